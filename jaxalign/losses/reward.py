"""Losses that train a scalar reward model."""

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
