"""A decoder-only transformer of the Llama family.

RMSNorm before each half of a block, rotary positions, grouped-query attention, SwiGLU, tied or untied head. The layers
are one scanned block, so that a program does not grow with their number. The module returns hidden states: logits of a
whole batch are never made (`logps.token_stats` makes them in chunks).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import attention as attention_lib
from jaxalign.models import rotary

# What the backward pass finds saved: everything, products with weights, or nothing but what each layer reads.
REMAT: dict[str, Callable | None] = {
    'none': None,
    'dots': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    'full': jax.checkpoint_policies.nothing_saveable,
}
_VOCAB_MULTIPLE = 128  # the vocabulary is padded to it, so that a tensor axis divides it


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a transformer.

  Attributes:
    vocab_size: V without padding.
    num_layers: L.
    embed_dim: D.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; divides N.
    head_size: H, even.
    mlp_dim: F.
    max_length: positions that the model was trained for.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: whether the output matrix is the transposed embedding.
    reward_head: whether there is a vector that scores hidden states.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  mlp_dim: int
  max_length: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  reward_head: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, float) and not value > 0:
        raise types.UsageError(f'transformer.Config.{field.name} = {value}: it must be positive')
    if self.num_heads % self.num_kv_heads:
      raise types.UsageError(
          f'transformer.Config.num_heads = {self.num_heads}: it must be a multiple of num_kv_heads ='
          f' {self.num_kv_heads}'
      )
    if self.head_size % 2:
      raise types.UsageError(f'transformer.Config.head_size = {self.head_size}: rotary positions want an even number')

  @property
  def padded_vocab(self) -> int:
    """V with padding; ids from `vocab_size` on are never read and have probability 0."""
    return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

  def to_json(self) -> dict[str, Any]:
    """The arguments that make an equal configuration."""
    return dataclasses.asdict(self)


@struct.dataclass
class KVCache:
  """Keys and values of what has been read, and how much that is.

  Attributes:
    k_LBSKH: keys, rotated; slot s of a row is its token s.
    v_LBSKH: values.
    lengths_B: int32, tokens of each row.
  """

  k_LBSKH: types.Array
  v_LBSKH: types.Array
  lengths_B: types.Array


def init_cache(config: Config, rows: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
  """An empty cache for `rows` rows of up to `length` tokens; what is read beyond that is lost."""
  shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_size)
  place = lambda x: sharding.constrain(x, 'layers', 'batch', None, None, None)
  return KVCache(place(jnp.zeros(shape, dtype)), place(jnp.zeros(shape, dtype)), jnp.zeros(rows, jnp.int32))


def _rms_norm(x_BTD, scale_D, eps: float):
  """Computes x / sqrt(mean(x^2) + eps) * scale in float32. Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467."""
  wide = x_BTD.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
  return (normed * scale_D[None, None, :]).astype(x_BTD.dtype)


def _param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> types.Array:
  """A float32 parameter whose axes have logical names."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table_VD, ids_BT):
  """Rows of a float32 table in `dtype`, gathered over the mesh in `dtype`."""
  return jnp.take(sharding.constrain(table_VD.astype(dtype), 'vocab', None), ids_BT, axis=0)


def _look_up_forward(dtype, table_VD, ids_BT):
  return _look_up(dtype, table_VD, ids_BT), (table_VD, ids_BT)


