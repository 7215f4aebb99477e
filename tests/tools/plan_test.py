"""tools/plan.py: which runs it plans, and the table it makes of them."""

import argparse
import json
import pathlib

import pytest

from tools import plan

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def args():
  return argparse.Namespace(
      matrix=False,
      algos='dpo,ppo',
      models='tiny',
      topologies='h100:8',
      mesh='',
      row_length=64,
      rows_per_device=4,
      rows_at_once=2,
  )


class TestPoints:

  def test_are_every_combination(self, args):
    found = [(point['algo'], point['topology']) for point in plan.points(args)]
    assert found == [('dpo', 'h100:8'), ('ppo', 'h100:8')]

  def test_of_the_matrix_are_three_sizes_on_three_generations(self, args):
    args.matrix = True
    found = list(plan.points(args))
    assert len(found) == 3 * 3 * 4
    assert {point['topology'].split(':')[0] for point in found} == {'v5e', 'v5p', 'v6e'}


class TestFlags:

  def test_bind_a_step_of_so_many_rows_a_device(self, args):
    pairs, sampled = (plan.flags(point, args) for point in plan.points(args))
    assert '--gin=loader.Packing.rows=16' in pairs and '--gin=loader.Packing.micro_batches=2' in pairs
    assert '--gin=rollouts.Options.prompts=4' in sampled and '--gin=rollouts.Options.max_new_tokens=32' in sampled
    assert not [flag for flag in pairs if 'rollouts' in flag]
    args.mesh = 'fsdp:4,context:-1'  # Devices that share rows count as one.
    assert '--gin=loader.Packing.rows=8' in plan.flags({'algo': 'dpo', 'topology': 'v5e:4x4'}, args)


