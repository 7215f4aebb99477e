"""What gin has bound: by which names, what references lead to, and how it is written."""

from collections.abc import Callable
from collections.abc import Iterator
import copy
import functools
import inspect
import itertools
from typing import Any

import gin

from jaxalign.data import probes

# A binding: its scope, the full name of what it configures, the parameter.
Key = tuple[str, str, str]


def keys(config: dict[tuple[str, str], dict[str, Any]]) -> Iterator[Key]:
  """The bindings of a configuration of gin's."""
  for (scope, name), values in config.items():
    for parameter in values:
      yield scope, name, parameter


def named(key: Key) -> str:
  """A binding as a user writes it: 'preference.dpo.beta'."""
  scope, name, parameter = key
  if name == 'gin.macro':
    return f'{scope} (a macro)'
  return f'{scope}/' * bool(scope) + '.'.join([*name.split('.')[-2:], parameter])


def node(scope: str, name: str) -> str:
  """What references lead to: a function or class, or one macro."""
  return f'%{scope}' if name == 'gin.macro' else name


def _referred(value: Any) -> list[str]:
  return [node(*reference.config_key) for reference in gin.config.iterate_references(value)]


def reached(waiting: list[str]) -> set[str]:
  """These nodes, and those that what is bound to them leads to."""
  found: set[str] = set()
  while waiting:
    name = waiting.pop()
    if name not in found:
      found.add(name)
      waiting += _referred([values for key, values in gin.config._CONFIG.items() if node(*key) == name])
  return found


def is_used(key: Key, used: set[Key]) -> bool:
  """A binding serves its own scope and all within it."""
  scope, name, parameter = key
  return any(
      (name, parameter) == (other, parameter_) and (not scope or f'{within}/'.startswith(f'{scope}/'))
      for within, other, parameter_ in used
  )


def options(name: str, parameter: str) -> str:
  """What is bound to a parameter of the package's, and to all that it refers to, in any scope, as text with its source.

  Defaults are left out, so that the operative configuration tells the same as the bindings that led to it.
  """
  start = gin.config._CONFIG.get(('', f'jaxalign.{name}'), {}).get(parameter)
  nodes = reached(_referred(start))
  lines = [f'{parameter} = {start!r}']
  lines += [probes.told(gin.config._REGISTRY[one].wrapped) for one in nodes if not one.startswith('%')]
  for (scope, function), values in gin.config._CONFIG.items():
    if node(scope, function) in nodes:
      known = inspect.signature(gin.config._REGISTRY[function].wrapped).parameters
      for option, value in values.items():
        # In a scope, a default may undo what is bound outside it.
        if scope or option not in known or repr(value) != repr(known[option].default):
          lines.append(f'{scope}/{function}.{option} = {value!r}')
  return '\n'.join(sorted(lines))


def frozen(name: str, parameter: str) -> Callable[..., Any] | None:
  """The function that a parameter of the package's refers to, with what is bound to it now, whatever is parsed later.

  None where the parameter is not bound.
  """
  reference = gin.config._CONFIG.get(('', f'jaxalign.{name}'), {}).get(parameter)
  if reference is None:
    return None
  scope, function = reference.config_key
  values: dict[str, Any] = {}
  for within in ['', *itertools.accumulate(filter(None, scope.split('/')), '{}/{}'.format)]:
    values |= gin.config._CONFIG.get((within, function), {})
  # A copy has the values of references.
  return functools.partial(gin.config._REGISTRY[function].wrapped, **copy.deepcopy(values))


def text(write: Callable[..., str]) -> str:
  """A configuration as gin writes it, each binding on one line."""
  lines = write(max_line_length=100_000).splitlines()
  return ''.join(line + '\n' for line in lines if not line.startswith('# ='))
