"""From placed groups to the arrays of a batch, and from those to words."""

from collections.abc import Callable
from collections.abc import Sequence
import itertools
import operator
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import examples
from jaxalign.data import packing
from jaxalign.data import tokenizers

# (record, slot) -> float32, one number per target that counts
ExtraFn = Callable[[int, int], np.ndarray]


class Shape(NamedTuple):
  """Sizes of a step's batch: `[micro_batches, rows, row_length]`, with S = `max_responses`.

  `share_prompts` says whether a prompt stands once for all of its responses in a row.
  """

  micro_batches: int
  rows: int
  row_length: int
  max_responses: int
  share_prompts: bool = False


def empty(dataset: dataset_lib.Joined, shape: Shape, num_rows: int, with_ref: bool) -> types.Batch:
  """A batch of `num_rows` of the rows, without any sequence: it weighs nothing."""
  tokens = shape.micro_batches, num_rows, shape.row_length
  responses = shape.micro_batches, num_rows, shape.max_responses
  return types.Batch(
      inputs_BT=np.zeros(tokens, np.int32),
      targets_BT=np.zeros(tokens, np.int32),
      mask_BT=np.zeros(tokens, np.float32),
      positions_BT=np.zeros(tokens, np.int32),
      segments_BT=np.zeros(tokens, np.int32),
      responses_BT=np.full(tokens, -1, np.int32),
      group_BS=np.full(responses, -1, np.int32),
      slot_BS=np.full(responses, -1, np.int32),
      labels_BS={name: np.zeros(responses, np.float32) for name in dataset.label_names},
      labels_BT={name: np.zeros(tokens, np.float32) for name in dataset.token_label_names},
      ref_logps_BT=np.zeros(tokens, np.float32) if with_ref else None,
      branches_BT=np.zeros(tokens, np.int32) if shape.share_prompts and dataset.group_size > 1 else None,
      experts_BTLk=None if dataset.free is None else np.tile(dataset.free, (*tokens, 1, 1)),
      num_groups=max(1, shape.rows * shape.max_responses // dataset.group_size),
      group_size=dataset.group_size,
  )


def assemble(
    dataset: dataset_lib.Joined,
    placements: packing.Placements,
    *,
    shape: Shape,
    rows: np.ndarray,
    extra: ExtraFn | None = None,
) -> types.Batch:
  """Fills rows of a step.

  Args:
    dataset: where the groups are.
    placements: of the step.
    shape: of the whole step.
    rows: which of its rows are wanted, increasing; only their groups are read.
    extra: gives `ref_logps_BT`.

  Returns:
    NumPy arrays `[A, len(rows), ...]`.

  Raises:
    RunError: a group cannot be read, or `extra` fails for it; the message names its record.
  """
  batch = empty(dataset, shape, len(rows), extra is not None)
  index_of = np.full(shape.rows, -1)
  index_of[rows] = np.arange(len(rows))
  group: tuple[int, examples.Group] | None = None
  segment = 0
  for p in np.flatnonzero(index_of[placements.rows_P] >= 0):
    record, slot = int(placements.records_P[p]), int(placements.slots_P[p])
    if group is None or group[0] != record:
      group = record, dataset[record]
    if slot >= len(group[1].sequences):
      continue  # The list is shorter than K.
    sequence, labels = group[1].sequences[slot], group[1].labels
    row = int(placements.micro_P[p]), int(index_of[placements.rows_P[p]])
    start, rank, skipped = (int(x[p]) for x in (placements.starts_P, placements.ranks_P, placements.skipped_P))
    segment = segment if skipped else rank + 1
    _put(batch, (*row, slice(start, start + len(sequence.ids) - 1 - skipped)), segment, rank, sequence, skipped)
    if batch.branches_BT is not None:
      own = start + max(int(dataset.shared_N[record]) - skipped, 0)
      batch.branches_BT[(*row, slice(own, start + len(sequence.ids) - 1 - skipped))] = rank + 1
    batch.group_BS[(*row, rank)] = placements.groups_P[p]
    batch.slot_BS[(*row, rank)] = slot
    for name in dataset.label_names:
      value = labels[name]
      batch.labels_BS[name][(*row, rank)] = value[slot] if isinstance(value, list) else value
    targets = start - skipped + np.flatnonzero(sequence.mask[1:])
    for name in dataset.token_label_names:
      batch.labels_BT[name][(*row, targets)] = sequence.labels[name]
    if extra is not None and batch.ref_logps_BT is not None:
      batch.ref_logps_BT[(*row, targets)] = _extra_of(extra, dataset, record, slot, len(targets))
  return batch


def _put(
    batch: types.Batch,
    slots: tuple[int, int, slice],
    segment: int,
    rank: int,
    sequence: examples.Sequence,
    skipped: int,
) -> None:
  """Writes a sequence, shifted and without the first slots that it leaves out, into slots of a row."""
  mask = sequence.mask[1 + skipped :]
  batch.inputs_BT[slots] = sequence.ids[skipped:-1]
  batch.targets_BT[slots] = sequence.ids[1 + skipped :]
  batch.mask_BT[slots] = mask
  batch.positions_BT[slots] = skipped + np.arange(len(mask))
  batch.segments_BT[slots] = segment
  batch.responses_BT[slots] = np.where(mask, rank, -1)
  if batch.experts_BTLk is not None and sequence.experts is not None:
    batch.experts_BTLk[slots] = sequence.experts[skipped:]


def _extra_of(extra: ExtraFn, dataset: dataset_lib.Joined, record: int, slot: int, count: int) -> np.ndarray:
  try:
    values = np.asarray(extra(record, slot), np.float32)
  except (LookupError, ValueError, OSError) as err:
    raise types.RunError(
        f'{dataset.where(record)}: no reference log-probabilities of response {slot} ({err!r})'
    ) from err
  if values.shape != (count,):
    raise types.RunError(
        f'{dataset.where(record)}: response {slot} has {count} targets, but its reference log-probabilities have shape'
        f' {values.shape}; delete the reference cache'
    )
  return values


def describe(batch: types.Batch, tokenizer: tokenizers.Tokenizer) -> str:
  """The sequences of a step's rows in words: place, tokens, labels and text, what is to be predicted in [[ ]].

  Args:
    batch: `[A, B, ...]`, whole on this host.
    tokenizer: of the batch.
  """
  host = jax.tree.map(np.asarray, batch)
  lines = []
  for a, b in np.ndindex(host.inputs_BT.shape[:2]):
    row = jax.tree.map(operator.itemgetter((a, b)), host)
    used = int(np.count_nonzero(row.segments_BT))
    lines.append(f'micro-batch {a}, row {b}: {used} of {row.segments_BT.size} slots used')
    for rank in np.flatnonzero(row.group_BS >= 0):
      slots = _slots_of(row, int(rank))
      runs = np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1)
      places = ' and '.join(f'{run[0]}-{run[-1]}' for run in runs)
      labels = ''.join(f', {name} {values[rank]:g}' for name, values in row.labels_BS.items())
      counts = slots[row.mask_BT[slots] > 0]
      labels += ''.join(f', {name} {" ".join(f"{x:g}" for x in v[counts])}' for name, v in row.labels_BT.items())
      lines.append(
          f'  slots {places}, {int(row.mask_BT[slots].sum())} predicted: response {row.slot_BS[rank]} of'
          f' group {row.group_BS[rank]}{labels}'
      )
      ids = [row.inputs_BT[slots[0]], *row.targets_BT[slots]]
      lines.append('    ' + _marked(ids, [False, *(row.mask_BT[slots] > 0)], tokenizer))
  return '\n'.join(lines)


def _slots_of(row: types.Batch, rank: int) -> np.ndarray:
  """The token slots of a sequence of a row, those first that it shares with others."""
  if row.branches_BT is None:
    return np.flatnonzero(row.segments_BT == rank + 1)
  (own,) = np.nonzero(row.branches_BT == rank + 1)
  shared = (row.segments_BT == row.segments_BT[own[0]]) & (row.branches_BT == 0)
  return np.concatenate([np.flatnonzero(shared), own])


def _marked(ids: Sequence[int], mask: Sequence[bool], tokenizer: tokenizers.Tokenizer) -> str:
  """The text of ids on one line, runs under the mask in [[ ]]."""
  text, start = '', 0
  for masked, run in itertools.groupby(mask):
    stop = start + len(list(run))
    part = tokenizer.decode(ids[start:stop], continuation=start > 0, skip_special=False)
    text += f'[[{part}]]' if masked else part
    start = stop
  return text.replace('\n', '\\n')
