"""Weights and configuration in Hugging Face layout: which tensors of a directory a parameter is made of."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import pathlib
import tempfile
from typing import Any
from typing import NamedTuple

import numpy as np
import safetensors

from jaxalign import storage
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import families


@dataclasses.dataclass(frozen=True)
class Source:
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

  def sides(self, ours: tuple) -> tuple[tuple, tuple]:
    """Our axes that make up the tensor's last axis (inputs) and its first (outputs), of shapes or of bounds."""
    if len(ours) == 1:
      return (), ours
    if not self.transposed:
      return ours[1:], ours[:1]
    return ours[: self.ins], ours[self.ins :]

  def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor from that of a parameter of one layer."""
    ins, outs = self.sides(ours)
    wide = (self.outs or int(np.prod(outs)),)
    return wide + ((int(np.prod(ins)),) if ins else ())

  def to_theirs(self, ours: np.ndarray) -> np.ndarray:
    """The tensor, or its part, of one layer's parameter."""
    ins, outs = self.sides(ours.shape)
    if not ins:
      return np.ascontiguousarray(ours.reshape(-1))
    if not self.transposed:
      return np.ascontiguousarray(ours)
    return np.ascontiguousarray(ours.reshape(int(np.prod(ins)), int(np.prod(outs))).T)


_HALVES = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}


def _sources(family: str, config: architecture.Config) -> dict[str, Source]:
  """Where the parameters of one layer come from, by the name that they have in `layers.Block`."""
  vector = lambda name: Source(name, transposed=False)
  found = {name: Source(f'self_attn.{name}_proj.weight', ins=2 if name == 'o' else 1) for name in 'qkvo'}
  found |= {f'{name}_bias': Source(f'self_attn.{name}_proj.bias', ins=0) for name in 'qkvo'}
  found |= {f'{name}_norm': Source(f'self_attn.{name}_norm.weight', ins=0) for name in 'qk'}
  found |= {name: Source(f'mlp.{theirs}.weight') for name, theirs in _HALVES.items()}
  found |= {f'{name}_bias': Source(f'mlp.{theirs}.bias', ins=0) for name, theirs in _HALVES.items()}
  found['attn_norm'] = vector('input_layernorm.weight')
  found['mlp_norm'] = vector('post_attention_layernorm.weight')
  if config.norms != 'pre':
    found['mlp_norm'] = vector('pre_feedforward_layernorm.weight')
    found['attn_post_norm'] = vector('post_attention_layernorm.weight')
    found['mlp_post_norm'] = vector('post_feedforward_layernorm.weight')
  if config.num_experts:
    theirs = {'gate': 'w1', 'up': 'w3', 'down': 'w2'} if family == 'mixtral' else _HALVES
    where = 'block_sparse_moe' if family == 'mixtral' else 'mlp'
    found |= {name: Source(f'{where}.experts.{{expert}}.{theirs[name]}.weight') for name in _HALVES}
    found['router'] = Source(f'{where}.gate.weight')
  if family == 'phi3':
    q, kv, F = config.num_heads * config.head_size, config.num_kv_heads * config.head_size, config.mlp_dim
    for name, first in ('q', 0), ('k', q), ('v', q + kv):
      found[name] = Source('self_attn.qkv_proj.weight', first=first, outs=q + 2 * kv)
    for name, first in ('gate', 0), ('up', F):
      found[name] = Source('mlp.gate_up_proj.weight', first=first, outs=2 * F)
  return {name: dataclasses.replace(s, name='model.layers.{layer}.' + s.name) for name, s in found.items()}


HEAD = 'lm_head.weight'
_GLOBAL = {
    'embed': Source('model.embed_tokens.weight', transposed=False),
    'head': Source(HEAD),
    'final_norm': Source('model.norm.weight', transposed=False),
    'score': Source('score.weight'),
    'score_bias': Source('score.bias', ins=0),
}


class TensorMap(NamedTuple):
  """One parameter of ours: its source, and the tensors that it is stacked from, shaped as its leading axes."""

  source: Source
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


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """A scratch folder whose files are moved to `directory` when all are written, or removed where that fails.

  Raises:
    RunError: a file cannot be written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.part-', dir=directory) as scratch:
      yield pathlib.Path(scratch)
      for file in sorted(pathlib.Path(scratch).iterdir()):
        file.rename(directory / file.name)
  except (OSError, safetensors.SafetensorError) as err:
    raise types.RunError(f'{directory}: cannot be written ({err})') from err


def read_config(directory: storage.Path) -> architecture.Config:
  """Reads config.json, see `families.read_config`.

  Raises:
    RunError: the file is missing or not JSON, lacks a key, or has one that changes the numbers and is not supported.
  """
  path = storage.path(directory) / 'config.json'
  return families.read_config(path, read_json(path))


def read_json(path: storage.Path) -> dict[str, Any]:
  """The object in a JSON file of a model.

  Raises:
    RunError: the file cannot be read or is not JSON.
  """
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except storage.errors() as err:
    raise types.RunError(
        f'{path}: cannot be read ({storage.reason(err)}); a model is a Hugging Face directory'
    ) from err
  except ValueError as err:
    raise types.RunError(f'{path}: not JSON ({err})') from err
  if not isinstance(values, dict):
    raise types.RunError(f'{path}: not a JSON object')
  return values
