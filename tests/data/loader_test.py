"""Tests of batches on the mesh."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign import types
from jaxalign.data import loader


def _mesh(devices=8, text=''):
  return sharding.make_mesh(text, devices=jax.devices()[:devices])


def _open(datasets, weights=None, *, mesh=None, seed=0, extra=None, **packing):
  shape = {'rows': 8, 'row_length': 64} | packing
  weights = weights or [1.0] * len(datasets)
  opened = loader.Loader(datasets, weights, packing=loader.Packing(**shape), mesh=mesh or _mesh(), seed=seed)
  return opened if extra is None else opened.with_extra(extra)


def _take(batches, count):
  taken = [(epoch, step, jax.device_get(batch)) for epoch, step, batch in itertools.islice(batches, count)]
  batches.close()
  return taken


def _epoch(opened, epoch=0):
  return [batch for _, _, batch in _take(opened.batches(epoch), opened.steps_per_epoch(epoch))]


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _sequences(batch):
  """{(micro, group, slot): (tokens, trained tokens, label, row)} of a batch, read from its arrays alone."""
  found = {}
  for a, b in np.ndindex(batch.inputs_BT.shape[:2]):
    for s in range(batch.group_BS.shape[-1]):
      if batch.group_BS[a, b, s] < 0:
        assert batch.slot_BS[a, b, s] == -1 and not (batch.segments_BT[a, b] == s + 1).any()
        continue
      at = batch.segments_BT[a, b] == s + 1
      tokens = [int(batch.inputs_BT[a, b][at][0]), *batch.targets_BT[a, b][at].tolist()]
      assert batch.inputs_BT[a, b][at].tolist() == tokens[:-1]
      assert batch.positions_BT[a, b][at].tolist() == list(range(at.sum()))
      counts = batch.responses_BT[a, b] == s
      assert (counts == (at & (batch.mask_BT[a, b] > 0))).all()
      key = a, int(batch.group_BS[a, b, s]), int(batch.slot_BS[a, b, s])
      assert key not in found
      label = float(batch.labels_BS['margin'][a, b, s])
      found[key] = tuple(tokens), tuple(batch.targets_BT[a, b][counts].tolist()), label, b
  return found


def _expected(records):
  return collections.Counter(
      (tuple(ids), tuple(ids[r['prompt'] :]), float(np.float32(r['margin']))) for r in records for ids in r['ids']
  )


class TestPacking:

  @pytest.mark.parametrize('name', ['rows', 'row_length', 'micro_batches', 'max_responses', 'groups_per_step'])
  def test_sizes_must_be_positive(self, name):
    with pytest.raises(types.UsageError, match=rf'loader\.Packing\.{name} = 0: it must be at least 1'):
      loader.Packing(**({'rows': 1, 'row_length': 8} | {name: 0}))


class TestLoader:

  @pytest.mark.parametrize('micro_batches', [1, 3])
  @pytest.mark.parametrize('options', [{}, {'groups_per_step': 9}, {'max_responses': 3}, {'row_length': 40}])
  def test_every_token_of_every_record_is_in_one_batch_of_an_epoch(
      self, token_dataset, random_records, micro_batches, options
  ):
    records = random_records(100)
    opened = _open([token_dataset(records)], micro_batches=micro_batches, **options)
    for epoch in range(2):
      found = collections.Counter()
      for batch in _epoch(opened, epoch):
        found.update(entry[:3] for entry in _sequences(batch).values())
      assert found == _expected(records)

  def test_the_table_of_a_micro_batch_has_whole_groups_of_one_record(self, token_dataset, random_records):
    records = random_records(60, group_size=3)
    record_of = {tuple(ids): (i, k) for i, r in enumerate(records) for k, ids in enumerate(r['ids'])}
    for batch in _epoch(_open([token_dataset(records)], micro_batches=2)):
      members = collections.defaultdict(dict)
      for (micro, group, slot), (tokens, *_) in _sequences(batch).items():
        assert group < batch.num_groups
        members[micro, group][slot] = record_of[tokens]
      for of_group in members.values():
        (record,) = {record for record, _ in of_group.values()}
        assert of_group == {slot: (record, slot) for slot in range(3)}

  def test_a_group_longer_than_a_row_is_spread_over_rows_of_one_micro_batch(self, token_dataset):
    ids = [list(range(100 * k, 100 * k + 30)) for k in range(4)]
    records = [{'ids': ids, 'prompt': 3, 'margin': 0.0}, {'ids': [[1, 2]] * 4, 'prompt': 1, 'margin': 1.0}]
    (batch,) = _epoch(_open([token_dataset(records)], row_length=32))
    found = {(group, slot): (tokens, row) for (_, group, slot), (tokens, _, _, row) in _sequences(batch).items()}
    (wide,) = {group for (group, slot), (tokens, _) in found.items() if len(tokens) == 30}
    assert [list(found[wide, slot][0]) for slot in range(4)] == ids
    assert len({found[wide, slot][1] for slot in range(4)}) == 4

  def test_a_run_resumed_anywhere_goes_on_exactly(self, token_dataset, random_records):
    data = token_dataset(random_records(40))
    straight = _take(_open([data]).batches(), 12)
    assert straight[-1][0] >= 2
    for i, (epoch, step, _) in enumerate(straight[:-1]):
      ((after_epoch, after_step, batch),) = _take(_open([data]).batches(epoch, step), 1)
      assert (after_epoch, after_step) == straight[i + 1][:2]
      _assert_same(batch, straight[i + 1][2])

  def test_states_count_steps_and_epochs(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(40))])
    per_epoch = [opened.steps_per_epoch(epoch) for epoch in range(3)]
    states = [(epoch, step) for epoch, step, _ in _take(opened.batches(), sum(per_epoch))]
    expected = [(e, s) for e in range(3) for s in range(per_epoch[e])]
    assert states == [*expected[1:], (3, 0)]

  def test_a_mixture_keeps_its_weights_and_resumes_exactly(self, token_dataset, random_records):
    first, second = random_records(300, 1, seed=1), random_records(200, 1, seed=2, start=1_000_000)
    data = [token_dataset(first, 'a.jsonl'), token_dataset(second, 'b.jsonl')]
    opened = _open(data, [0.7, 0.3])
    counts = np.zeros(2)
    for batch in _epoch(opened):
      for tokens, *_ in _sequences(batch).values():
        counts[int(tokens[0] >= 1_000_000)] += 1
    np.testing.assert_allclose(counts / counts.sum(), [0.7, 0.3], atol=0.01)
    straight = _take(opened.batches(), opened.steps_per_epoch(0) + 3)
    epoch, step, _ = straight[-3]
    for resumed, going in zip(_take(_open(data, [0.7, 0.3]).batches(epoch, step), 2), straight[-2:], strict=True):
      _assert_same(resumed[2], going[2])

  @pytest.mark.parametrize('text', ['data:8', 'fsdp:4,tensor:2', 'data:2,fsdp:2,context:2'])
  def test_batches_are_the_same_on_any_mesh(self, token_dataset, random_records, text):
    data = token_dataset(random_records(60))
    one = _take(_open([data], mesh=_mesh(1)).batches(0, 1), 4)
    many = _take(_open([data], mesh=_mesh(8, text)).batches(0, 1), 4)
    for a, b in zip(one, many, strict=True):
      assert a[:2] == b[:2]
      _assert_same(a[2], b[2])

  def test_batches_are_laid_out_as_the_table_says(self, token_dataset, random_records):
    mesh = _mesh(8, 'fsdp:4,context:2')
    opened = _open([token_dataset(random_records(60))], mesh=mesh, micro_batches=2)
    batches = opened.batches()
    *_, batch = next(batches)
    batches.close()
    assert batch.inputs_BT.shape == (2, 8, 64)
    wanted = sharding.batch_shardings(mesh, batch, stacked=True)
    jax.tree.map(lambda x, s: None if x.sharding == s else pytest.fail(f'{x.sharding} is not {s}'), batch, wanted)
    assert batch.inputs_BT.addressable_shards[0].data.shape == (2, 2, 32)

  def test_another_seed_is_another_order(self, token_dataset, random_records):
    data = token_dataset(random_records(60))
    ((_, _, a),) = _take(_open([data], seed=0).batches(), 1)
    ((_, _, b),) = _take(_open([data], seed=1).batches(), 1)
    assert (a.inputs_BT != b.inputs_BT).any()

  def test_an_epoch_ends_with_rows_that_weigh_nothing(self, token_dataset, random_records):
    last = _epoch(_open([token_dataset(random_records(5))], micro_batches=3))[-1]
    used = last.segments_BT.any(axis=-1)
    assert used.any() and not used[1:].any()
    assert not last.mask_BT[~used].any()
    assert (last.group_BS[~used] == -1).all() and (last.responses_BT[~used] == -1).all()

  def test_all_batches_of_all_epochs_have_one_static_shape(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(50, longest=60))], row_length=128, micro_batches=2)
    total = jax.jit(lambda batch: batch.mask_BT.sum())
    batches = opened.batches()
    for epoch, _, batch in batches:
      total(batch)
      if epoch == 4:
        break
    batches.close()
    assert total._cache_size() == 1

  def test_extra_becomes_reference_log_probabilities(self, token_dataset, random_records):
    records = random_records(30)
    opened = _open(
        [token_dataset(records)],
        extra=lambda record, slot: -np.array(records[record]['ids'][slot][records[record]['prompt'] :], np.float32),
    )
    for batch in _epoch(opened):
      np.testing.assert_array_equal(batch.ref_logps_BT, -(batch.targets_BT * batch.mask_BT))

  def test_what_fails_in_a_thread_is_told_with_its_record(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(30))], extra=lambda record, slot: np.zeros(1000))
    with pytest.raises(types.RunError, match=r'data\.jsonl:\d+: response \d has \d+ targets'):
      next(opened.batches())

  def test_a_record_that_cannot_be_read_is_named(self, token_dataset, random_records, tmp_path):
    opened = _open([token_dataset(random_records(30))])
    (folder,) = (tmp_path / 'cache').iterdir()
    (folder / 'groups.arrayrecord').write_bytes(b'')
    with pytest.raises(types.RunError, match=r'data\.jsonl:\d+: its tokens cannot be read'):
      next(opened.batches())

  def test_threads_end_when_the_batches_are_left(self, token_dataset, random_records):
    before = set(threading.enumerate())
    batches = _open([token_dataset(random_records(30))]).batches()
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
      time.sleep(0.01)
    assert not set(threading.enumerate()) - before

  def test_a_step_that_the_epoch_does_not_have_is_refused(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(30))])
    with pytest.raises(types.UsageError, match='99 steps of epoch 0 were consumed, but it has'):
      next(opened.batches(0, 99))

  def test_the_end_of_an_epoch_is_the_beginning_of_the_next(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(30))])
    ((*_, a),) = _take(opened.batches(0, opened.steps_per_epoch(0)), 1)
    ((*_, b),) = _take(opened.batches(1, 0), 1)
    _assert_same(a, b)

  @pytest.mark.parametrize(
      ('packing', 'text', 'message'),
      [
          ({'rows': 6}, 'data:8', r'loader\.Packing\.rows = 6: it is split 8 ways'),
          ({'row_length': 63}, 'fsdp:4,context:2', r'loader\.Packing\.row_length = 63: it is split 2 ways'),
      ],
  )
  def test_rows_that_the_mesh_cannot_split_are_refused(self, token_dataset, random_records, packing, text, message):
    with pytest.raises(types.UsageError, match=message):
      _open([token_dataset(random_records(3))], mesh=_mesh(8, text), **packing)

  def test_a_record_too_long_for_the_packing_is_named(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(30, longest=200))])
    with pytest.raises(types.UsageError, match=r'data\.jsonl:\d+: a sequence of \d+ tokens .* rows of 64; raise'):
      opened.steps_per_epoch(0)

  def test_the_bound_on_responses_lets_short_sequences_fill_their_rows(self, token_dataset):
    records = [{'ids': [[1, 2, 3]], 'prompt': 1, 'margin': 0.0}] * 900
    opened = _open([token_dataset(records)], row_length=512)
    assert opened.steps_per_epoch(0) == 1
    assert opened.shape.max_responses * 2 >= 512

  def test_records_of_are_those_that_the_steps_read(self, token_dataset, random_records):
    records = random_records(40)
    record_of = {tuple(ids): i for i, r in enumerate(records) for ids in r['ids']}
    opened = _open([token_dataset(records)], rows=8, row_length=40)
    for steps in (1, 2, opened.steps_per_epoch(0), 1000):
      read = {record_of[t] for _, _, b in _take(opened.batches(), min(steps, 20)) for t, *_ in _sequences(b).values()}
      assert opened.records_of(steps).tolist() == sorted(read)

  def test_epochs_is_a_number_that_grows(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(40))], row_length=32)
    steps = opened.steps_per_epoch(1)
    assert [opened.epochs((1, s)) for s in range(steps)] == pytest.approx([1 + s / steps for s in range(steps)])

  def test_packing_report_is_of_the_whole_epoch(self, token_dataset, random_records):
    records = random_records(40)
    opened = _open([token_dataset(records)])
    tokens = sum(len(ids) - 1 for r in records for ids in r['ids'])
    slots = opened.steps_per_epoch(0) * 8 * 64
    assert opened.packing_report() == {
        'packing/groups': 40,
        'packing/steps': opened.steps_per_epoch(0),
        'packing/slots_per_group': pytest.approx(slots / 40),
        'packing/used': pytest.approx(tokens / slots),
    }

  def test_first_is_the_first_batch(self, token_dataset, random_records):
    opened = _open([token_dataset(random_records(40))])
    ((*_, batch),) = _take(opened.batches(), 1)
    _assert_same(jax.device_get(opened.first()), batch)


class TestOrdered:

  def test_gives_every_record_asked_for_once_and_nearly_in_order(self, token_dataset, random_records):
    records = random_records(100)
    record_of = {tuple(ids): i for i, r in enumerate(records) for ids in r['ids']}
    opened = _open([token_dataset(records)], rows=8, row_length=40)
    asked = list(range(0, 100, 2))
    steps = opened.ordered(asked)
    found = [{record_of[t] for t, *_ in _sequences(jax.device_get(batch)).values()} for _, batch in steps]
    assert len(found) == len(steps) > 1
    assert sorted(itertools.chain(*found)) == asked
    assert 0 in found[0] and 98 not in found[0]

  def test_can_be_gone_through_again(self, token_dataset, random_records):
    steps = _open([token_dataset(random_records(10))]).ordered(range(10))
    for (_, a), (_, b) in zip(steps, steps, strict=True):
      _assert_same(jax.device_get(a), jax.device_get(b))

  def test_nothing_asked_for_is_no_batch(self, token_dataset, random_records):
    assert not list(_open([token_dataset(random_records(10))]).ordered([]))

  def test_evaluation_reads_every_record_once(self, token_dataset, random_records):
    records = random_records(50)
    found = collections.Counter()
    for batch in _open([token_dataset(records)]).evaluation_batches():
      found.update(entry[:3] for entry in _sequences(jax.device_get(batch)).values())
    assert found == _expected(records)

  def test_places_point_at_the_targets_that_count(self, token_dataset, random_records):
    records = random_records(30)
    opened = _open([token_dataset(records)], micro_batches=2)
    seen = []
    for placements, batch in opened.ordered(range(30)):
      targets = np.asarray(batch.targets_BT)
      for place in opened.places(placements):
        ids = records[place.record]['ids'][place.slot]
        assert targets[place.micro, place.row][place.targets].tolist() == ids[records[place.record]['prompt'] :]
        seen.append((place.record, place.slot))
    assert sorted(seen) == [(record, slot) for record in range(30) for slot in range(2)]


_PROCESS = """
import json, sys
import jax
import numpy as np

