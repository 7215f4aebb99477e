"""What `--mode=plan` says of runs, against counts by hand."""

import dataclasses
import functools
import json
import math
import shlex
import types as pytypes
from typing import Any

import jax
import pytest

from jaxalign import main
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import types
from jaxalign.data import loader
from jaxalign.models import architecture
from jaxalign.planning import plan as plan_lib
from jaxalign.planning import programs
from jaxalign.planning import search
from jaxalign.planning import topology

L, D, N, K, H, F, V = 3, 128, 4, 2, 64, 256, 1024
ROWS, LENGTH = 16, 256
MATRICES = L * (D * H * (2 * N + 2 * K) + 3 * D * F)
PARAMS = MATRICES + 2 * D * V + (2 * L + 1) * D
ATTENTION = L * N * H * LENGTH  # twice the products of queries and keys for a token that sees half of them


def flags(where, algo, *more):
  sizes = f'vocab_size = {V}', f'num_layers = {L}', f'embed_dim = {D}', f'num_heads = {N}', f'num_kv_heads = {K}'
  sizes += f'head_size = {H}', f'mlp_dim = {F}', 'max_length = 4096', 'tie_embeddings = False'
  bound = [f'architecture.Config.{one}' for one in sizes]
  bound += ["recipe.Recipe.dtype = 'bfloat16'", "recipe.Recipe.remat = 'full'"]
  bound += [f'loader.Packing.rows = {ROWS}', f'loader.Packing.row_length = {LENGTH}', *more]
  named = '--mode=plan', f'--algo={algo}', '--model=llama3_1_8b', f'--topology={where}', '--json', '--eval_data='
  return ['jaxalign', *named, *(f'--gin={one}' for one in bound)]


@pytest.fixture(scope='module', autouse=True)
def in_haste(optimised):
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  yield
  jax.config.update('jax_exec_time_optimization_effort', 0.0)


def planned(capsys, args):
  code = main.main(args)
  out = capsys.readouterr()
  if code and 'libtpu is wanted' in out.err:
    pytest.skip('libtpu is not installed')
  assert code == 0, out.err
  return json.loads(out.out)


