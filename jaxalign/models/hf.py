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

import jax
import numpy as np
import safetensors

from jaxalign import types
from jaxalign.models import transformer

_INDEX, _WEIGHTS = 'model.safetensors.index.json', 'model.safetensors'

# Keys that change the numbers in a way that the transformer does not have, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    'attention_bias': (False, None),
    'mlp_bias': (False, None),
    'hidden_act': ('silu', 'swish'),
    'rope_scaling': (None,),
    'partial_rotary_factor': (1, None),
    'sliding_window': (None,),
    'quantization_config': (None,),
}


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a parameter comes from.

  Attributes:
    name: of the tensor; {layer} is a number.
    transposed: whether the tensor is [out, in] and ours [in, out].
    ins: how many of our axes are inputs: 2 for (heads, head size).
  """

  name: str
  transposed: bool = False
  ins: int = 1


_LAYER = 'model.layers.{layer}.'
_SOURCES: dict[str, _Source] = {
    'embed': _Source('model.embed_tokens.weight'),
    'head': _Source('lm_head.weight', transposed=True),
    'final_norm': _Source('model.norm.weight'),
    'layers/attn_norm': _Source(_LAYER + 'input_layernorm.weight'),
    'layers/mlp_norm': _Source(_LAYER + 'post_attention_layernorm.weight'),
    'layers/q': _Source(_LAYER + 'self_attn.q_proj.weight', transposed=True),
    'layers/k': _Source(_LAYER + 'self_attn.k_proj.weight', transposed=True),
    'layers/v': _Source(_LAYER + 'self_attn.v_proj.weight', transposed=True),
    'layers/o': _Source(_LAYER + 'self_attn.o_proj.weight', transposed=True, ins=2),
    'layers/gate': _Source(_LAYER + 'mlp.gate_proj.weight', transposed=True),
    'layers/up': _Source(_LAYER + 'mlp.up_proj.weight', transposed=True),
    'layers/down': _Source(_LAYER + 'mlp.down_proj.weight', transposed=True),
}
# Buffers that older files hold and that the configuration says already.
_IGNORED = re.compile(r'.*rotary_emb\.inv_freq')


def read_config(directory: pathlib.Path) -> transformer.Config:
  """Reads config.json of a model of the Llama family.

  Raises:
    RunError: the file is missing or not JSON, lacks a key, or has one that changes the numbers and is not supported.
  """
  path = pathlib.Path(directory) / 'config.json'
  values = _read_json(path)
  kind = values.get('model_type')
  if kind not in ('llama', 'mistral'):
    raise types.RunError(f'{path}: model_type {kind!r} is not supported; llama and mistral are')
  _check_neutral(path, values)
  heads = _number(path, values, 'num_attention_heads', int)
  width = _number(path, values, 'hidden_size', int)
  rope = values.get('rope_parameters') or {}
  return transformer.Config(
      vocab_size=_number(path, values, 'vocab_size', int),
      num_layers=_number(path, values, 'num_hidden_layers', int),
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=_number(path, values, 'num_key_value_heads', int, heads),
      head_size=_number(path, values, 'head_dim', int, width // max(1, heads)),
      mlp_dim=_number(path, values, 'intermediate_size', int),
      max_length=_number(path, values, 'max_position_embeddings', int, 2048),
      rope_theta=_number(path, rope | values, 'rope_theta', float, 10000.0),
      norm_eps=_number(path, values, 'rms_norm_eps', float, 1e-6),
      tie_embeddings=bool(values.get('tie_word_embeddings', False)),
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except OSError as err:
    raise types.RunError(f'{path}: cannot be read ({err.strerror}); --model is a Hugging Face directory') from err
  except ValueError as err:
    raise types.RunError(f'{path}: not JSON ({err})') from err
  if not isinstance(values, dict):
    raise types.RunError(f'{path}: not a JSON object')
  return values


def _check_neutral(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Raises for keys that ask for what the transformer does not do."""
  for key, neutral in _NEUTRAL.items():
    value = values.get(key, neutral[0])
    plain_rope = isinstance(value, dict) and value.get('rope_type', value.get('type')) == 'default'
    if value not in neutral and not (key == 'rope_scaling' and plain_rope):
      raise types.RunError(f'{path}: {key} = {json.dumps(value)} is not supported, and ignoring it changes the numbers')
  kind = (values.get('rope_parameters') or {}).get('rope_type', 'default')
  if kind != 'default':
    raise types.RunError(f'{path}: rope_parameters of rope_type {kind!r} are not supported')


