"""Grouped products against one product after the other, the kernels' programs run by XLA."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.models import grouped

D, F = 256, 128
# Rows of each group: with borders within tiles, none, in the middle and at the end; rows of no group behind.
SIZES = {'uneven': (100, 0, 60, 70), 'whole': (128, 64, 32, 160), 'none': (0, 0, 0, 0), 'all': (0, 384, 0, 0)}


def arrays(rows):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return normal(rows, D), normal(4, D, F), normal(rows, F)


def formula(x, w, sizes, d):
  """The product, and the gradients of x and w where d is that of the product, in float64."""
  x, w, d = (one.astype(np.float64) for one in (x, w, d))
  out, dx, dw = np.zeros(d.shape), np.zeros(x.shape), np.zeros(w.shape)
  for e, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes)):
    own = slice(start, start + size)
    out[own], dx[own], dw[e] = x[own] @ w[e], d[own] @ w[e].T, x[own].T @ d[own]
  return out, dx, dw


def run(name, x, w, sizes, d):
  """The same by a kernel; rows of no group may be anything."""
  product = functools.partial(grouped.product, name, usual=len(x))
  out, back = jax.vjp(lambda x, w: product(x, w, jnp.array(sizes, jnp.int32)), x, w)
  dx, dw = back(jnp.asarray(d))
  grouped_rows = np.arange(len(x))[:, None] < sum(sizes)
  return np.where(grouped_rows, out, 0), np.where(grouped_rows, dx, 0), dw


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(grouped, '_megablox', functools.partial(grouped._megablox, interpret=True))


@pytest.mark.usefixtures('interpreted')
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('name', grouped.KERNELS)
class TestProduct:

  def test_and_its_gradients_are_those_of_each_group(self, name, sizes):
    args = arrays(384)
    x, w, d = args
    for found, wanted in zip(run(name, x, w, sizes, d), formula(x, w, sizes, d)):
      np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


class TestTiles:

  def test_divide_what_they_are_of(self):
    assert grouped._Tiles(256)(4096, 4096, 14336) == (256, 1024, 1024)
    assert grouped._Tiles(256)(4096, 768, 2048) == (256, 768, 1024)
    assert grouped._Tiles(128)(4096, 3584, 1280) == (128, 896, 640)

  @pytest.mark.parametrize('name,rows,wanted', [('megablox', 1, 128), ('megablox', 256, 256), ('ragged_dot', 3, 3)])
  def test_take_whole_ones_alone(self, name, rows, wanted):
    assert grouped.rounded(name, rows) == wanted


class TestOneGroup:

  def test_is_multiplied_row_by_row(self):
    rng = np.random.default_rng(2)
    x, w, d = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 5), (1, 5, 3), (6, 3)))
    x[4:] = np.nan  # of no group
    run = lambda x, w: grouped.product('ragged_dot', x, w, jnp.array([4]), 4)
    found, back = jax.vjp(run, x, w)
    np.testing.assert_allclose(found[:4], x[:4] @ w[0], rtol=1e-5)
    d[4:] = np.nan
    d_x, d_w = back(jnp.asarray(d))
    np.testing.assert_allclose(d_x[:4], d[:4] @ w[0].T, rtol=1e-5)
    np.testing.assert_allclose(d_w[0], x[:4].T @ d[:4], rtol=1e-5)


def mesh_of(platform, **sizes):
  """A stand-in for a mesh of devices that this machine lacks."""
  device = types.SimpleNamespace(platform=platform)
  return types.SimpleNamespace(devices=np.array([device]), shape=dict.fromkeys(sharding.AXES, 1) | sizes)


class TestPick:

  @pytest.mark.parametrize(
      'platform,dtype,sizes,inner,outer,wanted',
      [
          ('tpu', 'bfloat16', {}, 4096, 14336, 'megablox'),
          ('tpu', 'bfloat16', {'tensor': 4}, 4096, 14336, 'megablox'),
          ('tpu', 'bfloat16', {'tensor': 4, 'fsdp': 2}, 2048, 768, 'ragged_dot'),  # 192 columns on each device
          ('tpu', 'bfloat16', {}, 2000, 768, 'ragged_dot'),
          ('tpu', 'float16', {}, 4096, 14336, 'ragged_dot'),
          ('tpu', 'float32', {}, 4096, 14336, 'ragged_dot'),
          ('gpu', 'bfloat16', {}, 4096, 14336, 'ragged_dot'),
          ('cpu', 'bfloat16', {}, 4096, 14336, 'ragged_dot'),
      ],
  )
  def test_takes_the_kernel_that_the_program_can_run(self, caplog, platform, dtype, sizes, inner, outer, wanted):
    with caplog.at_level('INFO', logger='absl'):
      assert grouped.pick(mesh_of(platform, **sizes), dtype, inner=inner, outer=outer) == wanted
    assert f'experts: {wanted} (' in caplog.text
