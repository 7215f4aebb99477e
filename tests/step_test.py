"""The step: exact accumulation, the guard, the update, and one program for all batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import forward
from jaxalign import masked
from jaxalign import objectives
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import actor_critic
from jaxalign.losses import batchwise
from jaxalign.losses import policy
from jaxalign.losses import preference
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from jaxalign.models import architecture
from jaxalign.models import transformer
from tests import packed

CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, MESH, length=16)
PARAMS = transformer.init_params(MODEL, jax.random.key(0), MESH)
OTHER = transformer.init_params(MODEL, jax.random.key(1), MESH)
OPTIMIZER = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-2), weight_decay=0.1)
NEEDS = tracing.Needs()
SFT = objectives.supervised(model=MODEL, loss_fn=supervised.cross_entropy, needs=NEEDS)
DPO = objectives.preference(model=MODEL, loss_fn=functools.partial(preference.dpo, beta=0.5), needs=NEEDS)
# Losses that look at all pairs of a step.
WHOLE = {
    'aot': functools.partial(batchwise.aot, beta=0.5),
    'beta_dpo': functools.partial(batchwise.beta_dpo, beta=0.5, alpha=0.6, keep=0.6),
    'kto': functools.partial(unpaired.kto, beta=0.5),
}
TRACED = {name: tracing.trace(loss, group_size=2, labels=('desirable',)) for name, loss in WHOLE.items()}
OBJECTIVES = {'sft': SFT, 'dpo': DPO} | {
    name: objectives.preference(model=MODEL, loss_fn=loss, needs=TRACED[name]) for name, loss in WHOLE.items()
}
STEPS = {name: jax.jit(step_lib.make_step(objective, OPTIMIZER)) for name, objective in OBJECTIVES.items()}
PAIRS = packed.pairs(0, 4)
PPO = functools.partial(policy.ppo, clip_eps=0.2)


def split(ways, pairs=PAIRS):
  """Four pairs as a step of `ways` micro-batches of one pair a row; a pair's lengths differ from another's."""
  count = len(pairs) // ways
  micros = []
  for start in range(0, len(pairs), count):
    part = pairs[start : start + count]
    rows = [[(g, k, pair[0], pair[1 + k]) for k in range(2)] for g, pair in enumerate(part)]
    micro = packed.micro_batch(rows, groups=4, size=2, length=20, slots=2)
    desirable_BS = np.where(micro.group_BS >= 0, (micro.group_BS + start) % 3 != 0, 0).astype(np.float32)
    micros.append(dataclasses.replace(micro, labels_BS={'desirable': desirable_BS}))
  batch = packed.stack(*micros)
  ref = jax.jit(functools.partial(forward.ref_logps, model=MODEL))
  return dataclasses.replace(batch, ref_logps_BT=ref(OTHER, batch))


def fresh(params=PARAMS, optimizer=OPTIMIZER, loss_state=()):
  return step_lib.init_state(params, optimizer.tx, 0, loss_state)


class TestMakeStep:

  @pytest.mark.parametrize('name', OBJECTIVES)
  def test_gives_the_same_update_however_the_batch_is_split(self, name):
    start = fresh(loss_state=TRACED[name].state if name in TRACED else ())
    whole, measured = STEPS[name](start, {}, split(1))
    for ways in (2, 4) if name not in ('kto', 'beta_dpo') else (4,):
      state, other = STEPS[name](start, {}, split(ways))
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.loss_state, whole.loss_state)
      for key, pair in measured.means.items():
        np.testing.assert_allclose(other.means[key].mean(), pair.mean(), rtol=2e-5, atol=1e-6, err_msg=key)
      np.testing.assert_allclose(other.gauges['grad_norm'], measured.gauges['grad_norm'], rtol=1e-5)
      # Adam divides by the root of the second moment, which makes rounding of tiny gradients visible.
      moments = state.opt_state[1].mu, whole.opt_state[1].mu
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), *moments)

  def test_divides_the_sum_by_the_weight_of_the_whole_step(self):
    _, measured = STEPS['sft'](fresh(), {}, split(4))
    of_micro = jax.jit(lambda micro: SFT.of_micro(PARAMS, {}, micro, None, ()))
    sums = [of_micro(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), split(4))) for i in range(4)]
    weights = [float(s.weight) for _, s in sums]
    assert len(set(weights)) > 1  # a mean of means would differ
    wanted = sum(float(total) for total, _ in sums) / sum(weights)
    np.testing.assert_allclose(measured.means['loss'].mean(), wanted, rtol=1e-6)

  def test_is_adamw_on_the_gradient_of_the_mean(self):
    batch = split(1)
    mean = lambda p: (lambda out: out[0] / out[1].weight)(
        SFT.of_micro(p, {}, jax.tree.map(lambda x: jnp.asarray(x[0]), batch), None, ())
    )
    grads = jax.jit(jax.grad(mean))(PARAMS)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    state, measured = STEPS['sft'](fresh(), {}, batch)
    np.testing.assert_allclose(measured.gauges['grad_norm'], norm, rtol=1e-5)
    g, w = np.asarray(grads['layers']['0']['gate'], np.float64), np.asarray(PARAMS['layers']['0']['gate'], np.float64)
    g = g * min(1, 1 / norm)
    found = np.asarray(state.params['layers']['0']['gate'])
    sure = np.abs(g) > 1e-6
    np.testing.assert_allclose(found[sure], (w - 1e-2 * (g / (np.abs(g) + 1e-8) + 0.1 * w))[sure], rtol=1e-4, atol=1e-6)

  def test_keeps_small_updates_in_float32(self):
    optimizer = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-7))
    model = transformer.build(CONFIG, MESH, length=16, dtype='bfloat16')
    objective = objectives.supervised(model=model, loss_fn=supervised.cross_entropy, needs=NEEDS)
    state, _ = jax.jit(step_lib.make_step(objective, optimizer))(fresh(optimizer=optimizer), {}, split(1))
    moved = np.abs(np.asarray(state.params['layers']['0']['q']) - np.asarray(PARAMS['layers']['0']['q']))
    # About 1e-7 each; in bfloat16 weights of this size no step below 1e-4 is seen.
    assert 0.5e-7 < np.median(moved[moved > 0]) < 2e-7

  def test_makes_no_update_by_a_rollout_that_the_policy_has_left(self):
    needs = tracing.trace(PPO, group_size=2, labels=(), token_labels=('advantages', 'old_logps'))
    objective = objectives.policy_gradient(model=MODEL, loss_fn=PPO, needs=needs)
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER, max_kl=0.01))
    batch = split(1)
    labels = {'advantages': batch.mask_BT, 'old_logps': forward.ref_logps(PARAMS, batch, model=MODEL)}
    at_home = dataclasses.replace(batch, labels_BT=labels)
    moved, measured = step(fresh(), {}, at_home)
    assert float(measured.gauges['stopped']) == 0
    assert not np.array_equal(moved.params['embed'], PARAMS['embed'])
    far = dataclasses.replace(batch, labels_BT=labels | {'old_logps': labels['old_logps'] - 0.2 * batch.mask_BT})
    state, measured = step(moved, {}, far)  # 0.02 nats away, and what the update before added
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (moved.params, moved.opt_state))
    assert float(measured.gauges['stopped']) == 1
    # The schedule's own count stands still too, and nothing is broken.
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (2, 1, 0)
    assert int(state.opt_state[1].count) == 1

  def test_measures_what_was_sampled_apart_from_texts(self):
    mixed = functools.partial(actor_critic.with_pretraining, loss=PPO, weight=2.0)
    needs = tracing.trace(mixed, group_size=2, labels=(), token_labels=('advantages', 'old_logps', 'is_text'))
    objective = objectives.policy_gradient(model=MODEL, loss_fn=mixed, needs=needs, aggregate='token')
    batch = split(1)
    logps = forward.ref_logps(PARAMS, batch, model=MODEL)
    is_text = (np.asarray(batch.responses_BT) == 1) * batch.mask_BT
    labels = {'advantages': batch.mask_BT, 'old_logps': logps - 0.2 * batch.mask_BT, 'is_text': is_text}
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER))
    _, measured = step(fresh(), {}, dataclasses.replace(batch, labels_BT=labels))
    assert 0 < is_text.sum() < batch.mask_BT.sum()
    np.testing.assert_allclose(measured.means['policy/approxkl_avg'].mean(), 0.02, rtol=1e-4)
    np.testing.assert_allclose(measured.means['texts/loss'].mean(), -(logps * is_text).sum() / is_text.sum(), rtol=1e-5)
    sampled = 1.2214028 * (batch.mask_BT - is_text)  # e^0.2, clipped at 1.2
    wanted = (-np.minimum(sampled, 1.2) - 2 * np.asarray(logps) * is_text).sum() / batch.mask_BT.sum()
    np.testing.assert_allclose(measured.means['loss'].mean(), wanted, rtol=1e-4)

  def test_skips_an_update_that_is_not_finite_and_counts_it(self):
    good = split(1)
    bad = dataclasses.replace(good, ref_logps_BT=np.full_like(good.ref_logps_BT, np.nan))
    before, _ = STEPS['dpo'](fresh(), {}, good)
    state, measured = STEPS['dpo'](before, {}, bad)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (2, 1, 1)
    assert (float(measured.gauges['skipped_steps']), float(measured.gauges['skipped_in_row'])) == (1, 1)
    state, _ = STEPS['dpo'](state, {}, bad)
    assert (int(state.skipped), int(state.skipped_in_row)) == (2, 2)
    state, measured = STEPS['dpo'](state, {}, good)
    assert (int(state.skipped), int(state.skipped_in_row)) == (2, 0)
    assert not np.array_equal(state.params['embed'], before.params['embed'])

  def test_does_not_let_a_skipped_step_use_up_the_schedule(self):
    optimizer = optim.adamw(4, schedule=functools.partial(optim.linear, lr=1.0, warmup=0.0))
    step = jax.jit(step_lib.make_step(DPO, optimizer))
    good = split(1)
    bad = dataclasses.replace(good, ref_logps_BT=np.full_like(good.ref_logps_BT, np.inf))
    state = fresh(optimizer=optimizer)
    rates = []
    for batch in (good, bad, good):
      state, measured = step(state, {}, batch)
      rates.append(float(measured.gauges['learning_rate']))
    assert rates == [1.0, rates[2], rates[2]]
    assert int(optimizer.tx.init(PARAMS)[1].count) == 0
    assert int(state.opt_state[1].count) == 2

  def test_is_compiled_once_for_all_ragged_batches(self):
    state, _ = STEPS['dpo'](fresh(), {}, split(2))
    state, _ = STEPS['dpo'](state, {}, split(2))
    compiled = STEPS['dpo']._cache_size()
    for seed in range(5):
      state, _ = STEPS['dpo'](state, {}, split(2, packed.pairs(seed, 4)))
    assert STEPS['dpo']._cache_size() == compiled

  def test_counts_the_tokens_that_were_read(self):
    _, measured = STEPS['sft'](fresh(), {}, split(2))
    assert int(measured.gauges['num_tokens']) == sum(2 * len(p) + len(c) + len(r) - 2 for p, c, r in PAIRS)

  def test_hands_the_state_of_the_loss_on_and_keeps_it_where_it_skips(self):
    def counting(policy, ref, labels, *, state):
      return types.LossOut(policy.logps_GK[:, 0] + ref.logps_GK[:, 0], {}, state + 1)

    objective = objectives.preference(model=MODEL, loss_fn=counting, needs=NEEDS)
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER))
    good = split(1)
    start = dataclasses.replace(fresh(), loss_state=jnp.zeros(()))
    state, _ = step(start, {}, good)
    assert float(state.loss_state) == 1
    state, _ = step(state, {}, dataclasses.replace(good, ref_logps_BT=np.full_like(good.ref_logps_BT, np.nan)))
    assert float(state.loss_state) == 1


class TestPacked:

  def test_gives_every_number_back_from_a_vector_a_dtype(self):
    numbers = {'a': 1.5, 'c': -2.0, 'd': 7.25, 'e': 0.0}
    means = {name: masked.Weighted(jnp.float32(x), jnp.float32(x + 1)) for name, x in numbers.items()}
    gauges = {'b': jnp.int32(2**24 + 1), 'num_tokens': jnp.int32(3), 'z': jnp.float32(0.5)}
    packed_up = jax.device_get(jax.jit(lambda *x: step_lib.Packed.of(step_lib.StepMetrics(*x)))(means, gauges))
    assert [(len(x), x.dtype) for x in jax.tree.leaves(packed_up)] == [(9, np.float32), (2, np.int32)]
    found = packed_up.unpacked()
    assert {n: (one.sum, one.weight) for n, one in found.means.items()} == {n: (x, x + 1) for n, x in numbers.items()}
    assert found.gauges == {'b': 2**24 + 1, 'num_tokens': 3, 'z': 0.5}

  def test_gives_metrics_back_that_are_vectors(self):
    bins = masked.Weighted(jnp.arange(3.0), jnp.arange(3.0) + 1)
    means = {'a': masked.Weighted(jnp.float32(9), jnp.float32(4)), 'bins': bins, 'c': masked.Weighted(*jnp.ones(2))}
    measured = jax.device_get(jax.jit(lambda x: step_lib.Packed.of(step_lib.StepMetrics(x, {})))(means))
    found = jax.tree.leaves(measured.unpacked().means)
    assert [x.tolist() for x in found] == [9, 4, [0, 1, 2], [1, 2, 3], 1, 1]


class TestEvalStep:

  @pytest.mark.parametrize('name', WHOLE)
  def test_of_a_loss_on_whole_steps_does_not_depend_on_micro_batches(self, name):
    evaluate = step_lib.make_eval_step(OBJECTIVES[name])
    wanted = evaluate(PARAMS, {}, split(1), TRACED[name].state)
    for key, pair in evaluate(PARAMS, {}, split(4), TRACED[name].state).items():
      np.testing.assert_allclose(pair.mean(), wanted[key].mean(), rtol=2e-5, atol=1e-6, err_msg=key)


class TestAbstractState:

  def test_lays_moments_where_their_parameters_are(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    params = transformer.abstract_params(MODEL, mesh)
    state = step_lib.abstract_state(mesh, params, OPTIMIZER.tx, 0)
    for moments in (state.opt_state[1].mu, state.opt_state[1].nu):
      jax.tree.map(lambda m, p: np.testing.assert_equal(m.sharding, p.sharding), moments, params)
    assert state.step.sharding.is_fully_replicated
    assert state.key.sharding.is_fully_replicated

  def test_has_the_shapes_of_a_state(self):
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(step_lib.abstract_state(MESH, PARAMS, OPTIMIZER.tx, 0)) == shapes(fresh())


class TestMakeEvalStep:

  def test_sums_the_metrics_of_all_micro_batches(self):
    evaluate = jax.jit(step_lib.make_eval_step(DPO))
    whole, parts = evaluate(PARAMS, {}, split(1), ()), evaluate(PARAMS, {}, split(4), ())
    for name, pair in whole.items():
      np.testing.assert_allclose(parts[name].sum, pair.sum, rtol=2e-5, atol=1e-5, err_msg=name)
      np.testing.assert_allclose(parts[name].weight, pair.weight)