@pytest.mark.libtpu
class TestPlan:

  def test_of_pairs_counts_memory_and_products(self, capsys):
    found = planned(capsys, flags('v5e:2x2', 'dpo'))
    step, reference = found['programs']
    assert [step['name'], reference['name']] == ['step', 'reference']
    classes = found['hbm_by_class']
    assert classes['parameters'] == PARAMS * 4 / 4 + (2 * L + 1) * D * 4 * 3 / 4  # norms are whole on each of the four
    assert classes['optimizer'] == pytest.approx(2 * classes['parameters'], abs=16)
    assert sum(classes.values()) == pytest.approx(found['hbm_bytes'], rel=0.01)
    assert found['fits'] and found['hbm_bytes'] < found['hbm_limit_bytes'] == 15.75 * 2**30
    tokens = ROWS * LENGTH / 4
    head = D * V
    # Forward twice, as all is computed again but what the last product gives, and backward; of the head likewise.
    again = MATRICES - L * F * D
    kernels = ATTENTION * (2 + 2 + 4 + 3) / 2 * 2
    assert step['flops'] == pytest.approx(tokens * (2 * (3 * MATRICES + again + 4 * head) + kernels), rel=1e-3)
    assert step['model_flops'] == pytest.approx(tokens * (6 * (MATRICES + head) + 6 * ATTENTION), rel=1e-6)
    assert reference['flops'] == pytest.approx(tokens * (2 * (MATRICES + head) + 2 * ATTENTION), rel=1e-3)
    assert found['tokens_per_step'] == ROWS * LENGTH
    bound = step['model_flops'] / (197e12 * found['seconds_bound'])
    assert found['mfu_bound'] == pytest.approx(bound)
    assert 0 < bound < 1
    gathered = found['collectives']['all-gather']['bytes']
    # In 16 bits: weights of each layer forward and again backward; the head for both passes, once. Of embeddings what
    # is wanted is exchanged, and in the backward pass what they change by.
    assert gathered == pytest.approx(2 * (2 * MATRICES + D * V), rel=0.03)
    assert found['collectives']['all-to-all']['bytes'] == pytest.approx(2 * 2 * tokens * D, rel=0.01)

  def test_of_rollouts_has_what_samples_and_what_reads_again(self, capsys):
    few = 'rollouts.Options.prompts = 4', 'rollouts.Options.samples = 4', 'rollouts.Options.max_new_tokens = 96'
    found = planned(capsys, flags('v5e:2x2', 'ppo', *few, 'prompts.alone.longest = 32'))
    of = {one['name']: one for one in found['programs']}
    assert list(of) == ['step', 'prefill', 'decode', 'annotation']
    cache = of['decode']['hbm_by_class']['kv cache']
    slots = 192 + 96  # the bucket of the longest prompt, and what is written
    assert cache == pytest.approx(2 * L * 16 * slots * K * H * 2 / 4, rel=0.01)
    # While rows are written, training's state lies beside.
    assert {'parameters', 'optimizer', 'critic', 'weights for sampling'} <= of['decode']['hbm_by_class'].keys()
    assert of['step']['hbm_by_class']['critic'] > 0.9 * of['step']['hbm_by_class']['parameters']
    # The critic makes no logits, and of a prompt the last token alone has any; policy, reference and critic annotate.
    each, body, head = ROWS * LENGTH / 4, 2 * MATRICES + 2 * ATTENTION, 2 * D * V
    assert of['step']['model_flops'] == pytest.approx(each * 3 * (2 * body + head), rel=1e-6)
    assert of['annotation']['model_flops'] == pytest.approx(each * (3 * body + 2 * head), rel=1e-6)
    of_prompts = 4 * (192 * (2 * MATRICES + 2 * ATTENTION * 192 / LENGTH) + head) / 4
    assert of['prefill']['model_flops'] == pytest.approx(of_prompts, rel=1e-6)
    assert found['hbm_bytes'] == max(one['hbm_bytes'] for one in of.values())

  def test_of_rollouts_gathers_weights_once_where_rules_say_so(self, capsys):
    few = 'rollouts.Options.prompts = 4', 'rollouts.Options.samples = 4', 'rollouts.Options.max_new_tokens = 96'
    bytes_of = lambda one: one['collectives'].get('all-gather', {'bytes': 0})['bytes']
    decodes = []
    for rules in ('None', "{'embed': ()}"):
      bound = *few, 'prompts.alone.longest = 32', f'rollouts.Options.sampling_rules = {rules}'
      found = planned(capsys, flags('v5e:2x2', 'grpo', *bound))
      decodes.append(next(one for one in found['programs'] if one['name'] == 'decode'))
    spread, whole = decodes
    assert bytes_of(spread) > 2 * MATRICES > 50 * bytes_of(whole)
    weights = [one['hbm_by_class']['weights for sampling'] for one in decodes]
    assert weights[1] == pytest.approx(4 * weights[0], rel=0.01)


