"""What an algorithm is, as a gin file binds it, and what every mode builds from it: model, tokenizer and data."""

from collections.abc import Callable
import dataclasses
import importlib.resources
import inspect
import pathlib
from typing import Any

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import credit as credit_lib
from jaxalign import objectives
from jaxalign import reference as reference_lib
from jaxalign import rollouts as rollouts_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import loader
from jaxalign.data import probes
from jaxalign.data import sources
from jaxalign.data import token_cache
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer

DEFAULT_MODEL = 'builtin:stories260K'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An algorithm: which examples, which objective, which loss, in which precision.

  Attributes:
    objective: from `objectives`; what it needs of the batch is what the examples provide. One that takes no `ref_model`
      has no reference.
    loss_fn: from `losses`, or a function of the user's own.
    example_fn: from `data.examples`: a record to a group of sequences.
    scored_fn: the same of a record whose responses are to be scored; None reads them as they are, see `score`.
    combine_fn: makes scores of what the model makes of those examples, a list of `[O]`, one of each sequence: outputs
      of its head, or without one log-probabilities of what is marked. None takes those of a head as they are, or else
      implicit rewards.
    mismatched: whether each record is given another one, see `data.feedback.mismatched`.
    data: what is trained on where there is no `--data`.
    eval_data: what is held out then.
    packing: rows per micro-batch and their length.
    model: configuration of a randomly initialised model; None where `--model` is a directory.
    score_outputs: numbers that a head of the model makes of each token it reads, 0 for no such head.
    score_bias: whether that head has a bias, as Hugging Face's classifiers of tokens have.
    critic: where a critic with parameters of its own starts from, for a loss of sampled tokens that reads values:
      'policy' for the weights of `--model` (with `lora`, adapters of its own on the same base) and a zero head, or else
      the checkpoint of a reward model. Empty for none: the policy has a head then (`score_outputs` = 1), or no values.
    critic_writes: whether the critic has no head: it starts from any model, and judges tokens by their log-ratio to the
      reference, which it learns, as PRIME's.
    reference: 'cached' (log-probabilities computed once per response, kept on disk) or 'live' (a second copy of the
      parameters, a forward pass per step), as it always is where the loss reads more of it.
    sync: how a reference follows the policy; None for one that stays as the policy was at first.
    dtype: of the computation; what is trained and optimizer state are float32.
    remat: which activations the backward pass computes again, see `models.transformer`; 'dots' (all but products with
      weights) is the fastest on CPUs too, where memory is slow.
    attention: one of `models.attention.KERNELS`; None takes what the platform does best.
    lora: adapters to train in place of the model's parameters; None trains those.
    rollouts: what is sampled from the policy and trained on; None trains on the data themselves.
  """

  objective: Callable
  loss_fn: Callable
  example_fn: Callable
  packing: loader.Packing
  data: str
  eval_data: str = ''
  mismatched: bool = False
  scored_fn: Callable | None = None
  combine_fn: Callable | None = None
  model: architecture.Config | None = None
  score_outputs: int = 0
  score_bias: bool = False
  critic: str = ''
  critic_writes: bool = False
  reference: str = 'cached'
  sync: reference_lib.Sync | None = None
  dtype: str = 'float32'
  remat: str = 'dots'
  attention: str | None = None
  lora: lora_lib.Lora | None = None
  rollouts: rollouts_lib.Options | None = None

  def __post_init__(self):
    if self.combine_fn is not None and self.scored_fn is None:
      raise types.UsageError(
          'recipe.Recipe.combine_fn: it is of the examples that recipe.Recipe.scored_fn makes; bind that'
      )
    if self.critic and self.score_outputs:
      problem = 'the policy has a head for values already (recipe.Recipe.score_outputs); leave one out'
      raise types.UsageError(f'recipe.Recipe.critic = {self.critic!r}: {problem}')
    if self.critic and self.rollouts is None:
      raise types.UsageError(f'recipe.Recipe.critic = {self.critic!r}: only a run that samples trains a critic')
    if self.critic_writes and not self.critic:
      raise types.UsageError(
          "recipe.Recipe.critic_writes = True: there is no critic; bind recipe.Recipe.critic = 'policy'"
      )
    if self.reference not in ('cached', 'live'):
      raise types.UsageError(f"recipe.Recipe.reference = {self.reference!r}: it is 'cached' or 'live'")


@dataclasses.dataclass(frozen=True)
class Job:
  """What the flags say: where things are and where they go. Nothing in it changes a formula."""

  algo: str
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  seed: int
  model: str
  tokenizer: str
  data: str
  eval_data: str
  data_dir: str | None
  cache_dir: pathlib.Path
  skip_bad_records: bool
  debug: bool

  def __post_init__(self):
    if self.eval_data:
      sources.parse_all(self.eval_data)  # refuses weights, as nothing is drawn

  def identity(self) -> dict[str, str | int]:
    """What must not change when a run is resumed, as run.json has it (where `model` holds sizes)."""
    return {
        'algo': self.algo,
        'seed': self.seed,
        'model_spec': self.model,
        'tokenizer': self.tokenizer,
        'data': self.data,
        'eval_data': self.eval_data,
    }


def asset(name: str) -> pathlib.Path:
  """The path of a file or folder in the package's assets."""
  return pathlib.Path(str(importlib.resources.files('jaxalign').joinpath('assets', name)))


