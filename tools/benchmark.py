"""Times steps and rollouts on stated work, alone or in turns with another program.

  JAX_PLATFORMS=cpu python tools/benchmark.py
  JAX_PLATFORMS=cpu python tools/benchmark.py --peer=trl --peer_python=trl/bin/python
  JAX_PLATFORMS=cpu python tools/benchmark.py --work=hh --pairs_file=FILE --tokenizer=FILE ...
  python tools/benchmark.py --model=llama3_2_1b --pairs=32 --response_tokens=960 --mesh=fsdp:8
  JAX_PLATFORMS=cpu python tools/benchmark.py --start

The works (--work):
  dpo       steps of DPO on made-up pairs of one length, against a reference that is computed in the step
            (--cached_reference: before training); tokens of both sequences per second,
            the prompt's counted with each of them
  hh        the same on the real pairs of --pairs_file, up to --row_length tokens: jaxalign packs them into --rows rows,
            peers pad --pairs of them to the longest (TRL) or to fixed widths (Tunix); pairs per second
  sft       steps of SFT on the chosen responses of --pairs_file, packed; tokens per second, without padding
  rollouts  --prompts responses of --response_tokens to prompts of --prompt_tokens, temperature 1, top-k 50; tokens per
            second, of TRL by transformers' `generate`

Weights are random, in float32; products have the dtype of the model's gin file. Every repeat is a process of its own
for jaxalign and then one for the peer, so that a busy machine slows both; its first --warm_up steps do not count. One
JSON object is printed, and a table on stderr: of each side the median of the repeats, quartiles and range, and the most
memory of its processes (maximum RSS, or what arrays took on the GPU); the ratio of the medians, and the median and
range of the ratios of neighbours. For jaxalign `host_ms_per_step` is what the thread that trains computes itself,
`input_ms_per_step` how long it waits for a batch.

--start measures another thing: seconds from the start of `python -m jaxalign.main --algo=dpo` until its first step is
logged, once with empty caches, then with full ones. Of the other flags it reads --repeats and --gin.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / 'tools' / 'peers'
# What each work is measured by.
UNITS = {'dpo': 'tokens/s', 'hh': 'pairs/s', 'sft': 'tokens/s', 'rollouts': 'tokens/s'}
ALIKE = ('dpo', 'rollouts')  # each step is of as much work as any other
# What makes the virtual environment of a peer, with versions that were seen to work.
INSTALL = {
    'trl': 'torch==2.13.0 trl==1.16.0 transformers==5.24.0 datasets==5.2.0 accelerate==1.15.0',
    'tunix': 'google-tunix==0.1.7 jax==0.10.2',
}
DEFAULTS = {
    'dpo': {'prompt_tokens': 64, 'response_tokens': 192, 'rows': 0},
    'hh': {'prompt_tokens': 0, 'response_tokens': 0, 'rows': 2},
    'sft': {'prompt_tokens': 0, 'response_tokens': 0, 'rows': 4},
    'rollouts': {'prompt_tokens': 64, 'response_tokens': 128, 'rows': 0},
}
_POLL_S = 0.02


class Refused(Exception):
  """The command line cannot be done as it is; one line."""


class Failed(Exception):
  """A process did not do its work; one line."""


def script(name: str, python: str, argument: pathlib.Path, is_ours: bool) -> str:
  """What a script of tools/peers prints; with `is_ours` it sees this checkout, else nothing of it."""
  env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  env |= {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
  if is_ours:
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
  command = [python, str(SCRIPTS / f'{name}.py'), str(argument)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  if done.returncode:
    said = [line for line in done.stderr.splitlines() if line.strip()] or ['it said nothing']
    raise (Refused if done.returncode == 2 else Failed)(f'{name}: {said[-1]}')
  return done.stdout


def run(side: str, python: str, work: pathlib.Path, alike: bool) -> dict[str, Any]:
  """What the script of a side measures of a work, whose steps are `alike` or not."""
  last = script(f'run_{side}', python, work, side == 'jaxalign').strip().split('\n')[-1]
  try:
    found = json.loads(last)
    return found | {'rate': rate(found['seconds'], found['units'], alike)}
  except (ValueError, KeyError, TypeError, ZeroDivisionError) as err:
    raise Failed(f'run_{side}: it printed no JSON with seconds and units: {last[:200]}') from err


def rate(seconds: Sequence[float], units: Sequence[float], alike: bool) -> float:
  """Units per second: of the median step where all steps are alike, else over all steps."""
  return statistics.mean(units) / statistics.median(seconds) if alike else sum(units) / sum(seconds)


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, quartiles and range."""
  low, middle, high = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else [values[0]] * 3
  return {'median': middle, 'quartile_1': low, 'quartile_3': high, 'min': min(values), 'max': max(values)}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """One side's runs: rates, seconds of a step, memory, and medians of what else it measures."""
  found: dict[str, Any] = spread([one['rate'] for one in runs])
  found['median_step_s'] = statistics.median(statistics.median(one['seconds']) for one in runs)
  found['timed_steps'] = [len(one['seconds']) for one in runs]
  found['peak_rss_bytes'] = max(one['peak_rss_bytes'] for one in runs)
  if 'peak_memory_bytes' in runs[0]:
    found['peak_memory_bytes'] = max(one['peak_memory_bytes'] for one in runs)
  for name in ('host_ms_per_step', 'input_ms_per_step'):
    if name in runs[0]:
      found[name] = statistics.median(one[name] for one in runs)
  return found | {name: runs[0][name] for name in ('versions', 'widths', 'dtypes') if name in runs[0]}


