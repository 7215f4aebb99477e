"""Adapters in the format of PEFT: a folder with adapter_config.json and adapter_model.safetensors.

Where a family keeps several of our weights in one tensor (Phi 3), its adapter is theirs side by side: A stacked, B in
blocks. PEFT's adapter of such a tensor is read as one for each of ours, with a common A.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any
from typing import NamedTuple

from flax import traverse_util
import jax
import numpy as np
import safetensors
from safetensors import numpy as st

from jaxalign import storage
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer

_CONFIG, _WEIGHTS, _PREFIX = 'adapter_config.json', 'adapter_model.safetensors', 'base_model.model.'
_HEAD = {name: f'{_PREFIX}{source}' for name, source in (('score', 'score.weight'), ('score_bias', 'score.bias'))}
_PARTS = {'a': '.lora_A.weight', 'b': '.lora_B.weight', 'magnitude': '.lora_magnitude_vector'}
# Keys that are read here, or that say nothing about the numbers.
_READ = {'r', 'lora_alpha', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern', 'target_modules'}
_SILENT = {
    'auto_mapping',
    'base_model_name_or_path',
    'exclude_modules',
    'inference_mode',
    'megatron_core',
    'peft_version',
}
_SILENT |= {'revision', 'task_type', 'qalora_group_size', 'layers_pattern', 'ensure_weight_tying', 'corda_config'}
_SILENT |= {'lora_dropout', 'eva_config', 'lora_ga_config', 'loftq_config', 'runtime_config', 'unsloth_fixed'}
# Values, beside empty ones, that change nothing.
_HARMLESS: dict[str, tuple] = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'init_lora_weights': (True, False, 'gaussian', 'orthogonal'),
    'modules_to_save': (['score'], ['classifier', 'score'], ['score', 'classifier']),
}


class Adapter(NamedTuple):
  """A folder's adapter: for which `model_type`, what it is, its tensors, and its configuration."""

  directory: storage.Path
  family: str
  lora: lora_lib.Lora
  tensors: dict[str, np.ndarray]
  values: Mapping[str, Any]


def read(directory: storage.Path, config: architecture.Config, family: str, like: lora_lib.Lora) -> Adapter:
  """Reads a folder.

  Args:
    directory: the folder.
    config: of the base.
    family: `model_type` of the base.
    like: says the rest, dropout and the precision of the base.

  Raises:
    UsageError: there is no such folder, or `like` says otherwise than the adapter what it is.
    RunError: it is not whole, or is of a kind that would change the numbers.
  """
  path = directory / _CONFIG
  if not path.exists():
    raise types.UsageError(f'lora.Lora.adapter = {str(directory)!r}: there is no {_CONFIG}')
  values = hf.read_json(path)
  for key, value in values.items():
    if key not in _READ | _SILENT and value not in (None, False, [], {}, *_HARMLESS.get(key, ())):
      raise types.RunError(f'{path}: {key} = {json.dumps(value)} changes the numbers, and is not supported')
  _check_numbers(path, values)
  tensors = _load(directory / _WEIGHTS)
  ranks = [x.shape[0] for name, x in tensors.items() if name.endswith(_PARTS['a'])]
  if not ranks:
    raise types.RunError(f'{directory / _WEIGHTS}: it holds no adapter (no *{_PARTS["a"]})')
  adapted = lambda name: any(_stem(tensor) + _PARTS['a'] in tensors for tensor in _names(family, config, name))
  # All modules are brought to one rank and one scale.
  rank, rslora = max(ranks), bool(values.get('use_rslora'))
  lora = dataclasses.replace(
      like,
      rank=rank,
      alpha=_scale(values, '') * (math.sqrt(rank) if rslora else rank),
      targets=tuple(filter(adapted, lora_lib.TARGETS)),
      rslora=rslora,
      dora=bool(values.get('use_dora')),
  )
  for name in ('rank', 'alpha', 'targets', 'rslora', 'dora'):
    asked, found = getattr(like, name), getattr(lora, name)
    if asked not in (found, getattr(lora_lib.Lora(), name)):
      raise types.UsageError(f'lora.Lora.{name} = {asked!r}: the adapter in {directory} has {found!r}; leave it out')
  return Adapter(directory, family, lora, tensors, values)


def _load(path: storage.Path) -> dict[str, np.ndarray]:
  try:
    return st.load_file(storage.local(path))
  except FileNotFoundError as err:
    raise types.RunError(f'{path}: no such file') from err
  except (OSError, safetensors.SafetensorError) as err:
    raise types.RunError(f'{path}: not a whole safetensors file ({err}); copy it again') from err


