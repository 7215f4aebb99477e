"""What policy-gradient losses are made of: ratios, the clip, estimates of a divergence, weights against staleness.

Log-ratios x are `[B, T]`, of the policy to the one that wrote the tokens (`old_logps`), or to a reference. Weights are
called as `weight(policy, ref, labels)`, give one number per token, and no gradient passes through them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types

# (x_BT, policy) -> [B, T]
Level = Callable[[types.Array, types.Stats], types.Array]
# x_BT -> [B, T]
Estimator = Callable[[types.Array], types.Array]

_CAP = 20.0  # as verl; e^20 times what a gradient brings is finite in float32, and the gradient beyond is 0


# Log-ratios and the level at which they are taken.


def log_ratio(policy, labels) -> types.Array:
  """Computes x_t = log pi_t - log old_t."""
  return policy.logps_BT - labels['old_logps']


def token(x_BT, policy) -> types.Array:
  """Each token's own."""
  del policy
  return x_BT


def response_sum(x_BT, policy) -> types.Array:
  """The sum over the response's counted tokens, at each of them."""
  return masked.to_tokens(masked.totals(x_BT, policy.rows), policy.rows)


def response_mean(x_BT, policy) -> types.Array:
  """The mean over the response's counted tokens, at each of them."""
  mean_GK = masked.totals(x_BT, policy.rows) / jnp.maximum(policy.tokens_GK, 1.0)
  return masked.to_tokens(mean_GK, policy.rows)


def ratio(x_BT) -> types.Array:
  """e^x, held below e^20."""
  return jnp.exp(jnp.minimum(x_BT, _CAP))


def coefficient(beta: float, state) -> types.Array:
  """A coefficient of the divergence, which a state of `actor_critic.adaptive` may have changed."""
  return beta * jnp.exp(state['log_coefficient']) if 'log_coefficient' in state else jnp.asarray(beta, jnp.float32)


# The clip.


def clipped(
    ratio_BT, advantages_BT, *, low: float, high: float, dual_clip: float | None = None, max_ratio: float | None = None
) -> types.Array:
  """PPO's surrogate: what moves the ratio out of [1 - low, 1 + high] has no gradient, what moves it back has.

    loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

  Args:
    ratio_BT: new to old policy.
    advantages_BT: A.
    low: how far below 1 the ratio may fall where A < 0.
    high: how far above 1 it may rise where A > 0.
    dual_clip: c > 1: the loss is at most -c A where A < 0. Ye et al., 2019, https://arxiv.org/abs/1912.09729, uses 3.
    max_ratio: the unclipped ratio is at most this, which matters where A < 0. Prime Intellect, 2025,
      https://arxiv.org/abs/2505.07291, uses 4; TRL's `delta`.
  """
  free_BT = ratio_BT if max_ratio is None else jnp.minimum(ratio_BT, max_ratio)
  loss_BT = -jnp.minimum(free_BT * advantages_BT, jnp.clip(ratio_BT, 1 - low, 1 + high) * advantages_BT)
  if dual_clip is None:
    return loss_BT
  return jnp.where(advantages_BT < 0, jnp.minimum(loss_BT, -dual_clip * advantages_BT), loss_BT)


def ratio_metrics(policy, labels, ratio_BT, *, low: float, high: float) -> dict[str, types.Array]:
  """TRL's: mean ratio, half the squared log-ratio (k2 of old to new), and where the clip takes the gradient away."""
  advantages_BT = labels['advantages']
  low_BT = ((ratio_BT < 1 - low) & (advantages_BT < 0)).astype(jnp.float32)
  high_BT = ((ratio_BT > 1 + high) & (advantages_BT > 0)).astype(jnp.float32)
  return {
      'val/ratio': ratio_BT,
      'policy/approxkl_avg': k2(log_ratio(policy, labels)),
      'clip_ratio/low_mean': low_BT,
      'clip_ratio/high_mean': high_BT,
      'clip_ratio/region_mean': low_BT + high_BT,
  }


# Estimates of KL(policy || reference) of a token that the policy wrote, x = log pi - log ref.
# Schulman, 2020, http://joschu.net/blog/kl-approx.html. `limit` holds the estimate within [-limit, limit]; verl and
# OpenRLHF use 10, TRL none.


def k1(x_BT, *, limit: float | None = None) -> types.Array:
  """Computes x: unbiased in value; as a loss its gradient is 0 on average, so it belongs in the reward."""
  return _limited(x_BT, limit)


def k2(x_BT, *, limit: float | None = None) -> types.Array:
  """x^2 / 2: biased in value; as a loss its gradient is that of KL(policy || reference) on average."""
  return _limited(0.5 * jnp.square(x_BT), limit)


def k3(x_BT, *, limit: float | None = None) -> types.Array:
  """e^-x - 1 + x >= 0: unbiased in value; as a loss its gradient is that of KL(reference || policy) on average.

  -x is held below 20, as in verl.
  """
  down_BT = jnp.minimum(-x_BT, _CAP)
  return _limited(jnp.expm1(down_BT) - down_BT, limit)


