"""Which token a uniform number chooses, against probabilities in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.generation import next_token

LOGITS = np.random.default_rng(0).normal(size=20) * 2
N = 2000


def softmax(x):
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def kept(p, keep):
  return np.where(keep, p, 0) / p[keep].sum()


def nucleus(p, share):
  """The fewest tokens that reach it."""
  order = np.argsort(-p)
  return np.isin(np.arange(len(p)), order[: np.argmax(np.cumsum(p[order]) >= share) + 1])


def of_k(p, k):
  return kept(p, p >= np.sort(p)[-k])


CASES = [
    ({}, lambda p: p),
    ({'temperature': 2.0}, lambda p: kept(p**0.5, p > 0)),
    ({'top_k': 3}, lambda p: of_k(p, 3)),
    ({'top_p': 0.6}, lambda p: kept(p, nucleus(p, 0.6))),
    ({'min_p': 0.2}, lambda p: kept(p, p >= 0.2 * p.max())),
    ({'top_k': 5, 'top_p': 0.6}, lambda p: kept(of_k(p, 5), nucleus(of_k(p, 5), 0.6))),
    ({'top_k': 40}, lambda p: p),
]


class TestChoose:

  @pytest.mark.parametrize('columns', [20, 256, 1280])  # one block, few and more than k, with padding
  @pytest.mark.parametrize('options,wanted', CASES, ids=[str(options) for options, _ in CASES])
  def test_chooses_each_token_as_often_as_it_is_probable(self, options, wanted, columns):
    rows = np.full((N, columns), -1e30, np.float32)
    places = np.arange(20) * (columns // 20)
    rows[:, places] = LOGITS
    uniform = ((np.arange(N) + 0.5) / N).astype(np.float32)
    token, logp = jax.jit(next_token.choose, static_argnums=0)(next_token.Rule(**options), rows, uniform)
    p = wanted(softmax(LOGITS))
    share = np.bincount(np.asarray(token), minlength=columns) / N
    np.testing.assert_allclose(share[places], p, atol=1.5 / N)
    np.testing.assert_allclose(share.sum(), share[places].sum())
    assert (np.diff(token) >= 0).all()  # in the order of ids
    np.testing.assert_allclose(logp, np.log(p[np.searchsorted(places, token)]), atol=1e-4)

  def test_never_chooses_what_is_impossible(self):
    rows = jnp.where(jnp.arange(256)[None] < 200, jnp.zeros((2, 256)), -1e30)
    token, _ = next_token.choose(next_token.Rule(), rows, jnp.array([0.0, 1 - 2.0**-24]))
    np.testing.assert_array_equal(token, [0, 199])
    # What is left of a share when blocks before are taken off may be rounded to the whole of its block, or beyond.
    place, _ = next_token._passes(jnp.array([[1.0, 2.0, 2.0]] * 2), jnp.array([1.0, 1.0000001]))
    np.testing.assert_array_equal(place, [1, 1])

  def test_of_temperature_zero_takes_the_first_of_the_most_probable(self):
    token, logp = next_token.choose(next_token.Rule(temperature=0.0), jnp.array([[0.0, 3.0, 3.0]]), jnp.array([0.9]))
    assert (int(token[0]), float(logp[0])) == (1, 0.0)


class TestRule:

  def test_penalty_lowers_what_was_seen(self):
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    found = next_token.penalise(next_token.Rule(repetition_penalty=4.0), logits, seen)
    np.testing.assert_allclose(found, [[0.5, -8.0, 2.0, -2.0]])

  @pytest.mark.parametrize(
      'option', [{'temperature': -1}, {'top_k': -1}, {'top_p': 0}, {'min_p': 1.5}, {'repetition_penalty': 0}], ids=str
  )
  def test_says_which_number_has_no_meaning(self, option):
    (name,) = option
    with pytest.raises(types.UsageError, match=name):
      next_token.Rule(**option).check()
