"""Laws that losses obey whatever the data: what they do not see, which is a case of which, and which way they push."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.losses import batchwise
from jaxalign.losses import listwise
from jaxalign.losses import parts
from jaxalign.losses import pointwise
from jaxalign.losses import preference
from jaxalign.losses import reference_free as free
from jaxalign.losses import reward
from jaxalign.losses import shaped
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from tests.losses import methods_test as methods
from tests.losses import world as world_lib

_of = functools.partial
# Losses that read whole distributions, rivals or values; their formulas are in `methods_test`.
DENSE_PAIRS = {
    'tdpo1': _of(shaped.tdpo1, beta=0.3),
    'tdpo2': _of(shaped.tdpo2, beta=0.3, alpha=0.5),
    'mallows_dpo': _of(shaped.mallows_dpo, beta=0.3, scale=1.0),
    'pairwise_cringe': _of(shaped.pairwise_cringe, alpha=0.7, gate_margin=1.0, temperature=2.0),
}
D2O = _of(listwise.d2o, beta=0.3, alpha=0.2)
LISTS = methods.LISTS | {'dro_v': (_of(listwise.dro_v, tau=0.3), None)}
# chi-PO is flat beyond its clip.
PAIRS = (
    methods.PAIRS
    | {'chi_po': (_of(preference.chi_po, beta=0.8, max_reward=1e3), None)}
    | {name: (loss, None) for name, loss in DENSE_PAIRS.items()}
)
ALL = {
    **{name: (size, loss) for name, (size, loss, _) in methods.ALL.items()},
    **{name: (2, loss) for name, loss in DENSE_PAIRS.items()},
    'dro_v': (4, LISTS['dro_v'][0]),
    'd2o': (4, D2O),
}
seeds = hypothesis.given(st.integers(0, 10**6))
few = hypothesis.settings(max_examples=4)


def world(seed=0, size=2, groups=5, **more):
  """Always of one shape, so that nothing is compiled twice."""
  return world_lib.world(groups=groups, size=size, seed=seed, empty=1, per_row=1, **more)


def per_group(loss, policy, ref, labels, groups=5):
  return np.asarray(loss(policy, ref, labels).per_item)[:groups]


def run(loss, w):
  return per_group(loss, *w.stats(), w.given(), len(w.policy))


SHIFTED = {name: loss for name, (loss, _) in {**PAIRS, **LISTS, 'd2o': (D2O, None)}.items()}
# Read z of each response for itself, or bent, or divided by its length, or sorted over groups.
ABSOLUTE = {
    'f_dpo_forward_kl', 'f_dpo_jensen_shannon', 'f_dpo_alpha', 'chi_po', 'ipo_averaged', 'sigmoid_norm', 'apo_zero',
    'apo_down', 'nca_pair', 'bco_pair', 'sppo_hard', 'dpop', 'cal_dpo', 'mpo', 'nca', 'aot_unpaired',
    'dro_v', 'd2o',
}  # fmt: skip
# Read no sums of log-ratios: tokens, or no reference.
OTHERWISE = {
    'ld_dpo', 'tis_dpo', 'aot', 'simpo', 'alphapo', 'simper', 'cpo', 'orpo', 'slic_hf', 'rrhf', 'pro', 'lire',
    'pairwise_cringe',
}  # fmt: skip


class TestShift:

  @pytest.mark.parametrize('name', sorted(SHIFTED.keys() - OTHERWISE))
  @few
  @seeds
  def test_of_all_log_ratios_of_a_group_is_seen_by_those_that_take_each_for_itself(self, name, seed):
    w = world(seed, size=2 if name in PAIRS else 4)
    policy, ref = w.stats()
    # Down, as DPO-Positive sees only what is below the reference.
    shift_G1 = jnp.asarray(np.random.default_rng(seed).uniform(-3, -2, (6, 1)), jnp.float32)
    moved = ref.replace(logratios_GK=ref.logratios_GK + shift_G1)
    here, there = (per_group(SHIFTED[name], policy, one, w.given()) for one in (ref, moved))
    if name in ABSOLUTE:
      assert np.abs(here - there).max() > 1e-3
    else:
      np.testing.assert_allclose(there, here, rtol=1e-4, atol=2e-5)

  @pytest.mark.parametrize('name', ['slic_hf', 'cpo'])
  def test_of_log_probabilities_leaves_a_contrast_of_sums_alone(self, name):
    w = world()
    loss = {'slic_hf': _of(free.slic_hf, delta=1.0, lam=0.0), 'cpo': _of(free.cpo, beta=0.1, alpha=0.0)}[name]
    policy, ref = w.stats()
    there = per_group(loss, policy.replace(logps_GK=policy.logps_GK - 3.0), ref, w.given())
    np.testing.assert_allclose(there, run(loss, w), rtol=1e-4, atol=2e-5)

  @pytest.mark.parametrize('name', ['dpo_pl', 'rrhf', 'pro', 'infonca', 'nca', 'exo', 'dro'])
  @few
  @seeds
  def test_of_all_scores_of_a_list_is_not_seen(self, name, seed):
    w = world(seed, size=4)
    labels = w.given()
    there = per_group(LISTS[name][0], *w.stats(), labels | {'score': labels['score'] + 2.0})
    np.testing.assert_allclose(there, run(LISTS[name][0], w), rtol=1e-4, atol=2e-5)

  @pytest.mark.parametrize('loss', [reward.all_pairs, reward.plackett_luce, _of(reward.length_debiased, penalty=2.0)])
  @few
  @seeds
  def test_of_all_rewards_of_a_group_is_not_seen(self, loss, seed):
    w = world(seed, size=2)
    policy, ref = w.stats()
    shift_G1 = jnp.asarray(np.random.default_rng(seed).uniform(-2, 2, (6, 1)), jnp.float32)
    here, there = (
        per_group(loss, policy.replace(rewards_GK=x), ref, w.given())
        for x in (ref.logratios_GK, ref.logratios_GK + shift_G1)
    )
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=2e-5)


# Their tokens stay where they are when groups change places.
OF_TOKENS = {'ld_dpo', 'tis_dpo', 'tdpo1', 'tdpo2', 'pairwise_cringe'}


class TestOrder:

  @pytest.mark.parametrize('name', LISTS)
  @few
  @seeds
  def test_of_a_list_does_not_matter(self, name, seed):
    w = world(seed, size=4)
    order = np.random.default_rng(seed).permutation(4)
    policy, ref = w.stats()
    turn = lambda stats: stats.replace(
        **{field: x[:, order] for field, x in vars(stats).items() if field.endswith('_GK') and x is not None}
    )
    labels = w.given() | {'score': w.given()['score'][:, order]}
    found = LISTS[name][0](turn(policy), turn(ref), labels)
    wanted = w.run(LISTS[name][0])
    np.testing.assert_allclose(found.per_item, wanted.per_item, rtol=1e-5, atol=1e-6)
    for metric, x in wanted.metrics.items():
      x = x[:, order] if metric == 'values' else x
      np.testing.assert_allclose(found.metrics[metric], x, rtol=1e-5, atol=1e-6, err_msg=metric)

  @few
  @seeds
  def test_of_samples_does_not_matter_to_d2o_but_which_response_is_rejected_does(self, seed):
    w = world(seed, size=4)
    policy, ref = w.stats()
    turned = lambda order: D2O(policy, ref.replace(logratios_GK=ref.logratios_GK[:, order]), {}).per_item[:5]
    np.testing.assert_allclose(turned(np.array([0, 3, 1, 2])), run(D2O, w), rtol=1e-5)
    assert np.abs(turned(np.array([1, 0, 2, 3])) - run(D2O, w)).max() > 1e-3

  @pytest.mark.parametrize('name', sorted(PAIRS.keys() - OF_TOKENS))
  def test_of_groups_does_not_matter(self, name):
    w = world(3)
    policy, ref = w.stats()
    turn = lambda stats: stats.replace(
        **{x: y[::-1] for x, y in vars(stats).items() if x.endswith(('_GK', '_G')) and y is not None}
    )
    labels = {label: x[::-1] for label, x in w.given().items() if label != 'weight'}
    found = PAIRS[name][0](turn(policy), turn(ref), labels).per_item[::-1]
    np.testing.assert_allclose(found[:5], run(PAIRS[name][0], w), rtol=1e-5, atol=1e-6)


class TestPacking:

  @pytest.mark.parametrize('name', sorted(ALL))
  def test_changes_no_loss_and_no_gradient(self, name):
    size, loss = ALL[name]
    alone, packed = (world_lib.world(groups=5, size=size, seed=2, per_row=n, empty=n) for n in (1, 3))
    np.testing.assert_allclose(run(loss, packed), run(loss, alone), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(packed.slopes(loss), alone.slopes(loss), rtol=1e-4, atol=1e-6)


# What is claimed of every world of pairs (of tokens where it says so): special case, and the general loss that has it.
EQUAL = {
    'f-DPO of alpha 0 is DPO': (
        PAIRS['dpo'][0],
        _of(preference.f_dpo, beta=0.3, divergence=_of(parts.alpha_divergence, alpha=1e-4)),
    ),
    'f-DPO of alpha 1 is that of the forward KL': (
        PAIRS['f_dpo_forward_kl'][0],
        _of(preference.f_dpo, beta=0.3, divergence=_of(parts.alpha_divergence, alpha=1.0)),
    ),
    'AlphaPO of alpha 0 is SimPO': (PAIRS['simpo'][0], _of(free.alphapo, beta=2.0, margin=0.7, alpha=1e-4)),
    'RSO is DPO': (PAIRS['dpo'][0], _of(preference.rso, gamma=0.3)),
    'ODPO without offset is DPO': (PAIRS['dpo'][0], _of(shaped.odpo, beta=0.3, alpha=0.0)),
    'DPO with a margin of 0 is DPO': (PAIRS['dpo'][0], _of(shaped.margin_dpo, beta=0.3, scale=0.0)),
    'Cal-DPO without calibration is DPO': (
        _of(preference.dpo, beta=1.0),
        _of(shaped.cal_dpo, beta=0.25, calibration=0.0),
    ),
    'NCA of one right response in two is that of pairs': (
        PAIRS['nca_pair'][0],
        _of(listwise.nca, beta=0.3, alpha=1e-4),
    ),
    'sigmoid_norm of single tokens is DPO': (PAIRS['dpo'][0], _of(preference.sigmoid_norm, beta=0.3)),
    'averaged IPO of single tokens is IPO': (PAIRS['ipo'][0], _of(preference.ipo_averaged, tau=0.2)),
    'GPO of the squared link is IPO': (
        lambda *args: _scaled(preference.ipo(*args, tau=0.2), 4 * 0.2**2),
        _of(preference.gpo, beta=0.4, link=parts.squared),
    ),
    'soft labels of 1 - eps are label smoothing': (
        _of(preference.cdpo, beta=0.3, label_smoothing=0.2),
        lambda policy, ref, labels: preference.soft(
            policy, ref, labels | {'probability': 0.8 + 0 * labels['score']}, beta=0.3
        ),
    ),
    'TIS-DPO of weights 1 is DPO': (
        PAIRS['dpo'][0],
        lambda policy, ref, labels: shaped.tis_dpo(policy, ref, labels | {'weight': policy.mask_BT}, beta=0.3),
    ),
    'LiPO of two is weighted logistic': (
        lambda policy, ref, labels: _scaled(preference.dpo(policy, ref, labels, beta=0.3), _lambda(labels['score'])),
        _of(listwise.lipo_lambda, beta=0.3),
    ),
    'PRO of two is logistic in the gap of scores': (
        lambda policy, ref, labels: _own_beta(policy, labels),
        _of(listwise.pro, sft_weight=0.0),
    ),
    'EXO of two is that of pairs, by the gap of scores': (
        lambda policy, ref, labels: preference.exo_pair(policy, ref, labels, beta=0.3, label_smoothing=0.2),
        lambda policy, ref, labels: listwise.exo(
            policy,
            ref,
            labels | {'score': np.log(4.0) * 0.7 * jnp.array([[1.0, 0.0]]) + 0 * labels['score']},
            beta=0.3,
            reward_beta=0.7,
        ),
    ),
    'group-robust DPO of one group is DPO': (
        PAIRS['dpo'][0],
        lambda policy, ref, labels: batchwise.group_robust(
            policy, ref, labels | {'group': 0 * labels['score']}, beta=0.3, groups=1, rate=0.7
        ),
    ),
    'MPO is the sum of its losses': (
        lambda *args: types.LossOut(
            0.8 * preference.dpo(*args, beta=0.3).per_item
            + 0.2 * preference.bco_pair(*args, beta=0.3).per_item
            + shaped.rpo(*args, beta=0.3, eta=1.0).per_item
            - preference.dpo(*args, beta=0.3).per_item,
            {},
        ),
        PAIRS['mpo'][0],
    ),
    'TDPO2 of alpha 1 has the value of TDPO1': (PAIRS['tdpo1'][0], _of(shaped.tdpo2, beta=0.3, alpha=1.0)),
    'Mallows-DPO where every entropy is 1 / e is DPO': (
        PAIRS['dpo'][0],
        lambda policy, ref, labels: PAIRS['mallows_dpo'][0](
            policy, ref.replace(entropy_GK=policy.tokens_GK / np.e), labels
        ),
    ),
    'pairwise CRINGE with an open gate and no rivals is the likelihood of what is chosen': (
        lambda policy, ref, labels: types.LossOut(-policy.logps_GK[:, 0], {}),
        _of(shaped.pairwise_cringe, alpha=0.0, gate_margin=1e3, temperature=1.0),
    ),
    'D2O of one sample is DPO': (
        PAIRS['dpo'][0],
        lambda policy, ref, labels: listwise.d2o(
            policy, ref.replace(logratios_GK=ref.logratios_GK[:, ::-1]), labels, beta=0.3, alpha=0.3
        ),
    ),
    'DRO-V whose value is the mean of what is left is DRO': (
        _of(listwise.dro, tau=0.3),
        lambda policy, ref, labels: listwise.dro_v(
            policy.replace(values_GK=_mean_of_both(labels['score'] - 0.3 * ref.logratios_GK)), ref, labels, tau=0.3
        ),
    ),
    'BCO whose density ratios are 1 is BCO': (
        _of(unpaired.bco, beta=0.3),
        lambda policy, ref, labels: unpaired.bco_udm(
            policy, ref, labels | {'density_ratio': 1 + 0 * labels['score']}, beta=0.3
        ),
    ),
    'a classifier of two classes is a model of right and wrong': (
        lambda *args: pointwise.correctness(*_as_rewards(*args)),
        lambda policy, ref, labels: pointwise.classification(
            policy.replace(outputs_GKO=jnp.stack([0 * ref.logratios_GK, ref.logratios_GK], axis=2)),
            ref,
            labels | {'class': labels['desirable']},
        ),
    ),
    'regression on one attribute is regression on ratings': (
        lambda *args: pointwise.regression(*_as_rewards(*args)),
        lambda policy, ref, labels: pointwise.attributes(
            policy.replace(outputs_GKO=ref.logratios_GK[..., None]), ref, labels, attributes=('score',)
        ),
    ),
    'Plackett-Luce rewards of two are Bradley and Terry': (
        lambda *args: reward.bradley_terry(*_as_rewards(*args)),
        lambda *args: reward.plackett_luce(*_as_rewards(*args)),
    ),
    'rewards of all pairs of two are Bradley and Terry': (
        lambda *args: reward.bradley_terry(*_as_rewards(*args)),
        lambda *args: reward.all_pairs(*_as_rewards(*args)),
    ),
    'length-debiased rewards without penalty are Bradley and Terry': (
        lambda *args: reward.bradley_terry(*_as_rewards(*args)),
        lambda *args: reward.length_debiased(*_as_rewards(*args), penalty=0.0),
    ),
}


def _scaled(out, by):
  return types.LossOut(out.per_item * by, {})


def _lambda(score_GK):
  """LambdaLoss's weight of two, whose ranks are 1 and 2 in whatever order."""
  return jnp.abs(2 ** score_GK[:, 0] - 2 ** score_GK[:, 1]) * (1 / np.log(2) - 1 / np.log(3))


