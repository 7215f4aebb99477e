"""The cache of reference log-probabilities: what is a hit, what is a miss, what survives."""

import jax
import numpy as np
import pytest

from jaxalign import reference
from jaxalign import sharding
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import transformer

CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64)


def params_on(text, dtype=np.float32):
  mesh = sharding.make_mesh(text)
  params = transformer.init_params(transformer.build(CONFIG, mesh, length=16), jax.random.key(0), mesh)
  return jax.tree.map(lambda x: x.astype(dtype), params)


class TestChecksum:

  def test_is_the_same_on_every_mesh(self):
    assert (
        len(
            {reference.checksum(params_on(text)) for text in ('fsdp:8', 'data:2,fsdp:2,tensor:2', 'tensor:2,context:4')}
        )
        == 1
    )

  def test_changes_with_any_bit_any_place_and_any_name(self):
    params = jax.device_get(params_on('fsdp:8'))
    base = reference.checksum(params)
    one = jax.tree.map(np.array, params)
    one['embed'][3, 5] = np.nextafter(one['embed'][3, 5], 1.0)
    swapped = jax.tree.map(np.array, params)
    swapped['embed'][[3, 4]] = swapped['embed'][[4, 3]]
    renamed = {('other' if name == 'embed' else name): x for name, x in params.items()}
    found = [reference.checksum(p) for p in (one, swapped, renamed, params_on('fsdp:8', np.float16))]
    assert len({base, *found}) == 5


class TestDigest:

  def test_tells_lists_of_texts_apart(self):
    assert reference.digest('a', 'bc') == reference.digest('a', 'bc')
    assert len({reference.digest(*parts) for parts in (('a', 'bc'), ('ab', 'c'), ('abc',), ('bc', 'a'))}) == 4


class TestCache:

  def test_comes_back_from_its_file(self, tmp_path):
    rows = {2**63 + 5: np.array([-1.5, -2.0], np.float32), 7: np.array([-0.25], np.float32), 9: np.zeros(0, np.float32)}
    cache = reference.Cache(tmp_path, 'a')
    for key, row in rows.items():
      assert key not in cache
      cache[key] = row
    cache.save()
    again = reference.Cache(tmp_path, 'a')
    for key, row in rows.items():
      assert key in again
      np.testing.assert_array_equal(again[key], row)
    assert 7 not in reference.Cache(tmp_path, 'b')  # other parameters have another name
    assert [path.name for path in tmp_path.iterdir()] == ['ref-a.npz']

  @pytest.mark.parametrize('spoil', [lambda b: b[:-30], lambda b: b'', lambda b: b'no zip' * 9])
  def test_that_is_damaged_is_empty_and_says_so(self, tmp_path, caplog, spoil):
    cache = reference.Cache(tmp_path, 'a')
    cache[7] = np.ones(3, np.float32)
    cache.save()
    path = tmp_path / 'ref-a.npz'
    path.write_bytes(spoil(path.read_bytes()))
    with caplog.at_level('WARNING', logger='absl'):
      assert 7 not in reference.Cache(tmp_path, 'a')
    assert f'{path} is corrupt' in caplog.text

  def test_that_cannot_be_written_is_an_error_and_leaves_nothing(self, tmp_path):
    folder = tmp_path / 'cache'
    cache = reference.Cache(folder, 'a')
    cache[7] = np.ones(3, np.float32)
    folder.write_text('a file where the folder should be')
    with pytest.raises(types.RunError, match='ref-a.npz: cannot write the reference cache'):
      cache.save()
