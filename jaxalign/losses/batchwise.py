"""Losses on pairs that look at all pairs of a step at once, and some that remember earlier steps.

Contract and notation are those of `losses.preference`. As these read which groups are real (`policy.valid_G`), a step
gives them all its micro-batches, so results depend on the number of pairs per step, but not on how it is divided among
micro-batches and devices. A state begins as zeros.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import compose
from jaxalign.losses import parts

_FAR = 1e30


def _mean(x_G, valid_G):
  return jnp.sum(x_G * valid_G) / jnp.maximum(jnp.sum(valid_G), 1.0)


def _margins(z_GK):
  return z_GK[:, 0] - z_GK[:, 1]


def beta_dpo(
    policy, ref, labels, *, state=(), beta: float, alpha: float, keep: float = 0.8, decay: float = 0.9
) -> types.LossOut:
  """DPO whose beta follows the batch, on the pairs whose margin is not far from the running mean.

    loss = -log sigmoid(b h),    b = max(1e-3, beta (1 + alpha [mean h - M])),    M <- decay M + (1 - decay) mean h

  mean over the step's pairs, M its bias-corrected running mean, beta and weights without gradient. The share `keep` of
  pairs with the smallest |h - M| counts; the authors draw it at random with weights exp(-(h - M)^2 / (2 std^2)), here
  the likeliest stay. The paper's values are beta 0.1, alpha 0.6, keep 0.8, decay 0.9. alpha = 0 and keep = 1 is DPO.

  References:
    Wu et al., 2024, https://arxiv.org/abs/2407.08639.
  """
  total, weight = state or (jnp.zeros(()), jnp.zeros(()))
  margins_G, valid_G = jax.lax.stop_gradient(_margins(parts.log_ratio(policy, ref, labels))), policy.valid_G
  mean = _mean(margins_G, valid_G)
  total, weight = decay * total + (1 - decay) * mean, decay * weight + (1 - decay)
  running = total / weight
  distance_G = jnp.where(valid_G > 0, jnp.abs(margins_G - running), _FAR)
  rank_G = jnp.argsort(jnp.argsort(distance_G))
  kept_G = (rank_G.astype(jnp.float32) < jnp.ceil(keep * jnp.sum(valid_G))).astype(jnp.float32)
  # The step divides by all pairs, the loss is the mean of those that are kept.
  share_G = kept_G * jnp.sum(valid_G) / jnp.maximum(jnp.sum(kept_G), 1.0)
  now = jnp.maximum(1e-3, beta * (1 + alpha * (mean - running)))
  out = compose.pairwise(policy, ref, labels, state=(total, weight), beta=now, weight=lambda *_: share_G)
  metrics = {**out.metrics, 'beta': jnp.full_like(valid_G, now), 'kept': kept_G}
  return dataclasses.replace(out, metrics=metrics)


def aot(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Alignment via Optimal Transport, paired: the policy's gaps are to dominate the reference's in distribution.

    loss_i = -log sigmoid(beta [gap_(i) - ref_gap_(i)]),    gap = s_w - s_l, both sorted over the step's pairs

  TRL's `aot` (in its older versions and in EasyDeL `aot_pair` is the unpaired one). The paper uses beta 0.01. log 2
  where policy equals ref, up to the rounding of sums.

  References:
    Melnyk et al., 2024, https://arxiv.org/abs/2406.05882.
  """
  gaps_G, ref_gaps_G = _margins(policy.logps_GK), _margins(ref.logps_GK)
  x_G = beta * (gaps_G - _matched(ref_gaps_G, gaps_G, policy.valid_G))
  rewards_GK = beta * parts.log_ratio(policy, ref, labels)
  return types.LossOut(parts.logistic(x_G), compose.pair_metrics(policy, rewards_GK), state)


