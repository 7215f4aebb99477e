"""The way from a trained checkpoint to a Hugging Face directory, from the command line."""

import json

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
    assert f'convert_hf: {tmp_path}: no checkpoint there' in capsys.readouterr().err
    assert convert_hf.main([f'--model={tmp_path}']) == 1
    assert 'config.json: cannot be read' in capsys.readouterr().err
    with pytest.raises(SystemExit):
      convert_hf.main([f'--checkpoint={tmp_path}'])

  def test_leaves_the_value_head_of_a_policy_behind(self, tmp_path, capsys):
    records = [{'prompt': f'Tom {i}', 'completions': [' ran', ' sat down'], 'scores': [1.0, i / 8]} for i in range(8)]
    (tmp_path / 'lists.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    data = (f'--data=jsonl:{tmp_path / "lists.jsonl"}', '--algo=dro_v', '--eval_data=')
    args = runs.flags(tmp_path, tmp_path / 'run', *data, steps=2)
    assert main.main([x for x in args if 'model=' not in x and 'linear' not in x]) == 0
    assert checkpoint.load(tmp_path / 'run', sharding.make_mesh()).model.config.score_outputs == 1
    assert convert_hf.main([f'--checkpoint={tmp_path / "run"}', f'--output={tmp_path / "out"}']) == 0
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == ['LlamaForCausalLM']
    capsys.readouterr()
    said = []
    for model in (tmp_path / 'run', tmp_path / 'out'):
      args = ('--mode=sample', f'--model={model}', '--prompt=Once', '--temperature=0', '--max_new_tokens=8')
      assert main.main(['jaxalign', *args]) == 0
      said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith('Once')
    scored = (f'--model={tmp_path / "run"}', f'--data=jsonl:{tmp_path / "pairs.jsonl"}', '--per=token')
    runs.write_pairs(tmp_path / 'pairs.jsonl', 1)
    assert main.main(['jaxalign', '--mode=score', *scored]) == 0  # by implicit rewards, as that of any policy
    assert any(x != 0 for x in json.loads(capsys.readouterr().out)['scores'][0])
