"""Decoder-only transformers: embedding, layers, and the norm before the head.

Layers of a repeating pattern are scanned, so that a program does not grow with their number. The module returns hidden
states: logits of a whole batch are never made (`logps.token_stats` makes them in chunks).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign import vocab
from jaxalign.models import architecture
from jaxalign.models import attention as attention_lib
from jaxalign.models import embedding
from jaxalign.models import grouped
from jaxalign.models import kv_cache
from jaxalign.models import layers
from jaxalign.models import linear
from jaxalign.models import lora as lora_lib
from jaxalign.models import quant
from jaxalign.models import rotary
from jaxalign.models import seen as seen_lib

DTYPES = ('float32', 'bfloat16', 'float16')


class _Repeat(nn.Module):
  """Layers one behind the other; blocks are named by their number among them."""

  kinds: tuple[str, ...]
  make: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, carry, rotations, seen, experts_BTLk):
    for i, kind in enumerate(self.kinds):
      carry = self.make(kind=kind, name=str(i))(carry, rotations, seen, experts_BTLk)
    return carry, None


class Transformer(nn.Module):
  """The model.

  Attributes:
    config: sizes.
    dtype: of the computation; parameters are float32, but for a frozen base (`lora.Lora.base`).
    remat: a key of `layers.REMAT`.
    kept_logits: MiB a device and pass over targets, of whole chunks that the backward pass does not compute again.
    chunk: targets a device whose logits exist at once beside those that are kept.
    attention: one of `attention.KERNELS`, for whole sequences; behind what is in a cache attention is dense.
    experts: one of `grouped.KERNELS`.
    lora: what is adapted, None for nothing; with dropout `apply` takes `rngs={'dropout': key}`.
    apart: layers have parameters and caches of their own, see `apart`: nothing is copied out of stacks, as scanning
      does on CPUs, but a program grows with the number of layers.
  """

  config: architecture.Config
  dtype: Any = jnp.float32
  remat: str = 'none'
  kept_logits: int = 0
  chunk: int = vocab.CHUNK
  attention: str = 'xla'
  experts: str = 'ragged_dot'
  lora: lora_lib.Lora | None = None
  apart: bool = False

  @property
  def base_dtype(self) -> Any:
    """The precision of parameters that are not trained, and not quantised, where there are adapters; else float32."""
    if self.lora is None:
      return jnp.dtype('float32')
    return jnp.dtype(self.dtype if self.lora.base in ('', *quant.KINDS) else self.lora.base)

  @nn.compact
  def __call__(
      self,
      inputs_BT,
      positions_BT,
      segments_BT,
      cache: kv_cache.Cache | None = None,
      *,
      branches_BT=None,
      experts_BTLk=None,
  ):
    """Reads tokens and returns what the head reads.

    Args:
      inputs_BT: int32 ids.
      positions_BT: int32, from 0 in each segment.
      segments_BT: int32, runs of equal numbers; 0 is padding. With a cache a row is one segment, and tokens of segment
        0 can only follow its last: they are not counted in its length.
      cache: None reads whole sequences; otherwise the tokens follow those in the cache, see `KVCache.mode`.
      branches_BT: int32, of the parts of a segment that share its beginning, see `seen.Seen`; without a cache.
      experts_BTLk: the experts that tokens take in each layer, `experts.free` where its router chooses; None where all
        routers do.

    Returns:
      Hidden states after the final norm, `[B, T, D]`; with a cache, these and the new cache.
    """
    c = self.config
    normal = nn.initializers.normal(0.02)
    embed_VD = linear.param(self, 'embed', normal, (c.padded_vocab, c.embed_dim), ('vocab', 'embed'))
    if not c.tie_embeddings:
      linear.param(self, 'head', normal, (c.embed_dim, c.padded_vocab), ('embed', 'vocab'))
    if c.score_outputs:
      linear.param(self, 'score', nn.initializers.zeros, (c.embed_dim, c.score_outputs), ('embed', 'outputs'))
      if c.score_bias:
        linear.param(self, 'score_bias', nn.initializers.zeros, (c.score_outputs,), ('outputs',))
    x_BTD = sharding.constrain(embedding.look_up(self.dtype, embed_VD, inputs_BT), 'batch', 'length', 'hidden')
    if c.scale_embeddings:
      x_BTD = x_BTD * jnp.asarray(c.embed_dim**0.5, self.dtype)
    seen = seen_lib.Seen(segments_BT, branches_BT, None if branches_BT is None else positions_BT)
    rotations = {kind: rotary.rotations(c, kind, positions_BT) for kind in set(c.kinds)}
    if self.apart:
      caches: Any = cache or [None] * c.num_layers
      found = []
      for i, (block, own) in enumerate(zip(self._layers(), caches, strict=True)):
        taken_BT1k = None if experts_BTLk is None else experts_BTLk[:, :, i : i + 1]
        x_BTD, own, _ = block((x_BTD, own, 0), rotations, seen, taken_BT1k)
        found.append(own)
      cache = cache and tuple(found)
    else:
      # The cache is carried, not scanned: as a scanned output it would exist twice.
      carry = x_BTD, cache, 0
      for part in self._parts():
        carry, _ = part(carry, rotations, seen, experts_BTLk)
      x_BTD, cache, _ = carry
    x_BTD = layers.rms_norm(x_BTD, linear.param(self, 'final_norm', layers.norm_init(c), (c.embed_dim,), ('norm',)), c)
    if cache is None:
      return x_BTD
    return x_BTD, kv_cache.longer(cache, jnp.sum(segments_BT > 0, axis=1))

  def _block(self) -> Callable[..., nn.Module]:
    policy = layers.REMAT[self.remat]
    block = layers.Block if policy is None else nn.remat(layers.Block, policy=policy, prevent_cse=False)
    own = {'dtype': self.dtype, 'attention': self.attention, 'experts': self.experts, 'lora': self.lora}
    return functools.partial(block, config=self.config, **own)

  def _layers(self) -> list[nn.Module]:
    """Each layer."""
    return [self._block()(kind=kind, name=f'layer_{i}') for i, kind in enumerate(self.config.kinds)]

  def _parts(self) -> list[nn.Module]:
    """The repeated pattern of layers, scanned so that a program does not grow with it, and the layers that are left."""
    c, make = self.config, self._block()
    parts: list[nn.Module] = []
    if c.repeats:
      scanned = nn.scan(
          _Repeat,
          variable_axes={'params': 0},
          split_rngs={'params': True, 'dropout': True},
          in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
          length=c.repeats,
          metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      parts.append(scanned(c.pattern, make, name='layers'))
    rest = c.kinds[c.repeats * len(c.pattern) :]
    return [*parts, _Repeat(rest, make, name='rest')] if rest else parts


def output_matrix(params: types.PyTree) -> types.Array:
  """The matrix `[D, V]` from hidden states to logits: the head, or the transposed embedding."""
  return params['head'] if 'head' in params else params['embed'].T


def apart(params: types.PyTree, config: architecture.Config) -> types.PyTree:
  """Parameters as the model `apart` has them, and the embedding as a head where they share it: so read it is faster."""
  rest = {name: x for name, x in params.items() if name not in ('layers', 'rest')}
  found = {'head': output_matrix(params)}
  for i in range(config.num_layers):
    repeat, place = divmod(i, len(config.pattern))
    whole = repeat < config.repeats
    own = params['layers' if whole else 'rest'][str(place)]
    found[f'layer_{i}'] = jax.tree.map(lambda x, repeat=repeat: x[repeat], own) if whole else own
  return rest | found


def scores(params: types.PyTree, hidden_BTD: types.Array) -> types.Array:
  """What the head that scores makes of hidden states, `[B, T, outputs]` float32."""
  wide_BTD, head_DO = hidden_BTD.astype(jnp.float32), params['score'].astype(jnp.float32)
  found_BTO = jnp.einsum('BTD,DO->BTO', wide_BTD, head_DO, precision='highest')
  return found_BTO + params['score_bias'][None, None, :] if 'score_bias' in params else found_BTO


def for_rows(
    model: Transformer, mesh: jax.sharding.Mesh, length: int, *, dtype: str | None = None, **kernels: Any
) -> Transformer:
  """The same model for rows of `length` tokens, computing in `dtype` (None: its own) by kernels as `build` has them."""
  own: dict[str, Any] = {name: getattr(model, name) for name in ('remat', 'kept_logits', 'lora')}
  return build(model.config, mesh, dtype=dtype or model.dtype.name, length=length, **own, **kernels)


def build(
    config: architecture.Config,
    mesh: jax.sharding.Mesh,
    *,
    dtype: jax.typing.DTypeLike = 'float32',
    remat: str = 'none',
    kept_logits: int | None = None,
    attention: str | None = None,
    experts: str | None = None,
    lora: lora_lib.Lora | None = None,
    length: int,
) -> Transformer:
  """The model for programs on `mesh`.

  Args:
    config: sizes.
    mesh: see `attention.pick`.
    dtype: of the computation.
    remat: a key of `layers.REMAT`.
    kept_logits: MiB a device, see `Transformer`; None for 192 on CPUs, where the product with the head takes longer
      than memory does, and 0 elsewhere.
    attention: one of `attention.KERNELS`; None picks it.
    experts: one of `grouped.KERNELS`; None picks it.
    lora: what is adapted, None for nothing.
    length: tokens of a row.

  Raises:
    UsageError: a name is unknown, rows are longer than the model's context, or the model lacks what is to be adapted.
  """
  if remat not in layers.REMAT:
    raise types.UsageError(f'recipe.Recipe.remat = {remat!r}: it is one of {", ".join(layers.REMAT)}')
  if remat == 'offload':
    sharding.check_memory(mesh, 'pinned_host', 'recipe.Recipe.remat')
  if dtype not in DTYPES:
    raise types.UsageError(f'recipe.Recipe.dtype = {dtype!r}: it is one of {", ".join(DTYPES)}')
  for what, kernel, known in (('attention', attention, attention_lib.KERNELS), ('experts', experts, grouped.KERNELS)):
    if kernel is not None and kernel not in known:
      raise types.UsageError(f'recipe.Recipe.{what} = {kernel!r}: it is one of {", ".join(known)}')
    platform = sharding.platform_of(mesh)
    if kernel is not None and platform != (wanted := _PLATFORMS.get(kernel, platform)):
      raise types.UsageError(
          f'recipe.Recipe.{what} = {kernel!r}: it runs on {wanted} alone, and the platform is {platform}'
      )
  if length > config.max_length:
    raise types.UsageError(
        f'loader.Packing.row_length = {length}: the context of the model is {config.max_length} tokens; bind no more'
        f' (--gin=loader.Packing.row_length={config.max_length})'
    )
  heads, cap = config.num_kv_heads, config.attn_softcap
  name = attention or attention_lib.pick(
      mesh, dtype, head_size=config.head_size, kv_heads=heads, length=length, softcap=cap
  )
  if config.num_experts:
    experts = experts or grouped.pick(mesh, dtype, inner=config.embed_dim, outer=config.mlp_dim)
  adapted, kept = lora.of(config) if lora is not None else None, _kept(kept_logits, mesh)
  chunk = _CHUNK.get(sharding.platform_of(mesh), vocab.CHUNK)
  return Transformer(config, jnp.dtype(dtype), remat, kept, chunk, name, experts or 'ragged_dot', adapted)


def _kept(logits: int | None, mesh: jax.sharding.Mesh) -> int:
  if logits is not None and logits < 0:
    raise types.UsageError(f'recipe.Recipe.kept_logits = {logits}: it is a number of MiB, 0 for none')
  return _KEPT.get(sharding.platform_of(mesh), 0) if logits is None else logits


def without_dropout(model: Transformer) -> Transformer:
  """The same model as it is evaluated and sampled from."""
  return dataclasses.replace(model, lora=model.lora and dataclasses.replace(model.lora, dropout=0.0))


def without_adapters(model: Transformer) -> Transformer:
  """The model of the frozen parameters alone."""
  return dataclasses.replace(model, lora=None)


_ONE = np.zeros((1, 1), np.int32)  # a single token, which no kernel but XLA takes
_PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu', 'megablox': 'tpu', 'flash': 'cpu'}  # of kernels that run on one alone
_KEPT = {'cpu': 192}  # MiB of logits, by platform
_CHUNK = {'cpu': 256}  # others want more work for each time that they read the head
_PLAIN: dict[str, Any] = {'attention': 'xla', 'experts': 'ragged_dot'}


def _init_fn(model: Transformer) -> Callable[[jax.Array], types.PyTree]:
  """Makes the parameters, boxed with the logical names of their axes, from a key."""
  plain = without_dropout(dataclasses.replace(model, **_PLAIN))
  return lambda key: plain.init(key, _ONE, _ONE, _ONE)['params']


def abstract_params(
    model: Transformer, mesh: jax.sharding.Mesh, rules: Mapping[str, Sequence[str]] | None = None
) -> types.PyTree:
  """Shapes, dtypes and shardings of the parameters: float32 for what is trained, a frozen base as `model.lora` says.

  Args:
    model: whose they are.
    mesh: where they lie, which need not be there.
    rules: see `sharding.shardings_of`.

  Raises:
    UsageError: the mesh does not divide an axis; the message names both.
  """
  # Nothing may run: the mesh may be of devices that are not there.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # One that does not divide it is told below.
    boxed = jax.eval_shape(_init_fn(model), jax.eval_shape(lambda: jax.random.key(0)))
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  placed = jax.tree.map(place, nn.unbox(boxed), sharding.shardings_of(mesh, boxed, rules))
  if model.lora is None:
    return placed
  trained, frozen = lora_lib.split(placed)
  kept = jax.tree.map(lambda x: x.update(dtype=model.base_dtype), frozen)
  return lora_lib.join(trained, lora_lib.all_kept(kept, model.lora, quant.abstract))


def init_params(model: Transformer, key: jax.Array, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Random normal parameters, without adapters, made where they lie; their deviation is 1/sqrt(fan-in).

  That of the embedding and the head is 0.02.
  """
  plain = without_adapters(model)
  where = jax.tree.map(lambda x: x.sharding, abstract_params(plain, mesh))
  return jax.jit(lambda key: nn.unbox(_init_fn(plain)(key)), out_shardings=where)(key)


def init_adapters(model: Transformer, key: jax.Array, frozen: types.PyTree, mesh: jax.sharding.Mesh) -> types.PyTree:
  """The first adapters of a frozen base, which change nothing, and a zero head that scores where the model has one."""
  where = jax.tree.map(lambda x: x.sharding, lora_lib.split(abstract_params(model, mesh))[0])
  plain = without_dropout(dataclasses.replace(model, **_PLAIN))

  def make(key, frozen):
    _, variables = plain.apply({'params': frozen}, _ONE, _ONE, _ONE, rngs={'params': key}, mutable=['params'])
    return lora_lib.split(nn.unbox(variables['params']))[0]

  return jax.jit(make, out_shardings=where)(key, frozen)
