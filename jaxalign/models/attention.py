"""Causal attention within segments, by the kernel that suits the platform a program is compiled for.

xla     dense, in blocks of queries; anywhere
cudnn   fused, with a dense mask; NVIDIA GPUs, 16-bit floats
splash  Pallas kernel that skips what the mask rules out; TPUs, 16-bit floats
"""

import functools
import math
from typing import Literal
from typing import NamedTuple

from absl import logging
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types

KERNELS = ('xla', 'cudnn', 'splash')
RESULT = 'attention'  # name of what attention gives, and of what the splash kernel's backward pass reads beside it
_QUERIES = 64  # of a block, at least
_BLOCKS = 8  # at most: up to 7/16 of the products are masked and not computed
_CUDNN_LENGTH = 4096  # beyond it the dense mask takes more memory than the kernel saves
_SPLASH_BLOCKS = (512, 256, 128)
_BRANCH_BITS, _APART = 10, -(2.0**15)  # of the number of a branch; what a bit that differs adds to a logit
_OUT = -1e30  # finite, so that a row that may see nothing is not NaN


class How(NamedTuple):
  """What differs between families and layers.

  Attributes:
    scale: multiplies the products of queries and keys.
    window: keys that a query sees, its own among them; 0 for all before it.
    softcap: c of c tanh(logit / c); 0 for none. Gemma Team, 2024, https://arxiv.org/abs/2408.00118, Sec. 2.
  """

  scale: float
  window: int = 0
  softcap: float = 0.0


class Seen(NamedTuple):
  """Which tokens of a row see which: those of a segment see those before them, but for other branches than their own.

  Attributes:
    segments_BT: int32; padding is a segment like any other.
    branches_BT: int32 below 1024: 0 for what the branches of a segment share, which comes first, else 1, 2, ...; None
      where a segment is one sequence.
    positions_BT: int32, with `branches_BT`: from 0 in each segment, and on in each branch where what is shared ends.
  """

  segments_BT: types.Array
  branches_BT: types.Array = None
  positions_BT: types.Array = None

  def mask(self, queries: slice, keys: slice, window: int = 0) -> types.Array:
    """`[B, T, S]`: which keys are of the query's segment and branch, and with branches of its window, by positions."""
    same_BTS = self.segments_BT[:, queries, None] == self.segments_BT[:, None, keys]
    if self.branches_BT is None:
      return same_BTS
    of_keys_B1S = self.branches_BT[:, None, keys]
    same_BTS &= (of_keys_B1S == 0) | (of_keys_B1S == self.branches_BT[:, queries, None])
    if window:
      same_BTS &= self.positions_BT[:, queries, None] - self.positions_BT[:, None, keys] < window
    return same_BTS


def pick(
    mesh: jax.sharding.Mesh,
    dtype: jax.typing.DTypeLike,
    *,
    head_size: int,
    kv_heads: int,
    length: int,
    softcap: float = 0.0,
) -> str:
  """The kernel for programs on `mesh`, whose platform need not be the local one; logs it with the reason.

  Args:
    mesh: of the program.
    dtype: of queries, keys and values.
    head_size: H.
    kv_heads: K.
    length: T.
    softcap: see `How`.
  """
  platform = sharding.platform_of(mesh)
  sixteen_bits = jnp.dtype(dtype).itemsize == 2
  name, reason = 'xla', f'the platform is {platform}'
  if platform == 'tpu':
    local = length // sharding.parts(mesh, 'length')
    if not sixteen_bits or head_size % 64 or local % _SPLASH_BLOCKS[-1]:
      reason = (
          f'splash wants 16-bit floats (here {jnp.dtype(dtype).name}), heads in multiples of 64 (here {head_size}),'
          f' tokens of 128 (here {local} per device)'
      )
    else:
      name = 'splash'
  elif platform == 'gpu':
    if softcap:
      reason = 'cuDNN has no soft cap'
    elif sharding.parts(mesh, 'length') > 1 or kv_heads % sharding.parts(mesh, 'heads'):
      reason = f'cuDNN takes whole rows and whole key heads (here {kv_heads}), which the mesh splits'
    elif not sixteen_bits or head_size % 8 or head_size > 128 or length > _CUDNN_LENGTH or length % 2:
      reason = (
          f'cuDNN wants 16-bit floats (here {jnp.dtype(dtype).name}), heads in multiples of 8 up to 128 (here'
          f' {head_size}), an even number of tokens up to {_CUDNN_LENGTH} (here {length})'
      )
    else:
      name = 'cudnn'
  logging.info('attention: %s (%s)', name, reason)
  return name


