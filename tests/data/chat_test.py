"""Chat templates: the sandbox, the spans of what the assistant says, and HH-RLHF's dialogues."""

import datetime

import pytest

from jaxalign import types
from jaxalign.data import chat
from jaxalign.data import templates

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MARKED = """\
{%- for m in messages %}
{{- '<' + m.role + '>' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<end>' }}{% endgeneration %}
{%- else %}
{{- m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def _talk(*contents):
  roles = ('user', 'assistant')
  return [{'role': roles[i % 2], 'content': content} for i, content in enumerate(contents)]


def _render(messages, template, **options):
  return chat.render(messages, template, bos_token='<s>', eos_token='</s>', **options)


def _said(messages, template, **options):
  text, spans = _render(messages, template, **options)
  return [text[start:end] for start, end in spans]


class TestRender:

  def test_writes_what_the_template_says(self):
    assert _render(_talk('a', 'b'), CHATML)[0] == '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n'
    assert _render(_talk('a', 'b'), LLAMA)[0] == '<s>[INST] a [/INST] b</s>'
    assert _render(_talk('a'), CHATML, add_generation_prompt=True)[0].endswith('<|im_start|>assistant\n')

  @pytest.mark.parametrize(
      'template, said',
      [
          (CHATML, ['b<|im_end|>', 'd<|im_end|>']),
          (LLAMA, [' b</s>', ' d</s>']),
          (MARKED, ['b<end>', 'd<end>']),
          (templates.HH, [' b', ' d']),
      ],
  )
  def test_spans_run_from_the_generation_prompt_to_the_end_of_turn(self, template, said):
    messages = _talk('a', 'b', 'c', 'd')
    assert _said(messages, template) == said
    text, spans = _render(messages, template)
    assert text[: spans[1][0]] == _render(messages[:3], template, add_generation_prompt=True)[0]

  def test_spans_from_a_turn_on(self):
    messages = _talk('a', 'b', 'c', 'd')
    assert _said(messages, CHATML, first_turn=2) == ['d<|im_end|>']
    assert _said(messages, MARKED, first_turn=2) == ['d<end>']
    assert _said(messages, CHATML, first_turn=4) == []

  def test_whitespace_of_the_content_is_the_assistants(self):
    assert _said(_talk('a', ' b \n'), CHATML) == [' b \n<|im_end|>']
    assert _said(_talk('a', 'b \n', 'c', ' d '), templates.HH) == [' b \n', '  d ']

  def test_an_empty_turn_is_its_end(self):
    assert _said(_talk('a', ''), CHATML) == ['<|im_end|>']
    assert _said(_talk('a', ''), templates.HH) == ['']

  def test_a_turn_may_repeat_an_earlier_one(self):
    assert _said(_talk('x', 'x', 'x', 'x'), CHATML) == ['x<|im_end|>'] * 2

  def test_a_think_block_that_earlier_turns_lose_is_no_matter_to_the_last(self):
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    messages = _talk('a', '<think>1</think>b', 'c', '<think>2</think>d')
    assert _said(messages, template, first_turn=2) == ['<think>2</think>d']
    with pytest.raises(types.RunError, match='message 1 is written otherwise when more messages follow'):
      _render(messages, template)

  @pytest.mark.parametrize(
      'template, reason',
      [
          (CHATML.replace('{% if add_generation_prompt %}', '{% if false %}'), 'ignores add_generation_prompt'),
          (
              CHATML.replace("assistant\n' }}{% endif", "model\n' }}{% endif"),
              'does not start where the generation prompt',
          ),
          ('{{ messages | length }}', 'does not start where'),
          ('{% for m in messages %}{{ m.role[:0] }}{% endfor %}', 'leaves out message 1'),
          (MARKED.replace("== 'assistant'", "!= ''"), 'mark 4 spans for 2 turns'),
          (MARKED.replace("== 'assistant'", "== ''"), 'mark 0 spans for 2 turns'),
          (MARKED.replace("== 'assistant'", "== 'user'"), "holds 'a<end>' where the assistant says 'b'"),
      ],
  )
  def test_a_template_that_does_not_tell_what_the_assistant_says_is_refused(self, template, reason):
    with pytest.raises(types.RunError, match=reason) as caught:
      _render(_talk('a', 'b', 'c', 'd'), template)
    assert '{% generation %}' in str(caught.value)

  def test_messages_cannot_forge_the_marks_of_a_generation_block(self):
    with pytest.raises(types.RunError, match='take it out'):
      _render(_talk('a\ufdd1b\ufdd2', 'c'), MARKED)
    assert _said(_talk('a\ufdd1b\ufdd2', 'c'), CHATML) == ['c<|im_end|>']

  def test_a_template_that_gives_everything_to_the_assistant_is_refused(self):
    template = '{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}'
    with pytest.raises(types.RunError, match='gives the whole text to the assistant'):
      _render(_talk('a', 'b'), template)

  @pytest.mark.parametrize(
      'template, reason',
      [
          ('{% for', 'line 1'),
          ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
          ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
          ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", 'SecurityError'),
          ('{{ messages.append(1) }}', 'SecurityError'),
          ("{% set x = messages[0].update({'role': 'x'}) %}", 'SecurityError'),
          ('{{ messages[9].content + 1 }}', 'no element 9'),
          ('{{ 1 / 0 }}', 'ZeroDivisionError'),
          ('{% for i in range(10 ** 9) %}{% endfor %}', 'OverflowError'),
          ("{{ 'x' + 1 }}", 'TypeError'),
          ("{% include '/etc/hostname' %}", 'TypeError'),
      ],
  )
  def test_a_template_that_fails_or_leaves_the_sandbox_is_one_clear_error(self, template, reason):
    with pytest.raises(types.RunError, match=reason) as caught:
      _render(_talk('a', 'b'), template)
    assert str(caught.value).startswith('the chat template ') and '\n' not in str(caught.value)

  def test_offers_what_templates_of_transformers_use(self):
    template = (
        '{% for m in messages %}{% if m.role == "system" %}{% continue %}{% endif %}\n'
        "  {% if true %}\n{{ {'b': 'é<', 'a': m.content} | tojson }}{% endif %}{% endfor %}\n"
    )
    assert _render([{'role': 'system', 'content': 'x'}, *_talk('a')], template)[0] == '{"b": "é<", "a": "a"}'
    assert _render(_talk('a'), "{{ strftime_now('%Y') }}")[0] == str(datetime.datetime.now().year)


class TestParseTranscript:

  def test_gives_the_turns(self):
    text = '\n\nHuman: hi\nthere\n\nAssistant: Hello. \n\nHuman:  bye\n\nAssistant: '
    assert chat.parse_transcript(text) == _talk('hi\nthere', 'Hello. ', ' bye', '')

  @pytest.mark.parametrize(
      'text',
      [
          '\n\nHuman: hi\n\nAssistant: Hello \n\n\n\nHuman: a: b\n\nAssistant: \n x',
          '\n\nAssistant: a\n\nAssistant: b\n\nHuman: c',
      ],
  )
  def test_the_hh_template_writes_them_back(self, text):
    assert _render(chat.parse_transcript(text), templates.HH)[0] == text

  @pytest.mark.parametrize('text', ['', 'hello', 'hello\n\nHuman: hi', 'User: hi'])
  def test_refuses_other_text(self, text):
    with pytest.raises(types.RunError, match='not a dialogue'):
      chat.parse_transcript(text)


class TestPick:

  def test_takes_the_given_then_the_tokenizers_then_hh(self):
    assert chat.pick('{{ x }}', 'own') == '{{ x }}'
    assert chat.pick(None, 'own') == 'own'
    assert chat.pick(None, None) == templates.HH
    assert chat.pick('hh', 'own') == templates.HH

  def test_lists_the_names_when_there_is_no_such_template(self):
    with pytest.raises(types.UsageError, match="'vicuna'; there are hh, chatml, llama3, gemma, mistral"):
      chat.pick('vicuna', None)


class TestHhTemplate:

  def test_opens_an_assistants_turn(self):
    messages = [{'role': 'system', 'content': 'Be brief.'}, *_talk('hi')]
    text, _ = _render(messages, templates.HH, add_generation_prompt=True)
    assert text == 'Be brief.\n\nHuman: hi\n\nAssistant:'

  def test_refuses_roles_it_does_not_know(self):
    with pytest.raises(types.RunError, match='unknown role tool'):
      _render([{'role': 'tool', 'content': 'x'}], templates.HH)
