"""The command line: what is configured by default, what is refused and how, and runs of every algorithm."""

import contextlib
import gzip
import io
import json
import math
import pathlib
import re
import shutil

import jax
import pytest

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign.cli import catalog
from jaxalign.cli import command
from jaxalign.cli import config
from jaxalign.cli import flag_table
from tests import runs as processes

README = pathlib.Path(__file__).resolve().parents[1] / 'README.md'
TINY = ('--model=tiny', '--tokenizer=builtin:stories260K')
SAMPLES = tuple(f'--gin=evaluate.Samples.{x}' for x in ('count = 2', 'per_prompt = 2', 'max_new_tokens = 4'))
RUN = '--steps=3', '--log_every=1', '--save_every=2', '--seed=5'
ROWS = '--gin=loader.Packing.rows = 8', '--gin=loader.Packing.row_length = 32'
PAIR = {'prompt': 'Once upon a time', 'chosen': ' there was a happy cat.', 'rejected': ' it was sad.'}


def configured(*flags):
  """The recipe that a command line configures."""
  return main._configure(command.parse(['jaxalign', *flags]))


def call(*flags):
  return main.main(['jaxalign', *map(str, flags)])


def small(algo):
  """Flags of a run of a second or two, on a slice of the algorithm's own data."""
  recipe = configured(f'--algo={algo}')
  data = f'--data={recipe.data}[:24]', f'--eval_data={recipe.eval_data}[:16]', '--gin=loader.Packing.rows = 8'
  rate = '--gin=optim.linear.lr = 0.01'
  samples = SAMPLES if config.query('train.train.samples') else ()
  return f'--algo={algo}', *TINY, *data, rate, *samples


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """Keeps what is compiled, as each call of main compiles afresh; many of the programs are the same."""
  options = {
      'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
      'jax_persistent_cache_min_compile_time_secs': 0.2,
  }
  before = {name: jax.config.values[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A function that gives the workdir of a finished run of an algorithm, made where it is first asked for."""
  folder = tmp_path_factory.mktemp('runs')

  def run(algo):
    workdir = folder / algo
    if not workdir.exists():
      with contextlib.redirect_stdout(io.StringIO()):  # of the first test that asks
        assert call(*small(algo), *RUN, f'--cache_dir={folder / "cache"}', f'--workdir={workdir}') == 0
    return workdir

  return run


def read_json(path):
  return json.loads(path.read_text(encoding='utf-8'))


class TestConfigure:

  @pytest.mark.parametrize('flags', [(), ('--data=builtin:sentiment:train',), ('--data=builtin:sentiment[:64]',)])
  def test_takes_the_options_of_the_embedded_data_named_or_not(self, flags):
    recipe = configured('--algo=dpo', *flags)
    assert recipe.eval_data == 'builtin:sentiment:test'
    assert (recipe.packing.rows, recipe.packing.groups_per_step) == (64, 32)
    assert recipe.packing.row_length < 128
    samples = config.get('evaluate.Samples')()
    assert (samples.count, samples.per_prompt) == (64, 8)
    assert samples.judge(['I love this wonderful day!'])[0] > 0.5

  def test_takes_those_of_the_algorithm(self):
    recipe = configured('--algo=sft')
    assert (recipe.data, recipe.eval_data) == ('builtin:stories:train', 'builtin:stories:test')
    assert recipe.packing.rows == 32
    assert recipe.packing.row_length < 128

  @pytest.mark.parametrize('data', ['jsonl:mine.jsonl', 'builtin:sentiment:0.5,jsonl:mine.jsonl:0.5'])
  def test_of_the_users_data_judges_nothing_and_holds_nothing_out(self, data):
    recipe = configured('--algo=dpo', f'--data={data}')
    assert recipe.eval_data == ''
    assert (recipe.packing.rows, recipe.packing.row_length, recipe.packing.groups_per_step) == (16, 512, None)
    samples = config.get('evaluate.Samples')()
    assert samples.judge is None and samples.prompts is None

  @pytest.mark.parametrize('flag', ['--reward=jaxalign.rewards.rules:json_valid', '--eval_data=jsonl:mine.jsonl'])
  def test_has_online_runs_judged_by_their_own_rewards_where_rewards_or_prompts_are_named(self, flag):
    configured('--algo=grpo', flag)
    samples = config.get('evaluate.Samples')()
    assert samples.judge is None and samples.prompts is None
    configured('--algo=grpo', flag, '--gin=evaluate.Samples.prompts = @evaluate.builtin_prompts')
    assert config.get('evaluate.Samples')().prompts is not None
    configured('--algo=dpo', '--eval_data=builtin:sentiment:test')
    assert config.get('evaluate.Samples')().judge is not None

  def test_takes_of_a_task_what_online_runs_want_beside_what_all_want(self):
    offline, online = (configured(f'--algo={algo}', '--data=builtin:addition') for algo in ('sft', 'grpo'))
    assert offline.eval_data == online.eval_data == 'builtin:addition:test'
    assert (offline.packing.rows, online.packing.rows) == (32, 128)
    assert online.rollouts.rewards == ('jaxalign.rewards.rules:exact_match',)
    assert config.get('evaluate.Samples')().judge(['46 '], answer=['46']) == [1.0]

  def test_lets_the_user_win_over_the_data(self):
    recipe = configured('--algo=dpo', '--gin=loader.Packing.rows = 4', "--gin=recipe.Recipe.eval_data = ''")
    assert (recipe.packing.rows, recipe.packing.groups_per_step, recipe.eval_data) == (4, 32, '')

  def test_follows_the_data_that_the_user_binds(self):
    recipe = configured('--algo=dpo', "--gin=recipe.Recipe.data = 'jsonl:mine.jsonl'")
    assert (recipe.eval_data, recipe.packing.row_length) == ('', 512)

  def test_prefers_a_directory_to_a_named_model(self, tmp_path, monkeypatch):
    (tmp_path / 'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    assert configured('--algo=sft', '--model=tiny').model is None


# The loss before the first update: a new reward head is zero, a policy is its own reference, and logits of random
# weights are small.
FIRST_LOSS = dict.fromkeys(('bco', 'dpo', 'prm', 'rm'), (math.log(2), 1e-6)) | {'sft': (math.log(512), 0.2)}


@pytest.mark.parametrize('algo', FIRST_LOSS)
class TestTrain:

  def test_begins_with_the_loss_that_its_file_promises(self, runs, algo):
    lines = [json.loads(line) for line in (runs(algo) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    losses = {line['step']: line['loss'] for line in lines if 'loss' in line}
    expected, tolerance = FIRST_LOSS[algo]
    assert list(losses) == [1, 2, 3]
    assert losses[1] == pytest.approx(expected, abs=tolerance)
    assert losses[3] != losses[1]

  def test_leaves_a_workdir_with_everything_in_it(self, runs, algo):
    workdir = runs(algo)
    assert {path.name for path in workdir.iterdir()} >= {'config.gin', 'metrics.jsonl', 'summary.json', 'tensorboard'}
    assert {path.name for path in (workdir / 'checkpoints').iterdir()} >= {'2', '3', 'config.gin', 'run.json'}
    operative = (workdir / 'config.gin').read_text(encoding='utf-8')
    assert 'recipe.Recipe.loss_fn = @' in operative
    assert 'loop.Options.steps = 3\n' in operative

  def test_summarises_what_was_read_and_how_fast(self, runs, algo):
    summary = read_json(runs(algo) / 'summary.json')
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in summary.values())
    counts = {'steps': 3, 'skipped_steps': 0, 'data/kept': 24, 'data/dropped': 0, 'data/bad': 0, 'eval_data/kept': 16}
    halves = 2 if algo == 'bco' else 1  # which takes both sides of a pair for themselves
    counts = {name: count * halves if 'kept' in name else count for name, count in counts.items()}
    assert {name: summary[name] for name in counts} == counts
    assert min(summary[name] for name in ('tokens_per_s', 'compilations', 'peak_memory_bytes', 'num_tokens')) > 0
    assert summary['eval/n'] >= 16
    assert summary['eval/loss'] != summary['eval/loss_before']

  def test_samples_before_and_after_where_the_algorithm_samples(self, runs, algo):
    workdir = runs(algo)
    configured(f'--algo={algo}')
    summary = read_json(workdir / 'summary.json')
    sampled = {'eval/reward_before', 'eval/reward_after', 'eval/distinct_2_before', 'eval/distinct_2_after'}
    if config.query('train.train.samples') is None:
      assert not sampled & summary.keys()
      assert not (workdir / 'samples.md').exists()
      return
    assert sampled <= summary.keys()
    text = (workdir / 'samples.md').read_text(encoding='utf-8')
    first = recipe_lib.asset('prompts.txt').read_text(encoding='utf-8').splitlines()[0]
    assert f'## {first}\n' in text
    assert text.count('**before:**') == text.count('**after:**') == 2

  def test_of_a_finished_run_prints_its_summary_and_does_nothing(self, runs, algo, capsys):
    workdir = runs(algo)
    state = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    assert call(*small(algo), *RUN, f'--workdir={workdir}') == 0
    assert json.loads(capsys.readouterr().out) == read_json(workdir / 'summary.json')
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == state

  def test_refuses_other_bindings_in_the_same_workdir(self, runs, algo, capsys):
    workdir = runs(algo)
    assert call(*small(algo), *RUN, f'--workdir={workdir}', '--gin=optim.linear.lr = 0.5', '--log_every=2') == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert 'holds another run (optim.linear.lr: 0.01 -> 0.5)' in message
    assert call(*small(algo), *RUN, f'--workdir={workdir}', '--seed=6') == 2
    assert 'holds another run (--seed: 5 -> 6)' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('algo', FIRST_LOSS)
class TestEvaluate:

  def test_of_a_checkpoint_alone_on_another_mesh_gives_the_numbers_of_the_run(self, runs, algo, tmp_path, capsys):
    # Elsewhere, so that nothing but the checkpoint can be read.
    shutil.copytree(runs(algo) / 'checkpoints', tmp_path / 'there')
    assert call('--mode=eval', f'--checkpoint={tmp_path / "there"}', '--mesh=data:2,fsdp:2,expert:2') == 0
    values = json.loads(capsys.readouterr().out)
    summary = read_json(runs(algo) / 'summary.json')
    assert {name for name in summary if name.startswith('eval/') and not name.endswith('_before')} == {
        name if name in summary else f'{name}_after' for name in values
    }
    for name, value in values.items():
      assert value == pytest.approx(summary.get(name, summary.get(f'{name}_after')), rel=1e-5, abs=1e-5), name


class TestEvaluateOptions:

  def test_takes_other_data_and_bindings(self, runs, tmp_path, capsys):
    flags = '--eval_data=builtin:sentiment:test[:5]', '--gin=evaluate.Samples.per_prompt = 3'
    assert call('--mode=eval', f'--checkpoint={runs("dpo")}', *flags) == 0
    values = json.loads(capsys.readouterr().out)
    assert values['eval/n'] == 5
    assert values['eval/mean_length'] <= 4

  def test_computes_in_the_dtype_that_is_asked_for(self, runs, capsys):
    losses = []
    for dtype in ('float32', 'bfloat16'):
      flags = (
          f'--checkpoint={runs("dpo")}',
          f"--gin=recipe.Recipe.dtype = '{dtype}'",
          '--gin=evaluate.Samples.count = 0',
      )
      assert call('--mode=eval', *flags) == 0
      losses.append(json.loads(capsys.readouterr().out)['eval/loss'])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert call('--mode=eval', f'--checkpoint={runs("dpo")}', "--gin=recipe.Recipe.dtype = 'float8'") == 2
    assert "recipe.Recipe.dtype = 'float8': it is one of" in capsys.readouterr().err.splitlines()[-1]

  def test_refuses_a_binding_that_evaluation_cannot_use(self, runs, capsys):
    assert call('--mode=eval', f'--checkpoint={runs("dpo")}', '--gin=optim.linear.lr = 1.0') == 2
    assert 'not used by this run: optim.linear.lr' in capsys.readouterr().err.splitlines()[-1]


class TestSample:

  def sample(self, capsys, workdir, *flags):
    assert call('--mode=sample', f'--checkpoint={workdir}', '--max_new_tokens=6', *flags) == 0
    return capsys.readouterr().out

  def test_continues_each_prompt(self, runs, capsys):
    out = self.sample(capsys, runs('dpo'), '--prompt=Once upon', '--prompt=The cat')
    assert out.startswith('Once upon')
    assert '\nThe cat' in out
    assert len(out) > len('Once upon\nThe cat\n')

  def test_is_a_function_of_the_seed(self, runs, capsys):
    draw = lambda seed: self.sample(capsys, runs('dpo') / 'checkpoints' / '3', '--prompt=Once', f'--seed={seed}')
    assert draw(1) == draw(1) != draw(2)

  def test_begins_from_nothing_where_the_prompt_is_empty(self, runs, capsys):
    assert len(self.sample(capsys, runs('dpo'), '--prompt=')) > 1

  def test_reads_a_hugging_face_directory_and_writes_what_a_user_says_by_its_template(self, tmp_path, capsys):
    shutil.copytree(recipe_lib.asset('stories260K'), tmp_path / 'model')
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}{{ 'assistant:' }}"
    config = tmp_path / 'model' / 'tokenizer_config.json'
    config.write_text(json.dumps({'chat_template': template, 'bos_token': '<s>', 'eos_token': '</s>'}))
    flags = '--mode=sample', f'--model={tmp_path / "model"}', '--temperature=0', '--max_new_tokens=8'
    assert call(*flags, '--prompt=user: Hi assistant:') == 0
    plain = capsys.readouterr().out.removeprefix('user: Hi assistant:').strip()
    assert call(*flags, '--chat', '--prompt=Hi') == 0
    assert capsys.readouterr().out == f'Hi\n\n{plain}\n\n'


class TestReadme:

  @pytest.fixture
  def blocks(self):
    """The fenced texts of README.md."""
    return re.findall(r'^```\w*\n(.*?)^```', README.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)

  def block(self, blocks, part):
    (found,) = [text for text in blocks if part in text]
    return found

  def test_loads_a_checkpoint_from_python_that_agrees_with_the_sampler(self, blocks, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs('dpo').parent)
    code = self.block(blocks, 'checkpoint.load').replace("'runs/dpo'", "'dpo'")
    names = {}
    exec(code, names)  # pylint: disable=exec-used
    loaded, logits = names['loaded'], names['logits_V']
    best = int(logits[: loaded.model.config.vocab_size].argmax())
    capsys.readouterr()
    flags = '--checkpoint=dpo', '--prompt=Once upon a time', '--temperature=0', '--max_new_tokens=1'
    assert call('--mode=sample', *flags) == 0
    text = loaded.tokenizer.decode([best], continuation=True)
    assert capsys.readouterr().out == f'Once upon a time{text}\n'

  def test_names_bindings_that_there_are(self, capsys):
    text = README.read_text(encoding='utf-8').partition('### Learning rate')[2].partition('###')[0]
    bindings = re.findall(r'`(\w+\.[\w.]+ = [^`]+)`', text)
    assert len(bindings) > 15
    assert (
        call('--mode=show', '--algo=dpo', '--data=builtin:sentiment[:200]', *(f'--gin={one}' for one in bindings)) == 0
    )
    capsys.readouterr()
    assert call('--mode=show', '--algo=dpo', '--gin=optim.adamw.beta2 = 0.95') == 2
    assert 'it has ' in capsys.readouterr().err

  @pytest.mark.parametrize('cwd,gin_file', [('mine', 'my.gin'), ('elsewhere', '../mine/my.gin')])
  def test_runs_a_loss_of_the_users_own(self, blocks, tmp_path, cwd, gin_file):
    for folder in ('mine', 'elsewhere'):
      (tmp_path / folder).mkdir()
    for part, name in (('my_losses.py', 'my_losses.py'), ('import my_losses', 'my.gin')):
      (tmp_path / 'mine' / name).write_text(self.block(blocks, part))
    assert '`python -m jaxalign.main --algo=dpo --gin_file=my.gin` runs it' in README.read_text(encoding='utf-8')
    flags = f'--gin_file={gin_file}', '--steps=2', '--log_every=1', '--workdir=run', f'--cache_dir={tmp_path / "cache"}'
    less = '--eval_data=', '--gin=evaluate.Samples.count = 0', '--gin=my_losses.squared.beta = 3.0'
    args = 'jaxalign', *small('dpo')[:4], *ROWS, *flags, *less
    code, err = processes.finished(processes.spawn(args, devices=1, cwd=tmp_path / cwd))
    assert code == 0, err
    lines = processes.logged(tmp_path / cwd / 'run')
    # Margins are 0 at first, and so is their share of the loss.
    assert lines[1]['loss'] == pytest.approx(1.0, abs=1e-5)
    assert lines[1]['rewards/margins'] == pytest.approx(0.0, abs=1e-5)
    assert lines[2]['loss'] != lines[1]['loss']
    assert 'my_losses.squared.beta = 3.0' in (tmp_path / cwd / 'run' / 'config.gin').read_text(encoding='utf-8')


class TestShow:

  def test_prints_rows_with_masks_and_how_they_pack(self, tmp_path, capsys):
    path = tmp_path / 'pairs.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in [PAIR, PAIR | {'margin': 2.5, 'chosen': ' he ran.'}]))
    # A tokenizer is enough; there are no weights.
    shutil.copy(recipe_lib.asset('stories260K') / 'tokenizer.model', tmp_path / 'x.model')
    flags = f'--data=jsonl:{path}', f'--tokenizer={tmp_path / "x.model"}', '--model=' + str(tmp_path)
    assert call('--mode=show', '--algo=dpo', *flags, '--gin=loader.Packing.rows = 8') == 0
    out = capsys.readouterr().out
    for part in (
        'micro-batch 0, row 0: ',
        '<s>Once upon a time[[ there was a happy cat.</s>]]',
        '<s>Once upon a time[[ he ran.</s>]]',
        'response 0 of group 0',
        'response 1 of group 1',
        'margin 2.5',
        'data/kept: 2\n',
        'data/truncated: 0\n',
        'data/dropped: 0\n',
        'packing/groups: 2\n',
        'packing/slots_per_group: 4096',
    ):
      assert part in out

  def test_tokenises_again_where_an_option_of_the_examples_is_another(self, tmp_path, capsys):
    record = {'prompt': 'Once', 'completions': [f' a{i}' for i in range(50)], 'scores': list(range(50))}
    (tmp_path / 'lists.jsonl').write_text(json.dumps(record) + '\n')
    flags = '--mode=show', '--algo=dpo_pl', f'--data=jsonl:{tmp_path / "lists.jsonl"}', f'--cache_dir={tmp_path / "c"}'
    counts = []
    for bound in ('', 'feedback.ranked.most = 41', 'feedback.ranked.most = 60', 'preference.dpo.beta = 0.2'):
      assert call(*flags, *([f'--gin={bound}'] if bound else [])) == 0
      responses = re.findall(r'response (\d+) of group 0', capsys.readouterr().out)
      counts.append((len(responses), len(list((tmp_path / 'c').iterdir()))))
    assert counts == [(4, 1), (41, 2), (50, 3), (4, 3)]

  def test_reads_the_whole_command_line_of_a_training(self, tmp_path, capsys):
    assert call(*small('sft'), '--mode=show', *RUN, f'--workdir={tmp_path / "w"}') == 0
    assert 'packing/groups: 24' in capsys.readouterr().out
    assert not (tmp_path / 'w').exists()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Files of a user who makes mistakes, by name."""
  folder = tmp_path_factory.mktemp('files')
  text = lambda *records: ''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in records)
  write = lambda name, content: (folder / name).write_text(content, encoding='utf-8')
  write('pairs.jsonl', text(*[PAIR] * 8))
  write('columns.jsonl', text({'question': 'a', 'answer': 'b'}))
  write('broken.jsonl', text(PAIR, '{not json', PAIR))
  write('empty.jsonl', '')
  write('equal.jsonl', text({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}))
  (folder / 'torn.jsonl.gz').write_bytes(gzip.compress(text(*[PAIR] * 8).encode())[:-20])
  source = recipe_lib.asset('stories260K')
  for name in ('torn', 'bare', 'none'):
    (folder / name).mkdir()
  for name in ('torn', 'bare'):
    shutil.copy(source / 'tokenizer.model', folder / name)
    shutil.copy(source / 'config.json', folder / name)
  weights = (source / 'model.safetensors').read_bytes()
  (folder / 'torn' / 'model.safetensors').write_bytes(weights[: len(weights) // 2])
  return folder


# Flags with {files} and {run} (a finished run of dpo), the exit code, and what the line must say.
REFUSED = {
    'no algorithm': ((), 2, ['--algo is needed', 'sft, sigmoid_norm']),
    'unknown flag': (('--algos=dpo',), 2, ["'algos'", 'Did you mean: algo']),
    'no flag': (('dpo',), 2, ["'dpo'", '--name=value']),
    'unknown mode': (('--mode=trian',), 2, ['--mode=trian', 'train, eval, sample, score, show']),
    'unknown algorithm': (('--algo=dpoo',), 2, ['--algo=dpoo', 'sft, sigmoid_norm', 'did you mean dpo']),
    'no steps': (('--algo=dpo', '--steps=0'), 2, ['--steps=0', 'positive']),
    'steps in words': (('--algo=dpo', '--steps=x'), 2, ['--steps=x']),
    'negative pause': (('--algo=dpo', '--save_every=-1'), 2, ['--save_every=-1']),
    'unread flag': (('--algo=dpo', '--checkpoint={run}'), 2, ['does not read --checkpoint', '--model=DIR']),
    'markdown alone': (('--markdown',), 2, ['--markdown', '--list']),
    'unknown parameter': (('--algo=dpo', '--gin=preference.dpo.bta=1'), 2, ["no parameter 'bta'", 'beta']),
    'unknown function': (('--algo=dpo', '--gin=preference.ipo2.beta=1'), 2, ['preference.ipo2.beta=1', 'ipo2']),
    'missing binding': (
        ('--algo=dpo', '--gin=recipe.Recipe.model = @architecture.Config()'),
        2,
        ['Config lacks vocab_size, num_layers, ', 'as Config.vocab_size'],
    ),
    'half a binding': (('--algo=dpo', '--gin=preference.dpo.beta'), 2, ['NAME.PARAMETER=VALUE']),
    'idle binding': (('--algo=dpo', '--gin=optim.cosine.end = 0.5'), 2, ['not used', 'optim.cosine.end']),
    'idle macro': (('--algo=dpo', '--gin=rate = 0.5'), 2, ['not used', 'rate (a macro)']),
    'no gin file': (('--algo=dpo', '--gin_file=nowhere.gin'), 2, ['nowhere.gin', 'no such file']),
    'unknown axis': (('--algo=dpo', '--mesh=rows:8'), 2, ["'rows'", 'data, fsdp, tensor, context, expert']),
    'mesh and devices': (('--algo=dpo', '--mesh=fsdp:3'), 2, ['--mesh=fsdp:3', '8 devices']),
    'mesh and model': (('--algo=dpo', '--mesh=tensor:8', *TINY), 2, ['--mesh', "2 'heads'", 'tensor:8']),
    'mesh and rows': (('--algo=dpo', '--gin=loader.Packing.rows = 3'), 2, ['Packing.rows = 3', 'fsdp:8']),
    'no slices': (('--algo=dpo', '--dcn_mesh=data:2'), 2, ['--dcn_mesh=data:2', 'one slice']),
    'no model': (('--algo=dpo', '--model=nowhere'), 2, ['nowhere: no such', 'gin_configs/models']),
    'a name of the package': (('--algo=dpo', '--model=stories260K'), 2, ['builtin:stories260K']),
    'name without tokenizer': (('--algo=dpo', '--model=tiny'), 2, ['--model=tiny', '--tokenizer']),
    'two models': (
        ('--algo=dpo', '--model={files}/bare', f'--gin_file={catalog.ROOT / "models" / "tiny.gin"}'),
        2,
        ['recipe.Recipe.model'],
    ),
    'no weights': (('--algo=dpo', '--model={files}/bare'), 1, ['bare', 'safetensors']),
    'torn weights': (('--algo=dpo', '--model={files}/torn'), 1, ['torn', 'model.safetensors']),
    'empty directory': (('--algo=dpo', '--model={files}/none'), 1, ['none', 'tokenizer.json']),
    'no tokenizer': (('--algo=dpo', '--tokenizer=nowhere'), 2, ['nowhere: no such']),
    'another tokenizer': (
        ('--algo=dpo', *TINY, '--gin=architecture.Config.vocab_size = 100'),
        2,
        ['the tokenizer has 512 ids', 'vocabulary of 100'],
    ),
    'not a tokenizer': (('--algo=dpo', '--tokenizer={files}/pairs.jsonl'), 1, ['pairs.jsonl', 'SentencePiece']),
    'no data': (('--algo=dpo', '--data=jsonl:nowhere.jsonl'), 2, ['there is no file nowhere.jsonl']),
    'rows that a mesh does not split': (
        ('--algo=grpo', '--mesh=data:8', '--gin=loader.Packing.rows = 12'),
        2,
        ['loader.Packing.rows = 12', 'data:8'],
    ),
    'nobody to judge': (
        ('--algo=grpo', '--data=jsonl:{files}/pairs.jsonl'),
        2,
        ['--data=jsonl:', 'nothing says what judges', '--reward='],
    ),
    'missing column of a reward': (
        ('--algo=grpo', '--data=jsonl:{files}/pairs.jsonl', '--reward=jaxalign.rewards.instructions:followed'),
        2,
        ['instructions:followed: it wants `instruction_id_list`, and of --data', 'chosen, ids, prompts, rejected'],
    ),
    'no held-out data': (
        ('--algo=dpo', '--data=jsonl:{files}/pairs.jsonl', '--eval_data=jsonl:nowhere.jsonl'),
        2,
        ['there is no file nowhere.jsonl'],
    ),
    'data without scheme': (('--algo=dpo', '--data={files}/pairs.jsonl'), 2, ['jsonl:...']),
    'unknown built-in data': (('--algo=dpo', '--data=builtin:x'), 2, ['builtin:sentiment:train']),
    'missing column': (
        ('--algo=dpo', '--data=jsonl:{files}/columns.jsonl'),
        1,
        ['columns.jsonl:1', 'answer, question'],
    ),
    'broken line': (('--algo=dpo', '--data=jsonl:{files}/broken.jsonl'), 1, ['broken.jsonl:2', 'not valid JSON']),
    'weights of held-out data': (
        ('--algo=dpo', '--data=jsonl:{files}/pairs.jsonl', '--eval_data=jsonl:a:0.7,jsonl:b:0.3'),
        2,
        ['every record is read once', 'weight 0.7 of jsonl:a'],
    ),
    'empty data': (('--algo=dpo', '--data=jsonl:{files}/empty.jsonl'), 1, ['empty.jsonl', 'it holds no records']),
    'torn archive': (('--algo=dpo', '--data=jsonl:{files}/torn.jsonl.gz'), 1, ['torn.jsonl.gz', 'not a whole gzip']),
    'equal responses': (('--algo=dpo', '--data=jsonl:{files}/equal.jsonl'), 1, ['1 dropped: equal responses']),
    'workdir in a file': (
        ('--algo=dpo', '--workdir={files}/pairs.jsonl/w'),
        2,
        ['--workdir=', 'pairs.jsonl is a file'],
    ),
    'cache in a file': (('--algo=dpo', '--cache_dir={files}/pairs.jsonl/c'), 1, ['pairs.jsonl/c', 'token cache']),
    'eval of nothing': (('--mode=eval',), 2, ['--checkpoint=DIR']),
    'eval of no data': (('--mode=eval', '--checkpoint={run}', '--eval_data='), 2, ['give --eval_data']),
    'eval of no checkpoint': (('--mode=eval', '--checkpoint={files}'), 2, ['no checkpoint there']),
    'eval of no step': (('--mode=eval', '--checkpoint={run}/checkpoints/7'), 2, ['no checkpoint there']),
    'eval of training data': (('--mode=eval', '--checkpoint={run}', '--data=x'), 2, ['--data', '--eval_data']),
    'eval on a mesh': (('--mode=eval', '--checkpoint={run}', '--mesh=tensor:8'), 2, ["2 'heads'", 'tensor:8']),
    'sample of nothing': (('--mode=sample', '--prompt=x'), 2, ['--checkpoint=DIR']),
    'sample of two': (('--mode=sample', '--prompt=x', '--checkpoint={run}', '--model=y'), 2, ['--checkpoint=DIR, or']),
    'no prompt': (('--mode=sample', '--checkpoint={run}'), 2, ['--prompt']),
    'long prompt': (('--mode=sample', '--checkpoint={run}', '--prompt=' + 'a b ' * 999), 2, ['tokens', 'context']),
    'negative temperature': (('--mode=sample', '--checkpoint={run}', '--temperature=-1'), 2, ['--temperature=-1']),
    'no new tokens': (('--mode=sample', '--checkpoint={run}', '--max_new_tokens=0'), 2, ['--max_new_tokens=0']),
    'show of nothing': (('--mode=show',), 2, ['--algo is needed']),
}


class TestMain:

  @pytest.mark.parametrize('case', REFUSED)
  def test_refuses_in_one_line_and_leaves_nothing(self, case, files, runs, tmp_path, monkeypatch, capsys):
    flags, code, parts = REFUSED[case]
    run = runs('dpo') if any('{run}' in flag for flag in flags) else None
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert call(*(flag.format(files=files, run=run) for flag in flags)) == code
    captured = capsys.readouterr()
    assert captured.out == ''
    lines = [line for line in captured.err.splitlines() if not re.match(r'\d\d:\d\d:\d\d ', line)]
    assert len(lines) == 1
    assert lines[0].startswith('jaxalign: ')
    for part in parts:
      assert part in lines[0]
    assert not (tmp_path / 'runs').exists()

  def test_refuses_to_sample_from_a_reward_model(self, runs, capsys):
    assert call('--mode=sample', '--prompt=x', f'--checkpoint={runs("rm")}') == 2
    assert 'it has a head that scores responses, and writes none' in capsys.readouterr().err.splitlines()[-1]

  def test_help_explains_every_flag(self, capsys):
    assert call('--help') == 0
    out = capsys.readouterr().out
    for _, name, _, text in flag_table.FLAGS:
      assert f'  --{name}\n' in out
      assert len(text) > 8
    assert max(map(len, out.splitlines())) <= 120

  def test_lists_the_algorithms(self, capsys):
    assert call('--list') == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(catalog.algorithms())
    assert call('--list', '--markdown') == 0
    assert capsys.readouterr().out == catalog.table()

  def test_skips_and_counts_bad_lines_where_asked_to(self, files, tmp_path):
    flags = f'--data=jsonl:{files / "broken.jsonl"}', '--skip_bad_records', '--steps=1', f'--workdir={tmp_path / "w"}'
    assert call('--algo=dpo', *TINY, *ROWS, *flags, '--gin=evaluate.Samples.count = 0') == 0
    summary = read_json(tmp_path / 'w' / 'summary.json')
    assert (summary['data/kept'], summary['data/bad']) == (2, 1)

  def test_skips_bad_lines_of_prompts_too_and_is_evaluated_on_its_own(self, files, tmp_path, capsys):
    data = f'--data=jsonl:{files / "broken.jsonl"}', '--skip_bad_records', '--eval_data=', '--reward=tests.runs:vowels'
    few = [f'--gin=rollouts.Options.{x}' for x in ('prompts = 2', 'samples = 2', 'max_new_tokens = 4')]
    own = '--gin=evaluate.Samples.prompts = @evaluate.builtin_prompts', *SAMPLES
    assert call('--algo=grpo', *TINY, *ROWS, *data, *few, *own, '--steps=1', f'--workdir={tmp_path / "w"}') == 0
    after = json.loads(capsys.readouterr().out)['eval/reward_after']
    assert call('--mode=eval', f'--checkpoint={tmp_path / "w"}', '--eval_data=', '--skip_bad_records') == 0
    assert json.loads(capsys.readouterr().out)['eval/reward'] == after

  def test_goes_on_with_another_model_after_a_run_that_ended_before_its_first_step(self, files, tmp_path, capsys):
    data = f'--data=jsonl:{files / "pairs.jsonl"}', '--gin=evaluate.Samples.count = 0', '--steps=1'
    flags = '--algo=dpo', *TINY, *ROWS, *data, f'--workdir={tmp_path / "w"}'
    # The caller gives this parameter, which only a call shows.
    assert call(*flags, '--gin=optim.linear.steps = 7') == 2
    assert 'not used by this run: optim.linear.steps' in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'w' / 'checkpoints' / 'run.json').exists()
    assert call(*flags, '--gin=architecture.Config.num_layers = 2') == 0
    loaded = checkpoint.load(tmp_path / 'w', sharding.make_mesh())
    base = checkpoint.load_reference(tmp_path / 'w', loaded).params
    assert jax.tree.leaves(base['layers'])[0].shape[0] == 2
