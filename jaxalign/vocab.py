"""The way from hidden states to the vocabulary, a chunk of tokens at a time, on the device's part of it.

What `logps` and `divergence` share: only targets that the mask counts are computed, compacted to the front, and the
largest array with a vocabulary axis is `[chunk, V / tensor]`, of which CPUs take a block of columns after another.
Their loops run under `shard_map`.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types

MASKED_LOGIT = -1e30  # finite, so that 0 * logit is 0
CHUNK = 512
_ALIGNED = 1024
_CPU_BLOCK = 2048  # columns, at most, of which what is made for a chunk stays in the caches of a CPU
_NO_TOKEN = jnp.iinfo(jnp.int32).max
_MOST = 2**27  # numbers of a gradient of the head that a device holds at once, where in the end it has a part of it


class Axes(NamedTuple):
  """Mesh axes that the tokens, the vocabulary and the width of the head are split over; empty off a mesh."""

  tokens: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()


class Output(NamedTuple):
  """What is known of the output layer before it is traced.

  Attributes:
    vocab_size: real columns of the head; those beyond are padding and have probability 0.
    chunk: targets per chunk and device.
    softcap: c of c tanh(logit / c); 0 for none.
    temperature: divides the logits after that.
  """

  vocab_size: int
  chunk: int = CHUNK
  softcap: float = 0.0
  temperature: float = 1.0


def sharded(local: Callable, ins: str, outs: tuple[str, ...]) -> Callable:
  """Runs `local(axes, ...)` on every device's shard; off a mesh, on the whole.

  `ins` and `outs` spell the kind of each array: h hidden states, t the head, l logits of compacted tokens, anything
  else one number per token.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return functools.partial(local, Axes())
  # A collective over an axis of one device is not always compiled away.
  split = lambda *names: tuple(a for name in names for a in sharding.axes_of(name) if mesh.shape[a] > 1)
  axes = Axes(split('batch', 'length'), split('vocab'), split('embed'))
  kinds = {
      'h': sharding.spec('batch', 'length', None),
      't': sharding.spec('embed', 'vocab'),
      'l': sharding.spec(('batch', 'length'), 'vocab'),
  }
  of = lambda kind: kinds.get(kind, sharding.spec('batch', 'length'))
  return jax.shard_map(
      functools.partial(local, axes),
      mesh=mesh,
      in_specs=tuple(of(kind) for kind in ins),
      out_specs=tuple(of(kind) for kind in outs),
      check_vma=False,
  )


