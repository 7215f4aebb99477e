"""What was sampled: responses to prompts with their rewards, as data of the step, and as text to be read again."""

import base64
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import json
import math
from typing import Any

import jax
import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import loader as loader_lib
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.models import experts as experts_lib
from jaxalign.rewards import rules


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Responses to prompts, G prompts with K responses each, one behind the other.

  Attributes:
    prompts: ids of each prompt, G of them.
    responses: ids of each response, G K of them.
    sampler_logps: log-probability of each of these ids that was sampled, when it was, in nats.
    finished: whether each response ended by itself.
    rewards_GK: float64, NaN where every reward abstained.
    labels: of responses by name, float32 `[G, K]`, see `credit`.
    token_labels: of tokens that were sampled by name, float32, an array for each response.
    counted: whether each response is trained on.
    said: mean and deviation of each reward, by name.
    sampled: of each response which ids were; None where all of them were. The others are an environment's.
    version: optimizer steps of the policy that wrote them.
    experts: of each response, see `sampling.Sampled`; None where they are not replayed.
  """

  prompts: list[list[int]]
  responses: list[list[int]]
  sampler_logps: list[list[float]]
  finished: list[bool]
  rewards_GK: np.ndarray
  labels: Mapping[str, np.ndarray]
  token_labels: Mapping[str, list[np.ndarray]]
  counted: list[bool]
  said: Mapping[str, float] = dataclasses.field(default_factory=dict)
  sampled: list[list[bool]] | None = None
  version: int = 0
  experts: Sequence[Any] | None = None

  def to_text(self, tokenizer: tokenizers.Tokenizer) -> str:
    """A line of JSON for each response, in words and in what it takes to go on from there."""
    samples, lines = self.rewards_GK.shape[1], []
    for n, ids in enumerate(self.responses):
      prompt, reward = self.prompts[n // samples], float(self.rewards_GK.reshape(-1)[n])
      advantages = self.token_labels.get('advantages')
      line: dict[str, Any] = {
          'group': n // samples,
          'policy_version': self.version,
          'prompt': tokenizer.decode(prompt),
          'response': tokenizer.decode(ids, continuation=True),
          'reward': None if math.isnan(reward) else reward,
          'advantage': None if advantages is None else float(np.mean(advantages[n])),
          'finished': self.finished[n],
          'counted': self.counted[n],
          'prompt_ids': prompt,
          'ids': ids,
          'sampler_logps': self.sampler_logps[n],
          'labels': {name: float(x_GK.reshape(-1)[n]) for name, x_GK in self.labels.items()},
          'token_labels': {name: each[n].tolist() for name, each in self.token_labels.items()},
      }
      if self.sampled is not None:
        line['sampled'] = list(map(int, self.sampled[n]))
      if self.experts is not None:
        line['experts'] = experts_to_text(self.experts[n])
      if not n:
        line['said'] = dict(self.said)
      lines.append(json.dumps(line) + '\n')
    return ''.join(lines)

  def groups(self) -> 'Groups':
    """What is trained on."""
    samples, sequences = self.rewards_GK.shape[1], []
    for n, response in enumerate(self.responses):
      own = {name: each[n] for name, each in self.token_labels.items()}
      own['sampler_logps'] = np.array(self.sampler_logps[n], np.float32)
      sampled = None if self.sampled is None else self.sampled[n]
      experts = None if self.experts is None else self.experts[n]
      how: dict[str, Any] = {'counted': self.counted[n], 'sampled': sampled, 'experts': experts}
      sequences.append(sequence(self.prompts[n // samples], response, own, **how))
    groups = []
    for g in range(len(self.prompts)):
      labels = {name: x_GK[g].tolist() for name, x_GK in self.labels.items()}
      groups.append(examples.Group(tuple(sequences[g * samples : (g + 1) * samples]), labels))
    return Groups(groups)

  def metrics(self) -> dict[str, float]:
    """What it says of the policy that it was sampled from, by name."""
    lengths, rewards = [len(logps) for logps in self.sampler_logps], np.ma.masked_invalid(self.rewards_GK)
    ids = self.responses if self.sampled is None else list(map(own, self.responses, self.sampled))
    kl = {'objective/kl': float(self.labels['kl'].mean())} if 'kl' in self.labels else {}
    return {
        'reward': float(rewards.mean()),
        'reward_std': float(rewards.std()),
        'frac_reward_zero_std': float((rewards.max(axis=1) == rewards.min(axis=1)).mean()),
        **self.said,
        **kl,
        'completions/mean_length': float(np.mean(lengths)),
        'completions/max_length': float(max(lengths)),
        'completions/clipped_ratio': 1 - float(np.mean(self.finished)),
        'completions/distinct_2': rules.distinct(2, ids),
    }


def own(ids: Sequence[int], sampled: Sequence[bool]) -> list[int]:
  """The tokens of a response that were sampled."""
  return list(itertools.compress(ids, sampled))


def of_text(text: str, samples: int) -> Rollout:
  """Undoes `Rollout.to_text`, of which `samples` responses belong to each prompt."""
  lines = [json.loads(line) for line in text.splitlines()]
  of: Mapping[str, list[Any]] = {name: [line[name] for line in lines] for name in lines[-1]}
  table = lambda values, dtype: np.array(values, dtype).reshape(-1, samples)
  each = lambda name, which: [line[which][name] for line in lines]
  return Rollout(
      of['prompt_ids'][::samples],
      of['ids'],
      of['sampler_logps'],
      of['finished'],
      table([math.nan if reward is None else reward for reward in of['reward']], np.float64),
      {name: table(each(name, 'labels'), np.float32) for name in lines[0]['labels']},
      {name: [np.array(one, np.float32) for one in each(name, 'token_labels')] for name in lines[0]['token_labels']},
      of['counted'],
      lines[0].get('said', {}),
      sampled=[list(map(bool, one)) for one in of['sampled']] if 'sampled' in of else None,
      version=lines[0]['policy_version'],
      experts=list(map(experts_of_text, of['experts'])) if 'experts' in of else None,
  )


def to_json(one: Any) -> list[Any]:
  """A response of `sampling` as JSON has it."""
  return [*one[:4], None if one.experts is None else experts_to_text(one.experts)]


def of_json(told: list[Any]) -> sampling.Sampled:
  """Undoes `to_json`."""
  ids, logps, processed, reason, experts = told
  return sampling.Sampled(ids, logps, processed, reason, None if experts is None else experts_of_text(experts))


def experts_to_text(experts: np.ndarray) -> list[Any]:
  """An array of whole numbers as JSON has it: dtype, shape, and its bytes in base 64."""
  return [experts.dtype.name, experts.shape, base64.b64encode(experts.tobytes()).decode('ascii')]


def experts_of_text(found: list[Any]) -> np.ndarray:
  """Undoes `experts_to_text`."""
  dtype, shape, text = found
  return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


class Groups:
  """Groups of sampled responses, all with as many, as a `data.dataset.Dataset` has them, for `data.loader.Loader`."""

  def __init__(self, groups: Sequence[examples.Group]):
    self._groups = list(groups)
    self.label_names = tuple(self._groups[0].labels)
    self.group_size = max(len(group.sequences) for group in self._groups)
    self.token_label_names = tuple(self._groups[0].sequences[0].labels)
    named = self._groups[0].sequences[0].experts
    self.free = None if named is None else np.full(named.shape[1:], experts_lib.free(named.dtype), named.dtype)
    self.lengths_NK = np.zeros((len(self._groups), self.group_size), np.int32)
    for n, group in enumerate(self._groups):
      self.lengths_NK[n, : len(group.sequences)] = [len(one.ids) - 1 for one in group.sequences]
    self.keys_NK = np.zeros(self.lengths_NK.shape, np.uint64)
    self.shared_N = np.array([examples.shared_slots(group.sequences) for group in self._groups], np.int32)

  def with_texts(self, texts: Sequence[examples.Group]) -> 'Groups':
    """The same and texts behind them, groups of one; tokens have the label `is_text`, and texts 0 for all others."""

    def marked(group: examples.Group, is_text: float) -> examples.Group:
      sequences = []
      for one in group.sequences:
        tokens = np.zeros(int(one.mask.sum()), np.float32)
        own = dict.fromkeys(self.token_label_names, tokens) if is_text else one.labels
        sequences.append(dataclasses.replace(one, labels={**own, 'is_text': tokens + is_text}))
      labels = {name: [0.0] * len(sequences) for name in self.label_names} if is_text else group.labels
      return dataclasses.replace(group, sequences=tuple(sequences), labels=labels)

    return Groups([*(marked(group, 0.0) for group in self._groups), *(marked(group, 1.0) for group in texts)])

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index: int) -> examples.Group:
    return self._groups[index]

  def where(self, index: int) -> str:
    """Which prompt."""
    return f'prompt {index} of those that were sampled'

  def place(self, index: int) -> int:
    """The same as a number."""
    return index


def sequence(
    prompt: list[int],
    response: list[int],
    labels: Mapping[str, np.ndarray],
    *,
    counted: bool = True,
    sampled: list[bool] | None = None,
    experts: np.ndarray | None = None,
) -> examples.Sequence:
  """A prompt and a response, whose tokens that were sampled carry labels, and are learned from where it is counted."""
  ids = np.array(prompt + response, np.int32)
  labels = labels if counted else {name: x[:0] for name, x in labels.items()}
  mask = np.concatenate([np.zeros(len(prompt), bool), np.array(sampled or [True] * len(response), bool)])
  return examples.Sequence(ids, mask & counted, labels, experts)


# (parameters, batch) -> [A, B, T] by name
Run = Callable[[Any, types.Batch], Mapping[str, types.Array]]


def annotated(
    models: Any, groups: Groups, run: Run, packing: loader_lib.Packing, mesh: jax.sharding.Mesh
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
  """Which group, which of its responses, and what models make of that one's tokens, by name.

  Args:
    models: their parameters.
    groups: the responses.
    run: jitted, as `forward.annotations`.
    packing: in which rows they are read.
    mesh: where.
  """
  loader = loader_lib.Loader([groups], [1.0], packing=packing, mesh=mesh, seed=0)  # type: ignore[list-item]
  for placements, batch in loader.ordered(range(len(groups))):
    found = {name: np.asarray(x_ABT) for name, x_ABT in run(models, batch).items()}
    for place in loader.places(placements):
      yield place.record, place.slot, {
          name: x_ABT[place.micro, place.row, place.targets] for name, x_ABT in found.items()
      }


def summed(
    models: Any, read: Sequence[examples.Sequence], run: Run, packing: loader_lib.Packing, mesh: jax.sharding.Mesh
) -> np.ndarray:
  """Of each sequence the sum of its `logps` by `run`, see `annotated`; float64, in nats."""
  found, groups = np.zeros(len(read)), Groups([examples.Group((one,), {}) for one in read])
  for group, _, of in annotated(models, groups, run, packing, mesh):
    found[group] = of['logps'].sum(dtype=np.float64)
  return found
