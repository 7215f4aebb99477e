"""Adam's moments in fewer bits: bfloat16, or 8 bits in blocks.

A moment moves by a share 1 - b of what is new. Where that is less than half the distance between the numbers that can
be kept, rounding to the nearest never moves it: of bfloat16 numbers, 2^-8 apart or more, a second moment with b2 of
0.999 falls no more at all, and rises only by squares several times as large. So moments are rounded up or down by
chance, up with the probability that makes the mean right. The chances follow from the count of updates alone: a resumed
run, or one on another mesh, draws the same.

8 bits are codes of small floats with 3 bits behind the point, over 15 (first moment, and a sign) or 31 (second) powers
of 2, relative to the largest of a block, which has float32:

  z = 1 + (2^e 15/8 - 1) |x| / max of the block     between 1 and 2^e 15/8,  e = 15 or 31
  code = the exponent of z and its first 3 bits, 0 to 127 or 255

so that a moment errs by at most (|x| + max / (2^e 15/8 - 1)) / 8: an eighth of itself, and at the low end millionths of
the largest. They are made by shifts, where the tables of the paper would be looked up, which TPUs are slow at. A block
is a whole row along one axis of the parameter: whatever the mesh, codes lie like their parameter, and of a row in parts
only its largest is sent, and kept by each device that has a part.

References:
  Dettmers et al., 2022, https://arxiv.org/abs/2110.02861, Sec. 2: block-wise, non-linear quantisation.
  Zamirai et al., 2020, https://arxiv.org/abs/2010.06192: stochastic rounding in place of wider copies.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign import types

KINDS = ('float32', 'bfloat16', 'int8')
SMALL = 4096  # parameters of fewer numbers keep float32 moments
_ROW = 128  # least length of a block, where an axis has it
_SIGNIFICANT = 23 - 3  # bits of a float32 that a code lacks
_ONE = 127 << 3  # exponent and first bits of 1.0
_LEVELS = {'int8': 127, 'uint8': 255}  # largest code of a first and of a second moment


class Blocks(NamedTuple):
  """A moment in 8 bits: int8 codes with a sign or uint8 codes without, and the largest of each block, float32."""

  codes: types.Array
  largest: types.Array


def is_blocks(x: Any) -> bool:
  """Whether this is a moment in 8 bits."""
  return isinstance(x, Blocks)


def scale_by_adam(
    b1: float,
    b2: float,
    eps: float,
    *,
    kind: str,
    is_wide: Callable[[types.PyTree], types.PyTree],
    is_stacked: Callable[[types.PyTree], types.PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, with moments that are kept in fewer bits between updates, or in the memory of the host.

  An update is of float32 moments, before they are rounded.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    kind: one of KINDS.
    is_wide: of parameters, as a tree: which of them keep float32 moments, besides small ones.
    is_stacked: for moments in the memory of the host: of gradients, as a tree, which are of a stack of layers. Those of
      one layer, or of another parameter, are on the device at a time: the next wait for it, as the compiler would else
      have all of them there at once. Where the argument `good` of an update is false, they stay as they were.
  """
  if kind == 'float32' and is_stacked is None:
    return optax.with_extra_args_support(optax.scale_by_adam(b1, b2, eps))

  def init(params):
    fresh = lambda signed: lambda x, wide: _zeros(x.shape, 'float32' if wide or x.size < SMALL else kind, signed)
    zeros = lambda signed: jax.tree.map(fresh(signed), params, is_wide(params))
    return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(True), zeros(False))

  def update(grads, state, params=None, *, good=True, **_):
    del params
    count = optax.safe_increment(state.count)
    key = jax.random.fold_in(jax.random.key(0), count)

    def of_one(g, kept, key):
      g, (old_mu, old_nu) = g.astype(jnp.float32), kept
      mu = b1 * wide(old_mu) + (1 - b1) * g
      nu = b2 * wide(old_nu) + (1 - b2) * g * g
      step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
      # 16 bits of chance for each moment.
      bits = jax.random.bits(key, g.shape, jnp.uint32)
      return step, (rounded(mu, old_mu, bits >> 16), rounded(nu, old_nu, bits & 0xFFFF))

    tree: Any
    flat, tree = jax.tree.flatten(grads)
    keys = [jax.random.fold_in(key, i) for i in range(len(flat))]
    todo = list(zip(flat, zip(tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)), keys))
    if is_stacked is None:
      found = [of_one(*one) for one in todo]
    else:
      found = _one_by_one(of_one, todo, jax.tree.leaves(is_stacked(grads)), good)
    steps, new = zip(*found)
    mu, nu = zip(*new)
    return tree.unflatten(steps), optax.ScaleByAdamState(count, tree.unflatten(mu), tree.unflatten(nu))

  return optax.GradientTransformationExtraArgs(init, update)


