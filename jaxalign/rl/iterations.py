"""One rollout after another: made, kept on disk, and packed into the batches of its updates."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent import futures
import dataclasses
import functools
import threading
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import storage
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import loader as loader_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import tokenizers
from jaxalign.rewards import functions
from jaxalign.rewards import panels
from jaxalign.rl import collect
from jaxalign.rl import experience
from jaxalign.rl import rollouts

_MAX_RESPONSES = 32  # of a row; static, as lengths differ from rollout to rollout


def packing_of(options: rollouts.Options, packing: loader_lib.Packing) -> loader_lib.Packing:
  """The packing of an update's batch."""
  groups = options.prompts // options.minibatches + options.texts
  most = packing.max_responses or max(_MAX_RESPONSES, options.samples)
  return dataclasses.replace(packing, groups_per_step=groups, max_responses=most)


def check_fit(
    options: rollouts.Options,
    prompts: dataset_lib.Joined,
    packing: loader_lib.Packing,
    context: int,
    texts: dataset_lib.Joined | None = None,
) -> None:
  """Raises UsageError where the longest rollout that there can be does not fit a step, or the model's context."""
  # Of a prompt `prompts.alone` makes one token more than it has, and lengths are of all but one.
  longest, groups = int(prompts.lengths_NK.max()) + options.longest, options.prompts // options.minibatches
  if longest > context:
    raise types.UsageError(
        f'a prompt of {longest - options.longest} tokens and {_limits(options)} exceed the context of the model,'
        f' {context}'
    )
  lengths = np.full((groups, options.samples), longest - 1)
  shared = np.full(groups, longest - options.longest - 1 if packing.share_prompts and options.samples > 1 else 0)
  if texts is not None:
    of_text = np.eye(1, options.samples, dtype=int) * int(texts.lengths_NK.max())
    lengths = np.concatenate([lengths, np.repeat(of_text, options.texts, axis=0)])
    shared = np.concatenate([shared, np.zeros(options.texts, int)])
  wanted = _wanted(lengths, shared, packing)
  if wanted:
    raise types.UsageError(
        f'{groups} prompts with {options.samples} responses of up to {longest} tokens do not fit a step of'
        f' {packing.micro_batches} x {packing.rows} rows of {packing.row_length} tokens: {wanted}, or lower'
        ' rollouts.Options.prompts, samples or max_new_tokens'
    )


