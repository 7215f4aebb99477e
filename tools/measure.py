"""Measures how models are read: how near to transformers, how alike by sampler and trainer, in how much memory.

  python tools/measure.py parity
  python tools/measure.py sampler [--mesh=fsdp:4,tensor:2] [--dtype=bfloat16] [--rank=4]
  python tools/measure.py import --model=DIR [--dtype=bfloat16] [--mesh=fsdp:4,tensor:2]
  python tools/measure.py import --gigabytes=4.2

`parity` prints a table: the worst difference of float32 logits from those in tests/goldens, of whole sequences and of
packed and padded rows; how many of 64 greedy tokens are the same; the median difference in bfloat16 in standard
deviations. `sampler` prints for the same models, on one device or a mesh, the worst and the mean difference in nats
between what the sampler says of the tokens that it draws and what the training program does, with --rank of adapters
that have learned something; experts are replayed as runs do, unless --no-replay_experts. `import` prints a JSON object:
bytes of anonymous memory at the peak, beyond those before, and of the parameters (--gigabytes makes up a Llama of that
size first, one file a layer).
"""

import argparse
from collections.abc import Sequence
import functools
import json
import pathlib
import sys
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as st

from jaxalign import forward
from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign import vocab
from jaxalign.generation import sampling
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer
from jaxalign.rl import rollouts

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'goldens'
CASES = sorted(path.parent.name for path in GOLDENS.glob('*/config.json'))
_LENGTH = 72
_TEMPERATURE, _PROMPTS = 0.7, [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2]]
_WIDTH, _MLP, _VOCAB = 2048, 8192, 32000


@functools.cache
def golden(name):
  """What transformers computed of one of CASES: `ids` and `logits` of two sequences, and a `greedy` continuation."""
  with np.load(GOLDENS / name / 'golden.npz') as file:
    return {key: file[key] for key in file}


@functools.cache
def _opened(name, mesh_text=''):
  mesh = sharding.make_mesh(mesh_text, devices=None if mesh_text else jax.devices()[:1])
  config = hf.read_config(GOLDENS / name)
  return transformer.build(config, mesh, length=_LENGTH), hf_import.read_params(GOLDENS / name, config, mesh), mesh


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, ids, positions, segments):
  hidden = model.apply({'params': params}, ids, positions, segments)
  head = transformer.output_matrix(params).astype(hidden.dtype)
  logits = jax.numpy.matmul(hidden, head, precision=types.precision(hidden))
  return vocab.soften(logits.astype('float32'), model.config.final_softcap)[..., : model.config.vocab_size]


def logits_of(name, ids, positions=None, segments=None, *, mesh='', dtype='float32'):
  """Logits of every token of rows of ids; without positions and segments a row is one sequence."""
  model, params, mesh = _opened(name, mesh)
  model = transformer.build(model.config, mesh, dtype=dtype, length=_LENGTH)
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if positions is None else positions
  segments = np.ones_like(ids) if segments is None else segments
  with jax.set_mesh(mesh):
    return np.asarray(_run(model, params, ids, positions, segments))


def plain(name):
  """Worst difference from the logits of transformers, beyond windows and scaled contexts."""
  return np.abs(logits_of(name, golden(name)['ids']) - golden(name)['logits']).max()


def packed(name):
  """The same in a row with a whole sequence, the start of the other, and padding."""
  ids, wanted = golden(name)['ids'], golden(name)['logits']
  row = np.concatenate([ids[0], ids[1, :27], np.zeros(5, ids.dtype)])[None]
  positions = np.array([[*range(40), *range(27), *range(5)]])
  found = logits_of(name, row, positions, np.repeat([1, 2, 0], [40, 27, 5])[None])[0]
  return np.abs(found[:67] - np.concatenate([wanted[0], wanted[1, :27]])).max()


def greedy(name):
  """How many of the 64 tokens of a greedy continuation are those of transformers, up to the first that is not."""
  model, params, mesh = _opened(name)
  wanted = golden(name)['greedy'].tolist()
  with jax.set_mesh(mesh):
    (found,) = sampling.sample(model, params, [wanted[:8]], max_new_tokens=64, temperature=0.0)
  return next((i for i, (a, b) in enumerate(zip(found.ids, wanted[8:])) if a != b), len(found.ids))


