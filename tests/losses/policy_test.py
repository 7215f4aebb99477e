"""Tests of policy-gradient losses, against loops over responses in float64.

All losses are evaluated in one program, values and gradients, so that little is compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import policy
from jaxalign.losses import policy_parts as parts
from tests.losses import world as world_lib

_of = functools.partial
LABELS = ('advantages', 'old_logps', 'sampler_logps')


def _surrogate(rho, a, low, high, dual=None, cap=np.inf):
  loss = -np.minimum(np.minimum(rho, cap) * a, np.clip(rho, 1 - low, 1 + high) * a)
  return loss if dual is None else np.where(a < 0, np.minimum(loss, -dual * a), loss)


def _k3(x):
  return np.exp(-x) - 1 + x


def _gmpo(d, eps):
  held = np.array([min(x, eps) if a > 0 else max(x, -eps) for x, a in zip(d.x, d.a)])
  return -d.a * np.exp(held.mean())


def _sapo(d, positive, negative):
  tau = np.where(d.a > 0, positive, negative)
  return -d.a * 4 / tau / (1 + np.exp(-tau * (np.exp(d.x) - 1)))


def _phi(d):
  k, lam = (2.0, 3.0) if d.a[0] >= 0 else (3.0, 2.0)
  w = np.exp(d.x.sum())
  return np.exp(lam) * w**k * np.exp(-lam * w)


def _tis(d, most):
  return np.minimum(np.exp(d.old - d.gen), most)


def _band(x, low, high):
  return x * (low <= x <= high)


def _drifted(d, most):
  return 0.0 if d.a[0] < 0 and (d.gen - d.lp).mean() > most else 1.0


_PPO = _of(policy.ppo, clip_eps=0.2)
_WEIGHED = _of(policy.regularised, loss=_PPO)
# The loss, its formula per token of one response, and the formula of its gradient, where that is not the formula's own.
CASES = {
    'reinforce': (policy.reinforce, lambda d: -d.a * d.lp, None),
    'ppo': (_PPO, lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2), None),
    'dual': (_of(policy.ppo, clip_eps=0.2, dual_clip=1.5), lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2, 1.5), None),
    'capped': (
        _of(policy.ppo, clip_eps=0.2, max_ratio=1.4),
        lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2, cap=1.4),
        None,
    ),
    'dapo': (
        _of(policy.dapo, clip_eps=0.1, clip_eps_high=0.4),
        lambda d: _surrogate(np.exp(d.x), d.a, 0.1, 0.4),
        None,
    ),
    'grpo': (
        _of(policy.grpo, clip_eps=0.2, beta=0.3),
        lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2) + 0.3 * _k3(d.lp - d.ref),
        lambda d: _slope(lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2), d) + 0.3 * (d.lp - d.ref),
    ),
    'grpo_k3': (
        _of(policy.grpo, clip_eps=0.2, beta=0.3, kl=parts.k3),
        lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2) + 0.3 * _k3(d.lp - d.ref),
        None,
    ),
    'gspo': (
        _of(policy.gspo, clip_eps=0.1, clip_eps_high=0.2),
        lambda d: _surrogate(np.exp(d.x.mean()), d.a, 0.1, 0.2),
        None,
    ),
    'gspo_token': (
        _of(policy.gspo_token, clip_eps=0.1, clip_eps_high=0.2),
        lambda d: _surrogate(np.exp(d.x.mean()), d.a, 0.1, 0.2),
        lambda d: -d.a * np.exp(d.x.mean()) * ~_stopped(np.exp(d.x.mean()), d.a, 0.1, 0.2),
    ),
    'luspo': (
        _of(policy.luspo, clip_eps=0.1, clip_eps_high=0.2),
        lambda d: len(d.x) * _surrogate(np.exp(d.x.mean()), d.a, 0.1, 0.2),
        None,
    ),
    'rloo': (_of(policy.rloo, clip_eps=0.2), lambda d: _surrogate(np.exp(d.x.sum()), d.a, 0.2, 0.2), None),
    'gmpo': (_of(policy.gmpo, clip_eps=0.3), lambda d: _gmpo(d, 0.3), None),
    'cispo': (
        _of(policy.cispo, max_ratio=1.3, min_ratio=0.6),
        lambda d: -np.clip(np.exp(d.x), 0.6, 1.3) * d.a * d.lp,
        lambda d: -np.clip(np.exp(d.x), 0.6, 1.3) * d.a,
    ),
    'sapo': (_of(policy.sapo, tau_positive=1.0, tau_negative=1.5), lambda d: _sapo(d, 1.0, 1.5), None),
    'vespo': (policy.vespo, lambda d: -_phi(d) * d.a * d.lp, lambda d: -_phi(d) * d.a),
    'truncated': (
        _of(_WEIGHED, weights=[_of(parts.truncated_importance, max_weight=1.2)]),
        lambda d: _tis(d, 1.2) * _surrogate(np.exp(d.x), d.a, 0.2, 0.2),
        None,
    ),
    'masked_response': (
        _of(_WEIGHED, weights=[_of(parts.masked_importance, min_weight=0.5, max_weight=2, level=parts.response_sum)]),
        lambda d: _band(np.exp((d.old - d.gen).sum()), 0.5, 2) * _surrogate(np.exp(d.x), d.a, 0.2, 0.2),
        None,
    ),
    'off_policy': (
        _of(
            _WEIGHED, weights=[_of(parts.off_policy_mask, max_drift=0.1), _of(parts.truncated_importance, max_weight=2)]
        ),
        lambda d: _drifted(d, 0.1) * _tis(d, 2) * _surrogate(np.exp(d.x), d.a, 0.2, 0.2),
        None,
    ),
    'regularised': (
        _of(_WEIGHED, beta=0.3),
        lambda d: _surrogate(np.exp(d.x), d.a, 0.2, 0.2) + 0.3 * _k3(d.lp - d.ref),
        lambda d: _slope(lambda e: _surrogate(np.exp(e.x), e.a, 0.2, 0.2), d) + 0.3 * (d.lp - d.ref),
    ),
}


class Response:
  """One response's numbers per token in float64: policy, old policy, reference, sampler, advantage, and x."""

  def __init__(self, lp, old, ref, gen, a):
    self.lp, self.old, self.ref, self.gen, self.a = (np.asarray(y, np.float64) for y in (lp, old, ref, gen, a))

  @property
  def x(self):
    return self.lp - self.old


