"""Whole runs through the command line: stopped, killed and resumed, on a full disk, and loaded elsewhere."""

import functools
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types as pytypes

import jax
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import evaluate
from jaxalign import loop
from jaxalign import main
from jaxalign import objectives
from jaxalign import optim
from jaxalign import recipe
from jaxalign import reference
from jaxalign import sharding
from jaxalign import train
from jaxalign.data import examples
from jaxalign.data import loader
from jaxalign.losses import preference
from jaxalign.models import architecture
from tests import runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.folder_with_pairs(tmp_path_factory, 'train')


@pytest.fixture(scope='module')
def broken(folder):
  """Flags of a loss that is NaN at every step."""
  (folder / 'broken.py').write_text(
      'import jax.numpy as jnp\n'
      'from jaxalign import types\n'
      'def loss(policy, ref, labels, *, state=()):\n'
      '  margins_G = ref.logratios_GK[:, 0] - 5.0\n'
      '  return types.LossOut(jnp.log(margins_G), {}, state)\n'
  )
  (folder / 'broken.gin').write_text(
      'from __gin__ import dynamic_registration\nimport broken\nfrom jaxalign import recipe\n'
      'recipe.Recipe.loss_fn = @broken.loss\n'
  )
  return (f'--gin_file={folder / "broken.gin"}',)


@pytest.fixture(scope='module')
def straight(folder):
  """A run that nothing disturbed."""
  workdir = folder / 'straight'
  assert runs.finished(runs.spawn(runs.flags(folder, workdir)))[0] == 0
  return workdir


def constant_rate(folder, name, *more, steps):
  """Flags of a run whose rate does not depend on the number of steps."""
  rate = '--gin=optim.adamw.schedule = @optim.constant', '--gin=optim.constant.lr = 0.01'
  return [x for x in runs.flags(folder, folder / name, *rate, *more, steps=steps) if 'linear' not in x]


def wait_for_lines(workdir, count):
  metrics, until = workdir / 'metrics.jsonl', time.monotonic() + 150
  while not metrics.exists() or metrics.read_text().count('\n') < count:
    assert time.monotonic() < until, f'{metrics} has not got {count} lines'
    time.sleep(0.005)


def told_to_end(process, workdir):
  """Sends SIGTERM to a run that has begun; the step after which it says that it stopped."""
  wait_for_lines(workdir, 2)
  process.send_signal(signal.SIGTERM)
  code, err = runs.finished(process)
  assert code == 75, err  # at which launchers run it again
  (said,) = [line for line in err.splitlines() if line.startswith('jaxalign: ')]
  found = re.fullmatch(r'jaxalign: stopped by SIGTERM after step (\d+), which is saved; the same command resumes', said)
  return int(found[1])


