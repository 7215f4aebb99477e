"""Losses on pairs of responses, of which one was preferred, against a reference.

All have the contract of `compose.pairwise`: they read pairs (K = 2, chosen first) and return one loss per pair. In the
equations z is a response's log-ratio, the sum over its tokens of log pi - log ref, in nats; w is the chosen response, l
the rejected one, h = z_w - z_l. `beta` > 0 is the pull towards the reference, in 1/nats of a whole response: a value
tuned for a length-normalised loss does not carry over. Where policy equals reference z and h are 0.
"""

import functools

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import compose
from jaxalign.losses import parts

_of = functools.partial


def dpo(policy, ref, labels, *, state=(), beta: float, label_smoothing: float = 0.0) -> types.LossOut:
  """Direct Preference Optimization.

    loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

  Where policy equals ref the loss is log 2, whatever `beta` is, and the gradient with respect to the chosen
  log-probability is -beta (1/2 - eps). The paper uses beta 0.1 and eps = `label_smoothing` = 0.

  References:
    Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Eq. 7; label smoothing: see `cdpo`.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=_of(parts.smooth, eps=label_smoothing))


def cdpo(policy, ref, labels, *, state=(), beta: float, label_smoothing: float) -> types.LossOut:
  """Conservative DPO: a label is wrong with probability eps = `label_smoothing` in [0, 1/2).

    loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

  Least where sigmoid(beta h) = 1 - eps, so that the margin stays finite. 0.1 in HALOs' and TRL's examples.

  References:
    Mitchell, 2023, "A note on DPO with noisy preferences", Eq. 3.
  """
  return dpo(policy, ref, labels, state=state, beta=beta, label_smoothing=label_smoothing)


def robust(policy, ref, labels, *, state=(), beta: float, label_smoothing: float) -> types.LossOut:
  """Robust DPO: unbiased for clean labels where a label is wrong with probability eps = `label_smoothing` < 1/2.

    loss = [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps)

  It is unbounded below as h grows. With eps = 0 it is `dpo`; where policy equals ref it is log 2.

  References:
    Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=_of(parts.robust, eps=label_smoothing))


def soft(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """DPO on soft preferences: the label `probability` p says how likely the chosen response is the better one.

    loss = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)

  With p of a Bradley-Terry model of rewards r, over all pairs, its optimum is ref e^(r / beta) / Z. DNO (Rosset et al.,
  2024, https://arxiv.org/abs/2404.03715) trains by it with p of a judge.
  """
  p = lambda policy, ref, labels, z_GK: labels['probability'][:, 0]
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, probability=p)


def ipo(policy, ref, labels, *, state=(), tau: float) -> types.LossOut:
  """Identity Preference Optimization: the margin is to be 1 / (2 tau), no more.

    loss = (h - 1 / (2 tau))^2

  The sum over tokens, as in the paper, OpenRLHF and OAT; TRL, HALOs and EasyDeL average, see `ipo_averaged`. Where
  policy equals ref the loss is 1 / (4 tau^2). The paper's tau is our usual beta, 0.1.

  References:
    Azar et al., 2023, https://arxiv.org/abs/2310.12036, Eq. 17.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=tau, link=_of(_regressed, tau=tau))


def ipo_averaged(policy, ref, labels, *, state=(), tau: float) -> types.LossOut:
  """IPO on log-ratios averaged over the tokens of each response, as in TRL, HALOs and EasyDeL.

    loss = (z_w / n_w - z_l / n_l - 1 / (2 tau))^2

  References:
    Azar et al., 2023, https://arxiv.org/abs/2310.12036; averaging as its authors advised TRL's.
  """
  score, link = _of(parts.log_ratio, length_power=1.0), _of(_regressed, tau=tau)
  return compose.pairwise(policy, ref, labels, state=state, beta=tau, score=score, link=link)


def _regressed(x, *, tau: float):
  """(x / tau - 1 / (2 tau))^2."""
  return parts.squared(x, target=0.5) / tau**2


def hinge(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Hinge loss on the normalised margin: SLiC's loss with a reference (RSO's hinge-norm; TRL's `hinge`).

    loss = max(0, 1 - beta h)

  1 where policy equals ref, and without gradient once beta h >= 1. RSO uses beta 0.05.

  References:
    Zhao et al., 2023, https://arxiv.org/abs/2305.10425; Liu et al., 2023, https://arxiv.org/abs/2309.06657.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=parts.hinge)


def rso(policy, ref, labels, *, state=(), gamma: float) -> types.LossOut:
  """Statistical Rejection Sampling Optimization, the sigmoid-norm loss; its pairs come from rejection sampling.

    loss = -log sigmoid(gamma h)

  The paper's gamma is 0.05; its other loss is `hinge`. On pairs that were not drawn so it is `dpo` with beta = gamma.

  References:
    Liu et al., 2023, https://arxiv.org/abs/2309.06657, derived from its definition.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=gamma)


def gpo(policy, ref, labels, *, state=(), beta: float, link: parts.Link) -> types.LossOut:
  """Generalized Preference Optimization: any link, convex as all here but `parts.savage`.

    loss = link(beta h)

  `parts.logistic` is DPO, `parts.hinge` SLiC, `parts.squared` IPO (up to scale, beta = 2 tau), and there are
  `parts.exponential_loss`, `parts.truncated_quadratic` and `parts.savage`.

  References:
    Tang et al., 2024, https://arxiv.org/abs/2402.05749, Table 1, derived from its definition.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=link)


def f_dpo(policy, ref, labels, *, state=(), beta: float, divergence) -> types.LossOut:
  """DPO under another divergence from the reference than the reverse KL.

    loss = -log sigmoid(beta [f'(e^z_w) - f'(e^z_l)])

  `divergence` is f' as a function of z: `parts.identity` (reverse KL, which is DPO), `parts.forward_kl`,
  `parts.jensen_shannon` or `parts.alpha_divergence`. Additive constants of f' do not count. log 2 at the reference.

  References:
    Wang et al., 2023, https://arxiv.org/abs/2309.16240, Table 1 and Thm. 1.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, utility=divergence)


