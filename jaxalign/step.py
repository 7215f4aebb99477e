"""The one training step: gradient, accumulation, guard, update, metrics."""

from collections.abc import Callable
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import optax

from jaxalign import masked
from jaxalign import objectives
from jaxalign import optim
from jaxalign import sharding
from jaxalign import types


@struct.dataclass
class TrainState:
  """What a step changes, and all that a resumed run needs beside its place in the data.

  Attributes:
    step: int32, optimizer steps taken, skipped ones included.
    params: what is trained, float32.
    opt_state: of the optax chain.
    loss_state: of the loss, `()` for most.
    key: raw uint32 key data; a step folds its number in.
    skipped: int32, updates skipped because the loss or the gradient was not finite.
    skipped_in_row: int32, of those, how many since the last good update.
  """

  step: types.Array
  params: types.PyTree
  opt_state: types.PyTree
  loss_state: types.PyTree
  key: types.Array
  skipped: types.Array
  skipped_in_row: types.Array


class StepMetrics(NamedTuple):
  """Metrics of one step: means yet to be taken, to be added over steps, and gauges, of which the newest counts."""

  means: dict[str, masked.Weighted]
  gauges: dict[str, types.Array]


def init_state(params: types.PyTree, tx: optax.GradientTransformation, seed: int) -> TrainState:
  """The state before the first step; call it under jit with the shardings of `state_shardings`."""
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, tx.init(params), (), jax.random.key_data(jax.random.key(seed)), zero, zero)


def abstract_state(
    mesh: jax.sharding.Mesh, params: types.PyTree, tx: optax.GradientTransformation, seed: int
) -> TrainState:
  """Shapes and shardings of a state: optimizer moments lie like their parameters, everything else is replicated.

  Args:
    mesh: of the run.
    params: arrays or shapes, with shardings.
    tx: of the run.
    seed: of the run.
  """
  shapes = jax.eval_shape(lambda p: init_state(p, tx, seed), params)
  placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  replicated = lambda x: placed(x, sharding.named(mesh))
  moments = optax.tree_map_params(
      tx, lambda x, like: placed(x, like.sharding), shapes.opt_state, params, transform_non_params=replicated
  )
  trained = jax.tree.map(lambda x: placed(x, x.sharding), params)
  return jax.tree.map(replicated, shapes).replace(params=trained, opt_state=moments)


def make_step(
    objective: objectives.Objective, optimizer: optim.Optimizer
) -> Callable[[TrainState, types.PyTree, types.Batch], tuple[TrainState, StepMetrics]]:
  """Builds `step(state, frozen, batch) -> state, metrics` for any objective.

  The batch is a stack of A micro-batches. Their loss sums, weights and gradients are added, and one division by the
  total weight follows, so the result does not depend on A or on the number of devices. Where the loss or the gradient's
  norm is not finite, parameters, optimizer and loss state stay as they were and the step is counted as skipped.
  """

  def gradients(state, frozen, batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def one(loss_state, index_and_micro):
      index, micro = index_and_micro
      (_, sums), grads = grad_fn(state.params, frozen, micro, jax.random.fold_in(key, index), loss_state)
      return sums.loss_state, (grads, sums.weight, sums.metrics)

    count = batch.inputs_BT.shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    loss_state, total = one(state.loss_state, (0, first))
    if count > 1:

      def add(carry, index_and_micro):
        loss_state, total = carry
        loss_state, new = one(loss_state, index_and_micro)
        return (loss_state, jax.tree.map(jnp.add, total, new)), None

      rest = jnp.arange(1, count), jax.tree.map(lambda x: x[1:], batch)
      (loss_state, total), _ = jax.lax.scan(add, (loss_state, total), rest)
    return loss_state, *total

  def step(state, frozen, batch):
    good_steps = state.step - state.skipped
    loss_state, grads, weight, metrics = gradients(state, frozen, batch)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics['loss'].sum)
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state, loss_state
    old = state.params, state.opt_state, state.loss_state
    params, opt_state, loss_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    in_row = (state.skipped_in_row + 1) * skipped
    new_state = TrainState(state.step + 1, params, opt_state, loss_state, state.key, state.skipped + skipped, in_row)
    gauges = {
        'grad_norm': norm,
        'learning_rate': jnp.asarray(optimizer.schedule(good_steps), jnp.float32),
        'num_tokens': jnp.sum(batch.segments_BT > 0),
        'skipped_steps': new_state.skipped,
        'skipped_in_row': in_row,
    }
    return new_state, StepMetrics(dict(metrics), gauges)

  return step


def make_eval_step(
    objective: objectives.Objective,
) -> Callable[[types.PyTree, types.PyTree, types.Batch, types.PyTree], dict[str, masked.Weighted]]:
  """Builds `evaluate(params, frozen, batch, loss_state) -> metrics`, sums over the micro-batches of `batch`."""

  def evaluate(params, frozen, batch, loss_state):
    key = jax.random.key(0)
    micro = lambda one: dict(objective(params, frozen, one, key, loss_state)[1].metrics)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(micro, batch))

  return evaluate
