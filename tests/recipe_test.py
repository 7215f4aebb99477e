"""What every mode builds from a recipe and a job: tokenizer, model and data."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxalign import objectives
from jaxalign import opening
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import loader
from jaxalign.data import scored
from jaxalign.data import tokenizers
from jaxalign.losses import preference
from jaxalign.models import architecture
from tests import runs

TINY = architecture.Config(512, 1, 16, 2, 1, 8, 32, 64)


def make_recipe(**options):
  defaults = {
      'objective': objectives.preference,
      'loss_fn': preference.dpo,
      'example_fn': examples.preference,
      'packing': loader.Packing(rows=8, row_length=32),
      'data': '',
      'model': TINY,
  }
  return recipe_lib.Recipe(**(defaults | options))


@pytest.fixture
def make_job(tmp_path):
  def make(mesh='', **options):
    defaults = {
        'algo': 'dpo',
        'workdir': tmp_path / 'run',
        'mesh': sharding.make_mesh(mesh),
        'seed': 0,
        'model': recipe_lib.DEFAULT_MODEL,
        'tokenizer': '',
        'data': '',
        'eval_data': '',
        'data_dir': None,
        'cache_dir': tmp_path / 'cache',
        'skip_bad_records': False,
        'debug': False,
    }
    return recipe_lib.Job(**(defaults | options))

  return make


@pytest.fixture
def pairs(tmp_path):
  """Pairs of which one is long."""
  records = [{'prompt': 'Once', 'chosen': ' a cat', 'rejected': ' a dog'} for _ in range(3)]
  records.append({'prompt': 'Once upon a time ' * 20, 'chosen': ' a cat', 'rejected': ' a dog'})
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return f'jsonl:{path}'


def open_model(job, recipe):
  model, params = opening.open_model(job, recipe, recipe_lib.open_tokenizer(job))
  return model, *params()


class TestRecipe:

  def test_names_the_kinds_of_reference(self):
    with pytest.raises(types.UsageError, match="reference = 'none': it is 'cached' or 'live'"):
      make_recipe(reference='none')

  def test_combines_what_is_read_to_score_alone(self):
    combine = lambda outputs: outputs
    assert make_recipe(scored_fn=scored.plain, combine_fn=combine).combine_fn is combine
    with pytest.raises(types.UsageError, match='recipe.Recipe.combine_fn: .* that recipe.Recipe.scored_fn makes'):
      make_recipe(combine_fn=combine)

  def test_has_outputs_of_a_critic_only_where_that_has_a_head(self):
    sampled = {'rollouts': object()}
    assert [make_recipe(score_outputs=n).value_outputs for n in (0, 2)] == [0, 2]
    assert make_recipe(critic='policy', critic_outputs=2, **sampled).value_outputs == 2
    assert make_recipe(critic='policy', critic_writes=True, **sampled).value_outputs == 0
    with pytest.raises(types.UsageError, match='critic_outputs = 2: there is no critic with a head'):
      make_recipe(critic_outputs=2)
    with pytest.raises(types.UsageError, match='critic_outputs = 2: there is no critic with a head'):
      make_recipe(critic='policy', critic_outputs=2, critic_writes=True, **sampled)
    with pytest.raises(types.UsageError, match='critic_outputs = 0: it is 1 or more'):
      make_recipe(critic='policy', critic_outputs=0, **sampled)


class TestJob:

  def test_is_the_same_run_wherever_it_lies(self, make_job, tmp_path):
    moved = make_job('data:8', workdir=tmp_path / 'b', cache_dir=tmp_path / 'c', debug=True)
    assert make_job().identity() == moved.identity()

  @pytest.mark.parametrize('name', ['algo', 'model', 'tokenizer', 'data', 'eval_data'])
  def test_is_another_run_with_other_data_or_model(self, make_job, name):
    assert make_job().identity() != make_job(**{name: 'other'}).identity()
    assert make_job(seed=1).identity() != make_job().identity()

  def test_leaves_the_name_of_the_sizes_free(self, make_job):
    assert 'model' not in make_job().identity()


class TestModelDirectory:

  def test_finds_assets_and_folders(self, tmp_path):
    assert (recipe_lib.model_directory('builtin:stories260K') / 'config.json').is_file()
    assert recipe_lib.model_directory(str(tmp_path)) == tmp_path

  @pytest.mark.parametrize('spec', ['builtin:nothing', 'nowhere/at/all'])
  def test_names_what_is_not_there(self, spec):
    with pytest.raises(types.UsageError, match=f'{spec}: no such file'):
      recipe_lib.model_directory(spec)


class TestOpenTokenizer:

  def test_prefers_the_one_that_is_named(self, make_job, tmp_path):
    shutil.copy(recipe_lib.asset('stories260K') / 'tokenizer.model', tmp_path / 'mine.model')
    tokenizer = recipe_lib.open_tokenizer(make_job(model='nowhere', tokenizer=str(tmp_path / 'mine.model')))
    assert tokenizer.vocab_size == 512


class TestOpenModel:

  def test_draws_weights_from_the_seed_the_same_on_any_mesh(self, make_job):
    _, one, _ = open_model(make_job('fsdp:8'), make_recipe())
    _, moved, _ = open_model(make_job('data:2,fsdp:2,expert:2'), make_recipe())
    _, other, _ = open_model(make_job('fsdp:8', seed=1), make_recipe())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(moved))
    assert not np.array_equal(one['embed'], other['embed'])

  def test_reads_those_of_the_embedded_model_and_adds_a_head_of_zeros(self, make_job):
    model, params, _ = open_model(make_job(), make_recipe(model=None))
    assert sum(x.size for x in jax.tree.leaves(params)) == 260_032
    scored, with_head, _ = open_model(make_job(), make_recipe(model=None, score_outputs=1))
    assert not model.config.score_outputs and scored.config.score_outputs
    assert with_head['score'].shape == (64, 1)
    assert not np.any(with_head['score'])
    np.testing.assert_array_equal(with_head['embed'], params['embed'])

  def test_refuses_a_vocabulary_smaller_than_the_tokenizers(self, make_job):
    with pytest.raises(types.UsageError, match='the tokenizer has 512 ids.*vocabulary of 100'):
      open_model(make_job(), make_recipe(model=dataclasses.replace(TINY, vocab_size=100)))

  def test_refuses_rows_longer_than_the_context(self, make_job):
    with pytest.raises(types.UsageError, match='row_length = 65: the context of the model is 64'):
      open_model(make_job(), make_recipe(packing=loader.Packing(rows=8, row_length=65)))

  @pytest.mark.parametrize('bound', [0, 7])
  def test_keeps_as_many_logits_as_the_recipe_says(self, make_job, bound):
    model, _, _ = open_model(make_job(), make_recipe(kept_logits=bound))
    assert model.kept_logits == bound
    with pytest.raises(types.UsageError, match='kept_logits = -1: it is a number of MiB'):
      open_model(make_job(), make_recipe(kept_logits=-1))

  def test_takes_the_precision_of_the_recipe_and_keeps_weights_in_float32(self, make_job):
    model, params, _ = open_model(make_job(), make_recipe(dtype='bfloat16', remat='full', attention='xla'))
    assert (model.dtype, model.remat, model.attention) == (np.dtype('bfloat16'), 'full', 'xla')
    assert model.kept_logits == 192  # of CPUs
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


class TestOpenCritic:

  def open(self, make_job, tokenizer, critic, outputs):
    recipe = make_recipe(model=None, critic=str(critic), critic_outputs=outputs, rollouts=object())
    job = make_job()
    with jax.set_mesh(job.mesh):
      model, params = opening.open_critic(job, recipe, tokenizer)
      return model.config.score_outputs, params({})['score']

  def test_has_as_many_values_as_are_bound_and_starts_from_a_head_with_as_many(self, make_job, tmp_path):
    tokenizer = tokenizers.load(recipe_lib.asset('stories260K'))
    outputs, score = self.open(make_job, tokenizer, 'policy', 2)
    assert outputs == 2 and score.shape == (64, 2) and not np.any(score)
    heads = {n: np.random.default_rng(n).normal(size=(64, n)).astype(np.float32) for n in (1, 2)}
    for n, head in heads.items():
      folder = tmp_path / str(n)
      folder.mkdir()
      np.testing.assert_array_equal(self.open(make_job, tokenizer, runs.write_model(folder, score=head), n)[1], head)
    with pytest.raises(types.UsageError, match='its head has 1 outputs, and recipe.Recipe.critic_outputs = 2'):
      self.open(make_job, tokenizer, tmp_path / '1', 2)
    with pytest.raises(types.UsageError, match='no reward model, as it has no head that scores'):
      self.open(make_job, tokenizer, recipe_lib.asset('stories260K'), 1)


class TestOpenData:

  def open(self, job, recipe, specs):
    return recipe_lib.open_data(job, recipe, recipe_lib.open_tokenizer(job), specs)

  def test_opens_each_source_of_a_mixture(self, make_job, pairs):
    found = self.open(make_job(), make_recipe(), f'{pairs}:0.5,{pairs}[:2]:0.5')
    assert [len(dataset) for dataset in found] == [4, 2]

  def test_cuts_to_the_row_whatever_the_cache_holds_of_other_rows(self, make_job, pairs):
    lengths = []
    for row_length in (32, 64, 32):
      (dataset,) = self.open(make_job(), make_recipe(packing=loader.Packing(rows=8, row_length=row_length)), pairs)
      lengths.append(dataset.lengths_NK.max())
      assert dataset.report['truncated'] == 1
    assert lengths == [32, 64, 32]


class TestOpenLoader:

  def test_packs_as_the_recipe_says(self, make_job, pairs):
    job, recipe = make_job(), make_recipe()
    datasets = recipe_lib.open_data(job, recipe, recipe_lib.open_tokenizer(job), pairs)
    opened = recipe_lib.open_loader(job, recipe, datasets, pairs)
    assert opened.first().inputs_BT.shape == (1, 8, 32)
