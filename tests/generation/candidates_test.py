"""Which of several candidates is kept."""

import math

import numpy as np
import pytest

from jaxalign import types
from jaxalign.generation import candidates

NAN = math.nan


def last_word(text):
  """An answer that is no number; some texts have none, and one is no text that can be read."""
  if text == 'broken':
    raise KeyError(text)
  if not text:
    raise ValueError('nothing')
  return [text.split()[-1]]  # equal, but not hashable


class TestBestOfN:

  @pytest.mark.parametrize(
      ('rewards', 'kept'), [([0.1, 3.0, -2.0], 1), ([1.0, 2.0, 2.0], 1), ([NAN, -5.0, NAN], 1), ([NAN, NAN], 0)]
  )
  def test_has_the_highest_reward(self, rewards, kept):
    assert candidates.best_of_n(np.array(rewards)) == kept


class TestMbr:

  @pytest.mark.parametrize(('beta', 'kept'), [(0.0, 2), (1.0, 2), (1.5, 0)])
  def test_weighs_reward_and_likeness(self, beta, kept):
    # Mean likenesses: (1 + 1 + 0) / 3 twice, and (0 + 0 + 1) / 3.
    tokens, rewards = [[1, 2], [2, 1], [7]], np.array([0.1, 0.0, 0.5])
    found = candidates.mbr(rewards, tokens, beta=beta, utility_fn=candidates.unigram_f1)
    assert found == kept == int(np.argmax(rewards + beta * np.array([2 / 3, 2 / 3, 1 / 3])))

  def test_leaves_what_has_no_reward(self):
    assert candidates.mbr(np.array([NAN, 0.0]), [[1], [2]], beta=9.0, utility_fn=candidates.rouge_l) == 1


class TestLikeness:

  @pytest.mark.parametrize(
      ('a', 'b', 'f1', 'rouge'),
      [
          ('', '', 1, 1),
          ('ab', '', 0, 0),
          ('abc', 'abc', 1, 1),
          ('aab', 'aba', 1, 2 / 3),
          ('axbyc', 'abc', 3 / 4, 3 / 4),
          ('aaab', 'ba', 2 / 3, 1 / 3),
      ],
  )
  def test_is_as_by_hand(self, a, b, f1, rouge):
    for x, y in ((a, b), (b, a)):
      assert candidates.unigram_f1(x, y) == pytest.approx(f1)
      assert candidates.rouge_l(x, y) == pytest.approx(rouge)


class TestVote:

  @pytest.mark.parametrize(
      ('texts', 'kept'),
      [
          (['so 3', 'it is 4', 'is 4.0', 'no idea', 'none', 'none'], 1),
          (['two: 2', '1', '1', '2'], 0),
          (['no', 'none'], 0),
          (['none', '7'], 1),
      ],
  )
  def test_keeps_the_first_of_the_majority(self, texts, kept):
    assert candidates.vote(texts) == kept

  def test_takes_any_parser(self):
    own = f'{__file__}:last_word'
    assert candidates.vote(['', '', '', 'a cat', 'a dog', 'the dog'], parser=own) == 4
    with pytest.raises(types.RunError, match=r"on 'broken': KeyError: 'broken' \(candidates_test.py:\d+: raise"):
      candidates.vote(['broken'], parser=own)

  @pytest.mark.parametrize('parser', ['number', 'nothing.of.this:name', 'jaxalign.rewards.answers:nothing'])
  def test_names_a_parser_that_is_not_there(self, parser):
    with pytest.raises(types.UsageError, match=f"candidates.vote.parser = '{parser}': "):
      candidates.vote(['1'], parser=parser)


class TestBound:

  def test_is_the_divergence_of_the_best_of_n_of_many_equally_likely(self):
    # Of m distinct rewards, the best of n is the i-th with probability (i / m)^n - ((i - 1) / m)^n.
    m, n = 20000, 4
    p = np.diff((np.arange(m + 1) / m) ** n)
    assert candidates.bound(candidates.best_of_n, n) == pytest.approx(np.sum(p * np.log(p * m)), abs=1e-3)

  def test_of_choices_by_more_than_rewards_is_larger(self):
    assert candidates.bound(candidates.mbr, 4) == candidates.bound(candidates.vote, 4) == pytest.approx(math.log(4))
    assert candidates.bound(candidates.vote, 1) == 0
