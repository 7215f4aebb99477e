"""Examples of other feedback than pairs, and what becomes of what."""

import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import tokenizers

LIST = {'prompt': 'ab', 'completions': ['a', 'b', 'aa', 'bb'], 'scores': [0.1, 0.9, 0.5, 0.5]}


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


@pytest.fixture
def said(letters):
  """The text that is learned of a sequence, without its EOS."""
  return lambda sequence: letters.decode(sequence.ids[sequence.mask].tolist())


class TestBinary:

  @pytest.mark.parametrize('label,wanted', [(True, 1.0), (False, 0.0), (1, 1.0), (0.0, 0.0)])
  def test_is_a_response_and_whether_it_is_desirable(self, letters, said, label, wanted):
    (group,) = feedback.binary({'prompt': 'ab', 'completion': 'ba', 'label': label}, letters, row_length=20)
    assert group.labels == {'desirable': wanted}
    assert [said(s) for s in group.sequences] == ['ba']

  def test_takes_both_responses_of_a_pair(self, letters, said):
    groups = feedback.binary({'prompt': 'ab', 'chosen': 'a', 'rejected': 'b'}, letters, row_length=20)
    assert [(said(g.sequences[0]), g.labels['desirable']) for g in groups] == [('a', 1.0), ('b', 0.0)]
    assert all(len(g.sequences) == 1 for g in groups)

  @pytest.mark.parametrize('label', ['yes', 0.5, None, [1]])
  def test_refuses_labels_that_are_none(self, letters, label):
    record = {'prompt': 'ab', 'completion': 'ba', 'label': label}
    with pytest.raises(types.RunError, match='column label: .* where true or false is wanted|a column is missing'):
      feedback.binary(record, letters, row_length=20)


