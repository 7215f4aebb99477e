"""launch/tpu_vm.sh, with a gcloud that has two workers: folders on this machine."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Copies into the home of each worker and runs commands there, one worker after another, as --worker=all does.
GCLOUD = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$CALLS/log"
echo >>"$CALLS/log"
[[ "$1 $2 $3" == 'compute tpus tpu-vm' && " $* " == *' --zone=us-x1-a '* && " $* " == *' --worker=all '* ]] || exit 64
if [[ -e $CALLS/fail ]] && [[ $4 == "$(cat "$CALLS/fail")" ]]; then exit 9; fi
for worker in "$CALLS"/worker-*; do
  case $4 in
    scp) cp "$5" "$worker/${6#my-tpu:}" ;;
    ssh)
      for arg; do
        if [[ $arg == --command=* ]]; then (cd "$worker" && HOME=$worker bash -c "${arg#--command=}"); fi
      done
      ;;
  esac
done
"""

# What launch/local.sh finds as Python on a worker.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  '--version ') echo 'Python 3.12.0' ;;
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m jaxalign.main') shift 2; printf '[%s]' "$@"; echo " ${COORDINATOR_ADDRESS-} in ${PWD##*/}" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
  """A function that runs the script of a checkout in a folder with a space; `run.calls` has the workers and the log."""
  checkout = tmp_path / 'my checkout'
  calls = tmp_path / 'calls'
  for name in ('worker-0', 'worker-1', 'bin'):
    (calls / name).mkdir(parents=True)
  for name in ('launch', 'gin_configs'):
    shutil.copytree(ROOT / name, checkout / name)
  for name in ('setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, checkout)
  (checkout / 'jaxalign' / '__pycache__').mkdir(parents=True)
  (checkout / 'jaxalign' / '__pycache__' / 'main.pyc').touch()
  (checkout / 'jaxalign' / 'main.py').touch()
  (checkout / 'jaxalign' / 'gin_configs').symlink_to('../gin_configs')
  for name, text in (('gcloud', GCLOUD), ('python3', PYTHON), ('nvidia-smi', '#!/bin/sh\nexit 9\n')):
    (calls / 'bin' / name).write_text(text)
    (calls / 'bin' / name).chmod(0o755)
  (calls / 'log').touch()

  def call(*args):
    clean = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'PYTHON', 'COORDINATOR_ADDRESS')}
    env = clean | {'PATH': f'{calls / "bin"}:/usr/bin:/bin', 'CALLS': str(calls), 'TMPDIR': str(calls)}
    command = ['bash', str(checkout / 'launch' / 'tpu_vm.sh'), *args]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

  call.calls = calls
  return call


class TestTpuVm:

  def test_runs_the_same_command_on_every_worker_which_find_each_other(self, run):
    done = run('my-tpu', 'us-x1-a', '--algo=dpo', '--prompt=once upon', "--gin=a.b='*'", '--eval_data=')
    assert done.returncode == 0, done.stderr
    flags = "[--algo=dpo][--prompt=once upon][--gin=a.b='*'][--eval_data=]"
    assert done.stdout.splitlines() == [f'{flags} auto in worker-{i}' for i in range(2)]

  def test_takes_this_checkout_along(self, run):
    run('my-tpu', 'us-x1-a', '--algo=dpo')
    there = run.calls / 'worker-1' / 'jaxalign'
    assert {path.name for path in there.iterdir()} >= {'setup.py', 'README.md', 'LICENSE', 'launch', '.venv'}
    assert {path.name for path in (there / 'jaxalign').iterdir()} == {'main.py', 'gin_configs'}
    assert (there / 'jaxalign' / 'gin_configs' / 'dpo.gin').is_file()

  def test_leaves_no_archive_behind(self, run):
    run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert {path.name for path in run.calls.iterdir()} == {'worker-0', 'worker-1', 'bin', 'log'}

  @pytest.mark.parametrize('args', [(), ('my-tpu',), ('my-tpu', 'us-x1-a'), ('my-tpu', '--algo=dpo', '--steps=1')])
  def test_says_how_it_is_used_and_calls_nothing(self, run, args):
    done = run(*args)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert 'usage: bash launch/tpu_vm.sh NAME ZONE --algo=ALGO' in done.stderr
    assert not (run.calls / 'log').read_text()

  @pytest.mark.skipif(shutil.which('gcloud', path='/usr/bin:/bin') is not None, reason='this machine has gcloud')
  def test_says_that_gcloud_is_missing(self, run):
    (run.calls / 'bin' / 'gcloud').unlink()
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('jaxalign: gcloud is not installed')

  def test_runs_nothing_where_the_checkout_could_not_be_copied(self, run):
    (run.calls / 'fail').write_text('scp')
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert (done.returncode, done.stdout) == (1, '')
    assert 'could not copy the checkout to my-tpu in us-x1-a' in done.stderr
    assert '|ssh|' not in (run.calls / 'log').read_text()

  def test_passes_the_exit_code_on(self, run):
    (run.calls / 'fail').write_text('ssh')
    assert run('my-tpu', 'us-x1-a', '--algo=dpo').returncode == 9
