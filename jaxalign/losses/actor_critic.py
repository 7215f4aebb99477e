"""Losses of a policy together with what goes along with it: a critic, a bonus, a coefficient that follows a target.

Each is put around a loss of `losses.policy`, has its contract, and gives one value per token, so that one step trains
all of it. What follows a target is a state of the loss, and is kept in checkpoints: logarithms of coefficients, 0 at
first, which `advantages` read too where the coefficient is one of theirs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import policy_parts

Loss = Callable[..., types.LossOut]


def actor_critic(
    policy, ref, labels, *, state=(), loss: Loss, value_loss: Loss, value_coef: float, entropy_coef: float = 0.0
) -> types.LossOut:
  """PPO's objective as a whole: the policy's loss, the critic's, and a bonus for entropy.

    loss_t = loss'_t + c_v value_loss_t - c_e H(pi_t)

  The paper's c_v is 1 for a network that shares parameters; TRL's 0.1, verl's and OpenRLHF's critic has an optimizer of
  its own. c_e is 0 in all of them.

  Args:
    policy: read by both losses, and `entropy_BT` where `entropy_coef` is not 0.
    ref: read by them.
    labels: read by them.
    state: of `loss`.
    loss: of the policy.
    value_loss: of the critic.
    value_coef: c_v.
    entropy_coef: c_e, of the entropy in nats.

  References:
    Schulman et al., 2017, https://arxiv.org/abs/1707.06347, Eq. 9.
  """
  out, critic = loss(policy, ref, labels, state=state), value_loss(policy, ref, labels)
  loss_BT = out.per_item + value_coef * critic.per_item
  metrics = {**out.metrics, **critic.metrics, 'loss/policy_avg': out.per_item, 'loss/value_avg': critic.per_item}
  if entropy_coef:
    loss_BT = loss_BT - entropy_coef * policy.entropy_BT
  return types.LossOut(loss_BT, metrics, out.state)


def clipped_values(policy, ref, labels, *, state=(), clip_eps: float) -> types.LossOut:
  """PPO's loss of a critic, whose head is read where it has read what comes before a token.

    loss_t = 1/2 max((v_t - R_t)^2, (clip(v_t, v_old_t - eps, v_old_t + eps) - R_t)^2)

  1/2 (v - R)^2 where v equals v_old. TRL's and verl's eps is 0.2 and 0.5.

  Args:
    policy: reads `scores_BTO`.
    ref: not read.
    labels: reads `values`, v_old, and `returns`, R.
    state: passed through.
    clip_eps: eps, in units of the reward.

  Raises:
    UsageError: the head has several outputs.

  References:
    Schulman et al., 2017, https://arxiv.org/abs/1707.06347, whose code this is; Ouyang et al., 2022, arXiv:2203.02155.
  """
  del ref
  (values_BT,) = _outputs(policy.scores_BTO, 1, 'clipped_values')
  return types.LossOut(*_clipped(values_BT, labels['values'], labels['returns'], clip_eps), state)


def clipped_values_and_costs(
    policy, ref, labels, *, state=(), clip_eps: float, cost_clip_eps: float | None = None
) -> types.LossOut:
  """The losses of a critic of a reward and of a critic of a cost, two outputs of one head, added up.

    loss_t = clipped_values of the first + clipped_values of the second

  Args:
    policy: reads `scores_BTO`.
    ref: not read.
    labels: reads `values` and `returns` of the first, `cost_values` and `cost_returns` of the second, which
      `returns.lagrangian` makes.
    state: passed through.
    clip_eps: see `clipped_values`, in units of the reward.
    cost_clip_eps: the same in units of the cost; None for the number that the reward has.

  Raises:
    UsageError: the head has other than two outputs.

  References:
    Dai et al., 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773, its appendix on PPO-Lag.
  """
  del ref
  values_BT, costs_BT = _outputs(policy.scores_BTO, 2, 'clipped_values_and_costs')
  loss_BT, metrics = _clipped(values_BT, labels['values'], labels['returns'], clip_eps)
  cost_clip_eps = clip_eps if cost_clip_eps is None else cost_clip_eps
  of_cost_BT, of_cost = _clipped(costs_BT, labels['cost_values'], labels['cost_returns'], cost_clip_eps)
  names = {'val/clipfrac_avg': 'val/cost_clipfrac_avg', 'values': 'cost_values', 'returns': 'cost_returns'}
  metrics |= {names[name]: x_BT for name, x_BT in of_cost.items()}
  return types.LossOut(loss_BT + of_cost_BT, metrics, state)


def _outputs(scores_BTO, count: int, name: str) -> list[types.Array]:
  """The outputs of a head, `[B, T]` each; raises UsageError where they are more or fewer than `count`."""
  if scores_BTO.shape[-1] != count:
    bound = 'recipe.Recipe.critic_outputs, or score_outputs of a head on the policy'
    raise types.UsageError(f'{bound} = {scores_BTO.shape[-1]}: actor_critic.{name} trains {count}')
  return [scores_BTO[..., i] for i in range(count)]


def _clipped(values_BT, old_BT, returns_BT, clip_eps: float) -> tuple[types.Array, dict[str, types.Array]]:
  """The loss of `clipped_values`, and its metrics."""
  held_BT = jnp.clip(values_BT, old_BT - clip_eps, old_BT + clip_eps)
  free_BT, held_BT = jnp.square(values_BT - returns_BT), jnp.square(held_BT - returns_BT)
  metrics = {'val/clipfrac_avg': (held_BT > free_BT).astype(jnp.float32), 'values': values_BT, 'returns': returns_BT}
  return 0.5 * jnp.maximum(free_BT, held_BT), metrics


def implicit_rewards(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """PRIME's loss of a critic that writes: its log-ratio to the reference is to say which responses are right.

    loss_t = -o log sigmoid(z) - (1 - o) log sigmoid(-z),    z = beta sum_s log critic_s - log ref_s

  log 2 where critic equals reference; at all tokens of the response, so that an average by `sequence` is that over
  responses, and 0 where the outcome is not known.

  Args:
    policy: reads `critic_logps_BT` and `rows`.
    ref: reads `logps_BT`.
    labels: reads `outcome`, o from 0 to 1, below 0 where it is not known; see `returns.prime`.
    state: passed through.
    beta: 0.05 in the paper, and that of the advantages.

  References:
    Yuan et al., 2024, https://arxiv.org/abs/2412.01981, Eq. 5; Cui et al., 2025, https://arxiv.org/abs/2502.01456.
  """
  z_GK = beta * masked.totals(policy.critic_logps_BT - ref.logps_BT, policy.rows)
  outcome_GK = labels['outcome']
  loss_GK = jnp.where(outcome_GK >= 0, jax.nn.softplus(z_GK) - outcome_GK * z_GK, 0.0)
  right_GK = ((z_GK > 0) == (outcome_GK > 0.5)).astype(jnp.float32)
  to_tokens = lambda x_GK: masked.to_tokens(x_GK, policy.rows)
  metrics = {'critic/rewards': to_tokens(z_GK), 'critic/accuracies': to_tokens(right_GK)}
  return types.LossOut(to_tokens(loss_GK), metrics, state)


def with_pretraining(policy, ref, labels, *, state=(), loss: Loss, weight: float) -> types.LossOut:
  """PPO-ptx: tokens of texts that nobody sampled are learned as in pretraining, beside another loss.

    loss_t = loss'_t of what was sampled,    -gamma log pi_t of texts

  How many texts there are beside a rollout is `rollouts.Options.texts`. The average is over the tokens of both; the
  paper adds two averages, with gamma 27.8. It goes around all others here, to which texts are no responses.

  Args:
    policy: read by the loss, and `logps_BT`.
    ref: read by the loss.
    labels: read by the loss, and `is_text`, 1 for tokens of texts.
    state: of the loss.
    loss: any of `losses.policy`, or of this module.
    weight: gamma.

  References:
    Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, Eq. 2.
  """
  is_text_BT = labels['is_text']
  out = loss(_Policy(policy, is_text_BT), ref, _Labels(labels, policy), state=state)
  loss_BT = jnp.where(is_text_BT > 0, -weight * policy.logps_BT, out.per_item)
  text_BT = is_text_BT * policy.mask_BT
  metrics = dict(out.metrics) | {'texts/loss': masked.Weighted(-text_BT * policy.logps_BT, text_BT)}
  return types.LossOut(loss_BT, metrics, out.state)


class _Labels:
  """Labels, the old log-probabilities of texts being the policy's: nobody sampled them, so there is no ratio."""

  def __init__(self, labels, policy):
    self._labels, self._policy = labels, policy

  def __getitem__(self, name: str) -> types.Array:
    found = self._labels[name]
    if name != 'old_logps':
      return found
    return jnp.where(self._labels['is_text'] > 0, jax.lax.stop_gradient(self._policy.logps_BT), found)


