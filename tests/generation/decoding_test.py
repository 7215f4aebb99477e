"""The sampler against the program that trains: log-probabilities of what was sampled, token by token."""

import pytest

from jaxalign.models import lora as lora_lib
from tools import measure


class TestLogps:

  @pytest.mark.parametrize('name', measure.CASES)
  def test_are_those_of_the_trainer_with_adapters_in_every_family(self, name):
    assert measure.drift(name, lora=lora_lib.Lora(rank=2, alpha=4.0))[0] < 1e-4

  def test_are_those_of_the_trainer_with_adapters_on_a_mesh(self):
    lora = lora_lib.Lora(rank=2, alpha=4.0)
    assert measure.drift('llama3', mesh='fsdp:4,tensor:2', lora=lora)[0] < 1e-4

  def test_are_those_of_the_trainer_with_experts_on_a_mesh(self):
    for mesh in ('fsdp:2,expert:2,tensor:2', 'expert:2,tensor:2,context:2'):
      assert measure.drift('qwen3_moe', mesh=mesh)[0] < 1e-4

  def test_are_near_those_of_the_trainer_in_bfloat16(self):
    assert measure.drift('llama3', dtype='bfloat16')[0] < 3e-2

  def test_are_near_them_where_rounding_would_send_tokens_to_other_experts(self):
    how = {'dtype': 'bfloat16', 'lora': lora_lib.Lora(rank=4, alpha=8.0)}
    assert measure.drift('qwen3_moe_raw', **how, replays=False)[0] > 5e-2
    assert measure.drift('qwen3_moe_raw', **how)[0] < 3e-2
