"""Tests of the plan of an epoch."""

import collections
import time

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxalign.data import packing


def _rows_of(plan, lengths_NK):
  """{(step, micro, row): [(record, slot, group, start, length), ...]} of a plan, in order."""
  rows = collections.defaultdict(list)
  for step in range(plan.num_steps):
    placed = plan.step(step)
    for p in range(len(placed)):
      record, slot = int(placed.records_P[p]), int(placed.slots_P[p])
      key = step, int(placed.micro_P[p]), int(placed.rows_P[p])
      assert placed.ranks_P[p] == len(rows[key])
      rows[key].append((record, slot, int(placed.groups_P[p]), int(placed.starts_P[p]), int(lengths_NK[record, slot])))
  return rows


class TestDrawsPerEpoch:

  def test_one_source_gives_each_record_once(self):
    assert packing.draws_per_epoch([17], [0.3]) == [17]

  def test_shares_are_the_weights(self):
    assert packing.draws_per_epoch([600, 400], [3, 1]) == [750, 250]

  def test_weights_like_the_sizes_give_each_record_once(self):
    assert packing.draws_per_epoch([600, 30], [600, 30]) == [600, 30]

  def test_no_source_is_left_out(self):
    assert packing.draws_per_epoch([10, 10], [1, 1e-9]) == [20, 1]


class TestInTurn:

  @pytest.mark.parametrize(
      'sizes,weights', [([10, 3], [1, 1]), ([4, 3, 3], [1, 1, 1]), ([10, 5], [0.7, 0.3]), ([7], [1])]
  )
  def test_goes_on_with_the_next_epoch_where_one_ends(self, sizes, weights):
    whole = np.concatenate([packing.order(sizes, weights, 5, epoch) for epoch in range(4)]).tolist()
    for start, count in ((0, len(whole)), (1, 3), (sum(sizes) - 2, 4), (sum(sizes), 2)):
      assert packing.in_turn(sizes, weights, 5, start, count) == whole[start : start + count]


class TestOrder:

  def test_one_source_is_a_permutation_in_each_epoch(self):
    for epoch in range(3):
      assert sorted(packing.order([101], [1.0], 7, epoch)) == list(range(101))

  def test_epochs_and_seeds_shuffle_differently(self):
    orders = [tuple(packing.order([50], [1.0], seed, epoch)) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)

  def test_is_the_same_when_asked_again(self):
    np.testing.assert_array_equal(packing.order([9, 5], [0.7, 0.3], 3, 4), packing.order([9, 5], [0.7, 0.3], 3, 4))

  def test_stays_what_it_was_so_that_old_runs_resume(self):
    # Recorded once; a change here breaks the resumption of every run that exists.
    assert packing.order([8], [1.0], 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert packing.order([4, 4], [0.75, 0.25], 1, 2).tolist() == [3, 1, 4, 2, 0, 1, 6, 0]

  def test_weights_hold_over_an_epoch_and_over_any_tenth_of_it(self):
    sizes, weights = [900, 3000, 100], [0.5, 0.3, 0.2]
    drawn = np.searchsorted(np.cumsum(sizes), packing.order(sizes, weights, 0, 0), 'right')
    for part in [drawn, *np.array_split(drawn, 10)]:
      shares = np.bincount(part, minlength=3) / len(part)
      np.testing.assert_allclose(shares, weights, atol=0.01)

  def test_a_source_is_read_through_before_it_repeats_also_across_epochs(self):
    sizes, weights = [30, 70], [0.83, 0.17]
    counts = np.zeros(100, int)
    for epoch in range(7):
      np.add.at(counts, packing.order(sizes, weights, 5, epoch), 1)
      for part in (counts[:30], counts[30:]):
        assert part.max() - part.min() <= 1

  def test_a_source_is_shuffled_anew_when_it_comes_round(self):
    first = [packing.order([20, 20], [1, 1], 0, epoch) for epoch in range(2)]
    assert [list(o[o < 20]) for o in first][0] != [list(o[o < 20]) for o in first][1]


@st.composite
def _cases(draw):
  group_size = draw(st.integers(1, 4))
  row_length = draw(st.integers(8, 40))
  max_responses = draw(st.integers(1, 6))
  rows = draw(st.integers(group_size, 6))  # so that a group fits with one response a row
  count = draw(st.integers(1, 60))
  lengths = draw(
      st.lists(
          st.lists(st.integers(1, row_length), min_size=group_size, max_size=group_size), min_size=count, max_size=count
      )
  )
  options = {
      'rows': rows,
      'row_length': row_length,
      'max_responses': max_responses,
      'micro_batches': draw(st.integers(1, 3)),
      'groups_per_step': draw(st.none() | st.integers(1, 20)),
      'window': draw(st.integers(1, 30)),
  }
  records = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=80))
  return np.array(lengths), records, options


