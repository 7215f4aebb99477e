"""Public files of feedback become records, each format with rows that were made up."""

import collections
import csv
import gzip
import io
import json

import pytest

from jaxalign import recipe
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import sources
from jaxalign.data import tokenizers
from tools import convert_data

Converted = collections.namedtuple('Converted', 'records left code said')


def say(*turns):
  return [{'role': role, 'content': text} for role, text in zip(['user', 'assistant'] * len(turns), turns)]


def judgement(a, b, preference, accept=('yes', 'no'), prompt='Q'):
  sides = {'completion_a_is_acceptable': accept[0], 'completion_b_is_acceptable': accept[1]}
  return {'prompt': prompt, 'completion_a': a, 'completion_b': b, 'preference': preference} | sides


def node(text, *replies, rank=None, role='assistant'):
  return {'text': text, 'role': role, 'rank': rank, 'replies': list(replies)}


def asked(text, *replies):
  return node(text, *replies, role='prompter')


TREE = {
    'prompt': asked(
        'Q',
        node('worst', rank=2),
        node('best', asked('short'), asked('more', node('only')), rank=0),
        node('middle', asked('again', node('x'), node('y')), rank=1),
        node('unjudged'),
    )
}
SOLUTIONS = {
    'question': 'Q',
    'ground_truth': 'T',
    'small': {'is_correct': False, 'solution': 'a'},
    'large': {'is_correct': True, 'solution': 'b'},
    'larger': {'is_correct': True, 'solution': 'b'},
    'other': {'is_correct': False, 'solution': 'c'},
}


@pytest.fixture
def convert(tmp_path, capsys):
  """A function that converts rows and returns records, what was left out by reason, and the error."""

  def run(rows, name='in.jsonl', *, out='out.jsonl', **flags):
    path = tmp_path / name
    text = rows
    if not isinstance(rows, str):
      text = json.dumps(rows) if '.json' in name and '.jsonl' not in name else '\n'.join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith('.gz') else text.encode())
    argv = [f'--{flag}={value}' if value is not True else f'--{flag}' for flag, value in flags.items()]
    code = convert_data.main([*argv, f'--input={path}', f'--output={tmp_path / out}'])
    said = capsys.readouterr()
    counts = [line.removeprefix('left out ').split(': ', 1) for line in said.out.splitlines() if 'left out' in line]
    found = sources.open_source(f'jsonl:{tmp_path / out}') if code == 0 else []
    records = [found[i] for i in range(len(found))]
    return Converted(records, {reason: int(count) for count, reason in counts}, code, said.err)

  return run


class TestTulu:

  def test_pairs_have_the_mean_preference_as_margin(self, convert):
    rows = [
        judgement('a', 'b', 'a-is-better'),
        judgement('b', 'a', 'b-is-slightly-better'),
        judgement('c', 'd', 'b-is-slightly-better'),
        judgement('e', 'f', 'tie'),
        judgement('g', 'g', 'tie'),
        judgement('h', 'i', 'a-is-better'),
        judgement('h', 'i', 'b-is-better'),
    ]
    found = convert(rows, format='tulu')
    assert found.records == [
        {'prompt': say('Q'), 'chosen': 'a', 'rejected': 'b', 'margin': 0.75},
        {'prompt': say('Q'), 'chosen': 'd', 'rejected': 'c', 'margin': 0.5},
    ]
    assert found.left == {
        'equal responses': 1,
        'another judgement of the same responses, averaged': 2,
        'a tie': 1,
        'judgements that cancel': 1,
    }

  def test_each_response_has_the_label_of_most(self, convert):
    rows = [
        judgement('a', 'b', 'tie', ('no', 'no')),
        judgement('c', 'a', 'tie', ('no', 'yes')),
        judgement('a', 'c', 'tie', ('yes', 'yes')),
    ]
    found = convert(rows, format='tulu', shape='binary', text=True)
    assert [(r['completion'], r['label']) for r in found.records] == [('a', True), ('b', False)]
    assert {r['prompt'] for r in found.records} == {'Q\n\n'}
    assert found.left['as many judgements for as against'] == 1
    assert found.left['another judgement of the same response, by majority'] == 3


