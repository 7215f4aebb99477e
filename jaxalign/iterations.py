"""One rollout after another: made, kept on disk, and packed into the batches of its updates."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import pathlib

import jax
import numpy as np

from jaxalign import episodes
from jaxalign import metrics
from jaxalign import rollouts
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import loader as loader_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import tokenizers
from jaxalign.rewards import functions

_MAX_RESPONSES = 32  # of a row; static, as lengths differ from rollout to rollout


def packing_of(options: rollouts.Options, packing: loader_lib.Packing) -> loader_lib.Packing:
  """The packing of an update's batch."""
  groups = options.prompts // options.minibatches
  most = packing.max_responses or max(_MAX_RESPONSES, options.samples)
  return dataclasses.replace(packing, groups_per_step=groups, max_responses=most)


def check_fit(
    options: rollouts.Options, prompts: dataset_lib.Joined, packing: loader_lib.Packing, context: int
) -> None:
  """Raises UsageError where the longest rollout that there can be does not fit a step, or the model's context."""
  longest, groups = int(prompts.lengths_NK.max()) + 1 + options.longest, options.prompts // options.minibatches
  if longest > context:
    raise types.UsageError(
        f'a prompt of {longest - options.longest} tokens and {_limits(options)} exceed the context of the model,'
        f' {context}'
    )
  try:
    steps = packing_lib.pack(
        np.full((groups, options.samples), longest - 1),
        np.arange(groups),
        rows=packing.rows,
        row_length=packing.row_length,
        max_responses=packing.max_responses or 1,
        micro_batches=packing.micro_batches,
    ).num_steps
  except packing_lib.DoesNotFit:
    steps = 0
  if steps != 1:
    raise types.UsageError(
        f'{groups} prompts with {options.samples} responses of up to {longest} tokens do not fit a step of'
        f' {packing.micro_batches} x {packing.rows} rows of {packing.row_length} tokens: raise'
        ' loader.Packing.micro_batches or rows, or lower rollouts.Options.prompts'
    )


def _limits(options: rollouts.Options) -> str:
  """What makes a response as long as the longest."""
  limit = f'rollouts.Options.max_new_tokens = {options.max_new_tokens}'
  if options.world is None:
    return limit
  return f'{limit}, turns = {options.turns} and observation_tokens = {options.observation_tokens}'


class Iterations:
  """The rollouts of a run, and batches of them."""

  def __init__(
      self,
      options: rollouts.Options,
      maker: rollouts.Maker,
      *,
      packing: loader_lib.Packing,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      seed: int,
      folder: pathlib.Path,
      scorers: Callable[[], Mapping[str, functions.Scorer]] = dict,
  ):
    """Keeps what all of them share.

    Args:
      options: what a rollout is.
      maker: makes them.
      packing: the shape of a step, see `packing_of`.
      tokenizer: of the policy.
      mesh: where batches lie.
      seed: of the order within a rollout.
      folder: where rollouts are kept.
      scorers: loads the models among the rewards, see `scorers.checked`, when the first rollout begins.
    """
    self._options, self._maker, self._packing, self._scorers = options, maker, packing, scorers
    self._tokenizer, self._mesh, self._seed, self._folder = tokenizer, mesh, seed, folder
    self.said: dict[tuple[int, int], dict[str, float]] = {}  # metrics of the newest rollouts by data state

  def batches(
      self, iteration: int, update: int, params: Callable[[], rollouts.Params]
  ) -> Iterator[tuple[tuple[int, int], types.Batch]]:
    """Batches from an update of a rollout on, without end.

    Args:
      iteration: which rollout.
      update: which use of it is the first; the rollout is then read from where it was kept.
      params: gives the parameters, when a rollout begins.

    Yields:
      (iteration, update) to resume from once the batch has been consumed, and the batch.
    """
    rewards = [functions.parse(spec) for spec in self._options.rewards]
    with functions.Panel(rewards, self._scorers(), together=True) as panel:
      while True:
        rollout = self._read(iteration) if update else self._made(panel, iteration, params())
        yield from self._of(rollout, iteration, update)
        iteration, update = iteration + 1, 0

  def _of(self, rollout: episodes.Rollout, iteration: int, update: int):
    groups, number = rollout.groups(), 0
    loader = loader_lib.Loader([groups], [1.0], packing=self._packing, mesh=self._mesh, seed=0)  # type: ignore[list-item]
    for epoch in range(self._options.epochs):
      order = np.argsort(np.random.default_rng([self._seed, iteration, epoch]).random(len(groups)))
      steps = loader.ordered(order.tolist())
      if len(steps) != self._options.minibatches:
        raise types.RunError(f'rollout {iteration} does not fit a step: raise loader.Packing.rows')
      for _, batch in steps:
        number += 1
        if number > update:
          place = (iteration, number) if number < self._options.updates else (iteration + 1, 0)
          self.said = {**dict(list(self.said.items())[-3:]), place: rollout.metrics()}
          yield place, batch

  def _made(self, panel: functions.Panel, iteration: int, params: rollouts.Params) -> episodes.Rollout:
    rollout = self._maker.make(panel, iteration, params)
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      metrics.write_text(self._path(iteration), rollout.to_text(self._tokenizer))
    return rollout

  def _path(self, iteration: int) -> pathlib.Path:
    return self._folder / f'{iteration:06d}.jsonl'

  def _read(self, iteration: int) -> episodes.Rollout:
    path = self._path(iteration)
    try:
      return episodes.of_text(path.read_text(encoding='utf-8'), self._options.samples)
    except OSError as err:
      raise types.RunError(f'{path}: the rollout that the run was at cannot be read ({err.strerror})') from err
