"""Parameters with named axes, and the product with a weight: in its precision, with bias and adapter."""

import math
import re
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
    spec: str,
    x_BT,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    bias: bool,
    dtype: Any,
    lora: lora_lib.Lora | None,
):
  """The product of tokens `[B, T, ...]` with the weight `name`, which may have a bias and an adapter.

  Args:
    module: whose parameters these are.
    name: of the weight; its bias is `name_bias`, its adapter `name_lora_a`, ...
    spec: as for `jnp.einsum`, 'BTD,DNH->BTNH'.
    x_BT: the tokens.
    shape: of the weight, inputs first.
    axes: logical names of its axes.
    bias: whether there is one.
    dtype: of the computation.
    lora: what is adapted, None for nothing.
  """
  _, inner, outer = re.split(',|->', spec)
  ins = sum(axis not in outer for axis in inner)
  w = weight(module, name, shape, axes, math.prod(shape[:ins]), dtype)
  out = _einsum(spec, x_BT, w)
  if lora is not None and name in lora.targets:
    out = _adapted(module, name, spec, x_BT, w, out, ins, axes, lora)
  if bias:
    b = param(module, f'{name}_bias', nn.initializers.zeros, shape[ins:], axes[ins:]).astype(dtype)
    out = out + jnp.expand_dims(b, (0, 1))
  return out


def _adapted(module, name: str, spec: str, x_BT, w, out, ins: int, axes: tuple[str, ...], lora: lora_lib.Lora):
  """What the adapter makes of `out`, the product with the weight; see `lora.Lora`."""
  tokens, inner, outer = re.split(',|->', spec)
  shape, fan_in = w.shape, math.prod(w.shape[:ins])
  uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
  a = param(module, f'{name}_lora_a', uniform, (*shape[:ins], lora.rank), (*axes[:ins], 'rank'))
  b = param(module, f'{name}_lora_b', nn.initializers.zeros, (lora.rank, *shape[ins:]), ('rank', *axes[ins:]))
  if lora.dropout:
    kept = jax.random.bernoulli(module.make_rng('dropout'), 1 - lora.dropout, x_BT.shape)
    x_BT = jnp.where(kept, x_BT / (1 - lora.dropout), 0).astype(x_BT.dtype)
  low_BTR = _einsum(f'{tokens},{inner[:ins]}R->BTR', x_BT, a.astype(out.dtype))
  out = out + lora.scale * _einsum(f'BTR,R{inner[ins:]}->{outer}', low_BTR, b.astype(out.dtype))
  if not lora.dora:
    return out
  flat = w.reshape(fan_in, -1), a.reshape(fan_in, -1), b.reshape(lora.rank, -1)
  norms = jax.lax.stop_gradient(lora_lib.column_norms(*flat, lora.scale)).reshape(shape[ins:])
  magnitude = param(module, f'{name}_lora_magnitude', lambda *_: norms, shape[ins:], axes[ins:])
  return out * jnp.expand_dims(magnitude / norms, (0, 1)).astype(out.dtype)


def _einsum(spec: str, x_BT, weight):
  """`jnp.einsum` of tokens `[B, T, ...]` and a weight.

  Tokens are one axis in it, so that the gradient of the weight sums over one: over two, XLA for CPUs first transposes
  both operands in memory. Where the mesh splits rows, the axes cannot be merged in place.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and sharding.parts(mesh, 'length') > 1:
    return jnp.einsum(spec, x_BT, weight, precision=types.precision(x_BT))
  B, T = x_BT.shape[:2]
  flat = x_BT.reshape(B * T, *x_BT.shape[2:])
  out = jnp.einsum(spec.replace('BT', 'T'), flat, weight, precision=types.precision(x_BT))
  return out.reshape(B, T, *out.shape[1:])