def attend(
    name: str,
    q_BTNH: types.Array,
    k_BTKH: types.Array,
    v_BTKH: types.Array,
    seen: Seen,
    how: How,
) -> types.Array:
  """Each query sees the keys of its own segment up to its own place, the last `window` of them where there is one.

    out_t = sum_s softmax_s(softcap(scale q_t . k_s)) v_s     over t - window < s <= t with segment_s = segment_t

  Where branches share a prompt, s and t are positions, and the branch of s is that of t or the prompt.

  Args:
    name: one of KERNELS, picked for the rows of a run; of another length, which splash may not take, XLA reads, and
      the log says so.
    q_BTNH: queries; query head n reads key head n // (N / K).
    k_BTKH: keys.
    v_BTKH: values.
    seen: segments and branches.
    how: scale, window and soft cap.

  Returns:
    `[B, T, N, H]` in the dtype of the queries; the softmax is float32.
  """
  if how.window >= q_BTNH.shape[1]:
    how = how._replace(window=0)
  if name == 'splash':
    if _takes(q_BTNH.shape[1]):
      return splash(q_BTNH, k_BTKH, v_BTKH, seen, how)
    logging.info('attention: xla (splash does not take rows of %d tokens on this mesh)', q_BTNH.shape[1])
  out_BTNH = (cudnn if name == 'cudnn' else xla)(q_BTNH, k_BTKH, v_BTKH, seen, how)
  return jax.ad_checkpoint.checkpoint_name(out_BTNH, RESULT)


