"""Trains preference methods on the embedded sentiment task at equal steps, and compares what each reached.

  python tools/frontier.py --algos=dpo,ipo,simpo,kto --steps=60 --output=DIR
  python tools/frontier.py --algos=all --output=DIR

Every method trains from the embedded model by `jaxalign.main`, with its own gin file; runs that are in the directory
already are not made again. Then the 64 built-in openings are continued eight times at temperature 1: sentiment is the
mean of VADER's scores of the continuations, KL the mean over them of log policy - log reference, in nats, both with
their standard errors. Written are frontier.md (a table), frontier.json and, with matplotlib, frontier.png (sentiment
over KL).
"""

import argparse
from collections.abc import Sequence
import contextlib
import io
import json
import pathlib
import sys

import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import evaluate
from jaxalign import main as main_lib
from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.data import examples
from jaxalign.generation import sampling
from jaxalign.models import transformer
from jaxalign.rewards import rules

_NEW_TOKENS, _PER_PROMPT, _LENGTH = 64, 8, 128
# They score, want data that the package does not have, or are to be sampled behind a tag.
_LEFT_OUT = {
    'generative_rm',
    'preference_model',
    'group_robust',
    'orm',
    'prm',
    'soft_dpo',
    'step_dpo',
    'tis_dpo',
    'csft',
    'c_rlft',
    'hindsight',
    'quark',
    'bco_udm',
}


def train(algo: str, output: pathlib.Path, steps: int, bindings: Sequence[str]) -> dict[str, float]:
  """Trains, or finds the finished run; returns its summary."""
  workdir = output / algo
  flags = [f'--algo={algo}', f'--workdir={workdir}', f'--steps={steps}', '--eval_every=0', '--save_every=0']
  flags += ['--gin=train.train.samples = None', *(f'--gin={binding}' for binding in bindings)]
  with contextlib.redirect_stdout(io.StringIO()):
    if main_lib.main(['frontier', *flags]):
      sys.exit(f'frontier: {algo} failed')
  return json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))


