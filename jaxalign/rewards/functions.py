"""Rewards: functions found by their import path, or models, called on responses and combined to one number each."""

import ast
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
import os
import re
import types as python_types
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxalign import types
from jaxalign.rewards import calling
from jaxalign.rewards import modelled

HOW = ('sum', 'normalised', 'gated')

_SPEC = re.compile(r'(?P<path>[^:()]+):(?P<name>[A-Za-z_][\w.]*)(?P<options>\(.*\))?(:(?P<weight>[^:()]*))?', re.DOTALL)
_OF_MODEL = re.compile(r'(?P<path>([^:()]|(?<=gs):(?=//))+)(?P<options>\(.*\))?(:(?P<weight>[^:()]*))?', re.DOTALL)
_FORM = (
    'write MODULE:FUNCTION, MODULE:FUNCTION:WEIGHT, path/to/file.py:FUNCTION(option=value):WEIGHT, or of a model'
    ' DIR(option=value):WEIGHT'
)


@dataclasses.dataclass(frozen=True)
class Responses:
  """What is judged, an item per response.

  Attributes:
    prompts: texts or messages.
    responses: texts.
    fields: columns of the records by name, None where a record has no such column.
    where: the record in words, for messages.
    ids: token ids of each response; None where there is no tokenizer.
    prompt_ids: token ids of what each was sampled after; None where it was not sampled here.
    finished: whether each ended by itself; None where that is not known.
  """

  prompts: Sequence[Any]
  responses: Sequence[str]
  fields: Mapping[str, Sequence[Any]]
  where: Sequence[str]
  ids: Sequence[Sequence[int]] | None = None
  prompt_ids: Sequence[Sequence[int]] | None = None
  finished: Sequence[bool] | None = None

  def arguments(self) -> dict[str, Sequence[Any]]:
    """What functions are called with, by keyword."""
    ids = {} if self.ids is None else {'ids': self.ids}
    return {**self.fields, 'prompts': self.prompts, 'responses': self.responses, **ids}

  def part(self, start: int, stop: int) -> 'Responses':
    """Those from `start` to before `stop`."""
    of = lambda values: values[start:stop]
    fields = {name: of(values) for name, values in self.fields.items()}
    rest = [None if values is None else of(values) for values in (self.ids, self.prompt_ids, self.finished)]
    return Responses(of(self.prompts), of(self.responses), fields, of(self.where), *rest)


class Scores(NamedTuple):
  """What a reward makes of N responses.

  Attributes:
    values: `[N]` float64, NaN where it abstains.
    tokens: of rewards that say something of tokens of sampled ids, and None of others: an array for each response,
      float64, a number for each of its ids. Of a policy these are beta (log policy - log reference), whose sum is the
      value; of a model that judges steps the probability that a step is right at the last token of each, NaN elsewhere.
  """

  values: np.ndarray
  tokens: list[np.ndarray] | None = None


# A model that judges, ready to be called.
Scorer = Callable[[Responses], Scores]


@dataclasses.dataclass(frozen=True)
class Reward:
  """A function that judges responses.

  Attributes:
    name: what it is called in messages and metrics.
    fn: called by keyword with `prompts`, `responses`, `ids` and every column of the records, each a list with an item a
      response, it takes those that it names, or all by `**kwargs`. It returns a list of a number per response, None
      where it abstains; or a coroutine of that.
    weight: in the sum.
    processes: where it runs: 0 is here, on all responses at once; otherwise in so many processes, each response alone.
    timeout: seconds that a call may take, in a process.
    target: path, name and options, from which a process loads it.
  """

  name: str
  fn: Callable
  weight: float = 1.0
  processes: int = 0
  timeout: float | None = None
  target: tuple[str, str, Mapping[str, Any]] | None = None

  @property
  def title(self) -> str:
    """The function alone, for names of metrics."""
    return self.name.partition('(')[0].rpartition(':')[2]


def is_model(spec: str) -> bool:
  """Whether what `--reward` names is a model, if anything: no name of a function follows a colon."""
  return _SPEC.fullmatch(spec) is None


def parse(spec: str, *, flag: str = 'reward') -> Reward | modelled.Model:
  """The reward that `--reward` names: `my_rewards:score`, `my.py:score(goal=3):0.5`, or a model, `runs/rm:0.5`.

  In parentheses stand Python literals. Of a function they are keywords, and `processes` and `timeout` (in seconds, and
  then one process at least), which say how it runs: see `Reward`. Of a model see `modelled.Model`.

  Raises:
    UsageError: the spec is not of this form, or there is no such function or directory, or it has no such option.
  """
  fail = lambda problem: types.UsageError(f'--{flag}={spec}: {problem}')
  match = _SPEC.fullmatch(spec) or _OF_MODEL.fullmatch(spec)
  if match is None:
    raise fail(_FORM)
  path = match['path']
  try:
    weight = 1.0 if match['weight'] is None else float(match['weight'])
    options = _literals(match['options'] or '()')
  except (ValueError, SyntaxError) as err:
    raise fail(f'{" ".join(str(err).split())}; {_FORM}') from err
  if not math.isfinite(weight):
    raise fail(f'the weight {weight} is not finite')
  if is_model(spec):
    return modelled.of(path, options, path + (match['options'] or ''), weight, fail, _FORM)
  name, processes, timeout = match['name'], options.pop('processes', 0), options.pop('timeout', None)
  if type(processes) is not int or processes < 0:
    raise fail(f'processes={processes!r}: it is a whole number from 0 on')
  if timeout is not None and (type(timeout) not in (int, float) or not 0 < timeout < math.inf):
    raise fail(f'timeout={timeout!r}: it is a number of seconds above 0')
  fn = loaded(path, name, fail)
  try:
    names, _, takes_any = calling.parameters(fn)
  except (ValueError, TypeError) as err:
    raise fail(f'{err}: write a function in Python around it') from err
  for option in options:
    if option not in names and not takes_any:
      raise fail(f'{name} has no option {option}; it has {", ".join(names) or "none"}')
  called = f'{path}:{name}{match["options"] or ""}'
  processes = processes or int(timeout is not None)
  return Reward(called, functools.partial(fn, **options), weight, processes, timeout, (path, name, options))