def _takes(length: int) -> bool:
  """Whether splash takes rows of this length on the mesh that is set."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.parts(mesh, 'length')
  return length % (shards * _SPLASH_BLOCKS[-1]) == 0


def xla(q_BTNH, k_BTKH, v_BTKH, seen: Seen, how: How):
  """Dense attention, a block of queries at a time; see `attend`."""
  length = q_BTNH.shape[1]
  mesh = jax.sharding.get_abstract_mesh()
  split = not mesh.empty and sharding.parts(mesh, 'length') > 1
  size = length if split else _QUERIES * math.ceil(length / (_QUERIES * _BLOCKS))
  out = []
  for start in range(0, length, size):
    stop = min(start + size, length)
    by_slots = how.window and seen.branches_BT is None
    first = max(0, start + 1 - how.window) if by_slots else 0
    behind_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
    allowed_TS = (behind_TS >= 0) & (behind_TS < how.window) if by_slots else behind_TS >= 0
    queries, keys = slice(start, stop), slice(first, stop)
    allowed_BTS = seen.mask(queries, keys, how.window) & allowed_TS[None]
    out.append(dense(q_BTNH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys], allowed_BTS, how))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def dense(q_BTNH, k_BSKH, v_BSKH, allowed_BTS, how: How):
  """Attention under any mask."""
  return heads_first(q_BTNH, k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3), allowed_BTS, how)


def heads_first(q_BTNH, k_BKHS, v_BKSH, allowed_BTS, how: How):
  """The same of other layouts; queries that share a key head are rows of one matrix product."""
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  R = N // K
  q = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R * T, H)
  product = functools.partial(jnp.matmul, precision=types.precision(q), preferred_element_type=jnp.float32)
  logits = product(q, k_BKHS).reshape(B, K, R, T, S) * how.scale
  if how.softcap:
    logits = how.softcap * jnp.tanh(logits / how.softcap)
  logits = jnp.where(allowed_BTS[:, None, None], logits, _OUT)
  exp = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
  total = jnp.sum(exp, axis=-1)
  # Divided after the product: H numbers a query instead of S.
  out = product(exp.astype(v_BKSH.dtype).reshape(B, K, R * T, S), v_BKSH)
  out = out.reshape(B, K, R, T, H) / total[..., None]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def cudnn(q_BTNH, k_BTKH, v_BTKH, seen: Seen, how: How, *, implementation: Literal['cudnn', 'xla'] = 'cudnn'):
  """Fused attention of cuDNN with a dense mask; see `attend`. With `implementation` 'xla' it runs on any platform."""
  same_BTS = seen.mask(slice(None), slice(None), how.window)
  by_slots = how.window and seen.branches_BT is None
  return jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      mask=same_BTS[:, None],
      scale=how.scale,
      is_causal=True,
      local_window_size=(how.window - 1, 0) if by_slots else None,
      implementation=implementation,
  )


def splash(q_BTNH, k_BTKH, v_BTKH, seen: Seen, how: How, *, interpret: bool = False):
  """Splash attention under `shard_map`: queries split over batch, heads and length, keys gathered over length.

  The kernel compares segments alone. Branches are told by further places of the heads, see `_told_apart`.

  Args:
    q_BTNH: see `attend`; likewise the others.
    k_BTKH: where the tensor axis is larger than K, each device takes a copy of the one head that its queries read.
    v_BTKH: likewise.
    seen: see `attend`.
    how: likewise.
    interpret: runs the kernel's program with XLA, on any platform.

  Raises:
    UsageError: there are branches, and a window or a soft cap, which neither slots nor logits have a place for.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = {name: 1 if mesh.empty else sharding.parts(mesh, name) for name in ('heads', 'length')}
  T, N = q_BTNH.shape[1:3]
  K = k_BTKH.shape[2]
  if parts['heads'] > K:
    k_BTKH, v_BTKH = (jnp.repeat(x, parts['heads'] // K, axis=2) for x in (k_BTKH, v_BTKH))
  kernel = _splash_kernel(T, N // parts['heads'], parts['length'], how, interpret)

  def local(kernel, q, k, v, q_segments, kv_segments, *branches):
    if branches:  # Not before: the gradient of k is summed over `length` as the model has it.
      q, k = _told_apart(q, k, *branches)
    ids = splash_attention_kernel.SegmentIds(q_segments, kv_segments)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    out = jax.vmap(kernel)(heads_first(q), heads_first(k), heads_first(v), ids)
    return heads_first(out)

  q_BTNH = q_BTNH * how.scale
  if seen.branches_BT is not None:
    if how.window or how.softcap:
      raise types.UsageError(
          f'loader.Packing.share_prompts = True: the TPU kernel has no way to tell branches from each other in layers'
          f' with a window (here {how.window}) or a soft cap (here {how.softcap}); bind it to False'
      )
  ids = [seen.segments_BT, seen.branches_BT][: 1 if seen.branches_BT is None else 2]
  args = q_BTNH, k_BTKH, v_BTKH, *(x for x in ids for _ in range(2))
  if mesh.empty:
    return local(kernel, *args)
  queries, keys = sharding.spec('batch', 'length', 'heads', None), sharding.spec('batch', None, 'heads', None)
  kernel_spec = kernel.manual_sharding_spec(sharding.named(mesh, None, 'length'))
  specs = kernel_spec, queries, keys, keys, *len(ids) * (sharding.spec('batch', 'length'), sharding.spec('batch', None))
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(kernel, *args)


def _told_apart(q_BTNH, k_BSKH, branches_BT, branches_BS):
  """Queries and keys with places for the bits of their branches, whose product adds -2^15 for each that differs.

  A key has (bit, 1 - bit) for each bit of its branch, a query -2^15 (1 - bit, bit); keys of a shared prompt have zeros.
  So where a query may see a key every term is 0, and nothing is rounded.
  """
  bits = lambda branches: (branches[..., None] >> jnp.arange(_BRANCH_BITS)[None, None, :]) & 1
  bits_BTE, bits_BSE = bits(branches_BT), bits(branches_BS)
  queries_BTE = _APART * jnp.concatenate([1 - bits_BTE, bits_BTE], axis=-1)
  keys_BSE = jnp.concatenate([bits_BSE, 1 - bits_BSE], axis=-1) * (branches_BS > 0)[..., None]

  def wider(x_BTNH, places_BTE):
    shape = *x_BTNH.shape[:3], places_BTE.shape[-1]
    return jnp.concatenate([x_BTNH, jnp.broadcast_to(places_BTE[:, :, None], shape).astype(x_BTNH.dtype)], axis=-1)

  return wider(q_BTNH, queries_BTE), wider(k_BSKH, keys_BSE)


def _splash_kernel(length: int, heads: int, shards: int, how: How, interpret: bool):
  """The causal kernel for `heads` heads, its queries split into `shards` parts."""
  block = next(size for size in _SPLASH_BLOCKS if length // shards % size == 0)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
  )
  shape = length, length
  # The part before a query that it sees; a mask without bound on the left is the causal one.
  seen = how.window - 1 if how.window else None, 0
  mask = splash_attention_mask.LocalMask(shape, seen, 0, shard_count=shards)
  return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * heads),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=shards,
      attn_logits_soft_cap=how.softcap or None,
      residual_checkpoint_name=RESULT,
      interpret=interpret,
  )
