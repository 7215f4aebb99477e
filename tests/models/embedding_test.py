"""The look-up of embeddings, against NumPy, on meshes that split table and tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.models import embedding

V, D, B, T = 24, 16, 8, 6
MESHES = ('', 'fsdp:8', 'data:2,fsdp:2,tensor:2', 'fsdp:2,tensor:2,context:2', 'data:2,fsdp:2,expert:2', 'tensor:8')


def data():
  rng = np.random.default_rng(0)
  table_VD, weight_BTD = (rng.normal(size=shape).astype(np.float32) for shape in ((V, D), (B, T, D)))
  return table_VD, rng.integers(0, V, (B, T)).astype(np.int32), weight_BTD


def looked_up(mesh_text, dtype=jnp.float32, ids_BT=None):
  """Rows, the gradient of their weighted sum, and the compiled text of both."""
  mesh = sharding.make_mesh(mesh_text, devices=None if mesh_text else jax.devices()[:1])
  table_VD, ids, weight_BTD = data()
  ids_BT = ids if ids_BT is None else ids_BT
  weight_BTD = weight_BTD[:, : ids_BT.shape[1]]
  where = sharding.named(mesh, 'vocab', 'embed')

  def total(table_VD, ids_BT):
    found = embedding.look_up(dtype, table_VD, ids_BT)
    return jnp.sum(found.astype(jnp.float32) * weight_BTD), found

  with jax.set_mesh(mesh):
    places = (where, sharding.named(mesh, 'batch', None))
    run = jax.jit(jax.grad(total, has_aux=True), in_shardings=places, out_shardings=(where, None))
    slope, found = run(table_VD, ids_BT)
    text = run.lower(table_VD, ids_BT).compile().as_text()
  return np.asarray(found, np.float32), np.asarray(slope), text


class TestLookUp:

  @pytest.mark.parametrize('length', [T, 1], ids=['rows', 'a token a row'])
  @pytest.mark.parametrize('mesh', MESHES)
  def test_gives_rows_and_their_gradient_on_any_mesh(self, mesh, length):
    table_VD, ids_BT, weight_BTD = data()
    ids_BT = ids_BT[:, :length]
    found, slope, _ = looked_up(mesh, ids_BT=ids_BT)
    np.testing.assert_array_equal(found, table_VD[ids_BT])
    wanted = np.zeros((V, D))
    np.add.at(wanted, ids_BT, weight_BTD[:, :length].astype(np.float64))
    np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize('mesh', ['fsdp:8', 'data:2,fsdp:2,tensor:2'])
  def test_exchanges_rows_in_16_bits_and_gathers_no_table(self, mesh):
    found, _, text = looked_up(mesh, jnp.bfloat16)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(data()[0])[data()[1]].astype(jnp.bfloat16), np.float32))
    exchanged = [line for line in text.splitlines() if re.search(r' all-to-all(-start)?\(', line)]
    assert exchanged and 's32' not in ''.join(exchanged)
    gathered = [line for line in text.splitlines() if re.search(r' all-gather(-start)?\(', line)]
    assert gathered and not [line for line in gathered if re.search(r'(f32|bf16)\[', line)]

  def test_reads_rows_that_a_mesh_does_not_divide(self):
    ids_BT = np.array([[1, 2, 3]] * 3, np.int32)
    mesh = sharding.make_mesh('fsdp:8')
    with jax.set_mesh(mesh):
      found = jax.jit(lambda table: embedding.look_up(jnp.float32, table, ids_BT))(data()[0])
    np.testing.assert_array_equal(found, data()[0][ids_BT])

  def test_sums_the_gradient_of_a_frequent_token_exactly_in_bfloat16(self):
    table = jnp.ones((4, 8))
    many = np.zeros((1, 4096), np.int32)
    total = lambda table: jnp.sum(embedding.look_up(jnp.bfloat16, table, many).astype(jnp.float32))
    # A 16-bit sum of ones stops at 256.
    np.testing.assert_array_equal(jax.grad(total)(table)[0], 4096)
