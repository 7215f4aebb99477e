"""Keys of example functions: equal only for those that do the same."""

import functools

import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import judged
from jaxalign.data import probes
from jaxalign.data import scored
from jaxalign.data import texts
from jaxalign.data import tokenizers

_SHORT = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


class TestDescribe:

  def test_differs_by_function_and_by_bound_options(self, letters):
    functions = [
        examples.supervised,
        examples.preference,
        functools.partial(examples.supervised, completion_only=False),
        functools.partial(examples.supervised, template="{{ messages[0]['content'] }}"),
        functools.partial(examples.supervised, columns={'text': 'body'}),
        functools.partial(examples.preference, columns={'margin': 'gap'}),
        scored.steps,
        functools.partial(scored.steps, columns={'labels': 'right'}),
    ]
    keys = [probes.describe(fn, letters, row_length=64) for fn in functions]
    assert len(set(keys)) == len(functions)
    assert probes.describe(examples.supervised, letters, row_length=64) == keys[0]

  def test_sees_options_that_are_bound_out_of_sight(self, letters):
    def wrap(**options):
      wrapped = lambda *args, **kwargs: examples.supervised(*args, **kwargs, **options)
      return functools.update_wrapper(wrapped, examples.supervised)

    keys = [probes.describe(wrap(**options), letters, row_length=64) for options in ({}, {'completion_only': False})]
    assert keys[0] != keys[1]

  def test_ignores_what_a_wrapper_adds_to_errors(self, letters):
    def wrap(note):
      def wrapped(*args, **kwargs):
        try:
          return examples.supervised(*args, **kwargs)
        except types.RunError as err:
          raise types.RunError(f'{err}\n  In call to {note}') from err

      return functools.update_wrapper(wrapped, examples.supervised)

    keys = {probes.describe(wrap(note), letters, row_length=64) for note in ('<at 0x1>', '<at 0x2>')}
    assert len(keys) == 1

  @pytest.mark.parametrize(
      'function,options',
      [
          (feedback.ranked, {'most': 4}),
          (feedback.ranked, {'most': 32}),
          (functools.partial(feedback.ranked, most=41), {'most': 60}),
          (feedback.ranked, {'template': _SHORT}),
          (feedback.pairs_of_list, {'which': 'all'}),
          (feedback.triple, {'template': _SHORT}),
          (feedback.mismatched, {'template': _SHORT}),
          (feedback.binary, {'template': _SHORT}),
          (scored.steps, {'template': _SHORT}),
          (scored.responses, {'per': 'step'}),
          (feedback.selected, {'most': 4}),
          (feedback.selected, {'threshold': 0.8}),
          (feedback.selected, {'template': _SHORT}),
          (feedback.negative, {'most': 4}),
          (feedback.negative, {'template': _SHORT}),
          (functools.partial(texts.quantiled, edges=(0.8, 0.9)), {'edges': (0.8, 0.91)}),
          (functools.partial(texts.quantiled, edges=(0.8,)), {'tag': '{}/{}'}),
          (texts.weighted, {'outside': 0.0}),
          (texts.tagged, {'good': 'Yes: '}),
          (texts.hindsight, {'bad': 'No: '}),
          (functools.partial(scored.attributes, attributes=('a', 'b')), {'attributes': ('a', 'c')}),
          (functools.partial(scored.attributes, attributes=('a', 'b')), {'template': _SHORT}),
          (functools.partial(scored.classified, classes=3), {'classes': 4}),
          (functools.partial(scored.classified, classes=3), {'template': _SHORT}),
          (judged.both_orders, {'first': ' A:'}),
          (judged.both_orders, {'second': ' B:'}),
          (judged.both_orders, {'labelled': False}),
          (judged.answered, {'before': ' A:'}),
          (judged.answered, {'question': ' Right?'}),
          (judged.answered, {'answers': (' Right', ' Wrong')}),
          (judged.answered, {'labelled': False}),
      ],
  )
  def test_differs_by_every_option(self, letters, function, options):
    keys = [probes.describe(fn, letters, row_length=64) for fn in (function, functools.partial(function, **options))]
    assert keys[0] != keys[1]

  def test_differs_by_options_that_are_told_where_no_record_shows_them(self, letters):
    told = [probes.Bound(feedback.ranked, options) for options in ('', 'most = 41', 'most = 60')]
    scored_of = [functools.partial(fn, columns={'scores': 'stars'}) for fn in told]
    keys = [probes.describe(fn, letters, row_length=64) for fn in (*told, *scored_of)]
    assert len(set(keys)) == len(keys)
    assert probes.describe(probes.Bound(feedback.ranked, 'most = 41'), letters, row_length=64) == keys[1]

  def test_tells_functions_among_options_by_their_source(self, letters):
    def make(text):
      return lambda record, tokenizer, *, row_length, said: examples.supervised(
          {'prompt': 'a', 'completion': text}, tokenizer, row_length=row_length
      )

    first = lambda: 'first'
    second = lambda: 'second'
    fn = make('b')
    keys = [probes.describe(functools.partial(fn, said=said), letters, row_length=64) for said in (first, second)]
    assert keys[0] != keys[1]
    again = probes.describe(functools.partial(make('b'), said=first), letters, row_length=64)
    assert again == keys[0]
    assert probes.describe(functools.partial(fn, said=len), letters, row_length=64) not in keys

  def test_differs_by_thresholds_that_take_the_same(self, letters):
    keys = {
        probes.describe(functools.partial(feedback.selected, threshold=threshold), letters, row_length=64)
        for threshold in (0.8, 0.85)
    }
    assert len(keys) == 2
