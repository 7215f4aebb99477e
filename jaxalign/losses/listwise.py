"""Losses on lists of scored responses to one prompt.

Contract as of `losses.preference`, with K responses and the label `score` r of each, higher being better; a list may be
shorter than K (`policy.valid_GK`). z is the log-ratio to the reference, a the mean log-probability of a response's
tokens, v = beta z. Losses are sums over a list's responses or pairs, as in the papers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import parts

_NEVER = -1e30


def dpo_pl(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """DPO under the Plackett-Luce model: the likelihood of the whole ranking.

    loss = sum_k [log sum_(i >= k) e^(v_i) - v_k],    responses sorted by score, best first

  Responses of equal score do not compete. log K! at the reference; for K = 2 it is DPO.

  References:
    Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, App. A.3, derived from its definition.
  """
  v_GK = beta * parts.log_ratio(policy, ref, labels)
  return _out(policy, labels, v_GK, plackett_luce(v_GK, labels['score'], policy.valid_GK), state)


def plackett_luce(v_GK, score_GK, valid_GK):
  """-log likelihood `[G]` of the order of `score` under the strengths e^v.

    sum_k [log sum_(i = k or r_i < r_k) e^(v_i) - v_k]

  Responses of equal score do not compete, so that it does not depend on the order in which they stand.
  """
  both_GKK = (valid_GK[:, :, None] * valid_GK[:, None, :]) > 0
  worse_GKK = (differences(score_GK) > 0) | jnp.eye(score_GK.shape[1], dtype=bool)[None]
  rest_GK = jax.nn.logsumexp(jnp.where(worse_GKK & both_GKK, v_GK[:, None, :], _NEVER), axis=2)
  return jnp.sum(jnp.where(valid_GK > 0, rest_GK - v_GK, 0.0), axis=1)


def lipo_lambda(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Listwise Preference Optimization with LambdaLoss weights.

    loss = sum_(r_i > r_j) D_ij log(1 + e^-(v_i - v_j))
    D_ij = |2^r_i - 2^r_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|,  ranks by v, without gradient

  Scores are to be of the order of 1. The paper uses beta 0.05 and K 8.

  References:
    Liu et al., 2024, https://arxiv.org/abs/2402.01878, derived from its definition; the log is natural here, another
    base scales the loss.
  """
  v_GK = beta * parts.log_ratio(policy, ref, labels)
  fixed_GK = jnp.where(policy.valid_GK > 0, jax.lax.stop_gradient(v_GK), _NEVER)
  rank_GK = 1.0 + jnp.argsort(jnp.argsort(-fixed_GK, axis=1), axis=1).astype(jnp.float32)
  discount_GK, gain_GK = 1.0 / jnp.log1p(rank_GK), jnp.exp2(labels['score'])
  weight_GKK = jnp.abs(differences(gain_GK)) * jnp.abs(differences(discount_GK))
  loss_GKK = weight_GKK * parts.logistic(differences(v_GK))
  return _out(policy, labels, v_GK, _over_pairs(loss_GKK, labels, policy), state)


def rrhf(policy, ref, labels, *, state=(), weight: float) -> types.LossOut:
  """Rank Responses to align with Human Feedback: mean log-probabilities in the order of scores, and fine-tuning.

    loss = sum_(r_i > r_j) max(0, a_j - a_i) - weight a_best

  The paper's weight is 1.

  References:
    Yuan et al., 2023, https://arxiv.org/abs/2304.05302, Eq. 2 to 4.
  """
  a_GK = parts.log_prob(policy, ref, labels, length_power=1.0)
  loss_G = _over_pairs(parts.hinge(differences(a_GK), margin=0.0), labels, policy)
  return _out(policy, labels, a_GK, loss_G - weight * _best(a_GK, labels, policy), state)


def pro(policy, ref, labels, *, state=(), sft_weight: float) -> types.LossOut:
  """Preference Ranking Optimization: each response against all worse ones, hotter where scores differ more.

    loss = sum_(k < K) [log sum_(i >= k) e^(a_i T_ki) - a_k T_kk] - sft_weight a_best
    T_ki = r_k - r_i for i > k,    T_kk = max_i T_ki,    responses sorted by score, best first

  The authors' weight is 0.05 (K - 1)^2.

  References:
    Song et al., 2023, https://arxiv.org/abs/2306.17492, Eq. 7 to 10.
  """
  a_GK = parts.log_prob(policy, ref, labels, length_power=1.0)
  better_GKK = better(labels, policy)
  heat_GKK = jnp.where(better_GKK, differences(labels['score']), 0.0)
  own_GK = jnp.max(heat_GKK, axis=2)
  others_GKK = jnp.where(better_GKK, a_GK[:, None, :] * heat_GKK, _NEVER)
  own = a_GK * own_GK
  all_GKK = jnp.concatenate([own[..., None], others_GKK], axis=2)
  has_worse_GK = jnp.any(better_GKK, axis=2)
  loss_G = jnp.sum(jnp.where(has_worse_GK, jax.nn.logsumexp(all_GKK, axis=2) - own, 0.0), axis=1)
  return _out(policy, labels, a_GK, loss_G - sft_weight * _best(a_GK, labels, policy), state)