def _stopped(rho, a, low, high):
  return np.where(a > 0, rho > 1 + high, rho < 1 - low)


def _slope(formula, d, step=1e-6):
  """The derivative of the sum over a response's tokens by each log-probability, by differences."""
  out = np.zeros(len(d.lp))
  for t in range(len(d.lp)):
    up, down = (Response(d.lp + h * np.eye(len(d.lp))[t], d.old, d.ref, d.gen, d.a) for h in (step, -step))
    out[t] = (np.sum(formula(up)) - np.sum(formula(down))) / (2 * step)
  return out


@functools.cache
def world(per_row):
  """Twelve responses, and the labels of their tokens by group and slot."""
  return world_lib.world(groups=4, size=3, seed=3, per_row=per_row)


@functools.cache
def numbers(same=False):
  """By group and slot; the same ones in every packing. Advantages are of whole responses and have both signs."""
  rng, w, out = np.random.default_rng(5), world(1), {}
  for g, group in enumerate(w.policy):
    for k, lp in enumerate(group):
      near = lambda x, spread: (x + rng.normal(0, spread, len(x))).astype(np.float32)
      old = lp if same else near(lp, 0.3)
      out[g, k] = Response(lp, old, w.ref[g][k], near(old, 0.3), np.full(len(lp), np.float32(rng.normal())))
  return out


def places(w):
  """Where the tokens of each response are: ((g, k), (row, positions))."""
  batch = w.batch
  for b, s in np.argwhere(np.asarray(batch.group_BS) >= 0):
    where = np.flatnonzero(np.asarray(batch.responses_BT[b]) == s)
    yield (int(batch.group_BS[b, s]), int(batch.slot_BS[b, s])), (b, where)


def labels_of(w, given):
  labels = {name: np.zeros(w.policy_BT.shape, np.float32) for name in LABELS}
  for place, where in places(w):
    d = given[place]
    for name, x in zip(LABELS, (d.a, d.old, d.gen)):
      labels[name][where] = x
  return {name: jnp.asarray(x) for name, x in labels.items()}


