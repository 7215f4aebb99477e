"""Ready templates against the text that each family's own template writes, and the spans in it."""

import pytest

from jaxalign import types
from jaxalign.data import chat

TALK = [
    {'role': 'system', 'content': 'Be kind.'},
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello'},
    {'role': 'user', 'content': 'Bye'},
    {'role': 'assistant', 'content': 'Farewell'},
]
TEXTS = {
    'chatml': (
        '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
        '[[Hello<|im_end|>]]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[Farewell<|im_end|>]]\n'
    ),
    'llama3': (
        '<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]'
        '<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n[[Farewell<|eot_id|>]]'
    ),
    'gemma': (
        '<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello<end_of_turn>]]\n'
        '<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[[Farewell<end_of_turn>]]\n'
    ),
    'mistral': '<s>[INST] Be kind.\n\nHi [/INST][[ Hello</s>]][INST] Bye [/INST][[ Farewell</s>]]',
    'hh': 'Be kind.\n\nHuman: Hi\n\nAssistant:[[ Hello]]\n\nHuman: Bye\n\nAssistant:[[ Farewell]]',
}


def render(name, messages, **options):
  return chat.render(messages, chat.pick(name, None), bos_token='<s>', eos_token='</s>', **options)


def marked(text, spans):
  for start, end in reversed(spans):
    text = f'{text[:start]}[[{text[start:end]}]]{text[end:]}'
  return text


class TestTemplates:

  @pytest.mark.parametrize('name', TEXTS)
  def test_write_the_text_of_their_family_and_mark_the_assistant(self, name):
    assert marked(*render(name, TALK)) == TEXTS[name]

  @pytest.mark.parametrize('name', TEXTS)
  def test_begin_a_response_where_a_prompt_for_it_ends(self, name):
    prompt, _ = render(name, TALK[:-1], add_generation_prompt=True)
    text, spans = render(name, TALK)
    assert text[: spans[-1][0]] == prompt

  @pytest.mark.parametrize('name', TEXTS)
  def test_need_no_turn_of_the_system(self, name):
    text, spans = render(name, TALK[1:])
    assert 'Be kind' not in text
    assert len(spans) == 2

  @pytest.mark.parametrize(
      'name,said', [('chatml', '<|im_start|>tool\n42<|im_end|>'), ('llama3', 'ipython<|end_header')]
  )
  def test_carry_messages_of_tools(self, name, said):
    text, spans = render(name, [TALK[1], {'role': 'tool', 'content': '42'}, TALK[2]])
    assert said in text
    assert len(spans) == 1

  @pytest.mark.parametrize('name', ['gemma', 'mistral', 'hh'])
  def test_refuse_roles_that_their_family_lacks(self, name):
    with pytest.raises(types.RunError, match='unknown role tool'):
      render(name, [TALK[1], {'role': 'tool', 'content': '42'}, TALK[2]])
