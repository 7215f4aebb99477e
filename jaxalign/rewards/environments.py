"""Environments that episodes are played with: `step(state, text) -> (observation, reward, done)`.

`state` has the columns of the record; see `jaxalign.rl.multi_turn`.
"""

import ast
from collections.abc import Callable
import fractions
import operator
import re
from typing import Any

from jaxalign.rewards import answers

_CALL = re.compile(r'<calc>(.*?)</calc>', re.DOTALL)
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_LONGEST = 200  # characters of an expression


def guess(state: dict[str, Any], text: str, *, higher: str = ' higher ', lower: str = ' lower ', unknown: str = ' ? '):
  """Guessing the number in the column `answer`: 1 where it is said, else a hint.

  Args:
    state: of the episode.
    text: the last number in it is the guess.
    higher: what is answered to a guess that is too small.
    lower: to one that is too large.
    unknown: to a text without a number.

  Raises:
    ValueError: the record has no number.
  """
  wanted, found = _number(state), answers.number(text)
  if found is None:
    return unknown, 0.0, False
  return (higher if found < wanted else lower), float(found == wanted), found == wanted


def calculator(state: dict[str, Any], text: str, *, per_call: float = 0.0):
  """A tool that answers `<calc>1+2</calc>` with `<result>3</result>`; 1 where an answer without a call is right.

  The last call of a turn is answered, and a turn without one ends the episode: its last number is compared with the
  column `answer`. Numbers, + - * / and parentheses are known; anything else is answered with `<result>error</result>`.

  Args:
    state: of the episode.
    text: of the turn.
    per_call: the reward of a call, below 0 for a cost.

  Raises:
    ValueError: the record has no number.
  """
  calls = _CALL.findall(text)
  if not calls:
    return '', float(answers.number(text) == _number(state)), True
  try:
    value = _value(ast.parse(calls[-1].strip()[:_LONGEST], mode='eval').body)
    said = str(value) if value.denominator == 1 else repr(float(value))
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, OverflowError):
    said = 'error'
  return f'<result>{said}</result>', per_call, False


def _number(state: dict[str, Any]) -> fractions.Fraction:
  wanted = answers.number(str(state.get('answer')))
  if wanted is None:
    raise ValueError(f'the column answer is {state.get("answer")!r:.80} where a number is wanted')
  return wanted


def _value(node: ast.expr) -> fractions.Fraction:
  """The value of an expression; raises ValueError where it is more than arithmetic."""
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return fractions.Fraction(str(node.value))
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
    return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
  if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
    return _OPERATORS[type(node.op)](_value(node.operand))
  raise ValueError(ast.dump(node))
