"""Learning-rate schedules and one optax chain, in reading order."""

from collections.abc import Callable
import operator
import re
from typing import NamedTuple

import jax
import optax

from jaxalign import moments as moments_lib
from jaxalign import types

Schedule = Callable[[types.Array], types.Array]


MEMORIES = ('device', 'pinned_host')


class Optimizer(NamedTuple):
  """A gradient transformation, the schedule inside it, which is logged, and where moments are kept between steps."""

  tx: optax.GradientTransformation
  schedule: Schedule
  memory: str = 'device'


def linear(steps: int, *, lr: float, warmup: float = 0.1) -> Schedule:
  """Rises linearly to `lr` over a share `warmup` of `steps`, then falls linearly to 0."""
  rise = max(1, round(warmup * steps))
  return optax.join_schedules(
      [optax.linear_schedule(lr / rise, lr, rise - 1 or 1), optax.linear_schedule(lr, 0.0, max(1, steps - rise))],
      [rise],
  )


def cosine(steps: int, *, lr: float, warmup: float = 0.1, end: float = 0.1) -> Schedule:
  """Rises linearly to `lr` over a share `warmup` of `steps`, then falls along a cosine to `end * lr`."""
  rise = max(1, round(warmup * steps))
  return optax.warmup_cosine_decay_schedule(lr / rise, lr, rise, max(steps, rise + 1), end * lr)


def constant(steps: int, *, lr: float, warmup: float = 0.0) -> Schedule:
  """Rises linearly to `lr` over a share `warmup` of `steps` and stays there."""
  rise = round(warmup * steps)
  if not rise:
    return optax.constant_schedule(lr)
  return optax.join_schedules([optax.linear_schedule(lr / rise, lr, rise), optax.constant_schedule(lr)], [rise])


def adamw(
    steps: int,
    *,
    schedule: Callable[[int], Schedule],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    moments: str = 'float32',
    memory: str = 'device',
) -> Optimizer:
  """AdamW after clipping by the global norm.

  Args:
    steps: optimizer steps of the whole run.
    schedule: makes the learning rate from `steps` (`linear`, `cosine`, `constant`).
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, scaled by the learning rate; never on norms, biases and other vectors.
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
    moments: how they are kept between steps, see `moments`: 'float32', 8 bytes a parameter, 'bfloat16', 4, or 'int8', 2
      and 8 for each row of a matrix. Those of norms, biases and parameters below 4,096 numbers are float32.
    memory: where they are kept between steps: 'device', or 'pinned_host', from where those of one layer or matrix after
      the other come to the device and go back. Not for 'int8', which the TPU compiler cannot move.

  Raises:
    UsageError: there is no such way or memory.

  References:
    Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, Alg. 2.
  """
  if moments not in moments_lib.KINDS:
    raise types.UsageError(f'optim.adamw.moments = {moments!r}: it is one of {", ".join(moments_lib.KINDS)}')
  if memory not in MEMORIES:
    raise types.UsageError(f'optim.adamw.memory = {memory!r}: it is one of {", ".join(MEMORIES)}')
  if memory != 'device' and moments == 'int8':
    raise types.UsageError(f"optim.adamw.memory = {memory!r}: with moments 'float32' or 'bfloat16', not 'int8'")
  rate = schedule(steps)
  stacks = None if memory == 'device' else stacked
  vectors = lambda params: jax.tree.map(operator.not_, decayed(params))
  tx = optax.chain(
      optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
      moments_lib.scale_by_adam(b1, b2, eps, kind=moments, is_wide=vectors, is_stacked=stacks),
      optax.add_decayed_weights(weight_decay, mask=decayed),
      optax.scale_by_learning_rate(rate),
  )
  return Optimizer(tx, rate, memory)


def decayed(params: types.PyTree) -> types.PyTree:
  """True for the parameters that weight decay applies to: all but norms and biases, which their names tell."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(r'norm|bias', _name(path)), params)


def stacked(params: types.PyTree) -> types.PyTree:
  """True for the parameters that are a stack of layers, which their names tell."""
  return jax.tree_util.tree_map_with_path(lambda path, _: 'layers' in _name(path).split('/'), params)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/').lower()
