"""Models merged from the command line."""

import jax
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import sharding
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
