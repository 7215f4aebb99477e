"""Evaluation: sums over held-out data, samples from fixed prompts, and the mode that does both from a checkpoint."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
from types import MappingProxyType
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import forward
from jaxalign import held_out
from jaxalign import metrics
from jaxalign import needs as needs_lib
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import streams as streams_lib
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import examples
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.generation import next_token
from jaxalign.generation import sampling
from jaxalign.models import lora
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import rules
from jaxalign.rewards import verdicts
from jaxalign.rl import experience
from jaxalign.rl import multi_turn
from jaxalign.rl import rollouts


@dataclasses.dataclass(frozen=True)
class Samples:
  """Which prompts are sampled before and after training, and who judges the responses.

  Attributes:
    prompts: returns texts; None takes prompts of the held-out data, the first that leave room for a response in the
      model's context.
    count: number of prompts.
    per_prompt: responses to each.
    max_new_tokens: length at which a response is cut; None for that of rollouts, or 64 where there are none.
    temperature: of sampling, 0 is greedy.
    judge: a reward, see `functions.Reward`, called with prompts and responses (texts), ids, and the columns of held-out
      records; None takes the rewards of a run that trains on what it samples, and judges nothing in others.
    pass_at: each k of `verdicts.pass_at` that is wanted, up to `per_prompt`.
    shown: prompts that are written to samples.md.
    prefix: what asks for a good response where training wrote tags before prompts: it is put before each of `prompts`,
      and of held-out data those are taken that begin with it.
    suffix: the same behind each prompt.
  """

  prompts: Callable[[], Sequence[str]] | None = None
  count: int = 8
  per_prompt: int = 1
  max_new_tokens: int | None = None
  temperature: float = 1.0
  judge: Callable[..., Sequence[float | None]] | None = None
  pass_at: tuple[int, ...] = ()
  shown: int = 8
  prefix: str = ''
  suffix: str = ''

  def __post_init__(self):
    for name, least in (('count', 0), ('per_prompt', 1), ('max_new_tokens', 1)):
      if getattr(self, name) is not None and getattr(self, name) < least:
        raise types.UsageError(f'evaluate.Samples.{name} = {getattr(self, name)}: it must be at least {least}')
    for k in self.pass_at:
      if not 1 <= k <= self.per_prompt:
        wanted = f'{k} is not from 1 to evaluate.Samples.per_prompt = {self.per_prompt}'
        raise types.UsageError(f'evaluate.Samples.pass_at = {self.pass_at}: {wanted}')


class Sampled(NamedTuple):
  """Metrics of the responses, and the first of them as (prompt, response)."""

  metrics: dict[str, float]
  shown: list[tuple[str, str]]


class Setting(NamedTuple):
  """Who judges responses, and what answers them, in a run.

  Attributes:
    rewards: who judges.
    how: several are combined, see `functions.combine`.
    world: what answers the policy, for as many turns as it has.
    scorers: loads the models among the rewards, by name.
    template: of messages, see `chat.pick`, whose end of a turn ends a response.
    ways: how tokens are drawn beside length and temperature, see `rollouts.Options.ways`.
    replays: whether the reference takes the experts that the policy took, see `rollouts.Options.replay_experts`.
  """

  rewards: Sequence[functions.Reward | modelled.Model] = ()
  how: str = 'sum'
  world: multi_turn.Environment | None = None
  scorers: Callable[[], Mapping[str, functions.Scorer]] = dict
  template: str | None = None
  ways: Mapping[str, Any] = MappingProxyType({})
  replays: bool = False


# (prompts, responses) -> the summed log-probability of each response under a reference, in nats
RefLogps = Callable[[list[list[int]], Sequence[multi_turn.Response]], np.ndarray]


def sample(
    model,
    params: types.PyTree,
    tokenizer: tokenizers.Tokenizer,
    samples: Samples,
    prompts: Sequence[verdicts.Prompt],
    seed: int,
    setting: Setting,
    ref_logps: RefLogps | None = None,
) -> Sampled:
  """Samples `per_prompt` responses to each prompt and judges them.

  Args:
    model: of the policy.
    params: its parameters.
    tokenizer: of the model.
    samples: how many, how long (which is set); its judge is not read.
    prompts: what is responded to.
    seed: of sampling.
    setting: who judges.
    ref_logps: for the divergence from a reference.

  Returns:
    metrics: `reward`, `reward_std` and `pass@K` where rewards do not abstain throughout, `distinct_2` (distinct token
      pairs over all pairs, low where a model repeats itself), `mean_length` in tokens; with `ref_logps`, temperature 1
      and no token ruled out `kl`, the mean over the responses of log policy - log reference in nats, which estimates
      KL(policy || reference), with its standard error; and the first response to the first `shown` prompts.
  """
  stop_ids = prompts_lib.stop_ids(tokenizer, verdicts.are_chats(prompts), setting.template)
  how: dict[str, Any] = {'max_new_tokens': samples.max_new_tokens, 'temperature': samples.temperature}
  how |= {'stop_ids': stop_ids, 'keep_experts': setting.replays, **setting.ways}
  draw = lambda behind, n, turn, experts: sampling.sample(
      model, params, behind, n=n, seed=seed + turn, experts=experts, **how
  )
  drawn = multi_turn.respond(setting.world, prompts, samples.per_prompt, tokenizer, draw)
  ids = [experience.own(one.ids, multi_turn.sampled_of(one)) for one in drawn]
  values = {'distinct_2': rules.distinct(2, ids), 'mean_length': float(np.mean([len(one.logps) for one in drawn]))}
  responses, given = verdicts.responses(prompts, tokenizer, drawn), multi_turn.rewards_of(drawn)
  judged = setting.rewards, setting.how, samples.pass_at, responses, len(prompts), given, setting.scorers()
  values |= verdicts.measured(*judged)
  rule = next_token.Rule(samples.temperature, **{k: x for k, x in setting.ways.items() if k in next_token.Rule._fields})
  if ref_logps is not None and rule == next_token.Rule():
    own = np.array([np.sum(one.logps, dtype=np.float64) for one in drawn])
    gaps = own - ref_logps([one.ids for one in prompts for _ in range(samples.per_prompt)], drawn)
    values |= {'kl': float(gaps.mean()), 'kl_stderr': float(gaps.std() / math.sqrt(len(gaps)))}
  shown = zip([tokenizer.decode(one.ids) for one in prompts], responses.responses[:: samples.per_prompt])
  return Sampled(values, list(shown)[: samples.shown])


def prompts_of(
    samples: Samples,
    tokenizer: tokenizers.Tokenizer,
    groups: dataset_lib.Joined | None,
    records: Sequence[sources.Source],
    room: int,
) -> list[verdicts.Prompt]:
  """The prompts that are sampled, none where there is nothing to take them from.

  Args:
    samples: how many, and whence.
    tokenizer: turns texts into ids.
    groups: the held-out data, tokenised.
    records: the sources of which they were made.
    room: tokens of the longest prompt.
  """
  suffix = examples.to_ids(tokenizer, samples.suffix, continuation=True, special=False)
  if samples.prompts is not None:
    texts = list(samples.prompts())[: samples.count]
    ids = [examples.prompt_ids(tokenizer, samples.prefix + text) + suffix for text in texts]
    return [verdicts.Prompt(one, {}, f'evaluate.Samples.prompts[{number}]') for number, one in enumerate(ids)]
  found: list[verdicts.Prompt] = []
  if groups is None:
    return found
  for index in range(len(groups)):
    if len(found) == samples.count:
      break
    one = verdicts.of_record(groups, records, index)
    if len(one.ids + suffix) <= room and tokenizer.decode(one.ids).startswith(samples.prefix):
      found.append(one._replace(ids=one.ids + suffix))
  return found


def builtin_prompts() -> list[str]:
  """The package's 64 fixed story openings."""
  return recipe_lib.asset('prompts.txt').read_text(encoding='utf-8').splitlines()


