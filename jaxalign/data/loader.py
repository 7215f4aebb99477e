"""From tokenised groups to batches on the mesh.

The plan of an epoch (`packing`) is the same on every host; a host reads and copies only the rows that its devices hold.
What has been consumed is two integers, (epoch, step), on any number of hosts and any mesh.
"""

import bisect
from collections.abc import Iterator
from collections.abc import Sequence
import copy
import dataclasses
import functools
import math
import sys
import threading
from typing import Any
from typing import NamedTuple

import grain
import jax
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import rows as rows_lib

# Two batches of each thread wait, so that a slow read does not stop the device.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_KEPT_PLANS = 2

State = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Packing:
  """The shape of a step, the same for all steps of a run.

  Attributes:
    rows: rows of a micro-batch, over all devices.
    row_length: token slots of a row.
    micro_batches: micro-batches of a step.
    max_responses: the most responses in a row; None takes a bound from the data's lengths that hardly ever binds.
    groups_per_step: the most groups in a step; None fills the rows.
    share_prompts: whether the responses of a row to the same prompt share its tokens, which are then read once. Their
      numbers are the same but for rounding.
  """

  rows: int
  row_length: int
  micro_batches: int = 1
  max_responses: int | None = None
  groups_per_step: int | None = None
  share_prompts: bool = False

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if name != 'share_prompts' and value is not None and value < 1:
        raise types.UsageError(f'loader.Packing.{name} = {value}: it must be at least 1')


class Place(NamedTuple):
  """Where a response stands in a step: `targets` are the token slots of row `[micro, row]` that count."""

  record: int
  slot: int
  micro: int
  row: int
  targets: np.ndarray


