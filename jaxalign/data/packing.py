"""The global plan of an epoch: which record comes when, and in which row of which micro-batch it lies.

Everything here is a pure function of lengths, seed and epoch, so every host computes the same plan, and a run resumes
at (epoch, step) without replaying anything. `order` draws the records of an epoch, `pack` puts them in rows.
"""

import bisect
from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxalign import types


@dataclasses.dataclass(frozen=True)
class Placements:
  """Where sequences lie, sorted by step, micro-batch, row and place in the row; one entry `_P` per sequence.

  Attributes:
    records_P: int64, which record.
    slots_P: int32, which of the record's K responses.
    micro_P: int32, which micro-batch of its step.
    groups_P: int32, the number of its group within the micro-batch, 0, 1, ...
    rows_P: int32, its row within the micro-batch.
    ranks_P: int32, how many sequences stand before it in the row.
    starts_P: int32, how many token slots they take.
    skipped_P: int32, leading token slots that it has in common with the one before it, and leaves out.
  """

  records_P: np.ndarray
  slots_P: np.ndarray
  micro_P: np.ndarray
  groups_P: np.ndarray
  rows_P: np.ndarray
  ranks_P: np.ndarray
  starts_P: np.ndarray
  skipped_P: np.ndarray

  def __len__(self) -> int:
    return len(self.records_P)

  def __getitem__(self, which: slice | np.ndarray) -> 'Placements':
    return Placements(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Plan:
  """An epoch: step s owns the placements `bounds[s]:bounds[s + 1]`."""

  placements: Placements
  bounds: np.ndarray

  @property
  def num_steps(self) -> int:
    """Steps of the epoch."""
    return len(self.bounds) - 1

  def step(self, index: int) -> Placements:
    """The placements of a step."""
    return self.placements[self.bounds[index] : self.bounds[index + 1]]


def draws_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
  """How many records an epoch draws from each source.

  An epoch has as many draws as the sources have records together (up to rounding), shared out by weight; for a single
  source, or for weights proportional to the sizes, that is every record once. Each source is drawn from at least once.
  """
  total = sum(sizes)
  return [max(1, round(total * weight / sum(weights))) for weight in weights]


def _permutation(seed: int, source: int, cycle: int, size: int) -> np.ndarray:
  # Raw generator output is sorted: NumPy keeps the bit stream as it is, but not what Generator.permutation makes of it.
  bits = np.random.Philox(np.random.SeedSequence([seed & (2**64 - 1), source, cycle]))
  return np.argsort(bits.random_raw(size), kind='stable')


def _draw(size: int, start: int, stop: int, seed: int, source: int) -> np.ndarray:
  """Draws `start:stop` of a source whose n-th draw is entry n % size of its permutation number n // size."""
  parts = []
  for cycle in range(start // size, -(-stop // size)):
    low, high = max(start - cycle * size, 0), min(stop - cycle * size, size)
    parts.append(_permutation(seed, source, cycle, size)[low:high])
  return np.concatenate(parts)


def in_turn(sizes: Sequence[int], weights: Sequence[float], seed: int, start: int, count: int) -> list[int]:
  """Records number `start` and on of epochs that follow one another, each in an order of its own, see `order`."""
  found, per_epoch = list[int](), sum(draws_per_epoch(sizes, weights))
  while len(found) < count:
    epoch, first = divmod(start + len(found), per_epoch)
    found += order(sizes, weights, seed, epoch)[first : first + count - len(found)].tolist()
  return found


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


class DoesNotFit(types.UsageError):
  """A record is too long for the rows there are."""

  def __init__(self, record: int, problem: str):
    super().__init__(problem)
    self.record = int(record)


class _Window:
  """The next groups of the order that are not placed yet, at most `size` of them.

  Narrow groups (that fit in one row) can be taken by age or by length; wide ones only by age. `totals` are their slots.
  """

  def __init__(self, totals: np.ndarray, wide: np.ndarray, size: int):
    self.totals = totals.tolist()
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
    count = len(self.totals)
    return self.totals[position] * count + count - 1 - position

  def refill(self) -> None:
    while self._next < len(self.totals) and len(self) < self._size:
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
    count = len(self.totals)
    i = bisect.bisect_left(self._by_length, (free + 1) * count) - 1
    return None if i < 0 else count - 1 - self._by_length[i] % count

  def take(self, position: int) -> None:
    del self._ages[position]
    del self._by_length[bisect.bisect_left(self._by_length, self._key(position))]


def slots_of(lengths_NK: np.ndarray, shared_N: np.ndarray | int) -> np.ndarray:
  """Token slots that groups take in a row each, where their sequences share the first `shared_N`."""
  return shared_N + np.maximum(lengths_NK - np.expand_dims(shared_N, -1), 0).sum(axis=-1)


def _spread(lengths: Sequence[int], shared: int, bins: int, row_length: int, most: int) -> dict[int, list[int]] | None:
  """First-fit-decreasing of a wide group's sequences into `bins` empty rows: of each row which, or None if they lack.

  The first of a row brings what they share.
  """
  free = [row_length - shared] * bins
  found: dict[int, list[int]] = {row: [] for row in range(bins)}
  for slot in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
    own = max(lengths[slot] - shared, 0)
    row = next((b for b in range(bins) if free[b] >= own and len(found[b]) < most), None)
    if row is None:
      return None
    free[row] -= own
    found[row].append(slot)
  return {row: slots for row, slots in found.items() if slots}


def _fill(window: _Window, lengths: np.ndarray, shared: np.ndarray, limit: int, rows: int, row_length: int, most: int):
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
        spread = _spread(lengths[wide].tolist(), int(shared[wide]), rows - row, row_length, most)
        if spread is not None:
          window.wide_ages.pop(0)
          of_slots = [0] * group_size
          for r, slots in spread.items():
            free[row + r] -= int(slots_of(lengths[wide, slots], shared[wide]))
            used[row + r] += len(slots)
            for slot in slots:
              of_slots[slot] = row + r
          placed.append((wide, of_slots))
          continue
      if position is None or used[row] + group_size > most:
        break
      window.take(position)
      placed.append((position, [row] * group_size))
      free[row] -= window.totals[position]
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
    shared_N: np.ndarray | None = None,
) -> Plan:
  """Packs groups into rows of micro-batches; every entry of `records` is placed exactly once.

  A group that fits in a row lies in one row; a longer one is spread over rows of one micro-batch. Rows are filled from
  the next `window` groups that are not placed yet: the oldest opens a row, the longest that fit close it. The oldest
  of all is the first of a micro-batch, so none waits for ever, and none comes more than `window` groups early.

  Args:
    lengths_NK: token slots of each sequence of each record.
    records: what to place (indices into `lengths_NK`), in this order; a record may come several times.
    rows: rows of a micro-batch.
    row_length: token slots of a row.
    max_responses: the most sequences that a row may hold.
    micro_batches: micro-batches of a step.
    groups_per_step: closes a step once it holds so many groups; its remaining rows and micro-batches stay empty.
    window: how many groups are looked at, at least 1; more pack better and change the order more.
    shared_N: leading token slots that the sequences of each record have in common, and that a row has once; None where
      each has its own.

  Raises:
    DoesNotFit: a sequence is longer than a row, or a group than a micro-batch.
  """
  records = np.asarray(records, np.int64)
  lengths = np.asarray(lengths_NK)[records]
  shared = np.zeros(len(records), np.int64) if shared_N is None else np.asarray(shared_N, np.int64)[records]
  totals, group_size = slots_of(lengths, shared), lengths.shape[1]
  wide = (totals > row_length) | (group_size > max_responses)
  _check_fit(lengths, shared, records, wide, rows, row_length, max_responses)
  waiting = _Window(totals, wide, window)
  positions: list[int] = []
  placed_rows: list[int] = []
  counts: list[int] = []
  while len(waiting):
    left = groups_per_step or len(records)
    for _ in range(micro_batches):
      placed = _fill(waiting, lengths, shared, left, rows, row_length, max_responses)
      for position, of_rows in placed:
        positions.append(position)
        placed_rows.extend(of_rows)
      counts.append(len(placed))
      left -= len(placed)
      waiting.refill()
  return _as_plan(records[positions], placed_rows, counts, lengths[positions], shared[positions], micro_batches)


def _check_fit(lengths_NK, shared_N, records, wide, rows, row_length, max_responses) -> None:
  for position in np.flatnonzero((lengths_NK > row_length).any(axis=1)):
    longest = lengths_NK[position].max()
    raise DoesNotFit(records[position], f'a sequence of {longest} tokens does not fit in rows of {row_length}')
  for position in np.flatnonzero(wide):
    lengths = lengths_NK[position].tolist()
    if _spread(lengths, int(shared_N[position]), rows, row_length, max_responses) is None:
      raise DoesNotFit(
          records[position],
          f'its {len(lengths)} responses, {sum(lengths)} tokens with their prompts, do not fit in a micro-batch of'
          f' {rows} rows of {row_length} tokens and {max_responses} responses',
      )


def _as_plan(
    records: np.ndarray,
    rows: list[int],
    counts: list[int],
    lengths_NK: np.ndarray,
    shared_N: np.ndarray,
    micro_batches: int,
) -> Plan:
  """Expands placed groups to sequences in the order of `Placements`.

  Args:
    records: the groups' records, micro-batch by micro-batch.
    rows: K rows per group.
    counts: groups per micro-batch.
    lengths_NK: of the groups.
    shared_N: likewise.
    micro_batches: micro-batches of a step.
  """
  group_size = lengths_NK.shape[1]
  rows_P = np.array(rows, np.int32)
  micro_P = np.repeat(np.arange(len(counts)), np.array(counts, np.int64) * group_size)
  firsts = np.cumsum([0, *counts])
  groups_P = np.repeat(np.arange(len(records)), group_size) - firsts[micro_P]
  slots_P = np.tile(np.arange(group_size), len(records))
  by_row = np.lexsort((rows_P, micro_P))
  rows_P, micro_P, groups_P = rows_P[by_row], micro_P[by_row], groups_P[by_row]
  opens_P, follows_P = np.ones(len(rows_P), bool), np.zeros(len(rows_P), bool)
  opens_P[1:] = (np.diff(rows_P) != 0) | (np.diff(micro_P) != 0)
  follows_P[1:] = ~opens_P[1:] & (np.diff(groups_P) == 0)
  lengths_P = lengths_NK.reshape(-1)[by_row].astype(np.int64)
  skipped_P = np.where(follows_P, np.minimum(np.repeat(shared_N, group_size)[by_row], lengths_P), 0)
  opener_P = np.flatnonzero(opens_P)[np.cumsum(opens_P) - 1]
  before_P = np.cumsum(lengths_P - skipped_P) - (lengths_P - skipped_P)
  placements = Placements(
      np.repeat(records, group_size).astype(np.int64)[by_row],
      slots_P.astype(np.int32)[by_row],
      (micro_P % micro_batches).astype(np.int32),
      groups_P.astype(np.int32),
      rows_P,
      (np.arange(len(rows_P)) - opener_P).astype(np.int32),
      (before_P - before_P[opener_P]).astype(np.int32),
      skipped_P.astype(np.int32),
  )
  return Plan(placements, firsts[::micro_batches] * group_size)
