"""Mesh axes and the one table from logical axes to mesh axes.

No other module spells a mesh axis or a PartitionSpec: models name logical axes, callers ask this module for shardings.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import os
import re

from absl import logging
from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
import numpy as np

from jaxalign import types

_GONE = 30  # seconds after which a process that says nothing is taken for gone, and the others end

AXES = ('data', 'fsdp', 'tensor', 'context', 'expert')

# Logical axis -> mesh axes. Parameters are sharded over fsdp along `embed` and over tensor along the other matrix axis;
# rows of a batch are spread over every axis that does not split a row or a matrix.
RULES: dict[str, tuple[str, ...]] = {
    'batch': ('data', 'fsdp', 'expert'),
    'length': ('context',),
    'vocab': ('tensor',),
    'embed': ('fsdp',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'mlp': ('tensor',),
    'experts': ('expert',),
    'layers': (),
    'head_size': (),
    'norm': (),
    'hidden': (),
    'rank': (),
    'micro': (),
    'outputs': (),
}


# The same as a key: pairs of a logical axis and mesh axes.
Pairs = tuple[tuple[str, tuple[str, ...]], ...]


def parse_mesh(text: str, flag: str = '--mesh') -> dict[str, int]:
  """Reads 'fsdp:4,tensor:2' into {axis: size}; -1 stands for the devices that the other axes leave.

  Raises:
    UsageError: an axis is unknown or given twice, a size is not -1 or positive, or -1 is given twice.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, (p.strip() for p in text.split(','))):
    match = re.fullmatch(r'(\w+):(-?\d+)', part)
    if not match:
      raise types.UsageError(f'{flag}={text}: {part!r} is not AXIS:SIZE; write for example fsdp:4,tensor:2')
    axis, size = match[1], int(match[2])
    if axis not in AXES:
      raise types.UsageError(f'{flag}={text}: unknown axis {axis!r}; the axes are {", ".join(AXES)}')
    if axis in sizes:
      raise types.UsageError(f'{flag}={text}: axis {axis!r} is given twice')
    if size < 1 and size != -1:
      raise types.UsageError(f'{flag}={text}: the size of {axis!r} must be positive, or -1 for the rest')
    sizes[axis] = size
  if list(sizes.values()).count(-1) > 1:
    raise types.UsageError(f'{flag}={text}: only one axis can be -1')
  return sizes


