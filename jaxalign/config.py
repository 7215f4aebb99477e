"""gin: finding the package's files, parsing them with the user's, and refusing bindings that do nothing.

Precedence, lowest first: the algorithm's file, files of a named model or data set, `--gin_file`, `--gin`.

gin looks for included files in the current folder first and gives a function its bindings only where it is called through a
reference. So the package's files are parsed with their own folder as the current one, and after everything has run once
`checked_operative` compares what was bound with what was used.
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import difflib
import pathlib
import re
import sys
from typing import Any

import gin

from jaxalign import types

_ROOT = pathlib.Path(__file__).parent / 'gin_configs'

# What `--gin` can name without importing it.
_HEADER = """
from __gin__ import dynamic_registration
from jaxalign import checkpoint
from jaxalign import evaluate
from jaxalign import loop
from jaxalign import objectives
from jaxalign import optim
from jaxalign import recipe
from jaxalign import train
from jaxalign.data import examples
from jaxalign.data import loader
from jaxalign.losses import preference
from jaxalign.losses import reward
from jaxalign.losses import supervised
from jaxalign.models import transformer
from jaxalign.rewards import rules
"""


def algorithms(root: pathlib.Path = _ROOT) -> dict[str, str]:
  """Name and description of each algorithm: the gin files with a header '# NAME: DESCRIPTION', but for base.gin."""
  found = {}
  for path in sorted(root.glob('*.gin')):
    if path.stem != 'base':
      first = path.read_text(encoding='utf-8').splitlines()[0]
      found[path.stem] = first.removeprefix(f'# {path.stem}:').strip()
  return found


def check_algorithm(name: str) -> None:
  """Raises UsageError for an unknown algorithm, naming the choices and the nearest."""
  known = algorithms()
  if name in known:
    return
  nearest = difflib.get_close_matches(name, known, 1)
  hint = f'; did you mean {nearest[0]}?' if nearest else ''
  raise types.UsageError(f'--algo={name}: unknown algorithm; there are {", ".join(known)}{hint}')


def listing() -> str:
  """The algorithms, one line each."""
  known = algorithms()
  width = max(map(len, known))
  return ''.join(f'{name:<{width}}  {text}\n' for name, text in known.items())


def table() -> str:
  """The algorithms as a Markdown table with paper, gin file and test."""
  rows = ['| algorithm | what it is | paper | gin file | test |', '|---|---|---|---|---|']
  for name, text in algorithms().items():
    link = re.search(r'https?://\S+', text)
    what = re.sub(r'\s*https?://\S+', '', text)
    loss = re.search(r'loss_fn = @(\w+)\.', (_ROOT / f'{name}.gin').read_text(encoding='utf-8'))
    test = f'tests/losses/{loss[1]}_test.py' if loss else ''
    rows.append(f'| `{name}` | {what} | {link[0] if link else ""} | `gin_configs/{name}.gin` | `{test}` |')
  return '\n'.join(rows) + '\n'


def exists(name: str) -> bool:
  """Whether the package has this gin file, named from its gin folder."""
  return (_ROOT / name).is_file()


class Parsed:
  """Which bindings the package's own files made: one of them may stay unused in some mode, one of the user's may not."""

  package: dict[str, str] = {}


def parse(algo: str, *, files: Sequence[str], user_files: Sequence[str], bindings: Sequence[str]) -> None:
  """Parses gin files and bindings, later ones winning.

  Args:
    algo: an algorithm.
    files: further files of the package, named from its gin folder.
    user_files: any gin files; what they include and import is looked for beside them.
    bindings: as 'preference.dpo.beta=0.2'.

  Raises:
    UsageError: a file is missing, or a line or binding is wrong; the message quotes it.
  """
  _clear()
  with contextlib.chdir(_ROOT), _explained(f'gin_configs/{algo}.gin'):
    for name in (f'{algo}.gin', *files):
      gin.parse_config_file(name, print_includes_and_imports=False)
  Parsed.package = _values(gin.config_str())
  _parse_user(user_files, bindings)


def parse_saved(text: str, user_files: Sequence[str], bindings: Sequence[str]) -> None:
  """Parses base.gin, then the operative configuration that a checkpoint holds, then files and bindings of the user."""
  _clear()
  for name in user_files:
    _import_from(pathlib.Path(name).absolute().parent)
  with contextlib.chdir(_ROOT), _explained('the config.gin of the checkpoint'):
    gin.parse_config_file('base.gin', print_includes_and_imports=False)
    gin.parse_config(text)
  Parsed.package = _values(gin.config_str())
  _parse_user(user_files, bindings)


def _clear() -> None:
  gin.clear_config()
  if str(_ROOT) not in gin.config._LOCATION_PREFIXES:  # pylint: disable=protected-access
    gin.add_config_file_search_path(str(_ROOT))


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
    with contextlib.chdir(path.parent), _explained(f'--gin_file={name}'):
      gin.parse_config_file(str(path), print_includes_and_imports=False)
    imports += re.findall(r'^(?:from [\w.]+ )?import [\w. ]+$', path.read_text(encoding='utf-8'), re.MULTILINE)
  header = _header(imports)
  for binding in bindings:
    if '=' not in binding:
      raise types.UsageError(f'--gin={binding}: write NAME.PARAMETER=VALUE, as preference.dpo.beta=0.2')
    with _explained(f'--gin={binding}'):
      gin.parse_config(header + binding)


def _header(imports: Sequence[str]) -> str:
  """Imports of the package's modules and of the user's, whose names win."""
  bound = lambda line: line.split(' as ')[-1].split('import ')[-1].strip()
  users = [line for line in imports if '__gin__' not in line]
  taken = {bound(line) for line in users}
  package = [line for line in _HEADER.strip().splitlines() if bound(line) not in taken]
  return '\n'.join([*package, *users, ''])


@contextlib.contextmanager
def _explained(where: str):
  """Turns what gin and the user's modules raise while parsing into one line for the user."""
  try:
    yield
  except (OSError, SyntaxError, ImportError, ValueError, TypeError, AttributeError, NameError, RuntimeError) as err:
    raise types.UsageError(f'{where}: {" ".join(str(err).split())}') from err