def _one_by_one(of_one: Callable, todo: list[Any], stacked: list[bool], good: types.Array) -> list[Any]:
  """Updates of one parameter after the other, or one of a stack, whose moments come to the device for that time."""

  def moved(g, old, key):
    old = jax.device_put(old, jax.memory.Space.Device)
    step, new = of_one(g, old, key)
    new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    return step, jax.device_put(new, jax.memory.Space.Host)

  def of_stack(g, old, key):
    def body(layer, carry):
      g, old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), carry)
      found = moved(g, old, jax.random.fold_in(key, layer))
      return jax.tree.map(lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, layer, 0), carry, found)

    return jax.lax.fori_loop(0, len(g), body, (g, old))

  found: list[Any] = []
  for (g, old, key), is_stack in zip(todo, stacked):
    if found:
      g, old, found[-1] = jax.lax.optimization_barrier((g, old, found[-1]))
    found.append((of_stack if is_stack else moved)(g.astype(jnp.float32), old, key))
  return found


def _zeros(shape: tuple[int, ...], kind: str, signed: bool) -> Any:
  if kind != 'int8':
    return jnp.zeros(shape, kind)
  axis = _axis(shape)
  blocks = tuple(1 if i == axis else size for i, size in enumerate(shape))
  return Blocks(jnp.zeros(shape, 'int8' if signed else 'uint8'), jnp.zeros(blocks, jnp.float32))


def _axis(shape: tuple[int, ...]) -> int:
  """Along which blocks lie: the shortest that has 128 numbers, or else the longest."""
  sizes = sorted((size, -i) for i, size in enumerate(shape))
  return -next((one for one in sizes if one[0] >= _ROW), sizes[-1])[1]


def wide(kept: Any) -> types.Array:
  """A moment in float32."""
  if not is_blocks(kept):
    return kept.astype(jnp.float32)
  codes = kept.codes.astype(jnp.int32)
  z = jax.lax.bitcast_convert_type((jnp.abs(codes) + _ONE) << _SIGNIFICANT, jnp.float32)
  size = (z - 1) / (_top(kept.codes.dtype) - 1) * kept.largest
  return jnp.where(codes < 0, -size, size)


def rounded(x: types.Array, like: Any, chance: types.Array) -> Any:
  """A float32 moment in the precision of `like`, up or down by chance: its mean is `x`.

  But for second moments below the first level of their block: they are never 0, by whose root a step is divided.

  Args:
    x: finite; of uint8 codes not negative.
    like: a moment.
    chance: uint32, 16 random bits.
  """
  if is_blocks(like):
    return _coded(x, like.codes.dtype, chance)
  if like.dtype == jnp.float32:
    return x
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
  return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _top(dtype: Any) -> float:
  """The largest z."""
  power, eighths = divmod(_LEVELS[jnp.dtype(dtype).name], 8)
  return 2.0**power * (1 + eighths / 8)


def _coded(x: types.Array, dtype: Any, chance: types.Array) -> Blocks:
  size = jnp.abs(x)
  largest = jnp.max(size, axis=_axis(x.shape), keepdims=True)
  z = 1 + size / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) * (_top(dtype) - 1)
  bits = jax.lax.bitcast_convert_type(z, jnp.uint32) + (chance << (_SIGNIFICANT - 16))
  codes = jnp.minimum((bits >> _SIGNIFICANT).astype(jnp.int32) - _ONE, _LEVELS[jnp.dtype(dtype).name])
  if dtype == jnp.uint8:
    codes = jnp.where((codes == 0) & (size > 0), 1, codes)
  return Blocks(jnp.where(x < 0, -codes, codes).astype(dtype), largest)
