"""Scores from the command line, against the model read one response at a time."""

import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as st

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import recipe
from jaxalign import scorers
from jaxalign import sharding
from jaxalign.cli import config
from jaxalign.data import tokenizers
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import panels
from tests import packed
from tests import runs

STORIES = recipe.asset('stories260K')
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
PAIRS = [
    {'prompt': 'Once upon a time', 'chosen': ' there was a cat.', 'rejected': ' a dog ran'},
    {'prompt': 'Lily', 'chosen': ' smiled', 'rejected': ' was very sad and cried all day'},
    {'prompt': 'The sun', 'chosen': ' is warm.', 'rejected': ' fell'},
]
STEPS = [' He ran', ' home.', ' It was late']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  head = np.random.default_rng(0).standard_normal((64, 1)).astype(np.float32)
  return runs.write_model(tmp_path_factory.mktemp('reward') / 'model', score=head)


@pytest.fixture(scope='module')
def hidden():
  """What the stories model makes of a text that is read alone, its ids given."""
  return runs.hidden_states()


@pytest.fixture(scope='module')
def expected(model, hidden):
  """Scores of all tokens of a text."""
  (weight,) = st.load_file(model / 'model.safetensors')['score.weight']
  return lambda ids: hidden(ids) @ weight


def score(capsys, model, records, folder, *flags):
  path = folder / 'records.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  args = f'--model={model}', f'--data=jsonl:{path}', f'--cache_dir={folder}', '--row_length=64', *flags
  capsys.readouterr()
  assert main.main(['jaxalign', '--mode=score', *args]) == 0
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def ids_of(tokenizer, prompt, response):
  return [tokenizer.bos_id, *tokenizer.encode(prompt)], tokenizer.encode(response, continuation=True)


