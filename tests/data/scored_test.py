"""Comparisons: what a reward model reads of a pair, and where."""

import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import scored
from jaxalign.data import tokenizers


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


class TestComparison:

  def test_reads_each_response_to_its_end_and_counts_only_there(self, letters):
    record = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'bb', 'margin': 2.0}
    group = scored.comparison(record, letters, row_length=20)
    assert group.labels == {'margin': 2.0}
    for sequence, response in zip(group.sequences, ('a', 'bb')):
      inputs, counts = sequence.ids[:-1], sequence.mask[1:]
      assert inputs.tolist() == [0, *letters.encode('ab' + response), 1]
      assert np.flatnonzero(counts).tolist() == [len(inputs) - 1]
      assert not sequence.mask[0]

  def test_ends_with_the_response_where_it_was_cut_off(self, letters):
    record = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'bb', 'append_eos': False}
    group = scored.comparison(record, letters, row_length=20)
    assert [s.ids[:-1][-1] for s in group.sequences] == letters.encode('ab')

  @pytest.mark.parametrize('row_length', [4, 5, 6])
  def test_fits_the_row_with_the_slot_that_it_adds(self, letters, row_length):
    record = {'prompt': 'ababab', 'chosen': 'a', 'rejected': 'bb'}
    group = scored.comparison(record, letters, row_length=row_length)
    assert max(len(s.ids) - 1 for s in group.sequences) == row_length
    assert group.truncated
    assert [s.ids[-2] for s in group.sequences] == [1, 1]

  def test_drops_and_refuses_what_preference_does(self, letters):
    with pytest.raises(examples.Dropped, match='equal responses'):
      scored.comparison({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, letters, row_length=20)
    with pytest.raises(types.RunError, match='wanted prompt'):
      scored.comparison({'text': 'a'}, letters, row_length=20)


class TestResponses:

  def read(self, sequence):
    """Tokens after which there is a score."""
    return sequence.ids[:-1][sequence.mask[1:]].tolist()

  def test_are_scored_where_the_last_token_was_read_in_pairs_and_alone(self, letters):
    pair = scored.responses({'prompt': 'ab', 'chosen': 'a', 'rejected': 'bb'}, letters, row_length=20)
    assert pair.sequences[1].ids[:-1].tolist() == [0, *letters.encode('abbb'), 1]
    assert [self.read(s) for s in pair.sequences] == [[1], [1]]
    alone = scored.responses({'prompt': 'ab', 'completion': 'ba', 'append_eos': False}, letters, row_length=20)
    assert [self.read(s) for s in alone.sequences] == [letters.encode('a')]

  @pytest.mark.parametrize('column', ['samples', 'completions'])
  def test_are_those_of_a_list_in_order_whatever_else_there_is(self, letters, column):
    said = [{'role': 'assistant', 'content': 'b'}]
    record = {'prompt': 'ab', column: ['ba', 'a', 'bb', 'ba'], 'chosen': 'aa', 'rejected': 'bb', 'completion': 'bbb'}
    group = scored.responses(record, letters, row_length=20)
    assert [s.ids[:-1].tolist() for s in group.sequences] == [
        [0, *letters.encode('ab' + text), 1] for text in record[column]
    ]
    assert [self.read(s) for s in group.sequences] == [[1]] * 4
    tokens = scored.responses(record, letters, row_length=20, per='token').sequences
    assert [self.read(s) for s in tokens] == [[*letters.encode(text), 1] for text in record[column]]
    talk = {'prompt': [{'role': 'user', 'content': 'a'}], column: ['b', said]}
    one, other = scored.responses(talk, letters, row_length=60, template='hh').sequences
    assert one.ids.tolist() == other.ids.tolist()

  def test_of_a_list_stay_together(self, letters):
    record = {'prompt': 'abab', 'samples': ['a', 'b' * 9, ''], 'append_eos': True}
    group = scored.responses(record, letters, row_length=9)
    assert group.truncated and len(group.sequences) == 3
    assert [s.ids[-2] for s in group.sequences] == [1, *letters.encode('b'), 1]
    with pytest.raises(examples.Dropped, match='empty response'):
      scored.responses(record | {'append_eos': False}, letters, row_length=9)
    with pytest.raises(examples.Dropped, match='no response'):
      scored.responses(record | {'samples': []}, letters, row_length=9)

  @pytest.mark.parametrize(
      'change,said',
      [
          ({'prompt': None}, 'wanted prompt \\+ samples, found samples'),
          ({'samples': 'ab'}, 'column samples: a list of responses is wanted'),
          ({'samples': ['a', 3]}, 'column samples: int where text or a list of messages'),
          ({'completions': ['a']}, 'columns samples and completions: scores belong to one list'),
      ],
  )
  def test_refuse_lists_that_are_none(self, letters, change, said):
    with pytest.raises(types.RunError, match=said):
      scored.responses({'prompt': 'a', 'samples': ['b']} | change, letters, row_length=9)

  def test_are_scored_at_each_of_their_tokens(self, letters):
    group = scored.responses({'prompt': 'ab', 'completion': 'ba'}, letters, row_length=20, per='token')
    assert self.read(group.sequences[0]) == [*letters.encode('ba'), 1]

  def test_are_scored_at_the_end_of_each_step(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'bb\n', 'ab']}
    group = scored.responses(record, letters, row_length=20, per='step')
    (sequence,) = group.sequences
    assert sequence.ids[:-1].tolist() == [0, *letters.encode('aba\nbb\nab\n')]
    assert self.read(sequence) == 3 * letters.encode('\n')
    assert not group.truncated

  def test_leave_out_steps_behind_the_row(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'bb', 'ab']}
    group = scored.responses(record, letters, row_length=9, per='step')
    assert len(self.read(group.sequences[0])) == 2
    assert group.truncated
    with pytest.raises(examples.Dropped, match='the prompt and its first step are longer than a row'):
      scored.responses(record, letters, row_length=4, per='step')

  @pytest.mark.parametrize('row_length', [4, 5, 6])
  @pytest.mark.parametrize('per', ['response', 'token'])
  def test_fit_the_row(self, letters, row_length, per):
    group = scored.responses({'prompt': 'ababab', 'completion': 'bb'}, letters, row_length=row_length, per=per)
    assert len(group.sequences[0].ids) - 1 == row_length
    assert group.truncated

  @pytest.mark.parametrize(
      'record,said',
      [
          ({'prompt': 'a'}, 'wanted prompt \\+ completions'),
          ({'prompt': 'a', 'completions': 'b'}, 'column completions: a list of texts is wanted'),
          ({'prompt': 'a', 'completions': ['b', 3]}, 'column completions: a list of texts is wanted'),
          ({'prompt': 5, 'completions': ['b']}, 'column prompt: int where text or a list'),
          ({'prompt': 'a', 'completions': ['\ud800']}, 'half a character'),
      ],
  )
  def test_refuse_steps_that_are_none(self, letters, record, said):
    with pytest.raises(types.RunError, match=said):
      scored.responses(record, letters, row_length=9, per='step')


