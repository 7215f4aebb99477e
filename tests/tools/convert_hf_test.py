"""The way from a trained checkpoint to a Hugging Face directory, from the command line."""

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.models import hf
from jaxalign.models import hf_import
from tests import runs
from tools import convert_hf


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('convert')
  runs.write_pairs(folder / 'pairs.jsonl')
  args = [x for x in runs.flags(folder, folder / 'run', steps=1) if 'model=' not in x and 'linear' not in x]
  assert main.main([*args, '--eval_data=']) == 0
  return folder / 'run'


class TestMain:

  def test_writes_what_was_trained(self, workdir, tmp_path, capsys):
    assert convert_hf.main([f'--checkpoint={workdir}', f'--output={tmp_path / "out"}', '--dtype=float32']) == 0
    assert 'tensors in float32, of step 1' in capsys.readouterr().out
    mesh = sharding.make_mesh('', devices=jax.devices()[:1])
    loaded = checkpoint.load(workdir, mesh)
    assert hf.read_config(tmp_path / 'out') == loaded.model.config
    again = hf_import.read_params(tmp_path / 'out', loaded.model.config, mesh)
    jax.tree.map(np.testing.assert_array_equal, again, loaded.params)
    job = recipe.Job('', tmp_path, mesh, 0, str(tmp_path / 'out'), '', '', '', None, tmp_path, False, False)
    assert recipe.open_tokenizer(job).encode('Once upon') == loaded.tokenizer.encode('Once upon')

  def test_reads_a_directory_into_a_checkpoint_that_goes_back_bit_for_bit(self, tmp_path, capsys):
    model = recipe.asset('stories260K')
    assert convert_hf.main([f'--model={model}', f'--output={tmp_path / "ours"}']) == 0
    loaded = checkpoint.load(tmp_path / 'ours', sharding.make_mesh())
    assert (loaded.step, loaded.model.config) == (0, hf.read_config(model))
    assert convert_hf.main([f'--checkpoint={tmp_path / "ours"}', f'--output={tmp_path / "back"}']) == 0
    theirs, back = (st.load_file(folder / 'model.safetensors') for folder in (model, tmp_path / 'back'))
    assert set(back) == set(theirs)
    for name, x in theirs.items():
      np.testing.assert_array_equal(back[name], x)
    capsys.readouterr()
    assert (
        main.main(['jaxalign', '--mode=sample', f'--model={tmp_path / "ours"}', '--prompt=Once', '--temperature=0'])
        == 0
    )
    ours = capsys.readouterr().out
    assert main.main(['jaxalign', '--mode=sample', f'--model={model}', '--prompt=Once', '--temperature=0']) == 0
    assert capsys.readouterr().out == ours
    assert main.main(['jaxalign', '--mode=eval', f'--checkpoint={tmp_path / "ours"}']) == 2
    assert 'it was imported' in capsys.readouterr().err
    assert convert_hf.main([f'--model={model}', f'--output={tmp_path / "ours"}']) == 2

  def test_shows_what_is_made_of_what(self, capsys):
    assert convert_hf.main([f'--model={recipe.asset("stories260K")}']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        'layers/0/o (5, 8, 8, 64) <- model.layers.0.self_attn.o_proj.weight'
        ' ... model.layers.4.self_attn.o_proj.weight' in lines
    )

  def test_says_what_is_wrong(self, tmp_path, capsys):
    assert convert_hf.main([f'--checkpoint={tmp_path}', f'--output={tmp_path / "out"}']) == 2
    assert 'convert_hf: --checkpoint=' in capsys.readouterr().err
    assert convert_hf.main([f'--model={tmp_path}']) == 1
    assert 'config.json: cannot be read' in capsys.readouterr().err
    with pytest.raises(SystemExit):
      convert_hf.main([f'--checkpoint={tmp_path}'])
