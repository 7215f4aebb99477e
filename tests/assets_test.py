"""The embedded default: tokenizer, model, prompts and preferences."""

import gzip
import json

import hypothesis
from hypothesis import strategies
import jax
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from jaxalign import evaluate
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import transformer
from jaxalign.rewards import rules
from tools import make_assets

MODEL = recipe.asset('stories260K')
TOKENIZER = tokenizers.load(MODEL)


def read(name):
  with gzip.open(recipe.asset(name), 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def merged(text):
  """What llama2.c makes of a text: bytes for what is not a piece, then the neighbours of the best score are merged."""
  proto = sentencepiece_model_pb2.ModelProto.FromString((MODEL / 'tokenizer.model').read_bytes())
  pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  scores = [piece.score for piece in proto.pieces]
  symbols = []
  for char in ('\u2581' + text.replace(' ', '\u2581')) if text else '':
    symbols += [char] if char in pieces else [f'<0x{byte:02X}>' for byte in char.encode()]
  while True:
    joined = [(a + b, i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in pieces]
    if not joined:
      return [pieces[symbol] for symbol in symbols]
    best, at = max(joined, key=lambda pair: (scores[pieces[pair[0]]], -pair[1]))
    symbols[at : at + 2] = [best]


class TestTokenizer:

  @hypothesis.given(strategies.text('abcdehilnorstuyTLO .,!"\'\n\té猫', max_size=40))
  def test_merges_as_llama2_c_does(self, text):
    assert TOKENIZER.encode(text) == merged(text)

  def test_gives_text_back(self):
    for text in [*evaluate.builtin_prompts(), 'Grüße, 猫!', ' two  spaces ', 'a\nb']:
      assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


class TestPrompts:

  def test_are_64_that_are_not_trained_on(self):
    prompts = evaluate.builtin_prompts()
    assert len(set(prompts)) == 64
    seen = {record['prompt'] for part in ('train', 'test') for record in read(f'sentiment-{part}.jsonl.gz')}
    assert not seen & set(prompts)

  def test_leave_the_model_room_both_ways(self):
    mesh = sharding.make_mesh('', devices=jax.devices()[:1])
    config = hf.read_config(MODEL)
    params = hf_import.read_params(MODEL, config, mesh)
    model = transformer.build(config, mesh, length=96)
    ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in evaluate.builtin_prompts()]
    drawn = sampling.sample(model, params, ids, n=8, max_new_tokens=64, seed=3)
    mean = np.mean(rules.vader([TOKENIZER.decode(one.ids, continuation=True) for one in drawn]))
    assert 0.35 <= mean <= 0.55


class TestPairs:

  def test_differ_in_sentiment_by_more_than_a_fifth(self):
    assert len(read('sentiment-train.jsonl.gz')) >= 2000
    assert len(read('sentiment-test.jsonl.gz')) >= 300
    for part in ('train', 'test'):
      for record in read(f'sentiment-{part}.jsonl.gz'):
        chosen, rejected = rules.vader([record['chosen'], record['rejected']])
        assert (chosen, rejected) == (record['chosen_score'], record['rejected_score'])
        assert chosen - rejected > 0.2

  def test_of_training_and_test_have_no_prompt_in_common(self):
    prompts = [{record['prompt'] for record in read(f'sentiment-{part}.jsonl.gz')} for part in ('train', 'test')]
    assert not prompts[0] & prompts[1]

  def test_hold_the_tokens_that_were_sampled(self):
    for record in read('sentiment-test.jsonl.gz'):
      for side in ('chosen', 'rejected'):
        assert len(TOKENIZER.encode(record[side], continuation=True)) == 64


class TestRatings:

  def test_are_those_of_the_lists(self):
    for part in ('train', 'test'):
      found = make_assets.ratings(read(f'lists-{part}.jsonl.gz')[: make_assets._RATED_LISTS])
      assert found == read(f'ratings-{part}.jsonl.gz')
      assert {record['class'] for record in found} == {0, 1, 2}
      assert 0 < sum(record['cheerfulness'] is None for record in found) < len(found) / 5


class TestFolder:

  def test_takes_at_most_3_megabytes_and_keeps_the_notice(self):
    files = [path for path in recipe.asset('').rglob('*') if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert 'Copyright (c) 2023 Andrej Karpathy' in (MODEL / 'LICENSE').read_text()