def read_params(adapter: Adapter, model: transformer.Transformer, mesh: jax.sharding.Mesh) -> types.PyTree:
  """The adapter's parameters for `model`, float32, sharded; with a head that scores where both have one.

  Raises:
    RunError: tensors are missing, of other shapes, or more than the model has a place for.
  """
  abstract = traverse_util.flatten_dict(lora_lib.split(transformer.abstract_params(model, mesh))[0], sep='/')
  whole: dict[str, np.ndarray] = {}
  used = set(_HEAD.values())
  for name, x in abstract.items():
    if name in _HEAD:
      if _HEAD[name] in adapter.tensors:
        whole[name] = _read_head(adapter, _HEAD[name], x.shape[::-1])
      continue
    whole[name] = np.zeros(x.shape, np.float32)
    path, _, part = name.rpartition('_lora_')
    source, names = hf.tensor_map(adapter.family, model.config, path)
    for place, tensor in np.ndenumerate(names):
      whole[name][place] = _read_part(adapter, source, tensor, part, x.shape[names.ndim :])
      used.add(_stem(tensor) + _PARTS[part])
  extra = sorted(set(adapter.tensors) - used)
  if extra:
    raise types.RunError(f'{adapter.directory / _WEIGHTS}: the model has no place for the tensor {extra[0]}')
  put = lambda x, value: jax.make_array_from_callback(x.shape, x.sharding, lambda at: value[at])
  return traverse_util.unflatten_dict({name: put(abstract[name], x) for name, x in whole.items()}, sep='/')


def _read_head(adapter: Adapter, name: str, shape: tuple[int, ...]) -> np.ndarray:
  found = adapter.tensors[name]
  if found.shape != shape:
    raise types.RunError(
        f'{adapter.directory / _WEIGHTS}: the tensor {name} is {list(found.shape)}, the algorithm wants {list(shape)}'
    )
  return np.asarray(found, np.float32).T


def _read_part(adapter: Adapter, source: hf.Source, tensor: str, part: str, shape: tuple[int, ...]) -> np.ndarray:
  """A, B or the magnitude of one layer, at the common rank and scale."""
  name = _stem(tensor) + _PARTS[part]
  found = adapter.tensors.get(name)
  if found is None:
    raise types.RunError(f'{adapter.directory / _WEIGHTS}: it lacks the tensor {name}')
  rank = _rank(adapter.values, _stem(tensor))
  size = math.prod(shape) // (adapter.lora.rank if part != 'magnitude' else 1)
  wanted = {'a': (rank, size), 'b': (source.outs or size, rank), 'magnitude': (source.outs or size,)}[part]
  if found.shape != wanted:
    raise types.RunError(
        f'{adapter.directory / _WEIGHTS}: the tensor {name} is {list(found.shape)}, of this model it would be'
        f' {list(wanted)}: an adapter of another base'
    )
  found = np.asarray(found, np.float32)
  if part == 'a':
    return np.pad(found.T, [(0, 0), (0, adapter.lora.rank - rank)]).reshape(shape)
  found = found[source.first : source.first + size]
  if part == 'magnitude':
    return found.reshape(shape)
  found = found.T * (_scale(adapter.values, _stem(tensor)) / adapter.lora.scale)
  return np.pad(found, [(0, adapter.lora.rank - rank), (0, 0)]).reshape(shape)


def _scale(values: Mapping[str, Any], module: str) -> float:
  """What PEFT multiplies the product of a module's matrices by."""
  rank, alpha = _rank(values, module), _picked(values, 'alpha_pattern', module, values['lora_alpha'])
  return alpha / (math.sqrt(rank) if values.get('use_rslora') else rank)


def _rank(values: Mapping[str, Any], module: str) -> int:
  return _picked(values, 'rank_pattern', module, values['r'])


def _picked(values: Mapping[str, Any], pattern: str, module: str, default: Any) -> Any:
  """The value of the first key, a regular expression of the end of a module's name, that fits."""
  name = module.removeprefix(_PREFIX)
  keys = values.get(pattern) or {}
  return next((value for key, value in keys.items() if re.match(rf'(.*\.)?({key})$', name)), default)


def _check_numbers(path: storage.Path, values: Mapping[str, Any]) -> None:
  """Raises where rank, alpha or one of their patterns is no number."""
  for key, pattern in (('r', 'rank_pattern'), ('lora_alpha', 'alpha_pattern')):
    found = values.get(pattern) or {}
    if not isinstance(found, dict):
      raise types.RunError(f'{path}: {pattern} = {json.dumps(found)} should be an object')
    for name, value in [(key, values.get(key)), *found.items()]:
      if not isinstance(value, int | float) or value <= 0:
        raise types.RunError(f'{path}: {name} = {json.dumps(value)} should be a positive number')


def _stem(tensor: str) -> str:
  return _PREFIX + tensor.removesuffix('.weight')


