"""What an example function does, for the key of a cache of its results."""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import inspect
from typing import Any

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.data import tokenizers


@dataclasses.dataclass(frozen=True)
class Bound:
  """An example function with the options that it is given out of sight, by gin for instance.

  Attributes:
    function: the example function.
    options: what is bound to it, as text: another text for other options.
  """

  function: Callable[..., examples.Group | list[examples.Group]]
  options: str

  def __call__(self, *args: Any, **kwargs: Any) -> examples.Group | list[examples.Group]:
    """Calls the function."""
    return self.function(*args, **kwargs)


def told(value: Any) -> str:
  """A function or class by its source and options, anything else as it is written."""
  if isinstance(value, Bound):
    return f'{told(value.function)} {value.options}'
  if isinstance(value, functools.partial):
    keywords = [f'{name}={told(option)}' for name, option in sorted(value.keywords.items())]
    return ' '.join([told(value.func), *map(told, value.args), *keywords])
  if inspect.isfunction(value) or inspect.ismethod(value) or inspect.isclass(value):
    return inspect.getsource(inspect.unwrap(value))
  return repr(value)


def describe(
    example_fn: Callable[..., examples.Group | list[examples.Group]],
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
) -> str:
  """A hash of what an example function does, for the key of a cache of its results.

  It is taken from the function's source, from its options, of `functools.partial` and of `Bound`, and from what it
  makes of a few records, errors included. Records show what the others hide: what a closure holds, and whether
  functions have changed that it calls, whose source is not read.
  """
  digest = hashlib.blake2b(f'{row_length} {told(example_fn)}'.encode(), digest_size=12)
  for record in _PROBES:
    try:
      found = example_fn(record, tokenizer, row_length=row_length)
      groups = found if isinstance(found, list) else [found]
      made = repr([(s.ids.tolist(), s.mask.tolist(), s.labels) for group in groups for s in group.sequences])
      made += repr([sorted(group.labels.items()) for group in groups])
    except (examples.Dropped, types.RunError, AttributeError, LookupError, TypeError, ValueError) as err:
      # The first line: gin adds others, with addresses that differ from process to process.
      made = f'{type(err).__name__} {str(err).partition(chr(10))[0]}'
    digest.update(made.encode())
  return digest.hexdigest()


class _Rated(dict):
  """A record in which any other column is a number."""

  def __contains__(self, name: object) -> bool:
    return True

  def __missing__(self, name: str) -> float:
    return 0.5


_TALK = [{'role': 'user', 'content': 'a b'}, {'role': 'assistant', 'content': 'c\n\nd'}]
_OTHER = {'role': 'assistant', 'content': 'f'}
_ELSE = {'prompt': [{'role': 'user', 'content': 'x'}], 'completion': [_OTHER], 'label': False}
_PROBES: tuple[records.Record, ...] = (
    {},
    {'messages': [*_TALK, *_TALK]},
    {'prompt': 'a b ', 'completion': ' c\n', 'completions': ['c', 'd\n'], 'labels': [1, 0]},
    {'text': 'a b c'},
    {'prompt': 'a b', 'completion': ' c', 'class': 10**9},
    {'messages': [*_TALK, *_TALK], 'class': 0},
    _Rated(prompt='a b', completion=' c'),
    _Rated(messages=[*_TALK, *_TALK]),
    {'prompt': 'a b', 'chosen': ' c', 'rejected': ' d', 'margin': 0.5, 'append_eos': False},
    {'chosen': _TALK, 'rejected': [_TALK[0], {'role': 'assistant', 'content': ''}]},
    {'prompt': 'a', 'completions': [f'b {i}' for i in range(40)], 'scores': [i % 7 + i / 50 for i in range(40)]},
    {'prompt': 'a', 'completions': ['b', 'c'], 'scores': [-1e30, -1e31]},
    {'prompt': 'a', 'samples': ['b', 'c'], 'scores': [0.5, 2]},
    {
        'prompt': _TALK[:1],
        'rejected': [_OTHER],
        'samples': [[{'role': 'assistant', 'content': f'{i}'}] for i in range(40)],
    },
    {'prompt': _TALK[:1], 'completions': [_TALK[1:], [{'role': 'assistant', 'content': 'e'}]], 'scores': [0.5, 2]},
    {'prompt': _TALK[:1], 'completions': ['c', 'd\n'], 'labels': [1, 0]},
    {'prompt': _TALK[:1], 'chosen': _TALK[1:], 'rejected': [_OTHER], 'gold': [{'role': 'assistant', 'content': 'g'}]},
    {'prompt': _TALK[:1], 'completion': [_OTHER], 'label': True, 'other_record': _ELSE},
    {'prompt': 'a', 'steps': ['b'], 'chosen': ' c', 'rejected': ' d', 'chosen_spans': [[0, 1, 0.5]]},
    {
        'prompt': 'a',
        'completion': 'b',
        'label': True,
        'other_record': {'prompt': 'c', 'completion': 'd', 'label': False},
    },
)
