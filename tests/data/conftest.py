"""What tests of data share: data sets made of token ids that the test writes down, and tiny tokenizers."""

import json
import types as pytypes

import numpy as np
import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from jaxalign.data import examples
from jaxalign.data import token_cache

# All that the token cache asks of a tokenizer is what it is.
TOKENIZER = pytypes.SimpleNamespace(fingerprint='token ids')


def example_of(record):
  """Makes a group of {'ids': [[...], ...], 'prompt': its tokens, 'tokens': {label: [[...], ...]}, ...labels}."""
  if record.get('drop'):
    raise examples.Dropped(record['drop'])
  sequences = tuple(
      examples.Sequence(
          np.array(ids, np.int32),
          np.arange(len(ids)) >= record['prompt'],
          {name: np.array(values[slot], np.float32) for name, values in record.get('tokens', {}).items()},
      )
      for slot, ids in enumerate(record['ids'])
  )
  labels = {name: value for name, value in record.items() if name not in ('ids', 'prompt', 'truncated', 'tokens')}
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
  """`token_cache.build` of token ids, with a cache of the test's own."""

  def run(spec, **options):
    defaults = {'tokenizer': TOKENIZER, 'example_fn': example_of, 'key_parts': 'ids', 'cache_dir': tmp_path / 'cache'}
    return token_cache.build(spec, **(defaults | options))

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


_CORPUS = 'the cat sat on the mat and said hello to the dog. Human Assistant user hello there how are you ' * 20


@pytest.fixture(scope='session')
def train_sentencepiece(tmp_path_factory):
  """A function that trains a tiny SentencePiece model (BPE with byte fallback) and returns its path."""

  def train(**options):
    path = tmp_path_factory.mktemp('sentencepiece') / 'tokenizer.model'
    defaults = {
        'vocab_size': 340,
        'model_type': 'bpe',
        'byte_fallback': True,
        'normalization_rule_name': 'identity',
        'remove_extra_whitespaces': False,
        'control_symbols': ['[INST]', '[/INST]'],
        'hard_vocab_limit': False,
        'minloglevel': 2,
    }
    with path.open('wb') as f:
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=iter(_CORPUS.split('. ')), model_writer=f, **(defaults | options)
      )
    return path

  return train


@pytest.fixture(scope='session')
def sentencepiece_model(train_sentencepiece):
  """Path of a SentencePiece model of the layout of Llama's: <unk> 0, <s> 1, </s> 2, byte fallback."""
  return train_sentencepiece()


@pytest.fixture
def write_json_tokenizer(tmp_path):
  """A function that writes a directory with a tokenizer.json, and returns its path.

  By default it is a byte-level BPE whose merges go across anything: 'Ġ' is a space and 'Ċ' a newline in its alphabet.
  """

  def write(merges=('Ġ Ċ', 'Ċ Ċ', 'ĠĊ a', 'a b', 'Ġ a', 'Ċ b'), special=('<s>', '</s>'), config=None, **parts):
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for merge in merges:
      vocab.setdefault(merge.replace(' ', ''), len(vocab))
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    added = [
        {'id': vocab[name], 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False}
        | {'normalized': False, 'special': True}
        for name in special
    ]
    spec = {
        'version': '1.0',
        'added_tokens': added,
        'normalizer': None,
        'pre_tokenizer': byte_level,
        'post_processor': None,
        'decoder': byte_level,
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': list(merges)},
    }
    config = {'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True} if config is None else config
    directory = tmp_path / f'tokenizer-{len(list(tmp_path.iterdir()))}'
    directory.mkdir()
    (directory / 'tokenizer.json').write_text(json.dumps(spec | parts))
    (directory / 'tokenizer_config.json').write_text(json.dumps(config))
    return directory

  return write
