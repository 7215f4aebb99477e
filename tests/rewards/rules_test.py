"""Rules against numbers worked out by hand."""

from concurrent import futures
import math
import sys

import pytest

from jaxalign import types
from jaxalign.rewards import rules


class TestVader:

  def test_squashes_the_sum_of_valences(self):
    # The lexicon gives 'happy' 2.7 and 'sad' -2.1; the compound score is x / sqrt(x^2 + 15), to four places.
    for text, valence in [('a happy cat', 2.7), ('a sad cat', -2.1), ('happy and sad', 2.7 - 2.1)]:
      assert rules.vader([text]) == [pytest.approx(valence / math.sqrt(valence**2 + 15), abs=1e-4)]

  def test_turns_what_is_negated_by_the_factor_of_the_paper(self):
    x = 2.7 * -0.74
    assert rules.vader(['not happy']) == [pytest.approx(x / math.sqrt(x**2 + 15), abs=1e-4)]

  def test_scores_each_text_by_itself(self):
    assert rules.vader(['', 'the cat', 'happy']) == [0.0, 0.0, rules.vader(['happy'])[0]]
    assert rules.vader([]) == []


class TestDistinct:

  def test_is_the_share_of_n_grams_that_differ(self):
    assert rules.distinct(2, [[1, 2, 3], [1, 2, 4]]) == 3 / 4
    assert rules.distinct(1, [[1, 1, 1, 1]]) == 1 / 4
    assert rules.distinct(2, ['abab']) == 2 / 3

  def test_does_not_join_sequences(self):
    assert rules.distinct(2, [[1], [2]]) == 0.0

  def test_of_nothing_is_zero(self):
    assert rules.distinct(2, []) == 0.0


class TestExactMatch:

  def test_compares_but_for_space_around(self):
    responses = [' Paris\n', 'paris', 'Paris.', '4', 'x', '']
    answers = ['Paris', 'Paris', 'Paris', 4, None, '']
    assert rules.exact_match(responses, answers) == [1.0, 0.0, 0.0, 1.0, None, 1.0]
    assert rules.exact_match(['PARIS', 'Straße'], ['paris', 'STRASSE'], ignore_case=True) == [1.0, 1.0]

  def test_takes_any_of_a_list_and_the_other_column(self):
    assert rules.exact_match(['b', 'c'], [['a', 'b'], ['a', 'b']]) == [1.0, 0.0]
    assert rules.exact_match(['b', 'b'], [None, 'a'], ['b', 'b']) == [1.0, 0.0]
    assert rules.exact_match(['b'], target=['b']) == [1.0]

  def test_wants_a_column_of_references(self):
    with pytest.raises(ValueError, match='no column answer or target'):
      rules.exact_match(['b'])


class TestNumericAnswer:

  def test_compares_the_last_number_with_that_of_the_reference(self):
    reference = 'Tom has 3 + 4 = <<3+4=7>>7 apples, for $1,200.\n#### 1,200'
    cases = {
        'so it is 1200.': 1.0,
        'It costs $1,200.00': 1.0,
        '1200 apples for 2 people': 0.0,
        '\\boxed{1{,}200} for 2 people': 1.0,
        '-1200': 0.0,
        'no idea': 0.0,
        '': 0.0,
    }
    assert rules.numeric_answer(list(cases), [reference] * len(cases)) == list(cases.values())

  def test_reads_references_of_numbers(self):
    responses, references = ['1/2', '50%', '3', '3', '5'], [0.5, 50, '3', None, '#### 4\n#### 5']
    assert rules.numeric_answer(responses, references) == [1.0, 1.0, 1.0, None, 1.0]
    assert rules.numeric_answer(['3'], target=[3]) == [1.0]

  def test_refuses_a_reference_without_a_number(self):
    with pytest.raises(ValueError, match="the reference '3 #### none' has no number"):
      rules.numeric_answer(['3'], ['3 #### none'])


class TestMathAnswer:

  def test_says_what_to_install(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'math_verify', None)
    with pytest.raises(types.UsageError, match=r'pip install "jaxalign\[math\]"'):
      rules.math_answer(['1'], ['1'])

  def test_gives_up_what_takes_too_long(self):
    pytest.importorskip('math_verify')
    endless = ['$9^{9^{9^{9}}}$'], ['$9^{9^{9^{9^{1}}}}+1$']
    with futures.ThreadPoolExecutor(1) as executor:
      assert executor.submit(rules.math_answer, *endless).result(timeout=60) == [0.0]

  def test_compares_as_mathematics(self):
    pytest.importorskip('math_verify')
    responses = ['It is $\\frac{2}{4}$.', '\\boxed{x^2+2x+1}', '$\\{2, 1\\}$', '$3$', 'none', '1']
    references = ['0.5', '(x+1)^2', '$\\{1,2\\}$', '4', '4', None]
    assert rules.math_answer(responses, references) == [1.0, 1.0, 1.0, 0.0, 0.0, None]
    with futures.ThreadPoolExecutor(1) as executor:  # as rollouts judge
      assert executor.submit(rules.math_answer, responses, references).result() == [1.0, 1.0, 1.0, 0.0, 0.0, None]


class TestMatchesFormat:

  def test_is_by_default_what_is_thought_then_what_is_answered(self):
    cases = {
        '<think>a\nb</think>\n<answer>c</answer>': 1.0,
        ' <think></think><answer></answer>\n': 1.0,
        '<think>a</think>': 0.0,
        '<answer>c</answer><think>a</think>': 0.0,
        '<think>a</think><answer>c</answer> more': 0.0,
        'x <think>a</think><answer>c</answer>': 0.0,
        '<think>a<think>b</think><answer>c</answer>': 0.0,
        '<think>a</think><answer>c</answer><answer>d</answer>': 0.0,
        '<think>a</think> so <answer>c</answer>': 0.0,
        '': 0.0,
    }
    assert rules.matches_format(list(cases)) == list(cases.values())

  def test_takes_a_pattern_of_the_whole(self):
    assert rules.matches_format(['a\nb', 'ab', 'abc'], pattern='a.?b') == [1.0, 1.0, 0.0]
    with pytest.raises(types.UsageError, match='it is no regular expression'):
      rules.matches_format(['a'], pattern='(')


class TestJsonValid:

  def test_tells_json(self):
    cases = {
        '{"a": [1, null]}': 1.0,
        ' 3 ': 1.0,
        '```json\n{"a": 1}\n```': 1.0,
        '```\n[]```\n': 1.0,
        "{'a': 1}": 0.0,
        '{"a": NaN}': 0.0,
        '{"a": 1} and so on': 0.0,
        'Here: ```json\n{}\n```': 0.0,
        '[' * 100_000: 0.0,
        '': 0.0,
    }
    assert rules.json_valid(list(cases)) == list(cases.values())

  def test_wants_the_keys(self):
    texts = ['{"a": 1, "b": 2}', '{"a": 1}', '["a", "b"]', '"ab"']
    assert rules.json_valid(texts, required_keys=['a', 'b']) == [1.0, 0.0, 0.0, 0.0]
