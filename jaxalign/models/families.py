"""config.json of Hugging Face models, family by family, to `architecture.Config`.

Every key is read, known not to change the numbers, or refused by name: none is ignored on a guess.
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
from typing import Any

from jaxalign import storage
from jaxalign import types
from jaxalign.models import architecture

# Keys that say what a model is called, how it was trained or how it is to be sampled from.
_HARMLESS = frozenset(
    """_attn_implementation _model_name_or_path _name_or_path architectures attention_dropout auto_map bos_token_id
    cache_implementation
    classifier_dropout dtype embd_pdrop eos_token_id id2label initializer_range label2id model_type num_labels
    output_router_logits pad_token_id pretraining_tp problem_type resid_pdrop router_aux_loss_coef
    router_jitter_noise tokenizer_class torch_dtype transformers_version use_cache vocab_size max_window_layers
    _sliding_window_pattern sliding_window_pattern no_rope_layer_interval original_max_position_embeddings
    layer_types num_hidden_layers hidden_act hidden_activation""".split()
)


# How architectures with a head that scores are called.
OF_SEQUENCES, OF_TOKENS = 'ForSequenceClassification', 'ForTokenClassification'


class _Keys:
  """The keys of a config.json, of which it remembers which were read."""

  def __init__(self, path: storage.Path, values: Mapping[str, Any]):
    self.path, self._values, self._read = path, dict(values), set(_HARMLESS)

  def get(self, key: str, default: Any = None) -> Any:
    """A value as it stands; null is as absent."""
    self._read.add(key)
    value = self._values.get(key)
    return default if value is None else value

  def number(self, key: str, kind: Any, default: Any = None) -> Any:
    """A positive int or float."""
    value = self.get(key, default)
    if value is None:
      raise types.RunError(f'{self.path}: the key {key!r} is missing')
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
      raise types.RunError(f'{self.path}: {key} = {json.dumps(value)} should be a positive {kind.__name__}')
    return kind(value)

  def want(self, key: str, *allowed: Any) -> None:
    """Raises where a key asks for what the transformer does not do."""
    value = self.get(key)
    if value is not None and value not in allowed:
      raise self.refused(key, value)

  def refused(self, key: str, value: Any) -> types.RunError:
    """The error for a key that would change the numbers."""
    return types.RunError(
        f'{self.path}: {key} = {json.dumps(value)} is not supported, and ignoring it changes the numbers'
    )

  def check_all_read(self) -> None:
    """Raises for the first key that nothing read, unless it is switched off."""
    for key, value in self._values.items():
      if key not in self._read and value:
        raise self.refused(key, value)


def read_config(path: storage.Path, values: Mapping[str, Any]) -> architecture.Config:
  """The configuration that a config.json describes.

  Args:
    path: of the file, for messages.
    values: its content.

  Raises:
    RunError: the family is not supported, a key is missing, or one changes the numbers and is not supported.
  """
  family = values.get('model_type')
  if family not in FAMILIES:
    raise types.RunError(f'{path}: model_type {family!r} is not supported; there are {", ".join(sorted(FAMILIES))}')
  keys = _Keys(path, values)
  for key in ('quantization_config', 'rope_interleaved', 'is_encoder_decoder', 'add_cross_attention'):
    keys.want(key, False)
  config = {**_common(keys), **FAMILIES[family](keys)}
  config |= _scores(keys)
  keys.check_all_read()
  try:
    return architecture.Config(**config)
  except types.UsageError as err:
    raise types.RunError(f'{path}: {err}') from err


def _scores(keys: _Keys) -> dict[str, Any]:
  """The head of a classifier of sequences (a reward model) or of tokens, whose file has none over the vocabulary."""
  name = (keys.get('architectures') or [''])[0]
  of_tokens = name.endswith(OF_TOKENS)
  if not of_tokens and not name.endswith(OF_SEQUENCES):
    return {}
  if of_tokens and keys.get('token_classification_bias', True) is not True:
    raise keys.refused('token_classification_bias', False)
  labels = keys.get('id2label') or {'0': '', '1': ''}  # two are what transformers takes where nothing is said
  return {'score_outputs': len(labels), 'score_bias': of_tokens, 'tie_embeddings': True}


def _common(keys: _Keys) -> dict[str, Any]:
  """What all families say by the same keys."""
  heads, width = keys.number('num_attention_heads', int), keys.number('hidden_size', int)
  return {
      'vocab_size': keys.number('vocab_size', int),
      'num_layers': keys.number('num_hidden_layers', int),
      'embed_dim': width,
      'num_heads': heads,
      'num_kv_heads': keys.number('num_key_value_heads', int, heads),
      'head_size': keys.number('head_dim', int, width // max(1, heads)),
      'mlp_dim': keys.number('intermediate_size', int),
      'max_length': keys.number('max_position_embeddings', int, 2048),
      'norm_eps': keys.number('rms_norm_eps', float, 1e-6),
      'activation': _activation(keys),
      'tie_embeddings': bool(keys.get('tie_word_embeddings', False)),
      **_rope(keys),
  }


def _activation(keys: _Keys) -> str:
  key = 'hidden_activation' if keys.get('hidden_activation') else 'hidden_act'
  name = keys.get(key, 'silu')
  known = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}
  if name not in known:
    raise keys.refused(key, name)
  return known[name]


def _rope(keys: _Keys) -> dict[str, Any]:
  """Base, scaling and share of rotary positions, as files say them before and since transformers 5."""
  parameters = keys.get('rope_parameters', {})
  by_kind = parameters if 'full_attention' in parameters else {'full_attention': parameters}
  scaling = {**keys.get('rope_scaling', {}), **by_kind['full_attention']}
  theta = scaling.pop('rope_theta', None) or keys.number('rope_theta', float, 10000.0)
  share = keys.number('partial_rotary_factor', float, scaling.pop('partial_rotary_factor', 1.0))
  found: dict[str, Any] = {'rope_theta': float(theta), 'rope_fraction': float(share)}
  local = by_kind.get('sliding_attention')
  if local is not None:
    if local.get('rope_type', 'default') != 'default':
      raise keys.refused('rope_parameters', parameters)
    found['local_rope_theta'] = float(local['rope_theta'])
  return found | {'rope_scaling': _scaling(keys, scaling)}


# What `rope_scaling` calls the fields of `architecture.RopeScaling`.
SCALING = {
    'factor': 'factor',
    'original_max_position_embeddings': 'original_length',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'attention_factor': 'attention_factor',
    'truncate': 'truncate',
}


def _scaling(keys: _Keys, values: dict[str, Any]) -> architecture.RopeScaling | None:
  kind = values.pop('rope_type', None) or values.pop('type', None) or 'default'
  values.pop('type', None)
  if kind == 'default':
    return None
  unknown = [name for name, value in values.items() if name not in SCALING and value is not None]
  if kind not in ('linear', 'llama3', 'yarn') or unknown:
    raise keys.refused('rope_scaling', {'rope_type': kind, **{name: values[name] for name in unknown}})
  given = {SCALING[name]: value for name, value in values.items() if value is not None}
  if kind == 'yarn':
    given.setdefault('original_length', keys.number('max_position_embeddings', int, 2048))
  try:
    return architecture.RopeScaling(kind, **given)
  except (TypeError, types.UsageError) as err:
    raise types.RunError(f'{keys.path}: rope_scaling of {kind!r}: {err}') from err


def _pattern(keys: _Keys, default: tuple[str, ...] = ('full_attention',)) -> tuple[str, ...]:
  """Kinds of all layers, as the shortest pattern that repeats to them."""
  count = keys.number('num_hidden_layers', int)
  layers = keys.get('layer_types') or [default[i % len(default)] for i in range(count)]
  names = {'full_attention': 'global', 'sliding_attention': 'local'}
  if len(layers) != count or not set(layers) <= set(names):
    raise keys.refused('layer_types', layers)
  return shortest([names[layer] for layer in layers])


def shortest(kinds: list[str]) -> tuple[str, ...]:
  """The shortest pattern whose repetition, cut at the end, is `kinds`."""
  for size in range(1, len(kinds) + 1):
    if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
      return tuple(kinds[:size])
  return tuple(kinds)


def _llama(keys: _Keys) -> dict[str, Any]:
  bias = bool(keys.get('attention_bias', False))
  return {'qkv_bias': bias, 'out_bias': bias, 'mlp_bias': bool(keys.get('mlp_bias', False))}


def _mistral(keys: _Keys) -> dict[str, Any]:
  window = keys.get('sliding_window', 0)
  return {'pattern': ('local',), 'window': window} if window else {}


def _mixtral(keys: _Keys) -> dict[str, Any]:
  experts = {
      'num_experts': keys.number('num_local_experts', int, 8),
      'experts_per_token': keys.number('num_experts_per_tok', int, 2),
  }
  return _mistral(keys) | experts


def _qwen(keys: _Keys) -> dict[str, Any]:
  """Layers see a window only where `use_sliding_window` is set; `layer_types` then says which."""
  window = keys.get('sliding_window', 0)
  pattern = _pattern(keys)
  if not keys.get('use_sliding_window', False):
    if 'local' in pattern:
      raise keys.refused('layer_types', keys.get('layer_types'))
    return {}
  if not keys.get('layer_types'):
    raise keys.refused('use_sliding_window', True)
  return {'pattern': pattern, 'window': window}


def _qwen2(keys: _Keys) -> dict[str, Any]:
  return _qwen(keys) | {'qkv_bias': True}


def _qwen3(keys: _Keys) -> dict[str, Any]:
  return _qwen(keys) | {'qk_norm': 'head'} | _llama(keys)


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
  keys.want('decoder_sparse_step', 1)
  keys.want('mlp_only_layers', [])
  return _qwen3(keys) | {
      'num_experts': keys.number('num_experts', int, keys.get('num_local_experts')),
      'experts_per_token': keys.number('num_experts_per_tok', int),
      'normalise_experts': bool(keys.get('norm_topk_prob', False)),
      'mlp_dim': keys.number('moe_intermediate_size', int),
  }


def _gemma(keys: _Keys) -> dict[str, Any]:
  keys.want('attention_bias', False)
  keys.want('use_bidirectional_attention', False)
  tied = bool(keys.get('tie_word_embeddings', True))
  # Where no activation is named it is this one, and `hidden_act` of old files is not what was trained with.
  activation = _activation(keys) if keys.get('hidden_activation') else 'gelu_tanh'
  return {'norm_offset': 1.0, 'scale_embeddings': True, 'activation': activation, 'tie_embeddings': tied}


def _gemma2(keys: _Keys) -> dict[str, Any]:
  return _gemma(keys) | {
      'norms': 'both',
      'pattern': _pattern(keys, ('sliding_attention', 'full_attention')),
      'window': keys.number('sliding_window', int, 4096),
      'query_scale': keys.number('query_pre_attn_scalar', float, 256.0) ** -0.5,
      'attn_softcap': float(keys.get('attn_logit_softcapping', 0.0)),
      'final_softcap': float(keys.get('final_logit_softcapping', 0.0)),
  }


def _gemma3(keys: _Keys) -> dict[str, Any]:
  found = _gemma2(keys) | {'qk_norm': 'head'}
  local = _rope(keys).get('local_rope_theta') or keys.number('rope_local_base_freq', float, 10000.0)
  every = int(keys.get('sliding_window_pattern') or keys.get('_sliding_window_pattern') or 6)
  pattern = _pattern(keys, ('sliding_attention',) * (every - 1) + ('full_attention',))
  theta = keys.get('rope_parameters') or keys.get('rope_theta')
  return found | {'pattern': pattern, 'local_rope_theta': local} | ({} if theta else {'rope_theta': 1e6})


def _olmo2(keys: _Keys) -> dict[str, Any]:
  keys.want('clip_qkv')
  return _llama(keys) | {'norms': 'post', 'qk_norm': 'all'}


def _smollm3(keys: _Keys) -> dict[str, Any]:
  """Every fourth layer has no positions, unless `no_rope_layers` (1 where they rotate) says otherwise."""
  count = keys.number('num_hidden_layers', int)
  rotates = keys.get('no_rope_layers') or [int((i + 1) % 4 != 0) for i in range(count)]
  tied = bool(keys.get('tie_word_embeddings', True))
  kinds = shortest(['global' if r else 'nope' for r in rotates])
  return _qwen(keys) | _llama(keys) | {'pattern': kinds, 'tie_embeddings': tied}


# By the `model_type` of config.json.
FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    'llama': _llama,
    'mistral': _mistral,
    'mixtral': _mixtral,
    'qwen2': _qwen2,
    'qwen3': _qwen3,
    'qwen3_moe': _qwen3_moe,
    'gemma': _gemma,
    'gemma2': _gemma2,
    'gemma3_text': _gemma3,
    'phi3': _mistral,
    'olmo2': _olmo2,
    'smollm3': _smollm3,
}
