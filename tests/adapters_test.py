"""Whole runs that train adapters, from the command line: step 0, what is saved, resumed, restored and refused."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.cli import command
from jaxalign.cli import config
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import lora as lora_lib
from tests import runs
from tools import convert_hf

ONE = sharding.make_mesh('', devices=jax.devices()[:1])
BUILTIN = (
    '--model=builtin:stories260K',
    '--gin=optim.adamw.schedule = @optim.constant',
    '--gin=optim.constant.lr = 0.01',
)


def flags(folder, workdir, *more, lora='rank:2', steps=3):
  """A run from the embedded model, in which the adapters move."""
  plain = [x for x in runs.flags(folder, workdir, steps=steps) if 'model=' not in x and 'linear' not in x]
  return [*plain, *BUILTIN, f'--lora={lora}', *more]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.folder_with_pairs(tmp_path_factory, 'adapters')


@pytest.fixture(scope='module')
def trained(folder):
  """The workdir of a finished run of DPO, with data held out."""
  workdir = folder / 'trained'
  assert main.main(flags(folder, workdir, f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:10]')) == 0
  return workdir


def summary(workdir):
  return json.loads((workdir / 'summary.json').read_text())


class TestStepZero:

  @pytest.mark.parametrize(
      'lora,reference',
      [
          ('rank:2', 'live'),
          ('rank:2,dora:true', 'cached'),
          ('rank:2,base:nf4', 'cached'),
          ('rank:2,targets:q+v,dropout:0.5,rslora:true', 'live'),
      ],
  )
  def test_is_log_2_with_no_margin(self, folder, tmp_path, lora, reference):
    more = f'--gin=recipe.Recipe.reference = {reference!r}', '--eval_data='
    assert main.main(flags(folder, tmp_path / 'w', *more, lora=lora, steps=2)) == 0
    first, second = (runs.logged(tmp_path / 'w')[i] for i in (1, 2))
    assert first['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(first['rewards/margins']) < 1e-5
    assert abs(second['rewards/margins']) > 1e-3

  @pytest.mark.parametrize('mesh', ['fsdp:4,tensor:2', 'data:2,tensor:2,context:2'])
  def test_is_so_on_a_mesh_and_in_bfloat16(self, folder, tmp_path, mesh):
    more = f'--mesh={mesh}', '--eval_data=', "--gin=recipe.Recipe.dtype = 'bfloat16'"
    assert main.main(flags(folder, tmp_path / 'w', *more, steps=1)) == 0
    assert runs.logged(tmp_path / 'w')[1]['loss'] == pytest.approx(np.log(2), abs=1e-2)

  def test_of_an_adapter_that_was_trained_before(self, folder, trained, tmp_path, capsys):
    assert convert_hf.main([f'--checkpoint={trained}', f'--output={tmp_path / "peft"}', '--adapter']) == 0
    held = f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:10]'
    assert main.main(flags(folder, tmp_path / 'w', held, lora=f'adapter:{tmp_path / "peft"}')) == 0
    assert runs.logged(tmp_path / 'w')[1]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    # It goes on from the policy that was saved, and its reference is that policy.
    start = json.loads((tmp_path / 'w' / 'before.json').read_text())['held_out']['eval/logps/chosen']
    assert start == pytest.approx(summary(trained)['eval/logps/chosen'], abs=1e-3)
    found = evaluated(capsys, tmp_path / 'w')
    assert found['eval/rewards/margins'] == pytest.approx(summary(tmp_path / 'w')['eval/rewards/margins'], abs=1e-5)
    assert abs(found['eval/rewards/margins']) > 1e-3

  def test_of_random_weights_in_few_bits(self, folder, tmp_path):
    args = [*runs.flags(folder, tmp_path / 'w', '--eval_data=', steps=1), '--lora=rank:2,base:nf4']
    assert main.main(args) == 0
    assert runs.logged(tmp_path / 'w')[1]['loss'] == pytest.approx(np.log(2), abs=1e-6)


def evaluated(capsys, workdir, *more):
  """What --mode=eval prints of a run."""
  capsys.readouterr()
  assert main.main(['jaxalign', '--mode=eval', f'--checkpoint={workdir}', *more]) == 0
  return json.loads(capsys.readouterr().out)


class TestCheckpoints:

  def test_hold_the_base_once_and_adapters_of_every_step(self, trained):
    loaded = checkpoint.load(trained, ONE)
    adapters, base = lora_lib.split(loaded.params)
    read = hf_import.read_params(recipe.asset('stories260K'), loaded.model.config, ONE)
    jax.tree.map(np.testing.assert_array_equal, base, read)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(adapters) == 2 * 5 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 172))
    folder = trained / 'checkpoints'
    checkpoint.check_shapes(folder / '3' / 'params', adapters)
    checkpoint.check_shapes(folder / 'base', base)
    assert not (folder / 'start').exists()

  def test_share_the_base_with_the_reference(self, trained):
    loaded = checkpoint.load(trained, ONE)
    ref = checkpoint.load_reference(trained, loaded)
    assert ref.model.lora is None
    assert ref.moving == {}
    assert ref.fixed['embed'] is loaded.params['embed']

  @pytest.mark.parametrize('mesh', ['', 'fsdp:4,tensor:2'])
  def test_are_evaluated_as_at_the_end_of_training_on_any_mesh(self, trained, capsys, mesh):
    found, wanted = evaluated(capsys, trained, f'--mesh={mesh}'), summary(trained)
    for name in ('eval/loss', 'eval/rewards/margins', 'eval/logps/chosen'):
      assert found[name] == pytest.approx(wanted[name], abs=1e-4), name
    assert abs(found['eval/rewards/margins']) > 1e-3

  def test_are_resumed_bit_for_bit(self, folder, capsys):
    lora = 'rank:2,dropout:0.3,base:int8'
    straight, halves = folder / 'straight', folder / 'halves'
    assert main.main(flags(folder, straight, '--eval_data=', '--save_every=2', lora=lora, steps=4)) == 0
    for steps in (2, 4):
      assert main.main(flags(folder, halves, '--eval_data=', '--save_every=2', lora=lora, steps=steps)) == 0
    runs.assert_same(runs.params_of(straight), runs.params_of(halves))
    one, other = (runs.logged(workdir)[4] | {'compilations': 0} for workdir in (straight, halves))
    assert one == other
    # From the checkpoint alone, in 8 bits as it was trained.
    held = f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:10]', '--gin=evaluate.evaluate.samples = None'
    assert abs(evaluated(capsys, straight, *held)['eval/rewards/margins']) > 1e-3

  def test_are_not_resumed_on_another_base(self, folder, tmp_path, capsys):
    model = tmp_path / 'model'
    shutil.copytree(recipe.asset('stories260K'), model)
    of = lambda steps: [
        x if 'model=' not in x else f'--model={model}'
        for x in flags(folder, tmp_path / 'w', '--eval_data=', steps=steps)
    ]
    assert main.main(of(1)) == 0
    tensors = st.load_file(model / 'model.safetensors')
    st.save_file(tensors | {'model.norm.weight': tensors['model.norm.weight'] + 1}, model / 'model.safetensors')
    assert main.main(of(2)) == 1
    assert f'--model={model}: not the weights that the run in {tmp_path / "w"} began with' in capsys.readouterr().err
    assert checkpoint.find(tmp_path / 'w')[1] == 1

  def test_are_a_base_for_other_adapters(self, folder, trained, tmp_path):
    more = f'--model={trained}', '--eval_data='
    args = [x for x in flags(folder, tmp_path / 'w', *more, steps=1) if 'builtin:stories260K' not in x]
    assert main.main(args) == 0
    assert runs.logged(tmp_path / 'w')[1]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    old = checkpoint.load(trained, ONE)
    merged = lora_lib.merge(old.params, old.model.lora)
    new = lora_lib.split(checkpoint.load(tmp_path / 'w', ONE).params)[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), new, merged)


class TestAlgorithms:

  @pytest.mark.parametrize('algo', ['sft', 'rm'])
  def test_train_adapters_too(self, folder, tmp_path, capsys, algo):
    data = folder / 'texts.jsonl'
    data.write_text(''.join(json.dumps({'prompt': f'Story {i}:', 'completion': ' a cat.'}) + '\n' for i in range(20)))
    held = f'--eval_data=jsonl:{data if algo == "sft" else folder / "pairs.jsonl"}[:10]'
    more = f'--algo={algo}', held, *([f'--data=jsonl:{data}'] if algo == 'sft' else [])
    assert main.main(flags(folder, tmp_path / 'w', *more)) == 0
    found = evaluated(capsys, tmp_path / 'w')
    assert found['eval/loss'] == pytest.approx(summary(tmp_path / 'w')['eval/loss'], abs=1e-4)
    assert found['eval/loss'] < summary(tmp_path / 'w')['eval/loss_before']

  def test_export_what_they_trained_merged_or_as_an_adapter(self, folder, tmp_path):
    assert main.main(flags(folder, tmp_path / 'w', '--algo=rm', '--eval_data=', lora='rank:2,dora:true')) == 0
    loaded = checkpoint.load(tmp_path / 'w', ONE)
    for name, *more in (('merged', '--dtype=float32'), ('adapter', '--adapter')):
      assert convert_hf.main([f'--checkpoint={tmp_path / "w"}', f'--output={tmp_path / name}', *more]) == 0
    config = hf.read_config(tmp_path / 'merged')
    assert config.score_outputs
    merged = hf_import.read_params(tmp_path / 'merged', config, ONE)
    wanted = lora_lib.merge(loaded.params, loaded.model.lora)
    jax.tree.map(np.testing.assert_array_equal, merged, wanted)
    tensors = st.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    np.testing.assert_array_equal(tensors['base_model.model.score.weight'][0], loaded.params['score'][:, 0])
    assert np.any(loaded.params['score'])

  def test_train_and_export_a_process_reward_model(self, folder, tmp_path, capsys):
    data = folder / 'steps.jsonl'
    record = {'prompt': 'Tom', 'completions': [' He was happy.', ' He cried.'], 'labels': [True, False]}
    data.write_text(20 * (json.dumps(record) + '\n'))
    # At a rate of 0.01 the loss jumps about, and ends where chance has it.
    more = '--algo=prm', f'--data=jsonl:{data}', f'--eval_data=jsonl:{data}[:8]', '--gin=optim.constant.lr = 0.001'
    assert main.main(flags(folder, tmp_path / 'w', *more, steps=40)) == 0
    found = evaluated(capsys, tmp_path / 'w')
    assert (found['eval/accuracy'], found['eval/right'], found['eval/n']) == (1, 0.5, 16)
    loaded = checkpoint.load(tmp_path / 'w', ONE)
    for name, *more in (('merged',), ('adapter', '--adapter')):
      assert convert_hf.main([f'--checkpoint={tmp_path / "w"}', f'--output={tmp_path / name}', *more]) == 0
    assert hf.read_json(tmp_path / 'merged' / 'config.json')['architectures'] == ['LlamaForTokenClassification']
    assert hf.read_json(tmp_path / 'adapter' / 'adapter_config.json')['task_type'] == 'TOKEN_CLS'
    tensors = st.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    np.testing.assert_array_equal(tensors['base_model.model.score.bias'], loaded.params['score_bias'])
    capsys.readouterr()
    args = f'--data=jsonl:{data}[:1]', '--per=step', f'--cache_dir={tmp_path}'
    assert main.main(['jaxalign', '--mode=score', f'--model={tmp_path / "merged"}', *args]) == 0
    ((right, wrong),) = json.loads(capsys.readouterr().out)['scores']
    assert right[1] > right[0] and wrong[1] < wrong[0]
    again = '--algo=rm', f'--model={tmp_path / "merged"}', '--eval_data='
    assert main.main(flags(folder, tmp_path / 'v', *again)) == 2
    assert 'its head that scores has 2 outputs with a bias, --algo=rm trains one of 1' in capsys.readouterr().err

  def test_go_on_from_a_reward_head_that_keeps_every_bit(self, folder, tmp_path):
    assert main.main(flags(folder, tmp_path / 'w', '--algo=rm', '--eval_data=', steps=2)) == 0
    head = checkpoint.load(tmp_path / 'w', ONE).params['score']
    low = '--algo=rm', '--eval_data=', f'--model={tmp_path / "w"}', "--gin=recipe.Recipe.dtype = 'bfloat16'"
    low += ('--gin=optim.constant.lr = 0.0',)
    args = [x for x in flags(folder, tmp_path / 'v', steps=1) if 'model=' not in x and '.lr' not in x]
    assert main.main([*args, *low]) == 0
    np.testing.assert_array_equal(checkpoint.load(tmp_path / 'v', ONE).params['score'], head)

  def test_say_that_a_base_of_random_weights_is_in_no_directory(self, folder, tmp_path, capsys):
    assert main.main([*runs.flags(folder, tmp_path / 'w', '--lora=rank:2', steps=1)]) == 0
    assert convert_hf.main([f'--checkpoint={tmp_path / "w"}', f'--output={tmp_path / "out"}', '--adapter']) == 2
    assert 'its base, tiny, was drawn at random' in capsys.readouterr().err

  def test_say_that_there_are_no_adapters_to_export(self, folder, tmp_path, capsys):
    args = [x for x in flags(folder, tmp_path / 'w', '--eval_data=', steps=1) if 'lora' not in x]
    assert main.main(args) == 0
    assert convert_hf.main([f'--checkpoint={tmp_path / "w"}', f'--output={tmp_path / "out"}', '--adapter']) == 2
    assert 'it holds no adapters' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


class TestFlag:

  @pytest.mark.parametrize(
      'lora,said',
      [
          ('rank:x', "--lora=rank:x: 'x' is no value of rank"),
          ('size:3', "--lora=size:3: 'size:3' is not NAME:VALUE; the names are rank, alpha"),
          ('rank:0', 'lora.Lora.rank = 0: it must be at least 1'),
          ('dora:yes', "--lora=dora:yes: 'yes' is no value of dora"),
          ('targets:q+z', "lora.Lora.targets: 'z' is none of q, k, v, o"),
          ('adapter:nowhere', "lora.Lora.adapter = 'nowhere': there is no adapter_config.json"),
      ],
  )
  def test_names_what_is_wrong(self, folder, tmp_path, capsys, lora, said):
    assert main.main(flags(folder, tmp_path / 'w', lora=lora)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'jaxalign: {said}')
    assert not (tmp_path / 'w').exists()

  def test_is_the_same_as_the_gin_file(self):
    def configured(files, bindings):
      config.parse('dpo', files=['models/stories260K.gin'], user_files=files, bindings=bindings)
      return config.get('recipe.Recipe')().lora

    found = configured([f'{runs.ROOT}/gin_configs/options/lora.gin'], [])
    assert found == configured([], command.lora_bindings('rank:16,alpha:32')) == lora_lib.Lora(16, 32.0)
