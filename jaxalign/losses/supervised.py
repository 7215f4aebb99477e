"""Losses on demonstrations: one value per target token."""

from collections.abc import Mapping

from jaxalign import types


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
