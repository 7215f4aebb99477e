"""A panel of rewards: functions, some in processes of their own, and models, called on the same responses."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import contextlib
import functools
import math
import types as python_types

import jax
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign.rewards import calling
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import pool as pool_lib


class Panel(contextlib.AbstractContextManager):
  """Rewards with their processes, which live as long as the context."""

  def __init__(
      self,
      rewards: Sequence[functions.Reward | modelled.Model],
      scorers: Mapping[str, functions.Scorer] = python_types.MappingProxyType({}),
      *,
      together: bool = False,
  ):
    """Takes at least one reward.

    Args:
      rewards: functions and models.
      scorers: what runs each of the models, by name.
      together: whether all processes of a job judge the same responses: functions then run in the first alone, and
        the others are told. Otherwise no device is looked for.

    Raises:
      UsageError: two have the same name.
    """
    names = functions.check_names(rewards)
    self._names, self._scorers, self._together = names, dict(scorers), together
    self._functions = [reward for reward in rewards if isinstance(reward, functions.Reward)]
    self._is_first = not together or jax.process_index() == 0
    self._pools: dict[str, pool_lib.Pool] = {}
    with contextlib.ExitStack() as stack:
      stack.push(self)  # closes what was started if the next cannot be
      for reward in self._functions if self._is_first else ():
        if reward.processes and reward.target is not None:
          self._pools[reward.name] = pool_lib.Pool(reward.name, reward.target, reward.processes, reward.timeout)
      stack.pop_all()

  def __exit__(self, kind, *_) -> None:
    for pool in self._pools.values():
      pool.close(at_once=kind is not None)

  def __call__(self, responses: functions.Responses) -> dict[str, functions.Scores]:
    """What each reward makes of the responses, by name; functions run beside models.

    Raises:
      RunError: a function failed, or a reward is no finite number; it names the reward and the record.
    """
    finish: Callable[[], np.ndarray] = functools.partial(self._of_functions, responses)
    if self._functions and self._scorers and self._is_first:
      executor = futures.ThreadPoolExecutor(1)
      finish = executor.submit(finish).result
      executor.shutdown(wait=False)  # No more is submitted.
    judged = {name: scorer(responses) for name, scorer in self._scorers.items()}
    if self._functions:
      shape = len(self._functions), len(responses.responses)
      table_RN = sharding.of_first(finish, shape) if self._together else finish()
      judged |= {reward.name: functions.Scores(row_N) for reward, row_N in zip(self._functions, table_RN)}
    return {name: judged[name] for name in self._names}

  def _of_functions(self, responses: functions.Responses) -> np.ndarray:
    """`[R, N]` of R functions."""
    table = []
    for reward in self._functions:
      if reward.name in self._pools:
        each = [responses.part(item, item + 1).arguments() for item in range(len(responses.responses))]
        found = self._pools[reward.name].map(each, responses.where)
      else:
        found = _called(reward, responses)
      table.append([math.nan if value is None else value for value in found])
    return np.array(table, np.float64)


def _called(reward: functions.Reward, responses: functions.Responses) -> list[float | None]:
  try:
    return calling.call(reward.fn, responses.arguments(), len(responses.responses))
  except types.UsageError:
    raise
  except calling.FAILURES as err:
    item = err.item if isinstance(err, calling.Unusable) else _culprit(reward, responses)
    span = f'{responses.where[0]} to {responses.where[-1]}' if len(set(responses.where)) > 1 else responses.where[0]
    where = span if item is None else responses.where[item]
    raise types.RunError(f'reward {reward.name}, {where}: {calling.told(err, reward.fn)}') from err


def _culprit(reward: functions.Reward, responses: functions.Responses) -> int | None:
  """A response that the function fails on alone too, None where halving finds none; each is judged once more."""

  def fails(start: int, stop: int) -> bool:
    try:
      calling.call(reward.fn, responses.part(start, stop).arguments(), stop - start)
    except calling.FAILURES:
      return True
    return False

  start, stop = 0, len(responses.responses)
  while stop - start > 1:
    middle = (start + stop) // 2
    start, stop = (start, middle) if fails(start, middle) else (middle, stop)
  return start if fails(start, stop) else None
