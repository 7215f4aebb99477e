"""The one training step: gradient, accumulation, guard, update, metrics."""

from collections.abc import Callable
import functools
import operator
from typing import Any
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import optax

from jaxalign import forward
from jaxalign import masked
from jaxalign import moments
from jaxalign import objectives
from jaxalign import optim
from jaxalign import reference as reference_lib
from jaxalign import sharding
from jaxalign import types

DRIFT = 'policy/approxkl_avg'  # the metric by which `max_kl` knows how far the policy has moved


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
    reference: what a reference that follows the policy has in place of `params`; `()` for one that does not.
  """

  step: types.Array
  params: types.PyTree
  opt_state: types.PyTree
  loss_state: types.PyTree
  key: types.Array
  skipped: types.Array
  skipped_in_row: types.Array
  reference: types.PyTree = ()


class StepMetrics(NamedTuple):
  """Metrics of one step: means yet to be taken, to be added over steps, and gauges, of which the newest counts."""

  means: dict[str, masked.Sum]
  gauges: dict[str, types.Array]


@struct.dataclass
class Packed:
  """`StepMetrics` as one vector for each dtype, since fetching a vector takes no longer than fetching a number.

  Attributes:
    vectors: by dtype.
    shapes: and dtypes of each metric, few of which are not numbers but vectors.
    form: the tree of the metrics.
  """

  vectors: dict[str, types.Array]
  shapes: tuple[jax.ShapeDtypeStruct, ...] = struct.field(pytree_node=False)
  form: Any = struct.field(pytree_node=False)

  @classmethod
  def of(cls, measured: StepMetrics) -> 'Packed':
    """Packs metrics, under jit."""
    leaves, form = jax.tree.flatten(measured)
    alike = lambda dtype: jnp.concatenate([x.ravel() for x in leaves if str(x.dtype) == dtype])
    vectors = {dtype: alike(dtype) for dtype in sorted({str(x.dtype) for x in leaves})}
    return cls(vectors, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves), form)

  def unpacked(self) -> StepMetrics:
    """What was packed, once the vectors have been fetched."""
    left, leaves = dict(self.vectors), []
    for like in self.shapes:
      vector = left[str(like.dtype)]
      leaves.append(vector[: like.size].reshape(like.shape))
      left[str(like.dtype)] = vector[like.size :]
    return jax.tree.unflatten(self.form, leaves)


def init_state(
    params: types.PyTree,
    tx: optax.GradientTransformation,
    seed: int,
    loss_state: types.PyTree = (),
    follows: bool = False,
) -> TrainState:
  """The state before the first step; call it under jit with the shardings of `abstract_state`.

  Args:
    params: what is trained.
    tx: of the run.
    seed: of the run.
    loss_state: of the loss.
    follows: whether the state has a reference that follows the policy.
  """
  zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed))
  reference = jax.tree.map(jnp.copy, forward.divided(params)[0]) if follows else ()
  return TrainState(zero, params, tx.init(params), loss_state, key, zero, zero, reference)


def abstract_state(
    mesh: jax.sharding.Mesh,
    params: types.PyTree,
    tx: optax.GradientTransformation,
    seed: int,
    loss_state: types.PyTree = (),
    follows: bool = False,
    memory: str = 'device',
) -> TrainState:
  """Shapes and shardings of a state: optimizer moments lie like their parameters, everything else is replicated.

  Args:
    mesh: of the run.
    params: arrays or shapes, with shardings.
    tx: of the run.
    seed: of the run.
    loss_state: of the loss, arrays.
    follows: see `init_state`.
    memory: where moments are kept, see `optim.Optimizer`.

  Raises:
    UsageError: devices have no such memory.
  """
  sharding.check_memory(mesh, memory, 'optim.adamw.memory')
  shapes = jax.eval_shape(lambda p: init_state(p, tx, seed, loss_state, follows), params)
  placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  replicated = lambda x: placed(x, sharding.named(mesh))

  def beside(x, like):
    where = like.sharding if x.shape == like.shape else sharding.resized(like, x.shape)
    return placed(x, where if memory == 'device' else where.with_memory_kind(memory))

  opt_state = optax.tree_map_params(
      tx,
      lambda moment, like: jax.tree.map(lambda x: beside(x, like), moment),
      shapes.opt_state,
      params,
      transform_non_params=replicated,
      is_leaf=moments.is_blocks,
  )
  trained = jax.tree.map(lambda x: placed(x, x.sharding), params)
  return jax.tree.map(replicated, shapes).replace(
      params=trained, opt_state=opt_state, reference=forward.divided(trained)[0] if follows else ()
  )


def make_step(
    objective: objectives.Objective,
    optimizer: optim.Optimizer,
    sync: reference_lib.Sync | None = None,
    max_kl: float | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
  """Builds `step(state, frozen, batch, ref=None) -> state, metrics` for any objective.

  `ref` is of a live reference that stays as it is, see `objectives.Objective`; with `sync` it follows the policy and is
  in the state.

  The batch is a stack of A micro-batches. Their loss sums, weights and gradients are added, and one division by the
  total weight follows, so the result does not depend on A or on the number of devices. Where the loss or the gradient's
  norm is not finite, parameters, optimizer and loss state stay as they were and the step is counted as skipped. So they
  do where the policy is more than `max_kl` nats a token from the one that was sampled from, by the metric
  `DRIFT` of this batch: the next one by that rollout finds the policy where it was, and most likely changes nothing.
  """
  gradients = _of_whole_step(objective) if objective.whole_step else _of_micro_batches(objective)

  def step(state, frozen, batch, ref=None):
    good_steps = state.step - state.skipped
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch.inputs_BT.shape[0]))
    ref = ref if sync is None else sync.moved(state.reference, forward.divided(state.params)[0], state.step)
    grads, (weight, metrics, loss_state) = gradients(state, frozen, batch, keys, ref)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics['loss'].sum)
    near = jnp.ones((), bool) if max_kl is None else metrics[DRIFT].mean() <= max_kl
    tx = optax.with_extra_args_support(optimizer.tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, good=finite & near)
    new = optax.apply_updates(state.params, updates), opt_state, loss_state
    old = state.params, state.opt_state, state.loss_state
    params, opt_state, loss_state = jax.tree.map(functools.partial(_chosen, finite & near), new, old)
    skipped = jnp.where(finite & near, 0, 1).astype(jnp.int32)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    followed = () if sync is None else ref
    counts = state.skipped + skipped, in_row
    new_state = TrainState(state.step + 1, params, opt_state, loss_state, state.key, *counts, followed)
    gauges = {
        'grad_norm': norm,
        'learning_rate': jnp.asarray(optimizer.schedule(good_steps), jnp.float32),
        'num_tokens': jnp.sum(batch.segments_BT > 0),
        'skipped_steps': new_state.skipped,
        'skipped_in_row': in_row,
    }
    if max_kl is not None:
      gauges['stopped'] = 1.0 - near
    return new_state, StepMetrics(dict(metrics), gauges)

  return step


def jitted(step: Callable, mesh: jax.sharding.Mesh, state: TrainState, *, donate: bool = True) -> Any:
  """Compiles a step of `make_step` for a mesh, on first use; its metrics come packed.

  Args:
    step: the step.
    mesh: where it runs.
    state: arrays or shapes, with shardings, which the new state has too.
    donate: whether the new state takes the place of the old one.
  """

  @functools.wraps(step)
  def packed(*args):
    new_state, measured = step(*args)
    return new_state, Packed.of(measured)

  where = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(packed, donate_argnums=(0,) if donate else (), out_shardings=(where, sharding.named(mesh)))


def _chosen(good, new, old):
  # Moments that are on the host again were chosen where they were made.
  return new if jax.typeof(new).memory_space == jax.memory.Space.Host else jnp.where(good, new, old)


def _of_micro_batches(objective: objectives.Objective) -> Callable:
  """Gradient and `Sums` of a step, added over its micro-batches, each seen by the loss alone."""
  grad_fn = jax.value_and_grad(objective.of_micro, has_aux=True)

  def gradients(state, frozen, batch, keys, ref):
    def one(loss_state, key_and_micro):
      key, micro = key_and_micro
      (_, sums), grads = grad_fn(state.params, frozen, micro, key, loss_state, ref)
      return sums.loss_state, (grads, sums.weight, sums.metrics)

    pick = lambda which: jax.tree.map(operator.itemgetter(which), (keys, batch))
    loss_state, total = one(state.loss_state, pick(0))
    if len(keys) > 1:

      def add(carry, key_and_micro):
        loss_state, total = carry
        loss_state, new = one(loss_state, key_and_micro)
        return (loss_state, jax.tree.map(jnp.add, total, new)), None

      (loss_state, total), _ = jax.lax.scan(add, (loss_state, total), pick(slice(1, None)))
    grads, weight, metrics = total
    return grads, objectives.Sums(weight, metrics, loss_state)

  return gradients


def _of_whole_step(objective: objectives.Objective) -> Callable:
  """The same for a loss that sees all micro-batches at once, in two passes.

  The first computes what the loss reads of every token, and the loss's derivative with respect to that. The second
  takes these derivatives back through the model, a micro-batch at a time. It is exact, for one more forward pass; a
  step of one micro-batch needs a single pass.
  """

  def gradients(state, frozen, batch, keys, ref):
    def single(params):
      micro = jax.tree.map(operator.itemgetter(0), batch)
      return objective.of_micro(params, frozen, micro, keys[0], state.loss_state, ref)

    if len(keys) == 1:
      grads, sums = jax.grad(single, has_aux=True)(state.params)
      return grads, sums
    stats_of = lambda key, micro: lambda params: objective.stats(params, frozen, micro, key, ref)
    stats = jax.lax.map(lambda one: stats_of(*one)(state.params), (keys, batch))
    on_whole = lambda stats: objective.loss(_flat(stats), masked.merged(batch), state.loss_state)
    slopes, sums = jax.grad(on_whole, has_aux=True)(stats)

    def add(total, one):
      key, micro, slope = one
      (new,) = jax.vjp(stats_of(key, micro), state.params)[1](slope)
      return jax.tree.map(jnp.add, total, new), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    return jax.lax.scan(add, zeros, (keys, batch, slopes))[0], sums

  return gradients


def _flat(stats):
  """Statistics of micro-batches one behind the other, as `masked.merged` puts their rows."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats)


def make_eval_step(objective: objectives.Objective) -> Callable[..., dict[str, masked.Sum]]:
  """Builds `evaluate(params, frozen, batch, loss_state, ref=None) -> metrics`, sums over the batch's micro-batches."""

  def evaluate(params, frozen, batch, loss_state, ref=None):
    key = jax.random.key(0)
    if objective.whole_step:
      stats = jax.lax.map(lambda micro: objective.stats(params, frozen, micro, key, ref), batch)
      return dict(objective.loss(_flat(stats), masked.merged(batch), loss_state)[1].metrics)
    of_one = lambda micro: dict(objective.of_micro(params, frozen, micro, key, loss_state, ref)[1].metrics)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_one, batch))

  return evaluate