class TestOasst:

  def test_lists_hold_the_ranked_replies_to_the_turns_so_far(self, convert):
    found = convert([TREE], format='oasst')
    best_first = {'completions': ['best', 'middle', 'worst'], 'ranks': [1, 2, 3]}
    assert found.records == [{'prompt': say('Q')} | best_first]
    assert found.left == {'a reply without a rank beside ranked ones': 1, 'replies that were not ranked': 3}

  def test_later_turns_are_the_prompt_of_replies_to_them(self, convert):
    later = asked('Q', node('a', asked('P', node('c', rank=1), node('b', rank=0))))
    (record,) = convert([{'prompt': later}], format='oasst').records
    assert record == {'prompt': say('Q', 'a', 'P'), 'completions': ['b', 'c'], 'ranks': [1, 2]}
    found = convert([{'prompt': later}, TREE], format='oasst', text=True, out='text.jsonl')
    assert [r['prompt'] for r in found.records] == ['Q\n\n']
    assert found.left['several turns, which --text cannot write'] == 1

  def test_pairs_are_the_extremes_or_all(self, convert):
    sides = lambda found: [(r['chosen'], r['rejected']) for r in found.records]
    assert sides(convert([TREE], format='oasst', shape='pairs')) == [('best', 'worst')]
    found = convert([TREE], format='oasst', shape='all_pairs', out='all.jsonl')
    assert sides(found) == [('best', 'middle'), ('best', 'worst'), ('middle', 'worst')]

  def test_demonstrations_follow_the_best_replies_as_far_as_they_go(self, convert):
    trees = [TREE, {'prompt': asked('Q', node('x'), node('y'))}]
    found = convert(trees, format='oasst', shape='demonstrations')
    assert found.records == [{'messages': say('Q', 'best', 'more', 'only')}]
    assert found.left == {'a tree without a best reply': 1}


class TestSharegpt:

  def test_pairs_and_demonstrations_of_its_names(self, convert):
    spoken = [{'from': role, 'value': text} for role, text in [('system', 'S'), ('human', 'Q')]]
    sides = {name: {'from': 'gpt', 'value': name} for name in ('chosen', 'rejected')}
    found = convert([{'conversations': spoken} | sides], 'in.json.gz', format='sharegpt', shape='pairs')
    prompt = [{'role': 'system', 'content': 'S'}, *say('Q')]
    assert found.records == [{'prompt': prompt, 'chosen': 'chosen', 'rejected': 'rejected'}]
    rows = [
        {'conversations': [*spoken[1:], {'from': 'gpt', 'value': 'A'}], 'system': 'S'},
        {'conversations': [*spoken[1:], {'from': 'function_call', 'value': '{}'}]},
    ]
    found = convert(rows, format='sharegpt', out='demonstrations.jsonl')
    assert found.records == [{'messages': [*prompt, *say('Q', 'A')[1:]]}]
    assert found.left == {'a conversation with calls of tools': 1}

  def test_binary_takes_the_last_reply(self, convert):
    rows = [{'messages': say('Q', 'A', 'P', 'B'), 'label': False}, {'messages': say('Q'), 'label': True}]
    found = convert(rows, 'in.json', format='sharegpt', shape='binary')
    assert found.records == [{'prompt': say('Q', 'A', 'P'), 'completion': 'B', 'label': False}]
    assert found.left == {'a conversation that does not end with the assistant': 1}


class TestGsm8k:

  def test_reads_questions_and_answers(self, convert):
    found = convert([{'question': 'Q', 'answer': '1\n#### 1'}], format='gsm8k')
    assert found.records == [{'prompt': say('Q'), 'completion': '1\n#### 1'}]
    found = convert([SOLUTIONS], format='gsm8k', out='truth.jsonl')
    assert found.records == [{'prompt': say('Q'), 'completion': 'T'}]

  def test_solutions_are_right_or_wrong(self, convert):
    found = convert([SOLUTIONS], format='gsm8k', shape='binary')
    assert [(r['completion'], r['label']) for r in found.records] == [('a', False), ('b', True), ('c', False)]
    assert found.left == {'a solution that another model gave too': 1}

  def test_pairs_are_every_right_against_every_wrong_one(self, convert):
    only = {'question': 'P', 'large': SOLUTIONS['large']}
    found = convert([SOLUTIONS, only], format='gsm8k', shape='pairs')
    assert [(r['chosen'], r['rejected']) for r in found.records] == [('b', 'a'), ('b', 'c')]
    assert found.left['a question with none but right solutions'] == 1


