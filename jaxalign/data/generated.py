"""Tasks that are generated rather than kept in files: problems whose answers a rule can check.

A task is a function without arguments that returns its splits by name, each a list of records, the same at every call.
"""

from collections.abc import Callable

import numpy as np

Records = list[dict[str, str]]

_SEED = 0
_BELOW = 100  # of what is added
_TEST = 1000


def addition() -> dict[str, Records]:
  """All sums of two numbers below 100, in an order drawn once; of the 10,000 a thousand are the split test.

  A record has `prompt` ('12+34='), `completion` ('46', a demonstration) and `answer` ('46', for who scores responses).
  Pairs are ordered, so 34+12 may be in the other split than 12+34.
  """
  order = np.argsort(np.random.default_rng(_SEED).random(_BELOW**2), kind='stable')
  records = [_sum(*divmod(int(pair), _BELOW)) for pair in order]
  return {'train': records[_TEST:], 'test': records[:_TEST]}


def _sum(a: int, b: int) -> dict[str, str]:
  return {'prompt': f'{a}+{b}=', 'completion': str(a + b), 'answer': str(a + b)}


TASKS: dict[str, Callable[[], dict[str, Records]]] = {'addition': addition}