class TestScore:

  @pytest.mark.parametrize('mesh', ['', 'fsdp:4,tensor:2'])
  def test_reads_each_response_at_its_last_token_though_padding_is_that_too(
      self, capsys, model, expected, tmp_path, mesh
  ):
    tokenizer = tokenizers.load(STORIES)
    found = score(capsys, model, PAIRS, tmp_path, f'--mesh={mesh}')
    assert [one['record'] for one in found] == [f'records.jsonl:{i}' for i in (1, 2, 3)]
    for one, record in zip(found, PAIRS):
      for value, side in zip(one['scores'], ('chosen', 'rejected')):
        prompt, response = ids_of(tokenizer, record['prompt'], record[side])
        assert value == pytest.approx(expected([*prompt, *response, tokenizer.eos_id])[-1], abs=1e-4)

  def test_reads_every_token(self, capsys, model, expected, tmp_path):
    tokenizer = tokenizers.load(STORIES)
    records = [{'prompt': pair['prompt'], 'completion': pair['rejected']} for pair in PAIRS]
    found = score(capsys, model, records, tmp_path, '--per=token')
    for one, record in zip(found, records):
      prompt, response = ids_of(tokenizer, record['prompt'], record['completion'])
      wanted = expected([*prompt, *response, tokenizer.eos_id])[len(prompt) :]
      np.testing.assert_allclose(one['scores'], [wanted], atol=1e-4)

  @pytest.mark.parametrize('column,length', [('samples', 1), ('completions', 8)])
  def test_reads_each_of_a_list_in_its_order_however_long(self, capsys, model, expected, tmp_path, column, length):
    tokenizer = tokenizers.load(STORIES)
    texts = [(' ran', ' sat')[i % 2] * (length + i) for i in range(20)]
    records = [
        {'prompt': 'Tom', column: texts},
        {'prompt': 'Lily', column: texts[:3], 'chosen': ' a', 'rejected': ' b'},
    ]
    found = score(capsys, model, records, tmp_path, '--mesh=fsdp:4,tensor:2')
    assert [len(one['scores']) for one in found] == [20, 3]
    for one, record in zip(found, records):
      for value, text in zip(one['scores'], record[column]):
        prompt, response = ids_of(tokenizer, record['prompt'], text)
        assert value == pytest.approx(expected([*prompt, *response, tokenizer.eos_id])[-1], abs=1e-4)

  def test_keeps_the_columns_of_each_record(self, capsys, model, tmp_path):
    equal = {'prompt': 'a', 'chosen': ' b', 'rejected': ' b'}
    first = PAIRS[0] | {'id': [7, None], 'scores': 'old', 'truncated': 'old'}
    found = score(capsys, model, [equal, first, PAIRS[1]], tmp_path)
    assert [list(one)[:3] for one in found] == [['record', 'scores', 'truncated']] * 2
    ours = [{name: one[name] for name in ('record', 'scores', 'truncated')} for one in found]
    assert [one['record'] for one in ours] == ['records.jsonl:2', 'records.jsonl:3']
    assert [len(one['scores']) for one in ours] == [2, 2] and not ours[0]['truncated']
    assert found == [first | ours[0], PAIRS[1] | ours[1]]

  def test_keeps_those_of_several_sources(self, capsys, model, tmp_path):
    (tmp_path / 'more.jsonl').write_text(''.join(json.dumps(record | {'id': 1}) + '\n' for record in PAIRS[:2]))
    more = f'--data=jsonl:{tmp_path / "records.jsonl"}[1:],jsonl:{tmp_path / "more.jsonl"}'
    found = score(capsys, model, PAIRS, tmp_path, more)
    named = [('records.jsonl:2', PAIRS[1]), ('records.jsonl:3', PAIRS[2])]
    named += [(f'more.jsonl:{i + 1}', PAIRS[i] | {'id': 1}) for i in (0, 1)]
    assert [(one['record'], one) for one in found] == [
        (name, record | {key: one[key] for key in ('record', 'scores', 'truncated')})
        for (name, record), one in zip(named, found)
    ]

  def ends_of_steps(self, prompt, steps):
    tokenizer = tokenizers.load(STORIES)
    ids, ends = [tokenizer.bos_id, *tokenizer.encode(prompt)], []
    for step in steps:
      ids += tokenizer.encode(step + '\n', continuation=True)
      ends.append(len(ids) - 1)
    return ids, ends

  def test_reads_the_end_of_every_step(self, capsys, model, expected, tmp_path):
    (one,) = score(capsys, model, [{'prompt': 'Tom', 'completions': STEPS}], tmp_path, '--per=step')
    ids, ends = self.ends_of_steps('Tom', STEPS)
    np.testing.assert_allclose(one['scores'], [expected(ids)[ends]], atol=1e-4)

  def test_gives_every_output_of_a_head_of_several(self, capsys, hidden, tmp_path):
    rng = np.random.default_rng(1)
    head = {name: rng.standard_normal(shape).astype('float32') for name, shape in runs.HEAD_OF_TWO.items()}
    folder = runs.write_model(tmp_path / 'steps', **head)
    (one,) = score(capsys, folder, [{'prompt': 'Tom', 'completions': STEPS}], tmp_path, '--per=step')
    ids, ends = self.ends_of_steps('Tom', STEPS)
    np.testing.assert_allclose(one['scores'], [hidden(ids)[ends] @ head['score'] + head['score_bias']], atol=1e-4)

  def test_is_the_same_in_two_processes(self, capsys, model, tmp_path):
    alone = score(capsys, model, PAIRS, tmp_path)
    args = '--mode=score', f'--model={model}', f'--data=jsonl:{tmp_path / "records.jsonl"}', '--row_length=64'
    processes = runs.spawn_together(['jaxalign', *args, f'--cache_dir={tmp_path}'], 2)
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    found = [[json.loads(line) for line in out.splitlines() if line.startswith('{')] for out, _ in said]
    assert found[1] == []
    for one, other in zip(found[0], alone, strict=True):
      assert one['record'] == other['record']
      np.testing.assert_allclose(one['scores'], other['scores'], atol=1e-4)

  def test_says_what_was_cut_and_leaves_out_what_is_equal(self, capsys, model, tmp_path):
    equal = {'prompt': 'a', 'chosen': ' b', 'rejected': ' b'}
    long = {'prompt': 'Lily', 'chosen': ' smiled' * 40, 'rejected': ' cried'}
    found = score(capsys, model, [PAIRS[0], equal, long], tmp_path)
    assert [(one['record'], one['truncated']) for one in found] == [
        ('records.jsonl:1', False),
        ('records.jsonl:3', True),
    ]


@pytest.fixture(scope='module')
def policy(tmp_path_factory):
  """The workdir of a short run of DPO, with adapters."""
  folder = runs.folder_with_pairs(tmp_path_factory, 'policy')
  plain = [x for x in runs.flags(folder, folder / 'w', steps=3) if 'model=' not in x and 'linear' not in x]
  more = '--model=builtin:stories260K', '--lora=rank:2', '--eval_data=', '--gin=optim.constant.lr = 0.01'
  assert main.main([*plain, *more]) == 0
  return folder / 'w'


