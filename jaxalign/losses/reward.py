"""Losses that train reward models: of responses, and of the steps of a process."""

from collections.abc import Callable
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import masked
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
        f'recipe.Recipe.score_outputs = {outputs_GKO.shape[-1]}, but reward.attributes.attributes names'
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
