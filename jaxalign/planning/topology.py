"""Devices that are not there: TPU topologies to compile for, and what is known of each kind of chip."""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from jaxalign import compiling
from jaxalign import types

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device, as JAX counts them: half a chip of v4 and TPU7x, a whole one of the others.

  Attributes:
    name: as `--topology` has it.
    hbm_bytes: that programs may use: what the compiler says is available, of GPUs the published size.
    flops: bfloat16 products and sums a second, at their peak.
    hbm_speed: bytes a second, at their peak.
    link_speed: bytes a second to the other chips of a slice, all links and directions together.
    clock: cycles a second of the estimates in compiled programs, 0 where it is not known.
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_speed: float
  link_speed: float
  clock: float = 0.0


# Published by Google (cloud.google.com/tpu/docs) and NVIDIA (data sheets); memory as libtpu says.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v4', 15.25 * _GIB, 137.5e12, 614e9, 150e9, 1.05e9),
        Chip('v5e', 15.75 * _GIB, 197e12, 819e9, 200e9, 1.5e9),
        Chip('v5p', 95.74 * _GIB, 459e12, 2765e9, 600e9, 1.75e9),
        Chip('v6e', 31.25 * _GIB, 918e12, 1640e9, 448e9, 1.75e9),
        Chip('tpu7x', 94.75 * _GIB, 1153.5e12, 3690e9, 600e9),
        Chip('a100', 80e9, 312e12, 2039e9, 600e9),
        Chip('h100', 80e9, 989e12, 3350e9, 900e9),
        Chip('h200', 141e9, 989e12, 4800e9, 900e9),
    )
}
_GPUS = ('a100', 'h100', 'h200')
_LARGEST = {'v4': 4096, 'v5e': 256, 'v5p': 8960, 'v6e': 256, 'tpu7x': 9216}  # chips of a slice
_FLAT = ('v5e', 'v6e')  # whose chips form a torus of two dimensions, those of other TPUs one of three


@dataclasses.dataclass(frozen=True)
class Topology:
  """What a plan is for.

  Attributes:
    chip: of which kind the devices are.
    devices: to compile for.
    estimated: whether they are CPUs that stand for GPUs: programs are then others, and sizes estimates.
    name: as `--topology` names a slice.
    num_slices: of how many.
  """

  chip: Chip
  devices: list[jax.Device]
  estimated: bool
  name: str
  num_slices: int


def find(text: str, num_slices: int = 1) -> Topology:
  """The devices that `--topology` names: v5p:4x4x4 of TPUs, h100:8 of GPUs.

  Call it before JAX has looked for devices, as it gives this process CPUs that stand for GPUs.

  Raises:
    UsageError: there is no such chip or topology, or libtpu is not installed.
  """
  name, _ = _parsed(text)
  if name in _GPUS:
    if num_slices > 1:
      raise types.UsageError(f'--topology={text}: GPUs are in one slice, not {num_slices}')
    return Topology(CHIPS[name], _cpus(text, count_of(text)), True, text, 1)
  # libtpu reads these when it is loaded; without them it asks the machine's metadata, which are not there.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  compiling.tune_compiler()
  jax.config.update('jax_platforms', 'cpu')
  options = {'num_slices': num_slices} if num_slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=text, **options)
  except (ImportError, RuntimeError, ValueError) as err:
    if isinstance(err, ImportError) or 'not installed' in str(err) or 'libtpu.so' in str(err):
      raise types.UsageError(f'--topology={text}: {_install()}') from err
    raise types.UsageError(f'--topology={text}: libtpu knows no such topology ({str(err).splitlines()[0]})') from err
  return Topology(CHIPS[name], list(found.devices), False, text, num_slices)


def count_of(text: str) -> int:
  """How many devices a topology has, GPUs without CPUs that stand for them: two a chip of v4 and TPU7x."""
  name, sizes = _parsed(text)
  return int(sizes) if name in _GPUS else len(find(text).devices)


def _parsed(text: str) -> tuple[str, str]:
  """Name of the chip, and its sizes, as many as it has."""
  name, _, sizes = text.partition(':')
  if name not in CHIPS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sizes):
    raise types.UsageError(
        f'--topology={text}: the chips are {", ".join(CHIPS)}; write for example v5e:4x4, v5p:4x4x4 or h100:8'
    )
  count = sizes.count('x') + 1
  if name in _GPUS:
    if count > 1:
      raise types.UsageError(f'--topology={text}: of GPUs their number, as h100:8')
  # libtpu takes other numbers of them, and makes devices of what is not there.
  elif count != (wanted := 2 if name in _FLAT else 3):
    raise types.UsageError(
        f'--topology={text}: {name} has {wanted} sizes, as {name}:{"x".join("4" * wanted)}, not {count}'
    )
  elif math.prod(map(int, sizes.split('x'))) > _LARGEST[name]:
    raise types.UsageError(f'--topology={text}: a slice of {name} has at most {_LARGEST[name]} chips; see --num_slices')
  return name, sizes


def _install() -> str:
  return "libtpu is wanted, which compiles for TPUs on any Linux with x86-64: pip install -e '.[tpu]'"


def _cpus(text: str, count: int) -> list[jax.Device]:
  jax.config.update('jax_platforms', 'cpu')
  try:
    # Whoever asked for more, by JAX_NUM_CPU_DEVICES, may want another topology later.
    jax.config.update('jax_num_cpu_devices', max(count, jax.config.values['jax_num_cpu_devices']))
  except RuntimeError:
    pass  # They are there already.
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise types.UsageError(f'--topology={text}: this process has {len(devices)} CPU devices already; start another')
  return devices[:count]
