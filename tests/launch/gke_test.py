"""launch/gke/run.sh, with an xpk, a kubectl and a gcloud that write down what they are asked for, and may fail."""

import importlib
import json
import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """#!/usr/bin/env bash
printf '%s|' "${0##*/}" "$@" >>"$CALLS/log"
echo >>"$CALLS/log"
[[ "$*" != *--filename=-* ]] || cat >"$CALLS/jobset"
[[ ! -e $CALLS/print ]] || cat "$CALLS/print"
[[ ! -e $CALLS/fail-${0##*/} ]] || { cat "$CALLS/fail-${0##*/}" >&2; exit 5; }
"""


@pytest.fixture
def run(tmp_path):
  return Cluster(tmp_path)


class Cluster:

  def __init__(self, folder):
    self.calls = folder
    (folder / 'bin').mkdir()
    (folder / 'log').touch()
    for name in ('kubectl', 'gcloud'):
      self.program(name)

  def program(self, name):
    (self.calls / 'bin' / name).write_text(PROGRAM)
    (self.calls / 'bin' / name).chmod(0o755)

  def fail(self, name, message):
    (self.calls / f'fail-{name}').write_text(f'{message}\n')

  def __call__(self, *args):
    env = os.environ | {'PATH': f'{self.calls / "bin"}:/usr/bin:/bin', 'CALLS': str(self.calls)}
    command = ['bash', str(ROOT / 'launch' / 'gke' / 'run.sh'), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

  def log(self):
    return (self.calls / 'log').read_text().splitlines()

  def lines(self):
    """The JobSet, a stripped line for each field."""
    return [line.strip() for line in (self.calls / 'jobset').read_text().splitlines()]


RUN = ('--name=my-run', '--image=gcr.io/p/jaxalign:1')


class TestKubectl:

  def test_submits_a_job_for_each_slice_and_a_pod_for_each_host(self, run):
    done = run(*RUN, '--tpu_type=v5litepod-16', '--slices=2', '--restarts=4', '--algo=dpo')
    assert done.returncode == 0, done.stderr
    assert run.log() == ['kubectl|apply|--filename=-|']
    wanted = ['kind: JobSet', 'name: my-run', 'maxRestarts: 4', 'replicas: 2', 'parallelism: 4', 'completions: 4']
    wanted += ['image: gcr.io/p/jaxalign:1', 'google.com/tpu: 4', 'terminationGracePeriodSeconds: 300']
    wanted += ['cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice', 'cloud.google.com/gke-tpu-topology: 4x4']
    lines = run.lines()
    assert [line for line in wanted if line not in lines] == []
    assert '{{' not in (run.calls / 'jobset').read_text()

  @pytest.mark.parametrize(
      'kind, topology, accelerator, hosts, chips',
      [
          ('v6e-8', '', 'tpu-v6e-slice', 2, 4),
          ('v6e-1', '', 'tpu-v6e-slice', 1, 1),
          ('v5litepod-256', '', 'tpu-v5-lite-podslice', 64, 4),
          ('v5p-32', '2x2x4', 'tpu-v5p-slice', 4, 4),
          ('v4-8', '2x2x1', 'tpu-v4-podslice', 1, 4),
          ('tpu7x-16', '2x2x2', 'tpu7x', 2, 4),
      ],
  )
  def test_knows_the_hosts_and_chips_of_a_slice(self, run, kind, topology, accelerator, hosts, chips):
    given = [f'--topology={topology}'] if topology else []
    assert run(*RUN, f'--tpu_type={kind}', *given, '--algo=dpo').returncode == 0
    lines = run.lines()
    assert f'cloud.google.com/gke-tpu-accelerator: {accelerator}' in lines
    assert (f'parallelism: {hosts}' in lines, f'google.com/tpu: {chips}' in lines) == (True, True)

  def test_passes_flags_on_as_they_are(self, run):
    flags = ['--algo=dpo', '--prompt="once" \\upon\n\t& a', "--gin=a.b='*'", '--stop=$(HOME) {{name}}', '--eval_data=']
    run(*RUN, '--tpu_type=v6e-8', *flags)
    (args,) = [line for line in run.lines() if line.startswith('args: ')]
    found = [flag.replace('$$(', '$(') for flag in json.loads(args.removeprefix('args: '))]
    assert found == flags
    assert '$$(HOME)' in args  # Kubernetes makes $(HOME) of it, and would put a variable in place of that.

  def test_writes_yaml(self, run):
    try:
      yaml = importlib.import_module('yaml')
    except ImportError:
      pytest.skip('PyYAML is not installed')
    run(*RUN, '--tpu_type=v6e-8', '--algo=dpo', '--prompt=a: "b" # c')
    jobset = yaml.safe_load((run.calls / 'jobset').read_text())
    job = jobset['spec']['replicatedJobs'][0]['template']['spec']
    (container,) = job['template']['spec']['containers']
    assert container['args'] == ['--algo=dpo', '--prompt=a: "b" # c']
    assert job['podFailurePolicy']['rules'][1]['onExitCodes']['containerName'] == container['name']
    assert container['resources'] == {'limits': {'google.com/tpu': 4}}

  @pytest.mark.parametrize(
      'claim, volume', [((), '[]'), (('--claim=disk',), '[{name: shared, mountPath: /mnt/shared}]')]
  )
  def test_mounts_the_disk_that_is_claimed(self, run, claim, volume):
    run(*RUN, '--tpu_type=v6e-8', *claim, '--algo=dpo')
    assert f'volumeMounts: {volume}' in run.lines()
    assert ('volumes: [{name: shared, persistentVolumeClaim: {claimName: disk}}]' in run.lines()) == bool(claim)

  def test_starts_all_again_unless_a_flag_is_wrong(self, run):
    run(*RUN, '--tpu_type=v6e-8', '--algo=dpo')
    lines = run.lines()
    assert lines[lines.index('- action: FailJob') :][:5][-2:] == ['operator: In', 'values: [2]']
    assert (lines.count('- action: FailJob'), 'restartPolicy: Never' in lines, 'backoffLimit: 0' in lines) == (
        1,
        True,
        True,
    )

  def test_is_indented_by_two(self):
    lines = (ROOT / 'launch' / 'gke' / 'jobset.yaml').read_text().splitlines()
    assert not [line for line in lines if '\t' in line or (len(line) - len(line.lstrip())) % 2]

  def test_goes_to_the_cluster_that_is_named(self, run):
    run(*RUN, '--cluster=c', '--zone=z', '--project=p', '--tpu_type=v6e-8', '--algo=dpo')
    assert run.log()[0] == 'gcloud|container|clusters|get-credentials|c|--location=z|--project=p|'
    assert run.log()[1:] == ['kubectl|apply|--filename=-|']

  def test_deletes_and_shows_logs(self, run):
    run('--name=my-run', '--delete')
    run('--name=my-run', '--logs')
    delete, logs = run.log()
    assert delete == 'kubectl|delete|jobset|my-run|'
    assert logs.startswith('kubectl|logs|--selector=jobset.sigs.k8s.io/jobset-name=my-run|')

  def test_passes_the_exit_code_on(self, run):
    run.fail('kubectl', 'connection refused')
    done = run(*RUN, '--tpu_type=v6e-8', '--algo=dpo', '--workdir=gs://b/r')
    assert (done.returncode, done.stderr) == (5, 'connection refused\n')

  def test_submits_nothing_where_there_is_no_such_cluster(self, run):
    run.fail('gcloud', 'ERROR: (gcloud.container.clusters.get-credentials) ResponseError: code=404')
    done = run(*RUN, '--cluster=c', '--tpu_type=v6e-8', '--algo=dpo')
    assert (done.returncode, 'code=404' in done.stderr) == (5, True)
    assert [line.split('|')[0] for line in run.log()] == ['gcloud']

  @pytest.mark.parametrize(
      'problem',
      [
          'Error from server (NotFound): pods "my-run-slice-0-1-x7k2p" not found',  # taken away with its node
          'Error from server (BadRequest): container "jaxalign" in pod "my-run-slice-0-1-x7k2p" is terminated',
      ],
  )
  def test_shows_what_the_other_pods_say_and_fails_where_a_pod_is_lost_while_it_is_followed(self, run, problem):
    said = '[pod/my-run-slice-0-0-b2c4d/jaxalign] jaxalign: another process of this job is gone\n'
    (run.calls / 'print').write_text(said)
    run.fail('kubectl', problem)
    done = run('--name=my-run', '--logs')
    assert (done.returncode, done.stdout, done.stderr) == (5, said, f'{problem}\n')
    assert '|--prefix|' in run.log()[0] and '|--follow|' in run.log()[0]  # which says of what pod each line is


class TestXpk:

  def test_submits_a_workload(self, run):
    run.program('xpk')
    flags = ['--algo=dpo', '--prompt=once upon', "--gin=a.b='$*'"]
    done = run(*RUN, '--cluster=c', '--zone=z', '--project=p', '--tpu_type=v5p-32', '--slices=2', *flags)
    assert done.returncode == 0, done.stderr
    (line,) = run.log()
    assert line.startswith('xpk|workload|create|--workload=my-run|--cluster=c|--tpu-type=v5p-32|--num-slices=2|')
    assert {'--docker-image=gcr.io/p/jaxalign:1', '--max-restarts=3', '--zone=z', '--project=p'} < set(line.split('|'))
    (command,) = [part for part in line.split('|') if part.startswith('--command=')]
    assert shlex.split(command.removeprefix('--command='))[:4] == ['exec', 'python', '-m', 'jaxalign.main']
    assert shlex.split(command)[4:] == flags

  def test_deletes_it(self, run):
    run.program('xpk')
    assert run('--name=my-run', '--cluster=c', '--delete').returncode == 0
    assert run.log() == ['xpk|workload|delete|--workload=my-run|--cluster=c|--force|']

  @pytest.mark.parametrize(
      'problem',
      [
          "[XPK] Quota exceeded for quota metric 'TPU V5 Lite PodSlice chips'",
          '[XPK] ERROR: Cluster c not found in project p',
      ],
  )
  @pytest.mark.parametrize(
      'what', [(*RUN, '--tpu_type=v6e-8', '--algo=dpo', '--workdir=gs://b/r'), ('--name=my-run', '--delete')]
  )
  def test_passes_on_what_xpk_fails_with_and_tries_nothing_else(self, run, what, problem):
    run.program('xpk')
    run.fail('xpk', problem)
    done = run('--cluster=c', *what)
    assert (done.returncode, done.stderr) == (5, f'{problem}\n')
    assert [line.split('|')[0] for line in run.log()] == ['xpk']

  @pytest.mark.parametrize(
      'option, problem',
      [
          ('--topology=2x2x4', '--topology=2x2x4: xpk goes by --tpu_type alone'),
          ('--claim=disk', '--claim: xpk mounts what `xpk storage attach` names'),
      ],
  )
  def test_refuses_what_xpk_does_not_take(self, run, option, problem):
    run.program('xpk')
    done = run(*RUN, '--cluster=c', '--tpu_type=v5p-32', option, '--algo=dpo')
    assert (done.returncode, done.stderr.count('\n'), run.log()) == (2, 1, [])
    assert done.stderr.startswith(f'jaxalign: {problem}')

  def test_is_not_used_where_no_cluster_is_named(self, run):
    run.program('xpk')
    run(*RUN, '--tpu_type=v6e-8', '--algo=dpo')
    assert run.log() == ['kubectl|apply|--filename=-|']


class TestUsage:

  def test_says_what_becomes_of_a_run_whose_workdir_nobody_named(self, run):
    said = 'jaxalign: without --workdir checkpoints stay on the disks of the machines, and go with them\n'
    for flags, wanted in [(['--algo=dpo'], said), (['--algo=dpo', '--workdir=gs://b/r'], ''), (['--mode=eval'], '')]:
      assert run(*RUN, '--dry_run', '--tpu_type=v6e-8', *flags).stderr == wanted

  @pytest.mark.parametrize('cluster', [(), ('--cluster=c',)])
  def test_prints_what_it_would_submit_and_submits_nothing(self, run, cluster):
    run.program('xpk')
    done = run(*RUN, '--dry_run', *cluster, '--tpu_type=v6e-8', '--algo=dpo', '--workdir=gs://b/r')
    assert (done.returncode, done.stderr, run.log()) == (0, '', [])
    assert done.stdout.startswith(
        'xpk workload create' if cluster else "kubectl apply --filename=- <<'END'\napiVersion: "
    )

  @pytest.mark.parametrize(
      'args, problem',
      [
          ((), 'usage: bash launch/gke/run.sh'),
          (('--name=my-run', '--algo=dpo'), 'usage: '),
          ((*RUN, '--tpu_type=v6e-8'), 'usage: '),
          (('--name=My_run', '--delete'), '--name=My_run: lower-case letters, digits and -'),
          (('--name=1st', '--delete'), '--name=1st: lower-case letters'),
          (('--name=run-', '--delete'), '--name=run-: lower-case letters'),
          ((f'--name={"a" * 41}', '--delete'), f'--name={"a" * 41}: lower-case letters'),
          (('--name=my-run', '--cluster=C', '--delete'), '--cluster=C: lower-case letters'),
          (('--name=my-run', '--delete', '--logs'), 'one of --logs and --delete'),
          (('--name=my-run', '--delete', '--algo=dpo'), '--logs and --delete are of a workload that is there'),
          ((*RUN, '--tpu_types=v6e-8', '--algo=dpo'), '--tpu_types: neither an option nor a flag of jaxalign'),
          ((*RUN, '--tpu_type=v6e', '--algo=dpo'), '--tpu_type=v6e: write v5litepod-16'),
          ((*RUN, '--tpu_type=h100-8', '--algo=dpo'), '--tpu_type=h100-8: the types are '),
          ((*RUN, '--tpu_type=v6e-12', '--algo=dpo'), '--tpu_type=v6e-12: there are 1, 4, 8, '),
          ((*RUN, '--tpu_type=v5p-32', '--algo=dpo'), '--tpu_type=v5p-32 needs --topology=AxBxC of 16 chips'),
          ((*RUN, '--tpu_type=v5p-32', '--topology=2x2x2', '--algo=dpo'), '--topology=2x2x2 has 8 chips'),
          ((*RUN, '--tpu_type=v5p-32', '--topology=4x4', '--algo=dpo'), '--topology=4x4: that of --tpu_type=v5p-32 is'),
          ((*RUN, '--tpu_type=v5p-12', '--topology=1x2x3', '--algo=dpo'), '--tpu_type=v5p-12: 6 chips are not of'),
          ((*RUN, '--tpu_type=v6e-8', '--topology=2by4', '--algo=dpo'), '--topology=2by4: write 4x4, or 2x2x4'),
          ((*RUN, '--tpu_type=v6e-8', '--slices=0', '--algo=dpo'), '--slices=0: it is a number, at least 1'),
          ((*RUN, '--tpu_type=v6e-8', '--algo=dpo', '--slices=2'), '--slices must come before the flags of jaxalign'),
          (('--name=my-run', '--image=a b', '--tpu_type=v6e-8', '--algo=dpo'), '--image=a b: it is not the name'),
      ],
  )
  def test_says_what_is_wrong_in_one_line_and_calls_nothing(self, run, args, problem):
    done = run(*args)
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'jaxalign: {problem}')
    assert not run.log()
