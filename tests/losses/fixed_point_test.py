"""What losses converge to where every response can be enumerated: three prompts with four responses of one token.

The policy is a table of logits, so that a loss on all responses or pairs, with the reference's weights, is exact. Those
that are to share the optimum ref e^(r / beta) / Z reach it; others stay finite, or do not, as their papers say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import types
from jaxalign.losses import listwise
from jaxalign.losses import preference

_of = functools.partial
PROMPTS, RESPONSES, BETA = 3, 4, 0.5
RNG = np.random.default_rng(0)
REF_PR = jax.nn.log_softmax(jnp.asarray(RNG.normal(0, 1, (PROMPTS, RESPONSES)), jnp.float32))
REWARD_PR = jnp.asarray(RNG.uniform(-1, 1, (PROMPTS, RESPONSES)), jnp.float32)
OPTIMUM_PR = jax.nn.log_softmax(REF_PR + REWARD_PR / BETA)

# Every ordered pair of different responses to each prompt: (prompt, i, j).
PAIRS = np.array([(p, i, j) for p in range(PROMPTS) for i in range(RESPONSES) for j in range(RESPONSES) if i != j])


def stats(logps_GK, ref_GK):
  ones = jnp.ones_like(logps_GK)
  policy = types.Stats(logps_GK=logps_GK, tokens_GK=ones, valid_GK=ones, valid_G=ones[:, 0])
  return policy, types.Stats(logps_GK=ref_GK, logratios_GK=logps_GK - ref_GK)


def on_pairs(loss, logps_PR, **labels):
  """The mean loss over all pairs; a label is a function of the rewards of both."""
  prompt, i, j = PAIRS.T
  pick = lambda x_PR: jnp.stack([x_PR[prompt, i], x_PR[prompt, j]], axis=1)
  given = {name: jnp.stack([of(pick(REWARD_PR))] * 2, axis=1) for name, of in labels.items()}
  return jnp.mean(loss(*stats(pick(logps_PR), pick(REF_PR)), given).per_item)


def on_lists(loss, logps_PR):
  return jnp.mean(loss(*stats(logps_PR, REF_PR), {'score': REWARD_PR}).per_item)


def trained(loss, steps=3000):
  """Log-probabilities after so many steps of Adam from the reference."""
  tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))
  total = lambda logits: loss(jax.nn.log_softmax(logits))

  def step(carry, _):
    logits, state = carry
    updates, state = tx.update(jax.grad(total)(logits), state)
    return (optax.apply_updates(logits, updates), state), None

  run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), None, steps)[0][0])
  with jax.numpy_dtype_promotion('standard'):  # Adam's count is an integer.
    return np.asarray(jax.nn.log_softmax(run(REF_PR)))


def bradley_terry(rewards_G2):
  return jax.nn.sigmoid(rewards_G2[:, 0] - rewards_G2[:, 1])


SHARED = {
    'soft': lambda logps: on_pairs(_of(preference.soft, beta=BETA), logps, probability=bradley_terry),
    'infonca': lambda logps: on_lists(_of(listwise.infonca, beta=BETA, alpha=1.0), logps),
    'exo': lambda logps: on_lists(_of(listwise.exo, beta=BETA, reward_beta=1.0), logps),
    'dro': lambda logps: on_lists(_of(listwise.dro, tau=BETA), logps),
}


class TestFixedPoint:

  @pytest.mark.parametrize('name', SHARED)
  def test_is_the_regularised_optimum(self, name):
    np.testing.assert_allclose(trained(SHARED[name]), OPTIMUM_PR, atol=2e-3)

  def test_is_not_reached_by_other_temperatures(self):
    other = lambda logps: on_lists(_of(listwise.infonca, beta=2 * BETA, alpha=1.0), logps)
    assert np.abs(trained(other) - OPTIMUM_PR).max() > 0.1

  def test_of_ipo_under_certain_labels_is_finite_where_dpo_diverges(self):
    certain = lambda rewards: (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32)
    margin = lambda logps: (logps - np.asarray(REF_PR)).max() - (logps - np.asarray(REF_PR)).min()
    dpo = lambda logps: on_pairs(_of(preference.soft, beta=BETA), logps, probability=certain)
    # IPO on every pair in its certain order; of a pair in the other order nothing is asked.
    prompt, i, j = PAIRS.T
    right = np.asarray(REWARD_PR)[prompt, i] > np.asarray(REWARD_PR)[prompt, j]

    def ipo(logps):
      pick = lambda x: jnp.stack([x[prompt[right], i[right]], x[prompt[right], j[right]]], axis=1)
      return jnp.mean(preference.ipo(*stats(pick(logps), pick(REF_PR)), {}, tau=BETA).per_item)

    assert margin(trained(ipo)) < 3 / (2 * BETA) + 0.1
    assert abs(margin(trained(ipo, 3000)) - margin(trained(ipo, 6000))) < 0.01
    assert margin(trained(dpo, 6000)) > margin(trained(dpo, 3000)) + 0.5