@functools.cache
def evaluated(per_row, same=False):
  """Of every case the losses and metrics of tokens, and the gradient of their sum."""
  w = world(per_row)
  labels = labels_of(w, numbers(same))

  def all_of(policy_BT):
    stats, ref = w.stats(policy_BT)
    return {name: loss(stats, ref, labels) for name, (loss, _, _) in CASES.items()}

  def slopes(policy_BT):
    sums = lambda x: {name: jnp.sum(out.per_item * w.batch.mask_BT) for name, out in all_of(x).items()}
    return jax.jacrev(sums)(policy_BT)

  return jax.device_get(jax.jit(lambda x: (all_of(x), slopes(x)))(jnp.asarray(w.policy_BT)))


@pytest.mark.parametrize('per_row', [1, 3])
@pytest.mark.parametrize('name', CASES)
class TestLosses:

  def test_are_their_formulas(self, name, per_row):
    out = evaluated(per_row)[0][name]
    for place, where in places(world(per_row)):
      wanted = np.broadcast_to(CASES[name][1](numbers()[place]), where[1].shape)
      np.testing.assert_allclose(out.per_item[where], wanted, rtol=2e-5, atol=2e-6)

  def test_have_the_gradients_of_their_formulas(self, name, per_row):
    slopes_BT = evaluated(per_row)[1][name]
    _, formula, gradient = CASES[name]
    for place, where in places(world(per_row)):
      d = numbers()[place]
      wanted = gradient(d) if gradient else _slope(formula, d)
      np.testing.assert_allclose(slopes_BT[where], wanted, rtol=2e-4, atol=2e-6)
    assert not np.any(slopes_BT[np.asarray(world(per_row).batch.mask_BT) == 0])