def _fill(text: str, flag: str, count: int, things: str) -> tuple[int, ...]:
  """Sizes of all AXES, with -1 replaced by what the other axes leave of `count`; `things` says of what."""
  sizes = parse_mesh(text, flag)
  fixed = math.prod(s for s in sizes.values() if s != -1)
  wild = next((a for a, s in sizes.items() if s == -1), None)
  if count % fixed or (wild is None and fixed != count):
    named = ' x '.join(f'{a}:{s}' for a, s in sizes.items() if s != -1) or '1'
    raise types.UsageError(
        f'{flag}={text}: {named} = {fixed} does not divide the {count} {things}; choose sizes whose product does'
        if count % fixed
        else f'{flag}={text}: {named} = {fixed}, but there are {count} {things}; make one axis -1 to take the rest'
    )
  return tuple(count // fixed if axis == wild else sizes.get(axis, 1) for axis in AXES)


def make_mesh(text: str = '', dcn_text: str = '', devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Builds the mesh named by `--mesh` (within a slice, over ICI) and `--dcn_mesh` (between slices).

  Args:
    text: sizes within a slice, 'fsdp:-1' where empty.
    dcn_text: sizes between slices; where empty and there are several slices, 'data:-1'.
    devices: the devices, `jax.devices()` where None.

  Raises:
    UsageError: the sizes do not multiply to the number of devices or slices.
  """
  devices = list(devices if devices is not None else jax.devices())
  slices = {_slice_index(d) for d in devices}
  text = text or 'fsdp:-1'
  if dcn_text and len(slices) == 1 and math.prod(abs(s) for s in parse_mesh(dcn_text, '--dcn_mesh').values()) > 1:
    raise types.UsageError(f'--dcn_mesh={dcn_text}: all devices are in one slice; leave --dcn_mesh out')
  shape = _fill(text, '--mesh', per_slice(devices), 'devices' if len(slices) == 1 else 'devices of a slice')
  if len(slices) > 1:
    dcn_shape = _fill(dcn_text or 'data:-1', '--dcn_mesh', len(slices), 'slices')
    array = mesh_utils.create_hybrid_device_mesh(shape, dcn_shape, devices, allow_split_physical_axes=True)
  elif devices[0].platform == 'tpu':
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    array = np.array(devices).reshape(shape)
  return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def abstract_mesh(text: str, count: int) -> jax.sharding.AbstractMesh:
  """The mesh named by `--mesh` of so many devices, which need not be there; see `make_mesh`."""
  return jax.sharding.AbstractMesh(_fill(text or 'fsdp:-1', '--mesh', count, 'devices'), AXES)


def per_slice(devices: Sequence[jax.Device]) -> int:
  """How many of these devices are in a slice."""
  return len(devices) // len({_slice_index(d) for d in devices})


def _slice_index(device: jax.Device) -> int:
  # Only TPU devices know slices; hosts of other platforms are joined by one flat network.
  return device.slice_index if hasattr(device, 'slice_index') and device.platform == 'tpu' else 0


def platform_of(mesh: jax.sharding.Mesh) -> str:
  """The platform a program on this mesh is compiled for: 'cpu', 'gpu' or 'tpu' (which need not be the local one)."""
  return mesh.devices.flat[0].platform


def check_memory(mesh: jax.sharding.Mesh, kind: str, name: str) -> None:
  """Raises UsageError, by the name of the binding, where the devices of `mesh` have no memory of this kind."""
  device = next((one for one in mesh.devices.flat if one.process_index == jax.process_index()), mesh.devices.flat[0])
  if kind != 'device' and kind not in (kinds := _memories(device)):
    raise types.UsageError(f'{name} = {kind!r}: {device.platform} devices have {", ".join(kinds)} memory')


def _memories(device: jax.Device) -> list[str]:
  return [memory.kind for memory in device.addressable_memories()]


def parts(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, logical: str) -> int:
  """How many ways an axis of this name is split on `mesh`."""
  return math.prod(mesh.shape[axis] for axis in axes_of(logical))


def axes_of(logical: str) -> tuple[str, ...]:
  """The mesh axes of one logical axis."""
  if logical not in RULES:
    raise _unknown(logical)
  return RULES[logical]


def _unknown(logical: str) -> ValueError:
  return ValueError(f'unknown logical axis {logical!r}; sharding.RULES knows {", ".join(RULES)}')


def spec(*logical: str | tuple[str, ...] | None) -> jax.sharding.PartitionSpec:
  """The PartitionSpec of an array whose axes have these logical names, several of one that is two axes made into one.

  None is an axis that is never split.
  """
  several = ((name,) if isinstance(name, str) else name or () for name in logical)
  return jax.sharding.PartitionSpec(*(sum(map(axes_of, names), ()) or None for names in several))


def named(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *logical: str | None) -> jax.sharding.NamedSharding:
  """The sharding, on `mesh`, of an array whose axes have these logical names; no names means replicated."""
  return jax.sharding.NamedSharding(mesh, spec(*logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Constrains `x` to the sharding of its logical axes on the current mesh (`jax.set_mesh`); returns `x` off a mesh."""
  if len(logical) != x.ndim:
    raise ValueError(f'{len(logical)} logical names {logical} for an array of rank {x.ndim}')
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_shardings(mesh: jax.sharding.Mesh, batch: types.Batch, stacked: bool) -> types.Batch:
  """Shardings of a batch: rows over the batch axes, tokens over context; `stacked` if micro-batches lead."""
  lead = ('micro',) if stacked else ()

  def of(path, _):
    name = jax.tree_util.keystr(path)
    return named(mesh, *lead, 'batch', 'length' if '_BT' in name else None)

  return jax.tree_util.tree_map_with_path(of, batch)


def check_rules(rules: Mapping[str, Sequence[str]], name: str) -> None:
  """Raises UsageError, by the name of the binding, where `rules` are not of logical axes to mesh axes."""
  for logical, axes in rules.items():
    if logical not in RULES:
      raise types.UsageError(f'{name}: {logical!r} is none of {", ".join(RULES)}')
    if isinstance(axes, str) or not set(axes) <= set(AXES):
      raise types.UsageError(f'{name}: {logical!r} is given {axes!r}, which is no tuple of {", ".join(AXES)}')


def shardings_of(
    mesh: jax.sharding.Mesh, boxed: types.PyTree, rules: Mapping[str, Sequence[str]] | None = None
) -> types.PyTree:
  """Shardings of a tree of `nn.Partitioned` parameters (arrays or shapes), with every axis checked.

  Key and value heads that are fewer than the devices they would be split over are replicated.

  Args:
    mesh: where they lie.
    boxed: the parameters.
    rules: in place of those of the table, for some logical axes.

  Raises:
    UsageError: a parameter's axis is not divisible by the mesh axes it is split over, or two axes are split over one.
    ValueError: a parameter names a logical axis that the table does not know.
  """
  table: dict[str, Sequence[str]] = {**RULES, **(rules or {})}

  def of(path, leaf):
    if not isinstance(leaf, nn.Partitioned):
      return named(mesh)
    found = [_fitting(mesh, path, size, name, table) for size, name in zip(leaf.value.shape, leaf.names)]
    split = [axis for axes in found for axis in axes]
    if len(set(split)) < len(split):
      which = 'reference_rules, critic_rules or sampling_rules' if rules else 'rules of sharding'
      raise types.UsageError(f'{which}: {jax.tree_util.keystr(path)} is split twice over one of {split}')
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(axes or None for axes in found)))

  return jax.tree_util.tree_map_with_path(of, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _fitting(mesh: jax.sharding.Mesh, path, size: int, logical: str | None, table) -> tuple[str, ...]:
  """The mesh axes that an axis of `size` is split over, none where it is replicated."""
  if logical and logical not in table:
    raise _unknown(logical)
  split = tuple(table[logical]) if logical else ()
  ways = math.prod(mesh.shape[axis] for axis in split)
  if size % ways == 0:
    return split
  # Fewer key heads than devices: each keeps them all, and its queries read one.
  if logical == 'kv_heads' and ways % size == 0:
    return ()
  axes = ' x '.join(f'{axis}:{mesh.shape[axis]}' for axis in split)
  raise types.UsageError(f'--mesh: {jax.tree_util.keystr(path)} has {size} {logical!r}, which {axes} does not divide')


def resized(x: jax.Array | jax.ShapeDtypeStruct, shape: Sequence[int]) -> jax.sharding.NamedSharding:
  """The sharding of an array of another shape that lies like `x`, whole along axes that cannot be split as its are."""
  where = x.sharding
  assert isinstance(where, jax.sharding.NamedSharding), 'parameters lie on a mesh'
  names = [*where.spec, *[None] * (x.ndim - len(where.spec))]
  ways = [size // part for size, part in zip(x.shape, where.shard_shape(x.shape))]
  kept = (axes if size % n == 0 else None for size, n, axes in zip(shape, ways, names))
  return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec(*kept))


def start_distributed() -> None:
  """Starts `jax.distributed` where the environment asks for it.

    COORDINATOR_ADDRESS=HOST:PORT, NUM_PROCESSES=N, PROCESS_ID=0..N-1     any machines
    COORDINATOR_ADDRESS=auto     JAX finds the others by itself: a Cloud TPU VM tells it, but not by its environment
    a Kubernetes TPU job of several workers, a Slurm step of several tasks, Open MPI     likewise

  Raises:
    UsageError: what the environment says is incomplete or impossible, or JAX is in use already.
  """
  env = os.environ
  address = env.get('COORDINATOR_ADDRESS')
  if address and address != 'auto':
    count, index = _process_numbers(env)
    if not re.fullmatch(r'.+:\d+', address):
      raise types.UsageError(f'COORDINATOR_ADDRESS={address}: write HOST:PORT, or auto')
    logging.info('process %d of %d, which meet at %s', index, count, address)
    with _before_jax():
      jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_GONE)
  elif (
      address
      or len(env.get('TPU_WORKER_HOSTNAMES', '').split(',')) > 1
      or 'MEGASCALE_COORDINATOR_ADDRESS' in env
      # A batch script has the number of tasks too, but only `srun` starts them.
      or ('SLURM_STEP_NODELIST' in env and int(env.get('SLURM_NTASKS', '1')) > 1)
      or int(env.get('OMPI_COMM_WORLD_SIZE', '1')) > 1
  ):
    with _before_jax():
      jax.distributed.initialize(heartbeat_timeout_seconds=_GONE)


