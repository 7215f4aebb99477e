"""Advantages and returns of tokens, and advantages that know the reference: pure functions, `[B, T]` in packed rows.

Nothing ever crosses from one response to another. Functions whose first argument is `rewards_GK` are for
`rollouts.Options.advantage_fn`; `loss_state` may hold what `losses.actor_critic.adaptive` made of their `beta`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import policy_parts
from jaxalign.rl import advantages


class Estimates(NamedTuple):
  """Advantages of tokens, `[B, T]`, and the returns that a critic is to learn: advantages plus values."""

  advantages: types.Array
  returns: types.Array


def gae(rewards_BT, values_BT, rows: types.Batch | types.Rows, *, discount: float, lam: float) -> Estimates:
  """Generalised advantage estimation within each response.

    delta_t = r_t + discount V_(t+1) - V_t,    A_t = delta_t + discount lam A_(t+1)

  The next token is the response's next one that counts: prompts, padding and what a tool wrote in between are stepped
  over, without discount. After its last one V and A are 0. A reward counts where the mask does.

  Args:
    rewards_BT: of each token.
    values_BT: V, a critic's output where it has read what comes before the token.
    rows: where the responses are.
    discount: gamma; 1 is usual.
    lam: 0.95 in TRL, 1 in OpenRLHF, where A_t + V_t is the discounted sum of the rewards that follow.

  References:
    Schulman et al., 2015, https://arxiv.org/abs/1506.02438, Eq. 16.
  """

  def back(carry, now):
    next_advantage_B, next_value_B, next_response_B = carry
    reward_B, value_B, response_B, mask_B = now
    same_B = (response_B == next_response_B).astype(jnp.float32)
    delta_B = reward_B + discount * same_B * next_value_B - value_B
    advantage_B = delta_B + discount * lam * same_B * next_advantage_B
    here = (advantage_B, value_B, response_B)
    carry = jax.tree.map(lambda new, old: jnp.where(mask_B > 0, new, old), here, carry)
    return carry, jnp.where(mask_B > 0, advantage_B, 0.0)

  zeros_B = jnp.zeros_like(rewards_BT[:, 0])
  start = (zeros_B, zeros_B, jnp.full(zeros_B.shape, -1, jnp.int32))
  tokens = tuple(jnp.swapaxes(x_BT, 0, 1) for x_BT in (rewards_BT, values_BT, rows.responses_BT, rows.mask_BT))
  advantages_BT = jnp.swapaxes(jax.lax.scan(back, start, tokens, reverse=True)[1], 0, 1)
  return Estimates(advantages_BT, jnp.where(rows.mask_BT > 0, advantages_BT + values_BT, 0.0))


def returns_to_go(rewards_BT, rows: types.Batch | types.Rows, *, discount: float = 1.0) -> types.Array:
  """The discounted sum of a token's reward and all that follow in its response, `[B, T]`: `gae` without a critic."""
  return gae(rewards_BT, jnp.zeros_like(rewards_BT), rows, discount=discount, lam=1.0).advantages


def shaped_rewards(
    rewards_GK,
    log_ratio_BT,
    rows: types.Batch | types.Rows,
    *,
    beta: float,
    kl: policy_parts.Estimator = policy_parts.k1,
) -> types.Array:
  """Rewards of tokens, `[B, T]`: of a response at its last token that counts, of staying near the reference at each.

    r_t = -beta kl(log pi_t - log ref_t) + [t is last] r

  Args:
    rewards_GK: of each response.
    log_ratio_BT: log pi_t - log ref_t of the policy that wrote the tokens.
    rows: where the responses are.
    beta: pull towards the reference, >= 0; 0.05 in TRL, 0.02 in the paper.
    kl: estimate of the divergence; the gradient of a reward by `k1` is right on average, by no other one.

  References:
    Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, Eq. 2.
  """
  length_BT = masked.to_tokens(masked.totals(jnp.ones_like(log_ratio_BT), rows), rows)
  last_BT = masked.order(rows) == length_BT - 1
  own_BT = jnp.where(last_BT, masked.to_tokens(rewards_GK, rows), 0.0)
  return jnp.where(rows.mask_BT > 0, own_BT - beta * kl(log_ratio_BT), 0.0)


