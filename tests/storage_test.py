"""Paths in buckets: files, copies of them, files that grow, and whole runs, on a fake of Google Cloud Storage."""

import gzip
import importlib
import importlib.util
import io
import json
import pathlib
import re
import shutil
import signal
import time

import fsspec
import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import metrics
from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.data import sources
from jaxalign.rewards import functions
from tests import fake_gcs
from tests import runs
from tools import rollouts


@pytest.fixture(scope='module')
def env():
  with fake_gcs.serving() as env, pytest.MonkeyPatch.context() as patch:
    for name, value in env.items():
      patch.setenv(name, value)
    yield env


@pytest.fixture
def bucket(env, request):
  """A folder of the test's own, in a bucket."""
  return storage.path(f'gs://bucket/{request.node.name.replace("[", "-").strip("]")}')


class TestPath:

  def test_is_of_a_disk_or_a_bucket(self):
    assert storage.path('runs/a') == pathlib.Path('runs/a')
    assert storage.absolute('runs/a') == pathlib.Path.cwd() / 'runs' / 'a'
    for found in (storage.path('gs://bucket/runs/a/'), storage.absolute('gs://bucket/runs/a')):
      assert str(found / 'b') == 'gs://bucket/runs/a/b'
    assert storage.is_remote('gs://b/a') and storage.is_remote(found) and not storage.is_remote(pathlib.Path('gs'))

  def test_sees_what_others_write(self, bucket):
    storage.write_text(bucket / 'a', '')
    names = lambda: {path.name for path in bucket.iterdir()}
    assert names() == {'a'}
    fsspec.filesystem('gcs', skip_instance_cache=True).pipe(str(bucket / 'b'), b'')
    assert names() == {'a', 'b'} and (bucket / 'b').exists()

  @pytest.mark.parametrize('text', ['s3://bucket/a', 'https://a.b/c', 'gs://', 'gs:///a', 'gs://B/a', 'gs://ab'])
  def test_refuses_other_urls(self, text):
    with pytest.raises(types.UsageError, match=f'^{text}: write gs://BUCKET/NAME'):
      storage.path(text)

  def test_says_what_to_install(self, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'gcsfs' else found(name))
    with pytest.raises(types.UsageError, match=r'^gs://bucket/a: .*pip install "jaxalign\[gcs\]"'):
      storage.path('gs://bucket/a')


class TestOnDisk:

  @pytest.mark.parametrize(
      'tool', ['convert_data', 'convert_hf', 'density_ratio', 'ensemble', 'frontier', 'merge', 'plan']
  )
  def test_has_tools_refuse_buckets_by_the_name_of_the_flag(self, tool, capsys):
    with pytest.raises(SystemExit) as ended:
      importlib.import_module(f'tools.{tool}').main(['--output=gs://bucket/out'])
    assert ended.value.code == 2
    assert 'argument --output: gs://bucket/out: give a path on a disk' in capsys.readouterr().err


class TestWriteText:

  @pytest.mark.parametrize('is_remote', [False, True])
  def test_writes_the_whole_of_it_and_nothing_beside_it(self, is_remote, bucket, tmp_path):
    folder = bucket if is_remote else tmp_path
    for text in ('an older one', 'grüße\n'):
      storage.write_text(folder / 'new' / 'a.txt', text)
      assert (folder / 'new' / 'a.txt').read_bytes() == text.encode()
    assert [path.name for path in (folder / 'new').iterdir()] == ['a.txt']


class TestLocal:

  def test_is_the_file_itself_on_a_disk(self, tmp_path):
    assert storage.local(tmp_path / 'not there') == tmp_path / 'not there'

  def test_copies_each_generation_of_an_object_once(self, bucket, monkeypatch):
    copied, (files, _) = [], fsspec.core.url_to_fs(str(bucket))
    get = files.get_file
    monkeypatch.setattr(files, 'get_file', lambda name, path: copied.append(name) or get(name, path))
    for text in ('one', 'two'):
      storage.write_text(bucket / 'a.txt', text)
      first, second = (storage.local(bucket / 'a.txt') for _ in range(2))
      assert first == second and first.name == 'a.txt' and first.read_text() == text
    assert len(copied) == 2
    assert {path.name for path in first.parents[1].rglob('*') if path.is_file()} == {'a.txt'}

  def test_leaves_nothing_of_a_copy_that_is_not_whole(self, bucket, monkeypatch):
    storage.write_text(bucket / 'a.txt', 'text')
    files, _ = fsspec.core.url_to_fs(str(bucket))
    monkeypatch.setattr(files, 'get_file', lambda _, path: pathlib.Path(path).write_text('te'))
    with pytest.raises(types.RunError, match='a.txt: cannot be copied to .*: 2 of 4 bytes came'):
      storage.local(bucket / 'a.txt')
    assert not [path for path in storage.cache_dir().rglob('*') if path.is_file()]

  def test_is_of_one_object_that_is_there(self, bucket):
    storage.write_text(bucket / 'a' / 'b', '')
    with pytest.raises(FileNotFoundError):
      storage.local(bucket / 'c')
    with pytest.raises(IsADirectoryError, match='a is a folder'):
      storage.local(bucket / 'a')


