"""Training-free alignment, response by response: functions that choose one of N candidates to a prompt.

What such a function reads is what its parameters are named, of these; it returns the place of the one to keep.

  rewards_N  float64, all rewards of a candidate as one number, NaN where every one abstained
  values_N   float64, what the head of the `value` that `--guide` names makes of prompt and candidate
  texts      of the candidates
  tokens     ids of each, without the token that ended it
"""

import collections
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
import inspect
import math

import numpy as np

from jaxalign import types
from jaxalign.rewards import calling
from jaxalign.rewards import functions

FIELDS = ('rewards_N', 'values_N', 'texts', 'tokens')


def reads(fn: Callable[..., int]) -> set[str]:
  """Which of the fields a function that chooses is given."""
  return set(FIELDS) & set(inspect.signature(fn).parameters)


def bound(fn: Callable[..., int], n: int) -> float:
  """The largest KL, in nats, from the candidates' distribution to that of the one that is chosen of n.

  It is log n - (n - 1) / n where rewards or values alone decide, and log n for any other choice, as none makes a
  response more than n times as likely.

  References:
    Beirami et al., 2024, https://arxiv.org/abs/2401.01879 (that the first is a bound).
  """
  return math.log(n) - ((n - 1) / n if reads(fn) <= {'rewards_N', 'values_N'} else 0.0)


def best_of_n(rewards_N: np.ndarray) -> int:
  """The one of the highest reward, the first of several; one without reward is the last that is taken.

  References:
    Stiennon et al., 2020, https://arxiv.org/abs/2009.01325; Nakano et al., 2021, https://arxiv.org/abs/2112.09332.
  """
  return int(np.argmax(np.where(np.isnan(rewards_N), -np.inf, rewards_N)))


def highest_value(values_N: np.ndarray) -> int:
  """The one that promises most, the first of several: of blocks, blockwise controlled decoding.

  References:
    Mudgal et al., 2023, https://arxiv.org/abs/2310.17022, Sec. 3.3.
  """
  return int(np.argmax(values_N))


def mbr(
    rewards_N: np.ndarray,
    tokens: Sequence[Sequence[int]],
    *,
    beta: float,
    utility_fn: Callable[[Sequence[int], Sequence[int]], float],
) -> int:
  """Best of n that stays near the others: argmax_i r_i + beta mean_j U(y_i, y_j), j = i among them.

  Args:
    rewards_N: r; one without reward is the last that is taken.
    tokens: y.
    beta: how much likeness counts.
    utility_fn: U, a likeness of two responses: `unigram_f1`, `rouge_l` or your own.

  References:
    Jinnai et al., 2024, https://arxiv.org/abs/2404.01054 (MBR-BoN, as in their code).
  """
  likeness_N = np.array([np.mean([utility_fn(one, other) for other in tokens]) for one in tokens])
  return best_of_n(rewards_N + beta * likeness_N)


def unigram_f1(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
  """F1 of the tokens that two responses share, each as often as both have it; in [0, 1], 1 for two empty ones."""
  shared = sum((collections.Counter(a) & collections.Counter(b)).values())
  return 2 * shared / (len(a) + len(b)) if len(a) + len(b) else 1.0


def rouge_l(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
  """F1 of the longest common subsequence of tokens of two responses; in [0, 1], 1 for two empty ones.

  References:
    Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", Sec. 3, with beta = 1; from its definition.
  """
  longest = [0] * (len(b) + 1)  # of what was seen of `a` and each beginning of `b`
  for x in a:
    before = list(longest)
    for j, y in enumerate(b):
      longest[j + 1] = before[j] + 1 if x == y else max(before[j + 1], longest[j])
  return 2 * longest[-1] / (len(a) + len(b)) if len(a) + len(b) else 1.0


def vote(texts: Sequence[str], *, parser: str = 'jaxalign.rewards.answers:number') -> int:
  """Self-consistency: the first response whose answer most responses have; the first of all where none has any.

  Args:
    texts: of the responses.
    parser: MODULE:FUNCTION or path/to/file.py:FUNCTION: a text to its answer, of which those that are equal are one;
      it returns None or raises ValueError where there is none. By default the last number, or the boxed one.

  Raises:
    UsageError: there is no such function.
    RunError: it raises something else.

  References:
    Wang et al., 2022, https://arxiv.org/abs/2203.11171, from its definition.
  """
  answers = _parsed(texts, parser)
  votes = [answers.count(answer) if answer is not None else 0 for answer in answers]
  return int(np.argmax(votes))


def _parsed(texts: Sequence[str], parser: str) -> list:
  path, _, name = parser.rpartition(':')
  fail = lambda problem: types.UsageError(f'candidates.vote.parser = {parser!r}: {problem}')
  if not path or not name:
    raise fail('write MODULE:FUNCTION or path/to/file.py:FUNCTION')
  parse, answers = functions.loaded(path, name, fail), []
  for text in texts:
    try:
      answers.append(parse(text))
    except ValueError:
      answers.append(None)
    except Exception as err:  # Whatever else the user's function raises.
      raise types.RunError(f'the parser {parser} on {text[-80:]!r}: {calling.told(err, parse)}') from err
  return answers
