"""launch/local.sh and tools/test.sh, with a Python that only writes down how it was called."""

import glob
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A Python that makes virtual environments with itself in them, and fails where CALLS/fail names what it is asked for.
FAKE = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$CALLS/log"
echo "JAX_PLATFORMS=${JAX_PLATFORMS-} in $PWD" >>"$CALLS/log"
if [[ -e $CALLS/fail ]] && [[ "$*" == *$(cat "$CALLS/fail")* ]]; then exit 7; fi
case "$1 $2" in
  '--version ') echo 'Python 3.12.0' ;;
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m jaxalign.main')
    shift 2
    printf '[%s]' "$@"
    case ${ENDS-} in
      aborted) kill -ABRT $$ ;;
      told) trap 'exit 75' TERM; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done; exit 9 ;;
      reading) cat; exit 8 ;;
    esac
    ;;
  '-m pytest') echo '1 passed in 0.01s' ;;
esac
"""

# What the environment has where a process is one of several, and where it is alone.
JOINED = (
    {'COORDINATOR_ADDRESS': 'auto'},
    {'TPU_WORKER_HOSTNAMES': 'a,b'},
    {'MEGASCALE_COORDINATOR_ADDRESS': 'a'},
    {'SLURM_STEP_NODELIST': 'n[0-1]', 'SLURM_NTASKS': '2'},
    {'OMPI_COMM_WORLD_SIZE': '2'},
)
ALONE = (
    {},
    {'TPU_WORKER_HOSTNAMES': 'a'},
    {'SLURM_NTASKS': '2'},
    {'SLURM_STEP_NODELIST': 'n0', 'SLURM_NTASKS': '1'},
    {'OMPI_COMM_WORLD_SIZE': '1'},
)


@pytest.fixture
def machine(tmp_path):
  """A checkout in a folder with a space, on a machine with the fake Python alone and no accelerator."""
  if glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*'):
    pytest.skip('this machine has an accelerator')
  return Machine(tmp_path)


class Machine:

  def __init__(self, folder):
    self.checkout = folder / 'my checkout'
    self.calls = folder / 'calls'
    self.bin = folder / 'bin'
    self.here = folder / 'elsewhere'
    for path in (self.checkout, self.calls, self.bin, self.here):
      path.mkdir()
    for name in ('launch', 'tools', '.ci'):
      shutil.copytree(ROOT / name, self.checkout / name)
    shutil.copy(ROOT / 'setup.py', self.checkout)
    self.program('python3', FAKE)
    self.program('nvidia-smi', '#!/bin/sh\nexit 9\n')

  def program(self, name, text):
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(0o755)

  def fail(self, what):
    (self.calls / 'fail').write_text(what)

  def run(self, script, *args, **env):
    """Runs a script from another folder; returns what it did, and the calls of Python since."""
    (self.calls / 'log').write_text('')
    told = ('JAX_PLATFORMS', 'PYTHON', *(name for job in JOINED for name in job))
    clean = {k: v for k, v in os.environ.items() if k not in told}
    env = clean | {'PATH': f'{self.bin}:/usr/bin:/bin', 'CALLS': str(self.calls)} | env
    command = ['bash', str(self.checkout / script), *args]
    done = subprocess.run(
        command, cwd=self.here, env=env, capture_output=True, text=True, check=False, input='typed', timeout=60
    )
    self.log = (self.calls / 'log').read_text().splitlines()
    return done

  def installs(self):
    return [line.split('|')[-2] for line in self.log if line.startswith('-m|pip|install')]


class TestLocal:

  def test_makes_the_environment_installs_and_runs(self, machine):
    done = machine.run('launch/local.sh', '--algo=dpo')
    assert (done.returncode, done.stdout) == (0, '[--algo=dpo]')
    assert (machine.checkout / '.venv/bin/python').is_file()
    assert machine.installs() == [str(machine.checkout)]
    assert machine.log[-1].endswith(f'JAX_PLATFORMS=cpu in {machine.here}')

  def test_passes_arguments_and_the_exit_code_on(self, machine):
    machine.run('launch/local.sh')
    machine.fail('jaxalign.main')
    done = machine.run('launch/local.sh', '--prompt=once upon', "--gin=a.b='*'", '')
    assert done.returncode == 7
    assert machine.log[-1].startswith("-m|jaxalign.main|--prompt=once upon|--gin=a.b='*'||JAX")

  @pytest.mark.parametrize('job', JOINED, ids=str)
  def test_asks_for_a_restart_where_jax_ended_a_process_of_several(self, machine, job):
    machine.run('launch/local.sh')
    done = machine.run('launch/local.sh', '--algo=dpo', ENDS='aborted', **job)
    assert (done.returncode, done.stdout) == (75, '[--algo=dpo]')
    (line,) = done.stderr.splitlines()
    assert line.startswith('jaxalign: JAX ended this process, most likely as another one of the job is gone')

  @pytest.mark.parametrize('job', ALONE, ids=str)
  def test_lets_a_process_that_is_alone_end_as_it_does(self, machine, job):
    assert machine.run('launch/local.sh', ENDS='aborted', **job).returncode == -signal.SIGABRT

  def test_passes_the_same_on_for_a_process_of_several(self, machine):
    assert machine.run('launch/local.sh', COORDINATOR_ADDRESS='auto').returncode == 0
    # SIGTERM of those that know this shell alone, as Kubernetes does.
    assert machine.run('launch/local.sh', ENDS='told', COORDINATOR_ADDRESS='auto').returncode == 75
    done = machine.run('launch/local.sh', '', ENDS='reading', COORDINATOR_ADDRESS='auto')
    assert (done.returncode, done.stdout) == (8, '[]typed')

  def test_prints_its_commands_in_a_dry_run(self, machine):
    done = machine.run('launch/local.sh', '--dry_run', '--algo=dpo', '--prompt=a b')
    assert done.returncode == 0 and not (machine.checkout / '.venv').exists()
    made, installed, run = done.stdout.splitlines()
    assert made.startswith('python3 -m venv ') and ' -m pip install ' in installed
    assert run.startswith('env JAX_PLATFORMS=cpu ') and run.endswith(' -m jaxalign.main --algo=dpo --prompt=a\\ b')
    assert not [line for line in machine.log if line.startswith('-m|')]

  def test_installs_again_only_where_setup_changed_or_the_checkout_moved(self, machine):
    machine.run('launch/local.sh')
    machine.run('launch/local.sh')
    assert not machine.installs()
    with (machine.checkout / 'setup.py').open('a') as setup:
      setup.write('# more\n')
    machine.run('launch/local.sh')
    assert len(machine.installs()) == 1
    moved = machine.checkout.with_name('moved')
    machine.checkout.rename(moved)
    machine.checkout = moved
    machine.run('launch/local.sh')
    assert machine.installs() == [str(moved)]

  def test_installs_again_after_a_failure(self, machine):
    machine.fail('pip install')
    done = machine.run('launch/local.sh')
    assert done.returncode == 1
    assert 'pip could not install the package' in done.stderr
    (machine.calls / 'fail').unlink()
    assert machine.run('launch/local.sh').returncode == 0
    assert len(machine.installs()) == 1

  def test_leaves_a_chosen_platform_alone(self, machine):
    machine.run('launch/local.sh', JAX_PLATFORMS='tpu')
    assert 'JAX_PLATFORMS=tpu' in machine.log[-1]

  def test_installs_for_an_nvidia_gpu_where_there_is_one(self, machine):
    machine.program('nvidia-smi', '#!/bin/sh\n[ "$1" = -L ] && echo GPU 0\n')
    machine.run('launch/local.sh')
    assert machine.installs() == [f'{machine.checkout}[cuda]']
    assert 'JAX_PLATFORMS= ' in machine.log[-1]

  def test_installs_what_buckets_need_where_a_flag_names_one(self, machine):
    machine.run('launch/local.sh', '--data=jsonl:gs://bucket/x.jsonl')
    assert machine.installs() == [f'{machine.checkout}[gcs]']
    machine.program('nvidia-smi', '#!/bin/sh\n[ "$1" = -L ] && echo GPU 0\n')
    machine.run('launch/local.sh', '--algo=dpo', '--workdir=gs://bucket/dpo')
    assert machine.installs() == [f'{machine.checkout}[cuda,gcs]']
    machine.run('launch/local.sh', '--algo=dpo')
    assert not machine.installs()

  def test_needs_no_install_after_that_of_the_tests(self, machine):
    machine.run('tools/test.sh')
    machine.run('launch/local.sh')
    assert not machine.installs()

  def test_refuses_other_pythons_in_one_line(self, machine):
    machine.fail('sys.version_info')
    done = machine.run('launch/local.sh', PYTHON='python3')
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert '3.11, 3.12 or 3.13 is needed' in done.stderr
    assert 'Python 3.12.0' in done.stderr
    assert not (machine.checkout / '.venv').exists()

  def test_says_that_a_chosen_python_is_not_there(self, machine):
    done = machine.run('launch/local.sh', PYTHON='/no such/python')
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1
    assert '/no such/python is not there' in done.stderr

  def test_takes_another_python_where_the_first_does_not_run(self, machine):
    machine.program('python3', '#!/bin/sh\nexit 127\n')
    machine.program('python3.13', '#!/bin/sh\nexit 127\n')
    machine.program('python3.12', FAKE)
    assert machine.run('launch/local.sh', '--list').stdout == '[--list]'

  def test_says_what_is_missing_where_venv_is(self, machine):
    machine.fail('-m venv')
    done = machine.run('launch/local.sh')
    assert done.returncode == 1
    assert 'python3-venv' in done.stderr


class TestTest:

  @pytest.mark.parametrize('script', ['tools/test.sh', '.ci/run'])
  def test_lints_checks_types_and_tests_in_this_order(self, machine, script):
    done = machine.run(script, '-k', 'a or b')
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == '1 passed in 0.01s'
    assert machine.installs() == [f'{machine.checkout}[test,tools]']
    stages = [line.split('|')[1] for line in machine.log if line.startswith('-m|')]
    assert stages[-4:] == ['ruff', 'pyink', 'mypy', 'pytest']
    called = '-m|pytest|--numprocesses=auto|--maxprocesses=4|--dist=worksteal|-k|a or b|JAX_PLATFORMS=cpu'
    assert machine.log[-1] == f'{called} in {machine.checkout}'

  @pytest.mark.parametrize('stage', ['ruff', 'pyink', 'mypy'])
  def test_stops_at_the_stage_that_fails_and_names_it(self, machine, stage):
    machine.fail(f'-m {stage}')
    done = machine.run('tools/test.sh')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f'jaxalign: tools/test.sh: {stage} failed'
    assert f'-m|{stage}|' in machine.log[-1]

  def test_passes_the_exit_code_of_pytest_on(self, machine):
    machine.fail('-m pytest')
    assert machine.run('tools/test.sh').returncode == 7
