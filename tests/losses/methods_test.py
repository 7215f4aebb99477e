"""Every loss on responses, against a float64 formula written here."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import masked
from jaxalign.losses import batchwise
from jaxalign.losses import listwise
from jaxalign.losses import parts
from jaxalign.losses import preference
from jaxalign.losses import reference_free as free
from jaxalign.losses import shaped
from jaxalign.losses import unpaired
from tests.losses import world as world_lib

_of = functools.partial


def sp(x):
  return np.logaddexp(0, x)


def sig(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def odds(a):
  return np.log(np.exp(a) / (1 - np.exp(a)))


def tail(w, alpha):
  """Summed log-ratios in which tokens beyond the shortest response of the pair count alpha."""
  total = np.zeros_like(w.s)
  for g, group in enumerate(w.policy):
    shortest = min(map(len, group))
    for k, lp in enumerate(group):
      r = lp.astype(np.float64) - w.ref[g][k]
      total[g, k] = r[:shortest].sum() + alpha * r[shortest:].sum()
  return total


def weighted(w):
  sums = [
      [np.sum(w.weights[g][k].astype(np.float64) * (lp - w.ref[g][k])) for k, lp in enumerate(group)]
      for g, group in enumerate(w.policy)
  ]
  return np.array(sums)


def gap(x):
  return x[:, 0] - x[:, 1]


def ratio(p, q, x):
  return sig(x) * np.log(sig(x) / p) + sig(-x) * np.log(sig(-x) / q)


def on_policy(w):
  return np.exp(((w.s + 0.3 * w.n) / w.n).sum(axis=1))


def dr(loss, b):
  return np.full_like(loss, -b * np.log(np.mean(np.exp(-loss / b))))


def aot(x, y, beta):
  """Losses in the order of the policy's gaps."""
  return sp(-beta * (np.sort(x) - np.sort(y)))[np.argsort(np.argsort(x))]


def beta_dpo(w, beta, alpha, keep):
  """The first step: the running mean is the mean."""
  kept = np.argsort(np.argsort(np.abs(w.h - w.h.mean()))) < np.ceil(keep * len(w.h))
  return sp(-max(1e-3, beta * (1 + 0 * alpha)) * w.h) * kept / kept.mean()


def group_robust(w, beta, rate):
  loss, group = sp(-beta * w.h), w.labels['group'][: len(w.h), 0]
  means = np.array([loss[group == g].mean() for g in range(3)])
  q = np.exp(rate * means) / np.exp(rate * means).sum()
  return np.array([q[int(g)] * x / (group == g).sum() for g, x in zip(group, loss)]) * len(loss)