class TestImplicitRewards:

  def test_are_log_ratios_to_what_the_run_began_with(self, capsys, policy, tmp_path):
    loaded, tokenizer = checkpoint.load(policy, ONE), tokenizers.load(STORIES)
    base = recipe.load(str(STORIES), ONE)

    def logps(model, params, ids):
      hidden = packed.hidden_states(model, params, ids)
      logits = hidden @ np.asarray(transformer.output_matrix(params), np.float64)[:, :512]
      return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.arange(ids.size - 1), ids[1:]]

    wanted = []
    found = score(capsys, policy, PAIRS, tmp_path)
    per_token = score(capsys, policy, PAIRS, tmp_path, '--per=token')
    for one, tokens, record in zip(found, per_token, PAIRS):
      for value, values, side in zip(one['scores'], tokens['scores'], ('chosen', 'rejected')):
        prompt, response = ids_of(tokenizer, record['prompt'], record[side])
        ids = np.array([*prompt, *response, tokenizer.eos_id])
        ratios = logps(loaded.model, loaded.params, ids) - logps(base.model, base.params, ids)
        wanted.append(ratios[len(prompt) - 1 :])
        np.testing.assert_allclose(values, ratios[len(prompt) - 1 :], atol=1e-4)
        assert value == pytest.approx(ratios[len(prompt) - 1 :].sum(), abs=1e-3)
        assert abs(value) > 1e-2
    # As a reward, in words and of ids that were sampled: times beta, of tokens too.
    args = f'--reward={policy}(beta=0.25):2', f'--data=jsonl:{tmp_path / "records.jsonl"}', '--row_length=64'
    capsys.readouterr()
    assert main.main(['jaxalign', '--mode=score', *args]) == 0
    scores = sum((json.loads(line)['scores'] for line in capsys.readouterr().out.splitlines()), [])
    np.testing.assert_allclose(scores, [2 * 0.25 * ratios.sum() for ratios in wanted], atol=1e-3)
    pairs = [ids_of(tokenizer, record['prompt'], record[side]) for record in PAIRS for side in ('chosen', 'rejected')]
    given = functions.Responses(
        [''] * 6, [''] * 6, {}, [''] * 6, [ids + [tokenizer.eos_id] for _, ids in pairs], [ids for ids, _ in pairs]
    )
    rewards, sampled = [functions.parse(f'{policy}(beta=0.25)')], scorers.Sampled(tokenizer, 16, 32, 64)
    with jax.set_mesh(ONE), panels.Panel(rewards, scorers.checked(rewards, ONE, own={}, sampled=sampled)()) as panel:
      (judged,) = panel(given).values()
    for value, tokens, ratios in zip(judged.values, judged.tokens, wanted, strict=True):
      np.testing.assert_allclose(tokens, 0.25 * ratios, atol=1e-4)
      assert value == pytest.approx(tokens.sum())

  def test_of_a_list_are_those_of_its_items(self, capsys, policy, tmp_path):
    texts = [side[name] for side in PAIRS for name in ('chosen', 'rejected')]
    (of_list,) = score(capsys, policy, [{'prompt': 'Tom', 'samples': texts}], tmp_path)
    alone = score(capsys, policy, [{'prompt': 'Tom', 'completion': text} for text in texts], tmp_path)
    np.testing.assert_allclose(of_list['scores'], [one['scores'][0] for one in alone], atol=1e-4)
    assert len(set(of_list['scores'])) == len(texts)

  def test_are_not_of_steps(self, capsys, policy):
    assert main.main(['jaxalign', '--mode=score', f'--checkpoint={policy}', '--data=jsonl:x', '--per=step']) == 2
    assert 'its implicit rewards are of tokens' in capsys.readouterr().err


def trained(tmp_path_factory, algo, *more):
  """The workdir of a short run, with the flags that name its cache."""
  folder = tmp_path_factory.mktemp(algo)
  args = f'--algo={algo}', f'--workdir={folder / "w"}', f'--cache_dir={folder}', '--steps=3', '--eval_data='
  more = '--save_every=0', '--gin=optim.constant.lr = 0.01', '--gin=loader.Packing.rows = 8', *more
  assert main.main(['jaxalign', *args, *more]) == 0
  return folder / 'w'


