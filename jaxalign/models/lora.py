"""Low-rank adapters: what they are, and how a tree of parameters is split into them and their frozen base.

Adapters are parameters beside those that they adapt: `q_lora_a` and `q_lora_b` beside `q`. What is trained is the tree
of them (and of a head that scores) alone, `split` off; a model reads both, put together again by `join`. The base
without them is the model that training began with.
"""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import quant

_ATTENTION, _MLP = ('q', 'k', 'v', 'o'), ('gate', 'up', 'down')
TARGETS = _ATTENTION + _MLP
HEAD = ('score', 'score_bias')  # trained too, where a model scores
_TRAINED = re.compile('|'.join((r'.*_lora_(a|b|magnitude)', *HEAD)))


@dataclasses.dataclass(frozen=True)
class Lora:
  """What is adapted, and how: W x becomes W x + scale B A x.

  Hu et al., 2021, https://arxiv.org/abs/2106.09685, Eq. 3.

  Attributes:
    rank: r, of A `[in, r]` (uniform within 1/sqrt(in) at first, as PEFT's) and B `[r, out]` (zero at first).
    alpha: the scale is alpha / rank.
    targets: which of q, k, v, o, gate, up and down; empty for all that the model has. Experts cannot be adapted.
    dropout: share of A's inputs that are zero in a training step, the others being scaled up.
    rslora: the scale is alpha / sqrt(rank) instead. Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732, Thm. 3.2.
    dora: the columns of W + scale A B are scaled to a trained magnitude. Liu et al., 2024,
      https://arxiv.org/abs/2402.09353, Eq. 5, the norm being held constant in the gradient (Eq. 11).
    base: precision that the frozen parameters are kept in: 'float32', 'bfloat16', or '' for that of the computation;
      'int8' and 'nf4' quantise the weights of attention, feed-forward halves and experts, see `models.quant`.
    adapter: a PEFT directory to start from, which says rank, alpha, targets, rslora and dora; the reference then has
      that adapter too.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ()
  dropout: float = 0.0
  rslora: bool = False
  dora: bool = False
  base: str = ''
  adapter: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    unknown = [name for name in self.targets if name not in TARGETS]
    problem = ''
    if unknown:
      problem = f'targets: {unknown[0]!r} is none of {", ".join(TARGETS)}'
    elif self.rank < 1:
      problem = f'rank = {self.rank}: it must be at least 1'
    elif not 0 <= self.dropout < 1:
      problem = f'dropout = {self.dropout}: it is a share, from 0 to less than 1'
    elif self.alpha <= 0:
      problem = f'alpha = {self.alpha}: it must be positive'
    elif self.base not in ('', 'float32', 'bfloat16', *quant.KINDS):
      problem = f"base = {self.base!r}: it is 'float32', 'bfloat16', 'int8' or 'nf4'"
    if problem:
      raise types.UsageError(f'lora.Lora.{problem}')

  @property
  def scale(self) -> float:
    """What the product of the two matrices is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

  def of(self, config: architecture.Config) -> 'Lora':
    """The same with the targets that a model of `config` has.

    Raises:
      UsageError: a target is an expert.
    """
    if config.num_experts:
      expert = [name for name in self.targets if name in _MLP]
      if expert:
        raise types.UsageError(
            f'lora.Lora.targets: {expert[0]!r} is a matrix of experts, which cannot be adapted; choose of q, k, v, o'
        )
      return dataclasses.replace(self, targets=self.targets or _ATTENTION)
    return dataclasses.replace(self, targets=self.targets or TARGETS)


def split(params: types.PyTree) -> tuple[types.PyTree, types.PyTree]:
  """What is trained of a model with adapters (those, and a head that scores), and what is frozen."""
  flat = traverse_util.flatten_dict(params, sep='/')
  trained = {name: x for name, x in flat.items() if _TRAINED.fullmatch(name)}
  frozen = {name: x for name, x in flat.items() if name not in trained}
  return traverse_util.unflatten_dict(trained, sep='/'), traverse_util.unflatten_dict(frozen, sep='/')


