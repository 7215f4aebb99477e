"""Runs a work of pairs by Tunix's DPO trainer, on a Llama.

Prompts and responses are padded, and the few longer ones cut, to fixed widths, as Tunix does. A step lasts from when
its batch is asked for until the next one is: what is under way at once is bounded, so that this is the pace of steps.
"""

import importlib.metadata
import sys
import time

import common
from flax import nnx
import jax
import numpy as np
import optax
from tunix.models.llama3 import model as llama
from tunix.sft.dpo import dpo_trainer

_AHEAD = 3  # batches that may be asked for before their steps run


def model_of(work):
  """A model of random weights."""
  sizes = work['hf_config']
  config = llama.ModelConfig(
      num_layers=sizes['num_hidden_layers'],
      vocab_size=sizes['vocab_size'],
      embed_dim=sizes['hidden_size'],
      hidden_dim=sizes['intermediate_size'],
      num_heads=sizes['num_attention_heads'],
      head_dim=sizes['head_dim'],
      num_kv_heads=sizes['num_key_value_heads'],
      rope_theta=10000,
      norm_eps=sizes['rms_norm_eps'],
      weight_tying=sizes['tie_word_embeddings'],
  )
  return llama.Llama3(config, rngs=nnx.Rngs(work['seed']))


def padded(rows, width, left):
  """Ids and mask [n, width]; what is too long loses its beginning on the left, its end on the right."""
  ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for index, row in enumerate(rows):
    row = row[-width:] if left else row[:width]
    place = slice(width - len(row), None) if left else slice(len(row))
    ids[index, place], mask[index, place] = row, True
  return ids, mask


def batches(work):
  """All batches of the work."""
  to_ids = lambda text: [int(word[1:]) for word in text.split()]
  records, count = common.records(work), work['pairs']
  prompt_width, response_width = work['widths']
  for step in range(work['warm_up'] + work['steps'] + _AHEAD):
    part = [records[(step * count + index) % len(records)] for index in range(count)]
    fields = {}
    for name, width in (('prompt', prompt_width), ('chosen', response_width), ('rejected', response_width)):
      is_prompt = name == 'prompt'
      rows = [to_ids(record[name]) + ([] if is_prompt else [2]) for record in part]
      fields[f'{name}_ids'], fields[f'{name}_mask'] = padded(rows, width, is_prompt)
    yield dpo_trainer.TrainingInput(**fields)


class Watched(list):
  """Batches that note when each was asked for."""

  def __init__(self, items):
    super().__init__(items)
    self.asked = []

  def __iter__(self):
    for item in super().__iter__():
      self.asked.append(time.perf_counter())
      yield item


def train(work):
  """Steps of DPO."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  steps = work['warm_up'] + work['steps'] + _AHEAD
  data = Watched(batches(work))
  with mesh:
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=steps)
    model = model_of(work)
    trainer = dpo_trainer.DPOTrainer(model, model_of(work), optax.adamw(1e-6), config)
    trainer.train(data)
  first = work['warm_up']
  seconds = np.diff(data.asked)[first : first + work['steps']].tolist()
  tokens = 2 * work['pairs'] * sum(work['widths'])
  common.report(
      seconds,
      [work['pairs'] if work['work'] == 'hh' else tokens] * len(seconds),
      versions={name: importlib.metadata.version(name) for name in ('google-tunix', 'jax')},
      widths=work['widths'],
      dtypes=sorted({str(x.dtype) for x in jax.tree.leaves(nnx.state(model, nnx.Param))}),
  )


if __name__ == '__main__':
  asked = common.read()
  if asked['work'] not in ('dpo', 'hh'):
    sys.exit(f'Tunix runs --work=dpo and hh here, not {asked["work"]}')
  train(asked)
