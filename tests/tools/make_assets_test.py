"""The tool that makes the package's assets: tokenizer, openings, pairs, and the same bytes twice."""

import gzip
import json
import struct

import pytest
from sentencepiece import sentencepiece_model_pb2

from jaxalign import recipe
from tools import make_assets

STORIES = recipe.asset('stories260K')


@pytest.fixture
def source(tmp_path):
  """The folder that the tool reads: llama2.c's tokenizer, written from the shipped one, and the weights."""
  proto = sentencepiece_model_pb2.ModelProto.FromString((STORIES / 'tokenizer.model').read_bytes())
  plain = lambda i, piece: '' if i < 259 else piece.piece.replace('\u2581', ' ')
  texts = [(piece.score, plain(i, piece).encode()) for i, piece in enumerate(proto.pieces)]
  data = b''.join(struct.pack('<fi', score, len(text)) + text for score, text in texts)
  (tmp_path / 'tok512.bin').write_bytes(struct.pack('<i', 27) + data)
  (tmp_path / 'hf').symlink_to(STORIES)
  return tmp_path


def made(source, output):
  """Runs the tool and gives the bytes of what it wrote, by name."""
  make_assets.make(source, output, seed=0)
  return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob('*') if path.is_file()}


class TestTokenizerModel:

  def test_is_the_file_that_is_shipped(self, source):
    assert make_assets.tokenizer_model(source / 'tok512.bin') == (STORIES / 'tokenizer.model').read_bytes()


class TestOpenings:

  def test_are_three_to_eight_words_of_a_long_sentence_each_once(self):
    story = 'Too short. Once upon a time there was a little red ball in the grass.'
    found = make_assets.openings([story] * 30, seed=0)
    sentence = 'Once upon a time there was a little red ball in the grass'
    assert len(found) == len(set(found)) > 1
    assert all(sentence.startswith(text) and 3 <= len(text.split()) <= 8 for text in found)

  def test_leave_out_gloomy_ones(self):
    gloomy = 'The horrible terrible awful monster killed everyone in the sad town.'
    assert make_assets.openings([gloomy] * 5, seed=0) == []


class TestPairsAndDemonstrations:

  def test_are_best_and_worst_where_they_differ_and_the_best_of_every_prompt(self):
    texts = ['one', 'two', 'three']
    candidates = [[' a stone', ' a terrible stone', ' a wonderful stone'], [' a stone', ' a table'], [' alone']]
    pairs, demonstrations = make_assets._pairs_and_demonstrations(texts, candidates)
    (pair,) = pairs
    assert (pair['prompt'], pair['chosen'], pair['rejected']) == ('one', ' a wonderful stone', ' a terrible stone')
    assert pair['chosen_score'] > 0 > pair['rejected_score']
    assert [(one['prompt'], one['completion']) for one in demonstrations] == [
        ('one', ' a wonderful stone'),
        ('two', ' a stone'),
    ]


class TestRatings:

  def test_are_counted_by_hand(self):
    found = [{'prompt': 'One', 'completions': ["A cat's happy happy elephant.", '...'], 'scores': [0.5, 0.0]}]
    happy, nothing = make_assets.ratings(found)
    assert (happy['cheerfulness'], happy['variety'], happy['simplicity'], happy['class']) == (0.5, 0.8, 0.2, 2)
    assert (nothing['cheerfulness'], nothing['variety'], nothing['class']) == (None, 0.0, 1)
    assert make_assets.ratings([found[0] | {'scores': [-0.05, -0.04]}])[0]['class'] == 0


class TestMake:

  def test_writes_the_same_bytes_twice(self, source, tmp_path, monkeypatch):
    sizes = {'_STORIES': 60, '_TEST_PROMPTS': 12, '_HELD_OUT_PROMPTS': 4, '_TRAIN_PROMPTS': 20, '_NEW_TOKENS': 12}
    for name, value in sizes.items():
      monkeypatch.setattr(make_assets, name, value)
    first, second = (made(source, tmp_path / name) for name in ('first', 'second'))
    assert first == second
    assert len(first['prompts.txt'].splitlines()) == 4
    records = [json.loads(line) for line in gzip.decompress(first['stories-train.jsonl.gz']).splitlines()]
    assert records
    assert all(set(record) == {'prompt', 'completion', 'append_eos'} for record in records)