@dataclasses.dataclass(frozen=True)
class Whole:
  """One evaluation of everything: held-out metrics, and samples with theirs."""

  held_out: dict[str, float]
  sampled: Sampled

  def to_json(self) -> dict[str, Any]:
    """What `from_json` takes."""
    return {'held_out': self.held_out, 'metrics': self.sampled.metrics, 'shown': self.sampled.shown}

  def metrics(self) -> dict[str, float]:
    """All of them, as in summary.json."""
    return self.held_out | {f'eval/{name}': value for name, value in self.sampled.metrics.items()}

  @classmethod
  def from_json(cls, found: Mapping[str, Any]) -> 'Whole':
    """Undoes `to_json`."""
    shown = [(prompt, response) for prompt, response in found['shown']]
    return cls(dict(found['held_out']), Sampled(dict(found['metrics']), shown))


class Evaluator:
  """Evaluates parameters on a run's held-out data and prompts, with everything compiled once."""

  def __init__(
      self,
      job: recipe_lib.Job,
      recipe: recipe_lib.Recipe,
      model: transformer.Transformer,
      tokenizer: tokenizers.Tokenizer,
      streams: streams_lib.Streams | streams_lib.Online,
      samples: Samples | None,
      counter: metrics.Compilations,
      frozen: types.PyTree,
      live: reference.Reference | None,
      kept: Callable[[], reference.Reference] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      job: names prompts' seed and mesh.
      recipe: the algorithm.
      model: of the policy.
      tokenizer: of the model.
      streams: held-out data.
      samples: what is sampled, None for nothing.
      counter: counts compilations.
      frozen: parameters that are not trained.
      live: a reference that the loss or advantages read as it is.
      kept: reads what the run began with, where no reference is live, to say how far the policy has moved.
    """
    model = transformer.without_dropout(model)
    objective = needs_lib.bind(recipe, model, streams.needs, live and live.model)
    evaluate_step = counter.counted(step_lib.make_eval_step(objective))
    self._step = jax.jit(evaluate_step, out_shardings=sharding.named(job.mesh))
    ref_model = live.model if live is not None else reference.model_of(model)
    run = counter.counted(lambda params, batch: {'logps': forward.ref_logps(params, batch, model=ref_model)})
    self._ref_run = jax.jit(run, out_shardings=sharding.named(job.mesh))
    self._live, self._kept, self._follows, self._ref = live, kept, recipe.sync is not None, live and live.moving
    self._packing, self._mesh = dataclasses.replace(recipe.packing, groups_per_step=None), job.mesh
    self._model, self._tokenizer, self._streams, self._seed = model, tokenizer, streams, job.seed
    self._samples, self._frozen, self._prompts, self._setting = samples, frozen, list[verdicts.Prompt](), Setting()
    if samples is not None:
      specs = sources.parse_all(job.eval_data) if streams.asked is not None else []
      records = [sources.open_source(spec, job.data_dir) for spec in specs]
      own = samples.judge and [functions.Reward('evaluate.Samples.judge', samples.judge)]
      most, self._setting = samples.max_new_tokens or 64, Setting(own or (), replays=rollouts.replays(None, model))
      if (its := recipe.rollouts) is not None:
        most, ways = samples.max_new_tokens or its.max_new_tokens, its.ways(tokenizer)
        judges: Sequence[functions.Reward | modelled.Model] = own or [functions.parse(spec) for spec in its.rewards]
        self._setting = Setting(judges, its.combine, its.world, streams.scorers, its.template, ways, its.replays(model))
      longest = most if self._setting.world is None else self._setting.world.longest(most)
      self._samples = dataclasses.replace(samples, max_new_tokens=most)
      self._prompts = prompts_of(samples, tokenizer, streams.asked, records, model.config.max_length - longest)

  def held_out(self, params: types.PyTree, loss_state: types.PyTree, ref: types.PyTree = ()) -> dict[str, float]:
    """Metrics of the held-out data, none where there is no such data; `ref` is of a reference that follows."""
    if self._streams.held is None:
      return {}
    ref = ref if jax.tree.leaves(ref) else self._ref
    run = lambda params, batch: self._step(params, self._frozen, batch, loss_state, ref)
    return held_out.means(run, params, self._streams.held_batches())

  def _ref_logps(self, ref: types.PyTree) -> RefLogps | None:
    """Under the reference of the step, or what was kept where there is none, or one that follows the policy."""
    if self._live is None and self._kept is None:
      return None
    own = self._kept().params if self._kept is not None and (self._live is None or self._follows) else None
    params = lora.join(ref if jax.tree.leaves(ref) else self._ref, self._frozen) if own is None else own
    return functools.partial(self._summed, params)

  def _summed(self, params: types.PyTree, prompts, responses) -> np.ndarray:
    pairs = zip(prompts, responses, strict=True)
    more = lambda one: {'sampled': multi_turn.sampled_of(one), 'experts': one.experts}
    read = [experience.sequence(prompt, one.ids, {}, **more(one)) for prompt, one in pairs]
    return experience.summed(params, read, self._ref_run, self._packing, self._mesh)

  def whole(
      self, params: types.PyTree, loss_state: types.PyTree, ref: types.PyTree = (), *, compared: bool = True
  ) -> Whole:
    """Held-out metrics and samples, with their divergence from a reference where they are `compared` with it."""
    sampled = Sampled({}, [])
    if self._samples is not None and self._prompts:
      args = self._samples, self._prompts, self._seed, self._setting, self._ref_logps(ref) if compared else None
      whole = lora.join(forward.divided(params)[0], self._frozen)
      sampled = sample(self._model, whole, self._tokenizer, *args)
    return Whole(self.held_out(params, loss_state, ref), sampled)


def evaluate(
    job: recipe_lib.Job, directory: str, *, recipe: recipe_lib.Recipe, samples: Samples | None
) -> dict[str, float]:
  """Evaluates a checkpoint on `--eval_data` (by default that of its run), with its own reference, on any mesh.

  Of a run that trained on what it sampled, prompts alone are held out (`samples`), judged by its rewards.

  Returns:
    Metrics by name, as in summary.json.

  Raises:
    UsageError: there are no held-out data.
  """
  if not job.eval_data and (recipe.rollouts is None or samples is None or samples.prompts is None):
    raise types.UsageError('--mode=eval: the run of this checkpoint held nothing out; give --eval_data')
  counter = metrics.Compilations()
  with jax.set_mesh(job.mesh):
    loaded = recipe_lib.reopened(directory, recipe, job.mesh)
    streams: streams_lib.Streams | streams_lib.Online
    if recipe.rollouts is not None:
      scored = samples is not None and samples.judge is None
      streams = streams_lib.open_prompts(job, recipe, loaded.tokenizer, loaded.model, train=False, scored=scored)
    else:
      streams = streams_lib.open_streams(job, recipe, loaded.tokenizer, train=False)
    ref = checkpoint.load_reference(directory, loaded) if streams.reference or recipe.rollouts is not None else None
    if ref is not None and isinstance(streams, streams_lib.Streams) and streams.cached:
      streams = streams_lib.with_reference(streams, job, recipe, ref, steps=0, counter=counter)
    loss_state = checkpoint.load_loss_state(directory, streams.needs.state, job.mesh)
    plain = recipe.sync is not None and recipe.rollouts is not None and loaded.model.lora is None
    load = functools.partial(checkpoint.load_base, checkpoint.find(directory)[0], loaded.model, job.mesh)
    kept = load if plain else None
    own = recipe_lib.reference_of(recipe, job.mesh, loaded.model)
    live = ref.alone(own) if ref is not None and (streams.live or recipe.rollouts is not None) else None
    evaluator = Evaluator(job, recipe, loaded.model, loaded.tokenizer, streams, samples, counter, {}, live, kept)
    return evaluator.whole(loaded.params, loss_state).metrics()
