"""The models of a run, and their first parameters: imported, restored, or drawn from the seed."""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp

from jaxalign import checkpoint
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import lora as lora_lib
from jaxalign.models import peft
from jaxalign.models import transformer


class Params(NamedTuple):
  """Parameters of a model, sharded: what is trained, float32, and what is frozen, `{}` for nothing."""

  trained: types.PyTree
  frozen: types.PyTree


def open_model(
    job: recipe_lib.Job, recipe: recipe_lib.Recipe, tokenizer: tokenizers.Tokenizer
) -> tuple[transformer.Transformer, Callable[[], Params]]:
  """Builds the model, and what then imports, restores, or draws from the seed its parameters.

  A head that scores starts at zero where the source has none, so that every score is 0. Adapters of the source are
  merged into its parameters.

  Raises:
    UsageError: the tokenizer has more ids than the model's vocabulary, or the source another head that scores.
    RunError: a file of the model is missing or corrupt.
  """
  config, read = _source(job, recipe)
  _check_vocabulary(config, tokenizer, job)
  _check_scores(config, recipe, job)
  adapter = _open_adapter(job, recipe, config)
  if not config.num_experts and (count := sharding.parts(job.mesh, 'experts')) > 1:
    logging.warning('--mesh: the model has no experts to split %d ways, and each part keeps all weights', count)
  model = transformer.build(
      dataclasses.replace(config, score_outputs=recipe.score_outputs, score_bias=recipe.score_bias),
      job.mesh,
      dtype=recipe.dtype,
      remat=recipe.remat,
      kept_logits=recipe.kept_logits,
      attention=recipe.attention,
      experts=recipe.experts,
      lora=adapter.lora if adapter is not None else recipe.lora,
      length=recipe.packing.row_length,
  )

  def params() -> Params:
    found = _divide(model, read(model), jax.random.key(job.seed), job.mesh)
    if adapter is None:
      return found
    return found._replace(trained=found.trained | peft.read_params(adapter, model, job.mesh))

  return model, params


def config_of(job: recipe_lib.Job, recipe: recipe_lib.Recipe) -> architecture.Config:
  """The sizes of the model."""
  return _source(job, recipe)[0]


def open_critic(
    job: recipe_lib.Job, recipe: recipe_lib.Recipe, tokenizer: tokenizers.Tokenizer
) -> tuple[transformer.Transformer | None, Callable[[types.PyTree], types.PyTree]]:
  """Builds a critic with parameters of its own, and what makes of the policy's frozen ones those that it trains.

  Raises:
    UsageError: with adapters, it is to start from another model, or it is to score and its checkpoint has no head.
  """
  if not recipe.critic:
    return None, lambda frozen: None
  scored = dataclasses.replace(
      recipe,
      score_outputs=recipe.value_outputs,
      score_bias=False,
      dtype=recipe.critic_dtype or recipe.dtype,
      critic='',
      critic_outputs=1,
      critic_writes=False,
      critic_dtype='',
      critic_rules={},
  )
  if recipe.critic == 'policy':
    model, params = open_model(job, scored, tokenizer)
  elif recipe.lora is not None:
    problem = "with adapters it shares the policy's base; bind 'policy'"
    raise types.UsageError(f'recipe.Recipe.critic = {recipe.critic!r}: {problem}')
  else:
    source, read = dataclasses.replace(job, model=recipe.critic, tokenizer=''), dataclasses.replace(scored, model=None)
    try:
      outputs = _source(source, read)[0].score_outputs
    except types.UsageError as err:
      raise types.UsageError(f'recipe.Recipe.critic = {recipe.critic!r}: no such model') from err
    if not outputs and not recipe.critic_writes:
      raise types.UsageError(
          f'recipe.Recipe.critic = {recipe.critic!r}: no reward model, as it has no head that scores'
      )
    if outputs != recipe.value_outputs and not recipe.critic_writes:
      wanted = f'recipe.Recipe.critic_outputs = {recipe.critic_outputs}'
      raise types.UsageError(f'recipe.Recipe.critic = {recipe.critic!r}: its head has {outputs} outputs, and {wanted}')
    model, params = open_model(source, read, tokenizer)
  shapes = transformer.abstract_params(model, job.mesh, recipe.critic_rules)
  if model.lora is None:
    place = lambda found: jax.device_put(found, jax.tree.map(lambda x: x.sharding, shapes))
    return model, lambda frozen: place(params().trained)
  key = jax.random.fold_in(jax.random.key(job.seed), 1)
  place = lambda found: jax.device_put(found, jax.tree.map(lambda x: x.sharding, lora_lib.split(shapes)[0]))
  return model, lambda frozen: place(transformer.init_adapters(model, key, frozen, job.mesh))


