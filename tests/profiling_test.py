"""What the profiler records of a run, and what is refused."""

import gzip
import json

from absl import logging
import pytest

from jaxalign import main
from jaxalign import profiling
from jaxalign import types
from tests import runs


@pytest.fixture
def calls(monkeypatch):
  """What is called of the profiler, and waits for devices, in order."""
  seen = []
  monkeypatch.setattr(profiling.jax.profiler, 'start_trace', lambda into: seen.append(f'start {into}'))
  monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', lambda: seen.append('stop'))
  return seen


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.folder_with_pairs(tmp_path_factory, 'profile')


def recorded(calls, steps, count=5, done=0):
  def made():
    for step in range(done + 1, done + 1 + count):
      calls.append(f'make {step}')
      yield step

  return profiling.recorded(made(), steps, 'here', done=done, wait=lambda: calls.append('wait'))


class TestRecorded:

  def test_is_what_is_made_and_trained_of_these_steps(self, calls):
    for step in recorded(calls, (2, 3), count=4):
      calls.append(f'train {step}')
    recorded_part = calls[calls.index('wait') : calls.index('stop') + 1]
    assert recorded_part == ['wait', 'start here', 'make 2', 'train 2', 'make 3', 'train 3', 'wait', 'stop']
    assert [call for call in calls if 'train' in call] == [f'train {step}' for step in (1, 2, 3, 4)]

  @pytest.mark.parametrize('steps,done', [((2, 9), 0), ((5, 9), 2)])
  def test_ends_with_the_batches(self, calls, steps, done):
    assert list(recorded(calls, steps, done=done)) == list(range(done + 1, done + 6))
    assert calls[-1] == 'stop' and calls.count('stop') == 1

  def test_ends_where_training_stops(self, calls):
    batches = recorded(calls, (1, 4))
    assert next(batches) == 1
    batches.close()
    assert calls == ['wait', 'start here', 'make 1', 'stop']

  def test_is_nothing_of_steps_that_are_over(self, calls, monkeypatch):
    said = []
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    assert list(recorded(calls, (2, 3), count=2, done=3)) == [4, 5]
    assert 'start here' not in calls and '--profile=2:3 records nothing' in said[0]

  def test_goes_on_where_the_profiler_fails(self, monkeypatch):
    def fails(*_):
      raise RuntimeError('no space left')

    said = []
    monkeypatch.setattr(profiling.jax.profiler, 'start_trace', lambda _: None)
    monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', fails)
    monkeypatch.setattr(logging, 'warning', lambda text, *args: said.append(text % args))
    assert list(recorded([], (2, 3))) == [1, 2, 3, 4, 5]
    assert said == ['--profile: nothing is recorded: no space left']

  def test_of_a_resumed_run_begins_where_that_goes_on(self, calls):
    assert list(recorded(calls, (2, 4), count=3, done=2)) == [3, 4, 5]
    assert calls[:2] == ['wait', 'start here'] and calls[-2:] == ['stop', 'make 5']


class TestParse:

  def test_reads_the_first_and_the_last_step(self):
    assert profiling.parse('3:5') == (3, 5) and profiling.parse('4:4') == (4, 4)

  @pytest.mark.parametrize('text', ['3', '3:', ':3', '5:3', '0:2', '-1:2', 'a:b', '1:2:3'])
  def test_refuses_what_names_no_steps(self, text):
    with pytest.raises(types.UsageError, match='FIRST:LAST'):
      profiling.parse(text)


class TestRun:

  def test_leaves_a_profile_of_the_step(self, folder, tmp_path):
    assert main.main(runs.flags(folder, tmp_path / 'run', '--profile=2:3', steps=3)) == 0
    (trace,) = (tmp_path / 'run' / 'profile').rglob('*.trace.json.gz')
    names = {event.get('name', '') for event in json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']}
    assert any('PjitFunction(step)' in name or 'jit_step' in name for name in names), sorted(names)[:50]

  @pytest.mark.parametrize(
      'given,said',
      [
          (['--profile=2:9'], 'the run has 3 steps'),
          (['--profile=2:3', '--workdir=gs://bucket/run'], 'writes to a disk'),
          (['--gin=loop.Options.profile=(2, 3)', '--workdir=gs://bucket/run'], 'writes to a disk'),
      ],
  )
  def test_is_refused_before_anything_is_read(self, folder, tmp_path, capsys, given, said):
    assert main.main(runs.flags(folder, tmp_path / 'run', *given, steps=3)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
