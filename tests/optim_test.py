"""Schedules and AdamW against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import optim


class TestLinear:

  def test_rises_then_falls_to_zero(self):
    rate = optim.linear(100, lr=0.5, warmup=0.1)
    for step in range(10):
      np.testing.assert_allclose(rate(step), 0.5 * (step + 1) / 10, rtol=1e-6)
    for step in range(10, 101):
      np.testing.assert_allclose(rate(step), 0.5 * (100 - step) / 90, rtol=1e-5, atol=1e-8)

  def test_never_begins_at_zero(self):
    assert optim.linear(3, lr=0.5, warmup=0.0)(0) == 0.5
    assert optim.linear(1, lr=0.5)(0) == 0.5


class TestCosine:

  def test_rises_then_falls_along_a_cosine(self):
    rate = optim.cosine(50, lr=2.0, warmup=0.2, end=0.25)
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    for step in range(10, 51):
      wanted = 0.5 + 1.5 * (1 + np.cos(np.pi * (step - 10) / 40)) / 2
      np.testing.assert_allclose(rate(step), wanted, rtol=1e-5)


class TestConstant:

  def test_rises_and_stays(self):
    rate = optim.constant(40, lr=1.0, warmup=0.1)
    np.testing.assert_allclose([rate(s) for s in range(6)], [0.25, 0.4375, 0.625, 0.8125, 1.0, 1.0])
    assert optim.constant(40, lr=1.0)(0) == 1.0


def first_update(params, grads, **options):
  opt = optim.adamw(10, schedule=functools.partial(optim.constant, lr=0.1), **options)
  state = opt.tx.init(params)
  return opt.tx.update(grads, state, params)[0]


class TestAdamw:

  def test_takes_the_step_of_the_paper(self):
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
    opt = optim.adamw(
        10, schedule=functools.partial(optim.constant, lr=0.1), b1=0.8, b2=0.9, weight_decay=0.3, clip_norm=0.0
    )
    params = {'gate': jnp.asarray(w, jnp.float32)}
    state = opt.tx.init(params)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
      updates, state = opt.tx.update({'gate': jnp.asarray(g, jnp.float32)}, state, params)
      params = jax.tree.map(jnp.add, params, updates)
      m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
      w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8) + 0.3 * w)
      np.testing.assert_allclose(params['gate'], w, rtol=1e-5, atol=1e-6)

  def test_decays_no_norm_and_no_bias(self):
    params = {'layers': {'attn_norm': jnp.ones(2), 'q': jnp.ones((2, 2)), 'q_bias': jnp.ones(2)}, 'embed': jnp.ones(2)}
    updates = first_update(params, jax.tree.map(jnp.zeros_like, params), weight_decay=0.5)
    assert (np.asarray(updates['layers']['q']) == -0.05).all()
    assert (np.asarray(updates['embed']) == -0.05).all()
    for name in ('attn_norm', 'q_bias'):
      np.testing.assert_array_equal(updates['layers'][name], 0)

  @pytest.mark.parametrize('clip_norm,scale', [(1.0, 0.2), (50.0, 1.0), (0.0, 1.0)])
  def test_clips_by_the_norm_of_all_gradients(self, clip_norm, scale):
    # The norm of (3, 4) is 5; a large eps makes the update proportional to the gradient.
    grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    updates = first_update(grads, grads, clip_norm=clip_norm, eps=1e6)
    np.testing.assert_allclose(updates['a'], [-0.1 * 3 * scale / 1e6], rtol=1e-4)
    np.testing.assert_allclose(updates['b'], [-0.1 * 4 * scale / 1e6], rtol=1e-4)
