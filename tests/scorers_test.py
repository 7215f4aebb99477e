"""Models as judges of sampled ids, against the model read one response at a time; rewards of whole runs."""

import json
import re

import jax
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import main
from jaxalign import recipe
from jaxalign import scorers
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.rewards import functions
from tests import runs

STORIES = recipe.asset('stories260K')
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
TOKENIZER = tokenizers.load(STORIES)
PROMPTS = ['Once upon a time', 'Lily', 'The sun', 'Tom and Ben']
TEXTS = [' there was a cat.', ' ran\nhome', ' is warm.\n\n It shone.\n', ' \n\n']


def spelt(text):
  """Ids of a text that its tokenizer would not choose, a token for each character."""
  ids = [i for c in text for i in TOKENIZER.encode(c, continuation=True)]
  assert TOKENIZER.decode(ids, continuation=True) == text
  assert len(text) < 4 or ids != TOKENIZER.encode(text, continuation=True)
  return ids


def sampled(count=4, eos=(0, 2)):
  """Responses as a rollout has them, some of which end by themselves."""
  ids = [spelt(text) + [TOKENIZER.eos_id] * (n in eos) for n, text in enumerate(TEXTS[:count])]
  prompts = [[TOKENIZER.bos_id, *TOKENIZER.encode(prompt)] for prompt in PROMPTS[:count]]
  where = [f'd.jsonl:{n + 1}' for n in range(count)]
  ends = [n in eos for n in range(count)]
  return functions.Responses(PROMPTS[:count], TEXTS[:count], {}, where, ids, prompts, ends)


def opened(spec, mesh=ONE, own=None, policy=TOKENIZER, **sizes):
  """The judge of one model."""
  sizes = {'prompt': 12, 'response': 40, 'row_length': 64} | sizes
  rewards = [functions.parse(spec)]
  with jax.set_mesh(mesh):
    known = scorers.checked(rewards, mesh, own=own or {}, sampled=scorers.Sampled(policy, **sizes))
    (judge,) = known().values()

  def judging(responses):
    with jax.set_mesh(mesh):
      return judge(responses)

  if isinstance(judge, scorers.Scorer):
    judging.run, judging.params = judge.run, judge._reading.params
  return judging


@pytest.fixture(scope='module')
def heads(tmp_path_factory):
  """Directories of models by name, and their heads: of one output, another of one, and of two for steps."""
  rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp('heads')
  of = lambda shapes: {name: rng.standard_normal(shape).astype('float32') for name, shape in shapes.items()}
  found = {'rm': of({'score': (64, 1)}), 'other': of({'score': (64, 1)}), 'prm': of(runs.HEAD_OF_TWO)}
  found['nan'] = {'score': np.full((64, 1), np.nan, np.float32)}
  return {name: (runs.write_model(folder / name, **head), head) for name, head in found.items()}


@pytest.fixture(scope='module')
def hidden():
  """What the model without a head makes of ids that it reads alone."""
  return runs.hidden_states()


def ends_of(hidden, head, responses):
  """The first output where the last token of each response has been read."""
  whole = [prompt + ids for prompt, ids in zip(responses.prompt_ids, responses.ids)]
  return np.array([float(hidden(ids)[-1] @ head['score'][:, 0].astype(np.float64)) for ids in whole])


