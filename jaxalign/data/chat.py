"""Chat templates: messages to text, and where in the text the assistant speaks."""

from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import functools
import json
import re
from typing import Any
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxalign import types
from jaxalign.data import templates

Message = Mapping[str, Any]
Span = tuple[int, int]

# Noncharacters that frame what a `{% generation %}` block wrote; they never leave this module.
_OPEN, _CLOSE = '\ufdd1', '\ufdd2'
_TURN = re.compile(r'\n\n(Human|Assistant):')
# What the evaluation of a template may raise besides Jinja's own errors: its expressions are Python's.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def pick(template: str | None, default: str | None) -> str:
  """The template to render with.

  Args:
    template: Jinja source, a name in `templates.BY_NAME`, or None.
    default: the tokenizer's own, taken where `template` is None; without one it is 'hh'.

  Raises:
    UsageError: `template` is neither.
  """
  if template is None:
    return default or templates.HH
  if template in templates.BY_NAME:
    return templates.BY_NAME[template]
  if '{' not in template:
    names = ', '.join(templates.BY_NAME)
    raise types.UsageError(f'no chat template {template!r}; there are {names}, or write it in Jinja')
  return template


def end_of_turn(template: str, *, bos_token: str, eos_token: str) -> str:
  """What a template writes behind what the assistant says; raises as `render` does."""
  said = 'assistant said'
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': said}]
  return render(turns, template, bos_token=bos_token, eos_token=eos_token)[0].rpartition(said)[2]


def answer(template: str, text: str, *, bos_token: str, eos_token: str) -> str:
  """What a template writes from where the assistant has spoken to where it speaks again, a user saying `text` between.

  Raises:
    RunError: as `render` does.
  """
  said = 'assistant said'
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': said}, {'role': 'user', 'content': text}]
  tokens = {'bos_token': bos_token, 'eos_token': eos_token}
  return render(turns, template, add_generation_prompt=True, first_turn=len(turns), **tokens)[0].partition(said)[2]


def render(
    messages: Sequence[Message],
    template: str,
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = False,
    first_turn: int = 0,
) -> tuple[str, list[Span]]:
  """Renders a conversation and finds what the assistant says in it.

  A span runs from where generation begins to the end of what the template writes for that turn (the content, then
  usually an end-of-turn token), whitespace behind it excluded. Templates with `{% generation %}` blocks say it
  themselves. In others a turn starts where the turns before it, rendered with a generation prompt, end.

  Args:
    messages: `role` and `content` each, and whatever else the template reads.
    template: Jinja source, run in a sandbox as transformers does.
    bos_token: what the template writes for `bos_token`; likewise `eos_token`.
    eos_token: see `bos_token`.
    add_generation_prompt: end with the opening of an assistant's turn.
    first_turn: the first message whose span is wanted; those of earlier ones are not looked for.

  Returns:
    The text, and a span (start, end) in characters for each of the assistant's messages from `first_turn` on.

  Raises:
    RunError: the template fails, reaches out of the sandbox, or does not tell where the assistant speaks.
  """
  write = functools.partial(_write, template, bos_token=bos_token, eos_token=eos_token)
  text = write(messages, add_generation_prompt)
  marks = _has_generation(template)
  if marks and any(mark in str(message.get('content')) for message in messages for mark in (_OPEN, _CLOSE)):
    raise types.RunError(f'a message holds {_OPEN!r} or {_CLOSE!r}, which mark what the assistant says; take it out')
  text, marked = _take_marks(text) if marks else (text, [])
  turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
  wanted = [i for i in turns if i >= first_turn]
  if not wanted:
    return text, []
  if marks:
    if len(marked) != len(turns):
      _fail(f'its generation blocks mark {len(marked)} spans for {len(turns)} turns of the assistant')
    spans = marked[len(turns) - len(wanted) :]
    _check_marks(text, spans, [messages[i] for i in wanted])
  else:
    spans = [_span_of(i, messages, text, write) for i in wanted]
  if spans[0][0] <= 0 and wanted[0] > 0:
    _fail('it gives the whole text to the assistant')
  return text, spans


