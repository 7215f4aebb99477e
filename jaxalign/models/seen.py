"""What the kernels of attention share: which tokens of a row see which, and how families and layers differ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import types

RESULT = 'attention'  # name of what kernels give, flash aside, and of what splash's backward pass reads beside it
OUT = -1e30  # the logit of what is not seen; finite, so that a row that may see nothing is not NaN


class How(NamedTuple):
  """What differs between families and layers.

  Attributes:
    scale: multiplies the products of queries and keys.
    window: keys that a query sees, its own among them; 0 for all before it.
    softcap: c of c tanh(logit / c); 0 for none. Gemma Team, 2024, https://arxiv.org/abs/2408.00118, Sec. 2.
  """

  scale: float
  window: int = 0
  softcap: float = 0.0


class Seen(NamedTuple):
  """Which tokens of a row see which: those of a segment see those before them, but for other branches than their own.

  Attributes:
    segments_BT: int32, runs of equal numbers; padding is a segment like any other.
    branches_BT: int32 below 1024: 0 for what the branches of a segment share, which comes first, else 1, 2, ...; None
      where a segment is one sequence.
    positions_BT: int32, with `branches_BT`: from 0 in each segment, and on in each branch where what is shared ends.
  """

  segments_BT: types.Array
  branches_BT: types.Array = None
  positions_BT: types.Array = None

  def of(self, at: slice) -> 'Seen':
    """The same of some of the slots."""
    return jax.tree.map(lambda x_BT: x_BT[:, at], self)


def sees(queries: Seen, keys: Seen, window: int = 0) -> types.Array:
  """`[..., T, S]`: which keys are of the query's segment and branch, and with branches of its window, by positions."""
  same_TS = queries.segments_BT[..., :, None] == keys.segments_BT[..., None, :]
  if queries.branches_BT is None:
    return same_TS
  of_keys_1S = keys.branches_BT[..., None, :]
  same_TS &= (of_keys_1S == 0) | (of_keys_1S == queries.branches_BT[..., :, None])
  if window:
    same_TS &= queries.positions_BT[..., :, None] - keys.positions_BT[..., None, :] < window
  return same_TS


def sees_before(queries: Seen, keys: Seen, behind_TS: types.Array, window: int = 0) -> types.Array:
  """`[..., T, S]`: which of them are not behind the query; without branches the window counts slots.

  Args:
    queries: T slots.
    keys: S slots.
    behind_TS: slots from a key to a query, below 0 where the key comes later.
    window: see `How`.
  """
  allowed_TS = behind_TS >= 0
  if window and queries.branches_BT is None:
    allowed_TS &= behind_TS < window
  seen_TS = sees(queries, keys, window)
  return seen_TS & jnp.expand_dims(allowed_TS, range(seen_TS.ndim - 2))
