"""What an algorithm is, as a gin file binds it, and what every mode builds from it: model, tokenizer and data."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import importlib.resources
import pathlib
from typing import Any

import jax

from jaxalign import checkpoint
from jaxalign import reference as reference_lib
from jaxalign import sharding
from jaxalign import storage
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
from jaxalign.rl import rollouts as rollouts_lib

DEFAULT_MODEL = 'builtin:stories260K'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An algorithm: which examples, which objective, which loss, in which precision.

  Attributes:
    objective: from `objectives`; what it needs of the batch is what the examples provide. One that takes no `ref_model`
      has no reference.
    loss_fn: from `losses`, or a function of the user's own.
    example_fn: from `data.examples`: a record to a group of sequences; where there are rollouts it takes a `template`.
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
    critic_outputs: numbers that the critic's head makes of each token it reads: 1, or 2 for values of a reward and of a
      cost, see `returns.lagrangian`. A head on the policy has `score_outputs` instead.
    critic_writes: whether the critic has no head: it starts from any model, and judges tokens by their log-ratio to the
      reference, which it learns, as PRIME's.
    reference: 'cached' (log-probabilities computed once per response, kept on disk) or 'live' (a second copy of the
      parameters, a forward pass per step), as it always is where the loss reads more of it.
    reference_dtype: of a live reference without adapters, as it is kept and computed; '' for as the policy is.
    reference_rules: logical axes to mesh axes of its parameters, in place of some of `sharding.RULES`.
    critic_dtype: of the computation of a critic with parameters of its own; '' for that of the policy.
    critic_rules: logical axes to mesh axes of its parameters and their moments, likewise.
    sync: how a reference follows the policy; None for one that stays as the policy was at first.
    dtype: of the computation; what is trained is float32, and the optimizer's state as `optim.adamw.moments` says.
    remat: which activations the backward pass computes again, a key of `models.layers.REMAT`; 'dots' (all but
      products with weights, and what the flash kernel gives) is the fastest on CPUs too, where memory is slow.
    kept_logits: MiB of logits a device and pass over targets, for which the backward pass need not compute the product
      with the head again, in whole chunks of 512 tokens (2 KB for each entry of the vocabulary that a device has), of
      256 on CPUs; None takes 192 there and 0 elsewhere.
    attention: one of `models.attention.KERNELS`; None takes what the platform does best.
    experts: one of `models.grouped.KERNELS`, likewise.
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
  critic_outputs: int = 1
  critic_writes: bool = False
  reference: str = 'cached'
  reference_dtype: str = ''
  reference_rules: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  critic_dtype: str = ''
  critic_rules: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  sync: reference_lib.Sync | None = None
  dtype: str = 'float32'
  remat: str = 'dots'
  kept_logits: int | None = None
  attention: str | None = None
  experts: str | None = None
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
    if self.critic_outputs < 1 or self.critic_outputs > 1 and (self.critic_writes or not self.critic):
      problem = (
          'there is no critic with a head and parameters of its own' if self.critic_outputs > 1 else 'it is 1 or more'
      )
      raise types.UsageError(f'recipe.Recipe.critic_outputs = {self.critic_outputs}: {problem}')
    if self.reference not in ('cached', 'live'):
      raise types.UsageError(f"recipe.Recipe.reference = {self.reference!r}: it is 'cached' or 'live'")
    for name, dtype in (('reference_dtype', self.reference_dtype), ('critic_dtype', self.critic_dtype)):
      if dtype not in ('', *transformer.DTYPES):
        raise types.UsageError(f'recipe.Recipe.{name} = {dtype!r}: it is one of {", ".join(transformer.DTYPES)}')
    sharding.check_rules(self.reference_rules, 'recipe.Recipe.reference_rules')
    sharding.check_rules(self.critic_rules, 'recipe.Recipe.critic_rules')
    if (self.critic_dtype or self.critic_rules) and not self.critic:
      raise types.UsageError('recipe.Recipe.critic_dtype, critic_rules: there is no critic with parameters of its own')
    if self.keeps_reference and (self.lora is not None or self.sync is not None):
      problem = 'follows the policy' if self.lora is None else "is the policy's own frozen base"
      raise types.UsageError(f'recipe.Recipe.reference_dtype, reference_rules: this reference {problem}')

  @property
  def value_outputs(self) -> int:
    """Numbers that a critic, or a head on the policy, makes of each token; 0 where there is neither."""
    if not self.critic:
      return self.score_outputs
    return 0 if self.critic_writes else self.critic_outputs

  @property
  def keeps_reference(self) -> bool:
    """Whether a live reference is kept in another way than the policy."""
    return bool(self.reference_dtype or self.reference_rules)


@dataclasses.dataclass(frozen=True)
class Job:
  """What the flags say: where things are and where they go. Nothing in it changes a formula."""

  algo: str
  workdir: storage.Path
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


_A_MODEL = 'a model is a Hugging Face directory, a checkpoint of jaxalign, or a name in gin_configs/models'
A_TOKENIZER = 'a tokenizer is a SentencePiece .model, a tokenizer.json, or a directory with one'


def model_directory(spec: str, wanted: str = _A_MODEL) -> storage.Path:
  """The directory that a `--model` or `--tokenizer` names: `builtin:NAME` is an asset of the package.

  Args:
    spec: as the flag has it.
    wanted: says what it may be.

  Raises:
    UsageError: there is no such directory or file.
  """
  path = asset(spec.removeprefix('builtin:')) if spec.startswith('builtin:') else storage.path(spec)
  with storage.naming(spec):
    is_there = path.exists()
  if not is_there:
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


def reopened(directory: str, recipe: Recipe, mesh: jax.sharding.Mesh) -> checkpoint.Loaded:
  """A checkpoint, see `checkpoint.load`, whose model reads rows and computes as `recipe` says."""
  loaded = checkpoint.load(directory, mesh)
  how = {'dtype': recipe.dtype, 'attention': recipe.attention, 'experts': recipe.experts}
  return loaded._replace(model=transformer.for_rows(loaded.model, mesh, recipe.packing.row_length, **how))


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
  return load_tokenizer(job.tokenizer, A_TOKENIZER) if job.tokenizer else load_tokenizer(job.model)


def load_tokenizer(spec: str, wanted: str = _A_MODEL) -> tokenizers.Tokenizer:
  """Loads what `--tokenizer` names, or the tokenizer beside what `--model` names; see `model_directory`."""
  path = model_directory(spec, wanted)
  return tokenizers.load(checkpoint.find(path)[0] / 'tokenizer' if checkpoint.is_checkpoint(path) else path)


def open_data(job: Job, recipe: Recipe, tokenizer: tokenizers.Tokenizer, specs: str) -> list[dataset.Dataset]:
  """Tokenises the sources of a mixture, or finds them in the cache."""
  row_length, example_fn = recipe.packing.row_length, recipe.example_fn
  if recipe.rollouts is not None:
    # Of rollouts, so that prompts, what answers them and where a turn ends are written by the same.
    example_fn = functools.partial(example_fn, template=recipe.rollouts.template)
  open_one = lambda spec: open_source(job, example_fn, tokenizer, spec, row_length, recipe.mismatched)
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


def reference_of(recipe: Recipe, mesh: jax.sharding.Mesh, model: transformer.Transformer) -> reference_lib.Own:
  """How the live reference of a run of `model` is computed and kept."""
  found = reference_lib.model_of(model, follows=recipe.sync is not None)
  if recipe.reference_dtype:
    found = transformer.build(
        found.config,
        mesh,
        dtype=recipe.reference_dtype,
        attention=recipe.attention,
        experts=recipe.experts,
        length=recipe.packing.row_length,
    )
  shapes = transformer.abstract_params(found, mesh, recipe.reference_rules) if recipe.reference_rules else None
  where = None if shapes is None else jax.tree.map(lambda x: x.sharding, shapes)
  return reference_lib.Own(found, where, recipe.reference_dtype or None)