def kl_penalty(x_BT, *, value: Estimator = k3, gradient: Estimator = k2) -> types.Array:
  """The value of one estimate with the gradient of another.

  By default the value is unbiased and never negative, and the gradient is that of KL(policy || reference) on average:
  verl's `k3+`. Where x is 0 both are 0.
  """
  slope_BT = gradient(x_BT)
  return jax.lax.stop_gradient(value(x_BT)) + slope_BT - jax.lax.stop_gradient(slope_BT)


def _limited(x_BT, limit: float | None):
  return x_BT if limit is None else jnp.clip(x_BT, -limit, limit)


# Weights. Those of importance correct for a sampler whose log-probabilities are not those of the old policy.


def truncated_importance(policy, ref, labels, *, max_weight: float, level: Level = token) -> types.Array:
  """Computes min(old / sampler, max_weight), of tokens or, at the level `response_sum`, of whole responses.

  1 where both agree. 2 or 3 is usual. Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy
  RL training"; TRL's and verl's truncated importance sampling.
  """
  del ref
  return jnp.minimum(_importance(policy, labels, level), max_weight)


def masked_importance(
    policy, ref, labels, *, min_weight: float = 0.0, max_weight: float, level: Level = token
) -> types.Array:
  """Computes old / sampler where that is within [min_weight, max_weight], and 0 elsewhere.

  IcePop (Ling Team, 2025, https://arxiv.org/abs/2510.18855) uses [0.5, 5] on tokens; TRL's default is at the level
  `response_sum`, up to 3.
  """
  del ref
  weight_BT = _importance(policy, labels, level)
  return jnp.where((weight_BT >= min_weight) & (weight_BT <= max_weight), weight_BT, 0.0)


def high_entropy(policy, ref, labels, *, share: float) -> types.Array:
  """1 for the `share` of a step's tokens whose next-token distributions have the most entropy; 0 for the others.

  Wang et al., 2025, https://arxiv.org/abs/2506.01939, uses 0.2; TRL's `top_entropy_quantile` is 1 - share.
  """
  del ref, labels
  counted_BT = _counted(policy)
  return largest(jnp.where(counted_BT > 0, policy.entropy_BT, -jnp.inf), share * jnp.sum(counted_BT))


def clip_cov(policy, ref, labels, *, share: float, low: float, high: float) -> types.Array:
  """0 for `share` of a step's tokens, drawn from those whose `covariances` are in (low, high); 1 for the others.

  What raises likely tokens takes entropy away. Tokens are drawn by the digits of their covariance beyond the third, so
  that a step is the same whenever it is made again. Cui et al., 2025, https://arxiv.org/abs/2505.22617, Sec. 4.2, and
  verl, whose share is 2e-4 of the band 1 to 5.
  """
  del ref
  covariance_BT, counted_BT = covariances(policy, labels)
  band_BT = (counted_BT > 0) & (covariance_BT > low) & (covariance_BT < high)
  drawn_BT = jnp.where(band_BT, jnp.mod(covariance_BT * 1e3, 1.0), -jnp.inf)
  return 1.0 - largest(drawn_BT, share * jnp.sum(counted_BT))


def covariances(policy, labels) -> tuple[types.Array, types.Array]:
  """(log pi_t - its mean)(A_t - its mean) over a step's tokens, without gradient, and which tokens count."""
  counted_BT = _counted(policy)
  centred = lambda x_BT: x_BT - jnp.sum(x_BT * counted_BT) / jnp.maximum(jnp.sum(counted_BT), 1.0)
  return centred(jax.lax.stop_gradient(policy.logps_BT)) * centred(labels['advantages']), counted_BT


def largest(x_BT, count) -> types.Array:
  """1 for so many of the largest numbers, rounded up, no fewer than one, and what equals them; 0 for -inf."""
  place = jnp.clip(jnp.ceil(count).astype(jnp.int32), 1, x_BT.size) - 1
  least = -jnp.sort(-x_BT.reshape(-1))[place]
  return ((x_BT >= least) & (x_BT > -jnp.inf)).astype(jnp.float32)


def _counted(policy) -> types.Array:
  """Which tokens of a step count: reading `valid_G` shows a loss all of them at once."""
  return policy.mask_BT * jnp.max(policy.valid_G)


def off_policy_mask(policy, ref, labels, *, max_drift: float) -> types.Array:
  """0 for tokens with A < 0 of responses that have become unlikely: mean_t(log sampler - log pi) > max_drift; else 1.

  DeepSeek-AI, 2025 (V3.2), https://arxiv.org/abs/2512.02556. TRL's documentation suggests 0.5.
  """
  del ref
  drift_BT = response_mean(jax.lax.stop_gradient(labels['sampler_logps'] - policy.logps_BT), policy)
  return 1.0 - ((labels['advantages'] < 0) & (drift_BT > max_drift)).astype(jnp.float32)


def _importance(policy, labels, level: Level):
  return ratio(level(labels['old_logps'] - labels['sampler_logps'], policy))