def join(trained: types.PyTree, frozen: types.PyTree) -> types.PyTree:
  """One tree of both, as a model reads it; `frozen` is `{}` where everything is trained."""
  if not frozen:
    return trained
  flat = [traverse_util.flatten_dict(tree, sep='/') for tree in (frozen, trained)]
  return traverse_util.unflatten_dict(flat[0] | flat[1], sep='/')


def kept(name: str, x: types.Array, lora: Lora | None, quantise: Callable = quant.quantise) -> Any:
  """How the frozen parameter at this path is kept: as it is, or in as few bits as `lora.base` says."""
  few = lora is not None and lora.base in quant.KINDS and quant.is_quantised(name) and not quant.is_array_of(x)
  return quantise(name, x, lora.base) if lora is not None and few else x


def shrunk(params: types.PyTree, lora: Lora | None, dtype: jax.typing.DTypeLike) -> types.PyTree:
  """Parameters as they are kept, one after the other: what was read in more bits is deleted. Heads stay float32."""
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  for name, x in flat.items():
    if not _TRAINED.fullmatch(name):
      cast = x if x.dtype == jnp.dtype(dtype) else x.astype(dtype)
      flat[name] = kept(name, cast, lora)
      for old in (x, cast):
        if old is not flat[name] and not old.is_deleted():
          old.delete()
  return traverse_util.unflatten_dict(flat, sep='/')


def all_kept(frozen: types.PyTree, lora: Lora, quantise: Callable = quant.quantise) -> types.PyTree:
  """A frozen tree as it is kept."""
  flat = traverse_util.flatten_dict(frozen, sep='/')
  return traverse_util.unflatten_dict({name: kept(name, x, lora, quantise) for name, x in flat.items()}, sep='/')


def column_norms(weight, a, b, scale: float):
  """Norms `[...out]` of the columns of W + scale A B, float32, without that sum: of W, their product, and A B.

  Args:
    weight: `[in, out]`.
    a: `[in, r]`.
    b: `[r, out]`.
    scale: of the product.
  """
  dot = functools.partial(jnp.matmul, precision='highest')
  weight, a, b = (x.astype(jnp.float32) for x in (weight, a, b))
  cross = jnp.sum(dot(a.T, weight) * b, axis=0)
  own = jnp.sum(dot(dot(a.T, a), b) * b, axis=0)
  return jnp.sqrt(jnp.sum(jnp.square(weight), axis=0) + 2 * scale * cross + scale**2 * own)


def adapters(params: types.PyTree) -> dict[str, dict[str, types.Array]]:
  """The arrays of each adapter by the path of what it adapts, as 'layers/0/q': 'a', 'b' and, of DoRA, 'magnitude'."""
  found: dict[str, dict[str, types.Array]] = {}
  for name, x in traverse_util.flatten_dict(params, sep='/').items():
    path, lora, part = name.rpartition('_lora_')
    if lora:
      found.setdefault(path, {})[part] = x
  return found


def merge(params: types.PyTree, lora: Lora) -> types.PyTree:
  """Parameters of the plain model that computes the same: what is adapted or quantised in float32."""
  flat = {
      name: quant.dequantise(x, 'float32') if quant.is_array_of(x) else x
      for name, x in traverse_util.flatten_dict(params, sep='/').items()
  }
  for path, parts in adapters(params).items():
    for part in parts:
      del flat[f'{path}_lora_{part}']
    stacked = path.startswith('layers/')
    flat[path] = jax.jit(functools.partial(_merged, lora=lora, stacked=stacked))(flat[path], parts)
  return traverse_util.unflatten_dict(flat, sep='/')


def _merged(weight, parts, *, lora: Lora, stacked: bool):
  def one(weight, a, b, magnitude):
    shape = weight.shape
    rows = lambda x: x.reshape(-1, x.shape[-1])
    a, b = rows(a), b.reshape(lora.rank, -1)
    weight = weight.reshape(a.shape[0], -1).astype(jnp.float32)
    out = weight + lora.scale * jnp.matmul(a, b, precision='highest')
    if magnitude is not None:
      out = out * (magnitude.reshape(-1) / column_norms(weight, a, b, lora.scale))[None, :]
    return out.reshape(shape)

  run = jax.vmap(one) if stacked else one
  return run(weight, parts['a'], parts['b'], parts.get('magnitude'))
