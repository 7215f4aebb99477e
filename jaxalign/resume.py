"""Whether a workdir holds the run that is asked for, another one, or one that is over."""

from collections.abc import Sequence
import os
import re
from typing import Any

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import storage
from jaxalign import types

# Bindings that may differ between a run and its resumption: they change how long and how often, not what.
_RESUMABLE = (
    'loop.Options.steps',
    'loop.Options.log_every',
    'loop.Options.eval_every',
    'loop.Options.save_every',
    'loop.Options.profile',
    'checkpoint.Options.keep',
)


def check_writable(workdir: storage.Path) -> None:
  """Raises UsageError or RunError where `--workdir` cannot be made or written; leaves nothing."""
  if storage.is_remote(workdir):
    with storage.naming(f'--workdir={workdir}'):
      probe = workdir / f'.writable-{jax.process_index()}'
      probe.write_bytes(b'may be deleted')
      probe.unlink()
    return
  there = next(path for path in (workdir, *workdir.parents) if path.exists())
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    problem = 'may not be written' if there.is_dir() else 'is a file'
    raise types.UsageError(f'--workdir={workdir}: {there} {problem}')


def finished(job: recipe.Job, bindings: str, steps: int) -> dict[str, Any] | None:
  """The summary of a run that is over, None where there is something to do.

  Args:
    job: names the workdir.
    bindings: everything that was bound, as text with each binding on one line.
    steps: of the run.

  Raises:
    UsageError: the workdir holds a run of other flags or bindings.
  """
  path = job.workdir / 'checkpoints' / 'run.json'
  with storage.naming(f'--workdir={job.workdir}'):
    if not path.exists():
      return None
  run = checkpoint.read_json(path)
  if run['bindings'] is None:
    raise types.UsageError(f'{job.workdir} holds an imported model, start from it by --model; choose another --workdir')
  identity = job.identity().items()
  changed = [f'--{name.removesuffix("_spec")}: {run[name]!r} -> {new!r}' for name, new in identity if run[name] != new]
  changed += diff(run['bindings'], bindings, ignore=_RESUMABLE)
  if changed:
    raise types.UsageError(f'{job.workdir} holds another run ({"; ".join(changed)}); choose another --workdir')
  done = job.workdir / 'summary.json'
  if not done.exists():
    return None
  summary = checkpoint.read_json(done)
  if summary['steps'] < steps:
    return None
  logging.info(
      '%s is finished: %d steps; its summary follows (choose another --workdir, or more --steps)',
      job.workdir,
      summary['steps'],
  )
  return summary


def diff(old: str, new: str, ignore: Sequence[str] = ()) -> list[str]:
  """What differs between two texts of bindings, as 'NAME: OLD -> NEW', but for ignored names."""
  before, after = _values(old), _values(new)
  return [
      f'{name}: {before.get(name, "unset")} -> {after.get(name, "unset")}'
      for name in sorted(before.keys() | after.keys())
      if before.get(name) != after.get(name) and name not in ignore
  ]


def _values(text: str) -> dict[str, str]:
  """Bindings by name, of a text that has each on one line."""
  return dict(re.findall(r'^([\w./]+) = (.*)$', text, re.MULTILINE))
