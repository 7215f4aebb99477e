"""The tool that combines scores of several reward models: its table, its output, its refusals."""

import json

import numpy as np
import pytest

from tools import ensemble

# Three members, two pairs: margins 2 and 1, 1 and -2, -3 and 2.
MEMBERS = [[[2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 1.0]], [[-1.0, 2.0], [2.0, 0.0]]]


def write(folder, members=MEMBERS):
  paths = []
  for i, pairs in enumerate(members):
    lines = [{'record': f'p:{n}', 'scores': pair, 'truncated': False} for n, pair in enumerate(pairs)]
    paths.append(folder / f'{i}.jsonl')
    paths[-1].write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return list(map(str, paths))


def table(out):
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines() if line.startswith('| ')]
  return {row[0]: [float(x) for x in row[1:]] for row in rows[1:]}


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


class TestMain:

  @pytest.mark.parametrize(
      'flags,how,combined',
      [
          ([], 'mean', [[2 / 3, 2 / 3], [2 / 3, 1 / 3]]),
          (['--how=worst'], 'worst', [[-1.0, 0.0], [-1.0, 0.0]]),
          (
              ['--how=uncertainty', '--penalty=0.5'],
              'uncertainty',
              [[2 / 3 - 14 / 18, 2 / 3 - 8 / 18], [2 / 3 - 14 / 18, 1 / 3 - 2 / 18]],
          ),
      ],
  )
  def test_combines_and_tells_how_good_members_and_all_are(self, tmp_path, capsys, flags, how, combined):
    paths = write(tmp_path)
    assert ensemble.main([*paths, *flags, f'--output={tmp_path / "all.jsonl"}']) == 0
    lines = [json.loads(line) for line in (tmp_path / 'all.jsonl').read_text().splitlines()]
    assert [line['record'] for line in lines] == ['p:0', 'p:1']
    np.testing.assert_allclose([line['scores'] for line in lines], combined, atol=1e-9)
    rows = table(capsys.readouterr().out)
    assert list(rows) == [*paths, how]
    for name, pairs in zip(rows, [*MEMBERS, combined]):
      margins = np.array([a - b for a, b in pairs])
      right = np.where(margins == 0, 0.5, margins > 0)
      sure = sigmoid(abs(margins))
      # Two predictions in different bins, or of the same kind in one.
      ece = np.mean(abs(sure - right)) if len(set(np.ceil(10 * sure))) == 2 else abs(np.mean(sure - right))
      wanted = [np.mean(margins > 0), np.mean((1 - sigmoid(margins)) ** 2), ece]
      np.testing.assert_allclose(rows[name], wanted, atol=1e-4)

  def test_compares_no_responses_of_a_list(self, tmp_path, capsys):
    paths = write(tmp_path)
    for path in paths:
      lines = [json.loads(line) | {'samples': ['a', 'b']} for line in open(path)]
      with open(path, 'w') as file:
        file.write(''.join(json.dumps(line) + '\n' for line in lines))
    assert ensemble.main([*paths, f'--output={tmp_path / "all.jsonl"}']) == 0
    assert '|' not in capsys.readouterr().out
    assert [json.loads(line)['samples'] for line in open(tmp_path / 'all.jsonl')] == [['a', 'b']] * 2

  def test_centres_members(self, tmp_path):
    offsets = [[[x + 10.0 * i for x in pair] for pair in pairs] for i, pairs in enumerate(MEMBERS)]
    found = []
    for name, members in ('a', MEMBERS), ('b', offsets):
      (tmp_path / name).mkdir()
      out = tmp_path / f'{name}.jsonl'
      assert ensemble.main([*write(tmp_path / name, members), '--how=worst', '--centre', f'--output={out}']) == 0
      found.append([json.loads(line)['scores'] for line in out.read_text().splitlines()])
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)

  @pytest.mark.parametrize(
      'change,flags,code,said',
      [
          (lambda paths: paths[:1], [], 2, 'an ensemble has at least two members'),
          (lambda paths: paths, ['--penalty=2'], 2, '--penalty: --how=mean does not read it'),
          (lambda paths: [*paths, 'nowhere.jsonl'], [], 2, 'nowhere.jsonl: no such file'),
      ],
  )
  def test_refuses_wrong_flags_in_one_line(self, tmp_path, capsys, change, flags, code, said):
    assert ensemble.main([*change(write(tmp_path)), *flags]) == code
    assert said in capsys.readouterr().err

  @pytest.mark.parametrize(
      'line,said',
      [
          ('{"record": "p:0"}', '1.jsonl:1: not a line of --mode=score'),
          ('no', '1.jsonl:1: not a line of --mode=score'),
          ('{"record": "p:0", "scores": [[1, 2]]}', '1.jsonl:1: scores that are no numbers'),
          ('{"record": "p:7", "scores": [1, 2]}', 'do not score the same responses; the first that differs is p:0'),
          ('', '1.jsonl: it holds no scores'),
      ],
  )
  def test_refuses_files_that_do_not_fit(self, tmp_path, capsys, line, said):
    paths = write(tmp_path)
    (tmp_path / '1.jsonl').write_text(line)
    assert ensemble.main(paths) == 1
    assert said in capsys.readouterr().err