# name: (loss, formula of a world of pairs)
PAIRS = {
    'dpo': (_of(preference.dpo, beta=0.3), lambda w: sp(-0.3 * w.h)),
    'cdpo': (_of(preference.cdpo, beta=0.3, label_smoothing=0.2), lambda w: 0.8 * sp(-0.3 * w.h) + 0.2 * sp(0.3 * w.h)),
    'robust': (
        _of(preference.robust, beta=0.3, label_smoothing=0.1),
        lambda w: (0.9 * sp(-0.3 * w.h) - 0.1 * sp(0.3 * w.h)) / 0.8,
    ),
    'soft': (
        _of(preference.soft, beta=0.3),
        lambda w: w.p * sp(-0.3 * w.h) + (1 - w.p) * sp(0.3 * w.h),
    ),
    'ipo': (_of(preference.ipo, tau=0.2), lambda w: (w.h - 2.5) ** 2),
    'ipo_averaged': (_of(preference.ipo_averaged, tau=0.2), lambda w: (gap(w.z / w.n) - 2.5) ** 2),
    'hinge': (_of(preference.hinge, beta=0.7), lambda w: np.maximum(0, 1 - 0.7 * w.h)),
    'rso': (_of(preference.rso, gamma=0.05), lambda w: sp(-0.05 * w.h)),
    'gpo_exponential': (_of(preference.gpo, beta=0.3, link=parts.exponential_loss), lambda w: np.exp(-0.3 * w.h)),
    'gpo_quadratic': (
        _of(preference.gpo, beta=0.9, link=parts.truncated_quadratic),
        lambda w: np.maximum(0, 1 - 0.9 * w.h) ** 2,
    ),
    'gpo_savage': (_of(preference.gpo, beta=0.3, link=parts.savage), lambda w: 1 / (1 + np.exp(0.3 * w.h)) ** 2),
    'gpo_squared': (_of(preference.gpo, beta=0.3, link=parts.squared), lambda w: (0.3 * w.h - 1) ** 2),
    'f_dpo_forward_kl': (
        _of(preference.f_dpo, beta=0.3, divergence=parts.forward_kl),
        lambda w: sp(0.3 * gap(np.exp(-w.z))),
    ),
    'f_dpo_jensen_shannon': (
        _of(preference.f_dpo, beta=0.3, divergence=parts.jensen_shannon),
        lambda w: sp(-0.3 * gap(np.log(2 * np.exp(w.z) / (1 + np.exp(w.z))))),
    ),
    'f_dpo_alpha': (
        _of(preference.f_dpo, beta=0.3, divergence=_of(parts.alpha_divergence, alpha=0.4)),
        lambda w: sp(-0.3 * gap((1 - np.exp(w.z) ** -0.4) / 0.4)),
    ),
    'chi_po': (
        _of(preference.chi_po, beta=0.8, max_reward=0.4),
        lambda w: sp(-np.clip(0.8 * gap(w.z + np.exp(w.z)), -0.8, 0.8)),
    ),
    'exo_pair': (
        _of(preference.exo_pair, beta=0.3, label_smoothing=0.01),
        lambda w: ratio(0.99, 0.01, 0.3 * w.h),
    ),
    'discopop': (
        _of(preference.discopop, beta=0.3, tau=0.5),
        lambda w: sig(-0.6 * w.h) * sp(-0.3 * w.h) + sig(0.6 * w.h) * np.exp(-0.3 * w.h),
    ),
    'sigmoid_norm': (_of(preference.sigmoid_norm, beta=5.0), lambda w: sp(-5 * gap(w.z / w.n))),
    'apo_zero': (_of(preference.apo_zero, beta=0.3), lambda w: 1 - sig(0.3 * w.z[:, 0]) + sig(0.3 * w.z[:, 1])),
    'apo_down': (_of(preference.apo_down, beta=0.3), lambda w: sig(0.3 * w.z[:, 0]) + 1 - sig(0.3 * w.h)),
    'nca_pair': (
        _of(preference.nca_pair, beta=0.3),
        lambda w: sp(-0.3 * w.z[:, 0]) + 0.5 * sp(0.3 * w.z[:, 0]) + 0.5 * sp(0.3 * w.z[:, 1]),
    ),
    'bco_pair': (_of(preference.bco_pair, beta=0.3), lambda w: sp(-0.3 * w.z[:, 0]) + sp(0.3 * w.z[:, 1])),
    'sppo_hard': (
        _of(preference.sppo_hard, beta=0.25),
        lambda w: (w.z[:, 0] - 2) ** 2 + (w.z[:, 1] + 2) ** 2,
    ),
    'dpop': (
        _of(shaped.dpop, beta=0.3, penalty=5.0),
        lambda w: sp(-0.3 * (w.h - 5 * np.maximum(0, -w.z[:, 0]))),
    ),
    'odpo': (_of(shaped.odpo, beta=0.3, alpha=0.5), lambda w: sp(-(0.3 * w.h - 0.5 * np.log(gap(w.score))))),
    'margin_dpo': (_of(shaped.margin_dpo, beta=0.3, scale=2.0), lambda w: sp(-(0.3 * w.h - 2 * w.margin))),
    'modpo': (
        _of(shaped.modpo, beta=0.3, weight=0.6),
        lambda w: sp(-(0.3 * w.h - 0.4 * gap(w.score)) / 0.6),
    ),
    'r_dpo': (_of(shaped.r_dpo, beta=0.3, alpha=0.05), lambda w: sp(-(0.3 * w.h + 0.05 * gap(w.n)))),
    'ld_dpo': (_of(shaped.ld_dpo, beta=0.3, alpha=0.5), lambda w: sp(-0.3 * gap(tail(w, 0.5)))),
    'tis_dpo': (_of(shaped.tis_dpo, beta=0.3), lambda w: sp(-0.3 * gap(weighted(w)))),
    'wpo': (_of(shaped.wpo, beta=0.3), lambda w: np.minimum(1, on_policy(w)) * sp(-0.3 * w.h)),
    'wpo_unclamped': (_of(shaped.wpo, beta=0.3, clamp=False), lambda w: on_policy(w) * sp(-0.3 * w.h)),
    'cal_dpo': (
        _of(shaped.cal_dpo, beta=0.25, calibration=0.5),
        lambda w: sp(-w.h) + 0.5 * ((w.z[:, 0] - 2) ** 2 + (w.z[:, 1] + 2) ** 2),
    ),
    'rpo': (_of(shaped.rpo, beta=0.3, eta=0.2), lambda w: sp(-0.3 * w.h) - 0.2 * w.a[:, 0]),
    'mpo': (
        _of(shaped.mpo, beta=0.3, weights=(0.8, 0.2, 1.0)),
        lambda w: 0.8 * sp(-0.3 * w.h) + 0.2 * (sp(-0.3 * w.z[:, 0]) + sp(0.3 * w.z[:, 1])) - w.a[:, 0],
    ),
    'simpo': (_of(free.simpo, beta=2.0, margin=0.7), lambda w: sp(-(2 * gap(w.a) - 0.7))),
    'alphapo': (
        _of(free.alphapo, beta=2.5, margin=0.1, alpha=0.25),
        lambda w: sp(-(2.5 * gap((1 - np.exp(-0.25 * w.a)) / 0.25) - 0.1)),
    ),
    'simper': (free.simper, lambda w: -gap(np.exp(w.a))),
    'cpo': (_of(free.cpo, beta=0.1, alpha=0.5), lambda w: sp(-0.1 * gap(w.s)) - 0.5 * w.a[:, 0]),
    'orpo': (_of(free.orpo, lam=0.1), lambda w: -w.a[:, 0] + 0.1 * sp(-gap(odds(w.a)))),
    'slic_hf': (
        _of(free.slic_hf, delta=1.0, lam=0.1),
        lambda w: np.maximum(0, 1 - gap(w.s)) - 0.1 * w.s[:, 0],
    ),
    'aot': (_of(batchwise.aot, beta=0.3), lambda w: aot(gap(w.s), gap(w.s_ref), 0.3)),
    'aot_unpaired': (_of(batchwise.aot_unpaired, beta=0.3), lambda w: aot(w.z[:, 0], w.z[:, 1], 0.3)),
    'dr_dpo': (_of(batchwise.dr_dpo, beta=0.3, beta_prime=0.5), lambda w: dr(sp(-0.3 * w.h), 0.5)),
    'beta_dpo': (_of(batchwise.beta_dpo, beta=0.3, alpha=0.6, keep=0.6), lambda w: beta_dpo(w, 0.3, 0.6, 0.6)),
    'group_robust': (
        _of(batchwise.group_robust, beta=0.3, groups=3, rate=0.7),
        lambda w: group_robust(w, 0.3, 0.7),
    ),
}