def get(name: str) -> Callable[..., Any]:
  """The function or class of this name ('train.train'), with its bindings."""
  with _explained(name):
    return gin.get_configurable(name)


def query(name: str) -> Any:
  """The value bound to a parameter ('loop.Options.steps')."""
  return gin.query_parameter(name)


def bindings() -> str:
  """Everything that was bound, as text."""
  return gin.config_str()


def checked_operative() -> str:
  """The operative configuration as text; call it when everything has been called once.

  Raises:
    UsageError: a binding of the user's had no effect, so far as can be known by now.
  """
  operative = gin.operative_config_str()
  used = _values(operative)
  idle = [
      f'{name} = {value}'
      for name, value in _values(gin.config_str()).items()
      if name not in used and Parsed.package.get(name) != value
  ]
  if idle:
    raise types.UsageError(f'bound, but not used by this run: {"; ".join(idle)}; see config.gin of a run for what is used')
  return operative


def _values(text: str) -> dict[str, str]:
  """Bindings of a gin text by name."""
  joined = re.sub(r'\\\n\s*', '', text)
  return dict(re.findall(r'^([\w./]+) = ((?:.*)(?:\n[ \]\)}].*)*)', joined, re.MULTILINE))


def diff(old: str, new: str, ignore: Sequence[str] = ()) -> list[str]:
  """What differs between two texts of bindings, as 'NAME: OLD -> NEW', but for ignored names."""
  before, after = _values(old), _values(new)
  return [
      f'{name}: {before.get(name, "unset")} -> {after.get(name, "unset")}'
      for name in sorted(before.keys() | after.keys())
      if before.get(name) != after.get(name) and name not in ignore
  ]
