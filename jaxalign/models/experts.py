"""Mixture of experts: each token takes the feed-forward halves that a router picks for it.

Nothing is dropped: tokens are sorted by expert, and grouped products (`models.grouped`) serve those that are here.

Experts are split over the mesh axis `expert`, over which tokens are split too. Devices along it gather each other's
tokens, each computes what its own experts say of them, and the sums go back to where the tokens are:

    all-gather tokens (N D) -> rows of own experts -> sum over the axis, scattered (N D)

Weights do not travel along that axis, and neither do their gradients. Shapes are static: there are buffers for twice
the rows that a device has when all experts are taken equally often; where more come, it takes several turns.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import grouped

_SPARE = 2  # rows of a turn over those that are usual
_LEAST = 1024  # rows below which turns do not pay


def feed_forward(
    x_BTD: types.Array,
    router_DE: types.Array,
    gate_EDF: types.Array,
    up_EDF: types.Array,
    down_EFD: types.Array,
    *,
    config: architecture.Config,
    act: Callable,
    kernel: str = 'ragged_dot',
    taken_BTk: types.Array = None,
) -> types.Array:
  """The weighted sum, over the experts that each token takes, of down(act(gate) * up).

    p = softmax(x . router)        weights: the k largest of p, divided by their sum where `config` says so

  With `taken_BTk` tokens take these experts instead, by the weights that the router gives them; see `free`.

  Shazeer et al., 2017, https://arxiv.org/abs/1701.06538, without noise; Jiang et al., 2024,
  https://arxiv.org/abs/2401.04088, Sec. 2.1. Experts and tokens split over the same devices: Lepikhin et al., 2020,
  https://arxiv.org/abs/2006.16668, Sec. 3, but for its capacity, beyond which tokens are dropped.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # A collective over an axis of one device is not always compiled away.
  split = lambda name: tuple(axis for axis in sharding.axes_of(name) if not mesh.empty and mesh.shape[axis] > 1)
  of_experts, of_mlp, of_embed = split('experts'), split('mlp'), split('embed')
  gather = lambda x, axes, axis=0: jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x
  mix = functools.partial(_mix, config=config, act=act, kernel=kernel)

  def local(of_embed, x_BTD, router_DE, gate_EDF, up_EDF, down_EFD, taken_BTk=None):
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    taken_Nk = None if taken_BTk is None else taken_BTk.reshape(len(x_ND), -1)
    weights_Nk, experts_Nk = _route(x_ND, router_DE, config, taken_Nk)
    tokens = gather(x_ND, of_experts), gather(weights_Nk, of_experts), gather(experts_Nk, of_experts)
    first = jax.lax.axis_index(of_experts) * len(gate_EDF) if of_experts else 0
    weights = gather(gate_EDF, of_embed, 1), gather(up_EDF, of_embed, 1), gather(down_EFD, of_embed, 2)
    out_ND = mix(tokens, first, weights)
    out_ND = jax.lax.psum_scatter(out_ND, of_experts, tiled=True) if of_experts else out_ND
    out_ND = jax.lax.psum(out_ND, of_mlp) if of_mlp else out_ND
    return out_ND.reshape(x_BTD.shape)

  def split_over(of_embed, *args):
    # Of rows that are written a token is read alone, and parameters are made for one row, whatever is split over.
    over = [
        name if size % sharding.parts(mesh, name) == 0 else None for name, size in zip(('batch', 'length'), x_BTD.shape)
    ]
    embed, tokens = 'embed' if of_embed else None, sharding.spec(*over, None)
    wide, narrow = sharding.spec('experts', embed, 'mlp'), sharding.spec('experts', 'mlp', embed)
    specs = tokens, sharding.spec(None, None), wide, wide, narrow, *[tokens] * (len(args) - 5)
    run = functools.partial(local, of_embed)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(*args)

  args = x_BTD, router_DE, gate_EDF, up_EDF, down_EFD, *([] if taken_BTk is None else [taken_BTk])
  if mesh.empty:
    return local((), *args)
  # Weights that get gradients are gathered within, so that these are scattered as they are summed. Those of a reference
  # or while sampling may be whole already; they are not gathered then.
  run = jax.custom_vjp(functools.partial(split_over, ()))
  run.defvjp(lambda *args: jax.vjp(functools.partial(split_over, of_embed), *args), lambda back, d_BTD: back(d_BTD))
  return run(*args)


def number_dtype(config: architecture.Config) -> jnp.dtype:
  """Of numbers of experts, as they are kept."""
  return jnp.dtype(jnp.uint8 if config.num_experts < 256 else jnp.uint16)


def shape_of(config: architecture.Config, tokens: Sequence[int]) -> jax.ShapeDtypeStruct:
  """Of the numbers of the experts that tokens take in all layers, `[..., L, k]`."""
  shape = *tokens, config.num_layers, config.experts_per_token
  return jax.ShapeDtypeStruct(shape, number_dtype(config))


def free(dtype: jax.typing.DTypeLike) -> int:
  """In place of the number of an expert: the router chooses."""
  return int(jnp.iinfo(dtype).max)