def infonca(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """InfoNCA: cross-entropy from the softmax of rewards to that of log-ratios.

    loss = -sum_i softmax(r / alpha)_i log softmax(v)_i

  Its optimum over all responses is ref e^(r / (alpha beta)) / Z. log K at the reference; one-hot rewards and K = 2 give
  DPO. The paper uses beta 0.01 and alpha 1e-2.

  References:
    Chen et al., 2024, https://arxiv.org/abs/2402.05369, Eq. 10.
  """
  v_GK = beta * parts.log_ratio(policy, ref, labels)
  return _out(
      policy, labels, v_GK, -jnp.sum(_target(labels, policy, alpha) * _log_softmax(v_GK, policy), axis=1), state
  )


def nca(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Noise Contrastive Alignment: absolute log-ratios, each response against noise.

    loss = -sum_i [softmax(r / alpha)_i log sigmoid(v_i) + 1/K log sigmoid(-v_i)]

  2 log 2 at the reference.

  References:
    Chen et al., 2024, https://arxiv.org/abs/2402.05369.
  """
  v_GK, valid_GK = beta * parts.log_ratio(policy, ref, labels), policy.valid_GK
  count_G1 = jnp.maximum(jnp.sum(valid_GK, axis=1, keepdims=True), 1.0)
  noise_GK = valid_GK / count_G1 * parts.logistic(-v_GK)
  loss_GK = _target(labels, policy, alpha) * parts.logistic(v_GK) + noise_GK
  return _out(policy, labels, v_GK, jnp.sum(loss_GK, axis=1), state)


def exo(policy, ref, labels, *, state=(), beta: float, reward_beta: float) -> types.LossOut:
  """Efficient Exact Optimization: the reverse KL from the softmax of log-ratios to that of rewards.

    loss = sum_i p_i [log p_i - log softmax(r / reward_beta)_i],    p = softmax(v)

  0 where both agree; it seeks modes, where `infonca` covers them.

  References:
    Ji et al., 2024, https://arxiv.org/abs/2402.00856.
  """
  v_GK = beta * parts.log_ratio(policy, ref, labels)
  log_p_GK, log_q_GK = _log_softmax(v_GK, policy), _log_softmax(labels['score'] / reward_beta, policy)
  return _out(policy, labels, v_GK, jnp.sum(jnp.exp(log_p_GK) * (log_p_GK - log_q_GK), axis=1), state)


def lire(policy, ref, labels, *, state=(), temperature: float) -> types.LossOut:
  """Listwise Reward Enhancement: the mean score under a softmax of summed log-probabilities.

    loss = -sum_i softmax(s / temperature)_i r_i

  The paper uses temperature 1 to 2. Derived from the definition in its abstract.

  References:
    Zhu et al., 2024, https://arxiv.org/abs/2405.13516.
  """
  s_GK = parts.log_prob(policy, ref, labels)
  share_GK = jnp.exp(_log_softmax(s_GK / temperature, policy))
  return _out(policy, labels, s_GK, -jnp.sum(share_GK * labels['score'], axis=1), state)


def dro(policy, ref, labels, *, state=(), tau: float) -> types.LossOut:
  """Direct Reward Optimization, the value of a prompt being the list's mean in place of a network's.

    loss = 1/2 mean_i (r_i - tau z_i - V)^2,    V = mean_i (r_i - tau z_i), the minimiser

  Its optimum over all responses is ref e^(r / tau) / Z. The paper trains a value network, on one response a prompt.

  References:
    Richemond et al., 2024, https://arxiv.org/abs/2405.19107, Eq. 5, derived from its definition.
  """
  z_GK, valid_GK = parts.log_ratio(policy, ref, labels), policy.valid_GK
  count_G1 = jnp.maximum(jnp.sum(valid_GK, axis=1, keepdims=True), 1.0)
  left_GK = labels['score'] - tau * z_GK
  value_G1 = jnp.sum(left_GK * valid_GK, axis=1, keepdims=True) / count_G1
  loss_G = 0.5 * jnp.sum(valid_GK * jnp.square(left_GK - value_G1), axis=1) / count_G1[:, 0]
  return _out(policy, labels, tau * z_GK, loss_G, state)


def dro_v(policy, ref, labels, *, state=(), tau: float) -> types.LossOut:
  """Direct Reward Optimization with a value network: a head on the policy, read where it has read the prompt.

    loss = 1/2 mean_i (r_i - V(x) - tau z_i)^2

  It moves the policy and V alike, and needs but one response a prompt. Its optimum over all responses is
  ref e^(r / tau) / Z, with V = tau log Z. The paper's V is a network of its own, its tau 1.

  References:
    Richemond et al., 2024, https://arxiv.org/abs/2405.19107, Eq. 5.
  """
  z_GK, valid_GK = parts.log_ratio(policy, ref, labels), policy.valid_GK
  count_G = jnp.maximum(jnp.sum(valid_GK, axis=1), 1.0)
  left_GK = valid_GK * (labels['score'] - policy.values_GK - tau * z_GK)
  out = _out(policy, labels, tau * z_GK, 0.5 * jnp.sum(jnp.square(left_GK), axis=1) / count_G, state)
  return dataclasses.replace(out, metrics={**out.metrics, 'values': policy.values_GK})


def d2o(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Distributional Dispreference Optimization: away from a rejected response, towards the policy's own others.

    loss = -log sigmoid(beta mean_k z_k - alpha z_0)

  Slot 0 is the rejected response, the others are samples of the model itself (`data.feedback.negative`). The paper's
  beta and alpha are 0.1, with 11 samples. It compares both sides with references of their own; here they have the same.
  log 2 at the reference.

  References:
    Duan et al., 2024, https://arxiv.org/abs/2403.03419, Eq. 6.
  """
  z_GK = parts.log_ratio(policy, ref, labels)
  own_GK = policy.valid_GK.at[:, 0].set(0.0)
  mean_G = jnp.sum(own_GK * z_GK, axis=1) / jnp.maximum(jnp.sum(own_GK, axis=1), 1.0)
  metrics = {
      'rewards/rejected': alpha * z_GK[:, 0],
      'rewards/own': beta * mean_G,
      'rewards/accuracies': (beta * mean_G > alpha * z_GK[:, 0]).astype(jnp.float32),
      'logps/rejected': policy.logps_GK[:, 0],
  }
  return types.LossOut(parts.logistic(beta * mean_G - alpha * z_GK[:, 0]), metrics, state)


def differences(x_GK):
  """Of response i and response j: `[G, K, K]`."""
  return x_GK[:, :, None] - x_GK[:, None, :]


def better(labels, policy):
  """Whether response i is better than j, both being there: `[G, K, K]`."""
  both_GKK = (policy.valid_GK[:, :, None] * policy.valid_GK[:, None, :]) > 0
  return (differences(labels['score']) > 0) & both_GKK


def concordance(rewards_GK, labels, policy):
  """The share of a list's pairs whose rewards are in the order of their scores: `[G]`."""
  pairs_GKK = better(labels, policy).astype(jnp.float32)
  right_GKK = pairs_GKK * (differences(rewards_GK) > 0).astype(jnp.float32)
  return jnp.sum(right_GKK, axis=(1, 2)) / jnp.maximum(jnp.sum(pairs_GKK, axis=(1, 2)), 1.0)


def _over_pairs(loss_GKK, labels, policy):
  return jnp.sum(jnp.where(better(labels, policy), loss_GKK, 0.0), axis=(1, 2))


def _best(x_GK, labels, policy):
  best_G = jnp.argmax(jnp.where(policy.valid_GK > 0, labels['score'], -jnp.inf), axis=1)
  return jnp.take_along_axis(x_GK, best_G[:, None], axis=1)[:, 0]


def _log_softmax(x_GK, policy):
  return jax.nn.log_softmax(jnp.where(policy.valid_GK > 0, x_GK, _NEVER), axis=1)


def _target(labels, policy, alpha: float):
  return jnp.exp(_log_softmax(labels['score'] / alpha, policy))


def _out(policy, labels, rewards_GK, loss_G, state) -> types.LossOut:
  """With the share of pairs whose rewards are in the order of their scores, and the reward of the best response."""
  metrics = {
      'rewards/accuracies': concordance(rewards_GK, labels, policy),
      'rewards/best': _best(rewards_GK, labels, policy),
      'logps/best': _best(policy.logps_GK, labels, policy),
  }
  return types.LossOut(loss_G, metrics, state)
