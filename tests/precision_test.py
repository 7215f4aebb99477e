"""Products of float32 are those of float32 on every platform: GPUs and TPUs round the factors unless told not to."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxalign import objectives
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import tracing
from jaxalign.generation import next_token
from jaxalign.losses import preference
from jaxalign.models import architecture
from jaxalign.models import kv_cache
from jaxalign.models import transformer
from tests import packed

DENSE = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64)
EXPERTS = dataclasses.replace(DENSE, num_experts=2, experts_per_token=1)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
PRODUCT = re.compile(r'(dot_general|ragged_dot_general)\[(.*?)\]\s', re.DOTALL)


def shares(jaxpr):
  """How many products there are, and which share of them is exact."""
  found = [match[2] for match in PRODUCT.finditer(str(jaxpr))]
  return len(found), sum('Precision.HIGHEST' in text for text in found) / len(found)


def built(config, dtype):
  model = transformer.build(config, MESH, length=16, dtype=dtype)
  return model, transformer.init_params(model, jax.random.key(0), MESH)


@pytest.mark.parametrize('dtype,wanted', [('float32', 1.0), ('bfloat16', 0.0)])
class TestPrecision:

  @pytest.mark.parametrize('config', [DENSE, EXPERTS])
  def test_of_a_step(self, config, dtype, wanted):
    model, params = built(config, dtype)
    objective = objectives.preference(
        model=model, loss_fn=functools.partial(preference.dpo, beta=0.1), needs=tracing.Needs()
    )
    optimizer = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-2))
    row = [(0, k, [3, 4], [5 + k]) for k in range(2)]
    batch = packed.stack(packed.micro_batch([row], groups=1, size=2, length=20, slots=2))
    batch = dataclasses.replace(batch, ref_logps_BT=jnp.zeros_like(batch.mask_BT))
    step = step_lib.make_step(objective, optimizer)
    count, share = shares(jax.make_jaxpr(step)(step_lib.init_state(params, optimizer.tx, 0, ()), {}, batch))
    assert count > 20  # forward and backward
    assert share == wanted

  def test_of_a_token_behind_a_cache(self, dtype, wanted):
    model, params = built(DENSE, dtype)
    cache = kv_cache.init(DENSE, 2, 8, dtype)

    def token(params):
      ones = jnp.ones((2, 1), jnp.int32)
      hidden_BTD, _ = model.apply({'params': params}, ones, ones, ones, cache)
      return next_token.logits(model, params, hidden_BTD[:, 0])

    count, share = shares(jax.make_jaxpr(token)(params))
    assert count == 10  # seven weights, two of attention, the head
    assert share == wanted
