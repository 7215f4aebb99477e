"""Numbers as people and models write them."""

import fractions
import time

import pytest

from jaxalign.rewards import answers

F = fractions.Fraction


class TestNumber:

  @pytest.mark.parametrize(
      ('text', 'value'),
      [
          ('The answer is 42.', F(42)),
          ('3 + 4 = 7', F(7)),
          ('$1,234.50 in all', F('1234.5')),
          ('-5', F(-5)),
          ('−5', F(-5)),
          ('+5', F(5)),
          ('-$5', F(-5)),
          ('$-5', F(-5)),
          ('$ 5', F(5)),
          (r'\$18', F(18)),
          ('**18**', F(18)),
          ('10-5', F(5)),
          ('(3)-2', F(2)),
          ('10 - 5', F(5)),
          ('a 5-year plan', F(5)),
          ('50%', F(50)),
          (r'50\%', F(50)),
          ('5km', F(5)),
          ('.5', F(1, 2)),
          ('-.5', F(-1, 2)),
          ('3.', F(3)),
          ('7,000,', F(7000)),
          ('1,2,3', F(3)),
          ('2e3', F(2000)),
          ('1/2', F(1, 2)),
          ('-3 / 4', F(-3, 4)),
          (r'\frac{1}{2}', F(1, 2)),
          (r'-\dfrac{3}{4}', F(-3, 4)),
          (r'\frac{-1}{2}', F(-1, 2)),
          (r'\frac12', F(1, 2)),
          (r'12{,}000', F(12000)),
          (r'12\,000', F(12000)),
          (r'\boxed{4}, not 5', F(4)),
          (r'\boxed{3} or \boxed{4}, not 5', F(4)),
          (r'\boxed{\frac{1}{3}} of 5', F(1, 3)),
          (r'\boxed{\text{about }7} of 5', F(7)),
          (r'\boxed{4} and \boxed{5', F(4)),
          (r'so \boxed{12', F(12)),
          ('} 5 {', F(5)),
      ],
  )
  def test_is_the_last_or_that_of_the_box(self, text, value):
    assert answers.number(text) == value

  @pytest.mark.parametrize('text', ['', 'none', '2/0', r'5 and \boxed{none}', 'CO2', 'v2', '-', '$', '9' * 5000])
  def test_is_none_where_there_is_none(self, text):
    assert answers.number(text) is None

  @pytest.mark.parametrize(
      'text', [r'\boxed{' * 5000, '1,111' * 4000, ',111' * 8000, '-$' * 9000, '{' * 30000, '1/' * 9000]
  )
  def test_is_found_fast_in_what_repeats(self, text):
    start = time.process_time()
    answers.number(text)
    assert time.process_time() - start < 1
