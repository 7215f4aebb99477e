"""How JAX compiles in a process, and what it keeps."""

import os

import jax
import pytest

from jaxalign import compiling
from tests import runs


class TestTuneCompiler:

  def test_adds_a_default_to_what_the_user_says(self, monkeypatch):
    monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_other=1')
    compiling.tune_compiler()
    compiling.tune_compiler()
    wanted = '--xla_other=1 --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000'
    assert os.environ['LIBTPU_INIT_ARGS'] == wanted

  def test_leaves_what_the_user_says(self, monkeypatch):
    said = '--xla_jf_spmd_threshold_for_windowed_einsum_mib=0'
    monkeypatch.setenv('LIBTPU_INIT_ARGS', said)
    compiling.tune_compiler()
    assert os.environ['LIBTPU_INIT_ARGS'] == said


class TestKeepPrograms:

  @pytest.fixture
  def told(self, monkeypatch):
    found = {}
    monkeypatch.setattr(jax.config, 'update', found.__setitem__)
    return found

  def test_leaves_what_the_environment_says(self, told, tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/elsewhere')
    compiling.keep_programs(tmp_path)
    assert not told

  def test_keeps_them_in_the_cache_of_a_run(self, tmp_path, monkeypatch):
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    runs.write_pairs(tmp_path / 'pairs.jsonl')
    for steps in (1, 2):
      code, err = runs.finished(runs.spawn(runs.flags(tmp_path, tmp_path / 'run', steps=steps)))
      assert code == 0, err
    (folder,) = (tmp_path / 'cache').glob('compiled-*')
    assert list(folder.iterdir())
