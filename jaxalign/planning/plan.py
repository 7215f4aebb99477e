"""What a run would need of devices that are not there: its programs are compiled for them, and their text is read.

Nothing runs: sizes, products and collectives are the compiler's; times are bounds that follow from them.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import math
import re
import time
from typing import Any

from absl import logging
import jax

from jaxalign import loop
from jaxalign import optim
from jaxalign import recipe as recipe_lib
from jaxalign import types
from jaxalign.planning import hlo
from jaxalign.planning import programs as programs_lib
from jaxalign.planning import topology as topology_lib

_UNTOLD = ('flops', 'bytes', 'seconds', 'collectives', 'link_seconds')  # of a program that the compiler refused
_UNITS = {'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler makes of a program, of one device.

  Attributes:
    name: of the program.
    hbm_bytes: at the peak of a run of it: all that it reads, makes and keeps, and what of the run lies beside it.
    hbm_by_class: the same in parts; of what a step makes for a while, as much as parameters take counts as gradients.
    host_bytes: what of the run is kept in the host's memory, for this device; a step brings it here and back.
    fits: whether that is no more than there is.
    flops: of its products, Pallas kernels included.
    bytes: between the chip and its HBM.
    model_flops: that the work takes, without what is computed again.
    seconds: the largest of three bounds: cycles, by the compiler's own estimate, products at the chip's peak, and each
      argument read once. What collectives take beyond that is left out. It is 0 of a program that the compiler refused
      as too large, whose flops, bytes and collectives are not known.
    collectives: by kind, how often in a run and how many bytes.
    link_seconds: what collectives would take if nothing else ran, each byte crossing the links once.
    tokens: that it reads, of the whole mesh.
    compile_seconds: of compiling.
  """

  name: str
  hbm_bytes: float
  hbm_by_class: dict[str, float]
  host_bytes: float
  fits: bool
  flops: float
  bytes: float
  model_flops: float
  seconds: float
  collectives: dict[str, dict[str, float]]
  link_seconds: float
  tokens: int
  compile_seconds: float

  def to_json(self) -> dict[str, Any]:
    """As `--json` prints it: None is what is not known."""
    found = dataclasses.asdict(self)
    return found if self.seconds else found | dict.fromkeys(_UNTOLD)


@dataclasses.dataclass(frozen=True)
class Plan:
  """All programs of a run, and what it is made of."""

  setting: dict[str, Any]
  chip: topology_lib.Chip
  devices: int
  estimated: bool
  programs: list[Compiled]

  @property
  def step(self) -> Compiled:
    """The step of training."""
    return self.programs[0]

  @property
  def fits(self) -> bool:
    """Whether every program does."""
    return all(one.fits for one in self.programs)

  @property
  def hbm_bytes(self) -> float:
    """What the largest program takes of a device."""
    return max(one.hbm_bytes for one in self.programs)

  @property
  def mfu_bound(self) -> float:
    """The share of the peak that the step can use at most."""
    return self.step.model_flops / (self.chip.flops * self.step.seconds) if self.step.seconds else 0.0

  def table(self) -> str:
    """In words and numbers."""
    return _table(self)

  def to_json(self) -> dict[str, Any]:
    """One object: the step, the largest program's memory, and every program."""
    programs = [one.to_json() for one in self.programs]
    largest, step = max(programs, key=lambda one: one['hbm_bytes']), programs[0]
    return self.setting | {
        'devices': self.devices,
        'estimated': self.estimated,
        'fits': self.fits,
        'hbm_bytes': self.hbm_bytes,
        'hbm_limit_bytes': self.chip.hbm_bytes,
        'hbm_by_class': largest['hbm_by_class'],
        'host_bytes': step['host_bytes'],
        'flops_per_device': step['flops'],
        'model_flops_per_device': step['model_flops'],
        'bytes_per_device': step['bytes'],
        'tokens_per_step': step['tokens'],
        'seconds_bound': step['seconds'],
        'mfu_bound': self.mfu_bound or None,
        'collectives': step['collectives'],
        'compile_seconds': sum(one.compile_seconds for one in self.programs),
        'programs': programs,
    }