def model_directory(spec: str) -> pathlib.Path:
  """The directory that a `--model` or `--tokenizer` names: `builtin:NAME` is an asset of the package.

  Raises:
    UsageError: there is no such directory or file.
  """
  path = asset(spec.removeprefix('builtin:')) if spec.startswith('builtin:') else pathlib.Path(spec)
  if not path.exists():
    wanted = '--model is a Hugging Face directory, a checkpoint of jaxalign, or a name in gin_configs/models'
    raise types.UsageError(f'{spec}: no such file or directory ({wanted})')
  return path


def run_of(spec: str) -> dict[str, Any]:
  """The run.json of a checkpoint, empty for other directories."""
  path = model_directory(spec)
  return checkpoint.read_json(checkpoint.find(path)[0] / 'run.json') if checkpoint.is_checkpoint(path) else {}


def check_model(recipe: Recipe, model: str | None, tokenizer: str | None, *, is_named: bool) -> None:
  """Raises UsageError where `--model` and the recipe disagree on where weights come from."""
  if not model or model.startswith('builtin:') and recipe.model is None:
    return
  if is_named and recipe.model is None:
    raise types.UsageError(f'--model={model}: write builtin:{model}, it is in the package')
  if recipe.model is not None and not is_named:
    raise types.UsageError(f'--model={model}: recipe.Recipe.model is bound too, to random weights; leave one out')
  if is_named and not tokenizer:
    raise types.UsageError(
        f'--model={model} has random weights and no tokenizer; give --tokenizer (as builtin:stories260K)'
    )


def origin(job: Job, recipe: Recipe) -> dict[str, Any] | None:
  """The config.json that the model's weights came with, for their way back; None for random weights."""
  if recipe.model is not None:
    return None
  path = model_directory(job.model)
  if not checkpoint.is_checkpoint(path):
    return hf.read_json(path / 'config.json')
  return checkpoint.read_json(checkpoint.find(path)[0] / 'run.json')['hf_config']


def load(spec: str, mesh: jax.sharding.Mesh, dtype: str | None = None) -> checkpoint.Loaded:
  """Loads what a `--model` names, weights and tokenizer, onto `mesh`.

  Args:
    spec: a checkpoint or a Hugging Face directory.
    mesh: where it lies.
    dtype: of parameters and computation, but for a head that scores; None for what they are kept in.

  Raises:
    UsageError: there is no such directory, or the mesh does not divide the model.
    RunError: a file is missing or corrupt.
  """
  path = model_directory(spec)
  if checkpoint.is_checkpoint(path):
    return checkpoint.load(path, mesh, dtype)
  config, values = hf.read_config(path), hf.read_json(path / 'config.json')
  dtype = dtype or values.get('dtype') or values.get('torch_dtype') or 'float32'
  model = transformer.build(config, mesh, dtype=dtype, length=config.max_length)
  params = hf_import.read_params(path, config, mesh, dtype)
  return checkpoint.Loaded(model, params, tokenizers.load(path), {}, 0)


def open_tokenizer(job: Job) -> tokenizers.Tokenizer:
  """Loads `--tokenizer`, or the tokenizer beside the model."""
  return load_tokenizer(job.tokenizer or job.model)


def load_tokenizer(spec: str) -> tokenizers.Tokenizer:
  """Loads what `--tokenizer` names, or the tokenizer beside what `--model` names."""
  path = model_directory(spec)
  return tokenizers.load(checkpoint.find(path)[0] / 'tokenizer' if checkpoint.is_checkpoint(path) else path)


def open_data(job: Job, recipe: Recipe, tokenizer: tokenizers.Tokenizer, specs: str) -> list[dataset.Dataset]:
  """Tokenises the sources of a mixture, or finds them in the cache."""
  row_length = recipe.packing.row_length
  open_one = lambda spec: open_source(job, recipe.example_fn, tokenizer, spec, row_length, recipe.mismatched)
  return [open_one(spec) for spec, _ in sources.parse_mixture(specs)]


def open_source(
    job: Job,
    example_fn: Callable,
    tokenizer: tokenizers.Tokenizer,
    spec: str,
    row_length: int,
    mismatched: bool = False,
) -> dataset.Dataset:
  """Tokenises one source by `example_fn`, or finds it in the cache."""
  return token_cache.build(
      spec,
      tokenizer=tokenizer,
      example_fn=lambda record: example_fn(record, tokenizer, row_length=row_length),
      key_parts=probes.describe(example_fn, tokenizer, row_length=row_length),
      data_dir=job.data_dir,
      cache_dir=str(job.cache_dir),
      skip_bad_records=job.skip_bad_records,
      mismatched=mismatched,
  )