def pl(v, r):
  """Negative log of the product of Plackett-Luce choices."""
  total = []
  for v_K, r_K in zip(v, r):
    left, p = list(np.argsort(-r_K)), 1.0
    while left:
      p *= np.exp(v_K[left[0]]) / np.exp(v_K[left]).sum()
      left.pop(0)
    total.append(-np.log(p))
  return np.array(total)


def over_pairs(w, of):
  """Sum of `of(g, i, j)` over pairs whose first is better."""
  G, K = w.score.shape
  better = lambda g, i, j: w.score[g, i] > w.score[g, j]
  pairs = itertools.product(range(K), repeat=2)
  pairs = list(pairs)
  return np.array([sum(of(g, i, j) for i, j in pairs if better(g, i, j)) for g in range(G)])


def lipo(w, beta):
  v = beta * w.z
  rank = [[1 + sum(other > x for other in row) for x in row] for row in v]

  def one(g, i, j):
    gain = abs(2 ** w.score[g, i] - 2 ** w.score[g, j])
    return gain * abs(1 / np.log(1 + rank[g][i]) - 1 / np.log(1 + rank[g][j])) * sp(-(v[g, i] - v[g, j]))

  return over_pairs(w, one)


def pro(w, weight):
  total = []
  for a, r in zip(w.a, w.score):
    order = np.argsort(-r)
    loss = -weight * a[order[0]]
    for k in range(len(order) - 1):
      best, worse = order[k], order[k + 1 :]
      heat = r[best] - r[worse]
      own = np.exp(a[best] * heat.max())
      loss += np.log(own + np.exp(a[worse] * heat).sum()) - a[best] * heat.max()
    total.append(loss)
  return np.array(total)


def best(w, x):
  return x[np.arange(len(x)), w.score.argmax(axis=1)]


def centred(x):
  return x - x.mean(axis=1, keepdims=True)