class TestMain:

  def test_plans_what_the_file_lacks_and_makes_a_table(self, tmp_path, capsys, monkeypatch):
    planned = []

    def run(command):
      planned.append(command)
      if '--algo=sft' in command:
        return {'error': 'jaxalign: no'}
      of = {'hbm_bytes': 20 * 2**30, 'hbm_limit_bytes': 15.75 * 2**30, 'fits': False, 'mfu_bound': 0.5}
      return of | ({'fits': True, 'hbm_bytes': 2**30} if '--algo=dpo' in command else {})

    monkeypatch.setattr(plan, 'plan', run)
    output = f'--output={tmp_path / "plans.jsonl"}'
    for _ in range(2):
      assert plan.main([output, '--algos=dpo,grpo,sft', '--models=tiny', '--topologies=h100:8']) == 1  # sft is refused
    assert len(planned) == 3
    assert [json.loads(line)['algo'] for line in (tmp_path / 'plans.jsonl').open()] == ['dpo', 'grpo', 'sft']
    capsys.readouterr()
    assert plan.main([output, '--table']) == 0
    cells = '1.0 of 15.8 GiB, MFU <= 50% | **does not fit**: 20.0 of 15.8 GiB | refused'
    assert capsys.readouterr().out.splitlines()[2] == f'| tiny | h100:8 | {cells} |'

  def test_table_tells_several_plans_of_an_algorithm_apart(self):
    of = {'algo': 'dpo', 'model': 'tiny', 'topology': 'h100:8'}
    of |= {'hbm_limit_bytes': 2**34, 'fits': True, 'mfu_bound': 0.5}
    flags = lambda mesh: ['--algo=dpo', f'--mesh={mesh}', '--gin=loader.Packing.rows=8', '--gin=recipe.Recipe.remat=1']
    lines = [of | {'hbm_bytes': size * 2**30, 'flags': flags(mesh)} for mesh, size in (('fsdp:8', 1), ('tensor:8', 2))]
    assert plan.table(lines).splitlines() == [
        '| model | topology | mesh and rows | dpo |',
        '|---|---|---|---|',
        '| tiny | h100:8 | fsdp:8, rows=8 | 1.0 of 16.0 GiB, MFU <= 50% |',
        '| tiny | h100:8 | tensor:8, rows=8 | 2.0 of 16.0 GiB, MFU <= 50% |',
    ]

  def test_says_what_a_plan_was_refused_for(self):
    found = plan.plan(['--mode=plan', '--algo=dpo', '--topology=v9:2x2'])
    assert found['error'].startswith('jaxalign: --topology=v9:2x2: the chips are')

  def test_does_not_write_what_may_be_otherwise_the_next_time(self, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, 'plan', lambda command: {'error': 'killed', 'failed': True})
    path = tmp_path / 'plans.jsonl'
    assert plan.main([f'--output={path}', '--topologies=h100:8,h100:16']) == 1
    assert not path.exists() and capsys.readouterr().err.count('killed') == 2

  @pytest.mark.parametrize(
      'flags,said',
      [
          (['--topologies=v9:2x2'], '--topology=v9:2x2: the chips are'),
          (['--rows_per_device=3', '--rows_at_once=2'], '--rows_at_once=2 does not divide --rows_per_device=3'),
          (['--table'], 'there are no plans in it'),
          (['--output=nowhere/plans.jsonl', '--topologies=h100:8'], 'there is no folder nowhere'),
      ],
  )
  def test_names_the_flag_that_cannot_be(self, flags, said, tmp_path, capsys):
    assert plan.main([f'--output={tmp_path / "plans.jsonl"}', *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('plan: --') and said in line

  def test_names_the_line_that_is_no_plan(self, tmp_path, capsys):
    path = tmp_path / 'plans.jsonl'
    for text, said in (('{}', 'line 1 is not of a plan'), ('no', 'line 1 is not JSON')):
      path.write_text(text)
      assert plan.main([f'--output={path}', '--table']) == 2
      assert said in capsys.readouterr().err

  def test_wants_rows(self, capsys):
    with pytest.raises(SystemExit) as stop:
      plan.main(['--output=plans.jsonl', '--rows_at_once=0'])
    assert stop.value.code == 2
    assert '--rows_at_once: 0: it is a whole number, at least 1' in capsys.readouterr().err

  @pytest.mark.parametrize(
      'args,said',
      [
          (['--algos=dpo,nope'], '--algo=nope: unknown algorithm'),
          (['--algos='], '--algo=: unknown algorithm'),
          (['--matrix', '--models=a', '--algos=dpo'], '--matrix says what is planned, and takes no --algos, --models'),
      ],
  )
  def test_refuses_what_it_cannot_plan_before_it_plans_any(self, args, said, tmp_path, capsys):
    assert plan.main([f'--output={tmp_path / "plans.jsonl"}', *args]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'plans.jsonl').exists()


class TestPlans:

  def test_of_the_files_take_no_more_than_what_runs(self):
    lines = [line for name in ('plans.jsonl', 'plans_long.jsonl') for line in (ROOT / 'tools' / name).open()]
    programs = [one for line in lines for one in json.loads(line)['programs'] if one['seconds']]
    assert {one['name'] for one in programs} == {'step', 'reference', 'prefill', 'decode', 'annotation'}
    for one in programs:
      if one['name'] != 'decode':  # of which rows of a device are too few for what counts as a product
        assert one['model_flops'] < 1.001 * one['flops']


class TestReadme:

  def test_tables_are_those_of_the_files(self):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    read = lambda name: [json.loads(line) for line in (ROOT / 'tools' / name).read_text(encoding='utf-8').splitlines()]
    assert plan.table(read('plans.jsonl')) in readme
    for line in read('plans_long.jsonl'):
      mesh = ','.join(f'{axis}:{size}' for axis, size in line['mesh'].items())
      memory = f'{line["hbm_bytes"] / 2**30:.1f} of {line["hbm_limit_bytes"] / 2**30:.1f} GiB'
      numbers = f'{line["rows"]} | {memory} | {line["seconds_bound"]:.1f} | {100 * line["mfu_bound"]:.0f} %'
      assert line['fits'] and line['row_length'] == 131_072
      assert f'| {line["algo"]}, `{line["model"]}` | {line["topology"]} | `{mesh}` | {numbers} |' in readme
