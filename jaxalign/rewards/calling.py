"""Loads and calls reward functions; run as a program, it is a worker that does so for another process.

It imports the standard library alone, so that a worker starts at once and touches no accelerator.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
from multiprocessing import connection as connection_lib
import os
import pathlib
import signal
import sys
import threading
import traceback
from typing import Any
from typing import SupportsFloat

# What a user's function may end by; of `asyncio` and of `sys.exit`, what is no Exception.
FAILURES = (Exception, SystemExit, asyncio.CancelledError)


class Unusable(Exception):
  """There is no such function, or it wants what there is not, or returns no list of numbers; `item` says where."""

  def __init__(self, message: str, item: int | None = None):
    super().__init__(message)
    self.item = item


def load(path: str, name: str) -> Callable:
  """The function `name` of a module, `path` being its import path or a file that ends in .py.

  Modules are also looked for in the current folder, and what a file imports beside it.

  Raises:
    Unusable: the module has no such function.
    Exception: whatever the import raises.
  """
  if path.endswith('.py'):
    module = _load_file(str(pathlib.Path(path).absolute()))
  else:
    _look_in(os.getcwd())
    module = importlib.import_module(path)
  try:
    return functools.reduce(getattr, name.split('.'), module)
  except AttributeError as err:
    raise Unusable(f'{path} has no {err.name}') from err


def _look_in(folder: str) -> None:
  if folder not in sys.path:
    sys.path.append(folder)


@functools.cache
def _load_file(path: str):
  _look_in(os.path.dirname(path))
  name = f'{pathlib.Path(path).stem} of {path}'  # no name that an import can ask for
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise ImportError(f'{path} is no Python file')
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # which dataclasses and pickle look up
  spec.loader.exec_module(module)
  return module


def parameters(fn: Callable) -> tuple[list[str], list[str], bool]:
  """The keywords that a function takes, those of them that it must have, and whether it takes any other."""
  kinds = inspect.Parameter
  found = inspect.signature(fn).parameters.values()
  named = [one for one in found if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
  needed = [one.name for one in named if one.default is kinds.empty]
  needed += [one.name for one in found if one.kind is kinds.POSITIONAL_ONLY and one.default is kinds.empty]
  return [one.name for one in named], needed, any(one.kind is kinds.VAR_KEYWORD for one in found)


def call(fn: Callable, arguments: Mapping[str, Any], count: int) -> list[float | None]:
  """Calls a function with those of `arguments` that it names, or all of them where it has `**kwargs`.

  A coroutine that it returns is run to its end. What it prints goes to stderr.

  Args:
    fn: returns a number, or None, for each response.
    arguments: by keyword.
    count: of responses.

  Raises:
    Unusable: an argument is missing, or what it returned is something else than `count` finite numbers or None.
    Exception: whatever it raises.
  """
  names, needed, takes_any = parameters(fn)
  fixed = fn.keywords if isinstance(fn, functools.partial) else {}  # options, before columns of the same name
  arguments = {name: value for name, value in arguments.items() if name not in fixed}
  missing = [name for name in needed if name not in arguments and name not in fixed]
  with to_stderr():
    try:
      found = fn(**{name: value for name, value in arguments.items() if takes_any or name in names})
    except TypeError as err:
      if not missing:  # Otherwise it may have been bound by what wraps the function.
        raise
      raise Unusable(f'it wants `{missing[0]}`, and there is only {", ".join(arguments)}') from err
    if inspect.isawaitable(found):
      found = asyncio.run(_finished(found))
  return _numbers(found, count)


_SHARED = threading.Lock(), list[contextlib.redirect_stdout]()


@contextlib.contextmanager
def to_stderr() -> Iterator[None]:
  """What any thread prints meanwhile goes to stderr; of several threads within, until the last one leaves."""
  lock, within = _SHARED
  redirected = contextlib.redirect_stdout(sys.stderr)
  with lock:
    if not within:
      redirected.__enter__()
    within.append(redirected)
  try:
    yield
  finally:
    with lock:
      redirected = within.pop()
      if not within:  # It is the one that was entered.
        redirected.__exit__(None, None, None)


async def _finished(waiting):
  return await waiting


def _numbers(found: Any, count: int) -> list[float | None]:
  if isinstance(found, str | Mapping) or not hasattr(found, '__len__') or not hasattr(found, '__iter__'):
    raise Unusable(f'it returned {type(found).__name__} where a list of {count} numbers is wanted')
  if len(found) != count:
    raise Unusable(f'it returned {len(found)} numbers for {count} responses')
  return [None if value is None else _number(value, item) for item, value in enumerate(found)]


def _number(value: Any, item: int) -> float:
  try:
    number = float(value) if isinstance(value, SupportsFloat) else None
  except (TypeError, ValueError, OverflowError):  # an array of several numbers, say
    number = None
  if number is None or not math.isfinite(number):
    raise Unusable(f'it returned {value!r:.80} where a finite number, or None to abstain, is wanted', item)
  return number


def told(err: BaseException, fn: Callable) -> str:
  """An exception in one line: what it is, and the last line of the function's own file on the way to it."""
  if isinstance(err, Unusable):
    return str(err)
  what = ' '.join(f'{type(err).__name__}: {err}'.split()).removesuffix(': ').removesuffix(':')
  try:
    own = inspect.getsourcefile(inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn))
  except TypeError:  # It is an object that can be called, or one of C.
    own = None
  frames = [frame for frame in traceback.extract_tb(err.__traceback__) if frame.filename != __file__]
  frames = [frame for frame in frames if frame.filename == own] or frames
  return what + (f' ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})' if frames else '')


def serve(connection: connection_lib.Connection) -> None:
  """Loads the function that the other side names, then answers calls until it closes the connection."""
  for number in (signal.SIGINT, signal.SIGTERM):  # The other side hears of it, finishes its step, and ends this one.
    signal.signal(number, signal.SIG_IGN)
  sys.path[:], path, name, options = connection.recv()
  fn = functools.partial(load(path, name), **options)
  connection.send(None)
  while True:
    try:
      arguments, count = connection.recv()
    except EOFError:
      return
    answer: tuple[list[float | None], str]
    try:
      answer = call(fn, arguments, count), ''
    except FAILURES as err:
      answer = [], told(err, fn)
    connection.send(answer)


if __name__ == '__main__':
  serve(connection_lib.Connection(int(sys.argv[1])))
