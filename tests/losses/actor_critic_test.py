"""Tests of losses around losses of a policy, against formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import actor_critic
from jaxalign.losses import policy
from jaxalign.losses import policy_parts

_of = functools.partial
RNG = np.random.default_rng(1)
LOGPS, REF, OLD, ADVANTAGES, ENTROPY = (RNG.normal(size=(2, 3)) for _ in range(5))
VALUES, OLD_VALUES, RETURNS = (RNG.normal(size=(2, 3)) for _ in range(3))
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
LENGTH = [3, 2]
VALID = np.array([[1, 1]], np.float32)


def _f32(x):
  return jnp.asarray(x, jnp.float32)


def _run(loss, critic=REF, **labels):
  """Two responses to one prompt, a row each."""
  responses_BT = np.where(MASK > 0, 0, -1).astype(np.int32)
  rows = types.Rows(MASK, responses_BT, np.zeros((2, 1), np.int32), np.array([[0], [1]], np.int32), 1, 2)
  stats = types.Stats(
      logps_BT=_f32(LOGPS * MASK),
      mask_BT=MASK,
      entropy_BT=_f32(ENTROPY),
      scores_BTO=_f32(VALUES)[..., None],
      valid_G=jnp.ones(1),
      critic_logps_BT=_f32(critic * MASK),
      rows=rows,
      valid_GK=VALID,
  )
  given = {'advantages': _f32(ADVANTAGES), 'old_logps': _f32(OLD * MASK)}
  given |= {'values': _f32(OLD_VALUES), 'returns': _f32(RETURNS)}
  return loss(stats, types.Stats(logps_BT=_f32(REF * MASK)), given | labels)


def _ppo():
  rho = np.exp(LOGPS - OLD)
  return -np.minimum(rho * ADVANTAGES, np.clip(rho, 0.8, 1.2) * ADVANTAGES)


PPO = _of(policy.ppo, clip_eps=0.2)
CRITIC = _of(actor_critic.clipped_values, clip_eps=0.3)


class TestActorCritic:

  def test_adds_the_critic_s_loss_and_takes_the_entropy(self):
    out = _run(_of(actor_critic.actor_critic, loss=PPO, value_loss=CRITIC, value_coef=0.5, entropy_coef=0.1))
    held = np.clip(VALUES, OLD_VALUES - 0.3, OLD_VALUES + 0.3)
    value = 0.5 * np.maximum((VALUES - RETURNS) ** 2, (held - RETURNS) ** 2)
    counts = MASK > 0
    np.testing.assert_allclose(out.per_item[counts], (_ppo() + 0.5 * value - 0.1 * ENTROPY)[counts], rtol=1e-5)
    np.testing.assert_allclose(out.metrics['loss/value_avg'], value, rtol=1e-5)

  def test_reads_entropy_only_for_a_bonus(self):
    loss = _of(actor_critic.actor_critic, loss=PPO, value_loss=CRITIC, value_coef=0.5)
    labels = ('advantages', 'old_logps', 'values', 'returns')
    trace = _of(tracing.trace, group_size=1, labels=(), token_labels=labels)
    assert trace(loss).fields == {'policy.logps_BT', 'policy.scores_BTO', *(f'labels.{name}' for name in labels)}
    assert 'policy.entropy_BT' in trace(_of(loss, entropy_coef=0.1)).fields


class TestWithPretraining:

  def test_learns_texts_and_what_was_sampled(self):
    is_text = np.array([[1, 1, 0], [0, 0, 0]], np.float32)
    out = _run(_of(actor_critic.with_pretraining, loss=PPO, weight=3.0), is_text=jnp.asarray(is_text))
    wanted = np.where(is_text > 0, -3 * LOGPS, _ppo())
    np.testing.assert_allclose(out.per_item[MASK > 0], wanted[MASK > 0], rtol=1e-5)
    of_texts = out.metrics['texts/loss']
    np.testing.assert_allclose(of_texts.sum.sum() / of_texts.weight.sum(), -LOGPS[0, :2].mean(), rtol=1e-5)

  def test_counts_for_none_of_the_shares_of_a_step(self):
    is_text = jnp.asarray(np.array([[1, 1, 1], [0, 0, 0]], np.float32))
    inner = _of(policy.kl_cov, share=0.5, coef=1.0)
    out = _run(_of(actor_critic.with_pretraining, loss=inner, weight=3.0), is_text=is_text)
    held = np.asarray(out.metrics['kl_cov/held_mean'])
    assert not held[0].any() and held[1].sum() == 1  # of two tokens that were sampled

  def test_is_no_response_to_what_follows_a_target(self):
    is_text = jnp.asarray(np.array([[1, 1, 0], [0, 0, 0]], np.float32))
    inner = _of(actor_critic.constrained, loss=PPO, limit=0.5, rate=0.1)
    cost = {'cost': jnp.array([[9.0, 0.7]]), 'cost_known': jnp.ones((1, 2))}
    out = _run(_of(actor_critic.with_pretraining, loss=inner, weight=3.0), is_text=is_text, **cost)
    np.testing.assert_allclose(out.state['log_lambda'], 0.1 * 0.2, rtol=1e-5)


class TestAdaptive:

  def steered(self, kl, log_c, count=2):
    return log_c + np.log(1 + np.clip(kl / 5.0 - 1, -0.2, 0.2) * count / 100)

  def test_steers_the_coefficient_in_the_loss(self):
    loss = _of(actor_critic.adaptive, loss=PPO, beta=0.3, kl=policy_parts.k2, target=5.0, horizon=100)
    x = (LOGPS - REF) * MASK
    for state, log_c in (((), 0.0), ({'log_coefficient': jnp.float32(0.4)}, 0.4)):
      out = _run(_of(loss, state=state))
      wanted = _ppo() + np.exp(log_c) * 0.3 * x**2 / 2
      np.testing.assert_allclose(out.per_item[MASK > 0], wanted[MASK > 0], rtol=1e-5)
      np.testing.assert_allclose(out.state['log_coefficient'], self.steered(x.sum() / 2, log_c), rtol=1e-5, atol=1e-7)

  def test_steers_by_the_label_where_the_reward_has_the_divergence(self):
    loss = _of(actor_critic.adaptive, loss=PPO, target=5.0, horizon=100)
    for kl in (4.5, 5.5, 50.0, 0.1):
      out = _run(loss, kl=jnp.full((1, 2), kl))
      np.testing.assert_allclose(out.state['log_coefficient'], self.steered(kl, 0.0), rtol=1e-4)
      np.testing.assert_allclose(out.per_item[MASK > 0], _ppo()[MASK > 0], rtol=1e-5)

  def test_keeps_the_coefficient_positive_where_a_step_has_more_responses_than_the_horizon(self):
    out = _run(_of(actor_critic.adaptive, loss=PPO, target=5.0, horizon=0.2), kl=jnp.zeros((1, 2)))
    np.testing.assert_allclose(out.state['log_coefficient'], np.log(0.5), rtol=1e-6)


class TestConstrained:

  def test_leaves_the_multiplier_where_no_cost_is_known(self):
    loss = _of(actor_critic.constrained, loss=PPO, limit=0.5, rate=0.1, state={'log_lambda': jnp.float32(0.4)})
    out = _run(loss, cost=jnp.zeros((1, 2)), cost_known=jnp.zeros((1, 2)))
    np.testing.assert_array_equal(out.state['log_lambda'], np.float32(0.4))

  def test_raises_the_multiplier_where_the_cost_is_above_the_limit(self):
    loss = _of(actor_critic.constrained, loss=PPO, limit=0.5, rate=0.1)
    known = jnp.ones((1, 2))
    out = _run(loss, cost=jnp.array([[1.0, 0.4]]), cost_known=known)
    np.testing.assert_allclose(out.state['log_lambda'], 0.1 * 0.2, rtol=1e-5)
    out = _run(loss, cost=jnp.array([[1.0, 0.4]]), cost_known=jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(out.state['log_lambda'], 0.1 * -0.1, rtol=1e-5)
    out = _run(_of(loss, state={'log_lambda': jnp.float32(1.0)}), cost=jnp.zeros((1, 2)), cost_known=known)
    np.testing.assert_allclose(out.state['log_lambda'], 1 - 0.05 * np.e, rtol=1e-5)
    out = _run(_of(loss, state={'log_lambda': jnp.float32(1.6)}), cost=jnp.full((1, 2), 9.0), cost_known=known)
    np.testing.assert_allclose(out.state['log_lambda'], np.log(5.0), rtol=1e-5)
    np.testing.assert_allclose(out.per_item[MASK > 0], _ppo()[MASK > 0], rtol=1e-5)


class TestImplicitRewards:
  CRITIC = np.random.default_rng(8).normal(-2, 1, LOGPS.shape)

  @pytest.mark.parametrize('outcome', [(1.0, 0.0), (0.3, -1.0)])
  def test_are_the_cross_entropy_of_outcomes(self, outcome):
    loss = _of(actor_critic.implicit_rewards, beta=0.7)
    out = _run(loss, critic=self.CRITIC, outcome=jnp.array([outcome]))
    z = 0.7 * ((self.CRITIC - REF) * MASK).sum(axis=1)
    p = 1 / (1 + np.exp(-z))
    for row, o in enumerate(outcome):
      wanted = -o * np.log(p[row]) - (1 - o) * np.log(1 - p[row]) if o >= 0 else 0.0
      np.testing.assert_allclose(out.per_item[row][MASK[row] > 0], wanted, rtol=1e-5)
      np.testing.assert_allclose(out.metrics['critic/rewards'][row][MASK[row] > 0], z[row], rtol=1e-5)

  def test_are_log_2_where_the_critic_is_the_reference(self):
    out = _run(_of(actor_critic.implicit_rewards, beta=0.7), critic=REF, outcome=jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(out.per_item[MASK > 0], np.log(2), rtol=1e-6)


class TestClippedValues:
  V, OLD, R = (
      np.array([0.5, 0.5, 2.0, -1.0, 0.1]),
      np.array([0.4, 0.5, 1.0, 0.0, 0.0]),
      np.array([1.0, 0.0, 0.0, -2.0, 3.0]),
  )

  def run(self, values, clip_eps=0.2):
    stats = types.Stats(scores_BTO=values[None, :, None])
    given = {'values': jnp.asarray(self.OLD, jnp.float32)[None], 'returns': jnp.asarray(self.R, jnp.float32)[None]}
    return actor_critic.clipped_values(stats, types.Stats(), given, clip_eps=clip_eps)

  def test_is_the_larger_of_two_squares(self):
    out = self.run(jnp.asarray(self.V, jnp.float32))
    held = np.clip(self.V, self.OLD - 0.2, self.OLD + 0.2)
    wanted = 0.5 * np.maximum((self.V - self.R) ** 2, (held - self.R) ** 2)
    np.testing.assert_allclose(out.per_item[0], wanted, rtol=1e-6)
    np.testing.assert_array_equal(out.metrics['val/clipfrac_avg'][0], [0, 0, 0, 1, 0])

  def test_has_no_gradient_where_the_clip_is_the_larger_one(self):
    slopes = jax.grad(lambda v: jnp.sum(self.run(v).per_item))(jnp.asarray(self.V, jnp.float32))
    np.testing.assert_allclose(slopes, np.where([1, 1, 1, 0, 1], self.V - self.R, 0.0), rtol=1e-6)

  def test_trains_one_output(self):
    stats = types.Stats(scores_BTO=jnp.zeros((1, 5, 2)))
    with pytest.raises(types.UsageError, match='= 2: actor_critic.clipped_values trains 1'):
      actor_critic.clipped_values(stats, types.Stats(), {}, clip_eps=0.2)

  def test_reads_the_head_and_no_log_probability(self):
    loss = _of(actor_critic.clipped_values, clip_eps=0.2)
    needs = tracing.trace(loss, group_size=1, labels=(), token_labels=('values', 'returns'))
    assert needs.fields == {'policy.scores_BTO', 'labels.values', 'labels.returns'} and not needs.writes


class TestClippedValuesAndCosts:
  COSTS, OLD_COSTS, COST_RETURNS = np.random.default_rng(5).normal(size=(3, 2, 3))
  LABELS = {'cost_values': _f32(OLD_COSTS), 'cost_returns': _f32(COST_RETURNS)}

  def run(self, scores_BTO, logps=LOGPS, **options):
    loss = _of(actor_critic.clipped_values_and_costs, clip_eps=0.3, **options)
    whole = _of(actor_critic.actor_critic, loss=PPO, value_loss=loss, value_coef=0.5)
    return self.of(whole, scores_BTO, logps)

  def of(self, loss, scores_BTO, logps):
    given = {'advantages': _f32(ADVANTAGES), 'old_logps': _f32(OLD), 'values': _f32(OLD_VALUES)}
    stats = types.Stats(scores_BTO=scores_BTO, logps_BT=logps, mask_BT=MASK)
    return loss(stats, types.Stats(), given | {'returns': _f32(RETURNS)} | self.LABELS)

  def test_is_the_larger_of_two_squares_of_each(self):
    for options, cost_eps in (({}, 0.3), ({'cost_clip_eps': 0.1}, 0.1)):
      out = self.run(_f32(np.stack([VALUES, self.COSTS], axis=-1)), **options)
      wanted = 0
      each = (VALUES, OLD_VALUES, RETURNS, 0.3), (self.COSTS, self.OLD_COSTS, self.COST_RETURNS, cost_eps)
      for v, old, to, eps in each:
        wanted += 0.5 * np.maximum((v - to) ** 2, (np.clip(v, old - eps, old + eps) - to) ** 2)
      np.testing.assert_allclose(out.metrics['loss/value_avg'], wanted, rtol=1e-5)
      clipped = (np.clip(self.COSTS, self.OLD_COSTS - cost_eps, self.OLD_COSTS + cost_eps) - self.COST_RETURNS) ** 2
      np.testing.assert_array_equal(
          out.metrics['val/cost_clipfrac_avg'], clipped > (self.COSTS - self.COST_RETURNS) ** 2
      )
    np.testing.assert_array_equal(out.metrics['cost_values'], _f32(self.COSTS))
    np.testing.assert_array_equal(out.metrics['values'], _f32(VALUES))

  def test_moves_policy_and_first_critic_as_ppo_does(self):
    scores_BTO = _f32(np.stack([VALUES, self.COSTS], axis=-1))
    slopes = lambda fn, *at: jax.grad(lambda *x: jnp.sum(fn(*x).per_item), argnums=(0, 1))(*at)
    both = slopes(self.run, scores_BTO, _f32(LOGPS))
    alone = _of(actor_critic.actor_critic, loss=PPO, value_loss=CRITIC, value_coef=0.5)
    one = slopes(_of(self.of, alone), scores_BTO[..., :1], _f32(LOGPS))
    np.testing.assert_array_equal(both[1], one[1])
    np.testing.assert_array_equal(both[0][..., 0], one[0][..., 0])
    assert np.any(both[0][..., 1])

  def test_trains_two_outputs(self):
    with pytest.raises(types.UsageError, match='= 1: actor_critic.clipped_values_and_costs trains 2'):
      self.run(_f32(VALUES)[..., None])
