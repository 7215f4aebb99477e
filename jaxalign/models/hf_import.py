"""Parameters from *.safetensors in Hugging Face layout, straight onto the mesh.

Layers are stacked where they lie: a tensor is read, put on its devices, and written into the stack there. A host never
holds more than its part of one tensor beside the parameters themselves.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tqdm

from jaxalign import storage
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer

_INDEX, _WEIGHTS = 'model.safetensors.index.json', 'model.safetensors'
# Buffers that older files hold and that the configuration says already.
_IGNORED = re.compile(r'.*(rotary_emb\.inv_freq|masked_bias)')
_LISTED = 5  # names in an error
_PIECE_BYTES = 2**28  # of a parameter that is no stack

# Opens the slices of a tensor by its name.
_Tensors = Mapping[str, Callable[[], Any]]


def read_params(
    directory: storage.Path,
    config: architecture.Config,
    mesh: jax.sharding.Mesh,
    dtype: jax.typing.DTypeLike = 'float32',
    finish: Callable[[str, jax.Array], Any] = lambda name, x: x,
) -> types.PyTree:
  """Reads the parameters of `config` in `dtype`, laid out on `mesh`; a head that scores only where `config` has one.

  Args:
    directory: the folder.
    config: of the model.
    mesh: where they lie.
    dtype: of the parameters, but for a head that scores, which is float32.
    finish: makes what is kept of the parameter with this path, as 'layers/0/q', before the next is read.

  Raises:
    RunError: a file is missing or corrupt, or tensors are missing, of other shapes, or more than the model has.
    UsageError: the mesh does not divide the model.
  """
  directory = storage.path(directory)
  abstract = transformer.abstract_params(transformer.Transformer(config), mesh)
  with contextlib.ExitStack() as stack:
    tensors = _open(directory, stack)
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in flat}
    wanted = {name: x if name in lora_lib.HEAD else x.update(dtype=dtype) for name, x in wanted.items()}
    family = str(hf.read_json(directory / 'config.json').get('model_type'))
    maps = {name: hf.tensor_map(family, config, name) for name in wanted}
    _check_names(directory, config, maps, tensors)
    real = {name: _real_shape(name, x.shape[maps[name].tensors.ndim :], config) for name, x in wanted.items()}
    for name, one in maps.items():
      _check_shapes(directory, one, real[name], tensors)
    count = sum(one.tensors.size for one in maps.values())
    bar = stack.enter_context(tqdm.tqdm(total=count, desc=f'reading {directory.name}', disable=None, leave=False))
    return jax.tree.unflatten(
        tree, [finish(name, _read_param(x, maps[name], real[name], tensors, bar)) for name, x in wanted.items()]
    )


def _open(directory: storage.Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
  """What opens the slices of each tensor, by the tensor's name."""
  if (directory / _INDEX).is_file():
    weight_map = hf.read_json(directory / _INDEX).get('weight_map')
    if not isinstance(weight_map, dict):
      raise types.RunError(f'{directory / _INDEX}: it has no weight_map')
    files = {name: _open_file(directory / name, stack) for name in sorted(set(weight_map.values()))}
  elif (directory / _WEIGHTS).is_file():
    file = _open_file(directory / _WEIGHTS, stack)
    files, weight_map = {_WEIGHTS: file}, dict.fromkeys(file.keys(), _WEIGHTS)
  else:
    others = sorted(path.name for path in (*directory.glob('*.bin'), *directory.glob('*.safetensors')))
    remedy = f'copy {_INDEX} too' if others and others[0].endswith('.safetensors') else 'save it as safetensors'
    hint = f'; there is {others[0]}: {remedy}' if others else ''
    raise types.RunError(f'{directory}: no {_WEIGHTS} and no {_INDEX}{hint}')
  held = {name: set(file.keys()) for name, file in files.items()}
  for tensor, name in weight_map.items():
    if tensor not in held[name]:
      raise types.RunError(f'{directory / name}: it lacks the tensor {tensor!r} that {_INDEX} names')
  return {tensor: functools.partial(files[name].get_slice, tensor) for tensor, name in weight_map.items()}


def _open_file(path: storage.Path, stack: contextlib.ExitStack) -> Any:
  try:
    return stack.enter_context(safetensors.safe_open(str(storage.local(path)), framework='np'))
  except FileNotFoundError as err:
    raise types.RunError(f'{path}: no such file, though {_INDEX} names it') from err
  except (OSError, safetensors.SafetensorError) as err:
    raise types.RunError(f'{path}: not a whole safetensors file ({err}); copy it again') from err


def _check_names(directory, config: architecture.Config, maps: Mapping[str, hf.TensorMap], tensors: _Tensors) -> None:
  expected = {tensor for one in maps.values() for tensor in one.tensors.flat}
  missing = sorted(expected - set(tensors))
  if missing:
    raise types.RunError(f'{directory}: {_listed(missing)} missing: the model that config.json describes has them')
  tied = {hf.HEAD} if config.tie_embeddings else set()
  extra = sorted(name for name in set(tensors) - expected - tied if not _IGNORED.fullmatch(name))
  if extra:
    raise types.RunError(
        f'{directory}: {_listed(extra)} too many: the model that config.json describes has no place for them, and to'
        ' ignore them would change the numbers'
    )


