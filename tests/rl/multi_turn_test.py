"""Episodes with an environment: what is sampled, what is answered, what is learned, and what goes wrong."""

import json

import jax
import numpy as np
import pytest

from jaxalign import main
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rewards import environments as builtin
from jaxalign.rewards import verdicts
from jaxalign.rl import experience
from jaxalign.rl import multi_turn
from tests import packed
from tests import runs

HERE = 'tests.rl.multi_turn_test'


def scripted(state, text, *, last=2):
  """Answers with what it was told before, and ends after the turn `last`, or where the record says so."""
  state.setdefault('said', []).append(text)
  turn = len(state['said'])
  return f' and {turn} {state["name"]}', float(turn), turn == state.get('turns', last)


def failing(state, text):
  del text
  return state['unknown']


def leaving(state, text):
  raise SystemExit(0)


def returned(state, text):
  del text
  table = {'tuple': 3, 'text': (1, 0.0, True), 'number': ('', float('nan'), True), 'truth': ('', 0.0, 1)}
  return (table | {'arrays': ('', np.float32(2), np.bool_(True))})[state['what']]


def lonely(state):
  return state


def said_once(token):
  return sampling.Sampled([token], [-1.0], [-1.0], 'length')


def environment(spec=f'{HERE}:scripted', turns=3, observation_tokens=64):
  return multi_turn.Environment(spec, turns=turns, observation_tokens=observation_tokens)


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.load(recipe_lib.asset('stories260K'))


