"""Losses on pairs of responses, of which one was preferred."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign import types


def dpo(
    policy: types.Stats,
    ref: types.Stats,
    labels: Mapping[str, types.Array],
    *,
    state: types.PyTree = (),
    beta: float,
    label_smoothing: float = 0.0,
) -> types.LossOut:
  """Direct Preference Optimization.

    m = beta * [(policy_w - ref_w) - (policy_l - ref_l)]
    loss = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)

  with w chosen, l rejected and eps `label_smoothing`. Log-probabilities are sums over response tokens, so `beta` is per
  sequence, in 1/nats: a value tuned for a length-normalised loss does not carry over. Where policy equals ref the loss
  is log 2, whatever `beta` is, and the gradient with respect to the chosen log-probability is -beta (1/2 - eps).

  Args:
    policy: reads `logps_GK`, for the metrics; K = 2, chosen first.
    ref: reads `logratios_GK`.
    labels: not read.
    state: passed through.
    beta: pull towards the reference, > 0; the paper uses 0.1.
    label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO); 0 is the paper's loss.

  Returns:
    `per_item` is `[G]`.

  References:
    Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Eq. 7; label smoothing: Mitchell, 2023, "A note on DPO with
    noisy preferences", Eq. 3.
  """
  del labels
  rewards_GK = beta * ref.logratios_GK
  margins_G = rewards_GK[:, 0] - rewards_GK[:, 1]
  loss_G = -(1 - label_smoothing) * jax.nn.log_sigmoid(margins_G) - label_smoothing * jax.nn.log_sigmoid(-margins_G)
  metrics = {
      'rewards/chosen': rewards_GK[:, 0],
      'rewards/rejected': rewards_GK[:, 1],
      'rewards/margins': margins_G,
      'rewards/accuracies': (margins_G > 0).astype(jnp.float32),
      'logps/chosen': policy.logps_GK[:, 0],
      'logps/rejected': policy.logps_GK[:, 1],
  }
  return types.LossOut(loss_G, metrics, state)
