"""gin: finding the package's files, parsing them with the user's, and refusing bindings that do nothing.

Precedence, lowest first: the algorithm's file, files of a named model or data set, `--gin_file`, `--gin`.

gin looks for included files in the current folder first and gives a function its bindings only where it is called
through a reference. So files are parsed with their own folder as the current one, and after everything has run once
`checked_operative` compares what the user bound with what was used. The package's own files may bind more than a run
reaches: base.gin serves every mode.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import inspect
import os
import pathlib
import re
import sys
import tokenize
import typing
from typing import Any

import gin

from jaxalign import recipe as recipe_lib
from jaxalign import types
from jaxalign.cli import bound
from jaxalign.cli import catalog
from jaxalign.data import probes
from jaxalign.rewards import modelled

# What `--gin` can name without importing it.
_HEADER = """
from __gin__ import dynamic_registration
from jaxalign import checkpoint
from jaxalign import evaluate
from jaxalign import loop
from jaxalign import objectives
from jaxalign import optim
from jaxalign import recipe
from jaxalign import reference
from jaxalign import score
from jaxalign import steering
from jaxalign import train
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import judged
from jaxalign.data import loader
from jaxalign.data import prompts
from jaxalign.data import scored
from jaxalign.data import texts
from jaxalign.generation import candidates
from jaxalign.generation import guidance
from jaxalign.losses import actor_critic
from jaxalign.losses import batchwise
from jaxalign.losses import compose
from jaxalign.losses import listwise
from jaxalign.losses import parts
from jaxalign.losses import pointwise
from jaxalign.losses import policy
from jaxalign.losses import policy_parts
from jaxalign.losses import preference
from jaxalign.losses import reference_free
from jaxalign.losses import reward
from jaxalign.losses import rewarded
from jaxalign.losses import shaped
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from jaxalign.models import architecture
from jaxalign.models import lora
from jaxalign.planning import plan
from jaxalign.rewards import lengths
from jaxalign.rewards import rules
from jaxalign.rl import advantages
from jaxalign.rl import returns
from jaxalign.rl import rollouts
"""

# What the user bound in the last parse. A state of the process, as all of gin's is.
_users: set[bound.Key] = set()


def parse(algo: str, *, files: Sequence[str], user_files: Sequence[str], bindings: Sequence[str]) -> None:
  """Parses gin files and bindings, later ones winning.

  Args:
    algo: an algorithm, or what another file of the package is called in its gin folder.
    files: further files of the package, named from its gin folder.
    user_files: any gin files; what they include and import is looked for beside them.
    bindings: as 'preference.dpo.beta=0.2'. They can name the modules of the package that gin files name, and what a
      user file imports, which wins where the names are the same.

  Raises:
    UsageError: a file is missing, or a line or binding is wrong; the message quotes it.
  """

  def package() -> None:
    with contextlib.chdir(catalog.ROOT):
      for name in (f'{algo}.gin', *files):
        with _explained(f'gin_configs/{name}'):
          gin.parse_config_file(name)

  _parse(package, user_files, bindings)


def parse_saved(texts: Sequence[str], user_files: Sequence[str], bindings: Sequence[str]) -> None:
  """Parses the bindings that a checkpoint holds, in one or more texts, then files and bindings of the user.

  Raises:
    UsageError: as `parse` does, and where the checkpoint's bindings name a module that is not there.
  """

  def package() -> None:
    with contextlib.chdir(catalog.ROOT), _explained(
        'the bindings of the checkpoint (give --gin_file=FILE beside modules of yours)'
    ):
      for text in texts:
        gin.parse_config(text)

  for name in user_files:
    _import_from(pathlib.Path(name).absolute().parent)
  # A user's file is given again for the modules beside it; what else it binds served the training.
  _parse(package, user_files, [])
  needed = set(_users)
  _parse(package, user_files, bindings)
  _users.difference_update(needed)


def _parse(package: Callable[[], None], user_files: Sequence[str], bindings: Sequence[str]) -> None:
  """Parses the package's part, then the user's, and notes what the user bound."""
  _clear()
  package()
  # The user's part alone, once the package's names are known to gin, tells which bindings are the user's.
  _clear()
  _parse_user(user_files, bindings)
  _users.clear()
  _users.update(bound.keys(gin.config._CONFIG))
  _clear()
  package()
  _parse_user(user_files, bindings)
  with _explained('gin'):
    gin.finalize()
  for key in _users:
    _check_type(key)


def _check_type(key: bound.Key) -> None:
  """Raises UsageError where a plain value is bound to a parameter of the package's that is annotated with others."""
  scope, name, parameter = key
  if not name.startswith('jaxalign.'):
    return
  value = gin.config._CONFIG[scope, name][parameter]
  function = gin.config._REGISTRY[name].wrapped
  hint = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function).get(parameter)
  kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)
  plain = bool, int, float, str, type(None)
  if all(kind in plain for kind in kinds) and type(value) in (*plain, list, tuple, dict):
    if type(value) not in kinds and not (type(value) is int and float in kinds):
      wanted = ' or '.join(sorted(kind.__name__ for kind in kinds)).replace('NoneType', 'None')
      raise types.UsageError(f'{bound.named(key)} = {value!r}: it must be {wanted}')


