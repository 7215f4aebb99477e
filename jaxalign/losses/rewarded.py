"""Losses on whole responses that were sampled and scored: one value per group.

Contract of `losses.preference`, for lists of any length. r is the label `score` of a response, its reward; z its
log-ratio to the reference, or for `rebel` to the policy that wrote it. `rebel` and `a_star_po` leave out responses of
which the label `score_known` is 0, and those without a token that counts, as they were cut.
"""

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types


def rebel(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """REBEL: the difference of two responses' log-ratios to the old policy is regressed on that of their rewards.

    loss = (beta (z_0 - z_1) - (r_0 - r_1))^2,    z = sum_t log pi_t - log old_t

  For two responses a prompt, in either order. The paper writes 1 / eta for beta; its code multiplies the rewards
  by eta instead, which is this loss times eta^2. Its eta is 1. (r_0 - r_1)^2 where policy equals old; 0 where a
  response is missing.

  References:
    Gao et al., 2024, https://arxiv.org/abs/2404.16767, Algorithm 1.
  """
  del ref
  if labels['score'].shape[1] != 2:
    raise types.UsageError(f'rebel compares two responses to a prompt, and there are {labels["score"].shape[1]}')
  z_GK = masked.totals(policy.logps_BT - labels['old_logps'], policy.rows)
  gap_G = labels['score'][:, 0] - labels['score'][:, 1]
  margin_G = beta * (z_GK[:, 0] - z_GK[:, 1])
  both_G = jnp.min(_known(policy, labels)[:, :2], axis=1)
  right_G = masked.Weighted((margin_G * gap_G > 0).astype(jnp.float32) * both_G, both_G)
  return types.LossOut(jnp.square(margin_G - gap_G) * both_G, {'rewards/accuracies': right_G}, state)


def _known(policy, labels) -> types.Array:
  return policy.valid_GK * labels['score_known'] * (policy.tokens_GK > 0).astype(jnp.float32)


def a_star_po(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """A*-PO: the log-ratio is regressed on the optimal advantage.

    loss = mean_k (beta z_k - (r_k - V*))^2

  V*, the label `optimal_value` of each response's prompt, is that of `advantages.optimal_values` on samples of the
  reference. With V* = beta log E_ref e^(r / beta) the optimum is ref e^(r / beta) / Z, and the loss is 0 there. The
  paper uses beta 1e-3, and 0.5 for V*. (r - V*)^2 where policy equals ref.

  References:
    Brantley et al., 2025, https://arxiv.org/abs/2505.20686; TRL's `experimental.a2po`.
  """
  rewards_GK = beta * ref.logratios_GK
  wanted_GK = labels['score'] - labels['optimal_value']
  loss_G = _over_responses(jnp.square(rewards_GK - wanted_GK), _known(policy, labels))
  return types.LossOut(loss_G, {'rewards': rewards_GK, 'rewards/wanted': wanted_GK}, state)


def a_lol(policy, ref, labels, *, state=(), clip_eps: float) -> types.LossOut:
  """Advantage-Leftover Lunch RL: an offline policy gradient on responses that are better than the reference's value.

    loss = -mean_k max(A_k, 0) sg(clip(e^z_k, 1 - eps, 1 + eps)) s_k,    A = r - V

  V is the mean reward of the list: what the reference earns on the prompt, where it wrote the list; the paper trains a
  head to say so. s is the summed log-probability. A response no better than V adds 0, and counts. -max(A, 0) s where
  policy equals ref. TRL's and verl's clip_eps of 0.2 is usual; the paper uses 0.9.

  References:
    Baheti et al., 2023, https://arxiv.org/abs/2305.14718, derived from its definition.
  """
  value_G = _over_responses(labels['score'], policy.valid_GK)
  advantages_GK = jax.nn.relu(labels['score'] - value_G[:, None])
  ratio_GK = jax.lax.stop_gradient(jnp.clip(jnp.exp(ref.logratios_GK), 1 - clip_eps, 1 + clip_eps))
  loss_G = _over_responses(-advantages_GK * ratio_GK * policy.logps_GK, policy.valid_GK)
  used_GK = (advantages_GK > 0).astype(jnp.float32)
  return types.LossOut(loss_G, {'val/ratio': ratio_GK, 'advantages': advantages_GK, 'advantages/used': used_GK}, state)


def _over_responses(x_GK, valid_GK):
  """The mean over the responses that a group has: `[G]`."""
  return jnp.sum(jnp.where(valid_GK > 0, x_GK, 0.0), axis=1) / jnp.maximum(jnp.sum(valid_GK, axis=1), 1.0)