@contextlib.contextmanager
def _before_jax() -> Iterator[None]:
  """Says what to do where processes cannot meet as JAX is in use."""
  try:
    yield
  except RuntimeError as err:
    if 'must be called before any JAX calls' not in str(err):
      raise
    raise types.UsageError(
        'several processes cannot meet once JAX is in use: where a module that --reward, --environment or a gin file'
        ' names calls JAX as it is imported, have its functions do so'
    ) from err


def _process_numbers(env: Mapping[str, str]) -> tuple[int, int]:
  missing = [name for name in ('NUM_PROCESSES', 'PROCESS_ID') if name not in env]
  if missing:
    raise types.UsageError(f'COORDINATOR_ADDRESS is set, but not {" and ".join(missing)}')
  count, index = env['NUM_PROCESSES'], env['PROCESS_ID']
  if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
    raise types.UsageError(f'NUM_PROCESSES={count}, PROCESS_ID={index}: write N and one of 0 to N-1')
  return int(count), int(index)


def of_first(make: Callable[[], np.ndarray], shape: Sequence[int]) -> np.ndarray:
  """What `make` returns in the first process of a job, in all of them; elsewhere it is not called.

  Args:
    make: returns float64 of that shape.
    shape: the same in all processes.

  Raises:
    Exception: whatever it raises, in the first process.
    RunError: it failed there, in the others. A RunError or UsageError that all know of is so `everywhere`.
  """
  if jax.process_count() == 1:
    return make()
  told = np.zeros(1 + math.prod(shape))
  # As pairs of 32 bits, as JAX would round doubles.
  tell = lambda: multihost_utils.broadcast_one_to_all(told.view(np.uint32)).view(np.float64)
  if jax.process_index() == 0:
    told[0] = 1.0
    try:
      told[:] = 0.0, *make().reshape(-1)
    except (types.RunError, types.UsageError) as err:
      told[0], err.everywhere = 2.0, True
      raise
    finally:  # The others wait, and are told whatever it ended by.
      told = tell()
  elif (told := tell())[0]:
    failure = types.RunError('process 0 failed, and says why')
    failure.everywhere = told[0] == 2.0
    raise failure
  return told[1:].reshape(shape)