class TestPlay:

  def test_masks_what_is_observed_and_knows_the_logps_of_what_is_sampled(self, tokenizer):
    mesh = sharding.make_mesh('', devices=jax.devices()[:1])
    model = transformer.build(architecture.Config(512, 1, 16, 2, 1, 8, 32, 96), mesh, length=96)
    records = [{'name': 'Tom', 'turns': 3}, {'name': 'Lily', 'turns': 1}, {'name': 'Max', 'turns': 5}]
    prompts = [
        verdicts.Prompt([tokenizer.bos_id, *tokenizer.encode(one['name'])], one, f'here:{n}')
        for n, one in enumerate(records)
    ]
    asked = []

    def draw(behind, n, turn, experts):
      asked.append((len(behind), n))
      return sampling.sample(model, params, behind, n=n, max_new_tokens=5, seed=turn, stop_ids=(tokenizer.eos_id,))

    with jax.set_mesh(mesh):
      params = transformer.init_params(model, jax.random.key(0), mesh)
      played = environment().play(prompts, 2, tokenizer, draw)
      assert asked == [(3, 2), (4, 1), (4, 1)]
      wanted = [(3, 6.0, 0), (1, 1.0, 0), (3, 6.0, 0)]
      assert [(one.turns, one.reward, one.cut) for one in played] == [one for one in wanted for _ in range(2)]
      assert 'said' not in records[0]
      for prompt, one in zip([one for one in prompts for _ in range(2)], played, strict=True):
        # Answers stand where they were given, between samples, as their text alone is tokenised.
        observed = [i for i, is_sampled in zip(one.ids, one.sampled) if not is_sampled]
        answers = [f' and {turn} {prompt.record["name"]}' for turn in range(1, one.turns)]
        assert observed == [i for text in answers for i in tokenizer.encode(text, continuation=True)]
        runs_of = ''.join('s' if is_sampled else 'o' for is_sampled in one.sampled)
        assert runs_of.replace('s', ' ').split() == ['o' * len(tokenizer.encode(a, continuation=True)) for a in answers]
        assert len(one.logps) == sum(one.sampled)
        ids = prompt.ids + one.ids
        logits = packed.hidden_states(model, params, ids) @ np.asarray(transformer.output_matrix(params), np.float64)
        table = logits - np.log(np.exp(logits[:, :512]).sum(axis=1, keepdims=True))
        at = [len(prompt.ids) + i for i, is_sampled in enumerate(one.sampled) if is_sampled]
        np.testing.assert_allclose(one.logps, [table[i - 1, ids[i]] for i in at], atol=1e-4)

  def test_cuts_long_answers_and_says_so(self, tokenizer):
    prompts = [verdicts.Prompt([1], {'name': 'Tom', 'turns': 2}, 'here')]
    draw = lambda behind, n, turn, experts: [said_once(400 + turn)]
    (one,) = environment(observation_tokens=2).play(prompts, 1, tokenizer, draw)
    answer = tokenizer.encode(' and 1 Tom', continuation=True)
    assert one.ids == [400, *answer[:2], 401]
    assert one.sampled == [True, False, False, True]
    assert experience.own(one.ids, one.sampled) == [400, 401]
    assert (one.finished, one.cut) == (True, 1)
    assert multi_turn.said([one, one]) == {
        'episodes/turns': 2.0,
        'episodes/observed_tokens': 2.0,
        'episodes/cut_observations': 2.0,
    }

  def test_gives_later_turns_the_experts_of_earlier_ones(self, tokenizer):
    prompts, given = [verdicts.Prompt([1], {'name': name, 'turns': 2}, 'here') for name in ('Tom', 'Max', 'Lily')], []

    def draw(behind, n, turn, experts):
      given.append(experts)
      named = [np.full((len(ids), 1, 2), 10 * turn + row, np.uint8) for row, ids in enumerate(behind)]
      return [said_once(400 + turn)._replace(experts=one) for one in named]

    found = environment().play(prompts, 1, tokenizer, draw)
    assert given[0] is None
    assert [one.tolist() for one in given[1]] == [[[[row, row]]] for row in (0, 1, 2, 0)]
    assert [one.experts.shape for one in found] == [(len(one.ids), 1, 2) for one in found]
    assert [set(one.experts.ravel()) for one in found] == [{10}, {11}, {12}]

  def test_takes_numbers_and_truths_of_numpy(self, tokenizer):
    prompts = [verdicts.Prompt([1], {'what': 'arrays'}, 'here')]
    (one,) = environment(f'{HERE}:returned').play(
        prompts, 1, tokenizer, lambda behind, n, turn, experts: [said_once(400)]
    )
    assert (one.reward, one.finished) == (2.0, True)

  @pytest.mark.parametrize(
      'name,record,said',
      [
          ('leaving', {}, 'leaving, here: SystemExit: 0'),
          ('failing', {}, r"failing, here: KeyError: 'unknown' \(multi_turn_test.py:\d+: return state"),
          (
              'returned',
              {'what': 'tuple'},
              r'returned, here: it returned 3 where \(observation, reward, done\) is wanted',
          ),
          ('returned', {'what': 'text'}, 'its observation is 1 where .* the first a text'),
          ('returned', {'what': 'number'}, 'its reward is nan where .* the second a finite number'),
          ('returned', {'what': 'truth'}, 'its done is 1 where .* the third True or False'),
      ],
  )
  def test_says_which_record_and_function_went_wrong(self, tokenizer, name, record, said):
    draw = lambda behind, n, turn, experts: [said_once(400)]
    with pytest.raises(types.RunError, match=f'environment {HERE}:{said}' if name in said else said):
      environment(f'{HERE}:{name}').play([verdicts.Prompt([1], record, 'here')], 1, tokenizer, draw)

  @pytest.mark.parametrize(
      'spec,said',
      [
          (f'{HERE}:scripted:0.5', 'a weight, processes and timeout are for rewards'),
          (f'{HERE}:scripted(first=1)', 'scripted has no option first; it has state, text, last'),
          (f'{HERE}:nothing', 'has no nothing'),
          (f'{HERE}:lonely', r'it is called as step\(state, text\): too many positional arguments'),
      ],
  )
  def test_refuses_what_is_no_environment(self, spec, said):
    with pytest.raises(types.UsageError, match=f'--environment={HERE}.*: .*{said}'):
      environment(spec)


