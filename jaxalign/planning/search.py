"""Searches for the settings with which a run fits and its step is fast, by compiling it with each of them."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import shlex
from typing import Any
from typing import NamedTuple

from absl import logging
import jax

from jaxalign import opening
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import loader
from jaxalign.models import architecture
from jaxalign.planning import plan as plan_lib
from jaxalign.planning import topology as topology_lib

# What is varied beside the mesh, and how it is bound.
_BINDINGS = {
    'rows': 'loader.Packing.rows',
    'micro_batches': 'loader.Packing.micro_batches',
    'remat': 'recipe.Recipe.remat',
}
BOUND = frozenset(_BINDINGS.values())
_FAULTS = types.UsageError, jax.errors.JaxRuntimeError  # of a point: it cannot be, or the compiler fails
_LONG = 16_384  # tokens of rows that are split over devices too


def meshes(count: int, config: architecture.Config, length: int) -> list[str]:
  """Those that are tried of so many devices of a slice: parameters are spread over all of them, or some split more.

  That is the other axis of matrices, experts of a model with `config` that has any, and the tokens of long rows.
  """
  whole, matrices, experts, tokens = (sharding.axes_of(name)[0] for name in ('embed', 'mlp', 'experts', 'length'))
  ways = [n for n in (2, 4, 8) if count % n == 0]
  splits = [(matrices, n) for n in ways]
  splits += [(experts, n) for n in ways if config.num_experts and config.num_experts % n == 0]
  splits += [(tokens, n) for n in ways if length >= _LONG and length % n == 0]
  return [f'{whole}:{count}', *(f'{whole}:{count // n},{axis}:{n}' for axis, n in splits)]


def points(recipe: recipe_lib.Recipe, texts: Sequence[str], parts_of) -> Iterator[dict[str, Any]]:
  """Settings by name: mesh, remat, and rows of a micro-batch, with as many rows of a step as the recipe's.

  Args:
    recipe: of the run.
    texts: meshes, as `--mesh`.
    parts_of: how many ways a mesh splits rows.
  """
  total = recipe.packing.rows * recipe.packing.micro_batches
  for text, remat, each in itertools.product(texts, ('full', 'attention', 'dots'), (1, 2, 4, 8, 16)):
    rows = each * parts_of(text)
    if total % rows == 0:
      yield {'mesh': text, 'remat': remat, 'rows': rows, 'micro_batches': total // rows}


def planned(
    job: recipe_lib.Job,
    recipe: recipe_lib.Recipe,
    plan_fn: Callable[..., plan_lib.Plan],
    topology: topology_lib.Topology,
    mesh: str,
    dcn_mesh: str,
    command_line: Sequence[str],
) -> 'Search':
  """The step compiled at every point, without those where mesh and model do not agree, and the fastest run whole.

  Args:
    job: see `plan.plan`, but for the mesh.
    recipe: what is varied.
    plan_fn: `plan.plan` with what is not.
    topology: what it is for.
    mesh: as `--mesh`; where empty, several are tried.
    dcn_mesh: as `--dcn_mesh`.
    command_line: of the run, without what is searched for.

  Raises:
    UsageError: they agree nowhere.
  """
  count, length = sharding.per_slice(topology.devices), recipe.packing.row_length
  texts = [mesh] if mesh else meshes(count, opening.config_of(job, recipe), length)
  mesh_of = lambda text: sharding.make_mesh(text, dcn_mesh, topology.devices)

  def compiled(point: dict[str, Any], **only: bool) -> plan_lib.Plan:
    packing = dataclasses.replace(recipe.packing, rows=point['rows'], micro_batches=point['micro_batches'])
    varied = dataclasses.replace(recipe, packing=packing, remat=point['remat'])
    return plan_fn(dataclasses.replace(job, mesh=mesh_of(point['mesh'])), recipe=varied, **only)

  tried = list(points(recipe, texts, lambda text: sharding.parts(mesh_of(text), 'batch')))
  problem = _not_spread(recipe.packing, [text for text in texts if all(point['mesh'] != text for point in tried)])
  if not tried:
    raise types.UsageError(f'--search: {problem}')
  logging.info('--search: %d points%s', len(tried), problem and f'; {problem}')
  try:
    found = _steps(tried, functools.partial(compiled, only_step=True))
  except types.UsageError as err:
    raise types.UsageError(f'{err}{problem and f"; {problem}"}') from err
  whole = set[int]()
  while (best := pareto([one for _, one in found])[:1]) and not whole.issuperset(best):
    (i,) = best
    point = found[i][0]
    try:
      found[i] = point, compiled(point)
    except _FAULTS as err:
      said = _told(point, err)
      del found[i]
      whole = {number - (number > i) for number in whole}
      if not found:
        raise said from err
      continue
    logging.info('%s, the whole run: %s', _said(point), _result(found[i][1]))
    whole.add(i)
  return Search(found, frozenset(whole), command_line)


def _not_spread(packing: loader.Packing, texts: Sequence[str]) -> str:
  rows = f'{packing.rows * packing.micro_batches} rows of a step (loader.Packing.rows x micro_batches)'
  return f'{rows} cannot be spread over {", ".join(texts)}' if texts else ''


def _steps(
    tried: Sequence[dict[str, Any]], compiled: Callable[[dict[str, Any]], plan_lib.Plan]
) -> list[tuple[dict[str, Any], plan_lib.Plan]]:
  """Those points that compile; raises UsageError where none does. Rows are not tried where fewer are too large."""
  found, too_large = list[tuple[dict[str, Any], plan_lib.Plan]](), set[tuple[str, str]]()
  problem: types.UsageError | None = None
  for point in tried:
    # A step of a single micro-batch adds no gradients up, and may fit all the same.
    if (point['mesh'], point['remat']) in too_large and point['micro_batches'] > 1:
      logging.info('%s: left out, as fewer rows are too large', _said(point))
      continue
    try:
      one = compiled(point)
    except _FAULTS as err:
      said = _told(point, err)
      problem = problem or said
      continue
    logging.info('%s: %s', _said(point), _result(one))
    found.append((point, one))
    if not one.fits:
      too_large.add((point['mesh'], point['remat']))
  if not found and problem is not None:
    raise problem
  return found


def _told(point: dict[str, Any], err: Exception) -> types.UsageError:
  """Logs that a point is left out, and returns what to say where no other is left."""
  why = str(err).splitlines()[0]  # Gin says behind it what was called.
  logging.info('%s: left out, as %s', _said(point), why)
  return types.UsageError(f'--search: {_said(point)}: {why}')


class Search(NamedTuple):
  """What was compiled: settings and what became of each, the fastest that fits with all programs of the run.

  `whole` are the numbers of those with all programs; the flags of a point go behind `command_line`.
  """

  found: list[tuple[dict[str, Any], plan_lib.Plan]]
  whole: frozenset[int]
  command_line: Sequence[str]

  def to_json(self) -> list[dict[str, Any]]:
    """An object a point; `on_front` tells those of the Pareto front, `whole` those that are not of the step alone."""
    chosen = pareto([one for _, one in self.found])
    told = [{'on_front': i in chosen, 'whole': i in self.whole} for i in range(len(self.found))]
    return [point | more | one.to_json() for (point, one), more in zip(self.found, told, strict=True)]

  def table(self) -> str:
    """The Pareto front in words, with the flags of each point."""
    return front(self.found, self.command_line)


def _said(point: dict[str, Any]) -> str:
  return ', '.join(f'{name} {value}' for name, value in point.items())


def _result(one: plan_lib.Plan) -> str:
  most, step = one.hbm_bytes, one.step
  if not one.fits:
    return f'does not fit, by {(most - one.chip.hbm_bytes) / 2**30:.2f} GiB'
  return f'{most / 2**30:.2f} GiB, at least {step.seconds * 1e3:.1f} ms, MFU at most {one.mfu_bound:.1%}'


def pareto(plans: Sequence[plan_lib.Plan]) -> list[int]:
  """Numbers of those that fit and whose step no other is both smaller and faster than, the fastest first."""
  good = [(one.step.hbm_bytes, one.step.seconds, i) for i, one in enumerate(plans) if one.fits]
  beats = lambda s, t, size, time: s <= size and t <= time and (s, t) != (size, time)
  front = [(size, time, i) for size, time, i in good if not any(beats(s, t, size, time) for s, t, _ in good)]
  return [i for _, _, i in sorted(front, key=lambda of: of[1])]


def flags(point: dict[str, Any]) -> list[str]:
  """Those that choose a point."""
  return [f'--mesh={point["mesh"]}', *(f'--gin={name}={point[key]!r}' for key, name in _BINDINGS.items())]


def front(found: Sequence[tuple[dict[str, Any], plan_lib.Plan]], command_line: Sequence[str]) -> str:
  """The Pareto front in words, with the flags of each point."""
  chosen = pareto([one for _, one in found])
  if not chosen:
    least, smallest = min((one.hbm_bytes, i) for i, (_, one) in enumerate(found))
    over = (least - found[smallest][1].chip.hbm_bytes) / 2**30
    least_of = shlex.join(flags(found[smallest][0]))
    return f'none of {len(found)} fits; the smallest is {over:.2f} GiB too large: {least_of}\n'
  lines = [f'{len(found)} compiled; none of the others is both smaller and faster than these:']
  for i in chosen:
    point, one = found[i]
    lines.append(
        f'  {one.step.hbm_bytes / 2**30:7.2f} GiB  {one.step.seconds * 1e3:9.1f} ms  MFU at most {one.mfu_bound:6.1%} '
        f' {shlex.join(flags(point))}'
    )
  point, one = found[chosen[0]]
  lines.append(f'the whole run fits with the first, in {one.hbm_bytes / 2**30:.2f} GiB:')
  lines.append(f'  {shlex.join([*command_line, *flags(point)])}')
  return '\n'.join(lines) + '\n'
