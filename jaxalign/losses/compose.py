"""Compositions of parts: each named loss is one of these with its parts, and so is any other that a gin file binds.

# my.gin: SimPO's score under IPO's link
recipe.Recipe.loss_fn = @compose.pairwise
compose.pairwise.score = @parts.log_prob
parts.log_prob.length_power = 1.0
compose.pairwise.link = @parts.squared
parts.squared.target = 0.5
"""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.losses import parts

# part(policy, ref, labels, z_GK) -> [G]
Part = Callable[..., types.Array]


def pairwise(
    policy: types.Stats,
    ref: types.Stats,
    labels,
    *,
    state: types.PyTree = (),
    score: Callable[..., types.Array] = parts.log_ratio,
    utility: Callable[[types.Array], types.Array] = parts.identity,
    beta: float | types.Array = 1.0,
    offset: Part | None = None,
    link: parts.Link = parts.logistic,
    probability: Part | None = None,
    weight: Part | None = None,
    regularisers: Sequence[tuple[float, Part]] = (),
) -> types.LossOut:
  """A loss on the difference between the chosen response (slot 0) and the rejected one (slot 1).

    x = beta * (utility(z_w) - utility(z_l)) - offset,    loss = weight * link(x) + sum_i c_i regulariser_i

  Args:
    policy: read by the parts, and `logps_GK` for metrics.
    ref: read by the parts.
    labels: read by the parts.
    state: passed through.
    score: gives z `[G, K]` of (policy, ref, labels).
    utility: of z, elementwise.
    beta: multiplies the difference of utilities, > 0.
    offset: is subtracted from it.
    link: of the result; for those of `parts` the loss falls as x grows, but for bounded ones near their best x.
    probability: p that the chosen response is better, `[G]`: the link is then p link(x) + (1 - p) link(-x).
    weight: multiplies the link, without gradient.
    regularisers: (coefficient, part) pairs.

  Returns:
    `per_item` is `[G]`. `rewards/*` are beta z, beta being the one given here.
  """
  z_GK = score(policy, ref, labels)
  u_GK = utility(z_GK)
  x_G = beta * (u_GK[:, 0] - u_GK[:, 1])
  if offset is not None:
    x_G -= offset(policy, ref, labels, z_GK)
  loss_G = link(x_G)
  if probability is not None:
    p_G = probability(policy, ref, labels, z_GK)
    loss_G = p_G * loss_G + (1 - p_G) * link(-x_G)
  if weight is not None:
    loss_G *= jax.lax.stop_gradient(weight(policy, ref, labels, z_GK))
  loss_G += _sum(regularisers, policy, ref, labels, z_GK)
  return types.LossOut(loss_G, pair_metrics(policy, beta * z_GK), state)


def anchored(
    policy: types.Stats,
    ref: types.Stats,
    labels,
    *,
    state: types.PyTree = (),
    score: Callable[..., types.Array] = parts.log_ratio,
    beta: float = 1.0,
    terms: Sequence[tuple[int, float, parts.Link]],
    regularisers: Sequence[tuple[float, Part]] = (),
) -> types.LossOut:
  """A loss on the responses of a pair each for itself, against an anchor of 0.

    loss = sum over terms (slot, c, link) of |c| link(sign(c) beta z_slot)

  Args:
    policy: see `pairwise`.
    ref: see `pairwise`.
    labels: see `pairwise`.
    state: passed through.
    score: see `pairwise`.
    beta: multiplies z.
    terms: (slot, coefficient, link): a negative coefficient pushes the response down.
    regularisers: see `pairwise`.

  Returns:
    See `pairwise`.
  """
  z_GK = score(policy, ref, labels)
  loss_G = jnp.zeros(z_GK.shape[:1])
  for slot, coefficient, link in terms:
    loss_G += abs(coefficient) * link(jnp.sign(coefficient) * beta * z_GK[:, slot])
  loss_G += _sum(regularisers, policy, ref, labels, z_GK)
  return types.LossOut(loss_G, pair_metrics(policy, beta * z_GK), state)


def _sum(regularisers: Sequence[tuple[float, Part]], policy, ref, labels, z_GK):
  return sum((coefficient * part(policy, ref, labels, z_GK) for coefficient, part in regularisers), start=0.0)


def mixture(
    policy: types.Stats,
    ref: types.Stats,
    labels,
    *,
    state: types.PyTree = (),
    losses: Sequence[tuple[float, Callable[..., types.LossOut]]],
) -> types.LossOut:
  """A weighted sum of losses on the same data: loss = sum_i c_i loss_i; the metrics of the first that has them win."""
  states = state or ((),) * len(losses)
  metrics: dict[str, types.Array] = {}
  total, new = 0.0, []
  for (coefficient, loss), own in zip(losses, states, strict=True):
    out = loss(policy, ref, labels, state=own)
    total += coefficient * out.per_item
    metrics = {**out.metrics, **metrics}
    new.append(out.state)
  return types.LossOut(total, metrics, tuple(new) if any(jax.tree.leaves(one) for one in new) else state)


def pair_metrics(policy: types.Stats, rewards_GK: types.Array) -> dict[str, types.Array]:
  """TRL's metrics of pairs: rewards, their margin, how often it is right, and summed log-probabilities."""
  margins_G = rewards_GK[:, 0] - rewards_GK[:, 1]
  return {
      'rewards/chosen': rewards_GK[:, 0],
      'rewards/rejected': rewards_GK[:, 1],
      'rewards/margins': margins_G,
      'rewards/accuracies': (margins_G > 0).astype(jnp.float32),
      'logps/chosen': policy.logps_GK[:, 0],
      'logps/rejected': policy.logps_GK[:, 1],
  }
