"""Weights in few bits: their levels and errors by formula, what is quantised, and the way to disk and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.models import architecture
from jaxalign.models import lora as lora_lib
from jaxalign.models import quant
from jaxalign.models import transformer

# Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, App. E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
CONFIG = architecture.Config(50, 3, 128, 4, 2, 32, 192, 64, pattern=('local', 'global'), window=5)
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
IDS = np.random.default_rng(0).integers(0, 50, (4, 12)).astype(np.int32)


def weight(*shape):
  return jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32), sharding.named(ONE))


def apply(model, params):
  positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)
  return jax.jit(model.apply)({'params': params}, IDS, positions, np.ones_like(IDS))


class TestQuantise:

  # The shape of a stack of weights, inputs in front, and how many inputs share a scale.
  @pytest.mark.parametrize('name,shape,axis', [('layers/0/q', (2, 128, 4, 8), 1), ('rest/0/o', (4, 64, 6), 1)])
  def test_to_nf4_takes_the_nearest_level_of_every_block_of_64(self, name, shape, axis):
    w = weight(*shape)
    found = np.asarray(quant.dequantise(quant.quantise(name, w, 'nf4'), 'float32'))
    w = np.asarray(w)
    blocks = np.moveaxis(w, axis, -1).reshape(-1, 64).astype(np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = NF4[np.abs(blocks[..., None] / largest[..., None] - NF4).argmin(-1)] * largest
    np.testing.assert_allclose(np.moveaxis(found, axis, -1).reshape(-1, 64), nearest, atol=1e-5)

  @pytest.mark.parametrize('name,shape,outputs', [('layers/0/k', (2, 128, 4, 8), 2), ('layers/0/down', (2, 96, 6), 1)])
  def test_to_int8_rounds_to_a_127th_of_the_largest_of_an_output(self, name, shape, outputs):
    w = weight(*shape)
    x = quant.quantise(name, w, 'int8')
    w = np.asarray(w)
    assert x.qvalue.dtype == np.int8
    assert x.scale.shape == (2, 1, *shape[-outputs:])
    error = np.abs(np.asarray(quant.dequantise(x, 'float32')) - w)
    half = np.abs(w).max(axis=1, keepdims=True) / 127 / 2
    assert (error <= half * 1.02).all()
    assert error.max() > 0.5 * half.min()

  def test_leaves_all_but_large_weights(self):
    names = ('layers/0/q', 'rest/1/down', 'layers/0/q_bias', 'layers/0/attn_norm', 'layers/0/router', 'embed', 'head')
    assert [quant.is_quantised(name) for name in names] == [True, True] + [False] * 5


class TestPart:

  @pytest.mark.parametrize('kind', quant.KINDS)
  @pytest.mark.parametrize('mesh', ['fsdp:2,tensor:2,data:2', 'tensor:8', 'fsdp:8'])
  @pytest.mark.parametrize(
      'name,shape,axes',
      [
          ('layers/0/q', (128, 8, 8), ('embed', 'heads', 'head_size')),
          ('layers/0/o', (8, 64, 128), ('heads', 'head_size', 'embed')),
          ('layers/0/down', (192, 128), ('mlp', 'embed')),  # 3 blocks of inputs, which not every mesh divides
      ],
  )
  def test_of_all_devices_is_the_weight(self, kind, mesh, name, shape, axes):
    mesh = sharding.make_mesh(mesh)
    x = jax.device_put(np.asarray(weight(*shape)), sharding.named(mesh, *axes))
    kept = quant.quantise(name, x, kind)
    with jax.set_mesh(mesh):
      found = jax.jit(lambda kept: quant.part(kept, jnp.float32, axes))(kept)
    np.testing.assert_array_equal(found, quant.dequantise(kept, jnp.float32))


class TestAbstract:

  @pytest.mark.parametrize('kind', quant.KINDS)
  @pytest.mark.parametrize('mesh', ['', 'fsdp:2,tensor:2,data:2'])
  def test_is_what_a_model_is_read_as(self, kind, mesh):
    mesh = sharding.make_mesh(mesh, devices=jax.devices() if mesh else jax.devices()[:1])
    model = transformer.build(CONFIG, mesh, lora=lora_lib.Lora(base=kind), length=32)
    wanted = lora_lib.split(transformer.abstract_params(model, mesh))[1]
    plain = transformer.init_params(transformer.without_adapters(model), jax.random.key(0), mesh)
    found = lora_lib.all_kept(plain, model.lora)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
      assert (x.shape, x.dtype) == (like.shape, like.dtype)
      assert like.sharding.shard_shape(like.shape)
    if mesh.size > 1:
      assert found['layers']['0']['q'].qvalue.sharding.is_equivalent_to(wanted['layers']['0']['q'].qvalue.sharding, 4)

  @pytest.mark.parametrize('kind', quant.KINDS)
  def test_comes_back_from_disk(self, kind):
    tree = {'q': quant.quantise('q', weight(64, 2, 4), kind), 'norm': jnp.ones(3)}
    stored = quant.to_disk(tree)
    assert {x.dtype for x in jax.tree.leaves(stored)} <= {np.dtype(t) for t in ('int8', 'uint8', 'float32')}
    again = quant.from_disk(stored, jax.eval_shape(lambda: tree))
    assert again['q'].qvalue.dtype == tree['q'].qvalue.dtype
    jax.tree.map(np.testing.assert_array_equal, again, tree)


class TestModel:

  @pytest.mark.parametrize('kind,error', [('int8', 0.02), ('nf4', 0.2)])
  def test_computes_with_what_the_bits_stand_for_also_under_scan(self, kind, error):
    model = transformer.build(CONFIG, ONE, lora=lora_lib.Lora(rank=2, base=kind), length=32)
    plain = transformer.init_params(transformer.without_adapters(model), jax.random.key(0), ONE)
    plain |= {'embed': 50 * plain['embed']}
    few = lora_lib.all_kept(plain, model.lora)
    adapters = transformer.init_adapters(model, jax.random.key(1), few, ONE)
    found = apply(model, lora_lib.join(adapters, few))
    meant = lora_lib.merge(lora_lib.join(adapters, few), model.lora)
    np.testing.assert_allclose(found, apply(transformer.without_adapters(model), meant), atol=1e-5)
    exact = np.asarray(apply(transformer.without_adapters(model), plain))
    assert 1e-4 < np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < error