def actor_critic(
    rewards_GK,
    valid_GK,
    values_BT,
    log_ratio_BT,
    rows: types.Rows,
    loss_state=(),
    *,
    beta: float,
    lam: float,
    discount: float = 1.0,
    whiten: bool = True,
) -> Estimates:
  """PPO's advantages and returns: `gae` of `shaped_rewards`; advantages then `whitened` over all tokens.

  A response without a reward has the advantage 0, and its own values for returns. TRL's beta is 0.05, lam 0.95.
  """
  rewards_BT = shaped_rewards(rewards_GK, log_ratio_BT, rows, beta=policy_parts.coefficient(beta, loss_state))
  return _of_critic(rewards_BT, valid_GK, values_BT, rows, lam, discount, whiten)


def lagrangian(
    rewards_RGK,
    valid_RGK,
    values_BTO,
    log_ratio_BT,
    rows: types.Rows,
    loss_state=(),
    *,
    beta: float,
    lam: float,
    discount: float = 1.0,
) -> dict[str, types.Array]:
  """PPO under a constraint: advantages and returns of a reward r, the first, and of a cost c, the second.

    A = (A_r - lambda A_c) / (1 + lambda),    A_r and A_c by `gae` of `shaped_rewards`, of r and -c with half of beta

  The paper's critics are two networks; here they are two outputs of one, `values_BTO`, that share all below the head:
  one pass over a batch makes both, each with returns of its own. lambda is of `losses.actor_critic.constrained`, 1 at
  first, and the pull to the reference beta / 2 whatever it is. What is not known of a response leaves A at 0, and its
  critic's returns at its values. A is not whitened.
  Dai et al., 2023 (Safe RLHF), https://arxiv.org/abs/2310.12773, Sec. 3.3 and its appendix on PPO-Lag.

  Raises:
    UsageError: there are other than two values.
  """
  if values_BTO.shape[-1] != 2:
    problem = 'returns.lagrangian reads values of a reward and of a cost; bind recipe.Recipe.critic_outputs = 2'
    raise types.UsageError(
        f'rollouts.Options.advantage_fn: the critic has {values_BTO.shape[-1]} outputs, and {problem}'
    )
  each = []
  for i, sign in enumerate((1, -1)):
    rewards_BT = sign * shaped_rewards(sign * rewards_RGK[i], log_ratio_BT, rows, beta=beta / 2)
    each.append(_of_critic(rewards_BT, valid_RGK[i], values_BTO[..., i], rows, lam, discount, whiten=False))
  of_reward, of_cost = each
  advantages_BT = advantages.less_cost(of_reward.advantages, of_cost.advantages, loss_state)
  both_BT = masked.to_tokens(valid_RGK[0] * valid_RGK[1], rows)
  return {
      'advantages': jnp.where(both_BT > 0, advantages_BT, 0.0),
      'values': values_BTO[..., 0],
      'returns': of_reward.returns,
      'cost_values': values_BTO[..., 1],
      'cost_returns': of_cost.returns,
      'cost': rewards_RGK[1],
      'cost_known': valid_RGK[1],
  }


def _of_critic(rewards_BT, valid_GK, values_BT, rows, lam: float, discount: float, whiten: bool) -> Estimates:
  """`gae`, whitened where responses have a reward; where they have none there is nothing to learn."""
  found = gae(rewards_BT, values_BT, rows, discount=discount, lam=lam)
  counts_BT = rows.mask_BT * masked.to_tokens(valid_GK, rows)
  whitened_BT = advantages.whitened(found.advantages, counts_BT) if whiten else found.advantages
  return Estimates(whitened_BT, jnp.where(counts_BT > 0, found.returns, values_BT))


