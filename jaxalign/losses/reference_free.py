"""Losses on pairs without a reference, some with supervised fine-tuning in them.

Contract as of `losses.preference`, but that the reference is not read. s is a response's summed log-probability, n its
number of tokens, a = s / n, in nats; w is the chosen response, l the rejected one.
"""

import functools

from jaxalign import types
from jaxalign.losses import compose
from jaxalign.losses import parts

_of = functools.partial
_mean = _of(parts.log_prob, length_power=1.0)


def simpo(policy, ref, labels, *, state=(), beta: float, margin: float) -> types.LossOut:
  """Simple Preference Optimization.

    loss = -log sigmoid(beta (a_w - a_l) - margin)

  `margin` is the paper's gamma, with gamma / beta about 0.3 to 0.5, and beta 2 to 10.

  References:
    Meng et al., 2024, https://arxiv.org/abs/2405.14734, Eq. 6.
  """
  offset = _of(parts.constant, margin=margin)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=_mean, offset=offset)


def alphapo(policy, ref, labels, *, state=(), beta: float, margin: float, alpha: float) -> types.LossOut:
  """SimPO with a bent reward.

    loss = -log sigmoid(beta (r_w - r_l) - margin),    r = (1 - e^(-alpha a)) / alpha

  alpha -> 0 is `simpo`. The paper uses alpha 0.25, beta 2.5 and margin 0.1, TRL's names. a is a mean, as in TRL.

  References:
    Gupta et al., 2025, https://arxiv.org/abs/2501.03884.
  """
  shape, offset = _of(parts.alpha_divergence, alpha=alpha), _of(parts.constant, margin=margin)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=_mean, utility=shape, offset=offset)


def simper(policy, ref, labels, *, state=()) -> types.LossOut:
  """SimPER: inverse perplexity up for the chosen response, down for the rejected one; no hyperparameter.

    loss = -e^a_w + e^a_l

  In [-1, 1].

  References:
    Xiao et al., 2025, https://arxiv.org/abs/2502.00883.
  """
  return compose.pairwise(policy, ref, labels, state=state, score=_mean, utility=parts.exponential, link=parts.linear)


def cpo(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Contrastive Preference Optimization: DPO with a uniform reference, and supervised fine-tuning.

    loss = -log sigmoid(beta (s_w - s_l)) - alpha a_w

  The second term is averaged over tokens. TRL's defaults are beta 0.1 and alpha 1.

  References:
    Xu et al., 2024, https://arxiv.org/abs/2401.08417.
  """
  terms = ((alpha, parts.nll),)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=parts.log_prob, regularisers=terms)


def orpo(policy, ref, labels, *, state=(), lam: float) -> types.LossOut:
  """Odds Ratio Preference Optimization.

    loss = -a_w - lam log sigmoid(log odds(y_w) - log odds(y_l)),    odds = e^a / (1 - e^a)

  The first term is of the response alone (Hugging Face's TRL and Tunix take the prompt into it too). The paper's lambda
  is 0.1.

  References:
    Hong et al., 2024, https://arxiv.org/abs/2403.07691, Eq. 4, 6, 7.
  """
  link = lambda x: lam * parts.logistic(x)
  terms = ((1.0, parts.nll),)
  return compose.pairwise(
      policy, ref, labels, state=state, score=_mean, utility=parts.log_odds, link=link, regularisers=terms
  )


def slic_hf(policy, ref, labels, *, state=(), delta: float, lam: float) -> types.LossOut:
  """Sequence Likelihood Calibration from Human Feedback, with the chosen response as the target of fine-tuning.

    loss = max(0, delta - s_w + s_l) - lam s_w

  HALOs' defaults are delta 1 and lambda 0.1. The paper's target is a demonstration; see `tpo` for triples.

  References:
    Zhao et al., 2023, https://arxiv.org/abs/2305.10425.
  """
  terms = ((lam, _of(parts.nll, length_power=0.0)),)
  link = _of(parts.hinge, margin=delta)
  return compose.pairwise(policy, ref, labels, state=state, score=parts.log_prob, link=link, regularisers=terms)


def tpo(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Triple Preference Optimization: contrast of two responses and fine-tuning on a third, better one (slot 2).

    loss = -log sigmoid(beta (s_w - s_l)) - alpha a_gold

  Reads triples, K = 3. TRL's defaults are beta 0.01 and alpha 1.

  References:
    Saeidi et al., 2024, https://arxiv.org/abs/2405.16681.
  """
  terms = ((alpha, _of(parts.nll, slot=2)),)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=parts.log_prob, regularisers=terms)


def tpo_l(policy, ref, labels, *, state=(), beta: float, alpha: float, margin: float) -> types.LossOut:
  """TPO on mean log-probabilities with a margin, as SimPO has them.

    loss = -log sigmoid(beta (a_w - a_l) - margin) - alpha a_gold

  TRL's margin (gamma) is 0.5.

  References:
    Saeidi et al., 2024, https://arxiv.org/abs/2405.16681.
  """
  terms, offset = ((alpha, _of(parts.nll, slot=2)),), _of(parts.constant, margin=margin)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=_mean, offset=offset, regularisers=terms)
