"""Sums and means under a mask, and the way between rows of tokens and the table of groups."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import types


def _ratio(x: types.Array, weight: types.Array) -> types.Array:
  """Divides, in the precision of the arguments; x, which is then 0, where the weight is 0."""
  return x / (weight + (weight == 0).astype(weight.dtype))


class Weighted(NamedTuple):
  """A mean that has not been taken yet, so that micro-batches, devices and batches can be added exactly."""

  sum: types.Array
  weight: types.Array

  def mean(self) -> types.Array:
    """Sum / weight, and 0 where nothing was weighed."""
    return _ratio(self.sum, self.weight)


class Calibration(NamedTuple):
  """What is added up for an expected calibration error.

  Attributes:
    gap: float32, confidence less accuracy, summed over the predictions of each bin of confidence, bins last.
    count: float32, how many predictions a bin has.
  """

  gap: types.Array
  count: types.Array

  def mean(self) -> types.Array:
    """The error: sum over bins of |sum of gaps| / all predictions. Guo et al., 2017, arXiv:1706.04599, Eq. 3."""
    return _ratio(abs(self.gap).sum(), self.count.sum())


class Largest(NamedTuple):
  """How often each class occurs, `count` with the classes last; its mean is the share of the largest."""

  count: types.Array

  def mean(self) -> types.Array:
    """What always saying the most frequent class would score."""
    return _ratio(self.count.max(), self.count.sum())


Sum = Weighted | Calibration | Largest


def weighted(x: types.Array, weight: types.Array) -> Weighted:
  """The weighted sum of `x` and the sum of `weight`, broadcast to `x`; an entry of weight 0 cannot leak a NaN."""
  weight = jnp.broadcast_to(weight, x.shape)
  return Weighted(jnp.sum(jnp.where(weight > 0, x * weight, 0.0)), jnp.sum(weight))


def per_response(x_BT: types.Array, batch: types.Batch | types.Rows) -> types.Array:
  """Sums `x_BT` over the counted targets of each response of each row: `[B, S]`, 0 where a response slot is unused."""
  slots = jnp.arange(batch.group_BS.shape[-1])
  belongs_BTS = batch.responses_BT[..., None] == slots[None, None, :]
  counted_BT = jnp.where(batch.mask_BT > 0, x_BT * batch.mask_BT, 0.0)
  # A compare and a reduction fuse into one pass; nothing with three axes is stored.
  return jnp.sum(jnp.where(belongs_BTS, counted_BT[..., None], 0.0), axis=1)


def to_table(x_BS: types.Array, batch: types.Batch | types.Rows) -> types.Array:
  """Scatters one value per response into the table of groups: `[G, K]`, 0 where the table is empty."""
  # Negative indices would wrap round; G is out of bounds and dropped.
  group_BS = jnp.where(batch.group_BS < 0, batch.num_groups, batch.group_BS)
  table_GK = jnp.zeros((batch.num_groups, batch.group_size), x_BS.dtype)
  return table_GK.at[group_BS, batch.slot_BS].add(x_BS, mode='drop')


def totals(x_BT: types.Array, batch: types.Batch | types.Rows) -> types.Array:
  """Sums `x_BT` over the counted targets of each response, into the table of groups: `[G, K]`."""
  return to_table(per_response(x_BT, batch), batch)


def valid(batch: types.Batch | types.Rows) -> types.Array:
  """1 where the group has such a response, 0 where the table is empty: `[G, K]` float32."""
  return to_table(jnp.ones(batch.group_BS.shape, jnp.float32), batch)


def valid_groups(batch: types.Batch | types.Rows) -> types.Array:
  """1 for a group, which is never divided between micro-batches, 0 where the table is empty: `[G]` float32."""
  return jnp.max(valid(batch), axis=1)


def to_tokens(x_GK: types.Array, batch: types.Batch | types.Rows) -> types.Array:
  """The value of its response for each target `[B, T]`, 0 for prompts and padding."""
  x_BS = jnp.where(batch.group_BS >= 0, x_GK[batch.group_BS, batch.slot_BS], 0.0)
  belongs_BTS = batch.responses_BT[..., None] == jnp.arange(x_BS.shape[-1])[None, None, :]
  return jnp.sum(jnp.where(belongs_BTS, x_BS[:, None, :], 0.0), axis=2)


def order(batch: types.Batch | types.Rows) -> types.Array:
  """The number of counted targets that come before each one in its response, `[B, T]` float32."""
  before_BT = jnp.cumsum(batch.mask_BT, axis=1) - batch.mask_BT
  belongs_BTS = batch.responses_BT[..., None] == jnp.arange(batch.group_BS.shape[-1])[None, None, :]
  first_BS = jnp.min(jnp.where(belongs_BTS, before_BT[..., None], jnp.inf), axis=1)
  return before_BT - jnp.sum(jnp.where(belongs_BTS, first_BS[:, None, :], 0.0), axis=2)


def merged(batch: types.Batch) -> types.Batch:
  """A stack of micro-batches `[A, B, ...]` as one `[A B, ...]`, whose table holds the groups of all."""
  count = batch.inputs_BT.shape[0]
  first_A = batch.num_groups * jnp.arange(count)
  group_ABS = jnp.where(batch.group_BS < 0, -1, batch.group_BS + first_A[:, None, None])
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), dataclasses.replace(batch, group_BS=group_ABS))
  return dataclasses.replace(flat, num_groups=batch.num_groups * count)


def rows(batch: types.Batch) -> types.Rows:
  """The part of a batch that says which response each token belongs to."""
  return types.Rows(
      batch.mask_BT, batch.responses_BT, batch.group_BS, batch.slot_BS, batch.num_groups, batch.group_size
  )