def _literals(text: str) -> dict[str, Any]:
  """Keywords in parentheses; raises ValueError or SyntaxError where there is something else."""
  called = ast.parse(f'f{text}', mode='eval').body
  if not isinstance(called, ast.Call) or called.args or not isinstance(called.func, ast.Name):
    raise ValueError(f'{text} is not (option=value, ...)')
  found = {}
  for keyword in called.keywords:
    try:
      found[str(keyword.arg)] = ast.literal_eval(keyword.value)
    except ValueError as err:
      raise ValueError(f'{ast.unparse(keyword)} has no literal value (text is quoted)') from err
  return found


def loaded(path: str, name: str, fail: Callable[[str], Exception]) -> Callable:
  """A function by its module or path/to/file.py and its name; raises what `fail` makes of why there is none."""
  if path.endswith('.py') and not os.path.isfile(path):
    raise fail(f'there is no file {path}')
  try:
    fn = calling.load(path, name)
  except ModuleNotFoundError as err:
    if os.path.isdir(path):
      raise fail(f'{path} is a directory, behind which a weight may stand, and {name} is no finite number') from err
    looked = 'the current folder and PYTHONPATH are searched; path/to/file.py:FUNCTION names a file'
    raise fail(f'{err}; {looked}') from err
  except calling.Unusable as err:
    raise fail(f'{err}; {_FORM}') from err
  except Exception as err:  # Whatever the user's module raises when it is imported.
    raise fail(' '.join(f'{type(err).__name__}: {err}'.split())) from err
  if not callable(fn) or isinstance(fn, python_types.ModuleType):
    raise fail(f'{name} is no function but a {type(fn).__name__}')
  return fn


def check_names(rewards: Sequence[Reward | modelled.Model]) -> list[str]:
  """The names of rewards; UsageError where two have the same."""
  names = [reward.name for reward in rewards]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise types.UsageError(f'--reward={twice[0]}: it is given twice; give it once, with the sum of the weights')
  return names


def check_columns(rewards: Sequence[Reward | modelled.Model], columns: Collection[str]) -> None:
  """Raises UsageError where a function must have a column that records of `--data` lack.

  A function that wraps another may give what that wants, which is known when it is called.
  """
  for reward in rewards:
    if not isinstance(reward, Reward):
      continue
    bound = reward.fn if isinstance(reward.fn, functools.partial) else functools.partial(reward.fn)
    if hasattr(bound.func, '__wrapped__'):
      continue
    given = {*columns, *bound.keywords, 'prompts', 'responses', 'ids'} - {'prompt'}
    missing = [name for name in calling.parameters(reward.fn)[1] if name not in given]
    if missing:
      known = ', '.join(sorted(given))
      problem = f'it wants `{missing[0]}`, and of --data and what is sampled there is {known}'
      raise types.UsageError(f'--reward={reward.name}: {problem}')


def check_how(how: str) -> None:
  """Raises UsageError where there is no such way to combine."""
  if how not in HOW:
    raise types.UsageError(f'--combine={how}: it is one of {", ".join(HOW)}')


def combine(values: Sequence[np.ndarray], weights: Sequence[float], how: str = 'sum') -> np.ndarray:
  """One reward per response, of several.

    sum          sum_i w_i r_i
    normalised   sum_i w_i (r_i - mean r_i) / std r_i, over all responses given here; 0 where all r_i are the same
    gated        w_1 r_1 + [r_1 > 0] sum_{i>1} w_i r_i

  A reward that abstains is left out of the sum, and of mean and std.

  Args:
    values: `[N]` of each reward, NaN where it abstains.
    weights: of each reward.
    how: one of `HOW`.

  Returns:
    `[N]` float64, NaN where no reward has a say.

  Raises:
    UsageError: there is no such way.
  """
  check_how(how)
  table_RN = np.stack([np.asarray(one, np.float64) for one in values])
  weights_R1 = np.asarray(weights, np.float64)[:, None]
  known_RN = ~np.isnan(table_RN)
  if how == 'normalised':
    table_RN = np.stack([_normalised(row_N, known_N) for row_N, known_N in zip(table_RN, known_RN)])
  elif how == 'gated':
    known_RN = known_RN & np.concatenate([known_RN[:1], np.repeat(table_RN[:1] > 0, len(table_RN) - 1, axis=0)])
  total_N = np.where(known_RN, weights_R1 * table_RN, 0.0).sum(axis=0)
  return np.where(known_RN.any(axis=0), total_N, np.nan)


def _normalised(values_N: np.ndarray, known_N: np.ndarray) -> np.ndarray:
  found = values_N[known_N]
  if not found.size or np.ptp(found) == 0:
    return np.zeros_like(values_N)
  return (values_N - found.mean()) / found.std()
