"""What rewards make of sampled responses, with the fields of the records that their prompts came from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign import environments
from jaxalign import types
from jaxalign import verdicts
from jaxalign.data import tokenizers
from jaxalign.rewards import functions


class Judged(NamedTuple):
  """Responses to prompts, one prompt's behind another's, and what each reward makes of them.

  Attributes:
    drawn: N responses.
    values_RN: float64 of each reward, NaN where it abstains.
  """

  drawn: list[environments.Response]
  values_RN: np.ndarray

  def replace(self, group: int, other: 'Judged', its: int, samples: int) -> None:
    """Puts another one's responses to its prompt `its` in place of those to the prompt `group`."""
    own, new = (slice(at * samples, (at + 1) * samples) for at in (group, its))
    self.drawn[own] = other.drawn[new]
    self.values_RN[:, own] = other.values_RN[:, new]


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
      world: environments.Environment | None = None,
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
      self, panel: functions.Panel, asked: Sequence[verdicts.Prompt], drawn: Sequence[environments.Response]
  ) -> Judged:
    """What the rewards make of responses to these prompts, as many to each."""
    values = panel(verdicts.responses(asked, self._tokenizer, drawn))
    played = environments.rewards_of(drawn)
    rows = ([] if played is None else [played]) + [values[name].values for name in self._of_panel]
    return Judged(list(drawn), np.stack(rows))

  def total(self, values_RN: np.ndarray) -> np.ndarray:
    """All rewards of a response as one number, `[N]`, NaN where every one abstained."""
    return functions.combine(list(values_RN), self.weights_R.tolist(), self._combine)

  def known(self, judged: Judged, where: str) -> np.ndarray:
    """The same; RunError where every reward abstained on all responses, the first of which is to `where`."""
    total = self.total(judged.values_RN)
    if np.all(np.isnan(total)):
      raise types.RunError(f'every reward abstains on all {len(total)} responses (from {where} on)')
    return total

  def dull(self, judged: Judged, samples: int) -> np.ndarray:
    """Whether all responses to a prompt have the same reward, so that none is better than another: `[G]`."""
    total_GK = np.ma.masked_invalid(self.total(judged.values_RN).reshape(-1, samples))
    return np.ma.filled(total_GK.max(axis=1) == total_GK.min(axis=1), True)

  def said(self, judged: Judged) -> dict[str, float]:
    """Mean and deviation of each reward where it does not abstain, by name, and what is to be said of episodes."""
    played = [one for one in judged.drawn if isinstance(one, environments.Episode)]
    found = environments.said(played) if played else {}
    for name, values_N in zip(self._titles, judged.values_RN, strict=True):
      known = values_N[~np.isnan(values_N)]
      if known.size:
        found |= {f'rewards/{name}/mean': float(known.mean()), f'rewards/{name}/std': float(known.std())}
    return found
