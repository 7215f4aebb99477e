"""Numbers in texts, as answers to problems are written."""

import fractions
import re

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
_SIGN = r'(?:(?<![\w)\]}])[-+])?'  # A minus behind a word or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(
    rf'(?P<sign>{_SIGN})(?:[$€£]\s?)?(?<![A-Za-z_\d])(?P<inner>{_SIGN})(?P<number>{_DIGITS})'
    rf'(?P<exponent>[eE][-+]?\d{{1,2}}(?!\d))?(?:\s?/\s?(?P<below>{_DIGITS}))?'
)
_BRACE = re.compile(r'\\f?boxed\s*\{|\{|\}')
_LONGEST = 300  # digits: no answer has more, and Python refuses to read some thousands


def number(text: str) -> fractions.Fraction | None:
  r"""The answer in a text: the last number, that of the last \boxed{...} where there is one; None where there is none.

  Signs, thousands (1,000), decimals, exponents (2e3), fractions (1/2, \frac{1}{2}), and $ € £ before a number are read;
  what follows it (%, units) is not.
  """
  boxed = _last_box(text)
  plain = _plain(text if boxed is None else boxed)
  last = None
  for match in _NUMBER.finditer(plain):
    last = match
  return None if last is None else _value(last)


def _last_box(text: str) -> str | None:
  """What the last complete box holds: of those that are closed, the one that begins last."""
  opened: list[int | None] = []  # where each open brace begins what a box holds
  first, last = -1, -1
  for match in _BRACE.finditer(text):
    if match[0] != '}':
      opened.append(match.end() if len(match[0]) > 1 else None)
    elif opened and (start := opened.pop()) is not None and start > first:
      first, last = start, match.start()
  return None if first < 0 else text[first:last]


def _plain(text: str) -> str:
  """The text with LaTeX's ways to write numbers made plain."""
  text = text.replace('−', '-').replace('{,}', ',').replace('\\$', '$').replace('\\%', '%')
  text = re.sub(r'\\[,!;: ]', '', text)
  text = re.sub(r'\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}', r'\1/\2', text)
  return re.sub(r'\\[dtc]?frac\s*(\d)\s*(\d)', r'\1/\2', text)


def _value(match: re.Match) -> fractions.Fraction | None:
  if len(match[0]) > _LONGEST:
    return None
  above = fractions.Fraction(match['number'].replace(',', '') + (match['exponent'] or ''))
  below = fractions.Fraction((match['below'] or '1').replace(',', ''))
  if not below:
    return None
  return (-1) ** (match['sign'] + match['inner']).count('-') * above / below