class TestTrain:

  @pytest.mark.parametrize('seed', [0, 1])
  def test_killed_at_any_moment_and_resumed_ends_bit_for_bit_as_if_it_had_not_been(self, folder, straight, seed):
    workdir = folder / f'killed{seed}'
    lines = random.Random(seed).randint(1, 9)
    process = runs.spawn(runs.flags(folder, workdir))
    wait_for_lines(workdir, lines)
    process.send_signal(signal.SIGKILL)
    assert runs.finished(process)[0] == -signal.SIGKILL
    assert not (workdir / 'summary.json').exists()
    code, err = runs.finished(runs.spawn(runs.flags(folder, workdir)))
    assert code == 0, err
    runs.assert_same(runs.params_of(workdir), runs.params_of(straight))
    assert runs.logged(workdir).keys() == runs.logged(straight).keys()
    for step, line in runs.logged(straight).items():
      found = runs.logged(workdir)[step]
      assert found['loss'] == line['loss']
      assert (found['num_tokens'], found['epoch']) == (line['num_tokens'], line['epoch'])

  def test_told_to_end_saves_the_step_it_is_at_and_goes_on_from_there(self, folder):
    process = runs.spawn(constant_rate(folder, 'told', steps=100_000))
    step = told_to_end(process, folder / 'told')
    assert list(runs.logged(folder / 'told'))[-1] == step
    for name in 'told', 'untold':
      assert runs.finished(runs.spawn(constant_rate(folder, name, steps=step + 2)))[0] == 0
    runs.assert_same(runs.params_of(folder / 'told'), runs.params_of(folder / 'untold'))

  def test_told_to_end_while_a_rollout_is_made_saves_the_step_before_it(self, tmp_path):
    (tmp_path / 'mine.py').write_text(
        'import pathlib\nimport time\n\nHERE = pathlib.Path(__file__).parent\n\n\n'
        'def slow(responses):\n'
        '  metrics = HERE / "told" / "metrics.jsonl"\n'
        '  if (HERE / "sleepy").exists() and metrics.exists() and metrics.read_text():\n'
        '    (HERE / "asleep").touch()\n'
        '    time.sleep(600)\n'
        '  return [float(text.count("e")) for text in responses]\n'
    )
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': f'Tom {i}'}) + '\n' for i in range(8)))

    def run(name):
      sizes = (f'--gin=rollouts.Options.{one}' for one in ('prompts = 2', 'samples = 2', 'max_new_tokens = 6'))
      args = [x for x in constant_rate(tmp_path, name, *sizes, steps=3) if not x.startswith(('--data', '--algo'))]
      args += ['--algo=grpo', f'--data=jsonl:{tmp_path / "prompts.jsonl"}', f'--reward={tmp_path / "mine.py"}:slow']
      return runs.spawn(args)

    (tmp_path / 'sleepy').touch()
    process, until = run('told'), time.monotonic() + 150
    while not (tmp_path / 'asleep').exists() and process.poll() is None and time.monotonic() < until:
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, err = runs.finished(process)
    assert code == 75 and 'stopped by SIGTERM after step 1, which is saved' in err, err
    assert list(runs.logged(tmp_path / 'told')) == [1]
    (tmp_path / 'sleepy').unlink()
    for name in 'told', 'untold':
      code, err = runs.finished(run(name))
      assert code == 0, err
    runs.assert_same(runs.params_of(tmp_path / 'told'), runs.params_of(tmp_path / 'untold'))

  def test_told_to_one_process_ends_all_at_the_same_step(self, folder):
    both = runs.spawn_together(constant_rate(folder, 'both', '--mesh=data:2,fsdp:2', steps=100_000), 2)
    step = told_to_end(both[1], folder / 'both')
    code, err = runs.finished(both[0])
    assert code == 75
    assert f'stopped by SIGTERM after step {step},' in err
    assert (folder / 'both' / 'checkpoints' / str(step) / 'params').exists()

  def test_told_to_several_processes_while_a_rollout_is_made_saves_the_step_before_it(self, tmp_path):
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': f'Tom {i}'}) + '\n' for i in range(8)))
    # Some 800 tokens of a row each: the next rollout is far from its end when the step by the first is logged.
    sizes = (
        f'--gin=rollouts.Options.{one}' for one in ('prompts = 2', 'samples = 4', 'max_new_tokens = 400', 'rows = 4')
    )
    more = *sizes, '--gin=loader.Packing.row_length = 512', '--mesh=data:2,fsdp:2', '--reward=tests.runs:vowels'
    args = [x for x in constant_rate(tmp_path, 'long', *more, steps=50) if not x.startswith(('--data', '--algo'))]
    both = runs.spawn_together([*args, '--algo=grpo', f'--data=jsonl:{tmp_path / "prompts.jsonl"}'], 2)
    wait_for_lines(tmp_path / 'long', 1)
    for process in both:  # as clusters do
      process.send_signal(signal.SIGTERM)
    for process in both:
      code, err = runs.finished(process)
      assert code == 75 and 'stopped by SIGTERM after step 1, which is saved' in err, err
    assert list(runs.logged(tmp_path / 'long')) == [1] and (tmp_path / 'long' / 'checkpoints' / '1').exists()

  def test_of_which_a_process_is_killed_ends_soon_and_goes_on_with_more_processes(self, folder):
    both = runs.spawn_together(constant_rate(folder, 'lost', '--mesh=data:2,fsdp:2', steps=100_000), 2)
    wait_for_lines(folder / 'lost', 5)
    both[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, err = runs.finished(both[0])
    assert time.monotonic() - killed < 70
    # At once where it exchanges numbers with the other, else when the other's sign of life is missed.
    said = {75: 'jaxalign: another process of this job is gone', -signal.SIGABRT: 'indicates that another task died'}
    assert said[code] in err, err
    assert runs.finished(both[1])[0] == -signal.SIGKILL
    steps = max(runs.logged(folder / 'lost')) + 2
    for process in runs.spawn_together(constant_rate(folder, 'lost', '--mesh=data:2,fsdp:2,tensor:2', steps=steps), 4):
      code, err = runs.finished(process)
      assert code == 0, err
    assert runs.finished(runs.spawn(constant_rate(folder, 'kept', steps=steps)))[0] == 0
    found, wanted = runs.logged(folder / 'lost'), runs.logged(folder / 'kept')
    assert found.keys() == wanted.keys()
    for step, line in wanted.items():
      np.testing.assert_allclose(found[step]['loss'], line['loss'], atol=1e-3)
      assert found[step]['num_tokens'] == line['num_tokens']

  def test_stopped_and_continued_with_more_steps_reads_the_records_that_follow(self, folder):
    for name, steps in ('two', 5), ('two', 12), ('one', 12):
      assert main.main(constant_rate(folder, name, steps=steps)) == 0
    runs.assert_same(runs.params_of(folder / 'two'), runs.params_of(folder / 'one'))

  def test_continues_on_another_mesh_with_the_same_records(self, folder):
    workdir = folder / 'moved'
    for name, steps in ('moved', 6), ('stayed', 12):
      assert runs.finished(runs.spawn(constant_rate(folder, name, steps=steps), devices=1))[0] == 0
    assert main.main(constant_rate(folder, 'moved', '--mesh=data:2,fsdp:2,tensor:2', steps=12)) == 0
    for step, line in runs.logged(folder / 'stayed').items():
      np.testing.assert_allclose(runs.logged(workdir)[step]['loss'], line['loss'], atol=1e-4)
      assert runs.logged(workdir)[step]['num_tokens'] == line['num_tokens']

  def test_finished_says_so_and_does_nothing(self, folder, straight, caplog):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob('*') if path.is_file()}
    with caplog.at_level('INFO', logger='absl'):
      assert main.main(runs.flags(folder, straight)) == 0
    assert f'{straight} is finished: 12 steps' in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob('*') if path.is_file()}

  def test_that_went_further_than_is_asked_for_is_evaluated_as_it_is(self, folder, straight):
    shutil.copytree(straight, folder / 'further')
    (folder / 'further' / 'summary.json').unlink()
    assert main.main(runs.flags(folder, folder / 'further', steps=6)) == 0
    assert json.loads((folder / 'further' / 'summary.json').read_text())['steps'] == 12

  def test_on_a_full_disk_ends_in_one_line_and_leaves_earlier_checkpoints_whole(self, folder):
    workdir = folder / 'full'
    assert (
        runs.finished(runs.spawn([x.replace('--steps=12', '--steps=4') for x in runs.flags(folder, workdir)]))[0] == 0
    )
    before = runs.params_of(workdir, 4)
    # No file may grow beyond 12,000 bytes: what a full disk does to the arrays, but not to the small files.
    limit = (
        'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);'
        'from jaxalign import main, checkpoint; real = checkpoint.Store.save;\n'
        'def save(*args, **kwargs):\n'
        '  resource.setrlimit(resource.RLIMIT_FSIZE, (12000, resource.RLIM_INFINITY))\n'
        '  return real(*args, **kwargs)\n'
        'checkpoint.Store.save = save\n'
        'main.run()'
    )
    env = os.environ | {'PYTHONPATH': str(runs.ROOT), 'JAX_NUM_CPU_DEVICES': '2'}
    command = [sys.executable, '-c', limit, *runs.flags(folder, workdir)[1:]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False, cwd=runs.ROOT)
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if not re.match(r'\d\d:\d\d:\d\d ', line)]
    assert said.startswith(f'jaxalign: {workdir / "checkpoints"}: a checkpoint could not be written')
    assert 'whole checkpoints: 4' in said
    runs.assert_same(runs.params_of(workdir), before)
    assert not (workdir / 'checkpoints' / '8').exists()

  def test_writes_the_metrics_of_every_step(self, straight):
    lines = runs.logged(straight)
    assert list(lines) == list(range(1, 13))
    assert {
        'loss',
        'grad_norm',
        'learning_rate',
        'num_tokens',
        'epoch',
        'skipped_steps',
        'compilations',
        'data/dropped',
    } <= set(lines[1])
    assert lines[1]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert len({line['compilations'] for line in lines.values()}) == 1
    assert list((straight / 'tensorboard').glob('events.out.tfevents.*'))

  def test_refuses_the_checkpoint_of_another_model(self, folder, straight, capsys):
    bigger = '--gin=architecture.Config.mlp_dim = 48'
    run = json.loads((straight / 'checkpoints' / 'run.json').read_text())
    run['bindings'] = run['bindings'].replace('Config.mlp_dim = 32', 'Config.mlp_dim = 48')
    copy = folder / 'other'
    (copy / 'checkpoints').mkdir(parents=True)
    for name in ('4', '8', '12', 'base', 'tokenizer', 'config.gin'):
      source = straight / 'checkpoints' / name
      if source.exists():
        (copy / 'checkpoints' / name).symlink_to(source)
    (copy / 'checkpoints' / 'run.json').write_text(json.dumps(run))
    assert main.main(runs.flags(folder, copy, bigger, steps=16)) == 1
    assert 'is the checkpoint of another model: layers/0/down is (1, 32, 16) there' in capsys.readouterr().err

  @pytest.mark.parametrize(
      'more,said',
      [
          (
              ('--algo=rm', '--gin=recipe.Recipe.loss_fn = @preference.dpo', '--gin=preference.dpo.beta = 0.1'),
              'the loss reads ref.logratios_GK, but the objective is of scores',
          ),
          (('--gin=objectives.preference.rivals = 7',), 'rivals = 7: bound, but the loss reads no rivals'),
      ],
  )
  def test_refuses_what_objective_and_loss_disagree_on_before_it_reads_a_weight(self, folder, more, said, capsys):
    bare = folder / 'bare'
    shutil.copytree(
        recipe.asset('stories260K'), bare, ignore=shutil.ignore_patterns('*.safetensors'), dirs_exist_ok=True
    )
    args = [x for x in runs.flags(folder, folder / 'refused', *more) if '--model' not in x]
    assert main.main([*args, f'--model={bare}']) == 2
    assert said in capsys.readouterr().err
    assert not (folder / 'refused').exists()

  def test_stops_where_no_step_is_finite_any_more_and_keeps_what_was_before(self, folder, broken, capsys):
    workdir = folder / 'skipped'
    more = '--gin=loop.Options.max_skipped = 3', '--gin=loop.Options.log_every = 2'
    args = [x for x in runs.flags(folder, workdir, *broken, *more) if not re.match('--(log|save)_every=', x)]
    assert main.main(args) == 1
    assert (
        'jaxalign: step 4: the loss or its gradient was not finite in 4 consecutive steps; parameters are as they were'
        in capsys.readouterr().err
    )
    assert {step: line['skipped_steps'] for step, line in runs.logged(workdir).items()} == {1: 1, 2: 2, 4: 4, 5: 5}
    store = checkpoint.Store(workdir / 'checkpoints', checkpoint.Options())
    assert store.latest() == 5  # though none was due; it had begun when the line of step 4 was read
    store.close()
    # One that ends so at its last step is not over and done with.
    ended = [x.replace(str(workdir), str(folder / 'ended')).replace('--steps=12', '--steps=4') for x in args]
    for _ in range(2):
      assert main.main(ended) == 1
      assert 'jaxalign: step 4: the loss or its gradient was not finite in 4 ' in capsys.readouterr().err
    assert not (folder / 'ended' / 'summary.json').exists()

  def test_under_debug_names_the_line_that_made_a_nan(self, folder, broken):
    code, err = runs.finished(runs.spawn(runs.flags(folder, folder / 'broken', '--debug', *broken)))
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith('jaxalign: invalid value (nan) encountered in log at ')
    assert 'broken.py:5: return types.LossOut(jnp.log(margins_G), {}, state)' in last


