"""What was sampled: responses to prompts with their rewards, as data of the step, and as text to be read again."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import loader as loader_lib
from jaxalign.data import tokenizers
from jaxalign.rewards import rules

# What tokens of a response carry; the last where they are trained on more than once.
LABELS = ('advantages', 'sampler_logps', 'old_logps')


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Responses to prompts, G prompts with K responses each, one behind the other.

  Attributes:
    prompts: ids of each prompt, G of them.
    responses: ids of each response, G K of them.
    sampler_logps: log-probability of each of these ids when it was sampled, in nats.
    finished: whether each response ended by itself.
    rewards_GK: float64, NaN where every reward abstained.
    advantages_GK: float32, 0 there.
    said: mean and deviation of each reward, by name.
    old_logps: log-probabilities of the same ids by the program that trains, where it is used more than once.
  """

  prompts: list[list[int]]
  responses: list[list[int]]
  sampler_logps: list[list[float]]
  finished: list[bool]
  rewards_GK: np.ndarray
  advantages_GK: np.ndarray
  old_logps: list[list[float]] | None = None
  said: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def to_text(self, tokenizer: tokenizers.Tokenizer) -> str:
    """A line of JSON for each response, in words and in what it takes to go on from there."""
    samples, lines = self.rewards_GK.shape[1], []
    for n, ids in enumerate(self.responses):
      prompt, reward = self.prompts[n // samples], float(self.rewards_GK.reshape(-1)[n])
      line: dict[str, Any] = {
          'group': n // samples,
          'prompt': tokenizer.decode(prompt),
          'response': tokenizer.decode(ids, continuation=True),
          'reward': None if math.isnan(reward) else reward,
          'advantage': float(self.advantages_GK.reshape(-1)[n]),
          'finished': self.finished[n],
          'prompt_ids': prompt,
          'ids': ids,
          'sampler_logps': self.sampler_logps[n],
      }
      if self.old_logps is not None:
        line['old_logps'] = self.old_logps[n]
      lines.append(json.dumps(line) + '\n')
    return ''.join(lines)

  def groups(self) -> 'Groups':
    """What is trained on."""
    samples, groups = self.rewards_GK.shape[1], []
    for n, response in enumerate(self.responses):
      advantage = self.advantages_GK.reshape(-1)[n]
      labels = {'advantages': np.full(len(response), advantage, np.float32)}
      labels['sampler_logps'] = np.array(self.sampler_logps[n], np.float32)
      if self.old_logps is not None:
        labels['old_logps'] = np.array(self.old_logps[n], np.float32)
      groups.append(sequence(self.prompts[n // samples], response, labels))
    several = (tuple(groups[i : i + samples]) for i in range(0, len(groups), samples))
    return Groups([examples.Group(each, {}) for each in several])

  def metrics(self) -> dict[str, float]:
    """What it says of the policy that it was sampled from, by name."""
    lengths, rewards = [len(ids) for ids in self.responses], np.ma.masked_invalid(self.rewards_GK)
    return {
        'reward': float(rewards.mean()),
        'reward_std': float(rewards.std()),
        'frac_reward_zero_std': float((rewards.max(axis=1) == rewards.min(axis=1)).mean()),
        **self.said,
        'completions/mean_length': float(np.mean(lengths)),
        'completions/max_length': float(max(lengths)),
        'completions/clipped_ratio': 1 - float(np.mean(self.finished)),
        'completions/distinct_2': rules.distinct(2, self.responses),
    }


def of_text(text: str, samples: int) -> Rollout:
  """Undoes `Rollout.to_text`, of which `samples` responses belong to each prompt."""
  lines = [json.loads(line) for line in text.splitlines()]
  of: Mapping[str, list[Any]] = {name: [line[name] for line in lines] for name in lines[0]}
  rewards = [math.nan if reward is None else reward for reward in of['reward']]
  return Rollout(
      of['prompt_ids'][::samples],
      of['ids'],
      of['sampler_logps'],
      of['finished'],
      np.array(rewards, np.float64).reshape(-1, samples),
      np.array(of['advantage'], np.float32).reshape(-1, samples),
      of.get('old_logps'),
  )


class Groups:
  """Groups of sampled responses, all with as many, as a `data.dataset.Dataset` has them, for `data.loader.Loader`."""

  label_names: tuple[str, ...] = ()

  def __init__(self, groups: Sequence[examples.Group]):
    self._groups = list(groups)
    self.group_size = len(self._groups[0].sequences)
    self.token_label_names = tuple(self._groups[0].sequences[0].labels)
    self.lengths_NK = np.array([[len(one.ids) - 1 for one in group.sequences] for group in self._groups], np.int32)
    self.keys_NK = np.zeros(self.lengths_NK.shape, np.uint64)

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


def sequence(prompt: list[int], response: list[int], labels: Mapping[str, np.ndarray]) -> examples.Sequence:
  """A prompt and what was sampled behind it, whose tokens carry labels."""
  ids = np.array(prompt + response, np.int32)
  return examples.Sequence(ids, np.arange(len(ids)) >= len(prompt), labels)


def logps_of(
    params: types.PyTree,
    groups: Groups,
    run: Callable[[types.PyTree, types.Batch], types.Array],
    packing: loader_lib.Packing,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[int, int, np.ndarray]]:
  """Which group, which of its responses, and the log-probabilities of that one's tokens, in nats.

  Args:
    params: of the model.
    groups: the responses.
    run: see `forward.ref_logps`, jitted.
    packing: in which rows they are read.
    mesh: where.
  """
  loader = loader_lib.Loader([groups], [1.0], packing=packing, mesh=mesh, seed=0)  # type: ignore[list-item]
  for placements, batch in loader.ordered(range(len(groups))):
    logps = np.asarray(run(params, batch))
    for place in loader.places(placements):
      yield place.record, place.slot, logps[place.micro, place.row, place.targets]
