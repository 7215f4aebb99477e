"""Makes the package's assets from the TinyStories 260K model: tokenizer, prompts and data of every shape.

    python tools/make_assets.py --source=DIR [--output=jaxalign/assets] [--seed=0]

DIR holds `tok512.bin` (llama2.c's tokenizer) and `hf/` (the weights in Hugging Face layout). The controlled-sentiment
experiment of the DPO paper (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, Sec. 6) in miniature: prompts are
openings of sentences from stories that the model tells, every prompt is continued several times at temperature 1, VADER
ranks the continuations and says of each of their sentences, the steps, whether it is cheerful. Same seed and same kind
of machine, same bytes.
"""

import argparse
from collections.abc import Sequence
import gzip
import json
import pathlib
import random
import re
import shutil
import struct

import jax
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from jaxalign import sharding
from jaxalign import storage
from jaxalign.data import examples
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.models import hf
from jaxalign.models import hf_import
from jaxalign.models import transformer
from jaxalign.rewards import rules

_STORIES, _STORY_TOKENS = 5200, 96
_HELD_OUT_PROMPTS, _TEST_PROMPTS, _TRAIN_PROMPTS = 64, 480, 2600
_SAMPLES, _NEW_TOKENS, _LEAST_DIFFERENCE = 4, 64, 0.2
_LABELLED_PAIRS, _LISTS = 800, 400
_RATED_LISTS, _NEUTRAL = 200, 0.05
_STEP = re.compile(r'[^.!?]+[.!?"]*')
_SENTENCE = re.compile(r'[A-Z][^.!?"]*[.!?]')


def tokenizer_model(path: pathlib.Path) -> bytes:
  """The tokenizer file of llama2.c as a SentencePiece model: BPE by score, bytes for the rest, a space in front."""
  data = path.read_bytes()
  proto = sentencepiece_model_pb2.ModelProto()
  kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
  offset = 4
  for index in range(512):
    score, size = struct.unpack_from('<fi', data, offset)
    text = data[offset + 8 : offset + 8 + size].decode()
    offset += 8 + size
    piece = proto.pieces.add(score=score)
    if index < 3:
      piece.piece, piece.type = ('<unk>', '<s>', '</s>')[index], kinds.UNKNOWN if index == 0 else kinds.CONTROL
    elif index < 259:
      piece.piece, piece.type = f'<0x{index - 3:02X}>', kinds.BYTE
    else:
      piece.piece, piece.type = text.replace(' ', '\u2581'), kinds.NORMAL
  spec = proto.trainer_spec
  spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, 512, True
  spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
  proto.normalizer_spec.name = 'identity'
  proto.normalizer_spec.add_dummy_prefix = True
  proto.normalizer_spec.remove_extra_whitespaces = False
  proto.normalizer_spec.escape_whitespaces = True
  return proto.SerializeToString(deterministic=True)


def openings(stories: Sequence[str], seed: int) -> list[str]:
  """The first three to eight words of a sentence of each story, each opening once, without gloomy ones.

  What the openings say does not count, but gloomy ones would leave little to choose between.
  """
  rng = random.Random(seed)
  found: dict[str, None] = {}
  for story in stories:
    sentences = [s for s in _SENTENCE.findall(' '.join(story.split())) if len(s.split()) >= 6]
    if sentences:
      words = rng.choice(sentences).rstrip('.!?').split()
      found[' '.join(words[: rng.randint(3, min(8, len(words) - 1))]).rstrip(',')] = None
  return [text for text, score in zip(found, rules.vader(list(found))) if score >= 0]


def _stories(model, params, tokenizer, seed: int) -> list[str]:
  """Stories that the model tells from nothing."""
  drawn = sampling.sample(
      model,
      params,
      [[tokenizer.bos_id]],
      n=_STORIES,
      max_new_tokens=_STORY_TOKENS,
      seed=seed,
      stop_ids=(tokenizer.bos_id, tokenizer.eos_id),
      rows=512,
  )
  return [tokenizer.decode(one.ids) for one in drawn]


def _continuations(model, params, tokenizer, texts: list[str], count: int, seed: int) -> list[list[str]]:
  """Distinct continuations of each text that come back as the tokens that were sampled."""
  drawn = sampling.sample(
      model,
      params,
      [examples.prompt_ids(tokenizer, text) for text in texts],
      n=count,
      max_new_tokens=_NEW_TOKENS,
      seed=seed,
      stop_ids=(tokenizer.bos_id, tokenizer.eos_id),
      rows=512,
  )
  whole = [tokenizer.decode(one.ids, continuation=True) for one in drawn]
  same = [not one.finished and tokenizer.encode(text, continuation=True) == one.ids for one, text in zip(drawn, whole)]
  kept = [sorted({whole[i] for i in range(first, first + count) if same[i]}) for first in range(0, len(drawn), count)]
  print(f'{len(drawn)} samples, {sum(same)} kept: whole, and the same tokens when read again')
  return kept


def _write(path: pathlib.Path, records: list[dict]) -> None:
  lines = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  with path.open('wb') as raw, gzip.GzipFile(filename='', mode='wb', fileobj=raw, mtime=0) as file:
    file.write(lines.encode())
  print(f'{path}: {len(records)} records, {path.stat().st_size} bytes')


