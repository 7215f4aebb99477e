"""tools/benchmark.py on a tiny model, beside a peer that only prints."""

import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from jaxalign import recipe
from jaxalign.data import tokenizers
from tools import benchmark
from tools.peers import prepare

SMALL = ['--model=tiny', '--vocab_size=64', '--pairs=4', '--prompt_tokens=4', '--response_tokens=6', '--steps=2']
STUB = """
import json, sys
work = json.load(open(sys.argv[1]))
assert 'PYTHONPATH' not in __import__('os').environ
print('chatter')
print(json.dumps({'seconds': [1.0, 2.0 + work['seed'], 9.0], 'units': [10, 10, 10], 'peak_rss_bytes': 7}))
"""
OURS = """
import json, sys
work = json.load(open(sys.argv[1]))
print(json.dumps({'seconds': [0.5 / (1 + work['seed'])], 'units': [10], 'peak_rss_bytes': 7}))
"""
PREPARE = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
(path.parent / 'work.json').write_text(path.read_text())
"""


def asked(*flags):
  return vars(benchmark.parse([*SMALL, *flags]))


@pytest.fixture
def beside_stub(tmp_path, monkeypatch):
  """A folder of scripts that only print, and flags that choose a peer."""
  scripts = tmp_path / 'peers'
  scripts.mkdir()
  for name, text in (('prepare', PREPARE), ('run_jaxalign', OURS), ('run_trl', STUB)):
    (scripts / f'{name}.py').write_text(text)
  monkeypatch.setattr(benchmark, 'SCRIPTS', scripts)
  return scripts, ['--peer=trl', f'--peer_python={sys.executable}']


@pytest.fixture
def common():
  spec = importlib.util.spec_from_file_location('common', benchmark.SCRIPTS / 'common.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class TestMain:

  def test_runs_sides_in_turns_and_compares_them(self, beside_stub, capsys):
    assert benchmark.main([*SMALL, *beside_stub[1], '--repeats=2']) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    # Ten units in a median step of 2 s, and then of 3 s, as the seed goes up; of 0.5 s and 0.25 s.
    assert (found['trl']['max'], found['trl']['min']) == (5, pytest.approx(10 / 3))
    assert found['trl']['median'] == pytest.approx((5 + 10 / 3) / 2) and found['trl']['peak_rss_bytes'] == 7
    assert (found['jaxalign']['median'], found['jaxalign']['timed_steps']) == (30, [1, 1])
    assert found['ratio_of_medians'] == pytest.approx(30 * 2 / (5 + 10 / 3))
    assert (found['ratio']['min'], found['ratio']['max']) == (pytest.approx(20 / 5), pytest.approx(40 / (10 / 3)))
    assert 'of medians 7.2, of neighbours 8 (4 .. 12)' in printed.err and '2/2: jaxalign 40, trl 3.333' in printed.err

  def test_times_steps_by_jaxalign(self, capsys):
    assert benchmark.main([*SMALL, '--pairs=8', '--repeats=1', '--mesh=fsdp:8']) == 0
    ours = json.loads(capsys.readouterr().out)['jaxalign']
    assert ours['timed_steps'] == [2] and ours['host_ms_per_step'] > 0 and ours['input_ms_per_step'] >= 0
    assert ours['median'] * ours['median_step_s'] == pytest.approx(8 * 2 * 10)  # the tokens of a step
    assert ours['peak_rss_bytes'] > 2**27

  def test_counts_the_tokens_of_rollouts(self, capsys):
    flags = ['--work=rollouts', '--model=tiny', '--prompts=8', '--prompt_tokens=4', '--response_tokens=6']
    assert benchmark.main([*flags, '--steps=1', '--warm_up=1', '--repeats=1', '--mesh=fsdp:8']) == 0
    ours = json.loads(capsys.readouterr().out)['jaxalign']
    assert ours['median'] * ours['median_step_s'] == pytest.approx(8 * 6)

  def test_says_how_to_make_a_peer_and_which_works_it_has(self, capsys):
    assert benchmark.main([*SMALL, '--peer=tunix']) == 2
    assert 'pip install google-tunix==' in capsys.readouterr().err
    assert benchmark.main(['--work=sft', '--peer=tunix', f'--peer_python={sys.executable}']) == 2
    assert 'on dpo and hh' in capsys.readouterr().err

  @pytest.mark.parametrize(
      'name,text,code,said',
      [
          ('run_jaxalign', 'print({})', 1, 'run_jaxalign: it printed no JSON'),
          ('run_trl', 'raise ValueError("no luck")', 1, 'run_trl: ValueError: no luck'),
          ('prepare', 'import sys\nprint("--a=b: no", file=sys.stderr)\nsys.exit(2)', 2, 'prepare: --a=b: no'),
      ],
  )
  def test_says_in_a_line_what_failed(self, beside_stub, name, text, code, said, capsys):
    scripts, flags = beside_stub
    (scripts / f'{name}.py').write_text(text)
    assert benchmark.main([*SMALL, *flags, '--repeats=1']) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('benchmark: ')]
    assert said in line

  @pytest.mark.parametrize('count', ['0', 'x'])
  def test_wants_steps_to_time(self, count, capsys):
    with pytest.raises(SystemExit) as stop:
      benchmark.main([f'--steps={count}'])
    assert stop.value.code == 2
    assert f'--steps: {count}: it is a whole number, at least 1' in capsys.readouterr().err

  @pytest.mark.parametrize(
      'flags,said',
      [
          (['--work=sft', '--cached_reference'], '--cached_reference --work=sft: dpo and hh have a reference'),
          (['--peer_python=python'], '--peer_python=python needs --peer'),
          (['--start', '--peer=trl'], '--start --peer=trl: the first step of jaxalign alone is timed'),
      ],
  )
  def test_refuses_flags_that_would_do_nothing(self, flags, said, capsys):
    assert benchmark.main(flags) == 2
    assert capsys.readouterr().err == f'benchmark: {said}\n'


class TestRate:

  def test_is_of_the_median_step_or_of_all_where_they_differ(self):
    assert benchmark.rate([1.0, 2.0, 30.0], [8, 8, 8], True) == 4
    assert benchmark.rate([1.0, 2.0, 5.0], [8, 4, 12], False) == 3
    assert benchmark.rate([1.0, 2.0, 5.0], [8, 8, 8], False) == 3  # as many pairs, padded to other widths


class TestSpread:

  def test_is_that_of_numpy(self):
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    wanted = dict(
        zip(('min', 'quartile_1', 'median', 'quartile_3', 'max'), np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    )
    assert benchmark.spread(values) == pytest.approx(wanted)
    assert set(benchmark.spread([2.0]).values()) == {2.0}


class TestFirstStep:

  def test_waits_for_a_line_and_ends_the_command(self, tmp_path):
    path = tmp_path / 'metrics.jsonl'
    code = f'import time; time.sleep(0.2); open({str(path)!r}, "w").write("x"); time.sleep(600)'
    assert 0.2 <= benchmark.first_step([sys.executable, '-c', code], path) < 300

  @pytest.mark.parametrize('before', ['', 'open({path!r}, "a"); '])  # A run opens the file before its first step.
  def test_says_why_there_was_none(self, tmp_path, before):
    path = tmp_path / 'metrics.jsonl'
    code = before.format(path=str(path)) + 'raise SystemExit("oh")'
    with pytest.raises(benchmark.Failed, match='no step: SystemExit: oh|no step: oh'):
      benchmark.first_step([sys.executable, '-c', code], path)


class TestPrepare:

  def test_gives_sequences_of_exactly_the_tokens_asked_for(self, tmp_path):
    work = prepare.prepare(asked('--warm_up=1'), tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'data.jsonl').read_text().splitlines()]
    assert len(records) == 4 * (1 + 2 + 1)
    for record in records:
      assert len(tokenizer.encode(record['prompt'])) == 4
      assert len(tokenizer.encode(record['chosen'], continuation=True)) == 5  # and EOS
      assert record['chosen'] != record['rejected']
    assert work['widths'] == (4, 6)
    assert work['units_per_slot'] == pytest.approx(20 / (3 + 6 + 6))  # The prompt's last token begins each response.
    assert prepare.prepare(asked('--no-share_prompts'), tmp_path)['units_per_slot'] == pytest.approx(10 / 9)
    assert work['hf_config']['hidden_size'] > 0
    assert (work['dtype'], work['remat']) == ('float32', 'dots')

  def test_says_how_jaxalign_computes(self, tmp_path):
    work = prepare.prepare(
        asked('--work=rollouts', '--model=llama3_2_1b', "--gin=recipe.Recipe.remat = 'none'"), tmp_path
    )
    assert (work['dtype'], work['remat']) == ('bfloat16', 'none')
    assert work['hf_config']['rope_scaling']['factor'] == 32

  def test_wants_real_pairs_for_real_work(self, tmp_path, capsys):
    (tmp_path / 'asked.json').write_text(json.dumps(asked('--work=hh')))
    assert prepare.main(tmp_path / 'asked.json') == 2
    assert '--pairs_file=FILE' in capsys.readouterr().err

  @pytest.mark.parametrize('work', ['hh', 'sft'])
  def test_reads_real_pairs_as_they_are_trained_on(self, work, tmp_path):
    turns = lambda reply: f'\n\nHuman: Once upon a time\n\nAssistant:{reply}'
    pairs = [(' there was a cat', ' a dog ran home and slept'), (' yes', ' no'), (' same', ' same')]
    lines = [json.dumps({'chosen': turns(a), 'rejected': turns(b)}) for a, b in pairs]
    (tmp_path / 'pairs.jsonl').write_text('\n'.join(lines))
    flags = [f'--work={work}', f'--pairs_file={tmp_path / "pairs.jsonl"}', '--row_length=128', '--vocab_size=512']
    tokenizer = recipe.asset('stories260K')
    found = prepare.prepare(asked(*flags, f'--tokenizer={tokenizer}'), tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'data.jsonl').read_text().splitlines()]
    assert len(records) == 2  # Equal responses teach nothing.
    own, words = tokenizers.load(tokenizer), lambda text: len(text.split())
    wanted = sorted(len(own.encode(a, continuation=True)) for a, _ in pairs[:2])
    assert sorted(words(one['chosen' if work == 'hh' else 'completion']) for one in records) == wanted
    prompts = [words(one['prompt']) for one in records]
    if work == 'hh':
      slots = sum(words(one['prompt']) + words(one['chosen']) + words(one['rejected']) + 1 for one in records)
      assert found['units_per_slot'] == pytest.approx(2 / slots)
    else:
      slots = sum(prompts) + sum(words(one['completion']) for one in records)
      assert found['units_per_slot'] == pytest.approx((slots + 2) / slots)


class TestWidths:

  def test_leave_most_pairs_whole(self):
    random = np.random.default_rng(0)
    pairs = [([0] * random.integers(1, 400), [0] * random.integers(1, 90), [0]) for _ in range(200)]
    prompt, response = prepare.widths(pairs)
    whole = sum(len(p) <= prompt and len(c) + 1 <= response for p, c, _ in pairs)
    assert math.ceil(0.95 * 200) <= whole < 200


class TestCommon:

  def test_orders_texts_by_the_seed(self, common, tmp_path):
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(str, range(9))))
    orders = [common.records({'folder': tmp_path, 'seed': seed}) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(9))

  def test_reports_the_largest_memory_in_bytes(self, common, capsys):
    common.report([1.0], [2], note='x')
    found = json.loads(capsys.readouterr().out)
    (line,) = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]
    assert found['peak_rss_bytes'] == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
    assert (found['seconds'], found['units'], found['note']) == ([1.0], [2], 'x')
