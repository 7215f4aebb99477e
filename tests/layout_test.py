"""How the package is laid out: what imports what, who may spell a mesh axis, how long things are.

A rule is a function from a module to the lines that break it. Every rule is also shown a module that breaks it.
"""

import ast
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import graphlib
import pathlib
import re
import textwrap

import pytest

from jaxalign import sharding
from jaxalign.cli import catalog

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOP = {'setup.py', 'jaxalign', 'launch', 'gin_configs', 'tests', 'tools', 'README.md', 'LICENSE'}
IGNORED = {'build', 'dist', 'runs', 'jaxalign.egg-info'}

# Modules and packages, lowest first; each imports from rows below its own, and packages within themselves.
ROWS = (
    ('types',),
    ('compiling', 'masked', 'moments', 'pages', 'storage'),
    ('losses', 'profiling', 'sharding'),
    ('data', 'metrics', 'optim', 'tracing', 'vocab'),
    ('models',),
    ('divergence', 'held_out', 'logps', 'rewards'),
    ('forward', 'generation'),
    ('objectives', 'reference', 'rl'),
    ('step',),
    ('checkpoint',),
    ('loop', 'recipe'),
    ('needs', 'reading'),
    ('scorers',),
    ('opening', 'respond', 'resume', 'score', 'streams'),
    ('evaluate', 'planning'),
    ('train',),
    ('cli',),
    ('steering',),
    ('main',),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
LOOPS = {'train.train', 'loop.run'}
# 'data' is also a flag, a field and a folder: it counts only where an axis is meant.
PLAIN_AXES = set(sharding.AXES) - {'data'}
COLLECTIVES = {'psum', 'pmean', 'pmax', 'pmin', 'all_gather', 'all_to_all', 'psum_scatter', 'ppermute', 'axis_index'}


@dataclasses.dataclass
class Module:
  """A module of the package: 'losses.preference', its text and its tree."""

  name: str
  text: str

  def __post_init__(self):
    self.tree = ast.parse(self.text)

  @property
  def part(self) -> str:
    """The module or package that the table of rows names."""
    return self.name.split('.')[0]

  def nodes(self, *kinds) -> Iterator[ast.AST]:
    return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


def modules() -> list[Module]:
  found = []
  for path in sorted((ROOT / 'jaxalign').rglob('*.py')):
    parts = path.relative_to(ROOT / 'jaxalign').with_suffix('').parts
    found.append(Module('.'.join(parts), path.read_text(encoding='utf-8')))
  return found


def imported(module: Module) -> Iterator[tuple[int, str]]:
  """Line and full name of everything that is imported: 'jaxalign.data.chat', 'jax', 'jax.numpy'."""
  for node in module.nodes(ast.Import):
    yield from ((node.lineno, alias.name) for alias in node.names)
  for node in module.nodes(ast.ImportFrom):
    yield from ((node.lineno, f'{node.module}.{alias.name}') for alias in node.names)


def of_package(module: Module) -> Iterator[tuple[int, list[str]]]:
  """Line and parts of everything that is imported from the package."""
  for line, name in imported(module):
    if name.split('.')[0] == 'jaxalign':
      yield line, name.split('.')[1:]


def imports_point_down(module: Module) -> Iterator[str]:
  if module.part == '__init__':
    return
  for line, parts in of_package(module):
    if parts[0] != module.part and ROW_OF[parts[0]] >= ROW_OF[module.part]:
      yield f'{line}: {module.part} may not import {parts[0]}'
    if parts[0] == module.part and len(parts) == 1:
      yield f'{line}: imports itself'


def within_packages(found: list[Module]) -> dict[str, set[str]]:
  """What each module of a package imports from its own package."""
  within: dict[str, set[str]] = {}
  for module in found:
    own = {'.'.join(parts) for _, parts in of_package(module) if parts[0] == module.part and len(parts) > 1}
    if own:
      within[module.name] = own
  return within


def imports_are_modules(module: Module) -> Iterator[str]:
  package = ROOT / 'jaxalign'
  for line, parts in of_package(module):
    path = package.joinpath(*parts)
    if not path.with_suffix('.py').is_file() and not (path / '__init__.py').is_file():
      yield f'{line}: {".".join(parts)} is not a module'
  for node in module.nodes(ast.ImportFrom):
    if node.level:
      yield f'{node.lineno}: relative import'


def gin_stays_outside(module: Module) -> Iterator[str]:
  if module.name not in ('main', 'cli.config', 'cli.bound'):
    yield from (f'{line}: gin' for line, name in imported(module) if name.split('.')[0] == 'gin')


def losses_are_pure(module: Module) -> Iterator[str]:
  if module.part == 'losses':
    for line, name in imported(module):
      allowed = name.startswith(
          ('jaxalign.losses', 'jaxalign.types', 'jaxalign.masked', 'collections', 'dataclasses', 'typing')
      )
      if not allowed and name.split('.')[0] not in ('jax', 'numpy', 'functools', 'math', 'optax'):
        yield f'{line}: a loss may not see {name}'
    for node in module.nodes(ast.Attribute):
      if node.attr in ('mean', 'sharding'):
        yield f'{node.lineno}: .{node.attr} in a loss'


def one_module_spells_the_mesh(module: Module) -> Iterator[str]:
  if module.name == 'sharding':
    return
  for node in module.nodes(ast.Name, ast.Attribute, ast.alias):
    name = {ast.Name: 'id', ast.Attribute: 'attr', ast.alias: 'name'}[type(node)]
    if vars(node)[name].split('.')[-1] in ('PartitionSpec', 'NamedSharding', 'make_mesh', 'P'):
      if ast.unparse(node) not in ('sharding.make_mesh', 'jaxalign.sharding.make_mesh'):
        yield f'{node.lineno}: {ast.unparse(node)}'
  for node in module.nodes(ast.Constant):
    if node.value in PLAIN_AXES:
      yield f'{node.lineno}: {node.value!r}'
  for node in module.nodes(ast.Call):
    called = ast.unparse(node.func).split('.')[-1]
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    if called in COLLECTIVES and any(isinstance(value, ast.Constant) and value.value == 'data' for value in values):
      yield f'{node.lineno}: {called} over data'
  for node in module.nodes(ast.Subscript):
    if ast.unparse(node).endswith(".shape['data']"):
      yield f"{node.lineno}: shape['data']"


def nothing_prints(module: Module) -> Iterator[str]:
  for node in module.nodes(ast.Call):
    if isinstance(node.func, ast.Name) and node.func.id == 'print':
      yield f'{node.lineno}: print'


def errors_are_named(module: Module) -> Iterator[str]:
  lines = module.text.splitlines()
  for node in module.nodes(ast.ExceptHandler):
    kind = ast.unparse(node.type) if node.type else ''
    # A library may raise nothing narrower; the line then says so.
    if kind in ('', 'BaseException') or kind == 'Exception' and '  # ' not in lines[node.lineno - 1]:
      yield f'{node.lineno}: except without a name or a reason'
  for node in module.nodes(ast.Call):
    if ast.unparse(node.func) == 'getattr' and len(node.args) == 3:
      yield f'{node.lineno}: getattr with a default'


def nothing_is_left_to_do(module: Module) -> Iterator[str]:
  if module.name.split('.')[-1] in ('utils', 'helpers', 'common', 'misc'):
    yield '1: name the module after what it does'
  for node in module.nodes(ast.Name):
    if node.id == 'NotImplementedError':
      yield f'{node.lineno}: NotImplementedError'
  for number, line in enumerate(module.text.splitlines(), 1):
    if 'TODO' in line and 'TODO(#' not in line or 'FIXME' in line:
      yield f'{number}: {line.strip()}'


def sizes_are_readable(module: Module) -> Iterator[str]:
  lines = len(module.text.splitlines())
  if lines > 350:
    yield f'1: {lines} lines'
  for node in module.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
    size = node.end_lineno - node.lineno + 1
    if size > (120 if f'{module.name}.{node.name}' in LOOPS else 60):
      yield f'{node.lineno}: {node.name} has {size} lines'


# Each rule with the name of a module and a text that break it, and how often.
RULES: dict[Callable[[Module], Iterator[str]], tuple[str, str, int]] = {
    imports_point_down: (
        'step',
        """
        from jaxalign import types
        from jaxalign import train
        from jaxalign.rewards import rules
        from jaxalign import checkpoint
        def late():
          from jaxalign import evaluate
        """,
        3,
    ),
    imports_are_modules: (
        'step',
        """
        from jaxalign import types
        from jaxalign.types import Batch
        from . import masked
        """,
        2,
    ),
    gin_stays_outside: ('train', 'import gin\nfrom gin import config\nimport begin\n', 2),
    losses_are_pure: (
        'losses.x',
        """
        import jax
        import gin
        from flax import linen as nn
        from jaxalign import sharding
        def x(a):
          return a.mean()
        """,
        4,
    ),
    one_module_spells_the_mesh: (
        'models.x',
        """
        import jax
        from jax.sharding import PartitionSpec as P
        from jaxalign import sharding
        spec = P('embed')
        other = jax.sharding.NamedSharding(mesh, None)
        axis = 'fsdp'
        mesh = sharding.make_mesh('')
        parts = mesh.shape['data']
        total = jax.lax.psum(x, ('tensor', 'context'))
        both = jax.lax.psum(x, axis_name='data')
        fine = batch['data']
        """,
        8,
    ),
    nothing_prints: ('train', "print('x')\nlogging.info('print')\n", 1),
    errors_are_named: (
        'train',
        """
        try:
          x = getattr(a, 'b', None) or getattr(a, 'b')
        except Exception:
          pass
        try:
          pass
        except (ValueError, KeyError):
          pass
        except Exception as err:  # All that the library raises.
          pass
        except:
          pass
        """,
        3,
    ),
    nothing_is_left_to_do: (
        'data.utils',
        'x = 1  # TODO: more\ny = 2  # TODO(#3): less\nraise NotImplementedError\n',
        3,
    ),
    sizes_are_readable: (
        'losses.x',
        'def long():\n' + '  x = 1\n' * 60 + 'def short():\n' + '  x = 1\n' * 59 + 'x = 1\n' * 300,
        2,
    ),
}


def names(rule) -> str:
  return rule.__name__


class TestRules:

  @pytest.mark.parametrize('rule', RULES, ids=names)
  def test_hold_in_the_package(self, rule):
    broken = [f'jaxalign/{module.name.replace(".", "/")}.py:{line}' for module in modules() for line in rule(module)]
    assert not broken, '\n'.join(broken)

  @pytest.mark.parametrize('rule', RULES, ids=names)
  def test_can_fail(self, rule):
    name, text, count = RULES[rule]
    broken = list(rule(Module(name, textwrap.dedent(text))))
    assert len(broken) == count, broken

  def test_hold_for_every_module(self):
    parts = {module.part for module in modules()}
    assert parts - {'__init__'} == ROW_OF.keys()

  def test_no_package_imports_in_a_circle(self):
    within = within_packages(modules())
    assert {'cli', 'data', 'generation', 'losses', 'models', 'planning', 'rewards', 'rl'} <= {
        name.split('.')[0] for name in within
    }
    graphlib.TopologicalSorter(within).prepare()

  def test_know_a_circle_when_they_see_one(self):
    texts = {
        'rl.a': 'from jaxalign.rl import b',
        'rl.b': 'from jaxalign.rl import c',
        'rl.c': 'from jaxalign.rl import a',
    }
    with pytest.raises(graphlib.CycleError):
      graphlib.TopologicalSorter(within_packages([Module(*item) for item in texts.items()])).prepare()

  def test_let_the_loops_be_longer(self):
    text = 'def run():\n' + '  x = 1\n' * 119
    assert not list(sizes_are_readable(Module('loop', text)))
    assert list(sizes_are_readable(Module('loop', text + '  x = 1\n')))
    assert list(sizes_are_readable(Module('step', text)))

  def test_are_told_of_in_the_readme(self):
    text = (ROOT / 'README.md').read_text(encoding='utf-8').split('## Reading the code')[1].split('\n## ')[0]
    cells = [line.split('|')[1] for line in text.splitlines() if line.startswith('| `')]
    named = [name for cell in cells for name in re.findall(r'`(\w+)(?:\.py|/)`', cell)]
    assert sorted(named) == sorted(ROW_OF)


class TestTop:

  def test_is_fixed(self):
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith('.')}
    assert TOP <= visible
    assert not visible - TOP - IGNORED

  def test_links_the_gin_files_into_the_package(self):
    link = ROOT / 'jaxalign' / 'gin_configs'
    assert link.is_symlink()
    assert str(link.readlink()) == '../gin_configs'


