"""Processes that call a reward: order, time and death."""

import os
import re
import time

import pytest

from jaxalign import types
from jaxalign.rewards import pool as pool_lib

MINE = """
import os
import signal
import time

print('loaded in a worker')

def wait(responses):
  print('\\nin a worker')
  seconds, value = responses[0].split()
  time.sleep(float(seconds))
  return [None if value == 'none' else float(value)]

def pid(responses, *, add):
  time.sleep(0.05)
  return [os.getpid() + add]

def told(responses):
  os.kill(os.getpid(), signal.SIGTERM)
  return [7.0]

def die(responses):
  if responses[0] == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  if responses[0] == 'exit':
    os._exit(3)
  return [1 / len(responses[0])]
"""


@pytest.fixture
def opened(tmp_path):
  """Opens pools of functions of a file, and closes them."""
  (tmp_path / 'mine.py').write_text(MINE)
  pools = []

  def opening(name, processes, timeout=None, **options):
    pools.append(pool_lib.Pool(f'mine:{name}', (str(tmp_path / 'mine.py'), name, options), processes, timeout))
    return pools[-1]

  yield opening
  for pool in pools:
    pool.close(at_once=True)


def run(pool, *texts):
  return pool.map([{'responses': [text]} for text in texts], [f'd.jsonl:{i + 1}' for i in range(len(texts))])


class TestPool:

  def test_keeps_the_order_whatever_ends_first_and_may_be_used_again(self, opened, capfd):
    pool = opened('wait', 2)
    assert run(pool, '0.4 1', '0 2', '0 none', '0.1 4', '0 5') == [1.0, 2.0, None, 4.0, 5.0]
    assert run(pool, '0 6') == [6.0] and run(pool) == []
    out, err = capfd.readouterr()
    assert out == '' and err.count('\nin a worker') + err.count('loaded') == 8

  def test_uses_its_processes_and_ends_them(self, opened):
    pool = opened('pid', 2, add=0)
    pids = {int(pid) for pid in run(pool, *'abcdefghijkl')}
    assert len(pids) == 2 and os.getpid() not in pids
    pool.close()
    for pid in pids:
      with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

  def test_ends_a_call_that_takes_too_long(self, opened):
    pool, start = opened('wait', 1, timeout=0.3), time.monotonic()
    assert run(pool, *['0.1 1'] * 5) == [1.0] * 5  # The limit is on each call.
    with pytest.raises(types.RunError, match=re.escape('reward mine:wait, d.jsonl:2: it took more than 0.3 s')):
      run(pool, '0 1', '60 1', '0 1')
    pool.close()
    assert time.monotonic() - start < 20

  def test_answers_though_a_scheduler_tells_all_processes_of_a_job_to_end(self, opened):
    assert run(opened('told', 1), 'a', 'b') == [7.0, 7.0]

  @pytest.mark.parametrize(('how', 'said'), [('kill', 'SIGKILL'), ('exit', 'exit code 3')])
  def test_names_what_died(self, opened, how, said):
    with pytest.raises(types.RunError, match=re.escape(f'reward mine:die, d.jsonl:2: its process died ({said})')):
      run(opened('die', 1), 'a', how)

  def test_names_what_failed(self, opened):
    line = 1 + MINE[: MINE.index('return [1 /')].count('\n')
    said = f'reward mine:die, d.jsonl:1: ZeroDivisionError: division by zero (mine.py:{line}: return [1 /'
    with pytest.raises(types.RunError, match=re.escape(said)):
      run(opened('die', 1), '', 'a')

  def test_names_what_cannot_be_loaded(self, opened, capfd):
    with pytest.raises(types.RunError, match=re.escape('reward mine:absent: its process died (exit code 1)')):
      run(opened('absent', 1), 'a')
    assert 'mine.py has no absent' in capfd.readouterr().err
