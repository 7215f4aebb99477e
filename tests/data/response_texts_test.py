"""Responses as texts, of every form that a record has."""

import pytest

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import response_texts

USER = {'role': 'user', 'content': 'Hi'}
MORE = {'role': 'user', 'content': 'And?'}


def says(text):
  return {'role': 'assistant', 'content': text}


class TestRead:

  @pytest.mark.parametrize(
      ('record', 'prompt', 'responses'),
      [
          ({'prompt': 'q', 'completion': ' a'}, 'q', [' a']),
          ({'prompt': 'q', 'completion': ''}, 'q', ['']),
          ({'text': 'all of it'}, '', ['all of it']),
          ({'prompt': 'q', 'chosen': ' a', 'rejected': ' b'}, 'q', [' a', ' b']),
          ({'prompt': 'q', 'samples': [' a', '', ' a'], 'chosen': 'x', 'rejected': 'y'}, 'q', [' a', '', ' a']),
          ({'prompt': [USER], 'completions': ['a', [says('b')], [says('c')]]}, [USER], ['a', 'b', 'c']),
          ({'prompt': 'q', 'chosen': [says('a')], 'rejected': [says('b')]}, 'q', ['a', 'b']),
          ({'messages': [USER, says('a'), MORE, says('b')]}, [USER, says('a'), MORE], ['b']),
          ({'messages': [USER, says('a'), MORE]}, [USER], ['a']),
          (
              {'chosen': [USER, says('a'), MORE, says('b')], 'rejected': [USER, says('a'), MORE, says('c')]},
              [USER, says('a'), MORE],
              ['b', 'c'],
          ),
          ({'chosen': [USER, says('a'), MORE, says('b')], 'rejected': [USER, says('c')]}, [USER], ['a\n\nb', 'c']),
          ({'prompt': 'Hi', 'chosen': [USER, says('a')], 'rejected': [USER, says('b')]}, [USER], ['a', 'b']),
      ],
  )
  def test_gives_prompt_and_responses(self, record, prompt, responses):
    assert response_texts.read(record) == (prompt, responses)

  def test_reads_transcripts(self):
    record = {'chosen': '\n\nHuman: Hi\n\nAssistant: Hello', 'rejected': '\n\nHuman: Hi\n\nAssistant: Go'}
    found = response_texts.read(record)
    assert [turn['role'] for turn in found.prompt] == ['user'] and found.responses == ['Hello', 'Go']

  @pytest.mark.parametrize(
      ('record', 'reason'),
      [
          ({'prompt': 'q', 'samples': []}, 'no response'),
          ({'prompt': 'q', 'chosen': 'a', 'rejected': 'a'}, 'equal responses'),
          ({'messages': [USER]}, 'nothing to score: no turn of the assistant'),
          ({'prompt': 'q', 'completion': [USER]}, 'nothing to score: no turn of the assistant'),
      ],
  )
  def test_drops_what_has_nothing_to_score(self, record, reason):
    with pytest.raises(examples.Dropped) as caught:
      response_texts.read(record)
    assert caught.value.reason == reason

  @pytest.mark.parametrize(
      ('record', 'said'),
      [
          ({'prompt': 'q'}, 'wanted prompt [+] samples or prompt [+] completion or messages or prompt [+] chosen'),
          ({'samples': ['a']}, 'wanted prompt [+] samples, found samples'),
          ({'prompt': 'q', 'samples': 'a'}, 'column samples: a list of responses is wanted'),
          ({'prompt': 'q', 'samples': [3]}, 'column samples: int where text or a list of messages is wanted'),
          (
              {'prompt': 'q', 'completion': [says([{'type': 'image'}])]},
              'column completion: the content of a message is',
          ),
          ({'text': 3}, 'column text: int where text is wanted'),
      ],
  )
  def test_says_what_is_wrong(self, record, said):
    with pytest.raises(types.RunError, match=said):
      response_texts.read(record)
