"""Losses on pairs that shift DPO's margin, weigh its pairs or tokens, or add a second term.

Contract and notation are those of `losses.preference`; n is a response's number of tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import compose
from jaxalign.losses import parts
from jaxalign.losses import preference

_of = functools.partial


def dpop(policy, ref, labels, *, state=(), beta: float, penalty: float) -> types.LossOut:
  """DPO-Positive: the chosen response must not become less likely than under the reference.

    loss = -log sigmoid(beta [h - penalty max(0, -z_w)])

  The penalty is inside the sigmoid, as in the paper. The paper's lambda = `penalty` is 50, its beta 0.3; 0 is DPO.

  References:
    Pal et al., 2024, https://arxiv.org/abs/2402.13228, Eq. 3.
  """
  offset = _of(parts.lost_likelihood, scale=beta * penalty)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=offset)


def odpo(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """DPO with an offset: a pair whose scores differ more must be won by more.

    loss = -log sigmoid(beta h - alpha log(score_w - score_l))

  Reads the label `score` of each response; where the chosen one's is not higher, the pair hardly counts. The paper's
  alpha is 1.

  References:
    Amini et al., 2024, https://arxiv.org/abs/2402.10571.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=_of(parts.score_gap, alpha=alpha))


def margin_dpo(policy, ref, labels, *, state=(), beta: float, scale: float = 1.0) -> types.LossOut:
  """DPO that must win by the label `margin` of the pair.

    loss = -log sigmoid(beta h - scale margin)

  References:
    Touvron et al., 2023 (Llama 2), https://arxiv.org/abs/2307.09288, Eq. 2, of reward models.
  """
  offset = lambda policy, ref, labels, z_GK: scale * labels['margin'][:, 0]
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=offset)


def modpo(policy, ref, labels, *, state=(), beta: float, weight: float) -> types.LossOut:
  """Multi-Objective DPO: preferences of one objective, with the rewards of the others as a margin.

    loss = -log sigmoid([beta h - (1 - weight) (score_w - score_l)] / weight)

  `weight` in (0, 1] is that of the objective whose preferences these are, the label `score` of each response the sum of
  the other rewards by weights that sum to 1. weight = 1 is DPO.

  References:
    Zhou et al., 2023, https://arxiv.org/abs/2310.03708, derived from its definition: over all pairs, the others being
    `score`, its optimum is ref e^((weight r + (1 - weight) score) / beta) / Z.
  """
  others = lambda policy, ref, labels, z_GK: (labels['score'][:, 0] - labels['score'][:, 1]) * (1 - weight) / weight
  return compose.pairwise(policy, ref, labels, state=state, beta=beta / weight, offset=others)


def r_dpo(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """DPO regularised by length: a longer chosen response must win by less, as length explains some of it.

    loss = -log sigmoid(beta h + alpha (n_w - n_l))

  The sign follows from the reward beta z + alpha n, and is OAT's. alpha is per token; 0 is DPO.

  References:
    Park et al., 2024, https://arxiv.org/abs/2403.19159.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=_of(parts.length_difference, alpha=alpha))


def ld_dpo(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Length-Desensitization DPO: tokens beyond the length of the shorter response count alpha of the others.

    loss = -log sigmoid(beta (z'_w - z'_l)),    z' = sum_(t < m) r_t + alpha sum_(t >= m) r_t

  with m = min(n_w, n_l) and r_t the log-ratio of a token. alpha in [0, 1]; the paper uses 0.5, 1 is DPO.

  References:
    Liu et al., 2024, https://arxiv.org/abs/2409.06411.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=_of(parts.tail_log_ratio, alpha=alpha))


def tis_dpo(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Token-level Importance Sampling DPO: each token's log-ratio is weighed by its label `weight`.

    loss = -log sigmoid(beta [sum_t w_t r_t (chosen) - sum_t w_t r_t (rejected)])

  Where the weights come from (the paper contrasts two models) is the data's affair; 1 everywhere is DPO, and 0 outside
  some spans compares these spans alone. The paper also subtracts a difference of sequential KLs, as TDPO does, which
  is left out here (from memory).

  References:
    Liu et al., 2024, https://arxiv.org/abs/2410.04350, derived from its definition.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, score=parts.weighted_log_ratio)


def tdpo1(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Token-level DPO: the margin is also to be won against how far the policy has moved on each response.

    loss = -log sigmoid(beta [h - (D_l - D_w)]),    D = sum_t KL(ref_t || pi_t), exact

  log 2 at the reference. The paper's beta is 0.1.

  References:
    Zeng et al., 2024, https://arxiv.org/abs/2404.11999, Eq. 13.
  """
  offset = _of(parts.divergence_gap, scale=beta)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=offset)


def tdpo2(policy, ref, labels, *, state=(), beta: float, alpha: float) -> types.LossOut:
  """Token-level DPO with a weight for the divergences, and no gradient through that of the chosen response.

    loss = -log sigmoid(beta [h - alpha (D_l - sg D_w)]),    D as in `tdpo1`

  log 2 at the reference; alpha = 0 is DPO. The paper's alpha is 0.5.

  References:
    Zeng et al., 2024, https://arxiv.org/abs/2404.11999, Eq. 17.
  """
  offset = _of(parts.divergence_gap, scale=beta * alpha, hold_chosen=True)
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, offset=offset)