LISTS = {
    'dpo_pl': (_of(listwise.dpo_pl, beta=0.3), lambda w: pl(0.3 * w.z, w.score)),
    'lipo_lambda': (_of(listwise.lipo_lambda, beta=0.3), lambda w: lipo(w, 0.3)),
    'rrhf': (
        _of(listwise.rrhf, weight=0.7),
        lambda w: over_pairs(w, lambda g, i, j: max(0, w.a[g, j] - w.a[g, i])) - 0.7 * best(w, w.a),
    ),
    'pro': (_of(listwise.pro, sft_weight=0.2), lambda w: pro(w, 0.2)),
    'infonca': (
        _of(listwise.infonca, beta=0.3, alpha=0.5),
        lambda w: -(softmax(w.score / 0.5) * np.log(softmax(0.3 * w.z))).sum(axis=1),
    ),
    'nca': (
        _of(listwise.nca, beta=0.3, alpha=0.5),
        lambda w: (softmax(w.score / 0.5) * sp(-0.3 * w.z)).sum(axis=1) + sp(0.3 * w.z).mean(axis=1),
    ),
    'exo': (
        _of(listwise.exo, beta=0.3, reward_beta=0.5),
        lambda w: (softmax(0.3 * w.z) * np.log(softmax(0.3 * w.z) / softmax(w.score / 0.5))).sum(axis=1),
    ),
    'lire': (_of(listwise.lire, temperature=2.0), lambda w: -(softmax(w.s / 2) * w.score).sum(axis=1)),
    'dro': (_of(listwise.dro, tau=0.3), lambda w: 0.5 * (centred(w.score - 0.3 * w.z) ** 2).mean(axis=1)),
}


def either(w, up, down):
  return np.where(w.desirable > 0, up, down)


def kto(w):
  z0 = max(0.0, w.z[:, 1].mean())
  return either(w, 1.5 * (1 - sig(0.3 * (w.z[:, 0] - z0))), 0.5 * (1 - sig(0.3 * (z0 - w.z[:, 0]))))


def bco(w):
  delta = 0.3 * w.z[:, 0].mean()
  return either(w, sp(-(0.3 * w.z[:, 0] - delta)), sp(0.3 * w.z[:, 0] - delta))


SINGLES = {
    'kto': (_of(unpaired.kto, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5), kto),
    'apo_zero_unpaired': (
        _of(unpaired.apo_zero_unpaired, beta=0.3),
        lambda w: either(w, 1 - sig(0.3 * w.z[:, 0]), 1 - sig(-0.3 * w.z[:, 0])),
    ),
    'bco': (_of(unpaired.bco, beta=0.3), bco),
    'npo': (
        _of(unpaired.npo, beta=0.3, retain=0.5),
        lambda w: either(w, -0.5 * w.a[:, 0], 2 / 0.3 * sp(0.3 * w.z[:, 0])),
    ),
}
TRIPLES = {
    'tpo': (_of(free.tpo, beta=0.1, alpha=0.5), lambda w: sp(-0.1 * gap(w.s)) - 0.5 * w.a[:, 2]),
    'tpo_l': (
        _of(free.tpo_l, beta=2.0, alpha=0.5, margin=0.5),
        lambda w: sp(-(2 * gap(w.a) - 0.5)) - 0.5 * w.a[:, 2],
    ),
}
ALL = {
    **{name: (2, *case) for name, case in PAIRS.items()},
    **{name: (4, *case) for name, case in LISTS.items()},
    **{name: (2, *case) for name, case in SINGLES.items()},
    **{name: (3, *case) for name, case in TRIPLES.items()},
}


@functools.cache
def world(size, seed=0, **options):
  return world_lib.world(groups=6, size=size, seed=seed, **options)


@pytest.mark.parametrize('name', ALL)
class TestEach:

  @pytest.mark.parametrize('seed', [0, 1])
  def test_is_its_formula(self, name, seed):
    size, loss, formula = ALL[name]
    w = world(size, seed)
    found = np.asarray(w.run(loss).per_item)[: len(w.policy)]
    np.testing.assert_allclose(found, formula(w), rtol=2e-5, atol=2e-5)

  def test_is_finite_with_its_gradient_far_from_the_reference(self, name):
    size, loss, _ = ALL[name]
    w = world(size)
    for scale in (-1e4, 1e4):
      far = np.where(w.batch.slot_BS[:, :1] == 0, scale, -scale) * w.batch.mask_BT
      far = np.minimum(w.policy_BT + far.astype(np.float32), 0.0) if 'simp' in name else w.policy_BT + far
      value, slope = jax.value_and_grad(lambda x: w.total(loss, x))(jnp.asarray(far, jnp.float32))
      assert np.isfinite(value) and np.all(np.isfinite(slope)), (scale, value)

  def test_gives_no_gradient_where_nothing_counts(self, name):
    size, loss, _ = ALL[name]
    w = world(size)
    slope = jax.grad(lambda x: w.total(loss, x))(jnp.asarray(w.policy_BT))
    np.testing.assert_array_equal(np.asarray(slope)[w.batch.mask_BT == 0], 0)
    assert np.any(slope)


