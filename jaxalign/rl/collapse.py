"""Signs that a policy collapses while it is trained on what it samples, each called by a name."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
from typing import Any

from absl import logging

from jaxalign import metrics
from jaxalign import storage

_Line = Mapping[str, Any]

_DISTINCT = 0.5  # of the first rollout's
_ENTROPY = 0.1  # of the first rollout's
_LONGER = 3.0  # than the first rollout's
_FAR = 2.0  # nats a token from the reference


def _ratio(name: str, first: _Line, now: _Line) -> float:
  """The value over the first one, 1 where either is not there."""
  values = first.get(name), now.get(name)
  return values[1] / values[0] if None not in values and values[0] else 1.0


def _is(name: str, value: float, line: _Line) -> bool:
  return line.get(name) == value


def _per_token(line: _Line) -> float:
  """Nats a token from the reference, of the loss, of the reward, or of held-out prompts (then from the beginning)."""
  of_responses = ('objective/kl', 'completions/mean_length'), ('eval/kl', 'eval/mean_length')
  shares = [line[whole] / line[length] for whole, length in of_responses if line.get(whole) and line.get(length)]
  return max([line.get('kl') or 0.0, *shares])


# What is told of a sign, and whether the first and the newest metrics show it.
_SIGNS: dict[str, tuple[str, Callable[[_Line, _Line], bool]]] = {
    'reward_std': (
        'every response has the same reward, so there is nothing to learn from',
        lambda first, now: _is('reward_std', 0.0, now),
    ),
    'distinct_2': (
        f'distinct token pairs are below {_DISTINCT:g} of what they were: responses repeat themselves or each other',
        lambda first, now: _ratio('completions/distinct_2', first, now) < _DISTINCT,
    ),
    'entropy': (
        f'the entropy of a token is below {_ENTROPY:g} of what it was: sampling finds nothing new',
        lambda first, now: _ratio('entropy', first, now) < _ENTROPY,
    ),
    'kl': (
        f'the policy is more than {_FAR:g} nats a token away from the reference: raise beta or lower the learning rate',
        lambda first, now: _per_token(now) > _FAR,
    ),
    'clipped_ratio': (
        'every response is cut at max_new_tokens, which was not so at first',
        lambda first, now: _is('completions/clipped_ratio', 1.0, now)
        and not _is('completions/clipped_ratio', 1.0, first),
    ),
    'length': (
        f'responses are more than {_LONGER:g} times as long as at first',
        lambda first, now: _ratio('completions/mean_length', first, now) > _LONGER,
    ),
}


def signs(history: Sequence[_Line]) -> tuple[str, ...]:
  """The names of the signs that the newest metrics show, beside the first.

    reward_std      it is 0
    distinct_2      below half of the first
    entropy         below a tenth of the first
    kl              more than 2 nats a token, where nothing reads a reference by `eval/kl`
    clipped_ratio   1, and less at first
    length          the mean is more than three times the first

  The bounds are rules of thumb: what a healthy run on the built-in tasks keeps well within.

  Args:
    history: metrics of logged steps, by name, the first of the run first; what is not there shows nothing.
  """
  return tuple(name for name, (_, shows) in _SIGNS.items() if history and shows(history[0], history[-1]))


class Writer(metrics.Writer):
  """Writes metrics as its base does, with `collapse/NAME` 1 or 0 from where a sign is first seen, and warns of it once.

  Attributes:
    seen: names of the signs that were seen in the whole run.
  """

  def __init__(self, workdir: storage.Path, step: int):
    super().__init__(workdir, step)
    path = workdir / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() and step else []
    before = [line for line in map(json.loads, lines) if line['step'] <= step]
    self._first: _Line | None = before[0] if before else None
    told = {name.removeprefix('collapse/') for line in before for name in line if name.startswith('collapse/')}
    self.seen = [name for name in _SIGNS if name in told]

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line."""
    self._first = values if self._first is None else self._first
    found = signs([self._first, values])
    for name in found:
      if name not in self.seen:
        logging.warning('step %d: collapse: %s: %s', step, name, _SIGNS[name][0])
        self.seen.append(name)
    super().write(step, {**values, **{f'collapse/{name}': float(name in found) for name in self.seen}})
