"""Products of rows with the matrices of their groups, by the kernel that suits the platform a program is compiled for.

ragged_dot  XLA's; anywhere. It multiplies every row with every matrix, and masks
megablox    Pallas kernels, forward and backward, that skip rows of other groups; TPUs, bfloat16
"""

from typing import NamedTuple

from absl import logging
import jax
from jax.experimental.pallas.ops.tpu import megablox
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types

KERNELS = ('ragged_dot', 'megablox')
_ROWS = (512, 256, 128)  # of a tile
_WIDTH = 1024  # most columns of a tile; 512 x 1024 x 1024 fits the memory of a chip's core, v5e's too
_LANES = 128


def pick(mesh: jax.sharding.Mesh, dtype: jax.typing.DTypeLike, *, inner: int, outer: int) -> str:
  """The kernel for programs on `mesh`, whose platform need not be the local one; logs it with the reason.

  Args:
    mesh: of the program.
    dtype: of rows and matrices.
    inner: D, the width of the model.
    outer: F, the width of each expert, of the whole mesh.
  """
  platform = sharding.platform_of(mesh)
  name, reason = 'ragged_dot', f'the platform is {platform}'
  if platform == 'tpu':
    local = outer // sharding.parts(mesh, 'mlp')
    if jnp.dtype(dtype) != jnp.bfloat16 or inner % _LANES or local % _LANES:
      reason = (
          f'megablox wants bfloat16 (here {jnp.dtype(dtype).name}), widths in multiples of {_LANES} (here {inner}, and'
          f' {local} per device)'
      )
    else:
      name = 'megablox'
  logging.info('experts: %s (%s)', name, reason)
  return name


def rounded(name: str, rows: int) -> int:
  """The least number of rows, not below this one, that a kernel takes."""
  unit = _ROWS[-1] if name == 'megablox' else 1
  return -(-rows // unit) * unit


def product(name: str, x_RD: types.Array, w_EDF: types.Array, sizes_E: types.Array, usual: int) -> types.Array:
  """Row r times the matrix of its group: out[r] = x[r] w[e].

  Rows behind the last group are of no group: what is said of them, and their gradient, may be anything, even NaN. They
  add nothing to gradients of matrices.

  Args:
    name: one of KERNELS.
    x_RD: rows, those of a group together, groups in order; as many as `rounded` says.
    w_EDF: a matrix for each group.
    sizes_E: int32, rows of each group.
    usual: rows that groups have in all on average, which a plan counts (`planning.hlo.kernel_flops`).
  """
  if name == 'megablox':
    return _megablox(x_RD, w_EDF, sizes_E, usual)
  if len(w_EDF) == 1:  # of which libtpu compiles no ragged_dot for v5e
    is_own_R1 = jnp.arange(len(x_RD))[:, None] < sizes_E[0]
    product_RF = jnp.matmul(jnp.where(is_own_R1, x_RD, 0), w_EDF[0], precision=types.precision(x_RD))
    return jnp.where(is_own_R1, product_RF, 0)
  return jax.lax.ragged_dot(x_RD, w_EDF, sizes_E, precision=types.precision(x_RD))


class _Tiles(NamedTuple):
  """Sizes of tiles for a product of [m, k] and [k, n]; the kernels call it forward and backward."""

  rows: int

  def __call__(self, m: int, k: int, n: int) -> tuple[int, int, int]:
    fitting = lambda size: max((part for part in range(_LANES, _WIDTH + 1, _LANES) if size % part == 0), default=size)
    return self.rows, fitting(k), fitting(n)


def _megablox(x_RD, w_EDF, sizes_E, usual: int, interpret: bool = False):
  rows, groups = len(x_RD), len(w_EDF)
  # A tile where two groups meet is computed for both.
  fits = (size for size in _ROWS if rows % size == 0 and usual >= 2 * size * groups)
  tiles = _Tiles(next(fits, _ROWS[-1]))
  with jax.named_scope(f'usual_{usual}_rows'):
    return megablox.gmm(x_RD, w_EDF, sizes_E, x_RD.dtype, tiles, None, None, False, interpret)
