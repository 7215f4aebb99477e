"""Parameters back to the Hugging Face layout, with config.json beside them: the inverse of `hf_import.read_params`."""

from collections.abc import Iterator
from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as st

from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import families
from jaxalign.models import hf

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float16': np.dtype(np.float16)}
_SHARD_BYTES = 4 * 2**30
# What each kind of `architecture.RopeScaling` reads beside its factor.
_SCALING_FIELDS = {
    'linear': (),
    'llama3': ('original_length', 'low_freq_factor', 'high_freq_factor'),
    'yarn': ('original_length', 'beta_fast', 'beta_slow', 'attention_factor', 'truncate'),
}
_WITHOUT_TOKEN_HEADS = ('gemma3_text', 'olmo2')  # families whose tokens transformers 5 cannot classify


def config_json(
    config: architecture.Config, origin: Mapping[str, Any] | None, dtype: str, pad_id: int | None
) -> dict[str, Any]:
  """The config.json of an export.

  Args:
    config: of the model.
    origin: the config.json that the model was read from, kept but for dtype and head; None for one that was drawn at
      random, which is written as a Llama.
    dtype: a key of DTYPES.
    pad_id: what pads the batches that a classifier reads, where the origin does not say.

  Raises:
    UsageError: there is no origin, and the model is none that a Llama can be, or transformers has no such head.
  """
  values = dict(origin) if origin else _llama_json(config)
  values.pop('torch_dtype', None)
  values['dtype'] = dtype
  if not config.score_outputs:
    return values
  stem = (values.get('architectures') or ['LlamaForCausalLM'])[0].partition('For')[0]
  if config.score_bias and values['model_type'] in _WITHOUT_TOKEN_HEADS:
    raise types.UsageError(f'transformers has no {stem}{families.OF_TOKENS}; train with recipe.Recipe.score_bias=False')
  if len(values.get('id2label') or {}) != config.score_outputs:
    labels = ['reward'] if config.score_outputs == 1 else [f'LABEL_{i}' for i in range(config.score_outputs)]
    values |= {'id2label': {str(i): label for i, label in enumerate(labels)}}
    values |= {'label2id': {label: i for i, label in enumerate(labels)}}
  values['architectures'] = [stem + (families.OF_TOKENS if config.score_bias else families.OF_SEQUENCES)]
  if values.get('pad_token_id') is None:
    values['pad_token_id'] = pad_id
  return values


def _llama_json(config: architecture.Config) -> dict[str, Any]:
  plain = architecture.Config(
      config.vocab_size,
      config.num_layers,
      config.embed_dim,
      config.num_heads,
      config.num_kv_heads,
      config.head_size,
      config.mlp_dim,
      config.max_length,
      rope_theta=config.rope_theta,
      norm_eps=config.norm_eps,
      tie_embeddings=config.tie_embeddings,
      rope_scaling=config.rope_scaling,
      score_outputs=config.score_outputs,
      score_bias=config.score_bias,
  )
  if plain != config:
    raise types.UsageError(
        'a model that was drawn at random can only be exported where it is a plain Llama; start from a Hugging Face'
        ' directory (--model=DIR)'
    )
  return {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'vocab_size': config.vocab_size,
      'num_hidden_layers': config.num_layers,
      'hidden_size': config.embed_dim,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_size,
      'intermediate_size': config.mlp_dim,
      'max_position_embeddings': config.max_length,
      'rms_norm_eps': config.norm_eps,
      'rope_theta': config.rope_theta,
      'tie_word_embeddings': config.tie_embeddings,
      **({} if config.rope_scaling is None else {'rope_scaling': _scaling_json(config.rope_scaling)}),
  }


def _scaling_json(scaling: architecture.RopeScaling) -> dict[str, Any]:
  fields = 'factor', *_SCALING_FIELDS[scaling.kind]
  values = {name: getattr(scaling, field) for name, field in families.SCALING.items() if field in fields}
  if not scaling.attention_factor:
    values.pop('attention_factor', None)  # transformers has the same default where there is none
  return {'rope_type': scaling.kind, **values}


def tensors(
    params: types.PyTree, config: architecture.Config, family: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a model by their Hugging Face names, one parameter of ours after the other.

  Args:
    params: of the model; a parameter is fetched when its turn comes.
    config: of the model.
    family: `model_type` of config.json.
    dtype: a key of DTYPES.
  """
  fused: dict[str, np.ndarray] = {}
  flat = {
      jax.tree_util.keystr(p, simple=True, separator='/'): x for p, x in jax.tree_util.tree_leaves_with_path(params)
  }
  left = {name: hf.tensor_map(family, config, name) for name in flat}
  for name, x in flat.items():
    source, names = left.pop(name)
    if name == 'head' and config.score_outputs:
      continue
    host = np.asarray(x).astype(DTYPES[dtype])
    for place, theirs in np.ndenumerate(names):
      tensor = source.to_theirs(_without_padding(host[place], name, config))
      if not source.outs:
        yield theirs, tensor
        continue
      whole = fused.setdefault(theirs, np.empty((source.outs, *tensor.shape[1:]), tensor.dtype))
      whole[source.first : source.first + len(tensor)] = tensor
    still = {tensor for one in left.values() for tensor in one.tensors.flat}
    for done in [tensor for tensor in fused if tensor not in still]:
      yield done, fused.pop(done)


def _without_padding(x: np.ndarray, name: str, config: architecture.Config) -> np.ndarray:
  if name == 'embed':
    return x[: config.vocab_size]
  return x[:, : config.vocab_size] if name == 'head' else x


def write(
    directory: pathlib.Path,
    params: types.PyTree,
    config: architecture.Config,
    origin: Mapping[str, Any] | None,
    dtype: str,
    pad_id: int | None = None,
) -> int:
  """Writes config.json and *.safetensors, in parts of at most 4 GiB; returns the number of tensors.

  Raises:
    UsageError: see `config_json`; or the directory holds weights already.
    RunError: a file cannot be written.
  """
  if dtype not in DTYPES:
    raise types.UsageError(f'--dtype={dtype}: it is one of {", ".join(DTYPES)}')
  values = config_json(config, origin, dtype, pad_id)
  if list(directory.glob('*.safetensors')):
    raise types.UsageError(f'{directory}: it holds weights already; choose another directory')
  with hf.writing(directory) as scratch:
    parts = _write_parts(scratch, tensors(params, config, values['model_type'], dtype))
    _name_parts(scratch, parts)
    (scratch / 'config.json').write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
  return sum(len(names) for names in parts)


def _write_parts(directory: pathlib.Path, named: Iterator[tuple[str, np.ndarray]]) -> list[list[str]]:
  """Writes part-N.safetensors; the names of the tensors in each."""
  parts: list[list[str]] = []
  held: dict[str, np.ndarray] = {}

  def flush() -> None:
    st.save_file(held, directory / f'part-{len(parts)}.safetensors', metadata={'format': 'pt'})
    parts.append(list(held))
    held.clear()

  for name, tensor in named:
    if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > _SHARD_BYTES:
      flush()
    held[name] = tensor
  flush()
  return parts


def _name_parts(directory: pathlib.Path, parts: list[list[str]]) -> None:
  """Gives the parts the names that transformers looks for, and writes its index where there are several."""
  if len(parts) == 1:
    (directory / 'part-0.safetensors').rename(directory / 'model.safetensors')
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(parts):
    file = f'model-{i + 1:05}-of-{len(parts):05}.safetensors'
    (directory / f'part-{i}.safetensors').rename(directory / file)
    weight_map |= dict.fromkeys(names, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (directory / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2), encoding='utf-8')