class TestMismatched:

  def test_puts_the_response_to_another_prompt_behind_each(self, letters, said):
    other = {'prompt': 'bb', 'completion': 'bbb', 'label': True}
    record = {'prompt': 'ab', 'completion': 'ba', 'label': False, feedback.OTHER: other}
    (group,) = feedback.mismatched(record, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['ba', 'bbb']
    assert all(s.ids[:3].tolist() == [0, *letters.encode('ab')] for s in group.sequences)
    assert group.labels == {'desirable': 0.0}

  def test_does_so_for_both_sides_of_pairs_text_or_talk(self, letters, said):
    pair = {
        'prompt': 'ab',
        'chosen': 'a',
        'rejected': 'b',
        feedback.OTHER: {'prompt': 'a', 'chosen': 'c', 'rejected': 'd'},
    }
    groups = feedback.mismatched(pair, letters, row_length=20)
    assert [([said(s) for s in g.sequences], g.labels['desirable']) for g in groups] == [
        (['a', 'c'], 1.0),
        (['b', 'd'], 0.0),
    ]
    talk = lambda a, b: [{'role': 'user', 'content': a}, {'role': 'assistant', 'content': b}]
    record = {'chosen': talk('q', 'x'), 'rejected': talk('q', 'y')}
    record[feedback.OTHER] = {'chosen': talk('p', 'v'), 'rejected': talk('p', 'w')}
    first, second = feedback.mismatched(record, letters, row_length=60)
    assert [[said(s).strip() for s in g.sequences] for g in (first, second)] == [['x', 'v'], ['y', 'w']]

  def test_takes_whole_conversations_apart_beside_a_prompt_too(self, letters, said):
    talk = lambda a, b: [{'role': 'user', 'content': a}, {'role': 'assistant', 'content': b}]
    record = {'prompt': 'q', 'chosen': talk('q', 'x'), 'rejected': talk('q', 'y')}
    record[feedback.OTHER] = {'prompt': 'p', 'chosen': talk('p', 'v'), 'rejected': talk('p', 'w')}
    groups = feedback.mismatched(record, letters, row_length=60)
    assert [[said(s).strip() for s in g.sequences] for g in groups] == [['x', 'v'], ['y', 'w']]
    for one in groups:
      assert len({tuple(s.ids[: one.prompt_tokens].tolist()) for s in one.sequences}) == 1
      assert 'q' in letters.decode(one.sequences[1].ids[: one.prompt_tokens].tolist())

  def test_keeps_a_response_that_equals_the_other(self, letters, said):
    other = {'prompt': 'bb', 'completion': 'ba', 'label': True}
    record = {'prompt': 'ab', 'completion': 'ba', 'label': False, feedback.OTHER: other}
    (group,) = feedback.mismatched(record, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['ba', 'ba']

  def test_wants_another_prompt(self, letters):
    record = {'prompt': 'ab', 'completion': 'ba', 'label': False}
    with pytest.raises(feedback.SamePrompt):
      feedback.mismatched(record | {feedback.OTHER: record}, letters, row_length=20)

  def test_says_what_is_missing(self, letters):
    with pytest.raises(types.RunError, match='recipe.Recipe.mismatched = True'):
      feedback.mismatched({'prompt': 'ab', 'completion': 'ba', 'label': True}, letters, row_length=20)
    record = {'text': 'ab', feedback.OTHER: {'text': 'a'}}
    with pytest.raises(types.RunError, match='a column is missing: wanted prompt'):
      feedback.mismatched(record, letters, row_length=20)


class TestRanked:

  def test_is_a_list_with_a_score_each(self, letters, said):
    group = feedback.ranked(LIST, letters, row_length=20)
    assert [said(s) for s in group.sequences] == LIST['completions']
    assert group.labels == {'score': LIST['scores']}

  def test_reads_samples_as_it_does_completions(self, letters):
    record = {'samples' if name == 'completions' else name: value for name, value in LIST.items()}
    assert repr(feedback.ranked(record, letters, row_length=20)) == repr(feedback.ranked(LIST, letters, row_length=20))
    renamed = feedback.ranked(record, letters, row_length=20, columns={'completions': 'samples'})
    assert repr(renamed) == repr(feedback.ranked(LIST, letters, row_length=20))

  def test_takes_ranks_of_which_1_is_the_best(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'b'], 'ranks': [2, 1]}
    assert feedback.ranked(record, letters, row_length=20).labels == {'score': [-2.0, -1.0]}

  def test_keeps_the_best_the_worst_and_some_between(self, letters, said):
    group = feedback.ranked(LIST, letters, row_length=20, most=3)
    assert len(group.sequences) == 3
    assert {'a', 'b'} <= {said(s) for s in group.sequences}
    assert sorted(group.labels['score'])[::2] == [0.1, 0.9]

  def test_cuts_all_responses_alike(self, letters):
    record = {'prompt': 'abab' * 4, 'completions': ['a', 'b' * 9], 'scores': [1, 2]}
    group = feedback.ranked(record, letters, row_length=16)
    short, long = group.sequences
    assert len(long.ids) - 1 == 16 and group.truncated
    assert short.ids[: group.prompt_tokens].tolist() == long.ids[: group.prompt_tokens].tolist()
    assert group.prompt_tokens == int(np.argmax(short.mask)) == int(np.argmax(long.mask))

  def test_reads_renamed_columns(self, letters):
    record = {'p': 'ab', 'c': ['a', 'b'], 's': [1, 2], 'fin': False}
    columns = {'prompt': 'p', 'completions': 'c', 'scores': 's', 'append_eos': 'fin'}
    group = feedback.ranked(record, letters, row_length=20, columns=columns)
    assert [s.ids[-1] for s in group.sequences] == letters.encode('ab')

  @pytest.mark.parametrize('change', [{'completions': ['a'], 'scores': [1]}, {'scores': [2, 2, 2, 2]}])
  def test_drops_what_cannot_be_ranked(self, letters, change):
    with pytest.raises(examples.Dropped, match='nothing to rank'):
      feedback.ranked(LIST | change, letters, row_length=20)

  @pytest.mark.parametrize(
      'change,said',
      [
          ({'scores': [1, 2]}, 'column scores: 2 values where a list of 4 is wanted'),
          ({'scores': [1, 2, 3, 'x']}, "column scores: 'x' where a finite number is wanted"),
          ({'scores': [1, 2, 3, float('nan')]}, 'column scores: nan where a finite number'),
          ({'scores': None}, 'wanted prompt \\+ completions \\+ scores or prompt \\+ completions \\+ ranks'),
          ({'completions': 'ab'}, 'column completions: a list of responses is wanted'),
          ({'samples': ['a', 'b', 'c', 'd']}, 'columns samples and completions: scores belong to one list'),
          ({'completions': None, 'samples': ['a'], 'scores': None}, 'wanted prompt \\+ samples \\+ scores'),
      ],
  )
  def test_refuses_lists_that_are_none(self, letters, change, said):
    with pytest.raises(types.RunError, match=said):
      feedback.ranked(LIST | change, letters, row_length=20)


class TestPairsOfList:

  def test_are_the_extremes_or_all_that_differ(self, letters, said):
    read = lambda groups: [(said(g.sequences[0]), said(g.sequences[1]), round(g.labels['margin'], 6)) for g in groups]
    assert read(feedback.pairs_of_list(LIST, letters, row_length=20)) == [('b', 'a', 0.8)]
    assert read(feedback.pairs_of_list(LIST, letters, row_length=20, which='all')) == [
        ('b', 'aa', 0.4),
        ('b', 'bb', 0.4),
        ('b', 'a', 0.8),
        ('aa', 'a', 0.4),
        ('bb', 'a', 0.4),
    ]
    with pytest.raises(types.UsageError, match="it is 'extremes' or 'all'"):
      feedback.pairs_of_list(LIST, letters, row_length=20, which='some')


class TestTriple:

  def test_is_a_pair_and_a_better_response(self, letters, said):
    record = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'b', 'gold': 'aaa'}
    group = feedback.triple(record, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['a', 'b', 'aaa']
    assert all(np.array_equal(s.ids[:3], group.sequences[0].ids[:3]) for s in group.sequences)

  def test_of_a_list_are_its_best_its_next_and_its_worst(self, letters, said):
    group = feedback.triple(LIST, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['aa', 'a', 'b']
    for change in {'completions': ['a', 'b'], 'scores': [1, 2]}, {'completions': ['a', 'b', 'c'], 'scores': [5, 1, 1]}:
      with pytest.raises(examples.Dropped, match='not three responses of different scores'):
        feedback.triple(LIST | change, letters, row_length=20)


class TestSelected:

  def test_is_the_best_response(self, letters, said):
    (group,) = feedback.selected(LIST, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['b'] and group.labels == {'score': 0.9}
    assert group.sequences[0].ids[-1] == letters.eos_id

  def test_are_those_that_reach_the_threshold_and_no_more_than_most(self, letters, said):
    read = lambda **options: [
        said(g.sequences[0]) for g in feedback.selected(LIST, letters, row_length=20, most=9, **options)
    ]
    assert read() == ['b', 'aa', 'bb', 'a']
    assert read(threshold=0.5) == ['b', 'aa', 'bb']
    with pytest.raises(examples.Dropped, match='no response with a score of 0.95 or more'):
      read(threshold=0.95)
    assert len(feedback.selected(LIST, letters, row_length=20, most=2)) == 2

  def test_takes_equal_texts_once_and_equal_scores_too(self, letters, said):
    record = {'prompt': 'ab', 'completions': ['a', 'a', 'b'], 'scores': [1, 1, 1], 'append_eos': False}
    groups = feedback.selected(record, letters, row_length=20, most=2)
    assert [said(g.sequences[0]) for g in groups] == ['a', 'b']
    assert groups[0].sequences[0].ids[-1] != letters.eos_id

  def test_writes_messages_by_the_template(self, letters, said):
    turn = lambda role, text: [{'role': role, 'content': text}]
    record = {'prompt': turn('user', 'q'), 'completions': [turn('assistant', 'x'), 'y'], 'ranks': [2, 1]}
    groups = feedback.selected(record, letters, row_length=60, template='hh', most=2)
    assert [said(g.sequences[0]).strip() for g in groups] == ['y', 'x']


class TestNegative:

  def test_is_the_rejected_response_before_samples(self, letters, said):
    record = {'prompt': 'ab', 'rejected': 'x', 'samples': ['a', 'x', 'b', 'c']}
    group = feedback.negative(record, letters, row_length=20, most=2)
    assert [said(s) for s in group.sequences] == ['x', 'a', 'b'] and group.labels == {}
    assert all(s.ids[:3].tolist() == [0, *letters.encode('ab')] for s in group.sequences)
    assert len(feedback.negative(record, letters, row_length=20).sequences) == 4

  def test_takes_a_rejected_conversation_apart(self, letters):
    turns = lambda said: [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': said}]
    pair = {'chosen': turns('a'), 'rejected': turns('x')}
    wanted = examples.preference(pair, letters, row_length=60, template='hh').sequences
    record = {'prompt': 'ab', 'rejected': turns('x'), 'samples': ['a']}
    found = feedback.negative(record, letters, row_length=60, template='hh').sequences
    for one, other in zip(found, wanted[::-1], strict=True):
      np.testing.assert_array_equal(one.ids, other.ids)
      np.testing.assert_array_equal(one.mask, other.mask)

  def test_of_a_list_is_its_worst_before_the_others(self, letters, said):
    group = feedback.negative(LIST | {'scores': [0.5, 0.1, 0.9, 0.7]}, letters, row_length=20)
    assert [said(s) for s in group.sequences] == ['b', 'a', 'aa', 'bb']
    record = {'prompt': 'ab', 'samples': ['a', 'b', 'bb'], 'scores': [2, 1, 3]}
    assert [said(s) for s in feedback.negative(record, letters, row_length=20).sequences] == ['b', 'a', 'bb']

  def test_drops_and_refuses_what_it_cannot_use(self, letters):
    record = {'prompt': 'ab', 'rejected': 'x', 'samples': ['x']}
    with pytest.raises(examples.Dropped, match='no sample that differs'):
      feedback.negative(record, letters, row_length=20)
    with pytest.raises(types.RunError, match='column samples: a list of responses is wanted'):
      feedback.negative(record | {'samples': 'abc'}, letters, row_length=20)
    with pytest.raises(types.RunError, match='wanted prompt \\+ rejected \\+ samples or prompt'):
      feedback.negative({'prompt': 'ab', 'rejected': 'x'}, letters, row_length=20)


class TestLabelsOfPairs:

  def test_are_what_the_record_says(self, letters):
    record = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'b', 'chosen_score': 2, 'rejected_score': -1.5}
    group = examples.preference(record | {'probability': 0.75, 'group': 3}, letters, row_length=20)
    assert group.labels == {'margin': 0.0, 'score': [2.0, -1.5], 'probability': 0.75, 'group': 3.0}

  def test_are_refused_where_they_are_none(self, letters):
    record = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'b', 'probability': 1.5}
    with pytest.raises(types.RunError, match='column probability: 1.5 where a finite number from 0 to 1 is wanted'):
      examples.preference(record, letters, row_length=20)