def bytes_of_a_session(folder, workdir, reference, steps):
  """Bytes of the arrays that are alive once the first step of a session is done, beyond those that were before."""
  alive = lambda: gc.collect() and 0 or sum(x.nbytes for x in jax.live_arrays())
  before, found = alive(), []

  def config():
    found.append(alive() - before)
    return '', ''

  job = recipe.Job(
      algo='dpo',
      workdir=workdir,
      mesh=sharding.make_mesh(),
      seed=0,
      model='',
      tokenizer='builtin:stories260K',
      data=f'jsonl:{folder / "pairs.jsonl"}',
      eval_data='',
      data_dir=None,
      cache_dir=folder / 'cache',
      skip_bad_records=False,
      debug=False,
  )
  made = recipe.Recipe(
      objective=objectives.preference,
      loss_fn=functools.partial(preference.dpo, beta=0.1),
      example_fn=examples.preference,
      packing=loader.Packing(rows=8, row_length=64),
      data='',
      model=architecture.Config(512, 1, 16, 2, 1, 8, 32, 64),
      reference=reference,
  )
  train.train(
      job,
      recipe=made,
      optimizer=functools.partial(optim.adamw, schedule=functools.partial(optim.constant, lr=0.01)),
      options=loop.Options(steps),
      checkpoints=checkpoint.Options(),
      samples=None,
      config=config,
  )
  return found


