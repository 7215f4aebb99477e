"""Generated tasks: what is in them, and that they stay as they are."""

import pytest

from jaxalign import types
from jaxalign.data import generated
from jaxalign.data import sources
from jaxalign.rewards import rules


class TestAddition:

  def test_is_every_sum_of_two_numbers_below_100_once_with_a_thousand_held_out(self):
    splits = generated.addition()
    assert {name: len(records) for name, records in splits.items()} == {'train': 9000, 'test': 1000}
    prompts = [record['prompt'] for records in splits.values() for record in records]
    assert set(prompts) == {f'{a}+{b}=' for a in range(100) for b in range(100)}
    assert len(prompts) == 10_000

  def test_answers_itself(self):
    for records in generated.addition().values():
      assert all(int(record['answer']) == sum(map(int, record['prompt'][:-1].split('+'))) for record in records)
      answers, said = ([record[name] for record in records] for name in ('answer', 'completion'))
      assert set(rules.exact_match(said, answers)) == {1.0}
      assert set(rules.exact_match([text + '1' for text in said], answers)) == {0.0}

  def test_is_mixed_the_same_way_every_time(self):
    train = generated.addition()['train']
    assert train == generated.addition()['train']
    assert [record['prompt'] for record in train[:3]] == ['42+73=', '48+71=', '80+72=']
    carries = [sum(int(x) % 10 for x in record['prompt'][:-1].split('+')) > 9 for record in train[:1000]]
    assert 0.4 < sum(carries) / 1000 < 0.5


class TestTasks:

  def test_are_opened_as_built_in_data(self):
    source = sources.open_source('builtin:addition:test[-2:]')
    assert [source[i] for i in range(2)] == generated.addition()['test'][-2:]
    assert [source.where(i) for i in range(2)] == ['addition-test[998]', 'addition-test[999]']
    train = sources.open_source('builtin:addition')
    assert len(train) == 9000
    assert train.at(17) == generated.addition()['train'][17]
    assert train.fingerprint != sources.open_source('builtin:addition:test').fingerprint

  def test_of_another_split_are_answered_with_those_there_are(self):
    with pytest.raises(types.UsageError, match='unknown; there is .*builtin:addition:train, builtin:addition:test'):
      sources.open_source('builtin:addition:dev')
