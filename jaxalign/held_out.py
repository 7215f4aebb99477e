"""Means of an objective's metrics over held-out batches."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import math
from typing import Any
from typing import TypeVar

import jax
import numpy as np

from jaxalign import masked
from jaxalign import types

_T = TypeVar('_T')


def means(
    eval_step: Callable[[types.PyTree, types.Batch], Mapping[str, masked.Sum]],
    params: types.PyTree,
    batches: Iterable[types.Batch],
) -> dict[str, float]:
  """Means over held-out batches of every metric of the objective, from sums: memory does not grow with the data.

  Returns:
    'eval/NAME' for each metric, `eval/n` (groups, or target tokens), and for accuracies their binomial standard error.
  """
  host: dict[str, Any] = {}
  for sums in _one_behind(eval_step(params, batch) for batch in batches):
    for name, pair in jax.device_get(sums).items():
      # In double precision: weights are counts, which float32 rounds from 2^24 on.
      new = jax.tree.map(np.float64, pair)
      host[name] = jax.tree.map(np.add, host[name], new) if name in host else new
  values = {f'eval/{name}': float(pair.mean()) for name, pair in host.items()}
  values['eval/n'] = float(host['loss'].weight)
  for name in ('rewards/accuracies', 'accuracy', 'length_only/accuracies'):
    if name in host:
      p = min(1.0, max(0.0, values[f'eval/{name}']))
      values[f'eval/{name}_stderr'] = math.sqrt(p * (1 - p) / max(host[name].weight, 1.0))
  return values


def _one_behind(items: Iterable[_T]) -> Iterator[_T]:
  """The same items, each when the next has been asked for, so that fetching one does not hold up the device."""
  waiting: list[_T] = []
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting
