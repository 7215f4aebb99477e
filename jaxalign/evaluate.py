"""Evaluation: sums over held-out data, samples from fixed prompts, and the mode that does both from a checkpoint."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any
from typing import NamedTuple
from typing import TypeVar

import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import episodes
from jaxalign import forward
from jaxalign import masked
from jaxalign import metrics
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import sampling
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import streams as streams_lib
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import loader
from jaxalign.data import tokenizers
from jaxalign.models import lora
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import rules

_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Samples:
  """Which prompts are sampled before and after training, and who judges the responses.

  Attributes:
    prompts: returns texts; None takes prompts of the held-out data, the first that leave room for a response in the
      model's context.
    count: number of prompts.
    per_prompt: responses to each.
    max_new_tokens: length at which a response is cut.
    temperature: of sampling, 0 is greedy.
    judge: a reward, see `functions.Reward`, called with prompts and responses (texts) and ids; None judges nothing.
    shown: prompts that are written to samples.md.
    prefix: what asks for a good response where training wrote tags before prompts: it is put before each of `prompts`,
      and of held-out data those are taken that begin with it.
    suffix: the same behind each prompt.
  """

  prompts: Callable[[], Sequence[str]] | None = None
  count: int = 8
  per_prompt: int = 1
  max_new_tokens: int = 64
  temperature: float = 1.0
  judge: Callable[..., Sequence[float | None]] | None = None
  shown: int = 8
  prefix: str = ''
  suffix: str = ''


class Sampled(NamedTuple):
  """Metrics of the responses, and the first of them as (prompt, response)."""

  metrics: dict[str, float]
  shown: list[tuple[str, str]]


def held_out(
    eval_step: Callable[[types.PyTree, types.Batch], Mapping[str, masked.Sum]],
    params: types.PyTree,
    batches: Iterable[types.Batch],
) -> dict[str, float]:
  """Means over held-out batches of every metric of the objective, from sums: memory does not grow with the data.

  Returns:
    'eval/NAME' for each metric, `eval/n` (groups, or target tokens), and for accuracies their binomial standard error.
  """
  host: dict[str, Any] = {}
  for sums in _one_behind(eval_step(params, batch) for batch in batches):
    for name, pair in jax.device_get(sums).items():
      # In double precision: weights are counts, which float32 rounds from 2^24 on.
      new = jax.tree.map(np.float64, pair)
      host[name] = jax.tree.map(np.add, host[name], new) if name in host else new
  values = {f'eval/{name}': float(pair.mean()) for name, pair in host.items()}
  values['eval/n'] = float(host['loss'].weight)
  for name in ('rewards/accuracies', 'accuracy', 'length_only/accuracies'):
    if name in host:
      p = min(1.0, max(0.0, values[f'eval/{name}']))
      values[f'eval/{name}_stderr'] = math.sqrt(p * (1 - p) / max(host[name].weight, 1.0))
  return values


def _one_behind(items: Iterable[_T]) -> Iterator[_T]:
  """The same items, each when the next has been asked for, so that fetching one does not hold up the device."""
  waiting: list[_T] = []
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting


# (prompts, responses) -> the summed log-probability of each response under a reference, in nats
RefLogps = Callable[[list[list[int]], list[list[int]]], np.ndarray]


def sample(
    model,
    params: types.PyTree,
    tokenizer: tokenizers.Tokenizer,
    samples: Samples,
    prompts: list[list[int]],
    seed: int,
    ref_logps: RefLogps | None = None,
) -> Sampled:
  """Samples `per_prompt` responses to each prompt and judges them.

  Returns:
    metrics: `reward` and `reward_std` where there is a judge that does not abstain throughout, `distinct_2` (distinct
    token pairs over all pairs, low where a model repeats itself), `mean_length` in tokens; with `ref_logps` and
    temperature 1 `kl`, the mean over the responses of log policy - log reference in nats, which estimates
    KL(policy || reference), with its standard error; and the first response to the first `shown` prompts.
  """
  repeated = [ids for ids in prompts for _ in range(samples.per_prompt)]
  drawn = sampling.sample(
      model,
      params,
      prompts,
      n=samples.per_prompt,
      max_new_tokens=samples.max_new_tokens,
      temperature=samples.temperature,
      seed=seed,
      stop_ids=(tokenizer.eos_id,),
  )
  texts = [tokenizer.decode(one.ids, continuation=True) for one in drawn]
  values = {
      'distinct_2': rules.distinct(2, [one.ids for one in drawn]),
      'mean_length': float(np.mean([len(one.ids) for one in drawn])),
  }
  if samples.judge is not None:
    rewards = _judged(samples.judge, [tokenizer.decode(one) for one in repeated], texts, [one.ids for one in drawn])
    if rewards.size:
      values |= {'reward': float(rewards.mean()), 'reward_std': float(rewards.std())}
  if ref_logps is not None and samples.temperature == 1:
    own = np.array([np.sum(one.logps, dtype=np.float64) for one in drawn])
    gaps = own - ref_logps(repeated, [one.ids for one in drawn])
    values |= {'kl': float(gaps.mean()), 'kl_stderr': float(gaps.std() / math.sqrt(len(gaps)))}
  firsts = range(0, len(repeated), samples.per_prompt)
  shown = [(tokenizer.decode(repeated[i]), texts[i]) for i in firsts][: samples.shown]
  return Sampled(values, shown)


def _judged(judge: Callable, prompts: list[str], texts: list[str], ids: list[list[int]]) -> np.ndarray:
  """What the judge makes of those responses on which it does not abstain."""
  reward = functions.Reward('evaluate.Samples.judge', judge)
  where = [f'sample {i}' for i in range(len(texts))]
  with functions.Panel([reward], together=True) as panel:
    (judged,) = panel(functions.Responses(prompts, texts, {}, where, ids)).values()
  return judged.values[~np.isnan(judged.values)]


def prompt_ids(
    samples: Samples, tokenizer: tokenizers.Tokenizer, held: loader.Loader | None, context: int
) -> list[list[int]]:
  """Token ids of the prompts that are sampled, none where there is nothing to take them from.

  Args:
    samples: how many, and whence.
    tokenizer: turns texts into ids.
    held: the held-out data.
    context: tokens of the longest sequence that the model is meant for.
  """
  suffix = examples.to_ids(tokenizer, samples.suffix, continuation=True, special=False)
  if samples.prompts is not None:
    texts = list(samples.prompts())[: samples.count]
    return [examples.prompt_ids(tokenizer, samples.prefix + text) + suffix for text in texts]
  if held is None:
    return []
  found: list[list[int]] = []
  for index in range(len(held.dataset)):
    if len(found) == samples.count:
      break
    group = held.dataset[index]
    ids = group.sequences[0].ids[: max(1, group.prompt_tokens)].tolist()
    if len(ids + suffix) + samples.max_new_tokens <= context and tokenizer.decode(ids).startswith(samples.prefix):
      found.append(ids + suffix)
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
    objective = recipe_lib.bind(recipe, model, streams.needs, live and live.model)
    evaluate_step = counter.counted(step_lib.make_eval_step(objective))
    self._step = jax.jit(evaluate_step, out_shardings=sharding.named(job.mesh))
    self._ref = live and live.moving
    ref_model = live.model if live is not None else reference.model_of(model)
    run = counter.counted(lambda params, batch: {'logps': forward.ref_logps(params, batch, model=ref_model)})
    self._live, self._ref_run = live, jax.jit(run, out_shardings=sharding.named(job.mesh))
    self._kept = kept
    self._packing, self._mesh = dataclasses.replace(recipe.packing, groups_per_step=None), job.mesh
    self._model, self._tokenizer, self._streams, self._seed = model, tokenizer, streams, job.seed
    self._samples, self._frozen = samples, frozen
    self._prompts = prompt_ids(samples, tokenizer, streams.held, model.config.max_length) if samples is not None else []

  def held_out(self, params: types.PyTree, loss_state: types.PyTree, ref: types.PyTree = ()) -> dict[str, float]:
    """Metrics of the held-out data, none where there is no such data; `ref` is of a reference that follows."""
    if self._streams.held is None:
      return {}
    ref = ref if jax.tree.leaves(ref) else self._ref
    run = lambda params, batch: self._step(params, self._frozen, batch, loss_state, ref)
    return held_out(run, params, self._streams.held_batches())

  def _ref_logps(self, ref: types.PyTree) -> RefLogps | None:
    """Under the reference of the step, `ref` where it follows the policy, or else under what was kept."""
    if self._live is None and self._kept is None:
      return None
    own = self._kept().params if self._live is None and self._kept is not None else None
    params = lora.join(ref if jax.tree.leaves(ref) else self._ref, self._frozen) if own is None else own

    def summed(prompts, responses):
      sequences = (episodes.sequence(*pair, {}) for pair in zip(prompts, responses, strict=True))
      groups = episodes.Groups([examples.Group((one,), {}) for one in sequences])
      found = np.zeros(len(responses))
      for group, _, of in episodes.annotated(params, groups, self._ref_run, self._packing, self._mesh):
        found[group] = of['logps'].sum(dtype=np.float64)
      return found

    return summed

  def whole(
      self, params: types.PyTree, loss_state: types.PyTree, ref: types.PyTree = (), *, compared: bool = True
  ) -> Whole:
    """Held-out metrics and samples, with their divergence from a reference where they are `compared` with it."""
    sampled = Sampled({}, [])
    if self._samples is not None and self._prompts:
      whole = lora.join(forward.divided(params)[0], self._frozen)
      judge = self._ref_logps(ref) if compared else None
      sampled = sample(self._model, whole, self._tokenizer, self._samples, self._prompts, self._seed, judge)
    return Whole(self.held_out(params, loss_state, ref), sampled)


def evaluate(
    job: recipe_lib.Job, directory: str, *, recipe: recipe_lib.Recipe, samples: Samples | None
) -> dict[str, float]:
  """Evaluates a checkpoint on `--eval_data` (by default that of its run), with its own reference, on any mesh.

  Of a run that trained on what it sampled, prompts alone are held out (`samples`).

  Returns:
    Metrics by name, as in summary.json.

  Raises:
    UsageError: there are no held-out data.
  """
  if not job.eval_data and recipe.rollouts is None:
    raise types.UsageError('--mode=eval: the run of this checkpoint held nothing out; give --eval_data')
  counter = metrics.Compilations()
  with jax.set_mesh(job.mesh):
    loaded = checkpoint.load(directory, job.mesh)
    streams: streams_lib.Streams | streams_lib.Online
    if recipe.rollouts is not None:
      streams = streams_lib.open_prompts(job, recipe, loaded.tokenizer, loaded.model, train=False)
    else:
      streams = streams_lib.open_streams(job, recipe, loaded.tokenizer, train=False)
    known = streams.reference or recipe.rollouts is not None
    ref = checkpoint.load_reference(directory, loaded, job.mesh) if known else None
    if ref is not None and isinstance(streams, streams_lib.Streams) and streams.cached:
      streams = streams_lib.with_reference(streams, job, recipe, ref, steps=0, counter=counter)
    loss_state = checkpoint.load_loss_state(directory, streams.needs.state, job.mesh)
    live = ref.alone() if ref is not None and (streams.live or recipe.rollouts is not None) else None
    evaluator = Evaluator(job, recipe, loaded.model, loaded.tokenizer, streams, samples, counter, {}, live)
    found = evaluator.whole(loaded.params, loss_state)
  return found.held_out | {f'eval/{name}': value for name, value in found.sampled.metrics.items()}


def write_samples(path: pathlib.Path, before: Sampled, after: Sampled) -> None:
  """Writes samples.md: the same prompts before and after training."""
  lines = ['# Samples before and after training', '']
  for (prompt, old), (_, new) in zip(before.shown, after.shown):
    lines += [f'## {" ".join(prompt.split())}', '', '**before:** ' + old.strip(), '', '**after:** ' + new.strip(), '']
  metrics.write_text(path, '\n'.join(lines))
