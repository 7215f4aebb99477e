"""Splash attention, Pallas' kernel for TPUs, with segments and branches, on a mesh."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import seen as seen_lib

BLOCKS = (512, 256, 128)  # sizes, of which the largest that divides the length is taken
_BRANCH_BITS, _APART = 10, -(2.0**15)  # of the number of a branch; what a bit that differs adds to a logit


def takes(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, length: int) -> bool:
  """Whether the kernel takes rows of this length on a mesh."""
  shards = 1 if mesh.empty else sharding.parts(mesh, 'length')
  return length % (shards * BLOCKS[-1]) == 0


def attend(q_BTNH, k_BTKH, v_BTKH, seen: seen_lib.Seen, how: seen_lib.How, *, interpret: bool = False):
  """The kernel under `shard_map`: queries split over batch, heads and length, keys gathered over length.

  The kernel compares segments alone. Branches are told by further places of the heads, see `_told_apart`.

  Args:
    q_BTNH: see `attention.attend`; likewise the others.
    k_BTKH: where the tensor axis is larger than K, each device takes a copy of the one head that its queries read.
    v_BTKH: likewise.
    seen: likewise.
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
  kernel = _kernel(T, N // parts['heads'], parts['length'], how, interpret)

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


def _kernel(length: int, heads: int, shards: int, how: seen_lib.How, interpret: bool):
  """The causal kernel for `heads` heads, its queries split into `shards` parts."""
  block = next(size for size in BLOCKS if length // shards % size == 0)
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
      residual_checkpoint_name=seen_lib.RESULT,
      interpret=interpret,
  )
