"""Weights and configuration in Hugging Face layout: a folder with config.json and *.safetensors.

Tensors are read slice by slice: a host holds no more than its devices' part of one parameter at a time.
"""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
import safetensors

from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import families
from jaxalign.models import transformer

_INDEX, _WEIGHTS = 'model.safetensors.index.json', 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a parameter comes from.

  Attributes:
    name: of the tensor; {layer} and {expert} are numbers.
    transposed: whether the tensor is [out, in] and ours [in, out].
    ins: how many of our axes, behind those of layers and experts, are inputs: 2 for (heads, head size), 0 for biases.
    first: where its outputs begin, where several parameters are one tensor.
    outs: how many outputs such a tensor has in all; 0 where it is the parameter's alone.
  """

  name: str
  transposed: bool = True
  ins: int = 1
  first: int = 0
  outs: int = 0

  def to_theirs(self, ours: np.ndarray) -> np.ndarray:
    """The tensor, or its part, of one layer's parameter."""
    ins, outs = _sides(self, ours.shape)
    if not ins:
      return np.ascontiguousarray(ours.reshape(-1))
    if not self.transposed:
      return np.ascontiguousarray(ours)
    return np.ascontiguousarray(ours.reshape(int(np.prod(ins)), int(np.prod(outs))).T)


# Buffers that older files hold and that the configuration says already.
_IGNORED = re.compile(r'.*(rotary_emb\.inv_freq|masked_bias)')
_HALVES = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}


def _sources(family: str, config: architecture.Config) -> dict[str, _Source]:
  """Where the parameters of one layer come from, by the name that they have in `layers.Block`."""
  vector = lambda name: _Source(name, transposed=False)
  found = {name: _Source(f'self_attn.{name}_proj.weight', ins=2 if name == 'o' else 1) for name in 'qkvo'}
  found |= {f'{name}_bias': _Source(f'self_attn.{name}_proj.bias', ins=0) for name in 'qkvo'}
  found |= {f'{name}_norm': _Source(f'self_attn.{name}_norm.weight', ins=0) for name in 'qk'}
  found |= {name: _Source(f'mlp.{theirs}.weight') for name, theirs in _HALVES.items()}
  found |= {f'{name}_bias': _Source(f'mlp.{theirs}.bias', ins=0) for name, theirs in _HALVES.items()}
  found['attn_norm'] = vector('input_layernorm.weight')
  found['mlp_norm'] = vector('post_attention_layernorm.weight')
  if config.norms != 'pre':
    found['mlp_norm'] = vector('pre_feedforward_layernorm.weight')
    found['attn_post_norm'] = vector('post_attention_layernorm.weight')
    found['mlp_post_norm'] = vector('post_feedforward_layernorm.weight')
  if config.num_experts:
    theirs = {'gate': 'w1', 'up': 'w3', 'down': 'w2'} if family == 'mixtral' else _HALVES
    where = 'block_sparse_moe' if family == 'mixtral' else 'mlp'
    found |= {name: _Source(f'{where}.experts.{{expert}}.{theirs[name]}.weight') for name in _HALVES}
    found['router'] = _Source(f'{where}.gate.weight')
  if family == 'phi3':
    q, kv, F = config.num_heads * config.head_size, config.num_kv_heads * config.head_size, config.mlp_dim
    for name, first in ('q', 0), ('k', q), ('v', q + kv):
      found[name] = _Source('self_attn.qkv_proj.weight', first=first, outs=q + 2 * kv)
    for name, first in ('gate', 0), ('up', F):
      found[name] = _Source('mlp.gate_up_proj.weight', first=first, outs=2 * F)
  return {name: dataclasses.replace(s, name='model.layers.{layer}.' + s.name) for name, s in found.items()}


_GLOBAL = {
    'embed': _Source('model.embed_tokens.weight', transposed=False),
    'head': _Source('lm_head.weight'),
    'final_norm': _Source('model.norm.weight', transposed=False),
    'reward_head': _Source('score.weight'),
}


class TensorMap(NamedTuple):
  """One parameter of ours: its source, and the tensors that it is stacked from, shaped as its leading axes."""

  source: _Source
  tensors: np.ndarray