class TestPreemption:

  def test_takes_the_signal_once_though_it_comes_again(self):
    tell = lambda: os.kill(os.getpid(), signal.SIGTERM)

    def batches():
      yield 1
      try:
        tell()
        time.sleep(5)
      finally:  # while what was waited for is given up
        tell()
        time.sleep(0.01)

    with loop.Preemption() as preemption:
      assert list(preemption.until(batches())) == [1]
      tell()
      assert preemption.reached()


class TestNewest:

  @pytest.mark.parametrize('step,wanted', [(2, 0.25), (3, 0.0)])
  def test_has_the_reference_that_the_next_step_compares_with(self, step, wanted):
    state = pytypes.SimpleNamespace(
        params={'a': jax.numpy.ones(2)}, reference={'a': jax.numpy.zeros(2)}, loss_state=(), step=jax.numpy.int32(step)
    )
    live, sync = reference.Reference(None, None, {}), reference.Sync(every=2, alpha=0.25)
    found = train._Newest(lambda *_: None, state, {}, live, sync).params()
    np.testing.assert_allclose(found.ref['a'], wanted)
    assert found.version == step


class TestWriteSamples:

  def test_puts_before_and_after_under_each_prompt(self, tmp_path):
    before = evaluate.Sampled({}, [('One\nday', ' a'), ('Tom', ' b')])
    after = evaluate.Sampled({}, [('One\nday', ' c\n'), ('Tom', ' d')])
    train.write_samples(tmp_path / 'samples.md', before, after)
    text = (tmp_path / 'samples.md').read_text()
    assert '## One day\n\n**before:** a\n\n**after:** c\n\n## Tom\n\n**before:** b\n\n**after:** d\n' in text


class TestMemory:

  @pytest.mark.parametrize('reference', ['cached', 'live'])
  def test_of_a_resumed_run_is_that_of_a_fresh_one(self, folder, reference):
    workdir = folder / f'memory-{reference}'
    (fresh,), (resumed,) = (bytes_of_a_session(folder, workdir, reference, steps) for steps in (2, 4))
    assert resumed == fresh
