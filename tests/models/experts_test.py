"""Mixture of experts against a loop over tokens, and against itself on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign.models import architecture
from jaxalign.models import experts

CONFIG = architecture.Config(50, 2, 8, 2, 2, 4, 12, 64, num_experts=4, experts_per_token=2)


def arrays():
  rng = np.random.default_rng(0)
  shapes = (8, 6, 8), (8, 4), (4, 8, 12), (4, 8, 12), (4, 12, 8)
  return [0.5 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def run(config, *args):
  return experts.feed_forward(*args, config=config, act=jax.nn.silu)


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


class TestFeedForward:

  @pytest.mark.parametrize('changes', [{}, {'normalise_experts': False}, {'experts_per_token': 1}])
  def test_is_the_weighted_sum_of_the_experts_that_a_token_takes(self, changes):
    config = dataclasses.replace(CONFIG, **changes)
    np.testing.assert_allclose(run(config, *arrays()), formula(config, *arrays()), rtol=2e-4, atol=2e-5)

  @pytest.mark.parametrize('mesh', ['fsdp:8', 'data:2,tensor:4', 'fsdp:2,tensor:2,context:2', 'expert:4,tensor:2'])
  def test_has_the_same_gradient_on_a_mesh(self, mesh):
    grad = jax.grad(lambda *args: jnp.sum(jnp.sin(run(CONFIG, *args))), (0, 1, 2, 3, 4))
    wanted = grad(*arrays())
    with jax.set_mesh(sharding.make_mesh(mesh)):
      found = jax.jit(grad)(*arrays())
    for x, y in zip(found, wanted):
      np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())

  def test_gives_the_router_a_gradient(self):
    args = arrays()
    grads = jax.grad(lambda router: jnp.sum(run(CONFIG, args[0], router, *args[2:]) ** 2))(args[1])
    assert float(jnp.abs(grads).max()) > 1e-3
