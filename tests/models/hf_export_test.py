"""Models that were read and written again, against the files that they were read from."""

import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import hf_export
from jaxalign.models import hf_import
from jaxalign.models import transformer

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
CASES = sorted(path.parent.name for path in GOLDENS.glob('*/config.json'))


def read(name, mesh=''):
  config = hf.read_config(GOLDENS / name)
  devices = None if mesh else jax.devices()[:1]
  params = hf_import.read_params(GOLDENS / name, config, sharding.make_mesh(mesh, devices=devices))
  return config, params, hf.read_json(GOLDENS / name / 'config.json')


class TestWrite:

  @pytest.mark.parametrize('name', CASES)
  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_gives_back_every_tensor_and_the_configuration(self, tmp_path, name, dtype):
    config, params, origin = read(name)
    hf_export.write(tmp_path / 'out', params, config, origin, dtype)
    wanted, found = (st.load_file(folder / 'model.safetensors') for folder in (GOLDENS / name, tmp_path / 'out'))
    assert found.keys() == wanted.keys()
    for tensor, x in wanted.items():
      np.testing.assert_array_equal(found[tensor], x.astype(hf_export.DTYPES[dtype]), err_msg=tensor)
    assert hf.read_config(tmp_path / 'out') == config
    written = hf.read_json(tmp_path / 'out' / 'config.json')
    assert written.pop('dtype') == dtype
    assert written == {key: value for key, value in origin.items() if key != 'dtype'}

  def test_gathers_what_a_mesh_holds(self, tmp_path):
    config, params, origin = read('llama', 'fsdp:4,tensor:2')
    hf_export.write(tmp_path / 'out', params, config, origin, 'float32')
    wanted = st.load_file(GOLDENS / 'llama' / 'model.safetensors')
    for tensor, x in st.load_file(tmp_path / 'out' / 'model.safetensors').items():
      np.testing.assert_array_equal(x, wanted[tensor])

  def test_in_parts_is_read_as_a_whole(self, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, '_SHARD_BYTES', 5000)
    config, params, origin = read('phi3')
    count = hf_export.write(tmp_path / 'out', params, config, origin, 'float32')
    files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
    assert files[0] == f'model-00001-of-{len(files):05}.safetensors'
    assert len(files) > 2
    assert count == len(st.load_file(GOLDENS / 'phi3' / 'model.safetensors'))
    again = hf_import.read_params(tmp_path / 'out', config, sharding.make_mesh('', devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, again, params)

  def test_of_a_reward_model_is_a_sequence_classifier_without_a_head_for_tokens(self, tmp_path):
    config, params, origin = read('llama')
    config = dataclasses.replace(config, score_outputs=1)
    params = params | {'score': np.arange(16, dtype=np.float32)[:, None]}
    hf_export.write(tmp_path / 'out', params, config, origin, 'bfloat16')
    found = st.load_file(tmp_path / 'out' / 'model.safetensors')
    np.testing.assert_array_equal(found['score.weight'], np.arange(16)[None].astype(ml_dtypes.bfloat16))
    assert 'lm_head.weight' not in found
    written = hf.read_json(tmp_path / 'out' / 'config.json')
    assert written['architectures'] == ['LlamaForSequenceClassification']
    assert (written['id2label'], written['pad_token_id']) == ({'0': 'reward'}, 0)
    again = hf.read_config(tmp_path / 'out')
    assert again == dataclasses.replace(config, tie_embeddings=True)
    back = hf_import.read_params(tmp_path / 'out', again, sharding.make_mesh('fsdp:8'))
    np.testing.assert_array_equal(back['score'], params['score'])

  def test_names_what_pads_a_reward_model(self, tmp_path):
    config, _, origin = read('llama')
    config, origin = dataclasses.replace(config, score_outputs=1), origin | {'pad_token_id': None}
    assert hf_export.config_json(config, origin, 'float32', 7)['pad_token_id'] == 7

  @pytest.mark.parametrize(
      'scaling',
      [
          None,
          architecture.RopeScaling('linear', 2.0),
          architecture.RopeScaling('llama3', 8.0, 32, 1.5, 3.0),
          architecture.RopeScaling('yarn', 4.0, 16, beta_fast=20.0, beta_slow=2.0, truncate=False),
          architecture.RopeScaling('yarn', 4.0, 16, attention_factor=1.25),
      ],
  )
  def test_writes_a_random_model_as_a_llama(self, scaling, tmp_path):
    config = architecture.Config(50, 2, 16, 4, 2, 4, 24, 64, rope_scaling=scaling)
    mesh = sharding.make_mesh('', devices=jax.devices()[:1])
    params = transformer.init_params(transformer.build(config, mesh, length=8), jax.random.key(0), mesh)
    hf_export.write(tmp_path / 'out', params, config, None, 'float32')
    assert hf.read_config(tmp_path / 'out') == config
    again = hf_import.read_params(tmp_path / 'out', config, mesh)
    np.testing.assert_array_equal(again['embed'][:50], params['embed'][:50])
    jax.tree.map(np.testing.assert_array_equal, again['layers'], params['layers'])

  def test_refuses_a_random_model_that_is_no_llama(self, tmp_path):
    config = architecture.Config(50, 2, 16, 4, 2, 4, 24, 64, qk_norm='head')
    with pytest.raises(types.UsageError, match='only be exported where it is a plain Llama'):
      hf_export.write(tmp_path / 'out', {}, config, None, 'float32')
    assert not (tmp_path / 'out').exists()

  def test_leaves_nothing_where_it_fails_half_way(self, tmp_path, monkeypatch):
    config, params, origin = read('llama')
    real, calls = hf_export.st.save_file, []

    def save(*args, **kwargs):
      calls.append(real(*args, **kwargs))
      if len(calls) == 2:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hf_export.st, 'save_file', save)
    monkeypatch.setattr(hf_export, '_SHARD_BYTES', 4000)
    with pytest.raises(types.RunError, match='out: cannot be written .*No space left on device'):
      hf_export.write(tmp_path / 'out', params, config, origin, 'float32')
    assert list((tmp_path / 'out').iterdir()) == []

  def test_refuses_to_mix_with_other_weights(self, tmp_path):
    config, params, origin = read('llama')
    hf_export.write(tmp_path, params, config, origin, 'float32')
    with pytest.raises(types.UsageError, match='it holds weights already'):
      hf_export.write(tmp_path, params, config, origin, 'float32')
    assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == 'float32'
