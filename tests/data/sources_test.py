"""Tests of where records come from."""

import datetime
import decimal
import gzip
import importlib.resources
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from jaxalign import types
from jaxalign.data import sources

_RECORDS = [{'prompt': f'é {i}', 'n': i, 'messages': [{'role': 'user', 'content': 'hi'}] * (i % 3)} for i in range(10)]


def _write_jsonl(path, lines):
  text = '\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines) + '\n'
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return f'jsonl:{path}'


def _all(source):
  return [source[i] for i in range(len(source))]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS set made with TFDS's own writer."""

  def __init__(self, name, version, data_dir, features, file_format='array_record'):
    self.name, self.VERSION, self._of = name, tfds.core.Version(version), features
    super().__init__(data_dir=data_dir, file_format=file_format)

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._of), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(0, 7), 'test': self._generate_examples(7, 10)}

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      yield i, {name: {**_RECORDS[i], 'version': str(self.VERSION)}[name] for name in self._of}


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  text = tfds.features.Text()
  features = {'prompt': text, 'n': np.int64, 'messages': tfds.features.Sequence({'role': text, 'content': text})}
  _Builder('chats', '1.2.0', folder, features).download_and_prepare()
  _Builder('chats', '1.10.0', folder, features | {'version': text}).download_and_prepare()
  (folder / 'configured' / 'small').mkdir(parents=True)
  (folder / 'chats' / '1.2.0').rename(folder / 'configured' / 'small' / '1.2.0')
  _Builder('chats', '1.2.0', folder, features).download_and_prepare()
  return str(folder)