def _mean_of_both(x_GK):
  return jnp.broadcast_to(jnp.mean(x_GK, axis=1, keepdims=True), x_GK.shape)


def _own_beta(policy, labels):
  a_GK = policy.logps_GK / jnp.maximum(policy.tokens_GK, 1.0)
  gap_G = labels['score'][:, 0] - labels['score'][:, 1]
  return types.LossOut(jnp.log1p(jnp.exp(-gap_G * (a_GK[:, 0] - a_GK[:, 1]))), {})


def _as_rewards(policy, ref, labels):
  return policy.replace(rewards_GK=ref.logratios_GK), ref, labels | {'margin': 0 * labels['margin']}


class TestEqual:

  @pytest.mark.parametrize('claim', EQUAL)
  @few
  @seeds
  def test_are_a_special_case_and_what_it_is_one_of(self, claim, seed):
    special, general = EQUAL[claim]
    w = world(seed, longest=1 if 'single tokens' in claim else 6)
    np.testing.assert_allclose(run(general, w), run(special, w), rtol=5e-4, atol=5e-4 if 'alpha 0' in claim else 2e-5)

  @pytest.mark.parametrize('loss', [_of(batchwise.aot, beta=0.3), _of(batchwise.aot_unpaired, beta=0.3)])
  @few
  @seeds
  def test_are_aot_of_one_pair_and_dpo(self, loss, seed):
    w = world(seed, groups=1)
    np.testing.assert_allclose(run(loss, w), run(PAIRS['dpo'][0], w), rtol=1e-4, atol=1e-5)

  @few
  @seeds
  def test_are_tpo_whose_third_response_is_the_chosen_one_and_cpo(self, seed):
    w = world(seed, size=3)
    policy, ref = w.stats()
    again = lambda x_GK: x_GK.at[:, 2].set(x_GK[:, 0])
    policy = policy.replace(logps_GK=again(policy.logps_GK), tokens_GK=again(policy.tokens_GK))
    found, wanted = (
        per_group(loss, policy, ref, {}) for loss in (methods.TRIPLES['tpo'][0], _of(free.cpo, beta=0.1, alpha=0.5))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)

  def test_are_losses_on_desirable_tokens_alone_and_the_likelihood(self):
    w = world(size=1)
    policy, ref = w.stats()
    labels = {'desirable': jnp.ones_like(w.given()['desirable'])}
    wanted = supervised.cross_entropy(policy, ref, labels).per_item * policy.mask_BT
    for loss in (
        _of(supervised.unlikelihood, alpha=0.5),
        _of(supervised.class_weighted, undesirable_weight=0.1),
        _of(supervised.cringe, alpha=0.5),
        _of(supervised.quark, beta=0.0),
    ):
      np.testing.assert_allclose(loss(policy, ref, labels).per_item * policy.mask_BT, wanted, rtol=1e-6)

  @few
  @hypothesis.given(st.floats(-4, 4), st.floats(0.0, 0.45), st.floats(0.0, 0.45))
  def test_are_smoothed_links_linear_in_how_much(self, x, first, second):
    x = jnp.float32(x)
    middle = parts.smooth(x, eps=(first + second) / 2)
    mean = (parts.smooth(x, eps=first) + parts.smooth(x, eps=second)) / 2
    np.testing.assert_allclose(middle, mean, rtol=1e-5)