class TestEstimate:

  def test_of_gpus_is_said_to_be_one(self, capsys):
    found = planned(capsys, flags('h100:8', 'sft'))
    assert found['estimated'] and found['devices'] == 8 and found['chip'] == 'h100'
    assert (found['topology'], found['num_slices']) == ('h100:8', 1)
    assert found['hbm_by_class']['parameters'] == PARAMS * 4 / 8 + (2 * L + 1) * D * 4 * 7 / 8
    args = [one for one in flags('h100:8', 'sft') if one != '--json']
    assert main.main(args) == 0
    out = capsys.readouterr().out
    assert 'sft of llama3_1_8b on 8 x h100 (estimated on CPUs, whose programs are others)' in out
    assert 'ms by products and reading alone, and collectives' in out
    assert 'fits, ' in out and 'tokens/s' in out

  def test_counts_gradients_and_what_longer_rows_keep(self, capsys):
    found = [planned(capsys, flags('h100:8', 'sft', f'loader.Packing.row_length = {n}')) for n in (LENGTH, 2 * LENGTH)]
    short, long = (one['hbm_by_class'] for one in found)
    assert short['gradients'] == long['gradients'] == short['parameters']
    assert (
        long['activations'] - short['activations'] > ROWS / 8 * LENGTH * D * L * 2
    )  # hidden states of layers at least
    assert found[1]['hbm_bytes'] == pytest.approx(sum(long.values()), rel=1e-3)

  def test_tells_of_experts_that_there_are_not(self, capsys, caplog):
    found = planned(capsys, [*flags('h100:8', 'sft'), '--mesh=fsdp:4,expert:2'])
    assert found['mesh'] == {'fsdp': 4, 'expert': 2}
    assert 'the model has no experts to split 2 ways, and each part keeps all weights' in caplog.text

  def test_of_one_gpu_counts_as_many_products_as_of_each_of_two(self, capsys):
    # One CPU, in its place, would read less than all keys, and how much less no program tells.
    rows = lambda count: (f'loader.Packing.rows = {8 * count}', 'loader.Packing.row_length = 1024')
    one, two = (planned(capsys, flags(f'h100:{count}', 'sft', *rows(count)))['flops_per_device'] for count in (1, 2))
    assert one == pytest.approx(two, rel=0.01)

  @pytest.mark.parametrize(
      'algo,bound,said',
      [
          ('dpo', ('loader.Packing.rows = 12',), 'loader.Packing.rows = 12: it is split 8 ways'),
          ('grpo', ('rollouts.Options.prompts = 64', 'rollouts.Options.max_new_tokens = 192'), 'do not fit a step'),
      ],
  )
  def test_refuses_what_a_run_would(self, algo, bound, said, capsys):
    assert main.main(flags('h100:8', algo, *bound)) == 2
    assert said in capsys.readouterr().err

  def test_takes_the_kernel_of_the_run_for_another(self, capsys, caplog):
    found = []
    for bound in (("recipe.Recipe.attention = 'cudnn'",), ()):
      found.append(planned(capsys, flags('h100:8', 'sft', *bound))['flops_per_device'])
    assert found[0] == found[1]
    assert caplog.text.count('estimated as xla') == caplog.text.count('estimated as xla, not cudnn') == 1

  def test_of_held_out_data_has_what_evaluates(self, capsys):
    found = planned(capsys, [one for one in flags('h100:8', 'dpo') if one != '--eval_data='])
    step, reference, evaluation = found['programs']
    assert [one['name'] for one in (step, reference, evaluation)] == ['step', 'reference', 'evaluation']
    # A pass forward of each.
    tokens = ROWS * LENGTH / 8
    assert evaluation['model_flops'] == pytest.approx(tokens * (2 * (MATRICES + D * V) + 2 * ATTENTION), rel=1e-6)
    assert evaluation['flops'] == pytest.approx(reference['flops'], rel=0.01)
    # The optimizer's state lies there meanwhile; gradients do not.
    assert evaluation['hbm_by_class']['optimizer'] == step['hbm_by_class']['optimizer']
    assert 'gradients' not in evaluation['hbm_by_class'] and evaluation['hbm_bytes'] < step['hbm_bytes']

  def test_of_rollouts_counts_the_experts_that_are_kept_and_tells_of_models_that_judge(self, capsys, caplog, tmp_path):
    few = 'rollouts.Options.prompts = 4', 'rollouts.Options.samples = 4', 'rollouts.Options.max_new_tokens = 96'
    sizes = 'architecture.Config.num_experts = 4', 'architecture.Config.experts_per_token = 2'
    more = *few, *sizes, 'prompts.alone.longest = 32', f"rollouts.Options.rewards = ('{tmp_path}:2',)"
    of = {one['name']: one['hbm_by_class'] for one in planned(capsys, flags('h100:8', 'grpo', *more))['programs']}
    # Of a row's places keys and values in 16 bits, and a byte for each of two experts, in each layer.
    places = 16 * (192 + 96) * L / 8
    assert of['decode']['kv cache'] == pytest.approx(places * (2 * K * H * 2 + 2), rel=1e-3)
    assert f'--reward={tmp_path}:2: what a model that judges takes' in caplog.text


