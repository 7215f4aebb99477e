"""Averages of policy-gradient losses over a step: mesh, micro-batches and packing change no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import masked
from jaxalign import objectives
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import policy
from jaxalign.models import architecture
from jaxalign.models import transformer
from tests import packed

_of = functools.partial
CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64)
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, ONE, length=32)
GROUPS, SIZE = 8, 2
PAIRS = packed.pairs(3, GROUPS)
CUT = (2, 1)  # of this response no token counts
GSPO = _of(policy.gspo, clip_eps=0.1, clip_eps_high=0.2)
AGGREGATES = {'token': None, 'sequence': None, 'constant': 7}
# By the number of micro-batches: packed, a sequence a row, and packed with half of the rows empty.
LAYOUTS = {
    'one': dict(micros=1, rows=8, together=3),
    'two': dict(micros=2, rows=10, together=1),
    'four': dict(micros=4, rows=8, together=2),
}
SINGLE = dict(micros=1, rows=16, together=1)


def number(g, k, name):
  """What a token of a response has, by its place in it: advantages, and log-probabilities."""
  n = len(PAIRS[g][1 + k])
  rng = np.random.default_rng([g, k, ['advantages', 'old_logps', 'logps'].index(name)])
  if name == 'advantages':
    return np.full(n, np.float32(rng.normal()))
  return -rng.uniform(0.1, 1.0, n).astype(np.float32)


def batch_of(micros, rows, together):
  """Eight groups of two as a step, shared unevenly by its micro-batches; log-probabilities are beside the labels."""
  made, bounds = [], {1: (0, 8), 2: (0, 3, 8), 4: (0, 1, 3, 6, 8)}[micros]
  for first, stop in zip(bounds, bounds[1:]):
    count = stop - first
    places = [(g, k) for k in range(SIZE) for g in range(count)]  # a group is never in one row
    sequence = lambda g, k, first=first: (g, k, PAIRS[first + g][0], PAIRS[first + g][1 + k])
    layout = [[sequence(*x) for x in places[i : i + together]] for i in range(0, len(places), together)]
    batch = packed.micro_batch(
        layout + [[]] * (rows - len(layout)), groups=GROUPS, size=SIZE, length=32, slots=together
    )
    labels = {name: np.zeros(batch.mask_BT.shape, np.float32) for name in ('advantages', 'old_logps', 'logps')}
    for b, s in np.argwhere(batch.group_BS >= 0):
      g, k = first + int(batch.group_BS[b, s]), int(batch.slot_BS[b, s])
      where = batch.responses_BT[b] == s
      if (g, k) == CUT:
        batch.mask_BT[b, where] = 0.0
        continue
      for name, x_BT in labels.items():
        x_BT[b, where] = number(g, k, name)
    made.append(dataclasses.replace(batch, labels_BT=labels))
  return packed.stack(*made)


def gold(aggregate):
  """The average of GSPO's loss in float64."""
  total, tokens, means = 0.0, 0, []
  for g in range(GROUPS):
    for k in range(SIZE):
      a, old, lp = (number(g, k, name).astype(np.float64) for name in ('advantages', 'old_logps', 'logps'))
      ratio, n = np.exp(np.mean(lp - old)), len(lp)
      loss = -min(ratio * a[0], np.clip(ratio, 0.9, 1.2) * a[0]) * ((g, k) != CUT)
      total, tokens = total + n * loss, tokens + n * ((g, k) != CUT)
      means.append(loss)
  return {'token': total / tokens, 'sequence': np.mean(means), 'constant': total / (GROUPS * SIZE * 7)}[aggregate]


def objective_of(aggregate, model=MODEL, loss=GSPO):
  needs = tracing.trace(loss, group_size=SIZE, labels=(), token_labels=('advantages', 'old_logps'))
  return objectives.policy_gradient(
      model=model, loss_fn=loss, needs=needs, aggregate=aggregate, max_tokens=AGGREGATES[aggregate]
  )


def sums_of(batch, drop=('logps',)):
  """By aggregate the mean over a step, from the sums of its micro-batches, and its gradient by log-probabilities."""
  labels_BT = {name: x for name, x in batch.labels_BT.items() if name not in drop}
  logps_ABT, micros = batch.labels_BT['logps'], dataclasses.replace(batch, labels_BT=labels_BT)

  def mean(logps_ABT, aggregate):
    def of(now):
      out, sums = objective_of(aggregate).loss({'logps': now[0]}, now[1], ())
      return masked.Weighted(out, sums.weight)

    added = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of, (logps_ABT, micros)))
    return added.mean()

  return {name: jax.value_and_grad(_of(mean, aggregate=name))(logps_ABT) for name in AGGREGATES}


@functools.cache
def found(mesh_text, **layout):
  batch = batch_of(**layout)
  mesh = sharding.make_mesh(mesh_text) if mesh_text else ONE
  with jax.set_mesh(mesh):
    placed = jax.device_put(batch, sharding.batch_shardings(mesh, batch, stacked=True))
    by_name = jax.device_get(jax.jit(sums_of)(placed))
  return {name: (mean, slope_ABT[batch.mask_BT > 0]) for name, (mean, slope_ABT) in by_name.items()}


