"""The sampler against the program that trains: log-probabilities of what was sampled, token by token."""

import jax
import numpy as np
import pytest

from jaxalign import forward
from jaxalign import sampling
from jaxalign import types
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer
from tools import measure

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2]]
LENGTH = 64


def trainers(model, params, prompts, found):
  """Log-probabilities of each response by `forward.target_stats`, a row each."""
  inputs = np.zeros((8, LENGTH), np.int32)
  targets, mask, segments = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32), np.zeros_like(inputs)
  for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
    ids = [*prompt, *one.ids]
    inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
    mask[row, len(prompt) - 1 : len(ids) - 1] = 1
    segments[row, : len(ids) - 1] = 1
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), inputs.shape)
  slots = np.zeros((8, 1), np.int32)
  batch = types.Batch(inputs, targets, mask, positions, segments, segments - 1, slots, slots, {})
  run = jax.jit(lambda params: forward.target_stats(params, batch, model=model)['logps'])
  logps = np.asarray(run(params))
  return [logps[row][mask[row] > 0] for row in range(len(found))]


def worst(name, mesh_text, dtype='float32', lora=None):
  """The largest difference of any token."""
  model, params, mesh = measure._opened(name, mesh_text)
  model = transformer.build(model.config, mesh, dtype=dtype, lora=lora, length=LENGTH)
  with jax.set_mesh(mesh):
    if lora is not None:
      adapters = transformer.init_adapters(model, jax.random.key(1), params, mesh)
      # The second factor begins as 0.
      params = lora_lib.join(jax.tree.map(lambda x: x + 0.05, adapters), params)
    found = sampling.sample(model, params, PROMPTS, n=2, max_new_tokens=20, seed=5, rows=4)
    wanted = trainers(model, params, [ids for ids in PROMPTS for _ in range(2)], found)
  assert len({tuple(one.ids) for one in found}) == 8
  return max(np.abs(np.array(one.logps) - logps).max() for one, logps in zip(found, wanted, strict=True))


class TestLogps:

  @pytest.mark.parametrize('name', ['gemma2', 'qwen3_moe'])
  def test_are_those_of_the_trainer_in_float32(self, name):
    assert worst(name, '') < 1e-4

  def test_are_those_of_the_trainer_with_adapters_on_a_mesh(self):
    lora = lora_lib.Lora(rank=2, alpha=4.0)
    assert worst('llama3', 'fsdp:4,tensor:2', lora=lora) < 1e-4

  def test_are_those_of_the_trainer_with_experts_on_a_mesh(self):
    assert worst('qwen3_moe', 'fsdp:2,expert:2,tensor:2') < 1e-4

  def test_are_near_those_of_the_trainer_in_bfloat16(self):
    assert worst('llama3', '', 'bfloat16') < 3e-2
