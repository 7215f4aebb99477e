"""launch/tpu_vm.sh, with a gcloud that has two workers: folders on this machine."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A TPU VM and its place in the queue are files with the states that are told, one after another; the last one stays.
# `fail-VERB` has what a verb says as it fails; `ssh`, `scp` and `create` have exit codes of calls that come to nothing,
# one after another. Where there is `fail-stop`, no worker can be told to stop; `slow-scp` makes copies long, and
# `slow-create` what makes a VM.
GCLOUD = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$CALLS/log"
echo >>"$CALLS/log"
[[ "$1 $2" == 'compute tpus' && " $* " == *' --zone=us-x1-a'* ]] || exit 64
next() {
  local first
  first=$(head -n 1 "$CALLS/$1" 2>/dev/null) || first=ABSENT
  if (($(wc -l <"$CALLS/$1") > 1)); then sed -i 1d "$CALLS/$1"; fi
  echo "$first"
}
lost() {
  local code
  [[ -s $CALLS/$1 ]] || return 0
  code=$(head -n 1 "$CALLS/$1")
  sed -i 1d "$CALLS/$1"
  return "$code"
}
if [[ -e $CALLS/fail-$4 ]]; then cat "$CALLS/fail-$4" >&2; exit 9; fi
case "$3 $4 $*" in
  *networkEndpoints*) echo 2 ;;
  *failedData*) echo 'no such network' ;;
  *' describe '*)
    state=$(next "$3")
    [[ $state != ABSENT ]] || { echo "ERROR: NOT_FOUND: Resource $5 was not found" >&2; exit 1; }
    echo "$state"
    ;;
  *' create '*)
    [[ ! -e $CALLS/slow-create ]] || { touch "$CALLS/making"; sleep 3; touch "$CALLS/made"; }
    lost create || { echo 'There is no more capacity in the zone' >&2; exit 9; }
    echo READY >"$CALLS/tpu-vm"
    if [[ $3 == queued-resources && ! -s $CALLS/queued-resources.next ]]; then echo ACTIVE >"$CALLS/$3"; fi
    if [[ -s $CALLS/queued-resources.next ]]; then cp "$CALLS/queued-resources.next" "$CALLS/queued-resources"; fi
    ;;
  *' delete '*) echo ABSENT >"$CALLS/tpu-vm"; echo ABSENT >"$CALLS/queued-resources" ;;
  *' scp '*)
    lost scp || exit
    [[ ! -e $CALLS/slow-scp ]] || { touch "$CALLS/copying"; sleep 10; }
    if [[ " $* " == *' --worker=all '* ]]; then
      for worker in "$CALLS"/worker-*; do cp "$5" "$worker/${6#my-tpu:}"; done
    else
      for arg; do [[ $arg != --worker=* ]] || worker=$CALLS/worker-${arg#--worker=}; done
      cp "$worker/${5#my-tpu:}" "$worker/${6#my-tpu:}" "$7" 2>/dev/null ||
        { printf 'no log '; sleep 0.2; echo "of ${worker##*/}"; exit 1; } >&2
    fi
    ;;
  *' ssh '*)
    [[ " $* " == *' --worker=all '* ]] || exit 64
    if [[ $* == *pkill* ]]; then
      [[ ! -e $CALLS/fail-stop ]] || exit 255
    else
      lost ssh || exit
    fi
    for arg; do [[ $arg != --command=* ]] || command=${arg#--command=}; done
    running=()
    for worker in "$CALLS"/worker-*; do
      (cd "$worker" && HOME=$worker exec setsid bash -c "$command") &
      running+=($!)
    done
    code=0
    for process in "${running[@]}"; do
      wait "$process" || { failed=$?; ((code)) || code=$failed; }
    done
    exit "$code"
    ;;
esac
"""

# What launch/local.sh finds as Python on a worker: `exit` in its home has the codes of runs, `slow` makes them long.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  '--version ') echo 'Python 3.12.0' ;;
  '-c '*) [[ ! -e $HOME/old ]] || exit 1 ;;
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip')
    if [[ " $* " == *' uv '* ]]; then
      touch "$HOME/installing"
      for i in {1..100}; do [[ ! -e $CALLS/slow ]] || sleep 0.1; done
      mkdir -p "$HOME/.local/bin"
      cp "$CALLS/bin/uv" "$HOME/.local/bin"
    fi
    ;;
  '-m jaxalign.main')
    shift 2
    flags=$(printf '[%s]' "$@")
    echo "$flags ${COORDINATOR_ADDRESS-} in ${PWD##*/}"  # one write: lines of workers do not mix
    echo "step 1 in ${PWD##*/}" >&2
    if [[ -e $CALLS/slow ]]; then
      trap 'echo saved >"$HOME/saved"; exit 75' TERM
      echo $$ >"$HOME/started"
      for i in {1..100}; do [[ ! -e $CALLS/slow ]] || sleep 0.1; done
    fi
    if [[ -s $HOME/exit ]]; then
      code=$(head -n 1 "$HOME/exit")
      sed -i 1d "$HOME/exit"
      exit "$code"
    fi
    ;;
