"""Models merged from the command line."""

import json
import shutil

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.data import templates
from tools import merge

STORIES = 'builtin:stories260K'


def params_of(spec):
  return jax.device_get(recipe.load(str(spec), sharding.make_mesh(), dtype='float32').params)


class TestMain:

  def test_writes_a_checkpoint_that_is_a_model(self, tmp_path, capsys):
    args = 'linear', '--models', STORIES, STORIES, '--weights', '0.5', '0.25', f'--output={tmp_path / "half"}'
    assert merge.main(args) == 0
    assert 'linear of' in capsys.readouterr().out
    found, whole = params_of(tmp_path / 'half'), params_of(STORIES)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 0.75 * y, rtol=1e-6), found, whole)
    assert checkpoint.load(tmp_path / 'half', sharding.make_mesh()).run['hf_config']['model_type'] == 'llama'
    args = (
        'extrapolate',
        f'--base={tmp_path / "half"}',
        '--models',
        STORIES,
        '--alpha=1',
        f'--output={tmp_path / "far"}',
    )
    assert merge.main(args) == 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 1.25 * y, rtol=1e-5), params_of(tmp_path / 'far'), whole)

  @pytest.mark.parametrize(
      'args,said',
      [
          (('slerp', '--base', STORIES, '--models', STORIES), '--models: slerp takes 2'),
          (('ties', '--models', STORIES), '--base: ties needs the model'),
          (('linear', '--models', STORIES, '--weights', '1', '2'), '--weights: 2 for 1 models'),
          (('linear', '--models', 'nowhere'), 'nowhere: no such file or directory'),
          (('linear', '--models', STORIES, '--base', STORIES), '--base: linear does not read it'),
          (
              ('slerp', '--base', STORIES, '--models', STORIES, STORIES, '--alpha', '1'),
              '--alpha: slerp does not read it',
          ),
      ],
  )
  def test_refuses_what_does_not_fit_in_one_line(self, tmp_path, capsys, args, said):
    assert merge.main([*args, f'--output={tmp_path / "out"}']) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()

  def test_refuses_other_tokenizers_but_not_other_templates(self, tmp_path, capsys):
    shutil.copytree(recipe.asset('stories260K'), tmp_path / 'chat')
    config = {'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': templates.BY_NAME['chatml']}
    (tmp_path / 'chat' / 'tokenizer_config.json').write_text(json.dumps(config))
    args = 'linear', '--models', STORIES, str(tmp_path / 'chat'), f'--output={tmp_path / "out"}'
    assert merge.main(args) == 0, capsys.readouterr().err
    shutil.copytree(recipe.asset('stories260K'), tmp_path / 'other')
    (model,) = (tmp_path / 'other').glob('*.model')
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    proto.pieces[400].piece, proto.pieces[401].piece = proto.pieces[401].piece, proto.pieces[400].piece
    model.write_bytes(proto.SerializeToString())
    args = 'linear', '--models', STORIES, str(tmp_path / 'other'), f'--output={tmp_path / "none"}'
    assert merge.main(args) == 2
    said = capsys.readouterr().err
    assert f"other: its tokenizer is not that of {STORIES}: token 400 is '" in said and said.count('\n') == 1
    assert not (tmp_path / 'none').exists()
