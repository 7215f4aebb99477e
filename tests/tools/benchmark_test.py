"""tools/benchmark.py on a tiny model."""

import importlib.util
import json
import pathlib

import pytest

from jaxalign.data import tokenizers

PATH = pathlib.Path(__file__).resolve().parents[2] / 'tools' / 'benchmark.py'


@pytest.fixture(scope='module')
def benchmark():
  spec = importlib.util.spec_from_file_location('benchmark', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


SMALL = ['--model=tiny', '--vocab_size=64', '--pairs=4', '--prompt_tokens=4', '--response_tokens=6', '--steps=5']


class TestMain:

  def test_prints_the_time_of_steps_on_the_pairs_asked_for(self, benchmark, capsys):
    assert benchmark.main([*SMALL, '--micro_batches=1', '--mesh=fsdp:8']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['timed_steps'] == 2
    assert found['median_step_s'] > 0
    assert found['tokens_per_s'] == pytest.approx(4 * 2 * 10 / found['median_step_s'])

  def test_wants_steps_to_time(self, benchmark):
    with pytest.raises(SystemExit) as stop:
      benchmark.main(['--steps=3'])
    assert stop.value.code == 2


class TestWritePairs:

  def test_gives_sequences_of_exactly_the_tokens_asked_for(self, benchmark, tmp_path):
    parser_args = type('Args', (), {'seed': 0, 'vocab_size': 64, 'pairs': 2, 'steps': 3, 'prompt_tokens': 4})
    parser_args.response_tokens = 6
    benchmark.write_tokenizer(tmp_path, 64)
    benchmark.write_pairs(tmp_path / 'pairs.jsonl', parser_args)
    tokenizer = tokenizers.load(tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'pairs.jsonl').read_text().splitlines()]
    assert len(records) == 6
    for record in records:
      assert len(tokenizer.encode(record['prompt'])) == 4
      assert len(tokenizer.encode(record['chosen'], continuation=True)) == 5  # and EOS
      assert record['chosen'] != record['rejected']
