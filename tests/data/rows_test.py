"""Tests of how placed groups become arrays."""

import types as pytypes

import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import packing
from jaxalign.data import rows

# Prompts [1, 5] and [1]; the second response of the first record is the longer one.
_RECORDS = [
    {'ids': [[1, 5, 6, 2], [1, 5, 7, 8, 2]], 'prompt': 2, 'margin': 0.5},
    {'ids': [[1, 9, 2], [1, 2]], 'prompt': 1, 'margin': 1.5},
]
_SHAPE = rows.Shape(micro_batches=2, rows=2, row_length=8, max_responses=3)


def _place(*entries):
  """Placements of (record, slot, micro, group, row, rank, start, skipped); what is left out is 0."""
  return packing.Placements(*(np.array(column) for column in zip(*((*one, 0)[:8] for one in entries))))


# The first group in one row, the second over two rows of the other micro-batch.
_PLACED = _place((0, 0, 0, 0, 1, 0, 0), (0, 1, 0, 0, 1, 1, 3), (1, 0, 1, 0, 0, 0, 0), (1, 1, 1, 0, 1, 0, 0))


class TestAssemble:

  def test_writes_shifted_sequences_and_their_table(self, token_dataset):
    joined = dataset.Joined([token_dataset(_RECORDS)])
    batch = rows.assemble(joined, _PLACED, shape=_SHAPE, rows=np.arange(2))
    none = [-1] * 8
    np.testing.assert_array_equal(batch.inputs_BT[0], [[0] * 8, [1, 5, 6, 1, 5, 7, 8, 0]])
    np.testing.assert_array_equal(batch.targets_BT[0], [[0] * 8, [5, 6, 2, 5, 7, 8, 2, 0]])
    np.testing.assert_array_equal(batch.mask_BT[0], [[0] * 8, [0, 1, 1, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.positions_BT[0], [[0] * 8, [0, 1, 2, 0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(batch.segments_BT[0], [[0] * 8, [1, 1, 1, 2, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch.responses_BT[0], [none, [-1, 0, 0, -1, 1, 1, 1, -1]])
    np.testing.assert_array_equal(batch.group_BS[0], [[-1, -1, -1], [0, 0, -1]])
    np.testing.assert_array_equal(batch.slot_BS[0], [[-1, -1, -1], [0, 1, -1]])
    np.testing.assert_allclose(batch.labels_BS['margin'][0], [[0, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_array_equal(batch.targets_BT[1], [[9, 2, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.group_BS[1], [[0, -1, -1], [0, -1, -1]])
    np.testing.assert_array_equal(batch.slot_BS[1], [[0, -1, -1], [1, -1, -1]])
    assert (batch.num_groups, batch.group_size, batch.ref_logps_BT) == (3, 2, None)

  def test_writes_a_shared_prompt_once_and_its_last_token_in_each_branch(self, token_dataset):
    records = [{'ids': [[1, 5, 3, 6, 2], [1, 5, 3, 7, 8, 2]], 'prompt': 3, 'margin': 0.5}, _RECORDS[1]]
    joined = dataset.Joined([token_dataset(records)])
    placed = _place((0, 0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 1, 4, 2), (1, 0, 0, 1, 0, 2, 7), (1, 1, 0, 1, 0, 3, 9))
    extra = lambda record, slot: np.array([[[2, 3], [4, 5, 6]], [[7, 8], [9]]][record][slot], np.float32)
    shape = rows.Shape(1, 1, 12, 4, share_prompts=True)
    batch = rows.assemble(joined, placed, shape=shape, rows=np.arange(1), extra=extra)
    np.testing.assert_array_equal(batch.inputs_BT[0, 0], [1, 5, 3, 6, 3, 7, 8, 1, 9, 1, 0, 0])
    np.testing.assert_array_equal(batch.targets_BT[0, 0], [5, 3, 6, 2, 7, 8, 2, 9, 2, 2, 0, 0])
    np.testing.assert_array_equal(batch.mask_BT[0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.positions_BT[0, 0], [0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.segments_BT[0, 0], [1, 1, 1, 1, 1, 1, 1, 3, 3, 4, 0, 0])
    np.testing.assert_array_equal(batch.branches_BT[0, 0], [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 0, 0])
    np.testing.assert_array_equal(batch.responses_BT[0, 0], [-1, -1, 0, 0, 1, 1, 1, 2, 2, 3, -1, -1])
    np.testing.assert_array_equal(batch.ref_logps_BT[0, 0], [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0])
    np.testing.assert_array_equal(batch.group_BS[0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(batch.slot_BS[0, 0], [0, 1, 0, 1])

  def test_puts_a_label_of_tokens_at_each_target_that_counts(self, token_dataset):
    tokens = [{'step': [[0.1, 0.2], [0.3, 0.4, 0.5]]}, {'step': [[0.6, 0.7], [0.8]]}]
    records = [record | {'tokens': values} for record, values in zip(_RECORDS, tokens)]
    batch = rows.assemble(dataset.Joined([token_dataset(records)]), _PLACED, shape=_SHAPE, rows=np.arange(2))
    found_BT = batch.labels_BT['step']
    np.testing.assert_allclose(found_BT[0], [[0] * 8, [0, 0.1, 0.2, 0, 0.3, 0.4, 0.5, 0]])
    np.testing.assert_allclose(found_BT[1], [[0.6, 0.7, *[0] * 6], [0.8, *[0] * 7]])
    assert found_BT.dtype == np.float32

  def test_types_are_those_of_the_layout(self, token_dataset):
    batch = rows.assemble(
        dataset.Joined([token_dataset(_RECORDS)]),
        _PLACED,
        shape=_SHAPE,
        rows=np.arange(2),
        extra=lambda record, slot: np.zeros([[2, 3], [2, 1]][record][slot]),
    )
    for name in ('inputs_BT', 'targets_BT', 'positions_BT', 'segments_BT', 'responses_BT', 'group_BS', 'slot_BS'):
      assert vars(batch)[name].dtype == np.int32
    for array in (batch.mask_BT, batch.ref_logps_BT, batch.labels_BS['margin']):
      assert array.dtype == np.float32

  def test_some_rows_are_the_same_rows_and_read_no_other_groups(self, token_dataset):
    joined = dataset.Joined([token_dataset(_RECORDS)])
    read = []
    spying = _Spy(joined, read)
    whole = rows.assemble(joined, _PLACED, shape=_SHAPE, rows=np.arange(2))
    part = rows.assemble(spying, _PLACED, shape=_SHAPE, rows=np.array([0]))
    np.testing.assert_array_equal(part.targets_BT, whole.targets_BT[:, :1])
    np.testing.assert_array_equal(part.group_BS, whole.group_BS[:, :1])
    assert read == [1]

  def test_extra_lands_on_the_targets_that_count(self, token_dataset):
    values = {(0, 0): [-1.0, -2.0], (0, 1): [-3.0, -4.0, -5.0], (1, 0): [-6.0, -7.0], (1, 1): [-8.0]}
    batch = rows.assemble(
        dataset.Joined([token_dataset(_RECORDS)]),
        _PLACED,
        shape=_SHAPE,
        rows=np.arange(2),
        extra=lambda record, slot: np.array(values[record, slot]),
    )
    np.testing.assert_array_equal(batch.ref_logps_BT[0], [[0] * 8, [0, -1, -2, 0, -3, -4, -5, 0]])
    np.testing.assert_array_equal(batch.ref_logps_BT[1], [[-6, -7, 0, 0, 0, 0, 0, 0], [-8, 0, 0, 0, 0, 0, 0, 0]])

  def test_extra_of_another_length_is_refused_by_record(self, token_dataset):
    with pytest.raises(types.RunError, match=r'data\.jsonl:1: response 1 has 3 targets, but .* shape \(2,\)'):
      rows.assemble(
          dataset.Joined([token_dataset(_RECORDS)]),
          _PLACED,
          shape=_SHAPE,
          rows=np.arange(2),
          extra=lambda record, slot: np.zeros(2),
      )

  def test_extra_that_is_missing_is_refused_by_record(self, token_dataset):
    with pytest.raises(types.RunError, match=r'data\.jsonl:1: no reference log-probabilities of response 0'):
      rows.assemble(
          dataset.Joined([token_dataset(_RECORDS)]),
          _PLACED,
          shape=_SHAPE,
          rows=np.arange(2),
          extra=lambda record, slot: {}[record, slot],
      )


class TestEmpty:

  def test_weighs_nothing_and_belongs_to_no_group(self, token_dataset):
    batch = rows.empty(dataset.Joined([token_dataset(_RECORDS)]), _SHAPE, 2, with_ref=True)
    assert not batch.mask_BT.any() and not batch.segments_BT.any() and not batch.ref_logps_BT.any()
    for array in (batch.responses_BT, batch.group_BS, batch.slot_BS):
      assert (array == -1).all()


class _Spy:
  """A data set that notes what is read from it."""

  def __init__(self, joined, read):
    self._joined, self._read = joined, read
    self.group_size, self.label_names, self.token_label_names = joined.group_size, joined.label_names, ()
    self.free = joined.free

  def __getitem__(self, index):
    self._read.append(index)
    return self._joined[index]


class TestDescribe:

  @pytest.mark.parametrize(
      ('second', 'used', 'places'),
      [((3,), 5, '3-4'), ((3, 1), 4, '0-0 and 3-3')],
      ids=['alone', 'behind a shared prompt'],
  )
  def test_shows_text_with_what_is_predicted_places_and_labels(self, second, used, places, token_dataset):
    joined = dataset.Joined([token_dataset([{'ids': [[1, 2, 3, 4], [1, 2, 5]], 'prompt': 2, 'margin': 0.5}])])
    placed, share = _place((0, 0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 1, *second)), len(second) > 1
    batch = rows.assemble(joined, placed, shape=rows.Shape(1, 1, 8, 2, share), rows=np.arange(1))
    decode = lambda ids, continuation=False, skip_special=True: ''.join(chr(ord('a') + i) for i in ids) + '\n'
    assert rows.describe(batch, pytypes.SimpleNamespace(decode=decode)).splitlines() == [
        f'micro-batch 0, row 0: {used} of 8 slots used',
        '  slots 0-2, 2 predicted: response 0 of group 0, margin 0.5',
        r'    bc\n[[de\n]]',
        f'  slots {places}, 1 predicted: response 1 of group 0, margin 0.5',
        r'    bc\n[[f\n]]',
    ]