def compare(asked: Mapping[str, Any], pythons: Mapping[str, str], folder: pathlib.Path) -> dict[str, Any]:
  """Runs all sides in turns, and returns what is printed."""
  unit = UNITS[asked['work']]
  (folder / 'asked.json').write_text(json.dumps(asked), encoding='utf-8')
  script('prepare', sys.executable, folder / 'asked.json', True)
  path = folder / 'work.json'
  work = json.loads(path.read_text(encoding='utf-8'))
  runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
  for turn in range(asked['repeats']):
    path.write_text(json.dumps(work | {'seed': asked['seed'] + turn}), encoding='utf-8')
    for side, python in pythons.items():
      runs[side].append(run(side, python, path, asked['work'] in ALIKE))
    said = ', '.join(f'{side} {of[-1]["rate"]:.4g}' for side, of in runs.items())
    print(f'{turn + 1}/{asked["repeats"]}: {said} {unit}', file=sys.stderr, flush=True)
  found = {'work': asked['work'], 'unit': unit, 'repeats': asked['repeats']}
  found |= {side: summary(of) for side, of in runs.items()}
  if len(runs) > 1:
    ours, theirs = ([one['rate'] for one in of] for of in runs.values())
    found['ratio_of_medians'] = statistics.median(ours) / statistics.median(theirs)
    found['ratio'] = spread([a / b for a, b in zip(ours, theirs)])
  return found


def table(found: Mapping[str, Any]) -> str:
  """The same for people."""
  lines = [f'{found["work"]}, {found["unit"]}, {found["repeats"]} repeats']
  lines.append(f'{"":10}{"median":>10}{"quartiles":>20}{"range":>20}{"s/step":>9}{"memory":>11}')
  between = lambda of, a, b: f'{of[a]:.4g} .. {of[b]:.4g}'
  sides = [of for of in found.values() if isinstance(of, Mapping) and 'peak_rss_bytes' in of]
  of_memory = 'peak_memory_bytes' if all('peak_memory_bytes' in of for of in sides) else 'peak_rss_bytes'
  for side, of in found.items():
    if isinstance(of, Mapping) and 'peak_rss_bytes' in of:
      spans = f'{between(of, "quartile_1", "quartile_3"):>20}{between(of, "min", "max"):>20}'
      memory = f'{of[of_memory] / 1e6:.0f} MB'
      lines.append(f'{side:10}{of["median"]:>10.4g}{spans}{of["median_step_s"]:>9.3g}{memory:>11}')
  if 'ratio' in found:
    of = found['ratio']
    each = f'of neighbours {of["median"]:.3g} ({between(of, "min", "max")})'
    lines.append(f'ratio: of medians {found["ratio_of_medians"]:.3g}, {each}')
  if 'host_ms_per_step' in found['jaxalign']:
    of = found['jaxalign']
    lines.append(f'host {of["host_ms_per_step"]:.2f} ms a step, input {of["input_ms_per_step"]:.2f} ms')
  return '\n'.join(lines)


def first_step(command: Sequence[str], metrics: pathlib.Path) -> float:
  """Seconds from the start of a command until `metrics` has a line; the command is ended then."""
  start = time.perf_counter()
  with tempfile.TemporaryFile() as said:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT) as process:
      while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(_POLL_S)
      seconds = time.perf_counter() - start
      process.kill()
    if not (metrics.exists() and metrics.stat().st_size):
      said.seek(0)
      last = said.read().decode(errors='replace').strip().splitlines()[-1:]
      raise Failed(f'no step: {"".join(last)}')
  return seconds