class TestPack:

  @hypothesis.given(_cases())
  @hypothesis.settings(max_examples=150, deadline=None)
  def test_every_response_lies_once_in_a_row_that_holds_it(self, case):
    lengths, records, options = case
    rows = _rows_of(packing.pack(lengths, records, **options), lengths)
    placed = collections.Counter((record, slot) for row in rows.values() for record, slot, *_ in row)
    slots = range(lengths.shape[1])
    assert placed == collections.Counter((record, slot) for record in records for slot in slots)
    for (_, micro, row), entries in rows.items():
      assert micro < options['micro_batches'] and row < options['rows']
      assert len(entries) <= options['max_responses']
      used = 0
      for *_, start, length in entries:
        assert start == used
        used += length
      assert used <= options['row_length']

  @hypothesis.given(_cases())
  @hypothesis.settings(max_examples=150, deadline=None)
  def test_a_group_is_whole_in_one_micro_batch_and_in_one_row_where_it_fits(self, case):
    lengths, records, options = case
    groups = collections.defaultdict(list)
    for (step, micro, row), entries in _rows_of(packing.pack(lengths, records, **options), lengths).items():
      for record, slot, group, *_ in entries:
        groups[step, micro, group].append((record, slot, row))
    for members in groups.values():
      assert len({record for record, _, _ in members}) == 1
      assert sorted(slot for _, slot, _ in members) == list(range(lengths.shape[1]))
      fits = lengths[members[0][0]].sum() <= options['row_length'] and lengths.shape[1] <= options['max_responses']
      assert (len({row for _, _, row in members}) == 1) or not fits
    numbers = collections.defaultdict(set)
    for step, micro, group in groups:
      numbers[step, micro].add(group)
    for found in numbers.values():
      assert found == set(range(len(found)))
      assert len(found) * lengths.shape[1] <= options['rows'] * options['max_responses']

  @hypothesis.given(_cases(), st.data())
  @hypothesis.settings(max_examples=150, deadline=None)
  def test_a_row_has_what_sequences_of_a_group_share_once(self, case, data):
    lengths, records, options = case
    shared = np.array([data.draw(st.integers(0, int(min(of) - 1))) for of in lengths])
    plan = packing.pack(lengths, records, shared_N=shared, **options)
    rows, whole = collections.defaultdict(list), collections.defaultdict(set)
    for step in range(plan.num_steps):
      placed = plan.step(step)
      for p in range(len(placed)):
        rows[step, placed.micro_P[p], placed.rows_P[p]].append(placed[p : p + 1])
    for (step, micro, row), entries in rows.items():
      used, before = 0, None
      for one in entries:
        record, group, length = int(one.records_P[0]), int(one.groups_P[0]), int(lengths[one.records_P, one.slots_P][0])
        assert one.starts_P[0] == used and one.skipped_P[0] == (shared[record] if group == before else 0)
        used, before = used + length - int(one.skipped_P[0]), group
        whole[step, micro, group, record].add(row)
      assert used <= options['row_length'] and len(entries) <= options['max_responses']
    assert sorted(record for *_, record in whole) == sorted(records)
    for (*_, record), of in whole.items():
      once = int(shared[record] + (lengths[record] - shared[record]).sum())
      assert len(of) == 1 or once > options['row_length'] or lengths.shape[1] > options['max_responses']

  @hypothesis.given(_cases())
  @hypothesis.settings(max_examples=100, deadline=None)
  def test_a_step_holds_at_most_the_groups_asked_for(self, case):
    lengths, records, options = case
    plan = packing.pack(lengths, records, **options)
    limit = options['groups_per_step'] or len(records)
    counts = np.diff(plan.bounds) // lengths.shape[1]
    assert counts.max() <= limit and counts.min() >= 1 and counts.sum() == len(records)

  def test_groups_per_step_is_reached_where_there_is_room(self):
    plan = packing.pack(np.full((30, 1), 2), np.arange(30), rows=4, row_length=8, max_responses=8, groups_per_step=7)
    assert (np.diff(plan.bounds)).tolist() == [7, 7, 7, 7, 2]

  @hypothesis.given(_cases())
  @hypothesis.settings(max_examples=100, deadline=None)
  def test_the_oldest_group_opens_each_step_and_none_comes_early_by_more_than_the_window(self, case):
    lengths, _, options = case
    plan = packing.pack(lengths, np.arange(len(lengths)), **options)
    waiting = set(range(len(lengths)))
    for step in range(plan.num_steps):
      placed = plan.step(step)
      micro_0 = placed[placed.micro_P == 0]
      assert min(waiting) in micro_0.records_P
      taken = set(placed.records_P.tolist())
      # The window holds the next groups that wait, refilled as they go.
      reach = sorted(waiting)[: options['window'] + len(taken)]
      assert taken <= set(reach)
      waiting -= taken

  def test_is_the_same_when_asked_again(self):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, (200, 2))
    plans = [packing.pack(lengths, np.arange(200), rows=4, row_length=100, max_responses=9) for _ in range(2)]
    for name in ('records_P', 'slots_P', 'micro_P', 'groups_P', 'rows_P', 'ranks_P', 'starts_P', 'skipped_P'):
      np.testing.assert_array_equal(*(getattr(plan.placements, name) for plan in plans))

  @pytest.mark.parametrize('rows', [8, 16, 32])
  def test_fills_rows_of_pairs_like_those_of_real_data(self, rows):
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(4.3, 0.9, (2000, 1))
    lengths = np.clip(prompts + rng.lognormal(3.6, 0.9, (2000, 2)), 10, 1024).astype(int)
    plan = packing.pack(lengths, rng.permutation(2000), rows=rows, row_length=1024, max_responses=32)
    full = plan.bounds[-2]
    placed = plan.placements[:full]
    used = lengths[placed.records_P, placed.slots_P].sum() / ((plan.num_steps - 1) * rows * 1024)
    assert used > 0.97

  def test_a_hundred_thousand_pairs_take_seconds(self):
    lengths = np.random.default_rng(0).integers(20, 400, (100_000, 2))
    start = time.perf_counter()
    packing.pack(lengths, np.arange(100_000), rows=32, row_length=1024, max_responses=24)
    assert time.perf_counter() - start < 10

  def test_nothing_makes_no_steps(self):
    assert packing.pack(np.ones((3, 2), int), [], rows=1, row_length=8, max_responses=2).num_steps == 0

  def test_a_sequence_longer_than_a_row_is_refused_by_record(self):
    with pytest.raises(packing.DoesNotFit, match='a sequence of 9 tokens does not fit in rows of 8') as caught:
      packing.pack(np.array([[3], [9]]), [0, 1], rows=2, row_length=8, max_responses=2)
    assert caught.value.record == 1

  def test_a_group_longer_than_a_micro_batch_is_refused_by_record(self):
    with pytest.raises(packing.DoesNotFit, match='3 responses, 18 tokens .* 2 rows of 8') as caught:
      packing.pack(np.array([[1, 1, 1], [6, 6, 6]]), [0, 1], rows=2, row_length=8, max_responses=3)
    assert caught.value.record == 1