def _listed(names: list[str]) -> str:
  shown = ', '.join(names[:_LISTED]) + (', ...' if len(names) > _LISTED else '')
  return f'{len(names)} tensors ({shown}) are' if len(names) > 1 else f'the tensor {names[0]} is'


def _real_shape(name: str, shape: tuple[int, ...], config: architecture.Config) -> tuple[int, ...]:
  """The shape of one layer's parameter without the padding of the vocabulary."""
  vocab = {'embed': 0, 'head': 1}.get(name)
  return tuple(config.vocab_size if axis == vocab else size for axis, size in enumerate(shape))


def _check_shapes(directory, one: hf.TensorMap, real: tuple[int, ...], tensors: _Tensors) -> None:
  theirs = one.source.their_shape(real)
  for tensor in one.tensors.flat:
    found = tensors[tensor]().get_shape()
    if tuple(found) != theirs:
      raise types.RunError(f'{directory}: the tensor {tensor!r} is {found}, config.json makes it {list(theirs)}')


def _read_param(
    x: jax.ShapeDtypeStruct, one: hf.TensorMap, real: tuple[int, ...], tensors: _Tensors, bar: tqdm.tqdm
) -> jax.Array:
  """One parameter on its devices, written there piece by piece."""
  whole = jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
  write = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=x.sharding)
  for corner, sizes in _pieces(x, one):
    shape = sizes + x.shape[len(sizes) :]
    offsets = corner + (0,) * (len(shape) - len(corner))
    read: dict[tuple, np.ndarray] = {}

    def part_of(index: Any, shape=shape, offsets=offsets, read=read) -> np.ndarray:
      ranges = (which.indices(size)[:2] for which, size in zip(index, shape))
      bounds = tuple((start + at, stop + at) for (start, stop), at in zip(ranges, offsets))
      if bounds not in read:
        read[bounds] = _read_block(one, bounds, real, tensors, x.dtype)
      return read[bounds]

    whole = write(whole, jax.make_array_from_callback(shape, x.sharding, part_of), offsets)
    bar.update(one.tensors.size * math.prod(shape) / x.size)
  return whole


def _pieces(x: jax.ShapeDtypeStruct, one: hf.TensorMap) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Corner and sizes, along the first axes, of each piece: a tensor of a stack, rows of a tensor; split axes whole."""
  lead = max(1, one.tensors.ndim)
  rows = 1 if one.tensors.ndim else max(1, _PIECE_BYTES * x.shape[0] // (x.size * x.dtype.itemsize))
  split = (part < size for part, size in zip(x.sharding.shard_shape(x.shape), x.shape))
  steps = [size if is_split else rows for size, is_split in zip(x.shape[:lead], split)]
  for corner in itertools.product(*(range(0, size, step) for size, step in zip(x.shape, steps))):
    yield corner, tuple(min(step, size - at) for at, step, size in zip(corner, steps, x.shape))


def _read_block(one: hf.TensorMap, bounds: tuple[tuple[int, int], ...], real, tensors: _Tensors, dtype) -> np.ndarray:
  """The block of a parameter within `bounds`; zeros where it lies beyond the tensors (a padded vocabulary)."""
  lead = one.tensors.ndim
  out = np.zeros([stop - start for start, stop in bounds], dtype)
  for place in np.ndindex(out.shape[:lead]):
    name = one.tensors[tuple(start + at for (start, _), at in zip(bounds, place))]
    _read_layer(one.source, tensors[name](), bounds[lead:], real, out[place])
  return out


def _read_layer(source: hf.Source, tensor: Any, bounds, real: tuple[int, ...], out: np.ndarray) -> None:
  """Copies `bounds` of one layer's parameter into `out`."""
  inside = tuple((min(start, size), min(stop, size)) for (start, stop), size in zip(bounds, real))
  if any(start == stop for start, stop in inside):
    return
  sides = zip(source.sides(inside)[::-1], source.sides(real)[::-1])
  index = tuple(_flat(side, sizes) for side, sizes in sides if side)
  index = slice(index[0].start + source.first, index[0].stop + source.first), *index[1:]
  values = np.asarray(tensor[index])
  if len(inside) == 1 or not source.transposed:
    target = out[tuple(slice(stop - start) for start, stop in inside)]
  else:
    # Only a vocabulary is padded, and its parameters have two axes as the tensor has.
    columns = math.prod(stop - start for start, stop in source.sides(inside)[1])
    target = out.reshape(-1, math.prod(out.shape[source.ins :]))[:, :columns]
    values = values.T
  np.copyto(target, values.reshape(target.shape), casting='unsafe')


def _flat(bounds: tuple[tuple[int, int], ...], sizes: tuple[int, ...]) -> slice:
  """One range over axes that are one in the tensor; of (heads, head size) only heads are ever split."""
  width = math.prod(sizes[1:])
  return slice(bounds[0][0] * width, bounds[0][1] * width)
