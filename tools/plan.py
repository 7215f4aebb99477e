"""Plans many runs by `--mode=plan`, each in a process of its own, and writes a table of what they need.

  python tools/plan.py --matrix --output=plans.jsonl
  python tools/plan.py --algos=dpo,grpo --models=llama3_1_8b --topologies=v5p:2x4x4,v6e:8x8 --output=plans.jsonl
  python tools/plan.py --output=plans.jsonl --table

A line of the output is what `--json` prints, with the flags that made it; what it has already is not compiled again.
Rows are as many as there are devices times --rows_per_device, split into micro-batches of --rows_at_once of a device;
devices that share a row (tensor, context) count as one.
`--table` prints the file as Markdown: peak memory of a device over what it has, and the bound on utilisation. The exit
code is 1 where one of the runs was refused, which is written, or failed, which is not.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.planning import topology as topology_lib

# Of each kind a slice that such models are trained on.
_TOPOLOGIES = {
    'llama3_2_1b': ('v5e:4x4', 'v5p:2x2x2', 'v6e:2x4'),
    'llama3_1_8b': ('v5e:8x8', 'v5p:2x4x4', 'v6e:4x8'),
    'llama3_1_70b': ('v5e:16x16', 'v5p:4x8x8', 'v6e:16x16'),
}
_ALGOS = ('sft', 'dpo', 'ppo', 'grpo')
_DEFAULTS = {'algos': 'dpo', 'models': 'llama3_1_8b', 'topologies': 'v5p:2x4x4'}  # without --matrix


def points(args: argparse.Namespace) -> Iterator[dict[str, str]]:
  """The runs that are asked for: algo, model and topology."""
  if args.matrix:
    for model, places in _TOPOLOGIES.items():
      yield from ({'algo': a, 'model': model, 'topology': t} for a, t in itertools.product(_ALGOS, places))
  else:
    for algo, model, place in itertools.product(*(x.split(',') for x in (_DEFAULTS | _named(args)).values())):
      catalog.check_algorithm(algo)
      yield {'algo': algo, 'model': model, 'topology': place}


def _named(args: argparse.Namespace) -> dict[str, str]:
  return {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}


def flags(point: dict[str, str], args: argparse.Namespace) -> list[str]:
  """What `jaxalign.main` is called with."""
  mesh = sharding.abstract_mesh(args.mesh, topology_lib.count_of(point['topology']))
  count = sharding.parts(mesh, 'batch')
  bound = {
      'loader.Packing.rows': count * args.rows_at_once,
      'loader.Packing.micro_batches': max(1, args.rows_per_device // args.rows_at_once),
      'loader.Packing.row_length': args.row_length,
  }
  if catalog.is_online(point['algo']):
    # As many responses as rows, of half a row each.
    bound |= {'rollouts.Options.max_new_tokens': args.row_length // 2, 'rollouts.Options.samples': 8}
    bound['rollouts.Options.prompts'] = max(1, count * args.rows_per_device // 8)
    if point['algo'] == 'ppo':
      bound['rollouts.Options.minibatches'] = 1
  named = [f'--{name}={value}' for name, value in point.items()]
  place = [f'--mesh={args.mesh}'] if args.mesh else []
  return ['--mode=plan', '--json', '--eval_data=', *named, *place, *(f'--gin={k}={v}' for k, v in bound.items())]


def plan(command: Sequence[str]) -> dict[str, Any]:
  """What a plan found, or `error`, and whether it is one of the run and not of the flags."""
  done = subprocess.run([sys.executable, '-m', 'jaxalign.main', *command], capture_output=True, text=True, check=False)
  if done.returncode:
    said = done.stderr.strip().splitlines()[-1:] or [f'exit code {done.returncode}']
    return {'error': said[0]} | ({} if done.returncode == 2 else {'failed': True})
  return json.loads(done.stdout)


def table(lines: Sequence[dict[str, Any]]) -> str:
  """The plans as Markdown, a column an algorithm, a row a model and topology.

  Where a model, topology and algorithm have several, rows are of a mesh and a shape of steps too.
  """
  algos = list(dict.fromkeys(line['algo'] for line in lines))
  several = len({(line['model'], line['topology'], line['algo']) for line in lines}) < len(lines)
  rows: dict[tuple[str, ...], dict[str, str]] = {}
  for line in lines:
    of = line['model'], line['topology'], *([_setting(line)] if several else [])
    rows.setdefault(of, {})[line['algo']] = _cell(line)
  head = ['model', 'topology', *(['mesh and rows'] if several else []), *algos]
  out = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  for of, cells in rows.items():
    out.append('| ' + ' | '.join([*of, *(cells.get(algo, '') for algo in algos)]) + ' |')
  return '\n'.join(out) + '\n'


def _setting(line: dict[str, Any]) -> str:
  """The mesh and the shape of a step, as they were asked for."""
  of = [flag.partition('=')[2] for flag in line['flags'] if flag.startswith(('--mesh=', '--gin=loader.Packing.'))]
  return ', '.join(one.removeprefix('loader.Packing.') for one in of)


def _cell(line: dict[str, Any]) -> str:
  if 'error' in line:
    return 'refused'
  memory = f'{line["hbm_bytes"] / 2**30:.1f} of {line["hbm_limit_bytes"] / 2**30:.1f} GiB'
  if not line['fits']:
    return f'**does not fit**: {memory}'
  return f'{memory}, MFU <= {line["mfu_bound"]:.0%}'


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--output', type=storage.on_disk, required=True, help='a JSONL file, which is added to')
  parser.add_argument('--matrix', action='store_true', help='1B, 8B and 70B on v5e, v5p and v6e: sft, dpo, ppo, grpo')
  for name, default in _DEFAULTS.items():
    of = ', names in gin_configs/models' if name == 'models' else ''
    parser.add_argument(f'--{name}', help=f'by commas{of}; {default} without --matrix')
  parser.add_argument('--mesh', default='', help='as for jaxalign.main')
  parser.add_argument('--row_length', type=_positive, default=2048, help='tokens of a row')
  parser.add_argument('--rows_per_device', type=_positive, default=2, help='of a step')
  parser.add_argument('--rows_at_once', type=_positive, default=1, help='of a micro-batch, on each device')
  parser.add_argument('--table', action='store_true', help='print the file as Markdown, and plan nothing')
  args = parser.parse_args(argv)
  try:
    return run(args)
  except types.UsageError as err:
    print(f'plan: {err}', file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
  """Does what is asked for, and returns the exit code.

  Raises:
    UsageError: a flag cannot be, or the file is not one of plans.
  """
  known = _read(args.output)
  if args.table:
    if not known:
      raise types.UsageError(f'--output={args.output}: there are no plans in it')
    sys.stdout.write(table(known))
    return 0
  if args.matrix and _named(args):
    raise types.UsageError(f'--matrix says what is planned, and takes no --{", --".join(_named(args))}')
  if args.rows_per_device % args.rows_at_once:
    raise types.UsageError(
        f'--rows_at_once={args.rows_at_once} does not divide --rows_per_device={args.rows_per_device}'
    )
  if not args.output.parent.is_dir():
    raise types.UsageError(f'--output={args.output}: there is no folder {args.output.parent}')
  done = {tuple(line['flags']): line for line in known}
  refused = False
  for point, command in [(point, flags(point, args)) for point in points(args)]:
    line = done.get(tuple(command))
    if line is None:
      line = point | plan(command) | {'model': point['model'], 'flags': command}
      if 'failed' not in line:
        with args.output.open('a', encoding='utf-8') as file:
          file.write(json.dumps(line) + '\n')
      print(*point.values(), line.get('error') or _cell(line), file=sys.stderr, flush=True)
    refused |= 'error' in line
  return int(refused)


def _positive(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text}: it is a whole number, at least 1')
  return int(text)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  found = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    try:
      found.append(json.loads(line))
    except ValueError as err:
      raise types.UsageError(f'--output={path}: line {number} is not JSON') from err
    if not isinstance(found[-1], dict) or not {'flags', 'algo', 'model', 'topology'} <= found[-1].keys():
      raise types.UsageError(f'--output={path}: line {number} is not of a plan')
  return found


if __name__ == '__main__':
  sys.exit(main())
