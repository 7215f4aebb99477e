"""Configurations: what is refused, the layers they describe, and their FLOPs."""

import json

import pytest

from jaxalign import types
from jaxalign.models import architecture

SIZES = (50, 5, 16, 4, 2, 4, 24, 64)
NAMES = ('vocab_size', 'num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_size', 'mlp_dim', 'max_length')
FIELDS = dict(zip(NAMES, SIZES))


class TestConfig:

  @pytest.mark.parametrize(
      'changes,said',
      [
          ({'norms': 'none'}, "norms = 'none': it is one of 'pre', 'post', 'both'"),
          ({'activation': 'relu'}, "activation = 'relu': it is one of 'silu'"),
          ({'pattern': ('sparse',)}, "pattern = ('sparse',): it holds any of global, local, nope"),
          ({'pattern': ('local',)}, "window = 0: 'local' layers of the pattern need it"),
          ({'norm_eps': 0.0}, 'norm_eps = 0.0: it must be positive'),
          ({'norm_eps': -1.0}, 'norm_eps = -1.0: it must be positive'),
          ({'num_kv_heads': 3}, 'num_heads = 4: it must be a multiple of num_kv_heads = 3'),
          ({'head_size': 5}, 'head_size = 5'),
          ({'num_layers': 0}, 'num_layers = 0: it must be positive'),
          ({'attn_softcap': -1.0}, 'attn_softcap = -1.0: it must be positive'),
          ({'num_experts': 1}, 'experts_per_token = 2: there are 1 experts'),
          ({'rope_fraction': 0.25}, 'head_size = 4: rotary positions want an even number'),
      ],
  )
  def test_refuses_what_cannot_be(self, changes, said):
    with pytest.raises(types.UsageError) as caught:
      architecture.Config(**(FIELDS | changes))
    assert f'architecture.Config.{said}' in str(caught.value)

  def test_repeats_its_pattern_and_begins_it_once_more(self):
    config = architecture.Config(*SIZES, pattern=['local', 'global'], window=3)
    assert config.kinds == ('local', 'global', 'local', 'global', 'local')
    assert config.repeats == 2

  def test_comes_back_from_json(self):
    assert architecture.Config(**architecture.Config(*SIZES).to_json()) == architecture.Config(*SIZES)
    scaling = architecture.RopeScaling('yarn', 4.0, original_length=32)
    config = architecture.Config(*SIZES, pattern=['local', 'nope'], window=3, rope_scaling=scaling)
    assert architecture.Config.from_json(json.loads(json.dumps(config.to_json()))) == config


class TestRopeScaling:

  @pytest.mark.parametrize('kind,said', [('ntk', "kind = 'ntk'"), ('llama3', "original_length: 'llama3' needs it")])
  def test_refuses_what_cannot_be(self, kind, said):
    with pytest.raises(types.UsageError, match=said):
      architecture.RopeScaling(kind, 2.0)


class TestFlopsPerToken:

  def test_of_llama_3_8b_is_six_per_parameter_and_attention(self):
    llama = architecture.Config(128256, 32, 4096, 32, 8, 128, 14336, 8192, tie_embeddings=False)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    attention = 32 * 2 * 2 * 4096 * 8192 / 2  # a query reads half of the row: scores, then values
    assert architecture.flops_per_token(llama, 8192) == 3 * (2 * matrices + attention)
    assert architecture.flops_per_token(llama, 8192, frozen=True) == 2 * 2 * matrices + 3 * attention
    assert architecture.flops_per_token(llama, 8192, head=False) == 3 * (2 * (matrices - 4096 * 128256) + attention)

  def test_counts_one_more_pass_forward_of_a_live_reference(self):
    # Of each of two layers: queries, keys with values, what follows them, and three products of the feed-forward half.
    layer = 16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 32
    forward = 2 * (2 * layer + 16 * 100), 2 * 2 * 2 * 24 * (10 / 2)  # the head too; scores, then values, of five keys
    config = architecture.Config(100, 2, 16, 4, 2, 6, 32, 64)
    assert architecture.flops_per_token(config, 10, live=True) == 4 * sum(forward)
    assert architecture.flops_per_token(config, 10, frozen=True, live=True) == 3 * forward[0] + 4 * forward[1]

  def test_counts_the_keys_of_a_window(self):
    whole = architecture.flops_per_token(architecture.Config(*SIZES), 100)
    local = architecture.flops_per_token(architecture.Config(*SIZES, pattern=('local',), window=10), 100)
    # A query sees half of its own key and all of those before it, so that the mean of a whole row is 100 / 2.
    keys = sum(min(t + 0.5, 10) for t in range(100)) / 100
    assert whole - local == pytest.approx(12 * 5 * 16 * (50 - keys))

  def test_counts_the_experts_that_a_token_takes(self):
    plain = architecture.flops_per_token(architecture.Config(*SIZES), 10)
    mixed = architecture.flops_per_token(architecture.Config(*SIZES, num_experts=4, experts_per_token=3), 10)
    assert mixed - plain == 6 * 5 * (2 * 3 * 16 * 24 + 16 * 4)