class TestHeads:

  @pytest.mark.parametrize('mesh', ['', 'data:2,fsdp:2,tensor:2'])
  def test_are_read_where_the_last_sampled_id_was_read_in_one_program(self, heads, hidden, mesh):
    folder, head = heads['rm']
    judge = opened(str(folder), mesh=sharding.make_mesh(mesh) if mesh else ONE)
    for responses in (sampled(), sampled(2)):
      found = judge(responses)
      np.testing.assert_allclose(found.values, ends_of(hidden, head, responses), atol=1e-4)
      assert found.tokens is None
    assert judge.run._cache_size() == 1

  def test_read_texts_where_ids_mean_something_else(self, heads, hidden, tmp_path):
    folder, head = heads['rm']
    for name in ('tokenizer.model', 'tokenizer.json'):
      if (STORIES / name).exists():
        (tmp_path / name).write_bytes((STORIES / name).read_bytes())
    (tmp_path / 'tokenizer_config.json').write_text('{"chat_template": "{{ messages[0].content }}"}')
    responses = sampled()
    found = opened(str(folder), policy=tokenizers.load(tmp_path))(responses)
    canonical = [TOKENIZER.encode(text, continuation=True) for text in TEXTS]
    ids = [one + [TOKENIZER.eos_id] * ends for one, ends in zip(canonical, responses.finished)]
    read = functions.Responses(PROMPTS, TEXTS, {}, responses.where, ids, responses.prompt_ids)
    wanted = ends_of(hidden, head, read)
    np.testing.assert_allclose(found.values, wanted, atol=1e-4)
    assert np.all(np.abs(found.values - ends_of(hidden, head, responses))[:3] > 1e-3)

  def test_are_kept_in_another_precision(self, heads, hidden):
    folder, head = heads['rm']
    responses = sampled()
    found = opened(f"{folder}(dtype='bfloat16')")(responses).values
    wanted = ends_of(hidden, head, responses)
    assert 1e-3 < np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()

  def test_lie_on_a_mesh_of_their_own(self, heads, hidden):
    folder, head = heads['rm']
    responses, policy = sampled(), sharding.make_mesh('data:2,fsdp:2,tensor:2')
    judge = opened(f"{folder}(mesh='fsdp:8')", mesh=policy)
    with jax.set_mesh(policy):
      found = judge(responses)
    np.testing.assert_allclose(found.values, ends_of(hidden, head, responses), atol=1e-4)
    table = judge.params['embed']
    assert table.sharding.shard_shape(table.shape) == (table.shape[0], table.shape[1] // 8)
    with pytest.raises(types.UsageError, match=r"--reward=.*mesh='fsdp:3'\): --mesh=fsdp:3: .* does not divide"):
      opened(f"{folder}(mesh='fsdp:3')", mesh=policy)
    with pytest.raises(
        types.UsageError, match=r"--reward=.*mesh='tensor:8'\): --mesh: .* which tensor:8 does not divide"
    ):
      opened(f"{folder}(mesh='tensor:8')", mesh=policy)

  def test_of_several_models_are_combined(self, heads, hidden):
    responses = sampled()
    names = '+'.join(str(heads[name][0]) for name in ('rm', 'other'))
    scores_EN = np.stack([ends_of(hidden, heads[name][1], responses) for name in ('rm', 'other')])
    centred_EN = scores_EN - scores_EN.mean(axis=1)[:, None]
    for options, wanted_N in (
        ("(how='worst', centre=True)", centred_EN.min(axis=0)),
        (
            "(how='uncertainty', penalty=0.5)",
            scores_EN.mean(axis=0) - 0.5 * np.square(np.diff(scores_EN, axis=0)[0] / 2),
        ),
    ):
      np.testing.assert_allclose(opened(names + options)(responses).values, wanted_N, atol=1e-3)

  def test_that_are_not_finite_name_the_record(self, heads):
    with pytest.raises(types.RunError, match=r'reward .*nan, d.jsonl:1: the model gives nan') as caught:
      opened(str(heads['nan'][0]))(sampled())
    assert caught.value.everywhere  # so that a job of several processes saves the steps before


OF_STEPS = {'min': np.min, 'mean': np.mean, 'last': lambda x: x[-1], 'product': np.prod}


class TestSteps:

  def right(self, hidden, head, ids):
    """Probability that what ends with the last of these ids is right."""
    wrong, right = hidden(ids)[-1] @ head['score'].astype(np.float64) + head['score_bias']
    return 1 / (1 + np.exp(wrong - right))

  def test_are_lines_of_the_sampled_ids(self, heads, hidden):
    folder, head = heads['prm']
    responses = sampled()
    (newline,) = TOKENIZER.encode('\n', continuation=True)
    judged = {how: opened(f'{folder}(reduce={how!r})')(responses) for how in OF_STEPS}
    for n, text in enumerate(TEXTS):
      ids = [i for i in responses.ids[n] if i != TOKENIZER.eos_id]
      # Where a line with words ends, and how the last one would.
      wanted, start = {}, 0
      for line in text.split('\n'):
        end = start + len(spelt(line)) if line else start
        if line.strip():
          read = responses.prompt_ids[n] + ids[:end] + [newline]
          wanted[min(end, len(ids) - 1)] = self.right(hidden, head, read)
        start = end + 1
      steps = np.array([wanted[place] for place in sorted(wanted)])
      assert len(steps) == [1, 2, 2, 0][n]
      for how, of in OF_STEPS.items():
        found = judged[how]
        if not steps.size:
          assert np.isnan(found.values[n]) and np.isnan(found.tokens[n]).all()
          continue
        assert found.values[n] == pytest.approx(of(steps), abs=1e-4)
        assert len(found.tokens[n]) == len(responses.ids[n])
        assert np.flatnonzero(~np.isnan(found.tokens[n])).tolist() == sorted(wanted)
        np.testing.assert_allclose(found.tokens[n][sorted(wanted)], steps, atol=1e-4)

  def test_of_texts_are_their_lines(self, heads):
    folder, _ = heads['prm']
    of_ids = functions.Responses(PROMPTS, TEXTS, {}, sampled().where, None, sampled().prompt_ids)
    canonical = [TOKENIZER.encode(text, continuation=True) for text in TEXTS]
    given = functions.Responses(PROMPTS, TEXTS, {}, sampled().where, canonical, sampled().prompt_ids)
    judge = opened(str(folder))
    np.testing.assert_allclose(judge(of_ids).values[:2], judge(given).values[:2], atol=1e-4)
    assert judge(of_ids).tokens is None


class TestChecked:

  @pytest.mark.parametrize(
      ('name', 'options', 'said'),
      [
          ('empty', '', 'no model is there (looked for run.json, checkpoints/run.json and config.json)'),
          ('stories', '', 'it has no head that scores (train one with --algo=rm) and no reference'),
          ('rm', '(beta=0.1)', 'beta=0.1: it is of implicit rewards'),
          ('prm', '(output=0)', 'output=0: it has no such output'),
          ('rm', '(output=1)', 'output=1: it has no such output'),
      ],
  )
  def test_refuses_what_cannot_judge_before_weights_are_read(self, heads, tmp_path, name, options, said):
    folder = {'empty': tmp_path, 'stories': STORIES} | {name: folder for name, (folder, _) in heads.items()}
    with pytest.raises(types.UsageError, match=re.escape(said)):
      scorers.checked([functions.parse(f'{folder[name]}{options}')], ONE, own={})

  def test_refuses_responses_that_do_not_fit(self, heads):
    policy = scorers.Sampled(TOKENIZER, prompt=480, response=40, row_length=1024)
    said = 'a prompt of 480 tokens and a response of 40 exceed its context, 512'
    with pytest.raises(types.UsageError, match=said):
      scorers.checked([functions.parse(str(heads['rm'][0]))], ONE, own={}, sampled=policy)


OWN = """
import json
import os
import random

def drawn(ids):
  values = [random.random() for _ in ids]
  with open('drawn.jsonl', 'a') as f:
    f.write(json.dumps([os.getpid(), ids, values]) + '\\n')
  return values

"""

# A run, and then numbers of the first process in both; where it fails there, both do.
TOGETHER = """
import random, sys
import numpy as np
from jaxalign import main, sharding, types
if main.main(sys.argv):
  sys.exit(1)
print('told', sharding.of_first(lambda: np.array([[random.random()], [np.nan]]), (2, 1)).tolist())
try:
  sharding.of_first(lambda: np.zeros(2) / {}['absent'], (2,))
except (KeyError, types.RunError) as err:
  print('raised', type(err).__name__)
"""


class TestRuns:

  def flags(self, algo, name, *more):
    sizes = 'loader.Packing.rows = 8', 'loader.Packing.row_length = 96', 'optim.constant.lr = 0.001'
    rollouts = 'prompts = 4', 'samples = 2', 'max_new_tokens = 8'
    args = [f'--algo={algo}', f'--workdir={name}', '--steps=2', '--log_every=1', '--save_every=0', '--eval_data=']
    args += ['--gin=train.train.samples = None', *(f'--gin={one}' for one in sizes), *more]
    return ['', *args, *(f'--gin=rollouts.Options.{one}' for one in rollouts if algo == 'grpo')]

  def test_are_judged_by_a_model_as_it_scores_and_by_functions_of_the_first_process(
      self, tmp_path, monkeypatch, capsys
  ):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(OWN)
    assert main.main(self.flags('rm', 'rm')) == 0
    rewards = '--reward=rm', '--reward=own.py:drawn:2'
    args = self.flags('grpo', 'w', '--mesh=data:2', *rewards)
    processes = runs.spawn_together(args, 2, cwd=tmp_path, devices=1, program=('-c', TOGETHER))
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    calls = [json.loads(line) for line in (tmp_path / 'drawn.jsonl').read_text().splitlines()]
    assert len(calls) == 2 and len({pid for pid, _, _ in calls}) == 1
    (told, raised), (other, stopped) = ([x for x in out.splitlines() if x[:4] in ('told', 'rais')] for out, _ in said)
    assert told == other and 'nan' in told
    assert {raised, stopped} == {'raised KeyError', 'raised RunError'}

    lines = [json.loads(line) for line in (tmp_path / 'w/rollouts/000000.jsonl').read_text().splitlines()]
    of_rm = [line['reward'] - 2 * value for line, value in zip(lines, calls[0][2], strict=True)]
    records = [{'prompt': x['prompt'], 'completion': x['response'], 'append_eos': x['finished']} for x in lines]
    (tmp_path / 'd.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    capsys.readouterr()
    for flag in '--checkpoint=rm', '--reward=rm':
      assert main.main(['', '--mode=score', flag, '--data=jsonl:d.jsonl', '--row_length=96']) == 0
      scores = [json.loads(line)['scores'][0] for line in capsys.readouterr().out.splitlines()]
      same = [TOKENIZER.encode(x['response'], continuation=True) == x['ids'] for x in lines]
      assert sum(same) >= 4 and len(scores) == len(lines)
      np.testing.assert_allclose(np.array(scores)[same], np.array(of_rm)[same], atol=1e-5)
    assert np.ptp(np.array(of_rm)[same]) > 1e-3
    assert runs.logged(tmp_path / 'w')[1]['rewards/rm/mean'] == pytest.approx(np.mean(of_rm), abs=1e-5)
    params = checkpoint.load('rm', ONE, 'bfloat16').params
    assert (params['embed'].dtype, params['score'].dtype) == ('bfloat16', 'float32')