# Which of a pair's derivatives may have the other sign: beyond the best margin, or of what sinks too.
BEST = {
    'ipo': lambda w: w.h > 2.5,
    'ipo_averaged': lambda w: methods.gap(w.z / w.n) > 2.5,
    'gpo_squared': lambda w: 0.3 * w.h > 1,
    'exo_pair': lambda w: methods.sig(0.3 * w.h) > 0.99,
    'cdpo': lambda w: methods.sig(0.3 * w.h) > 0.8,
    'soft': lambda w: methods.sig(0.3 * w.h) > w.p,
}
# name: (the chosen response is pushed down there, the rejected one up there).
EACH = {
    'nca_pair': (lambda w: 0.3 * w.z[:, 0] > np.log(2), lambda w: w.h != w.h),
    'sppo_hard': (lambda w: w.z[:, 0] > 2, lambda w: w.z[:, 1] < -2),
}
NOT_MONOTONE = {'discopop', 'apo_down', 'cal_dpo'}


class TestSigns:

  @pytest.mark.parametrize('name', sorted(PAIRS.keys() - BEST.keys() - EACH.keys() - NOT_MONOTONE))
  @few
  @seeds
  def test_are_up_for_the_chosen_response_and_down_for_the_rejected_one(self, name, seed):
    slopes = world(seed, spread=2.0).slopes(PAIRS[name][0])
    assert np.all(slopes[:, 0] <= 1e-7) and np.all(slopes[:, 1] >= -1e-7)
    assert np.any(slopes)

  @pytest.mark.parametrize('name', BEST)
  @few
  @seeds
  def test_turn_beyond_the_best_margin(self, name, seed):
    w = world(seed, spread=3.0)
    slopes, beyond = w.slopes(PAIRS[name][0]), BEST[name](w)
    np.testing.assert_array_equal(slopes[:, 0] > 0, beyond)
    np.testing.assert_array_equal(slopes[:, 1] < 0, beyond)

  @pytest.mark.parametrize('name', EACH)
  @few
  @seeds
  def test_turn_for_each_response_beyond_its_own_best(self, name, seed):
    w = world(seed, spread=3.0)
    slopes = w.slopes(PAIRS[name][0])
    for k, (side, sign) in enumerate(zip(EACH[name], (1, -1))):
      np.testing.assert_array_equal(sign * slopes[:, k] > 0, side(w))

  @few
  @seeds
  def test_of_apo_down_are_down_for_the_rejected_one_and_for_both_at_the_reference(self, seed):
    loss = PAIRS['apo_down'][0]
    assert np.all(world(seed, spread=2.0).slopes(loss)[:, 1] >= -1e-7)
    # Half of the pull of the margin is left for the chosen one: 0 in sum.
    np.testing.assert_allclose(world(seed, same=True).slopes(loss), np.tile([0, 0.3 / 4], (5, 1)), atol=1e-6)

  @few
  @seeds
  def test_of_cal_dpo_turn_beyond_both_targets(self, seed):
    w = world(seed, spread=3.0)
    slopes = w.slopes(PAIRS['cal_dpo'][0])
    assert np.all(slopes[:, 0][w.z[:, 0] < 2] < 0) and np.all(slopes[:, 1][w.z[:, 1] > -2] > 0)
    assert np.all(slopes[:, 0][w.z[:, 0] > 3] > 0) and np.all(slopes[:, 1][w.z[:, 1] < -3] < 0)

  def test_of_discopop_are_not_all_one_way(self):
    link = _of(parts.discovered, tau=0.05)
    slopes = jax.vmap(jax.grad(link))(jnp.linspace(-4, 4, 801))
    assert np.all(np.asarray(slopes)[:300] < 0) and np.any(np.asarray(slopes) > 0.1)

  def test_of_exo_are_0_where_the_smoothed_label_is_met_alone(self):
    x = jnp.linspace(-6, 6, 1201)
    loss = np.asarray(parts.reverse_kl(x, eps=0.1))
    best = np.log(0.9 / 0.1)
    np.testing.assert_allclose(parts.reverse_kl(jnp.float32(best), eps=0.1), 0, atol=1e-6)
    assert np.all(loss[np.abs(np.asarray(x) - best) > 0.05] > 1e-5)
