"""Runs a work by jaxalign: training by the same way as `python -m jaxalign.main`, rollouts by `sampling.sample`."""

import contextlib
import io
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import common

from jaxalign import pages

if __name__ == '__main__':  # As `python -m jaxalign.main` does.
  pages.begin_with_huge(sys.argv[:1])

import jax
import numpy as np

from jaxalign import main as main_lib
from jaxalign import metrics
from jaxalign import sharding
from jaxalign.generation import sampling
from tools import rollout_speed


def flags(work: dict[str, Any], workdir: pathlib.Path) -> list[str]:
  """The command line of a run with one step more than count, as a last step's results come with those before it."""
  folder, packing = work['folder'], {'row_length': work['row_length'], 'rows': work['rows']}
  if work['work'] == 'dpo':  # A row to each pair, or to each sequence.
    in_row = 2 if work['share_prompts'] else 1
    packing['row_length'] = work['prompt_tokens'] + in_row * work['response_tokens']
    packing |= {'rows': 2 // in_row * work['pairs'] // work['micro_batches'], 'groups_per_step': work['pairs']}
  packing |= {'micro_batches': work['micro_batches'], 'share_prompts': work['share_prompts']}
  gin = [f'loader.Packing.{name}={value}' for name, value in packing.items()]
  if work['work'] != 'sft' and not work['cached_reference']:
    gin.append("recipe.Recipe.reference='live'")
  return [
      f'--algo={work["algo"]}',
      f'--model={work["model"]}',
      f'--tokenizer={folder}',
      f'--data=jsonl:{folder}/data.jsonl',
      '--eval_data=',
      f'--workdir={workdir}',
      f'--cache_dir={folder}/cache',
      f'--mesh={work["mesh"]}',
      f'--steps={work["warm_up"] + work["steps"] + 1}',
      f'--seed={work["seed"]}',
      '--log_every=1',
      '--eval_every=0',
      '--save_every=0',
      *(f'--gin={binding}' for binding in [*gin, *work['gin']]),
  ]


def train(work: dict[str, Any]) -> None:
  """Steps of training."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / 'run'
    with contextlib.redirect_stdout(io.StringIO()):
      code = main_lib.main(['benchmark', *flags(work, workdir)])
    if code:
      sys.exit(code)
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
  slots = np.diff([line['num_tokens'] for line in lines])
  timed = [index for index, line in enumerate(lines) if work['warm_up'] < line['step'] < lines[-1]['step']]
  common.report(
      [lines[index]['step_time'] for index in timed],
      [float(slots[index - 1] * work['units_per_slot']) for index in timed],
      host_ms_per_step=1e3 * statistics.median(lines[index]['time/host'] for index in timed),
      input_ms_per_step=1e3 * statistics.median(lines[index]['time/input'] for index in timed),
      peak_memory_bytes=metrics.peak_memory_bytes(),
  )


def roll_out(work: dict[str, Any]) -> None:
  """Responses of a fixed length to random prompts."""
  prompts, length, new = work['prompts'], work['prompt_tokens'], work['response_tokens']
  mesh, seconds = sharding.make_mesh(work['mesh']), []
  with jax.set_mesh(mesh):
    model, params = rollout_speed.open_model(work['model'], mesh, work['dtype'])
    ids = np.random.default_rng(work['seed']).integers(10, model.config.vocab_size, (prompts, length)).tolist()
    for turn in range(work['warm_up'] + work['steps']):
      start = time.perf_counter()
      sampling.sample(model, params, ids, max_new_tokens=[new] * prompts, temperature=1.0, top_k=50, seed=turn)
      seconds.append(time.perf_counter() - start)
  timed = seconds[work['warm_up'] :]
  common.report(timed, [prompts * new] * len(timed), peak_memory_bytes=metrics.peak_memory_bytes())


if __name__ == '__main__':
  asked = common.read()
  (roll_out if asked['work'] == 'rollouts' else train)(asked)
