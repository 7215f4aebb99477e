"""Losses that look at all pairs of a step: any mesh, micro-batches and packing give the numbers of one device.

All of them are one loss here, so that a layout is compiled once: their values and metrics are told apart by name, and
the gradient is that of their sum.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxalign import objectives
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import batchwise
from jaxalign.losses import reward
from jaxalign.losses import unpaired
from jaxalign.models import architecture
from jaxalign.models import transformer
from tests import packed

_of = functools.partial
COUPLED = {
    'aot': _of(batchwise.aot, beta=0.5),
    'aot_unpaired': _of(batchwise.aot_unpaired, beta=0.5),
    'beta_dpo': _of(batchwise.beta_dpo, beta=0.5, alpha=0.6, keep=0.6),
    'dr_dpo': _of(batchwise.dr_dpo, beta=0.5, beta_prime=0.7),
    'group_robust': _of(batchwise.group_robust, beta=0.5, groups=3, rate=0.7),
    'kto': _of(unpaired.kto, beta=0.5, desirable_weight=1.5),
    'bco': _of(unpaired.bco, beta=0.5),
    'bco_udm': _of(unpaired.bco_udm, beta=0.5),
}
LABELS = 'desirable', 'group', 'density_ratio'
CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64, score_outputs=1)
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
# At rest, so that a second step begins with another state of the loss and the same parameters.
OPTIMIZER = optim.adamw(10, schedule=_of(optim.constant, lr=0.0))
PAIRS = [packed.pairs(seed, 8) for seed in (1, 2)]


def together(policy, ref, labels, *, state=()):
  """The sum of all losses, with the value, metrics and state of each by its name."""
  outs = {name: loss(policy, ref, labels, state=state[name] if state else ()) for name, loss in COUPLED.items()}
  metrics = {f'{name}/{key}': x for name, out in outs.items() for key, x in {**out.metrics, '': out.per_item}.items()}
  states = {name: out.state for name, out in outs.items()}
  return types.LossOut(sum(out.per_item for out in outs.values()), metrics, states)


def objective_of(kind, mesh):
  """The objective of all losses on log-probabilities, or of the one on scores."""
  model = transformer.build(CONFIG, mesh, length=32)
  if kind == 'scores':
    loss, objective = _of(reward.length_debiased, penalty=3.0), objectives.reward
  else:
    loss, objective = together, _of(objectives.preference, dense=())
  needs = tracing.trace(loss, group_size=2, labels=LABELS)
  return objective(model=model, loss_fn=loss, needs=needs), needs.state, model


def batch_of(pairs, kind, micros, rows, together):
  """Eight pairs as a step: so many micro-batches of so many rows, and sequences to a row."""
  count = len(pairs) // micros
  made = []
  for first in range(0, len(pairs), count):
    places = [(g, k) for k in range(2) for g in range(count)]  # a pair is never in one row
    sequence = lambda g, k, first=first: (g, k, pairs[first + g][0], pairs[first + g][1 + k])
    layout = [[sequence(*x) for x in places[i : i + together]] for i in range(0, len(places), together)]
    batch = packed.micro_batch(layout + [[]] * (rows - len(layout)), groups=8, size=2, length=32, slots=together)
    number = batch.group_BS + first
    ref = np.where(batch.mask_BT > 0, -2 - np.sin(batch.targets_BT + 3.0 * batch.positions_BT), 0)
    # A response is scored at its last token.
    mask = np.roll(batch.mask_BT, -1, axis=1) < batch.mask_BT if kind == 'scores' else batch.mask_BT
    used = batch.group_BS >= 0
    labels = {'desirable': number % 3 != 0, 'group': number % 3, 'density_ratio': 1 + number % 2}
    made.append(
        dataclasses.replace(
            batch,
            mask_BT=mask.astype(np.float32),
            ref_logps_BT=ref.astype(np.float32),
            labels_BS={name: np.where(used, x, 0).astype(np.float32) for name, x in labels.items()},
        )
    )
  return packed.stack(*made)


@functools.cache
def started():
  """The parameters to begin with, on the host."""
  params = transformer.init_params(transformer.build(CONFIG, ONE, length=32), jax.random.key(0), ONE)
  return jax.device_get(params | {'score': jax.random.normal(jax.random.key(1), (16, 1))})


@functools.cache
def after_two_steps(kind, mesh_text, **layout):
  """State and metrics of each step."""
  mesh = sharding.make_mesh(mesh_text) if mesh_text else ONE
  objective, loss_state, model = objective_of(kind, mesh)
  shapes = transformer.abstract_params(model, mesh)
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), started(), shapes)
  init = lambda params: step_lib.init_state(params, OPTIMIZER.tx, 0, loss_state)
  places = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(mesh, shapes, OPTIMIZER.tx, 0, loss_state))
  state = jax.jit(init, out_shardings=places)(params)
  quick = {'xla_backend_optimization_level': 0}
  step = step_lib.make_step(objective, OPTIMIZER)
  step = jax.jit(step, out_shardings=(places, sharding.named(mesh)), compiler_options=quick)
  found = []
  for pairs in PAIRS:
    batch = batch_of(pairs, kind, **layout)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):  # the model and Adam promote
      state, measured = step(state, {}, jax.device_put(batch, sharding.batch_shardings(mesh, batch, stacked=True)))
    means = {name: pair.mean() for name, pair in measured.means.items()}
    found.append(jax.device_get((state.loss_state, state.opt_state[1].mu, means, measured.gauges['grad_norm'])))
  return found


# By the number of micro-batches: packed, a sequence a row, and packed with half of the rows empty.
LAYOUTS = {
    'one': dict(micros=1, rows=8, together=3),
    'two': dict(micros=2, rows=8, together=1),
    'four': dict(micros=4, rows=8, together=2),
}
SINGLE = dict(micros=1, rows=16, together=1)


class TestWholeStep:

  @pytest.mark.parametrize('kind,layout', [*(('responses', layout) for layout in LAYOUTS), ('scores', 'four')])
  def test_of_eight_devices_is_that_of_one(self, kind, layout):
    wanted = after_two_steps(kind, '', **SINGLE)
    found = after_two_steps(kind, 'fsdp:8', **LAYOUTS[layout])
    for (state, moments, means, norm), (state_1, moments_1, means_1, norm_1) in zip(found, wanted):
      assert means.keys() == means_1.keys()
      for name, x in means_1.items():
        np.testing.assert_allclose(means[name], x, rtol=3e-5, atol=2e-6, err_msg=name)
      np.testing.assert_allclose(norm, norm_1, rtol=2e-5)
      jax.tree.map(_of(np.testing.assert_allclose, rtol=1e-3, atol=1e-7), moments, moments_1)
      jax.tree.map(_of(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), state, state_1)

  @pytest.mark.parametrize('kind,states', [('responses', 7), ('scores', 0)])
  def test_hands_a_state_on_and_has_metrics_that_are_no_zeros(self, kind, states):
    (first, _, means, _), (second, _, _, _) = after_two_steps(kind, '', **SINGLE)
    moved = jax.tree.map(lambda a, b: np.any(a != b), first, second)
    assert all(jax.tree.leaves(moved))
    assert len(jax.tree.leaves(moved)) == states  # of BCO, the same by prompts and beta-DPO two each, and of the groups
    assert all(x != 0 for name, x in means.items() if 'kl' not in name), means


class TestNeeds:

  @pytest.mark.parametrize('name', COUPLED)
  def test_tell_that_each_sees_the_whole_step(self, name):
    needs = tracing.trace(COUPLED[name], group_size=2, labels=LABELS)
    assert needs.whole_step
