"""Examples that say more in their text than a response."""

import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import texts
from jaxalign.data import tokenizers

PAIR = {'prompt': 'ab', 'chosen': 'ba', 'rejected': 'bbb'}


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


def text_of(letters, sequence):
  """All of a sequence but its BOS, what is learned in brackets."""
  out, inside = '', False
  for i, m in zip(sequence.ids[1:].tolist(), sequence.mask[1:].tolist()):
    out += ('[' if m and not inside else ']' if inside and not m else '') + letters.decode([i], skip_special=False)
    inside = m
  return out + (']' if inside else '')


class TestTagged:

  def test_puts_a_tag_before_each_prompt(self, letters):
    groups = texts.tagged(PAIR, letters, row_length=40, good='+', bad='-')
    assert [text_of(letters, g.sequences[0]) for g in groups] == ['+ab[ba</s>]', '-ab[bbb</s>]']
    assert [g.labels for g in groups] == [{'desirable': 1.0}, {'desirable': 0.0}]

  def test_refuses_messages(self, letters):
    record = {'prompt': [{'role': 'user', 'content': 'a'}], 'completion': 'b', 'label': True}
    with pytest.raises(types.RunError, match='list where text is wanted'):
      texts.tagged(record, letters, row_length=40)


class TestQuantiled:

  def test_tags_each_response_with_the_range_of_its_score(self, letters):
    record = {'prompt': 'ab', 'completions': ['a', 'b', 'c', 'd'], 'scores': [0.5, -1, 2, 0.4]}
    groups = texts.quantiled(record, letters, row_length=40, edges=(0.0, 0.5), tag='{}/{} ')
    said = [text_of(letters, g.sequences[0]) for g in groups]
    assert said == ['3/3 ab[a</s>]', '1/3 ab[b</s>]', '3/3 ab[c</s>]', '2/3 ab[d</s>]']
    assert [g.labels for g in groups] == [{'score': 0.5}, {'score': -1.0}, {'score': 2.0}, {'score': 0.4}]

  def test_reads_single_responses_too(self, letters):
    record = {'prompt': 'ab', 'completion': 'a', 'score': -1, 'append_eos': False}
    (group,) = texts.quantiled(record, letters, row_length=40, edges=[0])
    assert text_of(letters, group.sequences[0]) == 'Reward 1 of 2: ab[a]'

  def test_takes_lists_of_equal_scores(self, letters):
    for column in ('completions', 'samples'):
      record = {'prompt': 'ab', column: ['a'], 'ranks': [1]}
      (group,) = texts.quantiled(record, letters, row_length=40, edges=[0])
      assert group.labels == {'score': -1.0}

  @pytest.mark.parametrize('edges', [(), (1, 1), (2, 1), (0.5, float('nan'))])
  def test_refuses_edges_that_do_not_increase(self, letters, edges):
    with pytest.raises(types.UsageError, match='texts.quantiled.edges = .*: numbers that increase'):
      texts.quantiled({'prompt': 'a', 'completion': 'b', 'score': 1}, letters, row_length=40, edges=edges)

  def test_says_what_is_missing_or_no_text(self, letters):
    with pytest.raises(types.RunError, match='wanted prompt \\+ completion \\+ score or .* for the edges \\(0,\\)'):
      texts.quantiled({'prompt': 'a', 'completion': 'b'}, letters, row_length=40, edges=(0,))
    with pytest.raises(types.RunError, match='column score: '):
      texts.quantiled({'prompt': 'a', 'completion': 'b', 'score': 'x'}, letters, row_length=40, edges=(0,))
    with pytest.raises(types.RunError, match='list where text is wanted'):
      texts.quantiled({'prompt': [], 'completion': 'b', 'score': 1}, letters, row_length=40, edges=(0,))


class TestHindsight:

  def test_learns_the_rejected_and_then_the_chosen_response(self, letters):
    group = texts.hindsight(PAIR, letters, row_length=40, bad='-', good='+')
    assert text_of(letters, group.sequences[0]) == 'ab-[bbb]+[ba</s>]'
    with pytest.raises(examples.Dropped, match='longer than a row without its prompt'):
      texts.hindsight(PAIR, letters, row_length=7, bad='-', good='+')
    cut = texts.hindsight(PAIR, letters, row_length=9, bad='-', good='+')
    assert text_of(letters, cut.sequences[0]) == 'b-[bbb]+[ba</s>]'
    scored = {'prompt': 'ab', 'samples': ['ba', 'a', 'bbb'], 'scores': [3, 2, 1]}
    of_list = texts.hindsight(scored, letters, row_length=40, bad='-', good='+')
    assert of_list.sequences[0].ids.tolist() == group.sequences[0].ids.tolist()
    with pytest.raises(types.RunError, match='wanted prompt \\+ chosen \\+ rejected'):
      texts.hindsight({'prompt': 'a', 'completion': 'b'}, letters, row_length=40)


