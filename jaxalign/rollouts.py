"""Rollouts: responses sampled from the policy as it is, their rewards, and what each is trained on.

The ids that were sampled are trained on as they are; text is only for those who score.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import credit as credit_lib
from jaxalign import environments
from jaxalign import episodes
from jaxalign import forward
from jaxalign import judging
from jaxalign import sampling
from jaxalign import sharding
from jaxalign import types
from jaxalign import verdicts
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import loader as loader_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import modelled


@dataclasses.dataclass(frozen=True)
class Options:
  """What a rollout is, and what becomes of it.

  Attributes:
    prompts: of a rollout.
    samples: responses to each prompt, K.
    max_new_tokens: length at which a response is cut.
    rewards: what scores responses, each as `--reward` names it, see `rewards.functions.parse`; with an environment
      there may be none.
    scorings: of models among them, by directory, what their own runs say of how they score; nothing binds it.
    combine: of several rewards, see `rewards.functions.combine`.
    advantage_fn: from `advantages`, or any function that `credit` can call: what it reads its parameters name.
    temperature: of sampling.
    top_k: see `sampling.sample`.
    top_p: see `sampling.sample`.
    epochs: passes over a rollout.
    minibatches: optimizer steps of a pass.
    ref_samples: responses of the reference to each prompt, for an `advantage_fn` that reads `ref_rewards_GN`.
    refill: how often prompts whose responses all have the same reward are replaced by others, sampled anew; prompts
      that are replaced stay where that is not enough. DAPO's dynamic sampling (Yu et al., 2025, arXiv:2503.14476).
    max_kl: nats a token from the policy that was sampled from beyond which no further update is made by a rollout, see
      `step.make_step`; TRL's `target_kl` of old, times 1.5.
    mask_truncated: whether a response that was cut at `max_new_tokens` is not trained on; its reward still counts in
      its group. DAPO's overlong filtering, TRL's `mask_truncated_completions`.
    environment: what answers the policy, see `environments.Environment`; '' for nothing, and a single turn. Its rewards
      are added up, and come first among `rewards`, which read a whole episode, what was answered included.
    turns: the most of an episode, each of up to `max_new_tokens`.
    observation_tokens: the most that an answer of the environment has.
    template: see `chat.pick`, of answers where prompts are messages: what `prompts.alone.template` is.
  """

  prompts: int
  samples: int
  max_new_tokens: int
  rewards: tuple[str, ...]
  advantage_fn: Callable[..., Any]
  scorings: Mapping[str, modelled.Scoring] = dataclasses.field(default_factory=dict)
  combine: str = 'sum'
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  epochs: int = 1
  minibatches: int = 1
  ref_samples: int = 0
  refill: int = 0
  max_kl: float | None = None
  mask_truncated: bool = False
  environment: str = ''
  turns: int = 4
  observation_tokens: int = 64
  template: str | None = None

  def __post_init__(self):
    if not self.rewards and not self.environment:
      raise types.UsageError(
          'rollouts.Options.rewards: nothing scores the responses; give --reward=MODULE:FUNCTION or DIR'
      )
    functions.check_how(self.combine)
    for name in ('prompts', 'samples', 'max_new_tokens', 'epochs', 'minibatches'):
      if getattr(self, name) < 1:
        raise types.UsageError(f'rollouts.Options.{name} = {getattr(self, name)}: it must be at least 1')
    for name in ('ref_samples', 'refill'):
      if getattr(self, name) < 0:
        raise types.UsageError(f'rollouts.Options.{name} = {getattr(self, name)}: it must be at least 0')
    if self.temperature <= 0:
      raise types.UsageError(
          f'rollouts.Options.temperature = {self.temperature}: it must be above 0, or nothing varies'
      )
    if self.prompts % self.minibatches:
      raise types.UsageError(
          f'rollouts.Options.minibatches = {self.minibatches}: it must divide the {self.prompts} prompts of a rollout'
      )
    if ('ref_rewards_GN' in self.credit.reads) != (self.ref_samples > 0):
      problem = f'rollouts.Options.advantage_fn reads {"none" if self.ref_samples else "responses"} of the reference'
      raise types.UsageError(f'rollouts.Options.ref_samples = {self.ref_samples}: {problem}')

  @functools.cached_property
  def credit(self) -> credit_lib.Credit:
    """What makes labels of what was sampled."""
    return credit_lib.Credit(self.advantage_fn)

  @functools.cached_property
  def world(self) -> environments.Environment | None:
    """The environment, None where there is none."""
    limits = {'turns': self.turns, 'observation_tokens': self.observation_tokens}
    return environments.Environment(self.environment, template=self.template, **limits) if self.environment else None

  @property
  def longest(self) -> int:
    """Tokens of the longest response, answers of the environment included."""
    return self.max_new_tokens if self.world is None else self.world.longest(self.max_new_tokens)

  @property
  def most_sampled(self) -> int:
    """Those of them that are sampled."""
    return self.max_new_tokens * (1 if self.world is None else self.world.turns)

  @property
  def updates(self) -> int:
    """Optimizer steps that a rollout is used for."""
    return self.epochs * self.minibatches


class Models(NamedTuple):
  """Those that a rollout is made with.

  Attributes:
    policy: without dropout; a head that it has gives values.
    critic: gives values where it has parameters of its own; None where there is none.
    ref: the reference; None where none is wanted.
  """

  policy: transformer.Transformer
  critic: transformer.Transformer | None
  ref: transformer.Transformer | None


class Params(NamedTuple):
  """The parameters of `Models` at one moment, None for those that are not there, and the state of the loss."""

  policy: types.PyTree
  critic: types.PyTree | None = None
  ref: types.PyTree | None = None
  loss_state: types.PyTree = ()


class Maker:
  """Makes the rollouts of a run."""

  def __init__(
      self,
      options: Options,
      prompts: dataset_lib.Joined,
      records: Sequence[sources.Source],
      *,
      weights: Sequence[float],
      packing: loader_lib.Packing,
      models: Models,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      seed: int,
  ):
    """Keeps what all rollouts share.

    Args:
      options: what a rollout is.
      prompts: tokenised, see `prompts.alone`.
      records: the sources that they came from, for the fields that rewards read.
      weights: shares of the sources.
      packing: of the rows in which models read responses again.
      models: of the run.
      tokenizer: of the policy.
      mesh: where they lie.
      seed: of the order of prompts and of sampling.
    """
    self._options, self._prompts, self._weights = options, prompts, list(weights)
    self._packing, self._models, self._tokenizer, self._mesh, self._seed = packing, models, tokenizer, mesh, seed
    self._asked = functools.partial(verdicts.of_record, prompts, records)
    self._stop_ids = prompts_lib.stop_ids(tokenizer, self._asked(0).is_chat, options.template)
    self._judge = judging.Judge(options.rewards, options.combine, tokenizer, options.world)
    self._wanted = options.credit.reads & credit_lib.OF_PROGRAM | ({'logps_BT'} if options.updates > 1 else set())
    ref_model = models.ref if 'log_ratio_BT' in self._wanted else None
    run = lambda params, batch: forward.annotations(
        params.policy,
        params.critic,
        params.ref,
        batch,
        model=models.policy,
        critic_model=models.critic if 'values_BT' in self._wanted else None,
        ref_model=ref_model,
        temperature=options.temperature,
    )
    self._run = jax.jit(run, out_shardings=sharding.named(mesh))

  def make(self, panel: functions.Panel, iteration: int, params: Params) -> episodes.Rollout:
    """The rollout of this number: samples, scores, replaces what tells nothing, and gives credit."""
    samples = self._options.samples
    draw = lambda chosen, name: self._judged(panel, chosen, params.policy, self._models.policy, name, samples)
    chosen = self._drawn(iteration, 0)
    judged = draw(chosen, (iteration,))
    said: dict[str, float] = {}
    for turn in range(1, self._options.refill + 1):
      dull = np.flatnonzero(self._judge.dull(judged, samples))
      said['rollouts/refilled'] = said.get('rollouts/refilled', 0.0) + len(dull)
      if not dull.size:
        break
      others = self._drawn(iteration, turn)  # As many at every turn, so that no other program is compiled.
      fresh = draw(others, (iteration, turn))
      good = np.flatnonzero(~self._judge.dull(fresh, samples))
      for old, new in zip(dull, good):
        chosen[old] = others[new]
        judged.replace(int(old), fresh, int(new), samples)
    return self._credited(panel, iteration, params, chosen, judged, said)

  def _credited(
      self, panel, iteration: int, params: Params, chosen: list[int], judged: judging.Judged, said: dict[str, float]
  ) -> episodes.Rollout:
    """What the responses are trained on."""
    options, samples, drawn = self._options, self._options.samples, judged.drawn
    total = self._judge.known(judged, self._prompts.where(chosen[0]))
    rollout = episodes.Rollout(
        [self._asked(i).ids for i in chosen],
        [one.ids for one in drawn],
        [one.logps for one in drawn],
        [one.finished for one in drawn],
        total.reshape(-1, samples),
        {},
        {},
        [one.finished or not options.mask_truncated for one in drawn],
        self._judge.said(judged) | said,
        [environments.sampled_of(one) for one in drawn] if options.world is not None else None,
    )
    fields = self._fields(rollout, judged.values_RN) | {'loss_state': params.loss_state}
    if self._wanted:
      fields |= self._annotations(rollout, params)
    for name, count, model, of in self._others(params):
      judged = self._judged(panel, chosen, of, model, (iteration, name), count, 0.0 if name == 'greedy_G' else None)
      rewards_N = np.nan_to_num(self._judge.total(judged.values_RN)).astype(np.float32)
      fields[name] = rewards_N if name == 'greedy_G' else rewards_N.reshape(-1, count)
    made = options.credit.labels(fields)
    if options.updates > 1:
      made['old_logps'] = fields['logps_BT']
    return self._labelled(rollout, made)

  def _others(self, params: Params):
    """What else is sampled for a field: its name, responses to each prompt, model and parameters."""
    if 'greedy_G' in self._options.credit.reads:
      yield 'greedy_G', 1, self._models.policy, params.policy
    if 'ref_rewards_GN' in self._options.credit.reads:
      yield 'ref_rewards_GN', self._options.ref_samples, self._models.ref, params.ref

  def _fields(self, rollout: episodes.Rollout, values_RN: np.ndarray) -> dict[str, Any]:
    """What `credit` may read of responses without a model."""
    samples, lengths = self._options.samples, [len(logps) for logps in rollout.sampler_logps]
    known = lambda x: np.nan_to_num(x).astype(np.float32)
    return {
        'rewards_GK': known(rollout.rewards_GK),
        'valid_GK': (~np.isnan(rollout.rewards_GK)).astype(np.float32),
        'rewards_RGK': known(values_RN).reshape(len(values_RN), -1, samples),
        'weights_R': self._judge.weights_R,
        'tokens_GK': np.array(lengths, np.float32).reshape(-1, samples),
        'finished_GK': np.array(rollout.finished, np.float32).reshape(-1, samples),
        'rows': credit_lib.rows(lengths, samples, self._options.most_sampled),
    }

  def _annotations(self, rollout: episodes.Rollout, params: Params) -> dict[str, np.ndarray]:
    """What the training program makes of the responses."""
    all_counted = dataclasses.replace(rollout, counted=[True] * len(rollout.responses))
    each: list[dict[str, np.ndarray]] = [{} for _ in rollout.responses]
    for group, slot, found in episodes.annotated(params, all_counted.groups(), self._run, self._packing, self._mesh):
      each[group * self._options.samples + slot] = found
    tables = {name: credit_lib.table([one[name] for one in each], self._options.most_sampled) for name in each[0]}
    named = {'logps_BT': tables['logps']}
    if 'values' in tables:
      named['values_BT'] = tables['values']
    if 'ref_logps' in tables:
      named['log_ratio_BT'] = tables['logps'] - tables['ref_logps']
    return named

  def _labelled(self, rollout: episodes.Rollout, made: dict[str, np.ndarray]) -> episodes.Rollout:
    """The rollout with labels of responses and of tokens."""
    of_responses, of_tokens, most = {}, {}, self._options.most_sampled
    for name, x in made.items():
      if x.shape == rollout.rewards_GK.shape and name != 'advantages':
        of_responses[name] = x
      else:
        rows_BT = np.repeat(x.reshape(-1, 1), most, axis=1) if x.shape == rollout.rewards_GK.shape else x
        of_tokens[name] = [rows_BT[n, : len(logps)] for n, logps in enumerate(rollout.sampler_logps)]
    return dataclasses.replace(rollout, labels=of_responses, token_labels=of_tokens)

  def _drawn(self, iteration: int, turn: int) -> list[int]:
    """Which prompts a rollout takes: the next ones of epochs that follow one another; others at each further turn."""
    found: list[int] = []
    start = iteration * self._options.prompts
    while len(found) < self._options.prompts:
      epoch, first = divmod(start + len(found), len(self._prompts))
      order = packing_lib.order(self._prompts.sizes, self._weights, self._seed + turn, epoch)
      found += order[first : first + self._options.prompts - len(found)].tolist()
    return found

  def _judged(self, panel, chosen, params, model, name, count: int, temperature: float | None = None) -> judging.Judged:
    """Samples `count` responses to each prompt and has them scored; `name` makes the random numbers its own."""
    options, asked = self._options, list(map(self._asked, chosen))

    def draw(prompts: list[list[int]], n: int, turn: int) -> list[sampling.Sampled]:
      return sampling.sample(
          model,
          params,
          prompts,
          n=n,
          max_new_tokens=options.max_new_tokens,
          temperature=options.temperature if temperature is None else temperature,
          top_k=options.top_k,
          top_p=options.top_p,
          seed=_seed(self._seed, (*name, 'turn', turn) if turn else name),
          stop_ids=self._stop_ids,
      )

    return self._judge(panel, asked, environments.respond(options.world, asked, count, self._tokenizer, draw))


def _seed(seed: int, name: tuple[int | str, ...]) -> int:
  """A seed for each thing that is sampled: an iteration, or an iteration and what is sampled beside its rollout."""
  numbers = [int.from_bytes(part.encode()[:4], 'little') if isinstance(part, str) else part for part in (seed, *name)]
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])
