"""Reading config.json: what is taken, filled in and refused."""

import json

import pytest

from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import hf
from tests.llama import CONFIG


def write(folder, config=None):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config or CONFIG))
  return folder


class TestReadConfig:

  def test_takes_what_is_written(self, tmp_path):
    config = hf.read_config(write(tmp_path / 'model', CONFIG | {'head_dim': 6}))
    assert config == architecture.Config(
        40, 2, 16, 4, 2, 6, 24, 32, rope_theta=500.0, norm_eps=1e-5, tie_embeddings=False
    )

  def test_fills_what_older_files_leave_out(self, tmp_path):
    old = {k: v for k, v in CONFIG.items() if k not in ('num_key_value_heads', 'rope_theta', 'tie_word_embeddings')}
    config = hf.read_config(write(tmp_path / 'model', old | {'head_dim': None}))
    assert (config.num_kv_heads, config.head_size, config.rope_theta, config.tie_embeddings) == (4, 4, 10000.0, False)

  def test_reads_the_rope_of_newer_files(self, tmp_path):
    new = {k: v for k, v in CONFIG.items() if k != 'rope_theta'}
    new['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 7000.0}
    assert hf.read_config(write(tmp_path / 'model', new)).rope_theta == 7000.0

  @pytest.mark.parametrize(
      'changes,words',
      [
          ({'model_type': 'gpt2'}, "model_type 'gpt2' is not supported; there are "),
          ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "'llama3' needs it"),
          ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_scaling of 'yarn'"),
          ({'sliding_window': 4096}, 'sliding_window = 4096'),
          ({'quantization_config': {'bits': 4}}, 'quantization_config'),
          ({'hidden_size': None}, "the key 'hidden_size' is missing"),
          ({'num_hidden_layers': '2'}, 'num_hidden_layers = "2" should be a positive int'),
          ({'rms_norm_eps': -1}, 'rms_norm_eps = -1 should be a positive float'),
      ],
  )
  def test_refuses_what_would_change_the_numbers(self, tmp_path, changes, words):
    folder = write(tmp_path / 'model', CONFIG | changes)
    with pytest.raises(types.RunError, match=words):
      hf.read_config(folder)

  def test_takes_values_that_change_nothing(self, tmp_path):
    neutral = {'rope_scaling': {'type': 'default'}, 'sliding_window': None, 'attention_bias': False, 'mlp_bias': None}
    assert hf.read_config(write(tmp_path / 'a', CONFIG | neutral)) == hf.read_config(write(tmp_path / 'b'))

  def test_names_a_file_that_is_missing_or_broken(self, tmp_path):
    with pytest.raises(types.RunError, match='nowhere/config.json: cannot be read .No such file'):
      hf.read_config(tmp_path / 'nowhere')
    (tmp_path / 'config.json').write_text('{"a": ')
    with pytest.raises(types.RunError, match='config.json: not JSON'):
      hf.read_config(tmp_path)
