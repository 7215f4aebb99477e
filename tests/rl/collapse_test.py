"""Signs of collapse: which made-up histories show them, and how they are told."""

import json

from absl import logging
import pytest

from jaxalign.rl import collapse

FIRST = {
    'reward_std': 0.4,
    'entropy': 2.0,
    'kl': 0.0,
    'completions/distinct_2': 0.16,
    'completions/clipped_ratio': 0.5,
    'completions/mean_length': 20.0,
}


class TestSigns:

  @pytest.mark.parametrize(
      'name,just,beyond,sign',
      [
          ('reward_std', 1e-6, 0.0, 'reward_std'),
          ('completions/distinct_2', 0.081, 0.079, 'distinct_2'),
          ('entropy', 0.21, 0.19, 'entropy'),
          ('kl', 1.99, 2.01, 'kl'),
          ('completions/clipped_ratio', 0.99, 1.0, 'clipped_ratio'),
          ('completions/mean_length', 59.0, 61.0, 'length'),
      ],
  )
  def test_are_told_apart_by_name(self, name, just, beyond, sign):
    assert collapse.signs([FIRST, FIRST | {name: just}]) == ()
    assert collapse.signs([FIRST, FIRST | {name: beyond}]) == (sign,)
    assert collapse.signs([FIRST, FIRST | {name: beyond}, FIRST]) == ()
    assert collapse.signs([FIRST, {n: value for n, value in FIRST.items() if n != name}]) == ()

  def test_are_those_of_a_policy_that_says_one_thing_over_and_over(self):
    loop = {'reward_std': 0.0, 'entropy': 0.01, 'kl': 7.5, 'completions/distinct_2': 0.008}
    assert collapse.signs([FIRST, FIRST | loop]) == ('reward_std', 'distinct_2', 'entropy', 'kl')

  def test_are_those_of_a_divergence_in_the_reward_too(self):
    far = {name: value for name, value in FIRST.items() if name != 'kl'} | {'objective/kl': 39.0}
    assert collapse.signs([FIRST, far]) == ()
    assert collapse.signs([FIRST, far | {'objective/kl': 41.0}]) == ('kl',)

  def test_are_those_of_held_out_prompts_where_nothing_reads_a_reference(self):
    far = {name: value for name, value in FIRST.items() if name != 'kl'} | {'eval/mean_length': 64.0, 'eval/kl': 127.0}
    assert collapse.signs([FIRST, far]) == ()
    assert collapse.signs([FIRST, far | {'eval/kl': 129.0}]) == ('kl',)

  def test_do_not_show_at_first(self):
    assert collapse.signs([]) == collapse.signs([FIRST]) == ()
    always = FIRST | {'completions/clipped_ratio': 1.0}
    assert collapse.signs([always, always]) == ()
    assert collapse.signs([{'entropy': None}, {'entropy': 0.0}]) == ()


class TestWriter:

  def test_warns_once_and_goes_on_after_a_resumption(self, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(logging, 'warning', lambda text, *values: told.append(text % values))
    bad = FIRST | {'completions/distinct_2': 0.01}
    writer = collapse.Writer(tmp_path, 0)
    for step, values in enumerate((FIRST, bad, FIRST, bad), 1):
      writer.write(step, values)
    writer.close()
    assert len(told) == 1 and told[0].startswith('step 2: collapse: distinct_2: ')
    resumed = collapse.Writer(tmp_path, 3)
    assert resumed.seen == ['distinct_2']
    resumed.write(4, bad | {'kl': 3.0})
    resumed.close()
    assert [line.split(': ')[2] for line in told] == ['distinct_2', 'kl']
    lines = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    names = 'collapse/distinct_2', 'collapse/kl'
    wanted = [(None, None), (1.0, None), (0.0, None), (1.0, 1.0)]
    assert [tuple(map(line.get, names)) for line in lines] == wanted
    fresh = collapse.Writer(tmp_path, 0)
    fresh.close()
    assert fresh.seen == []
