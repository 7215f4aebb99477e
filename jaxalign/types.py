"""The shape legend and the one layout of batches.

Arrays are named with a suffix that spells their axes:

  A  micro-batches of a step     B  rows                    T  target/query tokens
  S  source/key tokens (models); responses per row (batches)
  D  model width                 F  feed-forward width      V  vocabulary (padded)
  N  query heads                 K  key/value heads (models); responses per group (batches)
  H  head size                   L  layers                  G  groups per micro-batch
"""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any


@struct.dataclass
class Batch:
  """Rows of packed sequences, already shifted; a sequence is a prompt and one response.

  A *group* is one prompt with its K responses (1 for demonstrations, 2 for pairs, chosen first). The table `[G, K]` of a
  micro-batch is filled from the rows: response `s` of row `b` stands at `[group_BS[b, s], slot_BS[b, s]]`. A group may
  spread over rows of its micro-batch. Every array leads with its rows, so one sharding serves them all; a whole step
  stacks A micro-batches in front (`[A, B, T]`).

  Attributes:
    inputs_BT: int32 token ids that the model reads.
    targets_BT: int32 token ids that it must predict: `inputs` shifted by one.
    mask_BT: float32, 1 where the target counts, 0 for prompts and padding.
    positions_BT: int32, restarts at 0 in each sequence.
    segments_BT: int32, 1, 2, ... per sequence of a row, 0 is padding; attention never crosses a segment.
    responses_BT: int32, which of the row's S responses a target belongs to, -1 for prompt and padding.
    group_BS: int32, the group of each response of the row, -1 where unused.
    slot_BS: int32, its place in that group, -1 where unused.
    labels_BS: float32 arrays by name (`margin`, ...), one number per response.
    ref_logps_BT: float32 log-probabilities of the targets under the reference, or None before they are attached.
    num_groups: G, static.
    group_size: K, static.
  """

  inputs_BT: Array
  targets_BT: Array
  mask_BT: Array
  positions_BT: Array
  segments_BT: Array
  responses_BT: Array
  group_BS: Array
  slot_BS: Array
  labels_BS: Mapping[str, Array]
  ref_logps_BT: Array | None = None
  num_groups: int = struct.field(pytree_node=False, default=1)
  group_size: int = struct.field(pytree_node=False, default=1)


class UsageError(Exception):
  """What the user asked for cannot be done as asked; `main` prints the message and exits with 2."""


class RunError(Exception):
  """The run met something it cannot go on with (data, files, numbers); `main` prints the message and exits with 1."""
