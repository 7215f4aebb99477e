"""A decoder-only transformer of the Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU, tied or untied head."""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import attention as attention_lib

REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Config:
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

  @property
  def padded_vocab(self) -> int:
    return -(-self.vocab_size // 128) * 128

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


@struct.dataclass
class KVCache:
  k_LBSKH: types.Array
  v_LBSKH: types.Array
  lengths_B: types.Array


def init_cache(config, batch, length, dtype):
  shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_size)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def _rope(x, positions_BT, theta):
  H = x.shape[-1]
  freq = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
  angle = positions_BT.astype(jnp.float32)[..., None] * freq[None, None, :]
  cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(x, scale, eps):
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
  return (y * scale[None, None, :]).astype(x.dtype)


class Block(nn.Module):
  config: Config
  dtype: Any
  attention: str

  @nn.compact
  def __call__(self, carry, positions_BT, segments_BT):
    c = self.config
    x, cache, layer = carry
    p = lambda name, shape, axes, fan: self.param(
        name, nn.with_logical_partitioning(nn.initializers.normal(fan**-0.5), axes), shape, jnp.float32
    ).astype(self.dtype)
    scale = lambda name: self.param(
        name, nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (c.embed_dim,), jnp.float32
    )
    D, N, K, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_size, c.mlp_dim
    h = _norm(x, scale('attn_norm'), c.norm_eps)
    q = jnp.einsum('BTD,DNH->BTNH', h, p('q', (D, N, H), ('embed', 'heads', 'head_size'), D))
    k = jnp.einsum('BTD,DKH->BTKH', h, p('k', (D, K, H), ('embed', 'kv_heads', 'head_size'), D))
    v = jnp.einsum('BTD,DKH->BTKH', h, p('v', (D, K, H), ('embed', 'kv_heads', 'head_size'), D))
    q, k = _rope(q, positions_BT, c.rope_theta), _rope(k, positions_BT, c.rope_theta)
    if cache is None:
      a = attention_lib.attend(self.attention, q, k, v, segments_BT)
    else:
      B, T = positions_BT.shape
      rows, cols = jnp.arange(B)[:, None], cache.lengths_B[:, None] + jnp.arange(T)[None, :]
      ck = cache.k_LBSKH.at[layer, rows, cols].set(k.astype(cache.k_LBSKH.dtype), mode='drop')
      cv = cache.v_LBSKH.at[layer, rows, cols].set(v.astype(cache.v_LBSKH.dtype), mode='drop')
      cache = cache.replace(k_LBSKH=ck, v_LBSKH=cv)
      ok = jnp.arange(ck.shape[2])[None, None, :] <= cols[:, :, None]
      a = attention_lib.dense(q, ck[layer].astype(q.dtype), cv[layer].astype(q.dtype), ok)
    x = x + jnp.einsum('BTNH,NHD->BTD', a, p('o', (N, H, D), ('heads', 'head_size', 'embed'), N * H))
    x = sharding.constrain(x, 'batch', 'length', 'hidden')
    h = _norm(x, scale('mlp_norm'), c.norm_eps)
    g = jnp.einsum('BTD,DF->BTF', h, p('gate', (D, F), ('embed', 'mlp'), D))
    u = jnp.einsum('BTD,DF->BTF', h, p('up', (D, F), ('embed', 'mlp'), D))
    x = x + jnp.einsum('BTF,FD->BTD', jax.nn.silu(g) * u, p('down', (F, D), ('mlp', 'embed'), F))
    x = sharding.constrain(x, 'batch', 'length', 'hidden')
    return (x, cache, layer + 1), None


class Transformer(nn.Module):
  config: Config
  dtype: Any = jnp.float32
  remat: str = 'none'
  attention: str = 'xla'

  @nn.compact
  def __call__(self, inputs_BT, positions_BT, segments_BT, cache=None):
    c = self.config
    embed = self.param(
        'embed',
        nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed')),
        (c.padded_vocab, c.embed_dim),
        jnp.float32,
    )
    if not c.tie_embeddings:
      self.param(
          'head',
          nn.with_logical_partitioning(nn.initializers.normal(0.02), ('embed', 'vocab')),
          (c.embed_dim, c.padded_vocab),
          jnp.float32,
      )
    if c.reward_head:
      self.param(
          'reward_head',
          nn.with_logical_partitioning(nn.initializers.zeros, ('embed', 'one')),
          (c.embed_dim, 1),
          jnp.float32,
      )
    x = sharding.constrain(embed.astype(self.dtype)[inputs_BT], 'batch', 'length', 'hidden')
    block = Block
    if REMAT[self.remat] is not None:
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
    layers = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=c.num_layers,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    (x, cache_out, _), _ = layers(c, self.dtype, self.attention, name='layers')(
        (x, cache, 0), positions_BT, segments_BT
    )
    scale = self.param(
        'final_norm', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (c.embed_dim,), jnp.float32
    )
    x = _norm(x, scale, c.norm_eps)
    if cache is None:
      return x
    lengths = cache.lengths_B + jnp.sum(segments_BT > 0, axis=1)
    return x, cache_out.replace(lengths_B=lengths)


def output_matrix(params):
  return params['head'] if 'head' in params else params['embed'].T


def build(config, mesh, *, dtype='float32', remat='none', length):
  name = attention_lib.pick(sharding.platform_of(mesh), jnp.dtype(dtype), config, length, mesh)
  return Transformer(config, jnp.dtype(dtype), remat, name)


def _boxed(model, key):
  one = jnp.zeros((1, 1), jnp.int32)
  return jax.eval_shape(model.init, key, one, one, one + 1)['params']


def abstract_params(model, mesh):
  boxed = _boxed(model, jax.random.key(0))
  shardings = sharding.shardings_of(mesh, boxed)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings)


def init_params(model, key, mesh):
  one = jnp.zeros((1, 1), jnp.int32)
  where = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh))
  return jax.jit(lambda key: nn.unbox(model.init(key, one, one, one + 1)['params']), out_shardings=where)(key)


def flops_per_token(config, length):
  """Model FLOPs of a training token."""
  D, N, K, H, F = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_size, config.mlp_dim
  layer = D * H * (2 * N + 2 * K) + 3 * D * F
  return 6 * (config.num_layers * layer + D * config.vocab_size) + 6 * config.num_layers * N * H * length
