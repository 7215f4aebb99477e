"""Losses that read whole distributions, a live reference or a value head, against float64 formulas written here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import masked
from jaxalign.losses import listwise
from jaxalign.losses import preference
from jaxalign.losses import shaped
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from tests.losses import world as world_lib

_of = functools.partial


def sp(x):
  return np.logaddexp(0, x)


def sums(w, x_BT):
  """Of each response, in float64."""
  batch, found = w.batch, np.zeros(w.s.shape)
  for b, t in np.argwhere(np.asarray(batch.responses_BT) >= 0):
    place = int(batch.responses_BT[b, t])
    found[batch.group_BS[b, place], batch.slot_BS[b, place]] += np.float64(x_BT[b, t])
  return found


def world(size=2, **more):
  return world_lib.world(groups=6, size=size, **more)


def diverging(w, kl_BT):
  """Policy and reference, with these divergences."""
  policy, ref = w.stats()
  return policy, ref.replace(kl_BT=jnp.asarray(kl_BT))


class TestTdpo:

  def test_one_is_its_formula(self):
    w = world()
    kl = sums(w, w.dense_BT['kl'])
    wanted = sp(-0.3 * (w.h - (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(w.run(_of(shaped.tdpo1, beta=0.3)).per_item[:6], wanted, rtol=1e-5)

  def test_two_is_its_formula(self):
    w = world()
    kl = sums(w, w.dense_BT['kl'])
    wanted = sp(-0.3 * (w.h - 0.7 * (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(w.run(_of(shaped.tdpo2, beta=0.3, alpha=0.7)).per_item[:6], wanted, rtol=1e-5)

  def test_two_lets_no_gradient_through_the_divergence_of_the_chosen_response(self):
    w = world()
    slopes = lambda loss: np.asarray(
        masked.totals(
            jax.grad(lambda kl: jnp.sum(loss(*diverging(w, kl), w.given()).per_item[:6]))(
                jnp.asarray(w.dense_BT['kl'])
            ),
            w.batch,
        )
    )[:6]
    one, two = slopes(_of(shaped.tdpo1, beta=0.3)), slopes(_of(shaped.tdpo2, beta=0.3, alpha=0.7))
    assert np.all(one[:, 0] < 0) and np.all(one[:, 1] > 0)
    assert not np.any(two[:, 0]) and np.all(two[:, 1] > 0)

  def test_is_dpo_where_nothing_diverges(self):
    w = world()
    dpo = w.run(_of(preference.dpo, beta=0.3)).per_item
    for loss in (_of(shaped.tdpo1, beta=0.3), _of(shaped.tdpo2, beta=0.3, alpha=0.5)):
      np.testing.assert_array_equal(loss(*diverging(w, 0 * w.dense_BT['kl']), w.given()).per_item, dpo)
    np.testing.assert_array_equal(w.run(_of(shaped.tdpo2, beta=0.3, alpha=0.0)).per_item, dpo)


class TestMallowsDpo:

  def test_is_its_formula(self):
    w = world()
    phi = -2.0 * np.log((sums(w, w.dense_BT['entropy']) / w.n).mean(axis=1))
    out = w.run(_of(shaped.mallows_dpo, beta=0.3, scale=2.0))
    np.testing.assert_allclose(out.per_item[:6], sp(-0.3 * phi * w.h), rtol=1e-5)
    np.testing.assert_allclose(out.metrics['dispersion'][:6], phi, rtol=1e-5)


class TestCringe:

  def test_is_likelihood_where_desirable_and_loses_against_the_rival_elsewhere(self):
    w = world(1)
    out = w.run(_of(supervised.cringe, alpha=0.6)).per_item
    desirable = w.desirable
    wanted = np.where(
        desirable > 0.5,
        -w.s[:, 0],
        0.6
        * sums(w, np.where(w.dense_BT['rival'] != 0, sp(w.policy_BT.astype(np.float64) - w.dense_BT['rival']), 0.0))[
            :, 0
        ],
    )
    assert 0 < desirable.sum() < len(desirable)
    np.testing.assert_allclose(sums(w, np.asarray(out))[:, 0], wanted, rtol=1e-5)

  def test_on_pairs_is_gated_by_the_margin_without_gradient(self):
    w = world()
    loss = _of(shaped.pairwise_cringe, alpha=0.6, gate_margin=1.0, temperature=2.0)
    against = sums(w, np.where(w.dense_BT['rival'] != 0, sp(w.policy_BT.astype(np.float64) - w.dense_BT['rival']), 0.0))
    gate = 1 / (1 + np.exp(-(1.0 - w.s[:, 0] + w.s[:, 1]) / 2.0))
    wanted = gate * (0.6 * against[:, 1] - w.s[:, 0])
    np.testing.assert_allclose(w.run(loss).per_item[:6], wanted, rtol=1e-5)

    def total(policy_BT):
      policy, ref = w.stats(policy_BT)
      return jnp.sum(loss(policy.replace(rival_logps_BT=jnp.asarray(w.dense_BT['rival'])), ref, w.given()).per_item[:6])

    slope_BT = jax.grad(total)(jnp.asarray(w.policy_BT))
    np.testing.assert_allclose(sums(w, np.asarray(slope_BT))[:, 0], -gate * w.n[:, 0], rtol=1e-5)


class TestQuark:

  def test_is_likelihood_and_the_divergence_of_each_token(self):
    w = world(1)
    out = w.run(_of(supervised.quark, beta=0.3)).per_item
    np.testing.assert_allclose(out, -w.policy_BT.astype(np.float64) + 0.3 * w.dense_BT['kl'], rtol=1e-6)


class TestDroV:

  @pytest.mark.parametrize('size', [1, 3])
  def test_is_its_formula(self, size):
    w = world(size)
    left = w.score - w.values_GK[:6] - 0.4 * w.z
    found = w.run(_of(listwise.dro_v, tau=0.4)).per_item[:6]
    np.testing.assert_allclose(found, 0.5 * (left**2).mean(axis=1), rtol=1e-4)


class TestBco:

  def test_weighs_undesirable_responses_alone_by_their_density_ratio(self):
    w = world(1)
    ratio_G = np.linspace(0.5, 3.0, 8).astype('f')
    policy, ref = w.stats()
    labels = w.given() | {'density_ratio': jnp.asarray(ratio_G)[:, None]}
    found = unpaired.bco(policy, ref, labels, beta=0.3, weighted=True).per_item[:6]
    x = 0.3 * w.z[:, 0] - (0.3 * w.z[:, 0]).mean()
    wanted = np.where(w.desirable > 0.5, sp(-x), ratio_G[:6].astype(np.float64) * sp(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


class TestD2o:

  def test_is_its_formula(self):
    w = world(4)
    z = w.z
    wanted = sp(-(0.3 * z[:, 1:].mean(axis=1) - 0.2 * z[:, 0]))
    np.testing.assert_allclose(w.run(_of(listwise.d2o, beta=0.3, alpha=0.2)).per_item[:6], wanted, rtol=1e-5)

  def test_is_log_2_at_the_reference(self):
    found = world(3, same=True).run(_of(listwise.d2o, beta=0.1, alpha=0.1)).per_item[:6]
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)