def open_loader(job: Job, recipe: Recipe, datasets: list[dataset.Dataset], specs: str) -> loader.Loader:
  """The loader of a mixture under the recipe's packing."""
  weights = [weight for _, weight in sources.parse_mixture(specs)]
  return loader.Loader(datasets, weights, packing=recipe.packing, mesh=job.mesh, seed=job.seed)


def needs_of(recipe: Recipe, options: rollouts_lib.Options) -> tracing.Needs:
  """What the loss reads; raises UsageError where it and advantages read what there is not, or not what there is."""
  outputs = recipe.score_outputs or int(bool(recipe.critic) and not recipe.critic_writes)
  if 'values_BT' in options.credit.reads and not outputs:
    problem = 'reads values_BT of a critic: bind recipe.Recipe.critic, or recipe.Recipe.score_outputs = 1 for a head'
    raise types.UsageError(f'rollouts.Options.advantage_fn {problem}')
  count = len(options.rewards) + bool(options.environment)
  of_responses, of_tokens = options.credit.names(options.samples, count)
  if options.samples == 1 and options.credit.compares(count):
    problem = 'rollouts.Options.advantage_fn compares the responses to a prompt, and of one makes 0; it takes 2 or more'
    raise types.UsageError(f'rollouts.Options.samples = 1: {problem}')
  needs = tracing.trace(
      recipe.loss_fn,
      group_size=options.samples,
      labels=of_responses,
      token_labels=(*of_tokens, 'sampler_logps', 'old_logps', *(['is_text'] if options.texts else [])),
      outputs=outputs,
  )
  values = needs.fields & {'policy.scores_BTO', 'policy.values_GK'} or 'values_BT' in options.credit.reads
  writes = needs.fields & {'policy.critic_logps_BT'} or 'critic_ratio_BT' in options.credit.reads
  if writes and not recipe.critic_writes:
    problem = "read a critic that writes; bind recipe.Recipe.critic = 'policy' and recipe.Recipe.critic_writes = True"
    raise types.UsageError(f'loss or advantages {problem}')
  if recipe.critic and not (writes if recipe.critic_writes else values):
    what = 'log-probabilities' if recipe.critic_writes else 'values'
    raise types.UsageError(f'recipe.Recipe.critic = {recipe.critic!r}: neither loss nor advantages read its {what}')
  if options.updates > 1 and 'labels.advantages' in needs.fields and 'labels.old_logps' not in needs.fields:
    problem = 'the loss has no ratio to the policy that sampled, which the first update changes; bind 1, or policy.ppo'
    raise types.UsageError(f'rollouts.Options.epochs x minibatches = {options.updates}: {problem}')
  if recipe.sync is not None and not (needs.reference or options.credit.reads & credit_lib.OF_REFERENCE):
    raise types.UsageError('recipe.Recipe.sync: neither loss nor advantages compare with a reference; leave it out')
  if options.asynchronous and 'labels.sampler_logps' not in needs.fields:
    wanted = 'policy.regularised with policy_parts.truncated_importance weighs it'
    logging.warning('the loss does not know that an asynchronous rollout is of an earlier policy; %s', wanted)
  if options.texts and 'labels.is_text' not in needs.fields:
    problem = 'the loss reads no texts; put actor_critic.with_pretraining around it'
    raise types.UsageError(f'rollouts.Options.texts = {options.texts}: {problem}')
  return needs


def bind(
    recipe: Recipe,
    model: transformer.Transformer,
    needs: tracing.Needs,
    ref_model: transformer.Transformer | None = None,
    critic_model: transformer.Transformer | None = None,
) -> objectives.Objective:
  """The recipe's objective for `model`, as the step takes it.

  Args:
    recipe: the algorithm.
    model: of the policy.
    needs: of the loss.
    ref_model: of a live reference, None where there is none.
    critic_model: of a critic with parameters of its own, None where there is none.

  Raises:
    UsageError: the loss reads a reference, but the objective takes no `ref_model`; or the objective refuses more.
  """
  if needs.reference and 'ref_model' not in inspect.signature(recipe.objective).parameters:
    fields = ', '.join(sorted(name for name in needs.fields if name.startswith('ref.')))
    problem = 'but the objective is of scores, which have no reference; bind objectives.preference or supervised'
    raise types.UsageError(f'the loss reads {fields}, {problem}')
  others = {'ref_model': ref_model if needs.reference else None, 'critic_model': critic_model}
  given: dict[str, Any] = {name: other for name, other in others.items() if other is not None}
  if recipe.rollouts is not None and 'longest' in inspect.signature(recipe.objective).parameters:
    given['longest'] = recipe.rollouts.most_sampled
  if recipe.rollouts is not None and recipe.rollouts.temperature != 1:
    given['temperature'] = recipe.rollouts.temperature
  return recipe.objective(model=model, loss_fn=recipe.loss_fn, needs=needs, **given)