def low(name):
  """Median difference in bfloat16, in standard deviations of the logits: a router may send a token elsewhere."""
  found = logits_of(name, golden(name)['ids'], dtype='bfloat16')
  return np.median(np.abs(found - golden(name)['logits'])) / golden(name)['logits'].std()


def _by_trainer(model, params, prompts, drawn, replays):
  """Log-probabilities of each response as the training program has them, a row each.

  With `replays` tokens take the experts that they took in the sampler.
  """
  inputs = np.zeros((len(drawn), _LENGTH), np.int32)
  targets, mask, segments = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32), np.zeros_like(inputs)
  for row, (prompt, one) in enumerate(zip(prompts, drawn, strict=True)):
    ids = [*prompt, *one.ids]
    inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
    mask[row, len(prompt) - 1 : len(ids) - 1] = 1
    segments[row, : len(ids) - 1] = 1
  positions = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), inputs.shape)
  slots, experts = np.zeros((len(drawn), 1), np.int32), None
  if replays:
    experts = np.zeros((*inputs.shape, *drawn[0].experts.shape[1:]), drawn[0].experts.dtype)
    for row, one in enumerate(drawn):
      experts[row, : len(one.experts)] = one.experts
  batch = types.Batch(inputs, targets, mask, positions, segments, segments - 1, slots, slots, {}, experts_BTLk=experts)
  told = jax.jit(lambda params: forward.target_stats(params, batch, model=model, temperature=_TEMPERATURE)['logps'])
  return [row[counted > 0] for row, counted in zip(np.asarray(told(params)), mask)]


def drift(name, *, mesh='', dtype='float32', lora=None, replays=None):
  """Worst and mean difference in nats between sampler and trainer, over 8 responses of 20 tokens."""
  model, params, mesh = _opened(name, mesh)
  model = transformer.build(model.config, mesh, dtype=dtype, lora=lora, length=_LENGTH)
  with jax.set_mesh(mesh):
    if lora is not None:
      adapters = transformer.init_adapters(model, jax.random.key(1), params, mesh)
      # The second factor begins as 0.
      params = lora_lib.join(jax.tree.map(lambda x: x + 0.05, adapters), params)
    ways = {'temperature': _TEMPERATURE, 'told_at': _TEMPERATURE, 'max_new_tokens': 20, 'seed': 5, 'rows': 4}
    replays = rollouts.replays(replays if model.config.num_experts else None, model)
    drawn = sampling.sample(model, params, _PROMPTS, n=2, keep_experts=replays, **ways)
    told = _by_trainer(model, params, [ids for ids in _PROMPTS for _ in range(2)], drawn, replays)
  assert len({tuple(one.ids) for one in drawn}) == 8
  apart = [np.abs(np.array(one.logps) - by_trainer) for one, by_trainer in zip(drawn, told, strict=True)]
  return np.max(apart), np.mean(apart)


def show_drift(mesh: str, dtype: str, rank: int, replays: bool | None) -> None:
  """Prints the table of all goldens."""
  lora = lora_lib.Lora(rank=rank, alpha=2.0 * rank) if rank else None
  print(f'{"model":16} {"worst":>9} {"mean":>9}')
  for name in CASES:
    print(
        '{:16} {:9.1e} {:9.1e}'.format(name, *drift(name, mesh=mesh, dtype=dtype, lora=lora, replays=replays)),
        flush=True,
    )


def show_parity() -> None:
  """Prints the table of all goldens."""
  print(f'{"model":16} {"plain":>9} {"packed":>9} {"greedy":>7} {"bf16":>7}')
  for name in CASES:
    measured = plain(name), packed(name), greedy(name), low(name)
    print('{:16} {:9.1e} {:9.1e} {:4}/64 {:7.4f}'.format(name, *measured), flush=True)