def unheaded(path: pathlib.Path) -> list[str]:
  """What is wrong with the header of a gin file."""
  lines = path.read_text(encoding='utf-8').splitlines()
  name = path.stem
  if not lines or not lines[0].startswith(f'# {name}: ') or not lines[0].removeprefix(f'# {name}: ').strip():
    return [f'{path.name}:1: begins with "# {name}: " and what it is']
  if path.parent.name == 'gin_configs' and name != 'base':
    header = lines[: next((i for i, line in enumerate(lines) if not line.startswith('#')), len(lines))]
    if not any(f'python -m jaxalign.main --algo={name}' in line for line in header):
      return [f'{path.name}: its header gives the command']
  return []


class TestGinFiles:

  @pytest.mark.parametrize('path', sorted((ROOT / 'gin_configs').rglob('*.gin')), ids=lambda path: path.stem)
  def test_have_a_header(self, path):
    assert not unheaded(path)

  @pytest.mark.parametrize(
      'text', ['', 'x.y = 1\n', '# other: a file\n', '# some:\n', '# some: no command\n\nx.y = 1\n']
  )
  def test_without_a_header_are_noticed(self, tmp_path, text):
    folder = tmp_path / 'gin_configs'
    folder.mkdir()
    (folder / 'some.gin').write_text(text)
    assert unheaded(folder / 'some.gin')

  def test_at_the_top_are_listed(self):
    at_the_top = {path.stem for path in (ROOT / 'gin_configs').glob('*.gin')} - {'base'}
    assert set(catalog.algorithms()) == at_the_top
    assert all(f'\n{name} ' in '\n' + catalog.listing() for name in at_the_top)

  def test_configure_by_reference_what_the_package_has(self):
    for path in (ROOT / 'gin_configs').rglob('*.gin'):
      text = path.read_text(encoding='utf-8')
      assert text.count('from __gin__ import dynamic_registration') == 1, path.name
      assert 'import jaxalign' not in text, f'{path.name}: write "from jaxalign import x"'
