"""Tests of the tool that makes TFDS sets."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign import types
from jaxalign.data import sources

_TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'prepare_data.py'
_RECORDS = [
    {
        'prompt': f'é {i}\n',
        'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': ''}][: i % 3],
        'tags': ['x'] * (i % 2),
        'numbers': list(range(i % 4)),
        'origin': {'page': i},
        'margin': i / 4,
        'count': -(2**40) * i,
        'good': i % 3 == 0,
    }
    for i in range(20)
]


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('prepare_data', _TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _jsonl(tmp_path, records):
  path = tmp_path / 'in.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return f'jsonl:{path}'


def _read(spec, folder):
  source = sources.open_source(spec, str(folder))
  return [source[i] for i in range(len(source))]


class TestPrepare:

  def test_what_is_read_is_what_was_written(self, tool, tmp_path):
    folder = tool.prepare(_jsonl(tmp_path, _RECORDS), str(tmp_path / 'out'), 'my_set', 0.0, 0)
    assert folder == f'{tmp_path}/out/my_set/1.0.0'
    assert _read('tfds:my_set', tmp_path / 'out') == _RECORDS

  def test_parquet_goes_the_same_way(self, tool, tmp_path):
    pq.write_table(pa.Table.from_pylist(_RECORDS), tmp_path / 'in.parquet')
    tool.prepare(f'parquet:{tmp_path}/in.parquet', str(tmp_path), 'my_set', 0.0, 0)
    assert _read('tfds:my_set', tmp_path) == _RECORDS

  def test_splits_share_the_records_in_their_order(self, tool, tmp_path):
    tool.prepare(_jsonl(tmp_path, _RECORDS), str(tmp_path), 'my_set', 0.25, 3)
    train, test = _read('tfds:my_set', tmp_path), _read('tfds:my_set:test', tmp_path)
    assert len(test) == 5
    assert sorted(train + test, key=lambda r: r['margin']) == _RECORDS
    for part in (train, test):
      assert part == sorted(part, key=lambda r: r['margin'])

  def test_splits_are_increasing_and_disjoint(self, tool):
    splits = tool.split(20, 0.25, 3)
    assert all((splits[name] == sorted(splits[name])).all() for name in ('train', 'test'))
    assert sorted([*splits['train'], *splits['test']]) == list(range(20))

  def test_another_seed_is_another_split(self, tool):
    assert tool.split(20, 0.25, 0)['test'].tolist() != tool.split(20, 0.25, 1)['test'].tolist()

  def test_whole_numbers_among_fractions_are_fractions(self, tool, tmp_path):
    tool.prepare(_jsonl(tmp_path, [{'x': 1}, {'x': 2.5}]), str(tmp_path), 'my_set', 0.0, 0)
    assert _read('tfds:my_set', tmp_path) == [{'x': 1.0}, {'x': 2.5}]

  @pytest.mark.parametrize(
      ('records', 'message'),
      [
          ([{'a': 'x', 'b': 'y'}, {'a': 'x'}], r"in\.jsonl:2: column 'b' has no value"),
          ([{'a': 'x'}, {'a': None}], r"in\.jsonl:2: column 'a' has no value"),
          ([{'a': 'x'}, {'a': 3}], r"column 'a' holds int and str \(see in\.jsonl:1 and in\.jsonl:2\)"),
          ([{'a': True}, {'a': 3}], r"column 'a' holds bool and int"),
          ([{'a': [{'role': 'x'}]}, {'a': [{'role': 1}]}], r"column 'a\[\]\.role' holds int and str"),
          ([{'a': [['x'], ['y']]}], "column 'a' holds lists of lists"),
          ([{'a': [{'b': ['x', 'y']}]}], "column 'a.*' holds lists"),
          ([{'a': 2**70}], "column 'a'.*64 bits"),
      ],
  )
  def test_what_tfds_cannot_hold_is_refused_by_place_and_leaves_nothing(self, tool, tmp_path, records, message):
    with pytest.raises(types.RunError, match=message):
      tool.prepare(_jsonl(tmp_path, records), str(tmp_path / 'out'), 'my_set', 0.0, 0)
    assert not (tmp_path / 'out').exists()

  @pytest.mark.parametrize('name', ['Capital', '1st', 'a-b', '', 'a/b'])
  def test_a_name_that_tfds_does_not_take_is_refused(self, tool, tmp_path, name):
    with pytest.raises(types.UsageError, match=f'--name={name}: write small letters'):
      tool.prepare(_jsonl(tmp_path, _RECORDS), str(tmp_path), name, 0.0, 0)

  def test_nothing_is_overwritten(self, tool, tmp_path):
    spec = _jsonl(tmp_path, _RECORDS)
    tool.prepare(spec, str(tmp_path), 'my_set', 0.0, 0)
    with pytest.raises(types.UsageError, match='my_set/1.0.0 exists'):
      tool.prepare(spec, str(tmp_path), 'my_set', 0.0, 0)

  @pytest.mark.parametrize('fraction', [0.01, 0.99, 1.0, -0.5, float('nan')])
  def test_a_split_must_not_be_empty(self, tool, tmp_path, fraction):
    with pytest.raises(types.UsageError, match='--test_fraction=.* of 20 records leaves a split empty'):
      tool.prepare(_jsonl(tmp_path, _RECORDS), str(tmp_path), 'my_set', fraction, 0)

  def test_no_records_are_an_error(self, tool, tmp_path):
    with pytest.raises(types.RunError, match='no records'):
      tool.prepare(_jsonl(tmp_path, []), str(tmp_path), 'my_set', 0.0, 0)


class TestMain:

  def test_runs_as_a_script_and_names_what_it_wrote(self, tmp_path):
    command = [sys.executable, _TOOL, f'--input={_jsonl(tmp_path, _RECORDS)}', f'--output_dir={tmp_path}', '--name=s']
    env = {'PYTHONPATH': str(_TOOL.parents[1]), 'PATH': ''}
    ran = subprocess.run([*command, '--test_fraction=0.1'], env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == f'wrote {tmp_path}/s/1.0.0; read it with --data=tfds:s --data_dir={tmp_path}'
    assert len(_read('tfds:s:test', tmp_path)) == 2

  def test_exits_with_2_for_flags_and_1_for_data(self, tool, tmp_path, capsys):
    arguments = [f'--output_dir={tmp_path}', '--name=s']
    assert tool.main([f'--input=jsonl:{tmp_path}/none', *arguments]) == 2
    assert tool.main([f'--input={_jsonl(tmp_path, [{"a": None}])}', *arguments]) == 1
    assert capsys.readouterr().err.count('\n') == 2
