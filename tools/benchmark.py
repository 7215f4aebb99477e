"""Times training steps on made-up preference pairs, by the same way as `python -m jaxalign.main`.

  JAX_PLATFORMS=cpu python tools/benchmark.py --model=stories15M --vocab_size=32000
  python tools/benchmark.py --model=llama3_2_1b --vocab_size=128256 --pairs=32 --response_tokens=960 --mesh=fsdp:8

Every pair is a prompt and two responses of fixed lengths. What is printed is one JSON object: the median of the steps'
wall times, without the first and the last, and tokens of both sequences (prompt and response) per second.
"""

import argparse
from collections.abc import Sequence
import contextlib
import io
import json
import pathlib
import statistics
import sys
import tempfile

import numpy as np
import tokenizers

from jaxalign import main as main_lib

_WARM_UP = 2  # the first step compiles, the second may still wait for memory
_SPECIALS = ('<pad>', '<bos>', '<eos>')


def write_tokenizer(directory: pathlib.Path, vocab_size: int) -> None:
  """A tokenizer whose words t3, t4, ... are one token each."""
  words = [*_SPECIALS, *(f't{i}' for i in range(len(_SPECIALS), vocab_size))]
  model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<pad>')
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<eos>'}), encoding='utf-8')


def write_pairs(path: pathlib.Path, args: argparse.Namespace) -> None:
  """Random pairs for all steps; a response's last token is the EOS that tokenising adds."""
  random = np.random.default_rng(args.seed)
  text = lambda count: ' '.join(f't{i}' for i in random.integers(len(_SPECIALS), args.vocab_size, count))
  with path.open('w', encoding='utf-8') as file:
    for _ in range(args.pairs * args.steps):
      chosen, rejected = (' ' + text(args.response_tokens - 1) for _ in range(2))
      file.write(json.dumps({'prompt': text(args.prompt_tokens), 'chosen': chosen, 'rejected': rejected}) + '\n')


def run(args: argparse.Namespace, directory: pathlib.Path) -> dict[str, float]:
  """Trains in `directory` and returns what the steps took."""
  write_tokenizer(directory, args.vocab_size)
  write_pairs(directory / 'pairs.jsonl', args)
  length = args.prompt_tokens + args.response_tokens
  workdir = directory / 'run'
  flags = [
      f'--algo={args.algo}',
      f'--model={args.model}',
      f'--tokenizer={directory}',
      f'--data=jsonl:{directory / "pairs.jsonl"}',
      f'--workdir={workdir}',
      f'--cache_dir={directory / "cache"}',
      f'--mesh={args.mesh}',
      f'--steps={args.steps}',
      f'--seed={args.seed}',
      '--log_every=1',
      '--eval_every=0',
      '--save_every=0',
      f'--gin=loader.Packing.rows={2 * args.pairs // args.micro_batches}',
      f'--gin=loader.Packing.micro_batches={args.micro_batches}',
      f'--gin=loader.Packing.row_length={length}',
      f'--gin=loader.Packing.groups_per_step={args.pairs}',
      *(f'--gin={binding}' for binding in args.gin),
  ]
  with contextlib.redirect_stdout(io.StringIO()):
    code = main_lib.main(['benchmark', *flags])
  if code:
    sys.exit(code)
  logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
  # The last step's results are fetched with those of the one before.
  times = [line['step_time'] for line in logged if _WARM_UP < line['step'] < args.steps]
  summary = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
  median = statistics.median(times)
  return {
      'median_step_s': median,
      'tokens_per_s': 2 * args.pairs * length / median,
      'timed_steps': len(times),
      'peak_memory_bytes': summary['peak_memory_bytes'],
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='stories15M', help='as for jaxalign.main; its own tokenizer is not used')
  parser.add_argument('--vocab_size', type=int, default=32000, help='ids to draw from, at most those of the model')
  parser.add_argument('--algo', default='dpo', help='an algorithm for pairs')
  parser.add_argument('--pairs', type=int, default=8, help='pairs of a step')
  parser.add_argument('--prompt_tokens', type=int, default=64)
  parser.add_argument('--response_tokens', type=int, default=192)
  parser.add_argument('--micro_batches', type=int, default=1, help='micro-batches of a step')
  parser.add_argument('--steps', type=int, default=7, help=f'of which the first {_WARM_UP} are not timed')
  parser.add_argument('--mesh', default='', help='as for jaxalign.main')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
      '--gin', action='append', default=[], help='as for jaxalign.main: "recipe.Recipe.reference=\'live\'"'
  )
  args = parser.parse_args(argv)
  if args.steps <= _WARM_UP + 1:
    parser.error(f'--steps must be more than {_WARM_UP + 1}')
  with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(run(args, pathlib.Path(folder))))
  return 0


if __name__ == '__main__':
  sys.exit(main())