class TestOpenSource:

  @pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
  def test_jsonl_gives_its_records_and_their_lines(self, tmp_path, name):
    source = sources.open_source(_write_jsonl(tmp_path / name, [_RECORDS[0], '', '   ', *_RECORDS[1:]]))
    assert _all(source) == _RECORDS
    assert [source.where(i) for i in (0, 1, 9)] == [f'{name}:1', f'{name}:4', f'{name}:12']

  def test_jsonl_reads_all_line_ends_a_byte_order_mark_and_a_last_line_without_end(self, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\xc2\x85\xe2\x80\xa8"}\n{"a": 3}')
    source = sources.open_source(f'jsonl:{path}')
    assert _all(source) == [{'a': 1}, {'a': '\x85\u2028'}, {'a': 3}]
    assert source.where(2) == 'a.jsonl:3'

  def test_an_empty_file_has_no_records(self, tmp_path):
    (tmp_path / 'a.jsonl').touch()
    assert len(sources.open_source(f'jsonl:{tmp_path / "a.jsonl"}')) == 0

  @pytest.mark.parametrize(
      ('line', 'message'),
      [
          ('{"a": 1', r"a\.jsonl:2: not valid JSON \(Expecting ',' delimiter at column 8\)"),
          ('{"a": }', r'a\.jsonl:2: not valid JSON \(Expecting value at column 7\)'),
          ('[1, 2]', r'a\.jsonl:2: not a JSON object but a list'),
          ('null', r'a\.jsonl:2: not a JSON object but a NoneType'),
          ('[' * 100_000, r'a\.jsonl:2: not valid JSON \('),
      ],
  )
  def test_a_bad_line_is_named_and_the_others_are_read(self, tmp_path, line, message):
    source = sources.open_source(_write_jsonl(tmp_path / 'a.jsonl', [{'a': 0}, line, {'a': 2}]))
    with pytest.raises(sources.BadRecord, match=message):
      source[1]
    assert (source[0], source[2]) == ({'a': 0}, {'a': 2})

  def test_a_line_that_is_not_utf8_is_named(self, tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(sources.BadRecord, match=r'a\.jsonl:1: not UTF-8'):
      sources.open_source(f'jsonl:{tmp_path / "a.jsonl"}')[0]

  def test_a_cut_gzip_file_is_refused(self, tmp_path):
    _write_jsonl(tmp_path / 'a.jsonl.gz', _RECORDS)
    whole = (tmp_path / 'a.jsonl.gz').read_bytes()
    for content in (whole[:-12], b'plain', b''):
      (tmp_path / 'b.jsonl.gz').write_bytes(content)
      with pytest.raises(types.RunError, match=r'b\.jsonl\.gz: not a whole gzip file'):
        sources.open_source(f'jsonl:{tmp_path / "b.jsonl.gz"}')

  def test_parquet_gives_its_records_as_python_values(self, tmp_path):
    pq.write_table(pa.Table.from_pylist(_RECORDS), tmp_path / 'a.parquet', row_group_size=3)
    source = sources.open_source(f'parquet:{tmp_path / "a.parquet"}')
    assert _all(source) == _RECORDS
    assert source.where(4) == 'a.parquet[4]'

  def test_a_file_that_is_not_parquet_is_refused(self, tmp_path):
    for content in (b'', b'PAR1 or not'):
      (tmp_path / 'a.parquet').write_bytes(content)
      with pytest.raises(types.RunError, match=r'a\.parquet: not a readable Parquet file'):
        sources.open_source(f'parquet:{tmp_path / "a.parquet"}')

  def test_tfds_gives_its_records_as_python_values(self, tfds_dir):
    source = sources.open_source('tfds:chats:1.2.0', tfds_dir)
    assert _all(source) == _RECORDS[:7]
    assert source.where(3) == 'chats/train[3]'

  def test_tfds_takes_a_split_and_the_newest_version(self, tfds_dir):
    assert _all(sources.open_source('tfds:chats:test', tfds_dir)) == [r | {'version': '1.10.0'} for r in _RECORDS[7:]]

  def test_tfds_takes_a_configuration_version_and_split(self, tfds_dir):
    assert _all(sources.open_source('tfds:configured/small:1.2.0:test', tfds_dir)) == _RECORDS[7:]

  @pytest.mark.parametrize(
      ('spec', 'message'),
      [
          ('tfds:nothing', r'no such set in --data_dir=.*chats:1\.10\.0, chats:1\.2\.0, configured/small:1\.2\.0'),
          ('tfds:configured', 'no such set .*configured/small'),
          ('tfds:chats:3.0.0', 'no such set'),
          ('tfds:chats:dev', "no split 'dev'; there is test, train"),
          ('tfds:a b', 'write tfds:NAME'),
      ],
  )
  def test_a_tfds_set_that_is_not_there_is_answered_with_those_that_are(self, tfds_dir, spec, message):
    with pytest.raises(types.UsageError, match=message):
      sources.open_source(spec, tfds_dir)

  def test_a_tfds_set_that_needs_tensorflow_is_refused(self, tmp_path, tfds_dir):
    info = json.loads(open(f'{tfds_dir}/chats/1.2.0/dataset_info.json').read())
    folder = tmp_path / 'old' / '1.0.0'
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
    (folder / 'features.json').write_bytes(open(f'{tfds_dir}/chats/1.2.0/features.json', 'rb').read())
    with pytest.raises(types.RunError, match='tfrecord, which only TensorFlow reads'):
      sources.open_source('tfds:old', str(tmp_path))

  def test_a_tfds_set_without_its_files_is_refused(self, tmp_path, tfds_dir):
    folder = tmp_path / 'chats' / '1.2.0'
    folder.mkdir(parents=True)
    for name in ('dataset_info.json', 'features.json'):
      (folder / name).write_bytes(open(f'{tfds_dir}/chats/1.2.0/{name}', 'rb').read())
    with pytest.raises((types.RunError, types.UsageError), match='chats'):
      sources.open_source('tfds:chats', str(tmp_path))
    (folder / 'features.json').write_text('{')
    with pytest.raises(types.RunError, match='not a readable TFDS set'):
      sources.open_source('tfds:chats', str(tmp_path))

  def test_builtin_sets_are_found_by_name_and_split(self):
    folder = importlib.resources.files('jaxalign') / 'assets'
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith('.jsonl.gz'))
    if not names:
      pytest.skip('the package holds no data yet')
    name, split = names[0].removesuffix('.jsonl.gz').rsplit('-', 1)
    source = sources.open_source(f'builtin:{name}:{split}')
    lines = gzip.decompress((folder / names[0]).read_bytes()).decode().splitlines()
    assert len(source) == len(lines) and source[0] == json.loads(lines[0])

  def test_an_unknown_builtin_is_answered_with_those_there_are(self):
    with pytest.raises(types.UsageError, match="data 'builtin:nope': unknown; there is "):
      sources.open_source('builtin:nope')

  @pytest.mark.parametrize('spec', ['x.csv', 'csv:x.csv', 'jsonl:', 'jsonl', '', 'jsonl:[3:]'])
  def test_a_spec_of_another_form_is_refused(self, spec):
    with pytest.raises(types.UsageError, match=r'write jsonl:\.\.\., parquet:\.\.\., tfds:\.\.\. or builtin:\.\.\.$'):
      sources.open_source(spec)

  @pytest.mark.parametrize('file,meant', [('x.jsonl', 'jsonl:'), ('a/x.jsonl.gz', 'jsonl:'), ('x.parquet', 'parquet:')])
  def test_a_file_alone_is_answered_with_its_spec(self, file, meant):
    with pytest.raises(types.UsageError, match=f'; did you mean {meant}{file}\\?$'):
      sources.open_source(file)

  @pytest.mark.parametrize('scheme', ['jsonl', 'parquet'])
  def test_a_missing_file_is_named(self, tmp_path, scheme):
    with pytest.raises(types.UsageError, match=f'there is no file {tmp_path}/none'):
      sources.open_source(f'{scheme}:{tmp_path}/none')

  def test_a_folder_is_not_a_file(self, tmp_path):
    with pytest.raises(types.RunError, match='cannot read .*directory'):
      sources.open_source(f'jsonl:{tmp_path}')

  @pytest.mark.parametrize(
      ('bounds', 'expected'),
      [
          ('[3:]', range(3, 10)),
          ('[:3]', range(3)),
          ('[2:5]', range(2, 5)),
          ('[-2:]', range(8, 10)),
          ('[:-7]', range(3)),
          ('[:90%]', range(9)),
          ('[90%:]', range(9, 10)),
          ('[25%:-1]', range(2, 9)),
          ('[5:99]', range(5, 10)),
          ('[:]', range(10)),
      ],
  )
  def test_a_slice_takes_a_part_and_keeps_its_places(self, tmp_path, bounds, expected):
    source = sources.open_source(_write_jsonl(tmp_path / 'a.jsonl', _RECORDS) + bounds)
    assert [record['n'] for record in _all(source)] == list(expected)
    assert source.where(0) == f'a.jsonl:{expected[0] + 1}'
    assert [source.at(place)['n'] for place in source.places] == list(expected)

  def test_tfds_takes_a_slice_too(self, tfds_dir):
    assert _all(sources.open_source('tfds:chats:1.2.0:train[2:4]', tfds_dir)) == _RECORDS[2:4]

  def test_an_empty_slice_is_refused(self, tmp_path):
    with pytest.raises(types.UsageError, match='the slice is empty; the source has 10 records'):
      sources.open_source(_write_jsonl(tmp_path / 'a.jsonl', _RECORDS) + '[10:]')

  def test_fingerprints_follow_content_and_slice_but_not_the_name(self, tmp_path):
    prints = [
        sources.open_source(_write_jsonl(tmp_path / 'a.jsonl', _RECORDS)).fingerprint,
        sources.open_source(_write_jsonl(tmp_path / 'b.jsonl', _RECORDS)).fingerprint,
        sources.open_source(_write_jsonl(tmp_path / 'c.jsonl', _RECORDS[1:])).fingerprint,
        sources.open_source(f'jsonl:{tmp_path / "a.jsonl"}[1:]').fingerprint,
        sources.open_source(f'jsonl:{tmp_path / "a.jsonl"}[2:]').fingerprint,
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


class TestParseMixture:

  @pytest.mark.parametrize(
      ('text', 'expected'),
      [
          ('jsonl:a.jsonl', [('jsonl:a.jsonl', 1.0)]),
          ('jsonl:a.jsonl:0.7,jsonl:b.jsonl:0.3', [('jsonl:a.jsonl', 0.7), ('jsonl:b.jsonl', 0.3)]),
          (
              'builtin:x:test:2, tfds:y/z:1.0.0:train[1:2]:.5',
              [('builtin:x:test', 2.0), ('tfds:y/z:1.0.0:train[1:2]', 0.5)],
          ),
          ('builtin:x,builtin:y:test', [('builtin:x', 1.0), ('builtin:y:test', 1.0)]),
          ('tfds:y:1.0.0', [('tfds:y:1.0.0', 1.0)]),
          ('jsonl:7', [('jsonl:7', 1.0)]),
          ('jsonl:a[3:]', [('jsonl:a[3:]', 1.0)]),
          ('jsonl:a:1e-3,jsonl:b:1', [('jsonl:a', 0.001), ('jsonl:b', 1.0)]),
      ],
  )
  def test_a_number_at_the_end_is_the_weight(self, text, expected):
    assert sources.parse_mixture(text) == expected

  @pytest.mark.parametrize('weight', ['0', '-1', 'nan', 'inf'])
  def test_a_weight_must_be_positive(self, weight):
    with pytest.raises(types.UsageError, match='the weight of jsonl:b is .* must be positive'):
      sources.parse_mixture(f'jsonl:a:1,jsonl:b:{weight}')

  def test_weights_are_given_to_all_or_none(self):
    with pytest.raises(types.UsageError, match='give every source a weight, or none'):
      sources.parse_mixture('jsonl:a:0.5,jsonl:b')

  @pytest.mark.parametrize('text', ['', ' , '])
  def test_nothing_is_refused(self, text):
    with pytest.raises(types.UsageError, match='no data'):
      sources.parse_mixture(text)


class TestParseAll:

  def test_is_the_specs(self):
    assert sources.parse_all('builtin:x,jsonl:a.jsonl[3:]') == ['builtin:x', 'jsonl:a.jsonl[3:]']
    assert sources.parse_all('jsonl:a:1,jsonl:b:1') == ['jsonl:a', 'jsonl:b']

  @pytest.mark.parametrize('text', ['jsonl:a:0.7,jsonl:b:0.3', 'jsonl:a:2'])
  def test_refuses_weights(self, text):
    with pytest.raises(types.UsageError, match='every record is read once, so leave out the weight .* of jsonl:a'):
      sources.parse_all(text)


class TestToJson:

  def test_is_the_record_where_it_can_be(self):
    record = {'text': 'é\n\ud800', 'n': None, 'list': [{'a': 1.5}]}
    assert json.loads(sources.to_json(record)) == record

  def test_makes_text_of_what_parquet_has_besides(self, tmp_path):
    record = {
        'at': datetime.datetime(2024, 5, 6, 7, 8),
        'price': decimal.Decimal('1.50'),
        'raw': b'a\xff',
        'took': datetime.timedelta(seconds=2),
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / 'a.parquet')
    (found,) = _all(sources.open_source(f'parquet:{tmp_path / "a.parquet"}'))
    assert json.loads(sources.to_json(found)) == {
        'at': '2024-05-06T07:08:00',
        'price': '1.50',
        'raw': 'a\\xff',
        'took': '0:00:02',
    }
