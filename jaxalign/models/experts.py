"""Mixture of experts: each token takes the feed-forward halves that a router picks for it.

Nothing is dropped and nothing padded: tokens are sorted by expert, and one ragged product serves them all. XLA computes
that product for all experts and masks it, on CPUs and, in jax 0.10, on TPUs: k of E products would do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture


def feed_forward(
    x_BTD: types.Array,
    router_DE: types.Array,
    gate_EDF: types.Array,
    up_EDF: types.Array,
    down_EFD: types.Array,
    *,
    config: architecture.Config,
    act: Callable,
) -> types.Array:
  """The weighted sum, over the experts that each token takes, of down(act(gate) * up).

    p = softmax(x . router)        weights: the k largest of p, divided by their sum where `config` says so

  Every device runs the experts for its own tokens and its part of F; where the mesh splits experts, they are gathered.
  Shazeer et al., 2017, https://arxiv.org/abs/1701.06538, without noise; Jiang et al., 2024,
  https://arxiv.org/abs/2401.04088, Sec. 2.1.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in sharding.axes_of('mlp') if not mesh.empty and mesh.shape[axis] > 1)

  def local(x_BTD, *weights):
    out_BTD = _mix(x_BTD.reshape(-1, x_BTD.shape[-1]), *weights, config=config, act=act).reshape(x_BTD.shape)
    return jax.lax.psum(out_BTD, axes) if axes else out_BTD

  args = x_BTD, router_DE, gate_EDF, up_EDF, down_EFD
  if mesh.empty:
    return local(*args)
  tokens, wide = sharding.spec('batch', 'length', None), sharding.spec(None, None, 'mlp')
  specs = tokens, sharding.spec(None, None), wide, wide, sharding.spec(None, 'mlp', None)
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(*args)


def _mix(x_ND, router_DE, gate_EDF, up_EDF, down_EFD, *, config: architecture.Config, act: Callable):
  k = config.experts_per_token
  precision = types.precision(x_ND)
  logits_NE = jnp.matmul(x_ND, router_DE, precision=precision, preferred_element_type=jnp.float32)
  p_NE = jax.nn.softmax(logits_NE, axis=-1)
  weights_Nk, experts_Nk = jax.lax.top_k(p_NE, k)
  if config.normalise_experts:
    weights_Nk = weights_Nk / jnp.sum(weights_Nk, axis=-1, keepdims=True)
  order = jnp.argsort(experts_Nk.reshape(-1), stable=True)
  tokens = order // k
  sizes_E = jnp.bincount(experts_Nk.reshape(-1), length=config.num_experts).astype(jnp.int32)
  read = jnp.take(x_ND, tokens, axis=0)
  product = lambda x, weight: jax.lax.ragged_dot(x, weight, sizes_E, precision=precision)
  said = product(act(product(read, gate_EDF)) * product(read, up_EDF), down_EFD)
  said = said * weights_Nk.reshape(-1)[order][:, None].astype(said.dtype)
  return jnp.zeros_like(x_ND).at[tokens].add(said)
