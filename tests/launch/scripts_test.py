"""All launchers."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / 'launch').rglob('*.sh'))


class TestScripts:

  @pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
  def test_can_be_read_by_bash(self, script):
    done = subprocess.run(['bash', '-n', str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')

  def test_names_each_option_in_its_head(self):
    for script in SCRIPTS:
      text = script.read_text()
      head = text.split('set -euo')[0]
      asked = [line for line in text.splitlines() if line.startswith('read_options ')]
      for line in asked:
        options = line.removeprefix('read_options ').removesuffix(' "$@"').replace("'", '').split()
        assert [option for option in options if f'--{option}' not in head] == [], script

  @pytest.mark.parametrize('args', [('slurm.sh',), ('slurm.sh', '--nodes=2'), ('tpu_vm.sh',), ('gke/run.sh',)], ids=str)
  def test_explains_its_options(self, args):
    script = ROOT / 'launch' / args[0]
    done = subprocess.run(['bash', str(script), *args[1:], '--help'], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    head = script.read_text().split('set -euo')[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix('#').removeprefix(' ') for line in head]

  def test_leaves_nothing_out_of_the_image_that_setup_needs(self):
    text = (ROOT / 'launch' / 'gke' / 'Dockerfile').read_text()
    ignored = (ROOT / 'launch' / 'gke' / 'Dockerfile.dockerignore').read_text().splitlines()
    copied = [name for line in text.splitlines() if line.startswith('COPY') for name in line.split()[1:-1]]
    assert set(copied) == {'setup.py', 'README.md', 'LICENSE', 'jaxalign', 'gin_configs'}
    assert all((ROOT / name).exists() and f'!{name}' in ignored for name in copied)
