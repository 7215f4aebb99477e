"""Talks to a model in the terminal, several turns; text appears as it is written.

  python tools/chat.py --model=runs/dpo
  echo 'Once upon a time' | python tools/chat.py --model=builtin:stories260K --template=none

The model is a checkpoint (or a workdir) or a Hugging Face directory. What you say is written by the tokenizer's chat
template, or by --template. Without either, what you type is continued as plain text, and the next line goes on from
there. /reset begins anew, /exit or the end of the input ends.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import sys

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import respond
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import chat
from jaxalign.data import examples
from jaxalign.generation import next_token

_NO_TEMPLATE = (
    'this tokenizer has no chat template: what you type is continued as plain text; to chat, name one'
    ' (--template=chatml, or hh, llama3, gemma, mistral)'
)


class Conversation:
  """What was said, and what the model answers."""

  def __init__(self, loaded: checkpoint.Loaded, options: respond.Options, seed: int):
    self._loaded, self._options, self._seed = loaded, options, seed
    self.reset()

  def reset(self) -> None:
    """Forgets all that was said."""
    self._turns: list[dict[str, str]] = []
    self._text = ''

  def say(self, line: str, tell: Callable[[str], None]) -> str:
    """Answers; raises UsageError where the conversation has become too long for the model."""
    if self._options.chat:
      prompt: str | list[dict[str, str]] = [*self._turns, {'role': 'user', 'content': line}]
    else:
      prompt = self._text + line
    ids = examples.prompt_ids(self._loaded.tokenizer, prompt)
    room = self._loaded.model.config.max_length - len(ids)
    if not ids or room < 1:
      what = f'{len(ids)} tokens leave no room in the context of {self._loaded.model.config.max_length}'
      raise types.UsageError(f'{what}: /reset begins anew' if ids else 'say something')
    options = dataclasses.replace(self._options, max_new_tokens=min(room, self._options.max_new_tokens))
    (answer,) = respond.texts(self._loaded, [ids], options, seed=self._seed, tell=tell)
    self._seed += 1
    if self._options.chat:
      self._turns += [{'role': 'user', 'content': line}, {'role': 'assistant', 'content': answer.strip()}]
    else:
      self._text += line + answer
    return answer


def converse(conversation: Conversation, lines: Iterable[str], tell: Callable[[str], None]) -> None:
  """Answers line by line until /exit or the end."""
  for line in (line.rstrip('\r\n') for line in lines):
    if line.strip() == '/exit':
      return
    if line.strip() == '/reset':
      conversation.reset()
    elif line.strip().startswith('/'):
      tell(f'{line.strip().split()[0]}: there are /reset and /exit\n')
    elif line.strip():
      try:
        conversation.say(line, tell)
      except types.UsageError as err:
        tell(str(err))
      tell('\n')


def _typed() -> Iterable[str]:
  """Lines from the terminal, behind a prompt, or from a pipe."""
  if not sys.stdin.isatty():
    yield from sys.stdin
    return
  while True:
    try:
      yield input('> ')
    except EOFError:
      print()
      return


def _tell(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


def start(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Conversation:
  """Opens the model and says how it is talked to."""
  loaded = respond.policy(args.model, mesh)
  if args.template not in (None, 'none'):
    loaded.tokenizer.chat_template = chat.pick(args.template, None)
  is_chat = args.template != 'none' and bool(loaded.tokenizer.chat_template)
  if not is_chat and args.template is None:
    print(_NO_TEMPLATE, file=sys.stderr)
  given = {name: getattr(args, name) for name in ('max_new_tokens', *next_token.Rule._fields)}
  options = respond.Options(chat=is_chat, stop=tuple(args.stop), **given)
  return Conversation(loaded, options, args.seed)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default=recipe.DEFAULT_MODEL, help='a checkpoint, or a Hugging Face directory')
  parser.add_argument('--template', help='a chat template: hh, chatml, llama3, gemma, mistral, or Jinja; none for none')
  parser.add_argument('--mesh', default='', help='as for jaxalign.main')
  for field in dataclasses.fields(respond.Options):
    if field.name not in ('chat', 'per_prompt', 'stop', 'cache_dtype'):
      kind = type(field.default)
      parser.add_argument(f'--{field.name}', type=kind, default=field.default, help='as for --mode=sample')
  parser.add_argument('--stop', action='append', default=[], help='as for --mode=sample')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)
  try:
    mesh = sharding.make_mesh(args.mesh)
    with jax.set_mesh(mesh):
      converse(start(args, mesh), _typed(), _tell)
  except (types.UsageError, types.RunError) as err:
    print(f'chat: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except KeyboardInterrupt:
    print()
  return 0


if __name__ == '__main__':
  sys.exit(main())
