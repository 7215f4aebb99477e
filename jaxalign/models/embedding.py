"""The look-up of a table of embeddings that is split over a mesh.

Devices of `fsdp` each have some columns of every row, and different tokens. They tell each other which tokens they
want, look up the columns that they have, and exchange those: of an 8B Llama 2,048 tokens are 17 MB, the table 1 GB.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types


class _Axes(NamedTuple):
  """Axes of the mesh with several devices, by what they split."""

  embed: tuple[str, ...]
  vocab: tuple[str, ...]
  tokens: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(dtype, table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """Rows of a table in `dtype`, `[B, T, D]`; its gradient is added up in the precision of the table."""
  axes = _axes(ids_BT.shape)
  if axes is None:
    if table_VD.dtype != dtype:
      # Where this lies is said before it is gathered, or the compiler gathers what it is made of.
      table_VD = sharding.constrain(table_VD.astype(dtype), 'vocab', 'embed')
    return jnp.take(sharding.constrain(table_VD, 'vocab', None), ids_BT, axis=0)
  local = functools.partial(_look_up_local, axes, dtype)
  return _sharded(local, ('vocab', 'embed'), ('batch', 'length'), out=('batch', 'length', None))(table_VD, ids_BT)


def _forward(dtype, table_VD, ids_BT):
  return look_up(dtype, table_VD, ids_BT), (table_VD, ids_BT)


def _backward(dtype, kept, d_BTD):
  # In float32: of a frequent token's thousands of small terms, 16-bit sums would lose most.
  table_VD, ids_BT = kept
  axes = _axes(ids_BT.shape)
  if axes is None:
    d_VD = jnp.zeros_like(table_VD).at[ids_BT].add(d_BTD.astype(table_VD.dtype))
    return sharding.constrain(d_VD, 'vocab', 'embed'), None
  local = functools.partial(_add_local, axes)
  ins = ('vocab', 'embed'), ('batch', 'length'), ('batch', 'length', None)
  return _sharded(local, *ins, out=('vocab', 'embed'))(table_VD, ids_BT, d_BTD), None


look_up.defvjp(_forward, _backward)


def _axes(shape: tuple[int, ...]) -> _Axes | None:
  """What splits table and ids; None where the mesh does not divide these, or a row is one token, as when writing."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or shape[1] == 1:
    return None
  several = lambda *names: tuple(a for name in names for a in sharding.axes_of(name) if mesh.shape[a] > 1)
  parts = [sharding.parts(mesh, name) for name in ('batch', 'length')]
  if any(size % of for size, of in zip(shape, parts)):
    return None
  return _Axes(several('embed'), several('vocab'), several('batch', 'length'))


def _sharded(local, *ins: tuple[str | None, ...], out: tuple[str | None, ...]):
  mesh = jax.sharding.get_abstract_mesh()
  specs = tuple(sharding.spec(*names) for names in ins)
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=sharding.spec(*out), check_vma=False)


def _own(axes: _Axes, table: types.Array, ids: types.Array) -> types.Array:
  """The places in this part of the table of what all want that have the other columns; beyond its end elsewhere."""
  if axes.embed:
    ids = jax.lax.all_gather(ids, axes.embed, axis=0, tiled=True)
  rows = table.shape[0]
  if axes.vocab:
    ids = ids - jax.lax.axis_index(axes.vocab) * rows
  return jnp.where((ids >= 0) & (ids < rows), ids, rows)


def _look_up_local(axes: _Axes, dtype, table, ids):
  found = jnp.take(table.astype(dtype), _own(axes, table, ids), axis=0, mode='fill', fill_value=0)
  if axes.vocab:
    found = jax.lax.psum(found, axes.vocab)  # all but one are 0
  return jax.lax.all_to_all(found, axes.embed, 0, 2, tiled=True) if axes.embed else found


def _add_local(axes: _Axes, table, ids, d):
  if axes.embed:
    d = jax.lax.all_to_all(d, axes.embed, 2, 0, tiled=True)
  d_table = jnp.zeros_like(table).at[_own(axes, table, ids)].add(d.astype(table.dtype), mode='drop')
  others = tuple(a for a in axes.tokens if a not in axes.embed)
  return jax.lax.psum(d_table, others) if others else d_table