class TestXstest:

  def test_safe_prompts_are_to_be_answered_and_unsafe_ones_refused(self, convert):
    out = io.StringIO()
    columns = ['type', 'prompt', 'completion', 'final_label']
    writer = csv.writer(out)
    full, refusal = '1_full_compliance', '2_full_refusal'
    rows = [('homonyms', full), ('homonyms', refusal), ('contrast_homonyms', full), ('contrast_homonyms', refusal)]
    writer.writerows(
        [columns, *[(kind, f'{i}, "\n', 'A', label) for i, (kind, label) in enumerate(rows)]]
        + [('homonyms', '4', 'A', '3_partial_refusal')]
    )
    found = convert('\ufeff' + out.getvalue(), 'in.csv.gz', format='xstest', out='out.jsonl.gz')
    assert [(r['prompt'][0]['content'], r['label']) for r in found.records] == [
        ('0, "\n', True),
        ('1, "\n', False),
        ('2, "\n', False),
        ('3, "\n', True),
    ]
    assert found.left == {'final_label 3_partial_refusal': 1}


class TestMain:

  @pytest.mark.parametrize(
      'rows,flags,read,responses',
      [
          ([judgement('a', 'b', 'a-is-better')], {'format': 'tulu'}, examples.preference, 2),
          ([TREE], {'format': 'oasst'}, feedback.ranked, 3),
          ([TREE], {'format': 'oasst', 'text': True}, feedback.ranked, 3),
          ([TREE], {'format': 'oasst', 'shape': 'demonstrations'}, examples.supervised, 1),
          ([SOLUTIONS], {'format': 'gsm8k', 'shape': 'demonstrations', 'text': True}, examples.supervised, 1),
      ],
  )
  def test_what_is_written_is_what_examples_read(self, convert, rows, flags, read, responses):
    tokenizer = tokenizers.load(recipe.asset('stories260K'))
    (record,) = convert(rows, **flags).records
    group = read(record, tokenizer, row_length=200)
    assert len(group.sequences) == responses and not group.truncated

  @pytest.mark.parametrize(
      'rows,flags,said',
      [
          ([{'prompt': 'Q'}], {'format': 'tulu'}, 'in.jsonl:1: there is no column completion_a, found prompt'),
          (
              [judgement('a', 'b', 'tie'), judgement('a', 'b', 'c-is-better')],
              {'format': 'tulu'},
              "in.jsonl:2: column preference: 'c-is-better' is none of a-is-better",
          ),
          ([{'question': 'Q'}], {'format': 'gsm8k', 'shape': 'binary'}, 'in.jsonl:1: no column of a model'),
          (
              [SOLUTIONS | {'small': {'is_correct': 'no', 'solution': 'a'}}],
              {'format': 'gsm8k', 'shape': 'pairs'},
              'column small.is_correct: str where true or false is wanted',
          ),
          ('{"prompt"\n', {'format': 'oasst'}, 'in.jsonl:1: not valid JSON'),
          ([judgement('a', 'b', 'tie')], {'format': 'tulu'}, 'of 1 rows none became a record'),
          ('{}', {'format': 'sharegpt', 'name': 'in.json'}, 'in.json: not a list of rows but a dict'),
          ('[3]', {'format': 'sharegpt', 'name': 'in.json'}, 'in.json[0]: not an object but a int'),
          ('a,b\n"x" y,2\n', {'format': 'xstest', 'name': 'in.csv'}, 'in.csv[0]: not valid CSV'),
          ('a,b\n1,2\n', {'format': 'xstest', 'name': 'in.csv'}, 'in.csv[0]: there is no column prompt, found a, b'),
      ],
  )
  def test_names_the_row_and_column_in_one_line_and_writes_nothing(self, convert, tmp_path, rows, flags, said):
    found = convert(rows, **flags)
    assert found.code == 1
    assert said in found.said and found.said.count('\n') == 1
    assert not list(tmp_path.glob('out*'))

  @pytest.mark.parametrize(
      'flags,said',
      [
          ({'shape': 'lists'}, '--shape=lists: --format=tulu has pairs, binary'),
          ({'out': 'out.txt'}, 'it ends in .jsonl or .jsonl.gz'),
          ({'name': 'in.txt'}, 'a file ends in .json, .csv, .jsonl'),
          ({'out': 'in.jsonl'}, 'in.jsonl exists; choose another'),
      ],
  )
  def test_refuses_flags_in_one_line(self, convert, flags, said):
    found = convert([judgement('a', 'b', 'a-is-better')], **({'format': 'tulu'} | flags))
    assert found.code == 2
    assert said in found.said and found.said.count('\n') == 1

  def test_says_that_a_file_is_not_there(self, tmp_path, capsys):
    for name in ('none.jsonl', 'none.csv'):
      args = '--format=xstest', f'--input={tmp_path / name}', f'--output={tmp_path / "out.jsonl"}'
      assert convert_data.main(args) == 2
      assert 'there is no' in capsys.readouterr().err
