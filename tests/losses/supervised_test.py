"""Tests of the losses on demonstrations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import types
from jaxalign.losses import supervised
from tests.losses import world as world_lib


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


class TestDft:

  def dft(self, logps_BT):
    return supervised.dft(types.Stats(logps_BT=jnp.asarray(logps_BT)), types.Stats(), {})

  def test_is_minus_p_log_p(self):
    p_BT = np.array([[0.5, 0.25, 1.0], [1e-3, 0.9, 0.1]])
    np.testing.assert_allclose(self.dft(np.log(p_BT).astype(np.float32)).per_item, -p_BT * np.log(p_BT), rtol=1e-5)

  def test_has_the_gradient_of_minus_p(self):
    logps_BT = np.array([[-0.1, -3.0, -40.0]], np.float32)
    grads_BT = jax.grad(lambda x: jnp.sum(self.dft(x).per_item))(logps_BT)
    np.testing.assert_allclose(grads_BT, -np.exp(logps_BT), rtol=1e-6)


class TestUnlikelihood:

  def unlikelihood(self, w, policy_BT=None, alpha=0.5):
    policy, _ = w.stats(policy_BT)
    return supervised.unlikelihood(policy, types.Stats(), w.given(), alpha=alpha)

  def test_is_the_likelihood_of_desirable_tokens_and_the_unlikelihood_of_others(self):
    w = world_lib.world(groups=4, size=1)
    total = 0.0
    for response, desirable in zip(w.policy, w.desirable):
      lp = response[0].astype(np.float64)
      total += -lp.sum() if desirable else -0.5 * np.log(1 - np.exp(lp)).sum()
    per_token_BT = np.asarray(self.unlikelihood(w).per_item)
    np.testing.assert_allclose((per_token_BT * w.batch.mask_BT).sum(), total, rtol=1e-5)
    assert 0 < w.desirable.sum() < 4

  def test_is_finite_where_a_token_is_certain(self):
    w = world_lib.world(groups=4, size=1)
    loss = lambda x: jnp.sum(self.unlikelihood(w, x).per_item * w.batch.mask_BT)
    value, slope = jax.value_and_grad(loss)(jnp.zeros_like(w.policy_BT))
    assert np.isfinite(value) and np.all(np.isfinite(slope))


class TestClassWeighted:

  def test_weighs_undesirable_responses_less(self):
    w = world_lib.world(groups=4, size=1)
    policy, _ = w.stats()
    per_token_BT = np.asarray(
        supervised.class_weighted(policy, types.Stats(), w.given(), undesirable_weight=0.1).per_item
    )
    wanted = sum(-x[0].astype(np.float64).sum() * (1 if good else 0.1) for x, good in zip(w.policy, w.desirable))
    np.testing.assert_allclose((per_token_BT * w.batch.mask_BT).sum(), wanted, rtol=1e-5)


class TestCringe:

  def test_is_likelihood_where_desirable_and_loses_against_the_rival_elsewhere(self):
    w = world_lib.world(groups=6, size=1)
    out = w.run(functools.partial(supervised.cringe, alpha=0.6)).per_item
    desirable = w.desirable
    rival_BT = w.dense_BT['rival']
    against_BT = np.where(rival_BT != 0, np.logaddexp(0, w.policy_BT.astype(np.float64) - rival_BT), 0.0)
    wanted = np.where(desirable > 0.5, -w.s[:, 0], 0.6 * world_lib.sums(w, against_BT)[:, 0])
    assert 0 < desirable.sum() < len(desirable)
    np.testing.assert_allclose(world_lib.sums(w, np.asarray(out))[:, 0], wanted, rtol=1e-5)


class TestQuark:

  def test_is_likelihood_and_the_divergence_of_each_token(self):
    w = world_lib.world(groups=6, size=1)
    out = w.run(functools.partial(supervised.quark, beta=0.3)).per_item
    np.testing.assert_allclose(out, -w.policy_BT.astype(np.float64) + 0.3 * w.dense_BT['kl'], rtol=1e-6)
