"""Records out of public files of feedback, one function for each format and shape; `tools/convert_data.py` runs them.

The formats were read off the files: the human evaluation of Tulu 1 (github.com/allenai/open-instruct), trees of
OpenAssistant (github.com/LAION-AI/Open-Assistant), conversations of LLaMA-Factory (github.com/hiyouga/LLaMA-Factory),
GSM8K (github.com/openai/grade-school-math) and XSTest (github.com/paul-rottger/exaggerated-safety).
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

from jaxalign import types
from jaxalign.data import records

_PREFERENCES = {
    'a-is-better': 1.0,
    'a-is-slightly-better': 0.5,
    'tie': 0.0,
    'b-is-slightly-better': -0.5,
    'b-is-better': -1.0,
}
_ACCEPTABLE = {'yes': True, 'no': False}
_COMPLIES = {'1_full_compliance': True, '2_full_refusal': False}
_KINDS = {str: 'text', bool: 'true or false', list: 'a list', dict: 'an object'}
_ROLES = {'human': 'user', 'gpt': 'assistant', 'prompter': 'user'} | {r: r for r in ('system', 'user', 'assistant')}


class Rows:
  """The rows of a raw file, and what is left out of them.

  Attributes:
    where: the row that is being read, for messages: 'annotations.jsonl.gz:17'.
    count: rows read so far.
    left: how often something was left out, by reason.
  """

  def __init__(self, places: Iterable[tuple[str, dict[str, Any]]]):
    self._places = places
    self.where, self.count = '', 0
    self.left: collections.Counter[str] = collections.Counter()

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for where, row in self._places:
      self.where = where
      self.count += 1
      yield row

  def leave_out(self, reason: str, count: int = 1) -> None:
    """Counts what does not become a record."""
    if count:
      self.left[reason] += count


def _tulu_pairs(rows: Rows) -> Iterator[records.Record]:
  """Each two responses once, with the mean of all judgements of them."""
  judged: dict[tuple[str, str, str], list[float]] = {}
  for row in rows:
    prompt, a, b = (_text(row, name) for name in ('prompt', 'completion_a', 'completion_b'))
    margin = _one_of(row, 'preference', _PREFERENCES)
    if a == b:
      rows.leave_out('equal responses')
      continue
    key, signed = ((prompt, a, b), margin) if a < b else ((prompt, b, a), -margin)
    judged.setdefault(key, []).append(signed)
  for (prompt, a, b), margins in judged.items():
    rows.leave_out('another judgement of the same responses, averaged', len(margins) - 1)
    margin = sum(margins) / len(margins)
    if margin == 0:
      rows.leave_out('a tie' if not any(margins) else 'judgements that cancel')
    else:
      chosen, rejected = (a, b) if margin > 0 else (b, a)
      yield _pair(_user(prompt), chosen, rejected) | {'margin': abs(margin)}


def _tulu_binary(rows: Rows) -> Iterator[records.Record]:
  """Each response once, with the label that most of its judgements have."""
  judged: dict[tuple[str, str], list[bool]] = {}
  for row in rows:
    for side in ('completion_a', 'completion_b'):
      label = _one_of(row, f'{side}_is_acceptable', _ACCEPTABLE)
      judged.setdefault((_text(row, 'prompt'), _text(row, side)), []).append(label)
  for (prompt, completion), labels in judged.items():
    rows.leave_out('another judgement of the same response, by majority', len(labels) - 1)
    if 2 * sum(labels) == len(labels):
      rows.leave_out('as many judgements for as against')
    else:
      yield _labelled(_user(prompt), completion, 2 * sum(labels) > len(labels))


def _oasst_lists(rows: Rows) -> Iterator[records.Record]:
  for turns, ranked in _oasst_ranked(rows):
    replies = {'completions': [_text(reply, 'text') for reply in ranked]}
    yield {'prompt': turns} | replies | {'ranks': [reply['rank'] + 1 for reply in ranked]}


def _oasst_pairs(rows: Rows) -> Iterator[records.Record]:
  for turns, ranked in _oasst_ranked(rows):
    yield _pair(turns, ranked[0]['text'], ranked[-1]['text'])


def _oasst_all_pairs(rows: Rows) -> Iterator[records.Record]:
  for turns, ranked in _oasst_ranked(rows):
    for i, better in enumerate(ranked):
      yield from (_pair(turns, better['text'], worse['text']) for worse in ranked[i + 1 :])


def _oasst_ranked(rows: Rows) -> Iterator[tuple[list[dict[str, str]], list[dict[str, Any]]]]:
  """Turns, and two or more ranked replies to them, the best first."""
  for row in rows:
    waiting: list[tuple[list[dict[str, str]], Any]] = [([], _column(row, 'prompt', dict))]
    while waiting:
      before, message = waiting.pop(0)
      turns, replies = [*before, _message(message, 'role', 'text')], _column(message, 'replies', list)
      waiting += [(turns, reply) for reply in replies]
      replies = [reply for reply in replies if _one_of(reply, 'role', _ROLES) == 'assistant']
      ranked = [reply for reply in replies if isinstance(reply.get('rank'), int)]
      if len(ranked) > 1:
        rows.leave_out('a reply without a rank beside ranked ones', len(replies) - len(ranked))
        yield turns, sorted(ranked, key=lambda reply: reply['rank'])
      elif replies:
        rows.leave_out('replies that were not ranked', len(replies))


def _oasst_demonstrations(rows: Rows) -> Iterator[records.Record]:
  """Of each tree the longest of the conversations in which every reply of the assistant is the best one."""
  for row in rows:
    turns = _best_path(_column(row, 'prompt', dict))
    if turns:
      yield {'messages': turns}
    else:
      rows.leave_out('a tree without a best reply')


def _best_path(message: dict[str, Any]) -> list[dict[str, str]]:
  """The turns from a message on to a reply of the assistant; none where there is no best reply."""
  here, replies = _message(message, 'role', 'text'), _column(message, 'replies', list)
  if here['role'] == 'assistant':
    return [here, *max(map(_best_path, replies), key=len, default=[])]
  best = [reply for reply in replies if reply.get('rank') == 0] or (replies if len(replies) == 1 else [])
  return [here, *_best_path(best[0])] if best else []


def _sharegpt_demonstrations(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    turns = _conversation(rows, row)
    if turns:
      yield {'messages': turns}


def _sharegpt_pairs(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    turns = _conversation(rows, row)
    chosen, rejected = (_message(_column(row, name, dict), *_keys(row[name])) for name in ('chosen', 'rejected'))
    if turns and chosen == rejected:
      rows.leave_out('equal responses')
    elif turns:
      yield _pair(turns, chosen['content'], rejected['content'])


def _sharegpt_binary(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    turns, label = _conversation(rows, row), _column(row, 'label', bool)
    if turns and (len(turns) < 2 or turns[-1]['role'] != 'assistant'):
      rows.leave_out('a conversation that does not end with the assistant')
    elif turns:
      yield _labelled(turns[:-1], turns[-1]['content'], label)


def _conversation(rows: Rows, row: dict[str, Any]) -> list[dict[str, str]]:
  """The messages of a row, none (and counted) where the assistant calls tools in it."""
  found = _column(row, 'messages' if 'messages' in row else 'conversations', list)
  if any(isinstance(one, dict) and _keys(one)[0] in one and one[_keys(one)[0]] not in _ROLES for one in found):
    rows.leave_out('a conversation with calls of tools')
    return []
  system = [{'role': 'system', 'content': row['system']}] if row.get('system') else []
  return [*system, *(_message(one, *_keys(one)) for one in found)]


def _keys(message: Any) -> tuple[str, str]:
  return ('from', 'value') if isinstance(message, dict) and 'from' in message else ('role', 'content')


def _gsm8k_demonstrations(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    answer = _text(row, 'ground_truth' if 'ground_truth' in row else 'answer')
    yield {'prompt': _user(_text(row, 'question')), 'completion': answer}


def _gsm8k_binary(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    for solution, right in _solutions(rows, row):
      yield _labelled(_user(_text(row, 'question')), solution, right)


def _gsm8k_pairs(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    found = _solutions(rows, row)
    right, wrong = ([one for one, is_right in found if is_right is wanted] for wanted in (True, False))
    if not right or not wrong:
      rows.leave_out(f'a question with none but {"right" if right else "wrong"} solutions')
    yield from (_pair(_user(_text(row, 'question')), a, b) for a in right for b in wrong)


def _solutions(rows: Rows, row: dict[str, Any]) -> list[tuple[str, bool]]:
  """The different solutions of models, and whether each is right."""
  columns = {name: value for name, value in row.items() if isinstance(value, dict)}
  if not columns:
    raise types.RunError(f'no column of a model with solution and is_correct, found {", ".join(row)}')
  found = [
      (_text(one, 'solution', f'{name}.'), _column(one, 'is_correct', bool, f'{name}.'))
      for name, one in columns.items()
  ]
  different = list(dict.fromkeys(found))
  rows.leave_out('a solution that another model gave too', len(found) - len(different))
  return different


def _xstest_binary(rows: Rows) -> Iterator[records.Record]:
  for row in rows:
    prompt, completion, kind, label = (_text(row, n) for n in ('prompt', 'completion', 'type', 'final_label'))
    if label in _COMPLIES:
      yield _labelled(_user(prompt), completion, _COMPLIES[label] != kind.startswith('contrast_'))
    else:
      rows.leave_out(f'final_label {label}')


def _user(prompt: str) -> list[dict[str, str]]:
  return [{'role': 'user', 'content': prompt}]


def _pair(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def _labelled(prompt: list[dict[str, str]], completion: str, label: bool) -> dict[str, Any]:
  return {'prompt': prompt, 'completion': completion, 'label': label}


def _column(row: Any, name: str, kind: type, prefix: str = '') -> Any:
  """A value of a row; raises RunError where it is not of this kind."""
  if not isinstance(row, dict) or name not in row:
    found = ', '.join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise types.RunError(f'there is no column {prefix}{name}, found {found}')
  if not isinstance(row[name], kind):
    raise types.RunError(f'column {prefix}{name}: {type(row[name]).__name__} where {_KINDS[kind]} is wanted')
  return row[name]


def _text(row: Any, name: str, prefix: str = '') -> str:
  return _column(row, name, str, prefix)


def _one_of(row: Any, name: str, meanings: dict[str, Any]) -> Any:
  value = _text(row, name)
  if value not in meanings:
    raise types.RunError(f'column {name}: {value!r} is none of {", ".join(meanings)}')
  return meanings[value]


def _message(message: Any, role: str, content: str) -> dict[str, str]:
  return {'role': _one_of(message, role, _ROLES), 'content': _text(message, content)}


# By format and shape; the first shape of a format is its own.
FORMATS: dict[str, dict[str, Callable[[Rows], Iterator[records.Record]]]] = {
    'tulu': {'pairs': _tulu_pairs, 'binary': _tulu_binary},
    'oasst': {
        'lists': _oasst_lists,
        'pairs': _oasst_pairs,
        'all_pairs': _oasst_all_pairs,
        'demonstrations': _oasst_demonstrations,
    },
    'sharegpt': {'demonstrations': _sharegpt_demonstrations, 'pairs': _sharegpt_pairs, 'binary': _sharegpt_binary},
    'gsm8k': {'demonstrations': _gsm8k_demonstrations, 'binary': _gsm8k_binary, 'pairs': _gsm8k_pairs},
    'xstest': {'binary': _xstest_binary},
}