def _look_up_backward(dtype, kept, d_BTD):
  # In float32: of a frequent token's thousands of small terms, 16-bit sums would lose most.
  table_VD, ids_BT = kept
  d_VD = jnp.zeros_like(table_VD).at[ids_BT].add(d_BTD.astype(table_VD.dtype))
  return sharding.constrain(d_VD, 'vocab', 'embed'), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _einsum(spec: str, x_BT, weight):
  """`jnp.einsum` of tokens `[B, T, ...]` and a weight.

  Tokens are one axis in it, so that the gradient of the weight sums over one: over two, XLA for CPUs first transposes
  both operands in memory. Where the mesh splits rows, the axes cannot be merged in place.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and sharding.parts(mesh, 'length') > 1:
    return jnp.einsum(spec, x_BT, weight)
  B, T = x_BT.shape[:2]
  out = jnp.einsum(spec.replace('BT', 'T'), x_BT.reshape(B * T, *x_BT.shape[2:]), weight)
  return out.reshape(B, T, *out.shape[1:])


class Block(nn.Module):
  """One layer: attention, then the feed-forward half, each on a normed copy and added to what it read.

  Attributes:
    config: sizes.
    dtype: of the computation.
    attention: one of `attention.KERNELS`.
  """

  config: Config
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, carry, rotations, segments_BT):
    """Takes and returns (hidden states, cache or None, number of the layer), as `nn.scan` wants."""
    x_BTD, cache, layer = carry
    a_BTD, cache = self._attend(self._norm('attn_norm', x_BTD), cache, layer, rotations, segments_BT)
    x_BTD = sharding.constrain(x_BTD + a_BTD, 'batch', 'length', 'hidden')
    x_BTD = x_BTD + self._feed_forward(self._norm('mlp_norm', x_BTD))
    return (sharding.constrain(x_BTD, 'batch', 'length', 'hidden'), cache, layer + 1), None

  def _attend(self, x_BTD, cache, layer, rotations, segments_BT):
    c = self.config
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_size
    q = _einsum('BTD,DNH->BTNH', x_BTD, self._weight('q', (D, N, H), ('embed', 'heads', 'head_size'), D))
    k = _einsum('BTD,DKH->BTKH', x_BTD, self._weight('k', (D, K, H), ('embed', 'kv_heads', 'head_size'), D))
    v = _einsum('BTD,DKH->BTKH', x_BTD, self._weight('v', (D, K, H), ('embed', 'kv_heads', 'head_size'), D))
    q, k = rotary.rotate(q, rotations), rotary.rotate(k, rotations)
    if cache is None:
      out = attention_lib.attend(self.attention, q, k, v, segments_BT)
    else:
      out, cache = _attend_cached(q, k, v, cache, layer)
    o = self._weight('o', (N, H, D), ('heads', 'head_size', 'embed'), N * H)
    return _einsum('BTNH,NHD->BTD', out, o), cache

  def _feed_forward(self, x_BTD):
    D, F = self.config.embed_dim, self.config.mlp_dim
    gate = _einsum('BTD,DF->BTF', x_BTD, self._weight('gate', (D, F), ('embed', 'mlp'), D))
    up = _einsum('BTD,DF->BTF', x_BTD, self._weight('up', (D, F), ('embed', 'mlp'), D))
    return _einsum('BTF,FD->BTD', jax.nn.silu(gate) * up, self._weight('down', (F, D), ('mlp', 'embed'), F))

  def _norm(self, name: str, x_BTD):
    scale_D = _param(self, name, nn.initializers.ones, (self.config.embed_dim,), ('norm',))
    return _rms_norm(x_BTD, scale_D, self.config.norm_eps)

  def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int):
    return _param(self, name, nn.initializers.normal(fan_in**-0.5), shape, axes).astype(self.dtype)


def _attend_cached(q_BTNH, k_BTKH, v_BTKH, cache: KVCache, layer):
  """Writes the new keys and values behind those of each row and attends to all of them."""
  T = q_BTNH.shape[1]
  rows_BT = jnp.arange(q_BTNH.shape[0])[:, None]
  slots_BT = cache.lengths_B[:, None] + jnp.arange(T)[None, :]
  write = lambda old, new: old.at[layer, rows_BT, slots_BT].set(
      new.astype(old.dtype), mode='drop', indices_are_sorted=True, unique_indices=True
  )
  cache = dataclasses.replace(cache, k_LBSKH=write(cache.k_LBSKH, k_BTKH), v_LBSKH=write(cache.v_LBSKH, v_BTKH))
  allowed_BTS = jnp.arange(cache.k_LBSKH.shape[2])[None, None, :] <= slots_BT[:, :, None]
  read = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).astype(q_BTNH.dtype)
  return attention_lib.dense(q_BTNH, read(cache.k_LBSKH), read(cache.v_LBSKH), allowed_BTS), cache


class Transformer(nn.Module):
  """The model.

  Attributes:
    config: sizes.
    dtype: of the computation; parameters are float32.
    remat: a key of REMAT.
    attention: one of `attention.KERNELS`, for whole sequences; with a cache attention is dense.
  """

  config: Config
  dtype: Any = jnp.float32
  remat: str = 'none'
  attention: str = 'xla'

  @nn.compact
  def __call__(self, inputs_BT, positions_BT, segments_BT, cache: KVCache | None = None):
    """Reads tokens and returns what the head reads.

    Args:
      inputs_BT: int32 ids.
      positions_BT: int32, from 0 in each segment.
      segments_BT: int32; 0 is padding. With a cache a row is one segment, and tokens of segment 0 can only follow its
        last: they are not counted in its length.
      cache: None reads whole sequences; otherwise the tokens follow those in the cache.

    Returns:
      Hidden states after the final norm, `[B, T, D]`; with a cache, these and the new cache.
    """
    c = self.config
    embed_VD = _param(self, 'embed', nn.initializers.normal(0.02), (c.padded_vocab, c.embed_dim), ('vocab', 'embed'))
    if not c.tie_embeddings:
      _param(self, 'head', nn.initializers.normal(0.02), (c.embed_dim, c.padded_vocab), ('embed', 'vocab'))
    if c.reward_head:
      _param(self, 'reward_head', nn.initializers.zeros, (c.embed_dim, 1), ('embed', 'one'))
    x_BTD = sharding.constrain(_look_up(self.dtype, embed_VD, inputs_BT), 'batch', 'length', 'hidden')
    policy = REMAT[self.remat]
    layers = nn.scan(
        Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=c.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, self.dtype, self.attention, name='layers')
    # The cache is carried, not scanned: as a scanned output it would exist twice.
    rotations = rotary.rotations(positions_BT, c.head_size, c.rope_theta)
    (x_BTD, cache, _), _ = layers((x_BTD, cache, 0), rotations, segments_BT)
    x_BTD = _rms_norm(x_BTD, _param(self, 'final_norm', nn.initializers.ones, (c.embed_dim,), ('norm',)), c.norm_eps)
    if cache is None:
      return x_BTD
    return x_BTD, dataclasses.replace(cache, lengths_B=cache.lengths_B + jnp.sum(segments_BT > 0, axis=1))


def output_matrix(params: types.PyTree) -> types.Array:
  """The matrix `[D, V]` from hidden states to logits: the head, or the transposed embedding."""
  return params['head'] if 'head' in params else params['embed'].T


def build(
    config: Config,
    mesh: jax.sharding.Mesh,
    *,
    dtype: jax.typing.DTypeLike = 'float32',
    remat: str = 'none',
    attention: str | None = None,
    length: int,
) -> Transformer:
  """The model for programs on `mesh`.

  Args:
    config: sizes.
    mesh: see `attention.pick`.
    dtype: of the computation.
    remat: a key of REMAT.
    attention: one of `attention.KERNELS`; None picks it.
    length: tokens of a row.

  Raises:
    UsageError: a name is unknown, or rows are longer than the model's context.
  """
  if remat not in REMAT:
    raise types.UsageError(f'recipe.Recipe.remat = {remat!r}: it is one of {", ".join(REMAT)}')
  if dtype not in ('float32', 'bfloat16', 'float16'):
    raise types.UsageError(f"recipe.Recipe.dtype = {dtype!r}: it is 'float32', 'bfloat16' or 'float16'")
  if attention is not None and attention not in attention_lib.KERNELS:
    raise types.UsageError(f'recipe.Recipe.attention = {attention!r}: it is one of {", ".join(attention_lib.KERNELS)}')
  if length > config.max_length:
    raise types.UsageError(
        f'loader.Packing.row_length = {length}: the context of the model is {config.max_length} tokens'
    )
  name = attention or attention_lib.pick(mesh, dtype, head_size=config.head_size, length=length)
  return Transformer(config, jnp.dtype(dtype), remat, name)


def _init_fn(model: Transformer) -> Callable[[jax.Array], types.PyTree]:
  """Makes the parameters, boxed with the logical names of their axes, from a key."""
  one = np.zeros((1, 1), np.int32)  # a single token, which no kernel but XLA takes
  plain = dataclasses.replace(model, attention='xla')
  return lambda key: plain.init(key, one, one, one)['params']


def abstract_params(model: Transformer, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Shapes, dtypes and shardings of the parameters.

  Raises:
    UsageError: the mesh does not divide an axis; the message names both.
  """
  # Nothing may run: the mesh may be of devices that are not there.
  boxed = jax.eval_shape(_init_fn(model), jax.eval_shape(lambda: jax.random.key(0)))
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(place, nn.unbox(boxed), sharding.shardings_of(mesh, boxed))


def init_params(model: Transformer, key: jax.Array, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Random normal parameters, made where they lie; their deviation is 1/sqrt(fan-in), 0.02 of embedding and head."""
  where = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
  return jax.jit(lambda key: nn.unbox(_init_fn(model)(key)), out_shardings=where)(key)


def flops_per_token(config: Config, length: int) -> float:
  """FLOPs of training on a token, forward and backward, in rows of `length`: what utilisation is measured by.

    6 * (matrix parameters) + 12 * L * N * H * length / 2

  Recomputation does not count, nor what the causal mask discards. Chowdhery et al., 2022,
  https://arxiv.org/abs/2204.02311, App. B.
  """
  D, N, K, H, F = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_size, config.mlp_dim
  layer = D * H * (2 * N + 2 * K) + 3 * D * F
  return 6 * (config.num_layers * layer + D * config.vocab_size) + 6 * config.num_layers * N * H * length