def chi_po(policy, ref, labels, *, state=(), beta: float, max_reward: float) -> types.LossOut:
  """chi-squared Preference Optimization: f' = u + log u, which holds against over-optimisation.

    loss = -log sigmoid(clip(beta [phi(z_w) - phi(z_l)], -2 R, 2 R)),    phi(z) = z + e^z

  with R = `max_reward`, a bound of the true reward. Where the clip acts there is no gradient.

  References:
    Huang et al., 2024, https://arxiv.org/abs/2407.13399, Alg. 1.
  """
  bound = 2 * max_reward
  link = lambda x: parts.logistic(jnp.clip(x, -bound, bound))
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, utility=parts.chi_squared, link=link)


def exo_pair(policy, ref, labels, *, state=(), beta: float, label_smoothing: float) -> types.LossOut:
  """Efficient Exact Optimization for pairs: the reverse KL from the policy's preference to the smoothed label.

    loss = KL(Bernoulli(sigmoid(beta h)) || Bernoulli(1 - eps))

  0 where sigmoid(beta h) = 1 - eps. eps = `label_smoothing` in (0, 1/2), TRL's default 1e-3; 0 would be infinite.

  References:
    Ji et al., 2024, https://arxiv.org/abs/2402.00856.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=_of(parts.reverse_kl, eps=label_smoothing))


def discopop(policy, ref, labels, *, state=(), beta: float, tau: float) -> types.LossOut:
  """Discovered Preference Optimization: logistic and exponential loss, blended by the margin itself.

    loss = (1 - g) log(1 + e^-x) + g e^-x,    x = beta h,  g = sigmoid(x / tau)

  (log 2 + 1) / 2 at the reference; not convex. The paper uses beta 0.05 and tau 0.05.

  References:
    Lu et al., 2024, https://arxiv.org/abs/2406.08414.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=_of(parts.discovered, tau=tau))


def sigmoid_norm(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Length-normalised DPO.

    loss = -log sigmoid(beta (z_w / n_w - z_l / n_l))

  beta is per mean token: Tulu 3 uses 5.

  References:
    Lambert et al., 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, Sec. 5.
  """
  score = _of(parts.log_ratio, length_power=1.0)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=score)


def apo_zero(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Anchored Preference Optimization, zero: up with the chosen response, down with the rejected one.

    loss = 1 - sigmoid(beta z_w) + sigmoid(beta z_l)

  1 at the reference. For a model that is worse than the chosen responses. The paper uses beta 0.1.

  References:
    D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266.
  """
  terms = (0, 1.0, parts.miss), (1, -1.0, parts.miss)
  return compose.anchored(policy, ref, labels, state=state, beta=beta, terms=terms)


def apo_down(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Anchored Preference Optimization, down: both responses down, the rejected one further.

    loss = sigmoid(beta z_w) + 1 - sigmoid(beta h)

  1 at the reference. For a model that is better than the chosen responses: z_w falls. The paper uses beta 0.1.

  References:
    D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266.
  """
  down = lambda policy, ref, labels, z_GK: jax.nn.sigmoid(beta * z_GK[:, 0])
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, link=parts.miss, regularisers=((1.0, down),))


def nca_pair(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Noise Contrastive Alignment for pairs: absolute likelihoods, so that the chosen one does not fall.

    loss = -log sigmoid(beta z_w) - 1/2 log sigmoid(-beta z_w) - 1/2 log sigmoid(-beta z_l)

  2 log 2 at the reference. The paper uses beta 0.01.

  References:
    Chen et al., 2024, https://arxiv.org/abs/2402.05369.
  """
  terms = (0, 1.0, parts.logistic), (0, -0.5, parts.logistic), (1, -0.5, parts.logistic)
  return compose.anchored(policy, ref, labels, state=state, beta=beta, terms=terms)


def bco_pair(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Binary Classifier Optimization on pairs, its reward shift being 0 as in TRL; `unpaired.bco` has the running mean.

    loss = -log sigmoid(beta z_w) - log sigmoid(-beta z_l)

  2 log 2 at the reference. TRL's beta is 0.1, the paper's 0.01.

  References:
    Jung et al., 2024, https://arxiv.org/abs/2404.04656.
  """
  terms = (0, 1.0, parts.logistic), (1, -1.0, parts.logistic)
  return compose.anchored(policy, ref, labels, state=state, beta=beta, terms=terms)


def sppo_hard(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Self-Play Preference Optimization with hard labels; the reference is the policy that the pairs were drawn from.

    loss = (z_w - 1 / (2 beta))^2 + (z_l + 1 / (2 beta))^2

  beta is 1 / eta of the paper (eta 1e3). The sum, as in TRL; the authors' code averages both squares.

  References:
    Wu et al., 2024, https://arxiv.org/abs/2405.00675.
  """
  link = _of(_regressed, tau=beta)
  return compose.anchored(policy, ref, labels, state=state, beta=beta, terms=((0, 1.0, link), (1, -1.0, link)))
