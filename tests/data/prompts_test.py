"""What models need that write responses of their own: where a response ends, and what is answered to it."""

import json
import pathlib
import shutil

import pytest

from jaxalign import recipe as recipe_lib
from jaxalign.data import examples
from jaxalign.data import prompts
from jaxalign.data import templates
from jaxalign.data import tokenizers


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.load(recipe_lib.asset('stories260K'))


class TestAlone:

  def test_drops_a_prompt_that_is_too_long_and_says_what_to_raise(self, tokenizer):
    record, ids = {'prompt': 'Once upon a time'}, examples.prompt_ids(tokenizer, 'Once upon a time')
    assert prompts.alone(record, tokenizer, row_length=64, longest=len(ids)).prompt_tokens == len(ids)
    with pytest.raises(examples.Dropped, match=f'prompts.alone.longest = {len(ids) - 1}'):
      prompts.alone(record, tokenizer, row_length=64, longest=len(ids) - 1)


class TestStopIds:

  @pytest.mark.parametrize(
      'template,ends', [('gemma', ['<eos>', '<end_of_turn>']), ('chatml', ['<eos>', '<|im_end|>'])]
  )
  def test_are_eos_and_what_the_template_ends_a_turn_with(self, tmp_path, template, ends):
    shutil.copy(pathlib.Path(__file__).parents[1] / 'goldens' / 'templates' / 'tokenizer.json', tmp_path)
    config = {'bos_token': '<bos>', 'eos_token': '<eos>', 'chat_template': templates.BY_NAME[template]}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    tokenizer = tokenizers.load(tmp_path)
    named = {i: name for name, i in tokenizer.special_tokens.items()}
    assert sorted(named[i] for i in prompts.stop_ids(tokenizer, is_chat=True)) == sorted(ends)
    assert prompts.stop_ids(tokenizer, is_chat=False) == (tokenizer.eos_id,)


class TestAnswer:

  def test_goes_on_with_the_turn_that_the_template_writes(self, tokenizer):
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        '{% if add_generation_prompt %}[assistant] {% endif %}'
    )
    written = tokenizer.encode('</s>[user] higher\n[assistant] ', continuation=True, special=True)
    assert written[0] == tokenizer.eos_id
    answer = lambda response: prompts.answer(tokenizer, 'higher', response, True, template)
    assert answer([400]) == written
    assert answer([400, tokenizer.eos_id]) == written[1:]
    assert prompts.answer(tokenizer, 'higher', [400], False) == tokenizer.encode('higher', continuation=True)
