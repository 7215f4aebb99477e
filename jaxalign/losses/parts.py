"""What losses on responses are made of: small pure functions that a composition (`losses.compose`) puts together.

    loss = weight * link(beta * (utility(z_w) - utility(z_l)) - offset) + sum of coefficient * regulariser

Scores z of responses are `[G, K]`, chosen first in a pair (w is slot 0, l slot 1). Parts that look at more than their
argument are called as `part(policy, ref, labels, z_GK)` and give one number per group, `[G]`; what they read is found
by tracing, so a part that reads no reference needs none. Links take x, of any shape, elementwise, and are small where
x is large.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types

Link = Callable[[types.Array], types.Array]


# Scores: what of a response is compared.


def log_ratio(policy, ref, labels, *, length_power: float = 0.0):
  """Computes z = sum_t (log pi_t - log ref_t) / n^p: the implicit reward up to beta; p = 1 averages over tokens."""
  del labels
  return ref.logratios_GK / _lengths(policy, length_power)


def log_prob(policy, ref, labels, *, length_power: float = 0.0):
  """Computes z = sum_t log pi_t / n^p: reference-free; p = 1 averages over the n tokens."""
  del ref, labels
  return policy.logps_GK / _lengths(policy, length_power)


def tail_log_ratio(policy, ref, labels, *, alpha: float):
  """Computes z = sum_(t < m) r_t + alpha sum_(t >= m) r_t, r_t a log-ratio, m the length of the shortest response.

  What a response says beyond the length of the other counts less. Liu et al., 2024 (LD-DPO),
  https://arxiv.org/abs/2409.06411; alpha in [0, 1], 1 gives `log_ratio`.
  """
  del labels
  shortest_G1 = jnp.min(policy.tokens_GK, axis=1, keepdims=True)
  order_BT = masked.order(policy.rows)
  limit_BT = masked.to_tokens(jnp.broadcast_to(shortest_G1, policy.tokens_GK.shape), policy.rows)
  weight_BT = jnp.where(order_BT < limit_BT, 1.0, alpha)
  return masked.totals(weight_BT * (policy.logps_BT - ref.logps_BT), policy.rows)


def weighted_log_ratio(policy, ref, labels):
  """Computes z = sum_t w_t (log pi_t - log ref_t), with the label `weight` of each token: importance, or a mask."""
  return masked.totals(labels['weight'] * (policy.logps_BT - ref.logps_BT), policy.rows)


def _lengths(policy, power: float):
  return jnp.maximum(policy.tokens_GK, 1.0) ** power if power else 1.0


# Utilities: elementwise in z; u = e^z is the ratio pi / ref.


def identity(z):
  """f'(u) = log u: reverse KL."""
  return z


def forward_kl(z):
  """f'(u) = -1 / u. Wang et al., 2023 (f-DPO), https://arxiv.org/abs/2309.16240, Table 1."""
  return -_exp(-z)


def jensen_shannon(z):
  """f'(u) = log(2u / (1 + u)). f-DPO, Table 1."""
  return jax.nn.log_sigmoid(z) + jnp.log(2.0)


def alpha_divergence(z, *, alpha: float):
  """f'(u) = (1 - u^-alpha) / alpha, alpha in (0, 1): 0 is reverse KL, 1 forward KL. f-DPO, Table 1.

  With z a mean log-probability it is AlphaPO's reward shape. TRL's `f_alpha_divergence_coef` is 1 - alpha.
  """
  return -jnp.expm1(jnp.minimum(-alpha * z, _CAP)) / alpha


def total_variation(z):
  """f'(u) = sign(u - 1) / 2. Go et al., 2023 (f-DPG), https://arxiv.org/abs/2302.08215, Table 1."""
  return 0.5 * jnp.sign(z)


def chi_squared(z):
  """Computes log u + u. Huang et al., 2024 (chi-PO), https://arxiv.org/abs/2407.13399."""
  return z + _exp(z)