class TestAggregates:

  @pytest.mark.parametrize('aggregate', AGGREGATES)
  @pytest.mark.parametrize('mesh,layout', [('', 'one'), ('', 'two'), ('fsdp:8', 'four')])
  def test_are_the_formula_whatever_the_mesh_the_micro_batches_and_the_packing(self, aggregate, mesh, layout):
    mean, slopes = found(mesh, **LAYOUTS[layout])[aggregate]
    np.testing.assert_allclose(mean, gold(aggregate), rtol=1e-5)
    alone = found('', **SINGLE)[aggregate][1]
    np.testing.assert_allclose(np.sort(slopes), np.sort(alone), rtol=1e-4, atol=1e-8)

  def test_weigh_tokens_by_the_length_of_their_response_or_not(self):
    """With REINFORCE and advantages of 1: 1 / N, 1 / (R n) and 1 / (R L)."""
    batch = jax.tree.map(lambda x: x[0], batch_of(**SINGLE))
    labels = {'advantages': np.ones_like(batch.mask_BT)}
    batch = dataclasses.replace(batch, labels_BT=labels)
    length_BT = np.asarray(masked.to_tokens(masked.totals(jnp.ones_like(batch.mask_BT), batch), batch))
    wanted = {
        'token': 1 / batch.mask_BT.sum(),
        'sequence': 1 / (GROUPS * SIZE * np.maximum(length_BT, 1)),
        'constant': 1 / (GROUPS * SIZE * 7),
    }
    for aggregate, x in wanted.items():
      made = objective_of(aggregate, loss=policy.reinforce)

      def mean(logps_BT, made=made):
        out, sums = made.loss({'logps': logps_BT}, batch, ())
        return out / sums.weight

      slope_BT = jax.grad(mean)(jnp.full(batch.mask_BT.shape, -1.0))
      np.testing.assert_allclose(slope_BT, -x * batch.mask_BT, rtol=1e-5)

  def test_of_a_batch_without_old_log_probabilities_take_the_policy_s_own(self):
    batch = batch_of(**SINGLE)
    by_name = jax.jit(_of(sums_of, drop=('logps', 'old_logps')))(batch)
    mean, slope_ABT = by_name['sequence']
    a = [number(g, k, 'advantages')[0] * ((g, k) != CUT) for g in range(GROUPS) for k in range(SIZE)]
    np.testing.assert_allclose(mean, -np.mean(a), rtol=1e-5)
    counts = batch.mask_BT > 0
    assert np.all(slope_ABT[counts] != 0) and not np.any(slope_ABT[~counts])

  @pytest.mark.parametrize(
      'aggregate,max_tokens,said',
      [
          ('mean', None, "aggregate = 'mean': one of token, sequence, constant"),
          ('constant', None, "max_tokens = None with aggregate = 'constant': bind"),
          ('constant', 0, "max_tokens = 0 with aggregate = 'constant': bind"),
          ('token', 9, "max_tokens = 9 with aggregate = 'token': it is for constant alone"),
      ],
  )
  def test_that_are_wrong_are_named(self, aggregate, max_tokens, said):
    with pytest.raises(types.UsageError, match=said):
      objectives.policy_gradient(
          model=MODEL, loss_fn=GSPO, needs=tracing.Needs(), aggregate=aggregate, max_tokens=max_tokens
      )


def after_one_step(mesh_text, **layout):
  """The gradient's moments, the metrics and the norm after a step of a real model, of GRPO averaged by `sequence`."""
  mesh = sharding.make_mesh(mesh_text) if mesh_text else ONE
  model, optimizer = transformer.build(CONFIG, mesh, length=32), optim.adamw(10, schedule=_of(optim.constant, lr=0.0))
  batch = batch_of(**layout)
  ref_ABT = np.where(batch.mask_BT > 0, -2 - np.sin(batch.targets_BT + 3.0 * batch.positions_BT), 0)
  labels_BT = {'advantages': batch.labels_BT['advantages'], 'old_logps': 4 * batch.labels_BT['old_logps']}
  batch = dataclasses.replace(batch, labels_BT=labels_BT, ref_logps_BT=ref_ABT.astype(np.float32))
  objective = objective_of('sequence', model, _of(policy.grpo, clip_eps=0.2, beta=0.3))
  shapes = transformer.abstract_params(model, mesh)
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), started(), shapes)
  places = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(mesh, shapes, optimizer.tx, 0, ()))
  state = jax.jit(lambda params: step_lib.init_state(params, optimizer.tx, 0, ()), out_shardings=places)(params)
  quick = {'xla_backend_optimization_level': 0}
  step = step_lib.make_step(objective, optimizer)
  step = jax.jit(step, out_shardings=(places, sharding.named(mesh)), compiler_options=quick)
  with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):  # the model and Adam promote
    state, measured = step(state, {}, jax.device_put(batch, sharding.batch_shardings(mesh, batch, stacked=True)))
  means = {name: pair.mean() for name, pair in measured.means.items()}
  return jax.device_get((state.opt_state[1].mu, means, measured.gauges['grad_norm']))


@functools.cache
def started():
  return jax.device_get(transformer.init_params(transformer.build(CONFIG, ONE, length=32), jax.random.key(0), ONE))


class TestStep:

  def test_of_eight_devices_and_four_micro_batches_is_that_of_one(self):
    (moments_1, means_1, norm_1), (moments, means, norm) = after_one_step('', **SINGLE), after_one_step(
        'fsdp:8', **LAYOUTS['four']
    )
    assert {'loss', 'kl', 'entropy', 'val/ratio', 'clip_ratio/region_mean'} <= means.keys() == means_1.keys()
    for name, x in means_1.items():
      np.testing.assert_allclose(means[name], x, rtol=3e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(norm, norm_1, rtol=2e-5)
    jax.tree.map(_of(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), moments, moments_1)
    assert norm_1 > 0 and 0 < means_1['clip_ratio/region_mean'] < 1
