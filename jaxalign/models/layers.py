"""One layer of a transformer: attention and a feed-forward half, in the ways of its family."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign.models import architecture
from jaxalign.models import attention as attention_lib
from jaxalign.models import experts
from jaxalign.models import flash
from jaxalign.models import kv_cache
from jaxalign.models import linear
from jaxalign.models import lora as lora_lib
from jaxalign.models import rotary
from jaxalign.models import seen as seen_lib

_ACTIVATIONS: dict[str, Callable] = {
    'silu': jax.nn.silu,
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
}

READ = 'read'  # name of what a layer reads

# What the backward pass finds kept of each layer, from most memory to least; numbers are of a token, N H = D. The rest
# is computed again.
#   none       everything: nothing is computed again
#   dots       products with weights, 3 D + 2 K H + 2 F, and D of the flash kernel: again other attention, norms and
#              activations
#   attention  what a layer reads and what attention gives, 2 D: again products with weights, but not the kernels splash
#              and flash
#   full       what a layer reads, D: again everything, a third more products
#   offload    nothing, as what a layer reads goes to the memory of the host and comes back; again as full
REMAT: dict[str, Callable | None] = {
    'none': None,
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(flash.RESULT),
    ),
    'attention': jax.checkpoint_policies.save_only_these_names(seen_lib.RESULT, flash.RESULT),
    'full': jax.checkpoint_policies.nothing_saveable,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[READ],
        offload_src='device',
        offload_dst='pinned_host',
    ),
}


def rms_norm(x, scale, config: architecture.Config):
  """Computes x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, in float32.

  Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.
  """
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
  return (normed * (config.norm_offset + jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1)))).astype(x.dtype)


def norm_init(config: architecture.Config):
  """Makes the norm's factor 1."""
  return nn.initializers.constant(1.0 - config.norm_offset)


class Block(nn.Module):
  """One layer: attention, then the feed-forward half, each added to what it read.

  Attributes:
    config: sizes and ways.
    kind: one of `architecture.LAYER_KINDS`.
    dtype: of the computation.
    attention: one of `attention.KERNELS`.
    experts: one of `grouped.KERNELS`.
    lora: what is adapted, None for nothing.
  """

  config: architecture.Config
  kind: str
  dtype: Any
  attention: str
  experts: str
  lora: lora_lib.Lora | None = None

  @nn.compact
  def __call__(self, carry, rotations, seen: seen_lib.Seen, experts_BTLk):
    """Takes and returns (hidden states, cache or None, number of the layer); `rotations` are by kind of layer.

    Tokens take the experts of `experts_BTLk`, see `Transformer`.
    """
    x_BTD, cache, layer = carry
    x_BTD = jax.ad_checkpoint.checkpoint_name(x_BTD, READ)
    a_BTD, cache = self._attend(self._norm_if('pre', 'attn_norm', x_BTD), cache, layer, rotations, seen)
    a_BTD = self._norm_if('post', 'attn_post_norm', a_BTD)
    x_BTD = sharding.constrain(x_BTD + a_BTD, 'batch', 'length', 'hidden')
    f_BTD, cache = self._feed_forward(self._norm_if('pre', 'mlp_norm', x_BTD), cache, layer, experts_BTLk)
    x_BTD = x_BTD + self._norm_if('post', 'mlp_post_norm', f_BTD)
    return sharding.constrain(x_BTD, 'batch', 'length', 'hidden'), cache, layer + 1

  def _attend(self, x_BTD, cache, layer, rotations, seen: seen_lib.Seen):
    c = self.config
    D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_size
    q = self._project('q', x_BTD, (D, N, H), ('embed', 'heads', 'head_size'), c.qkv_bias)
    k = self._project('k', x_BTD, (D, K, H), ('embed', 'kv_heads', 'head_size'), c.qkv_bias)
    v = self._project('v', x_BTD, (D, K, H), ('embed', 'kv_heads', 'head_size'), c.qkv_bias)
    q, k = self._norm_heads('q_norm', q, 'heads'), self._norm_heads('k_norm', k, 'kv_heads')
    q, k = rotary.rotate(q, rotations[self.kind]), rotary.rotate(k, rotations[self.kind])
    how = seen_lib.How(c.attention_scale, c.window if self.kind == 'local' else 0, c.attn_softcap)
    if cache is None:
      out = attention_lib.attend(self.attention, q, k, v, seen, how)
    else:
      out, cache = kv_cache.attend(self.attention, q, k, v, seen, cache, layer, how)
    axes = 'heads', 'head_size', 'embed'
    return self._project('o', out, (N, H, D), axes, c.out_bias), cache

  def _feed_forward(self, x_BTD, cache, layer, experts_BTLk):
    c = self.config
    D, F, E = c.embed_dim, c.mlp_dim, c.num_experts
    act = _ACTIVATIONS[c.activation]
    if E:
      router = self._weight('router', (D, E), ('embed', 'outputs'), D)
      gate = self._weight('gate', (E, D, F), ('experts', 'embed', 'mlp'), D)
      up = self._weight('up', (E, D, F), ('experts', 'embed', 'mlp'), D)
      down = self._weight('down', (E, F, D), ('experts', 'mlp', 'embed'), F)
      taken_BTk = None
      if experts_BTLk is not None:
        taken_BTk = jax.lax.dynamic_index_in_dim(experts_BTLk, layer, axis=2, keepdims=False)
      if cache is not None and cache.experts_LBKSH is not None:
        taken_BTk = experts.choose(x_BTD, router, c, taken_BTk)
        cache = kv_cache.with_experts(cache, layer, taken_BTk)
      how: dict[str, Any] = {'config': c, 'act': act, 'kernel': self.experts, 'taken_BTk': taken_BTk}
      return experts.feed_forward(x_BTD, router, gate, up, down, **how), cache
    gate = self._project('gate', x_BTD, (D, F), ('embed', 'mlp'), c.mlp_bias)
    up = self._project('up', x_BTD, (D, F), ('embed', 'mlp'), c.mlp_bias)
    return self._project('down', act(gate) * up, (F, D), ('mlp', 'embed'), c.mlp_bias), cache

  def _norm_if(self, place: str, name: str, x_BTD):
    c = self.config
    if c.norms not in (place, 'both'):
      return x_BTD
    return rms_norm(x_BTD, linear.param(self, name, norm_init(c), (c.embed_dim,), ('norm',)), c)

  def _norm_heads(self, name: str, x_BTNH, axis: str):
    c = self.config
    if not c.qk_norm:
      return x_BTNH
    B, T, N, H = x_BTNH.shape
    if c.qk_norm == 'head':
      return rms_norm(x_BTNH, linear.param(self, name, norm_init(c), (H,), ('norm',)), c)
    scale_NH = linear.param(self, name, norm_init(c), (N, H), (axis, 'head_size'))
    return rms_norm(x_BTNH.reshape(B, T, N * H), scale_NH.reshape(-1), c).reshape(x_BTNH.shape)

  def _project(self, name: str, x_BT, shape, axes: tuple[str, ...], bias: bool):
    more = {'bias': bias, 'dtype': self.dtype, 'lora': self.lora}
    return linear.project(self, name, x_BT, shape, axes, **more)

  def _weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int):
    return linear.weight(self, name, shape, axes, fan_in, self.dtype)
