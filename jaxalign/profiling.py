"""Records some steps of a run with JAX's profiler."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import itertools
import pathlib
from typing import TypeVar

from absl import logging
import jax

from jaxalign import storage
from jaxalign import types

_T = TypeVar('_T')

Steps = tuple[int, int]  # the first and the last


def parse(text: str) -> Steps:
  """The steps that `--profile` names.

  Raises:
    UsageError: it is not FIRST:LAST, with numbers from 1 on.
  """
  first, _, last = text.partition(':')
  if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise types.UsageError(f'--profile={text}: it is FIRST:LAST, the steps to record, as 3:5')
  return int(first), int(last)


def folder(workdir: storage.Path) -> pathlib.Path:
  """Where what this process records goes.

  Raises:
    UsageError: the run is kept in a bucket, where the profiler cannot write.
  """
  if storage.is_remote(workdir):
    raise types.UsageError(f'--profile: the profiler writes to a disk; --workdir={workdir} is none')
  own = [f'process_{jax.process_index()}'] if jax.process_count() > 1 else []
  return pathlib.Path(workdir).joinpath('profile', *own)


def recorded(
    batches: Iterator[_T], steps: Steps, into: pathlib.Path, *, done: int, wait: Callable[[], None]
) -> Iterator[_T]:
  """The same batches; while those of `steps` are made and trained on, the profiler records host and devices.

  Writing what was recorded takes seconds, which count as waiting for the batch behind.

  Args:
    batches: of the steps that follow.
    steps: the first and the last step to record.
    into: what TensorBoard's profile plugin, or xprof, is told to show.
    done: steps that are over.
    wait: returns when the devices have done what was dispatched.
  """
  first, last = max(steps[0], done + 1), steps[1]
  if first > last:
    logging.warning('--profile=%d:%d records nothing: the run goes on behind step %d', *steps, done)
  batches = iter(batches)
  yield from itertools.islice(batches, first - done - 1)
  if first <= last:
    wait()
    with _trace(into):
      yield from itertools.islice(batches, last - first + 1)
      wait()
  yield from batches


@contextlib.contextmanager
def _trace(into: pathlib.Path) -> Iterator[None]:
  """Records to a folder; a profiler that fails is told of, and the run goes on."""
  with _told():
    jax.profiler.start_trace(into)
  try:
    yield
  finally:
    with _told():
      jax.profiler.stop_trace()
      logging.info('profile: %s (tensorboard --logdir, or xprof)', into)


@contextlib.contextmanager
def _told() -> Iterator[None]:
  try:
    yield
  except Exception as err:  # Whatever the profiler raises.
    logging.warning('--profile: nothing is recorded: %s', err)