def _wanted(lengths_NK: np.ndarray, shared_N: np.ndarray, packing: loader_lib.Packing) -> str:
  """What would make these groups fit one step; '' where they do."""
  try:
    count = packing_lib.pack(
        lengths_NK,
        np.arange(len(lengths_NK)),
        rows=packing.rows,
        row_length=packing.row_length,
        max_responses=packing.max_responses or 1,
        shared_N=shared_N,
    ).num_steps
  except packing_lib.DoesNotFit:
    if lengths_NK.max() > packing.row_length:
      return f'raise loader.Packing.row_length to {lengths_NK.max()}'
    return 'raise loader.Packing.rows, as all responses to a prompt lie in one micro-batch'
  return f'raise loader.Packing.micro_batches to {count}' if count > packing.micro_batches else ''


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
      maker: collect.Maker,
      *,
      packing: loader_lib.Packing,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      seed: int,
      folder: storage.Path,
      scorers: Callable[[], Mapping[str, functions.Scorer]] = dict,
      texts: dataset_lib.Joined | None = None,
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
      texts: that nobody sampled, of which each step has some; None for none.
    """
    self._options, self._maker, self._packing, self._scorers, self._texts = options, maker, packing, scorers, texts
    self._tokenizer, self._mesh, self._seed, self._folder = tokenizer, mesh, seed % 2**32, folder
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
    asynchronous, scorers = self._options.asynchronous, self._scorers()
    # Models need the devices, which are busy, and processes must agree on the order of what they do together.
    begin = _at_once if scorers or jax.process_count() > 1 else _beside
    with panels.Panel(rewards, scorers, together=True) as panel:
      begun = functools.partial(self._begun, panel, begin)
      # What a run that is resumed had sampled before the updates that it has made.
      ahead = begun(iteration, None) if asynchronous and iteration and not update else None
      while True:
        if update:
          rollout = self._read(iteration)
        elif asynchronous:
          rollout = self._finished(iteration, ahead or begun(iteration, params()), params())
        else:
          rollout = self._kept(iteration, self._maker.make(panel, iteration, params(), begin))
        if asynchronous:
          ahead = begun(iteration + 1, None if update else params())
        yield from self._of(rollout, iteration, update)
        iteration, update = iteration + 1, 0

  def _begun(self, panel: panels.Panel, begin: collect.Begin, iteration: int, params) -> '_Ahead':
    """What is sampled for a rollout, and who judges it meanwhile; without `params` what was kept of that."""
    path = self._folder / f'{iteration:06d}.drawn.json'
    if params is None:
      drawn = _parsed(path, collect.Drawn.of_text)
    else:
      drawn = self._maker.draw(iteration, params)
      self._write(path, drawn.to_text)
    return _Ahead(drawn, begin(lambda: self._maker.judge(panel, drawn)))

  def _finished(self, iteration: int, ahead: '_Ahead', params: rollouts.Params) -> experience.Rollout:
    return self._kept(iteration, self._maker.finish(ahead.drawn, ahead.judged, params))

  def _of(self, rollout: experience.Rollout, iteration: int, update: int):
    """The batches of a rollout's updates that have not been made."""
    options, number, groups = self._options, 0, self._with_texts(rollout.groups(), iteration)
    loader = loader_lib.Loader([groups], [1.0], packing=self._packing, mesh=self._mesh, seed=0)  # type: ignore[list-item]
    texts = np.arange(options.prompts, len(groups)).reshape(options.minibatches, -1)
    for epoch in range(options.epochs):
      order = np.argsort(np.random.default_rng([self._seed, iteration, epoch]).random(options.prompts))
      parts = order.reshape(options.minibatches, -1)
      for part in np.concatenate([parts, texts], axis=1):
        steps = loader.ordered(part.tolist())
        if len(steps) != 1:
          problem = f'rollout {iteration} does not fit a step: raise loader.Packing.rows'
          raise types.RunError(problem, everywhere=True)
        ((_, batch),) = steps
        number += 1
        if number > update:
          place = (iteration, number) if number < options.updates else (iteration + 1, 0)
          self.said = {**dict(list(self.said.items())[-3:]), place: rollout.metrics()}
          yield place, batch

  def _with_texts(self, groups: experience.Groups, iteration: int) -> experience.Groups:
    """The next texts beside what was sampled."""
    if self._texts is None:
      return groups
    count = self._options.texts * self._options.minibatches
    sizes = self._texts.sizes
    chosen = packing_lib.in_turn(sizes, [1.0] * len(sizes), self._seed, iteration * count, count)
    return groups.with_texts([self._texts[i] for i in chosen])

  def _kept(self, iteration: int, rollout: experience.Rollout) -> experience.Rollout:
    self._write(self._path(iteration), lambda: rollout.to_text(self._tokenizer))
    return rollout

  def _write(self, path: storage.Path, text_fn: Callable[[], str]) -> None:
    if jax.process_index() == 0:
      with storage.naming(f'{path}: the rollout cannot be written'):
        storage.write_text(path, text_fn())

  def _path(self, iteration: int) -> storage.Path:
    return self._folder / f'{iteration:06d}.jsonl'

  def _read(self, iteration: int) -> experience.Rollout:
    count = self._options.prompts * self._options.samples

    def whole(text: str) -> experience.Rollout:
      rollout = experience.of_text(text, self._options.samples)
      if len(rollout.responses) != count:
        raise ValueError(f'it has {len(rollout.responses)} of {count} responses')
      return rollout

    return _parsed(self._path(iteration), whole)


class _Ahead(NamedTuple):
  """What was sampled, and what rewards will have made of it."""

  drawn: collect.Drawn
  judged: Callable[[], collect.Verdicts]


def _at_once(work: Callable[[], collect.Verdicts]) -> Callable[[], collect.Verdicts]:
  done = work()
  return lambda: done


def _beside(work: Callable[[], collect.Verdicts]) -> Callable[[], collect.Verdicts]:
  """Begins work in a thread; what it gives back waits. The process need not: a user's function may take its time."""
  done: futures.Future = futures.Future()

  def run():
    try:
      done.set_result(work())
    except Exception as err:  # Whatever it is, it is raised where it is waited for.
      done.set_exception(err)
    finally:
      if not done.done():
        done.set_exception(types.RunError('a reward ended the thread that judges, which said why'))

  threading.Thread(target=run, daemon=True).start()
  return done.result


def _parsed(path: storage.Path, parse: Callable[[str], Any]) -> Any:
  """What a file holds that a run left there; RunError where it is gone or torn."""
  try:
    return parse(path.read_text(encoding='utf-8'))
  except storage.errors() + (ValueError, LookupError, TypeError) as err:
    reason = storage.reason(err) if isinstance(err, storage.errors()) else f'{type(err).__name__}: {err}'
    raise types.RunError(f'{path}: the rollout that the run was at cannot be read ({reason})') from err