class TestRuns:

  def test_learn_from_episodes_and_are_resumed_bit_for_bit(self, tmp_path):
    names = ['Tom', 'Anna', 'Ben', 'Lily']
    lines = [json.dumps({'prompt': f'{name} was', 'name': name, 'turns': 1 + n % 3}) for n, name in enumerate(names)]
    (tmp_path / 'prompts.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'flat.jsonl').write_text('\n'.join(4 * lines[:1]))
    options = ('prompts = 4', 'samples = 2', 'max_new_tokens = 4', 'minibatches = 2', 'turns = 3')
    more = ('observation_tokens = 16', 'top_k = 50')

    def run(name, steps, data='prompts', *more_flags):
      args = [
          '--algo=grpo',
          '--model=tiny',
          '--tokenizer=builtin:stories260K',
          f'--data=jsonl:{tmp_path / data}.jsonl',
          f'--eval_data=jsonl:{tmp_path / "prompts.jsonl"}',
          f'--environment={HERE}:scripted',
          f'--workdir={tmp_path / name}',
          f'--steps={steps}',
          '--log_every=1',
          '--save_every=0',
          '--mesh=data:8',
          '--gin=optim.adamw.schedule = @optim.constant',
          '--gin=optim.constant.lr = 1e-3',
          '--gin=loader.Packing.row_length = 96',
          '--gin=loader.Packing.rows = 8',
          *(f'--gin=rollouts.Options.{one}' for one in (*options, *more)),
          *more_flags,
      ]
      assert main.main(['jaxalign', *args]) == 0

    run('straight', 4, 'prompts', '--reward=tests.runs:vowels:0.01')
    for steps in (3, 4):
      run('halves', steps, 'prompts', '--reward=tests.runs:vowels:0.01')
    runs.assert_same(runs.params_of(tmp_path / 'straight'), runs.params_of(tmp_path / 'halves'))
    kept = [json.loads(line) for line in (tmp_path / 'straight' / 'rollouts' / '000000.jsonl').read_text().splitlines()]
    for line in kept:
      turns = 1 + names.index(line['prompt'].split()[0]) % 3
      assert line['sampled'].count(0) > 0 or turns == 1
      assert len(line['sampler_logps']) == len(line['token_labels']['advantages']) == sum(line['sampled'])
      assert line['reward'] == pytest.approx(sum(range(1, turns + 1)) + 0.01 * runs.vowels([line['response']])[0])
      np.testing.assert_allclose(line['token_labels']['old_logps'], line['sampler_logps'], atol=1e-4)
    first = runs.logged(tmp_path / 'straight')[1]
    assert first['episodes/turns'] == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert first['rewards/scripted/mean'] == pytest.approx((1 + 3 + 6 + 1) / 4)
    summary = json.loads((tmp_path / 'straight' / 'summary.json').read_text())
    assert summary['eval/reward_before'] == pytest.approx((1 + 3 + 6 + 1) / 4, abs=0.5)
    assert (summary['eval/pass@1_after'], summary['collapse']) == (1.0, '')
    # Of an environment that gives the same to everybody.
    run('flat', 2, 'flat', '--gin=train.train.samples = None')
    assert runs.logged(tmp_path / 'flat')[1]['collapse/reward_std'] == 1.0
    assert json.loads((tmp_path / 'flat' / 'summary.json').read_text())['collapse'] == 'reward_std'


class TestRollout:

  def test_is_measured_by_what_the_policy_said(self):
    # An environment that says the same for ever is none of its faults.
    responses, sampled = [[5, 9, 9, 9, 6], [7, 9, 9, 9, 8]], [[True, False, False, False, True]] * 2
    of = [[1]], responses, [[-1.0, -1.0]] * 2, [True] * 2, np.zeros((1, 2)), {}, {}, [True] * 2
    found = [experience.Rollout(*of, sampled=which).metrics() for which in (sampled, None)]
    assert [one['completions/distinct_2'] for one in found] == [1.0, 5 / 8]
    assert found[0]['completions/mean_length'] == 2


class TestBuiltin:

  def test_guess_tells_where_to_look(self):
    state = {'answer': '41'}
    steps = [builtin.guess(state, text) for text in (' 12', 'I say 12, or 50!', 'none', '41.0')]
    assert steps == [(' higher ', 0.0, False), (' lower ', 0.0, False), (' ? ', 0.0, False), (' lower ', 1.0, True)]
    with pytest.raises(ValueError, match="the column answer is 'x' where a number is wanted"):
      builtin.guess({'answer': 'x'}, '1')

  @pytest.mark.parametrize(
      'call,result',
      [
          ('1+2', '3'),
          (' -(2 - 10) * 0.5 ', '4'),
          ('1/8', '0.125'),
          ('1/0', 'error'),
          ('2**9999', 'error'),
          ('__import__("os")', 'error'),
          ('1+', 'error'),
      ],
  )
  def test_calculator_answers_arithmetic_alone(self, call, result):
    step = builtin.calculator({'answer': 3}, f'so <calc>7</calc> or <calc>{call}</calc>', per_call=-0.1)
    assert step == (f'<result>{result}</result>', -0.1, False)

  def test_calculator_ends_with_an_answer(self):
    assert [builtin.calculator({'answer': 3}, text)[1:] for text in ('It is 3.', 'It is 4.', 'no')] == [
        (1.0, True),
        (0.0, True),
        (0.0, True),
    ]