class _Policy:
  """The policy, texts being none of its responses."""

  def __init__(self, policy, is_text_BT: types.Array):
    self._policy, self._is_text_BT = policy, is_text_BT

  def __getattr__(self, name: str):
    found = getattr(self._policy, name)
    if name == 'mask_BT':
      return found * (1.0 - self._is_text_BT)
    if name != 'valid_GK':
      return found
    return jnp.where(masked.totals(self._is_text_BT, self._policy.rows) > 0, 0.0, found)


def adaptive(
    policy,
    ref,
    labels,
    *,
    state=(),
    loss: Loss,
    target: float,
    horizon: float,
    beta: float = 0.0,
    kl: policy_parts.Estimator = policy_parts.kl_penalty,
) -> types.LossOut:
  """A divergence from the reference whose coefficient is steered so that responses stay at a target.

    loss_t = loss'_t + c beta kl(log pi_t - log ref_t),    c <- c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

  KL is the mean over the n responses of a step of the summed log-ratio to the reference, in nats. Every step counts:
  with several epochs multiply the horizon by them. With beta 0 the
  coefficient is that of `advantages` with the divergence in the reward, and KL the label `kl` that comes with them.

  Args:
    policy: read by the loss, and `logps_BT`.
    ref: read by the loss, and `logps_BT` where `beta` is not 0.
    labels: read by the loss, and `kl` where `beta` is 0.
    state: log c, and none of the loss's.
    loss: any of `losses.policy`, without a state.
    target: nats per response, 6 in the paper.
    horizon: responses, 10000 in the paper.
    beta: first coefficient of the divergence in the loss.
    kl: see `policy.regularised`.

  References:
    Ziegler et al., 2019, https://arxiv.org/abs/1909.08593, Sec. 2.2.
  """
  out = loss(policy, ref, labels)
  log_c = state['log_coefficient'] if state else jnp.zeros((), jnp.float32)
  loss_BT, metrics = out.per_item, dict(out.metrics)
  if beta:
    x_BT = policy.logps_BT - ref.logps_BT
    kl_GK, metrics['kl'] = masked.totals(x_BT, policy.rows), kl(x_BT)
    loss_BT = loss_BT + jnp.exp(log_c) * beta * metrics['kl']
  else:
    kl_GK = labels['kl']
  count = jnp.sum(policy.valid_GK)
  mean = jax.lax.stop_gradient(jnp.sum(kl_GK * policy.valid_GK) / jnp.maximum(count, 1.0))
  # A step of more responses than horizons would make the coefficient negative.
  step = jnp.log1p(jnp.maximum(jnp.clip(mean / target - 1, -0.2, 0.2) * count / horizon, -0.5))
  metrics['objective/kl_coef'] = jnp.full_like(loss_BT, jnp.exp(log_c))
  return types.LossOut(loss_BT, metrics, {'log_coefficient': log_c + step})