class Loader:
  """Batches of a mixture of data sets.

  Attributes:
    dataset: all groups, numbered through; record numbers mean its entries.
    packing: the shape of a step.
    row_keys: uint64 [N, K], see `dataset.Dataset.keys_NK`.
    shape: the sizes of batches.
  """

  def __init__(
      self,
      datasets: Sequence[dataset_lib.Dataset],
      weights: Sequence[float],
      *,
      packing: Packing,
      mesh: jax.sharding.Mesh,
      seed: int,
  ):
    """Checks that data, packing and mesh agree.

    Args:
      datasets: with the same number of responses and the same labels.
      weights: shares of the data sets in an epoch, see `packing.order`.
      packing: the shape of a step.
      mesh: where batches go.
      seed: of the order of records.

    Raises:
      UsageError: they do not agree.
    """
    check_mesh(packing, mesh)
    self.dataset = dataset_lib.Joined(datasets)
    self.packing = packing
    self.row_keys = self.dataset.keys_NK
    share = packing.share_prompts
    self._shared_N = self.dataset.shared_N if share else np.zeros_like(self.dataset.shared_N)
    self._totals_N = packing_lib.slots_of(self.dataset.lengths_NK, self._shared_N)
    max_responses = packing.max_responses or self._bound_responses()
    self.shape = rows_lib.Shape(packing.micro_batches, packing.rows, packing.row_length, max_responses, share)
    self._weights, self._mesh, self._seed = list(weights), mesh, seed
    self._extra: rows_lib.ExtraFn | None = None
    self._plans: dict[int, packing_lib.Plan] = {}
    self._num_steps: dict[int, int] = {}
    self._lock = threading.Lock()

  def with_extra(self, extra: rows_lib.ExtraFn) -> 'Loader':
    """The same, whose batches have the `ref_logps_BT` that `extra` gives."""
    other = copy.copy(self)
    other._extra = extra
    return other

  def steps_per_epoch(self, epoch: int) -> int:
    """Steps of an epoch; the number varies a little with the order of the records."""
    return self._num_steps.get(epoch) or self.plan(epoch).num_steps

  def epochs(self, state: State) -> float:
    """A data state as a number of epochs."""
    epoch, step = state
    return epoch + step / self.steps_per_epoch(epoch)

  def packing_report(self) -> dict[str, float]:
    """How well the first epoch packs, by name."""
    plan = self.plan(0)
    records = plan.placements.records_P[plan.placements.slots_P == 0]
    slots = plan.num_steps * self.packing.micro_batches * self.packing.rows * self.packing.row_length
    return {
        'packing/groups': len(records),
        'packing/steps': plan.num_steps,
        'packing/slots_per_group': slots / len(records),
        'packing/used': float(self._totals_N[records].sum() / slots),
    }

  def records_of(self, steps: int) -> np.ndarray:
    """The records that the first `steps` steps of a run read, increasing."""
    found = np.zeros(len(self.dataset), bool)
    epoch = 0
    while steps > 0 and not found.all():
      plan = self.plan(epoch)
      found[plan.placements.records_P[: plan.bounds[min(steps, plan.num_steps)]]] = True
      steps -= plan.num_steps
      epoch += 1
    return np.flatnonzero(found)

  def batches(self, epoch: int = 0, step: int = 0) -> Iterator[tuple[int, int, types.Batch]]:
    """Batches from step `step` of epoch `epoch` on, without end.

    Yields:
      The epoch and step to resume from once the batch has been consumed, and the batch: global arrays `[A, B, ...]`.

    Raises:
      UsageError: the epoch has fewer steps.
      RunError: a record cannot be read; the message names it.
    """
    if step > self.steps_per_epoch(epoch):
      raise types.UsageError(
          f'{step} steps of epoch {epoch} were consumed, but it has {self.steps_per_epoch(epoch)}: data or packing'
          ' have changed since the run began'
      )
    for (after_epoch, after_step), _, batch in self.prefetch(_Epochs(self, epoch, step)):
      yield after_epoch, after_step, batch

  def evaluation_batches(self) -> Iterator[types.Batch]:
    """One pass over all records, in their order but for packing."""
    for _, batch in self.ordered(range(len(self.dataset))):
      yield batch

  def ordered(self, records: Sequence[int]) -> '_Pass':
    """One pass over some records, in their order but for packing; has a length, and yields (placements, batch)."""
    return _Pass(self, np.asarray(records, np.int64))

  def first(self) -> types.Batch:
    """The first batch of a run."""
    return next(self.batches())[-1]

  def places(self, placements: packing_lib.Placements) -> Iterator[Place]:
    """Where the responses of a step stand; `placements` come with the batch from `ordered`."""
    begin_P = placements.starts_P - placements.skipped_P
    for record, slot, micro, row, begin in zip(
        placements.records_P, placements.slots_P, placements.micro_P, placements.rows_P, begin_P
    ):
      sequences = self.dataset[record].sequences
      if slot >= len(sequences):
        continue  # The list is shorter than K.
      mask = sequences[slot].mask
      yield Place(int(record), int(slot), int(micro), int(row), int(begin) + np.flatnonzero(mask[1:]))

  def pack(self, records: np.ndarray) -> packing_lib.Plan:
    """Packs records in this order."""
    pack = self.packing
    try:
      return packing_lib.pack(
          self.dataset.lengths_NK,
          records,
          rows=pack.rows,
          row_length=pack.row_length,
          max_responses=self.shape.max_responses,
          micro_batches=pack.micro_batches,
          groups_per_step=pack.groups_per_step,
          shared_N=self._shared_N,
      )
    except packing_lib.DoesNotFit as err:
      raise types.UsageError(
          f'{self.dataset.where(err.record)}: {err}; raise loader.Packing.rows or row_length'
      ) from err

  def plan(self, epoch: int) -> packing_lib.Plan:
    """The plan of an epoch."""
    with self._lock:
      plan = self._plans.get(epoch)
      if plan is None:
        records = packing_lib.order(self.dataset.sizes, self._weights, self._seed, epoch)
        plan = self.pack(records)
        self._num_steps[epoch] = plan.num_steps
        self._plans = {**dict(list(self._plans.items())[1 - _KEPT_PLANS :]), epoch: plan}
      return plan

  def _bound_responses(self) -> int:
    """A static S that hardly ever closes a row: what one of short sequences (the tenth percentile) holds, up to 64.

    Beyond 64 only where the average row needs it.
    """
    lengths_NK, row_length = self.dataset.lengths_NK, self.packing.row_length
    short, mean = np.percentile(lengths_NK, 10), self._totals_N.mean() / lengths_NK.shape[1]
    generous = min(64, row_length // max(1, int(short)))
    return max(1, generous, lengths_NK.shape[1], math.ceil(1.25 * row_length / max(1.0, mean)))

  def _local_rows(self) -> np.ndarray:
    """The rows that this host's devices hold."""
    place = sharding.named(self._mesh, 'micro', 'batch', 'length')
    shape = self.packing.micro_batches, self.packing.rows, self.packing.row_length
    held = np.zeros(self.packing.rows, bool)
    for index in filter(None, place.addressable_devices_indices_map(shape).values()):
      held[index[1]] = True
    return np.flatnonzero(held)

  def prefetch(self, steps: '_Epochs | _Pass') -> Iterator[tuple[State, packing_lib.Placements, types.Batch]]:
    """Assembles steps in threads, ahead of their use."""
    rows = self._local_rows()
    assemble = functools.partial(rows_lib.assemble, self.dataset, shape=self.shape, rows=rows, extra=self._extra)
    sized = grain.MapDataset.source(steps).map(lambda step: (*step, assemble(step[1])))
    iterator = iter(sized.to_iter_dataset(_READ))
    try:
      for state, placements, batch in iterator:
        yield state, placements, self._to_mesh(batch, rows)
    finally:
      iterator.close()

  def _to_mesh(self, batch: types.Batch, rows: np.ndarray) -> types.Batch:
    """Global arrays of the rows that each host holds."""
    index_of = np.zeros(self.packing.rows, np.int64)
    index_of[rows] = np.arange(len(rows))

    def place(array: np.ndarray, sharded: jax.sharding.Sharding) -> jax.Array:
      def part(index: Any) -> np.ndarray:
        return array[index[0], index_of[index[1]], *index[2:]]

      shape = (array.shape[0], self.packing.rows, *array.shape[2:])
      return jax.make_array_from_callback(shape, sharded, part)

    return jax.tree.map(place, batch, sharding.batch_shardings(self._mesh, batch, stacked=True))


class _Epochs:
  """The steps of all epochs from a data state on, by number."""

  def __init__(self, loader: Loader, epoch: int, step: int):
    self._loader, self._epoch, self._step = loader, epoch, step
    self._ends = [loader.steps_per_epoch(epoch) - step]
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[State, packing_lib.Placements]:
    with self._lock:
      while index >= self._ends[-1]:
        self._ends.append(self._ends[-1] + self._loader.steps_per_epoch(self._epoch + len(self._ends)))
      passed = bisect.bisect_right(self._ends, index)
    epoch = self._epoch + passed
    step = index - self._ends[passed - 1] if passed else index + self._step
    after = (epoch + 1, 0) if step + 1 == self._loader.steps_per_epoch(epoch) else (epoch, step + 1)
    return after, self._loader.plan(epoch).step(step)


class _Pass:
  """The steps of one pass over some records."""

  def __init__(self, loader: Loader, records: np.ndarray):
    self._loader, self._plan = loader, loader.pack(records)

  def __len__(self) -> int:
    return self._plan.num_steps

  def __getitem__(self, index: int) -> tuple[State, packing_lib.Placements]:
    return (0, index + 1), self._plan.step(index)

  def __iter__(self) -> Iterator[tuple[packing_lib.Placements, types.Batch]]:
    for _, placements, batch in self._loader.prefetch(self):
      yield placements, batch


def check_mesh(packing: Packing, mesh: jax.sharding.Mesh) -> None:
  """Raises where rows or tokens cannot be split over the mesh."""
  for name, size, logical in ('rows', packing.rows, 'batch'), ('row_length', packing.row_length, 'length'):
    parts = math.prod(mesh.shape[axis] for axis in sharding.axes_of(logical))
    if size % parts:
      axes = ' x '.join(f'{axis}:{mesh.shape[axis]}' for axis in sharding.axes_of(logical))
      raise types.UsageError(
          f'loader.Packing.{name} = {size}: it is split {parts} ways (--mesh, {axes}); make it a multiple'
      )