def plan(
    job: recipe_lib.Job,
    *,
    topology: topology_lib.Topology,
    recipe: recipe_lib.Recipe,
    optimizer: Callable[[int], optim.Optimizer],
    options: loop.Options,
    is_data_known: bool,
    only_step: bool = False,
) -> Plan:
  """Compiles the programs of a run.

  Args:
    job: names model and data; its mesh is of the topology.
    topology: what it is for.
    recipe: the algorithm.
    optimizer: makes the optimizer from the number of steps.
    options: how long.
    is_data_known: see `programs.of_run`.
    only_step: whether the step alone is compiled.

  Raises:
    UsageError: recipe, data, model and mesh do not agree.
  """
  if topology.estimated:  # by a mesh of CPUs, whose defaults are others, and which have no kernels of GPUs
    if recipe.attention not in (None, 'xla'):
      logging.info('attention is estimated as xla, not %s', recipe.attention)
    recipe = dataclasses.replace(recipe, kept_logits=recipe.kept_logits or 0, attention='xla')
  packing = recipe.packing
  setting = {
      'algo': job.algo,
      'model': job.model,
      'chip': topology.chip.name,
      'topology': topology.name,
      'num_slices': topology.num_slices,
      'mesh': {axis: size for axis, size in job.mesh.shape.items() if size > 1},
      'dtype': recipe.dtype,
      'remat': recipe.remat,
      'rows': packing.rows,
      'row_length': packing.row_length,
      'micro_batches': packing.micro_batches,
  }
  found = programs_lib.of_run(job, recipe, optimizer(options.steps), is_data_known=is_data_known)
  with jax.set_mesh(job.mesh):
    resident = programs_lib.resident(found)
    chosen = found[:1] if only_step else found
    compiled = [_compiled(one, resident, topology) for one in chosen]
  return Plan(setting, topology.chip, job.mesh.size, topology.estimated, compiled)


def _compiled(program: programs_lib.Program, resident, topology: topology_lib.Topology) -> Compiled:
  start, chip = time.monotonic(), topology.chip
  of = {name: _device_bytes(tree) for name, tree in program.roles.items()}
  beside = {name: _device_bytes(tree) for name, tree in resident.items() if name not in program.roles}
  on_host = sum(_device_bytes(tree, on_host=True) for tree in {**resident, **program.roles}.values())
  lowered = program.lower()
  with _Refused() as failed:
    compiled = lowered.compile()
  seconds = time.monotonic() - start
  logging.info('%s: compiled in %.1f s', program.name, seconds)
  if failed.needed:
    whole = failed.needed + sum(beside.values())
    parts = of | beside | {'temporaries': max(0.0, failed.needed - sum(of.values()))}
    empty: dict[str, dict[str, float]] = {}
    nothing = 0.0, 0.0, program.model_flops, 0.0, empty, 0.0
    return Compiled(program.name, whole, parts, on_host, False, *nothing, program.tokens, seconds)
  memory = compiled.memory_analysis()
  made = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
  # Of TPUs `temp_size_in_bytes` counts places twice that several buffers take in turn; the peak of CPUs leaves it out.
  peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes  # which it counts too
  peak = max(peak, memory.argument_size_in_bytes + made + topology.estimated * memory.temp_size_in_bytes)
  parts = of | beside | _temporaries(program, peak - memory.argument_size_in_bytes - made)
  parts |= {'results': made, 'program': memory.generated_code_size_in_bytes}
  parts['padding'] = max(0.0, memory.argument_size_in_bytes - sum(of.values()))
  whole = peak + memory.generated_code_size_in_bytes + sum(beside.values())
  costs = hlo.costs(compiled.as_text())
  flops = costs.flops + costs.kernel_flops
  cycles = costs.cycles / chip.clock + costs.kernel_flops / chip.flops if chip.clock else 0.0
  sent = sum(kind['bytes'] for kind in costs.collectives.values())
  return Compiled(
      program.name,
      whole,
      {name: size for name, size in parts.items() if size},
      on_host,
      whole <= chip.hbm_bytes,
      flops,
      costs.bytes,
      program.model_flops,
      max(cycles, flops / chip.flops, _least_bytes(program) / chip.hbm_speed),
      costs.collectives,
      sent / chip.link_speed,
      program.tokens,
      seconds,
  )