class TestAtTheOldPolicy:
  """Where the ratio is 1."""

  SURROGATES = ('ppo', 'dual', 'capped', 'dapo', 'gspo', 'gspo_token', 'rloo', 'gmpo')

  @pytest.mark.parametrize('name', sorted(CASES.keys() - {'truncated', 'masked_response', 'off_policy'}))
  def test_every_gradient_is_that_of_reinforce(self, name):
    slopes_BT = evaluated(3, same=True)[1]
    for place, where in places(world(3)):
      d, n = numbers(same=True)[place], len(where[1])
      wanted = slopes_BT['reinforce'][where].astype(np.float64)
      np.testing.assert_array_equal(slopes_BT['reinforce'][where], -d.a)
      if name in ('rloo', 'luspo'):
        wanted = wanted * n  # one action of n tokens, which the mean over tokens divides again
      if name == 'grpo_k3':
        wanted = wanted + 0.3 * (1 - np.exp(d.ref - d.lp))
      if name in ('grpo', 'regularised'):
        wanted = wanted + 0.3 * (d.lp - d.ref)
      np.testing.assert_allclose(slopes_BT[name][where], wanted, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize('name', SURROGATES)
  def test_the_loss_is_minus_the_advantage(self, name):
    out = evaluated(3, same=True)[0][name]
    for place, where in places(world(3)):
      np.testing.assert_array_equal(out.per_item[where], -numbers(same=True)[place].a.astype(np.float32))

  def test_ratios_are_exactly_one_and_nothing_is_clipped(self):
    outs = evaluated(3, same=True)[0]
    mask = np.asarray(world(3).batch.mask_BT) > 0
    for name, out in outs.items():
      for metric, value in {'val/ratio': 1.0, 'policy/approxkl_avg': 0.0, 'clip_ratio/region_mean': 0.0}.items():
        if metric in out.metrics:
          np.testing.assert_array_equal(out.metrics[metric][mask], value, err_msg=f'{name} {metric}')
    np.testing.assert_allclose(outs['vespo'].metrics['vespo/phi_seq_mean'][mask], 1.0, rtol=1e-6)
    advantages = _advantages(3, same=True)[mask]
    wanted = -2 * advantages / np.where(advantages > 0, 1.0, 1.5)
    np.testing.assert_allclose(outs['sapo'].per_item[mask], wanted, rtol=1e-6)


def _advantages(per_row, same=False):
  return np.asarray(labels_of(world(per_row), numbers(same))['advantages'])


class TestClips:

  @pytest.mark.parametrize(
      'name,low,high,level',
      [
          ('ppo', 0.2, 0.2, np.array),
          ('dapo', 0.1, 0.4, np.array),
          ('gspo', 0.1, 0.2, np.mean),
          ('rloo', 0.2, 0.2, np.sum),
      ],
  )
  def test_take_the_gradient_away_only_where_it_would_lead_further_out(self, name, low, high, level):
    out, slopes_BT = evaluated(3)[0][name], evaluated(3)[1][name]
    seen = {'low': 0, 'high': 0, 'back': 0}
    for place, where in places(world(3)):
      d = numbers()[place]
      rho = np.broadcast_to(np.exp(level(d.x)), d.a.shape)
      at_low, at_high = (d.a < 0) & (rho < 1 - low), (d.a > 0) & (rho > 1 + high)
      back = ((d.a < 0) & (rho > 1 + high)) | ((d.a > 0) & (rho < 1 - low))
      np.testing.assert_array_equal(slopes_BT[where] == 0, at_low | at_high)
      np.testing.assert_array_equal(out.metrics['clip_ratio/low_mean'][where], at_low)
      np.testing.assert_array_equal(out.metrics['clip_ratio/high_mean'][where], at_high)
      np.testing.assert_array_equal(out.metrics['clip_ratio/region_mean'][where], at_low | at_high)
      np.testing.assert_allclose(out.metrics['val/ratio'][where], rho, rtol=1e-5)
      np.testing.assert_allclose(out.metrics['policy/approxkl_avg'][where], d.x**2 / 2, rtol=1e-4, atol=1e-7)
      seen = {
          'low': seen['low'] + at_low.sum(),
          'high': seen['high'] + at_high.sum(),
          'back': seen['back'] + back.sum(),
      }
    assert min(seen.values()) > 0, seen

  def test_of_cispo_leave_every_token_its_gradient(self):
    out, slopes_BT = evaluated(3)[0]['cispo'], evaluated(3)[1]['cispo']
    assert np.all(slopes_BT[np.asarray(world(3).batch.mask_BT) > 0] != 0)
    share = out.metrics['cispo_clip_ratio'].sum()
    assert share == sum(np.sum((d.a > 0) & (np.exp(d.x) > 1.3)) for d in numbers().values()) > 0

  def test_of_two_sides_hold_the_loss_of_bad_tokens(self):
    dual, capped = evaluated(3)[0]['dual'].per_item, evaluated(3)[0]['capped'].per_item
    bad = _advantages(3) < 0
    assert np.any(evaluated(3)[0]['ppo'].per_item[bad] > -1.5 * _advantages(3)[bad])
    assert np.all(dual[bad] <= -1.5 * _advantages(3)[bad]) and np.all(capped[bad] <= -1.4 * _advantages(3)[bad] + 1e-6)


class TestExtremes:

  def test_are_finite_with_finite_gradients(self):
    logps_BT = jnp.array([[-1e4, -1e4, 0.0, 0.0, -1e4, 0.0]])
    old_BT = jnp.array([[0.0, 0.0, -1e4, -1e4, -1e4, 0.0]])
    rows = types.Rows(
        jnp.ones((1, 6)), jnp.array([[0, 1, 2, 3, 4, 5]]), jnp.arange(6)[None] % 3, jnp.arange(6)[None] // 3, 3, 2
    )
    labels = {
        'advantages': jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]]),
        'old_logps': old_BT,
        'sampler_logps': old_BT,
    }
    ref = types.Stats(logps_BT=old_BT)

    def all_of(logps_BT):
      stats = types.Stats(logps_BT=logps_BT, mask_BT=rows.mask_BT, tokens_GK=jnp.ones((3, 2)), rows=rows)
      return {name: jnp.sum(loss(stats, ref, labels).per_item) for name, (loss, _, _) in CASES.items()}

    found = jax.jit(lambda x: (all_of(x), jax.jacrev(all_of)(x)))(logps_BT)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
      assert np.all(np.isfinite(x)), path


class TestIdentities:

  def test_of_one_token_tie_responses_to_tokens(self):
    """GSPO, its token form, LUSPO and RLOO are PPO where a response has one token; LUSPO is n times GSPO."""
    losses = {
        'ppo': _of(policy.ppo, clip_eps=0.1, clip_eps_high=0.2),
        **{name: CASES[name][0] for name in ('gspo', 'gspo_token', 'luspo')},
    }
    w = world_lib.world(groups=4, size=3, seed=3, longest=1)
    stats, ref = w.stats()
    old_BT = jnp.asarray(w.policy_BT - 0.3 * w.weights_BT + 0.2)
    labels = {
        'advantages': jnp.asarray(np.where(w.policy_BT < -0.6, 1.0, -1.0).astype(np.float32)),
        'old_logps': old_BT,
    }
    found = {name: np.asarray(loss(stats, ref, labels).per_item * w.batch.mask_BT) for name, loss in losses.items()}
    for name in losses:
      np.testing.assert_allclose(found[name], found['ppo'], rtol=1e-6, err_msg=name)
    assert len(np.unique(np.sign(found['ppo']))) == 3