port, index, spec, cache, out = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.distributed.initialize('127.0.0.1:' + port, 2, int(index))

from jaxalign import sharding
from jaxalign.data import token_cache
from jaxalign.data import loader
import conftest

data = token_cache.build(
    spec, tokenizer=conftest.TOKENIZER, example_fn=conftest.example_of, key_parts='ids', cache_dir=cache
)
packing = loader.Packing(rows=8, row_length=64)
opened = loader.Loader([data], [1.0], packing=packing, mesh=sharding.make_mesh(''), seed=0)
batches = opened.batches(0, 1)
found = []
for _ in range(3):
  epoch, step, batch = next(batches)
  rows = {shard.index[1].start: np.asarray(shard.data).tolist() for shard in batch.targets_BT.addressable_shards}
  found.append([epoch, step, rows])
batches.close()

read = []
def extra(record, slot):
  read.append((record, slot))
  return np.zeros(np.count_nonzero(data[record].sequences[slot].mask[1:]))

counted = opened.with_extra(extra)
assert len(list(counted.ordered(range(len(data))))) > 1
json.dump({'found': found, 'read': read}, open(out, 'w'))
"""


class TestTwoProcesses:

  def test_hold_together_the_rows_of_one_process_and_read_no_more(self, token_dataset, random_records, tmp_path):
    data = token_dataset(random_records(60))
    (tmp_path / 'run.py').write_text(_PROCESS)
    here = pathlib.Path(__file__).parent
    env = os.environ | {'PYTHONPATH': f'{here.parents[1]}:{here}', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    port = str(20_000 + os.getpid() % 20_000)
    spec, cache = f'jsonl:{tmp_path / "data.jsonl"}', str(tmp_path / 'cache')
    command = [sys.executable, str(tmp_path / 'run.py'), port]
    runs = [
        subprocess.Popen([*command, str(i), spec, cache, str(tmp_path / f'{i}.json')], env=env, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for run in runs:
      _, errors = run.communicate(timeout=100)
      assert run.returncode == 0, errors.decode()
    results = [json.loads((tmp_path / f'{i}.json').read_text()) for i in range(2)]
    found, read = [result['found'] for result in results], [result['read'] for result in results]
    assert sorted(read[0] + read[1]) == [[record, slot] for record in range(60) for slot in range(2)]
    assert min(map(len, read)) > 30
    for i, (epoch, step, batch) in enumerate(_take(_open([data]).batches(0, 1), 3)):
      assert [process[i][:2] for process in found] == [[epoch, step]] * 2
      assert [len(process[i][2]) for process in found] == [4, 4]
      rows = {int(row): part for process in found for row, part in process[i][2].items()}
      np.testing.assert_array_equal(np.concatenate([rows[row] for row in range(8)], axis=1), batch.targets_BT)