def write_llama(directory: pathlib.Path, gigabytes: float) -> None:
  """A Llama in bfloat16 of about that size, whose weights are noise, with one file a layer."""
  shapes = {f'self_attn.{name}_proj': (_WIDTH, _WIDTH) for name in 'qkvo'}
  shapes |= {'mlp.gate_proj': (_MLP, _WIDTH), 'mlp.up_proj': (_MLP, _WIDTH), 'mlp.down_proj': (_WIDTH, _MLP)}
  of_layer = sum(map(np.prod, shapes.values()))
  layers = max(1, round((gigabytes * 1e9 / 2 - 2 * _VOCAB * _WIDTH) / of_layer))
  noise = np.random.default_rng(0).standard_normal((_VOCAB, _WIDTH), np.float32).astype(ml_dtypes.bfloat16)
  ones = np.ones(_WIDTH, ml_dtypes.bfloat16)
  of = lambda shape: noise.reshape(-1)[: np.prod(shape)].reshape(shape)
  files = [{'model.embed_tokens.weight': noise, 'lm_head.weight': noise.copy(), 'model.norm.weight': ones}]
  for i in range(layers):
    layer = {f'model.layers.{i}.{name}.weight': of(shape) for name, shape in shapes.items()}
    norms = (f'model.layers.{i}.{name}_layernorm.weight' for name in ('input', 'post_attention'))
    files.append(layer | dict.fromkeys(norms, ones))
  weight_map = {}
  for number, tensors in enumerate(files):
    file = f'model-{number:05}.safetensors'
    st.save_file(tensors, directory / file)
    weight_map |= dict.fromkeys(tensors, file)
  (directory / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}), encoding='utf-8')
  sizes = {'hidden_size': _WIDTH, 'intermediate_size': _MLP, 'vocab_size': _VOCAB, 'num_hidden_layers': layers}
  config = sizes | {'model_type': 'llama', 'num_attention_heads': 16, 'rms_norm_eps': 1e-5}
  (directory / 'config.json').write_text(json.dumps(config), encoding='utf-8')


def _anonymous() -> int:
  """Bytes of memory that is no file's."""
  lines = pathlib.Path('/proc/self/smaps_rollup').read_text(encoding='ascii').splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('Anonymous'))


def measure_import(directory: pathlib.Path, dtype: str, mesh_text: str) -> dict[str, float]:
  """Bytes at the peak of an import and of what it gives, and its seconds."""
  mesh = sharding.make_mesh(mesh_text)
  jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())
  config, before, peak = hf.read_config(directory), _anonymous(), 0
  over = threading.Event()

  def watch():
    nonlocal peak
    while not over.wait(0.002):
      peak = max(peak, _anonymous())

  thread = threading.Thread(target=watch)
  thread.start()
  start = time.monotonic()
  params = jax.block_until_ready(hf_import.read_params(directory, config, mesh, dtype))
  seconds = time.monotonic() - start
  over.set()
  thread.join()
  resident = sum(x.nbytes for x in jax.tree.leaves(params))
  return {'peak': peak - before, 'resident': resident, 'seconds': round(seconds, 1)}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)
  commands.add_parser('parity')
  of_import = commands.add_parser('import')
  given = of_import.add_mutually_exclusive_group(required=True)
  given.add_argument('--model', type=storage.on_disk, help='a Hugging Face directory')
  given.add_argument('--gigabytes', type=float, help='size of a model to make up')
  of_import.add_argument('--dtype', choices=('float32', 'bfloat16'), default='bfloat16', help='what it is read as')
  of_sampler = commands.add_parser('sampler')
  of_sampler.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the products')
  of_sampler.add_argument('--rank', type=int, default=0, help='of low-rank adapters; 0: without')
  wanted = 'whether the trainer takes those of the sampler; default: as runs do'
  of_sampler.add_argument('--replay_experts', action=argparse.BooleanOptionalAction, help=wanted)
  for command in (of_import, of_sampler):
    command.add_argument('--mesh', default='', help='as for jaxalign.main')
  args = parser.parse_args(argv)
  try:
    if args.command == 'parity':
      show_parity()
    elif args.command == 'sampler':
      show_drift(args.mesh, args.dtype, args.rank, args.replay_experts)
    elif args.model:
      print(json.dumps(measure_import(recipe.model_directory(str(args.model)), args.dtype, args.mesh)))
    else:
      with tempfile.TemporaryDirectory() as folder:
        write_llama(pathlib.Path(folder), args.gigabytes)
        print(json.dumps(measure_import(pathlib.Path(folder), args.dtype, args.mesh)))
  except (types.UsageError, types.RunError) as err:
    print(f'measure: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