class TestKinds:
  """Each kind of reward model is trained, restored and scores, against its model read one text at a time."""

  def hidden(self, workdir, ids):
    loaded = checkpoint.load(workdir, ONE)
    return packed.hidden_states(loaded.model, loaded.params, ids)[-1], jax.device_get(loaded.params)

  def test_of_several_ratings_gives_them_all(self, capsys, tmp_path_factory, tmp_path):
    workdir = trained(tmp_path_factory, 'rm_attributes')
    tokenizer = tokenizers.load(STORIES)
    for one, record in zip(score(capsys, workdir, PAIRS, tmp_path), PAIRS):
      for values, side in zip(one['scores'], ('chosen', 'rejected')):
        prompt, response = ids_of(tokenizer, record['prompt'], record[side])
        read, params = self.hidden(workdir, [*prompt, *response, tokenizer.eos_id])
        wanted = read @ params['score'].astype(np.float64)
        assert wanted.shape == (3,) and np.all(np.abs(wanted) > 1e-3)
        np.testing.assert_allclose(values, wanted, atol=1e-4)

  def test_of_pairs_in_one_text_gives_log_probabilities_over_both_orders(self, capsys, tmp_path_factory, tmp_path):
    workdir = trained(tmp_path_factory, 'preference_model', "--gin=judged.both_orders.second = ' or'")
    tokenizer = tokenizers.load(STORIES)
    encode = lambda text: tokenizer.encode(text, continuation=True)

    def ahead(prompt, a, b):
      """Probability that the first of two is better."""
      pieces = encode('\n\nResponse A:'), encode(a), encode(' or'), encode(b)
      ids = [tokenizer.bos_id, *tokenizer.encode(prompt), *sum(pieces, []), tokenizer.eos_id]
      read, params = self.hidden(workdir, ids)
      return 1 / (1 + np.exp(-float(read @ params['score'][:, 0])))

    for one, record in zip(score(capsys, workdir, PAIRS, tmp_path), PAIRS):
      prompt, chosen, rejected = (record[name] for name in ('prompt', 'chosen', 'rejected'))
      orders = ahead(prompt, chosen, rejected), ahead(prompt, rejected, chosen)
      assert abs(orders[0] + orders[1] - 1) > 1e-3
      p = (orders[0] + 1 - orders[1]) / 2
      np.testing.assert_allclose(one['scores'], np.log([p, 1 - p]), atol=1e-4)
    args = f'--data=jsonl:{tmp_path / "list.jsonl"}', f'--cache_dir={tmp_path}', f'--checkpoint={workdir}'
    (tmp_path / 'list.jsonl').write_text(json.dumps({'prompt': 'Tom', 'samples': [' ran', ' sat', ' sang']}) + '\n')
    assert main.main(['jaxalign', '--mode=score', *args]) == 1
    assert 'list.jsonl:1: column samples: this model compares two responses' in capsys.readouterr().err
    args = f'--data=jsonl:{tmp_path / "list.jsonl"}', f'--reward={workdir}'
    assert main.main(['jaxalign', '--mode=score', *args]) == 2
    assert 'its recipe.Recipe.scored_fn reads no single response (RunError: a column' in capsys.readouterr().err

  def test_of_a_judge_in_words_gives_the_log_odds_of_the_good_answer(self, capsys, tmp_path_factory, tmp_path):
    workdir = trained(tmp_path_factory, 'generative_rm', "--gin=judged.answered.answers = (' sun', ' moon')")
    tokenizer = tokenizers.load(STORIES)
    encode = lambda text: tokenizer.encode(text, continuation=True)
    (yes, *_), (no, *_) = (encode(word) for word in (' sun', ' moon'))
    assert yes != no
    singles = [{'prompt': pair['prompt'], 'completion': pair['chosen']} for pair in PAIRS]
    lists = [{'prompt': pair['prompt'], 'samples': [pair[x] for x in ('rejected', 'chosen')] * 2} for pair in PAIRS]
    found, alone, several = (score(capsys, workdir, records, tmp_path) for records in (PAIRS, singles, lists))
    assert (
        main.main(['jaxalign', '--mode=score', f'--reward={workdir}', f'--data=jsonl:{tmp_path / "records.jsonl"}'])
        == 0
    )
    as_reward = [json.loads(line)['scores'] for line in capsys.readouterr().out.splitlines()]
    for one, other in zip(as_reward, several, strict=True):
      assert one == pytest.approx(other['scores'], abs=1e-4)
    # What its run bound goes with its functions where another recipe is bound, as where it judges what is sampled.
    bindings = checkpoint.read_json(workdir / 'checkpoints' / 'run.json')['bindings']
    config.parse_saved([bindings], [], [])
    own = config.scoring()
    config.parse('sft', files=[], user_files=[], bindings=[])
    made = own.scored_fn(singles[0], tokenizer, row_length=64)
    said = [tokenizer.decode(sequence.ids) for sequence in made.sequences]
    assert [text.rpartition('Good?')[2] for text in said] == [' s', ' m']  # They end where they differ.
    assert own.combine_fn([np.array([3.0]), np.array([1.0])]) == [2.0]
    for one, other in zip(found, several):
      assert other['scores'] == pytest.approx(one['scores'][::-1] * 2, abs=1e-5)
    for one, other, record in zip(found, alone, PAIRS):
      assert other['scores'] == pytest.approx(one['scores'][:1], abs=1e-5)
      for value, side in zip(one['scores'], ('chosen', 'rejected')):
        pieces = encode('\n\nResponse:'), encode(record[side]), encode('\n\nGood?')
        read, params = self.hidden(workdir, [tokenizer.bos_id, *tokenizer.encode(record['prompt']), *sum(pieces, [])])
        logits = read @ np.asarray(transformer.output_matrix(params), np.float64)
        assert value == pytest.approx(logits[yes] - logits[no], abs=1e-3)
    assert main.main(['jaxalign', '--mode=score', f'--checkpoint={workdir}', '--data=jsonl:x', '--per=token']) == 2
    assert 'judges whole responses' in capsys.readouterr().err


