"""Processes that call one reward function, each response by itself, with a limit on its time."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import multiprocessing
from multiprocessing import connection as connection_lib
import os
import signal
import subprocess
import sys
import time
from typing import Any
from typing import NamedTuple

from jaxalign import types
from jaxalign.rewards import calling

_PATIENCE = 5.0  # seconds that an idle worker has to end


class _Task(NamedTuple):
  item: int
  deadline: float


class Pool:
  """Worker processes of one function.

  They are programs of their own rather than those of `concurrent.futures`: such a pool would import the whole package,
  and JAX, once more in each of them, and can neither end a call that takes too long nor say which one died.
  """

  def __init__(
      self, called: str, target: tuple[str, str, Mapping[str, Any]], processes: int, timeout: float | None = None
  ):
    """Starts the workers.

    Args:
      called: what the function is called in messages.
      target: its path and name, see `calling.load`, and its options.
      processes: how many.
      timeout: seconds that a call may take, None for any.
    """
    self._called, self._timeout = called, float('inf') if timeout is None else timeout
    self._workers: dict[connection_lib.Connection, subprocess.Popen] = {}
    for _ in range(processes):
      ours, theirs = multiprocessing.Pipe()
      self._workers[ours] = _spawn(theirs.fileno())
      theirs.close()
    self._idle: list[connection_lib.Connection] = []
    self._busy: dict[connection_lib.Connection, _Task | None] = dict.fromkeys(self._workers)  # None: it is loading
    for worker in self._workers:
      self._send(worker, (sys.path, *target), '')

  def map(self, arguments: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[float | None]:
    """The function's value of each response, in their order.

    Args:
      arguments: what it is called with for each response, lists of one.
      where: which record each response is of.

    Raises:
      RunError: a call failed or took too long, or a worker died. The pool is then of no more use; close it.
    """
    values: list[float | None] = [None] * len(arguments)
    waiting = collections.deque(range(len(arguments)))
    while waiting or any(self._busy.values()):
      while waiting and self._idle:
        worker, item = self._idle.pop(), waiting.popleft()
        self._send(worker, (arguments[item], 1), where[item])
        self._busy[worker] = _Task(item, time.monotonic() + self._timeout)
      for worker, task, answer in self._answers(where):
        self._idle.append(worker)
        if task is not None:
          found, problem = answer
          if problem:
            raise self._failed(problem, where[task.item])
          values[task.item] = found[0]
    return values

  def close(self, at_once: bool = False) -> None:
    """Ends the workers, those that are in the middle of a call by force, or all of them."""
    for worker, process in self._workers.items():
      worker.close()
      if at_once or worker in self._busy:
        process.kill()
    for process in self._workers.values():
      try:
        process.wait(_PATIENCE)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

  def _answers(self, where: Sequence[str]) -> list[tuple[connection_lib.Connection, _Task | None, Any]]:
    """Waits for one or more workers; raises RunError where one is late or has died."""
    deadline, first = min((task.deadline, task.item) for task in [*self._busy.values(), _NEVER] if task is not None)
    left = None if deadline == float('inf') else max(0.0, deadline - time.monotonic())
    ready = connection_lib.wait(list(self._busy), left)
    if not ready:
      raise self._failed(f'it took more than {self._timeout:g} s', where[first])
    found = []
    for worker in self._busy.keys() & set(ready):
      task = self._busy.pop(worker)
      try:
        found.append((worker, task, worker.recv()))
      except (EOFError, OSError) as err:
        raise self._died(worker, where[task.item] if task is not None else '') from err
    return found

  def _send(self, worker: connection_lib.Connection, message: Any, where: str) -> None:
    try:
      worker.send(message)
    except OSError as err:
      raise self._died(worker, where) from err

  def _died(self, worker: connection_lib.Connection, where: str) -> types.RunError:
    code = self._workers[worker].wait()
    how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
    return self._failed(f'its process died ({how})', where)

  def _failed(self, problem: str, where: str) -> types.RunError:
    return types.RunError(f'reward {self._called}{where and ", "}{where}: {problem}')


_NEVER = _Task(-1, float('inf'))


def _spawn(handle: int) -> subprocess.Popen:
  # Accelerators are the run's; stdout is for results, so that what the function prints goes to stderr.
  command = [sys.executable, '-P', calling.__file__, str(handle)]
  return subprocess.Popen(command, pass_fds=[handle], stdout=2, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
