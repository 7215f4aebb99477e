"""Policy-gradient losses on responses that were sampled: one value per token.

All have the contract of `losses.supervised`: `per_item` is `[B, T]`, and how tokens and responses are averaged is the
objective's (`objectives.policy_gradient`). A is the label `advantages` of each token, x_t = log pi_t - log old_t with
the label `old_logps`, and ratio_t = e^x_t, held below e^20. Labels carry no gradient. Where the policy is still the old
one every ratio is 1, and the gradient of the sum over tokens with respect to log pi_t is that of `reinforce`, -A_t; of
`rloo` and `luspo` times the response's number of tokens, which the average by `sequence` takes away again.

A loss with a divergence from the reference, or with weights against staleness, is `regularised` around another one.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import policy_parts

_of = functools.partial


def reinforce(policy, ref, labels, *, state=()) -> types.LossOut:
  """REINFORCE: the policy gradient itself.

    loss_t = -A_t log pi_t

  With the advantages of `advantages` it is ReMax (`greedy_baseline`), OPO (`length_weighted`) and GPG
  (`nonzero_scaled`). It knows no old policy: one update per rollout.

  References:
    Williams, 1992, https://doi.org/10.1007/BF00992696.
  """
  del ref
  return types.LossOut(-labels['advantages'] * policy.logps_BT, {}, state)


def ppo(
    policy,
    ref,
    labels,
    *,
    state=(),
    clip_eps: float,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    max_ratio: float | None = None,
) -> types.LossOut:
  """Proximal Policy Optimization's clipped surrogate.

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)

  -A where policy equals old. The paper uses eps 0.2. With group-relative advantages it is Dr. GRPO (`mean_centred`,
  averaged by `constant`) and REINFORCE++ (`whitened`).

  Args:
    policy: reads `logps_BT`.
    ref: not read.
    labels: reads `advantages` and `old_logps`.
    state: passed through.
    clip_eps: eps.
    clip_eps_high: eps of the upper bound, where it is another.
    dual_clip: see `policy_parts.clipped`.
    max_ratio: see `policy_parts.clipped`.

  References:
    Schulman et al., 2017, https://arxiv.org/abs/1707.06347, Eq. 7.
  """
  del ref
  x_BT = policy_parts.log_ratio(policy, labels)
  return _clipped(policy, labels, state, x_BT, clip_eps, clip_eps_high, dual_clip=dual_clip, max_ratio=max_ratio)


def dapo(policy, ref, labels, *, state=(), clip_eps: float, clip_eps_high: float) -> types.LossOut:
  """DAPO's clip-higher: PPO's surrogate with an upper bound of its own, so that unlikely tokens can rise.

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps_low, 1 + eps_high) A_t)

  The paper uses 0.2 and 0.28, no reference, and averages over the tokens of all responses (`token`).

  References:
    Yu et al., 2025, https://arxiv.org/abs/2503.14476, Eq. 8.
  """
  return ppo(policy, ref, labels, state=state, clip_eps=clip_eps, clip_eps_high=clip_eps_high)


def regularised(
    policy,
    ref,
    labels,
    *,
    state=(),
    loss: Callable[..., types.LossOut],
    weights: Sequence[Callable[..., types.Array]] = (),
    beta: float = 0.0,
    kl: policy_parts.Estimator = policy_parts.kl_penalty,
) -> types.LossOut:
  """Another loss, weighed token by token, and a divergence from the reference.

    loss_t = (product of weights_t) loss'_t + beta kl(log pi_t - log ref_t)

  Args:
    policy: read by the loss and the weights, and `logps_BT` where `beta` is not 0.
    ref: reads `logps_BT` where `beta` is not 0: at 0 no reference is needed.
    labels: read by the loss and the weights.
    state: of the loss.
    loss: any of this module.
    weights: such as `policy_parts.truncated_importance`; no gradient passes through them.
    beta: pull towards the reference, >= 0.
    kl: of the token's log-ratio. The default has an unbiased value and an unbiased gradient.

  Returns:
    With the metrics `kl`, what `beta` multiplies, and `policy/weight_avg`.
  """
  out = loss(policy, ref, labels, state=state)
  loss_BT, metrics = out.per_item, dict(out.metrics)
  if weights:
    weight_BT = functools.reduce(jnp.multiply, [weight(policy, ref, labels) for weight in weights])
    metrics['policy/weight_avg'] = weight_BT
    loss_BT = jax.lax.stop_gradient(weight_BT) * loss_BT
  if beta:
    metrics['kl'] = kl(policy.logps_BT - ref.logps_BT)
    loss_BT = loss_BT + beta * metrics['kl']
  return types.LossOut(loss_BT, metrics, out.state)


def grpo(
    policy, ref, labels, *, state=(), clip_eps: float, beta: float, kl: policy_parts.Estimator = policy_parts.kl_penalty
) -> types.LossOut:
  """Group Relative Policy Optimization.

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) + beta k3_t

  k3_t = ref_t / pi_t - 1 - log(ref_t / pi_t) is the loss's value. Its own gradient, which the paper follows (`kl` of
  `policy_parts.k3`), is on average that of the KL the other way round; the default follows the gradient of
  KL(policy || reference). The paper uses beta 0.04, advantages of `group_norm`, and averages over each response first
  (`sequence`); eps 0.2 is of TRL and verl. TRL's beta is 0.

  References:
    Shao et al., 2024, https://arxiv.org/abs/2402.03300, Eq. 3 and 4.
  """
  return regularised(policy, ref, labels, state=state, loss=_of(ppo, clip_eps=clip_eps), beta=beta, kl=kl)


def gspo(policy, ref, labels, *, state=(), clip_eps: float, clip_eps_high: float) -> types.LossOut:
  """Group Sequence Policy Optimization: the ratio of whole responses, to the power of 1 / length, is clipped.

    loss = -min(w A, clip(w, 1 - eps_low, 1 + eps_high) A),    w = exp(mean_t x_t)

  Every token of a response has this loss: average by `sequence`. For one token it is PPO's. The paper uses 3e-4 and
  4e-4.

  References:
    Zheng et al., 2025, https://arxiv.org/abs/2507.18071, Eq. 5 and 7.
  """
  del ref
  x_BT = policy_parts.response_mean(policy_parts.log_ratio(policy, labels), policy)
  return _clipped(policy, labels, state, x_BT, clip_eps, clip_eps_high)


def gspo_token(policy, ref, labels, *, state=(), clip_eps: float, clip_eps_high: float) -> types.LossOut:
  """GSPO with the value of the response's ratio and the gradient of each token's own, for advantages of tokens.

    loss_t = -min(w_t A_t, clip(w_t, 1 - eps_low, 1 + eps_high) A_t),    w_t = sg(w) pi_t / sg(pi_t)

  With one advantage for all of a response, averaged by `sequence`, value and gradient are those of `gspo`.

  References:
    Zheng et al., 2025, https://arxiv.org/abs/2507.18071, Eq. 13 and 14.
  """
  del ref
  sg = jax.lax.stop_gradient
  x_BT = (
      sg(policy_parts.response_mean(policy_parts.log_ratio(policy, labels), policy))
      + policy.logps_BT
      - sg(policy.logps_BT)
  )
  return _clipped(policy, labels, state, x_BT, clip_eps, clip_eps_high)


def luspo(policy, ref, labels, *, state=(), clip_eps: float, clip_eps_high: float) -> types.LossOut:
  """Length-Unbiased Sequence Policy Optimization: GSPO's loss times the number n of a response's tokens.

  Average by `sequence`. TRL suggests eps 2e-3 and 2.5e-3.

  References:
    Liu et al., 2026, https://arxiv.org/abs/2602.05261, derived from TRL's definition.
  """
  out = gspo(policy, ref, labels, state=state, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
  length_BT = policy_parts.response_sum(jnp.ones_like(policy.logps_BT), policy)
  return types.LossOut(length_BT * out.per_item, out.metrics, out.state)


def rloo(policy, ref, labels, *, state=(), clip_eps: float) -> types.LossOut:
  """REINFORCE Leave-One-Out: PPO's surrogate of whole responses, each one action.

    loss = -min(w A, clip(w, 1 - eps, 1 + eps) A),    w = exp(sum_t x_t)

  Every token of a response has this loss: average by `sequence`. A is of `leave_one_out`, the divergence from the
  reference a part of the reward. The paper has no ratio, and where policy equals old the gradient is the paper's.
  TRL's eps is 0.2.

  References:
    Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740; the ratio is TRL's.
  """
  del ref
  x_BT = policy_parts.response_sum(policy_parts.log_ratio(policy, labels), policy)
  return _clipped(policy, labels, state, x_BT, clip_eps)


def gmpo(policy, ref, labels, *, state=(), clip_eps: float) -> types.LossOut:
  """Geometric-Mean Policy Optimization: tokens are clipped, in logarithms and on one side, before they are averaged.

    loss = -A exp(mean_t c_t),    c_t = min(x_t, eps) where A > 0,  max(x_t, -eps) where A < 0

  Every token of a response has this loss: average by `sequence`. The paper uses eps 0.4.

  References:
    Zhao et al., 2025, https://arxiv.org/abs/2507.20673, derived from verl's definition.
  """
  del ref
  advantages_BT, x_BT = labels['advantages'], policy_parts.log_ratio(policy, labels)
  held_BT = jnp.where(advantages_BT > 0, jnp.minimum(x_BT, clip_eps), jnp.maximum(x_BT, -clip_eps))
  ratio_BT = policy_parts.ratio(policy_parts.response_mean(held_BT, policy))
  past_BT = (held_BT != x_BT).astype(jnp.float32)
  metrics = {'val/ratio': ratio_BT, 'policy/approxkl_avg': policy_parts.k2(x_BT), 'clip_ratio/region_mean': past_BT}
  return types.LossOut(-advantages_BT * ratio_BT, metrics, state)


def cispo(policy, ref, labels, *, state=(), max_ratio: float, min_ratio: float = 0.0) -> types.LossOut:
  """CISPO: the clipped ratio weighs REINFORCE, so that no token loses its gradient.

    loss_t = -sg(clip(ratio_t, min_ratio, max_ratio)) A_t log pi_t

  Both bounds are ratios: TRL's `epsilon_high` is max_ratio, 5 in ScaleRL (https://arxiv.org/abs/2510.13786), while
  verl's and open-instruct's eps_high is max_ratio - 1. Average by `token`.

  References:
    MiniMax, 2025, https://arxiv.org/abs/2506.13585, Eq. 4 and 5.
  """
  del ref
  advantages_BT, x_BT = labels['advantages'], policy_parts.log_ratio(policy, labels)
  ratio_BT = jax.lax.stop_gradient(policy_parts.ratio(x_BT))
  loss_BT = -jnp.clip(ratio_BT, min_ratio, max_ratio) * advantages_BT * policy.logps_BT
  above_BT = ((ratio_BT > max_ratio) & (advantages_BT > 0)).astype(jnp.float32)
  metrics = {'val/ratio': ratio_BT, 'policy/approxkl_avg': policy_parts.k2(x_BT), 'cispo_clip_ratio': above_BT}
  return types.LossOut(loss_BT, metrics, state)


def sapo(policy, ref, labels, *, state=(), tau_positive: float, tau_negative: float) -> types.LossOut:
  """Soft Adaptive Policy Optimization: a smooth gate in place of the clip.

    loss_t = -4 / tau sigmoid(tau (ratio_t - 1)) A_t,    tau by the sign of A_t

  -2 A / tau where policy equals old. The paper uses 1 and 1.05, and averages by `sequence`.

  References:
    Gao et al., 2025, https://arxiv.org/abs/2511.20347, derived from TRL's definition.
  """
  del ref
  advantages_BT, x_BT = labels['advantages'], policy_parts.log_ratio(policy, labels)
  ratio_BT = policy_parts.ratio(x_BT)
  tau_BT = jnp.where(advantages_BT > 0, tau_positive, tau_negative)
  metrics = {'val/ratio': ratio_BT, 'policy/approxkl_avg': policy_parts.k2(x_BT)}
  return types.LossOut(-4 / tau_BT * jax.nn.sigmoid(tau_BT * (ratio_BT - 1)) * advantages_BT, metrics, state)


def vespo(
    policy,
    ref,
    labels,
    *,
    state=(),
    k_positive: float = 2.0,
    lam_positive: float = 3.0,
    k_negative: float = 3.0,
    lam_negative: float = 2.0,
) -> types.LossOut:
  """VESPO: REINFORCE weighed by a gamma density of the ratio of whole responses, 1 at ratio 1.

    loss_t = -sg(phi(W)) A_t log pi_t,    phi(W) = e^lam W^k e^(-lam W),    W = exp(sum_t x_t)

  k and lam by the sign of A_t; the defaults are TRL's. W is held below e^20. Average by `token`.

  References:
    Shen et al., 2026, https://arxiv.org/abs/2602.10693, derived from TRL's definition.
  """
  del ref
  advantages_BT, x_BT = labels['advantages'], policy_parts.log_ratio(policy, labels)
  log_w_BT = policy_parts.response_sum(x_BT, policy)
  w_BT = policy_parts.ratio(log_w_BT)
  k_BT = jnp.where(advantages_BT >= 0, k_positive, k_negative)
  lam_BT = jnp.where(advantages_BT >= 0, lam_positive, lam_negative)
  phi_BT = jax.lax.stop_gradient(jnp.exp(lam_BT + k_BT * log_w_BT - lam_BT * w_BT))
  metrics = {'val/ratio': w_BT, 'policy/approxkl_avg': policy_parts.k2(x_BT), 'vespo/phi_seq_mean': phi_BT}
  return types.LossOut(-phi_BT * advantages_BT * policy.logps_BT, metrics, state)


def kl_cov(policy, ref, labels, *, state=(), share: float, coef: float) -> types.LossOut:
  """KL-Cov: what raises likely tokens most, which takes entropy away, is held at the old policy.

    loss_t = -ratio_t A_t + coef |x_t| [`policy_parts.covariances` of t is among the `share` largest of the step]

  Nothing is clipped. verl's coefficient is 1, and the share 2e-3 for 7B, 2e-4 for 32B.

  References:
    Cui et al., 2025, https://arxiv.org/abs/2505.22617, Eq. 13, as verl has it.
  """
  del ref
  x_BT = policy_parts.log_ratio(policy, labels)
  ratio_BT = policy_parts.ratio(x_BT)
  covariance_BT, counted_BT = policy_parts.covariances(policy, labels)
  held_BT = policy_parts.largest(jnp.where(counted_BT > 0, covariance_BT, -jnp.inf), share * jnp.sum(counted_BT))
  metrics = {'val/ratio': ratio_BT, 'policy/approxkl_avg': policy_parts.k2(x_BT), 'kl_cov/held_mean': held_BT}
  return types.LossOut(-ratio_BT * labels['advantages'] + coef * held_BT * jnp.abs(x_BT), metrics, state)


def _clipped(policy, labels, state, x_BT, low: float, high: float | None = None, **options) -> types.LossOut:
  """PPO's surrogate of the ratio e^x, whatever x is."""
  high = low if high is None else high
  ratio_BT = policy_parts.ratio(x_BT)
  loss_BT = policy_parts.clipped(ratio_BT, labels['advantages'], low=low, high=high, **options)
  return types.LossOut(loss_BT, policy_parts.ratio_metrics(policy, labels, ratio_BT, low=low, high=high), state)
