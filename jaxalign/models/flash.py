"""Attention of a block of queries at a time, over the blocks of keys that it can see; for one CPU.

Rows that are packed hold many short segments, so that most keys of a row are of segments that a query does not see.
Here a block of queries reads the keys from the first that one of them sees. Backward, weights are computed again from
what they were divided by, as in FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691, Alg. 2).

XLA wants sizes that do not change: how many keys are read is one of a few sizes, a branch of the program for each.
"""

import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from jaxalign import types
from jaxalign import vocab
from jaxalign.models import seen as seen_lib

LEAST = 512  # tokens of a row from which it is faster than dense attention
RESULT = 'flash'  # name of what it gives, and of what its backward pass reads beside it
_QUERIES = 128  # of a block


def takes(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, length: int) -> bool:
  """Whether it takes rows of this length on a mesh: one device, rows that are not short."""
  return length >= LEAST and (mesh.empty or mesh.size == 1)


def attend(q_BTNH, k_BTKH, v_BTKH, seen: seen_lib.Seen, how: seen_lib.How):
  """See `attention.attend`; rows are read one behind the other."""
  length = q_BTNH.shape[1]
  short = -length % _QUERIES  # What is put behind a row is seen by nothing in it.
  longer = lambda x: jnp.pad(x, [(0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)])
  return _attend(how, *jax.tree.map(longer, (q_BTNH, k_BTKH, v_BTKH, seen)))[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q_BTNH, k_BTKH, v_BTKH, seen):
  return _forward(how, q_BTNH, k_BTKH, v_BTKH, seen)[0]


def _forward(how, q_BTNH, k_BTKH, v_BTKH, seen):
  args = _behind_barrier(q_BTNH, k_BTKH, v_BTKH, seen)
  out_BTNH, lse = jax.lax.map(lambda row: _forward_row(how, *row), args)
  out_BTNH, lse = (ad_checkpoint.checkpoint_name(x, RESULT) for x in (out_BTNH, lse))
  return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, seen, out_BTNH, lse)


def _backward(how, kept, d_out_BTNH):
  grads = jax.lax.map(lambda row: _backward_row(how, *row), _behind_barrier(*kept, d_out_BTNH))
  return *grads, None


_attend.defvjp(_forward, _backward)


def _behind_barrier(*args):
  """The same; without it the masks, which no gradient flows through, would be made for all blocks and kept."""
  return jax.lax.optimization_barrier(args)


# Names of axes beside those of `types`: I blocks of queries, Q queries of a block for each query head of a key head.
# `seen_T` is what `Seen` has of one row.
def _forward_row(how, q_TNH, k_TKH, v_TKH, seen_T):
  """Results, and log-sum-exps of logits by block `[I, K, Q]`, of one row."""
  heads = k_TKH.shape[1]
  k_KTH, v_KTH = k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)

  def of_block(_, block):
    at, size, q_KQH = block

    def of_keys(count: int):
      start, of = _keys(at, count)
      logits = _logits(how, q_KQH, of(k_KTH), seen_T, at, start)
      top = jnp.max(logits, axis=-1)
      exp = jnp.exp(logits - top[..., None])
      total = jnp.sum(exp, axis=-1)
      out_KQH = _product('kqs,ksh->kqh', exp.astype(v_TKH.dtype), of(v_KTH)) / total[..., None]
      return out_KQH.astype(q_TNH.dtype), top + jnp.log(total)

    return None, _by_size(size, seen_T, of_keys)

  _, (out, lse_IKQ) = jax.lax.scan(of_block, None, (*_blocks(how, seen_T), _in_blocks(q_TNH, heads)))
  return _in_row(out, q_TNH.shape), lse_IKQ


