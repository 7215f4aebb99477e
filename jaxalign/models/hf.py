"""draft"""

import json
import pathlib

import jax
import numpy as np
from safetensors import safe_open

from jaxalign.models import transformer


def read_config(directory):
  c = json.loads((pathlib.Path(directory) / 'config.json').read_text())
  return transformer.Config(
      c['vocab_size'],
      c['num_hidden_layers'],
      c['hidden_size'],
      c['num_attention_heads'],
      c['num_key_value_heads'],
      c['head_dim'],
      c['intermediate_size'],
      c['max_position_embeddings'],
      c['rope_theta'],
      c['rms_norm_eps'],
      c['tie_word_embeddings'],
  )


def read_params(directory, config, mesh, dtype):
  f = safe_open(str(pathlib.Path(directory) / 'model.safetensors'), 'np')
  t = f.get_tensor
  D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_size
  L = lambda n, tr: np.stack([tr(t(f'model.layers.{i}.{n}.weight')) for i in range(config.num_layers)])
  pad = config.padded_vocab - config.vocab_size
  emb = np.pad(t('model.embed_tokens.weight'), ((0, pad), (0, 0)))
  p = {
      'embed': emb,
      'final_norm': t('model.norm.weight'),
      'layers': {
          'attn_norm': L('input_layernorm', lambda x: x),
          'mlp_norm': L('post_attention_layernorm', lambda x: x),
          'q': L('self_attn.q_proj', lambda x: x.T.reshape(D, N, H)),
          'k': L('self_attn.k_proj', lambda x: x.T.reshape(D, K, H)),
          'v': L('self_attn.v_proj', lambda x: x.T.reshape(D, K, H)),
          'o': L('self_attn.o_proj', lambda x: x.T.reshape(N, H, D)),
          'gate': L('mlp.gate_proj', lambda x: x.T),
          'up': L('mlp.up_proj', lambda x: x.T),
          'down': L('mlp.down_proj', lambda x: x.T),
      },
  }
  model = transformer.Transformer(config)
  a = transformer.abstract_params(model, mesh)
  return jax.tree.map(lambda x, y: jax.device_put(np.ascontiguousarray(x), y.sharding), p, a)
