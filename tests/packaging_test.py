"""What is shipped: a wheel, an editable install and a plain checkout all find their gin files and assets."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from jaxalign.cli import catalog

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOSTILE = 'this is not gin at all ('
PROBE = """
import pathlib, sys
import jaxalign
from jaxalign.cli import catalog, config
config.parse('dpo', files=['models/stories260K.gin'], user_files=[], bindings=['preference.dpo.label_smoothing=0.25'])
assert config.query('losses.preference.dpo.label_smoothing') == 0.25
assert pathlib.Path(jaxalign.__file__).is_relative_to(sys.argv[1]), jaxalign.__file__
assert pathlib.Path(jaxalign.__file__).with_name('assets').joinpath('stories260K', 'model.safetensors').is_file()
print(' '.join(catalog.algorithms()))
"""


def run(*command, **options):
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A copy of what a build reads, and of what it must leave out, so that building leaves nothing in the checkout."""
  copy = tmp_path_factory.mktemp('a checkout') / 'jaxalign'
  copy.mkdir()
  for name in ('setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, copy)
  ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
  for name in ('gin_configs', 'jaxalign', 'tests', 'tools', 'launch'):
    shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
  return copy


def pip_wheel(source, folder):
  """Builds a wheel as a user would, without the network."""
  pip = '-m', 'pip', '--disable-pip-version-check', 'wheel', '--quiet', '--no-deps', '--no-build-isolation'
  run(sys.executable, *pip, '--wheel-dir', str(folder), str(source))
  (wheel,) = folder.glob('*.whl')
  return wheel


@pytest.fixture(scope='module')
def wheel(checkout, tmp_path_factory):
  return pip_wheel(checkout, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def names(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return set(archive.namelist())


@pytest.fixture
def elsewhere(tmp_path):
  """A foreign current folder with gin files of its own."""
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  for name in ('base.gin', 'dpo.gin'):
    (folder / name).write_text(HOSTILE)
  return folder


def python(place, elsewhere, *arguments):
  """Runs Python where `place` alone provides the package: -S keeps an editable install of this checkout away."""
  paths = os.pathsep.join([str(place), sysconfig.get_path('purelib')])
  env = dict(os.environ, PYTHONPATH=paths, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='1')
  return run(sys.executable, '-S', *arguments, cwd=elsewhere, env=env)


def hook(checkout, name, folder):
  """Calls a hook of the build backend and returns what it made."""
  code = f'import setuptools.build_meta as backend; print(backend.{name}({str(folder)!r}))'
  return folder / run(sys.executable, '-c', code, cwd=checkout).splitlines()[-1]


def data_files():
  """Everything but Python that the package reads."""
  files = [*(ROOT / 'gin_configs').rglob('*.gin'), *(ROOT / 'jaxalign' / 'assets').rglob('*')]
  return {f'jaxalign/{str(f.relative_to(ROOT)).removeprefix("jaxalign/")}' for f in files if f.is_file()}


class TestWheel:

  def test_holds_every_module_gin_file_and_asset(self, names):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'jaxalign').rglob('*.py')}
    assert len(modules) > 20
    assert 'jaxalign/gin_configs/models/stories260K.gin' in data_files()
    assert modules | data_files() <= names

  def test_holds_the_licences_of_the_package_and_of_the_model(self, names):
    assert any(name.endswith('.dist-info/licenses/LICENSE') for name in names)
    assert 'jaxalign/assets/stories260K/LICENSE' in names

  def test_holds_nothing_else(self, names):
    assert {name.split('/')[0].partition('-')[0] for name in names} == {'jaxalign'}
    kinds = {pathlib.PurePath(name).suffix for name in names if name.startswith('jaxalign/')}
    assert kinds <= {'.py', '.gin', '.gz', '.txt', '.json', '.safetensors', '.model', ''}

  def test_is_small(self, wheel):
    with zipfile.ZipFile(wheel) as archive:
      assets = sum(entry.compress_size for entry in archive.infolist() if '/assets/' in entry.filename)
    assert 0 < assets <= 3 * 2**20
    assert wheel.stat().st_size <= 3 * 2**20

  def test_runs_from_a_foreign_folder(self, wheel, elsewhere, tmp_path):
    site = tmp_path / 'site'
    pip = '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', '--no-deps', '--no-index'
    run(sys.executable, *pip, '--target', str(site), str(wheel))
    assert python(site, elsewhere, '-P', '-c', PROBE, str(site)).split() == list(catalog.algorithms())
    assert python(site, elsewhere, '-m', 'jaxalign.main', '--list') == catalog.listing()
    flags = '--mode=show', '--algo=dpo', '--data=builtin:sentiment[:4]', f'--cache_dir={tmp_path / "cache"}'
    shown = python(site, elsewhere, '-m', 'jaxalign.main', *flags)
    assert 'packing/groups: 4\n' in shown
    assert sorted(path.name for path in elsewhere.iterdir()) == ['base.gin', 'dpo.gin']


class TestSdist:

  def test_makes_the_same_wheel(self, checkout, names, tmp_path):
    for name in ('sdist', 'unpacked', 'wheel'):
      (tmp_path / name).mkdir()
    with tarfile.open(hook(checkout, 'build_sdist', tmp_path / 'sdist')) as archive:
      archive.extractall(tmp_path / 'unpacked', filter='data')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    with zipfile.ZipFile(pip_wheel(unpacked, tmp_path / 'wheel')) as archive:
      assert set(archive.namelist()) == names


class TestCheckout:

  def test_works_as_it_is(self, checkout, elsewhere):
    assert python(checkout, elsewhere, '-P', '-c', PROBE, str(checkout)).split() == list(catalog.algorithms())

  def test_works_as_an_editable_install(self, checkout, elsewhere, tmp_path):
    site = tmp_path / 'site'
    with zipfile.ZipFile(hook(checkout, 'build_editable', tmp_path)) as archive:
      archive.extractall(site)
      assert not any(name.endswith('.gin') for name in archive.namelist())
    hidden = f'import site, sys; site.addsitedir({str(site)!r}); sys.argv[1] = {str(checkout)!r}\n'
    assert python(site, elsewhere, '-P', '-c', hidden + PROBE, str(site)).split() == list(catalog.algorithms())