def mallows_dpo(policy, ref, labels, *, state=(), beta: float, scale: float) -> types.LossOut:
  """DPO that is sharper for prompts whose answers vary little.

    loss = -log sigmoid(phi beta h),    phi = -scale log(1/2 [H_w + H_l])

  H is the mean over a response's tokens of the reference's next-token entropy, in shares of log V: phi is 0 where it
  knows nothing, and grows without bound as it becomes certain. From its definition, the paper's normalisation being by
  the number of tokens and the entropy of the uniform distribution. log 2 at the reference.

  References:
    Chen et al., 2024, https://arxiv.org/abs/2405.14953: Mallows-theta-DPO; the form with another link is not offered.
  """
  entropy_GK = ref.entropy_GK / jnp.maximum(policy.tokens_GK, 1.0)
  phi_G = -scale * jnp.log(jnp.clip(0.5 * (entropy_GK[:, 0] + entropy_GK[:, 1]), 1e-6, 1.0))
  score = lambda *stats: phi_G[:, None] * parts.log_ratio(*stats)
  out = compose.pairwise(policy, ref, labels, state=state, beta=beta, score=score)
  return dataclasses.replace(out, metrics={**out.metrics, 'dispersion': phi_G})


def pairwise_cringe(
    policy, ref, labels, *, state=(), alpha: float, gate_margin: float, temperature: float
) -> types.LossOut:
  """Pairwise CRINGE: fine-tuning on the chosen response, rivals against the rejected one's tokens, gated by margin.

    loss = g [-s_w + alpha sum_t log(1 + pi_t(y_l) / pi_t(rival))]
    g = sigmoid((gate_margin - s_w + s_l) / temperature)

  s is a summed log-probability. The rival of a token of the rejected response is drawn from the likeliest other tokens.
  The gate, which carries no gradient here, closes once the pair is won by `gate_margin` nats.

  References:
    Xu et al., 2023, https://arxiv.org/abs/2312.16682, Sec. 3.
  """
  s_GK = policy.logps_GK
  against_GK = masked.totals(parts.logistic(policy.rival_logps_BT - policy.logps_BT), policy.rows)
  gate_G = jax.nn.sigmoid((gate_margin - s_GK[:, 0] + s_GK[:, 1]) / temperature)
  loss_G = jax.lax.stop_gradient(gate_G) * (alpha * against_GK[:, 1] - s_GK[:, 0])
  return types.LossOut(loss_G, {**compose.pair_metrics(policy, s_GK), 'gate': gate_G}, state)


def wpo(policy, ref, labels, *, state=(), beta: float, clamp: bool = True) -> types.LossOut:
  """Weighted Preference Optimization: pairs weigh as much as the policy would say them itself, without gradient.

    loss = -w log sigmoid(beta h),    w = prod over both of exp(mean_t [log pi_t - log sum_v pi_tv^2])

  The authors clamp w at 1; TRL (`use_weighting`) does not. The paper uses beta 0.01.

  References:
    Zhou et al., 2024, https://arxiv.org/abs/2406.11827.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, weight=_of(parts.on_policy, clamp=clamp))


def cal_dpo(policy, ref, labels, *, state=(), beta: float, calibration: float) -> types.LossOut:
  """Calibrated DPO: implicit rewards are also to be +-1 / (2 beta).

    loss = -log sigmoid(h) + calibration [(z_w - 1 / (2 beta))^2 + (z_l + 1 / (2 beta))^2]

  The authors' code has `calibration` 1/2.

  References:
    Xiao et al., 2024, https://arxiv.org/abs/2412.14516.
  """
  terms = ((calibration, _of(parts.calibration, beta=beta)),)
  return compose.pairwise(policy, ref, labels, state=state, regularisers=terms)


def rpo(policy, ref, labels, *, state=(), beta: float, eta: float) -> types.LossOut:
  """DPO with supervised fine-tuning on the chosen response, against over-optimisation; also iterative RPO's loss.

    loss = -log sigmoid(beta h) - eta (1 / n_w) sum_t log pi_t (chosen)

  eta is 0.005 in RPO, 1 in iterative RPO (Pang et al., 2024, https://arxiv.org/abs/2404.19733).

  References:
    Liu et al., 2024, https://arxiv.org/abs/2405.16436.
  """
  return compose.pairwise(policy, ref, labels, state=state, beta=beta, regularisers=((eta, parts.nll),))


def mpo(policy, ref, labels, *, state=(), beta: float, weights: tuple[float, float, float]) -> types.LossOut:
  """Mixed Preference Optimization: DPO for preference, BCO for quality, supervised fine-tuning for generation.

    loss = c_1 dpo + c_2 bco_pair - c_3 (1 / n_w) sum_t log pi_t (chosen)

  The paper's weights are 0.8, 0.2 and 1. BCO's shift is 0 here, see `preference.bco_pair`.

  References:
    Wang et al., 2024, https://arxiv.org/abs/2411.10442.
  """
  dpo, bco = _of(preference.dpo, beta=beta), _of(preference.bco_pair, beta=beta)
  nll = _of(compose.anchored, terms=(), regularisers=((1.0, parts.nll),))
  losses = tuple(zip(weights, (dpo, bco, nll), strict=True))
  return compose.mixture(policy, ref, labels, state=state, losses=losses)