def rto(
    token_rewards_BT,
    outcomes_GK,
    valid_GK,
    values_BT,
    log_ratio_BT,
    rows: types.Rows,
    loss_state=(),
    *,
    beta: float,
    lam: float,
    discount: float = 1.0,
    whiten: bool = True,
) -> Estimates:
  """RTO: `actor_critic` whose tokens earn what a policy aligned by DPO says of them, `--reward=runs/dpo(beta=B)`.

    r_t = B log(dpo_t / ref_t) - beta log(pi_t / ref_t) + [t is last] r,    r of the rewards that tell no tokens apart

  The paper's B is 0.05. Zhong et al., 2024, https://arxiv.org/abs/2404.18922, Eq. 4.5; derived from its definition.
  """
  shaped_BT = shaped_rewards(outcomes_GK, log_ratio_BT, rows, beta=policy_parts.coefficient(beta, loss_state))
  return _of_critic(shaped_BT + token_rewards_BT, valid_GK, values_BT, rows, lam, discount, whiten)


def prime(
    critic_ratio_BT, rewards_GK, valid_GK, rows: types.Rows, *, beta: float, discount: float = 1.0
) -> dict[str, types.Array]:
  """PRIME: `implicit_rewards` of a critic that learns them, by `losses.actor_critic.implicit_rewards`, as it goes.

  r_s is beta times the critic's log-ratio to the reference, before the update by the rollout. Rewards are outcomes, and
  the critic is told of them within 0 and 1. The paper's beta is 0.05.
  Cui et al., 2025, https://arxiv.org/abs/2502.01456, Algorithm 1.
  """
  outcome_GK = jnp.where(valid_GK > 0, jnp.clip(rewards_GK, 0.0, 1.0), -1.0)
  advantages_BT = implicit_rewards(beta * critic_ratio_BT, rewards_GK, valid_GK, rows, discount=discount)
  return {'advantages': advantages_BT, 'outcome': outcome_GK}


def implicit_rewards(
    token_rewards_BT, outcomes_GK, valid_GK, rows: types.Rows, *, discount: float = 1.0
) -> types.Array:
  """Outcomes and implicit rewards of tokens, each less what the group's other responses have.

    A_t = sum_(s >= t) discount^(s - t) (r_s - b) + r - mean of the others' r,    b the mean over them of their mean r_s

  r_s is of a model of implicit rewards that stays as it is, `--reward=DIR(beta=0.05)`.
  Cui et al., 2025, https://arxiv.org/abs/2502.01456, Eq. 5.
  """
  lengths_GK = masked.totals(jnp.ones_like(token_rewards_BT), rows)
  mean_GK = masked.totals(token_rewards_BT, rows) / jnp.maximum(lengths_GK, 1.0)
  others_GK = mean_GK - advantages.leave_one_out(mean_GK, valid_GK)
  follows_BT = returns_to_go(token_rewards_BT - masked.to_tokens(others_GK, rows), rows, discount=discount)
  return follows_BT + masked.to_tokens(advantages.leave_one_out(outcomes_GK, valid_GK), rows)


def process_supervised(
    token_rewards_BT, token_marks_BT, valid_GK, rows: types.Rows, *, epsilon: float = 1e-4
) -> types.Array:
  """GRPO with process supervision: the normalised rewards of all steps that end at a token or later.

    A_t = sum_(steps that end at s >= t) (r_s - mean) / (std + epsilon)

  Mean and deviation (of a sample) are of all steps of the group; `token_marks_BT` is 1 where a step ends.
  Shao et al., 2024, https://arxiv.org/abs/2402.03300, Sec. 4.1.3.
  """
  marks_BT = token_marks_BT * masked.to_tokens(valid_GK, rows)
  of_group = lambda x_BT: jnp.sum(masked.totals(x_BT * marks_BT, rows), axis=1, keepdims=True)
  spread = lambda x_G1: masked.to_tokens(jnp.broadcast_to(x_G1, valid_GK.shape), rows)
  count_G1 = of_group(jnp.ones_like(marks_BT))
  centred_BT = token_rewards_BT - spread(of_group(token_rewards_BT) / jnp.maximum(count_G1, 1.0))
  deviation_G1 = jnp.sqrt(of_group(jnp.square(centred_BT)) / jnp.maximum(count_G1 - 1, 1.0))
  return returns_to_go(marks_BT * centred_BT / (spread(deviation_G1) + epsilon), rows)


