"""Recipes of real size, compiled for TPUs that are not there by `--mode=plan`: they fit, and are sharded as meant."""

import json
import math

import jax
import pytest

from jaxalign import main
from jaxalign.planning import hlo
from jaxalign.planning import plan as plan_lib

pytestmark = [pytest.mark.tpu, pytest.mark.usefixtures('optimised')]

VOCAB, LENGTH, CHUNK = 128256, 1280, 512
FEW = ('rollouts.Options.prompts = 8', 'rollouts.Options.samples = 4', 'rollouts.Options.max_new_tokens = 512')
# Algorithm, model, topology, slices, mesh, bindings.
CASES = {
    'sft of 1B on 16 v5e': ('sft', 'llama3_2_1b', 'v5e:4x4', 1, 'fsdp:16', ()),
    'rm of 8B on 16 v5p': ('rm', 'llama3_1_8b', 'v5p:2x2x4', 1, 'fsdp:16', ()),
    'dpo of 8B on two slices of 16 v5e': ('dpo', 'llama3_1_8b', 'v5e:4x4', 2, 'fsdp:16', ()),
    'dpo of 70B on 256 v5p': ('dpo', 'llama3_1_70b', 'v5p:4x8x8', 1, 'fsdp:64,tensor:4', ()),
    'grpo of 8B on 32 v6e': ('grpo', 'llama3_1_8b', 'v6e:4x8', 1, 'fsdp:16,tensor:2', FEW),
    'ppo of 1B on 16 v5e': ('ppo', 'llama3_2_1b', 'v5e:4x4', 1, 'fsdp:16', (*FEW, 'rollouts.Options.minibatches = 1')),
}
PARAMS = {'llama3_2_1b': 1.236e9, 'llama3_1_8b': 8.03e9, 'llama3_1_70b': 70.55e9}
WIDTHS = {'llama3_2_1b': 2048, 'llama3_1_8b': 4096, 'llama3_1_70b': 8192}


@pytest.fixture(scope='module', autouse=True)
def in_haste():
  """A program is compiled, but not as fast or small as it can be."""
  jax.config.update('jax_exec_time_optimization_effort', -1.0)
  yield
  jax.config.update('jax_exec_time_optimization_effort', 0.0)


def planned(capsys, monkeypatch, algo, model, topology, slices, mesh, bound):
  """What is said of a recipe, and the text of each of its programs."""
  texts, costs = [], hlo.costs

  def spy(text):
    texts.append(text)
    return costs(text)

  monkeypatch.setattr(plan_lib.hlo, 'costs', spy)
  rows = math.prod(int(part.split(':')[1]) for part in mesh.split(',') if 'fsdp' in part) * slices
  bound = (f'loader.Packing.rows = {rows}', f'loader.Packing.row_length = {LENGTH}', *bound)
  named = f'--algo={algo}', f'--model={model}', f'--topology={topology}', f'--num_slices={slices}', f'--mesh={mesh}'
  args = ['jaxalign', '--mode=plan', '--json', '--eval_data=', *named, *(f'--gin={one}' for one in bound)]
  code = main.main(args)
  out = capsys.readouterr()
  if code and 'libtpu is wanted' in out.err:
    pytest.skip('libtpu is not installed')
  assert code == 0, out.err
  return json.loads(out.out), texts


def in_loops(module):
  """Instructions that run in a loop."""
  loops = [one for lines in module.computations.values() for one in lines if one.op == 'while']
  for loop in loops:
    for one, _, _ in module._runs(loop.called('body'), 1.0, False):
      yield one


def sizes(instruction):
  return [tuple(map(int, filter(None, dims.split(',')))) for _, dims, _ in hlo._ARRAY.findall(instruction.shape)]


@pytest.mark.parametrize('name', CASES)
class TestRecipes:

  def test_fit_and_are_sharded_as_meant(self, name, capsys, monkeypatch):
    algo, model, topology, slices, mesh, bound = CASES[name]
    found, texts = planned(capsys, monkeypatch, *CASES[name])
    assert found['fits'], found['programs']
    shards = math.prod(int(part.split(':')[1]) for part in mesh.split(','))
    # Parameters and moments lie in parts over every axis of a slice; norms alone are whole.
    of = found['programs'][0]['hbm_by_class']
    assert of['parameters'] == pytest.approx(4 * PARAMS[model] / shards, rel=0.02)
    assert of['optimizer'] == pytest.approx(2 * (of['parameters'] + of.get('critic', 0)), rel=0.01)
    step = hlo.Module(texts[0])
    everything = list(step.of_name.values())
    kernels = [one.name for one in everything if one.op == 'custom-call' and 'tpu_custom_call' in one.rest]
    for part in ('fwd', 'dq', 'dkv'):
      assert [kernel for kernel in kernels if 'splash' in kernel and part in kernel]
    tensor = int(next((part.split(':')[1] for part in mesh.split(',') if 'tensor' in part), 1))
    width = VOCAB // tensor
    with_vocab = {size for one in everything for size in sizes(one) if {VOCAB, width} & set(size)}
    # Of tokens and vocabulary no array is larger than a chunk's; the head and the embedding have the model's width.
    assert not [size for size in with_vocab if CHUNK < math.prod(size) // width != WIDTHS[model]]
    gathers = [one for one in in_loops(step) if one.op.startswith('all-gather')]
    assert gathers  # layers are gathered one by one
    assert not [one for one in gathers if any(width in size for size in sizes(one))]
    once = [one for one in everything if one.op.startswith('all-gather') and one not in gathers]
    # In 16 bits, and once: the head for each pass, backward in parts of its columns, and that of the reference; no
    # embedding, as rows are exchanged.
    shapes = lambda *first: [size for one in once for size in sizes(one) if size[0] in first and len(size) == 2]
    heads = [size[1] for size in shapes(WIDTHS[model]) if size[1] > 1]
    assert sum(heads) == {'rm': 0, 'grpo': 3}.get(algo, 2) * width
    assert not shapes(width) and not [one for one in once for size in sizes(one) if {LENGTH, WIDTHS[model]} <= {*size}]
    assert not [one for one in once if 'f32' in one.shape and any(set(heads) & {*size} for size in sizes(one))]
    if 'decode' in [one['name'] for one in found['programs']]:
      decode = next(one for one in found['programs'] if one['name'] == 'decode')
      assert decode['hbm_by_class']['activations'] < 2 * found['programs'][0]['hbm_by_class']['parameters'] + 2**31


class TestGradients:

  def test_are_scattered_where_the_compiler_knows_how(self, capsys, monkeypatch):
    """On a torus it sends along all links at once it adds them up whole instead, and slices what each device keeps."""
    found, texts = planned(capsys, monkeypatch, 'sft', 'llama3_2_1b', 'v5e:4x8', 1, 'fsdp:32', ())
    layers = 2 * 16 * (2048 * 64 * (32 + 8 + 8 + 32) + 3 * 2048 * 8192)
    # All but the output projections of attention and the embedding, whose sharded axis is the last.
    last, embedding = 2 * 16 * 2048 * 64 * 32, 4 * 2048 * VOCAB
    assert found['collectives']['reduce-scatter']['bytes'] > 0.95 * (layers - last)
    assert found['collectives']['all-reduce']['bytes'] < 1.1 * (last + embedding)