def _least_bytes(program: programs_lib.Program) -> float:
  """What a run of a program reads at least: each of its arguments once."""
  return sum(map(_device_bytes, program.roles.values()))


def _temporaries(program: programs_lib.Program, temp: float) -> dict[str, float]:
  """Gradients, float32 as parameters are, and what the passes forward and backward keep."""
  if program.name != 'step':
    return {'activations': temp}
  trained = sum(_device_bytes(program.roles.get(name, {})) for name in ('parameters', 'critic'))
  return {'gradients': min(temp, trained), 'activations': max(0.0, temp - trained)}


def _device_bytes(tree: types.PyTree, *, on_host: bool = False) -> float:
  """Bytes of arrays on one device, or of those that are kept for it in the memory of the host."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
  is_away = lambda x: x.sharding is not None and x.sharding.memory_kind == 'pinned_host'
  return float(sum(size(x) for x in jax.tree.leaves(tree) if is_away(x) == on_host))


class _Refused(contextlib.AbstractContextManager):
  """Catches the compiler's refusal of what does not fit, and keeps how many bytes that wants."""

  needed = 0.0

  def __exit__(self, kind, err, trace) -> bool:
    if not isinstance(err, jax.errors.JaxRuntimeError) or 'RESOURCE_EXHAUSTED' not in str(err):
      return False
    found = re.findall(r'(\d+(?:\.\d+)?)([BKMGT])\b', str(err).split('Largest program allocations')[0])
    self.needed = max(float(number) * _UNITS[unit] for number, unit in found)
    return True


def _table(plan: Plan) -> str:
  chip, step = plan.chip, plan.step
  gib = lambda size: f'{size / 2**30:.2f} GiB'
  kind = 'estimated on CPUs, whose programs are others' if plan.estimated else 'planned, nothing ran'
  lines = [
      f'{plan.setting["algo"]} of {plan.setting["model"]} on {plan.devices} x {chip.name} ({kind})',
      '  ' + ', '.join(f'{name} {value}' for name, value in list(plan.setting.items())[3:]),
      f'  tokens of a step: {step.tokens:,}',
  ]
  for one in plan.programs:
    room = chip.hbm_bytes - one.hbm_bytes
    verdict = f'fits, {gib(room)} to spare' if one.fits else f'does not fit, by {gib(-room)}'
    lines += ['', f'{one.name}: {gib(one.hbm_bytes)} of {gib(chip.hbm_bytes)} of HBM on each device: {verdict}']
    lines += [f'    {name:22}{gib(size):>12}' for name, size in one.hbm_by_class.items() if size >= 2**20]
    if one.host_bytes:
      moved = ', which the step reads and writes: no time is counted for it' if one is step else ''
      lines.append(f'    in the memory of the host{gib(one.host_bytes):>11}{moved}')
    if one.seconds:
      lines += _work(one, chip)
  return '\n'.join(lines) + '\n'


def _work(one: Compiled, chip: topology_lib.Chip) -> list[str]:
  counted = '' if chip.clock else ' by products and reading alone,'
  lines = [
      f'    {one.flops / 1e12:.3f} TFLOP ({one.model_flops / 1e12:.3f} of the model), {one.bytes / 1e9:.2f} GB of HBM',
      f'    at least {one.seconds * 1e3:.2f} ms{counted} and collectives that nothing hides: at most'
      f' {one.model_flops / chip.flops / one.seconds:.1%} of the peak, {one.tokens / one.seconds:,.0f} tokens/s',
  ]
  if one.collectives:
    lines.append(f'    collectives, {one.link_seconds * 1e3:.2f} ms if alone:')
  for kind, of in one.collectives.items():
    lines.append(f'      {kind:20}{of["count"]:8,.0f} x{of["bytes"] / 1e6:12,.1f} MB')
  return [*lines, f'    compiled in {one.compile_seconds:.0f} s']