class TestNaming:

  def test_tells_what_and_why_in_one_line(self, env):
    with pytest.raises(types.UsageError, match='^--flag: there is no such bucket or object$'):
      with storage.naming('--flag'):
        storage.path('gs://nobucket/a').read_text()
    with pytest.raises(types.RunError, match=f'^--flag: Forbidden: .*{fake_gcs.DENIED}$'):
      with storage.naming('--flag'):
        storage.path('gs://private/a').exists()


class TestGrowing:

  def test_begins_with_what_is_there_and_sends_what_has_grown(self, bucket):
    storage.write_text(bucket / 'a.txt', 'one ')
    grown = storage.Growing(bucket, 'a.txt', 'b.txt')
    with (grown.folder / 'a.txt').open('a') as file:
      file.write('two')
    (grown.folder / 'c').mkdir()
    (grown.folder / 'c' / 'd.txt').write_text('new')
    assert (bucket / 'a.txt').read_text() == 'one '
    grown.send()
    assert ((bucket / 'a.txt').read_text(), (bucket / 'c' / 'd.txt').read_text()) == ('one two', 'new')
    assert not grown.is_due(60) and grown.is_due(0)
    before = fake_gcs.generations(bucket / 'c')
    (grown.folder / 'a.txt').write_text('cut')
    grown.close()
    assert ((bucket / 'a.txt').read_text(), fake_gcs.generations(bucket / 'c')) == ('cut', before)
    assert not grown.folder.exists()

  def test_is_the_folder_itself_on_a_disk(self, tmp_path):
    grown = storage.Growing(tmp_path, 'a')
    grown.close()
    assert grown.folder == tmp_path and tmp_path.exists() and not grown.is_due(0)


class TestWriter:

  def test_keeps_metrics_in_a_bucket(self, bucket):
    storage.write_text(bucket / 'metrics.jsonl', '{"step": 4}\n{"step": 5}\n{"step": 6}\n')
    writer = metrics.Writer(bucket, 5)
    sent = lambda: [json.loads(line) for line in (bucket / 'metrics.jsonl').read_text().splitlines()]
    writer.write(6, {'loss': 1.0})
    writer.write(7, {'loss': 2.0})
    assert sent() == [{'step': 4}, {'step': 5}, {'step': 6, 'loss': 1.0}]  # The next is sent in a minute.
    writer.flush()
    assert sent()[-1] == {'step': 7, 'loss': 2.0}
    (events,) = (bucket / 'tensorboard').iterdir()
    for _ in range(100):  # A thread of TensorBoard's writes them.
      writer.flush()
      if events.read_bytes().count(b'loss') == 2:
        break
      time.sleep(0.05)
    assert events.read_bytes().count(b'loss') == 2
    writer.write(8, {'loss': 3.0})
    writer.close()
    assert sent()[-1] == {'step': 8, 'loss': 3.0}
    assert events.read_bytes().count(b'loss') == 3

  def test_goes_on_where_a_bucket_cannot_be_reached_for_a_while(self, bucket, caplog, monkeypatch):
    def fail(*_):
      raise OSError('no route to it')

    writer = metrics.Writer(bucket, 0)
    with monkeypatch.context() as patch:
      patch.setattr(storage.Growing, 'send', fail)
      writer.write(1, {'loss': 1.0})
      assert 'tried again: no route to it' in caplog.text
      with pytest.raises(types.RunError, match='metrics could not be written: no route to it'):
        writer.flush()
    writer.close()
    assert json.loads((bucket / 'metrics.jsonl').read_text()) == {'step': 1, 'loss': 1.0}


