"""Attention against a float64 formula, kernel by kernel."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign import types as errors
from jaxalign.models import attention
from jaxalign.models import cudnn
from jaxalign.models import flash
from jaxalign.models import seen as seen_lib
from jaxalign.models import splash as splash_lib


def arrays(rng, rows, length, heads, kv_heads, size):
  """Queries, keys, values and who sees whom: segments are runs of equal ids, the last of them padding."""
  q, k, v = (rng.normal(size=(rows, length, n, size)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
  segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
  segments[:, -length // 8 :] = 0
  return q, k, v, seen_lib.Seen(segments.astype(np.int32))


def branched(rng, rows, length, heads, kv_heads, size):
  """The same where each segment is a prompt and branches that begin behind it."""
  q, k, v, seen = arrays(rng, rows, length, heads, kv_heads, size)
  branches, positions, number = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32), 0
  for b in range(rows):
    for segment in range(1, 4):
      (slots,) = np.nonzero(seen.segments_BT[b] == segment)
      prompt = len(slots) // 3
      positions[b, slots[:prompt]] = np.arange(prompt)
      for branch in np.array_split(slots[prompt:], 3):
        number += 1
        branches[b, branch], positions[b, branch] = number, prompt + np.arange(len(branch))
  return q, k, v, seen._replace(branches_BT=branches, positions_BT=positions)


def plain(size):
  """What most models do."""
  return seen_lib.How(size**-0.5)


def formula(q_BTNH, k_BTKH, v_BTKH, seen, how):
  """Softmax attention, a query at a time, in float64."""
  out = np.zeros(q_BTNH.shape)
  ratio = q_BTNH.shape[2] // k_BTKH.shape[2]
  segments_BT = seen.segments_BT
  branches_BT = np.zeros_like(segments_BT) if seen.branches_BT is None else seen.branches_BT
  places_BT = np.tile(np.arange(q_BTNH.shape[1]), (len(q_BTNH), 1)) if seen.branches_BT is None else seen.positions_BT
  for b, t, n in np.ndindex(q_BTNH.shape[:3]):
    keys = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
    keys = [s for s in keys if branches_BT[b, s] in (0, branches_BT[b, t])]
    keys = [s for s in keys if not how.window or places_BT[b, t] - places_BT[b, s] < how.window]
    scores = k_BTKH[b, keys, n // ratio].astype(np.float64) @ q_BTNH[b, t, n] * how.scale
    scores = how.softcap * np.tanh(scores / how.softcap) if how.softcap else scores
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights / weights.sum() @ v_BTKH[b, keys, n // ratio]
  return out


def gradients(fn, q, k, v, seen, how):
  """Of the three, of a sum over what `fn` makes of them."""
  return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(fn(*x, seen, how))), (0, 1, 2)))(q, k, v)


def splash(*args):
  return splash_lib.attend(*args, interpret=True)


def fused(*args):
  return cudnn.attend(*args, implementation='xla')


class TestAttend:

  @pytest.mark.parametrize('length', [1, 12, 200])
  @pytest.mark.parametrize('heads,kv_heads', [(4, 4), (4, 2), (3, 1)])
  def test_is_softmax_attention_within_segments(self, length, heads, kv_heads):
    args = arrays(np.random.default_rng(0), 2, length, heads, kv_heads, 8)
    np.testing.assert_allclose(attention.attend('xla', *args, plain(8)), formula(*args, plain(8)), atol=2e-6)

  def test_is_the_same_in_blocks_and_whole_with_its_gradient(self, monkeypatch):
    q, k, v, segments = arrays(np.random.default_rng(1), 2, 40, 4, 2, 8)

    def both(queries):
      monkeypatch.setattr(attention, '_QUERIES', queries)  # of the least block
      total = lambda q, k, v: jnp.sum(jnp.sin(attention.xla(q, k, v, segments, plain(8))))
      return attention.xla(q, k, v, segments, plain(8)), *jax.grad(total, (0, 1, 2))(q, k, v)

    for blocks, whole in zip(both(16), both(40)):
      np.testing.assert_allclose(blocks, whole, atol=3e-6)

  @pytest.mark.parametrize('kernel,length', [(attention.xla, 9), (flash.attend, 300)])
  @pytest.mark.parametrize('how', [plain(4), seen_lib.How(0.5, 0, 5.0)])
  def test_of_large_logits_is_finite(self, kernel, length, how):
    q, k, v, segments = arrays(np.random.default_rng(2), 1, length, 2, 2, 4)
    out, grads = jax.value_and_grad(lambda q: jnp.sum(kernel(q, 1e4 * k, v, segments, how)))(1e4 * q)
    assert np.isfinite(out)
    assert np.isfinite(grads).all()

  @pytest.mark.parametrize('kernel,length', [(attention.xla, 64), (flash.attend, 200)])
  def test_keeps_the_softmax_in_float32(self, kernel, length):
    q, k, v, segments = arrays(np.random.default_rng(3), 2, length, 2, 2, 16)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    exact = formula(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, plain(16))
    found = kernel(q, k, v, segments, plain(16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=0.02)

  @pytest.mark.parametrize('window', [1, 5, 64, 70, 400])
  @pytest.mark.parametrize('softcap', [0.0, 0.7])
  def test_sees_a_window_of_capped_logits(self, window, softcap):
    args = arrays(np.random.default_rng(7), 1, 200, 2, 1, 8)
    how = seen_lib.How(0.9, window, softcap)
    np.testing.assert_allclose(attention.attend('xla', *args, how), formula(*args, how), atol=2e-6)

  @pytest.mark.parametrize('how', [plain(8), seen_lib.How(0.9, 5), seen_lib.How(0.9, 500, 0.7)])
  def test_sees_of_a_segment_the_prompt_and_its_own_branch(self, how):
    args = branched(np.random.default_rng(8), 2, 200, 2, 1, 8)
    np.testing.assert_allclose(attention.attend('xla', *args, how), formula(*args, how), atol=2e-6)


class TestCudnn:

  @pytest.mark.parametrize('how', [plain(8), seen_lib.How(0.9, 5)])
  def test_gives_the_kernel_the_mask_of_segments_and_the_window(self, how):
    args = arrays(np.random.default_rng(4), 2, 24, 4, 2, 8)
    np.testing.assert_allclose(fused(*args, how), formula(*args, how), atol=2e-6)

  @pytest.mark.parametrize('how', [plain(8), seen_lib.How(0.9, 5)])
  def test_gives_it_the_mask_of_branches(self, how):
    args = branched(np.random.default_rng(9), 2, 48, 4, 2, 8)
    np.testing.assert_allclose(fused(*args, how), formula(*args, how), atol=2e-6)


class TestSplash:

  @pytest.mark.parametrize('how', [plain(64), seen_lib.How(0.1, 5), seen_lib.How(0.2, 0, 0.7)])
  def test_is_softmax_attention_within_segments(self, how):
    args = arrays(np.random.default_rng(5), 1, 128, 2, 1, 64)
    np.testing.assert_allclose(splash(*args, how), formula(*args, how), atol=2e-6)

  @pytest.mark.parametrize('size', [64, 128])
  def test_tells_branches_apart(self, size):
    args = branched(np.random.default_rng(10), 1, 128, 2, 1, size)
    np.testing.assert_allclose(splash(*args, plain(size)), formula(*args, plain(size)), atol=2e-6)

  def test_on_a_mesh_tells_branches_apart_with_its_gradient(self):
    q, k, v, seen = branched(np.random.default_rng(11), 8, 256, 4, 2, 64)
    grads = lambda fn: gradients(fn, q, k, v, seen, plain(64))
    with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2,context:2')):
      for found, wanted in zip(grads(splash), grads(attention.xla)):
        np.testing.assert_allclose(found, wanted, atol=3e-5)

  @pytest.mark.parametrize('how', [seen_lib.How(0.1, 5), seen_lib.How(0.1, 0, 0.7)])
  def test_refuses_branches_that_it_cannot_tell_apart(self, how):
    with pytest.raises(errors.UsageError, match='share_prompts'):
      splash(*branched(np.random.default_rng(12), 1, 128, 2, 1, 64), how)

  @pytest.mark.parametrize(
      'mesh,how',
      [
          ('fsdp:8', plain(64)),
          ('fsdp:2,tensor:2,context:2', plain(64)),
          ('fsdp:4,context:2', seen_lib.How(0.1, 40, 0.7)),
          ('data:2,tensor:4', plain(64)),
      ],
  )
  def test_on_a_mesh_equals_the_dense_one_with_its_gradient(self, mesh, how):
    # Two key heads: with tensor:4 there are more devices than heads.
    q, k, v, segments = arrays(np.random.default_rng(6), 8, 256, 4, 2, 64)
    grads = lambda fn: gradients(fn, q, k, v, segments, how)
    run = lambda *args: splash(*args, how)
    with jax.set_mesh(sharding.make_mesh(mesh)):
      np.testing.assert_allclose(jax.jit(run)(q, k, v, segments), attention.xla(q, k, v, segments, how), atol=2e-6)
      for found, wanted in zip(grads(splash), grads(attention.xla)):
        np.testing.assert_allclose(found, wanted, atol=3e-5)


class TestFlash:

  @pytest.mark.parametrize('length', [1, 128, 400])
  @pytest.mark.parametrize('heads,kv_heads', [(4, 4), (4, 2), (3, 1)])
  def test_is_softmax_attention_within_segments(self, length, heads, kv_heads):
    args = arrays(np.random.default_rng(14), 2, length, heads, kv_heads, 8)
    np.testing.assert_allclose(flash.attend(*args, plain(8)), formula(*args, plain(8)), atol=2e-6)

  @pytest.mark.parametrize('make', [arrays, branched])
  @pytest.mark.parametrize('window,softcap', [(0, 0.0), (0, 0.7), (1, 0.0), (100, 0.7), (300, 0.0)])
  def test_sees_windows_caps_and_branches_with_their_gradients(self, make, window, softcap):
    q, k, v, seen = make(np.random.default_rng(15), 2, 400, 4, 2, 8)
    how = seen_lib.How(0.9, window, softcap)
    np.testing.assert_allclose(flash.attend(q, k, v, seen, how), formula(q, k, v, seen, how), atol=2e-6)
    for found, wanted in zip(*(gradients(fn, q, k, v, seen, how) for fn in (flash.attend, attention.xla))):
      np.testing.assert_allclose(found, wanted, atol=2e-5)

  @pytest.mark.parametrize('branches', [False, True])
  @pytest.mark.parametrize('softcap', [0.0, 0.7])
  def test_reads_more_keys_than_it_must_where_no_size_fits(self, branches, softcap):
    # Eight blocks, of which 1, 2, 3, 4, 6 or 8 are read. Block 4 wants 5, and 6 would begin before the row does.
    q, k, v, _ = arrays(np.random.default_rng(18), 1, 1000, 3, 1, 4)
    segments = (np.arange(1000) >= 700)[None].astype(np.int32)
    part = np.where(segments, 1000, 0) + (np.arange(1000) >= 200) + (np.arange(1000) >= 450)
    positions = np.where(part == 2, np.arange(1000) - 250, np.arange(1000) - 700 * segments)
    seen = seen_lib.Seen(segments)
    if branches:
      seen = seen_lib.Seen(segments, np.where(segments, 0, part).astype(np.int32), positions.astype(np.int32))
    how = seen_lib.How(0.9, 0, softcap)
    np.testing.assert_allclose(flash.attend(q, k, v, seen, how), formula(q, k, v, seen, how), atol=2e-6)
    for found, wanted in zip(*(gradients(fn, q, k, v, seen, how) for fn in (flash.attend, attention.xla))):
      np.testing.assert_allclose(found, wanted, atol=3e-5)

  def test_has_gradients_of_the_dtype(self):
    q, k, v, seen = arrays(np.random.default_rng(3), 2, 200, 2, 2, 16)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wanted = gradients(attention.xla, *(x.astype(jnp.float32) for x in narrow), seen, plain(16))
    for grad, gold in zip(gradients(lambda *x: flash.attend(*x).astype(jnp.float32), *narrow, seen, plain(16)), wanted):
      assert grad.dtype == jnp.bfloat16
      np.testing.assert_allclose(np.asarray(grad, np.float32), gold, atol=0.06)

  @pytest.mark.parametrize('window', [0, 64])
  def test_reads_no_keys_before_the_first_that_a_block_sees(self, window):
    # What is read and not seen has weight 0, and 0 times no number is none.
    length = 1024
    q, k, v, _ = arrays(np.random.default_rng(16), 1, length, 2, 1, 8)
    ends = [length] if window else [300, 500, length]
    segments = np.searchsorted(ends, np.arange(length), side='right')[None].astype(np.int32)
    seen, how = seen_lib.Seen(segments), seen_lib.How(0.4, window)
    wanted = formula(q, k, v, seen, how)
    # Blocks of 128. With the window each reads one more. The last wants back to 384, five blocks, and six are the size.
    first, query = (512, 640) if window else (256, 640)
    v[:, :first] = np.nan
    found = flash.attend(q, k, v, seen, how)
    np.testing.assert_allclose(found[:, query:], wanted[:, query:], atol=2e-6)
    assert np.isnan(found[:, :first]).all()

  def test_is_not_evaluated_again_where_its_results_are_kept(self):
    q, k, v, seen = arrays(np.random.default_rng(17), 1, 512, 2, 1, 8)

    def barriers(policy):
      fn = jax.checkpoint(lambda q: jnp.sin(flash.attend(q, k, v, seen, plain(8))), policy=policy)
      text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(fn(q))))(q))
      return text.count('optimization_barrier')

    keeps = jax.checkpoint_policies.save_only_these_names(flash.RESULT)
    assert barriers(keeps) == 2
    assert barriers(jax.checkpoint_policies.nothing_saveable) == 3


class TestOtherLengths:

  @pytest.mark.parametrize(
      'kernel,mesh,length,wanted',
      [
          ('splash', 'fsdp:4,context:2', 256, 'splash'),
          ('splash', 'fsdp:4,context:2', 128, 'xla'),
          ('splash', 'fsdp:4,context:2', 64, 'xla'),
          ('splash', 'fsdp:4,context:2', 600, 'xla'),
          ('cudnn', 'fsdp:8', 512, 'cudnn'),
          ('cudnn', 'fsdp:8', 511, 'xla'),
          ('cudnn', 'fsdp:4,context:2', 512, 'xla'),
          ('flash', 'fsdp:1', 512, 'flash'),
          ('flash', 'fsdp:1', 511, 'xla'),
          ('flash', 'fsdp:8', 512, 'xla'),
      ],
  )
  def test_are_left_to_xla_where_a_kernel_does_not_take_them(self, monkeypatch, kernel, mesh, length, wanted):
    q, k, v, seen = arrays(np.random.default_rng(13), 2, length, 4, 2, 64)
    monkeypatch.setattr(splash_lib, 'attend', lambda *_: 'splash')
    monkeypatch.setattr(flash, 'attend', lambda *_: 'flash')
    monkeypatch.setattr(cudnn, 'attend', lambda *_: 'cudnn')
    monkeypatch.setattr(attention, 'xla', lambda q, *_: q)
    with jax.set_mesh(sharding.make_mesh(mesh, devices=jax.devices()[:1] if mesh == 'fsdp:1' else None)):
      found = attention.attend(kernel, q, k, v, seen, plain(64))
    assert (found if isinstance(found, str) else 'xla') == wanted


def mesh_of(platform, **sizes):
  """A stand-in for a mesh of devices that this machine lacks."""
  device = types.SimpleNamespace(platform=platform)
  shape = dict.fromkeys(sharding.AXES, 1) | sizes
  return types.SimpleNamespace(devices=np.array([device]), shape=shape, empty=False, size=math.prod(shape.values()))


class TestPick:

  @pytest.mark.parametrize(
      'platform,dtype,head_size,length,sizes,name',
      [
          ('cpu', 'bfloat16', 64, 1024, {}, 'flash'),
          ('cpu', 'float32', 48, 600, {}, 'flash'),
          ('cpu', 'float32', 48, 511, {}, 'xla'),
          ('cpu', 'float32', 48, 1024, {'fsdp': 2}, 'xla'),
          ('tpu', 'bfloat16', 128, 1024, {}, 'splash'),
          ('tpu', 'bfloat16', 64, 1024, {}, 'splash'),
          ('tpu', 'float32', 64, 1024, {}, 'xla'),
          ('tpu', 'bfloat16', 96, 1024, {}, 'xla'),
          ('tpu', 'bfloat16', 128, 1000, {}, 'xla'),
          ('tpu', 'bfloat16', 128, 512, {'context': 4}, 'splash'),
          ('tpu', 'bfloat16', 128, 512, {'context': 8}, 'xla'),
          ('gpu', 'bfloat16', 64, 1024, {}, 'cudnn'),
          ('gpu', 'float16', 128, 4096, {}, 'cudnn'),
          ('gpu', 'float32', 64, 1024, {}, 'xla'),
          ('gpu', 'bfloat16', 64, 8192, {}, 'xla'),
          ('gpu', 'bfloat16', 20, 1024, {}, 'xla'),
          ('gpu', 'bfloat16', 64, 1023, {}, 'xla'),
          ('gpu', 'bfloat16', 64, 1024, {'tensor': 2}, 'cudnn'),
          ('gpu', 'bfloat16', 64, 1024, {'tensor': 4}, 'xla'),
          ('gpu', 'bfloat16', 64, 1024, {'context': 2}, 'xla'),
      ],
  )
  def test_takes_what_the_platform_runs_and_logs_it(self, caplog, platform, dtype, head_size, length, sizes, name):
    with caplog.at_level('INFO', logger='absl'):
      assert attention.pick(mesh_of(platform, **sizes), dtype, head_size=head_size, kv_heads=2, length=length) == name
    assert f'attention: {name} (' in caplog.text

  def test_caps_no_logits_by_cudnn(self):
    assert attention.pick(mesh_of('gpu'), 'bfloat16', head_size=64, kv_heads=2, length=1024, softcap=50.0) == 'xla'
