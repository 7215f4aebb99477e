"""The comparison of methods, at the size of two short runs."""

import json

import pytest

from tools import frontier


class TestMain:

  def test_compares_what_methods_reached(self, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, '_NEW_TOKENS', 8)
    monkeypatch.setattr(frontier, '_PER_PROMPT', 1)
    small = '--gin=loader.Packing.rows=8', '--gin=loader.Packing.groups_per_step=6', "--gin=recipe.Recipe.eval_data=''"
    args = '--algos=dpo,simpo', '--steps=2', f'--output={tmp_path}', '--gin=optim.constant.lr=0.01', *small
    assert frontier.main(args) == 0
    found = json.loads((tmp_path / 'frontier.json').read_text())
    assert set(found) == {'(before)', 'dpo', 'simpo'}
    # The sampler and the scorer are two programs.
    assert found['(before)']['kl'] == pytest.approx(0, abs=1e-3)
    assert found['dpo']['kl'] > 1e-3 and found['simpo']['kl'] > 1e-3
    table = (tmp_path / 'frontier.md').read_text()
    assert '| `dpo` |' in table and '| `(before)` |' in table
    before = (tmp_path / 'dpo' / 'summary.json').stat().st_mtime_ns
    assert frontier.main(args) == 0
    assert (tmp_path / 'dpo' / 'summary.json').stat().st_mtime_ns == before
