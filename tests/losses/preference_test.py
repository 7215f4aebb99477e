"""Tests of the losses on pairs, against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.losses import preference


def _pairs(groups=5, seed=0, scale=10.0):
  """Log-probabilities [G, 2] of policy and reference, as sums over tens of tokens are."""
  rng = np.random.default_rng(seed)
  policy_GK, ref_GK = (rng.normal(-40, scale, (groups, 2)).astype(np.float32) for _ in range(2))
  return policy_GK, ref_GK


def _dpo(policy_GK, ref_GK, **options):
  policy_GK, ref_GK = jnp.asarray(policy_GK), jnp.asarray(ref_GK)
  ref = types.Stats(logps_GK=ref_GK, logratios_GK=policy_GK - ref_GK)
  return preference.dpo(types.Stats(logps_GK=policy_GK), ref, {}, **options)


def _softplus(x):
  x = np.asarray(x, np.float64)
  return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


class TestDpo:

  @pytest.mark.parametrize('beta', [0.01, 0.1, 0.5])
  @pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.3])
  def test_equals_equation_7(self, beta, label_smoothing):
    policy_GK, ref_GK = _pairs()
    ratios_GK = policy_GK.astype(np.float64) - ref_GK
    margins_G = beta * (ratios_GK[:, 0] - ratios_GK[:, 1])
    gold_G = (1 - label_smoothing) * _softplus(-margins_G) + label_smoothing * _softplus(margins_G)
    out = _dpo(policy_GK, ref_GK, beta=beta, label_smoothing=label_smoothing)
    np.testing.assert_allclose(out.per_item, gold_G, rtol=1e-5)

  def test_equals_a_number_worked_out_by_hand(self):
    # m = 0.1 * ((-10 + 12) - (-20 + 17)) = 0.5;  log(1 + e^-0.5) = 0.474076984
    out = _dpo([[-10.0, -20.0]], [[-12.0, -17.0]], beta=0.1)
    np.testing.assert_allclose(out.per_item, [0.474076984], rtol=1e-6)

  @pytest.mark.parametrize('beta', [0.01, 0.1, 5.0])
  @pytest.mark.parametrize('label_smoothing', [0.0, 0.2])
  def test_is_log_2_with_no_margin_where_policy_equals_ref(self, beta, label_smoothing):
    policy_GK, _ = _pairs()
    out = _dpo(policy_GK, policy_GK, beta=beta, label_smoothing=label_smoothing)
    np.testing.assert_allclose(out.per_item, np.full(5, np.log(2)), rtol=1e-6)
    for name in ('rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies'):
      assert not np.any(out.metrics[name]), name

  @pytest.mark.parametrize('label_smoothing', [0.0, 0.2])
  def test_gradient_where_policy_equals_ref_is_half_of_beta_either_way(self, label_smoothing):
    policy_GK, _ = _pairs()
    loss = lambda x: jnp.sum(_dpo(x, policy_GK, beta=0.3, label_smoothing=label_smoothing).per_item)
    wanted = 0.3 * (0.5 - label_smoothing)
    np.testing.assert_allclose(jax.grad(loss)(policy_GK), np.tile([-wanted, wanted], (5, 1)), rtol=1e-6)

  def test_a_step_downhill_raises_chosen_and_lowers_rejected(self):
    policy_GK, ref_GK = _pairs()
    grads_GK = jax.grad(lambda x: jnp.sum(_dpo(x, ref_GK, beta=0.1).per_item))(policy_GK)
    assert np.all(grads_GK[:, 0] < 0) and np.all(grads_GK[:, 1] > 0)
    np.testing.assert_array_equal(grads_GK[:, 0], -grads_GK[:, 1])

  def test_gradient_is_weighed_by_how_wrong_the_reward_is(self):
    policy_GK, ref_GK = _pairs()
    ratios_GK = policy_GK.astype(np.float64) - ref_GK
    wrong_G = 1 / (1 + np.exp(0.1 * (ratios_GK[:, 0] - ratios_GK[:, 1])))
    grads_GK = jax.grad(lambda x: jnp.sum(_dpo(x, ref_GK, beta=0.1).per_item))(policy_GK)
    np.testing.assert_allclose(grads_GK[:, 1], 0.1 * wrong_G, rtol=1e-4)

  def test_label_smoothing_stops_at_the_margin_of_its_noise(self):
    # (1 - eps) sigmoid(-m) = eps sigmoid(m) where m = log((1 - eps) / eps).
    margin = float(np.log(0.9 / 0.1))
    loss = lambda m: _dpo(
        jnp.stack([jnp.stack([m, m * 0])]), jnp.zeros((1, 2)), beta=1.0, label_smoothing=0.1
    ).per_item[0]
    slope = jax.grad(loss)
    assert abs(slope(jnp.float32(margin))) < 1e-6
    assert slope(jnp.float32(margin - 1)) < -0.01 and slope(jnp.float32(margin + 1)) > 0.01

  def test_swapped_labels_mirror_the_loss(self):
    policy_GK, ref_GK = _pairs()
    out = _dpo(policy_GK, ref_GK, beta=0.1)
    swapped = _dpo(policy_GK[:, ::-1], ref_GK[:, ::-1], beta=0.1)
    np.testing.assert_allclose(swapped.per_item - out.per_item, out.metrics['rewards/margins'], rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize('gap', [1e4, -1e4])
  @pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
  def test_is_finite_at_extreme_margins(self, gap, label_smoothing):
    policy_GK = np.array([[gap, 0.0]], np.float32)
    loss = lambda x: jnp.sum(_dpo(x, jnp.zeros((1, 2)), beta=1.0, label_smoothing=label_smoothing).per_item)
    value, grads_GK = jax.value_and_grad(loss)(policy_GK)
    np.testing.assert_allclose(value, 1e4 * (label_smoothing if gap > 0 else 1 - label_smoothing), rtol=1e-6)
    slope = label_smoothing - (gap < 0)
    np.testing.assert_allclose(grads_GK, [[slope, -slope]], atol=1e-6)

  def test_metrics_are_the_implicit_rewards(self):
    policy_GK, ref_GK = _pairs()
    rewards_GK = 0.2 * (policy_GK.astype(np.float64) - ref_GK)
    metrics = _dpo(policy_GK, ref_GK, beta=0.2).metrics
    gold = {
        'rewards/chosen': rewards_GK[:, 0],
        'rewards/rejected': rewards_GK[:, 1],
        'rewards/margins': rewards_GK[:, 0] - rewards_GK[:, 1],
        'rewards/accuracies': rewards_GK[:, 0] > rewards_GK[:, 1],
        'logps/chosen': policy_GK[:, 0],
        'logps/rejected': policy_GK[:, 1],
    }
    assert set(metrics) == set(gold)
    for name, want in gold.items():
      np.testing.assert_allclose(metrics[name], want, rtol=1e-5, atol=1e-5, err_msg=name)

  def test_a_tie_is_not_accurate(self):
    policy_GK = np.array([[-3.0, -3.0], [-2.0, -3.0], [-3.0, -2.0]], np.float32)
    out = _dpo(policy_GK, np.zeros((3, 2), np.float32), beta=0.1)
    assert out.metrics['rewards/accuracies'].tolist() == [0, 1, 0]

  def test_passes_the_loss_state_through(self):
    assert _dpo(*_pairs(), beta=0.1, state={'mean': 3}).state == {'mean': 3}
