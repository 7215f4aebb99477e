"""Model gin files of real sizes, against the parameter counts that their makers publish."""

import jax
import numpy as np
import pytest

from jaxalign.cli import catalog
from jaxalign.cli import config
from jaxalign.models import transformer

# As the safetensors metadata of each release has it.
EXACT = {
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'llama3_1_8b': 8_030_261_248,
    'llama3_8b': 8_030_261_248,
    'llama3_1_70b': 70_553_706_496,
    'mixtral_8x7b': 46_702_792_704,
    'qwen2_5_0_5b': 494_032_768,
    'qwen2_5_1_5b': 1_543_714_304,
    'qwen2_5_3b': 3_085_938_688,
    'qwen2_5_7b': 7_615_616_512,
    'qwen2_5_14b': 14_770_033_664,
    'qwen2_5_32b': 32_763_876_352,
    'qwen3_0_6b': 596_049_920,
    'qwen3_1_7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'qwen3_14b': 14_768_307_200,
    'qwen3_32b': 32_762_123_264,
    'qwen3_30b_a3b': 30_532_122_624,
    'gemma2_2b': 2_614_341_888,
    'gemma2_9b': 9_241_705_984,
    'gemma2_27b': 27_227_128_320,
    'gemma3_1b': 999_885_952,
    'smollm2_135m': 134_515_008,
    'smollm2_360m': 361_821_120,
    'smollm2_1_7b': 1_711_376_384,
}
# Millions without embeddings, Gemma Team, 2025, https://arxiv.org/abs/2503.19786, Table 1.
MILLIONS = {'gemma3_1b': 698, 'gemma3_4b': 3209, 'gemma3_12b': 10759, 'gemma3_27b': 25600}


def model_of(name):
  config.parse('dpo', files=[f'models/{name}.gin'], user_files=[], bindings=[])
  return transformer.Transformer(config.get('recipe.Recipe')().model)


def counts(name):
  """Parameters, those of the padded vocabulary left out, in all and of the embedding."""
  model = model_of(name)
  one = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(lambda key: model.init(key, one, one, one)['params'], jax.random.key(0))
  total = sum(x.size for x in jax.tree.leaves(shapes))
  c = model.config
  tables = 1 if c.tie_embeddings else 2
  return total - tables * (c.padded_vocab - c.vocab_size) * c.embed_dim, c.vocab_size * c.embed_dim


class TestSizes:

  @pytest.mark.parametrize('name', EXACT)
  def test_are_those_that_were_published(self, name):
    assert counts(name)[0] == EXACT[name]

  @pytest.mark.parametrize('name', MILLIONS)
  def test_are_those_of_the_report_without_embeddings(self, name):
    total, embedding = counts(name)
    assert round((total - embedding) / 1e6) == pytest.approx(MILLIONS[name], abs=1)

  def test_are_checked_for_every_file(self):
    names = {path.stem for path in (catalog.ROOT / 'models').glob('*.gin')}
    assert names - {'tiny', 'stories15M', 'stories260K'} == EXACT.keys() | MILLIONS.keys()