class TestRegularised:

  def test_reports_the_divergence_that_it_trains_on(self):
    outs, w = evaluated(3)[0], world(3)
    for name in ('grpo', 'grpo_k3', 'regularised'):
      np.testing.assert_allclose(
          outs[name].per_item, outs['ppo'].per_item + 0.3 * outs[name].metrics['kl'], rtol=1e-5, atol=1e-6
      )
      assert np.all(outs[name].metrics['kl'][np.asarray(w.batch.mask_BT) > 0] > 0)

  def test_reports_the_weights(self):
    out = evaluated(3)[0]['truncated']
    for place, where in places(world(3)):
      np.testing.assert_allclose(out.metrics['policy/weight_avg'][where], _tis(numbers()[place], 1.2), rtol=1e-5)


class TestNeeds:

  def needs(self, loss):
    return tracing.trace(loss, group_size=3, labels=(), token_labels=LABELS)

  @pytest.mark.parametrize('name', sorted(CASES.keys() - {'grpo', 'grpo_k3', 'regularised'}))
  def test_are_no_reference_without_a_divergence(self, name):
    needs = self.needs(CASES[name][0])
    assert not needs.reference and needs.writes and not needs.whole_step

  @pytest.mark.parametrize('beta', [0.0, 0.1])
  def test_are_a_reference_only_where_beta_is_not_zero(self, beta):
    assert self.needs(_of(policy.grpo, clip_eps=0.2, beta=beta)).reference == (beta > 0)
    assert self.needs(_of(_WEIGHED, beta=beta)).reference == (beta > 0)

  def test_are_no_old_policy_for_reinforce_and_a_sampler_only_for_its_weights(self):
    assert self.needs(policy.reinforce).fields == {'policy.logps_BT', 'labels.advantages'}
    assert 'labels.sampler_logps' in self.needs(CASES['truncated'][0]).fields
    assert 'labels.sampler_logps' not in self.needs(CASES['ppo'][0]).fields


class TestEstimators:
  """On five tokens, over all of them: p is the policy's, q the reference's."""

  THETA, Q = np.array([0.1, 1.0, -0.7, 0.4, -1.2]), np.array([0.3, 0.1, 0.25, 0.3, 0.05])
  P = np.exp(THETA) / np.exp(THETA).sum()
  KL = float((P * np.log(P / Q)).sum())

  def value(self, estimator):
    return float(self.P @ np.asarray(estimator(jnp.asarray(np.log(self.P / self.Q), jnp.float32)), np.float64))

  def gradient(self, estimator):
    """The expectation, over tokens that p writes, of the estimate's gradient by the logits."""
    x = lambda theta: jax.nn.log_softmax(theta) - jnp.asarray(np.log(self.Q), jnp.float32)
    return self.P @ np.asarray(jax.jacrev(lambda theta: estimator(x(theta)))(jnp.asarray(self.THETA, jnp.float32)))

  def test_k1_and_k3_have_the_divergence_s_expectation_and_k2_has_not(self):
    np.testing.assert_allclose([self.value(parts.k1), self.value(parts.k3)], self.KL, rtol=1e-5)
    assert abs(self.value(parts.k2) - self.KL) > 0.1 * self.KL

  def test_k2_has_its_gradient_k1_none_and_k3_that_of_the_other_way_round(self):
    exact = self.P * (np.log(self.P / self.Q) - self.KL)
    np.testing.assert_allclose(self.gradient(parts.k2), exact, atol=1e-6)
    np.testing.assert_allclose(self.gradient(parts.k1), 0.0, atol=1e-6)
    np.testing.assert_allclose(self.gradient(parts.k3), self.P - self.Q, atol=1e-6)

  def test_a_penalty_has_the_expectation_and_the_gradient_of_the_divergence(self):
    np.testing.assert_allclose(self.value(parts.kl_penalty), self.KL, rtol=1e-5)
    np.testing.assert_allclose(self.gradient(parts.kl_penalty), self.P * (np.log(self.P / self.Q) - self.KL), atol=1e-6)

  def test_are_precise_where_policy_and_reference_hardly_differ(self):
    x = np.float32(1e-3)
    np.testing.assert_allclose(parts.k3(jnp.asarray(x)), np.expm1(-np.float64(x)) + np.float64(x), rtol=1e-3)

  @pytest.mark.parametrize('estimator', [parts.k1, parts.k2, parts.k3])
  def test_are_held_within_a_limit(self, estimator):
    x = jnp.array([-1e4, -30.0, 0.5, 30.0, 1e4])
    value, slope = estimator(x, limit=10.0), jax.grad(lambda x: jnp.sum(estimator(x, limit=10.0)))(x)
    np.testing.assert_array_equal(np.abs(value)[np.array([0, 1, 3, 4])], 10.0)
    np.testing.assert_array_equal(value[2], estimator(x)[2])
    np.testing.assert_array_equal(slope == 0, [True, True, False, True, True])