class TestLaws:

  @pytest.mark.parametrize(
      'special,general',
      [
          (PAIRS['dpo'][0], _of(preference.cdpo, beta=0.3, label_smoothing=0.0)),
          (PAIRS['dpo'][0], _of(preference.robust, beta=0.3, label_smoothing=0.0)),
          (PAIRS['dpo'][0], _of(preference.f_dpo, beta=0.3, divergence=parts.identity)),
          (PAIRS['dpo'][0], _of(preference.gpo, beta=0.3, link=parts.logistic)),
          (PAIRS['dpo'][0], _of(shaped.dpop, beta=0.3, penalty=0.0)),
          (PAIRS['dpo'][0], _of(shaped.ld_dpo, beta=0.3, alpha=1.0)),
          (PAIRS['dpo'][0], _of(shaped.r_dpo, beta=0.3, alpha=0.0)),
          (PAIRS['dpo'][0], _of(shaped.modpo, beta=0.3, weight=1.0)),
          (PAIRS['dpo'][0], _of(shaped.rpo, beta=0.3, eta=0.0)),
          (PAIRS['dpo'][0], _of(batchwise.beta_dpo, beta=0.3, alpha=0.0, keep=1.0)),
          (PAIRS['dpo'][0], _of(listwise.dpo_pl, beta=0.3)),
          (PAIRS['dpo'][0], _of(shaped.mpo, beta=0.3, weights=(1.0, 0.0, 0.0))),
          (PAIRS['hinge'][0], _of(preference.gpo, beta=0.7, link=parts.hinge)),
          (PAIRS['dpo'][0], _of(listwise.infonca, beta=0.3, alpha=1e-4)),
      ],
  )
  def test_special_cases_are_equal(self, special, general):
    w = world(2)
    found, wanted = (np.asarray(w.run(loss).per_item)[: len(w.policy)] for loss in (general, special))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w.slopes(general), w.slopes(special), rtol=1e-4, atol=1e-6)

  def test_robust_dpo_with_many_groups_is_dpo_in_the_limit(self):
    w = world(2)
    np.testing.assert_allclose(
        w.total(_of(batchwise.dr_dpo, beta=0.3, beta_prime=1e4)), w.total(PAIRS['dpo'][0]), rtol=1e-3
    )

  def test_simpo_without_margin_on_single_tokens_is_the_contrast_of_cpo(self):
    w = world_lib.world(groups=4, size=2, seed=3)
    simpo, cpo = _of(free.simpo, beta=0.3, margin=0.0), _of(free.cpo, beta=0.3, alpha=0.0)
    alone = (w.n == 1).all(axis=1)
    found, wanted = (np.asarray(w.run(loss).per_item)[: len(w.policy)] for loss in (simpo, cpo))
    np.testing.assert_allclose(found[alone], wanted[alone], rtol=1e-6)

  def test_kto_without_shift_is_apo_zero_unpaired(self):
    w = world(2)
    reference = w.policy_BT.copy()
    for b, row in enumerate(w.batch.slot_BS):
      for rank, slot in enumerate(row):
        if slot == 1:  # z of the other prompt's response becomes negative, so that the anchor is 0
          reference[b][w.batch.responses_BT[b] == rank] = w.ref_BT[b][w.batch.responses_BT[b] == rank] - 1.0
    kto = _of(unpaired.kto, beta=0.3)
    apo = _of(unpaired.apo_zero_unpaired, beta=0.3)
    np.testing.assert_allclose(w.total(kto, reference), w.total(apo, reference), rtol=1e-6)

  @pytest.mark.parametrize(
      'name', ['dpo', 'cdpo', 'robust', 'rso', 'f_dpo_forward_kl', 'f_dpo_alpha', 'chi_po', 'dr_dpo']
  )
  def test_is_log_2_at_the_reference(self, name):
    w = world(2, same=True)
    np.testing.assert_allclose(w.run(PAIRS[name][0]).per_item, np.log(2), atol=1e-6)


# What each calls the reward of a response.
REWARDS = {
    'dpo': lambda w: 0.3 * w.z,
    'ipo': lambda w: 0.2 * w.z,
    'modpo': lambda w: 0.3 / 0.6 * w.z,
    'sigmoid_norm': lambda w: 5 * w.z / w.n,
    'f_dpo_forward_kl': lambda w: 0.3 * w.z,
    'apo_zero': lambda w: 0.3 * w.z,
    'apo_down': lambda w: 0.3 * w.z,
    'sppo_hard': lambda w: 0.25 * w.z,
    'cal_dpo': lambda w: w.z,
    'ld_dpo': lambda w: 0.3 * tail(w, 0.5),
    'mpo': lambda w: 0.3 * w.z,
    'simpo': lambda w: 2 * w.a,
    'cpo': lambda w: 0.1 * w.s,
    'aot': lambda w: 0.3 * w.z,
    'aot_unpaired': lambda w: 0.3 * w.z,
    'dr_dpo': lambda w: 0.3 * w.z,
    'dpo_pl': lambda w: 0.3 * w.z,
    'rrhf': lambda w: w.a,
    'lire': lambda w: w.s,
    'dro': lambda w: 0.3 * w.z,
    'kto': lambda w: 0.3 * w.z,
    'apo_zero_unpaired': lambda w: 0.3 * w.z,
    'bco': lambda w: 0.3 * w.z,
    'npo': lambda w: 0.3 * w.z,
}


