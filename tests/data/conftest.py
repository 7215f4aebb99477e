"""What tests of data share: data sets made of token ids that the test writes down."""

import json
import types as pytypes

import numpy as np
import pytest

from jaxalign.data import dataset
from jaxalign.data import examples

# All that the token cache asks of a tokenizer is what it is.
TOKENIZER = pytypes.SimpleNamespace(fingerprint='token ids')


def example_of(record):
  """Makes a group of {'ids': [[...], ...], 'prompt': tokens of the prompt, ...labels}."""
  if record.get('drop'):
    raise examples.Dropped(record['drop'])
  sequences = tuple(
      examples.Sequence(np.array(ids, np.int32), np.arange(len(ids)) >= record['prompt']) for ids in record['ids']
  )
  labels = {name: value for name, value in record.items() if name not in ('ids', 'prompt', 'truncated')}
  return examples.Group(sequences, labels, truncated=record.get('truncated', False), prompt_tokens=record['prompt'])


@pytest.fixture
def write_jsonl(tmp_path):
  """A function that writes records (or lines) to a file and returns its spec."""

  def write(records, name='data.jsonl'):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (tmp_path / name).write_text(''.join(line + '\n' for line in lines))
    return f'jsonl:{tmp_path / name}'

  return write


@pytest.fixture
def build(tmp_path):
  """`dataset.build` of token ids, with a cache of the test's own."""

  def run(spec, **options):
    defaults = {'tokenizer': TOKENIZER, 'example_fn': example_of, 'key_parts': 'ids', 'cache_dir': tmp_path / 'cache'}
    return dataset.build(spec, **(defaults | options))

  return run


@pytest.fixture
def token_dataset(build, write_jsonl):
  """A function from records to a data set."""
  return lambda records, name='data.jsonl': build(write_jsonl(records, name))


@pytest.fixture
def random_records():
  """A function that draws records with K responses; every id occurs once, so that tokens can be told apart."""

  def draw(count, group_size=2, seed=0, longest=30, start=0):
    rng = np.random.default_rng(seed)
    records, next_id = [], start
    for _ in range(count):
      prompt = int(rng.integers(1, 6))
      ids = []
      for _ in range(group_size):
        length = prompt + int(rng.integers(1, longest))
        ids.append(list(range(next_id, next_id + length)))
        next_id += length
      records.append({'ids': ids, 'prompt': prompt, 'margin': round(float(rng.random()), 3)})
    return records

  return draw
