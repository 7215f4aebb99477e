"""Rules against numbers worked out by hand."""

import math

import pytest

from jaxalign.rewards import rules


class TestVader:

  def test_squashes_the_sum_of_valences(self):
    # The lexicon gives 'happy' 2.7 and 'sad' -2.1; the compound score is x / sqrt(x^2 + 15), to four places.
    for text, valence in [('a happy cat', 2.7), ('a sad cat', -2.1), ('happy and sad', 2.7 - 2.1)]:
      assert rules.vader([text]) == [pytest.approx(valence / math.sqrt(valence**2 + 15), abs=1e-4)]

  def test_turns_what_is_negated_by_the_factor_of_the_paper(self):
    x = 2.7 * -0.74
    assert rules.vader(['not happy']) == [pytest.approx(x / math.sqrt(x**2 + 15), abs=1e-4)]

  def test_scores_each_text_by_itself(self):
    assert rules.vader(['', 'the cat', 'happy']) == [0.0, 0.0, rules.vader(['happy'])[0]]
    assert rules.vader([]) == []


class TestDistinct:

  def test_is_the_share_of_n_grams_that_differ(self):
    assert rules.distinct(2, [[1, 2, 3], [1, 2, 4]]) == 3 / 4
    assert rules.distinct(1, [[1, 1, 1, 1]]) == 1 / 4
    assert rules.distinct(2, ['abab']) == 2 / 3

  def test_does_not_join_sequences(self):
    assert rules.distinct(2, [[1], [2]]) == 0.0

  def test_of_nothing_is_zero(self):
    assert rules.distinct(2, []) == 0.0