class TestPrefixes:

  def test_are_those_of_each_response_with_its_score(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'bab'], 'scores': [0.5, -2.0]}
    groups = scored.prefixes(record, letters, row_length=20)
    every = scored.responses({**record, 'scores': None}, letters, row_length=20, per='token').sequences
    for group, wanted, score in zip(groups, every, (0.5, -2.0), strict=True):
      (sequence,) = group.sequences
      np.testing.assert_array_equal(sequence.ids, wanted.ids)
      np.testing.assert_array_equal(sequence.mask, wanted.mask)
      assert sequence.labels['reward'].tolist() == [score] * int(wanted.mask.sum())

  @pytest.mark.parametrize('scores', [[1.0], [0.0, 0.0], [0.0] * 19 + [1.0]])
  def test_are_of_all_responses_however_they_are_scored(self, letters, scores):
    record = {'prompt': 'ab', 'completions': ['ab'] * len(scores), 'scores': scores}
    groups = scored.prefixes(record, letters, row_length=20)
    assert [float(group.sequences[0].labels['reward'][0]) for group in groups] == scores

  def test_want_scores_and_responses(self, letters):
    with pytest.raises(types.RunError, match='prompt \\+ completions \\+ scores'):
      scored.prefixes({'prompt': 'ab', 'completions': ['a', 'b'], 'ranks': [1, 2]}, letters, row_length=20)
    with pytest.raises(examples.Dropped, match='no response'):
      scored.prefixes({'prompt': 'ab', 'completions': [], 'scores': []}, letters, row_length=20)


