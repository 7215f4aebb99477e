"""The same run on one device, on eight, and in two processes gives the same numbers."""

import json

import jax
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import sharding
from tests import runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('mesh')
  runs.write_pairs(folder / 'pairs.jsonl')
  return folder


def flags(folder, name, *more):
  """20 steps; a rate at which rounding does not grow into other numbers."""
  args = runs.flags(folder, folder / name, *more, steps=20)
  return [x.replace('lr = 0.01', 'lr = 0.001').replace('save_every=4', 'save_every=0') for x in args]


@pytest.fixture(scope='module')
def single(folder):
  code, err = runs.finished(runs.spawn(flags(folder, 'single'), devices=1))
  assert code == 0, err
  return folder / 'single'


def assert_like(workdir, single):
  wanted, found = runs.logged(single), runs.logged(workdir)
  assert wanted.keys() == found.keys()
  np.testing.assert_allclose(found[1]['loss'], wanted[1]['loss'], atol=1e-6)
  np.testing.assert_allclose(found[1]['grad_norm'], wanted[1]['grad_norm'], rtol=1e-4)
  for step, line in wanted.items():
    np.testing.assert_allclose(found[step]['loss'], line['loss'], atol=1e-4, err_msg=f'step {step}')
    assert found[step]['num_tokens'] == line['num_tokens']
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
  a, b = runs.params_of(workdir), runs.params_of(single)
  for path, x in jax.tree_util.tree_leaves_with_path(a):
    y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
    assert norm(x - y) <= 1e-3 * norm(y), path


class TestMeshes:

  @pytest.mark.parametrize('mesh', ['data:2,fsdp:2,tensor:2', 'tensor:2,context:4', 'fsdp:4,expert:2'])
  def test_of_eight_devices_give_the_numbers_of_one(self, folder, single, mesh):
    name = mesh.replace(':', '').replace(',', '')
    assert main.main(flags(folder, name, f'--mesh={mesh}')) == 0
    assert_like(folder / name, single)

  def test_of_two_processes_give_the_numbers_of_one(self, folder, single):
    other_cache = f'--cache_dir={folder / "other_cache"}'
    processes = runs.spawn_together(flags(folder, 'two', '--mesh=data:2,fsdp:2', other_cache), 2)
    for process in processes:
      code, err = runs.finished(process)
      assert code == 0, err
    assert_like(folder / 'two', single)
    assert len(list((folder / 'two' / 'tensorboard').iterdir())) == 1


# A reference that stays and one that moves, each in the step; whole distributions, and rivals that are drawn.
LIVE = {
    'stays': (
        '--gin=recipe.Recipe.loss_fn = @compose.mixture',
        '--gin=compose.mixture.losses = [(1.0, @shaped.tdpo2), (0.01, @shaped.pairwise_cringe)]',
        *(f'--gin=shaped.tdpo2.{name} = 0.5' for name in ('alpha', 'beta')),
        *(f'--gin=shaped.pairwise_cringe.{name} = 1.0' for name in ('alpha', 'gate_margin', 'temperature')),
    ),
    'moves': ('--algo=tr_dpo', '--gin=reference.Sync.every = 3', '--gin=preference.dpo.beta = 0.5'),
}


class TestLive:

  def test_references_of_two_processes_give_the_numbers_of_one(self, folder):
    held = f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:6]'
    of = lambda which, *more: [
        x.replace('--steps=20', '--steps=8') for x in flags(folder, *more, *LIVE[which], held) if x
    ]
    both = [json.dumps(of(which, f'{which}-two', '--mesh=data:2,fsdp:2')) for which in LIVE]
    processes = runs.spawn_together(['', *both], 2, program=('-c', runs.ONE_BY_ONE))
    for which in LIVE:
      assert main.main(of(which, f'{which}-one')) == 0
    for process in processes:
      code, err = runs.finished(process)
      assert code == 0, err
    for which in LIVE:
      one, two = (folder / f'{which}-{count}' for count in ('one', 'two'))
      assert_like(two, one)
      summaries = [json.loads((workdir / 'summary.json').read_text()) for workdir in (one, two)]
      assert summaries[0]['eval/loss'] == pytest.approx(summaries[1]['eval/loss'], abs=1e-4)
      assert abs(summaries[0]['eval/loss'] - summaries[0]['eval/loss_before']) > 1e-2


class TestStepZero:

  @pytest.mark.parametrize('dtype,tolerance', [('float32', 1e-6), ('bfloat16', 1e-2)])
  @pytest.mark.parametrize(
      'mesh,reference', [('data:8', 'cached'), ('fsdp:4,tensor:2', 'live'), ('data:2,tensor:2,context:2', 'cached')]
  )
  def test_is_log_2_without_margins(self, tmp_path, folder, mesh, dtype, tolerance, reference):
    more = (
        f'--mesh={mesh}',
        f"--gin=recipe.Recipe.dtype = '{dtype}'",
        f"--gin=recipe.Recipe.reference = '{reference}'",
        f'--workdir={tmp_path / "run"}',
    )
    args = [x.replace('--steps=20', '--steps=1') for x in flags(folder, 'unused', *more)]
    assert main.main(args) == 0
    first = runs.logged(tmp_path / 'run')[1]
    np.testing.assert_allclose(first['loss'], np.log(2), atol=tolerance)
    np.testing.assert_allclose(first['rewards/margins'], 0, atol=tolerance)


class TestExperts:

  @pytest.mark.parametrize('lora', ['', '--lora=rank:2'])
  def test_are_made_and_trained_alike_on_meshes(self, tmp_path, folder, lora):
    experts = [f'--gin=architecture.Config.{name}' for name in ('num_experts=4', 'experts_per_token=2')]
    losses = {}
    for mesh in ('data:8', 'fsdp:4,expert:2'):
      more = f'--mesh={mesh}', f'--workdir={tmp_path / mesh}', *experts, *filter(None, [lora])
      assert main.main([x.replace('--steps=20', '--steps=4') for x in flags(folder, 'unused', *more)]) == 0
      losses[mesh] = [line['loss'] for line in runs.logged(tmp_path / mesh).values()]
    assert len(set(losses['data:8'])) == 4
    np.testing.assert_allclose(losses['fsdp:4,expert:2'], losses['data:8'], atol=1e-5)

  def test_are_refused_where_the_mesh_does_not_divide_them(self, tmp_path, folder, capsys):
    experts = [f'--gin=architecture.Config.{name}' for name in ('num_experts=4', 'experts_per_token=2')]
    assert main.main(flags(folder, 'unused', '--mesh=expert:8', f'--workdir={tmp_path / "w"}', *experts)) == 2
    assert "has 4 'experts', which expert:8 does not divide" in capsys.readouterr().err


class TestLoad:

  def test_gives_the_same_parameters_on_any_mesh(self, single):
    loaded = checkpoint.load(single, sharding.make_mesh('fsdp:4,tensor:2'))
    runs.assert_same(jax.device_get(loaded.params), runs.params_of(single))
    assert loaded.params['embed'].sharding.num_devices == 8
    assert loaded.tokenizer.decode(loaded.tokenizer.encode('Once upon a time')) == 'Once upon a time'
