"""Verdicts on responses: what rewards make of them and the columns of their records, and how often 1 of k is right."""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from types import MappingProxyType
from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np

from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import panels


class Prompt(NamedTuple):
  """What is responded to.

  Attributes:
    ids: its tokens.
    record: what it was made of, for the columns that rewards read; empty for a prompt of no record.
    where: the record in words.
  """

  ids: list[int]
  record: Mapping[str, Any]
  where: str

  @property
  def is_chat(self) -> bool:
    """Whether it is of messages."""
    said = self.record.get('prompt', self.record.get('messages'))
    return said is not None and not isinstance(said, str)


class Said(Protocol):
  """What was sampled behind a prompt: its tokens, and whether it ended by itself."""

  @property
  def ids(self) -> list[int]:
    """The tokens."""

  @property
  def finished(self) -> bool:
    """Whether it did."""


def of_record(groups: dataset.Joined, records: Sequence[sources.Source], index: int) -> Prompt:
  """A prompt of tokenised data, `records` being the sources of which `groups` were made."""
  group, (source, place) = groups[index], groups.place(index)
  ids = group.sequences[0].ids[: max(1, group.prompt_tokens)].tolist()
  return Prompt(ids, records[source].at(place), groups.where(index))


def are_chats(prompts: Sequence[Prompt]) -> bool:
  """Whether all these prompts are of messages; raises UsageError where some are and others are not."""
  kinds = {one.is_chat: one.where for one in reversed(prompts)}
  if len(kinds) > 1:
    problem = 'is of messages, but {} is a text, and their responses end differently; write all of them in one way'
    raise types.UsageError(f'{kinds[True]}: this prompt {problem.format(kinds[False])}')
  return True in kinds


def responses(prompts: Sequence[Prompt], tokenizer: tokenizers.Tokenizer, said: Sequence[Said]) -> functions.Responses:
  """What rewards are called with: as many responses to each prompt, one prompt behind the other.

  Args:
    prompts: G of them; one of no record is read as text.
    tokenizer: of the model.
    said: responses, G K of them.
  """
  each = lambda values: [value for value in values for _ in range(len(said) // len(prompts))]
  names = sorted({name for prompt in prompts for name in prompt.record} - {'prompt'})
  asked = lambda prompt: prompt.record.get('prompt', prompt.record.get('messages'))
  return functions.Responses(
      prompts=each(tokenizer.decode(one.ids) if asked(one) is None else asked(one) for one in prompts),
      responses=[tokenizer.decode(one.ids, continuation=True) for one in said],
      fields={name: each(prompt.record.get(name) for prompt in prompts) for name in names},
      where=each(prompt.where for prompt in prompts),
      ids=[one.ids for one in said],
      prompt_ids=each(one.ids for one in prompts),
      finished=[one.finished for one in said],
  )


def measured(
    rewards: Sequence[functions.Reward | modelled.Model],
    how: str,
    ks: Sequence[int],
    responses: functions.Responses,
    groups: int,
    given: np.ndarray | None = None,
    scorers: Mapping[str, functions.Scorer] = MappingProxyType({}),
) -> dict[str, float]:
  """What rewards say of as many responses to each of `groups` prompts.

  Args:
    rewards: who judges.
    how: see `functions.combine`; the sum in place of 'normalised', whose mean is 0 whatever is judged.
    ks: of which `pass_at` is wanted.
    responses: what is judged.
    groups: number of prompts.
    given: rewards `[N]` of an environment, which come first, with weight 1.
    scorers: what runs the models among them, by name.

  Returns:
    `reward`, `reward_std`, and `pass@K` for each k that enough responses were judged for; nothing where all rewards
    abstain throughout.
  """
  found: list[np.ndarray] = []
  if rewards:
    with panels.Panel(rewards, scorers, together=True) as panel:
      found = [one.values for one in panel(responses).values()]
  weights = [reward.weight for reward in rewards]
  if given is not None:
    found, weights = [given, *found], [1.0, *weights]
  if not found:
    return {}
  how = 'sum' if how == 'normalised' else how
  total_N = functions.combine(found, weights, how)
  known = total_N[~np.isnan(total_N)]
  if not known.size:
    return {}
  table_GK = total_N.reshape(groups, -1)
  right = {f'pass@{k}': pass_at(k, table_GK) for k in ks}
  values = {'reward': float(known.mean()), 'reward_std': float(known.std()), **right}
  return {name: value for name, value in values.items() if not math.isnan(value)}


def pass_at(k: int, rewards_GK: np.ndarray) -> float:
  """The chance that of k responses to a prompt at least one is right, that is has a reward above 0; mean over prompts.

    1 - C(n - c, k) / C(n, k)

  with c right ones of n, which is unbiased where k <= n. A response on which rewards abstain (NaN) is left out of n;
  prompts with fewer than k are left out, and NaN is returned where there is no other.

  References:
    Chen et al., 2021, https://arxiv.org/abs/2107.03374, Eq. 1.
  """
  known_GK = ~np.isnan(rewards_GK)
  n_G1 = known_GK.sum(axis=1, keepdims=True)
  right_G1 = (known_GK & (np.nan_to_num(rewards_GK) > 0)).sum(axis=1, keepdims=True)
  enough_G = n_G1[:, 0] >= k
  if not enough_G.any():
    return float('nan')
  drawn_1k = np.arange(k)[None, :]
  wrong_Gk = np.maximum(n_G1 - right_G1 - drawn_1k, 0) / np.maximum(n_G1 - drawn_1k, 1)
  return float(1 - wrong_Gk.prod(axis=1)[enough_G].mean())
