"""Sums and means under a mask, and the way between rows of tokens and the table of groups."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign import types


class Weighted(NamedTuple):
  """A mean that has not been taken yet, so that micro-batches, devices and batches can be added exactly."""

  sum: types.Array
  weight: types.Array

  def mean(self) -> types.Array:
    """Sum / weight, and 0 where nothing was weighed."""
    return self.sum / jnp.maximum(self.weight, jnp.finfo(jnp.float32).tiny)


def weighted(x: types.Array, weight: types.Array) -> Weighted:
  """The weighted sum of `x` and the sum of `weight`, broadcast to `x`; an entry of weight 0 cannot leak a NaN."""
  weight = jnp.broadcast_to(weight, x.shape)
  return Weighted(jnp.sum(jnp.where(weight > 0, x * weight, 0.0)), jnp.sum(weight))


def per_response(x_BT: types.Array, batch: types.Batch) -> types.Array:
  """Sums `x_BT` over the counted targets of each response of each row: `[B, S]`, 0 where a response slot is unused."""
  slots = jnp.arange(batch.group_BS.shape[-1])
  belongs_BTS = batch.responses_BT[..., None] == slots[None, None, :]
  counted_BT = jnp.where(batch.mask_BT > 0, x_BT * batch.mask_BT, 0.0)
  # A compare and a reduction fuse into one pass; nothing with three axes is stored.
  return jnp.sum(jnp.where(belongs_BTS, counted_BT[..., None], 0.0), axis=1)


def to_table(x_BS: types.Array, batch: types.Batch) -> types.Array:
  """Scatters one value per response into the table of groups: `[G, K]`, 0 where the table is empty."""
  # Negative indices would wrap round; G is out of bounds and dropped.
  group_BS = jnp.where(batch.group_BS < 0, batch.num_groups, batch.group_BS)
  table_GK = jnp.zeros((batch.num_groups, batch.group_size), x_BS.dtype)
  return table_GK.at[group_BS, batch.slot_BS].add(x_BS, mode='drop')


def valid_groups(batch: types.Batch) -> types.Array:
  """`[G]` float32: 1 where all K responses of the group are in the micro-batch, 0 where the table is empty."""
  return jnp.min(to_table(jnp.ones(batch.group_BS.shape, jnp.float32), batch), axis=1)
