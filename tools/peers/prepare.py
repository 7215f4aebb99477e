"""Prepares a work for programs that are timed side by side: data as words of one token each, and what a side must know.

  python tools/peers/prepare.py FOLDER/asked.json   # writes work.json, tokenizer.json and data.jsonl beside it

Whatever the data, every program reads them through one tokenizer whose words t3, t4, ... are the ids 3, 4, ..., so that
all of them train on the same tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np
import tokenizers as hf_tokenizers

from jaxalign import recipe
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.cli import config
from jaxalign.data import examples
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import hf_export

_SPECIALS = ('<pad>', '<bos>', '<eos>')
_WHOLE = 0.95  # the share of pairs that a peer of fixed widths need not cut

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected, without EOS


def write_tokenizer(directory: pathlib.Path, vocab_size: int) -> None:
  """A tokenizer whose words t3, t4, ... are one token each."""
  words = [*_SPECIALS, *(f't{i}' for i in range(len(_SPECIALS), vocab_size))]
  model = hf_tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<pad>')
  tokenizer = hf_tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<eos>'}), encoding='utf-8')


def made_up(work: Mapping[str, Any], count: int) -> list[Pair]:
  """Random pairs of fixed lengths; the last token of a response is the EOS that tokenising adds."""
  random = np.random.default_rng(work['seed'])
  ids = lambda size: random.integers(len(_SPECIALS), work['vocab_size'], size).tolist()
  sizes = work['prompt_tokens'], work['response_tokens'] - 1, work['response_tokens'] - 1
  return [(ids(sizes[0]), ids(sizes[1]), ids(sizes[2])) for _ in range(count)]


def real(work: Mapping[str, Any]) -> list[Pair]:
  """All pairs of --pairs_file as --tokenizer reads them, cut to --row_length, in random order."""
  if not work['pairs_file'] or not work['tokenizer']:
    raise types.UsageError(f'--work={work["work"]} needs --pairs_file=FILE (JSONL or .gz) and --tokenizer=FILE')
  tokenizer, found = tokenizers.load(work['tokenizer']), []
  source = sources.open_source(f'jsonl:{work["pairs_file"]}')
  # Ids of special tokens mean others here.
  plain = lambda ids: [int(i) if len(_SPECIALS) <= i < work['vocab_size'] else len(_SPECIALS) for i in ids]
  for index in np.random.default_rng(work['seed']).permutation(len(source)):
    try:
      group = examples.preference(source[index], tokenizer, row_length=work['row_length'])
    except examples.Dropped:
      continue
    first = group.prompt_tokens
    chosen, rejected = (plain(one.ids[first:-1]) for one in group.sequences)
    if chosen and rejected and first:
      found.append((plain(group.sequences[0].ids[:first]), chosen, rejected))
  if not found:
    raise types.UsageError(f'--pairs_file={work["pairs_file"]}: no pair in it can be learned from')
  return found


def write_data(path: pathlib.Path, pairs: Sequence[Pair], is_sft: bool) -> None:
  """Records of pairs, or of prompts with the chosen response alone."""
  words = lambda ids: ' '.join(f't{i}' for i in ids)
  with path.open('w', encoding='utf-8') as file:
    for prompt, chosen, rejected in pairs:
      sides = {'completion': chosen} if is_sft else {'chosen': chosen, 'rejected': rejected}
      record = {'prompt': words(prompt)} | {name: f' {words(ids)}' for name, ids in sides.items()}
      file.write(json.dumps(record) + '\n')


def tokens(pairs: Sequence[Pair], is_sft: bool) -> int:
  """Tokens of all sequences, EOS included."""
  return sum(len(p) + len(c) + 1 + (0 if is_sft else len(p) + len(r) + 1) for p, c, r in pairs)


def slots(pairs: Sequence[Pair], is_sft: bool, share: bool) -> int:
  """Token slots that they take in rows: n - 1 for n tokens, and a prompt once where its responses share it."""
  twice = sum(len(p) - 1 for p, _, _ in pairs) if share and not is_sft else 0
  return tokens(pairs, is_sft) - len(pairs) * (1 if is_sft else 2) - twice


def widths(pairs: Sequence[Pair]) -> tuple[int, int]:
  """Of prompts and of responses with EOS: the least of one quantile that leave _WHOLE of the pairs uncut."""
  prompts = np.array([len(prompt) for prompt, _, _ in pairs])
  responses = np.array([max(len(chosen), len(rejected)) + 1 for _, chosen, rejected in pairs])
  for share in np.linspace(_WHOLE, 1, 51):
    prompt, response = (int(np.quantile(x, share, method='higher')) for x in (prompts, responses))
    if np.mean((prompts <= prompt) & (responses <= response)) >= _WHOLE:
      break
  return prompt, response


def model_of(asked: Mapping[str, Any]) -> tuple[architecture.Config, recipe.Recipe]:
  """The sizes of a model of gin_configs/models or of a directory of Hugging Face, and how jaxalign computes with it."""
  name = asked['model']
  is_named = catalog.exists(f'models/{name}.gin')
  files = [f'models/{name}.gin'] if is_named else []
  config.parse(asked['algo'], files=files, user_files=[], bindings=asked['gin'])
  how = config.recipe()
  if not is_named:
    return hf.read_config(pathlib.Path(name)), how
  if how.model is None:
    raise types.UsageError(f'--model={name}: it has a tokenizer of its own; choose one of random weights')
  return how.model, how


def prepare(asked: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Writes tokenizer and data to `folder`, and returns what the scripts of this folder read of a work.

  Its fields: what was asked for (`work`, `steps`, `warm_up`, `pairs`, ...); `hf_config`, a config.json of Hugging Face;
  `dtype` of products and `remat`, see `recipe.Recipe`; `folder`, with `tokenizer.json` and `data.jsonl`; `widths` of
  prompts and responses, for a peer of fixed widths; and `units_per_slot`, what is measured for each token slot that is
  filled.
  """
  sizes, how = model_of(asked)
  work = {**asked, 'folder': str(folder), 'hf_config': hf_export.config_json(sizes, None, 'float32', None)}
  work |= {'vocab_size': asked['vocab_size'] or sizes.vocab_size, 'dtype': how.dtype, 'remat': how.remat}
  if asked['work'] == 'rollouts':
    return work
  is_sft, count = asked['work'] == 'sft', asked['pairs'] * (asked['warm_up'] + asked['steps'] + 1)
  pairs = made_up(work, count) if asked['work'] == 'dpo' else real(work)
  write_tokenizer(folder, work['vocab_size'])
  work['widths'] = widths(pairs)
  if asked['cached_reference']:
    pairs = pairs[: 2 * count]  # A reference is computed of all that there is.
  write_data(folder / 'data.jsonl', pairs, is_sft)
  units = len(pairs) if asked['work'] == 'hh' else tokens(pairs, is_sft)
  return work | {'units_per_slot': units / slots(pairs, is_sft, asked['share_prompts'])}


def main(path: pathlib.Path) -> int:
  """Reads what is asked for, and writes the work."""
  try:
    work = prepare(json.loads(path.read_text(encoding='utf-8')), path.parent)
  except (types.UsageError, types.RunError, OSError) as err:
    print(err, file=sys.stderr)
    return 2
  (path.parent / 'work.json').write_text(json.dumps(work), encoding='utf-8')
  return 0


if __name__ == '__main__':
  sys.exit(main(pathlib.Path(sys.argv[1])))