def concordance(reward, score):
  """Of one list."""
  pairs = [(i, j) for i, j in itertools.permutations(range(len(score)), 2) if score[i] > score[j]]
  return np.mean([reward[i] > reward[j] for i, j in pairs])


class TestMetrics:

  @pytest.mark.parametrize('name', sorted(REWARDS.keys() & PAIRS.keys()))
  def test_of_pairs_are_rewards_margins_and_log_probabilities(self, name):
    w = world(2)
    metrics, r = w.run(PAIRS[name][0]).metrics, REWARDS[name](w)
    wanted = {
        'rewards/chosen': r[:, 0],
        'rewards/rejected': r[:, 1],
        'rewards/margins': gap(r),
        'rewards/accuracies': gap(r) > 0,
        'logps/chosen': w.s[:, 0],
        'logps/rejected': w.s[:, 1],
    }
    for key, x in wanted.items():
      np.testing.assert_allclose(metrics[key][: len(r)], x, rtol=2e-5, atol=2e-5, err_msg=key)

  @pytest.mark.parametrize('name', sorted(REWARDS.keys() & LISTS.keys()))
  def test_of_lists_are_how_many_pairs_are_in_order_and_the_best_response(self, name):
    w = world(4)
    metrics, r = w.run(LISTS[name][0]).metrics, REWARDS[name](w)
    wanted = {
        'rewards/accuracies': [concordance(*one) for one in zip(r, w.score)],
        'rewards/best': best(w, r),
        'logps/best': best(w, w.s),
    }
    for key, x in wanted.items():
      np.testing.assert_allclose(metrics[key][: len(r)], x, rtol=2e-5, atol=2e-5, err_msg=key)

  @pytest.mark.parametrize('name', sorted(SINGLES))
  def test_of_single_responses_are_means_over_desirable_and_undesirable_ones(self, name):
    w = world(2)
    metrics, r, up = w.run(SINGLES[name][0]).metrics, REWARDS[name](w)[:, 0], w.desirable > 0
    wanted = {
        'rewards/chosen': r[up],
        'rewards/rejected': r[~up],
        'logps/chosen': w.s[up, 0],
        'logps/rejected': w.s[~up, 0],
    }
    for key, x in wanted.items():
      found = metrics[key]
      np.testing.assert_allclose(np.sum(found.sum[: len(r)]), x.sum(), rtol=2e-5, err_msg=key)
      assert np.sum(found.weight[: len(r)]) == len(x) > 0
    np.testing.assert_array_equal(metrics['rewards/accuracies'][: len(r)], (r > 0) == up)


def bent(x):
  return sig(x) * sig(-x)


class TestWithoutGradient:
  """Of what a loss measures of the step or of a pair no gradient flows: derivatives by hand."""

  def test_is_the_anchor_of_kto(self):
    w = world(2)
    x = 0.3 * (w.z[:, 0] - max(0.0, w.z[:, 1].mean()))
    wanted = np.stack([0.3 * bent(x) * either(w, -1.5, 0.5), np.zeros(6)], axis=1)
    np.testing.assert_allclose(w.slopes(SINGLES['kto'][0]), wanted, rtol=1e-4, atol=1e-6)

  def test_is_the_shift_of_bco(self):
    w = world(2)
    wanted = 0.3 * (sig(0.3 * (w.z[:, 0] - w.z[:, 0].mean())) - w.desirable)
    np.testing.assert_allclose(w.slopes(SINGLES['bco'][0])[:, 0], wanted, rtol=1e-4, atol=1e-6)

  def test_are_beta_and_the_choice_of_pairs_of_beta_dpo(self):
    first, w = world(2, 0), world(2, 1)
    loss = _of(batchwise.beta_dpo, beta=0.3, alpha=0.6, keep=1.0)
    state = first.run(loss).state
    beta = float(w.run(loss, state=state).metrics['beta'][0])
    assert abs(beta - 0.3) > 0.01
    np.testing.assert_allclose(w.slopes(loss, state=state)[:, 0], -beta * sig(-beta * w.h), rtol=1e-4, atol=1e-6)

  def test_are_the_weights_of_groups(self):
    w = world(2)
    loss, group = sp(-0.3 * w.h), w.labels['group'][:6, 0]
    means = np.array([loss[group == g].mean() for g in range(3)])
    q = np.exp(0.7 * means) / np.exp(0.7 * means).sum()
    share = np.array([6 * q[int(g)] / (group == g).sum() for g in group])
    np.testing.assert_allclose(w.slopes(PAIRS['group_robust'][0])[:, 0], -0.3 * share * sig(-0.3 * w.h), rtol=1e-4)

  def test_is_the_weight_of_wpo(self):
    w = world(2)
    wanted = -0.3 * on_policy(w) * sig(-0.3 * w.h)
    np.testing.assert_allclose(w.slopes(PAIRS['wpo_unclamped'][0])[:, 0], wanted, rtol=1e-4)


