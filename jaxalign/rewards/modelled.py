"""Rewards that are models: how `--reward` names them, and which numbers make one of what they say."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import os
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxalign import storage
from jaxalign import types
from jaxalign.rewards import ensembles

# One number of those of a response's steps.
REDUCE: dict[str, Callable[[np.ndarray], float]] = {
    'min': lambda steps: float(steps.min()),
    'mean': lambda steps: float(steps.mean()),
    'last': lambda steps: float(steps[-1]),
    'product': lambda steps: float(steps.prod()),
}
_DTYPES = ('float32', 'bfloat16', 'float16')


class Scoring(NamedTuple):
  """What the recipe of a model's own run says of how it scores responses, see `recipe.Recipe`."""

  scored_fn: Callable | None
  combine_fn: Callable | None


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that judges responses, or several whose scores make one.

  Attributes:
    name: what it is called in messages and metrics.
    directories: of the models: checkpoints, or Hugging Face directories.
    weight: in the sum.
    beta: what log-ratios to the reference are multiplied by, 1 where it is None; for a policy.
    reduce: a key of `REDUCE`, 'min' where it is None; for a model that judges steps.
    output: which output of a head of several counts.
    dtype: of parameters and computation; None for those of the model.
    mesh: as `--mesh`, where the model lies on other axes of the same devices than the policy; None for the policy's.
    how: see `ensembles.combine`; None for one model.
    penalty: see `ensembles.combine`.
    centre: whether each model's mean is taken from its scores first, see `ensembles.centred`.
  """

  name: str
  directories: tuple[str, ...]
  weight: float = 1.0
  beta: float | None = None
  reduce: str | None = None
  output: int | None = None
  dtype: str | None = None
  mesh: str | None = None
  how: str | None = None
  penalty: float = 1.0
  centre: bool = False

  @property
  def title(self) -> str:
    """The last part of each directory, for names of metrics."""
    return '+'.join(os.path.basename(os.path.abspath(one)) for one in self.directories)


def of(
    path: str, options: Mapping[str, Any], name: str, weight: float, fail: Callable[[str], types.UsageError], form: str
) -> Model:
  """The models in a directory, or in several with a + between them.

  Args:
    path: the directories.
    options: those of `Model` but for its first three.
    name: of the reward.
    weight: of the reward.
    fail: makes an error of a problem.
    form: how rewards are written.

  Raises:
    UsageError: there is no such directory, or no such option, or an option has no such value.
  """
  with storage.naming(path):
    directories = (path,) if storage.path(path).is_dir() else tuple(path.split('+'))
    absent = [one for one in directories if not storage.path(one).is_dir()]
  if absent:
    raise fail(f'there is no directory {absent[0]}; {form}')
  known = [field.name for field in dataclasses.fields(Model)][3:]
  for option in options:
    if option not in known:
      raise fail(f'a model has no option {option}; it has {", ".join(known)}')
  model = Model(name, directories, weight, **options)
  number = lambda value: type(value) in (int, float) and math.isfinite(value)
  for option, is_fine, wanted in (
      ('beta', model.beta is None or number(model.beta), 'a number'),
      ('reduce', model.reduce in (None, *REDUCE), f'one of {", ".join(REDUCE)}'),
      ('output', model.output is None or type(model.output) is int and model.output >= 0, 'a whole number from 0 on'),
      ('dtype', model.dtype in (None, *_DTYPES), f'one of {", ".join(_DTYPES)}'),
      ('mesh', model.mesh is None or type(model.mesh) is str and model.mesh, 'sizes of axes, as for --mesh'),
      ('how', model.how in (None, *ensembles.HOW), f'one of {", ".join(ensembles.HOW)}'),
      ('penalty', number(model.penalty) and model.penalty >= 0, 'a number from 0 on'),
      ('centre', type(model.centre) is bool, 'True or False'),
  ):
    if not is_fine:
      raise fail(f'{option}={options[option]!r}: it is {wanted}')
  of_several = [option for option in ('how', 'penalty', 'centre') if option in options]
  if len(directories) == 1 and of_several:
    raise fail(f'{of_several[0]} is of several models, A+B')
  if 'penalty' in options and model.how != 'uncertainty':
    raise fail("penalty is of how='uncertainty'")
  return model if len(directories) == 1 else dataclasses.replace(model, how=model.how or 'mean')