@pytest.mark.libtpu
class TestHost:

  def test_holds_what_is_kept_there_and_the_device_the_rest(self):
    try:
      there = topology.find('v5e:2x2')
    except types.UsageError as err:
      pytest.skip(str(err))
    mesh = sharding.make_mesh('fsdp:4', devices=there.devices)
    params = {'w': jax.ShapeDtypeStruct((1024, 1024), 'float32', sharding=sharding.named(mesh, 'embed', None))}
    opt = optim.adamw(10, schedule=functools.partial(optim.constant, lr=0.1), moments='bfloat16', memory='pinned_host')
    moments = step_lib.abstract_state(mesh, params, opt.tx, 0, memory=opt.memory).opt_state
    where = jax.tree.map(lambda x: x.sharding, (params, moments))
    run = jax.jit(opt.tx.update, out_shardings=where)
    roles = {'parameters': params, 'optimizer': moments}
    program = programs.Program('step', lambda: run.lower(params, moments, params), roles, 1, 1.0)
    step = plan_lib._compiled(program, roles, there)
    assert step.host_bytes == 4 * 1024 * 1024 / 4
    assert step.hbm_by_class['parameters'] == 4 * 1024 * 1024 / 4
    assert step.hbm_by_class['optimizer'] == 8  # two counts
    # 1 MB each of weights, gradients and steps, moments as they come and go, the program; not what the host holds.
    assert sum(step.hbm_by_class.values()) == pytest.approx(step.hbm_bytes, rel=0.01)
    assert step.hbm_bytes < 5.5e6
    made = plan_lib.Plan(
        {'algo': 'a', 'model': 'b'}, topology.CHIPS['v5e'], 4, False, [dataclasses.replace(step, host_bytes=2**30)]
    )
    assert 'in the memory of the host   1.00 GiB, which the step reads and writes' in made.table()


def test_json_has_nothing_where_the_compiler_refused():
  found = made(20, 0.0, fits=False).to_json()
  names = 'flops_per_device', 'bytes_per_device', 'seconds_bound', 'mfu_bound', 'collectives'
  assert [found[name] for name in names] == [None] * 5
  (program,) = found['programs']
  names = 'flops', 'bytes', 'seconds', 'collectives', 'link_seconds'
  assert [program[name] for name in names] == [None] * 5 and program['hbm_bytes'] == found['hbm_bytes'] == 20


class TestTopology:

  @pytest.mark.parametrize(
      ('args', 'said'),
      [
          (['--mode=plan', '--algo=dpo'], 'needs --topology'),
          (['--mode=plan', '--algo=dpo', '--topology=v9:2x2'], 'the chips are v4, v5e'),
          (['--mode=plan', '--algo=dpo', '--topology=h100:2x2'], 'of GPUs their number'),
          (['--mode=plan', '--algo=dpo', '--topology=h100:0'], 'write for example v5e:4x4, v5p:4x4x4 or h100:8'),
          (['--mode=plan', '--algo=dpo', '--topology=v5p:4x4'], 'v5p has 3 sizes, as v5p:4x4x4, not 2'),
          (['--mode=plan', '--algo=dpo', '--topology=v5e:64x64'], 'a slice of v5e has at most 256 chips'),
          (['--mode=plan', '--algo=dpo', '--topology=v6e:2x2x2'], 'v6e has 2 sizes, as v6e:4x4, not 3'),
          (['--algo=dpo', '--topology=v5e:2x2'], '--mode=train does not read --topology; it goes with --mode=plan'),
          (['--mode=plan', '--algo=dpo', '--topology=h100:8', '--mesh=fsdp:3'], 'does not divide the 8 devices'),
      ],
      ids=lambda x: x[-1] if isinstance(x, list) else '',
  )
  def test_is_refused_by_name(self, args, said, capsys):
    assert main.main(['jaxalign', *args]) == 2
    assert said in capsys.readouterr().err

  def test_says_what_to_install(self, monkeypatch):
    def missing(**_):
      raise NotImplementedError('JAX TPU support not installed; cannot generate TPU topology')

    monkeypatch.setattr(topology.topologies, 'get_topology_desc', missing)
    with pytest.raises(types.UsageError, match=r"v5e:2x2: libtpu is wanted.*pip install -e '.\[tpu\]'"):
      topology.find('v5e:2x2')


class TestRefused:

  def test_reads_how_much_the_compiler_wanted(self):
    refused = plan_lib._Refused()
    with refused:
      raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 36.49G of 15.75G hbm. Exceeded hbm capacity'
          ' by 20.74G. Largest program allocations in hbm: 1. Size: 99.00G'
      )
    assert refused.needed == 36.49 * 2**30

  def test_lets_other_errors_through(self):
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), plan_lib._Refused():
      raise jax.errors.JaxRuntimeError('INTERNAL: 3G')


