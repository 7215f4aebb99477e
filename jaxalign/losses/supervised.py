"""Losses on demonstrations: one value per target token."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import parts


def cross_entropy(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Negative log-likelihood of the targets.

    loss_t = -log p(target_t)

  Which targets count (the completion only, or every token) is the data's mask; the step divides the sum over the whole
  batch by the number of counted targets, so a long response weighs more than a short one. For uniform logits the loss
  is log V.

  Args:
    policy: reads `logps_BT`.
    ref: not read.
    labels: not read.
    state: passed through.

  Returns:
    `per_item` is `[B, T]`.

  References:
    Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, stage 1.
  """
  del ref, labels
  return types.LossOut(-policy.logps_BT, {}, state)


def dft(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Dynamic Fine-Tuning: each token's likelihood weighs its own loss, without gradient.

    loss_t = -sg(p(target_t)) log p(target_t)

  Its gradient is that of -p(target_t): tokens that the model finds impossible no longer dominate. For uniform logits
  the loss is log(V) / V. TRL's `loss_type="dft"`.

  Args:
    policy: reads `logps_BT`.
    ref: not read.
    labels: not read.
    state: passed through.

  Returns:
    `per_item` is `[B, T]`.

  References:
    Wu et al., 2025, https://arxiv.org/abs/2508.05629.
  """
  del ref, labels
  return types.LossOut(-jax.lax.stop_gradient(jnp.exp(policy.logps_BT)) * policy.logps_BT, {}, state)


def unlikelihood(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = (), alpha: float
) -> types.LossOut:
  """Likelihood training on desirable responses, unlikelihood training on the others.

    loss_t = -log p(target_t)  or, where undesirable,  -alpha log(1 - p(target_t))

  p is held below 1 - 1e-6, beyond which there is no gradient.

  Args:
    policy: reads `logps_BT` and `rows`.
    ref: not read.
    labels: reads `desirable`, 1 or 0.
    state: passed through.
    alpha: weight of the second term; the paper uses 1.

  Returns:
    `per_item` is `[B, T]`.

  References:
    Welleck et al., 2019, https://arxiv.org/abs/1908.04319, Eq. 4, for whole responses.
  """
  del ref
  desirable_BT = masked.to_tokens(labels['desirable'], policy.rows)
  against_BT = -alpha * jnp.log(-jnp.expm1(jnp.minimum(policy.logps_BT, -1e-6)))
  return types.LossOut(jnp.where(desirable_BT > 0.5, -policy.logps_BT, against_BT), {}, state)


def cringe(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = (), alpha: float
) -> types.LossOut:
  """CRINGE: likelihood training on desirable responses; in others each token is to lose against a likely rival.

    loss_t = -log p(target_t)  or, where undesirable,  alpha log(1 + p(target_t) / p(rival_t))

  The rival is drawn, at each step anew, from the softmax over the 5 likeliest tokens (`objectives.supervised.rivals`)
  other than the target: which one depends on where the token is packed.

  Args:
    policy: reads `logps_BT`, `rival_logps_BT` and `rows`.
    ref: not read.
    labels: reads `desirable`, 1 or 0.
    state: passed through.
    alpha: weight of the second term; the paper uses 1.

  Returns:
    `per_item` is `[B, T]`.

  References:
    Adolphs et al., 2022, https://arxiv.org/abs/2211.05826, Eq. 3 and 4; ParlAI's code.
  """
  del ref
  desirable_BT = masked.to_tokens(labels['desirable'], policy.rows)
  against_BT = alpha * parts.logistic(policy.rival_logps_BT - policy.logps_BT)
  return types.LossOut(jnp.where(desirable_BT > 0.5, -policy.logps_BT, against_BT), {}, state)


def quark(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = (), beta: float
) -> types.LossOut:
  """Quark: likelihood of responses that are tagged with the quantile of their reward, held near the reference.

    loss_t = -log p(target_t) + beta KL(ref_t || p_t), exact

  Here the reference reads the tag too; the paper's does not. Its beta is 0.05 to 0.1.

  Args:
    policy: reads `logps_BT`.
    ref: reads `kl_BT`, of a live reference.
    labels: not read; the tag is in the prompt.
    state: passed through.
    beta: weight of the divergence, >= 0.

  Returns:
    `per_item` is `[B, T]`.

  References:
    Lu et al., 2022, https://arxiv.org/abs/2205.13636, Eq. 2.
  """
  del labels
  return types.LossOut(-policy.logps_BT + beta * ref.kl_BT, {'kl': ref.kl_BT}, state)


def class_weighted(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    undesirable_weight: float,
) -> types.LossOut:
  """Negative log-likelihood in which undesirable responses weigh less.

    loss_t = -w log p(target_t),    w = 1, or `undesirable_weight` where undesirable

  With tags before the prompts (`data.texts.tagged`) it is C-RLFT; the paper's weight is 0.1.

  Args:
    policy: reads `logps_BT` and `rows`.
    ref: not read.
    labels: reads `desirable`, 1 or 0.
    state: passed through.
    undesirable_weight: in [0, 1].

  Returns:
    `per_item` is `[B, T]`.

  References:
    Wang et al., 2023 (OpenChat), https://arxiv.org/abs/2309.11235, derived from its definition.
  """
  del ref
  desirable_BT = masked.to_tokens(labels['desirable'], policy.rows)
  return types.LossOut(-jnp.where(desirable_BT > 0.5, 1.0, undesirable_weight) * policy.logps_BT, {}, state)