def parse_transcript(text: str) -> list[dict[str, str]]:
  r"""The turns of a dialogue written as '\n\nHuman: ...\n\nAssistant: ...', as in Anthropic's HH-RLHF.

  Only the space after the colon is taken from the content.

  Raises:
    RunError: the text is not such a dialogue.
  """
  before, *turns = _TURN.split('\n\n' + text.lstrip('\n'))
  if before or not turns:
    raise types.RunError(f'not a dialogue that starts with "Human:" or "Assistant:": {text[:40]!r}')
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  pairs = zip(turns[::2], turns[1::2], strict=True)
  return [{'role': roles[speaker], 'content': said.removeprefix(' ')} for speaker, said in pairs]


def _span_of(turn: int, messages: Sequence[Message], text: str, write) -> Span:
  """Where the turn stands in the whole text, by rendering what comes before it and what comes up to it."""
  before = write(messages[:turn], True)
  upto = write(messages[: turn + 1], False)
  if not upto.startswith(before):
    _fail(f'message {turn} does not start where the generation prompt before it ends')
  said = upto[len(before) :]
  content = messages[turn].get('content')
  content = content if isinstance(content, str) else ''
  if content.strip() and not said.strip():
    _fail(f'it leaves out message {turn}')
  header = said[: max(0, said.find(content.strip()))]
  if header.strip() and before == write(messages[:turn], False):
    _fail(f'it ignores add_generation_prompt and writes {header!r} before message {turn}')
  # Whitespace at the end is the content's where the template keeps it, otherwise it separates turns.
  content_end = said.rfind(content) + len(content) if content and content in said else 0
  end = len(before) + max(content_end, len(said.rstrip()))
  if not text.startswith(upto[:end]):
    _fail(f'message {turn} is written otherwise when more messages follow')
  return len(before), end


def _check_marks(text: str, spans: Sequence[Span], messages: Sequence[Message]) -> None:
  for (start, end), message in zip(spans, messages, strict=True):
    content = message.get('content')
    if isinstance(content, str) and content.strip() in text and content.strip() not in text[start:end]:
      _fail(f'a generation block holds {text[start:end][:40]!r} where the assistant says {content[:40]!r}')


def _fail(reason: str) -> NoReturn:
  advice = 'put what the assistant says into {% generation %} ... {% endgeneration %}'
  raise types.RunError(f'the chat template does not tell what the assistant says: {reason}; {advice}')


def _write(template: str, messages: Sequence[Message], add_generation_prompt: bool, **tokens: str) -> str:
  try:
    return _compile(template).render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
  except _TEMPLATE_ERRORS as err:
    raise types.RunError(f'the chat template failed: {type(err).__name__}: {err}') from err


def _take_marks(marked: str) -> tuple[str, list[Span]]:
  """Removes the marks of generation blocks and returns the text with their spans; blocks in blocks count once."""
  text, spans, depth, start = '', [], 0, 0
  for part in re.split(f'([{_OPEN}{_CLOSE}])', marked):
    if part == _OPEN:
      start = start if depth else len(text)
      depth += 1
    elif part == _CLOSE:
      depth -= 1
      if not depth:
        spans.append((start, len(text)))
    else:
      text += part
  return text, spans


class _Generation(jinja2.ext.Extension):
  """The block `{% generation %}...{% endgeneration %}`."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

  def _mark(self, caller) -> str:
    return _OPEN + caller() + _CLOSE


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  environment = _environment()
  try:
    return environment.from_string(template)
  except jinja2.TemplateSyntaxError as err:
    raise types.RunError(f'the chat template is not valid Jinja (line {err.lineno}: {err.message})') from err


@functools.lru_cache(maxsize=16)
def _has_generation(template: str) -> bool:
  return any(token[1:] == ('name', 'generation') for token in _environment().lex(template))


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  """Jinja as transformers sets it up, which is what templates are written for."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = lambda format: datetime.datetime.now().strftime(format)
  return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False
) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)