def starts(repeats: int, folder: pathlib.Path, more: Sequence[str]) -> dict[str, Any]:
  """Seconds to the first step, with empty caches and then with full ones."""
  found = []
  for turn in range(repeats + 1):
    workdir = folder / f'run{turn}'
    flags = ['--algo=dpo', '--steps=2', '--log_every=1', f'--workdir={workdir}', f'--cache_dir={folder / "cache"}']
    command = [sys.executable, '-m', 'jaxalign.main', *flags, *more]
    found.append(first_step(command, workdir / 'metrics.jsonl'))
    print(f'{"warm" if turn else "cold"}: {found[-1]:.1f} s', file=sys.stderr, flush=True)
  return {'unit': 's', 'cold': found[0], 'warm': spread(found[1:])}


def _positive(text: str) -> int:
  """A whole number from 1 on; argparse says so of another."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text}: it is a whole number, at least 1')
  return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The flags, defaults of the work filled in."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--work', default='dpo', choices=tuple(UNITS))
  parser.add_argument('--start', action='store_true', help='time the first step of the default run instead')
  parser.add_argument('--peer', choices=tuple(INSTALL), help='run in turns with it')
  parser.add_argument('--peer_python', help="the interpreter of the peer's own virtual environment")
  parser.add_argument('--repeats', type=_positive, default=5, help='processes of each side')
  parser.add_argument('--steps', type=_positive, default=5, help='steps or rollouts of a process that count')
  parser.add_argument('--warm_up', type=_positive, default=2, help='steps before them; the first one compiles')
  parser.add_argument('--model', default='stories15M', help='as for jaxalign.main; its own tokenizer is not used')
  parser.add_argument('--vocab_size', type=_positive, help='ids to draw from; default: all of the model')
  parser.add_argument('--algo', help='of jaxalign: for pairs dpo by default, or another one')
  parser.add_argument('--pairs', type=_positive, default=8, help='pairs of a step')
  parser.add_argument('--pairs_file', help='of hh and sft: chosen and rejected, JSONL or .gz')
  parser.add_argument('--tokenizer', help='of --pairs_file')
  parser.add_argument('--prompts', type=_positive, default=16, help='of rollouts')
  parser.add_argument('--prompt_tokens', type=_positive, help='default: 64')
  parser.add_argument('--response_tokens', type=_positive, help='with EOS; default: 192, of rollouts 128')
  parser.add_argument('--cached_reference', action='store_true', help='its log-probabilities are computed before')
  parser.add_argument(
      '--share_prompts',
      action=argparse.BooleanOptionalAction,
      default=True,
      help='jaxalign writes a prompt once a pair',
  )
  parser.add_argument('--rows', type=_positive, help='of a micro-batch of hh (default: 2) and sft (4)')
  parser.add_argument('--row_length', type=_positive, default=1024, help='of hh and sft')
  parser.add_argument('--micro_batches', type=_positive, default=1, help='micro-batches of a step')
  parser.add_argument('--mesh', default='', help='as for jaxalign.main')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--gin', action='append', default=[], help='as for jaxalign.main')
  args = parser.parse_args(argv)
  for name, value in DEFAULTS[args.work].items():
    setattr(args, name, vars(args)[name] or value)
  args.algo = args.algo or ('sft' if args.work == 'sft' else 'dpo')
  return args


def pythons_of(args: argparse.Namespace) -> dict[str, str]:
  """The interpreter of each side.

  Raises:
    Refused: there is none for the peer; the message says how to make one.
  """
  if args.start and args.peer:
    raise Refused(f'--start --peer={args.peer}: the first step of jaxalign alone is timed')
  if args.cached_reference and args.work not in ('dpo', 'hh'):
    raise Refused(f'--cached_reference --work={args.work}: dpo and hh have a reference')
  if args.peer is None:
    if args.peer_python:
      raise Refused(f'--peer_python={args.peer_python} needs --peer')
    return {'jaxalign': sys.executable}
  if args.peer == 'tunix' and args.work not in ('dpo', 'hh'):
    raise Refused(f'--peer=tunix --work={args.work}: it is timed on dpo and hh')
  if not args.peer_python or not os.access(args.peer_python, os.X_OK):
    make = f'python3 -m venv {args.peer} && {args.peer}/bin/pip install {INSTALL[args.peer]}'
    raise Refused(f'--peer={args.peer} needs --peer_python={args.peer}/bin/python, made by: {make}')
  return {'jaxalign': sys.executable, args.peer: args.peer_python}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  args = parse(argv)
  try:
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch)
      pythons = pythons_of(args)
      if args.start:
        print(json.dumps(starts(args.repeats, folder, [f'--gin={one}' for one in args.gin])))
        return 0
      found = compare(vars(args), pythons, folder)
    print(table(found), file=sys.stderr)
    print(json.dumps(found))
  except (Refused, Failed) as err:
    print(f'benchmark: {err}', file=sys.stderr)
    return 2 if isinstance(err, Refused) else 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
