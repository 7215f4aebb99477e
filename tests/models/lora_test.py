"""Adapters: what they add, how they begin, how they are merged, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer

# Three layers of a pattern of two: one repetition is scanned, one layer is left.
CONFIG = architecture.Config(50, 3, 16, 4, 2, 4, 24, 64, pattern=('local', 'global'), window=5)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
ALL = {
    'layers': {'q': (16, 4, 4), 'k': (16, 2, 4), 'v': (16, 2, 4), 'o': (4, 4, 16)},
    'mlp': {'gate': (16, 24), 'up': (16, 24), 'down': (24, 16)},
}
WEIGHTS = np.random.default_rng(1).standard_normal((4, 12, 16)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 50, (4, 12)).astype(np.int32)


def build(mesh=MESH, config=CONFIG, dtype='float32', **options):
  lora = lora_lib.Lora(**({'rank': 3, 'alpha': 6.0} | options))
  return transformer.build(config, mesh, dtype=dtype, lora=lora, length=32)


@functools.lru_cache
def base_of():
  """Parameters with embeddings near 1, whose rounding the norms need not amplify."""
  params = transformer.init_params(transformer.build(CONFIG, MESH, length=32), jax.random.key(0), MESH)
  return params | {'embed': 50 * params['embed']}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, key=None):
  positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)
  rngs = {} if key is None else {'dropout': key}
  return model.apply({'params': params}, IDS, positions, np.ones_like(IDS), rngs=rngs)


def moved(adapters, size=0.3):
  """Adapters as training might leave them."""
  leaves, tree = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  return jax.tree.unflatten(tree, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@functools.lru_cache
def first(model):
  return transformer.init_adapters(model, jax.random.key(1), base_of(), MESH)


def with_adapters(model, move=True):
  return lora_lib.join(moved(first(model)) if move else first(model), base_of())


class TestLora:

  @pytest.mark.parametrize(
      'options,said',
      [
          ({'rank': 0}, 'rank = 0: it must be at least 1'),
          ({'alpha': 0.0}, 'alpha = 0.0: it must be positive'),
          ({'dropout': 1.0}, 'dropout = 1.0: it is a share'),
          ({'targets': ('q', 'embed')}, "targets: 'embed' is none of q, k, v, o, gate, up, down"),
          ({'base': 'float16'}, "base = 'float16': it is"),
      ],
  )
  def test_refuses_what_cannot_be(self, options, said):
    with pytest.raises(types.UsageError, match=f'lora.Lora.{said}'):
      lora_lib.Lora(**options)

  def test_scales_by_the_rank_or_its_root(self):
    assert lora_lib.Lora(rank=16, alpha=32.0).scale == 2
    assert lora_lib.Lora(rank=16, alpha=32.0, rslora=True).scale == 8

  def test_takes_all_that_a_model_has_but_no_experts(self):
    experts = dataclasses.replace(CONFIG, num_experts=4)
    assert lora_lib.Lora().of(CONFIG).targets == ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
    assert lora_lib.Lora().of(experts).targets == ('q', 'k', 'v', 'o')
    assert lora_lib.Lora(targets=('up',)).of(CONFIG).targets == ('up',)
    with pytest.raises(types.UsageError, match="'up' is a matrix of experts, which cannot be adapted"):
      lora_lib.Lora(targets=('q', 'up')).of(experts)


class TestFirstAdapters:

  @pytest.mark.parametrize('options', [{}, {'rslora': True}, {'dropout': 0.5}, {'targets': ('q', 'down')}])
  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_change_no_bit(self, options, dtype):
    model = build(dtype=dtype, **options)
    params = with_adapters(model, move=False)
    key = jax.random.key(2) if model.lora.dropout else None
    wanted = apply(transformer.without_adapters(model), base_of())
    np.testing.assert_array_equal(np.asarray(apply(model, params, key)), np.asarray(wanted))

  @pytest.mark.parametrize('dtype,near', [('float32', 3e-6), ('bfloat16', 0)])
  def test_with_a_magnitude_change_nothing(self, dtype, near):
    model = build(dtype=dtype, dora=True)
    wanted = apply(transformer.without_adapters(model), base_of())
    found = apply(model, with_adapters(model, move=False))
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=near)

  def test_are_uniform_and_zero_in_the_shapes_of_what_they_adapt(self):
    model = build(rank=200)
    adapters = first(model)
    assert set(adapters) == {'layers', 'rest'}
    block = adapters['rest']['0']
    for name, shape in (ALL['layers'] | ALL['mlp']).items():
      ins = 2 if name == 'o' else 1
      a, b = block[f'{name}_lora_a'], block[f'{name}_lora_b']
      assert (a.shape, b.shape) == ((*shape[:ins], 200), (200, *shape[ins:]))
      bound = np.prod(shape[:ins]) ** -0.5
      assert 0.95 * bound < np.abs(a).max() <= bound
      np.testing.assert_allclose(np.std(a), bound / 3**0.5, rtol=0.1)
      assert not np.any(b)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {np.dtype('float32')}

  def test_do_not_depend_on_the_mesh_and_lie_as_what_they_adapt(self):
    mesh = sharding.make_mesh('fsdp:2,tensor:2,data:2')
    model = build(mesh, dora=True)
    other = jax.device_put(
        base_of(),
        jax.tree.map(lambda x: x.sharding, transformer.abstract_params(transformer.without_adapters(model), mesh)),
    )
    found = transformer.init_adapters(model, jax.random.key(1), other, mesh)
    alone = first(build(dora=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.device_get(found), jax.device_get(alone))
    block = found['layers']['0']
    assert block['q_lora_a'].sharding == sharding.named(mesh, 'layers', 'embed', 'rank')
    assert block['q_lora_b'].sharding == sharding.named(mesh, 'layers', 'rank', 'heads', 'head_size')
    assert block['down_lora_a'].sharding == sharding.named(mesh, 'layers', 'mlp', 'rank')

  def test_of_a_reward_model_have_a_head_of_zeros(self):
    config = dataclasses.replace(CONFIG, score_outputs=1)
    adapters = first(build(config=config))
    assert adapters['score'].shape == (16, 1)
    assert not np.any(adapters['score'])


class TestSplit:

  def test_is_undone_by_join(self):
    params = with_adapters(build(dora=True)) | {'score': np.ones((16, 1))}
    trained, frozen = lora_lib.split(params)
    assert set(trained) == {'layers', 'rest', 'score'}
    jax.tree.map(np.testing.assert_array_equal, frozen, base_of())
    jax.tree.map(np.testing.assert_array_equal, lora_lib.join(trained, frozen), params)
    assert lora_lib.join(trained, {}) is trained


class TestBase:

  @pytest.mark.parametrize('dtype,base,kept', [('bfloat16', '', 'bfloat16'), ('bfloat16', 'float32', 'float32')])
  def test_is_kept_in_the_precision_of_the_computation_or_another(self, dtype, base, kept):
    trained, frozen = lora_lib.split(transformer.abstract_params(build(dtype=dtype, base=base), MESH))
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {np.dtype(kept)}
    assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype('float32')}


class TestMerge:

  @pytest.mark.usefixtures('optimised')
  @pytest.mark.parametrize('options', [{}, {'rslora': True}, {'dora': True}, {'targets': ('k', 'o', 'gate')}])
  def test_computes_what_the_adapters_do(self, options):
    model = build(**options)
    params = with_adapters(model)
    merged = lora_lib.merge(params, model.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base_of())
    found = apply(transformer.without_adapters(model), merged)
    # Another order of float32 sums, by another instruction set too: relative to the largest logit.
    np.testing.assert_allclose(found, apply(model, params), atol=1e-5 * np.abs(found).max())
    assert np.abs(found - apply(transformer.without_adapters(model), base_of())).max() > 0.1

  @pytest.mark.parametrize('name,ins', [('q', 1), ('o', 2), ('down', 1)])
  def test_adds_the_scaled_product(self, name, ins):
    model = build()
    params = with_adapters(model)
    block, layer = params['layers']['1'], 0
    a, b = (np.asarray(block[f'{name}_lora_{part}'][layer], np.float64) for part in 'ab')
    wanted = np.asarray(block[name][layer], np.float64) + 6 / 3 * np.tensordot(a, b, 1)
    assert a.ndim == ins + 1
    found = lora_lib.merge(params, model.lora)['layers']['1'][name][layer]
    np.testing.assert_allclose(found, wanted, atol=1e-6)

  def test_gives_columns_the_length_of_their_magnitude(self):
    model = build(dora=True)
    params = with_adapters(model)
    merged = lora_lib.merge(params, model.lora)['rest']['0']
    magnitude = np.abs(params['rest']['0']['o_lora_magnitude'])
    np.testing.assert_allclose(np.linalg.norm(merged['o'], axis=(0, 1)), magnitude, rtol=1e-5)

  def test_takes_a_base_in_bfloat16(self):
    model = build(dtype='bfloat16')
    trained, base = lora_lib.split(with_adapters(model))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = lora_lib.merge(lora_lib.join(trained, base), model.lora)
    assert merged['rest']['0']['q'].dtype == np.dtype('float32')
    assert merged['embed'].dtype == np.dtype('bfloat16')


class TestColumnNorms:

  def test_are_those_of_the_sum(self):
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((20, 6), (20, 3), (3, 6)))
    wanted = np.linalg.norm(w.astype(np.float64) + 0.7 * a.astype(np.float64) @ b, axis=0)
    np.testing.assert_allclose(lora_lib.column_norms(w, a, b, 0.7), wanted, rtol=1e-5)


class TestGradient:

  def total(self, model, base):
    return lambda trained: jnp.sum(apply(model, lora_lib.join(trained, base)) * WEIGHTS)

  def test_reaches_b_at_first_and_then_both(self):
    model = build()
    grads = jax.grad(self.total(model, base_of()))(first(model))['layers']['0']
    assert not np.any(grads['q_lora_a'])
    assert np.abs(grads['q_lora_b']).max() > 1e-3
    later = jax.grad(self.total(model, base_of()))(moved(first(model)))
    assert all(np.any(x) for x in jax.tree.leaves(later))

  def test_holds_the_norm_of_dora_constant(self):
    model = build(dora=True, targets=('down',))
    trained, base = lora_lib.split(with_adapters(model))
    block = dict(trained['rest']['0'])
    fixed = lora_lib.column_norms(base['rest']['0']['down'], block['down_lora_a'], block['down_lora_b'], 2.0)

    def plain(b):
      w = base['rest']['0']['down'] + 2.0 * block['down_lora_a'] @ b
      merged = lora_lib.merge(lora_lib.join({'layers': trained['layers']}, base), model.lora)
      merged['rest']['0']['down'] = w * (block['down_lora_magnitude'] / fixed)[None, :]
      return jnp.sum(apply(transformer.without_adapters(model), merged) * WEIGHTS)

    found = jax.grad(self.total(model, base))(trained)['rest']['0']['down_lora_b']
    wanted = jax.grad(plain)(block['down_lora_b'])
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


class TestDropout:

  def test_drops_inputs_of_the_adapter_and_keeps_their_mean(self):
    model = build(dropout=0.4, targets=('down',))
    trained, base = lora_lib.split(with_adapters(model))
    # The adapter of the last layer alone, whose effect on its output is linear.
    trained = trained | {'layers': jax.tree.map(jnp.zeros_like, trained['layers'])}
    plain = transformer.without_dropout(model)
    hidden = lambda key: apply_last(model if key is not None else plain, lora_lib.join(trained, base), key)
    draws = np.stack([hidden(jax.random.key(i)) for i in range(300)])
    assert np.std(draws, axis=0).max() > 0.1
    error = np.abs(draws.mean(0) - hidden(None)) / (np.std(draws, axis=0) / 300**0.5 + 1e-6)
    assert np.mean(error) < 1.2 and error.max() < 6

  def test_is_another_in_every_layer(self):
    model = build(dropout=0.4, targets=('down',))
    text = str(jax.make_jaxpr(functools.partial(apply, model))(with_adapters(model), jax.random.key(0)))
    assert 'random_fold_in' in text or 'random_split' in text


@functools.partial(jax.jit, static_argnums=0)
def apply_last(model, params, key=None):
  """Hidden states before the final norm."""
  positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)
  rngs = {} if key is None else {'dropout': key}
  _, kept = model.apply(
      {'params': params},
      IDS,
      positions,
      np.ones_like(IDS),
      rngs=rngs,
      capture_intermediates=lambda m, _: m.name == 'rest',
  )
  return kept['intermediates']['rest']['__call__'][0][0][0]
