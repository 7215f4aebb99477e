"""How much better a response did than expected: pure functions of rewards, `returns` having those of tokens.

Rewards are `[G, K]` of K responses to each of G prompts, float32. `valid_GK` is 1 where there is such a response with a
reward: one that is missing, or whose reward function abstained, is left out of every baseline and has the advantage 0,
whatever stands in its place (not a NaN in rewards that count: check those where they are made). A response without
another one to compare with has the advantage 0 too. Where all rewards that are compared are equal, advantages are
exactly 0. `masked.to_tokens` spreads them over tokens.

Whitening and all that looks at the whole batch gives other numbers for other batches: call it on all of a rollout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import types

# (rewards_GK, valid_GK) -> [G, K]
Advantage = Callable[[types.Array, types.Array], types.Array]


def mean_centred(rewards_GK, valid_GK) -> types.Array:
  """Computes r - mean of the group. Liu et al., 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783.

  On average over samples its policy gradient is (K - 1) / K of the true one, `leave_one_out`'s.
  """
  return _centred(rewards_GK, valid_GK, axis=1)


def group_norm(rewards_GK, valid_GK, *, ddof: int = 1, epsilon: float = 1e-4) -> types.Array:
  """Computes (r - mean) / (std + epsilon) of the group. Shao et al., 2024 (GRPO), https://arxiv.org/abs/2402.03300.

  Args:
    rewards_GK: rewards.
    valid_GK: which of them count.
    ddof: 1 for the unbiased variance of TRL, verl, Tunix and OpenRLHF, 0 for that of the population.
    epsilon: of TRL; 1e-6 in verl and Tunix, 1e-9 in OpenRLHF.
  """
  return _normalised(rewards_GK, valid_GK, 1, ddof, epsilon)


def batch_norm(rewards_GK, valid_GK, *, ddof: int = 1, epsilon: float = 1e-4) -> types.Array:
  """(r - mean of the group) / (std of the batch + epsilon): TRL's `scale_rewards="batch"`.

  Liu et al., 2025 (Lite PPO), https://arxiv.org/abs/2508.08221.
  """
  deviation_11 = _std(_centred(rewards_GK, valid_GK, axis=None), valid_GK, None, ddof)
  return mean_centred(rewards_GK, valid_GK) / (deviation_11 + epsilon)


def leave_one_out(rewards_GK, valid_GK) -> types.Array:
  """Computes r - mean of the group's other rewards, which is K / (K - 1) of `mean_centred`; unbiased.

  A lone response has no other: 0, as in Tunix and in verl's vectorised form; verl's loop leaves the reward as it is.
  Ahmadian et al., 2024 (RLOO), https://arxiv.org/abs/2402.14740.
  """
  count_G1 = jnp.sum(valid_GK, axis=1, keepdims=True)
  return mean_centred(rewards_GK, valid_GK) * count_G1 / jnp.maximum(count_G1 - 1, 1.0)


def length_weighted(rewards_GK, valid_GK, *, tokens_GK) -> types.Array:
  """Computes r - sum n r / sum n of the group, n being lengths in tokens.

  The baseline of least variance where a token's gradient is as large as any other's.
  Hao et al., 2025 (OPO), https://arxiv.org/abs/2505.23585.
  """
  return _centred(rewards_GK, valid_GK, axis=1, weight=valid_GK * tokens_GK)


def best_only(rewards_GK, valid_GK, *, ddof: int = 1, epsilon: float = 1e-6) -> types.Array:
  """(best - second best) / (std + epsilon) for the best response of a group, 0 for the others; ties give 0.

  For pass@k: what counts is that one is right. Derived from the definition of verl's `grpo_passk`, after
  https://arxiv.org/abs/2503.19595; the epsilon is verl's.
  """
  there_GK = jnp.where(valid_GK > 0, rewards_GK, -jnp.inf)
  best_GK = jax.nn.one_hot(jnp.argmax(there_GK, axis=1), rewards_GK.shape[1]) * valid_GK
  second_G1 = jnp.max(jnp.where(best_GK > 0, -jnp.inf, there_GK), axis=1, keepdims=True)
  gap_GK = jnp.where((best_GK > 0) & jnp.isfinite(second_G1), rewards_GK - second_G1, 0.0)
  return gap_GK / (_std(_centred(rewards_GK, valid_GK, axis=1), valid_GK, 1, ddof) + epsilon)


def nonzero_scaled(rewards_GK, valid_GK) -> types.Array:
  """Computes (r - mean of the group) times the batch's number of responses / that of rewards that are not 0, if any.

  Chu et al., 2025 (GPG), https://arxiv.org/abs/2504.02546; verl's scale.
  """
  nonzero = jnp.sum(valid_GK * (rewards_GK != 0).astype(jnp.float32))
  return mean_centred(rewards_GK, valid_GK) * (jnp.sum(valid_GK) / jnp.maximum(nonzero, 1.0))


def greedy_baseline(rewards_GK, valid_GK, *, greedy_G) -> types.Array:
  """Computes r - reward of the greedy response to the same prompt. Li et al., 2023 (ReMax), arXiv:2310.10505.

  0 where that response has none, which is NaN in `greedy_G`.
  """
  known_GK = (valid_GK > 0) & ~jnp.isnan(greedy_G)[:, None]
  return jnp.where(known_GK, rewards_GK - jnp.nan_to_num(greedy_G)[:, None], 0.0)


def normalise_then_sum(rewards_RGK, valid_RGK, *, weights_R, ddof: int = 1, epsilon: float = 1e-4) -> types.Array:
  """Normalises each of R rewards in its group, sums them by weight, and normalises the sum over the batch.

  Unlike the norm of a sum it tells combinations of rewards apart. TRL's `normalize_then_sum`.
  Liu et al., 2026 (GDPO), https://arxiv.org/abs/2601.05242.
  """
  each_RGK = jax.vmap(lambda *of: group_norm(*of, ddof=ddof, epsilon=epsilon))(rewards_RGK, valid_RGK)
  valid_GK = jnp.max(valid_RGK, axis=0)
  return _normalised(jnp.tensordot(weights_R, each_RGK, axes=1, precision='highest'), valid_GK, None, ddof, epsilon)


def whitened(x, mask, *, ddof: int = 1, epsilon: float = 1e-8) -> types.Array:
  """(x - mean) / sqrt(variance + epsilon) over all that counts, 0 elsewhere: of tokens `[B, T]` or of responses.

  ddof 1 and epsilon inside the root are of verl and Tunix; OpenRLHF takes the variance of the population (ddof 0).
  Tokens of long responses weigh as much as any. Hu et al., 2025 (REINFORCE++), https://arxiv.org/abs/2501.03262.
  """
  centred = _centred(x, mask, axis=None)
  return centred / jnp.sqrt(jnp.square(_std(centred, mask, None, ddof)) + epsilon)


def optimal_values(rewards_GK, valid_GK, *, beta: float) -> types.Array:
  """Computes V* = beta log mean e^(r / beta) of a group that the reference sampled: `[G]`, 0 where it is empty.

  A*-PO's first stage. Brantley et al., 2025, https://arxiv.org/abs/2505.20686, which uses beta 0.5.
  """
  count_G = jnp.sum(valid_GK, axis=1)
  sum_G = jax.nn.logsumexp(jnp.where(valid_GK > 0, rewards_GK / beta, -jnp.inf), axis=1)
  return jnp.where(count_G > 0, beta * (sum_G - jnp.log(jnp.maximum(count_G, 1.0))), 0.0)


def scores(rewards_GK, valid_GK) -> dict[str, types.Array]:
  """Rewards as they are, and which are known, for `losses.rewarded.rebel`."""
  return {'score': rewards_GK, 'score_known': valid_GK}


def soft_optimal(rewards_GK, valid_GK, ref_rewards_GN, *, beta: float) -> dict[str, types.Array]:
  """Rewards, and V* of what the reference writes to the same prompt, for `losses.rewarded.a_star_po`.

  The reference's that have no reward, NaN in `ref_rewards_GN`, are left out; where none has one nothing is known.
  """
  there_GN = ~jnp.isnan(ref_rewards_GN)
  value_G = optimal_values(jnp.nan_to_num(ref_rewards_GN), there_GN.astype(jnp.float32), beta=beta)
  known_GK = valid_GK * jnp.any(there_GN, axis=1, keepdims=True)
  value_GK = jnp.broadcast_to(value_G[:, None], rewards_GK.shape)
  return {'score': rewards_GK, 'score_known': known_GK, 'optimal_value': value_GK}


def lagrangian(rewards_RGK, valid_RGK, loss_state, *, advantage_fn: Advantage = mean_centred) -> dict[str, types.Array]:
  """Another's advantages of (r - lambda c) / (1 + lambda), r being the first reward and c, a cost, the second.

  lambda is of `losses.actor_critic.constrained`, and 1 at first. Responses count of which both are known.
  Dai et al., 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773, Eq. 10 and its appendix on PPO-Lag.
  """
  reward_GK, cost_GK = rewards_RGK[0], rewards_RGK[1]
  both_GK = valid_RGK[0] * valid_RGK[1]
  advantages_GK = advantage_fn(less_cost(reward_GK, cost_GK, loss_state), both_GK)
  return {'advantages': advantages_GK, 'cost': cost_GK, 'cost_known': valid_RGK[1]}


def less_cost(reward, cost, loss_state) -> types.Array:
  """Computes (r - lambda c) / (1 + lambda), lambda being of `losses.actor_critic.constrained`, and 1 at first."""
  multiplier = jnp.exp(loss_state['log_lambda']) if 'log_lambda' in loss_state else 1.0
  return (reward - multiplier * cost) / (1 + multiplier)


def _centred(x, valid, axis: int | None, weight=None):
  """Less the mean over what counts, and 0 elsewhere; what is equal becomes exactly 0."""
  weight = valid if weight is None else weight
  # Rounding in the mean of equal numbers would be blown up by a division by their deviation.
  start = jnp.max(jnp.where(valid > 0, x, -jnp.inf), axis=axis, keepdims=True)
  shifted = jnp.where(valid > 0, x - start, 0.0)
  total = jnp.sum(weight, axis=axis, keepdims=True)
  mean = jnp.sum(shifted * weight, axis=axis, keepdims=True) / jnp.maximum(total, 1.0)
  return jnp.where(valid > 0, shifted - mean, 0.0)


def _std(centred, valid, axis: int | None, ddof: int):
  count = jnp.sum(valid, axis=axis, keepdims=True)
  return jnp.sqrt(jnp.sum(jnp.square(centred), axis=axis, keepdims=True) / jnp.maximum(count - ddof, 1.0))


def _normalised(x, valid, axis: int | None, ddof: int, epsilon: float):
  centred = _centred(x, valid, axis)
  return centred / (_std(centred, valid, axis, ddof) + epsilon)
