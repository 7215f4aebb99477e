"""The tool that browses rollouts: its table, its groups, its tokens, its refusals."""

import json
import shutil

import numpy as np
import pytest

from jaxalign import recipe
from jaxalign.data import tokenizers
from jaxalign.rl import experience
from tools import rollouts


@pytest.fixture
def workdir(tmp_path):
  """Two rollouts of two prompts with three responses each; of the second the trainer's log-probabilities are known."""
  tokenizer = tokenizers.load(recipe.asset('stories260K'))
  prompts = [tokenizer.encode(text) for text in ('Tom was', 'Lily was')]
  said = [' sad', ' happy', ' very very big', ' at home', '', ' good']
  ids = [tokenizer.encode(text, continuation=True) if text else [tokenizer.eos_id] for text in said]
  rewards_GK = np.array([[0.0, 1.0, 0.5], [np.nan, 0.25, 0.75]])
  (tmp_path / 'rollouts').mkdir()
  for number in range(2):
    rollout = experience.Rollout(
        prompts,
        ids,
        [[-1.5] * len(one) for one in ids],
        [False, True, True, False, True, True],
        rewards_GK + number,
        {},
        {
            'advantages': [np.full(len(one), x) for one, x in zip(ids, (-1, 1, 0, 0, -2, 2))],
            **({'old_logps': [np.full(len(one), -1.25) for one in ids]} if number else {}),
        },
        [True] * 6,
    )
    (tmp_path / 'rollouts' / f'{number:06d}.jsonl').write_text(rollout.to_text(tokenizer))
  shutil.copytree(recipe.asset('stories260K'), tmp_path / 'checkpoints' / 'tokenizer')
  return tmp_path


def shown(capsys, *args):
  assert rollouts.main(list(map(str, args))) == 0
  return capsys.readouterr().out.splitlines()


class TestMain:

  def test_lists_rollouts(self, workdir, capsys):
    head, *rows = shown(capsys, workdir)
    assert head.split() == ['rollout', 'responses', 'reward', 'std', 'length', 'clipped', 'distinct-2']
    table = np.array([list(map(float, row.split())) for row in rows])
    rewards = np.array([0, 1, 0.5, 0.25, 0.75])
    np.testing.assert_allclose(table[:, :4], [[n, 6, rewards.mean() + n, rewards.std()] for n in (0, 1)], atol=1e-4)
    lines = [json.loads(line) for line in (workdir / 'rollouts' / '000000.jsonl').read_text().splitlines()]
    assert table[0, 4] == pytest.approx(np.mean([len(line['ids']) for line in lines]), abs=1e-4)
    assert table[0, 5] == pytest.approx(2 / 6, abs=1e-4)
    assert float(shown(capsys, workdir, '--prompt=tom')[1].split()[2]) == 0.5
    assert float(shown(capsys, workdir, '--prompt=lily')[1].split()[2]) == 0.5

  def test_shows_the_best_and_the_worst_response_to_each_prompt(self, workdir, capsys):
    lines = shown(capsys, workdir, '--rollout=0')
    assert lines[:4] == [
        'prompt 0: "Tom was"',
        '  3 responses, mean reward 0.5000',
        f'  best reward 1.0000, advantage +1.0000, {lines[2].split()[5]} tokens: " happy"',
        f'  worst reward 0.0000, advantage -1.0000, {lines[3].split()[5]} tokens, cut: " sad"',
    ]
    assert lines[7].endswith('" good"') and 'reward abstained' in lines[8]

  @pytest.mark.parametrize(
      'sort,order', [('reward', ['big', 'sad']), ('length', ['happy', 'sad']), ('advantage', ['big', 'sad'])]
  )
  def test_shows_all_in_an_order(self, workdir, capsys, sort, order):
    lines = shown(capsys, workdir, '--rollout=0', f'--sort={sort}', '--prompt=TOM')
    assert len(lines) == 6
    lengths = [int(line.split(' tokens')[0].split()[-1]) for line in lines[2:5]]
    said = [line.rstrip('"').split()[-1] for line in lines[2:5]]
    if sort == 'length':
      assert lengths == sorted(lengths, reverse=True) and said[0] == 'big'
    else:
      assert said == ['happy', *order]

  def test_shows_tokens_with_what_sampler_and_trainer_make_of_them(self, workdir, capsys):
    lines = shown(capsys, workdir, '--rollout=1', '--prompt=tom', '--tokens')
    best = next(n for n, line in enumerate(lines) if 'best' in line)
    assert lines[best + 1].split() == ['id', 'sampler', 'trainer', 'difference', 'token']
    parts = [line.split(maxsplit=4) for line in lines[best + 2 : lines.index(next(x for x in lines if 'worst' in x))]]
    assert [part[1:4] for part in parts] == [['-1.50000', '-1.25000', '-0.25000']] * len(parts)
    assert ''.join(part[4].strip("'") for part in parts).strip() == 'happy'
    assert 'trainer' not in '\n'.join(shown(capsys, workdir, '--rollout=0', '--tokens'))

  def test_tells_what_was_observed(self, workdir, capsys):
    path = workdir / 'rollouts' / '000001.jsonl'
    line = json.loads(path.read_text().splitlines()[2])
    count = len(line['ids'])
    line |= {'sampled': [1] + [0] * (count - 2) + [1], 'sampler_logps': [-1.5, -2.5]}
    line['token_labels'] = {'advantages': [0, 0], 'old_logps': [-1.25, -2.5]}
    path.write_text(json.dumps(line) + '\n')
    _, _, head, _, *tokens, _ = shown(capsys, workdir, '--rollout=1', '--tokens')
    assert ', 2 tokens' in head
    assert [token.split()[1] for token in tokens] == ['-1.50000'] + ['observed'] * (count - 2) + ['-2.50000']

  @pytest.mark.parametrize(
      'args,code,said',
      [
          (['{}/checkpoints'], 2, 'it holds no rollouts'),
          (['{}', '--rollout=7'], 2, '--rollout=7: there are 0 to 1'),
          (['{}', '--prompt=Max'], 2, 'no prompt has this in it'),
          (['{}', '--rollout=1', '--prompt=Max'], 2, 'no prompt of rollout 1 has this in it'),
          (['{}', '--tokens'], 2, '--tokens: it is of one rollout; give --rollout=N'),
          (['{}', '--rollout=3'], 1, '000003.jsonl:2: not a response of a rollout: reward is missing'),
          (['{}', '--rollout=4'], 1, '000004.jsonl:1: not valid JSON'),
      ],
  )
  def test_says_in_a_line_what_is_wrong(self, workdir, capsys, args, code, said):
    folder = workdir / 'rollouts'
    if code == 1:
      line = (folder / '000000.jsonl').read_text().splitlines()[0]
      (folder / '000003.jsonl').write_text(line + '\n' + json.dumps({**json.loads(line), 'reward': 'much'}) + '\n')
      (folder / '000004.jsonl').write_text('{')
    assert rollouts.main([arg.format(workdir) for arg in args]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('rollouts: ') and said in line
