"""Ids of conversations against those that transformers makes with the families' templates (tools/make_goldens.py)."""

import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxalign.data import examples
from jaxalign.data import tokenizers

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'templates'
CASES = json.loads((GOLDENS / 'templates.json').read_text(encoding='utf-8'))


@pytest.fixture(params=CASES)
def case(request, tmp_path):
  """A case, its tokenizer, and what is made of its messages."""
  found = CASES[request.param]
  shutil.copy(GOLDENS / 'tokenizer.json', tmp_path)
  config = {name: found[name] for name in ('bos_token', 'eos_token') if name in found}
  config |= {'chat_template': found['template']} if found['template'] else {}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = tokenizers.load(tmp_path)
  group = examples.supervised({'messages': found['messages']}, tokenizer, row_length=1000, template=found['ours'])
  return found, tokenizer, group.sequences[0]


class TestTemplates:

  def test_give_the_ids_of_transformers_to_the_end_of_the_last_response(self, case):
    found, tokenizer, sequence = case
    ids, wanted = sequence.ids.tolist(), found['ids']
    assert ids == wanted[: len(ids)]
    assert tokenizer.decode(wanted[len(ids) :]).strip() == ''

  def test_give_the_prompt_ids_of_transformers(self, case):
    found, tokenizer, _ = case
    assert examples.prompt_ids(tokenizer, found['messages'][:-1], found['ours']) == found['prompt_ids']

  def test_write_one_bos_at_most_and_learn_eos(self, case):
    _, tokenizer, sequence = case
    assert np.flatnonzero(sequence.ids == tokenizer.bos_id).tolist() == ([] if tokenizer.bos_id is None else [0])
    assert sequence.ids[-1] == tokenizer.eos_id
    assert sequence.mask[-1]

  def test_learn_exactly_what_the_assistant_says_and_its_end(self, case):
    found, tokenizer, sequence = case
    runs = itertools.groupby(zip(sequence.mask, sequence.ids.tolist()), key=lambda pair: pair[0])
    learned = [[i for _, i in run] for counts, run in runs if counts]
    said = [message['content'] for message in found['messages'] if message['role'] == 'assistant']
    if found['ours'] in ('llama3', 'gemma'):  # which trim it
      said = [text.strip() for text in said]
    if 'generation %' in (found['template'] or ''):  # which says so itself, newlines around the message included
      said = [f'\n{text}\n' for text in said[:-1]] + [f'\n{said[-1]}']
    assert all(tokenizer.eos_id in ids[-2:] for ids in learned)
    assert [tokenizer.decode(ids, continuation=True) for ids in learned] == said
