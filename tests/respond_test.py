"""What a model answers: where it stops, and to which records."""

import json
import sys
import types as pytypes

import pytest

from jaxalign import main
from jaxalign import recipe as recipe_lib
from jaxalign import respond
from jaxalign.data import feedback
from jaxalign.data import tokenizers

STORIES = 'builtin:stories260K'


class TestRespond:

  def said(self, capsys, *flags, code=0):
    args = 'jaxalign', '--mode=sample', f'--model={STORIES}', '--prompt=Once upon a time', '--max_new_tokens=24'
    assert main.main([*args, *flags]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err.splitlines()[-1]

  def test_leaves_out_the_text_that_ends_a_response(self, capsys):
    whole = self.said(capsys, '--top_k=20')
    end = whole.index(' little')
    assert self.said(capsys, '--top_k=20', '--stop=nothing', '--stop= little') == whole[:end] + '\n'

  def test_shows_the_same_text_as_it_is_written(self, capsys, monkeypatch):
    flags = '--min_p=0.1', '--repetition_penalty=1.3', '--cache_dtype=int8', '--stop= girl!'
    pieces, write = [], sys.stdout.write
    whole = self.said(capsys, *flags, '--nostream')
    monkeypatch.setattr(main.sys.stdout, 'write', lambda text: (pieces.append(text), write(text)))
    self.said(capsys, *flags, '--stream')
    assert ''.join(pieces) == whole
    assert len(pieces) > 3

  @pytest.mark.parametrize(
      'flags,said',
      [
          (['--top_p=2'], '--top_p = 2.0: it must be above 0 and at most 1'),
          (['--cache_dtype=int4'], '--cache_dtype = int4: it is int8 or left out'),
          (['--stop='], '--stop: an empty text'),
          (['--stream', '--samples_per_prompt=2'], '--stream shows one response'),
      ],
      ids=str,
  )
  def test_says_what_is_wrong_with_a_flag(self, capsys, flags, said):
    assert said in self.said(capsys, *flags, code=2)


class TestTeller:

  def test_holds_back_what_may_still_change(self):
    told = []
    teller = respond._Teller(told.append, ['\n\nB', 'xy'])
    for text in ('a', 'a\ufffd', 'aé\n', 'aé\n\n', 'aé\n\nA', 'aé\n\nAx', 'aé\n\nAxy'):
      teller.read(text)
    teller.end('aé\n\nA')
    assert told == ['a', 'é', '\n\nA']


class TestToRecords:

  def run(self, tmp_path, capsys, rows, *flags, code=0):
    path = tmp_path / 'in.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    args = 'jaxalign', '--mode=sample', f'--model={STORIES}', f'--data=jsonl:{path}', '--max_new_tokens=8', *flags
    assert main.main(args) == code
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()] if code == 0 else said.err.splitlines()[-1]

  def test_adds_samples_to_each_record(self, tmp_path, capsys):
    rows = [{'prompt': 'Once upon a time', 'rejected': ' no', 'id': 7}, {'prompt': 'Tom', 'rejected': ' no'}]
    found = self.run(tmp_path, capsys, rows, '--samples_per_prompt=3')
    assert [{**record, 'samples': 0} for record in found] == [
        {**row, 'samples': 0, 'append_eos': False} for row in rows
    ]
    assert all(len(record['samples']) == 3 for record in found)
    assert len(set(found[1]['samples'])) == 3
    # The first of each is what the prompt alone is continued with.
    args = 'jaxalign', '--mode=sample', f'--model={STORIES}', '--prompt=Once upon a time', '--max_new_tokens=8'
    assert main.main([*args, '--samples_per_prompt=2']) == 0
    assert capsys.readouterr().out == ''.join(f'Once upon a time{text}\n' for text in found[0]['samples'][:2])

  def test_is_what_negative_reads(self, tmp_path, capsys):
    rows = [{'prompt': 'Tom', 'chosen': ' yes', 'rejected': ' no'}]
    (record,) = self.run(tmp_path, capsys, rows, '--samples_per_prompt=3')
    tokenizer = tokenizers.load(recipe_lib.asset('stories260K'))
    group = feedback.negative(record, tokenizer, row_length=64)
    texts = [tokenizer.decode(s.ids[s.mask], continuation=True) for s in group.sequences]
    assert texts == [' no', *record['samples']]

  def test_keeps_the_end_where_all_came_to_theirs(self, tmp_path, capsys, monkeypatch):
    sampled = [pytypes.SimpleNamespace(ids=[5], finished=finished) for finished in (True, True, True, False)]
    monkeypatch.setattr(respond.sampling, 'sample', lambda *args, **options: sampled)
    found = self.run(tmp_path, capsys, [{'prompt': 'a'}, {'prompt': 'b'}], '--samples_per_prompt=2')
    assert [record.get('append_eos') for record in found] == [None, False]

  def test_takes_the_place_of_another_list(self, tmp_path, capsys):
    rows = [{'prompt': 'a', 'completions': ['b'], 'scores': [1], 'ranks': [1], 'append_eos': True, 'rejected': ' x'}]
    (record,) = self.run(tmp_path, capsys, rows, '--samples_per_prompt=2')
    assert set(record) == {'prompt', 'rejected', 'append_eos', 'samples'}

  def test_forgets_the_end_of_samples_before(self, tmp_path, capsys, monkeypatch):
    done = pytypes.SimpleNamespace(ids=[5], finished=True)
    monkeypatch.setattr(respond.sampling, 'sample', lambda *args, **options: [done, done])
    rows = [{'prompt': 'a', 'append_eos': False}, {'prompt': 'a', 'append_eos': False, 'samples': ['b'], 'scores': [1]}]
    found = self.run(tmp_path, capsys, rows)
    assert [record.get('append_eos') for record in found] == [False, None]
    assert 'scores' not in found[1]

  def test_refuses_weights(self, tmp_path, capsys):
    said = self.run(tmp_path, capsys, [{'prompt': 'a'}], '--data=jsonl:a:0.7,jsonl:b:0.3', code=2)
    assert 'every record is read once, so leave out the weight 0.7 of jsonl:a' in said

  def test_answers_messages(self, tmp_path, capsys):
    turns = [{'role': 'user', 'content': 'Hi'}]
    found = self.run(tmp_path, capsys, [{'prompt': turns}], '--temperature=0')
    said = self.run(tmp_path, capsys, [{'prompt': 'Hi'}], '--temperature=0', '--chat')
    assert said[0]['prompt'] == turns  # so that what is learned follows the prompt that was sampled behind
    plain = self.run(tmp_path, capsys, [{'prompt': 'Hi'}], '--temperature=0')
    assert found[0]['samples'] == said[0]['samples'] != plain[0]['samples']

  def test_leaves_out_prompts_without_room(self, tmp_path, capsys):
    found = self.run(tmp_path, capsys, [{'prompt': 'Tom ' * 600}, {'prompt': 'Tom'}])
    assert [record['prompt'] for record in found] == ['Tom']

  @pytest.mark.parametrize(
      'rows,said',
      [
          ([{'prompt': 'a'}, {'text': 'a'}], 'in.jsonl:2: a column is missing: wanted prompt, found text'),
          ([{'prompt': 3}], 'in.jsonl:1: column prompt: int where text or a list of messages is wanted'),
          ([{'prompt': 'a'}, {'prompt': [{'role': 'user', 'content': 'b'}]}], 'prompts are text and messages'),
          ([{'prompt': 'Tom ' * 600}], 'no record is left'),
      ],
  )
  def test_says_which_record_has_no_prompt(self, tmp_path, capsys, rows, said):
    assert said in self.run(tmp_path, capsys, rows, code=1 if said.startswith('in.jsonl') else 2)

  def test_takes_prompts_of_one_place(self, tmp_path, capsys):
    assert 'one of them' in self.run(tmp_path, capsys, [{'prompt': 'a'}], '--prompt=b', code=2)
