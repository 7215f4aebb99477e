"""Two responses in one text, and a question about one: what is read, what is learned."""

import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import judged
from jaxalign.data import tokenizers

PAIR = {'prompt': 'ab', 'chosen': 'a', 'rejected': 'bb'}


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


def text_of(letters, sequence):
  return letters.decode(sequence.ids[1:].tolist())


class TestBothOrders:

  def read(self, letters, record, **options):
    return judged.both_orders(record, letters, row_length=40, **({'first': '|', 'second': '/'} | options))

  def test_are_two_groups_of_which_the_better_response_is_first_in_one(self, letters):
    groups = self.read(letters, PAIR)
    assert [group.labels for group in groups] == [{'desirable': 1.0}, {'desirable': 0.0}]
    for group, text in zip(groups, ('ab|a/bb', 'ab|bb/a')):
      (sequence,) = group.sequences
      assert sequence.ids[:-1].tolist() == [0, *letters.encode(text), 1]
      assert np.flatnonzero(sequence.mask[1:]).tolist() == [8]

  def test_are_one_group_without_labels_where_they_are_scored(self, letters):
    group = self.read(letters, PAIR, labelled=False)
    assert group.labels == {}
    wanted = [s.ids.tolist() for made in self.read(letters, PAIR) for s in made.sequences]
    assert [s.ids.tolist() for s in group.sequences] == wanted

  def test_take_every_two_of_a_list_that_differ(self, letters):
    groups = self.read(letters, {'prompt': 'p', 'completions': ['x', 'y', 'z'], 'scores': [1, 2, 2]})
    texts = [letters.decode(group.sequences[0].ids[1:-2].tolist()) for group in groups]
    assert sorted(texts) == ['p|x/y', 'p|x/z', 'p|y/x', 'p|z/x']
    better = {text for text, group in zip(texts, groups) if group.labels['desirable']}
    assert better == {'p|y/x', 'p|z/x'}

  def test_take_a_list_that_has_scores_before_a_pair(self, letters):
    record = PAIR | {'samples': ['x', 'y']}
    first = lambda record: letters.decode(self.read(letters, record)[0].sequences[0].ids[1:-2].tolist())
    assert first(record) == 'ab|a/bb'
    assert first(record | {'scores': [2, 1]}) == 'ab|x/y'

  @pytest.mark.parametrize('column', ['samples', 'completions'])
  def test_are_not_scored_in_lists(self, letters, column):
    with pytest.raises(types.RunError, match=f'column {column}: this model compares two responses'):
      self.read(letters, PAIR | {column: ['x', 'y', 'z']}, labelled=False)

  def test_read_messages_as_what_they_say(self, letters):
    said = lambda role, text: {'role': role, 'content': text}
    turns = [said('user', 'ab')]
    record = {'prompt': turns} | {name: [said('assistant', PAIR[name])] for name in ('chosen', 'rejected')}
    ids = lambda record: [g.sequences[0].ids.tolist() for g in self.read(letters, record)]
    assert ids(record) == ids(PAIR)
    whole = {name: turns + record[name] for name in ('chosen', 'rejected')}
    assert ids(whole) == ids(PAIR)
    long = {'prompt': [said('user', 'a'), said('assistant', 'b'), said('user', 'c')]}
    wanted = PAIR | {'prompt': 'User: a\n\nAssistant: b\n\nUser: c'}
    assert ids(record | long) == ids(wanted)

  def test_lose_their_prompt_alone(self, letters):
    read = lambda row_length: judged.both_orders(PAIR, letters, row_length=row_length, first='|', second='/')
    cut = read(8)[0]
    assert cut.truncated
    assert cut.sequences[0].ids[:-1].tolist() == [0, *letters.encode('b|a/bb'), 1]
    with pytest.raises(examples.Dropped, match='longer than a row without its prompt'):
      read(6)

  def test_refuse_what_is_no_pair(self, letters):
    with pytest.raises(examples.Dropped, match='equal responses'):
      self.read(letters, {'prompt': 'a', 'chosen': 'b', 'rejected': 'b'})
    with pytest.raises(types.RunError, match='wanted prompt \\+ chosen \\+ rejected'):
      self.read(letters, {'prompt': 'a', 'completion': 'b'})
    with pytest.raises(types.RunError, match='column response: int where text or a list of messages'):
      self.read(letters, {'prompt': 'a', 'completions': ['b', 3], 'scores': [1, 2]})


class TestAnswered:

  def read(self, letters, record, row_length=40, **options):
    options = {'before': '|', 'question': '?', 'answers': ('Ya', 'Yob')} | options
    return judged.answered(record, letters, row_length=row_length, **options)

  def test_ends_with_the_token_that_decides_and_learns_it_alone(self, letters):
    groups = self.read(letters, PAIR)
    assert [text_of(letters, group.sequences[0]) for group in groups] == ['ab|a?Ya', 'ab|bb?Yo']
    for group in groups:
      (sequence,) = group.sequences
      assert np.flatnonzero(sequence.mask).tolist() == [len(sequence.ids) - 1]
    single = {'prompt': 'ab', 'completion': 'bb', 'label': False}
    assert text_of(letters, self.read(letters, single)[0].sequences[0]) == 'ab|bb?Yo'

  def test_gives_both_answers_where_they_are_scored(self, letters):
    group = self.read(letters, PAIR, labelled=False)
    assert [text_of(letters, s) for s in group.sequences] == ['ab|a?Ya', 'ab|a?Yo', 'ab|bb?Ya', 'ab|bb?Yo']
    single = self.read(letters, {'prompt': 'ab', 'completion': 'a'}, labelled=False)
    assert [text_of(letters, s) for s in single.sequences] == ['ab|a?Ya', 'ab|a?Yo']

  def test_asks_about_each_of_a_list_where_it_is_scored(self, letters):
    record = {'prompt': 'ab', 'completion': 'x', 'samples': ['a', 'bb', [{'role': 'assistant', 'content': 'b'}]]}
    group = self.read(letters, record, labelled=False)
    answers = [text_of(letters, s) for s in group.sequences]
    assert answers == ['ab|a?Ya', 'ab|a?Yo', 'ab|bb?Ya', 'ab|bb?Yo', 'ab|b?Ya', 'ab|b?Yo']
    trained = self.read(letters, record | {'label': True})
    assert [text_of(letters, group.sequences[0]) for group in trained] == ['ab|x?Ya']

  def test_loses_its_prompt_alone(self, letters):
    group, _ = self.read(letters, PAIR, row_length=8)
    assert group.truncated and text_of(letters, group.sequences[0]) == 'b|a?Ya'
    with pytest.raises(examples.Dropped, match='longer than a row without its prompt'):
      self.read(letters, PAIR, row_length=6)

  @pytest.mark.parametrize('answers', [('Y', 'Y'), ('Y', 'Yes')])
  def test_refuses_answers_that_nothing_decides(self, letters, answers):
    with pytest.raises(types.UsageError, match='judged.answered.answers = .*begin with those of the other'):
      self.read(letters, PAIR, answers=answers)