def tensor_map(family: str, config: architecture.Config, name: str) -> TensorMap:
  """Where the parameter at path `name`, as 'layers/0/q', of a model of this `model_type` comes from."""
  if name in _GLOBAL:
    return TensorMap(_GLOBAL[name], np.array(_GLOBAL[name].name, object))
  part, block, leaf = name.split('/')
  source, size = _sources(family, config)[leaf], len(config.pattern)
  layers = [config.repeats * size + int(block)]
  if part == 'layers':
    layers = [repeat * size + int(block) for repeat in range(config.repeats)]
  experts = range(config.num_experts) if '{expert}' in source.name else range(1)
  names = np.array([[source.name.format(layer=i, expert=e) for e in experts] for i in layers], object)
  names = names if '{expert}' in source.name else names[:, 0]
  return TensorMap(source, names if part == 'layers' else names[0] if names.ndim > 1 else np.array(names[0], object))


def read_config(directory: pathlib.Path) -> architecture.Config:
  """Reads config.json, see `families.read_config`.

  Raises:
    RunError: the file is missing or not JSON, lacks a key, or has one that changes the numbers and is not supported.
  """
  path = pathlib.Path(directory) / 'config.json'
  return families.read_config(path, read_json(path))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a model.

  Raises:
    RunError: the file cannot be read or is not JSON.
  """
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except OSError as err:
    raise types.RunError(f'{path}: cannot be read ({err.strerror}); --model is a Hugging Face directory') from err
  except ValueError as err:
    raise types.RunError(f'{path}: not JSON ({err})') from err
  if not isinstance(values, dict):
    raise types.RunError(f'{path}: not a JSON object')
  return values


def read_params(directory: pathlib.Path, config: architecture.Config, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Reads the parameters of `config` as float32, laid out on `mesh`; a reward head only where `config` has one.

  Raises:
    RunError: a file is missing or corrupt, or tensors are missing, of other shapes, or more than the model has.
    UsageError: the mesh does not divide the model.
  """
  directory = pathlib.Path(directory)
  abstract = transformer.abstract_params(transformer.Transformer(config), mesh)
  with contextlib.ExitStack() as stack:
    tensors = _open(directory, stack)
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in flat}
    family = str(read_json(directory / 'config.json').get('model_type'))
    maps = {name: tensor_map(family, config, name) for name in wanted}
    _check_names(directory, config, maps, tensors)
    return jax.tree_util.tree_unflatten(
        tree, [_read_param(directory, config, name, x, maps[name], tensors) for name, x in wanted.items()]
    )


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
  """What opens the slices of each tensor, by the tensor's name."""
  if (directory / _INDEX).is_file():
    weight_map = read_json(directory / _INDEX).get('weight_map')
    if not isinstance(weight_map, dict):
      raise types.RunError(f'{directory / _INDEX}: it has no weight_map')
    files = {name: _open_file(directory / name, stack) for name in sorted(set(weight_map.values()))}
  elif (directory / _WEIGHTS).is_file():
    file = _open_file(directory / _WEIGHTS, stack)
    files, weight_map = {_WEIGHTS: file}, dict.fromkeys(file.keys(), _WEIGHTS)
  else:
    others = sorted(path.name for path in directory.glob('*.bin'))
    hint = f'; there is {others[0]}: save the model with safe_serialization=True' if others else ''
    raise types.RunError(f'{directory}: no {_WEIGHTS} and no {_INDEX}{hint}')
  held = {name: set(file.keys()) for name, file in files.items()}
  for tensor, name in weight_map.items():
    if tensor not in held[name]:
      raise types.RunError(f'{directory / name}: it lacks the tensor {tensor!r} that {_INDEX} names')
  return {tensor: functools.partial(files[name].get_slice, tensor) for tensor, name in weight_map.items()}


