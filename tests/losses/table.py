"""What the tests of losses say of each algorithm, as a Markdown table.

  python -m pytest tests/losses --junitxml=losses.xml
  python -m tests.losses.table losses.xml

Of each: its loss and how many lines that has, without signature and docstring; the largest error against its formula in
float64 (of a loss that reads what only whole distributions give, the formula is in a test of its own); how many of the
tests of its laws passed, by what they are about; how far from its fixed point it ended, and what that is.
"""

import ast
import collections
from collections.abc import Callable
import importlib
import inspect
import re
import statistics
import sys
import textwrap
from xml.etree import ElementTree

import numpy as np

from jaxalign.cli import catalog
from tests.losses import fixed_point_test as fixed_point
from tests.losses import methods_test as methods


def loss_of(algo: str) -> Callable:
  """The function that the gin file of an algorithm names, without gin."""
  text = (catalog.ROOT / f'{algo}.gin').read_text(encoding='utf-8')
  module, function = re.findall(r'loss_fn = @(\w+)\.(\w+)', text)[0]
  return getattr(importlib.import_module(f'jaxalign.losses.{module}'), function)


def lines_of(function: Callable) -> int:
  """Lines of a function's body behind its docstring."""
  (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
  assert isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition), function
  first, *_, last = definition.body[1:] * 2
  return last.end_lineno - first.lineno + 1


def gold_error(algo: str) -> str:
  """The largest relative error (absolute where the loss is below 1) of two random worlds."""
  if algo not in methods.ALL:
    return ''
  size, loss, formula = methods.ALL[algo]
  worst = 0.0
  for seed in (0, 1):
    w = methods.world(size, seed)
    found, wanted = np.asarray(w.run(loss).per_item, np.float64)[: len(w.policy)], np.asarray(formula(w))
    worst = max(worst, float(np.max(np.abs(found - wanted) / np.maximum(np.abs(wanted), 1.0))))
  return f'{worst:.0e}'


def laws(path: str) -> dict[str, collections.Counter]:
  """Of each algorithm, how many tests that name it passed, by the class they are of."""
  found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for test in ElementTree.parse(path).iter('testcase'):
    module, _, about = (test.get('classname') or '').rpartition('.')
    named = re.search(r'\[(?:.*-)?([a-z0-9_]+)(?:-.*)?\]$', test.get('name') or '')
    is_law = module.rpartition('.')[2] in ('laws_test', 'methods_test', 'whole_step_test')
    if named and is_law and test.find('failure') is None and about not in ('TestEach', 'TestMetrics'):
      found[named[1]][about.removeprefix('Test').lower()] += 1
  return found


def fixed_point_of(algo: str) -> tuple[str, str]:
  """How far from its fixed point training ended, and why it is there."""
  case = fixed_point.CASES[algo]
  found, wanted = case.check(fixed_point.fitted(case.loss, case.data, follows=case.follows))
  return f'{np.max(np.abs(np.asarray(found) - np.asarray(wanted))):.0e}', case.why


def main() -> None:
  """Prints the table."""
  held = laws(sys.argv[1])
  write = sys.stdout.write
  write('| method | loss | lines | gold error | laws | fixed point | error |\n|---|---|---|---|---|---|---|\n')
  lines = {}
  for algo in fixed_point.OFFLINE:
    loss, (error, why) = loss_of(algo), fixed_point_of(algo)
    lines[loss] = lines_of(inspect.unwrap(loss))
    module = loss.__module__.rpartition('.')[2]
    passed = ', '.join(f'{about} {count}' for about, count in sorted(held[algo].items()))
    row = algo, f'{module}.{loss.__name__}', lines[loss], gold_error(algo), passed, why, error
    write(f'| {" | ".join(map(str, row))} |\n')
  write(f'\n{len(lines)} losses: median {statistics.median(lines.values()):g} lines, at most {max(lines.values())}.\n')


if __name__ == '__main__':
  main()
