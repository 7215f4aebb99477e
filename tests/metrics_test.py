"""Writers, the progress line, the clock and the counter of compilations."""

import io
import json

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from jaxalign import metrics
from jaxalign import storage


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


class TestWriter:

  def test_appends_one_object_a_step_that_any_reader_of_json_takes(self, tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(1, {'loss': 0.5, 'rewards/chosen': float('nan')})
    writer.write(2, {'loss': float('inf')})
    writer.close()
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    assert lines(tmp_path / 'metrics.jsonl') == [
        {'step': 1, 'loss': 0.5, 'rewards/chosen': None},
        {'step': 2, 'loss': None},
    ]

  def test_mirrors_to_tensorboard(self, tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    writer.write(3, {'loss': 0.25})
    writer.close()
    (events,) = (tmp_path / 'tensorboard').iterdir()
    data, found, start = events.read_bytes(), [], 0
    while start < len(data):  # length, its checksum, an event, its checksum
      size = int.from_bytes(data[start : start + 8], 'little')
      event = event_pb2.Event.FromString(data[start + 12 : start + 12 + size])
      found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
      start += 16 + size
    assert ('loss', 3, 0.25) in found

  def test_cuts_off_what_comes_again_and_what_was_half_written(self, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 4}\n{"step": 5}\n{"step": 6}\n{"ste')
    writer = metrics.Writer(tmp_path, 5)
    writer.write(6, {'loss': 1.0})
    writer.close()
    assert lines(path) == [{'step': 4}, {'step': 5}, {'step': 6, 'loss': 1.0}]


class TestWriteText:

  def test_leaves_nothing_beside_the_file(self, tmp_path):
    storage.write_text(tmp_path / 'a', 'x')
    assert [path.name for path in tmp_path.iterdir()] == ['a']


class _Terminal(io.StringIO):

  def isatty(self):
    return True


class TestProgress:
  VALUES = {'loss': 0.51234, 'rewards/accuracies': 0.75, 'tokens_per_s': 12345.6, 'step_time': 2.0}

  def test_is_a_line_a_logged_step_where_there_is_no_terminal(self, caplog):
    progress = metrics.Progress(0, 100)
    with caplog.at_level('INFO', logger='absl'):
      progress.show(10, self.VALUES)
    progress.close()
    assert 'step 10/100  loss 0.5123  accuracy 0.750  tok/s 12,346  eta 3m00s' in caplog.text

  def test_is_a_bar_on_a_terminal(self, monkeypatch, caplog):
    terminal = _Terminal()
    monkeypatch.setattr('sys.stderr', terminal)
    progress = metrics.Progress(3, 10)
    progress.advance()
    progress.show(4, self.VALUES)
    progress.close()
    shown = terminal.getvalue()
    assert '4/10' in shown
    assert 'loss=0.5123' in shown and 'accuracy=0.750' in shown and 'tok/s=12,346' in shown
    assert not caplog.text


class TestClock:

  @pytest.fixture
  def now(self, monkeypatch):
    """Seconds that passed, and those in which this thread computed."""
    passed = {'perf_counter': 0.0, 'thread_time': 0.0}
    for name in passed:
      monkeypatch.setattr(f'time.{name}', lambda name=name: passed[name])
    return passed

  def test_measures_laps_and_leaves_pauses_out(self, now):
    clock = metrics.Clock(1000)
    assert clock.lap(50, 1) is None  # the compiling step
    clock.start()
    now |= {'perf_counter': 2.0, 'thread_time': 0.5}
    assert clock.lap(400, 4) == metrics.Speed(200.0, 0.5, 0.125, 0.0)
    clock.pause()
    now |= {'perf_counter': 100.0, 'thread_time': 50.0}
    clock.start()
    now |= {'perf_counter': 101.0, 'thread_time': 50.5}
    assert clock.lap(100, 1) == metrics.Speed(100.0, 1.0, 0.5, 0.0)
    assert clock.mean() == metrics.Speed(500 / 3, 3 / 5, 1 / 5, 0.0)
    assert clock.seen == 1550

  def test_measures_how_long_items_were_waited_for(self, now):

    def items():
      for wait in (3.0, 0.25, 1.25):
        now['perf_counter'] += wait
        yield wait

    clock, seen = metrics.Clock(0), []
    for item in clock.waiting(items()):
      now['perf_counter'] += 10.0  # a step
      if item == 3.0:
        clock.start()
      seen.append(item)
    assert seen == [3.0, 0.25, 1.25]
    assert clock.lap(4, 2) == metrics.Speed(4 / 21.5, 10.75, 0.0, 0.75)


class TestCompilations:

  def test_grow_with_new_shapes_alone(self):
    counter = metrics.Compilations()
    fn = jax.jit(counter.counted(lambda x: x + 1))
    for size in (2, 2, 3, 2, 3):
      fn(jnp.zeros(size))
    assert counter.count == 2


class TestUtilisation:

  def test_is_unknown_where_the_peak_is(self):
    assert metrics.utilisation(1e9, 1e6) is None

  def test_is_the_share_of_the_peak_of_all_devices(self, monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e15)
    assert metrics.utilisation(4e9, 1e6) == pytest.approx(4e15 / (1e15 * 8))


class TestPeakMemoryBytes:

  def test_is_at_least_what_is_held(self):
    held = bytearray(200 * 2**20)
    held[:: 2**12] = b'\1' * len(held[:: 2**12])
    assert metrics.peak_memory_bytes() > len(held)