def _clear() -> None:
  gin.clear_config()
  # Includes are found beside the file, then among the package's. gin's third way, as resources of Python packages, logs
  # an error for each folder that it does not find.
  gin.config._LOCATION_PREFIXES[:] = ['', str(catalog.ROOT)]
  gin.config._FILE_READERS[:] = [(open, os.path.isfile)]


def _import_from(folder: pathlib.Path) -> None:
  if str(folder) not in sys.path:
    sys.path.insert(0, str(folder))


def _parse_user(user_files: Sequence[str], bindings: Sequence[str]) -> None:
  imports: list[str] = []
  for name in user_files:
    path = pathlib.Path(name).absolute()
    if not path.is_file():
      raise types.UsageError(f'--gin_file={name}: no such file')
    _import_from(path.parent)
    before = set(gin.config._IMPORTS)
    with contextlib.chdir(path.parent), _explained(f'--gin_file={name}'):
      gin.parse_config_file(str(path))
    new = sorted(gin.config._IMPORTS - before, key=lambda statement: statement.location.line_num)
    imports += [statement.format() for statement in new if not statement.module.startswith('__gin__')]
  for binding in bindings:
    if '=' not in binding:
      raise types.UsageError(f'--gin={binding}: write NAME.PARAMETER=VALUE, as preference.dpo.beta=0.2')
    with _explained(f'--gin={binding}', quote=False):
      gin.parse_config(_header(imports) + binding)


def _header(imports: Sequence[str]) -> str:
  """Imports of the package's modules and of the user's, whose names win."""
  name_of = lambda line: line.split(' as ')[-1].split('import ')[-1].split('.')[0].strip()
  taken = {name_of(line) for line in imports}
  package = [line for line in _HEADER.strip().splitlines() if name_of(line) not in taken]
  return '\n'.join([*package, *imports, ''])


@contextlib.contextmanager
def _explained(where: str, quote: bool = True) -> Iterator[None]:
  """Turns what gin raises while parsing into one line for the user; `quote` adds file, line and content."""
  try:
    yield
  except SyntaxError as err:
    place = f' ({err.filename or "line"}:{err.lineno}: {(err.text or "").strip()})' if quote else ''
    raise types.UsageError(f'{where}: {_plain(err.msg)}{place}') from err
  except tokenize.TokenError as err:
    raise types.UsageError(f'{where}: a bracket or string is not closed: {err.args[0]}') from err
  except (OSError, ImportError, ValueError, TypeError, AttributeError, NameError, RuntimeError) as err:
    # gin appends a place for each file that includes the next; the first is where it happened.
    text, *places = re.split(r'\n  In (?:file |bindings string)', str(err))
    place = ''
    if places and quote:
      at = re.match(r'(?:"(.*)",)? ?line (\d+)\n(.*)', places[0])
      place = f' ({at[1] or "line"}:{at[2]}: {at[3].strip()})' if at else ''
    raise types.UsageError(f'{where}: {_plain(text)}{place}') from err


def _plain(text: str) -> str:
  """What gin says, in words of the user."""
  text = ' '.join(text.split())
  token = re.search(r"Failed to parse token '(.*)'", text)
  if token:
    return f"cannot read the value {token[1]}; strings are quoted ('{token[1]}'), functions begin with @"
  unknown = re.fullmatch(r"Configurable '(.*)' doesn't have a parameter named '(.*)'\.", text)
  if unknown:
    return f"{unknown[1]} has no parameter '{unknown[2]}'{_parameters(unknown[1])}"
  # What gin says of NAME.PARAMETER where NAME is a module.
  if text == 'not enough values to unpack (expected at least 2, got 1)':
    return 'a module alone has no parameters; write MODULE.NAME.PARAMETER=VALUE'
  macro = re.match(r"No bindings specified for '(.*)/gin\.macro'", text)
  if macro:
    return f'the macro %{macro[1]} is read, but nothing binds it'
  text = re.sub(r'\. Searched config paths: .*', '', text)
  text = re.sub(r"Couldn't resolve selector [\w.]+; <(?:module|class|function) '?([\w.]+)'?.*?>", r'\1', text)
  text = re.sub(r'was not provided by an import statement\.?', 'is not imported (import it in a gin file)', text)
  return text.rstrip('.')


