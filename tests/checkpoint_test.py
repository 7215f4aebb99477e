"""Checkpoints: what stays, what is found, what is refused."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import optim
from jaxalign import recipe
from jaxalign import reference
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import transformer

CONFIG = architecture.Config(512, 1, 16, 2, 1, 8, 24, 64)
MESH = sharding.make_mesh('fsdp:4,tensor:2')
MODEL = transformer.build(CONFIG, MESH, length=16)
TX = optim.adamw(10, schedule=functools.partial(optim.constant, lr=0.1)).tx


def state(seed=0):
  return step_lib.init_state(transformer.init_params(MODEL, jax.random.key(seed), MESH), TX, 7)


def place(step):
  return {'epoch': 1, 'step': step, 'num_tokens': 10 * step}


@pytest.fixture
def saved(tmp_path):
  """A workdir with checkpoints 1 to 4, of which 2 is the best."""
  store = checkpoint.Store(tmp_path / 'checkpoints', checkpoint.Options(keep=1, best_metric='eval/x', best_mode='max'))
  for step, score in enumerate((0.1, 0.9, 0.3, 0.2), 1):
    store.save(state(step), step, place(step), {'eval/x': score})
    store.wait()
  store.close()
  run = {'model': CONFIG.to_json(), 'dtype': 'float32', 'row_length': 16, 'lora': None}
  checkpoint.save_run(tmp_path / 'checkpoints', run, '', tokenizers.load(recipe.asset('stories260K')))
  return tmp_path


class TestOptions:

  @pytest.mark.parametrize('options', [{'best_mode': 'most'}, {'keep': 0}])
  def test_refuse_what_they_do_not_know(self, options):
    with pytest.raises(types.UsageError, match="keep must be at least 1, and best_mode 'min' or 'max'"):
      checkpoint.Options(**options)


class TestStore:

  def test_keeps_the_newest_and_the_best(self, saved):
    assert sorted(p.name for p in (saved / 'checkpoints').iterdir() if p.name.isdigit()) == ['2', '4']

  def test_gives_back_every_bit_on_any_mesh(self, saved):
    store = checkpoint.Store(saved / 'checkpoints', checkpoint.Options())
    other = sharding.make_mesh('data:8')
    abstract = step_lib.abstract_state(other, transformer.abstract_params(MODEL, other), TX, 7)
    found, data = store.restore(4, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state(4)))
    assert found.params['embed'].sharding == abstract.params['embed'].sharding
    assert data == place(4)
    assert store.latest() == 4

  def test_refuses_the_parameters_of_another_model(self, saved):
    store = checkpoint.Store(saved / 'checkpoints', checkpoint.Options())
    bigger = transformer.build(architecture.Config(512, 1, 16, 2, 1, 8, 48, 64), MESH, length=16)
    abstract = step_lib.abstract_state(MESH, transformer.abstract_params(bigger, MESH), TX, 7)
    with pytest.raises(
        types.RunError, match=r'another model: layers/0/down is \(1, 24, 16\) there, \(1, 48, 16\) in this'
    ):
      store.restore(4, abstract)


class TestIsCheckpoint:

  def test_knows_workdirs_their_checkpoints_and_single_ones(self, tmp_path):
    (tmp_path / 'checkpoints' / '7').mkdir(parents=True)
    (tmp_path / 'checkpoints' / 'run.json').touch()
    for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'checkpoints' / '7'):
      assert checkpoint.is_checkpoint(path)
    assert not checkpoint.is_checkpoint(recipe.asset('stories260K'))


class TestFind:

  def test_takes_a_workdir_its_folder_or_one_step(self, saved):
    folder = saved / 'checkpoints'
    assert checkpoint.find(saved) == checkpoint.find(folder) == checkpoint.find(folder / '4') == (folder, 4)
    assert checkpoint.find(folder / '2') == (folder, 2)

  def test_says_where_it_looked(self, tmp_path):
    with pytest.raises(types.UsageError, match='no checkpoint there'):
      checkpoint.find(tmp_path)


class TestLoad:

  def test_needs_the_folder_alone(self, saved):
    loaded = checkpoint.load(saved / 'checkpoints' / '2', MESH)
    assert loaded.step == 2
    assert loaded.model.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.params), jax.device_get(state(2).params))
    assert loaded.tokenizer.encode('Once') == tokenizers.load(recipe.asset('stories260K')).encode('Once')

  def test_names_what_is_missing_or_broken(self, saved):
    run = saved / 'checkpoints' / 'run.json'
    whole = run.read_text()
    run.write_text('{')
    with pytest.raises(types.RunError, match='run.json: not valid JSON'):
      checkpoint.load(saved, MESH)
    run.write_text(json.dumps(json.loads(whole)))
    (saved / 'checkpoints' / '4' / 'params').rename(saved / 'elsewhere')
    with pytest.raises(types.RunError, match='4/params is missing'):
      checkpoint.load(saved, MESH)


class TestSaveBase:

  def test_is_read_as_the_reference(self, saved):
    checkpoint.save_base(saved / 'checkpoints', reference.Reference(MODEL, state(9).params, {}))
    found = checkpoint.load_reference(saved, checkpoint.load(saved, MESH)).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state(9).params))
