"""Hugging Face weights, against a float64 forward pass that reads the same tensors by their own names."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import recipe
from jaxalign import sharding
from jaxalign import types
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import transformer
from tests import runs
from tests.llama import CONFIG

IDS = np.random.default_rng(1).integers(0, 40, (2, 9))


def tensors(config, seed=0):
  """Random weights under their Hugging Face names."""
  rng = np.random.default_rng(seed)
  D, F, N, K = (config[k] for k in ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads'))
  H = config.get('head_dim') or D // N
  shapes = {'model.embed_tokens.weight': (config['vocab_size'], D), 'model.norm.weight': (D,)}
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (config['vocab_size'], D)
  for i in range(config['num_hidden_layers']):
    layer = {
        'input_layernorm': (D,),
        'post_attention_layernorm': (D,),
        'self_attn.q_proj': (N * H, D),
        'self_attn.k_proj': (K * H, D),
        'self_attn.v_proj': (K * H, D),
        'self_attn.o_proj': (D, N * H),
        'mlp.gate_proj': (F, D),
        'mlp.up_proj': (F, D),
        'mlp.down_proj': (D, F),
    }
    shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in layer.items()}
  return {name: (rng.normal(size=shape) * 0.3 + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()}


def write(folder, config=CONFIG, weights=None, shards=1):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  weights = tensors(config) if weights is None else weights
  if shards == 1:
    st.save_file(weights, folder / 'model.safetensors')
    return folder
  weight_map = {name: f'part-{i % shards}.safetensors' for i, name in enumerate(sorted(weights))}
  for part in set(weight_map.values()):
    st.save_file({name: weights[name] for name in weights if weight_map[name] == part}, folder / part)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  return folder


def rotated(x, turn):
  """The pairs (i, i + H/2) as complex numbers, turned."""
  half = x.shape[-1] // 2
  z = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([z.real, z.imag], axis=-1)


def logits_of(w, config, ids):
  """The Llama forward pass as its authors describe it, a token pair at a time where it attends, in float64."""
  w = {name: np.asarray(x, np.float64) for name, x in w.items()}
  N, K = config['num_attention_heads'], config['num_key_value_heads']
  H = config.get('head_dim') or config['hidden_size'] // N
  norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + config['rms_norm_eps']) * scale
  out = []
  for row in ids:
    x = w['model.embed_tokens.weight'][row]
    angles = np.arange(len(row))[:, None] / config['rope_theta'] ** (2 * np.arange(H // 2) / H)[None]
    turn = np.exp(1j * angles)[:, None]
    for i in range(config['num_hidden_layers']):
      of = functools.partial(lambda i, name: w[f'model.layers.{i}.{name}.weight'], i)
      h = norm(x, of('input_layernorm'))
      q = rotated((h @ of('self_attn.q_proj').T).reshape(-1, N, H), turn)
      k = rotated((h @ of('self_attn.k_proj').T).reshape(-1, K, H), turn)
      v = (h @ of('self_attn.v_proj').T).reshape(-1, K, H)
      mixed = np.zeros((len(row), N, H))
      for t in range(len(row)):
        for n in range(N):
          kv = n * K // N
          scores = k[: t + 1, kv] @ q[t, n] / np.sqrt(H)
          p = np.exp(scores - scores.max())
          mixed[t, n] = p @ v[: t + 1, kv] / p.sum()
      x = x + mixed.reshape(len(row), N * H) @ of('self_attn.o_proj').T
      h = norm(x, of('post_attention_layernorm'))
      gate = h @ of('mlp.gate_proj').T
      x = x + (gate / (1 + np.exp(-gate)) * (h @ of('mlp.up_proj').T)) @ of('mlp.down_proj').T
    head = w['lm_head.weight'] if 'lm_head.weight' in w else w['model.embed_tokens.weight']
    out.append(norm(x, w['model.norm.weight']) @ head.T)
  return np.stack(out)


def logits_read(folder, ids, mesh=''):
  mesh = sharding.make_mesh(mesh)
  config = hf.read_config(folder)
  params = hf_import.read_params(folder, config, mesh)
  model = transformer.build(config, mesh, length=ids.shape[1])
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  hidden = model.apply({'params': params}, ids, positions, np.ones_like(ids))
  return np.asarray(hidden @ transformer.output_matrix(params))[..., : config.vocab_size]


class TestReadParams:

  @pytest.mark.parametrize(
      'changes', [{}, {'tie_word_embeddings': True}, {'head_dim': 6}, {'num_key_value_heads': 4}, {'rope_theta': 1e4}]
  )
  def test_gives_the_logits_of_the_tensors(self, tmp_path, changes):
    config = CONFIG | changes
    folder = write(tmp_path / 'model', config)
    np.testing.assert_allclose(logits_read(folder, IDS), logits_of(tensors(config), config, IDS), atol=2e-5)

  def test_gives_the_logits_of_the_embedded_model(self):
    folder = recipe.asset('stories260K')
    config = json.loads((folder / 'config.json').read_text())
    wanted = logits_of(st.load_file(folder / 'model.safetensors'), config, IDS)
    np.testing.assert_allclose(logits_read(folder, IDS), wanted, atol=5e-5)

  @pytest.mark.parametrize('mesh', ['fsdp:8', 'data:2,fsdp:2,tensor:2', 'tensor:2,context:4'])
  def test_lays_every_parameter_out_on_the_mesh(self, tmp_path, mesh):
    folder = write(tmp_path / 'model')
    config, mesh = hf.read_config(folder), sharding.make_mesh(mesh)
    single = hf_import.read_params(folder, config, sharding.make_mesh('', devices=jax.devices()[:1]))
    params = hf_import.read_params(folder, config, mesh)
    abstract = transformer.abstract_params(transformer.build(config, mesh, length=8), mesh)
    jax.tree.map(lambda x, like: np.testing.assert_equal(x.sharding, like.sharding), params, abstract)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), params, single)

  def test_reads_shards_as_one_file(self, tmp_path):
    whole, parts = write(tmp_path / 'a'), write(tmp_path / 'b', shards=3)
    np.testing.assert_array_equal(logits_read(whole, IDS), logits_read(parts, IDS))

  @pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
  def test_reads_16_bit_floats_exactly(self, tmp_path, dtype):
    narrow = {name: x.astype(dtype) for name, x in tensors(CONFIG).items()}
    folder = write(tmp_path / 'model', weights=narrow)
    params = hf_import.read_params(folder, hf.read_config(folder), sharding.make_mesh())
    assert params['layers']['0']['up'].dtype == np.float32
    np.testing.assert_array_equal(
        params['layers']['0']['up'][1], narrow['model.layers.1.mlp.up_proj.weight'].astype(np.float32).T
    )

  def test_pads_the_vocabulary_with_zeros(self, tmp_path):
    folder = write(tmp_path / 'model')
    params = hf_import.read_params(folder, hf.read_config(folder), sharding.make_mesh('fsdp:2,tensor:4'))
    assert params['embed'].shape == (128, 16)
    assert params['head'].shape == (16, 128)
    np.testing.assert_array_equal(params['embed'][40:], 0)
    np.testing.assert_array_equal(params['head'][:, 40:], 0)

  def test_leaves_out_buffers_and_a_head_that_is_tied(self, tmp_path):
    config = CONFIG | {'tie_word_embeddings': True}
    more = {'lm_head.weight': np.ones((40, 16), np.float32), 'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(2)}
    folder = write(tmp_path / 'model', config, tensors(config) | more)
    np.testing.assert_allclose(logits_read(folder, IDS), logits_of(tensors(config), config, IDS), atol=2e-5)

  @pytest.mark.parametrize(
      'change,words',
      [
          (lambda w: w.pop('model.layers.1.mlp.up_proj.weight'), 'tensor model.layers.1.mlp.up_proj.weight is missing'),
          (
              lambda w: w.update({'model.layers.0.self_attn.q_proj.bias': np.ones(16)}),
              'tensor .*q_proj.bias is too many',
          ),
          (
              lambda w: w.update({'model.layers.2.mlp.up_proj.weight': np.ones(16)}),
              'layers.2.mlp.up_proj.weight is too many: .* no place',
          ),
          (lambda w: [w.pop(name) for name in list(w)[:3]], r'3 tensors \(.*, .*, .*\) are missing'),
          (lambda w: [w.pop(name) for name in list(w)[:7]], r'7 tensors \(.*, \.\.\.\) are missing'),
          (lambda w: w.update({'model.norm.weight': np.ones(8)}), r"'model.norm.weight' is \[8\].* \[16\]"),
          (
              lambda w: w.update({'model.layers.0.mlp.up_proj.weight': np.ones((16, 24))}),
              r'up_proj.weight. is \[16, 24\], config.json makes it \[24, 16\]',
          ),
      ],
  )
  def test_refuses_tensors_that_are_not_the_models(self, tmp_path, change, words):
    weights = tensors(CONFIG)
    change(weights)
    folder = write(tmp_path / 'model', weights=weights)
    with pytest.raises(types.RunError, match=words):
      hf_import.read_params(folder, hf.read_config(folder), sharding.make_mesh())

  def test_refuses_files_that_are_not_whole(self, tmp_path):
    folder = write(tmp_path / 'model', shards=2)
    config, mesh = hf.read_config(folder), sharding.make_mesh()
    part = folder / 'part-1.safetensors'
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(types.RunError, match='part-1.safetensors: not a whole safetensors file'):
      hf_import.read_params(folder, config, mesh)
    part.unlink()
    with pytest.raises(types.RunError, match='part-1.safetensors: no such file, though model.safetensors.index'):
      hf_import.read_params(folder, config, mesh)
    st.save_file({'other': np.ones(1)}, part)
    with pytest.raises(types.RunError, match="part-1.safetensors: it lacks the tensor '"):
      hf_import.read_params(folder, config, mesh)

  def test_says_what_weights_should_be(self, tmp_path):
    folder = write(tmp_path / 'model')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(
        types.RunError, match='no model.safetensors.* there is pytorch_model.bin: save it as safetensors'
    ):
      hf_import.read_params(folder, hf.read_config(folder), sharding.make_mesh())

  def test_says_that_the_index_is_missing(self, tmp_path):
    folder = write(tmp_path / 'model', shards=2)
    (folder / 'model.safetensors.index.json').unlink()
    with pytest.raises(types.RunError, match='there is part-0.safetensors: copy model.safetensors.index.json too'):
      hf_import.read_params(folder, hf.read_config(folder), sharding.make_mesh())


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """Three stacks of 16 tensors are nearly all of this model: to hold one beside itself would take 30 % more."""
  config = CONFIG | {'vocab_size': 64, 'hidden_size': 512, 'intermediate_size': 4096, 'num_hidden_layers': 16}
  return write(tmp_path_factory.mktemp('large') / 'model', config, shards=4)


class TestMemory:

  @pytest.mark.skipif(not pathlib.Path('/proc/self/smaps_rollup').exists(), reason='Linux tells')
  @pytest.mark.parametrize('dtype,devices', [('bfloat16', 1), ('float32', 1), ('bfloat16', 8)])
  def test_is_that_of_the_parameters_and_little_more(self, large, dtype, devices):
    # Compiled as a user's programs are: in haste they take more.
    env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')}
    env |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    command = [
        sys.executable,
        'tools/measure.py',
        'import',
        f'--model={large}',
        f'--dtype={dtype}',
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False, cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['resident'] > 200e6
    # A tensor of 8 MB, its copies, and what compiling takes.
    assert found['peak'] < 1.05 * found['resident'] + 80e6
