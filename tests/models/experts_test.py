"""Mixture of experts against a loop over tokens, and against itself on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.models import architecture
from jaxalign.models import experts
from jaxalign.models import grouped
from jaxalign.planning import hlo

CONFIG = architecture.Config(50, 2, 8, 2, 2, 4, 12, 64, num_experts=4, experts_per_token=2)


def arrays():
  rng = np.random.default_rng(0)
  shapes = (8, 6, 8), (8, 4), (4, 8, 12), (4, 8, 12), (4, 12, 8)
  return [0.5 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


MESHES = ['fsdp:8', 'data:2,tensor:4', 'fsdp:2,tensor:2,context:2', 'expert:4,tensor:2', 'data:2,expert:4']


def run(config, *args, **options):
  return experts.feed_forward(*args, config=config, act=jax.nn.silu, **options)


def assert_same_on(mesh, args, run, devices=None):
  """Value and gradients on a mesh are those of one device by XLA's product."""
  total = lambda run: jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(run(CONFIG, *args))), (0, 1, 2, 3, 4))
  wanted = total(globals()['run'])(*args)
  with jax.set_mesh(sharding.make_mesh(mesh, devices=devices)):
    found = jax.jit(total(run))(*args)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def formula(config, x, router, gate, up, down):
  """A token at a time, in float64."""
  out = np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    token = x[b, t].astype(np.float64)
    p = np.exp(token @ router)
    p /= p.sum()
    taken = np.argsort(-p)[: config.experts_per_token]
    weights = p[taken] / p[taken].sum() if config.normalise_experts else p[taken]
    for weight, e in zip(weights, taken):
      g = token @ gate[e]
      out[b, t] += weight * ((g / (1 + np.exp(-g)) * (token @ up[e])) @ down[e])
  return out


@pytest.fixture
def few_rows(monkeypatch):
  """Turns of 10 rows."""
  monkeypatch.setattr(experts, '_LEAST', 10)
  monkeypatch.setattr(experts, '_SPARE', 0)