MINE = """
from jaxalign.data import scored

def talk(record, tokenizer, *, row_length, end):
  pair = {'prompt': record['q'], 'chosen': record['a'] + end, 'rejected': record['b'] + end}
  return scored.comparison(pair, tokenizer, row_length=row_length)

def answer(record, tokenizer, *, row_length, end):
  return scored.responses({'prompt': record['q'], 'completion': record['a'] + end}, tokenizer, row_length=row_length)
"""
MINE_GIN = """
from __gin__ import dynamic_registration
import my_examples
from jaxalign import recipe
recipe.Recipe.example_fn = @my_examples.talk
recipe.Recipe.scored_fn = @my_examples.answer
my_examples.talk.end = '.'
my_examples.answer.end = '.'
"""


class TestUsersExamples:

  def test_are_scored_as_the_run_says(self, tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    (tmp_path / 'my_examples.py').write_text(MINE)
    own = [{'q': pair['prompt'], 'a': pair['chosen'], 'b': pair['rejected']} for pair in PAIRS]
    (tmp_path / 'own.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in own))
    (tmp_path / 'my.gin').write_text(MINE_GIN.rsplit('\n', 2)[0])
    mine = f'--gin_file={tmp_path / "my.gin"}'
    workdir = trained(tmp_path_factory, 'rm', mine, f'--data=jsonl:{tmp_path / "own.jsonl"}')
    (tmp_path / 'my.gin').write_text(MINE_GIN)  # with what only scoring calls
    args = ['jaxalign', '--mode=score', f'--checkpoint={workdir}', f'--data=jsonl:{tmp_path / "own.jsonl"}']
    args.append(f'--cache_dir={tmp_path}')
    # In processes of their own, which have not imported the module.
    spawned = [runs.spawn(args + more, cwd=tmp_path.parent) for more in ([], [mine])]
    (_, err), (out, told) = (process.communicate(timeout=200) for process in spawned)
    assert [process.returncode for process in spawned] == [2, 0], told
    assert "(give --gin_file=FILE beside modules of yours): No module named 'my_examples'" in err.splitlines()[-1]
    found = [json.loads(line) for line in out.splitlines()]
    head = jax.device_get(checkpoint.load(workdir, ONE).params)
    tokenizer = tokenizers.load(STORIES)
    for one, record in zip(found, own, strict=True):
      prompt, response = ids_of(tokenizer, record['q'], record['a'] + '.')
      read, _ = TestKinds().hidden(workdir, [*prompt, *response, tokenizer.eos_id])
      np.testing.assert_allclose(one['scores'], read @ head['score'].astype(np.float64), atol=1e-4)
      assert one['b'] == record['b']

  def test_may_be_bound_when_they_are_scored(self, capsys, policy, tmp_path):
    (tmp_path / 'columns.gin').write_text(
        'from __gin__ import dynamic_registration\nfrom jaxalign import recipe\nfrom jaxalign.data import scored\n'
        "recipe.Recipe.scored_fn = @scored.plain\nscored.plain.columns = {'prompt': 'q', 'samples': 'a'}\n"
    )
    texts = [' ran', ' sat']
    flag = f'--gin_file={tmp_path / "columns.gin"}'
    (one,) = score(capsys, policy, [{'q': 'Tom', 'a': texts}], tmp_path, flag)
    (other,) = score(capsys, policy, [{'prompt': 'Tom', 'samples': texts}], tmp_path)
    assert one['scores'] == pytest.approx(other['scores'], abs=1e-4)

  def test_are_all_that_a_gin_file_is_read_for(self, capsys, model, policy, tmp_path):
    (tmp_path / 'idle.gin').write_text('')
    for where, said in (f'--model={model}', 'is of none'), (f'--checkpoint={policy}', 'nothing binds recipe.Recipe.sc'):
      args = where, '--data=jsonl:x', f'--gin_file={tmp_path / "idle.gin"}'
      assert main.main(['jaxalign', '--mode=score', *args]) == 2
      assert '--gin_file' in (line := capsys.readouterr().err.splitlines()[-1]) and said in line


REWARDS = """
import my_words

def length(responses):
  return [len(text) for text in responses]

def answers(responses, answer, prompts, scores=None, **columns):
  assert 'responses' not in columns and len(prompts) == len(responses)
  return [None if a is None else float(a in text) for a, text in zip(answer, responses)]

def good(responses):
  return [my_words.good(text) for text in responses]

def fails(responses):
  return [1 / (len(text) - 4) for text in responses]

def tokens(ids):
  return [len(one) for one in ids]
"""
JUDGED = [
    {'prompt': 'q', 'samples': [' a', ' ab', ' b'], 'answer': 'a', 'scores': 'old', 'truncated': True},
    {'prompt': 'q', 'chosen': ' a', 'rejected': ' a'},
    {'prompt': 'q', 'chosen': ' good', 'rejected': ' b', 'answer': 'b'},
    {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'good day'}], 'id': 7},
]


