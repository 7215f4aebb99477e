"""Families of Hugging Face models, against what transformers computed with the same tiny weights.

tests/goldens is written by tools/make_goldens.py.
"""

import json
import shutil

import numpy as np
import pytest

from jaxalign import types
from jaxalign.models import families
from jaxalign.models import hf
from tools import measure

GOLDENS = measure.GOLDENS


@pytest.mark.parametrize('name', measure.CASES)
class TestParity:

  def test_has_the_logits_of_transformers_beyond_windows_and_scaled_contexts(self, name):
    assert measure.plain(name) < 1e-4

  def test_has_them_in_packed_and_padded_rows(self, name):
    assert measure.packed(name) < 1e-4

  def test_decodes_greedily_to_the_same_tokens(self, name):
    assert measure.greedy(name) == 64

  def test_stays_near_them_in_bfloat16(self, name):
    # 2^-8 is the rounding of one number.
    assert measure.low(name) < 0.05


@pytest.mark.parametrize('name', ['gemma3', 'mixtral', 'olmo2', 'phi3_window'])
def test_has_the_same_logits_on_a_mesh(name):
  ids, wanted = measure.golden(name)['ids'], measure.golden(name)['logits']
  eight = np.concatenate([ids, ids[:, ::-1]] * 2)[:, :40]
  found = measure.logits_of(name, eight, mesh='data:2,fsdp:2,tensor:2')
  np.testing.assert_allclose(found[:2], wanted, atol=1e-4)


def changed(tmp_path, name, **changes):
  shutil.copytree(GOLDENS / name, tmp_path / 'model')
  path = tmp_path / 'model' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return tmp_path / 'model'


class TestReadConfig:

  @pytest.mark.parametrize(
      'name,changes,said',
      [
          ('llama', {'model_type': 'mamba'}, "model_type 'mamba' is not supported; there are gemma"),
          ('llama', {'hidden_act': 'relu'}, 'hidden_act = "relu" is not supported'),
          ('llama', {'sparse_blocks': 3}, 'sparse_blocks = 3 is not supported, and ignoring it changes the numbers'),
          ('llama', {'rope_parameters': {'rope_type': 'longrope', 'short_factor': [1.0]}}, '"rope_type": "longrope"'),
          ('llama', {'rope_parameters': {'rope_type': 'linear'}}, "rope_scaling of 'linear'"),
          ('qwen2', {'use_sliding_window': True, 'layer_types': None}, 'use_sliding_window = true'),
          ('qwen3_moe', {'decoder_sparse_step': 2}, 'decoder_sparse_step = 2'),
          ('qwen3_moe', {'mlp_only_layers': [0]}, 'mlp_only_layers = [0]'),
          ('gemma2', {'layer_types': ['linear_attention'] * 2}, 'layer_types = ["linear_attention"'),
          ('gemma', {'attention_bias': True}, 'attention_bias = true'),
          (
              'llama',
              {'architectures': ['LlamaForTokenClassification'], 'token_classification_bias': False},
              'token_classification_bias = false',
          ),
          ('olmo2', {'num_key_value_heads': 3}, 'num_heads = 4: it must be a multiple of num_kv_heads = 3'),
      ],
  )
  def test_refuses_by_name_what_would_change_the_numbers(self, tmp_path, name, changes, said):
    with pytest.raises(types.RunError) as caught:
      hf.read_config(changed(tmp_path, name, **changes))
    assert said in str(caught.value)
    assert 'config.json' in str(caught.value)

  def test_reads_files_of_before_transformers_5(self, tmp_path):
    old = {
        'rope_parameters': None,
        'rope_theta': 500000.0,
        'rope_scaling': json.loads((GOLDENS / 'llama3' / 'config.json').read_text())['rope_parameters'],
    }
    old['rope_scaling'].pop('rope_theta', None)
    assert hf.read_config(changed(tmp_path, 'llama3', **old)) == hf.read_config(GOLDENS / 'llama3')

  def test_takes_gemma_3s_local_base_from_older_files(self, tmp_path):
    old = {'rope_parameters': None, 'rope_theta': 1e6, 'rope_local_base_freq': 10000.0}
    assert hf.read_config(changed(tmp_path, 'gemma3', **old)) == hf.read_config(GOLDENS / 'gemma3')


class TestShortest:

  @pytest.mark.parametrize(
      'kinds,wanted',
      [('gggg', 'g'), ('lglg', 'lg'), ('lglgl', 'lg'), ('lllgll', 'lllg'), ('gl', 'gl'), ('glll', 'glll')],
  )
  def test_repeats_to_the_whole(self, kinds, wanted):
    assert families.shortest(list(kinds)) == tuple(wanted)