def _pairs_and_demonstrations(texts: list[str], continuations: list[list[str]]) -> tuple[list[dict], list[dict]]:
  """Best and worst continuation where they differ enough, and the best of every prompt."""
  pairs, demonstrations = [], []
  for text, candidates in zip(texts, continuations):
    if len(candidates) < 2:
      continue
    scores = rules.vader(candidates)
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    demonstrations.append({'prompt': text, 'completion': candidates[best], 'append_eos': False})
    if scores[best] - scores[worst] > _LEAST_DIFFERENCE:
      pairs.append(
          {
              'prompt': text,
              'chosen': candidates[best],
              'rejected': candidates[worst],
              'chosen_score': scores[best],
              'rejected_score': scores[worst],
              'append_eos': False,
          }
      )
  return pairs, demonstrations


def steps(pairs: list[dict]) -> list[dict]:
  """Each response of the pairs in sentences, labelled with whether VADER finds something cheerful in them."""
  found = []
  for pair in pairs:
    for side in ('chosen', 'rejected'):
      texts = _STEP.findall(' ' + ' '.join(pair[side].split()))
      labels = [score > 0 for score in rules.vader(texts)]
      found.append({'prompt': pair['prompt'], 'completions': texts, 'labels': labels})
  return found


def lists(texts: list[str], continuations: list[list[str]]) -> list[dict]:
  """The continuations of each text with their scores, where there are three or more."""
  found = []
  for text, candidates in zip(texts, continuations):
    if len(candidates) > 2:
      scores = rules.vader(candidates)
      found.append({'prompt': text, 'completions': candidates, 'scores': scores, 'append_eos': False})
  return found


def ratings(found: list[dict]) -> list[dict]:
  """Each response of the lists with several ratings, and the class that VADER's authors give it.

  `cheerfulness` is VADER's score, null where that is 0, as it knows no word then; `variety` is the share of distinct
  words, `simplicity` that of words of up to four letters; `class` is 0, 1 or 2: gloomy, neutral or cheerful.
  """
  rated = []
  for record in found:
    for text, score in zip(record['completions'], record['scores']):
      words = re.findall(r"[a-z']+", text.lower())
      rated.append(
          {
              'prompt': record['prompt'],
              'completion': text,
              'cheerfulness': score or None,
              'variety': round(len(set(words)) / max(1, len(words)), 3),
              'simplicity': round(sum(len(word) <= 4 for word in words) / max(1, len(words)), 3),
              'class': 1 + (score >= _NEUTRAL) - (score <= -_NEUTRAL),
              'append_eos': False,
          }
      )
  return rated


def make(source: pathlib.Path, output: pathlib.Path, seed: int) -> None:
  """Makes everything."""
  target = output / 'stories260K'
  target.mkdir(parents=True, exist_ok=True)
  for name in ('config.json', 'model.safetensors'):
    shutil.copyfile(source / 'hf' / name, target / name)
  (target / 'tokenizer.model').write_bytes(tokenizer_model(source / 'tok512.bin'))
  tokenizer = tokenizers.load(target)
  mesh = sharding.make_mesh()
  config = hf.read_config(target)
  with jax.set_mesh(mesh):
    model = transformer.build(config, mesh, length=config.max_length)
    params = hf_import.read_params(target, config, mesh)
    texts = openings(_stories(model, params, tokenizer, seed), seed)
    cuts = np.cumsum([_TEST_PROMPTS, _HELD_OUT_PROMPTS, _TRAIN_PROMPTS])
    test, held, train = texts[: cuts[0]], texts[cuts[0] : cuts[1]], texts[cuts[1] : cuts[2]]
    (output / 'prompts.txt').write_text('\n'.join(held) + '\n', encoding='utf-8')
    for number, (name, part) in enumerate((('train', train), ('test', test))):
      found = _continuations(model, params, tokenizer, part, _SAMPLES, seed + number)
      pairs, demonstrations = _pairs_and_demonstrations(part, found)
      _write(output / f'sentiment-{name}.jsonl.gz', pairs)
      _write(output / f'stories-{name}.jsonl.gz', demonstrations)
      _write(output / f'steps-{name}.jsonl.gz', steps(pairs[:_LABELLED_PAIRS]))
      scored = lists(part, found)[:_LISTS]
      _write(output / f'lists-{name}.jsonl.gz', scored)
      _write(output / f'ratings-{name}.jsonl.gz', ratings(scored[:_RATED_LISTS]))
    ids = [examples.prompt_ids(tokenizer, text) for text in held]
    drawn = sampling.sample(model, params, ids, n=8, max_new_tokens=_NEW_TOKENS, seed=seed + 9)
    base = np.mean(rules.vader([tokenizer.decode(one.ids, continuation=True) for one in drawn]))
    print(f'{len(drawn)} samples from the {len(held)} held-out prompts: mean sentiment {base:.3f}')


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--source', type=storage.on_disk, required=True, help='folder with tok512.bin and hf/')
  parser.add_argument('--output', type=storage.on_disk, default='jaxalign/assets', help='where the assets go')
  parser.add_argument('--seed', type=int, default=0, help='of prompts and samples')
  args = parser.parse_args()
  make(args.source, args.output, args.seed)


if __name__ == '__main__':
  main()
