"""Losses on single responses, each labelled desirable or not.

Contract as of `losses.preference`, with K = 1 and the label `desirable` (1 or 0) of each response; `kto` reads a second
response, of another prompt. z is the log-ratio to the reference, s the summed log-probability, n the tokens.
"""

import jax
import jax.numpy as jnp

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import parts


def kto(
    policy, ref, labels, *, state=(), beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> types.LossOut:
  """Kahneman-Tversky Optimization.

    loss = lam_D (1 - sigmoid(beta (z - z0)))  or, where undesirable,  lam_U (1 - sigmoid(beta (z0 - z)))
    z0 = max(0, mean z(x, y')),  without gradient, over the step's prompts x with the response y' of another prompt

  Slot 1 of a group holds y'. The mean is over all pairs of the step, as in TRL. 1/2 at the reference. The paper uses
  beta 0.1 and weights with lam_D n_D / (lam_U n_U) between 1 and 4/3, n being the numbers of examples.

  References:
    Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, Eq. 8.
  """
  z_GK, valid_G = parts.log_ratio(policy, ref, labels), policy.valid_G
  mean = jnp.sum(z_GK[:, 1] * valid_G) / jnp.maximum(jnp.sum(valid_G), 1.0)
  anchor = jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
  loss_G = _either(labels, beta * (z_GK[:, 0] - anchor), parts.miss, desirable_weight, undesirable_weight)
  return _out(policy, labels, beta * z_GK, loss_G, state, {'kl': jnp.full_like(valid_G, anchor)})


def apo_zero_unpaired(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """APO-zero on single responses: KTO with the anchor 0.

    loss = 1 - sigmoid(beta z)  or, where undesirable,  1 - sigmoid(-beta z)

  1/2 at the reference. TRL's beta is 0.1.

  References:
    D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266.
  """
  rewards_GK = beta * parts.log_ratio(policy, ref, labels)
  return _out(policy, labels, rewards_GK, _either(labels, rewards_GK[:, 0], parts.miss), state)


def bco(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """Binary Classifier Optimization: logistic classification of responses by their reward less its running mean.

    loss = -log sigmoid(beta z - d)  or, where undesirable,  -log sigmoid(d - beta z)

  d is the mean of beta z over all responses of all steps, this one's among them, pooled as in TRL and without gradient.
  log 2 at the reference. The paper uses beta 0.01.

  References:
    Jung et al., 2024, https://arxiv.org/abs/2404.04656.
  """
  return _bco(policy, ref, labels, state, beta)


def bco_udm(policy, ref, labels, *, state=(), beta: float) -> types.LossOut:
  """BCO with underlying distribution matching: undesirable responses weigh by their prompts.

    loss = -log sigmoid(beta z - d)  or, where undesirable,  -rho log sigmoid(d - beta z)

  rho is the label `density_ratio` of the response's prompt: how much likelier it is among desirable responses than
  among undesirable ones (`tools/density_ratio.py` makes it; TRL's `embedding_func`). All else is as in `bco`.

  References:
    Jung et al., 2024, https://arxiv.org/abs/2404.04656.
  """
  return _bco(policy, ref, labels, state, beta, labels['density_ratio'][:, 0])


def _bco(policy, ref, labels, state, beta: float, down: float | types.Array = 1.0) -> types.LossOut:
  """BCO whose undesirable responses weigh `down`."""
  rewards_GK = beta * parts.log_ratio(policy, ref, labels)
  mean, count = state or (jnp.zeros(()), jnp.zeros(()))
  here = jnp.sum(policy.valid_G)
  count = count + here
  new = jnp.sum((jax.lax.stop_gradient(rewards_GK[:, 0]) - mean) * policy.valid_G)
  mean = mean + new / jnp.maximum(count, 1.0)
  loss_G = _either(labels, rewards_GK[:, 0] - mean, parts.logistic, down=down)
  return _out(policy, labels, rewards_GK, loss_G, (mean, count), {'delta': jnp.full_like(policy.valid_G, mean)})


def npo(policy, ref, labels, *, state=(), beta: float, retain: float) -> types.LossOut:
  """Negative Preference Optimization: unlearns undesirable responses; desirable ones are retained.

    loss = (2 / beta) log(1 + e^(beta z))  where undesirable,    -retain s / n  where desirable

  beta -> 0 is gradient ascent up to a constant. The paper uses beta 0.1.

  References:
    Zhang et al., 2024, https://arxiv.org/abs/2404.05868, Eq. 3.
  """
  z_GK = parts.log_ratio(policy, ref, labels)
  forget_G = 2 / beta * parts.logistic(-beta * z_GK[:, 0])
  kept_G = retain * parts.nll(policy, ref, labels, z_GK)
  return _out(policy, labels, beta * z_GK, jnp.where(_desirable(labels), kept_G, forget_G), state)


def _desirable(labels):
  return labels['desirable'][:, 0] > 0.5


def _either(labels, x_G, link: parts.Link, up: float = 1.0, down: float | types.Array = 1.0):
  desirable_G = _desirable(labels)
  return jnp.where(desirable_G, up, down) * link(jnp.where(desirable_G, x_G, -x_G))


def _out(policy, labels, rewards_GK, loss_G, state, more=None) -> types.LossOut:
  """With TRL's metrics: chosen is what is desirable, rejected what is not."""
  desirable_G = _desirable(labels).astype(jnp.float32)
  of = lambda x_G, which_G: masked.Weighted(x_G * which_G, which_G)
  metrics = {
      'rewards/chosen': of(rewards_GK[:, 0], desirable_G),
      'rewards/rejected': of(rewards_GK[:, 0], 1 - desirable_G),
      'rewards/accuracies': ((rewards_GK[:, 0] > 0) == _desirable(labels)).astype(jnp.float32),
      'logps/chosen': of(policy.logps_GK[:, 0], desirable_G),
      'logps/rejected': of(policy.logps_GK[:, 0], 1 - desirable_G),
  }
  return types.LossOut(loss_G, metrics | (more or {}), state)
