"""Adapters of PEFT, in and out: the logits that PEFT computes, from real files of it."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import lora as lora_lib
from jaxalign.models import peft
from jaxalign.models import transformer

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens'
BASES = {'peft_llama3': 'llama3', 'peft_gemma2': 'gemma2', 'peft_phi3': 'phi3', 'peft_reward': 'llama3'}
ONE = sharding.make_mesh('', devices=jax.devices()[:1])


def opened(name, folder=None, mesh=ONE, **options):
  """The model of a golden adapter, its parameters and those of its base."""
  base = GOLDENS / BASES[name]
  config = hf.read_config(base)
  family = hf.read_json(base / 'config.json')['model_type']
  folder = folder or GOLDENS / name
  adapter = peft.read(folder, config, family, lora_lib.Lora(adapter=str(folder), **options))
  config = dataclasses.replace(config, score_outputs=int(name == 'peft_reward'))
  model = transformer.build(config, mesh, lora=adapter.lora, length=64)
  frozen = hf_import.read_params(base, hf.read_config(base), mesh)
  return model, peft.read_params(adapter, model, mesh), frozen, family


def logits(model, params, ids):
  """Logits of every position, or the scores of whole rows."""
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  hidden_BTD = jax.jit(model.apply)({'params': params}, ids, positions, np.ones_like(ids))
  if model.config.score_outputs:
    return hidden_BTD[:, -1] @ params['score']
  out = hidden_BTD @ transformer.output_matrix(params)[:, : model.config.vocab_size]
  cap = model.config.final_softcap
  return cap * np.tanh(out / cap) if cap else out


class TestRead:

  @pytest.mark.parametrize('name', BASES)
  def test_gives_the_logits_of_peft(self, name):
    golden = np.load(GOLDENS / name / 'golden.npz')
    model, trained, frozen, _ = opened(name)
    found = logits(model, lora_lib.join(trained, frozen), golden['ids'])
    np.testing.assert_allclose(found, golden['logits'], atol=1e-4)

  def test_gives_them_on_a_mesh_and_merged(self):
    golden = np.load(GOLDENS / 'peft_gemma2' / 'golden.npz')
    mesh = sharding.make_mesh('fsdp:2,tensor:2,data:2')
    model, trained, frozen, _ = opened('peft_gemma2', mesh=mesh)
    with jax.set_mesh(mesh):
      merged = lora_lib.merge(lora_lib.join(trained, frozen), model.lora)
    found = logits(transformer.without_adapters(model), jax.device_get(merged), golden['ids'])
    np.testing.assert_allclose(found, golden['logits'], atol=1e-4)

  def test_takes_what_the_adapter_is_from_it_and_the_rest_from_the_user(self):
    lora = opened('peft_llama3', dropout=0.1, base='float32')[0].lora
    assert (lora.rank, lora.rslora, lora.dropout) == (4, True, 0.1)
    assert lora.scale == pytest.approx(6 / 4**0.5)
    assert opened('peft_gemma2')[0].lora.targets == ('q', 'o', 'down')

  @pytest.mark.parametrize(
      'key', ['q_proj', r'layers\.[01]\.self_attn\.q_proj', '^model.layers.[01].self_attn.q_proj', 'self_attn.q_proj']
  )
  def test_takes_patterns_as_regular_expressions_of_the_end_of_a_name(self, tmp_path, key):
    folder = tmp_path / 'adapter'
    shutil.copytree(GOLDENS / 'peft_llama3', folder)
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'alpha_pattern': {key: 60}}))
    plain, found = (opened('peft_llama3', f)[1]['layers']['0'] for f in (None, folder))
    # The scale of all is alpha / sqrt(r) with alpha = 6; this module's is ten times that.
    np.testing.assert_allclose(found['q_lora_b'], 10 * plain['q_lora_b'], rtol=1e-6)
    np.testing.assert_array_equal(found['k_lora_b'], plain['k_lora_b'])


class TestWrite:

  @pytest.mark.parametrize('name', BASES)
  def test_is_undone_by_reading(self, name, tmp_path):
    golden = np.load(GOLDENS / name / 'golden.npz')
    model, trained, frozen, family = opened(name)
    peft.write(tmp_path / 'out', lora_lib.join(trained, frozen), model, family, base='elsewhere')
    again, read, _, _ = opened(name, tmp_path / 'out')
    found = logits(again, lora_lib.join(read, frozen), golden['ids'])
    np.testing.assert_allclose(found, golden['logits'], atol=1e-4)

  @pytest.mark.parametrize('name', ['peft_llama3', 'peft_gemma2', 'peft_reward'])
  def test_gives_the_tensors_that_peft_wrote(self, name, tmp_path):
    model, trained, frozen, family = opened(name)
    count = peft.write(tmp_path / 'out', lora_lib.join(trained, frozen), model, family, base='elsewhere')
    theirs, ours = (st.load_file(f / 'adapter_model.safetensors') for f in (GOLDENS / name, tmp_path / 'out'))
    assert len(ours) == count
    assert set(ours) == set(theirs)
    for tensor, x in theirs.items():
      np.testing.assert_array_equal(ours[tensor], x, err_msg=tensor)
    config, written = (hf.read_json(f / 'adapter_config.json') for f in (GOLDENS / name, tmp_path / 'out'))
    for key in ('peft_type', 'task_type', 'r', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern', 'bias'):
      assert written[key] == config[key], key
    assert written['lora_alpha'] == pytest.approx(config['lora_alpha'])
    assert written['target_modules'] == config['target_modules'] or name == 'peft_llama3'

  def test_says_the_ranks_of_weights_that_are_one_tensor(self, tmp_path):
    model, trained, frozen, family = opened('peft_phi3')
    peft.write(tmp_path / 'out', lora_lib.join(trained, frozen), model, family, base='elsewhere')
    written = hf.read_json(tmp_path / 'out' / 'adapter_config.json')
    assert written['rank_pattern'] == {'qkv_proj': 12, 'gate_up_proj': 8}
    assert written['alpha_pattern']['qkv_proj'] == pytest.approx(3 * written['lora_alpha'])

  def test_refuses_a_folder_with_an_adapter_and_a_magnitude_of_a_part(self, tmp_path):
    model, trained, frozen, family = opened('peft_llama3')
    peft.write(tmp_path / 'out', lora_lib.join(trained, frozen), model, family, base='elsewhere')
    with pytest.raises(types.UsageError, match='it holds an adapter already'):
      peft.write(tmp_path / 'out', lora_lib.join(trained, frozen), model, family, base='elsewhere')
    base = hf_import.read_params(GOLDENS / 'phi3', hf.read_config(GOLDENS / 'phi3'), ONE)
    lora = lora_lib.Lora(rank=2, targets=('q',), dora=True)
    part = transformer.build(hf.read_config(GOLDENS / 'phi3'), ONE, lora=lora, length=64)
    params = lora_lib.join(transformer.init_adapters(part, jax.random.key(0), base, ONE), base)
    with pytest.raises(types.UsageError, match='DoRA adapts only a part of model.layers.0.self_attn.qkv_proj.weight'):
      peft.write(tmp_path / 'part', params, part, 'phi3', base='elsewhere')
    assert not (tmp_path / 'part').exists()


class TestErrors:

  @pytest.fixture
  def folder(self, tmp_path):
    shutil.copytree(GOLDENS / 'peft_llama3', tmp_path / 'adapter')
    return tmp_path / 'adapter'

  def configure(self, folder, **changes):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  def rewrite(self, folder, change):
    tensors = st.load_file(folder / 'adapter_model.safetensors')
    change(tensors)
    st.save_file(tensors, folder / 'adapter_model.safetensors')

  @pytest.mark.parametrize(
      'key,value', [('peft_type', 'IA3'), ('bias', 'all'), ('layers_to_transform', [0]), ('init_lora_weights', 'pissa')]
  )
  def test_refuse_what_would_change_the_numbers(self, folder, key, value):
    self.configure(folder, **{key: value})
    with pytest.raises(types.RunError, match=f'adapter_config.json: {key} = .*changes the numbers'):
      opened('peft_llama3', folder)

  @pytest.mark.parametrize(
      'key,value,said',
      [
          ('r', None, 'r = null should be a positive number'),
          ('lora_alpha', 'large', 'lora_alpha = "large" should be a positive number'),
          ('rank_pattern', {'q_proj': 'x'}, 'q_proj = "x" should be a positive number'),
          ('alpha_pattern', ['q_proj'], 'alpha_pattern = .* should be an object'),
      ],
  )
  def test_name_a_number_that_is_none(self, folder, key, value, said):
    self.configure(folder, **{key: value})
    with pytest.raises(types.RunError, match=f'adapter_config.json: {said}'):
      opened('peft_llama3', folder)

  def test_name_a_tensor_of_another_rank_than_the_configuration_says(self, folder):
    self.configure(folder, r=8)
    with pytest.raises(types.RunError, match=r'lora_A.weight is \[4, 24\], of this model it would be \[8, 24\]'):
      opened('peft_llama3', folder)

  def test_refuse_settings_that_are_not_the_adapters(self, folder):
    assert opened('peft_llama3', folder, rank=4)[0].lora.rank == 4
    with pytest.raises(types.UsageError, match='lora.Lora.rank = 64: the adapter in .* has 4; leave it out'):
      opened('peft_llama3', folder, rank=64)

  def test_name_the_folder_or_file_that_is_not_whole(self, folder, tmp_path):
    with pytest.raises(types.UsageError, match='nowhere.*: there is no adapter_config.json'):
      opened('peft_llama3', tmp_path / 'nowhere')
    weights = folder / 'adapter_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(types.RunError, match='adapter_model.safetensors: not a whole safetensors file'):
      opened('peft_llama3', folder)
    weights.unlink()
    with pytest.raises(types.RunError, match='adapter_model.safetensors: no such file'):
      opened('peft_llama3', folder)

  def test_name_the_tensor_of_an_adapter_for_another_base(self, folder):
    name = 'base_model.model.model.layers.1.mlp.up_proj.lora_A.weight'
    self.rewrite(folder, lambda tensors: tensors.update({name: np.zeros((4, 17), np.float32)}))
    with pytest.raises(
        types.RunError, match=rf'{name} is \[4, 17\], of this model it would be \[4, 16\]: .*another base'
    ):
      opened('peft_llama3', folder)

  def test_name_tensors_that_are_missing_or_too_many(self, folder):
    name = 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight'
    self.rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(types.RunError, match=f'it lacks the tensor {name}'):
      opened('peft_llama3', folder)
    more = 'base_model.model.model.layers.7.mlp.up_proj.lora_B.weight'
    self.rewrite(folder, lambda tensors: tensors.update({name: np.zeros((24, 4), np.float32), more: np.zeros(3)}))
    with pytest.raises(types.RunError, match=f'no place for the tensor {more}'):
      opened('peft_llama3', folder)
