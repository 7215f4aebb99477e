"""Batches of training and held-out data, with what the loss was found to need: reference log-probabilities."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from absl import logging
import jax
import numpy as np

from jaxalign import forward
from jaxalign import metrics
from jaxalign import needs as needs_lib
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import scorers
from jaxalign import sharding
from jaxalign import tracing
from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import loader as loader_lib
from jaxalign.data import rows
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rl import collect
from jaxalign.rl import credit
from jaxalign.rl import iterations
from jaxalign.rl import judging
from jaxalign.rl import rollouts


@dataclasses.dataclass(frozen=True)
class Streams:
  """What a run reads.

  Attributes:
    train: loader of the training data; None where only evaluation was asked for.
    held: loader of the held-out data; None where there is none.
    needs: what the loss reads, found by tracing it.
    live: whether the step itself is to compute what the loss reads of the reference.
    report: counts of records, truncated and dropped, by name.
  """

  scorers = dict  # No models are among the rewards of what is not online.

  train: loader_lib.Loader | None
  held: loader_lib.Loader | None
  needs: tracing.Needs
  live: bool
  report: dict[str, int]

  @property
  def asked(self) -> dataset.Joined | None:
    """What prompts are taken from for samples: the held-out data."""
    return self.held.dataset if self.held is not None else None

  @property
  def reference(self) -> bool:
    """Whether the run has a reference."""
    return self.needs.reference

  @property
  def cached(self) -> bool:
    """Whether batches need what `with_reference` gives them."""
    return self.needs.reference and not self.live

  def said(self, place: tuple[int, int]) -> dict[str, int]:
    """What is logged with the step that led to a data state: here the report."""
    del place
    return self.report

  def epochs(self, place: tuple[int, int]) -> float:
    """Epochs of training data that a data state stands for."""
    assert self.train is not None, 'opened for evaluation alone'
    return self.train.epochs(place)

  def training_batches(
      self, place: tuple[int, int], params: Callable[[], types.PyTree]
  ) -> Iterator[tuple[tuple[int, int], types.Batch]]:
    """Batches from a data state on, for ever; with each the data state once it is consumed."""
    del params  # They are the same whatever the policy.
    assert self.train is not None, 'opened for evaluation alone'
    epoch, step = place
    for after_epoch, after_step, batch in self.train.batches(epoch, step):
      yield (after_epoch, after_step), batch

  def held_batches(self) -> Iterator[types.Batch]:
    """One pass over the held-out data, of which there may be none."""
    yield from self.held.evaluation_batches() if self.held is not None else ()


class Online:
  """The same for a run that trains on what it samples; of what is held out it reads prompts alone.

  A data state is (rollout, updates by it).

  Attributes:
    needs: what the loss reads.
    reference: whether loss or advantages read a reference.
    live: the same: nothing is cached, as responses are new.
    held: None.
    cached: False.
    asked: prompts that are held out; None where there are none.
    report: counts of prompts by name.
    scorers: loads the models among the rewards.
  """

  held = None
  cached = False

  def __init__(
      self,
      made: iterations.Iterations,
      needs: tracing.Needs,
      reference: bool,
      asked: dataset.Joined | None,
      report: dict[str, int],
      share: float,
      scorers: Callable[[], Mapping[str, functions.Scorer]] = dict,
  ):
    self.needs, self.reference, self.live, self.report = needs, reference, reference, report
    self._iterations, self._share, self.asked, self.scorers = made, share, asked, scorers

  def said(self, place: tuple[int, int]) -> dict[str, float]:
    """The report, and what was sampled for the step that led to a data state."""
    return self.report | self._iterations.said.get(place, {})

  def epochs(self, place: tuple[int, int]) -> float:
    """Epochs of prompts that a data state stands for."""
    return place[0] * self._share

  def training_batches(
      self, place: tuple[int, int], params: Callable[[], types.PyTree]
  ) -> Iterator[tuple[tuple[int, int], types.Batch]]:
    """Batches of the rollouts of `params()`, from a data state on."""
    return self._iterations.batches(*place, params)

  def held_batches(self) -> Iterator[types.Batch]:
    """None."""
    return iter(())


def open_prompts(
    job: recipe_lib.Job,
    recipe: recipe_lib.Recipe,
    tokenizer: tokenizers.Tokenizer,
    model: transformer.Transformer,
    critic: transformer.Transformer | None = None,
    *,
    train: bool = True,
    scored: bool = True,
    between: Callable[[], None] | None = None,
) -> Online:
  """Opens the prompts in `--data` for rollouts of `model`, and those in `--eval_data`.

  Args:
    job: names the data.
    recipe: the algorithm.
    tokenizer: of the model.
    model: of the policy.
    critic: gives values where it has parameters of its own.
    train: whether responses to `--data` are judged.
    scored: whether rewards are asked, so that models among them are wanted.
    between: see `sampling.sample`.

  Raises:
    UsageError: loss or advantages read what a rollout does not give, or it fits no step of the mesh, or none judges it.
  """
  options = recipe.rollouts
  assert options is not None
  datasets, held_sets = (
      recipe_lib.open_data(job, recipe, tokenizer, x) if x else [] for x in (job.data, job.eval_data)
  )
  mixture, prompts = sources.parse_mixture(job.data), dataset.Joined(datasets)
  needs = needs_lib.of_rollouts(recipe, options)
  logging.info('the loss reads %s', ', '.join(sorted(needs.fields)))
  logging.info('advantages read %s', ', '.join(sorted(options.credit.reads)))
  packing = iterations.packing_of(options, recipe.packing)
  texts = open_texts(job, options, tokenizer, packing.row_length)
  loader_lib.check_mesh(packing, job.mesh)
  iterations.check_fit(options, prompts, packing, model.config.max_length, texts)
  ref = options.credit.reads & credit.OF_REFERENCE
  shared: dict[str, Any] = {'tokenizer': tokenizer, 'mesh': job.mesh, 'seed': job.seed, 'packing': packing}
  maker = collect.Maker(
      options,
      prompts,
      _records(job, options.rewards if train else ()),
      weights=[weight for _, weight in mixture],
      models=_models(job, recipe, model, critic, bool(ref)),
      between=between,
      **shared,
  )
  asked = dataset.Joined(held_sets) if held_sets else None
  # Loaded once, for rollouts and for who judges held-out prompts.
  models = functools.cache(_scorers(options, tokenizer, [prompts, asked], packing, job.mesh) if scored else dict)
  made = iterations.Iterations(options, maker, folder=job.workdir / 'rollouts', scorers=models, texts=texts, **shared)
  has_reference = needs.reference or bool(ref)
  if recipe.keeps_reference and not has_reference:
    problem = 'neither loss nor advantages compare with one'
    raise types.UsageError(f'recipe.Recipe.reference_dtype, reference_rules: {problem}')
  report, share = _report(datasets, held_sets), options.prompts / len(prompts)
  return Online(made, needs, has_reference, asked, report, share, models)


def _records(job: recipe_lib.Job, rewards: tuple[str, ...]) -> list[sources.Source]:
  """What `--data` names; raises UsageError where one of the rewards must have a column that is not there."""
  opened = [sources.open_source(spec, job.data_dir) for spec, _ in sources.parse_mixture(job.data)]
  judging.check_columns(rewards, opened)
  return opened


def _models(job: recipe_lib.Job, recipe: recipe_lib.Recipe, model, critic, compared: bool) -> rollouts.Models:
  """Those that a rollout is made with."""
  ref = recipe_lib.reference_of(recipe, job.mesh, model).model if compared else None
  return rollouts.Models(transformer.without_dropout(model), critic and transformer.without_dropout(critic), ref)


def open_texts(job: recipe_lib.Job, options: rollouts.Options, tokenizer, row_length: int) -> dataset.Joined | None:
  """Texts that are learned beside a rollout, if any."""
  if options.texts_fn is None:
    return None
  read = lambda spec: recipe_lib.open_source(job, options.texts_fn, tokenizer, spec, row_length)
  return dataset.Joined([read(spec) for spec in sources.parse_all(options.texts_data)])


def _scorers(
    options: rollouts.Options, tokenizer, prompts: list[dataset.Joined | None], packing: loader_lib.Packing, mesh
):
  """What loads the models among the rewards; raises UsageError where one cannot score what is sampled."""
  longest = max(int(one.lengths_NK.max()) for one in prompts if one is not None)
  sampled = scorers.Sampled(tokenizer, longest, options.longest, packing.row_length)
  rewards = [functions.parse(spec) for spec in options.rewards]
  functions.check_names(rewards)
  return scorers.checked(rewards, mesh, own=options.scorings, sampled=sampled)


def open_streams(
    job: recipe_lib.Job, recipe: recipe_lib.Recipe, tokenizer: tokenizers.Tokenizer, *, train: bool
) -> Streams:
  """Opens `--data` and `--eval_data`, and finds by tracing what the loss needs of them.

  Args:
    job: names the data.
    recipe: how examples are made, and the loss.
    tokenizer: of the model.
    train: whether `--data` are wanted.

  Raises:
    UsageError: the loss needs what the data cannot give.
  """
  train_sets = recipe_lib.open_data(job, recipe, tokenizer, job.data) if train else []
  held_sets = recipe_lib.open_data(job, recipe, tokenizer, job.eval_data) if job.eval_data else []
  open_one = lambda sets, specs: recipe_lib.open_loader(job, recipe, sets, specs) if sets else None
  loaders = open_one(train_sets, job.data), open_one(held_sets, job.eval_data)
  needs = [needs_of(recipe, loader.dataset) for loader in loaders if loader is not None][0]
  logging.info('the loss reads %s', ', '.join(sorted(needs.fields)))
  if recipe.sync is not None and not needs.reference:
    raise types.UsageError(f'recipe.Recipe.sync = {recipe.sync}: the loss reads no reference that could follow')
  live = is_live(recipe, needs)
  if recipe.keeps_reference and not live:
    problem = "there is no live reference; bind recipe.Recipe.reference = 'live'"
    raise types.UsageError(f'recipe.Recipe.reference_dtype, reference_rules: {problem}')
  return Streams(*loaders, needs, live, _report(train_sets, held_sets))


def is_live(recipe: recipe_lib.Recipe, needs: tracing.Needs) -> bool:
  """Whether the step itself computes what the loss reads of a reference."""
  return needs.reference and (needs.live or recipe.sync is not None or recipe.reference == 'live')


def needs_of(recipe: recipe_lib.Recipe, data: dataset.Joined) -> tracing.Needs:
  """What the loss reads; raises UsageError where data do not have that."""
  needs = tracing.trace(
      recipe.loss_fn,
      group_size=data.group_size,
      labels=data.label_names,
      token_labels=data.token_label_names,
      outputs=recipe.score_outputs,
  )
  tracing.check_read(needs, data.label_names, data.group_size)
  if np.any(data.lengths_NK == 0) and 'policy.valid_GK' not in needs.fields:
    raise types.UsageError(
        f'the loss reads {data.group_size} responses to every prompt, but some have fewer; choose a loss on lists'
    )
  return needs


def with_reference(
    streams: Streams,
    job: recipe_lib.Job,
    recipe: recipe_lib.Recipe,
    ref: reference.Reference,
    *,
    steps: int,
    counter: metrics.Compilations,
) -> Streams:
  """The same with the log-probabilities of a reference in each batch, computed once and kept on disk.

  Args:
    streams: of `open_streams`.
    job: names the data and the cache.
    recipe: in whose precision they are computed.
    ref: what training began with.
    steps: of training, by which the plan is followed; records that they do not reach need no reference.
    counter: counts compilations.
  """
  model = ref.model
  kernels = model.attention, *((model.experts,) if model.config.num_experts else ())
  name = reference.digest(reference.checksum(ref.params), recipe.dtype, repr(model.config), repr(model.lora), *kernels)
  cache = reference.Cache(job.cache_dir, name)
  ref_fn = counter.counted(functools.partial(forward.ref_logps, model=ref.model))
  compute = jax.jit(ref_fn, out_shardings=sharding.named(job.mesh))

  def annotated(loader: loader_lib.Loader | None, records_of: Callable, specs: str) -> loader_lib.Loader | None:
    if loader is None:
      return None
    reference.fill(cache, ref.params, loader, compute, records_of(loader), specs)
    keys = loader.row_keys
    return loader.with_extra(lambda record, slot: cache[int(keys[record][slot])])

  train = annotated(streams.train, lambda loader: loader.records_of(steps), job.data)
  held = annotated(streams.held, lambda loader: range(len(loader.dataset)), job.eval_data)
  return dataclasses.replace(streams, train=train, held=held)


def _report(train_sets: list[dataset.Dataset], held_sets: list[dataset.Dataset]) -> dict[str, int]:
  counts: dict[str, int] = {}
  for prefix, sets in (('data', train_sets), ('eval_data', held_sets)):
    for data in sets:
      report = data.report
      dropped = sum(reason['count'] for reason in report['dropped'].values())
      for name, count in {**{n: report[n] for n in ('kept', 'truncated', 'bad')}, 'dropped': dropped}.items():
        counts[f'{prefix}/{name}'] = counts.get(f'{prefix}/{name}', 0) + count
  return counts


def show(job: recipe_lib.Job, recipe: recipe_lib.Recipe) -> str:
  """The first packed rows of `--data`, decoded, and how well the whole epoch packs."""
  tokenizer = recipe_lib.open_tokenizer(job)
  datasets = recipe_lib.open_data(job, recipe, tokenizer, job.data)
  loader = recipe_lib.open_loader(job, recipe, datasets, job.data)
  text = rows.describe(loader.first(), tokenizer)
  report = '\n'.join(f'{name}: {count}' for name, count in (_report(datasets, []) | loader.packing_report()).items())
  return f'{text}\n{report}\n'