def log_odds(z):
  """Computes log p / (1 - p) of p = e^z, z < 0. Hong et al., 2024 (ORPO), https://arxiv.org/abs/2403.07691, Eq. 4."""
  z = jnp.minimum(z, -1e-7)
  return z - jnp.log(-jnp.expm1(z))


def exponential(z):
  """e^z. Of a mean log-probability, the inverse perplexity: Xiao et al., 2025 (SimPER)."""
  return _exp(z)


_CAP = 60.0  # e^60 is finite in float32, and so is its square root's product with what a gradient brings


def _exp(z):
  return jnp.exp(jnp.minimum(z, _CAP))


# Links.


def logistic(x):
  """log(1 + e^-x)."""
  return -jax.nn.log_sigmoid(x)


def hinge(x, *, margin: float = 1.0):
  """max(0, margin - x)."""
  return jax.nn.relu(margin - x)


def squared(x, *, target: float = 1.0):
  """(x - target)^2."""
  return jnp.square(x - target)


def exponential_loss(x):
  """e^-x. Tang et al., 2024 (GPO), https://arxiv.org/abs/2402.05749, Table 1."""
  return _exp(-x)


def truncated_quadratic(x):
  """max(0, 1 - x)^2. GPO, Table 1."""
  return jnp.square(jax.nn.relu(1 - x))


def savage(x):
  """1 / (1 + e^x)^2. GPO, Table 1."""
  return jnp.square(jax.nn.sigmoid(-x))


def miss(x):
  """1 - sigmoid(x)."""
  return jax.nn.sigmoid(-x)


def linear(x):
  """-x."""
  return -x


def discovered(x, *, tau: float):
  """(1 - g) log(1 + e^-x) + g e^-x with g = sigmoid(x / tau). Lu et al., 2024 (DiscoPOP), arXiv:2406.08414."""
  gate = jax.nn.sigmoid(x / tau)
  return (1 - gate) * logistic(x) + gate * _exp(-x)


def reverse_kl(x, *, eps: float):
  """KL(Bernoulli(sigmoid(x)) || Bernoulli(1 - eps)), eps in (0, 1/2). Ji et al., 2024 (EXO), arXiv:2402.00856."""
  to_chosen = jax.nn.log_sigmoid(x) - jnp.log1p(-eps)
  to_rejected = jax.nn.log_sigmoid(-x) - jnp.log(eps)
  return jax.nn.sigmoid(x) * to_chosen + jax.nn.sigmoid(-x) * to_rejected


def smooth(x, *, eps: float, link: Link = logistic):
  """(1 - eps) link(x) + eps link(-x): a label is wrong with probability eps in [0, 1/2)."""
  return (1 - eps) * link(x) + eps * link(-x)


def robust(x, *, eps: float, link: Link = logistic):
  """((1 - eps) link(x) - eps link(-x)) / (1 - 2 eps): unbiased where a label is wrong with probability eps < 1/2.

  Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409.
  """
  return ((1 - eps) * link(x) - eps * link(-x)) / (1 - 2 * eps)


# Offsets: subtracted from beta times the difference of utilities.


def constant(policy, ref, labels, z_GK, *, margin: float):
  """A margin by which every pair should be won."""
  del policy, ref, labels
  return jnp.full(z_GK.shape[:1], margin)


def length_difference(policy, ref, labels, z_GK, *, alpha: float):
  """-alpha (n_w - n_l), n in tokens: a chosen response that is longer must win by less.

  Park et al., 2024 (R-DPO), https://arxiv.org/abs/2403.19159.
  """
  del ref, labels, z_GK
  return -alpha * (policy.tokens_GK[:, 0] - policy.tokens_GK[:, 1])


