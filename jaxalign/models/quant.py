"""Frozen weights in 8 or 4 bits, by qwix: kept as its arrays, read back where they are multiplied.

As in QLoRA (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, Sec. 3), but that the scales are float32 and not
quantised again.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types

KINDS = ('int8', 'nf4')
# What is quantised, and how many of its last axes are outputs; embeddings, heads, norms, biases and routers are not.
_OUTPUTS = {'q': 2, 'k': 2, 'v': 2, 'o': 1, 'gate': 1, 'up': 1, 'down': 1}
_BLOCK = 64


def is_quantised(name: str) -> bool:
  """Whether the parameter at this path, as 'layers/0/q', is kept in few bits."""
  return name.rpartition('/')[2] in _OUTPUTS


def is_array_of(x: Any) -> bool:
  """Whether this is an array of qwix."""
  return type(x).__name__ == 'QArray'


def quantise(name: str, x: types.Array, kind: str) -> Any:
  """A weight as a qwix array, with a scale per output (and head): of 'int8' one, of 'nf4' one per block of inputs.

  A block has 64 inputs or, where that does not divide them, the largest power of 2 that does.

  Args:
    name: path of the parameter.
    x: the weight, stacked or not, on a mesh.
    kind: one of KINDS.

  Raises:
    UsageError: qwix is not installed.
  """
  where = jax.tree.map(lambda like: like.sharding, abstract(name, x, kind))
  return jax.jit(functools.partial(_quantised, name=name, kind=kind), out_shardings=where)(x)


def abstract(name: str, x: jax.Array | jax.ShapeDtypeStruct, kind: str) -> Any:
  """Shapes and shardings of what `quantise` returns: scales lie like their weight where they can be split so."""
  place = lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding.resized(x, like.shape))
  return jax.tree.map(place, jax.eval_shape(functools.partial(_quantised, name=name, kind=kind), x))


def to_disk(params: types.PyTree) -> types.PyTree:
  """The same, of arrays or shapes, with 4 bits as a byte: checkpoints hold no less."""
  retyped = lambda x: x.update(dtype='uint8') if isinstance(x, jax.ShapeDtypeStruct) else x.astype('uint8')
  return jax.tree.map(lambda x: retyped(x) if x.dtype == jnp.uint4 else x, params)


def from_disk(params: types.PyTree, like: types.PyTree) -> types.PyTree:
  """Undoes `to_disk`; `like` has the types."""
  return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), params, like)


def dequantise(x: Any, dtype: jax.typing.DTypeLike) -> types.Array:
  """The weight in `dtype`, of a qwix array or an array."""
  if is_array_of(x):
    x = _qwix().dequantize(x)
  return x.astype(dtype)


def part(x: Any, dtype: jax.typing.DTypeLike, axes: tuple[str, ...]) -> types.Array:
  """The same on the current mesh, of which each device reads its part: codes are gathered over fsdp, and nothing else.

  Args:
    x: a qwix array or an array, whose axes have the logical names `axes`.
    dtype: of the weight.
    axes: see above.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not is_array_of(x) or mesh.empty:
    return dequantise(x, dtype)
  # Left to itself the compiler gathers every code, to look all of them up on each device.
  names = tuple(None if axis == 'embed' else axis for axis in axes)
  splits = lambda axis, size: bool(axis) and size % sharding.parts(mesh, axis) == 0
  if any(axis and not splits(axis, size) for axis, size in zip(names, x.qvalue.shape, strict=True)):
    return dequantise(x, dtype)
  # A scale may be of all that devices have parts of.
  if any(axis and size > 1 and not splits(axis, size) for axis, size in zip(names, x.scale.shape, strict=True)):
    return dequantise(x, dtype)
  of = lambda like: sharding.spec(*(axis if splits(axis, size) else None for axis, size in zip(names, like.shape)))
  read = functools.partial(dequantise, dtype=dtype)
  where = jax.tree.map(of, x)
  return jax.shard_map(read, mesh=mesh, in_specs=(where,), out_specs=sharding.spec(*names), check_vma=False)(x)


def _quantised(x, *, name: str, kind: str):
  outputs = _OUTPUTS[name.rpartition('/')[2]]
  last_input = x.ndim - outputs - 1
  outer = [axis for axis in range(x.ndim) if axis != last_input]
  if kind == 'nf4':
    block = math.gcd(_BLOCK, x.shape[last_input])
    return _qwix().quantize(x, 'nf4', channelwise_axes=outer, tiled_axes={last_input: block}, scale_dtype=jnp.float32)
  return _qwix().quantize(x, 'int8', channelwise_axes=outer, scale_dtype=jnp.float32)


def _qwix():
  try:
    import qwix
  except ImportError as err:
    raise types.UsageError("lora.Lora.base: 'int8' and 'nf4' need qwix; pip install qwix") from err
  return qwix