def _open_file(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  try:
    return stack.enter_context(safetensors.safe_open(str(path), framework='np'))
  except FileNotFoundError as err:
    raise types.RunError(f'{path}: no such file, though {_INDEX} names it') from err
  except (OSError, safetensors.SafetensorError) as err:
    raise types.RunError(f'{path}: not a whole safetensors file ({err}); copy it again') from err


def _check_names(directory, config: architecture.Config, maps: Mapping[str, TensorMap], tensors) -> None:
  expected = {tensor for one in maps.values() for tensor in one.tensors.flat}
  missing = sorted(expected - set(tensors))
  if missing:
    raise types.RunError(f'{directory}: the tensor {missing[0]!r} is missing, as are {len(missing) - 1} others')
  tied = {_GLOBAL['head'].name} if config.tie_embeddings else set()
  extra = sorted(name for name in set(tensors) - expected - tied if not _IGNORED.fullmatch(name))
  if extra:
    raise types.RunError(
        f'{directory}: the tensor {extra[0]!r} has no place in the model that config.json describes, nor have'
        f' {len(extra) - 1} others; ignoring it would change the numbers'
    )


def _read_param(
    directory, config: architecture.Config, name: str, x: jax.ShapeDtypeStruct, one: TensorMap, tensors
) -> jax.Array:
  """One parameter on its devices; every distinct part is read once."""
  source, lead = one.source, one.tensors.ndim
  shape = x.shape[lead:]
  vocab = {'embed': 0, 'head': 1}.get(name)
  real = tuple(config.vocab_size if axis == vocab else size for axis, size in enumerate(shape))
  theirs = _their_shape(source, real)
  opened = {tensor: tensors[tensor]() for tensor in one.tensors.flat}
  for tensor, part in opened.items():
    if tuple(part.get_shape()) != theirs:
      raise types.RunError(f'{directory}: the tensor {tensor!r} is {part.get_shape()}, config.json makes it {theirs}')
  read: dict[tuple, np.ndarray] = {}

  def part_of(index: Any) -> np.ndarray:
    bounds = tuple(which.indices(size)[:2] for which, size in zip(index, x.shape))
    if bounds not in read:
      which = one.tensors
      for axis, (start, stop) in enumerate(bounds[:lead]):
        which = which.take(range(start, stop), axis)
      out = np.empty([stop - start for start, stop in bounds], np.float32)
      for place in np.ndindex(which.shape):
        out[place] = _read_part(source, opened[which[place]], bounds[lead:], real)
      read[bounds] = out
    return read[bounds]

  return jax.make_array_from_callback(x.shape, x.sharding, part_of)


def _their_shape(source: _Source, ours: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a tensor from that of a parameter of one layer."""
  ins, outs = _sides(source, ours)
  wide = (source.outs or int(np.prod(outs)),)
  return wide + ((int(np.prod(ins)),) if ins else ())


def _sides(source: _Source, ours: tuple) -> tuple[tuple, tuple]:
  """Our axes that make up the tensor's last axis (inputs) and its first (outputs), of shapes or of bounds."""
  if len(ours) == 1:
    return (), ours
  if not source.transposed:
    return ours[1:], ours[:1]
  return ours[: source.ins], ours[source.ins :]


def _read_part(source: _Source, part: Any, bounds: tuple[tuple[int, int], ...], real: tuple[int, ...]) -> np.ndarray:
  """Reads `bounds` of one layer's parameter, zeros where they lie beyond the tensor (a padded vocabulary)."""
  inside = tuple((min(start, size), min(stop, size)) for (start, stop), size in zip(bounds, real))
  if any(start == stop for start, stop in inside):
    return np.zeros([stop - start for start, stop in bounds], np.float32)
  sides = zip(_sides(source, inside)[::-1], _sides(source, real)[::-1])
  index = tuple(_flat(side, sizes) for side, sizes in sides if side)
  index = slice(index[0].start + source.first, index[0].stop + source.first), *index[1:]
  values = np.asarray(part[index]).astype(np.float32)
  values = values.T if source.transposed else values
  values = values.reshape([stop - start for start, stop in inside])
  return np.pad(values, [(0, (b - a) - (d - c)) for (a, b), (c, d) in zip(bounds, inside)])


def _flat(bounds: tuple[tuple[int, int], ...], sizes: tuple[int, ...]) -> slice:
  """One range over axes that are one in the tensor; of (heads, head size) only heads are ever split."""
  width = int(np.prod(sizes[1:]))
  return slice(bounds[0][0] * width, bounds[0][1] * width)