class TestWeightsOfTheWholeStep:

  def test_keeps_the_least_certain_share_of_all_tokens_that_count(self):
    rng = np.random.default_rng(3)
    entropy, mask = rng.uniform(size=(4, 10)).astype(np.float32), (rng.uniform(size=(4, 10)) < 0.6).astype(np.float32)
    stats = types.Stats(entropy_BT=jnp.asarray(entropy), mask_BT=jnp.asarray(mask), valid_G=jnp.ones(2))
    found = parts.high_entropy(stats, types.Stats(), {}, share=0.2)
    least = np.sort(entropy[mask > 0])[::-1][int(np.ceil(0.2 * mask.sum())) - 1]
    np.testing.assert_array_equal(found, (mask > 0) & (entropy >= least))

  @pytest.mark.parametrize('share,count', [(0.1, 3), (0.9, None)])
  def test_covariance_rules_out_some_of_a_band(self, share, count):
    given, cov, mask = self.covariances()
    band = (mask > 0) & (cov > -0.5) & (cov < 1.0)
    out = np.asarray(parts.clip_cov(*given, share=share, low=-0.5, high=1.0)) == 0
    assert not np.any(out & ~band) and 3 < band.sum() < mask.sum()
    assert out.sum() == (band.sum() if count is None else count)

  def test_covariance_holds_the_largest_at_the_old_policy(self):
    given, cov, mask = self.covariances()
    out = policy.kl_cov(*given, share=0.1, coef=2.0)
    x = np.asarray(given[0].logps_BT, np.float64) - np.asarray(given[2]['old_logps'], np.float64)
    held = (mask > 0) & (cov >= np.sort(cov[mask > 0])[-3])
    wanted = -np.exp(x) * np.asarray(given[2]['advantages']) + 2 * held * np.abs(x)
    np.testing.assert_allclose(out.per_item[mask > 0], wanted[mask > 0], rtol=1e-5)
    assert out.metrics['kl_cov/held_mean'].sum() == 3
    total = lambda lp: jnp.sum(policy.kl_cov(given[0].replace(logps_BT=lp), *given[1:], share=0.1, coef=2.0).per_item)
    slope = -np.exp(x) * np.asarray(given[2]['advantages']) + 2 * held * np.sign(x)
    np.testing.assert_allclose(jax.grad(total)(given[0].logps_BT)[mask > 0], slope[mask > 0], rtol=1e-5)

  def covariances(self):
    """What losses are given of 24 tokens that count, and the products of their distances from the means."""
    rng = np.random.default_rng(4)
    logps, advantages, old = (rng.normal(size=(4, 10)).astype(np.float32) for _ in range(3))
    mask = np.ones((4, 10), np.float32)
    mask[:, 6:] = 0
    of = lambda x: x.astype(np.float64) - x[mask > 0].astype(np.float64).mean()
    stats = types.Stats(logps_BT=jnp.asarray(logps), mask_BT=jnp.asarray(mask), valid_G=jnp.ones(2))
    labels = {'advantages': jnp.asarray(advantages), 'old_logps': jnp.asarray(old)}
    return (stats, types.Stats(), labels), of(logps) * of(advantages), mask

  def test_looks_at_the_whole_step(self):
    loss = _of(policy.regularised, loss=policy.reinforce, weights=[_of(parts.high_entropy, share=0.2)])
    assert tracing.trace(loss, group_size=2, labels=(), token_labels=LABELS).whole_step
