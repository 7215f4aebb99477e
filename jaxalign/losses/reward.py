"""Losses that train reward models by comparisons of responses, whose scores then have no zero of their own."""

from collections.abc import Callable
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import listwise
from jaxalign.losses import parts


def bradley_terry(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    centring: float = 0.0,
    label_smoothing: float = 0.0,
    smoothing: Callable[..., types.Array] = parts.smooth,
) -> types.LossOut:
  """Bradley-Terry model of a preference between two scored responses.

    loss = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x) + centring * (r_w + r_l)^2,    x = r_w - r_l - margin

  with w chosen and l rejected. Where the rewards are equal and the margin is 0 the loss is log 2. Without centring it
  is unchanged when a constant is added to both rewards, which is why the mean of an uncentred reward means nothing.

  Args:
    policy: reads `rewards_GK`, K = 2, chosen first.
    ref: not read.
    labels: reads `margin`, by how much the chosen response should win; the data sets 0 where there is no such column.
    state: passed through.
    centring: strength of the pull of the pair's mean towards 0; 0 turns it off, the paper uses 0.01.
    label_smoothing: eps, the probability in [0, 1/2) that a label is wrong.
    smoothing: what is made of x and eps: `parts.smooth`, or `parts.robust`, whose mean over wrong labels is the loss
      of the right ones (and which is then not bounded from below).

  Returns:
    `per_item` is `[G]`.

  References:
    Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, Sec. 3.4; margin: Touvron et al., 2023,
    https://arxiv.org/abs/2307.09288, Eq. 2; centring: Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244,
    Sec. 3.
  """
  del ref
  rewards_GK = policy.rewards_GK
  chosen_G, rejected_G = rewards_GK[:, 0], rewards_GK[:, 1]
  loss_G = smoothing(chosen_G - rejected_G - labels['margin'][:, 0], eps=label_smoothing)
  loss_G += centring * jnp.square(chosen_G + rejected_G)
  return types.LossOut(loss_G, _pair_metrics(rewards_GK), state)


def _pair_metrics(rewards_GK):
  """TRL's metrics, and of sigmoid(r_w - r_l) Brier score, 1/4 where it knows nothing, and calibration error."""
  margins_G = rewards_GK[:, 0] - rewards_GK[:, 1]
  return {
      'accuracy': (margins_G > 0).astype(jnp.float32),
      'margin': margins_G,
      'mean_reward': rewards_GK,
      'brier': jnp.square(jax.nn.sigmoid(-margins_G)),
      'ece': parts.binary_calibration_error(margins_G),
  }


def length_debiased(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    penalty: float,
) -> types.LossOut:
  """Bradley-Terry whose margins are not to be explained by length.

    loss = -log sigmoid(r_w - r_l) + penalty * corr(r_w - r_l, n_w - n_l)^2

  the correlation being that of the step's pairs. ODIN has a second head, and takes |corr| over single responses.

  Args:
    policy: reads `rewards_GK`, `tokens_GK` and `valid_G`; K = 2, chosen first.
    ref: not read.
    labels: not read.
    state: passed through.
    penalty: strength; 0 is `bradley_terry` without a margin.

  Returns:
    `per_item` is `[G]`.

  References:
    Chen et al., 2024 (ODIN), https://arxiv.org/abs/2402.07319, derived from its definition.
  """
  del ref, labels
  valid_G = policy.valid_G
  count = jnp.maximum(jnp.sum(valid_G), 1.0)
  centred = lambda x_GK: (lambda x_G: valid_G * (x_G - jnp.sum(valid_G * x_G) / count))(x_GK[:, 0] - x_GK[:, 1])
  margins_G, longer_G = centred(policy.rewards_GK), centred(policy.tokens_GK)
  product = jnp.sum(margins_G * longer_G)
  squared = jnp.square(product) / (jnp.sum(jnp.square(margins_G)) * jnp.sum(jnp.square(longer_G)) + 1e-8)
  loss_G = parts.logistic(policy.rewards_GK[:, 0] - policy.rewards_GK[:, 1]) + penalty * squared
  metrics = _pair_metrics(policy.rewards_GK) | {'length_correlation': jnp.full_like(valid_G, squared)}
  return types.LossOut(loss_G, metrics, state)


def all_pairs(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Bradley-Terry model of all pairs of a scored list, which count as one example.

    loss = mean over pairs r_i > r_j (by the label `score`) of -log sigmoid(reward_i - reward_j)

  log 2 where the rewards are equal.

  Args:
    policy: reads `rewards_GK` and `valid_GK`.
    ref: not read.
    labels: reads `score`.
    state: passed through.

  Returns:
    `per_item` is `[G]`.

  References:
    Ouyang et al., 2022 (InstructGPT), https://arxiv.org/abs/2203.02155, Eq. 1, from its definition; ties do not count.
  """
  del ref
  better_GKK = listwise.better(labels, policy).astype(jnp.float32)
  loss_GKK = better_GKK * parts.logistic(listwise.differences(policy.rewards_GK))
  loss_G = jnp.sum(loss_GKK, axis=(1, 2)) / jnp.maximum(jnp.sum(better_GKK, axis=(1, 2)), 1.0)
  return types.LossOut(loss_G, _list_metrics(policy, labels), state)


def plackett_luce(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Plackett-Luce model of a ranked list.

    loss = sum_k [log sum_(i >= k) e^(reward_i) - reward_k],    responses sorted by the label `score`, best first

  log K! where the rewards are equal; for K = 2 it is Bradley-Terry.

  Args:
    policy: reads `rewards_GK` and `valid_GK`.
    ref: not read.
    labels: reads `score`.
    state: passed through.

  Returns:
    `per_item` is `[G]`.

  References:
    Zhu et al., 2023, https://arxiv.org/abs/2301.11270, Sec. 4, derived from its definition.
  """
  del ref
  loss_G = listwise.plackett_luce(policy.rewards_GK, labels['score'], policy.valid_GK)
  return types.LossOut(loss_G, _list_metrics(policy, labels), state)


def _list_metrics(policy, labels):
  return {'accuracy': listwise.concordance(policy.rewards_GK, labels, policy), 'mean_reward': policy.rewards_GK}