def aot_unpaired(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Alignment via Optimal Transport, unpaired: chosen log-ratios are to dominate rejected ones in distribution.

    loss_i = -log sigmoid(beta [z_w(i) - z_l(i)]),    both sorted over the step's pairs

  References:
    Melnyk et al., 2024, https://arxiv.org/abs/2406.05882.
  """
  z_GK = parts.log_ratio(policy, ref, labels)
  x_G = beta * (z_GK[:, 0] - _matched(z_GK[:, 1], z_GK[:, 0], policy.valid_G))
  return types.LossOut(parts.logistic(x_G), compose.pair_metrics(policy, beta * z_GK), state)


def _matched(x_G, like_G, valid_G):
  """For each entry of `like_G` the entry of `x_G` of the same rank; entries that are not valid come last in both."""
  last = lambda y_G: jnp.argsort(jnp.where(valid_G > 0, y_G, _FAR))
  rank_G = jnp.argsort(last(like_G))
  return x_G[last(x_G)[rank_G]]


def dr_dpo(policy, ref, labels, *, state=(), beta: float, beta_prime: float) -> types.LossOut:
  """Distributionally robust DPO: pairs that look mislabelled, having large losses, weigh less.

    loss = -beta' log mean exp(log sigmoid(beta h) / beta')

  the mean over the step's pairs. beta' -> infinity is DPO; the paper uses 1. log 2 at the reference. Of a pair that is
  labelled either way the margin stays finite where beta' > 1: beta h = beta' / (beta' - 1) log p / (1 - p).

  References:
    Wu et al., 2024, https://arxiv.org/abs/2407.07880, derived from its definition.
  """
  out = compose.pairwise(policy, ref, labels, state=state, beta=beta)
  valid_G = policy.valid_G
  scaled_G = jnp.where(valid_G > 0, -out.per_item / beta_prime, -_FAR)
  loss = -beta_prime * (jax.nn.logsumexp(scaled_G) - jnp.log(jnp.maximum(jnp.sum(valid_G), 1.0)))
  return dataclasses.replace(out, per_item=jnp.full_like(valid_G, loss))


def group_robust(policy, ref, labels, *, state=(), beta: float, groups: int, rate: float) -> types.LossOut:
  """Group Robust Preference Optimization: DPO for the worst of several groups of annotators or domains.

    loss = sum_g q_g L_g,    q_g <- q_g exp(rate L_g) / sum,    L_g the mean DPO loss of the step's pairs of group g

  The label `group` of a pair is a whole number in [0, groups); another makes the loss NaN. q is uniform at first and
  carries no gradient; `rate` 0 keeps it so.

  References:
    Ramesh et al., 2024, https://arxiv.org/abs/2405.20304, Alg. 1, derived from its definition.
  """
  out = compose.pairwise(policy, ref, labels, state=state, beta=beta)
  log_q = state if isinstance(state, jax.Array) else jnp.zeros(groups)
  numbers_N = jnp.arange(groups, dtype=jnp.float32)
  member_GN = (labels['group'][:, :1] == numbers_N[None, :]).astype(jnp.float32) * policy.valid_G[:, None]
  count_N = jnp.sum(member_GN, axis=0)
  mean_N = jnp.sum(member_GN * out.per_item[:, None], axis=0) / jnp.maximum(count_N, 1.0)
  log_q = jax.nn.log_softmax(log_q + rate * jax.lax.stop_gradient(mean_N))
  # A group that the step lacks gives its weight to the others.
  q_N = jnp.where(count_N > 0, jnp.exp(log_q), 0.0)
  weight_N = q_N / jnp.maximum(jnp.sum(q_N), 1e-30) / jnp.maximum(count_N, 1.0)
  known_G = jnp.sum(member_GN, axis=1) == policy.valid_G
  share_G = jnp.where(known_G, jnp.sum(member_GN * weight_N[None, :], axis=1) * jnp.sum(policy.valid_G), jnp.nan)
  metrics = {**out.metrics, 'worst_group': jnp.full_like(share_G, jnp.max(mean_N))}
  return types.LossOut(share_G * out.per_item, metrics, log_q)
