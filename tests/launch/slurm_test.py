"""launch/slurm.sh, with an sbatch that keeps the script, and an srun of two tasks."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# `fail` holds its exit code.
SBATCH = """#!/usr/bin/env bash
printf '%s|' sbatch "$@" >>"$CALLS/log"
echo >>"$CALLS/log"
[[ ! -e $CALLS/fail ]] || { echo 'sbatch: error: invalid partition specified' >&2; exit "$(cat "$CALLS/fail")"; }
cat >"$CALLS/script"
echo '123;cluster'
"""
# Two tasks, or the one that makes the environment; as the real one it exits with the highest code.
SRUN = """#!/usr/bin/env bash
tasks=(0 1)
while [[ $1 == -* ]]; do
  printf '%s|' "$1" >>"$CALLS/srun"
  [[ $1 != --ntasks=1 ]] || tasks=(0)
  shift
done
echo >>"$CALLS/srun"
highest=0
for task in "${tasks[@]}"; do
  SLURM_PROCID=$task "$@" &
  echo $! >"$CALLS/task-$task"
done
for task in "${tasks[@]}"; do
  wait "$(cat "$CALLS/task-$task")" || { code=$?; ((code <= highest)) || highest=$code; }
done
exit "$highest"
"""
# In place of launch/local.sh: exits with the code that is told of the task, or where it is `wait`, as SIGTERM comes.
LOCAL = """#!/usr/bin/env bash
printf '%s|' "$@" >>"$CALLS/log-$SLURM_PROCID"
echo "JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS-}" >>"$CALLS/log-$SLURM_PROCID"
if [[ $1 == --list ]]; then
  echo 'a list'
  exit "$(cat "$CALLS/setup" 2>/dev/null || echo 0)"
fi
code=$(cat "$CALLS/code-$SLURM_PROCID")
if [[ $code == wait ]]; then
  trap 'exit 75' TERM
  kill -TERM "$PPID"  # Slurm tells all processes of a task.
  kill -TERM $$
  code=0