class TestSteps:

  def test_carry_a_label_where_each_has_been_read(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'bb\n', 'ab'], 'labels': [True, 0.25, False]}
    group = scored.steps(record, letters, row_length=20)
    (sequence,) = group.sequences
    unlabelled = scored.responses(record, letters, row_length=20, per='step').sequences[0]
    np.testing.assert_array_equal(sequence.ids, unlabelled.ids)
    np.testing.assert_array_equal(sequence.mask, unlabelled.mask)
    assert sequence.labels['step'].tolist() == [1, 0.25, 0]
    assert unlabelled.labels == group.labels == {}

  def test_lose_the_labels_of_those_that_do_not_fit(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'bb', 'ab'], 'labels': [True, False, True]}
    group = scored.steps(record, letters, row_length=9)
    assert group.sequences[0].labels['step'].tolist() == [1, 0]
    assert group.truncated

  @pytest.mark.parametrize(
      'labels,said',
      [
          (None, 'wanted prompt \\+ completions \\+ labels'),
          ([True], 'column labels: 1 values where a list of 2 is wanted'),
          ('yes', 'column labels: str where a list of 2 is wanted'),
          ([True, 'no'], "column labels: item 1 is 'no'; true, false, or a number from 0 to 1"),
          ([True, 2], 'column labels: item 1 is 2; true, false, or a number'),
          ([float('nan'), 1], 'column labels: item 0 is nan'),
      ],
  )
  def test_refuse_labels_that_are_none(self, letters, labels, said):
    with pytest.raises(types.RunError, match=said):
      scored.steps({'prompt': 'a', 'completions': ['b', 'a'], 'labels': labels}, letters, row_length=20)


class TestAttributes:
  NAMES = 'help', 'tone'

  def read(self, letters, **record):
    record = {'prompt': 'ab', 'completion': 'ba'} | record
    return scored.attributes(record, letters, row_length=20, attributes=self.NAMES)

  @pytest.mark.parametrize('missing', [None, float('nan'), np.float32('nan')])
  def test_are_labels_and_not_a_number_where_they_are_missing(self, letters, missing):
    group = self.read(letters, help=3, tone=missing)
    assert list(group.labels) == ['help', 'tone']
    assert group.labels['help'] == 3.0 and np.isnan(group.labels['tone'])
    (sequence,) = group.sequences
    assert sequence.ids[:-1].tolist() == [0, *letters.encode('abba'), 1]
    assert np.flatnonzero(sequence.mask[1:]).tolist() == [5]

  def test_are_wanted_as_columns_of_numbers_and_not_all_missing(self, letters):
    with pytest.raises(examples.Dropped, match='no rating'):
      self.read(letters, help=None, tone=None)
    with pytest.raises(types.RunError, match='column tone is missing'):
      self.read(letters, help=1)
    with pytest.raises(types.RunError, match="column tone: 'good' where a finite number is wanted"):
      self.read(letters, help=1, tone='good')

  def test_leave_room_for_the_slot_that_is_added(self, letters):
    record = {'prompt': 'ababab', 'completion': 'bb', 'help': 1, 'tone': 2}
    group = scored.attributes(record, letters, row_length=6, attributes=self.NAMES)
    assert len(group.sequences[0].ids) - 1 == 6 and group.truncated


class TestClassified:

  def read(self, letters, **record):
    return scored.classified({'prompt': 'ab', 'completion': 'ba'} | record, letters, row_length=20, classes=3)

  def test_carries_the_class(self, letters):
    group = self.read(letters, **{'class': 2})
    assert group.labels == {'class': 2.0}
    assert np.flatnonzero(group.sequences[0].mask[1:]).tolist() == [5]

  @pytest.mark.parametrize(
      'label,said',
      [
          (None, 'wanted prompt \\+ completion \\+ class'),
          (3, 'column class: 3 where a finite number from 0 to 2'),
          (-1, 'column class: -1 where a finite number from 0 to 2'),
          (0.5, 'column class: 0.5 where a whole number is wanted'),
      ],
  )
  def test_refuses_what_is_no_class(self, letters, label, said):
    with pytest.raises(types.RunError, match=said):
      self.read(letters, **{'class': label})
