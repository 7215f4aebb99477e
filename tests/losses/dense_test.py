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


class Dense:
  """A world with random dense statistics, 0 where no target counts."""

  def __init__(self, size=2, seed=0, same=False):
    self.w = world_lib.world(groups=6, size=size, seed=seed, same=same)
    rng, shape = np.random.default_rng(seed + 100), self.w.policy_BT.shape
    counts = np.asarray(self.w.batch.mask_BT) > 0
    self.kl, self.entropy = (np.where(counts, rng.uniform(0.01, 1.0, shape), 0.0).astype('f') for _ in range(2))
    self.rival = np.where(counts, -rng.uniform(0.1, 3.0, shape), 0.0).astype('f')
    self.values_GK = rng.normal(size=(8, size)).astype('f')
    self.groups = len(self.w.policy)

  def run(self, loss, **more):
    policy, ref = self.w.stats()
    policy = policy.replace(rival_logps_BT=jnp.asarray(self.rival), values_GK=jnp.asarray(self.values_GK))
    entropy_GK = masked.totals(jnp.asarray(self.entropy), self.w.batch)
    ref = ref.replace(kl_BT=jnp.asarray(more.get('kl', self.kl)), entropy_GK=entropy_GK)
    return loss(policy, ref, self.w.given())


def pairs():
  return Dense()


class TestTdpo:

  def test_one_is_its_formula(self):
    d = pairs()
    kl = sums(d.w, d.kl)
    wanted = sp(-0.3 * (d.w.h - (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(d.run(_of(shaped.tdpo1, beta=0.3)).per_item[:6], wanted, rtol=1e-5)

  def test_two_is_its_formula(self):
    d = pairs()
    kl = sums(d.w, d.kl)
    wanted = sp(-0.3 * (d.w.h - 0.7 * (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(d.run(_of(shaped.tdpo2, beta=0.3, alpha=0.7)).per_item[:6], wanted, rtol=1e-5)

  def test_two_lets_no_gradient_through_the_divergence_of_the_chosen_response(self):
    d = pairs()
    slopes = lambda loss: np.asarray(
        masked.totals(jax.grad(lambda kl: jnp.sum(d.run(loss, kl=kl).per_item[:6]))(jnp.asarray(d.kl)), d.w.batch)
    )[:6]
    one, two = slopes(_of(shaped.tdpo1, beta=0.3)), slopes(_of(shaped.tdpo2, beta=0.3, alpha=0.7))
    assert np.all(one[:, 0] < 0) and np.all(one[:, 1] > 0)
    assert not np.any(two[:, 0]) and np.all(two[:, 1] > 0)

  def test_is_dpo_where_nothing_diverges(self):
    d = pairs()
    dpo = d.run(_of(preference.dpo, beta=0.3)).per_item
    for loss in (_of(shaped.tdpo1, beta=0.3), _of(shaped.tdpo2, beta=0.3, alpha=0.5)):
      np.testing.assert_array_equal(d.run(loss, kl=jnp.zeros_like(d.kl)).per_item, dpo)
    np.testing.assert_array_equal(d.run(_of(shaped.tdpo2, beta=0.3, alpha=0.0)).per_item, dpo)


class TestMallowsDpo:

  def test_is_its_formula(self):
    d = pairs()
    phi = -2.0 * np.log((sums(d.w, d.entropy) / d.w.n).mean(axis=1))
    out = d.run(_of(shaped.mallows_dpo, beta=0.3, scale=2.0))
    np.testing.assert_allclose(out.per_item[:6], sp(-0.3 * phi * d.w.h), rtol=1e-5)
    np.testing.assert_allclose(out.metrics['dispersion'][:6], phi, rtol=1e-5)


class TestCringe:

  def test_is_likelihood_where_desirable_and_loses_against_the_rival_elsewhere(self):
    d = Dense(size=1)
    out = d.run(_of(supervised.cringe, alpha=0.6)).per_item
    desirable = d.w.desirable
    wanted = np.where(
        desirable > 0.5,
        -d.w.s[:, 0],
        0.6 * sums(d.w, np.where(d.rival != 0, sp(d.w.policy_BT.astype(np.float64) - d.rival), 0.0))[:, 0],
    )
    assert 0 < desirable.sum() < len(desirable)
    np.testing.assert_allclose(sums(d.w, np.asarray(out))[:, 0], wanted, rtol=1e-5)

  def test_on_pairs_is_gated_by_the_margin_without_gradient(self):
    d = pairs()
    loss = _of(shaped.pairwise_cringe, alpha=0.6, gate_margin=1.0, temperature=2.0)
    against = sums(d.w, np.where(d.rival != 0, sp(d.w.policy_BT.astype(np.float64) - d.rival), 0.0))
    gate = 1 / (1 + np.exp(-(1.0 - d.w.s[:, 0] + d.w.s[:, 1]) / 2.0))
    wanted = gate * (0.6 * against[:, 1] - d.w.s[:, 0])
    np.testing.assert_allclose(d.run(loss).per_item[:6], wanted, rtol=1e-5)

    def total(policy_BT):
      policy, ref = d.w.stats(policy_BT)
      return jnp.sum(loss(policy.replace(rival_logps_BT=jnp.asarray(d.rival)), ref, d.w.given()).per_item[:6])

    slope_BT = jax.grad(total)(jnp.asarray(d.w.policy_BT))
    np.testing.assert_allclose(sums(d.w, np.asarray(slope_BT))[:, 0], -gate * d.w.n[:, 0], rtol=1e-5)


class TestQuark:

  def test_is_likelihood_and_the_divergence_of_each_token(self):
    d = Dense(size=1)
    out = d.run(_of(supervised.quark, beta=0.3)).per_item
    np.testing.assert_allclose(out, -d.w.policy_BT.astype(np.float64) + 0.3 * d.kl, rtol=1e-6)


class TestDroV:

  @pytest.mark.parametrize('size', [1, 3])
  def test_is_its_formula(self, size):
    d = Dense(size=size)
    left = d.w.score - d.values_GK[:6] - 0.4 * d.w.z
    found = d.run(_of(listwise.dro_v, tau=0.4)).per_item[:6]
    np.testing.assert_allclose(found, 0.5 * (left**2).mean(axis=1), rtol=1e-4)


class TestD2o:

  def test_is_its_formula(self):
    d = Dense(size=4)
    z = d.w.z
    wanted = sp(-(0.3 * z[:, 1:].mean(axis=1) - 0.2 * z[:, 0]))
    np.testing.assert_allclose(d.run(_of(listwise.d2o, beta=0.3, alpha=0.2)).per_item[:6], wanted, rtol=1e-5)

  def test_is_log_2_at_the_reference(self):
    found = Dense(size=3, same=True).run(_of(listwise.d2o, beta=0.1, alpha=0.1)).per_item[:6]
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)

  def test_with_one_sample_and_equal_weights_is_dpo(self):
    d = pairs()
    policy, ref = d.w.stats()
    swap = lambda x: x.replace(logratios_GK=x.logratios_GK[:, ::-1])
    dpo = preference.dpo(policy, swap(ref), d.w.given(), beta=0.3).per_item
    np.testing.assert_allclose(d.run(_of(listwise.d2o, beta=0.3, alpha=0.3)).per_item, dpo, rtol=1e-6)