esac
"""

# Those of the machine would look at all of its processes, where they are not told whose children.
PKILL = """#!/usr/bin/env bash
[[ " $* " != *' -P '* ]] || exec /usr/bin/pkill "$@"
printf '%s|' pkill "$@" >>"$HOME/killed"
[[ -e $HOME/started ]] && kill -TERM "$(cat "$HOME/started")"
"""
PGREP = """#!/usr/bin/env bash
[[ -e $HOME/started ]] && kill -0 "$(cat "$HOME/started")" 2>/dev/null
"""
UV = """#!/usr/bin/env bash
printf 'uv|%s\\n' "$*" >>"$CALLS/log"
if [[ "$1 $2" == 'python find' ]]; then rm -f "$HOME/old"; echo "$CALLS/bin/python3"; fi
"""


@pytest.fixture
def run(tmp_path):
  """A function that runs the script of a checkout in a folder with a space; see `Cloud`."""
  return Cloud(tmp_path)


class Cloud:

  def __init__(self, folder):
    self.here = folder
    self.checkout = checkout = folder / 'my checkout'
    self.calls = calls = folder / 'calls'
    for name in ('worker-0', 'worker-1', 'bin'):
      (calls / name).mkdir(parents=True)
    for name in ('launch', 'gin_configs'):
      shutil.copytree(ROOT / name, checkout / name)
    for name in ('setup.py', 'README.md', 'LICENSE'):
      shutil.copy(ROOT / name, checkout)
    (checkout / 'jaxalign' / '__pycache__').mkdir(parents=True)
    (checkout / 'jaxalign' / '__pycache__' / 'main.pyc').touch()
    (checkout / 'jaxalign' / 'main.py').touch()
    shutil.copytree(ROOT / 'jaxalign' / 'cli', checkout / 'jaxalign' / 'cli')
    (checkout / 'jaxalign' / 'gin_configs').symlink_to('../gin_configs')
    programs = {'gcloud': GCLOUD, 'python3': PYTHON}
    programs |= dict.fromkeys(('nvidia-smi', 'python3.11', 'python3.12', 'python3.13'), '#!/bin/sh\nexit 9\n')
    for name, text in (programs | {'pkill': PKILL, 'pgrep': PGREP, 'uv': UV}).items():
      (calls / 'bin' / name).write_text(text)
      (calls / 'bin' / name).chmod(0o755)
    (calls / 'log').touch()
    self.tell('tpu-vm', 'READY')
    self.tell('queued-resources', 'ABSENT')
    clean = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'PYTHON', 'COORDINATOR_ADDRESS')}
    paths = {'PATH': f'{calls / "bin"}:/usr/bin:/bin', 'CALLS': str(calls), 'TMPDIR': str(calls)}
    self.env = clean | paths | {'JAXALIGN_POLL_SECONDS': '0'}

  def tell(self, name, *lines):
    (self.calls / name).write_text(''.join(f'{line}\n' for line in lines))

  def command(self, *args):
    return ['env', '--default-signal=INT', 'bash', str(self.checkout / 'launch' / 'tpu_vm.sh'), *args]

  def __call__(self, *args):
    command = self.command(*args)
    return subprocess.run(command, cwd=self.here, env=self.env, capture_output=True, text=True, check=False)

  def worker(self, *args, index=0):
    """Calls launch/worker.sh on a worker, without waiting for it."""
    home = self.calls / f'worker-{index}'
    there = home / 'jaxalign'
    if not there.exists():
      shutil.copytree(self.checkout, there, symlinks=True)
    command = ['bash', 'jaxalign/launch/worker.sh', *args]
    env = self.env | {'HOME': str(home)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=env, stdout=pipe, stderr=pipe, text=True)

  def start(self, *args):
    """Runs the script without waiting for it, in a group of its own."""
    pipe = subprocess.PIPE
    options = {'cwd': self.here, 'env': self.env, 'text': True, 'start_new_session': True}
    return subprocess.Popen(self.command(*args), stdout=pipe, stderr=pipe, **options)

  def wait_for(self, *names):
    deadline = time.monotonic() + 20
    while not all((self.calls / name).exists() for name in names):
      assert time.monotonic() < deadline, names
      time.sleep(0.02)

  def log(self):
    """What gcloud was asked for, without the flags."""
    lines = (self.calls / 'log').read_text().splitlines()
    return [' '.join(line.split('|')[2:4]) for line in lines if line.startswith('compute|')]

  def changes(self):
    return [line for line in self.log() if 'describe' not in line]


def write_down_sleep(run):
  """Sleeps are among the calls from now on."""
  sleep = run.calls / 'bin' / 'sleep'
  sleep.write_text('#!/bin/sh\necho "compute|tpus|sleep|$1|" >>"$CALLS/log"\nexec /bin/sleep "$@"\n')
  sleep.chmod(0o755)
  run.env['JAXALIGN_POLL_SECONDS'] = '0.01'


class TestTpuVm:

  def test_runs_the_same_command_on_every_worker_which_find_each_other(self, run):
    done = run('my-tpu', 'us-x1-a', '--algo=dpo', '--prompt=once upon', "--gin=a.b='*'", '--eval_data=')
    assert done.returncode == 0, done.stderr
    flags = "[--algo=dpo][--prompt=once upon][--gin=a.b='*'][--eval_data=]"
    assert sorted(done.stdout.splitlines()) == [f'{flags} auto in worker-{i}' for i in range(2)]

  def test_keeps_the_log_apart_from_the_output(self, run):
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert 'step 1' not in done.stdout
    assert [f'step 1 in worker-{i}' in done.stderr.splitlines() for i in range(2)] == [True, True]

  def test_sets_the_workers_up_first_and_runs_nothing_where_that_fails(self, run):
    setup = '--setup=echo "it\'s" >mounted && echo mounted'
    done = run('my-tpu', 'us-x1-a', setup, '--algo=dpo')
    assert (done.returncode, 'mounted' in done.stdout) == (0, False), done.stderr
    assert (run.calls / 'worker-1' / 'mounted').read_text() == "it's\n"
    done = run('my-tpu', 'us-x1-a', '--setup=echo busy; exit 32', '--algo=dpo')
    assert (done.returncode, done.stdout) == (32, '')

  def test_takes_this_checkout_along(self, run):
    run('my-tpu', 'us-x1-a', '--algo=dpo')
    there = run.calls / 'worker-1' / 'jaxalign'
    assert {path.name for path in there.iterdir()} >= {'setup.py', 'README.md', 'LICENSE', 'launch', '.venv'}
    assert {path.name for path in (there / 'jaxalign').iterdir()} == {'main.py', 'cli', 'gin_configs'}
    assert (there / 'jaxalign' / 'gin_configs' / 'dpo.gin').is_file()

  def test_leaves_no_archive_behind(self, run):
    before = {path.name for path in run.calls.iterdir()}
    run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert {path.name for path in run.calls.iterdir()} == before

  @pytest.mark.parametrize(
      'args, problem',
      [
          ((), 'usage: bash launch/tpu_vm.sh NAME ZONE'),
          (('my-tpu',), 'usage: '),
          (('my-tpu', 'us-x1-a'), 'usage: '),
          (('my-tpu', '--algo=dpo', '--steps=1'), 'usage: '),
          (('my-tpu', 'us-x1-a', '--queued'), 'usage: '),
          (('my-tpu', 'us-x1-a', 'algo=dpo'), 'algo=dpo: flags of jaxalign begin with --'),
          (('my-tpu', 'us-x1-a', '--create', '--algo=dpo'), '--create needs a value: --create=...'),
          (('my-tpu', 'us-x1-a', '--logs=', '--algo=dpo'), '--logs needs a value: --logs=...'),
          (('my-tpu', 'us-x1-a', '--spot=1', '--algo=dpo'), '--spot takes no value'),
          (('my-tpu', 'us-x1-a', '--algo=dpo', '--delete'), '--delete must come before the flags of jaxalign'),
          (('my-tpu', 'us-x1-a', '--creat=v6e-8', '--algo=dpo'), '--creat: neither an option nor a flag of jaxalign'),
          (('my-tpu', 'us-x1-a', '--algo=dpo', '--step=1'), '--step: neither an option nor a flag of jaxalign'),
          (('my-tpu', 'us-x1-a', '--restarts=x', '--algo=dpo'), '--restarts=x: it is a number'),
          (('my-tpu', 'us-x1-a', '--restarts=08', '--algo=dpo'), '--restarts=08: it is a number'),
          (('my-tpu', 'us-x1-a', '--create=h100', '--algo=dpo'), '--create=h100: not a type that is known here'),
          (('my-tpu', 'us-x1-a', '--create=v5e-16', '--algo=dpo'), 'Google calls it v5litepod-16'),
          (('my-tpu', 'us-x1-a', '--create=tpu7x-8', '--algo=dpo'), 'launch/gke/run.sh'),
          (('my-tpu', 'us-x1-a', '--spot', '--algo=dpo'), 'they need --create'),
          (('my-tpu', 'us-x1-a', '--stop', '--algo=dpo'), 'it takes no flags of jaxalign'),
      ],
  )
  def test_says_what_is_wrong_in_one_line_and_calls_nothing(self, run, args, problem):
    done = run(*args)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert done.stderr.startswith('jaxalign: ')
    assert problem in done.stderr
    assert not run.log()

  @pytest.mark.skipif(shutil.which('gcloud', path='/usr/bin:/bin') is not None, reason='this machine has gcloud')
  def test_says_that_gcloud_is_missing(self, run):
    (run.calls / 'bin' / 'gcloud').unlink()
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('jaxalign: gcloud is not installed')

  def test_runs_nothing_where_the_checkout_could_not_be_copied(self, run):
    run.tell('fail-scp', 'no route to host')
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert (done.returncode, done.stdout) == (255, '')
    assert 'could not copy the checkout to my-tpu in us-x1-a' in done.stderr
    assert 'tpu-vm ssh' not in run.log()

  @pytest.mark.parametrize('code', [1, 2, 139])
  def test_passes_the_exit_code_of_half_the_workers_on_and_does_not_start_again(self, run, code):
    run.tell('worker-1/exit', code, 0)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == code
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh']

  def test_prints_what_it_would_do_and_does_nothing(self, run):
    options = ['--create=v6e-16', '--queued', '--spot', '--logs=my logs', '--delete', '--project=p']
    done = run('my-tpu', 'us-x1-a', '--dry_run', *options, '--workdir=gs://b/r', '--prompt=once\nupon')
    assert (done.returncode, done.stderr) == (0, '')
    assert not run.log()
    assert not (run.here / 'my logs').exists()
    said = 'say() { printf "%s\\0" "$@"; printf "\\n\\0"; }\n'
    said += 'alias gcloud="say gcloud" tar="say tar" mkdir="say mkdir"\n'
    read = ['bash', '-c', f'shopt -s expand_aliases\n{said}{done.stdout}']
    words = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    commands = [command.split('\0')[:-1] for command in words.split('\n\0')[:-1]]
    assert len(commands) == done.stdout.count('\n')
    asked = [words for words in commands if words[0] == 'gcloud']
    assert all({'--zone=us-x1-a', '--project=p'} < set(words) for words in asked)
    verbs = [' '.join(words[3:5]) for words in asked if words[4] != 'describe']
    assert verbs == ['queued-resources create', 'tpu-vm scp', 'tpu-vm ssh', 'tpu-vm scp', 'queued-resources delete']
    assert {words[0] for words in commands} == {'gcloud', 'tar', 'mkdir'}

  def test_passes_what_follows_two_dashes_on_whatever_it_is(self, run):
    done = run('my-tpu', 'us-x1-a', '--', '--delete', '--algo=dpo')
    assert done.stdout.startswith('[--delete][--algo=dpo]')
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh']


class TestCreating:

  def test_says_what_becomes_of_a_run_whose_workdir_nobody_named(self, run):
    said = 'jaxalign: without --workdir checkpoints stay on the disks of the machines, and go with them'
    for flags, wanted in [(['--algo=dpo'], True), (['--algo=dpo', '--workdir=gs://b/r'], False), (['--delete'], False)]:
      done = run('my-tpu', 'us-x1-a', '--create=v6e-8', *flags)
      assert (done.returncode, said in done.stderr.splitlines()) == (0, wanted), done.stderr

  def test_reuses_a_vm_that_is_ready(self, run):
    assert run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo').returncode == 0
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh']

  def test_names_the_option_where_there_is_no_vm(self, run):
    run.tell('tpu-vm', 'ABSENT')
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert done.returncode == 1
    assert done.stderr.startswith('jaxalign: there is no TPU VM my-tpu in us-x1-a: --create=ACCELERATOR_TYPE')
    assert not run.changes()

  @pytest.mark.parametrize(
      'kind, version',
      [
          ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
          ('v5p-32', 'v2-alpha-tpuv5'),
          ('v6e-8', 'v2-alpha-tpuv6e'),
          ('v4-8', 'tpu-ubuntu2204-base'),
      ],
  )
  def test_makes_one_with_the_image_of_its_generation(self, run, kind, version):
    run.tell('tpu-vm', 'ABSENT')
    assert run('my-tpu', 'us-x1-a', f'--create={kind}', '--spot', '--algo=dpo').returncode == 0
    assert run.changes() == ['tpu-vm create', 'tpu-vm scp', 'tpu-vm ssh']
    flags = f'create|my-tpu|--accelerator-type={kind}|--version={version}|--spot|--zone=us-x1-a|'
    assert flags in (run.calls / 'log').read_text()

  @pytest.mark.parametrize('state', ['PREEMPTED', 'TERMINATED', 'STOPPED'])
  def test_makes_one_anew_that_was_taken_away(self, run, state):
    run.tell('tpu-vm', state)
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert done.returncode == 1
    assert f'my-tpu is {state}: with --create=ACCELERATOR_TYPE' in done.stderr
    assert run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo').returncode == 0
    assert run.changes() == ['tpu-vm delete', 'tpu-vm create', 'tpu-vm scp', 'tpu-vm ssh']

  @pytest.mark.parametrize(
      'message, advice',
      [
          (
              "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded",
              'the project has no quota for v5litepod-16',
          ),
          ('There is no more capacity in the zone "us-x1-a"', 'us-x1-a has no free v5litepod-16 now: --queued waits'),
          ('Permission denied', 'could not make my-tpu; see the message of gcloud above'),
      ],
  )
  def test_says_why_it_could_not_make_one(self, run, message, advice):
    run.tell('tpu-vm', 'ABSENT')
    run.tell('fail-create', message)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'jaxalign: {advice}')
    assert run.changes() == ['tpu-vm create']

  def test_says_that_it_could_not_ask(self, run):
    run.tell('fail-describe', 'ERROR: You do not currently have an active account selected.')
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == 1
    assert 'active account' in done.stderr
    assert done.stderr.splitlines()[-1].startswith('jaxalign: could not ask for the state of my-tpu')
    assert not run.changes()

  def test_waits_in_the_queue_until_it_is_active(self, run):
    run.tell('tpu-vm', 'ABSENT')
    run.tell('queued-resources.next', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'WAITING_FOR_RESOURCES', 'ACTIVE')
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--queued', '--spot', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('my-tpu is WAITING_FOR_RESOURCES; waiting') == 1
    assert run.changes() == ['queued-resources create', 'tpu-vm scp', 'tpu-vm ssh']
    flags = '--accelerator-type=v5litepod-16|--runtime-version=v2-alpha-tpuv5-lite|--node-id=my-tpu|--spot|'
    assert flags in (run.calls / 'log').read_text()

  def test_takes_up_the_place_in_the_queue_that_it_has(self, run):
    run.tell('queued-resources', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
    assert run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--queued', '--algo=dpo').returncode == 0
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh']

  @pytest.mark.parametrize(
      'state, problem',
      [
          ('FAILED', 'my-tpu FAILED in the queue: no such network'),
          ('SUSPENDED', 'my-tpu is SUSPENDED before it could be used'),
      ],
  )
  def test_gives_up_where_the_queue_does(self, run, state, problem):
    run.tell('tpu-vm', 'ABSENT')
    run.tell('queued-resources.next', 'WAITING_FOR_RESOURCES', state)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--queued', '--algo=dpo')
    assert done.returncode == 1
    assert problem in done.stderr.splitlines()[-1]
    assert run.changes() == ['queued-resources create']

  def test_asks_again_for_what_failed_the_last_time(self, run):
    run.tell('queued-resources', 'FAILED')
    assert run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--queued', '--algo=dpo').returncode == 0
    assert run.changes()[:2] == ['queued-resources delete', 'queued-resources create']


class TestRestarting:

  def test_makes_a_vm_that_was_taken_away_anew_and_goes_on(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    assert 'jaxalign: my-tpu is PREEMPTED: restart 1 of 3' in done.stderr.splitlines()
    once = ['tpu-vm scp', 'tpu-vm ssh']
    assert run.changes() == [*once, 'tpu-vm delete', 'tpu-vm create', *once]
    assert '[--algo=dpo] auto in worker-1' in done.stdout.splitlines()

  def test_takes_a_new_place_in_the_queue_once_the_old_one_is_gone(self, run):
    run.tell('queued-resources', 'ACTIVE', 'SUSPENDING', 'SUSPENDING', 'SUSPENDED')
    run.tell('ssh', 255)
    assert run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--queued', '--algo=dpo').returncode == 0
    once = ['tpu-vm scp', 'tpu-vm ssh']
    assert run.changes() == [*once, 'queued-resources delete', 'queued-resources create', *once]
    assert '|delete|my-tpu|--quiet|--force|' in (run.calls / 'log').read_text()

  def test_starts_again_on_the_same_vm_where_the_run_asks_for_it(self, run):
    for worker in range(2):
      run.tell(f'worker-{worker}/exit', 75)
    done = run('my-tpu', 'us-x1-a', '--restarts=1', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm scp', 'tpu-vm ssh']
    assert sorted(done.stdout.splitlines()) == [f'[--algo=dpo] auto in worker-{i}' for i in (0, 0, 1, 1)]
    assert (run.calls / 'worker-0/jaxalign/launch.log').read_text().count('step 1') == 2

  def test_does_not_start_again_where_one_worker_failed_and_the_others_only_lost_it(self, run):
    run.tell('worker-0/exit', 75)
    run.tell('worker-1/exit', 1)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == 1
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh']

  def test_starts_again_where_jax_ended_a_worker_that_lost_another(self, run):
    run.tell('worker-0/exit', 75)
    run.tell('worker-1/exit', 134)
    done = run('my-tpu', 'us-x1-a', '--restarts=1', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    assert 'the run asked to be started again: restart 1 of 1' in done.stderr

  def test_ends_after_as_many_restarts_as_were_asked_for(self, run):
    for worker in range(2):
      run.tell(f'worker-{worker}/exit', 75, 75, 75)
    done = run('my-tpu', 'us-x1-a', '--restarts=1', '--algo=dpo')
    assert done.returncode == 75
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh'] * 2
    assert 'the same command goes on from the last checkpoint' in done.stderr.splitlines()[-1]

  def test_does_not_make_a_vm_anew_that_it_was_not_to_make(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    done = run('my-tpu', 'us-x1-a', '--algo=dpo')
    assert done.returncode == 255
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh']

  def test_connects_again_to_a_run_whose_connection_was_lost(self, run):
    run.tell('ssh', 255)
    done = run('my-tpu', 'us-x1-a', '--restarts=1', '--algo=dpo')
    assert done.returncode == 0
    assert 'the connection to my-tpu was lost: restart 1 of 1' in done.stderr

  def test_waits_before_it_connects_again_also_to_copy(self, run):
    write_down_sleep(run)
    run.tell('ssh', 255)
    run.tell('scp', 0, 1)
    done = run('my-tpu', 'us-x1-a', '--restarts=2', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    once = ['tpu-vm scp', 'tpu-vm ssh']
    assert run.changes() == [*once, 'sleep 0.01', 'tpu-vm scp', 'sleep 0.01', *once]
    assert 'the connection to my-tpu was lost: restart 2 of 2' in done.stderr

  def test_tries_again_where_there_is_no_room_to_make_a_vm_anew(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    run.tell('create', 9, 9)
    write_down_sleep(run)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if 'restart' in line]
    why = ['my-tpu is PREEMPTED', *['us-x1-a has no free v5litepod-16 now'] * 2]
    assert said == [f'jaxalign: {reason}: restart {i} of 3' for i, reason in enumerate(why, 1)]
    once = ['tpu-vm scp', 'tpu-vm ssh']
    waits = ['sleep 0.01'] * 20
    creates = ['tpu-vm create', *waits, 'tpu-vm create', *waits, 'tpu-vm create']
    assert run.changes() == [*once, 'tpu-vm delete', *creates, *once]

  def test_gives_up_where_there_is_none_after_as_many_restarts_as_were_asked_for(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    run.tell('create', 9, 9, 9)
    done = run('my-tpu', 'us-x1-a', '--create=v5litepod-16', '--restarts=2', '--delete', '--algo=dpo')
    assert done.returncode == 255
    next_ = 'the same command goes on from the last checkpoint'
    assert done.stderr.splitlines()[-1] == f'jaxalign: us-x1-a has no free v5litepod-16 now; {next_}'
    assert run.changes()[2:] == ['tpu-vm delete', *['tpu-vm create'] * 2]


AGAIN = 'bash launch/tpu_vm.sh my-tpu us-x1-a'
STAYS = f'jaxalign: my-tpu stays: {AGAIN} --stop ends what may run there, --delete the VM itself'


class TestDeleting:

  @pytest.fixture
  def alive(self, run):
    """A run that goes on, on both workers, which nobody watches any more."""
    run.tell('slow')
    started = [run.worker('1', '0', '--algo=dpo', index=i) for i in range(2)]
    run.wait_for('worker-0/started', 'worker-1/started')
    yield run
    (run.calls / 'slow').unlink()
    for process in started:
      process.communicate(timeout=20)
      assert process.returncode == 0

  def test_leaves_a_vm_where_another_run_is_going_on(self, alive):
    done = alive('my-tpu', 'us-x1-a', '--delete', '--algo=dpo')
    assert done.returncode == 1
    assert 'jaxalign: another run is going on here: launch/tpu_vm.sh NAME ZONE --stop ends it' in done.stderr
    assert done.stderr.splitlines()[-1] == STAYS
    assert alive.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh']

  @pytest.mark.parametrize('scp, ssh', [((0,), (255,)), ((0,), (255, 255)), ((1,), ()), ((0, 1), (255,))])
  def test_leaves_a_vm_whose_run_may_go_on_as_the_connection_was_lost(self, alive, scp, ssh):
    alive.tell('scp', *scp)
    alive.tell('ssh', *ssh)
    done = alive('my-tpu', 'us-x1-a', f'--restarts={len(scp) - 1}', '--delete', '--algo=dpo')
    assert done.returncode == 255
    assert done.stderr.splitlines()[-1] == STAYS
    assert 'tpu-vm delete' not in alive.log()

  def test_leaves_a_vm_that_cannot_be_asked_whether_a_run_goes_on(self, run):
    run.tell('ssh', 255, 255)
    done = run('my-tpu', 'us-x1-a', '--delete', '--algo=dpo')
    assert (done.returncode, done.stderr.splitlines()[-1]) == (255, STAYS)
    assert 'tpu-vm delete' not in run.log()

  def test_deletes_one_where_no_run_goes_on(self, run):
    run.tell('ssh', 255)
    assert run('my-tpu', 'us-x1-a', '--delete', '--algo=dpo').returncode == 255
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm delete']

  def test_deletes_one_that_was_taken_away_without_asking_it(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    assert run('my-tpu', 'us-x1-a', '--delete', '--algo=dpo').returncode == 255
    assert run.changes() == ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm delete']

  def test_leaves_a_vm_whose_run_could_not_be_stopped(self, run):
    run.tell('slow')
    run.tell('fail-stop')
    running = run.start('my-tpu', 'us-x1-a', '--delete', '--algo=dpo')
    run.wait_for('worker-0/started', 'worker-1/started')
    os.killpg(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=20)
    (run.calls / 'slow').unlink()
    assert running.returncode == 143
    assert 'could not stop it on all workers' in err
    assert err.splitlines()[-1] == STAYS
    assert 'tpu-vm delete' not in run.log()
    run.wait_for('worker-0/jaxalign/.launch/code', 'worker-1/jaxalign/.launch/code')

  def test_does_not_wait_for_a_run_that_could_not_be_stopped(self, run):
    run.tell('slow')
    run.tell('fail-stop')
    running = run.start('my-tpu', 'us-x1-a', '--logs=logs', '--algo=dpo')
    run.wait_for('worker-0/started', 'worker-1/started')
    running.terminate()  # the shell alone
    assert running.wait(timeout=20) == 143
    assert (run.here / 'logs' / 'worker-1' / 'launch.log').exists()
    assert not (run.calls / 'worker-0/jaxalign/.launch/code').exists()  # It still goes on.
    (run.calls / 'slow').unlink()
    run.wait_for('worker-0/jaxalign/.launch/code', 'worker-1/jaxalign/.launch/code')

  def test_leaves_a_vm_with_another_run_where_it_is_interrupted_before_its_own(self, alive):
    alive.tell('slow-scp')
    running = alive.start('my-tpu', 'us-x1-a', '--delete', '--algo=dpo')
    alive.wait_for('copying')
    os.killpg(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=20)
    assert (running.returncode, err.splitlines()[-1]) == (143, STAYS)
    assert 'tpu-vm delete' not in alive.log()

  @pytest.mark.parametrize('state, is_deleted', [('ABSENT', False), ('CREATING', True)])
  def test_ends_what_makes_one_where_it_is_interrupted_and_deletes_what_there_is_then(self, run, state, is_deleted):
    run.tell('slow-create')
    run.tell('tpu-vm', 'ABSENT')
    running = run.start('my-tpu', 'us-x1-a', '--create=v6e-8', '--delete', '--workdir=gs://b/r')
    run.wait_for('making')
    run.tell('tpu-vm', state)
    running.terminate()  # the shell alone
    _, err = running.communicate(timeout=20)
    assert running.returncode == 143
    assert ('tpu-vm delete' in run.log()) == is_deleted
    said = err.splitlines()
    stays = 'jaxalign: my-tpu was being made, and may still come: bash launch/tpu_vm.sh my-tpu us-x1-a --delete'
    assert said[0].startswith('jaxalign: making') and said[1:] == ['jaxalign: deleting my-tpu' if is_deleted else stays]
    time.sleep(3)
    assert not (run.calls / 'made').exists()

  def test_deletes_one_that_it_waits_for_where_it_is_interrupted(self, run):
    run.tell('tpu-vm', 'CREATING')
    running = run.start('my-tpu', 'us-x1-a', '--delete', '--algo=dpo')
    deadline = time.monotonic() + 20
    while len(run.log()) < 3 and time.monotonic() < deadline:
      time.sleep(0.02)
    os.killpg(running.pid, signal.SIGTERM)
    running.communicate(timeout=20)
    assert (running.returncode, run.changes()) == (143, ['tpu-vm delete'])


class TestEnding:

  @pytest.mark.parametrize('code', [0, 1])
  def test_fetches_the_logs_of_all_workers_however_the_run_ended(self, run, code):
    run.tell('worker-1/exit', code)
    done = run('my-tpu', 'us-x1-a', '--logs=my logs', '--delete', '--algo=dpo')
    assert done.returncode == code
    for worker in range(2):
      folder = run.here / 'my logs' / f'worker-{worker}'
      assert f'step 1 in worker-{worker}\n' in (folder / 'launch.log').read_text()
      assert (folder / 'launch.out').read_text() == f'[--algo=dpo] auto in worker-{worker}\n'
    assert run.changes()[-1] == 'tpu-vm delete'

  def test_passes_the_exit_code_on_though_the_logs_are_lost(self, run):
    run.tell('tpu-vm', 'READY', 'PREEMPTED')
    run.tell('ssh', 255)
    done = run('my-tpu', 'us-x1-a', '--logs=logs', '--algo=dpo')
    assert done.returncode == 255
    said = done.stderr.splitlines()[-4:]  # of copies at the same time, each as a whole
    for worker in range(2):
      at = said.index(f'no log of worker-{worker}')
      assert said[at + 1] == f'jaxalign: could not fetch the log of worker {worker}'

  @pytest.mark.parametrize('place, kind', [('ABSENT', 'tpu-vm'), ('ACTIVE', 'queued-resources')])
  def test_deletes_at_once_where_no_run_is_asked_for(self, run, place, kind):
    run.tell('queued-resources', place)
    assert run('my-tpu', 'us-x1-a', '--delete').returncode == 0
    assert run.changes() == [f'{kind} delete']

  @pytest.mark.parametrize(
      'to, how, code',
      [
          (os.killpg, signal.SIGINT, 130),
          (os.killpg, signal.SIGTERM, 143),
          (os.kill, signal.SIGTERM, 143),  # the shell alone, as containers do, and not what it runs
      ],
  )
  def test_lets_the_workers_save_where_it_is_interrupted(self, run, to, how, code):
    run.tell('slow')
    running = run.start('my-tpu', 'us-x1-a', '--logs=logs', '--delete', '--algo=dpo')
    run.wait_for('worker-0/started', 'worker-1/started')
    to(running.pid, how)
    _, err = running.communicate(timeout=20)
    assert running.returncode == code
    assert 'stopping the run on all workers of my-tpu' in err
    for worker in range(2):
      home = run.calls / f'worker-{worker}'
      assert (home / 'saved').exists()
      assert (home / 'killed').read_text() == 'pkill|-TERM|-f|--|-m jaxalign[.]main|jaxalign/launch/local[.]sh|'
      assert (run.here / 'logs' / f'worker-{worker}' / 'launch.log').exists()
    assert run.changes()[-1] == 'tpu-vm delete'

  def test_stops_a_run_that_another_command_started(self, run):
    run.tell('slow')
    running = run.worker('1', '0', '--algo=dpo')
    run.wait_for('worker-0/started')
    done = run('my-tpu', 'us-x1-a', '--stop')
    assert done.returncode == 0, done.stderr
    assert run.log() == ['tpu-vm ssh']
    assert (run.calls / 'worker-0/saved').exists()
    assert done.stderr == 'jaxalign: nothing runs here\n'  # on the other one
    running.communicate(timeout=20)
    assert running.returncode == 143  # not 75, at which the other command would start it again

  def test_stops_a_run_for_which_python_is_still_installed(self, run):
    run.tell('slow')
    run.tell('worker-0/old')
    running = run.worker('1', '0', '--algo=dpo')
    run.wait_for('worker-0/installing')
    stopping = run.start('my-tpu', 'us-x1-a', '--stop')
    run.wait_for('worker-0/jaxalign/.launch/stopped')
    (run.calls / 'slow').unlink()
    _, err = stopping.communicate(timeout=20)
    assert (stopping.returncode, err) == (0, 'jaxalign: nothing runs here\n')  # on the other one
    out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (143, '')
    assert err.splitlines() == ['jaxalign: getting Python 3.12', 'jaxalign: stopped before the run began']

  def test_notices_a_host_that_vanishes_whatever_it_is_asked(self, run):
    run.tell('worker-0/exit', 75)
    run.tell('worker-1/exit', 1)
    run('my-tpu', 'us-x1-a', '--project=p', '--delete', '--algo=dpo')
    run('my-tpu', 'us-x1-a', '--project=p', '--stop')
    calls = (run.calls / 'log').read_text().split('compute|tpus|')
    asked = [call for call in calls if call.startswith('tpu-vm|ssh|')]
    ends = '|--zone=us-x1-a|--project=p|--|-o|ServerAliveInterval=30|-o|ServerAliveCountMax=4|\n'
    assert [call.endswith(ends) for call in asked] == [True] * 4  # to run, for codes, whether a run goes on, to stop


class TestWorker:

  def test_shows_what_becomes_of_a_run_when_it_is_called_again(self, run):
    run.tell('slow')
    run.tell('worker-0/exit', 7)
    first = run.worker('1', '0', '--algo=dpo')
    run.wait_for('worker-0/started')
    first.kill()
    for pipe in (first.stdout, first.stderr):
      pipe.close()
    first.wait()
    again = run.worker('1', '0', '--algo=dpo')
    other = run.worker('2', '0', '--algo=dpo')
    _, err = other.communicate(timeout=20)
    assert other.returncode == 1
    assert err == 'jaxalign: another run is going on here: launch/tpu_vm.sh NAME ZONE --stop ends it\n'
    (run.calls / 'slow').unlink()
    out, err = again.communicate(timeout=20)
    assert (again.returncode, out) == (7, '[--algo=dpo]  in worker-0\n')
    assert 'step 1 in worker-0' in err
    after = run.worker('1', '0', '--algo=dpo')
    assert after.communicate(timeout=20)[0] == out
    assert after.returncode == 7
    assert (run.calls / 'worker-0/jaxalign/launch.log').read_text().count('step 1') == 1

  def test_asks_for_a_restart_where_the_machine_was_started_again(self, run):
    run.worker('1', '0', '--algo=dpo').communicate(timeout=20)
    (run.calls / 'worker-0/jaxalign/.launch/code').unlink()
    again = run.worker('1', '0', '--algo=dpo')
    assert again.communicate(timeout=20) == ('', 'jaxalign: this machine was started again during the run\n')
    assert again.returncode == 75

  def test_gets_a_python_where_that_of_the_image_is_too_old(self, run):
    run.tell('worker-0/old')
    done = run.worker('1', '0', '--algo=dpo')
    out, err = done.communicate(timeout=20)
    assert (done.returncode, out) == (0, '[--algo=dpo]  in worker-0\n'), err
    asked = (run.calls / 'log').read_text().splitlines()
    assert asked == ['uv|python install --quiet 3.12', 'uv|python find 3.12']