class TestWeighted:

  def test_gives_tokens_the_weight_of_their_span(self, letters):
    record = PAIR | {'chosen_spans': [[0, 1, 3.0]], 'rejected_spans': [[0, 3, 2], [1, 2, 0.5]]}
    chosen, rejected = texts.weighted(record, letters, row_length=40, outside=0.25).sequences
    np.testing.assert_array_equal(chosen.labels['weight'], [3.0, 0.25, 0.25])
    np.testing.assert_array_equal(rejected.labels['weight'], [2.0, 0.5, 2.0, 0.25])
    assert all(len(s.labels['weight']) == s.mask.sum() for s in (chosen, rejected))

  def test_without_spans_weighs_all_alike(self, letters):
    group = texts.weighted(PAIR, letters, row_length=40)
    np.testing.assert_array_equal(group.sequences[1].labels['weight'], [1, 1, 1, 1])

  def test_counts_characters_where_tokens_are_bytes_of_them(self, letters):
    record = PAIR | {'chosen': 'aé😀b😀', 'chosen_spans': [[1, 2, 2], [2, 3, 3], [3, 4, 4], [4, 5, 5]]}
    chosen, _ = texts.weighted(record, letters, row_length=40).sequences
    np.testing.assert_array_equal(chosen.labels['weight'], [1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5, 5, 1])

  def test_keeps_count_behind_signs_of_bytes_that_are_none(self, letters):
    said = '\ufffd' * 9 + 'abb'
    record = PAIR | {'chosen': said, 'chosen_spans': [[10, 11, 2], [11, 12, 3]]}
    chosen, _ = texts.weighted(record, letters, row_length=60).sequences
    assert chosen.labels['weight'][-3:].tolist() == [2, 3, 1]

  def test_counts_words_of_sentencepiece(self, sentencepiece_model):
    tokenizer = tokenizers.load(sentencepiece_model)
    said = ' the cat  sat on é the mat'
    record = PAIR | {'chosen': said, 'chosen_spans': [[i, i + 1, i + 2] for i in range(len(said))]}
    chosen, _ = texts.weighted(record, tokenizer, row_length=60).sequences
    ids = chosen.ids[chosen.mask].tolist()
    places = [len(tokenizer.decode(ids[:i], continuation=True).rstrip('\ufffd')) for i in range(len(ids) - 1)]
    assert chosen.labels['weight'].tolist() == [*(place + 2 for place in places), 1.0]

  def test_takes_time_in_proportion_to_the_response(self, letters, monkeypatch):
    decoded, decode = [], letters.decode
    count = lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options)
    monkeypatch.setattr(letters, 'decode', count)
    texts.weighted(PAIR | {'chosen': 'aé' * 100}, letters, row_length=400)
    assert sum(decoded) < 3 * 300

  @pytest.mark.parametrize('spans', ['0-1', [[0, 1]], [[0, 1, 'x']], [3], [[0, 1, float('nan')]]])
  def test_refuses_spans_that_are_none(self, letters, spans):
    with pytest.raises(types.RunError, match='column chosen_spans: .*\\[start, end, weight\\]'):
      texts.weighted(PAIR | {'chosen_spans': spans}, letters, row_length=40)


class TestNextStep:

  def test_has_the_right_steps_in_its_prompt(self, letters):
    group = texts.next_step(PAIR | {'steps': ['a', 'b\n']}, letters, row_length=40)
    assert [text_of(letters, s) for s in group.sequences] == ['aba\nb\n[ba\n]', 'aba\nb\n[bbb\n]']
    with pytest.raises(types.RunError, match='wanted prompt \\+ steps \\+ chosen \\+ rejected'):
      texts.next_step(PAIR, letters, row_length=40)
    with pytest.raises(types.RunError, match='column steps: a list of texts is wanted'):
      texts.next_step(PAIR | {'steps': 'a'}, letters, row_length=40)