def _number(path: pathlib.Path, values: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
  value: Any = default if values.get(key) is None else values[key]
  if value is None:
    raise types.RunError(f'{path}: the key {key!r} is missing')
  if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
    raise types.RunError(f'{path}: {key} = {json.dumps(value)} should be a positive {kind.__name__}')
  return kind(value)


def read_params(directory: pathlib.Path, config: transformer.Config, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Reads the parameters of `config` as float32, laid out on `mesh`; a reward head is not among them.

  Raises:
    RunError: a file is missing or corrupt, or tensors are missing, of other shapes, or more than the model has.
    UsageError: the mesh does not divide the model.
  """
  directory = pathlib.Path(directory)
  config = dataclasses.replace(config, reward_head=False)
  abstract = transformer.abstract_params(transformer.Transformer(config), mesh)
  with contextlib.ExitStack() as stack:
    tensors = _open(directory, stack)
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in flat}
    _check_names(directory, config, wanted, tensors)
    return jax.tree_util.tree_unflatten(
        tree, [_read_param(directory, config, name, x, tensors) for name, x in wanted.items()]
    )


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
  """What opens the slices of each tensor, by the tensor's name."""
  if (directory / _INDEX).is_file():
    weight_map = _read_json(directory / _INDEX).get('weight_map')
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


def _names(config: transformer.Config, name: str) -> list[str]:
  """The tensors that a parameter is stacked from, one per layer, or the one that it is."""
  source = _SOURCES[name].name
  layers = range(config.num_layers) if name.startswith('layers/') else range(1)
  return [source.format(layer=layer) for layer in layers]


def _check_names(directory, config: transformer.Config, wanted, tensors) -> None:
  expected = {tensor for name in wanted for tensor in _names(config, name)}
  missing = sorted(expected - set(tensors))
  if missing:
    raise types.RunError(f'{directory}: the tensor {missing[0]!r} is missing, as are {len(missing) - 1} others')
  tied = {_SOURCES['head'].name} if config.tie_embeddings else set()
  extra = sorted(name for name in set(tensors) - expected - tied if not _IGNORED.fullmatch(name))
  if extra:
    raise types.RunError(
        f'{directory}: the tensor {extra[0]!r} has no place in a model of {config.num_layers} layers without biases;'
        ' ignoring it would change the numbers'
    )


def _read_param(directory, config: transformer.Config, name: str, x: jax.ShapeDtypeStruct, tensors) -> jax.Array:
  """One parameter on its devices; every distinct part is read once."""
  source = _SOURCES[name]
  slices = [tensors[tensor]() for tensor in _names(config, name)]
  stacked = name.startswith('layers/')
  shape = x.shape[1:] if stacked else x.shape
  vocab = {'embed': 0, 'head': 1}.get(name)
  real = tuple(config.vocab_size if axis == vocab else size for axis, size in enumerate(shape))
  theirs = _their_shape(source, real)
  for tensor, part in zip(_names(config, name), slices):
    if tuple(part.get_shape()) != theirs:
      raise types.RunError(f'{directory}: the tensor {tensor!r} is {part.get_shape()}, config.json makes it {theirs}')
  read: dict[tuple, np.ndarray] = {}

  def part_of(index: Any) -> np.ndarray:
    bounds = tuple(which.indices(size)[:2] for which, size in zip(index, x.shape))
    if bounds not in read:
      layers, inner = (range(*bounds[0]), bounds[1:]) if stacked else (range(1), bounds)
      parts = [_read_part(source, slices[layer], inner, real) for layer in layers]
      read[bounds] = np.stack(parts) if stacked else parts[0]
    return read[bounds]

  return jax.make_array_from_callback(x.shape, x.sharding, part_of)


def _their_shape(source: _Source, ours: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a tensor from that of a parameter of one layer."""
  ins, outs = _sides(source, ours)
  return tuple(int(np.prod(side)) for side in (outs, ins) if side)


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
  values = np.asarray(part[index]).astype(np.float32)
  values = values.T if source.transposed else values
  values = values.reshape([stop - start for start, stop in inside])
  return np.pad(values, [(0, (b - a) - (d - c)) for (a, b), (c, d) in zip(bounds, inside)])


def _flat(bounds: tuple[tuple[int, int], ...], sizes: tuple[int, ...]) -> slice:
  """One range over axes that are one in the tensor; of (heads, head size) only heads are ever split."""
  width = int(np.prod(sizes[1:]))
  return slice(bounds[0][0] * width, bounds[0][1] * width)