def made(size, seconds, fits=True):
  step = plan_lib.Compiled('step', size, {}, 0.0, fits, 1.0, 1.0, 1.0, seconds, {}, 0.0, 8, 0.0)
  return plan_lib.Plan({'algo': 'a'}, topology.CHIPS['v5e'], 4, False, [step])


def fails(*_, **__):
  raise jax.errors.JaxRuntimeError('INTERNAL: a fault\nand where')


@dataclasses.dataclass
class Recipe:
  packing: loader.Packing
  remat: str


@dataclasses.dataclass
class Job:
  mesh: Any


class TestSearch:

  def test_front_is_what_nothing_beats_in_both(self):
    plans = [made(8, 1.0), made(4, 2.0), made(9, 1.5), made(2, 3.0, fits=False), made(4, 2.5), made(9, 1.0)]
    assert search.pareto(plans) == [0, 1]

  def test_points_keep_the_rows_of_a_step(self):
    packing = pytypes.SimpleNamespace(rows=16, micro_batches=2)
    points = list(search.points(pytypes.SimpleNamespace(packing=packing), ['fsdp:4'], lambda text: 4))
    assert {point['rows'] * point['micro_batches'] for point in points} == {32}
    assert {point['rows'] for point in points} == {4, 8, 16, 32}
    assert {point['remat'] for point in points} == {'full', 'attention', 'dots'}

  def test_prints_the_flags_of_what_it_found(self, capsys):
    args = [one for one in flags('h100:8', 'sft') if one != '--json']
    assert main.main([*args, '--search', '--mesh=fsdp:8', '--gin=loader.Packing.rows = 8']) == 0
    out = capsys.readouterr().out
    assert out.startswith('3 compiled; none of the others')
    chosen = ['--mesh=fsdp:8', '--gin=loader.Packing.rows=8', '--gin=loader.Packing.micro_batches=1']
    assert shlex.join(chosen) in out
    before, last = out.splitlines()[-2:]
    assert before.startswith('the whole run fits with the first, in ')
    found = shlex.split(last)
    assert found[:5] == ['python', '-m', 'jaxalign.main', '--algo=sft', '--eval_data=']
    assert found[-5:-1] == ['--tokenizer=FILE', *chosen] and found[-1].startswith("--gin=recipe.Recipe.remat='")
    # What was bound and is now chosen, and what is a plan's alone, is not there.
    named = [one.partition('=')[2].partition('=')[0].strip() for one in found if one.startswith('--gin=')]
    assert [named.count(f'loader.Packing.{one}') for one in ('rows', 'row_length')] == [1, 1]
    assert not [one for one in found if one.startswith(('--topology', '--search', '--mode='))]

  def test_plans_the_fastest_whole_and_the_next_where_that_does_not_fit(self):
    asked = []

    def plan(job, recipe, only_step=False):
      asked.append((recipe.remat, only_step))
      # What keeps more is faster; beside what samples, nothing that keeps all of it fits.
      seconds = {'dots': 1.0, 'attention': 2.0, 'full': 3.0}[recipe.remat]
      whole = [made(9, seconds).step, made(20, 1.0, fits=recipe.remat != 'dots').step]
      return dataclasses.replace(made(9, seconds), programs=whole[:1] if only_step else whole)

    packing, there = loader.Packing(rows=4, micro_batches=1, row_length=8), topology.find('h100:4')
    recipe, job = Recipe(packing, 'full'), Job(None)
    found = search.planned(job, recipe, plan, there, 'fsdp:4', '', ['python', 'run'])
    assert asked == [(how, True) for how in ('full', 'attention', 'dots')] + [('dots', False), ('attention', False)]
    assert [one['fits'] for one in found.to_json()] == [True, True, False]
    assert [one['whole'] for one in found.to_json()] == [False, True, True]
    assert [one['remat'] for one in found.to_json() if one['on_front']] == ['attention']
    assert found.table().splitlines()[-1] == '  ' + shlex.join(['python', 'run', *search.flags(found.found[1][0])])

  def test_compiles_no_more_rows_where_fewer_are_too_large_but_for_one_micro_batch(self):
    asked = []

    def plan(job, recipe, only_step=False):
      asked.append((recipe.remat, recipe.packing.rows))
      if recipe.remat == 'full':
        fails()
      return made(8, 1.0, fits=recipe.remat == 'attention' or recipe.packing.rows < 8)

    packing, there = loader.Packing(rows=32, micro_batches=1, row_length=8), topology.find('h100:4')
    found = search.planned(Job(None), Recipe(packing, 'full'), plan, there, 'fsdp:4', '', [])
    rows = {how: [rows for remat, rows in asked[:-1] if remat == how] for how in ('full', 'attention', 'dots')}
    assert rows == {'full': [4, 8, 16, 32], 'attention': [4, 8, 16, 32], 'dots': [4, 8, 32]}
    assert [point['remat'] for point, _ in found.found] == ['attention'] * 4 + ['dots'] * 3

  def test_goes_on_where_the_compiler_fails(self):
    packing, there = loader.Packing(rows=4, micro_batches=1, row_length=8), topology.find('h100:4')

    def plan(job, recipe, only_step=False):  # of the fastest it fails with the whole run
      if recipe.remat == 'dots' and not only_step:
        fails()
      return made(8, {'dots': 1.0, 'attention': 2.0, 'full': 3.0}[recipe.remat])

    found = search.planned(Job(None), Recipe(packing, 'full'), plan, there, 'fsdp:4', '', [])
    assert [(one['remat'], one['whole']) for one in found.to_json()] == [('full', False), ('attention', True)]
    with pytest.raises(types.UsageError, match=r'--search: mesh fsdp:4, remat .*: INTERNAL: a fault$'):
      search.planned(Job(None), Recipe(packing, 'full'), fails, there, 'fsdp:4', '', [])

  def test_says_which_meshes_cannot_take_the_rows_and_what_is_wrong_with_others(self, monkeypatch):
    def refuses(*_, **__):
      raise types.UsageError("--mesh: tensor:4 does not divide heads\n  In call to configurable 'plan'")

    monkeypatch.setattr(search, 'meshes', lambda *_: ['fsdp:4', 'fsdp:2,tensor:2', 'fsdp:1,tensor:4'])
    monkeypatch.setattr(search.opening, 'config_of', lambda *_: None)
    packing, there = loader.Packing(rows=7, micro_batches=1, row_length=8), topology.find('h100:4')
    with pytest.raises(types.UsageError) as said:
      search.planned(Job(None), Recipe(packing, 'full'), refuses, there, '', '', [])
    point = 'mesh fsdp:1,tensor:4, remat full, rows 1, micro_batches 7'
    rows = '7 rows of a step (loader.Packing.rows x micro_batches) cannot be spread over fsdp:4, fsdp:2,tensor:2'
    assert str(said.value) == f'--search: {point}: --mesh: tensor:4 does not divide heads; {rows}'

  def test_says_what_is_too_large(self):
    point = {'mesh': 'fsdp:4', 'rows': 8, 'micro_batches': 1, 'remat': 'full'}
    said = search.front([(point, made(17 * 2**30, 1.0, fits=False))], [])
    assert said == f'none of 1 fits; the smallest is 1.25 GiB too large: {shlex.join(search.flags(point))}\n'


class TestMeshes:

  def test_multiply_to_the_devices(self):
    config = architecture.Config(512, 2, 16, 2, 2, 8, 32, 64)
    for text in search.meshes(8, config, 2048):
      assert math.prod(sharding.parse_mesh(text).values()) == 8
    assert search.meshes(2, config, 2048) == ['fsdp:2', 'fsdp:1,tensor:2']
    mixed = dataclasses.replace(config, num_experts=6)
    ways = ['fsdp:4,tensor:2', 'fsdp:2,tensor:4', 'fsdp:4,expert:2', 'fsdp:4,context:2', 'fsdp:2,context:4']
    assert search.meshes(8, mixed, 131_072 + 4) == ['fsdp:8', *ways[:2], 'fsdp:1,tensor:8', *ways[2:]]


def test_chips_are_named_as_topologies_are():
  assert {name: chip.name for name, chip in topology.CHIPS.items()} == {name: name for name in topology.CHIPS}
  assert all(min(dataclasses.astuple(chip)[1:5]) > 0 for chip in topology.CHIPS.values())