class TestFeedForward:

  @pytest.mark.parametrize('changes', [{}, {'normalise_experts': False}, {'experts_per_token': 1}])
  def test_is_the_weighted_sum_of_the_experts_that_a_token_takes(self, changes):
    config = dataclasses.replace(CONFIG, **changes)
    np.testing.assert_allclose(run(config, *arrays()), formula(config, *arrays()), rtol=2e-4, atol=2e-5)

  @pytest.mark.parametrize('mesh', MESHES)
  def test_has_the_same_value_and_gradient_on_a_mesh(self, mesh):
    assert_same_on(mesh, arrays(), run)

  @pytest.mark.usefixtures('few_rows')
  @pytest.mark.parametrize('mesh', ['expert:4,tensor:2', 'fsdp:2,expert:2,context:2'])
  @pytest.mark.parametrize('favourites', [(0, 1), (1, 3)])
  def test_drops_no_token_where_all_take_the_same_experts(self, mesh, favourites):
    x, router, *weights = arrays()
    # Every token has a 1 in front, by which the router knows its experts.
    x[..., 0] = 1
    router[0] = np.isin(np.arange(4), favourites) * 20.0
    assert_same_on(mesh, [x, router, *weights], run)
    with jax.set_mesh(sharding.make_mesh(mesh)):
      found = jax.jit(lambda *args: run(CONFIG, *args))(x, router, *weights)
    np.testing.assert_allclose(found, formula(CONFIG, x, router, *weights), rtol=2e-4, atol=2e-5)

  @pytest.mark.parametrize('mesh', ['fsdp:4', 'fsdp:2,expert:2'])
  def test_is_the_same_by_the_kernel_of_tpus(self, monkeypatch, mesh):
    monkeypatch.setattr(grouped, '_megablox', functools.partial(grouped._megablox, interpret=True))
    devices = jax.devices()[:4]
    assert_same_on(mesh, arrays(), functools.partial(run, kernel='megablox'), devices)

  @pytest.mark.usefixtures('optimised')
  @pytest.mark.parametrize('text', ['fsdp:8', 'fsdp:2,expert:4'])
  def test_sends_tokens_and_no_weights_between_devices_of_experts(self, text):
    mesh, grad = sharding.make_mesh(text), jax.grad(lambda *args: jnp.sum(jnp.sin(run(CONFIG, *args))), range(5))
    names = ('batch', 'length', None), (None, None), *2 * (('experts', 'embed', 'mlp'),), ('experts', 'mlp', 'embed')
    where = tuple(sharding.named(mesh, *one) for one in names)
    with jax.set_mesh(mesh):
      compiled = jax.jit(grad, in_shardings=where, out_shardings=where).lower(*arrays()).compile()
    # Those of a device's own experts are gathered, and their gradients scattered; 4 bytes each, as routes have.
    weights = 4 * 3 * 8 * 12 * (1 if 'expert' in text else 4)
    tokens, routes = (4 * 24 * 8, 4 * 24 * 2) if 'expert' in text else (0, 0)
    found = {kind: of['bytes'] for kind, of in hlo.costs(compiled.as_text()).collectives.items()}
    router = 4 * 8 * 4
    assert found == {
        'all-gather': weights + 2 * tokens + 2 * routes,
        'reduce-scatter': weights + 2 * tokens + routes,
        'all-reduce': router,
    }

  @pytest.mark.usefixtures('optimised')
  def test_gathers_no_weights_that_every_device_has(self):
    mesh = sharding.make_mesh('fsdp:8')
    where = sharding.named(mesh, 'batch', 'length', None), *4 * (sharding.named(mesh),)
    with jax.set_mesh(mesh):
      text = jax.jit(functools.partial(run, CONFIG), in_shardings=where).lower(*arrays()).compile().as_text()
    assert not hlo.costs(text).collectives

  @pytest.mark.parametrize('mesh', ['', 'fsdp:8', 'fsdp:2,expert:2,context:2'])
  def test_takes_the_experts_that_are_given_by_the_weights_of_the_router(self, mesh):
    x, router, *weights = arrays()
    p_BTE = np.exp(x.astype(np.float64) @ router)
    last = np.argsort(-p_BTE, axis=-1)[..., 2:].astype(np.uint8)  # the two that the router likes least
    biased = np.zeros_like(router)
    with jax.set_mesh(sharding.make_mesh(mesh)):
      found = jax.jit(functools.partial(run, CONFIG))(x, router, *weights, taken_BTk=last)
      own = jax.jit(functools.partial(experts.choose, config=CONFIG))(x, router)
      total = lambda taken, *args: jnp.sum(jnp.sin(run(CONFIG, *args, taken_BTk=taken)))
      grads = jax.jit(jax.grad(total, (1, 2, 3, 4, 5)))(own, x, router, *weights)
      even = jax.jit(functools.partial(run, CONFIG))(x, biased, *weights, taken_BTk=last)
    np.testing.assert_array_equal(np.sort(own, -1), np.sort(np.argsort(-p_BTE, axis=-1)[..., :2], -1))
    silu = lambda g: g / (1 + np.exp(-g))
    wide = x.astype(np.float64)
    each = [(silu(wide @ gate) * (wide @ up)) @ down for gate, up, down in zip(*weights)]
    said_BTkD = np.take_along_axis(np.stack(each, axis=2), last[..., None].astype(int), axis=2)
    share_BTk = np.take_along_axis(p_BTE, last.astype(int), axis=-1)
    share_BTk /= share_BTk.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, (share_BTk[..., None] * said_BTkD).sum(2), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(even, said_BTkD.mean(2), rtol=2e-4, atol=2e-5)
    # Of its own choice, what it gives without one.
    wanted = jax.grad(lambda *args: jnp.sum(jnp.sin(run(CONFIG, *args))), (0, 1, 2, 3, 4))(x, router, *weights)
    for one, other in zip(grads, wanted, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())

  def test_gives_the_router_a_gradient(self):
    args = arrays()
    grads = jax.grad(lambda router: jnp.sum(run(CONFIG, args[0], router, *args[2:]) ** 2))(args[1])
    assert float(jnp.abs(grads).max()) > 1e-3
