"""Tests of divergences and rivals, against dense float64 formulas."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import divergence
from jaxalign import sharding

B, T, D, V = 8, 6, 16, 128
VOCAB = 101  # the other columns are padding
MESHES = ('fsdp:2,tensor:2,context:2', 'tensor:8')


def _data(seed=0):
  """Hidden states and head of policy and reference, and a mask; padding columns are large, so that they show."""
  rng = np.random.default_rng(seed)
  hidden, ref_hidden = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
  head, ref_head = (rng.normal(size=(D, V)).astype(np.float32) for _ in range(2))
  head[:, VOCAB:], ref_head[:, VOCAB:] = 9.0, -9.0
  return hidden, head, ref_hidden, ref_head, (rng.random((B, T)) < 0.6).astype(np.float32)


def _log_softmax(hidden, head, softcap=0.0):
  logits = np.einsum('btd,dv->btv', hidden.astype(np.float64), head.astype(np.float64))[..., :VOCAB]
  logits = softcap * np.tanh(logits / softcap) if softcap else logits
  return (
      logits
      - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
      - logits.max(-1, keepdims=True)
  )


def _gold(hidden, head, ref_hidden, ref_head, mask, softcap=0.0):
  log_p, log_q = _log_softmax(hidden, head, softcap), _log_softmax(ref_hidden, ref_head, softcap)
  return (np.exp(log_q) * (log_q - log_p)).sum(-1) * mask


def _under(mesh):
  return jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext()


def _kl(data, mesh='', **options):
  with _under(mesh):
    return jax.jit(functools.partial(divergence.kl, vocab_size=VOCAB, **options))(*data)


class TestKl:

  @pytest.mark.parametrize('options', [{'chunk': 1}, {'chunk': 13}, {'chunk': 1000}, {'chunk': 7, 'softcap': 2.0}])
  def test_equals_the_dense_sum(self, options):
    data = _data()
    gold = _gold(*data, softcap=options.get('softcap', 0.0))
    assert gold.max() > 1
    np.testing.assert_allclose(_kl(data, **options), gold, rtol=1e-5, atol=1e-6)

  @pytest.mark.parametrize('mesh', ['', *MESHES])
  @pytest.mark.parametrize('softcap', [0.0, 2.0])
  def test_has_the_gradient_of_the_dense_sum_for_the_policy_and_none_for_the_reference(self, mesh, softcap):
    data, weight = _data(1), np.random.default_rng(2).normal(size=(B, T)).astype(np.float32)

    def total(*models):
      return jnp.sum(weight * divergence.kl(*models, data[4], vocab_size=VOCAB, chunk=7, softcap=softcap))

    def dense(hidden, head):
      logits = hidden @ head[:, :VOCAB]
      logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
      log_q = jnp.asarray(_log_softmax(*data[2:4], softcap))
      return jnp.sum(weight * data[4] * jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(logits)), axis=-1))

    with _under(mesh):
      found = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*data[:4])
    wanted = jax.grad(dense, argnums=(0, 1))(*data[:2])
    for got, want in zip(found[:2], wanted):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    assert not np.any(found[2]) and not np.any(found[3])
    assert not np.any(np.asarray(found[1])[:, VOCAB:])

  @pytest.mark.parametrize('mesh', MESHES)
  def test_is_the_same_on_any_mesh(self, mesh):
    np.testing.assert_allclose(_kl(_data(), mesh), _kl(_data()), rtol=1e-5, atol=1e-6)

  def test_is_exactly_zero_between_a_model_and_itself(self):
    hidden, head, _, _, mask = _data()
    assert not np.any(_kl((hidden, head, hidden, head, mask)))

  def test_is_finite_where_the_policy_rules_out_what_the_reference_says(self):
    hidden, head, ref_hidden, ref_head, mask = _data()
    found = np.asarray(_kl((60 * hidden, head, 60 * ref_hidden, ref_head, mask)))
    assert np.isfinite(found).all() and found.max() > 500


def _rivals(data, uniform, among, mesh=''):
  hidden, head, _, _, mask = data
  targets = np.random.default_rng(5).integers(0, VOCAB, (B, T)).astype(np.int32)
  with _under(mesh):
    draw = jax.jit(functools.partial(divergence.rivals, vocab_size=VOCAB, among=among, chunk=7))
    return targets, np.asarray(draw(hidden, head, targets, uniform, mask))


class TestRivals:

  def test_are_drawn_from_the_softmax_over_the_likeliest_others(self):
    data, mask = _data(), _data()[4]
    log_p = _log_softmax(*data[:2])
    for u in (0.0, 0.3, 0.8, 0.999):
      targets, found = _rivals(data, np.full((B, T), u, np.float32), 5)
      for b, t in np.argwhere(mask > 0):
        others = [v for v in np.argsort(-log_p[b, t]) if v != targets[b, t]][:5]
        share = np.exp(log_p[b, t, others]) / np.exp(log_p[b, t, others]).sum()
        assert found[b, t] == others[int(np.searchsorted(np.cumsum(share), u, side='right'))]
      assert not np.any(found[mask == 0])

  def test_leave_the_target_out_even_where_it_is_the_likeliest(self):
    data = _data()
    best = _log_softmax(*data[:2]).argmax(-1).astype(np.int32)
    draw = functools.partial(divergence.rivals, vocab_size=VOCAB, among=1)
    found = np.asarray(draw(data[0], data[1], best, np.zeros((B, T), np.float32), np.ones((B, T), np.float32)))
    second = np.argsort(-_log_softmax(*data[:2]), axis=-1)[..., 1]
    np.testing.assert_array_equal(found, second)

  @pytest.mark.parametrize('mesh', MESHES)
  def test_are_the_same_on_any_mesh(self, mesh):
    uniform = np.random.default_rng(3).random((B, T)).astype(np.float32)
    np.testing.assert_array_equal(_rivals(_data(), uniform, 5, mesh)[1], _rivals(_data(), uniform, 5)[1])
