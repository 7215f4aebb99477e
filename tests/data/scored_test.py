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
