"""Heads that score, on every family: against what transformers computed with the same tiny weights, and back."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import forward
from jaxalign import masked
from jaxalign import sharding
from jaxalign import types
from jaxalign.models import families
from jaxalign.models import hf
from jaxalign.models import hf_export
from jaxalign.models import hf_import
from jaxalign.models import transformer
from tests import packed

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'heads'
CASES = sorted(path.name for path in GOLDENS.iterdir())
ONE = sharding.make_mesh('', devices=jax.devices()[:1])


def opened(name, mesh=ONE):
  config = hf.read_config(GOLDENS / name)
  return transformer.build(config, mesh, length=64), hf_import.read_params(GOLDENS / name, config, mesh)


def golden(name):
  with np.load(GOLDENS / name / 'golden.npz') as file:
    return file['ids'], file['logits']


def together(ids):
  """Both sequences in one packed row, the token behind each one's last being there to be predicted; and padding."""
  rows = [[(0, 0, ids[0].tolist(), [1]), (1, 0, ids[1, :17].tolist(), [1])]]
  return packed.micro_batch(rows, groups=2, size=1, length=48)


class TestParity:

  def test_is_shown_for_every_family(self):
    found = {hf.read_json(GOLDENS / name / 'config.json')['model_type'] for name in CASES}
    assert found == set(families.FAMILIES)

  @pytest.mark.parametrize('name', [name for name in CASES if name.endswith('_reward')])
  def test_gives_the_reward_of_transformers_at_the_last_token_that_counts(self, name):
    ids, wanted = golden(name)
    model, params = opened(name)
    scores_of = lambda p, b: masked.totals(forward.scores(p, b, model=model)[..., 0], b)
    found = jax.jit(scores_of)(params, together(ids))
    np.testing.assert_allclose(found, wanted, atol=1e-5)

  @pytest.mark.parametrize('name', [name for name in CASES if name.endswith('_steps')])
  def test_gives_the_scores_of_transformers_at_every_token(self, name):
    ids, wanted = golden(name)
    model, params = opened(name)
    found = jax.jit(lambda p, b: forward.scores(p, b, model=model))(params, together(ids))[0]
    np.testing.assert_allclose(found[:24], wanted[0], atol=1e-5)
    np.testing.assert_allclose(found[24:41], wanted[1, :17], atol=1e-5)

  def test_gives_them_on_a_mesh(self):
    ids, wanted = golden('qwen2_steps')
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    with jax.set_mesh(mesh):
      model, params = opened('qwen2_steps', mesh)
      batch = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), together(ids))
      found = jax.jit(lambda p, b: forward.scores(p, b, model=model))(params, batch)
    np.testing.assert_allclose(found[3, :24], wanted[0], atol=1e-5)


class TestWrite:

  @pytest.mark.parametrize('name', CASES)
  def test_gives_back_every_tensor_and_the_configuration(self, tmp_path, name):
    model, params = opened(name)
    origin = hf.read_json(GOLDENS / name / 'config.json')
    hf_export.write(tmp_path / 'out', params, model.config, origin, 'float32')
    wanted, found = (st.load_file(folder / 'model.safetensors') for folder in (GOLDENS / name, tmp_path / 'out'))
    assert found.keys() == wanted.keys()
    for tensor, x in wanted.items():
      np.testing.assert_array_equal(found[tensor], x, err_msg=tensor)
    assert hf.read_config(tmp_path / 'out') == model.config
    written = hf.read_json(tmp_path / 'out' / 'config.json')
    assert {key: written[key] for key in origin} == origin

  def test_keeps_the_names_of_labels(self, tmp_path):
    model, params = opened('llama_steps')
    names = {'id2label': {'0': 'wrong', '1': 'right'}, 'label2id': {'wrong': 0, 'right': 1}}
    origin = hf.read_json(GOLDENS / 'llama_steps' / 'config.json') | names
    hf_export.write(tmp_path / 'out', params, model.config, origin, 'float32')
    assert names.items() <= hf.read_json(tmp_path / 'out' / 'config.json').items()

  @pytest.mark.parametrize('name', ['gemma3', 'olmo2'])
  def test_refuses_a_head_that_transformers_does_not_have(self, tmp_path, name):
    model, params = opened(f'{name}_reward')
    config = dataclasses.replace(model.config, score_bias=True)
    origin = hf.read_json(GOLDENS / f'{name}_reward' / 'config.json')
    with pytest.raises(types.UsageError, match='transformers has no .*ForTokenClassification'):
      hf_export.write(tmp_path / 'out', params, config, origin, 'float32')
    assert not (tmp_path / 'out').exists()


class TestRead:

  def test_names_a_head_of_another_size(self, tmp_path):
    for file in ('config.json', 'model.safetensors'):
      (tmp_path / file).write_bytes((GOLDENS / 'llama_steps' / file).read_bytes())
    values = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(values | {'id2label': {'0': 'a', '1': 'b', '2': 'c'}}))
    with pytest.raises(types.RunError, match=r"'score.weight' is \[2, 16\], config.json makes it \[3, 16\]"):
      hf_import.read_params(tmp_path, hf.read_config(tmp_path), ONE)
