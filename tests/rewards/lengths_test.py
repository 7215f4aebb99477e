"""Rewards of length and of repetition, against numbers worked out by hand."""

import pytest

from jaxalign import types
from jaxalign.rewards import lengths


class TestNearLength:

  def test_is_a_ramp_around_the_length(self):
    texts = ['a b c d', 'a b c', 'a b', 'a', '', 'a b c d e f g']
    found = lengths.near_length(texts, wanted_length=4, tolerated=2)
    assert found == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]

  def test_counts_what_it_is_told(self):
    assert lengths.near_length(['ab c'], wanted_length=4, tolerated=1, unit='characters') == [1.0]
    assert lengths.near_length(['ab c'], [[1, 2, 3]], wanted_length=4, tolerated=2, unit='tokens') == [0.5]

  @pytest.mark.parametrize(
      ('options', 'said'),
      [
          ({'tolerated': 0}, 'tolerated=0'),
          ({'tolerated': 1, 'unit': 'lines'}, 'one of words, characters, tokens'),
          ({'tolerated': 1, 'unit': 'tokens'}, 'give --tokenizer'),
      ],
  )
  def test_refuses_what_it_cannot_count(self, options, said):
    with pytest.raises(types.UsageError, match=said):
      lengths.near_length(['a'], wanted_length=1, **options)


class TestOverlong:

  def test_falls_over_the_last_tokens_before_the_limit(self):
    ids = [range(n) for n in (0, 6, 7, 8, 10, 11, 50)]
    found = lengths.overlong(ids, max_tokens=10, cache_tokens=4)
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]

  @pytest.mark.parametrize('cache', [0, 11])
  def test_refuses_a_cache_that_does_not_fit(self, cache):
    with pytest.raises(types.UsageError, match='is not from 1 to max_tokens=10'):
      lengths.overlong([], max_tokens=10, cache_tokens=cache)


class TestRepetition:

  def test_is_the_share_of_n_grams_that_come_again(self):
    # 'a b', 'b a', 'a b', 'b a': 2 of 4 are distinct.
    assert lengths.repetition(['a b A b a', 'a b c', 'a', ''], ngram_size=2) == [-0.5, 0.0, 0.0, 0.0]
    assert lengths.repetition(['x ' * 11], max_penalty=-0.5) == [pytest.approx(-0.5 * 8 / 9)]

  @pytest.mark.parametrize('options', [{'ngram_size': 0}, {'max_penalty': 1.0}])
  def test_refuses_other_options(self, options):
    with pytest.raises(types.UsageError, match='repetition: '):
      lengths.repetition(['a'], **options)
