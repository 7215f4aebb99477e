"""Runs of a tiny model, through the command line and in processes of their own, for tests of whole runs."""

import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.data import tokenizers
from jaxalign.models import hf
from jaxalign.models import hf_export
from jaxalign.models import hf_import
from jaxalign.models import transformer
from tests import packed

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMED = {'tokens_per_s', 'step_time', 'time/host', 'time/input', 'mfu'}


def vowels(responses):
  """A reward that differs between responses of a model that knows nothing."""
  return [float(sum(text.count(vowel) for vowel in 'aeiou')) for text in responses]


def write_pairs(path, count=40):
  rng = random.Random(0)
  text = lambda: ' ' + ' '.join(
      rng.choice(('the cat', 'a dog', 'was happy', 'ran home')) for _ in range(rng.randint(1, 5))
  )
  records = [{'prompt': f'Story {i}:', 'chosen': text() + '!', 'rejected': text() + '.'} for i in range(count)]
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def folder_with_pairs(tmp_path_factory, name):
  folder = tmp_path_factory.mktemp(name)
  write_pairs(folder / 'pairs.jsonl')
  return folder


def flags(folder, workdir, *more, steps=12):
  return [
      'jaxalign',
      '--algo=dpo',
      '--model=tiny',
      '--tokenizer=builtin:stories260K',
      f'--data=jsonl:{folder / "pairs.jsonl"}',
      f'--cache_dir={folder / "cache"}',
      f'--workdir={workdir}',
      f'--steps={steps}',
      '--log_every=1',
      '--save_every=4',
      '--gin=loader.Packing.rows = 8',
      '--gin=loader.Packing.row_length = 64',
      '--gin=optim.linear.lr = 0.01',
      '--gin=train.train.samples = None',
      *more,
  ]


HEAD_OF_TWO = {'score': (64, 2), 'score_bias': (2,)}


def write_model(folder, **head):
  """The stories model with a head of these parameters, as transformers has it, its padding being its EOS."""
  stories = recipe.asset('stories260K')
  config = hf.read_config(stories)
  params = hf_import.read_params(stories, config, sharding.make_mesh('', devices=jax.devices()[:1])) | head
  config = dataclasses.replace(config, score_outputs=head['score'].shape[1], score_bias='score_bias' in head)
  tokenizer = tokenizers.load(stories)
  hf_export.write(folder, params, config, hf.read_json(stories / 'config.json'), 'float32', tokenizer.eos_id)
  tokenizer.save(folder)
  (folder / 'tokenizer_config.json').write_text('{"pad_token": "</s>"}')
  assert tokenizers.load(folder).pad_id == tokenizer.eos_id
  return folder


def hidden_states(longest=64):
  """What gives the stories model's hidden states of ids that it reads alone, `[n, D]` float64, by one program."""
  one, stories = sharding.make_mesh('', devices=jax.devices()[:1]), recipe.asset('stories260K')
  config = hf.read_config(stories)
  params, module = hf_import.read_params(stories, config, one), transformer.build(config, one, length=512)
  return lambda ids: packed.hidden_states(module, params, ids, length=longest)


def spawn(args, devices=2, cwd=ROOT, program=('-m', 'jaxalign.main'), **env):
  """A run in a process of its own, in a folder; JAX is told here what a conftest tells it for tests."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith('TPU_')}
  env = clean | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(ROOT)} | env
  command = [sys.executable, *program, *args[1:]]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


# Several runs in one process, as starting it takes as long as a run; it joins the others for the first.
ONE_BY_ONE = """
import json, os, sys
from jaxalign import main
for args in map(json.loads, sys.argv[1:]):
  if main.main(args):
    sys.exit(1)
  os.environ.pop('COORDINATOR_ADDRESS', None)
"""


def spawn_together(args, processes, **more):
  """A run in several processes with two devices each."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  member = lambda i: {'COORDINATOR_ADDRESS': address, 'NUM_PROCESSES': str(processes), 'PROCESS_ID': str(i)}
  return [spawn(args, **more, **member(i)) for i in range(processes)]


def finished(process):
  _, err = process.communicate(timeout=200)
  return process.returncode, err


def logged(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {line['step']: {k: v for k, v in line.items() if k not in TIMED} for line in map(json.loads, lines)}


def params_of(workdir, step=None):
  where = workdir if step is None else workdir / 'checkpoints' / str(step)
  return jax.device_get(checkpoint.load(where, sharding.make_mesh('', devices=jax.devices()[:1])).params)


def item_of(workdir, step, name):
  """A tree that a checkpoint holds apart."""
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(workdir / 'checkpoints' / str(step) / name)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