def _parameters(name: str) -> str:
  """What can be bound of something that gin knows by this name alone."""
  if len(gin.config._REGISTRY.matching_selectors(name)) != 1:
    return ''
  parameters = inspect.signature(gin.config._REGISTRY.get_match(name).wrapped).parameters.values()
  # A function's other parameters are its caller's.
  keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] or [p.name for p in parameters]
  return f'; it has {", ".join(keywords)}'


def get(name: str) -> Callable[..., Any]:
  """The function or class of the package of this name ('train.train'), with its bindings."""
  with _explained(name):
    return gin.get_configurable(f'jaxalign.{name}')


def query(name: str) -> Any:
  """The value bound to a parameter of the package's ('loop.Options.steps')."""
  with _explained(name):
    return gin.query_parameter(f'jaxalign.{name}')


def is_users(name: str) -> bool:
  """Whether the user bound a parameter of the package's ('rollouts.Options.rewards')."""
  return any(bound.named(key) == name for key in _users)


def bindings() -> str:
  """Everything that was bound, as text."""
  return bound.text(gin.config_str)


def recipe() -> recipe_lib.Recipe:
  """The recipe that is bound, whose functions of examples know what is bound to them."""
  made = get('recipe.Recipe')()
  fns = {name: fn for name in ('example_fn', 'scored_fn') if (fn := getattr(made, name)) is not None}
  told = {name: probes.Bound(fn, bound.options('recipe.Recipe', name)) for name, fn in fns.items()}
  return dataclasses.replace(made, **told)


def scoring() -> modelled.Scoring:
  """How the model of the recipe that is bound scores responses, for use when another recipe is bound."""
  return modelled.Scoring(*(bound.frozen('recipe.Recipe', name) for name in modelled.Scoring._fields))


def check_reachable(*roots: str) -> None:
  """Raises UsageError, before anything runs, for a binding that no chain of references from `roots` can reach.

  What is reached may still not be used, which `checked_operative` finds. Modules of the user's may call what they
  configure by themselves, so only bindings of macros and of the package's functions are refused here.
  """
  is_ours = lambda name: name.startswith(('%', 'jaxalign.'))
  theirs = [name for _, name in gin.config._CONFIG if not is_ours(bound.node('', name))]
  reached = bound.reached([f'jaxalign.{root}' for root in roots] + theirs)
  named = {key: bound.node(*key[:2]) for key in _users}
  _refuse(key for key, name in named.items() if is_ours(name) and name not in reached)


def unbound(err: TypeError) -> str:
  """What an error says of parameters that nothing gives to what gin calls, in words of the user; '' for others."""
  missing = re.match(r'([\w.]+)\(\) missing \d+ required [\w-]+ arguments?: (.*)', str(err))
  called = re.search(r"In call to configurable '(\w+)'", str(err))
  if not missing or not called or missing[1].removesuffix('.__init__') != called[1]:
    return ''
  names = re.findall(r"'(\w+)'", missing[2])
  return f'{called[1]} lacks {", ".join(names)}: bind it in gin, as {called[1]}.{names[0]} = ...'


def checked_operative() -> str:
  """The operative configuration as text; call it when everything has been called once.

  Raises:
    UsageError: a binding of the user's had no effect so far, because nothing that it configures was called by a gin
      reference, or because the caller gives that parameter.
  """
  used = set(bound.keys(gin.config._OPERATIVE_CONFIG))
  _refuse(key for key in _users if not bound.is_used(key, used))
  return bound.text(gin.operative_config_str)


def _refuse(idle: Iterable[bound.Key]) -> None:
  names = ', '.join(sorted(map(bound.named, idle)))
  if names:
    raise types.UsageError(
        f'bound, but not used by this run: {names}; leave it out, or bind what uses it (config.gin in a workdir has'
        ' all that a run used)'
    )