class TestSources:

  def test_reads_records_of_a_bucket(self, bucket):
    records = [{'text': f'{i}'} for i in range(5)]
    lines = ''.join(json.dumps(record) + '\n' for record in records).encode()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), table)
    for name, content in {'a.jsonl': lines, 'a.jsonl.gz': gzip.compress(lines), 'a.parquet': table.getvalue()}.items():
      (bucket / name).write_bytes(content)
      source = sources.open_source(f'{name.split(".")[1]}:{bucket / name}[1:]')
      assert [source[i] for i in range(len(source))] == records[1:]
    assert source.where(0) == 'a.parquet[1]'
    assert sources.parse_mixture(f'jsonl:{bucket}/a.jsonl:0.7,jsonl:{bucket}/b.jsonl:0.3') == [
        (f'jsonl:{bucket}/a.jsonl', 0.7),
        (f'jsonl:{bucket}/b.jsonl', 0.3),
    ]

  def test_names_what_cannot_be_read(self, env):
    with pytest.raises(types.UsageError, match="data 'jsonl:gs://bucket/no': there is no file gs://bucket/no"):
      sources.open_source('jsonl:gs://bucket/no')
    with pytest.raises(types.RunError, match=f'cannot read gs://private/no: Forbidden: .*{fake_gcs.DENIED}'):
      sources.open_source('jsonl:gs://private/no')


class TestRewards:

  def test_are_models_of_a_bucket_too(self, bucket):
    for name in ('a', 'b'):
      storage.write_text(bucket / name / 'config.json', '{}')
    one = functions.parse(f'{bucket}/a(beta=0.5):2')
    assert (one.directories, one.weight, one.beta, one.title) == ((f'{bucket}/a',), 2.0, 0.5, 'a')
    assert functions.parse(f'{bucket}/a+{bucket}/b').directories == (f'{bucket}/a', f'{bucket}/b')
    with pytest.raises(types.UsageError, match=f'there is no directory {bucket}/c'):
      functions.parse(f'{bucket}/a+{bucket}/c:0.5')


# A run that is killed while it saves step 4: Orbax marks what is whole at the very end.
KILLED = """
import os, signal
from jaxalign import checkpoint, main
real = checkpoint.Store.save
def save(self, state, step, *rest):
  real(self, state, step, *rest)
  self.wait()
  if step == 4:
    (self._directory / '4' / 'commit_success.txt').unlink()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Store.save = save
main.run()
"""


def flags(folder, workdir, tmp_path, *more):
  """Of a run with the model and the data in a folder."""
  return [
      'jaxalign',
      '--algo=sft',
      f'--model={folder / "stories"}',
      f'--data=jsonl:{folder / "train.jsonl.gz"}',
      f'--eval_data=parquet:{folder / "test.parquet"}',
      f'--workdir={workdir}',
      f'--cache_dir={tmp_path / "cache"}',
      '--steps=6',
      '--save_every=2',
      '--log_every=1',
      '--gin=loader.Packing.rows = 8',
      '--gin=loader.Packing.row_length = 64',
      '--gin=train.train.samples = None',
      *more,
  ]


@pytest.fixture
def inputs(tmp_path):
  """A folder with what a run reads."""
  folder = tmp_path / 'inputs'
  folder.mkdir()
  shutil.copytree(recipe.asset('stories260K'), folder / 'stories')
  records = [{'prompt': f'Story {i}:', 'completion': f' {i} cats and {2 * i} dogs.'} for i in range(40)]
  with gzip.open(folder / 'train.jsonl.gz', 'wt') as file:
    file.writelines(json.dumps(record) + '\n' for record in records[:32])
  pq.write_table(pa.Table.from_pylist(records[32:]), folder / 'test.parquet')
  return folder