def _logps(model: transformer.Transformer, params, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
  """Summed log-probabilities of each response behind its prompt, float64."""
  ids = np.zeros((len(rows), _LENGTH), np.int32)
  counts = np.zeros((len(rows), _LENGTH), bool)
  for i, (prompt, response) in enumerate(rows):
    ids[i, : len(prompt) + len(response)] = prompt + response
    counts[i, len(prompt) : len(prompt) + len(response)] = True
  positions, segments = np.broadcast_to(np.arange(_LENGTH), ids.shape), np.ones_like(ids)

  def run(params):
    hidden = model.apply({'params': params}, ids, positions, segments)
    logits = (hidden @ transformer.output_matrix(params))[..., : model.config.vocab_size]
    logp = jax.nn.log_softmax(logits[:, :-1].astype('float32'))
    return jax.numpy.take_along_axis(logp, ids[:, 1:, None], axis=2)[..., 0]

  return np.where(counts[:, 1:], np.asarray(jax.jit(run)(params), np.float64), 0).sum(axis=1)


def measure(spec: str, base: checkpoint.Loaded) -> dict[str, float]:
  """Sentiment and KL of fresh samples."""
  loaded = recipe.load(spec, sharding.make_mesh())
  params, model = checkpoint.merged(loaded), transformer.without_adapters(loaded.model)
  tokenizer = loaded.tokenizer
  prompts = [examples.prompt_ids(tokenizer, text) for text in evaluate.builtin_prompts()]
  drawn = sampling.sample(
      model, params, prompts, n=_PER_PROMPT, max_new_tokens=_NEW_TOKENS, seed=0, stop_ids=(tokenizer.eos_id,)
  )
  prompts = [ids for ids in prompts for _ in range(_PER_PROMPT)]
  own = np.array([np.sum(one.logps, dtype=np.float64) for one in drawn])
  gap = own - _logps(base.model, base.params, [(prompt, one.ids) for prompt, one in zip(prompts, drawn)])
  sentiment = np.array(rules.vader([tokenizer.decode(one.ids, continuation=True) for one in drawn]))
  error = lambda x: float(x.std() / np.sqrt(len(x)))
  return {
      'sentiment': float(sentiment.mean()),
      'sentiment_stderr': error(sentiment),
      'kl': float(gap.mean()),
      'kl_stderr': error(gap),
      'distinct_2': rules.distinct(2, [one.ids for one in drawn]),
      'length': float(np.mean([len(one.ids) for one in drawn])),
  }


def write(output: pathlib.Path, found: dict[str, dict[str, float]], steps: int) -> None:
  """Writes table, numbers and, where matplotlib is installed, the plot."""
  (output / 'frontier.json').write_text(json.dumps(found, indent=1), encoding='utf-8')
  lines = [f'# After {steps} steps on builtin:sentiment', '']
  lines += ['| method | accuracy | sentiment | KL (nats) | distinct-2 | length |', '|---|---|---|---|---|---|']
  for name, x in sorted(found.items(), key=lambda item: -item[1]['sentiment']):
    accuracy = f'{x["accuracy"]:.3f}' if x['accuracy'] is not None else ''
    lines.append(
        f'| `{name}` | {accuracy} | {x["sentiment"]:.3f} ± {x["sentiment_stderr"]:.3f} |'
        f' {x["kl"]:.2f} ± {x["kl_stderr"]:.2f} | {x["distinct_2"]:.3f} | {x["length"]:.1f} |'
    )
  (output / 'frontier.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  try:
    from matplotlib import figure
  except ImportError:
    print('frontier.png is not drawn: pip install matplotlib')
    return
  fig = figure.Figure(figsize=(9, 6))
  axes = fig.subplots()
  for name, x in found.items():
    axes.errorbar(x['kl'], x['sentiment'], xerr=x['kl_stderr'], yerr=x['sentiment_stderr'], fmt='o', markersize=3)
    axes.annotate(name, (x['kl'], x['sentiment']), fontsize=6)
  axes.set(xlabel='KL from the reference (nats per response)', ylabel='sentiment (VADER)', title=f'{steps} steps')
  fig.savefig(output / 'frontier.png', dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--algos', default='all', help='names, with commas between; all: what trains a policy')
  parser.add_argument('--steps', type=int, default=60, help='of every run')
  parser.add_argument('--gin', action='append', default=[], help='bindings for every run')
  parser.add_argument('--output', type=storage.on_disk, required=True, help='where runs, table and plot go')
  args = parser.parse_args(argv)
  offline = (a for a in catalog.algorithms() if not catalog.is_online(a))
  policies = [a for a in offline if a not in _LEFT_OUT and not a.startswith('rm')]
  algos = policies if args.algos == 'all' else args.algos.split(',')
  try:
    for algo in algos:
      catalog.check_algorithm(algo)
  except types.UsageError as err:
    print(f'frontier: {err}', file=sys.stderr)
    return 2
  args.output.mkdir(parents=True, exist_ok=True)
  mesh = sharding.make_mesh()
  found: dict[str, dict] = {}
  with jax.set_mesh(mesh):
    base = recipe.load(recipe.DEFAULT_MODEL, mesh)
    found['(before)'] = {'accuracy': None} | measure(recipe.DEFAULT_MODEL, base)
  for algo in algos:
    summary = train(algo, args.output, args.steps, args.gin)
    with jax.set_mesh(mesh):
      found[algo] = {'accuracy': summary.get('eval/rewards/accuracies')} | measure(str(args.output / algo), base)
    print(f'{algo}: sentiment {found[algo]["sentiment"]:.3f}, KL {found[algo]["kl"]:.2f}', flush=True)
    write(args.output, found, args.steps)
  return 0


if __name__ == '__main__':
  sys.exit(main())
