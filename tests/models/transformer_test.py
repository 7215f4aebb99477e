"""The transformer: what must not change a number, and what must."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import kv_cache
from jaxalign.models import transformer

pytestmark = pytest.mark.usefixtures('optimised')

TINY = architecture.Config(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    mlp_dim=24,
    max_length=64,
    tie_embeddings=False,
)
MESH = sharding.make_mesh('fsdp:1', devices=jax.devices()[:1])
MODEL = transformer.build(TINY, MESH, length=32)
PARAMS = transformer.init_params(MODEL, jax.random.key(0), MESH)
_OF_DOTS = ['1024,16', '1024,2,4', '1024,2,4', '1024,24', '1024,24', '1024,4,4']


def ids(rows, length, seed=0):
  return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length)).astype(np.int32)


def read(inputs, positions=None, segments=None, model=MODEL, params=PARAMS):
  shape = np.shape(inputs)
  positions = np.broadcast_to(np.arange(shape[1]), shape) if positions is None else positions
  segments = np.ones(shape, np.int32) if segments is None else segments
  return apply(model, params, inputs, positions, segments)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *args):
  return model.apply({'params': params}, *args)


class TestTransformer:

  def test_sees_nothing_that_comes_later(self):
    inputs = ids(2, 10)
    changed = inputs.copy()
    changed[:, 6] = (changed[:, 6] + 1) % TINY.vocab_size
    found, other = read(inputs), read(changed)
    np.testing.assert_array_equal(found[:, :6], other[:, :6])
    assert (np.abs(found - other)[:, 6:].max(axis=2) > 1e-4).all()

  def test_reads_packed_sequences_as_if_each_were_alone(self):
    a, b = ids(1, 7, 1), ids(1, 5, 2)
    packed = np.concatenate([a, b, np.zeros((1, 4), np.int32)], axis=1)
    positions = np.array([[*range(7), *range(5), 0, 0, 0, 0]])
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 4])
    found = read(packed, positions, segments)
    np.testing.assert_allclose(found[:, :7], read(a), atol=2e-6)
    np.testing.assert_allclose(found[:, 7:12], read(b), atol=2e-6)
    assert np.isfinite(found).all()

  def test_gives_a_sequence_no_gradient_from_its_neighbour(self):
    inputs, segments = np.arange(12)[None] % 50, np.array([[1] * 6 + [2] * 6])
    positions = np.array([[*range(6)] * 2])
    total = lambda params: jnp.sum(read(inputs, positions, segments, params=params)[:, 6:] ** 2)
    grads = jax.grad(total)(PARAMS)['embed']
    np.testing.assert_array_equal(grads[:6], 0)
    assert (np.abs(grads[6:12]).max(axis=1) > 0).all()

  def test_depends_on_distances_alone(self):
    inputs = ids(1, 8)
    positions = np.arange(8)[None]
    np.testing.assert_allclose(read(inputs, positions), read(inputs, positions + 20), atol=1e-5)
    assert np.abs(read(inputs, positions) - read(inputs, 2 * positions)).max() > 1e-3

  @pytest.mark.parametrize('pieces', [(9,), (4, 5), (6, 1, 1, 1)])
  def test_reads_the_same_through_a_cache_in_pieces(self, pieces):
    inputs = ids(3, 9)
    cache = kv_cache.init(TINY, 3, 12, jnp.float32)
    found, start = [], 0
    for size in pieces:
      part = inputs[:, start : start + size]
      positions = np.broadcast_to(np.arange(start, start + size), part.shape)
      out, cache = apply(MODEL, PARAMS, part, positions, np.ones_like(part), cache)
      found.append(out)
      start += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), read(inputs), atol=3e-6)
    np.testing.assert_array_equal(cache.lengths_B, [9, 9, 9])

  def test_reads_almost_the_same_through_a_cache_of_8_bits(self):
    inputs = ids(3, 9)
    found, cache = [], kv_cache.init(TINY, 3, 12, jnp.int8)
    for start in range(9):
      positions = np.full((3, 1), start)
      out, cache = apply(MODEL, PARAMS, inputs[:, start : start + 1], positions, np.ones_like(positions), cache)
      found.append(out)
    errors = np.concatenate(found, axis=1) - read(inputs)
    assert 1e-5 < np.sqrt(np.mean(errors**2)) / read(inputs).std() < 0.01  # 8 bits round by up to 1/254
    assert cache.k_LBKSH.dtype == jnp.int8

  def test_continues_rows_of_different_lengths_each_behind_its_own_end(self):
    whole = ids(2, 8)
    lengths = np.array([3, 6])
    prompt = np.where(np.arange(6)[None] < lengths[:, None], whole[:, :6], 0)
    segments = (np.arange(6)[None] < lengths[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(6), (2, 6))
    cache = kv_cache.init(TINY, 2, 10, jnp.float32)
    _, cache = apply(MODEL, PARAMS, prompt, positions, segments, cache)
    for step in range(2):
      here = (lengths + step)[:, None]
      token = np.take_along_axis(whole, here, axis=1)
      out, cache = apply(MODEL, PARAMS, token, here, np.ones_like(here), cache)
    expected = read(whole)
    for row, length in enumerate(lengths):
      np.testing.assert_allclose(out[row, 0], expected[row, length + 1], atol=3e-6)

  @pytest.mark.parametrize('remat', ['dots', 'attention', 'full', 'offload'])
  def test_has_the_same_gradient_under_rematerialisation(self, remat):
    total = lambda model: jax.grad(lambda params: jnp.sum(read(ids(2, 8), model=model, params=params) ** 2))
    other = dataclasses.replace(MODEL, remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), total(MODEL)(PARAMS), total(other)(PARAMS))

  @pytest.mark.parametrize('remat', ['none', 'dots', 'attention', 'full'])
  def test_has_the_same_gradient_with_the_flash_kernel(self, remat):
    segments = np.sort(np.random.default_rng(0).integers(0, 7, (2, 520)), axis=1)
    total = lambda model: lambda params: jnp.sum(
        jnp.sin(read(ids(2, 520), segments=segments, model=model, params=params))
    )
    wanted = jax.value_and_grad(total(MODEL))(PARAMS)
    found = jax.value_and_grad(total(dataclasses.replace(MODEL, remat=remat, attention='flash')))(PARAMS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

  @pytest.mark.parametrize(
      'attention,length,remat,kept',
      [
          ('xla', 8, 'dots', ['16,16', '16,2,4', '16,2,4', '16,24', '16,24', '16,4,4', '2,8,16']),  # o, k, v, gate, ...
          ('xla', 8, 'attention', ['2,8,16', '2,8,4,4']),
          ('xla', 8, 'full', ['2,8,16']),
          ('xla', 8, 'offload', ['<host>2,8,16']),
          # What flash gives, and a number for each query.
          ('flash', 512, 'dots', [*_OF_DOTS, '2,4,2,256', '2,512,16', '2,512,4,4']),
          ('flash', 512, 'attention', ['2,4,2,256', '2,512,16', '2,512,4,4']),
          ('flash', 512, 'full', ['2,512,16']),
      ],
  )
  def test_keeps_of_each_layer_what_is_said(self, attention, length, remat, kept, capsys):
    config = dataclasses.replace(TINY, num_layers=3)
    model = dataclasses.replace(MODEL, config=config, remat=remat, attention=attention)
    params = transformer.init_params(model, jax.random.key(0), MESH)
    jax.ad_checkpoint.print_saved_residuals(
        lambda params: jnp.sum(read(ids(2, length), model=model, params=params) ** 2), params
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if 'from the argument' not in line]
    found = re.findall(r'^f32(<host>)?\[3,([\d,]+)\]', '\n'.join(lines), re.MULTILINE)
    assert sorted(map(''.join, found)) == kept

  @pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
  def test_has_logits_and_masks_of_one_block_at_once_with_the_flash_kernel(self, remat):
    model, inputs = dataclasses.replace(MODEL, remat=remat, attention='flash'), ids(2, 1024)
    total = lambda params, segments: jnp.sum(read(inputs, segments=segments, model=model, params=params))
    text = str(jax.make_jaxpr(jax.grad(total))(PARAMS, np.ones_like(inputs)))
    shapes = re.findall(r'(?:f32|bool)\[([\d,]+)\]', text)
    assert max(math.prod(map(int, shape.split(','))) for shape in shapes) == TINY.num_heads * 128 * 1024

  def test_saves_less_under_rematerialisation(self):
    def temp(remat):
      model = dataclasses.replace(transformer.build(TINY, MESH, length=32, remat=remat))
      total = jax.jit(jax.grad(lambda params: jnp.sum(read(ids(8, 32), model=model, params=params) ** 2)))
      return total.lower(PARAMS).compile().memory_analysis().temp_size_in_bytes

    assert temp('full') < temp('none')

  def test_is_one_scanned_block_whatever_the_number_of_layers(self):
    def equations(layers):
      model = transformer.build(dataclasses.replace(TINY, num_layers=layers), MESH, length=32)
      params = transformer.abstract_params(model, MESH)
      return len(str(jax.make_jaxpr(lambda p: read(ids(1, 4), model=model, params=p))(params)).splitlines())

    assert equations(2) == equations(9)

  def test_computes_in_bfloat16_with_float32_parameters(self):
    model = transformer.build(TINY, MESH, length=32, dtype='bfloat16')
    found = read(ids(2, 8), model=model)
    assert found.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(transformer.abstract_params(model, MESH))} == {np.dtype('float32')}
    np.testing.assert_allclose(np.asarray(found, np.float32), read(ids(2, 8)), atol=0.1)


class TestBuild:

  @pytest.mark.parametrize(
      'changes,words',
      [
          ({'remat': 'some'}, "remat = 'some': it is one of none, dots, attention, full, offload"),
          ({'dtype': 'float8'}, "dtype = 'float8'"),
          ({'attention': 'flex'}, "attention = 'flex': it is one of xla, cudnn, splash, flash"),
          ({'attention': 'splash'}, "attention = 'splash': it runs on tpu alone, and the platform is cpu"),
          ({'attention': 'cudnn'}, "attention = 'cudnn': it runs on gpu alone"),
          ({'experts': 'megablox'}, "experts = 'megablox': it runs on tpu alone"),
          ({'length': 65}, 'row_length = 65: the context of the model is 64 tokens'),
      ],
  )
  def test_refuses_what_it_does_not_know(self, changes, words):
    with pytest.raises(types.UsageError, match='(?s)' + words):
      transformer.build(TINY, MESH, **{'length': 32, **changes})

  @pytest.mark.parametrize('platform,chunk', [('cpu', 256), ('gpu', 512), ('tpu', 512)])
  def test_takes_as_many_targets_at_once_as_suits_the_platform(self, monkeypatch, platform, chunk):
    monkeypatch.setattr(sharding, 'platform_of', lambda mesh: platform)
    assert transformer.build(TINY, MESH, length=32).chunk == chunk


class TestForRows:

  def test_computes_in_another_dtype_and_refuses_longer_rows_than_the_context(self):
    model = transformer.build(TINY, MESH, length=32)
    assert transformer.for_rows(model, MESH, 64) == model
    assert transformer.for_rows(model, MESH, 64, dtype='bfloat16').dtype == jnp.bfloat16
    with pytest.raises(types.UsageError, match="dtype = 'float8'"):
      transformer.for_rows(model, MESH, 64, dtype='float8')
    with pytest.raises(types.UsageError, match='row_length = 65: the context of the model is 64 tokens'):
      transformer.for_rows(model, MESH, 65)


class TestParams:

  def test_are_drawn_with_the_deviation_of_their_fan_in(self):
    wide = dataclasses.replace(TINY, embed_dim=64, mlp_dim=256, vocab_size=500)
    params = transformer.init_params(transformer.build(wide, MESH, length=32), jax.random.key(1), MESH)
    for name, deviation in {'gate': 64**-0.5, 'down': 256**-0.5, 'o': 16**-0.5}.items():
      np.testing.assert_allclose(np.std(params['layers']['0'][name]), deviation, rtol=0.05)
    np.testing.assert_allclose(np.std(params['embed']), 0.02, rtol=0.05)
    np.testing.assert_array_equal(params['final_norm'], 1)

  def test_do_not_depend_on_the_mesh(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    one = transformer.init_params(MODEL, jax.random.key(0), MESH)
    other = transformer.init_params(transformer.build(TINY, mesh, length=32), jax.random.key(0), mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(one))
    assert other['embed'].sharding == transformer.abstract_params(MODEL, mesh)['embed'].sharding

  def test_have_the_head_that_the_configuration_asks_for(self):
    shapes = lambda **changes: transformer.abstract_params(
        transformer.build(dataclasses.replace(TINY, **changes), MESH, length=32), MESH
    )
    assert shapes()['head'].shape == (16, 128)
    assert 'head' not in shapes(tie_embeddings=True)
    assert shapes(score_outputs=1)['score'].shape == (16, 1)
    assert shapes(score_outputs=2, score_bias=True)['score_bias'].shape == (2,)

  def test_pad_the_vocabulary_to_a_multiple_that_tensor_axes_divide(self):
    assert TINY.padded_vocab == 128
    assert dataclasses.replace(TINY, vocab_size=32000).padded_vocab == 32000
    assert dataclasses.replace(TINY, vocab_size=32001).padded_vocab == 32128


class TestOutputMatrix:

  def test_is_the_head_or_the_transposed_embedding(self):
    assert transformer.output_matrix(PARAMS) is PARAMS['head']
    tied = {'embed': np.arange(6.0).reshape(3, 2)}
    np.testing.assert_array_equal(transformer.output_matrix(tied), [[0, 2, 4], [1, 3, 5]])