def score_gap(policy, ref, labels, z_GK, *, alpha: float):
  """Computes alpha log(score_w - score_l) of the label `score`. Amini et al., 2024 (ODPO), arXiv:2402.10571."""
  del policy, ref, z_GK
  gap_G = labels['score'][:, 0] - labels['score'][:, 1]
  return alpha * jnp.log(jnp.maximum(gap_G, 1e-6))


def lost_likelihood(policy, ref, labels, z_GK, *, scale: float):
  """Computes scale * max(0, -z_w): what the chosen response has lost against the reference.

  Pal et al., 2024 (DPO-Positive), https://arxiv.org/abs/2402.13228, Eq. 3.
  """
  del policy, ref, labels
  return scale * jax.nn.relu(-z_GK[:, 0])


def divergence_gap(policy, ref, labels, z_GK, *, scale: float, hold_chosen: bool = False):
  """Computes scale (D_l - D_w), D the sum of exact KL(ref || policy) over a response's tokens.

  `hold_chosen` lets no gradient through D_w. Zeng et al., 2024 (TDPO), https://arxiv.org/abs/2404.11999, Eq. 13 and 17.
  """
  del labels, z_GK
  sums_GK = masked.totals(ref.kl_BT, policy.rows)
  chosen_G = jax.lax.stop_gradient(sums_GK[:, 0]) if hold_chosen else sums_GK[:, 0]
  return scale * (sums_GK[:, 1] - chosen_G)


# Weights: no gradient passes through them.


def on_policy(policy, ref, labels, z_GK, *, clamp: bool = True):
  """Product over both responses of exp(mean_t(log pi_t - log sum_v pi_tv^2)): how far the policy would say them itself.

  Zhou et al., 2024 (WPO), https://arxiv.org/abs/2406.11827. The authors' code clamps the product at 1, TRL
  does not.
  """
  del ref, labels, z_GK
  mean_GK = (policy.logps_GK - policy.sharpness_GK) / jnp.maximum(policy.tokens_GK, 1.0)
  weight_G = jnp.exp(jnp.sum(mean_GK[:, :2], axis=1))
  return jnp.minimum(weight_G, 1.0) if clamp else weight_G


# Regularisers.


def nll(policy, ref, labels, z_GK, *, slot: int = 0, length_power: float = 1.0):
  """-sum_t log pi_t / n^p of the response in `slot`: supervised fine-tuning beside; p = 1 averages over tokens."""
  del ref, labels, z_GK
  return -(policy.logps_GK / _lengths(policy, length_power))[:, slot]


def calibration(policy, ref, labels, z_GK, *, beta: float):
  """(z_w - 1 / (2 beta))^2 + (z_l + 1 / (2 beta))^2. Xiao et al., 2024 (Cal-DPO), arXiv:2412.14516."""
  del policy, ref, labels
  return jnp.square(z_GK[:, 0] - 0.5 / beta) + jnp.square(z_GK[:, 1] + 0.5 / beta)


# Metrics.


def calibration_error(p_G, right_G, *, bins: int = 10) -> masked.Calibration:
  """What the expected calibration error of predictions is made of: their gaps and counts in bins of confidence.

  Args:
    p_G: confidence in what was predicted, [0, 1]; bin m of M holds those in ((m - 1) / M, m / M].
    right_G: whether that was right; 1/2 for a prediction that takes no side.
    bins: M, of equal width.

  References:
    Guo et al., 2017, https://arxiv.org/abs/1706.04599, Sec. 2.
  """
  bin_G = jnp.clip(jnp.ceil(p_G * bins).astype(jnp.int32) - 1, 0, bins - 1)
  count_GN = jax.nn.one_hot(bin_G, bins)
  return masked.Calibration(count_GN * (p_G - right_G)[:, None], count_GN)


def binary_calibration_error(x_G) -> masked.Calibration:
  """The same where sigmoid(x) is the probability of what is true: x is a margin, or negated where the label is 0."""
  return calibration_error(jax.nn.sigmoid(jnp.abs(x_G)), 0.5 * (1.0 + jnp.sign(x_G)))
