"""Merged models, against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import merging

RNG = np.random.default_rng(0)
BASE, A, B = (
    {'x': {'w': RNG.normal(size=(4, 5)).astype(np.float32)}, 'b': RNG.normal(size=7).astype('f')} for _ in '012'
)


def leaves(*trees):
  return zip(*(map(lambda x: np.asarray(x, np.float64), jax.tree.leaves(tree)) for tree in trees))


class TestLinear:

  def test_is_the_weighted_sum_in_float32(self):
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), A)
    for found, a, b in leaves(merging.linear([low, B], [0.7, 0.3]), low, B):
      np.testing.assert_allclose(found, 0.7 * a + 0.3 * b, rtol=1e-6, atol=1e-6)


class TestExtrapolate:

  def test_goes_beyond_the_tuned_model_and_stays_with_0(self):
    for found, base, a in leaves(merging.extrapolate(BASE, A, 0.5), BASE, A):
      np.testing.assert_allclose(found, a + 0.5 * (a - base), rtol=1e-5, atol=1e-5)
    for found, a in leaves(merging.extrapolate(BASE, A, 0.0), A):
      np.testing.assert_allclose(found, a, atol=1e-6)


class TestSlerp:

  @pytest.mark.parametrize('share', [0.0, 0.25, 1.0])
  def test_is_on_the_arc_of_the_differences(self, share):
    for found, base, a, b in leaves(merging.slerp(BASE, A, B, share), BASE, A, B):
      d1, d2 = a - base, b - base
      w = np.arccos((d1 * d2).sum() / np.linalg.norm(d1) / np.linalg.norm(d2))
      wanted = base + np.sin((1 - share) * w) / np.sin(w) * d1 + np.sin(share * w) / np.sin(w) * d2
      np.testing.assert_allclose(found, wanted, atol=1e-5)

  def test_of_parallel_differences_is_a_straight_line(self):
    double = jax.tree.map(lambda base, a: 2 * a - base, BASE, A)
    for found, base, a in leaves(merging.slerp(BASE, A, double, 0.5), BASE, A):
      np.testing.assert_allclose(found, base + 1.5 * (a - base), atol=1e-4)
    for found, base in leaves(merging.slerp(BASE, BASE, BASE, 0.5), BASE):
      np.testing.assert_array_equal(found, base)


class TestTies:

  def test_trims_elects_and_averages(self):
    base = {'w': np.zeros(5, np.float32)}
    a, b = ({'w': np.array(x, np.float32)} for x in ([3.0, -2.0, 0.1, 1.0, 0.2], [1.0, 4.0, -0.3, 0.2, 2.0]))
    # Of five entries three stay: a's 3, -2, 1 and b's 1, 4, 2; the signs of their sums are +, +, 0, +, +.
    found = merging.ties(base, [a, b], density=0.6, scale=0.5, weights=[1.0, 1.0])
    np.testing.assert_allclose(found['w'], 0.5 * np.array([2.0, 4.0, 0.0, 1.0, 2.0]))

  def test_of_one_model_that_is_kept_whole_is_that_model(self):
    for found, a in leaves(merging.ties(BASE, [A], density=1.0, scale=1.0, weights=[1.0]), A):
      np.testing.assert_allclose(found, a, atol=1e-6)
