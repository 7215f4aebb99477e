"""Keys and values of what a model has read, so that it reads each token once."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import attention as attention_lib
from jaxalign.models import experts
from jaxalign.models import seen as seen_lib


@struct.dataclass
class KVCache:
  """Keys and values of what has been read, and how much that is.

  Attributes:
    k_LBKSH: keys, rotated; slot s of a row is its token s.
    v_LBKSH: values.
    lengths_B: int32, tokens of each row.
    k_scale_LBKS: of 8-bit keys, what each is multiplied by; None of others.
    v_scale_LBKS: likewise of values.
    experts_LBKSH: which experts each token took, a head of k numbers; None where that is not kept.
    mode: 'next', tokens follow those of their row; 'first', rows are empty, and attention is that of whole sequences;
      'either', tokens of a row are alternatives to each other as its next one, and the cache stays as it is.
  """

  k_LBKSH: types.Array
  v_LBKSH: types.Array
  lengths_B: types.Array
  k_scale_LBKS: types.Array = None
  v_scale_LBKS: types.Array = None
  experts_LBKSH: types.Array = None
  mode: str = struct.field(pytree_node=False, default='next')


Cache = KVCache | tuple[KVCache, ...]  # of all layers, or of each


def init(
    config: architecture.Config,
    rows: int,
    length: int,
    dtype: jax.typing.DTypeLike,
    mode: str = 'next',
    *,
    layers: int | None = None,
    with_experts: bool = False,
) -> KVCache:
  """An empty cache for `rows` rows of up to `length` tokens; what is read beyond that is lost.

  Rows are split over the mesh, and heads where it divides them. Of dtype int8, each head of each token has a scale.
  `with_experts` keeps which of them each token took, too, where the model has some.
  """
  layers = layers or config.num_layers
  shape = (layers, rows, config.num_kv_heads, length, config.head_size)
  empty = lambda: jnp.zeros(shape, dtype)
  scale = lambda: jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
  taken = None
  if with_experts and config.num_experts:
    taken = jnp.zeros((layers, rows, 1, length, config.experts_per_token), experts.number_dtype(config))
  return placed(KVCache(empty(), empty(), jnp.zeros(rows, jnp.int32), scale(), scale(), taken, mode))


def apart(config: architecture.Config, *args, **options) -> tuple[KVCache, ...]:
  """The same, a cache for each layer."""
  return tuple(init(config, *args, **options, layers=1) for _ in range(config.num_layers))


def each(fn: Callable[..., KVCache], cache: Cache, *others: Cache) -> Cache:
  """What a function makes of a cache of all layers, or of each of them."""
  return fn(cache, *others) if isinstance(cache, KVCache) else tuple(map(fn, cache, *others))


def lengths(cache: Cache) -> types.Array:
  """Tokens of each row."""
  return (cache if isinstance(cache, KVCache) else cache[0]).lengths_B


def longer(cache: Cache, counts_B: types.Array) -> Cache:
  """The same with so many more tokens of each row; alternatives are none."""
  more = lambda one: one if one.mode == 'either' else dataclasses.replace(one, lengths_B=one.lengths_B + counts_B)
  return each(more, cache)


def with_mode(cache: Cache, mode: str) -> Cache:
  """The same in another mode."""
  return each(lambda one: dataclasses.replace(one, mode=mode), cache)


def grown(cache: Cache, length: int) -> Cache:
  """The same with room for this many tokens, no fewer than it has."""

  def one(cache: KVCache) -> KVCache:
    more = lambda x: jnp.pad(x, [(0, length - x.shape[3] if axis == 3 else 0) for axis in range(x.ndim)])
    return dataclasses.replace(cache, **jax.tree.map(more, _arrays(cache)))

  return each(one, cache)


def placed(cache: KVCache) -> KVCache:
  """The same, constrained to where a cache lies."""
  lengths_B = sharding.constrain(cache.lengths_B, None)
  return dataclasses.replace(cache, lengths_B=lengths_B, **jax.tree.map(_place, _arrays(cache)))


def _place(x: jax.Array) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  # Fewer heads than devices: each keeps them all, as it does their weights.
  heads = 'kv_heads' if not mesh.empty and x.shape[2] % sharding.parts(mesh, 'kv_heads') == 0 else None
  return sharding.constrain(x, 'layers', 'batch', heads, *[None] * (x.ndim - 3))


def attend(name: str, q_BTNH, k_BTKH, v_BTKH, seen: seen_lib.Seen, cache: KVCache, layer, how: seen_lib.How):
  """Attention of new tokens to those in the cache and to each other, as its mode says, and the cache with them.

  Args:
    name: of the kernel, for whole sequences.
    q_BTNH: queries of the new tokens; likewise the others.
    k_BTKH: keys, rotated.
    v_BTKH: values.
    seen: see `attention.attend`; read in mode 'first' alone.
    cache: of all layers.
    layer: which this is.
    how: see `seen.How`.
  """
  if cache.mode == 'first':
    return attention_lib.attend(name, q_BTNH, k_BTKH, v_BTKH, seen, how), _write(cache, layer, k_BTKH, v_BTKH)
  T = q_BTNH.shape[1]
  own_TT = jnp.eye(T, dtype=bool)
  if cache.mode == 'next':
    cache = _write(cache, layer, k_BTKH, v_BTKH)
  k_BKSH, v_BKSH = _read(cache, layer, q_BTNH.dtype)
  slots_1S = jnp.arange(k_BKSH.shape[2])[None, :]
  # How far behind each query a slot is; of alternatives, all stand where the next token does.
  ahead_T = jnp.arange(T) if cache.mode == 'next' else jnp.zeros(T, jnp.int32)
  behind_BTS = (cache.lengths_B[:, None] + ahead_T[None, :])[:, :, None] - slots_1S[:, None, :]
  allowed_BTS = behind_BTS >= (0 if cache.mode == 'next' else 1)
  if how.window:
    allowed_BTS &= behind_BTS < how.window
  if cache.mode == 'either':
    behind = lambda x_BKSH, new_BTKH: jnp.concatenate([x_BKSH, new_BTKH.swapaxes(1, 2)], axis=2)
    k_BKSH, v_BKSH = behind(k_BKSH, k_BTKH), behind(v_BKSH, v_BTKH)
    own_BTT = jnp.broadcast_to(own_TT[None], (q_BTNH.shape[0], T, T))
    allowed_BTS = jnp.concatenate([allowed_BTS, own_BTT], axis=2)
  return attention_lib.heads_first(q_BTNH, k_BKSH.swapaxes(2, 3), v_BKSH, allowed_BTS, how), cache


def copy(cache: KVCache, rows_A, of: KVCache, sources_A) -> KVCache:
  """Rows of another cache, no longer than this, in place of rows of this; rows beyond the last are left out."""
  length = of.k_LBKSH.shape[3]

  def one(layer, arrays):
    put = lambda to, x: to.at[layer, rows_A, :, :length].set(x[layer][sources_A].astype(to.dtype), mode='drop')
    return jax.tree.map(put, arrays, _arrays(of))

  # A layer at a time, or the rows would exist twice.
  found = jax.lax.fori_loop(0, cache.k_LBKSH.shape[0], one, _arrays(cache))
  lengths_B = cache.lengths_B.at[rows_A].set(of.lengths_B[sources_A], mode='drop')
  return dataclasses.replace(cache, lengths_B=lengths_B, **found)


def _arrays(cache: KVCache) -> dict[str, Any]:
  names = 'k_LBKSH', 'v_LBKSH', 'k_scale_LBKS', 'v_scale_LBKS', 'experts_LBKSH'
  return {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}


def with_experts(cache: KVCache, layer, taken_BTk: types.Array) -> KVCache:
  """The cache with the experts that new tokens take in a layer; alternatives leave it as it is."""
  if cache.mode == 'either':
    return cache
  return dataclasses.replace(cache, experts_LBKSH=_put(cache, cache.experts_LBKSH, layer, taken_BTk[:, :, None]))


def _put(cache: KVCache, old, layer, new):
  """An array of the cache with what new tokens have, `[B, T, K, ...]`, behind the others of their rows."""
  new = new.astype(old.dtype)
  if cache.mode == 'first':
    return jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2)[None], (layer, *[0] * new.ndim))
  rows_B1, slots_BT = jnp.arange(len(new))[:, None], cache.lengths_B[:, None] + jnp.arange(new.shape[1])[None, :]
  return old.at[layer, rows_B1, :, slots_BT].set(new, mode='drop', indices_are_sorted=True, unique_indices=True)


def _write(cache: KVCache, layer, k_BTKH, v_BTKH) -> KVCache:
  """Puts keys and values of new tokens behind the others."""
  put = lambda old, new: _put(cache, old, layer, new)
  if cache.k_scale_LBKS is None:
    return dataclasses.replace(cache, k_LBKSH=put(cache.k_LBKSH, k_BTKH), v_LBKSH=put(cache.v_LBKSH, v_BTKH))
  (k, k_scale), (v, v_scale) = _to_8_bits(k_BTKH), _to_8_bits(v_BTKH)
  return dataclasses.replace(
      cache,
      k_LBKSH=put(cache.k_LBKSH, k),
      v_LBKSH=put(cache.v_LBKSH, v),
      k_scale_LBKS=put(cache.k_scale_LBKS, k_scale),
      v_scale_LBKS=put(cache.v_scale_LBKS, v_scale),
  )


def _to_8_bits(x_BTKH):
  """Each head of each token as integers to 127 and what they are multiplied by."""
  wide = x_BTKH.astype(jnp.float32)
  scale_BTK = jnp.max(jnp.abs(wide), axis=-1) / 127.0
  return jnp.round(wide / jnp.maximum(scale_BTK, 1e-30)[..., None]).astype(jnp.int8), scale_BTK


def _read(cache: KVCache, layer, dtype) -> tuple[types.Array, types.Array]:
  """Keys and values of a layer."""
  of_layer = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

  def read(x, scale):
    if scale is None:
      return of_layer(x).astype(dtype)
    return (of_layer(x).astype(jnp.float32) * of_layer(scale)[..., None]).astype(dtype)

  return read(cache.k_LBKSH, cache.k_scale_LBKS), read(cache.v_LBKSH, cache.v_scale_LBKS)
