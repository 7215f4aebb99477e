"""The few shapes that sampling is compiled for."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxalign import sharding

_LEAST = 32  # tokens of the smallest bucket; the next have 1.5 and 2 times as many, and so on, so that programs are few
_TOGETHER = 16384  # tokens of prompts that are read at once


def bucket(count: int) -> int:
  """The size, of few, that holds so many tokens."""
  size = _LEAST
  while size < count:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


class Sizes(NamedTuple):
  """The shapes that a call of `sample` compiles for.

  Attributes:
    rows: responses that are written at once.
    together: prompts that are read at once.
    longest: slots of the longest prompt of each model.
    new: slots of what is written.
    most: slots of keys and values of each model, when all is written.
  """

  rows: int
  together: int
  longest: tuple[int, ...]
  new: int
  most: tuple[int, ...]

  @classmethod
  def of(cls, lengths: Sequence[int], limits: Sequence[int], n: int, rows: int) -> 'Sizes':
    """Of the longest prompts of each model, the limits of each prompt, and `n` and `rows` of `sample`."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else sharding.parts(mesh, 'batch')
    up = lambda count: -(-count // parts) * parts
    size = up(min(rows, 1 << (len(limits) * n - 1).bit_length()))
    longest = tuple(map(bucket, lengths))
    together = up(min(len(limits), -(-size // n), max(1, _TOGETHER // max(longest))))
    new = -(-max(limits) // _LEAST) * _LEAST
    return cls(size, together, longest, new, tuple(length + new for length in longest))