def choose(
    x_BTD: types.Array, router_DE: types.Array, config: architecture.Config, taken_BTk: types.Array = None
) -> types.Array:
  """The experts that each token takes, `[B, T, k]`: those of `taken_BTk`, or those that the router picks."""
  x_ND, dtype = x_BTD.reshape(-1, x_BTD.shape[-1]), number_dtype(config)
  taken_Nk = None if taken_BTk is None else taken_BTk.reshape(len(x_ND), -1)
  _, taken_Nk = _route(x_ND, router_DE, config, taken_Nk)
  return taken_Nk.reshape(*x_BTD.shape[:2], -1).astype(dtype)


def _route(x_ND, router_DE, config: architecture.Config, taken_Nk=None):
  """Weights, float32, and numbers of the experts that each token takes: `[N, k]` both."""
  logits_NE = jnp.matmul(x_ND, router_DE, precision=types.precision(x_ND), preferred_element_type=jnp.float32)
  p_NE = jax.nn.softmax(logits_NE, axis=-1)
  weights_Nk, experts_Nk = jax.lax.top_k(p_NE, config.experts_per_token)
  if taken_Nk is not None:
    experts_Nk = jnp.where(taken_Nk == free(taken_Nk.dtype), experts_Nk, taken_Nk.astype(jnp.int32))
    weights_Nk = jnp.take_along_axis(p_NE, experts_Nk, axis=1)
  if config.normalise_experts:
    weights_Nk = weights_Nk / jnp.sum(weights_Nk, axis=-1, keepdims=True)
  return weights_Nk, experts_Nk


def _mix(tokens, first, weights, *, config: architecture.Config, act: Callable, kernel: str):
  """What the experts that are here, from number `first` on, add to each token: (x, see `_route`), (gate, up, down)."""
  x_ND, weights_Nk, experts_Nk = tokens
  N, k = experts_Nk.shape
  here, E = len(weights[0]), config.num_experts
  own_R = experts_Nk.reshape(-1) - first
  own_R = jnp.where((own_R >= 0) & (own_R < here), own_R, here)
  ends_E = jnp.sum(own_R[:, None] <= jnp.arange(here)[None, :], axis=0)
  usual, most = N * k * here // E, N * min(k, here)
  rows = grouped.rounded(kernel, min(most, max(_LEAST, _SPARE * usual)))
  turns = math.ceil(most / rows)
  # A row is a token and one of its experts. Experts elsewhere come last; rows of none are out of bounds.
  order = jnp.where(jnp.arange(most) < ends_E[-1], jnp.argsort(own_R, stable=True)[:most], N * k)
  order = jnp.pad(order, (0, turns * rows - most), constant_values=N * k)
  product = functools.partial(grouped.product, kernel, usual=usual)

  def turn(start, x_ND, weights_Nk, gate_EDF, up_EDF, down_EFD):
    taken = jax.lax.dynamic_slice_in_dim(order, start, rows)
    sizes_E = jnp.diff(jnp.clip(ends_E - start, 0, rows), prepend=0)
    read = _read(N, x_ND, taken // k)
    weight = jnp.take(weights_Nk.reshape(-1), taken, mode='fill', fill_value=0).astype(x_ND.dtype)
    # Weighed before the last product, whose result the backward pass then need not compute again.
    hidden = act(product(read, gate_EDF, sizes_E)) * product(read, up_EDF, sizes_E) * weight[:, None]
    return _added(N, product(hidden, down_EFD, sizes_E), taken // k)

  args = x_ND, weights_Nk, *weights
  if turns == 1:
    return turn(0, *args)
  # What turns read is all that they keep for the backward pass: whichever way it goes, there is memory for one.
  turn = jax.checkpoint(turn)
  starts = rows * jnp.arange(turns)
  all_turns = lambda *args: jax.lax.scan(lambda sum_, i: (sum_ + turn(i, *args), None), jnp.zeros_like(x_ND), starts)[0]
  return jax.lax.cond(ends_E[-1] > rows, all_turns, functools.partial(turn, 0), *args)


# Each is the other's gradient. Rows of no token are out of bounds: by `jnp.take` and its gradient they would be made 0,
# for which all rows are read and written again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(count: int, x_ND, tokens_R):
  """The token of each row, of `count`; any for a row of none."""
  return jnp.take(x_ND, tokens_R, axis=0, mode='clip')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _added(count: int, x_RD, tokens_R):
  """The sum of the rows of each of `count` tokens, whatever those of none hold."""
  return jnp.zeros((count, x_RD.shape[1]), x_RD.dtype).at[tokens_R].add(x_RD, mode='drop')


_read.defvjp(
    lambda count, x_ND, tokens_R: (_read(count, x_ND, tokens_R), tokens_R),
    lambda count, tokens_R, d_RD: (_added(count, d_RD, tokens_R), None),
)
_added.defvjp(
    lambda count, x_RD, tokens_R: (_added(count, x_RD, tokens_R), tokens_R),
    lambda count, tokens_R, d_ND: (_read(count, d_ND, tokens_R), None),
)