fi
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s|' scontrol "$@" >>"$CALLS/log"
echo >>"$CALLS/log"
"""


@pytest.fixture
def cluster(tmp_path):
  return Cluster(tmp_path)


class Cluster:

  def __init__(self, folder):
    self.calls = folder / 'calls'
    self.here = folder / 'elsewhere'
    (self.calls / 'bin').mkdir(parents=True)
    self.here.mkdir()
    for name, text in (('sbatch', SBATCH), ('srun', SRUN), ('scontrol', SCONTROL)):
      (self.calls / 'bin' / name).write_text(text)
      (self.calls / 'bin' / name).chmod(0o755)
    (self.calls / 'log').touch()
    self.checkout = folder / 'my checkout'
    shutil.copytree(ROOT / 'launch', self.checkout / 'launch')
    (self.checkout / 'launch' / 'local.sh').write_text(LOCAL)
    (self.checkout / 'jaxalign').mkdir()
    shutil.copytree(ROOT / 'jaxalign' / 'cli', self.checkout / 'jaxalign' / 'cli')

  def _call(self, *command, **env):
    paths = {'PATH': f'{self.calls / "bin"}:/usr/bin:/bin', 'CALLS': str(self.calls)}
    env = os.environ | paths | {'SLURM_JOB_ID': '123'} | env
    return subprocess.run(command, cwd=self.here, env=env, capture_output=True, text=True, check=False)

  def submit(self, *args):
    return self._call('bash', str(self.checkout / 'launch' / 'slurm.sh'), *args)

  def start(self, *codes, **env):
    """Does what Slurm would with the script."""
    for task, code in enumerate(codes):
      (self.calls / f'code-{task}').write_text(str(code))
    return self._call('bash', str(self.calls / 'script'), **env)

  def log(self):
    return (self.calls / 'log').read_text().splitlines()


class TestSlurm:

  def test_prints_the_id_of_a_job_that_saves_before_its_time_is_up(self, cluster):
    options = ['--nodes=2', '--gpus=8', '--time=12:00:00', '--partition=p', '--account=a', '--job_name=j']
    done = cluster.submit(*options, '--log_dir=my logs', '--algo=dpo')
    assert (done.returncode, done.stdout) == (0, '123\n'), done.stderr
    (asked,) = cluster.log()
    wanted = {
        '--nodes=2',
        '--ntasks-per-node=1',
        '--gpus-per-node=8',
        '--time=12:00:00',
        '--partition=p',
        '--account=a',
    }
    wanted |= {'--job-name=j', '--requeue', '--signal=TERM@120', '--output=my logs/%x-%j.log', '--open-mode=append'}
    assert set(asked.split('|')) >= wanted
    assert (cluster.here / 'my logs').is_dir()

  @pytest.mark.parametrize(
      'options, share', [((), {'--exclusive', '--mem=0'}), (('--cpus_per_gpu=6',), {'--cpus-per-gpu=6'})]
  )
  def test_asks_for_whole_nodes_or_for_cores_of_each_gpu(self, cluster, options, share):
    cluster.submit('--gpus=2', *options, '--algo=dpo')
    (asked,) = cluster.log()
    assert {one for one in asked.split('|') if one.startswith(('--exclusive', '--mem', '--cpus'))} == share

  def test_runs_a_task_on_every_node_with_all_of_its_gpus_and_these_flags(self, cluster):
    cluster.submit('--nodes=2', '--gpus=4', '--algo=dpo', '--prompt=once upon', "--gin=a.b='$*'", '--eval_data=')
    assert cluster.start(0, 0).returncode == 0
    setup, run = (cluster.calls / 'srun').read_text().splitlines()
    # Clusters may end all tasks with the first, and may bind each to one core.
    options = '--ntasks-per-node=1|--wait=300|--kill-on-bad-exit=0|--cpu-bind=none|'
    assert (setup, run) == ('--nodes=1|--ntasks=1|', options)
    flags = "--algo=dpo|--prompt=once upon|--gin=a.b='$*'|--eval_data=|JAX_LOCAL_DEVICE_IDS=0,1,2,3"
    first, second = ((cluster.calls / f'log-{task}').read_text().splitlines() for task in range(2))
    # So that what the flags need is installed once.
    assert (first, second) == ([f'--list|{flags.partition("=0,")[0]}=', flags], [flags])

  @pytest.mark.parametrize('codes', [(75, 75), (75, 0), ('wait', 'wait')])
  def test_goes_back_to_the_queue_where_the_run_asks_for_it(self, cluster, codes):
    cluster.submit('--algo=dpo')
    done = cluster.start(*codes)
    assert done.returncode == 75, done.stderr
    assert cluster.log()[-1] == 'scontrol|requeue|123|'

  @pytest.mark.parametrize('options, limit', [((), 30), (('--restarts=2',), 2)])
  def test_does_so_as_often_as_it_may(self, cluster, options, limit):
    cluster.submit(*options, '--algo=dpo')
    done = cluster.start(75, 75, SLURM_RESTART_COUNT=str(limit - 1))
    assert (done.returncode, cluster.log()[-1]) == (75, 'scontrol|requeue|123|')
    (cluster.calls / 'log').write_text('')
    done = cluster.start(75, 75, SLURM_RESTART_COUNT=str(limit))
    assert (done.returncode, cluster.log()) == (75, [])
    said = f'jaxalign: --restarts={limit} are used up; the same command goes on from the last checkpoint\n'
    assert done.stderr == said

  @pytest.mark.parametrize('codes, code', [((0, 0), 0), ((75, 1), 1), ((2, 75), 2), ((75, 137), 137)])
  def test_passes_other_exit_codes_on_also_where_one_task_failed_and_the_others_lost_it(self, cluster, codes, code):
    cluster.submit('--algo=dpo')
    assert cluster.start(*codes).returncode == code
    assert not [line for line in cluster.log() if line.startswith('scontrol')]

  def test_runs_nothing_where_the_environment_could_not_be_made(self, cluster):
    cluster.submit('--algo=dpo')
    (cluster.calls / 'setup').write_text('1')
    assert cluster.start(0, 0).returncode == 1
    assert not (cluster.calls / 'log-1').exists()

  def test_passes_the_exit_code_of_sbatch_on(self, cluster):
    (cluster.calls / 'fail').write_text('3')
    done = cluster.submit('--partition=p', '--algo=dpo')
    assert (done.returncode, done.stdout) == (3, '')
    assert done.stderr.splitlines()[-1] == 'jaxalign: sbatch refused the job; see its message above'

  def test_prints_what_it_would_submit_and_submits_nothing(self, cluster):
    done = cluster.submit('--dry_run', '--nodes=2', '--algo=dpo')
    assert (done.returncode, done.stderr, cluster.log()) == (0, '', [])
    assert done.stdout.startswith('sbatch --parsable --job-name=jaxalign --nodes=2 ')
    assert not list(cluster.here.iterdir())
    cluster.submit('--nodes=2', '--algo=dpo')
    assert (cluster.calls / 'script').read_text() in done.stdout

  @pytest.mark.parametrize(
      'args, problem',
      [
          ((), 'usage: bash launch/slurm.sh'),
          (('--nodes=2',), 'usage: '),
          (('--nodes=0', '--algo=dpo'), '--nodes=0: it is a number, at least 1'),
          (('--gpus=many', '--algo=dpo'), '--gpus=many: it is a number, at least 1'),
          (('--cpus_per_gpu=0', '--algo=dpo'), '--cpus_per_gpu=0: it is a number, at least 1'),
          (('--restarts=09', '--algo=dpo'), '--restarts=09: it is a number'),
          (('--time=noon', '--algo=dpo'), '--time=noon: write HH:MM:SS'),
          (('--job_name=a b', '--algo=dpo'), '--job_name=a b: letters'),
          (('--partition', '--algo=dpo'), '--partition needs a value: --partition=...'),
          (('--algo=dpo', '--nodes=2'), '--nodes must come before the flags of jaxalign'),
          (('--gpu=8', '--algo=dpo'), '--gpu: neither an option nor a flag of jaxalign'),
          (('dpo',), 'dpo: flags of jaxalign begin with --'),
      ],
  )
  def test_says_what_is_wrong_in_one_line_and_calls_nothing(self, cluster, args, problem):
    done = cluster.submit(*args)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'jaxalign: {problem}')
    assert not cluster.log()

  def test_says_that_sbatch_is_missing(self, cluster):
    (cluster.calls / 'bin' / 'sbatch').unlink()
    done = cluster.submit('--algo=dpo')
    assert done.returncode == 1
    assert done.stderr == 'jaxalign: sbatch is not installed: run this on a login node of the cluster\n'
