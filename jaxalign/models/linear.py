"""Parameters with named axes, and the product with a weight: in its precision, with bias and adapter."""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import lora as lora_lib
from jaxalign.models import quant


def param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> types.Array:
  """A float32 parameter whose axes have logical names."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, dtype: Any):
  """A weight, kept in whatever precision, in that of the computation; at first normal of deviation 1 / sqrt(fan-in)."""
  return quant.part(param(module, name, nn.initializers.normal(fan_in**-0.5), shape, axes), dtype, axes)


def project(
    module: nn.Module,
    name: str,
    x_BT,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    bias: bool,
    dtype: Any,
    lora: lora_lib.Lora | None,
):
  """The product of tokens `[B, T, ...]` with the weight `name`, over all but B and T; it may have bias and adapter.

  Args:
    module: whose parameters these are.
    name: of the weight; its bias is `name_bias`, its adapter `name_lora_a`, ...
    x_BT: the tokens.
    shape: of the weight, inputs first.
    axes: logical names of its axes.
    bias: whether there is one.
    dtype: of the computation.
    lora: what is adapted, None for nothing.
  """
  ins = x_BT.ndim - 2
  w = weight(module, name, shape, axes, math.prod(shape[:ins]), dtype)
  out = _product(x_BT, w)
  if lora is not None and name in lora.targets:
    out = _adapted(module, name, x_BT, w, out, axes, lora)
  if bias:
    b = param(module, f'{name}_bias', nn.initializers.zeros, shape[ins:], axes[ins:]).astype(dtype)
    out = out + jnp.expand_dims(b, (0, 1))
  return out


def _adapted(module, name: str, x_BT, w, out, axes: tuple[str, ...], lora: lora_lib.Lora):
  """What the adapter makes of `out`, the product with the weight; see `lora.Lora`."""
  shape, ins = w.shape, x_BT.ndim - 2
  fan_in = math.prod(shape[:ins])
  uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
  a = param(module, f'{name}_lora_a', uniform, (*shape[:ins], lora.rank), (*axes[:ins], 'rank'))
  b = param(module, f'{name}_lora_b', nn.initializers.zeros, (lora.rank, *shape[ins:]), ('rank', *axes[ins:]))
  if lora.dropout:
    kept = jax.random.bernoulli(module.make_rng('dropout'), 1 - lora.dropout, x_BT.shape)
    x_BT = jnp.where(kept, x_BT / (1 - lora.dropout), 0).astype(x_BT.dtype)
  low_BTR = _product(x_BT, a.astype(out.dtype))
  out = out + lora.scale * _product(low_BTR, b.astype(out.dtype))
  if not lora.dora:
    return out
  flat = w.reshape(fan_in, -1), a.reshape(fan_in, -1), b.reshape(lora.rank, -1)
  norms = jax.lax.stop_gradient(lora_lib.column_norms(*flat, lora.scale)).reshape(shape[ins:])
  magnitude = param(module, f'{name}_lora_magnitude', lambda *_: norms, shape[ins:], axes[ins:])
  return out * jnp.expand_dims(magnitude / norms, (0, 1)).astype(out.dtype)


def _product(x_BT, weight):
  """Sums over the further axes of tokens `[B, T, ...]` and the first of a weight, in their order.

  In another, as of `jnp.einsum`, XLA for CPUs transposes both in memory. For the same reason tokens are one axis: the
  gradient of the weight sums over it. Where the mesh splits rows, the axes cannot be merged in place.
  """
  over = functools.partial(jnp.tensordot, axes=x_BT.ndim - 2, precision=types.precision(x_BT))
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and sharding.parts(mesh, 'length') > 1:
    return over(x_BT, weight)
  B, T = x_BT.shape[:2]
  out = over(x_BT.reshape(B * T, *x_BT.shape[2:]), weight)
  return out.reshape(B, T, *out.shape[1:])
