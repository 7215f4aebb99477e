"""Tests of the losses on demonstrations."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import types
from jaxalign.losses import supervised


def _cross_entropy(logps_BT, **options):
  return supervised.cross_entropy(types.Stats(logps_BT=jnp.asarray(logps_BT)), types.Stats(), {}, **options)


class TestCrossEntropy:

  def test_is_minus_the_log_probability_of_each_target(self):
    probabilities_BT = np.array([[0.5, 0.25, 1.0], [1e-3, 0.9, 0.1]])
    out = _cross_entropy(np.log(probabilities_BT).astype(np.float32))
    gold_BT = [[0.693147181, 1.386294361, 0.0], [6.907755279, 0.105360516, 2.302585093]]
    np.testing.assert_allclose(out.per_item, gold_BT, rtol=1e-6)

  def test_is_log_v_for_uniform_logits(self):
    out = _cross_entropy(jax.nn.log_softmax(jnp.zeros((2, 3, 50)))[..., 7])
    np.testing.assert_allclose(out.per_item, np.full((2, 3), np.log(50)), rtol=1e-6)

  def test_a_step_downhill_raises_every_target_alike(self):
    grads_BT = jax.grad(lambda x: jnp.sum(_cross_entropy(x).per_item))(-np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(grads_BT, -np.ones((2, 3)))

  def test_is_finite_at_extreme_log_probabilities(self):
    out = _cross_entropy(np.array([[-1e4, 0.0]], np.float32))
    np.testing.assert_array_equal(out.per_item, [[1e4, 0.0]])

  def test_passes_the_loss_state_through(self):
    assert _cross_entropy(np.zeros((1, 1), np.float32), state={'mean': 3}).state == {'mean': 3}
