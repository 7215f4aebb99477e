"""Rollouts: responses sampled from the policy as it is, their rewards, and the batches that it is trained on.

A rollout takes the next prompts, samples several responses to each, has them scored, and makes of every response a
sequence whose tokens carry an advantage. They are packed as other data are. The ids that were sampled are trained on as
they are; text is only for those who score.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import pathlib

import jax
import numpy as np

from jaxalign import episodes
from jaxalign import forward
from jaxalign import metrics
from jaxalign import sampling
from jaxalign import sharding
from jaxalign import types
from jaxalign import verdicts
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import loader as loader_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.models import transformer
from jaxalign.rewards import functions

_MAX_RESPONSES = 32  # of a row; static, as lengths differ from rollout to rollout


@dataclasses.dataclass(frozen=True)
class Options:
  """What a rollout is, and what becomes of it.

  Attributes:
    prompts: of a rollout.
    samples: responses to each prompt, K.
    max_new_tokens: length at which a response is cut.
    rewards: what scores responses, each as `--reward` names it, see `rewards.functions.parse`.
    combine: of several rewards, see `rewards.functions.combine`.
    advantage_fn: from `advantages`: rewards `[G, K]` and which of them there are to advantages `[G, K]`.
    temperature: of sampling.
    top_k: see `sampling.sample`.
    top_p: see `sampling.sample`.
    epochs: passes over a rollout.
    minibatches: optimizer steps of a pass.
  """

  prompts: int
  samples: int
  max_new_tokens: int
  rewards: tuple[str, ...]
  advantage_fn: Callable[..., types.Array]
  combine: str = 'sum'
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  epochs: int = 1
  minibatches: int = 1

  def __post_init__(self):
    if not self.rewards:
      raise types.UsageError('rollouts.Options.rewards: nothing scores the responses; give --reward=MODULE:FUNCTION')
    functions.check_how(self.combine)
    for name in ('prompts', 'samples', 'max_new_tokens', 'epochs', 'minibatches'):
      if getattr(self, name) < 1:
        raise types.UsageError(f'rollouts.Options.{name} = {getattr(self, name)}: it must be at least 1')
    if self.temperature <= 0:
      raise types.UsageError(
          f'rollouts.Options.temperature = {self.temperature}: it must be above 0, or nothing varies'
      )
    if self.prompts % self.minibatches:
      raise types.UsageError(
          f'rollouts.Options.minibatches = {self.minibatches}: it must divide the {self.prompts} prompts of a rollout'
      )

  @property
  def updates(self) -> int:
    """Optimizer steps that a rollout is used for."""
    return self.epochs * self.minibatches


class Sampler:
  """Makes the rollouts of a run, and batches of them."""

  def __init__(
      self,
      options: Options,
      prompts: dataset_lib.Joined,
      records: Sequence[sources.Source],
      *,
      weights: Sequence[float],
      packing: loader_lib.Packing,
      model: transformer.Transformer,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      seed: int,
      folder: pathlib.Path,
  ):
    """Checks that a rollout fits a step.

    Args:
      options: what a rollout is.
      prompts: tokenised, see `examples.prompt`.
      records: the sources that they came from, for the fields that rewards read.
      weights: shares of the sources.
      packing: the shape of a step.
      model: of the policy, without dropout.
      tokenizer: of the model.
      mesh: where it lies.
      seed: of the order of prompts and of sampling.
      folder: where rollouts are kept.
    """
    self.options, self._prompts, self._records = options, prompts, records
    groups = options.prompts // options.minibatches
    self._packing = dataclasses.replace(
        packing, groups_per_step=groups, max_responses=packing.max_responses or max(_MAX_RESPONSES, options.samples)
    )
    self._model, self._tokenizer, self._mesh, self._seed, self._folder = model, tokenizer, mesh, seed, folder
    self._weights = list(weights)
    self.said: dict[tuple[int, int], dict[str, float]] = {}  # metrics of the newest rollouts by data state
    run = functools.partial(forward.ref_logps, model=model)
    self._logps = jax.jit(run, out_shardings=sharding.named(mesh))
    self._check_fit(groups)

  def _check_fit(self, groups: int) -> None:
    """Raises where the longest rollout that there can be does not fit a step."""
    longest, options = int(self._prompts.lengths_NK.max()) + 1 + self.options.max_new_tokens, self.options
    if longest > self._model.config.max_length:
      raise types.UsageError(
          f'a prompt of {longest - options.max_new_tokens} tokens and rollouts.Options.max_new_tokens ='
          f' {options.max_new_tokens} exceed the context of the model, {self._model.config.max_length}'
      )
    lengths = np.full((groups, options.samples), longest - 1)
    pack = self._packing
    try:
      steps = packing_lib.pack(
          lengths,
          np.arange(groups),
          rows=pack.rows,
          row_length=pack.row_length,
          max_responses=pack.max_responses or 1,
          micro_batches=pack.micro_batches,
      ).num_steps
    except packing_lib.DoesNotFit:
      steps = 0
    if steps != 1:
      raise types.UsageError(
          f'{groups} prompts with {options.samples} responses of up to {longest} tokens do not fit a step of'
          f' {pack.micro_batches} x {pack.rows} rows of {pack.row_length} tokens: raise loader.Packing.micro_batches or'
          ' rows, or lower rollouts.Options.prompts'
      )

  def epochs(self, iteration: int) -> float:
    """Passes over the prompts that so many rollouts make."""
    return iteration * self.options.prompts / len(self._prompts)

  def batches(
      self, iteration: int, update: int, params: Callable[[], types.PyTree]
  ) -> Iterator[tuple[tuple[int, int], types.Batch]]:
    """Batches from an update of a rollout on, without end.

    Args:
      iteration: which rollout.
      update: which use of it is the first; the rollout is then read from where it was kept.
      params: gives the policy's parameters, when a rollout begins.

    Yields:
      (iteration, update) to resume from once the batch has been consumed, and the batch.
    """
    with functions.Panel([functions.parse(spec) for spec in self.options.rewards]) as panel:
      yield from self._batches(panel, iteration, update, params)

  def _batches(self, panel: functions.Panel, iteration: int, update: int, params):
    while True:
      rollout = self._read(iteration) if update else self._roll(panel, iteration, params())
      loader = self._loader(rollout)
      number = 0
      for epoch in range(self.options.epochs):
        order = np.argsort(np.random.default_rng([self._seed, iteration, epoch]).random(len(rollout.prompts)))
        steps = loader.ordered(order.tolist())
        if len(steps) != self.options.minibatches:
          raise types.RunError(f'rollout {iteration} does not fit a step: raise loader.Packing.rows')
        for _, batch in steps:
          number += 1
          if number > update:
            place = (iteration, number) if number < self.options.updates else (iteration + 1, 0)
            self.said = {**dict(list(self.said.items())[-3:]), place: rollout.metrics()}
            yield place, batch
      iteration, update = iteration + 1, 0

  def _loader(self, rollout: episodes.Rollout) -> loader_lib.Loader:
    groups = rollout.groups()
    return loader_lib.Loader([groups], [1.0], packing=self._packing, mesh=self._mesh, seed=0)  # type: ignore[list-item]

  def _drawn(self, iteration: int) -> list[int]:
    """Which prompts a rollout takes: the next ones of epochs that follow one another."""
    found: list[int] = []
    start = iteration * self.options.prompts
    while len(found) < self.options.prompts:
      epoch, first = divmod(start + len(found), len(self._prompts))
      order = packing_lib.order(self._prompts.sizes, self._weights, self._seed, epoch)
      found += order[first : first + self.options.prompts - len(found)].tolist()
    return found

  def _roll(self, panel: functions.Panel, iteration: int, params: types.PyTree) -> episodes.Rollout:
    """Samples, scores and compares."""
    asked = [verdicts.of_record(self._prompts, self._records, index) for index in self._drawn(iteration)]
    prompts, samples = [one.ids for one in asked], self.options.samples
    drawn = sampling.sample(
        self._model,
        params,
        [ids for ids in prompts for _ in range(samples)],
        max_new_tokens=self.options.max_new_tokens,
        temperature=self.options.temperature,
        top_k=self.options.top_k,
        top_p=self.options.top_p,
        seed=int(np.random.SeedSequence([self._seed, iteration]).generate_state(1)[0]),
        stop_ids=(self._tokenizer.eos_id,),
    )
    rewards_GK, said = self._rewards(panel, asked, drawn)
    rollout = episodes.Rollout(
        prompts,
        [one.ids for one in drawn],
        [one.logps for one in drawn],
        [one.finished for one in drawn],
        rewards_GK,
        self._advantages(rewards_GK),
        said=said,
    )
    if self.options.updates > 1:
      rollout = dataclasses.replace(rollout, old_logps=self._trainers(rollout, params))
    self._keep(iteration, rollout)
    return rollout

  def _advantages(self, rewards_GK: np.ndarray) -> np.ndarray:
    valid_GK = (~np.isnan(rewards_GK)).astype(np.float32)
    found = self.options.advantage_fn(np.nan_to_num(rewards_GK).astype(np.float32), valid_GK)
    return np.asarray(found * valid_GK, np.float32)

  def _rewards(
      self, panel: functions.Panel, asked: Sequence[verdicts.Prompt], drawn: Sequence[sampling.Sampled]
  ) -> tuple[np.ndarray, dict[str, float]]:
    """Of every response, and what each reward says on the whole."""
    samples, options, decode = self.options.samples, self.options, self._tokenizer.decode
    texts, ids = [decode(one.ids, continuation=True) for one in drawn], [one.ids for one in drawn]
    responses = verdicts.responses(asked, [decode(one.ids) for one in asked], texts, ids)
    values = panel(responses)
    weights = [functions.parse(spec).weight for spec in options.rewards]
    total = functions.combine(list(values.values()), weights, options.combine)
    if np.all(np.isnan(total)):
      raise types.RunError(f'every reward abstains on all {len(total)} responses (from {responses.where[0]} on)')
    said: dict[str, float] = {}
    for name, found in values.items():
      known = found[~np.isnan(found)]
      if known.size:
        said |= {f'rewards/{name}/mean': float(known.mean()), f'rewards/{name}/std': float(known.std())}
    return total.reshape(-1, samples), said

  def _trainers(self, rollout: episodes.Rollout, params: types.PyTree) -> list[list[float]]:
    """Log-probabilities of the sampled ids by the program that trains."""
    found: list[list[float]] = [[] for _ in rollout.responses]
    for group, slot, logps in episodes.logps_of(params, rollout.groups(), self._logps, self._packing, self._mesh):
      found[group * self.options.samples + slot] = logps.tolist()
    return found

  def _path(self, iteration: int) -> pathlib.Path:
    return self._folder / f'{iteration:06d}.jsonl'

  def _keep(self, iteration: int, rollout: episodes.Rollout) -> None:
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      metrics.write_text(self._path(iteration), rollout.to_text(self._tokenizer))

  def _read(self, iteration: int) -> episodes.Rollout:
    path = self._path(iteration)
    try:
      return episodes.of_text(path.read_text(encoding='utf-8'), self.options.samples)
    except OSError as err:
      raise types.RunError(f'{path}: the rollout that the run was at cannot be read ({err.strerror})') from err