def _names(family: str, config: architecture.Config, name: str) -> Iterator[str]:
  """The tensors of a weight in all layers."""
  if config.num_experts and name in ('gate', 'up', 'down'):
    return
  size = len(config.pattern)
  for block in range(size):
    if config.repeats:
      yield from hf.tensor_map(family, config, f'layers/{block}/{name}').tensors.flat
  for block in range(config.num_layers - config.repeats * size):
    yield from hf.tensor_map(family, config, f'rest/{block}/{name}').tensors.flat


def write(directory: pathlib.Path, params: types.PyTree, model: transformer.Transformer, family: str, base: str) -> int:
  """Writes the adapters of `params` (base and adapters) and a head that scores; returns the number of tensors.

  Args:
    directory: where; it holds no adapter yet.
    params: of the model.
    model: with adapters.
    family: `model_type` of the base.
    base: what names the base in the configuration.

  Raises:
    UsageError: the directory holds an adapter already, or DoRA adapts but a part of one tensor.
    RunError: a file cannot be written.
  """
  if (directory / _WEIGHTS).exists():
    raise types.UsageError(f'{directory}: it holds an adapter already; choose another directory')
  assert model.lora is not None
  found: dict[str, list[_Part]] = {}
  for path, parts in lora_lib.adapters(params).items():
    source, names = hf.tensor_map(family, model.config, path)
    host = {part: np.asarray(x) for part, x in parts.items()}
    for place, tensor in np.ndenumerate(names):
      found.setdefault(tensor, []).append(_Part(source, {part: x[place] for part, x in host.items()}))
  tensors = {
      _stem(tensor) + _PARTS[part]: np.ascontiguousarray(x)
      for tensor, parts in found.items()
      for part, x in _side_by_side(tensor, parts, model.lora.rank).items()
  }
  tensors |= {
      theirs: np.ascontiguousarray(np.asarray(params[name]).T) for name, theirs in _HEAD.items() if name in params
  }
  counts = {tensor.removesuffix('.weight').rpartition('.')[2]: len(parts) for tensor, parts in found.items()}
  values = _config_json(model.lora, counts, model.config, base)
  with hf.writing(directory) as scratch:
    st.save_file(tensors, scratch / _WEIGHTS, metadata={'format': 'pt'})
    (scratch / _CONFIG).write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  return len(tensors)


class _Part(NamedTuple):
  """The adapter of one of our weights in one layer: 'a', 'b' and, of DoRA, 'magnitude'."""

  source: hf.Source
  arrays: dict[str, np.ndarray]


def _side_by_side(tensor: str, parts: list[_Part], rank: int) -> dict[str, np.ndarray]:
  """The adapter of one tensor from those of the weights in it."""
  outs = parts[0].source.outs or parts[0].arrays['b'].size // rank
  b = np.zeros((outs, rank * len(parts)), np.float32)
  magnitude = np.zeros(outs, np.float32)
  covered = 0
  for i, (source, arrays) in enumerate(parts):
    size = arrays['b'].size // rank
    rows = slice(source.first, source.first + size)
    b[rows, i * rank : (i + 1) * rank] = arrays['b'].reshape(rank, size).T
    if 'magnitude' in arrays:
      magnitude[rows] = arrays['magnitude'].reshape(-1)
    covered += size
  found = {'a': np.concatenate([part.arrays['a'].reshape(-1, rank).T for part in parts]), 'b': b}
  if 'magnitude' not in parts[0].arrays:
    return found
  if covered < outs:
    raise types.UsageError(f'DoRA adapts only a part of {tensor}, which PEFT cannot say; merge the adapter instead')
  return found | {'magnitude': magnitude}


def _config_json(
    lora: lora_lib.Lora, counts: Mapping[str, int], config: architecture.Config, base: str
) -> dict[str, Any]:
  """The content of adapter_config.json; `counts` says how many of our weights each module holds."""
  task = 'CAUSAL_LM' if not config.score_outputs else 'TOKEN_CLS' if config.score_bias else 'SEQ_CLS'
  several = {module: count for module, count in counts.items() if count > 1}
  return {
      'peft_type': 'LORA',
      'task_type': task,
      'base_model_name_or_path': base,
      'r': lora.rank,
      'lora_alpha': lora.alpha,
      'lora_dropout': lora.dropout,
      'target_modules': sorted(counts),
      'use_rslora': lora.rslora,
      'use_dora': lora.dora,
      'bias': 'none',
      'modules_to_save': ['score'] if config.score_outputs else None,
      'rank_pattern': {module: count * lora.rank for module, count in several.items()},
      'alpha_pattern': {
          module: lora.alpha * (math.sqrt(count) if lora.rslora else count) for module, count in several.items()
      },
      'inference_mode': True,
  }
