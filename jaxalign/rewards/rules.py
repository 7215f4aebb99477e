"""Rules that judge what a text says without a model: sentiment, answers, formats.

Each is a reward, see `functions.Reward`: it takes responses and those columns of the records that it names.
"""

import atexit
from collections.abc import Hashable
from collections.abc import Sequence
from concurrent import futures
import functools
import json
import multiprocessing
import re
import threading
from typing import Any

from vaderSentiment import vaderSentiment

from jaxalign import types
from jaxalign.rewards import answers

# What is thought, then what is answered, each tag once.
THINKING = r'\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*'


@functools.cache
def _analyser() -> vaderSentiment.SentimentIntensityAnalyzer:
  return vaderSentiment.SentimentIntensityAnalyzer()


def vader(responses: Sequence[str]) -> list[float]:
  """Sentiment of each text in [-1, 1]: VADER's compound score, a sum of word valences squashed by x / sqrt(x^2 + 15).

  The text is what is judged, no more: pass responses without their prompts.

  References:
    Hutto and Gilbert, 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
  """
  return [_analyser().polarity_scores(text)['compound'] for text in responses]


def distinct(n: int, sequences: Sequence[Sequence[Hashable]]) -> float:
  """Distinct n-grams over all n-grams of all sequences, in [0, 1]; near 0 where a model repeats itself.

  It falls as the number of sequences grows, so compare equal numbers only. 0 where there is no n-gram.

  References:
    Li et al., 2016, https://arxiv.org/abs/1510.03055, Sec. 5.
  """
  grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
  return len(set(grams)) / len(grams) if grams else 0.0


def exact_match(
    responses: Sequence[str],
    answer: Sequence[Any] | None = None,
    target: Sequence[Any] | None = None,
    *,
    ignore_case: bool = False,
) -> list[float | None]:
  """1 where the response is the reference but for space around it, else 0; None where there is no reference.

  Args:
    responses: texts.
    answer: the column of references, each a text, a number, or a list of those of which one will do.
    target: the same, read where there is no `answer`.
    ignore_case: whether case does not matter.
  """
  plain = lambda value: str(value).strip().casefold() if ignore_case else str(value).strip()

  def judge(response, reference):
    accepted = reference if isinstance(reference, list | tuple) else [reference]
    return float(plain(response) in map(plain, accepted))

  return _judged(judge, responses, answer, target)


def numeric_answer(
    responses: Sequence[str], answer: Sequence[Any] | None = None, target: Sequence[Any] | None = None
) -> list[float | None]:
  r"""1 where the last number of the response is that of the reference, else 0; None where there is no reference.

  Where the response has a \boxed{...}, the last one is read instead. Numbers are compared exactly, as fractions: 1,000
  is 1000.0, 1/2 is 0.5, $5 is 5, and 50% is 50, since references leave out units.

  Args:
    responses: texts.
    answer: the column of references: a number, or a text of which the number after #### counts, the last one without.
    target: the same, read where there is no `answer`.

  Raises:
    ValueError: a reference has no number.

  References:
    Cobbe et al., 2021, https://arxiv.org/abs/2110.14168 (GSM8K, whose solutions end in #### and the answer).
  """

  def judge(response, reference):
    wanted = answers.number(str(reference).rpartition('####')[2])
    if wanted is None:
      raise ValueError(f'the reference {str(reference)[-80:]!r} has no number')
    return float(answers.number(response) == wanted)

  return _judged(judge, responses, answer, target)


def math_answer(
    responses: Sequence[str], answer: Sequence[Any] | None = None, target: Sequence[Any] | None = None
) -> list[float | None]:
  r"""1 where the response's answer equals the reference as mathematics (1/2, \frac{1}{2}, 0.5), else 0; None without.

  Sets, intervals, equations and expressions are compared by the library math-verify. A response that it cannot read is
  wrong, also one that takes more than some seconds: alarms tell, which are for the main thread of a process; called in
  another it works in a process of its own.

  Args:
    responses: texts, LaTeX in them in $...$ or \boxed{...}.
    answer: the column of references: LaTeX, with or without $.
    target: the same, read where there is no `answer`.

  Raises:
    UsageError: math-verify is not installed.
    ValueError: a reference cannot be read.
  """
  try:
    import math_verify
  except ModuleNotFoundError as err:
    raise types.UsageError(f'math_answer needs math-verify: pip install "jaxalign[math]" ({err})') from err

  if threading.current_thread() is not threading.main_thread():
    return _beside().submit(math_answer, responses, answer, target).result()

  def judge(response, reference):
    text = str(reference)
    gold = math_verify.parse(text if '$' in text or '\\boxed' in text else f'${text}$')
    if not gold:
      raise ValueError(f'the reference {text[:80]!r} is no mathematics that math-verify reads')
    return float(math_verify.verify(gold, math_verify.parse(response)))

  return _judged(judge, responses, answer, target)


@functools.cache
def _beside() -> futures.Executor:
  found = futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
  atexit.register(found.shutdown)
  return found


def _judged(judge, responses, answer, target) -> list[float | None]:
  """`judge(response, reference)` of each, None where a record has no reference."""
  if answer is None and target is None:
    raise ValueError('the records have no column answer or target')
  nothing = [None] * len(responses)
  references = [a if a is not None else b for a, b in zip(answer or nothing, target or nothing)]
  return [None if given is None else judge(text, given) for text, given in zip(responses, references)]


def matches_format(responses: Sequence[str], *, pattern: str = THINKING) -> list[float]:
  """1 where a regular expression matches the whole response, else 0; its dot also matches line breaks.

  By default the format is <think>...</think> <answer>...</answer>, each tag once.

  Raises:
    UsageError: the pattern is no regular expression.

  References:
    DeepSeek-AI, 2025, https://arxiv.org/abs/2501.12948, Sec. 2.2.2 (format rewards), from its definition.
  """
  try:
    compiled = re.compile(pattern, re.DOTALL)
  except re.error as err:
    raise types.UsageError(f'matches_format(pattern={pattern!r}): it is no regular expression ({err})') from err
  return [float(compiled.fullmatch(text) is not None) for text in responses]


def json_valid(responses: Sequence[str], *, required_keys: Sequence[str] = ()) -> list[float]:
  """1 where the response is JSON, perhaps in a Markdown fence, and an object with all `required_keys`, else 0."""

  def is_valid(text):
    try:
      found = parse_json(text)
    except (ValueError, RecursionError):
      return False
    return not required_keys or isinstance(found, dict) and set(required_keys) <= set(found)

  return [float(is_valid(text)) for text in responses]


def parse_json(text: str) -> Any:
  """The JSON in a text, perhaps in a Markdown fence; raises ValueError or RecursionError where it is none."""
  fence = re.fullmatch(r'\s*```(?:json)?\s(.*)```\s*', text, re.DOTALL | re.IGNORECASE)
  return json.loads(fence[1] if fence else text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
  raise ValueError(f'{constant} is no JSON')