class TestState:

  def test_of_bco_is_the_mean_over_all_responses_so_far(self):
    first, second = world(2, 0), world(2, 1)
    loss = _of(unpaired.bco, beta=0.3)
    state = first.run(loss).state
    out = second.run(loss, state=state)
    delta = 0.3 * np.concatenate([first.z[:, 0], second.z[:, 0]]).mean()
    np.testing.assert_allclose(out.state[0], delta, rtol=1e-5)
    wanted = either(second, sp(-(0.3 * second.z[:, 0] - delta)), sp(0.3 * second.z[:, 0] - delta))
    np.testing.assert_allclose(out.per_item[:6], wanted, rtol=1e-5)

  def test_of_beta_dpo_moves_beta_by_how_far_the_batch_is_from_the_running_mean(self):
    first, second = world(2, 0), world(2, 1)
    loss = _of(batchwise.beta_dpo, beta=0.3, alpha=0.6, keep=1.0, decay=0.9)
    out = second.run(loss, state=first.run(loss).state)
    running = (0.9 * 0.1 * first.h.mean() + 0.1 * second.h.mean()) / (0.9 * 0.1 + 0.1)
    beta = max(1e-3, 0.3 * (1 + 0.6 * (second.h.mean() - running)))
    np.testing.assert_allclose(out.metrics['beta'], beta, rtol=1e-5)
    np.testing.assert_allclose(out.per_item[:6], sp(-beta * second.h), rtol=1e-5)

  def test_of_group_robust_dpo_adds_up_the_losses_of_groups(self):
    w = world(2)
    loss = _of(batchwise.group_robust, beta=0.3, groups=3, rate=0.7)
    out = w.run(loss, state=w.run(loss).state)
    losses, group = sp(-0.3 * w.h), w.labels['group'][:6, 0]
    means = np.array([losses[group == g].mean() for g in range(3)])
    q = np.exp(1.4 * means) / np.exp(1.4 * means).sum()
    np.testing.assert_allclose(np.exp(out.state), q, rtol=1e-5)


class TestSingles:

  @pytest.mark.parametrize('name', SINGLES)
  def test_go_by_the_label_of_the_response_itself(self, name):
    w = world(2)
    policy, ref = w.stats()
    desirable_GK = w.given()['desirable']
    labels = {'desirable': desirable_GK.at[:, 1].set(1 - desirable_GK[:, 0])}
    found = SINGLES[name][0](policy, ref, labels).per_item
    np.testing.assert_array_equal(found[:6], w.run(SINGLES[name][0]).per_item[:6])


class TestTies:

  def test_of_scores_do_not_compete(self):
    w = world(3)
    tied = {'score': jnp.tile(jnp.array([[1.0, 1.0, 0.0]]), (len(w.labels['score']), 1))}
    policy, ref = w.stats()
    found = listwise.dpo_pl(policy, ref, tied, beta=0.3).per_item[:6]
    v = 0.3 * w.z
    wanted = np.logaddexp(v[:, 0], v[:, 2]) - v[:, 0] + np.logaddexp(v[:, 1], v[:, 2]) - v[:, 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

  def test_groups_beyond_their_number_make_the_loss_nan(self):
    w = world(2)
    labels = {name: x + 5.0 if name == 'group' else x for name, x in w.given().items()}
    policy, ref = w.stats()
    out = batchwise.group_robust(policy, ref, labels, beta=0.3, groups=3, rate=0.1)
    assert np.all(np.isnan(out.per_item[:6]))


class TestShortLists:

  @pytest.mark.parametrize('rest', [7.0, -7.0])
  @pytest.mark.parametrize('name', LISTS)
  def test_are_as_if_there_were_no_more_places(self, name, rest):
    loss, _ = LISTS[name]
    w = world(3)
    policy, ref = w.stats()
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 2)), constant_values=rest)
    wide = lambda stats: stats.replace(
        **{field: pad(x) for field, x in vars(stats).items() if field.endswith('_GK') and x is not None}
    )
    wide_policy = wide(policy).replace(valid_GK=jnp.pad(policy.valid_GK, ((0, 0), (0, 2))))
    labels = {name: pad(x) for name, x in w.given().items() if name == 'score'}
    found = loss(wide_policy, wide(ref), labels).per_item
    np.testing.assert_allclose(found[:6], w.run(loss).per_item[:6], rtol=1e-5, atol=1e-6)


