"""Tests of the token cache."""

import concurrent.futures
import json
import logging
import pathlib
import resource
import types as pytypes

import gin
import numpy as np
import pytest

from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import examples

_RECORDS = [
    {'ids': [[1, 5, 6, 2], [1, 5, 7, 8, 2]], 'prompt': 2, 'margin': 0.5},
    {'ids': [[1, 9, 2], [1, 2]], 'prompt': 1, 'margin': 1.5},
    {'ids': [[1, 5, 6, 2], [1, 5, 6, 3]], 'prompt': 2, 'margin': 0.0},
]


def _folder(tmp_path) -> pathlib.Path:
  (folder,) = (tmp_path / 'cache').iterdir()
  return folder


def _assert_same_groups(data, records, example_of):
  for i, record in enumerate(records):
    expected, got = example_of(record), data[i]
    for a, b in zip(got.sequences, expected.sequences, strict=True):
      np.testing.assert_array_equal(a.ids, b.ids)
      np.testing.assert_array_equal(a.mask, b.mask)
      assert (a.ids.dtype, a.mask.dtype) == (np.int32, np.bool_)
    assert (dict(got.labels), got.truncated, got.prompt_tokens) == (
        dict(expected.labels),
        expected.truncated,
        expected.prompt_tokens,
    )


@pytest.fixture
def counting(build):
  """(build, calls): a build that counts the records it makes examples of."""
  calls = []

  def example_fn(record):
    calls.append(record)
    return _example_of(record)

  return lambda spec, **options: build(spec, **({'example_fn': example_fn} | options)), calls


def _example_of(record):
  sequences = [
      examples.Sequence(np.array(ids, np.int32), np.arange(len(ids)) >= record['prompt']) for ids in record['ids']
  ]
  return examples.Group(tuple(sequences), {'margin': record['margin']}, prompt_tokens=record['prompt'])


