"""Makes rollouts: samples responses from the policy as it is, has them scored, and says what each is trained on.

The ids that were sampled are trained on as they are; text is only for those who score.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
import time
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import forward
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import loader as loader_lib
from jaxalign.data import packing as packing_lib
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.rewards import panels
from jaxalign.rewards import verdicts
from jaxalign.rl import credit as credit_lib
from jaxalign.rl import experience
from jaxalign.rl import judging
from jaxalign.rl import multi_turn
from jaxalign.rl import rollouts

# By name, as they are sampled.
Verdicts = Mapping[str, judging.Judged]
# Begins what it is given, beside what follows where it can; what it gives back waits for that.
Begin = Callable[[Callable[[], Verdicts]], Callable[[], Verdicts]]

OWN = 'own'  # the responses that are trained on, among all that are sampled


class Drawn(NamedTuple):
  """What was sampled for a rollout, and has not been judged.

  Attributes:
    chosen: numbers of the prompts.
    responses: to each of them, by name: `OWN`, and for which field of `credit` others are.
    version: of the policy that wrote them.
  """

  chosen: list[int]
  responses: dict[str, list[multi_turn.Response]]
  version: int

  def to_text(self) -> str:
    """As JSON, of responses in a single turn."""
    responses = {name: list(map(experience.to_json, each)) for name, each in self.responses.items()}
    return json.dumps(self._asdict() | {'responses': responses})

  @classmethod
  def of_text(cls, text: str) -> 'Drawn':
    """Undoes `to_text`."""
    found = json.loads(text)
    read: dict[str, list[multi_turn.Response]] = {
        name: list(map(experience.of_json, each)) for name, each in found['responses'].items()
    }
    return cls(found['chosen'], read, found['version'])


def annotate_fn(options: rollouts.Options, models: rollouts.Models):
  """Builds what makes `Options.annotations`: (`rollouts.Params`, a step's batch) -> `[A, B, T]` by name."""
  read = models.making(options.annotations)
  return lambda params, batch: forward.annotations(
      params.policy,
      params.critic,
      params.ref,
      batch,
      model=read.policy,
      critic_model=read.critic,
      ref_model=read.ref,
      temperature=options.temperature,
  )


class Maker:
  """Makes the rollouts of a run."""

  def __init__(
      self,
      options: rollouts.Options,
      prompts: dataset_lib.Joined,
      records: Sequence[sources.Source],
      *,
      weights: Sequence[float],
      packing: loader_lib.Packing,
      models: rollouts.Models,
      tokenizer: tokenizers.Tokenizer,
      mesh: jax.sharding.Mesh,
      seed: int,
      between: Callable[[], None] | None = None,
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
      between: see `sampling.sample`.
    """
    self._options, self._prompts, self._weights, self._between = options, prompts, list(weights), between
    self._packing, self._models, self._tokenizer, self._mesh, self._seed = packing, models, tokenizer, mesh, seed
    self._asked = functools.partial(verdicts.of_record, prompts, records)
    self._stop_ids = functools.cache(lambda is_chat: prompts_lib.stop_ids(tokenizer, is_chat, options.template))
    self._judge = judging.Judge(options.rewards, options.combine, tokenizer, options.world)
    outputs = max(1, (models.critic or models.policy).config.score_outputs)
    # Of one response of one token, shapes do not tell.
    self._of_responses, _ = options.credit.names(options.samples, self._judge.weights_R.size, outputs)
    self._wanted, self._replays = options.annotations, options.replays(models.policy)
    self._run = jax.jit(annotate_fn(options, models), out_shardings=sharding.named(mesh))
    self._seconds: dict[str, float] = {}  # of the rollout in the making, by what they were spent on

  def make(self, panel: panels.Panel, iteration: int, params: rollouts.Params, begin: Begin) -> experience.Rollout:
    """The rollout of this number: samples, scores, replaces what tells nothing, and gives credit.

    Args:
      panel: the rewards.
      iteration: its number.
      params: of the policy, and of what else reads the responses.
      begin: what judges them.
    """
    drawn = self.draw(iteration, params)
    judged = begin(lambda: self.judge(panel, drawn))
    if not self._options.refill:
      return self.finish(drawn, judged, params)
    own = judged()[OWN]
    said = {'rollouts/refilled': float(self._refilled(panel, iteration, params, drawn.chosen, own))}
    rollout = self.finish(drawn._replace(responses={OWN: own.drawn}), lambda: {OWN: own}, params)
    return dataclasses.replace(rollout, said={**rollout.said, **said})

  def _refilled(self, panel, iteration: int, params: rollouts.Params, chosen: list[int], own: judging.Judged) -> int:
    """Puts other prompts in place of those whose responses are all alike; how many."""
    refilled, samples = 0, self._options.samples
    for turn in range(1, self._options.refill + 1):
      dull = np.flatnonzero(self._judge.dull(own, samples))
      if not dull.size:
        break
      others = self._prompts_of(iteration, turn)  # As many at every turn, so that no other program is compiled.
      start, name = time.perf_counter(), (iteration, turn)
      new_ones = self._sampled(others, params.policy, self._models.policy, name, samples)
      start = self._spent('sampling', start)
      fresh = self._judge(panel, self._all_asked(others), new_ones)
      self._spent('judging', start)
      good = [i for i in np.flatnonzero(~self._judge.dull(fresh, samples)) if others[i] not in chosen]
      refilled += min(len(dull), len(good))
      for old, new in zip(dull, good):
        chosen[old] = others[new]
        own.replace(int(old), fresh, int(new), samples)
    return refilled

  def draw(self, iteration: int, params: rollouts.Params) -> Drawn:
    """Samples all that a rollout wants: responses of the policy, and others to the same prompts."""
    start = time.perf_counter()
    options, chosen = self._options, self._prompts_of(iteration, 0)
    policy = self._models.policy, params.policy
    wanted: dict[str, tuple[Any, ...]] = {OWN: (*policy, options.samples, (iteration,), None)}
    if 'greedy_G' in options.credit.reads:
      wanted['greedy_G'] = (*policy, 1, (iteration, 'greedy'), 0.0)
    if 'ref_rewards_GN' in options.credit.reads:
      wanted['ref_rewards_GN'] = self._models.ref, params.ref, options.ref_samples, (iteration, 'reference'), None
    responses = {
        name: self._sampled(chosen, of, model, seed, count, temperature)
        for name, (model, of, count, seed, temperature) in wanted.items()
    }
    self._spent('sampling', start)
    return Drawn(chosen, responses, params.version)

  def judge(self, panel: panels.Panel, drawn: Drawn) -> Verdicts:
    """What rewards make of them, by the same names."""
    start, asked = time.perf_counter(), self._all_asked(drawn.chosen)
    found = {name: self._judge(panel, asked, responses) for name, responses in drawn.responses.items()}
    self._spent('judging', start)
    return found

  def finish(self, drawn: Drawn, judged: Callable[[], Verdicts], params: rollouts.Params) -> experience.Rollout:
    """What the responses are trained on.

    Args:
      drawn: the responses.
      judged: waits for what rewards make of them; models read the responses before.
      params: those that training on them begins with.
    """
    start, rollout, options = time.perf_counter(), self._unjudged(drawn), self._options
    annotations = self._annotations(rollout, params) if self._wanted else {}
    self._spent('annotation', start)
    found = judged()
    start, own = time.perf_counter(), found[OWN]
    total = self._judge.known(own, self._prompts.where(drawn.chosen[0]))
    if 'token_rewards_BT' in options.credit.reads and not own.tells_R.any():
      problem = 'reads rewards of tokens, and no --reward says anything of the tokens that were sampled'
      raise types.UsageError(f'rollouts.Options.advantage_fn {problem}; give a run of dpo or prm with its tokenizer')
    rollout = dataclasses.replace(rollout, rewards_GK=total.reshape(-1, options.samples))
    fields = self._fields(rollout, own) | annotations | {'loss_state': params.loss_state}
    for name, others in found.items():
      rewards_N = self._judge.total(others.values_RN).astype(np.float32)
      if name != OWN:
        fields[name] = rewards_N if name == 'greedy_G' else rewards_N.reshape(len(drawn.chosen), -1)
    made = options.credit.labels(fields)
    if options.updates > 1:
      made['old_logps'] = fields['logps_BT']
    self._spent('credit', start)
    spent, self._seconds = self._seconds, {}
    stale = {'rollouts/staleness': float(params.version - drawn.version)} if options.asynchronous else {}
    said = self._judge.said(own) | stale | spent
    return self._labelled(dataclasses.replace(rollout, said=said), made)

  def _unjudged(self, drawn: Drawn) -> experience.Rollout:
    """The responses as a rollout of which rewards have said nothing."""
    own, options = drawn.responses[OWN], self._options
    return experience.Rollout(
        [self._asked(i).ids for i in drawn.chosen],
        [one.ids for one in own],
        [one.logps for one in own],
        [one.finished for one in own],
        np.full((len(drawn.chosen), options.samples), np.nan),
        {},
        {},
        [one.finished or not options.mask_truncated for one in own],
        {},
        [multi_turn.sampled_of(one) for one in own] if options.world is not None else None,
        drawn.version,
        [one.experts for one in own] if self._replays else None,
    )

  def _spent(self, what: str, start: float) -> float:
    """Counts what this took since then; returns now. What is done side by side counts for each."""
    now, name = time.perf_counter(), f'time/{what}'
    self._seconds[name] = self._seconds.get(name, 0.0) + now - start
    return now

  def _fields(self, rollout: experience.Rollout, judged: judging.Judged) -> dict[str, Any]:
    """What `credit` may read of responses without a model."""
    samples, lengths = self._options.samples, [len(logps) for logps in rollout.sampler_logps]
    known = lambda x: np.nan_to_num(x).astype(np.float32)
    token_rewards_BT = credit_lib.table(judged.tokens, self._options.most_sampled)
    rows = credit_lib.rows(lengths, samples, self._options.most_sampled)
    outcomes_GK = self._judge.outcomes(judged).reshape(-1, samples)
    judged_GK = ~np.isnan(rollout.rewards_GK)
    if 'outcomes_GK' in self._options.credit.reads:  # Of a verifier that abstains, though rewards of tokens never do.
      judged_GK &= ~np.isnan(outcomes_GK)
    return {
        'rewards_GK': known(rollout.rewards_GK),
        'valid_GK': judged_GK.astype(np.float32),
        'rewards_RGK': known(judged.values_RN).reshape(len(judged.values_RN), -1, samples),
        'valid_RGK': (~np.isnan(judged.values_RN)).astype(np.float32).reshape(len(judged.values_RN), -1, samples),
        'weights_R': self._judge.weights_R,
        'outcomes_GK': known(outcomes_GK),
        'token_rewards_BT': known(token_rewards_BT),
        'token_marks_BT': (~np.isnan(token_rewards_BT)) * rows.mask_BT,
        'tokens_GK': np.array(lengths, np.float32).reshape(-1, samples),
        'sampler_logps_BT': credit_lib.table(rollout.sampler_logps, self._options.most_sampled),
        'finished_GK': np.array(rollout.finished, np.float32).reshape(-1, samples),
        'rows': rows,
    }

  def _annotations(self, rollout: experience.Rollout, params: rollouts.Params) -> dict[str, np.ndarray]:
    """What the training program makes of the responses."""
    all_counted = dataclasses.replace(rollout, counted=[True] * len(rollout.responses))
    each: list[dict[str, np.ndarray]] = [{} for _ in rollout.responses]
    for group, slot, found in experience.annotated(params, all_counted.groups(), self._run, self._packing, self._mesh):
      each[group * self._options.samples + slot] = found
    tables = {name: credit_lib.table([one[name] for one in each], self._options.most_sampled) for name in each[0]}
    named = {'logps_BT': tables['logps']}
    if values := [tables[f'values_{i}'] for i in range(sum(name.startswith('values_') for name in tables))]:
      named |= {'values_BT': values[0], 'values_BTO': np.stack(values, axis=-1)}
    if 'critic_logps' in tables:
      named['critic_ratio_BT'] = tables['critic_logps'] - tables['ref_logps']
    if 'ref_logps' in tables:
      named['log_ratio_BT'] = tables['logps'] - tables['ref_logps']
    return named

  def _labelled(self, rollout: experience.Rollout, made: dict[str, np.ndarray]) -> experience.Rollout:
    """The rollout with labels of responses and of tokens."""
    of_responses, of_tokens, most = {}, {}, self._options.most_sampled
    for name, x in made.items():
      if name in self._of_responses:
        of_responses[name] = x
      else:
        rows_BT = np.repeat(x.reshape(-1, 1), most, axis=1) if x.shape == rollout.rewards_GK.shape else x
        of_tokens[name] = [rows_BT[n, : len(logps)] for n, logps in enumerate(rollout.sampler_logps)]
    return dataclasses.replace(rollout, labels=of_responses, token_labels=of_tokens)

  def _prompts_of(self, iteration: int, turn: int) -> list[int]:
    """Which prompts a rollout takes: the next ones of epochs that follow one another; others at each further turn."""
    count, sizes = self._options.prompts, self._prompts.sizes
    return packing_lib.in_turn(sizes, self._weights, self._seed + turn, iteration * count, count)

  def _all_asked(self, chosen: Sequence[int]) -> list[verdicts.Prompt]:
    return list(map(self._asked, chosen))

  def _sampled(
      self, chosen: Sequence[int], params, model, name, count: int, temperature: float | None = None
  ) -> list[multi_turn.Response]:
    """`count` responses to each of these prompts; `name` makes the random numbers its own."""
    options, asked = self._options, self._all_asked(chosen)
    stop_ids = self._stop_ids(verdicts.are_chats(asked))

    # Of what is trained on, and no more.
    replays = self._replays and model is self._models.policy and temperature is None

    def draw(prompts: list[list[int]], n: int, turn: int, experts) -> list[sampling.Sampled]:
      return sampling.sample(
          model,
          params,
          prompts,
          n=n,
          max_new_tokens=options.max_new_tokens,
          temperature=options.temperature if temperature is None else temperature,
          told_at=options.temperature,  # as in the training program, which they are compared with
          keep_experts=replays,
          experts=experts if replays else None,
          rules=options.sampling_rules if model is self._models.policy else None,
          **options.ways(self._tokenizer),
          seed=_seed(self._seed, (*name, 'turn', turn) if turn else name),
          stop_ids=stop_ids,
          between=self._between,
      )

    return list(multi_turn.respond(options.world, asked, count, self._tokenizer, draw))


def _seed(seed: int, name: tuple[int | str, ...]) -> int:
  """A seed for each thing that is sampled: an iteration, or an iteration and what is sampled beside its rollout."""
  parts = seed % 2**32, *name  # a seed may be negative
  numbers = [int.from_bytes(part.encode()[:4], 'little') if isinstance(part, str) else part for part in parts]
  return int(np.random.SeedSequence(numbers).generate_state(1)[0])