def chunks(axes: Axes, mask, chunk: int):
  """Indices of counted tokens, compacted and padded with n (out of bounds), and how many chunks hold any.

  The number of chunks is the largest of any device, so that all of them run the loop's collectives equally often.
  """
  n = mask.size
  size = -(-n // chunk) * chunk
  (index,) = jnp.nonzero(mask.reshape(-1) > 0, size=size, fill_value=n)
  count = jnp.sum(mask > 0)
  if axes.tokens:
    count = jax.lax.pmax(count, axes.tokens)
  return index, -(-count // chunk)


def loop(first, last, most: int, body: Callable, carry):
  """`body(i, carry)` for each i from `first` up to `last`, at most `most` turns, which the program's text tells."""
  with jax.named_scope(f'at_most_{most}_turns'):  # read by `planning.hlo`
    return jax.lax.fori_loop(first, last, body, carry)


def take(x, rows):
  """The rows of a chunk; 0 where an index is out of bounds."""
  return jnp.take(x, rows, axis=0, mode='fill', fill_value=0)


def soften(logits, softcap: float):
  """Computes c tanh(logits / c); nothing where c is 0. Gemma Team, 2024, https://arxiv.org/abs/2408.00118, Sec. 2."""
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def columns(axes: Axes, width: int):
  """The token ids `[1, v]` that stand in this device's part of the vocabulary, `width` wide."""
  first = jax.lax.axis_index(axes.vocab) * width if axes.vocab else 0
  return first + jnp.arange(width)[None, :]


def logits(output: Output, hidden, head, columns):
  """Float32 logits `[c, v]` of a chunk for these columns of the head, very low where they are padding."""
  return masked(output, unmasked_logits(output, hidden, head), columns)


def unmasked_logits(output: Output, hidden, head):
  """Float32 logits `[c, v]` of a chunk for some columns of the head, whatever they are."""
  raw = soften(_product(hidden, head, (1, 0)), output.softcap)
  return raw if output.temperature == 1 else raw / output.temperature


def masked(output: Output, logits, columns):
  """The logits, very low where the columns are padding."""
  return jnp.where(columns < output.vocab_size, logits, MASKED_LOGIT)


def in_blocks(local: Callable, width: int, *args):
  """`local(block, *args)`, with as many columns of a head that is `width` wide as a platform takes at once.

  Accelerators take all of them: their compilers fuse what is done with a chunk. CPUs write it to memory.
  """
  whole = functools.partial(local, width)
  blocks = -(-width // _CPU_BLOCK)
  if blocks == 1:
    return whole(*args)
  return jax.lax.platform_dependent(*args, cpu=functools.partial(local, -(-width // blocks)), default=whole)


def fold(body: Callable, carry, head, ids, block: int):
  """`body(carry, start, part of the head, its token ids)` for each block of columns, in turn.

  All blocks are as wide. The last one begins with columns of that before it where it would end beyond the head; their
  ids are no token's.
  """
  width = head.shape[1]
  if width <= block:
    return body(carry, 0, head, ids)

  def step(i, carry):
    start = jnp.minimum(i * block, width - block)
    part, its = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (head, ids))
    is_new = start + jnp.arange(block)[None, :] >= i * block
    return body(carry, start, part, jnp.where(is_new, its, _NO_TOKEN))

  return jax.lax.fori_loop(0, -(-width // block), step, carry)


def total(axes: Axes, x):
  """The sum over the vocabulary, of all devices: `[c]`."""
  here = jnp.sum(x, axis=1)
  return jax.lax.psum(here, axes.vocab) if axes.vocab else here


def top(axes: Axes, logits):
  """The largest logit, of all devices: `[c]`."""
  here = jnp.max(logits, axis=1)
  return jax.lax.pmax(here, axes.vocab) if axes.vocab else here


def whole(axes: Axes, head):
  """The head with all of its width, which may be split over devices."""
  return jax.lax.all_gather(head, axes.embed, axis=0, tiled=True) if axes.embed else head


def gradients(axes: Axes, d_hidden, d_head):
  """Adds up what devices found of the gradients, each of which then has its part."""
  if axes.vocab:
    d_hidden = jax.lax.psum(d_hidden, axes.vocab)
  if axes.embed:
    d_head = jax.lax.psum_scatter(d_head, axes.embed, scatter_dimension=0, tiled=True)
  replicas = tuple(a for a in axes.tokens if a not in axes.embed)
  return d_hidden, jax.lax.psum(d_head, replicas) if replicas else d_head


def gradients_in_parts(axes: Axes, local: Callable, shape: tuple[int, int], head):
  """The same of a function of some columns, which are taken one part after another where the head is split by width.

  Such a head is whole only while it is used, and so is its gradient: 2.1 GB in float32 at Llama 3.1 8B.

  Args:
    axes: of the mesh.
    local: (where they begin on this device, whole columns `[D, v]` of the head, their ids) -> float32 gradients of
      hidden states and of those columns.
    shape: of the hidden states.
    head: this device's part.
  """
  count = -(-head.size * jax.lax.axis_size(axes.embed) // _MOST) if axes.embed else 1
  # Tiles of TPUs are 128 numbers wide.
  width = -(-head.shape[1] // (count * _ALIGNED)) * _ALIGNED
  ids = columns(axes, head.shape[1])
  d_hidden = jnp.zeros(shape, jnp.float32)
  found: list[jax.Array] = []
  for start in range(0, head.shape[1], width):
    at = slice(start, start + width)
    part = head[:, at]
    if count > 1:  # Nothing is gathered before the columns to the left are done with.
      d_hidden, found, part = jax.lax.optimization_barrier((d_hidden, found, part))
    of_part, d_part = gradients(axes, *local(start, whole(axes, part), ids[:, at]))
    d_hidden, found = d_hidden + of_part, [*found, d_part]
  return d_hidden, jnp.concatenate(found, axis=1)


def pull_back(output: Output, logits, d_logits, hidden, head):
  """Gradients of hidden states and head from that of a chunk's logits, which have been softened and divided."""
  if output.softcap:  # (c tanh(x / c))' = 1 - tanh^2, which is 0 for padding
    d_logits *= 1.0 - jnp.square(jnp.maximum(logits * (output.temperature / output.softcap), -1.0))
  if output.temperature != 1:
    d_logits /= output.temperature
  d_logits = d_logits.astype(hidden.dtype)
  return _product(d_logits, head, (1, 1)), _product(hidden, d_logits, (0, 0))


def _product(a, b, axes: tuple[int, int]):
  """Float32 sums over one axis of each."""
  over = ((axes[:1], axes[1:]), ((), ()))
  return jax.lax.dot_general(a, b, over, precision=types.precision(a), preferred_element_type=jnp.float32)
