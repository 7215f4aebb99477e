"""tools/rollout_speed.py on a tiny model."""

import json
import shlex
import sys

import pytest

from tools import rollout_speed

SMALL = ['--model=tiny', '--prompts=8', '--prompt_tokens=4', '--new_tokens=6', '--repeats=2', '--top_k=5']


def printing(text):
  return f'--beside={sys.executable} -c {shlex.quote(f"print({text!r})")}'


class TestMain:

  def test_is_timed_beside_another_program(self, capsys):
    assert rollout_speed.main([*SMALL, printing('tokens_per_s=12.5')]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['beside_tokens_per_s'] == 12.5
    assert found['ratio'] == pytest.approx(found['tokens_per_s'] / 12.5, rel=0.01, abs=0.01)

  def test_compares_a_queue_with_batches(self, capsys):
    assert rollout_speed.main([*SMALL, '--ragged', '--mean=3', '--rows=4', '--mesh=fsdp:8']) == 0
    assert set(json.loads(capsys.readouterr().out)) == {'queue_tokens_per_s', 'batches_tokens_per_s', 'ratio'}

  def test_says_what_the_other_program_lacks(self, capsys):
    assert rollout_speed.main([*SMALL, printing('nothing')]) == 1
    assert 'it printed no tokens_per_s=NUMBER' in capsys.readouterr().err

  @pytest.mark.parametrize('args,said', [(['--repeats=0'], 'at least 1'), (['--mean=0', '--ragged'], 'at least 1')])
  def test_refuses_what_measures_nothing(self, args, said, capsys):
    with pytest.raises(SystemExit) as ended:
      rollout_speed.main([*SMALL, *args])
    assert ended.value.code == 2 and said in capsys.readouterr().err

  def test_refuses_what_exceeds_the_context(self, capsys):
    assert rollout_speed.main([*SMALL, '--prompt_tokens=100000']) == 2
    assert '--prompt_tokens=100000' in capsys.readouterr().err
