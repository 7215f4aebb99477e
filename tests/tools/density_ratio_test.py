"""Density ratios: the regression against Newton's method, and the tool from the command line."""

import json

import numpy as np
import pytest

from tools import density_ratio


def by_newton(x, y):
  """Balanced logistic regression with an L2 penalty of 1/2 on all but the intercept, float64: the log-odds."""
  x = np.concatenate([(x - x.mean(0)) / x.std(0), np.ones((len(x), 1))], axis=1).astype(np.float64)
  weight = len(x) / (2 * np.array([(y == 0).sum(), (y == 1).sum()])[y.astype(int)])
  penalty = np.diag([1.0] * (x.shape[1] - 1) + [0.0])
  w = np.zeros(x.shape[1])
  for _ in range(50):
    p = 1 / (1 + np.exp(-x @ w))
    gradient = x.T @ (weight * (p - y)) + penalty @ w
    w -= np.linalg.solve(x.T @ (x * (weight * p * (1 - p))[:, None]) + penalty, gradient)
  return x @ w


class TestDensityRatios:

  def test_are_the_odds_of_a_balanced_regression_within_bounds(self):
    rng = np.random.default_rng(0)
    y = (rng.random(60) < 0.25).astype(float)
    x = rng.normal(size=(60, 3)) + y[:, None] * np.array([1.0, -0.5, 0.0])
    wanted = np.exp(by_newton(x, y))
    assert wanted.min() < 0.5 and wanted.max() > 2
    np.testing.assert_allclose(density_ratio.density_ratios(x, y, 1e-6, 1e6), wanted, rtol=2e-3)
    np.testing.assert_allclose(density_ratio.density_ratios(x, y, 0.5, 2.0), np.clip(wanted, 0.5, 2.0), rtol=2e-3)


class TestMain:

  def write(self, path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return f'--input=jsonl:{path}'

  def test_adds_a_column_by_which_prompts_of_one_kind_weigh_more(self, tmp_path, capsys):
    kinds = ('Once upon a time there was a cat named Tim', 'The big dog ran away from the red house')
    records = [
        {'prompt': f'{kinds[i % 2]} {"very " * (i % 5)}', 'completion': ' x', 'label': i % 2 == 0 or i % 8 == 1}
        for i in range(40)
    ]
    given = self.write(tmp_path / 'in.jsonl', records)
    output = tmp_path / 'out.jsonl'
    assert density_ratio.main([given, f'--output={output}']) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in one.items() if k != 'density_ratio'} for one in found] == records
    ratios = np.array([one['density_ratio'] for one in found])
    assert ratios[0::2].min() > 2 * ratios[1::2].max()
    assert '40 records, ratios 0.5 to' in capsys.readouterr().out

  @pytest.mark.parametrize(
      'records,said',
      [
          ([{'prompt': 'a', 'completion': 'b'}], 'in.jsonl:1: a column is missing: wanted prompt'),
          ([{'prompt': 'a', 'completion': 'b', 'label': True}], 'all responses have the same label'),
      ],
  )
  def test_says_what_is_wrong_and_writes_nothing(self, tmp_path, capsys, records, said):
    given = self.write(tmp_path / 'in.jsonl', records)
    assert density_ratio.main([given, f'--output={tmp_path / "out.jsonl"}']) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'out.jsonl').exists()