def reinforce_plus_plus(
    rewards_GK, valid_GK, log_ratio_BT, rows: types.Rows, loss_state=(), *, beta: float, discount: float = 1.0
) -> types.Array:
  """REINFORCE++: what follows each token of `shaped_rewards`, `whitened` over all tokens of the batch.

  Its code's beta is 0.01. Hu et al., 2025, https://arxiv.org/abs/2501.03262, Eq. 8 and 9.
  """
  beta = policy_parts.coefficient(beta, loss_state)
  follows_BT = returns_to_go(shaped_rewards(rewards_GK, log_ratio_BT, rows, beta=beta), rows, discount=discount)
  return advantages.whitened(follows_BT, rows.mask_BT * masked.to_tokens(valid_GK, rows))


def whitened_baseline(rewards_GK, valid_GK, rows: types.Rows) -> types.Array:
  """REINFORCE++-baseline: r - mean of the group, `whitened` over all tokens; the divergence is then the loss's.

  Hu et al., 2025, https://arxiv.org/abs/2501.03262, its second variant.
  """
  counts_BT = rows.mask_BT * masked.to_tokens(valid_GK, rows)
  return advantages.whitened(masked.to_tokens(advantages.mean_centred(rewards_GK, valid_GK), rows), counts_BT)


def penalised(
    rewards_GK,
    valid_GK,
    log_ratio_BT,
    rows: types.Rows,
    loss_state=(),
    *,
    beta: float,
    advantage_fn: advantages.Advantage,
) -> types.Array:
  """Another's advantages of r - beta sum_t (log pi_t - log ref_t): the pull to the reference is a part of the reward.

  RLOO's paper has beta 0.03, TRL 0.05. Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Eq. 2 and 5.
  """
  beta = policy_parts.coefficient(beta, loss_state)
  return advantage_fn(rewards_GK - beta * masked.totals(log_ratio_BT, rows), valid_GK)


def distribution_matching(
    rewards_GK,
    valid_GK,
    log_ratio_BT,
    logps_BT,
    sampler_logps_BT,
    rows: types.Rows,
    *,
    beta: float,
    divergence: Callable[[types.Array], types.Array],
) -> types.Array:
  """f-DPG: pseudo-rewards -f'(pi / p), less the mean of the group's others, for a target p = ref e^(r / beta) / Z.

  Z of a prompt is the mean over its responses of ref e^(r / beta) / mu, mu being the policy that wrote them. On average
  the gradient, where mu is pi, is that of the f-divergence of policy and target, whose minimum KL-regularised learning
  shares. log(pi / p) is held within 10.

  Args:
    rewards_GK: r.
    valid_GK: which of them count.
    log_ratio_BT: log pi_t - log ref_t.
    logps_BT: log pi_t.
    sampler_logps_BT: log mu_t; mu is an earlier policy where rollouts are asynchronous.
    rows: where the responses are.
    beta: the smaller, the more the target follows the reward.
    divergence: f' as a function of log(pi / p), whose additive constant does not count: `parts.identity` (KL of policy
      to target), `parts.forward_kl` (of target to policy), `parts.jensen_shannon` or `parts.total_variation`.

  References:
    Go et al., 2023, https://arxiv.org/abs/2302.08215, Theorem 1 and Table 1; Z of a prompt after Korbak et al., 2022,
    https://arxiv.org/abs/2112.00791; derived from their definitions.
  """
  log_weight_GK = rewards_GK / beta - masked.totals(log_ratio_BT, rows)
  drawn_GK = log_weight_GK + masked.totals(logps_BT - sampler_logps_BT, rows)
  there_GK = jnp.where(valid_GK > 0, drawn_GK, -jnp.inf)
  count_G1 = jnp.maximum(jnp.sum(valid_GK, axis=1, keepdims=True), 1.0)
  log_z_G1 = jax.nn.logsumexp(there_GK, axis=1, keepdims=True) - jnp.log(count_G1)
  z_GK = jnp.clip(jnp.where(valid_GK > 0, log_z_G1 - log_weight_GK, 0.0), -10, 10)
  return advantages.leave_one_out(-divergence(z_GK), valid_GK)
