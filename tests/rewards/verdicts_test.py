"""Verdicts on responses: how often one of k is right."""

import itertools
import math

import numpy as np
import pytest

from jaxalign import types
from jaxalign.rewards import functions
from jaxalign.rewards import verdicts


class TestPassAt:

  @pytest.mark.parametrize('k', [1, 2, 3, 5])
  def test_is_the_share_of_subsets_with_a_right_one(self, k):
    rewards_GK = np.array([[0, 1, 0, 0, 1], [0, 0, -2, 0, 0], [1, 0.5, 3, 1, 1], [0, 0, 0, 0, 2]], float)
    subsets = list(itertools.combinations(range(5), k))
    wanted = np.mean([[max(row[list(subset)]) > 0 for subset in subsets] for row in rewards_GK])
    assert verdicts.pass_at(k, rewards_GK) == pytest.approx(wanted, abs=1e-12)

  def test_leaves_out_what_rewards_abstain_on(self):
    nan = math.nan
    rewards_GK = np.array([[1, nan, 0], [nan, nan, 1], [0, 0, 0]])
    assert verdicts.pass_at(1, rewards_GK) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert verdicts.pass_at(2, rewards_GK) == pytest.approx((1 + 0) / 2)
    assert math.isnan(verdicts.pass_at(2, rewards_GK[1:2]))


class TestAreChats:

  def test_says_which_of_both_all_prompts_are(self):
    said = [{'role': 'user', 'content': 'Hello'}]
    chats = [verdicts.Prompt([1], {name: said}, f'a:{name}') for name in ('prompt', 'messages')]
    text = verdicts.Prompt([1], {'prompt': 'Hello'}, 'b:3')
    assert verdicts.are_chats(chats)
    assert not verdicts.are_chats([text, verdicts.Prompt([2], {}, 'no record')])
    with pytest.raises(types.UsageError, match='a:prompt: this prompt is of messages, but b:3 is a text'):
      verdicts.are_chats([*chats, text])


class TestMeasured:

  def test_adds_rewards_by_weight_whatever_they_are_normalised_to_in_training(self):
    rewards = [
        functions.Reward('a', lambda responses: [1.0, 3.0, None, 0.0]),
        functions.Reward('b', lambda responses: [0.0, 2.0, None, -4.0], weight=0.5),
    ]
    responses = functions.Responses(['p'] * 4, list('wxyz'), {}, ['here'] * 4)
    found = verdicts.measured(rewards, 'normalised', (1, 2), responses, 2)
    assert found == pytest.approx({'reward': 1.0, 'reward_std': np.std([1, 4, -2]), 'pass@1': 0.5, 'pass@2': 1.0})
    silent = [functions.Reward('c', lambda responses: [None] * 4)]
    assert verdicts.measured(silent, 'sum', (1,), responses, 2) == {}
