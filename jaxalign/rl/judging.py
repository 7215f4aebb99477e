"""What rewards make of sampled responses, with the fields of the records that their prompts came from."""

from collections.abc import Sequence
import contextlib
from typing import NamedTuple

import numpy as np

from jaxalign import types
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.rewards import functions
from jaxalign.rewards import panels
from jaxalign.rewards import verdicts
from jaxalign.rl import multi_turn

_FIRST = 100  # records that are looked at


class Judged(NamedTuple):
  """Responses to prompts, one prompt's behind another's, and what each reward makes of them.

  Attributes:
    drawn: N responses.
    values_RN: float64 of each reward, NaN where it abstains.
    tokens: of each response the sum of what rewards say of its sampled tokens, with their weights, NaN where none does.
    tells_R: whether each reward says something of tokens.
  """

  drawn: list[multi_turn.Response]
  values_RN: np.ndarray
  tokens: list[np.ndarray]
  tells_R: np.ndarray

  def replace(self, group: int, other: 'Judged', its: int, samples: int) -> None:
    """Puts another one's responses to its prompt `its` in place of those to the prompt `group`."""
    own, new = (slice(at * samples, (at + 1) * samples) for at in (group, its))
    self.drawn[own] = other.drawn[new]
    self.values_RN[:, own] = other.values_RN[:, new]
    self.tokens[own] = other.tokens[new]


def check_columns(rewards: Sequence[str], data: Sequence[sources.Source]) -> None:
  """Raises UsageError where a reward must have a column that none of the first records of `--data` has."""
  columns = set[str]()
  for source in data:
    for i in range(min(len(source), _FIRST)):
      with contextlib.suppress(sources.BadRecord):  # skipped, or refused before
        columns |= source[i].keys()
  if columns:
    functions.check_columns(list(map(functions.parse, rewards)), columns)


class Judge:
  """The rewards of a run.

  Attributes:
    weights_R: of each, in their sum.
  """

  def __init__(
      self,
      specs: Sequence[str],
      combine: str,
      tokenizer: tokenizers.Tokenizer,
      world: multi_turn.Environment | None = None,
  ):
    """Parses them.

    Args:
      specs: as for `--reward`.
      combine: see `functions.combine`.
      tokenizer: of the policy.
      world: whose rewards come first, with weight 1.
    """
    rewards = [functions.parse(spec) for spec in specs]
    self._of_panel, own = [one.name for one in rewards], [] if world is None else [world.title]
    self.weights_R = np.array([1.0] * len(own) + [one.weight for one in rewards], np.float32)
    titles = own + [one.title for one in rewards]
    # A function that is given twice, with other options, is told apart by its place.
    self._titles = [f'{t}_{i}' if titles.count(t) > 1 else t for i, t in enumerate(titles)]
    self._combine, self._tokenizer = combine, tokenizer

  def __call__(
      self, panel: panels.Panel, asked: Sequence[verdicts.Prompt], drawn: Sequence[multi_turn.Response]
  ) -> Judged:
    """What the rewards make of responses to these prompts, as many to each."""
    values = panel(verdicts.responses(asked, self._tokenizer, drawn))
    played = multi_turn.rewards_of(drawn)
    found = ([] if played is None else [functions.Scores(played)]) + [values[name] for name in self._of_panel]
    tells_R = np.array([one.tokens is not None for one in found])
    return Judged(list(drawn), np.stack([one.values for one in found]), self._tokens(found, drawn), tells_R)

  def _tokens(self, found: Sequence[functions.Scores], drawn: Sequence[multi_turn.Response]) -> list[np.ndarray]:
    """See `Judged`."""
    sums = []
    for n, response in enumerate(drawn):
      sampled = np.array(multi_turn.sampled_of(response), bool)
      own = [w * one.tokens[n][sampled] for one, w in zip(found, self.weights_R) if one.tokens is not None]
      table = np.stack(own) if own else np.full((1, int(sampled.sum())), np.nan)
      silent = np.isnan(table).all(axis=0)
      sums.append(np.where(silent, np.nan, np.nansum(table, axis=0)))
    return sums

  def total(self, values_RN: np.ndarray) -> np.ndarray:
    """All rewards of a response as one number, `[N]`, NaN where every one abstained."""
    return functions.combine(list(values_RN), self.weights_R.tolist(), self._combine)

  def outcomes(self, judged: Judged) -> np.ndarray:
    """The same of those that say nothing of tokens; 0 where there is no such reward."""
    others = np.flatnonzero(~judged.tells_R)
    if not others.size:
      return np.zeros(len(judged.drawn))
    return functions.combine(list(judged.values_RN[others]), self.weights_R[others].tolist(), self._combine)

  def known(self, judged: Judged, where: str) -> np.ndarray:
    """The same; RunError where every reward abstained on all responses, the first of which is to `where`."""
    total = self.total(judged.values_RN)
    if np.all(np.isnan(total)):
      raise types.RunError(f'every reward abstains on all {len(total)} responses (from {where} on)', everywhere=True)
    return total

  def dull(self, judged: Judged, samples: int) -> np.ndarray:
    """Whether all responses to a prompt have the same reward, so that none is better than another: `[G]`."""
    total_GK = np.ma.masked_invalid(self.total(judged.values_RN).reshape(-1, samples))
    return np.ma.filled(total_GK.max(axis=1) == total_GK.min(axis=1), True)

  def said(self, judged: Judged) -> dict[str, float]:
    """Mean and deviation of each reward where it does not abstain, by name, and what is to be said of episodes."""
    played = [one for one in judged.drawn if isinstance(one, multi_turn.Episode)]
    found = multi_turn.said(played) if played else {}
    for name, values_N in zip(self._titles, judged.values_RN, strict=True):
      known = values_N[~np.isnan(values_N)]
      if known.size:
        found |= {f'rewards/{name}/mean': float(known.mean()), f'rewards/{name}/std': float(known.std())}
    return found
