"""Examples: the tokens of prompts and responses, their masks, truncation, and what is dropped."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import tokenizers

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
_MARKED = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    '{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}'
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_SPECIAL = ('<s>', '</s>', '<|im_start|>', '<|im_end|>')

# Characters that the merges of the toy vocabularies join across any boundary, and names of special tokens.
_TEXTS = st.lists(st.sampled_from([' ', '\n', 'a', 'b', ':', 'é', '你', '😀', '</s>', '<s>']), max_size=8).map(''.join)
_few = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def _talk(*contents):
  roles = ('user', 'assistant')
  return [{'role': roles[i % 2], 'content': content} for i, content in enumerate(contents)]


def _learned(sequence):
  return sequence.ids[sequence.mask].tolist()


@pytest.fixture(params=['json', 'sentencepiece'])
def tokenizer(request, write_json_tokenizer, sentencepiece_model):
  """Both kinds, with BOS."""
  return tokenizers.load(write_json_tokenizer() if request.param == 'json' else sentencepiece_model)


@pytest.fixture
def letters(write_json_tokenizer):
  """A tokenizer without merges, BOS 0 and EOS 1: a character of ASCII is a token."""
  return tokenizers.load(write_json_tokenizer(merges=()))


class TestSupervised:

  @_few
  @hypothesis.given(prompt=_TEXTS, response=_TEXTS)
  def test_what_is_learned_is_exactly_the_response_and_eos(self, tokenizer, prompt, response):
    group = examples.supervised({'prompt': prompt, 'completion': response}, tokenizer, row_length=512)
    (sequence,) = group.sequences
    ids = sequence.ids.tolist()
    assert tokenizer.decode(_learned(sequence), continuation=bool(prompt)) == response
    assert tokenizer.decode(ids) == prompt + response
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.eos_id) == 1 and _learned(sequence)[-1] == ids[-1] == tokenizer.eos_id
    assert not group.truncated

  @_few
  @hypothesis.given(prompt=_TEXTS, response=_TEXTS)
  def test_the_prompt_is_the_one_that_is_sampled_from(self, tokenizer, prompt, response):
    for record, start in (
        ({'prompt': prompt, 'completion': response}, prompt),
        ({'messages': _talk(prompt, response)}, _talk(prompt)),
        ({'prompt': _talk(prompt), 'completion': _talk('', response)[1:]}, _talk(prompt)),
    ):
      group = examples.supervised(record, tokenizer, row_length=512)
      ids = examples.prompt_ids(tokenizer, start)
      assert group.sequences[0].ids[: group.prompt_tokens].tolist() == ids
      assert not group.sequences[0].mask[: group.prompt_tokens].any()

  @_few
  @hypothesis.given(
      contents=st.lists(_TEXTS, min_size=4, max_size=4), template=st.sampled_from(['hh', _LLAMA, _MARKED])
  )
  def test_every_turn_of_the_assistant_is_learned_and_nothing_else(self, tokenizer, contents, template):
    hypothesis.assume(contents[1].strip() and contents[3].strip())
    group = examples.supervised({'messages': _talk(*contents)}, tokenizer, row_length=512, template=template)
    (sequence,) = group.sequences
    ids = sequence.ids.tolist()
    space = '' if template == _MARKED else ' '
    assert tokenizer.decode(_learned(sequence), continuation=True) == ''.join(space + said for said in contents[1::2])
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert _learned(sequence)[-1] == ids[-1] == tokenizer.eos_id
    # EOS is where the template writes it, never where a message says so.
    assert ids.count(tokenizer.eos_id) == (1 if template == 'hh' else 2)

  def test_chatml_learns_its_end_of_turn(self, write_json_tokenizer):
    config = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'chat_template': _CHATML}
    tokenizer = tokenizers.load(write_json_tokenizer(special=_SPECIAL, config=config))
    group = examples.supervised({'messages': _talk('a', 'b', 'a<|im_end|>', 'ab')}, tokenizer, row_length=512)
    learned = [*tokenizer.encode('b'), tokenizer.eos_id, *tokenizer.encode('ab'), tokenizer.eos_id]
    assert _learned(group.sequences[0]) == learned
    assert group.sequences[0].ids.tolist().count(tokenizer.eos_id) == 4

  def test_text_after_the_last_turn_of_the_assistant_is_left_out(self, letters):
    group = examples.supervised({'messages': _talk('a', 'b', 'c')}, letters, row_length=512)
    assert letters.decode(group.sequences[0].ids) == '\n\nHuman: a\n\nAssistant: b'

  def test_bos_that_the_template_wrote_is_not_doubled(self, tokenizer):
    for completion_only in (True, False):
      group = examples.supervised(
          {'messages': _talk('a', 'b')}, tokenizer, row_length=512, template=_LLAMA, completion_only=completion_only
      )
      assert group.sequences[0].ids.tolist().count(tokenizer.bos_id) == 1

  def test_no_bos_where_the_tokenizer_has_none(self, write_json_tokenizer):
    tokenizer = tokenizers.load(write_json_tokenizer(merges=(), config={'eos_token': '</s>'}))
    (sequence,) = examples.supervised({'prompt': 'a', 'completion': 'b'}, tokenizer, row_length=8).sequences
    assert sequence.ids.tolist() == [*tokenizer.encode('ab'), 1]
    assert sequence.mask.tolist() == [False, True, True]

  def test_eos_is_learned_where_it_is_also_the_padding(self, write_json_tokenizer):
    config = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>', 'add_bos_token': True}
    tokenizer = tokenizers.load(write_json_tokenizer(config=config))
    assert tokenizer.pad_id == tokenizer.eos_id
    (sequence,) = examples.supervised({'prompt': 'a', 'completion': 'b'}, tokenizer, row_length=8).sequences
    assert (sequence.ids[-1], sequence.mask[-1]) == (tokenizer.eos_id, True)

  @pytest.mark.parametrize('template', ['hh', _LLAMA, _MARKED])
  def test_a_response_that_was_cut_off_learns_no_end(self, letters, template):
    record = {'messages': _talk('a', 'b'), 'append_eos': False}
    (sequence,) = examples.supervised(record, letters, row_length=512, template=template).sequences
    assert letters.decode(_learned(sequence), skip_special=False).strip() == 'b'
    assert sequence.mask[-1]

  def test_text_is_learned_whole(self, letters):
    (sequence,) = examples.supervised({'text': 'ab'}, letters, row_length=8).sequences
    assert sequence.ids.tolist() == [0, *letters.encode('ab'), 1]
    assert sequence.mask.tolist() == [False, True, True, True]

  @pytest.mark.parametrize('record', [{'prompt': 'a', 'completion': 'b'}, {'messages': _talk('a', 'b', 'a', 'b')}])
  def test_all_is_learned_on_request(self, letters, record):
    group = examples.supervised(record, letters, row_length=512, completion_only=False)
    only = examples.supervised(record, letters, row_length=512)
    assert group.sequences[0].ids.tolist() == only.sequences[0].ids.tolist()
    assert group.sequences[0].mask.tolist() == [False] + [True] * (len(only.sequences[0].ids) - 1)

  def test_a_dialogue_may_be_a_string(self, letters):
    group = examples.supervised({'messages': '\n\nHuman: a\n\nAssistant: b'}, letters, row_length=512)
    assert letters.decode(_learned(group.sequences[0])) == ' b'

  def test_columns_may_have_other_names(self, letters):
    record = {'question': 'a', 'answer': 'b', 'prompt': 'x'}
    columns = {'prompt': 'question', 'completion': 'answer'}
    group = examples.supervised(record, letters, row_length=8, columns=columns)
    assert letters.decode(group.sequences[0].ids) == 'ab'

  def test_missing_columns_are_named_beside_those_present(self, letters):
    with pytest.raises(types.RunError, match=r'wanted messages or question \+ completion or text, found id, prompt'):
      examples.supervised({'prompt': 'a', 'id': 3, 'x': None}, letters, row_length=8, columns={'prompt': 'question'})
    with pytest.raises(types.UsageError, match="'instruction' is not one of messages"):
      examples.supervised({}, letters, row_length=8, columns={'instruction': 'prompt'})

  @pytest.mark.parametrize(
      'record, reason',
      [
          ({'text': 3}, 'column text: int where text is wanted'),
          ({'prompt': 'a', 'completion': 3}, 'column completion: int'),
          ({'messages': [{'role': 'user', 'content': 'a'}, {'role': 'user'}]}, 'column messages: message 1'),
          ({'messages': []}, 'column messages: list'),
          ({'messages': 'hello'}, 'column messages: not a dialogue'),
          ({'text': 'a', 'append_eos': 'no'}, "column append_eos: 'no'"),
          ({'text': 'a\ud800'}, 'lone surrogate'),
      ],
  )
  def test_columns_of_the_wrong_kind_are_named(self, letters, record, reason):
    with pytest.raises(types.RunError, match=reason):
      examples.supervised(record, letters, row_length=8)

  @pytest.mark.parametrize(
      'record',
      [
          {'messages': _talk('a')},
          {'prompt': 'a', 'completion': '', 'append_eos': False},
          {'text': '', 'append_eos': False},
      ],
  )
  def test_a_record_with_nothing_to_learn_is_dropped(self, letters, record):
    with pytest.raises(examples.Dropped, match='nothing to learn') as caught:
      examples.supervised(record, letters, row_length=8)
    assert caught.value.reason == str(caught.value)


class TestTruncation:

  def test_truncation_keeps_the_response_and_bos(self, letters):
    group = examples.supervised({'prompt': '0123456789', 'completion': 'abc'}, letters, row_length=7)
    (sequence,) = group.sequences
    assert len(sequence.ids) == 8 and sequence.ids[0] == letters.bos_id
    assert letters.decode(sequence.ids) == '789abc'
    assert _learned(sequence) == [*letters.encode('abc'), letters.eos_id]
    assert group.truncated and group.prompt_tokens == 4

  def test_a_sequence_that_just_fits_is_whole(self, letters):
    assert not examples.supervised({'prompt': '01', 'completion': 'ab'}, letters, row_length=5).truncated
    assert examples.supervised({'prompt': '01', 'completion': 'ab'}, letters, row_length=4).truncated

  def test_a_response_longer_than_the_row_loses_its_end(self, letters):
    (sequence,) = examples.supervised({'prompt': '01', 'completion': 'abcdefgh'}, letters, row_length=4).sequences
    assert sequence.ids.tolist() == [0, *letters.encode('abcd')]
    assert sequence.mask.tolist() == [False] + [True] * 4

  def test_without_bos_the_last_of_the_prompt_stays(self, write_json_tokenizer):
    tokenizer = tokenizers.load(write_json_tokenizer(merges=(), config={'eos_token': '</s>'}))
    (sequence,) = examples.supervised({'prompt': '01', 'completion': 'abcdefgh'}, tokenizer, row_length=3).sequences
    assert tokenizer.decode(sequence.ids) == '1abc'
    assert sequence.mask.tolist() == [False, True, True, True]

  def test_later_turns_go_before_the_prompt_does(self, letters):
    messages = _talk('q' * 10, 'a' * 10, 'r' * 10, 'b' * 10)
    whole = examples.supervised({'messages': messages}, letters, row_length=512).sequences[0]
    fitted = examples.supervised({'messages': messages}, letters, row_length=60)
    assert fitted.sequences[0].ids.tolist() == whole.ids[:61].tolist()
    assert fitted.sequences[0].mask.tolist() == whole.mask[:61].tolist()

  def test_both_sides_of_a_pair_keep_the_same_prompt(self, letters):
    record = {'prompt': '0123456789', 'chosen': 'abcd', 'rejected': 'e'}
    group = examples.preference(record, letters, row_length=8)
    assert [letters.decode(sequence.ids) for sequence in group.sequences] == ['789abcd', '789e']
    assert group.truncated and group.prompt_tokens == 4

  @_few
  @hypothesis.given(
      prompt=st.text('ab', max_size=12),
      chosen=st.text('ab', max_size=12),
      rejected=st.text('ab', max_size=12),
      row_length=st.integers(1, 16),
  )
  def test_nothing_is_longer_than_the_row_and_every_response_is_learned(
      self, letters, prompt, chosen, rejected, row_length
  ):
    record = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
    try:
      group = examples.preference(record, letters, row_length=row_length)
    except examples.Dropped as err:
      assert chosen[:row_length] == rejected[:row_length] and err.reason.startswith('equal responses')
      return
    kept = [letters.bos_id, *letters.encode(prompt)[len(prompt) + 1 - group.prompt_tokens :]]
    for sequence, response in zip(group.sequences, (chosen, rejected), strict=True):
      assert sequence.ids[: group.prompt_tokens].tolist() == kept
      assert 2 <= len(sequence.ids) <= row_length + 1
      whole = [*letters.encode(response), letters.eos_id]
      assert _learned(sequence) == whole[:row_length]
      assert group.truncated or _learned(sequence) == whole


class TestPreference:

  @_few
  @hypothesis.given(prompt=_TEXTS, chosen=_TEXTS, rejected=_TEXTS)
  def test_what_is_learned_is_exactly_each_response(self, tokenizer, prompt, chosen, rejected):
    hypothesis.assume(chosen != rejected)
    record = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
    group = examples.preference(record, tokenizer, row_length=512)
    prompts = [sequence.ids[: group.prompt_tokens].tolist() for sequence in group.sequences]
    assert prompts[0] == prompts[1] == examples.prompt_ids(tokenizer, prompt)
    for sequence, response in zip(group.sequences, (chosen, rejected), strict=True):
      assert tokenizer.decode(_learned(sequence), continuation=bool(prompt)) == response
      assert _learned(sequence)[-1] == tokenizer.eos_id

  def test_types_are_those_of_batches(self, letters):
    group = examples.preference({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, letters, row_length=8)
    assert [(s.ids.dtype, s.mask.dtype) for s in group.sequences] == [(np.int32, bool)] * 2

  def test_margin_is_a_label(self, letters):
    record = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}
    assert examples.preference(record, letters, row_length=8).labels == {'margin': 0.0}
    assert examples.preference(record | {'margin': 2}, letters, row_length=8).labels == {'margin': 2.0}
    for bad in (float('nan'), 'much', [1]):
      with pytest.raises(types.RunError, match='column margin'):
        examples.preference(record | {'margin': bad}, letters, row_length=8)

  @pytest.mark.parametrize(
      'chosen, rejected',
      [
          (_talk('a', 'b', 'c', 'd'), _talk('a', 'b', 'c', 'e')),
          (
              '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d',
              '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e',
          ),
      ],
  )
  def test_the_turns_that_both_sides_share_are_the_prompt(self, letters, chosen, rejected):
    group = examples.preference({'chosen': chosen, 'rejected': rejected}, letters, row_length=512)
    assert [letters.decode(_learned(sequence)) for sequence in group.sequences] == [' d', ' e']
    prompt = group.sequences[0].ids[: group.prompt_tokens]
    assert letters.decode(prompt) == '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
    assert prompt.tolist() == examples.prompt_ids(letters, _talk('a', 'b', 'c'))

  def test_sides_may_part_earlier_than_at_their_last_turn(self, letters):
    record = {'chosen': _talk('a', 'b', 'c', 'd'), 'rejected': _talk('a', 'x', 'y', 'z')}
    group = examples.preference(record, letters, row_length=512)
    assert [letters.decode(_learned(sequence)) for sequence in group.sequences] == [' b d', ' x z']

  def test_an_empty_reply_learns_eos_alone(self, letters):
    record = {'chosen': _talk('a', 'b'), 'rejected': _talk('a', '')}
    group = examples.preference(record, letters, row_length=512)
    assert _learned(group.sequences[1]) == [letters.eos_id]

  def test_a_prompt_of_messages_takes_responses_of_either_kind(self, letters):
    forms = [
        {'prompt': _talk('a'), 'chosen': 'b', 'rejected': 'c'},
        {'prompt': 'a', 'chosen': _talk('', 'b')[1:], 'rejected': _talk('', 'c')[1:]},
        {'prompt': 'a', 'chosen': _talk('a', 'b'), 'rejected': _talk('a', 'c')},
        {'chosen': _talk('a', 'b'), 'rejected': _talk('a', 'c')},
    ]
    groups = [examples.preference(form, letters, row_length=512) for form in forms]
    for group in groups:
      assert [s.ids.tolist() for s in group.sequences] == [s.ids.tolist() for s in groups[0].sequences]
      assert group.prompt_tokens == groups[0].prompt_tokens

  def test_equal_responses_are_dropped(self, letters):
    with pytest.raises(examples.Dropped, match='^equal responses$'):
      examples.preference({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, letters, row_length=8)
    with pytest.raises(examples.Dropped, match='^equal responses after truncation$'):
      examples.preference({'prompt': 'a', 'chosen': 'bbbc', 'rejected': 'bbbd'}, letters, row_length=3)

  def test_responses_without_a_turn_of_the_assistant_are_dropped(self, letters):
    record = {'chosen': _talk('a', 'b', 'c'), 'rejected': _talk('a', 'b', 'd')}
    with pytest.raises(examples.Dropped, match='no turn of the assistant'):
      examples.preference(record, letters, row_length=512)

  def test_missing_columns_are_named_beside_those_present(self, letters):
    with pytest.raises(types.RunError, match=r'wanted prompt \+ better \+ rejected or .*, found chosen'):
      examples.preference({'chosen': 'b'}, letters, row_length=8, columns={'chosen': 'better'})
    with pytest.raises(types.RunError, match='column chosen: not a dialogue.* need a column prompt'):
      examples.preference({'chosen': 'b', 'rejected': 'c'}, letters, row_length=8)


class TestPromptIds:

  def test_starts_with_bos_and_opens_the_assistants_turn(self, letters):
    assert examples.prompt_ids(letters, 'ab') == [0, *letters.encode('ab')]
    assert examples.prompt_ids(letters, _talk('ab')) == [0, *letters.encode('\n\nHuman: ab\n\nAssistant:')]

  def test_bos_that_the_template_wrote_is_not_doubled(self, letters):
    assert examples.prompt_ids(letters, _talk('a'), _LLAMA) == [0, *letters.encode('[INST] a [/INST]')]

  def test_names_of_special_tokens_in_messages_are_plain_text(self, letters):
    ids = examples.prompt_ids(letters, [{'role': 'user', 'content': '<s></s>', 'name': ['</s>']}], _LLAMA)
    assert ids == [0, *letters.encode('[INST] <s></s> [/INST]')]
    assert examples.prompt_ids(letters, '<s>') == [0, *letters.encode('<s>')]