def _source(
    job: recipe_lib.Job, recipe: recipe_lib.Recipe
) -> tuple[architecture.Config, Callable[[transformer.Transformer], types.PyTree]]:
  """The configuration of `--model`, and what gives its parameters in the precision that a model keeps them in."""
  shrunk = lambda params, model: lora_lib.shrunk(params, model.lora, model.base_dtype)
  if recipe.model is not None:
    draw = lambda model: transformer.init_params(model, jax.random.key(job.seed), job.mesh)
    return recipe.model, lambda model: shrunk(draw(model), model)
  path = recipe_lib.model_directory(job.model)
  if not checkpoint.is_checkpoint(path):
    config = hf.read_config(path)
    kept = lambda model: functools.partial(lora_lib.kept, lora=model.lora)
    return config, lambda model: hf_import.read_params(path, config, job.mesh, model.base_dtype, kept(model))
  run = checkpoint.read_json(checkpoint.find(path)[0] / 'run.json')
  config = architecture.Config.from_json(run['model'])
  if run.get('writes'):
    config = dataclasses.replace(config, score_outputs=0, score_bias=False)
  load = lambda: checkpoint.merged(checkpoint.writer(checkpoint.load(path, job.mesh)))
  return config, lambda model: shrunk(load(), model)


def _open_adapter(job: recipe_lib.Job, recipe: recipe_lib.Recipe, config: architecture.Config) -> peft.Adapter | None:
  if recipe.lora is None or not recipe.lora.adapter:
    return None
  family = (recipe_lib.origin(job, recipe) or {}).get('model_type', 'llama')
  return peft.read(storage.path(recipe.lora.adapter), config, family, recipe.lora)


def _divide(model: transformer.Transformer, params: types.PyTree, key: jax.Array, mesh: jax.sharding.Mesh) -> Params:
  """What is trained and what is frozen of `params`, with first adapters and a zero head where they lack them."""
  head = {name: params[name] for name in lora_lib.HEAD if name in params and model.config.score_outputs}
  params = {name: value for name, value in params.items() if name not in lora_lib.HEAD}
  if model.lora is not None:
    frozen = lora_lib.split(params)[1]
    trained = transformer.init_adapters(model, key, frozen, mesh) | head
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    share = 100 * count(trained) / (count(trained) + count(frozen))
    megabytes = sum(x.nbytes for x in jax.tree.leaves(frozen)) / 1e6
    logging.info(
        'LoRA: %d parameters are trained, %.2f %% of all; the others take %.1f MB', count(trained), share, megabytes
    )
    return Params(trained, frozen)
  if model.config.score_outputs and not head:
    like = {name: x for name, x in transformer.abstract_params(model, mesh).items() if name in lora_lib.HEAD}
    where = jax.tree.map(lambda x: x.sharding, like)
    head = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), out_shardings=where)()
  return Params(params | head, {})


def _check_vocabulary(config: architecture.Config, tokenizer: tokenizers.Tokenizer, job: recipe_lib.Job) -> None:
  if tokenizer.vocab_size > config.vocab_size:
    raise types.UsageError(
        f'{job.tokenizer or job.model}: the tokenizer has {tokenizer.vocab_size} ids, the model {job.model} a'
        f' vocabulary of {config.vocab_size}; choose the tokenizer that the model was trained with'
    )


def _check_scores(config: architecture.Config, recipe: recipe_lib.Recipe, job: recipe_lib.Job) -> None:
  found, wanted = ((x.score_outputs, x.score_bias) for x in (config, recipe))
  if found[0] and wanted[0] and found != wanted:
    said = ['{} outputs {} bias'.format(n, 'with a' if bias else 'without') for n, bias in (found, wanted)]
    raise types.UsageError(
        f'{job.model}: its head that scores has {said[0]}, --algo={job.algo} trains one of {said[1]}'
        ' (recipe.Recipe.score_outputs, score_bias)'
    )
