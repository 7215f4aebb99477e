"""Tests of losses on scored responses, against their formulas in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import rewarded
from tests.losses import world as world_lib

_of = functools.partial
CASES = {
    'rebel': (
        2,
        _of(rewarded.rebel, beta=0.7),
        lambda w: (0.7 * w.h - (w.score[:, 0] - w.score[:, 1])) ** 2,
        lambda w: 1.4 * (0.7 * w.h - (w.score[:, 0] - w.score[:, 1]))[:, None] * np.array([1, -1]),
    ),
    'a_star_po': (
        3,
        _of(rewarded.a_star_po, beta=0.4),
        lambda w: ((0.4 * w.z - w.score + w.margin[:, None]) ** 2).mean(axis=1),
        lambda w: 0.8 / 3 * (0.4 * w.z - w.score + w.margin[:, None]),
    ),
    'a_lol': (
        3,
        _of(rewarded.a_lol, clip_eps=0.3),
        lambda w: -(_left(w) * np.clip(np.exp(w.z), 0.7, 1.3) * w.s).mean(axis=1),
        lambda w: -_left(w) * np.clip(np.exp(w.z), 0.7, 1.3) / 3,
    ),
}


def _left(w):
  return np.maximum(w.score - w.score.mean(axis=1, keepdims=True), 0.0)


def _known(labels):
  return {'score_known': jnp.ones_like(labels['score'])}


def _labelled(loss, w):
  """The loss with further labels; the old policy is the reference."""

  def labelled(policy, ref, labels, **options):
    more = {'old_logps': jnp.asarray(w.ref_BT), 'optimal_value': labels['margin']} | _known(labels)
    return loss(policy, ref, {**labels, **more}, **options)

  return labelled


@pytest.mark.parametrize('name', CASES)
class TestLosses:

  def test_are_their_formulas(self, name):
    size, loss, formula, _ = CASES[name]
    w = world_lib.world(groups=6, size=size)
    out = w.run(_labelled(loss, w))
    np.testing.assert_allclose(out.per_item[:6], formula(w), rtol=2e-5, atol=1e-6)

  def test_have_the_gradients_of_their_formulas(self, name):
    size, loss, _, gradient = CASES[name]
    w = world_lib.world(groups=6, size=size)
    np.testing.assert_allclose(w.slopes(_labelled(loss, w)), gradient(w), rtol=2e-4, atol=1e-6)

  def test_are_finite_at_extremes(self, name):
    size, loss, _, _ = CASES[name]
    w = world_lib.world(groups=6, size=size)
    for logps_BT in (jnp.full_like(w.policy_BT, -1e4), jnp.zeros_like(w.policy_BT)):
      total, slopes = jax.value_and_grad(_of(w.total, _labelled(loss, w)))(logps_BT)
      assert np.isfinite(total) and np.all(np.isfinite(slopes))


class TestLists:

  @pytest.mark.parametrize('name', ['a_star_po', 'a_lol'])
  def test_that_are_shorter_average_over_what_they_have(self, name):
    _, loss, _, _ = CASES[name]
    w = world_lib.world(groups=6, size=3)
    policy, ref = w.stats()
    labels = w.given() | {'optimal_value': w.given()['margin']} | _known(w.given())
    short = dataclasses.replace(policy, valid_GK=policy.valid_GK.at[1, 2].set(0.0))
    other = dataclasses.replace(ref, logratios_GK=ref.logratios_GK.at[1, 2].set(jnp.nan))
    found, whole = loss(short, other, labels).per_item, loss(policy, ref, labels).per_item
    left = np.maximum(w.score - w.score[:, :2].mean(axis=1, keepdims=True), 0.0)
    first = {
        'a_star_po': ((0.4 * w.z - w.score + w.margin[:, None]) ** 2)[1, :2].mean(),
        'a_lol': -(left * np.clip(np.exp(w.z), 0.7, 1.3) * w.s)[1, :2].mean(),
    }[name]
    np.testing.assert_allclose(found[1], first, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(found, 1), np.delete(whole, 1))
    if name == 'a_star_po':  # so with a response that nobody judged
      unknown = labels | {'score_known': labels['score_known'].at[1, 2].set(0.0)}
      np.testing.assert_array_equal(loss(policy, ref, unknown).per_item, found)
      cut = dataclasses.replace(policy, tokens_GK=policy.tokens_GK.at[1, 2].set(0.0))  # and of which no token counts
      np.testing.assert_array_equal(loss(cut, ref, labels).per_item, found)

  def test_of_one_response_are_nothing_to_rebel(self):
    w = world_lib.world(groups=6, size=2)
    policy, ref = w.stats()
    short = dataclasses.replace(policy, valid_GK=policy.valid_GK.at[1, 0].set(0.0))
    labels = w.given() | {'old_logps': jnp.asarray(w.ref_BT)} | _known(w.given())
    found = rewarded.rebel(short, ref, labels, beta=0.7)
    unknown = labels | {'score_known': labels['score_known'].at[1, 1].set(0.0)}
    np.testing.assert_array_equal(rewarded.rebel(policy, ref, unknown, beta=0.7).per_item, found.per_item)
    cut = dataclasses.replace(policy, tokens_GK=policy.tokens_GK.at[1, 1].set(0.0))
    np.testing.assert_array_equal(rewarded.rebel(cut, ref, labels, beta=0.7).per_item, found.per_item)
    right = w.h * (w.score[:, 0] - w.score[:, 1]) > 0
    assert found.per_item[1] == 0 and np.all(found.per_item[np.array([0, 2, 3, 4, 5])] > 0)
    accuracy = found.metrics['rewards/accuracies']
    assert float(jnp.sum(accuracy.weight)) == 5
    assert float(jnp.sum(accuracy.sum)) == right.sum() - right[1] > 0


class TestRewarded:
  """One prompt with four answers of one token: ref e^(r / beta) / Z is where the losses are 0."""

  Q, R, BETA = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.2, -0.5, 1.0, 0.4]), 0.5

  def at(self, loss, logps, picked):
    """Loss and gradient, for the answers `picked`."""
    ref = np.log(self.Q)[picked].astype(np.float32)
    value = self.BETA * np.log((self.Q * np.exp(self.R / self.BETA)).sum())
    rows = types.Rows(
        jnp.ones((1, len(picked))),
        jnp.arange(len(picked), dtype=jnp.int32)[None],
        jnp.zeros((1, len(picked)), jnp.int32),
        jnp.arange(len(picked), dtype=jnp.int32)[None],
        1,
        len(picked),
    )
    labels = {'score': jnp.asarray(self.R[picked], jnp.float32)[None], 'old_logps': jnp.asarray(ref)[None]}
    labels |= {'optimal_value': jnp.full((1, len(picked)), np.float32(value))} | _known(labels)

    def total(logps_BT):
      ones = jnp.ones((1, len(picked)))
      policy = types.Stats(logps_BT=logps_BT, logps_GK=logps_BT, tokens_GK=ones, rows=rows, valid_GK=ones)
      return loss(policy, types.Stats(logratios_GK=logps_BT - ref[None]), labels, beta=self.BETA).per_item[0]

    return jax.value_and_grad(total)(jnp.asarray(logps[picked], jnp.float32)[None])

  @pytest.mark.parametrize('loss,picked', [(rewarded.a_star_po, [0, 1, 2, 3]), (rewarded.rebel, [1, 2])])
  def test_losses_are_zero_at_the_optimum_and_not_at_the_reference(self, loss, picked):
    best = np.log(self.Q) + self.R / self.BETA
    best -= np.log(np.exp(best).sum())
    value, slope = self.at(loss, best, picked)
    np.testing.assert_allclose(value, 0.0, atol=1e-10)
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)
    assert self.at(loss, np.log(self.Q), picked)[0] > 0.1


class TestNeeds:

  @pytest.mark.parametrize('name,reference', [('rebel', False), ('a_star_po', True), ('a_lol', True)])
  def test_are_a_reference_but_for_rebel(self, name, reference):
    size, loss, _, _ = CASES[name]
    labels = ('score', 'score_known', 'optimal_value')
    needs = tracing.trace(loss, group_size=size, labels=labels, token_labels=('old_logps',))
    assert needs.reference == reference and not needs.live