class TestBuild:

  def test_gives_back_the_groups_that_were_made(self, token_dataset):
    data = token_dataset(_RECORDS)
    assert (len(data), data.group_size, data.label_names) == (3, 2, ('margin',))
    _assert_same_groups(data, _RECORDS, _example_of)

  def test_keeps_the_labels_of_tokens(self, token_dataset):
    data = token_dataset([_RECORDS[0] | {'tokens': {'step': [[1, 0], [0, 1, 0.5]]}}])
    assert data.token_label_names == ('step',)
    assert [s.labels['step'].tolist() for s in data[0].sequences] == [[1, 0], [0, 1, 0.5]]

  def test_indexes_slots(self, token_dataset):
    data = token_dataset(_RECORDS)
    np.testing.assert_array_equal(data.lengths_NK, [[3, 4], [2, 1], [3, 3]])

  def test_keys_follow_ids_and_mask(self, token_dataset):
    same = token_dataset(_RECORDS).keys_NK
    assert same[0, 0] == same[2, 0] and len(np.unique(same)) == 5
    other_mask = token_dataset([_RECORDS[0] | {'prompt': 3}], 'b.jsonl').keys_NK
    assert not np.isin(other_mask, same).any()

  def test_counts_what_became_of_the_records(self, token_dataset, caplog):
    drops = [{'drop': 'equal responses'}, {'drop': 'empty'}, {'drop': 'equal responses'}]
    with caplog.at_level(logging.INFO, 'absl'):
      data = token_dataset([_RECORDS[0], *drops, _RECORDS[1] | {'truncated': True}])
    assert data.report == {
        'records': 5,
        'kept': 2,
        'truncated': 1,
        'bad': 0,
        'dropped': {
            'equal responses': {'count': 2, 'first': 'data.jsonl:2'},
            'empty': {'count': 1, 'first': 'data.jsonl:3'},
        },
    }
    assert [data.where(i) for i in range(2)] == ['data.jsonl:1', 'data.jsonl:5']
    assert '2 records dropped: equal responses (first data.jsonl:2)' in caplog.text

  def test_a_second_time_nothing_is_tokenised(self, counting, write_jsonl):
    run, calls = counting
    spec = write_jsonl(_RECORDS)
    first, second = run(spec), run(spec)
    assert len(calls) == 3
    assert first.fingerprint == second.fingerprint and first.report == second.report
    _assert_same_groups(second, _RECORDS, _example_of)

  @pytest.mark.parametrize(
      'options',
      [
          {'tokenizer': pytypes.SimpleNamespace(fingerprint='another')},
          {'key_parts': 'another'},
          {'skip_bad_records': True},
      ],
  )
  def test_another_tokenizer_or_function_is_another_cache(self, counting, write_jsonl, options):
    run, calls = counting
    spec = write_jsonl(_RECORDS)
    assert run(spec).fingerprint != run(spec, **options).fingerprint
    assert len(calls) == 6

  def test_other_records_are_another_cache(self, counting, write_jsonl):
    run, calls = counting
    run(write_jsonl(_RECORDS))
    data = run(write_jsonl([*_RECORDS[:2], _RECORDS[2] | {'margin': 9.0}]))
    assert len(calls) == 6 and data[2].labels['margin'] == 9.0

  @pytest.mark.parametrize('name', ['groups.arrayrecord', 'index.npz', 'meta.json'])
  @pytest.mark.parametrize('damage', ['missing', 'cut', 'empty', 'garbage'])
  def test_a_damaged_cache_is_built_again(self, counting, write_jsonl, tmp_path, name, damage):
    run, calls = counting
    spec = write_jsonl(_RECORDS)
    run(spec)
    path = _folder(tmp_path) / name
    whole = path.read_bytes()
    if damage == 'missing':
      path.unlink()
    else:
      path.write_bytes({'cut': whole[: len(whole) // 2], 'empty': b'', 'garbage': b'{"a": [1]}'}[damage])
    _assert_same_groups(run(spec), _RECORDS, _example_of)
    assert len(calls) == 6
    assert sorted(p.name for p in _folder(tmp_path).iterdir()) == ['groups.arrayrecord', 'index.npz', 'meta.json']
    run(spec)
    assert len(calls) == 6

  def test_an_index_damaged_within_is_built_again(self, counting, write_jsonl, tmp_path):
    run, calls = counting
    spec = write_jsonl(_RECORDS)
    run(spec)
    path = _folder(tmp_path) / 'index.npz'
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    np.testing.assert_array_equal(run(spec).lengths_NK, [[3, 4], [2, 1], [3, 3]])
    assert len(calls) == 6

  def test_a_cache_of_another_kind_of_json_is_built_again(self, counting, write_jsonl, tmp_path):
    run, calls = counting
    spec = write_jsonl(_RECORDS)
    run(spec)
    for meta in ([], {}, {'sizes': 3}, {'sizes': {}, 'report': {}}):
      (_folder(tmp_path) / 'meta.json').write_text(json.dumps(meta))
      assert len(run(spec)) == 3
    assert len(calls) == 15

  def test_many_builders_at_once_give_one_whole_cache(self, build, write_jsonl, tmp_path):
    spec = write_jsonl(_RECORDS * 20)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      built = list(pool.map(lambda _: build(spec), range(8)))
    for data in built:
      _assert_same_groups(data, _RECORDS * 20, _example_of)
    _folder(tmp_path)

  def test_a_builder_that_fails_leaves_nothing(self, build, write_jsonl, tmp_path):
    def broken(record):
      if record['margin'] == 0.0:
        raise ZeroDivisionError
      return _example_of(record)

    with pytest.raises(ZeroDivisionError):
      build(write_jsonl(_RECORDS), example_fn=broken)
    assert not list((tmp_path / 'cache').iterdir())

  @pytest.mark.parametrize('limit', [100_000, 400_000])
  def test_a_full_disk_is_told_and_leaves_nothing(self, build, write_jsonl, tmp_path, limit):
    # Of the two limits, the second is met while groups are written, the first when the writer is closed.
    ids = np.random.default_rng(0).integers(0, 2**31, 5000).tolist()
    spec = write_jsonl([{'ids': [ids], 'prompt': 1, 'margin': 0.0}] * 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
      with pytest.raises(types.RunError, match='cannot write the token cache.*File too large'):
        build(spec)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / 'cache').iterdir())
    assert len(build(spec)) == 40

  def test_a_cache_folder_that_cannot_be_made_is_told(self, build, write_jsonl, tmp_path):
    (tmp_path / 'cache').write_text('a file')
    with pytest.raises(types.RunError, match=f'cannot write the token cache in {tmp_path}/cache: '):
      build(write_jsonl(_RECORDS))

  def test_a_bad_line_stops_and_is_named(self, build, write_jsonl):
    with pytest.raises(types.RunError, match=r'^data\.jsonl:2: not valid JSON'):
      build(write_jsonl([_RECORDS[0], '{"ids"', _RECORDS[1]]))

  def test_a_record_without_a_column_stops_and_is_named(self, build, write_jsonl):
    def picky(record):
      if 'margin' not in record:
        raise types.RunError("no column 'margin'")
      return _example_of(record)

    spec = write_jsonl([_RECORDS[0], {'ids': [[1, 2]]}])
    with pytest.raises(types.RunError, match=r"^data\.jsonl:2: no column 'margin'$"):
      build(spec, example_fn=picky)
    assert build(spec, example_fn=picky, skip_bad_records=True).report['bad'] == 1

  def test_reasons_are_those_of_the_function_also_when_gin_calls_it(self, build, write_jsonl):
    def function(record):
      raise examples.Dropped('equal') if record.get('drop') else types.RunError("no column 'margin'")

    with gin.unlock_config():  # another test may have parsed and locked one
      configured = gin.external_configurable(function, module='dataset_test')
    message = r"^data.jsonl:2: no column 'margin'$"
    with pytest.raises(types.RunError, match=message):
      build(write_jsonl([{'drop': 1}, {}]), example_fn=configured)
    with pytest.raises(types.RunError, match=r'none of its 1 records can be used; 1 dropped: equal \(first'):
      build(write_jsonl([{'drop': 1}]), example_fn=configured)

  def test_bad_lines_are_skipped_and_counted_on_request(self, build, write_jsonl, caplog):
    data = build(write_jsonl([_RECORDS[0], '{"ids"', '[]', _RECORDS[1]]), skip_bad_records=True)
    assert (data.report['bad'], data.report['kept'], data.where(1)) == (2, 2, 'data.jsonl:4')
    assert 'data.jsonl:2: not valid JSON' in caplog.text

  def test_a_line_that_cannot_be_read_is_an_error_that_says_how_to_leave_it_out(self, build, write_jsonl):
    with pytest.raises(types.RunError, match=r'^data.jsonl:2: not valid JSON .*; --skip_bad_records leaves such rec'):
      build(write_jsonl([_RECORDS[0], '{"ids"']))

  def test_no_record_left_is_an_error_with_reasons(self, build, write_jsonl, tmp_path):
    spec = write_jsonl([{'drop': 'equal responses'}, '{'])
    with pytest.raises(
        types.RunError, match=r'none of its 2 records .* 1 dropped: equal responses .*:1\), 1 unreadable'
    ):
      build(spec, skip_bad_records=True)
    assert not list((tmp_path / 'cache').iterdir())

  def test_an_empty_file_is_an_error(self, build, write_jsonl):
    with pytest.raises(types.RunError, match="jsonl': it holds no records$"):
      build(write_jsonl([]))

  def test_labels_that_only_some_records_have_are_left_out_with_a_warning(self, build, write_jsonl, caplog):
    other = {'ids': [[1, 2], [1, 3]], 'prompt': 1, 'weight': 0.0, 'margin': 1.0}
    with caplog.at_level(logging.WARNING, 'absl'):
      data = build(write_jsonl([_RECORDS[0], other]))
    assert data.label_names == ('margin',)
    assert 'only some records are labelled with weight, which is left out' in caplog.text

  def test_shorter_lists_leave_places_empty(self, build, write_jsonl):
    short = {'ids': [[1, 2, 3]], 'prompt': 1, 'margin': 0.0}
    data = build(write_jsonl([_RECORDS[0], short]))
    np.testing.assert_array_equal(data.lengths_NK, [[3, 4], [2, 0]])
    assert len(data[1].sequences) == 1

  def test_several_groups_of_a_record_are_as_many(self, build, write_jsonl):
    both = lambda record: [_example_of(record), _example_of(record | {'margin': 9.0})]
    data = build(write_jsonl(_RECORDS[:2]), example_fn=both)
    assert [group.labels['margin'] for group in (data[i] for i in range(4))] == [0.5, 9.0, 1.5, 9.0]
    assert [data.where(i) for i in range(4)] == [f'data.jsonl:{i}' for i in (1, 1, 2, 2)]

  def test_labels_of_each_response_come_back_as_a_list(self, token_dataset):
    data = token_dataset([_RECORDS[0] | {'score': [0.5, -1.0]}])
    assert data[0].labels == {'margin': 0.5, 'score': [0.5, -1.0]}

  def test_each_record_meets_another_where_that_is_asked_for(self, build, write_jsonl):
    seen = []
    example_fn = lambda record: seen.append(record) or _example_of(record)
    build(write_jsonl(_RECORDS), example_fn=example_fn, mismatched=True)
    assert [record['other_record']['margin'] for record in seen] == [1.5, 0.0, 0.5]


class TestDataset:

  def test_a_group_that_can_no_longer_be_read_is_named(self, token_dataset, tmp_path):
    data = token_dataset(_RECORDS)
    (_folder(tmp_path) / 'groups.arrayrecord').unlink()
    with pytest.raises(types.RunError, match=r'data\.jsonl:2: its tokens cannot be read from .* delete this folder'):
      data[1]

  def test_a_group_damaged_within_is_named(self, token_dataset, tmp_path):
    token_dataset(_RECORDS)
    path = _folder(tmp_path) / 'groups.arrayrecord'
    content = bytearray(path.read_bytes())
    place = content.index(np.array([1, 9, 2], '<i4').tobytes()) if b'ids' in content else 200
    content[place] ^= 255
    path.write_bytes(content)
    data = token_dataset(_RECORDS)
    with pytest.raises(types.RunError, match=r'data\.jsonl:\d: its tokens cannot be read'):
      for i in range(3):
        data[i]


class TestJoined:

  def test_numbers_records_through(self, token_dataset):
    parts = [token_dataset(_RECORDS[:1], 'a.jsonl'), token_dataset(_RECORDS[1:], 'b.jsonl')]
    joined = dataset.Joined(parts)
    assert (len(joined), joined.sizes) == (3, [1, 2])
    _assert_same_groups(joined, _RECORDS, _example_of)
    assert [joined.where(i) for i in range(3)] == ['a.jsonl:1', 'b.jsonl:1', 'b.jsonl:2']
    assert [joined.place(i) for i in range(3)] == [(0, 1), (1, 1), (1, 2)]
    np.testing.assert_array_equal(joined.lengths_NK, [[3, 4], [2, 1], [3, 3]])
    np.testing.assert_array_equal(joined.keys_NK[1:], parts[1].keys_NK)

  def test_shorter_lists_are_parts_of_the_longest(self, token_dataset):
    short = [{'ids': [[1, 2]], 'prompt': 1, 'margin': 0.5}]
    parts = [token_dataset(short, 'a.jsonl'), token_dataset(_RECORDS[:1], 'b.jsonl')]
    joined = dataset.Joined(parts)
    assert joined.group_size == 2
    _assert_same_groups(joined, [*short, _RECORDS[0]], _example_of)
    np.testing.assert_array_equal(joined.lengths_NK, [[1, 0], [3, 4]])
    np.testing.assert_array_equal(joined.keys_NK, [[parts[0].keys_NK[0, 0], 0], parts[1].keys_NK[0]])

  def test_sets_of_several_labels_are_refused(self, token_dataset):
    other = {'ids': [[1, 2]] * 2, 'prompt': 1}
    with pytest.raises(types.UsageError, match='--data mixes labels margin with nothing; all sources'):
      dataset.Joined([token_dataset(_RECORDS, 'a.jsonl'), token_dataset([other], 'b.jsonl')])
