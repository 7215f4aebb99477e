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

Array = Any  # a jax.Array or an np.ndarray: a union would have each operation checked against both
PyTree = Any


def precision(x: Array) -> str | None:
  """Of matrix products with x: 'highest' of float32, whose factors GPUs would round to 10 bits and TPUs to 7."""
  return 'highest' if x.dtype == 'float32' else None


@struct.dataclass
class Batch:
  """Rows of packed sequences, already shifted; a sequence is a prompt and one response.

  A *group* is one prompt with its K responses (1 for demonstrations, 2 for pairs, chosen first). The table `[G, K]` of
  a micro-batch is filled from the rows: response `s` of row `b` stands at `[group_BS[b, s], slot_BS[b, s]]`. A group
  may spread over rows of its micro-batch. Every array leads with its rows, so one sharding serves them all; a whole
  step stacks A micro-batches in front (`[A, B, T]`).

  Attributes:
    inputs_BT: int32 token ids that the model reads.
    targets_BT: int32 token ids that it must predict: `inputs` shifted by one.
    mask_BT: float32, 1 where the target counts, 0 for prompts and padding.
    positions_BT: int32, restarts at 0 in each sequence.
    segments_BT: int32, runs of 1, 2, ... per sequence of a row, or per prompt with the responses that share it; 0 is
      padding. Attention never crosses a segment.
    responses_BT: int32, which of the row's S responses a target belongs to, -1 for prompt and padding.
    group_BS: int32, the group of each response of the row, -1 where unused.
    slot_BS: int32, its place in that group, -1 where unused.
    labels_BS: float32 arrays by name (`margin`, ...), one number per response.
    labels_BT: float32 arrays by name (`step`, ...), one number per target that counts, 0 elsewhere.
    ref_logps_BT: float32 log-probabilities of the targets under the reference, or None before they are attached.
    branches_BT: int32, 0 for what the responses of a segment share, else 1, 2, ... per response of a row: a token sees
      what is shared and its own branch. The last token of the prompt begins each branch. None where none is shared.
    experts_BTLk: the k experts that each token takes in each of L layers, `models.experts.free` where a router chooses;
      None where all routers do.
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
  labels_BT: Mapping[str, Array] = struct.field(default_factory=dict)
  ref_logps_BT: Array = None
  branches_BT: Array = None
  experts_BTLk: Array = None
  num_groups: int = struct.field(pytree_node=False, default=1)
  group_size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Rows:
  """Which response the tokens of packed rows belong to: a part of `Batch`, by the same names."""

  mask_BT: Array
  responses_BT: Array
  group_BS: Array
  slot_BS: Array
  num_groups: int = struct.field(pytree_node=False, default=1)
  group_size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Stats:
  """What a loss may ask of the responses under one model; a field that was not computed is None.

  Attributes:
    logps_BT: float32 log-probability of each target, in nats, 0 where the mask is 0.
    mask_BT: float32, 1 where the target counts.
    logps_GK: sum of `logps_BT` over each response.
    tokens_GK: number of targets that count, per response.
    logratios_GK: of a reference only: sum over the response of (policy log-prob - its log-prob). Summed token by token,
      because the difference of two sums of hundreds of nats loses what is left of float32. It carries the policy's
      gradient.
    rewards_GK: scores of a head with one output, at the last token of each response.
    outputs_GKO: what a head with several outputs makes of the last token of each response.
    scores_BTO: float32 outputs of a head that scores, for every token that was read.
    kl_BT: of a live reference only: the exact divergence KL(reference || policy) between the next-token distributions
      at each target, in nats. It carries the policy's gradient.
    entropy_GK: of a live reference only: sum over the response of the entropy of its next-token distributions, in
      shares of log V, so that a uniform one has 1.
    rival_logps_BT: of the policy: log-probability of another token than the target, drawn from its likeliest.
    entropy_BT: of the policy: entropy of the next-token distribution at each target, in nats. It carries a gradient.
    values_GK: of the policy: the one output of its head that scores, where it has read the prompt.
    sharpness_GK: of the policy: sum over the response of log sum_v p_v^2 of each target, without gradient.
    rows: of the policy: where the responses' tokens are, for losses that weigh tokens (`masked.totals`).
    critic_logps_BT: log-probabilities under a critic that writes, see `recipe.Recipe.critic_writes`.
    valid_GK: of the policy: 1 where the group has such a response, 0 where its list is shorter than others.
    valid_G: of the policy: 1 for a group, 0 where the table of the batch is empty. A loss that reads it is given all
      micro-batches of a step at once: what it does to one group may then depend on the others.
  """

  logps_BT: Array = None
  mask_BT: Array = None
  logps_GK: Array = None
  tokens_GK: Array = None
  logratios_GK: Array = None
  rewards_GK: Array = None
  outputs_GKO: Array = None
  scores_BTO: Array = None
  kl_BT: Array = None
  entropy_GK: Array = None
  rival_logps_BT: Array = None
  entropy_BT: Array = None
  values_GK: Array = None
  sharpness_GK: Array = None
  rows: Any = None
  critic_logps_BT: Array = None
  valid_GK: Array = None
  valid_G: Array = None


@struct.dataclass
class LossOut:
  """What a loss returns: one value per item, never reduced.

  Attributes:
    per_item: `[G]` (a value per group) or `[B, T]` (per token).
    metrics: values by name, each of shape `[G]` or `[G, K]` for groups, `[B, T]` for tokens; averaged as the loss is.
      Of groups also `masked.Weighted` of such values, for means over some of them, and the other sums of `masked`.
    state: the new loss state, the one passed in where the loss has none.
  """

  per_item: Array
  metrics: Mapping[str, Any]
  state: PyTree = ()


class _Failure(Exception):

  def __init__(self, message: str, *, everywhere: bool = False):
    super().__init__(message)
    self.everywhere = everywhere


class UsageError(_Failure):
  """What the user asked for cannot be done as asked; `main` prints the message and exits with 2.

  `everywhere` says of one that was raised whether all processes of the job met it, or what came of it, at one place.
  """


class Preempted(Exception):
  """The machine is taken away, and what was done is saved; `main` exits with 75, at which launchers run it again."""


class RunError(_Failure):
  """The run met something it cannot go on with (data, files, numbers); `main` prints the message and exits with 1.

  For `everywhere` see `UsageError`.
  """