class TestRewards:
  """Responses are scored by functions of a user's own file, without a model."""

  @pytest.fixture
  def call(self, capsys, caplog, tmp_path, monkeypatch):
    """Scores `JUDGED`, or other records, in the folder of the user's files; returns what was printed, and the log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    (tmp_path / 'mine.py').write_text(REWARDS)
    (tmp_path / 'my_words.py').write_text("good = lambda text: float('good' in text)\n")

    def calling(*flags, records=JUDGED, code=0):
      (tmp_path / 'd.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
      caplog.clear()
      assert main.main(['jaxalign', '--mode=score', '--data=jsonl:d.jsonl', *flags]) == code
      out, err = capsys.readouterr()
      return [json.loads(line) for line in out.splitlines()], err + caplog.text

    yield calling
    sys.modules.pop('my_words', None)

  def test_are_printed_before_the_columns_of_each_record(self, call):
    found, err = call('--reward=mine.py:length')
    places, scores = ['d.jsonl:1', 'd.jsonl:3', 'd.jsonl:4'], [[2.0, 3.0, 2.0], [5.0, 2.0], [8.0]]
    made = [{'record': place, 'scores': one} for place, one in zip(places, scores)]
    kept = [JUDGED[0], *JUDGED[2:]]
    assert found == [record | one for record, one in zip(kept, made)]
    assert [list(one)[:2] for one in found] == [['record', 'scores']] * 3
    assert 'mine.py:length: mean 3.667, std 2.211, abstained 0 of 6' in err
    assert '1 records left out: equal responses (first d.jsonl:2)' in err

  def test_read_columns_and_abstain(self, call):
    found, err = call('--reward=mine.py:answers')
    assert [one['scores'] for one in found] == [[1.0, 1.0, 0.0], [0.0, 1.0], [None]]
    assert 'mean 0.6, std 0.4899, abstained 1 of 6' in err

  @pytest.mark.parametrize(
      ('how', 'scores'),
      [
          ([], [[2.0, 2.5, 1.0], [2.5, 2.0], [4.0]]),
          (['--combine=gated'], [[2.0, 2.5, 0.0], [0.0, 2.0], [None]]),
      ],
  )
  def test_are_combined(self, call, how, scores):
    found, _ = call('--reward=mine.py:answers', '--reward=mine.py:length:0.5', *how)
    assert [one['scores'] for one in found] == scores

  def test_are_normalised_over_all_records(self, call):
    found, _ = call('--reward=mine.py:length:2', '--combine=normalised')
    lengths = np.array([2, 3, 2, 5, 2, 8], np.float64)
    wanted = 2 * (lengths - lengths.mean()) / lengths.std()
    assert sum((one['scores'] for one in found), []) == pytest.approx(wanted)

  def test_keep_the_order_over_many_calls_and_in_processes(self, call):
    records = [{'prompt': 'q', 'samples': ['x' * (i % 7), 'good']} for i in range(70)]
    found, _ = call('--reward=mine.py:good(processes=2, timeout=60)', '--reward=mine.py:length', records=records)
    assert [one['record'] for one in found] == [f'd.jsonl:{i + 1}' for i in range(70)]
    assert [one['scores'] for one in found] == [[float(i % 7), 5.0] for i in range(70)]

  def test_of_token_ids_read_the_tokenizer(self, call):
    tokenizer = tokenizers.load(STORIES)
    found, _ = call('--reward=mine.py:tokens', '--tokenizer=builtin:stories260K', records=JUDGED[:1])
    assert found[0]['scores'] == [len(tokenizer.encode(text, continuation=True)) for text in JUDGED[0]['samples']]

  def test_of_the_package_judge_what_was_sampled(self, call):
    answers = [{'prompt': '2 + 2 =', 'answer': '2 + 2 = 4\n#### 4', 'samples': [' 4', ' $5', ' It is 4.00!']}]
    found, _ = call('--reward=jaxalign.rewards.rules:numeric_answer', records=answers)
    assert found[0]['scores'] == [1.0, 0.0, 1.0]

  def test_run_as_the_readme_says(self, call, tmp_path):
    text = (pathlib.Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'^```\w*\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if block.startswith('# my_rewards.py')]
    (tmp_path / 'my_rewards.py').write_text(code)
    (commands,) = [
        block for block in blocks if '--reward=' in block and 'my_rewards' in block and '--algo' not in block
    ][-1:]
    records = [{'prompt': 'q', 'samples': ['4', '"4', 'x'], 'answer': '4'}]
    for command, scores in zip(commands.replace('\\\n', '').splitlines(), [[1.0, 1.0, 0.0], [3.5, 3.0, 0.0]]):
      flags = [word for word in shlex.split(command.split(' > ')[0]) if word.startswith(('--reward', '--combine'))]
      assert call(*flags, records=records)[0][0]['scores'] == scores

  def test_skip_what_cannot_be_read_where_asked(self, call):
    records = [{'prompt': 'q', 'samples': 'a'}, {'prompt': 'q', 'samples': ['a']}]
    found, err = call('--reward=mine.py:length', '--skip_bad_records', records=records)
    assert [one['record'] for one in found] == ['d.jsonl:2']
    assert '1 records left out: unreadable (first d.jsonl:1)' in err

  @pytest.mark.parametrize(
      ('flags', 'records', 'code', 'said'),
      [
          (['--reward=mine.py:fails'], JUDGED[:1], 0, ''),
          (
              ['--reward=mine.py:fails'],
              [JUDGED[0], {'prompt': 'q', 'samples': ['a', 'four']}],
              1,
              'reward mine.py:fails, d.jsonl:2: ZeroDivisionError: division by zero (mine.py:',
          ),
          (['--reward=mine.py:tokens'], JUDGED, 1, 'it wants `ids`'),
          (
              ['--reward=mine.py:answers'],
              JUDGED[1:2] + JUDGED[3:],
              1,
              'd.jsonl:2: it wants `answer`, and there is only',
          ),
          (['--reward=mine.py:length'], JUDGED[1:2], 1, '--data=jsonl:d.jsonl: it holds no responses to score'),
          (['--reward=mine.py:length'], [{'prompt': 'q'}], 1, 'd.jsonl:1: a column is missing'),
          (['--reward=mine.py:long'], JUDGED, 2, '--reward=mine.py:long: mine.py has no long; write MODULE:FUNCTION'),
          (['--reward=mine.py:length', '--combine=best'], JUDGED, 2, '--combine=best: it is one of sum, norm'),
          (['--reward=mine.py:length', '--model=x'], JUDGED, 2, '--mode=score --reward does not read --model'),
          (['--reward=mine.py:length', '--per=token'], JUDGED, 2, '--mode=score --reward does not read --per'),
          (['--model=x', '--combine=sum'], JUDGED, 2, '--mode=score does not read --combine; it goes with --reward'),
          (['--model=x', '--tokenizer=x'], JUDGED, 2, '--mode=score does not read --tokenizer'),
          (['--reward=mine.py:length', '--data='], JUDGED, 2, '--mode=score needs --data=SPEC'),
          (
              ['--reward=jaxalign.rewards.rules:matches_format(pattern="(")'],
              JUDGED,
              2,
              'it is no regular expression',
          ),
      ],
  )
  def test_that_fail_say_so_in_one_line(self, call, flags, records, code, said):
    found, err = call(*flags, records=records, code=code)
    lines = [line for line in err.splitlines() if line.startswith('jaxalign: ')]
    assert len(lines) == (code > 0) and said in ''.join(lines)
    assert bool(found) == (code == 0)


class TestRound:

  def test_is_sampled_scored_and_trained_on(self, capsys, tmp_path_factory, tmp_path):
    judge = trained(tmp_path_factory, 'rm')
    cache = f'--cache_dir={tmp_path}'

    def call(name, *flags):
      capsys.readouterr()
      assert main.main(['jaxalign', *flags]) == 0
      (tmp_path / name).write_text(capsys.readouterr().out)
      return f'--data=jsonl:{tmp_path / name}'

    options = '--samples_per_prompt=4', '--max_new_tokens=8'
    first = '--data=builtin:lists:train[:6]'
    sampled = call('samples.jsonl', '--mode=sample', '--model=builtin:stories260K', first, *options)
    data = call('scored.jsonl', '--mode=score', f'--checkpoint={judge}', sampled, cache)
    records = [json.loads(line) for line in (tmp_path / 'scored.jsonl').read_text().splitlines()]
    assert [len(record['scores']) for record in records] == [4] * 6
    best = [record['samples'][int(np.argmax(record['scores']))] for record in records]
    call('shown.txt', '--mode=show', '--algo=raft', data)
    shown = (tmp_path / 'shown.txt').read_text()
    for record, text in zip(records, best):
      assert f'{record["prompt"]}[[{text}]]'.replace('\n', '\\n') in shown
    assert shown.count('[[') == 6
    small = '--steps=2', '--gin=loader.Packing.rows = 8', '--save_every=0', '--gin=train.train.samples = None', cache
    call('summary.json', '--algo=raft', data, *small, f'--workdir={tmp_path / "raft"}')
    assert json.loads((tmp_path / 'summary.json').read_text())['data/kept'] == 6
    # The next round samples from what was trained, for the same records.
    again = call('again.jsonl', '--mode=sample', f'--checkpoint={tmp_path / "raft"}', data, *options)
    newer = call('newer.jsonl', '--mode=score', f'--checkpoint={judge}', again, cache)
    call('shown.txt', '--mode=show', '--algo=rest', newer, '--gin=feedback.selected.threshold = -100.0')
    assert (tmp_path / 'shown.txt').read_text().count('[[') == 24


class TestErrors:

  @pytest.mark.parametrize(
      'flags,said',
      [
          (('--data=jsonl:x.jsonl',), '--mode=score needs --checkpoint=DIR, or --model=DIR'),
          (('--model={model}',), '--mode=score needs --data=SPEC'),
          (('--model={model}', '--data=jsonl:x', '--per=word'), '--per=word: it is one of response, token, step'),
          (
              ('--model={stories}', '--data=jsonl:x'),
              'it has no head that scores (train one with --algo=rm) and no reference',
          ),
          (
              ('--model={model}', '--data=jsonl:x', '--row_length=999'),
              '--row_length=999: the context of the model is 512',
          ),
          (
              ('--model={model}', '--data=jsonl:x', '--row_length=61', '--mesh=fsdp:4,context:2'),
              '--row_length=61: --mesh splits it 2 ways; make it a multiple',
          ),
          (('--model={model}', '--data=jsonl:x', '--gin=a.b=1'), '--mode=score does not read --gin'),
          (('--model={model}', '--data=jsonl:x:0.7,jsonl:y:0.3'), 'leave out the weight 0.7 of jsonl:x'),
          (('--checkpoint=nowhere', '--data=jsonl:x'), '--checkpoint=nowhere: no checkpoint there'),
      ],
  )
  def test_are_one_line(self, capsys, model, flags, said):
    args = [flag.format(model=model, stories=STORIES) for flag in flags]
    assert main.main(['jaxalign', '--mode=score', *args]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('jaxalign: ')]
    assert said in line
