"""Losses that train reward models: of responses, and of the steps of a process."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import types


def bradley_terry(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    centring: float = 0.0,
) -> types.LossOut:
  """Bradley-Terry model of a preference between two scored responses.

    loss = -log sigmoid(r_w - r_l - margin) + centring * (r_w + r_l)^2

  with w chosen and l rejected. Where the rewards are equal and the margin is 0 the loss is log 2. Without centring it
  is unchanged when a constant is added to both rewards, which is why the mean of an uncentred reward means nothing.

  Args:
    policy: reads `rewards_GK`, K = 2, chosen first.
    ref: not read.
    labels: reads `margin`, by how much the chosen response should win; the data sets 0 where there is no such column.
    state: passed through.
    centring: strength of the pull of the pair's mean towards 0; 0 turns it off, the paper uses 0.01.

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
  loss_G = -jax.nn.log_sigmoid(chosen_G - rejected_G - labels['margin'][:, 0])
  loss_G += centring * jnp.square(chosen_G + rejected_G)
  metrics = {
      'accuracy': (chosen_G > rejected_G).astype(jnp.float32),
      'margin': chosen_G - rejected_G,
      'mean_reward': rewards_GK,
  }
  return types.LossOut(loss_G, metrics, state)


def process(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Process reward model: cross-entropy of whether each step is right.

    loss_t = -y log p - (1 - y) log(1 - p),    p = sigmoid(s)

  at the last token of each step, where s is the score of a head with one output, or the second output less the first
  of a head with two, whose softmax p then is (label 1 is a right step). A head of zeros has the loss log 2. The step
  divides the sum by the number of steps, so a response with many steps weighs more.

  Args:
    policy: reads `scores_BTO`, O = 1 or 2.
    ref: not read.
    labels: reads `step` `[B, T]`, y in [0, 1]: 1 for a right step, or the share of roll-outs from it that succeed.
    state: passed through.

  Returns:
    `per_item` is `[B, T]`. Metrics: `accuracy` (score and label on the same side of 0 and 1/2), `right` (mean label:
    what a judge that calls every step right would score) and `mean_score`.

  Raises:
    UsageError: the head has more outputs.

  References:
    Wang et al., 2023 (Math-Shepherd), https://arxiv.org/abs/2312.08935, Eq. 2; Lightman et al., 2023,
    https://arxiv.org/abs/2305.20050, Sec. 2.6.
  """
  del ref
  scores_BTO, right_BT = policy.scores_BTO, labels['step']
  if scores_BTO.shape[-1] > 2:
    raise types.UsageError(f'recipe.Recipe.score_outputs = {scores_BTO.shape[-1]}: a step is right or wrong, 1 or 2')
  score_BT = scores_BTO[..., -1] - (scores_BTO[..., 0] if scores_BTO.shape[-1] == 2 else 0.0)
  loss_BT = -right_BT * jax.nn.log_sigmoid(score_BT) - (1 - right_BT) * jax.nn.log_sigmoid(-score_BT)
  metrics = {
      'accuracy': ((score_BT > 0) == (right_BT > 0.5)).astype(jnp.float32),
      'right': right_BT,
      'mean_score': score_BT,
  }
  return types.LossOut(loss_BT, metrics, state)
