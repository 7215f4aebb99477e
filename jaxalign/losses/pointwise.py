"""Losses of reward models on responses, or their steps, each for itself: ratings, classes, right or wrong.

Contract as of `losses.reward`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import parts


def regression(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Pointwise regression on ratings.

    loss = mean over the group's responses of (reward - score)^2

  Args:
    policy: reads `rewards_GK` and `valid_GK`.
    ref: not read.
    labels: reads `score`.
    state: passed through.

  Returns:
    `per_item` is `[G]`.

  References:
    Wang et al., 2024 (HelpSteer2), https://arxiv.org/abs/2406.08673, Sec. 3.1, for one attribute.
  """
  del ref
  count_G = jnp.maximum(jnp.sum(policy.valid_GK, axis=1), 1.0)
  error_GK = policy.valid_GK * (policy.rewards_GK - labels['score'])
  loss_G = jnp.sum(jnp.square(error_GK), axis=1) / count_G
  return types.LossOut(loss_G, {'mean_reward': policy.rewards_GK, 'mean_score': labels['score']}, state)


def correctness(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Outcome reward model: whether a response is right.

    loss = -y log sigmoid(reward) - (1 - y) log sigmoid(-reward)

  log 2 where the reward is 0.

  Args:
    policy: reads `rewards_GK`, K = 1.
    ref: not read.
    labels: reads `desirable`, y.
    state: passed through.

  Returns:
    `per_item` is `[G]`.

  References:
    Cobbe et al., 2021, https://arxiv.org/abs/2110.14168, Sec. 4, derived from its definition, at the last token alone.
  """
  del ref
  reward_G, right_G = policy.rewards_GK[:, 0], labels['desirable'][:, 0]
  loss_G = right_G * parts.logistic(reward_G) + (1 - right_G) * parts.logistic(-reward_G)
  metrics = {
      'accuracy': ((reward_G > 0) == (right_G > 0.5)).astype(jnp.float32),
      'right': right_G,
      'mean_reward': policy.rewards_GK,
      'brier': jnp.square(right_G - jax.nn.sigmoid(reward_G)),
      'ece': parts.binary_calibration_error(jnp.where(right_G > 0.5, reward_G, -reward_G)),
  }
  return types.LossOut(loss_G, metrics, state)


def attributes(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    attributes: tuple[str, ...],
) -> types.LossOut:
  """Regression on several ratings of a response, an output of the head for each.

    loss = mean over the ratings that there are of (output - rating)^2

  A rating that is NaN is missing: its output gets no gradient from that response.

  Args:
    policy: reads `outputs_GKO` and `valid_GK`.
    ref: not read.
    labels: reads one of each name.
    state: passed through.
    attributes: names of the labels, in the order of the outputs.

  Returns:
    `per_item` is `[G]`. Metrics, over the ratings that there are: `mse/NAME` and `mean_rating/NAME` of each.

  Raises:
    UsageError: the head has another number of outputs.

  References:
    Wang et al., 2024 (HelpSteer2), https://arxiv.org/abs/2406.08673, Sec. 3.1.
  """
  del ref
  outputs_GKO = policy.outputs_GKO
  if outputs_GKO.shape[-1] != len(attributes):
    raise types.UsageError(
        f'recipe.Recipe.score_outputs = {outputs_GKO.shape[-1]}, but pointwise.attributes.attributes names'
        f' {len(attributes)}: the head has one output for each'
    )
  rating_GKO = jnp.stack([labels[name] for name in attributes], axis=-1)
  there_GKO = jnp.isfinite(rating_GKO) & (policy.valid_GK[..., None] > 0)
  rating_GKO = jnp.where(there_GKO, rating_GKO, 0.0)
  error_GKO = jnp.square(jnp.where(there_GKO, outputs_GKO - rating_GKO, 0.0))
  error_GO, rating_GO, there_GO = (jnp.sum(x, axis=1, dtype=jnp.float32) for x in (error_GKO, rating_GKO, there_GKO))
  loss_G = jnp.sum(error_GO, axis=1) / jnp.maximum(jnp.sum(there_GO, axis=1), 1.0)
  metrics = {}
  for i, name in enumerate(attributes):
    metrics[f'mse/{name}'] = masked.Weighted(error_GO[:, i], there_GO[:, i])
    metrics[f'mean_rating/{name}'] = masked.Weighted(rating_GO[:, i], there_GO[:, i])
  return types.LossOut(loss_G, metrics, state)


def classification(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Classifier of responses, an output of the head for each class.

    loss = -log softmax(outputs)[class]

  log C where the outputs are equal, C classes. A class that the head has no output for makes it NaN.

  Args:
    policy: reads `outputs_GKO`, K = 1, O = C.
    ref: not read.
    labels: reads `class`, 0 to C - 1.
    state: passed through.

  Returns:
    `per_item` is `[G]`. Metrics: `accuracy`, `largest_class` (the share of the most frequent class: what always saying
    it would score) and `ece` of the class that is said.

  From its definition.
  """
  del ref
  outputs_GO, class_G = policy.outputs_GKO[:, 0], labels['class'][:, 0].astype(jnp.int32)
  logp_GO = jax.nn.log_softmax(outputs_GO, axis=-1)
  right_G = (jnp.argmax(outputs_GO, axis=-1) == class_G).astype(jnp.float32)
  metrics = {
      'accuracy': right_G,
      'largest_class': masked.Largest(jax.nn.one_hot(class_G, outputs_GO.shape[-1])),
      'ece': parts.calibration_error(jnp.exp(jnp.max(logp_GO, axis=-1)), right_G),
  }
  loss_G = -jnp.take_along_axis(logp_GO, class_G[:, None], axis=-1)[:, 0]
  return types.LossOut(loss_G, metrics, state)


def prefixes(
    policy: types.Stats, ref: types.Stats, labels: Mapping[str, types.Array], *, state: types.PyTree = ()
) -> types.LossOut:
  """Values of prefixes, for controlled decoding: regression of every prefix of a response on the response's reward.

    loss_t = 1/2 (V(x, y_<=t) - r(x, y))^2

  Its minimum is V = E[r | x, y_<=t], over the policy that wrote the responses.

  Args:
    policy: reads `scores_BTO`, O = 1.
    ref: not read.
    labels: reads `reward` `[B, T]`, r at every token of its response.
    state: passed through.

  Returns:
    `per_item` is `[B, T]`. Metrics, over tokens: `mean_value`, `mean_reward`.

  Raises:
    UsageError: the head has more outputs.

  References:
    Mudgal et al., 2023 (CD-FUDGE), https://arxiv.org/abs/2310.17022, after Yang and Klein, 2021,
    https://arxiv.org/abs/2104.05218; from its definition.
  """
  del ref
  if policy.scores_BTO.shape[-1] != 1:
    raise types.UsageError(f'recipe.Recipe.score_outputs = {policy.scores_BTO.shape[-1]}: a value is one number')
  value_BT, reward_BT = policy.scores_BTO[..., 0], labels['reward']
  loss_BT = 0.5 * jnp.square(value_BT - reward_BT)
  return types.LossOut(loss_BT, {'mean_value': value_BT, 'mean_reward': reward_BT}, state)


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
