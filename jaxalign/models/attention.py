"""Causal attention within segments, by the kernel that suits the platform a program is compiled for.

xla     dense, in blocks of queries; anywhere
cudnn   fused, with a dense mask; NVIDIA GPUs, 16-bit floats
splash  Pallas kernel that skips what the mask rules out; TPUs, 16-bit floats
flash   blocks of queries with the blocks of keys that they can see; a CPU
"""

import functools
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign import vocab
from jaxalign.models import cudnn
from jaxalign.models import flash
from jaxalign.models import seen as seen_lib
from jaxalign.models import splash

KERNELS = ('xla', 'cudnn', 'splash', 'flash')
_QUERIES = 64  # of a block, at least
_BLOCKS = 8  # at most: up to 7/16 of the products are masked and not computed
_MODULES: dict[str, Any] = {'cudnn': cudnn, 'splash': splash, 'flash': flash}


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
    softcap: see `seen.How`.
  """
  platform = sharding.platform_of(mesh)
  sixteen_bits = jnp.dtype(dtype).itemsize == 2
  name, reason = 'xla', f'the platform is {platform}'
  if platform == 'tpu':
    local = length // sharding.parts(mesh, 'length')
    if not sixteen_bits or head_size % 64 or local % splash.BLOCKS[-1]:
      reason = (
          f'splash wants 16-bit floats (here {jnp.dtype(dtype).name}), heads in multiples of 64 (here {head_size}),'
          f' tokens of 128 (here {local} per device)'
      )
    else:
      name = 'splash'
  elif platform == 'gpu':
    if softcap:
      reason = 'cuDNN has no soft cap'
    elif kv_heads % sharding.parts(mesh, 'heads'):
      reason = f'cuDNN takes whole key heads (here {kv_heads}), which the mesh splits'
    elif not sixteen_bits or head_size % 8 or head_size > 128 or length > cudnn.MOST or not cudnn.takes(mesh, length):
      reason = (
          f'cuDNN wants 16-bit floats (here {jnp.dtype(dtype).name}), heads in multiples of 8 up to 128 (here'
          f' {head_size}), rows that are not split, of an even number of tokens up to {cudnn.MOST} (here {length})'
      )
    else:
      name = 'cudnn'
  elif platform == 'cpu':
    if not flash.takes(mesh, length):
      reason = f'flash wants one device and rows of {flash.LEAST} tokens at least (here {length})'
    else:
      name = 'flash'
  logging.info('attention: %s (%s)', name, reason)
  return name


def attend(
    name: str,
    q_BTNH: types.Array,
    k_BTKH: types.Array,
    v_BTKH: types.Array,
    seen: seen_lib.Seen,
    how: seen_lib.How,
) -> types.Array:
  """Each query sees the keys of its own segment up to its own place, the last `window` of them where there is one.

    out_t = sum_s softmax_s(softcap(scale q_t . k_s)) v_s     over t - window < s <= t with segment_s = segment_t

  Where branches share a prompt, s and t are positions, and the branch of s is that of t or the prompt.

  Args:
    name: one of KERNELS, picked for the rows of a run; of another length or mesh, which it may not take, XLA reads
      them, and the log says so.
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
  if kernel := _MODULES.get(name):
    if kernel.takes(jax.sharding.get_abstract_mesh(), q_BTNH.shape[1]):
      return kernel.attend(q_BTNH, k_BTKH, v_BTKH, seen, how)
    logging.info('attention: xla (%s does not take rows of %d tokens on this mesh)', name, q_BTNH.shape[1])
  return jax.ad_checkpoint.checkpoint_name(xla(q_BTNH, k_BTKH, v_BTKH, seen, how), seen_lib.RESULT)


def xla(q_BTNH, k_BTKH, v_BTKH, seen: seen_lib.Seen, how: seen_lib.How):
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
    queries, keys = slice(start, stop), slice(first, stop)
    allowed_BTS = seen_lib.sees_before(seen.of(queries), seen.of(keys), behind_TS, how.window)
    out.append(dense(q_BTNH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys], allowed_BTS, how))
  return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def dense(q_BTNH, k_BSKH, v_BSKH, allowed_BTS, how: seen_lib.How):
  """Attention under any mask."""
  return heads_first(q_BTNH, k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3), allowed_BTS, how)


def heads_first(q_BTNH, k_BKHS, v_BKSH, allowed_BTS, how: seen_lib.How):
  """The same of other layouts; queries that share a key head are rows of one matrix product."""
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  R = N // K
  q = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R * T, H)
  product = functools.partial(jnp.matmul, precision=types.precision(q), preferred_element_type=jnp.float32)
  logits = vocab.soften(product(q, k_BKHS).reshape(B, K, R, T, S) * how.scale, how.softcap)
  logits = jnp.where(allowed_BTS[:, None, None], logits, seen_lib.OUT)
  exp = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
  total = jnp.sum(exp, axis=-1)
  # Divided after the product: H numbers a query instead of S.
  out = product(exp.astype(v_BKSH.dtype).reshape(B, K, R * T, S), v_BKSH)
  out = out.reshape(B, K, R, T, H) / total[..., None]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
