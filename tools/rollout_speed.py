"""Times sampling: tokens per second of a rollout, beside another program, and of responses of many lengths.

  JAX_PLATFORMS=cpu python tools/rollout_speed.py --model=stories15M --top_k=50
  JAX_PLATFORMS=cpu python tools/rollout_speed.py --model=stories15M --top_k=50 --beside='python other.py'
  JAX_PLATFORMS=cpu python tools/rollout_speed.py --model=stories15M --top_k=50 --ragged --prompts=128

Prompts are random tokens, and every response has the length that is asked for. --beside names a command that does the
same work otherwise and prints `tokens_per_s=NUMBER`; both run in turns, so that a busy machine slows both. --ragged
draws lengths from a geometric distribution (--mean, at most --new_tokens) and compares one queue, whose rows are given
to the next prompt when a response has ended, with one batch after another, each as long as its longest response.

What is printed is one JSON object: medians of tokens per second, and of their ratio where there are two.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import json
import re
import shlex
import statistics
import subprocess
import sys
import time

from absl import logging
import jax
import numpy as np

from jaxalign import recipe
from jaxalign import sharding
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.cli import config
from jaxalign.generation import sampling
from jaxalign.models import transformer


def open_model(name: str, mesh: jax.sharding.Mesh, dtype: str) -> tuple[transformer.Transformer, types.PyTree]:
  """A model of gin_configs/models with random weights, or one that `recipe.load` finds."""
  if not catalog.exists(f'models/{name}.gin'):
    loaded = recipe.load(name, mesh, dtype)
    return loaded.model, loaded.params
  config.parse('sft', files=[f'models/{name}.gin'], user_files=[], bindings=[])
  sizes = config.recipe().model
  if sizes is None:
    raise types.UsageError(f'--model={name}: write builtin:{name}, it is in the package')
  model = transformer.build(sizes, mesh, dtype=dtype, length=sizes.max_length)
  return model, transformer.init_params(model, jax.random.key(0), mesh)


def ours(args: argparse.Namespace, model, params, limits: Sequence[int], rows: int, size: int) -> float:
  """Tokens per second of all prompts, `size` of them in a call."""
  random = np.random.default_rng(0)
  prompts = random.integers(10, model.config.vocab_size, (len(limits), args.prompt_tokens)).tolist()
  start = time.perf_counter()
  for first in range(0, len(prompts), size):
    part = slice(first, first + size)
    sampling.sample(
        model,
        params,
        prompts[part],
        max_new_tokens=list(limits[part]),
        temperature=args.temperature,
        top_k=args.top_k,
        rows=rows,
    )
  return sum(limits) / (time.perf_counter() - start)


def others(command: str) -> float:
  """What another program prints."""
  done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
  found = re.search(r'tokens_per_s=([\d.]+)', done.stdout)
  if done.returncode or not found:
    last = (done.stderr.strip().splitlines() or ['it printed no tokens_per_s=NUMBER'])[-1]
    raise types.RunError(f'--beside={command}: exit code {done.returncode}: {last}')
  return float(found[1])


def compare(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
  """Medians of runs in turns, and of the ratio of the first to the second."""
  values: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      values[name].append(run())
  found = {name: round(statistics.median(each), 1) for name, each in values.items()}
  if len(runs) > 1:
    first, second = values.values()
    found['ratio'] = round(statistics.median(a / b for a, b in zip(first, second)), 2)
  return found


def measure(args: argparse.Namespace) -> dict[str, float]:
  """What `main` prints."""
  mesh = sharding.make_mesh(args.mesh)
  with jax.set_mesh(mesh):
    model, params = open_model(args.model, mesh, args.dtype)
    if args.prompt_tokens + args.new_tokens > model.config.max_length:
      wanted = f'--prompt_tokens={args.prompt_tokens} --new_tokens={args.new_tokens}'
      raise types.UsageError(f'{wanted}: the context of the model has {model.config.max_length} tokens')
    if args.ragged:
      drawn = np.random.default_rng(0).geometric(1 / args.mean, args.prompts).clip(max=args.new_tokens)
      limits = drawn.tolist()
      queue = lambda: ours(args, model, params, limits, args.rows, len(limits))
      # Batches as long as the longest of all are compiled once.
      batches = lambda: ours(args, model, params, limits, args.rows, args.rows)
      runs = {'queue_tokens_per_s': queue, 'batches_tokens_per_s': batches}
    else:
      limits = [args.new_tokens] * args.prompts
      runs = {'tokens_per_s': lambda: ours(args, model, params, limits, args.prompts, args.prompts)}
      if args.beside:
        runs['beside_tokens_per_s'] = lambda: others(args.beside)
    for name, run in runs.items():
      if not name.startswith('beside'):
        run()  # compiles
    return compare(runs, args.repeats)


def _positive(text: str) -> int:
  """A whole number from 1 on; argparse says so of another."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text}: it is a whole number, at least 1')
  return int(text)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='stories15M', help='a name in gin_configs/models, or as for jaxalign.main')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--prompts', type=_positive, default=16)
  parser.add_argument('--prompt_tokens', type=_positive, default=64)
  parser.add_argument('--new_tokens', type=_positive, help='of each response, at most; default: 128, with --ragged 512')
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--top_k', type=int, default=0)
  parser.add_argument('--ragged', action='store_true', help='lengths differ')
  parser.add_argument('--mean', type=float, default=64.0, help='of the lengths, with --ragged')
  parser.add_argument('--rows', type=_positive, default=16, help='with --ragged, written at once')
  parser.add_argument('--repeats', type=_positive, default=5)
  parser.add_argument('--beside', help='a command that does the same otherwise, not with --ragged')
  parser.add_argument('--mesh', default='', help='as for jaxalign.main')
  args = parser.parse_args(argv)
  if args.mean < 1:
    parser.error('--mean must be at least 1')
  if args.ragged and args.beside:
    parser.error('--ragged and --beside do not go together')
  args.new_tokens = args.new_tokens or (512 if args.ragged else 128)
  logging.set_verbosity(logging.WARNING)
  try:
    print(json.dumps(measure(args)))
  except (types.UsageError, types.RunError) as err:
    print(f'rollout_speed: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
