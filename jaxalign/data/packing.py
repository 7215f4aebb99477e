"""The global plan of an epoch: which record comes when, and in which row of which micro-batch it lies.

Everything here is a pure function of lengths, seed and epoch, so every host computes the same plan, and a run resumes at
(epoch, step) without replaying anything. Two functions: `order` draws the records of an epoch, `pack` puts them in rows.

Arrays of a plan carry the suffix `_P`: one entry per placed sequence, sorted by micro-batch and row.
"""

import bisect
from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxalign import types


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where each sequence of an epoch lies.

  Attributes:
    records_P: int64, the record of each sequence.
    slots_P: int32, which of the record's K responses it is.
    groups_P: int32, the number of its group within the micro-batch: 0, 1, ... in order of appearance.
    rows_P: int32, its row within the micro-batch; sequences of a row stand in the order in which they are placed.
    starts_M: int64 [M + 1]; micro-batch m owns entries `starts_M[m]:starts_M[m + 1]`, possibly none. M is a multiple of
      the micro-batches of a step.
  """

  records_P: np.ndarray
  slots_P: np.ndarray
  groups_P: np.ndarray
  rows_P: np.ndarray
  starts_M: np.ndarray

  @property
  def num_micro_batches(self) -> int:
    return len(self.starts_M) - 1


def draws_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
  """How many records an epoch draws from each source.

  An epoch has as many draws as the sources have records together (up to rounding), shared out by weight; for a single
  source, or for weights proportional to the sizes, that is every record once. Each source is drawn from at least once.
  """
  total = sum(sizes)
  return [max(1, round(total * weight / sum(weights))) for weight in weights]


def _permutation(seed: int, source: int, cycle: int, size: int) -> np.ndarray:
  # Sorting raw generator output: NumPy promises the bit stream for ever, but not what Generator.permutation makes of it.
  bits = np.random.Philox(np.random.SeedSequence([seed & (2**64 - 1), source, cycle]))
  return np.argsort(bits.random_raw(size), kind='stable')


def _draw(size: int, start: int, stop: int, seed: int, source: int) -> np.ndarray:
  """Draws `start:stop` of a source whose n-th draw is entry n % size of its permutation number n // size."""
  parts = []
  for cycle in range(start // size, -(-stop // size)):
    low, high = max(start - cycle * size, 0), min(stop - cycle * size, size)
    parts.append(_permutation(seed, source, cycle, size)[low:high])
  return np.concatenate(parts)


def order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
  """The records of an epoch, in the order in which they are drawn.

  Source i's n-th draw since the start of the run is `permutation(seed, i, n // size)[n % size]`, so a source is read
  through before any record of it comes again, across epochs too. The sources are interleaved evenly: every stretch of
  an epoch holds them in nearly their weights.

  Args:
    sizes: records per source, all positive.
    weights: one positive number per source; only their ratios matter.
    seed: any integer.
    epoch: from 0.

  Returns:
    int64 indices into the concatenation of the sources.
  """
  counts = draws_per_epoch(sizes, weights)
  offsets = np.cumsum([0, *sizes[:-1]])
  drawn = [
      offset + _draw(size, epoch * count, (epoch + 1) * count, seed, i)
      for i, (offset, size, count) in enumerate(zip(offsets, sizes, counts))
  ]
  # The j-th of a source's n draws comes at time (j + 1/2) / n; ties go to the earlier source.
  times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
  return np.concatenate(drawn)[np.argsort(times, kind='stable')]


class _Window:
  """The next groups of the order that are not placed yet, at most `size` of them.

  Narrow groups (that fit in one row) can be taken by age or by length; wide ones only by age.
  """

  def __init__(self, totals: np.ndarray, wide: np.ndarray, size: int):
    self._totals = totals.tolist()
    self._wide = wide.tolist()
    self._size = size
    self._next = 0
    self._by_length: list[int] = []  # total * N + (N - 1 - position): the last entry below a bound is long, then old
    self._ages: dict[int, None] = {}  # positions of narrow groups, oldest first
    self.wide_ages: list[int] = []
    self.refill()

  def __len__(self) -> int:
    return len(self._ages) + len(self.wide_ages)

  def _key(self, position: int) -> int:
    count = len(self._totals)
    return self._totals[position] * count + count - 1 - position

  def refill(self) -> None:
    while self._next < len(self._totals) and len(self) < self._size:
      if self._wide[self._next]:
        self.wide_ages.append(self._next)
      else:
        self._ages[self._next] = None
        bisect.insort(self._by_length, self._key(self._next))
      self._next += 1

  def oldest(self) -> int | None:
    """The position of the oldest narrow group."""
    return next(iter(self._ages), None)

  def longest(self, free: int) -> int | None:
    """The position of the longest narrow group of at most `free` tokens, the oldest among equals."""
    count = len(self._totals)
    i = bisect.bisect_left(self._by_length, (free + 1) * count) - 1
    return None if i < 0 else count - 1 - self._by_length[i] % count

  def take(self, position: int) -> None:
    del self._ages[position]
    del self._by_length[bisect.bisect_left(self._by_length, self._key(position))]


def _spread(lengths: Sequence[int], bins: int, row_length: int, max_responses: int) -> list[int] | None:
  """First-fit-decreasing of a wide group's sequences into `bins` empty rows; the row of each, or None if they lack."""
  free, used, rows = [row_length] * bins, [0] * bins, [0] * len(lengths)
  for slot in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
    row = next((b for b in range(bins) if free[b] >= lengths[slot] and used[b] < max_responses), None)
    if row is None:
      return None
    free[row] -= lengths[slot]
    used[row] += 1
    rows[slot] = row
  return rows


def _fill(window: _Window, lengths: np.ndarray, limit: int, rows: int, row_length: int, max_responses: int):
  """Takes groups from the window for one micro-batch: a list of (position, rows of its K sequences).

  A row is opened with the oldest group that is left, then topped up with the longest ones that fit.
  """
  group_size = lengths.shape[1]
  free, used = [row_length] * rows, [0] * rows
  placed: list[tuple[int, list[int]]] = []
  for row in range(rows):
    while len(placed) < limit:
      window.refill()
      position = window.oldest() if not used[row] else window.longest(free[row])
      wide = window.wide_ages[0] if window.wide_ages and not used[row] else None
      if wide is not None and (position is None or wide < position):
        spread = _spread(lengths[wide].tolist(), rows - row, row_length, max_responses)
        if spread is not None:
          window.wide_ages.pop(0)
          placed.append((wide, [row + r for r in spread]))
          for r, length in zip(spread, lengths[wide].tolist()):
            free[row + r] -= length
            used[row + r] += 1
          continue
      if position is None or used[row] + group_size > max_responses:
        break
      window.take(position)
      placed.append((position, [row] * group_size))
      free[row] -= int(lengths[position].sum())
      used[row] += group_size
  return placed


def pack(
    lengths_NK: np.ndarray,
    records: np.ndarray,
    *,
    rows: int,
    row_length: int,
    max_responses: int,
    micro_batches: int = 1,
    groups_per_step: int | None = None,
    window: int = 64,
) -> Packing:
  """Packs groups into rows of micro-batches; every entry of `records` is placed exactly once.

  A group that fits in a row lies in one row; a longer one is spread over rows of one micro-batch. Rows are filled from
  the next `window` groups that are not placed yet: the oldest opens a row, the longest that fit close it. So no group
  waits for more than `window` rows, and the order is changed only within that distance.

  Args:
    lengths_NK: token slots of each sequence of each record.
    records: what to place (indices into `lengths_NK`), in this order; a record may come several times.
    rows: rows of a micro-batch.
    row_length: token slots of a row.
    max_responses: the most sequences that a row may hold.
    micro_batches: micro-batches of a step.
    groups_per_step: closes a step once it holds so many groups; its remaining rows and micro-batches stay empty.
    window: how many groups are looked at, at least 1; more pack better and change the order more.

  Raises:
    UsageError: a sequence does not fit in a row, or a group not in a micro-batch.
  """
  records = np.asarray(records)
  lengths = np.asarray(lengths_NK)[records]
  group_size = lengths.shape[1]
  wide = (lengths.sum(axis=1) > row_length) | (group_size > max_responses)
  _check_fit(lengths, records, wide, rows, row_length, max_responses)
  waiting = _Window(lengths.sum(axis=1), wide, window)
  positions: list[int] = []
  placed_rows: list[int] = []
  counts: list[int] = []
  while len(waiting):
    left = groups_per_step or len(records)
    for _ in range(micro_batches):
      placed = _fill(waiting, lengths, left, rows, row_length, max_responses)
      for position, of_rows in placed:
        positions.append(position)
        placed_rows.extend(of_rows)
      counts.append(len(placed))
      left -= len(placed)
      waiting.refill()
  return _as_packing(records[positions], np.array(placed_rows, np.int32), np.array(counts), group_size)


def _check_fit(lengths, records, wide, rows, row_length, max_responses) -> None:
  for position in np.flatnonzero((lengths > row_length).any(axis=1))[:1]:
    raise types.UsageError(
        f'record {records[position]} has a sequence of {lengths[position].max()} tokens, rows have {row_length};'
        ' raise the row length or truncate'
    )
  for position in np.flatnonzero(wide):
    if _spread(lengths[position].tolist(), rows, row_length, max_responses) is None:
      raise types.UsageError(
          f'record {records[position]} has {lengths.shape[1]} responses of {lengths[position].sum()} tokens together, which'
          f' do not fit in a micro-batch of {rows} rows of {row_length} tokens; raise the rows or the row length'
      )


def _as_packing(records: np.ndarray, rows_P: np.ndarray, counts: np.ndarray, group_size: int) -> Packing:
  """Expands groups to sequences, sorted by (micro-batch, row)."""
  starts = np.concatenate([[0], np.cumsum(counts * group_size)]).astype(np.int64)
  micro_P = np.repeat(np.arange(len(counts)), counts * group_size)
  first_P = np.repeat(starts[:-1] // group_size, counts * group_size)
  groups_P = np.repeat(np.arange(len(records)), group_size) - first_P
  slots_P = np.tile(np.arange(group_size), len(records))
  by_row = np.lexsort((rows_P, micro_P))
  return Packing(
      np.repeat(records, group_size).astype(np.int64)[by_row],
      slots_P.astype(np.int32)[by_row],
      groups_P.astype(np.int32)[by_row],
      rows_P[by_row],
      starts,
  )