class TestRuns:

  def test_go_on_in_a_bucket_as_on_a_disk(self, inputs, bucket, tmp_path, capsys, caplog):
    assert main.main(flags(inputs, tmp_path / 'run', tmp_path)) == 0
    fake_gcs.put(inputs, bucket)
    args = flags(bucket, bucket / 'run', tmp_path)
    killed = runs.spawn(args, devices=8, program=('-c', KILLED))
    code, said = runs.finished(killed)
    assert code == -signal.SIGKILL, said
    assert set(runs.logged(bucket / 'run')) == {1, 2, 3, 4}
    assert checkpoint.find(bucket / 'run') == (bucket / 'run' / 'checkpoints', 2)
    capsys.readouterr()
    assert main.main(args) == 0
    summary = json.loads(capsys.readouterr().out)
    assert f'resuming at step 2 from {bucket / "run"}' in caplog.text
    on_disk, found = (
        [{**line, 'compilations': 0} for line in runs.logged(folder / 'run').values()] for folder in (tmp_path, bucket)
    )
    assert found == on_disk
    runs.assert_same(runs.params_of(bucket / 'run'), runs.params_of(tmp_path / 'run'))
    files = {path.relative_to(tmp_path / 'run').as_posix() for path in (tmp_path / 'run').iterdir()}
    assert {path.name for path in (bucket / 'run').iterdir()} == files
    assert {path.name for path in (bucket / 'run' / 'checkpoints').iterdir() if path.name.isdigit()} == {'4', '6'}
    # TensorBoard has what both processes wrote.
    assert len(list((bucket / 'run' / 'tensorboard').iterdir())) == 2

    before = fake_gcs.generations(bucket)
    assert main.main(args) == 0
    assert f'{bucket / "run"} is finished: 6 steps' in caplog.text
    assert json.loads(capsys.readouterr().out) == summary and fake_gcs.generations(bucket) == before

    assert main.main(['jaxalign', '--mode=eval', f'--checkpoint={bucket / "run"}', f'--cache_dir={tmp_path}']) == 0
    assert json.loads(capsys.readouterr().out)['eval/loss'] == summary['eval/loss']
    assert recipe.run_of(f'{bucket / "run"}')['algo'] == 'sft'
    assert (
        recipe.load_tokenizer(f'{bucket / "run"}').fingerprint == recipe.load_tokenizer(f'{inputs}/stories').fingerprint
    )

  def test_may_be_copied_into_a_bucket_and_back(self, bucket, tmp_path):
    mesh = sharding.make_mesh('', devices=jax.devices()[:1])
    loaded = recipe.load(str(recipe.asset('stories260K')), mesh)
    checkpoint.save_imported(tmp_path / 'a', loaded.params, loaded.model, None, loaded.tokenizer)
    fake_gcs.put(tmp_path / 'a', bucket)
    assert checkpoint.find(bucket) == (bucket, 0)
    runs.assert_same(recipe.load(str(bucket), mesh).params, loaded.params)
    fsspec.filesystem('gcs').get(f'{bucket}/', f'{tmp_path / "b"}/', recursive=True)
    runs.assert_same(recipe.load(str(tmp_path / 'b'), mesh).params, loaded.params)

  def test_of_what_is_sampled_go_on_in_the_midst_of_a_rollout(self, bucket, tmp_path, capsys):
    for steps in (1, 2):
      args = [
          'jaxalign',
          '--algo=grpo',
          f'--workdir={bucket / "run"}',
          f'--cache_dir={tmp_path / "cache"}',
          f'--steps={steps}',
          '--log_every=1',
          '--mesh=data:8',
          '--reward=tests.runs:vowels',
          '--gin=train.train.samples = None',
          '--gin=loader.Packing.row_length = 96',
          '--gin=loader.Packing.rows = 8',
          *(f'--gin=rollouts.Options.{one} = {n}' for one, n in {'prompts': 4, 'samples': 2, 'minibatches': 2}.items()),
          '--gin=rollouts.Options.max_new_tokens = 8',
      ]
      assert main.main(args) == 0, capsys.readouterr().err
      assert list(runs.logged(bucket / 'run')) == [1, 2][:steps]
    assert [path.name for path in (bucket / 'run' / 'rollouts').iterdir()] == ['000000.jsonl']
    capsys.readouterr()
    assert rollouts.main([f'{bucket / "run"}']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # a head, and one rollout

  @pytest.mark.parametrize(
      'flag, code, said',
      [
          ('--workdir=gs://nobucket/a', 2, '--workdir=gs://nobucket/a: there is no such bucket or object'),
          ('--workdir=gs://private/a', 1, f'--workdir=gs://private/a: Forbidden: [^ ]+ {fake_gcs.DENIED}'),
          ('--model=gs://bucket/none', 2, 'gs://bucket/none: no such file or directory .*'),
          ('--model=gs://private/none', 1, f'gs://private/none: Forbidden: [^ ]+ {fake_gcs.DENIED}'),
          ('--tokenizer=gs://bucket/none', 2, 'gs://bucket/none: no such file or directory .*'),
          ('--data=jsonl:gs://bucket/none', 2, "data 'jsonl:gs://bucket/none': there is no file gs://bucket/none"),
          ('--cache_dir=gs://bucket/a', 2, '--cache_dir=gs://bucket/a: .*'),
          ('--data=tfds:a --data_dir=gs://bucket/a', 2, '.*--data_dir=gs://bucket/a: .*'),
          ('--mode=eval --checkpoint=gs://bucket/a', 2, '--checkpoint=gs://bucket/a: no checkpoint there .*'),
          ('--mode=eval --checkpoint=gs://private/a', 1, '--checkpoint=gs://private/a: Forbidden: .*'),
      ],
  )
  def test_name_in_one_line_what_they_cannot_read_or_write(self, flag, code, said, env, tmp_path, capsys):
    args = ['jaxalign', *flag.split()]
    if '--mode=' not in flag:
      args[1:1] = ['--algo=sft', f'--workdir={tmp_path / "run"}']
    assert main.main(args) == code
    assert re.fullmatch(f'jaxalign: {said}\n', capsys.readouterr().err)
