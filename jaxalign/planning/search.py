"""Searches for the settings with which a run fits and its step is fast, by compiling it with each of them."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any
from typing import NamedTuple

from absl import logging

from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.planning import plan as plan_lib
from jaxalign.planning import topology as topology_lib


def meshes(count: int) -> list[str]:
  """Those that are tried of so many devices of a slice: parameters over all of them, or rows of matrices over some."""
  ways = (n for n in (1, 2, 4, 8) if count % n == 0 and n <= count)
  return [f'fsdp:{count // n}' + (f',tensor:{n}' if n > 1 else '') for n in ways]


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
    run: str,
) -> 'Search':
  """The step compiled at every point, without those where mesh and model do not agree, and the fastest run whole.

  Args:
    job: see `plan.plan`, but for the mesh.
    recipe: what is varied.
    plan_fn: `plan.plan` with what is not.
    topology: what it is for.
    mesh: as `--mesh`; where empty, several are tried.
    dcn_mesh: as `--dcn_mesh`.
    run: the command line without what is searched for.

  Raises:
    UsageError: they agree nowhere.
  """
  texts = [mesh] if mesh else meshes(sharding.per_slice(topology.devices))
  mesh_of = lambda text: sharding.make_mesh(text, dcn_mesh, topology.devices)

  def compiled(point: dict[str, Any], **only: bool) -> plan_lib.Plan:
    packing = dataclasses.replace(recipe.packing, rows=point['rows'], micro_batches=point['micro_batches'])
    varied = dataclasses.replace(recipe, packing=packing, remat=point['remat'])
    return plan_fn(dataclasses.replace(job, mesh=mesh_of(point['mesh'])), recipe=varied, **only)

  found, problem = list[tuple[dict[str, Any], plan_lib.Plan]](), None
  for point in points(recipe, texts, lambda text: sharding.parts(mesh_of(text), 'batch')):
    try:
      one = compiled(point, only_step=True)
    except types.UsageError as err:
      problem = err
      logging.info('%s: left out, as %s', _said(point), err)
      continue
    logging.info('%s: %s', _said(point), _result(one))
    found.append((point, one))
  if not found:
    rows = recipe.packing.rows * recipe.packing.micro_batches
    raise problem or types.UsageError(
        f'--search: {rows} rows of a step (loader.Packing.rows x micro_batches) cannot be spread over {texts}'
    )
  checked = set[int]()
  while (front := pareto([one for _, one in found])) and front[0] not in checked:
    point = found[front[0]][0]
    found[front[0]] = point, compiled(point)
    logging.info('%s, the whole run: %s', _said(point), _result(found[front[0]][1]))
    checked.add(front[0])
  return Search(found, run)


class Search(NamedTuple):
  """What was compiled: settings and what became of each, the fastest that fits with all programs of the run.

  `run` is the command line that they are added to.
  """

  found: list[tuple[dict[str, Any], plan_lib.Plan]]
  run: str

  def to_json(self) -> list[dict[str, Any]]:
    """An object a point; `on_front` tells those of the Pareto front."""
    chosen = pareto([one for _, one in self.found])
    return [point | {'on_front': i in chosen} | one.to_json() for i, (point, one) in enumerate(self.found)]

  def table(self) -> str:
    """The Pareto front in words, with the flags of each point."""
    return front(self.found, self.run)


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
  front = [(size, time, i) for size, time, i in good if not any(s <= size and t < time for s, t, _ in good)]
  return [i for _, _, i in sorted(front, key=lambda of: of[1])]


def command(point: dict[str, Any]) -> str:
  """The flags that choose a point."""
  bound = {'loader.Packing.rows': point['rows'], 'loader.Packing.micro_batches': point['micro_batches']}
  bindings = [f'--gin={name}={value}' for name, value in bound.items()]
  return ' '.join([f'--mesh={point["mesh"]}', *bindings, f"--gin=\"recipe.Recipe.remat='{point['remat']}'\""])


def front(found: Sequence[tuple[dict[str, Any], plan_lib.Plan]], run: str) -> str:
  """The Pareto front in words, with the flags of each point."""
  chosen = pareto([one for _, one in found])
  if not chosen:
    least, smallest = min((one.hbm_bytes, i) for i, (_, one) in enumerate(found))
    over = (least - found[smallest][1].chip.hbm_bytes) / 2**30
    return f'none of {len(found)} fits; the smallest is {over:.2f} GiB too large: {command(found[smallest][0])}\n'
  lines = [f'{len(found)} compiled; none of the others is both smaller and faster than these:']
  for i in chosen:
    point, one = found[i]
    lines.append(
        f'  {one.step.hbm_bytes / 2**30:7.2f} GiB  {one.step.seconds * 1e3:9.1f} ms  MFU at most {one.mfu_bound:6.1%} '
        f' {command(point)}'
    )
  point, one = found[chosen[0]]
  lines.append(f'the whole run fits with the first, in {one.hbm_bytes / 2**30:.2f} GiB: {run} {command(point)}')
  return '\n'.join(lines) + '\n'