def _backward_row(how, q_TNH, k_TKH, v_TKH, seen_T, out_TNH, lse_IKQ, d_out_TNH):
  """Gradients of queries, keys and values of one row."""
  heads, dtype = k_TKH.shape[1], q_TNH.dtype
  k_KTH, v_KTH = k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)

  def of_block(sums, block):
    at, size, q_KQH, out_KQH, lse_KQ, d_out_KQH = block
    mean_KQ = jnp.sum(out_KQH.astype(jnp.float32) * d_out_KQH, axis=-1)

    def of_keys(count: int, d_k_KTH, d_v_KTH):
      start, of = _keys(at, count)
      logits = _logits(how, q_KQH, of(k_KTH), seen_T, at, start)
      weights = jnp.exp(logits - lse_KQ[..., None])
      d_v_KSH = _product('kqs,kqh->ksh', weights.astype(dtype), d_out_KQH)
      d_logits = weights * (_product('kqh,ksh->kqs', d_out_KQH, of(v_KTH)) - mean_KQ[..., None]) * how.scale
      if how.softcap:  # Where nothing is seen the weight is 0, and the logit no number to square.
        d_logits *= jnp.where(weights > 0, 1 - (logits / how.softcap) ** 2, 0.0)
      d_logits = d_logits.astype(dtype)
      d_k_KSH = _product('kqs,kqh->ksh', d_logits, q_KQH)
      more = lambda x, d: jax.lax.dynamic_update_slice(x, of(x) + d, (0, start, 0))
      d_q_KQH = _product('kqs,ksh->kqh', d_logits, of(k_KTH))
      return (more(d_k_KTH, d_k_KSH), more(d_v_KTH, d_v_KSH)), d_q_KQH.astype(dtype)

    return _by_size(size, seen_T, of_keys, *sums)

  blocked = (_in_blocks(x, heads) for x in (q_TNH, out_TNH))
  xs = *_blocks(how, seen_T), *blocked, lse_IKQ, _in_blocks(d_out_TNH, heads)
  none_KTH = jnp.zeros(k_KTH.shape, jnp.float32)
  (d_k_KTH, d_v_KTH), d_q = jax.lax.scan(of_block, (none_KTH, none_KTH), xs)
  of_row = lambda x_KTH: x_KTH.swapaxes(0, 1).astype(dtype)
  return _in_row(d_q, q_TNH.shape), of_row(d_k_KTH), of_row(d_v_KTH)


def _in_blocks(x_TNH, heads: int):
  """`[I, K, Q, H]`: rows of one product are the queries of a block that share a key head."""
  T, N, H = x_TNH.shape
  blocked = x_TNH.reshape(T // _QUERIES, _QUERIES, heads, N // heads, H)
  return blocked.transpose(0, 2, 3, 1, 4).reshape(T // _QUERIES, heads, -1, H)


def _in_row(x_IKQH, shape):
  """The inverse, of this shape."""
  blocks, heads, _, size = x_IKQH.shape
  return x_IKQH.reshape(blocks, heads, -1, _QUERIES, size).transpose(0, 3, 1, 2, 4).reshape(shape)


def _sizes(blocks: int) -> list[int]:
  """Of how many blocks keys can be: powers of two and the halves between them."""
  powers = [2**i for i in range(blocks.bit_length())]
  return sorted({min(size, blocks) for power in powers for size in (power, power + power // 2)} | {blocks})


def _blocks(how, seen_T):
  """Of each block, its number, and of `_sizes` the least that reaches back to the first key that it sees."""
  segments_T = seen_T.segments_BT
  slots_T = jnp.arange(segments_T.size)
  is_first_T = jnp.concatenate([jnp.ones(1, bool), segments_T[1:] != segments_T[:-1]])
  first_I = jax.lax.cummax(jnp.where(is_first_T, slots_T, 0))[::_QUERIES]
  at_I = jnp.arange(first_I.size)
  if how.window and seen_T.branches_BT is None:
    first_I = jnp.maximum(first_I, at_I * _QUERIES + 1 - how.window)
  wanted_I = at_I - first_I // _QUERIES + 1
  return at_I, jnp.searchsorted(jnp.asarray(_sizes(first_I.size)), wanted_I)


def _by_size(size, seen_T, of_keys, *args):
  """`of_keys(count, *args)` for the count of keys of this size."""
  sizes = _sizes(seen_T.segments_BT.size // _QUERIES)
  return jax.lax.switch(size, [functools.partial(of_keys, count * _QUERIES) for count in sizes], *args)


def _keys(at, count: int):
  """The slot from which the block with this number reads `count` keys, its own the last, and what takes them."""
  start = jnp.maximum((at + 1) * _QUERIES - count, 0)
  return start, lambda x_KTH: jax.lax.dynamic_slice_in_dim(x_KTH, start, count, axis=1)


def _logits(how, q_KQH, k_KSH, seen_T, at, start):
  """`[K, Q, S]` in float32, of a block and keys from `start` on."""
  logits = vocab.soften(_product('kqh,ksh->kqs', q_KQH, k_KSH) * how.scale, how.softcap)
  part = lambda start, size: jax.tree.map(lambda x_T: jax.lax.dynamic_slice_in_dim(x_T, start, size), seen_T)
  count, first = k_KSH.shape[1], at * _QUERIES
  behind = first + jnp.arange(_QUERIES)[:, None] - start - jnp.arange(count)[None, :]
  allowed = seen_lib.sees_before(part(first, _QUERIES), part(start, count), behind, how.window)
  shape = q_KQH.shape[0], -1, _QUERIES, count
  return jnp.where(allowed, logits.reshape(shape), seen_lib.OUT).reshape(logits.shape)


def _product(axes: str, x, y):
  return jnp.einsum(axes, x, y, precision=types.precision(x), preferred_element_type=jnp.float32)