def constrained(
    policy, ref, labels, *, state=(), loss: Loss, limit: float, rate: float, most: float = 5.0
) -> types.LossOut:
  """The multiplier of a constraint on a cost, for `advantages.lagrangian` or `returns.lagrangian`, which label `cost`.

    log lambda <- log lambda + rate lambda (mean cost - limit)

  The mean is over the responses of a step whose cost is known; where none is, lambda stays. The paper's rate is 0.1
  with the limit 0 or below.

  Args:
    policy: read by the loss, and `valid_GK`.
    ref: read by the loss.
    labels: read by the loss, and `cost` with `cost_known`.
    state: log lambda, and none of the loss's.
    loss: any of `losses.policy`, without a state.
    limit: what the cost is to be on average, at most.
    rate: of the change.
    most: of lambda, which would become infinite where the limit cannot be kept; that of the paper's code.

  References:
    Dai et al., 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773, Eq. 31.
  """
  out = loss(policy, ref, labels)
  log_lambda = state['log_lambda'] if state else jnp.zeros((), jnp.float32)
  known_GK = policy.valid_GK * labels['cost_known']
  mean = jnp.sum(labels['cost'] * known_GK) / jnp.maximum(jnp.sum(known_GK), 1.0)
  multiplier = jnp.exp(log_lambda)
  moved = log_lambda + rate * multiplier * jnp.where(jnp.sum(known_GK) > 0, mean - limit, 0.0)
  metrics = dict(out.metrics) | {'objective/lambda': jnp.full_like(out.per_item, multiplier)}
  return types.LossOut(out.per_item, metrics, {'log_lambda': jnp.minimum(moved, jnp.log(most))})