def diverging(w, kl_BT):
  """Policy and reference, with these divergences."""
  policy, ref = w.stats()
  return policy, ref.replace(kl_BT=jnp.asarray(kl_BT))


class TestTdpo:

  def test_one_is_its_formula(self):
    w = world(2)
    kl = world_lib.sums(w, w.dense_BT['kl'])
    wanted = sp(-0.3 * (w.h - (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(w.run(_of(shaped.tdpo1, beta=0.3)).per_item[:6], wanted, rtol=1e-5)

  def test_two_is_its_formula(self):
    w = world(2)
    kl = world_lib.sums(w, w.dense_BT['kl'])
    wanted = sp(-0.3 * (w.h - 0.7 * (kl[:, 1] - kl[:, 0])))
    np.testing.assert_allclose(w.run(_of(shaped.tdpo2, beta=0.3, alpha=0.7)).per_item[:6], wanted, rtol=1e-5)

  def test_two_lets_no_gradient_through_the_divergence_of_the_chosen_response(self):
    w = world(2)
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
    w = world(2)
    dpo = w.run(_of(preference.dpo, beta=0.3)).per_item
    for loss in (_of(shaped.tdpo1, beta=0.3), _of(shaped.tdpo2, beta=0.3, alpha=0.5)):
      np.testing.assert_array_equal(loss(*diverging(w, 0 * w.dense_BT['kl']), w.given()).per_item, dpo)
    np.testing.assert_array_equal(w.run(_of(shaped.tdpo2, beta=0.3, alpha=0.0)).per_item, dpo)


class TestMallowsDpo:

  def test_is_its_formula(self):
    w = world(2)
    phi = -2.0 * np.log((world_lib.sums(w, w.dense_BT['entropy']) / w.n).mean(axis=1))
    out = w.run(_of(shaped.mallows_dpo, beta=0.3, scale=2.0))
    np.testing.assert_allclose(out.per_item[:6], sp(-0.3 * phi * w.h), rtol=1e-5)
    np.testing.assert_allclose(out.metrics['dispersion'][:6], phi, rtol=1e-5)


class TestPairwiseCringe:

  def test_is_gated_by_the_margin_without_gradient(self):
    w = world(2)
    loss = _of(shaped.pairwise_cringe, alpha=0.6, gate_margin=1.0, temperature=2.0)
    rival_BT = w.dense_BT['rival']
    against = world_lib.sums(w, np.where(rival_BT != 0, sp(w.policy_BT.astype(np.float64) - rival_BT), 0.0))
    gate = 1 / (1 + np.exp(-(1.0 - w.s[:, 0] + w.s[:, 1]) / 2.0))
    wanted = gate * (0.6 * against[:, 1] - w.s[:, 0])
    np.testing.assert_allclose(w.run(loss).per_item[:6], wanted, rtol=1e-5)

    def total(policy_BT):
      policy, ref = w.stats(policy_BT)
      return jnp.sum(loss(policy.replace(rival_logps_BT=jnp.asarray(w.dense_BT['rival'])), ref, w.given()).per_item[:6])

    slope_BT = jax.grad(total)(jnp.asarray(w.policy_BT))
    np.testing.assert_allclose(world_lib.sums(w, np.asarray(slope_BT))[:, 0], -gate * w.n[:, 0], rtol=1e-5)


class TestDroV:

  @pytest.mark.parametrize('size', [1, 3])
  def test_is_its_formula(self, size):
    w = world(size)
    left = w.score - w.values_GK[:6] - 0.4 * w.z
    found = w.run(_of(listwise.dro_v, tau=0.4)).per_item[:6]
    np.testing.assert_allclose(found, 0.5 * (left**2).mean(axis=1), rtol=1e-4)


class TestBcoUdm:

  def test_weighs_undesirable_responses_alone_by_their_density_ratio(self):
    w = world(1)
    ratio_G = np.linspace(0.5, 3.0, 8).astype('f')
    policy, ref = w.stats()
    labels = w.given() | {'density_ratio': jnp.asarray(ratio_G)[:, None]}
    found = unpaired.bco_udm(policy, ref, labels, beta=0.3).per_item[:6]
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
