"""Rollouts: what is sampled, scored and trained on, with the built-in model."""

import dataclasses
import functools
import itertools
import json
import re
import threading
import types as pytypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import main
from jaxalign import masked
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import examples
from jaxalign.data import loader
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import sources
from jaxalign.data import token_cache
from jaxalign.generation import decoding
from jaxalign.generation import sampling
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rl import advantages
from jaxalign.rl import collect
from jaxalign.rl import experience
from jaxalign.rl import iterations
from jaxalign.rl import judging
from jaxalign.rl import returns
from jaxalign.rl import rollouts
from tests import runs

MESH = sharding.make_mesh('', devices=jax.devices()[:1])
PACKING = loader.Packing(rows=4, row_length=64)
PROMPTS = [f'{name} was a' for name in ('Tom', 'Anna', 'Ben', 'Lily', 'Max')]


def of_vowels(responses, prompts, name):
  assert all(prompt.startswith(one) for prompt, one in zip(prompts, name, strict=True))
  return runs.vowels(responses)


OPTIONS = rollouts.Options(
    prompts=2,
    samples=3,
    max_new_tokens=12,
    rewards=('tests.rl.rollouts_test:of_vowels',),
    advantage_fn=advantages.mean_centred,
)


@pytest.fixture(scope='module')
def loaded():
  with jax.set_mesh(MESH):
    return recipe_lib.load('builtin:stories260K', MESH)


@pytest.fixture(scope='module')
def prompts(loaded, tmp_path_factory):
  folder = tmp_path_factory.mktemp('prompts')
  path = folder / 'prompts.jsonl'
  path.write_text(''.join(json.dumps({'prompt': text, 'name': text.split()[0]}) + '\n' for text in PROMPTS))
  spec = f'jsonl:{path}'
  read = lambda record: prompts_lib.alone(record, loaded.tokenizer, row_length=64, longest=16)
  made = token_cache.build(spec, tokenizer=loaded.tokenizer, example_fn=read, key_parts='', cache_dir=str(folder))
  return dataset_lib.Joined([made]), [sources.open_source(spec)]


@pytest.fixture
def make(loaded, prompts, tmp_path):
  def made(options=OPTIONS, packing=PACKING, folder=tmp_path / 'rollouts', texts=None):
    packing = iterations.packing_of(options, packing)
    iterations.check_fit(options, prompts[0], packing, loaded.model.config.max_length)
    shared = {'tokenizer': loaded.tokenizer, 'mesh': MESH, 'seed': 0, 'packing': packing}
    models = rollouts.Models(loaded.model, None, loaded.model)
    maker = collect.Maker(options, *prompts, weights=[1.0], models=models, **shared)
    return iterations.Iterations(options, maker, folder=folder, texts=texts, **shared)

  return made


def taken(sampler, loaded, count, place=(0, 0)):
  with jax.set_mesh(MESH):
    return list(
        itertools.islice(sampler.batches(*place, lambda: rollouts.Params(loaded.params, None, loaded.params)), count)
    )


def kept(tmp_path, iteration):
  return [json.loads(line) for line in (tmp_path / 'rollouts' / f'{iteration:06d}.jsonl').read_text().splitlines()]


class TestIterations:

  def test_trains_on_the_ids_that_were_sampled_with_an_advantage_each(self, make, loaded, tmp_path):
    ((place, batch),) = taken(make(), loaded, 1)
    assert place == (1, 0)
    batch, lines = jax.device_get(batch), kept(tmp_path, 0)
    assert len(lines) == 6
    assert batch.labels_BT.keys() == {'advantages', 'sampler_logps'}
    for group in range(2):
      texts = [line['response'] for line in lines[3 * group : 3 * group + 3]]
      rewards = np.array([sum(map(text.count, 'aeiou')) for text in texts], float)
      assert [line['reward'] for line in lines[3 * group : 3 * group + 3]] == rewards.tolist()
      np.testing.assert_allclose(
          [line['advantage'] for line in lines[3 * group : 3 * group + 3]], rewards - rewards.mean(), rtol=1e-6
      )
    found = {}
    for row, rank in np.argwhere(batch.group_BS[0] >= 0):
      here = batch.responses_BT[0, row] == rank
      ids = tuple(batch.targets_BT[0, row, here].tolist())
      found[ids] = batch.labels_BT['advantages'][0, row, here], batch.labels_BT['sampler_logps'][0, row, here]
    assert found.keys() == {tuple(line['ids']) for line in lines}
    for line in lines:
      advantage, logps = found[tuple(line['ids'])]
      np.testing.assert_allclose(advantage, line['advantage'], rtol=1e-6)
      np.testing.assert_array_equal(logps, np.float32(line['sampler_logps']))

  def test_writes_as_many_responses_at_once_as_it_is_told_and_the_same(self, make, loaded, tmp_path, monkeypatch):
    started, start = [], decoding.start
    monkeypatch.setattr(decoding, 'start', lambda *args: started.append(args[1]) or start(*args))
    found = {}
    for rows in (2, 4):
      taken(make(dataclasses.replace(OPTIONS, rows=rows)), loaded, 1)
      found[rows] = [line['ids'] for line in kept(tmp_path, 0)]
    assert started == [2, 4]
    assert found[2] == found[4]

  def test_takes_every_prompt_once_an_epoch(self, make, loaded, tmp_path):
    taken(make(), loaded, 5)
    seen = [kept(tmp_path, i)[n]['prompt'] for i in range(5) for n in (0, 3)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(PROMPTS)
    assert seen[:5] != seen[5:]

  def test_knows_what_the_training_program_makes_of_them_where_there_are_several_updates(self, make, loaded, tmp_path):
    sampler = make(dataclasses.replace(OPTIONS, epochs=2, minibatches=2))
    found = taken(sampler, loaded, 4)
    assert [place for place, _ in found] == [(0, 1), (0, 2), (0, 3), (1, 0)]
    old = [line['token_labels']['old_logps'] for line in kept(tmp_path, 0)]
    new = [line['sampler_logps'] for line in kept(tmp_path, 0)]
    for one, other in zip(old, new, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-4)
    groups = [int(np.sum(np.unique(jax.device_get(batch.group_BS)) >= 0)) for _, batch in found]
    assert groups == [1, 1, 1, 1]
    assert sampler.said[1, 0]['reward'] == pytest.approx(np.mean([line['reward'] for line in kept(tmp_path, 0)]))

  def test_goes_on_in_the_midst_of_a_rollout_from_what_was_kept(self, make, loaded):
    options = dataclasses.replace(OPTIONS, epochs=2, minibatches=2)
    straight = taken(make(options), loaded, 5)
    resumed = taken(make(options), loaded, 4, place=(0, 1))
    assert [place for place, _ in resumed] == [place for place, _ in straight[1:]]
    for (_, one), (_, other) in zip(straight[1:], resumed, strict=True):
      runs.assert_same(jax.device_get(one), jax.device_get(other))

  def test_tells_of_a_rollout_that_is_torn_or_gone(self, make, loaded, tmp_path):
    options, path = dataclasses.replace(OPTIONS, minibatches=2), tmp_path / 'rollouts' / '000000.jsonl'
    taken(make(options), loaded, 1)
    whole = path.read_text()
    for text, said in (
        (whole[:-20], 'JSONDecodeError'),
        (''.join(whole.splitlines(True)[:3]), 'it has 3 of 6 responses'),
        (whole.replace('"ids"', '"id"'), "KeyError: 'ids'"),
        ('', 'IndexError'),
    ):
      path.write_text(text)
      with pytest.raises(types.RunError, match=f'000000.jsonl: the rollout .* cannot be read .*{said}'):
        taken(make(options), loaded, 1, place=(0, 1))
    path.unlink()
    with pytest.raises(types.RunError, match='000000.jsonl: the rollout .* cannot be read .No such file'):
      taken(make(options), loaded, 1, place=(0, 1))

  @pytest.mark.parametrize(
      'options,packing,said',
      [
          (
              {},
              {'rows': 1},
              '2 prompts with 3 responses of up to 20 tokens do not fit a step of 1 x 1 rows of 64 tokens: raise'
              ' loader.Packing.micro_batches to 2, or',
          ),
          ({}, {'rows': 1, 'row_length': 40}, 'tokens: raise loader.Packing.rows, as all responses to a prompt'),
          ({'max_new_tokens': 64}, {}, 'of up to 72 tokens .*: raise loader.Packing.row_length to 71, or'),
          ({'max_new_tokens': 510}, {'row_length': 1024}, 'exceed the context of the model, 512'),
      ],
  )
  def test_refuses_what_does_not_fit(self, make, options, packing, said):
    with pytest.raises(types.UsageError, match=said):
      make(dataclasses.replace(OPTIONS, **options), dataclasses.replace(PACKING, **packing))

  def test_takes_what_just_fits_the_context(self, make, loaded):
    longest = max(len(examples.prompt_ids(loaded.tokenizer, text)) for text in PROMPTS)
    packing = dataclasses.replace(PACKING, row_length=511, rows=6)
    make(dataclasses.replace(OPTIONS, max_new_tokens=512 - longest), packing)
    with pytest.raises(types.UsageError, match=f'a prompt of {longest} tokens and .* exceed the context of the model'):
      make(dataclasses.replace(OPTIONS, max_new_tokens=513 - longest), packing)


class TestAhead:

  def moving(self, loaded):
    """Parameters that are others at every version."""
    version = itertools.count()

    def params():
      n = next(version)
      moved = jax.tree.map(lambda x: x * (1 + 0.02 * n), loaded.params)
      return rollouts.Params(moved, None, loaded.params, (), n)

    return params

  def test_is_written_by_the_policy_before_the_updates_of_the_rollout_before(self, make, loaded, tmp_path):
    options = dataclasses.replace(OPTIONS, asynchronous=True, minibatches=2)
    sampler = make(options)
    with jax.set_mesh(MESH):
      batches = sampler.batches(0, 0, self.moving(loaded))
      straight = list(itertools.islice(batches, 6))
      batches.close()
    lines = [kept(tmp_path, n) for n in range(3)]
    versions = [each[0]['policy_version'] for each in lines]
    # 0 is drawn and credited by the first two, 1 drawn by the third and credited by the fourth, and so on.
    assert versions == [0, 2, 4]
    assert [sampler.said[n, 0]['rollouts/staleness'] for n in (2, 3)] == [1, 1]
    drift = [np.abs(np.subtract(line['token_labels']['old_logps'], line['sampler_logps'])).max() for line in lines[1]]
    assert min(drift) > 1e-3  # what importance weights are for
    assert (tmp_path / 'rollouts' / '000003.drawn.json').exists()
    resumed = make(options)
    with jax.set_mesh(MESH):
      params = self.moving(loaded)
      for _ in range(3):
        params()
      batches = resumed.batches(1, 0, params)
      again = list(itertools.islice(batches, 2))
      batches.close()
    for (place, one), (other_place, other) in zip(straight[2:4], again, strict=True):
      assert place == other_place
      runs.assert_same(jax.device_get(one), jax.device_get(other))

  def test_is_not_combined_with_what_waits_for_rewards(self):
    with pytest.raises(types.UsageError, match='asynchronous = True: what is sampled next then depends on'):
      dataclasses.replace(OPTIONS, asynchronous=True, refill=1)


class TestTexts:

  def test_are_a_part_of_every_update(self, make, loaded, prompts):
    options = dataclasses.replace(OPTIONS, minibatches=2, epochs=2, texts=1, texts_data='own', texts_fn=of_vowels)
    found = taken(make(options, texts=prompts[0]), loaded, 4)
    for _, batch in found:
      is_text = batch.labels_BT['is_text'] * batch.mask_BT
      assert float(jnp.sum(is_text)) == 1  # of a prompt one token counts
      assert float(jnp.sum(batch.mask_BT)) > 12
      assert not np.any(batch.labels_BT['advantages'] * is_text)

  def test_are_as_many_in_each_update_where_rows_have_room_for_those_of_the_next(self, make, loaded, prompts):
    options = dataclasses.replace(OPTIONS, prompts=4, minibatches=2, texts=2, texts_data='own', texts_fn=of_vowels)
    found = taken(make(options, dataclasses.replace(PACKING, rows=16), texts=prompts[0]), loaded, 2)
    assert [float(jnp.sum(batch.labels_BT['is_text'] * batch.mask_BT)) for _, batch in found] == [2, 2]

  def test_stand_in_groups_of_their_own_beside_what_was_sampled(self):
    sampled = examples.Sequence(np.arange(5), np.arange(5) > 2, {'advantages': np.ones(2, np.float32)})
    text = examples.Sequence(np.arange(4), np.arange(4) > 0, {})
    groups = experience.Groups([examples.Group((sampled, sampled), {'score': [1.0, 2.0]})])
    both = groups.with_texts([examples.Group((text,), {})])
    assert (both.group_size, both.label_names, set(both.token_label_names)) == (
        2,
        ('score',),
        {'advantages', 'is_text'},
    )
    np.testing.assert_array_equal(both.lengths_NK, [[4, 4], [3, 0]])
    assert [one.labels['is_text'].tolist() for group in both for one in group.sequences] == [[0, 0], [0, 0], [1, 1, 1]]
    assert both[1].labels == {'score': [0.0]}
    assert both[1].sequences[0].labels['advantages'].tolist() == [0, 0, 0]


def of_length(responses, ids):
  return [float(len(one)) for one in ids]


def dull_of_all(responses):
  return [1.0] * len(responses)


def dull_of_t(responses, name):
  return [1.0 if one.startswith('T') else value for one, value in zip(name, runs.vowels(responses), strict=True)]


BEGUN = threading.Event()


def patient(responses):
  assert BEGUN.wait(60)
  return runs.vowels(responses)


CALLS: list[int] = []


def busy_at_third(responses):
  CALLS.append(len(responses))
  if len(CALLS) == 3:
    raise ConnectionError('busy')
  return runs.vowels(responses)


def leaving(responses):
  raise SystemExit(3)


class TestMaker:

  def test_ends_by_the_name_of_a_reward_that_would_end_the_thread_it_judges_in(self, make, loaded):
    options = dataclasses.replace(OPTIONS, rewards=('tests.rl.rollouts_test:leaving',))
    with pytest.raises(types.RunError, match='reward tests.rl.rollouts_test:leaving, .*SystemExit: 3'):
      taken(make(options), loaded, 1)

  @pytest.mark.parametrize('changed', [{'epochs': 2}, {'epochs': 2, 'asynchronous': True}], ids=['turns', 'ahead'])
  def test_has_models_read_responses_while_they_are_judged(self, make, loaded, monkeypatch, changed):
    annotate_fn = collect.annotate_fn

    def watched(*args):
      annotate = annotate_fn(*args)

      def annotated(params, batch):
        BEGUN.set()
        return annotate(params, batch)

      return annotated

    BEGUN.clear()
    monkeypatch.setattr(collect, 'annotate_fn', watched)
    sampler = make(dataclasses.replace(OPTIONS, rewards=('tests.rl.rollouts_test:patient',), **changed))
    _, (place, batch) = taken(sampler, loaded, 2)
    assert place == (1, 0) and 'old_logps' in batch.labels_BT
    assert {'time/sampling', 'time/judging', 'time/annotation', 'time/credit'} <= sampler.said[1, 0].keys()

  def test_takes_other_prompts_in_place_of_those_that_tell_nothing(self, make, loaded, tmp_path):
    options = dataclasses.replace(OPTIONS, rewards=('tests.rl.rollouts_test:dull_of_t',), refill=2, prompts=4)
    sampler = make(options)
    taken(sampler, loaded, 1)
    names = [line['prompt'].split()[0] for line in kept(tmp_path, 0)[::3]]
    assert 'Tom' not in names and len(set(names)) == 4
    rewards = np.array([line['reward'] for line in kept(tmp_path, 0)]).reshape(4, 3)
    assert np.all(np.ptp(rewards, axis=1) > 0)
    said = sampler.said[1, 0]
    assert said['rollouts/refilled'] >= 1
    assert {'time/sampling', 'time/judging', 'time/credit'} <= said.keys()

  def test_compares_with_the_greedy_response(self, make, loaded, tmp_path):
    taken(make(dataclasses.replace(OPTIONS, advantage_fn=advantages.greedy_baseline)), loaded, 1)
    lines = kept(tmp_path, 0)
    with jax.set_mesh(MESH):
      drawn = sampling.sample(
          loaded.model,
          loaded.params,
          [line['prompt_ids'] for line in lines[::3]],
          max_new_tokens=12,
          temperature=0.0,
          stop_ids=(loaded.tokenizer.eos_id,),
      )
    greedy = runs.vowels([loaded.tokenizer.decode(one.ids, continuation=True) for one in drawn])
    wanted = [line['reward'] - greedy[n // 3] for n, line in enumerate(lines)]
    np.testing.assert_allclose([line['advantage'] for line in lines], wanted, rtol=1e-6)

  def test_asks_the_reference_too(self, make, loaded, tmp_path):
    value = functools.partial(advantages.soft_optimal, beta=0.5)
    options = dataclasses.replace(
        OPTIONS, advantage_fn=value, ref_samples=4, rewards=('tests.rl.rollouts_test:of_length',)
    )
    ((_, batch),) = taken(make(options), loaded, 1)
    assert set(batch.labels_BS) == {'score', 'score_known', 'optimal_value'}
    lines = kept(tmp_path, 0)
    assert [line['labels']['score'] for line in lines] == [len(line['ids']) for line in lines]
    np.testing.assert_allclose(
        [line['labels']['optimal_value'] for line in lines], 12.0, rtol=1e-6
    )  # none ends so soon

  @pytest.mark.parametrize('draw', [{}, {'temperature': 0.7, 'top_p': 0.8}])
  def test_gives_what_models_make_of_tokens(self, make, loaded, tmp_path, draw):
    def told(rewards_GK, logps_BT, log_ratio_BT, rows):
      return {'advantages': logps_BT, 'ratio': log_ratio_BT, 'length': masked.totals(rows.mask_BT, rows)}

    taken(make(dataclasses.replace(OPTIONS, advantage_fn=told, **draw)), loaded, 1)
    for line in kept(tmp_path, 0):
      np.testing.assert_allclose(line['token_labels']['advantages'], line['sampler_logps'], atol=1e-4)
      np.testing.assert_allclose(line['token_labels']['ratio'], np.zeros(len(line['ids'])), atol=1e-6)
      assert line['labels']['length'] == len(line['ids'])
      assert abs(line['labels']['kl']) < 1e-5

  def test_says_that_no_reward_tells_of_tokens(self, make, loaded):
    options = dataclasses.replace(OPTIONS, advantage_fn=returns.process_supervised)
    with pytest.raises(types.UsageError, match='no --reward says anything of the tokens that were sampled'):
      taken(make(options), loaded, 1)

  def test_gives_no_credit_where_the_outcome_is_not_known(self, make, loaded, monkeypatch):
    def outcomes(outcomes_GK, token_rewards_BT, valid_GK, rows):
      del outcomes_GK, token_rewards_BT
      return {'advantages': masked.to_tokens(valid_GK, rows), 'known': valid_GK}

    # Two rewards: of tokens, always there, and of outcomes, which abstains on the second of three.
    def judged(self, panel, asked, drawn):
      values_RN = np.stack([np.ones(len(drawn)), np.tile([1.0, np.nan, 0.0], len(drawn) // 3)])
      tokens = [np.ones(len(one.ids)) for one in drawn]
      return judging.Judged(list(drawn), values_RN, tokens, np.array([True, False]))

    monkeypatch.setattr(judging.Judge, '__call__', judged)
    both = ('tests.rl.rollouts_test:of_vowels', 'tests.rl.rollouts_test:of_length')
    ((_, batch),) = taken(make(dataclasses.replace(OPTIONS, advantage_fn=outcomes, rewards=both)), loaded, 1)
    known_GK = masked.to_table(batch.labels_BS['known'][0], jax.tree.map(lambda x: x[0], batch))
    np.testing.assert_array_equal(known_GK[:2], [[1, 0, 1], [1, 0, 1]])

  def test_tells_labels_of_tokens_from_those_of_a_response_of_one_token(self, make, loaded):
    told = lambda rewards_GK, logps_BT: {'advantages': logps_BT, 'mine': logps_BT, 'score': rewards_GK}
    options = dataclasses.replace(OPTIONS, advantage_fn=told, samples=1, max_new_tokens=1)
    ((_, batch),) = taken(make(options), loaded, 1)
    assert (set(batch.labels_BS), 'mine' in batch.labels_BT) == ({'score'}, True)

  def test_counts_the_time_of_all_that_was_sampled_for_a_rollout(self, make, loaded, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(collect, 'time', pytypes.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    options = dataclasses.replace(OPTIONS, rewards=('tests.rl.rollouts_test:dull_of_all',), refill=2)
    found = make(options)
    taken(found, loaded, 2)
    for place in ((1, 0), (2, 0)):  # sampled three times, and told of each rollout by itself
      said = found.said[place]
      assert (said['time/sampling'], said['time/judging'], said['time/credit']) == (3.0, 3.0, 1.0)
      assert said['rollouts/refilled'] == 0.0

  def test_does_not_train_on_what_was_cut(self, make, loaded, tmp_path):
    ((_, batch),) = taken(make(dataclasses.replace(OPTIONS, mask_truncated=True)), loaded, 1)
    assert not any(line['finished'] or line['counted'] for line in kept(tmp_path, 0))
    assert not np.any(batch.mask_BT) and np.any(jax.device_get(batch.segments_BT))


class TestOptions:

  @pytest.mark.parametrize(
      'changed,said',
      [
          ({'samples': 0}, 'rollouts.Options.samples = 0: it must be at least 1'),
          ({'minibatches': 3}, 'rollouts.Options.minibatches = 3: it must divide the 2 prompts of a rollout'),
          ({'max_kl': 0.1}, 'max_kl = 0.1: a rollout has a single update, before which nothing moved'),
          ({'top_p': 1.5}, 'top_p = 1.5: it must be above 0 and at most 1'),
          ({'ref_samples': 2}, 'ref_samples = 2: rollouts.Options.advantage_fn reads none of the reference'),
          (
              {'combine': 'gated', 'advantage_fn': functools.partial(advantages.normalise_then_sum)},
              "combine = 'gated': rollouts.Options.advantage_fn reads each reward",
          ),
          (
              {'combine': 'normalised', 'advantage_fn': advantages.greedy_baseline},
              "combine = 'normalised': it makes numbers of one set of responses",
          ),
          ({'stop': '###'}, "stop = '###': a tuple of texts that are not empty"),
          ({'stop': ('',)}, r"stop = \('',\): a tuple of texts"),
          ({'turns': 0}, 'rollouts.Options.turns = 0: it must be at least 1'),
          ({'rows': 0}, 'rollouts.Options.rows = 0: it must be at least 1'),
          ({'temperature': 0.0}, 'rollouts.Options.temperature = 0.0: it must be above 0, or nothing varies'),
      ],
  )
  def test_say_what_is_wrong(self, changed, said):
    with pytest.raises(types.UsageError, match=said):
      dataclasses.replace(OPTIONS, **changed)

  @pytest.mark.parametrize(
      'asked, experts, dtype, cache, wanted',
      [
          (None, 4, 'bfloat16', None, True),
          (None, 4, 'float32', 'int8', True),
          (None, 4, 'float32', None, False),
          (None, 0, 'bfloat16', 'int8', False),
          (False, 4, 'bfloat16', None, False),
          (True, 4, 'float32', None, True),
      ],
  )
  def test_replay_experts_by_default_where_rounding_moves_tokens(self, asked, experts, dtype, cache, wanted):
    more = {'num_experts': experts, 'experts_per_token': 2} if experts else {}
    sizes = architecture.Config(512, 1, 16, 2, 1, 8, 24, 64, **more)
    model = transformer.build(sizes, sharding.make_mesh('data:8'), dtype=dtype, length=32)
    options = dataclasses.replace(OPTIONS, replay_experts=asked, cache_dtype=cache)
    assert options.replays(model) == wanted


BUSY = """
calls = []

def at_third(responses):
  calls.append(responses)
  if len(calls) == 3:
    raise ConnectionError('busy')
  return [float(len(one)) for one in responses]
"""


class TestRuns:

  def test_have_a_reference_and_a_critic_with_rules_and_precisions_of_their_own(self, tmp_path, capsys, caplog):
    few = ('prompts = 4', 'samples = 2', 'max_new_tokens = 8')

    def run(name, *more):
      args = ['--algo=ppo_adaptive', f'--workdir={tmp_path / name}', '--steps=2', '--log_every=1', '--mesh=fsdp:8']
      args += [
          '--gin=train.train.samples = None',
          '--gin=loader.Packing.row_length = 96',
          '--gin=loader.Packing.rows = 8',
      ]
      args += ['--gin=rollouts.Options.epochs = 1', '--gin=rollouts.Options.minibatches = 1']
      args += ['--gin=recipe.Recipe.dtype = "bfloat16"', *(f'--gin=rollouts.Options.{one}' for one in few)]
      with caplog.at_level('INFO', logger='absl'):
        assert main.main(['jaxalign', *args, *(f'--gin=recipe.Recipe.{one}' for one in more)]) == 0
      told = re.findall('memory of a device: (.*)', caplog.text)[-1]
      return {role: float(size) for role, size in re.findall(r'(\w+) ([\d.]+) MB', told)}, runs.logged(tmp_path / name)

    plain, wanted = run('plain')
    own = 'reference_dtype = "bfloat16"', 'reference_rules = {"embed": ()}', 'critic_rules = {"embed": ()}'
    sizes, found = run('own', *own, 'critic_dtype = "float32"')
    assert plain['policy'] == plain['critic'] == plain['reference'] == sizes['policy'] == 0.1
    assert (sizes['critic'], sizes['reference']) == (1.0, 0.5)  # whole on each of the eight, 260,000 parameters
    # In 16 bits the policy computes with the same rounded weights.
    for one in (wanted, found):
      assert abs(one[1]['objective/kl']) < 0.02 and one[1]['values'] == 0
    assert found[2]['reward'] == pytest.approx(wanted[2]['reward'], abs=1)
    capsys.readouterr()
    args = '--mode=eval', f'--checkpoint={tmp_path / "own"}', '--gin=evaluate.Samples.count = 2'
    assert main.main(['jaxalign', *args]) == 0
    assert json.loads(capsys.readouterr().out)['eval/mean_length'] > 0

  def test_write_prompts_and_their_answers_by_one_template(self, tmp_path, capsys):
    args = ['--mode=show', '--algo=grpo', f'--data=jsonl:{tmp_path / "p.jsonl"}', '--reward=tests.runs:vowels']
    (tmp_path / 'p.jsonl').write_text(json.dumps({'prompt': [{'role': 'user', 'content': 'Hello'}]}) + '\n')
    assert main.main(['jaxalign', *args, "--gin=rollouts.Options.template = 'hh'"]) == 0
    assert 'Human: Hello' in capsys.readouterr().out

  def test_of_which_a_reward_fails_keep_the_steps_before_it(self, tmp_path, capsys):
    options = 'prompts = 2', 'samples = 2', 'max_new_tokens = 4', 'asynchronous = {}'
    for asynchronous in (False, True):
      workdir, reward = tmp_path / str(asynchronous), '--reward=tests.rl.rollouts_test:busy_at_third'
      gin = [f'--gin=rollouts.Options.{one}'.format(asynchronous) for one in options]
      args = ['jaxalign', '--algo=grpo', f'--workdir={workdir}', '--steps=4', '--log_every=3', '--eval_data=', reward]
      args += ['--gin=train.train.samples = None', *gin]
      CALLS.clear()
      assert main.main(args) == 1
      assert 'ConnectionError: busy' in capsys.readouterr().err.splitlines()[-1]
      assert sorted(runs.logged(workdir)) == [1, 2] and (workdir / 'checkpoints' / '2').exists()
      assert main.main(args) == 0  # It is not busy any more.
      assert json.loads(capsys.readouterr().out)['steps'] == 4

  def test_of_which_a_reward_fails_in_one_of_two_processes_keep_the_steps_before_it(self, tmp_path):
    options = 'prompts = 2', 'samples = 2', 'max_new_tokens = 4'
    args = ['jaxalign', '--algo=grpo', f'--workdir={tmp_path / "w"}', '--steps=4', '--log_every=3', '--eval_data=']
    (tmp_path / 'busy.py').write_text(BUSY)
    args += [f'--reward={tmp_path}/busy.py:at_third', '--gin=train.train.samples = None', '--mesh=fsdp:4']
    both = runs.spawn_together([*args, *(f'--gin=rollouts.Options.{one}' for one in options)], 2)
    for process, said in zip(both, ('ConnectionError: busy', 'process 0 failed, and says why')):
      code, err = runs.finished(process)
      assert code == 1 and said in err.splitlines()[-1], err
    assert sorted(runs.logged(tmp_path / 'w')) == [1, 2]
    assert (tmp_path / 'w' / 'checkpoints' / '2' / 'params').exists()

  def test_of_two_processes_are_those_of_one(self, tmp_path):
    # Four rows for 16 responses that end when they like: the processes must agree on who has which row.
    more = '--reward=tests.runs:vowels', '--gin=rollouts.Options.samples = 4', '--gin=rollouts.Options.rows = 4'
    more += tuple(f'--gin=rollouts.Options.{one}' for one in ('max_new_tokens = 40', "stop = ('.', 'a')"))
    both = runs.spawn_together(self.args('grpo', tmp_path / 'two', 2, *more, '--mesh=data:2,fsdp:2'), 2)
    self.run('grpo', tmp_path / 'one', 2, *more)
    for process in both:
      code, err = runs.finished(process)
      assert code == 0, err
    lines = [(tmp_path / name / 'rollouts/000000.jsonl').read_text().splitlines() for name in ('two', 'one')]
    for found, wanted in zip(*(map(json.loads, each) for each in lines), strict=True):
      assert found['ids'] == wanted['ids'] and found['reward'] == wanted['reward']
      np.testing.assert_allclose(found['sampler_logps'], wanted['sampler_logps'], atol=1e-4)
    assert len({len(json.loads(line)['ids']) for line in lines[0]}) > 3
    found, wanted = (runs.logged(tmp_path / name) for name in ('two', 'one'))
    for step, line in wanted.items():
      assert found[step]['grad_norm'] == pytest.approx(line['grad_norm'], rel=1e-3)

  def test_of_several_processes_tell_of_a_reward_that_uses_jax_before_they_meet(self, tmp_path):
    (tmp_path / 'early.py').write_text(
        'import jax\njax.devices()\ndef score(responses): return [0.0] * len(responses)\n'
    )
    args = ['jaxalign', '--algo=grpo', f'--workdir={tmp_path / "w"}', f'--reward={tmp_path}/early.py:score']
    code, err = runs.finished(runs.spawn_together(args, 1)[0])
    assert code == 2 and 'a module that --reward,' in err.splitlines()[-1], err

  def test_of_which_a_reward_fails_in_evaluation_keep_the_step_that_is_evaluated(self, tmp_path, capsys):
    gin = [f'--gin=rollouts.Options.{one}' for one in ('prompts = 2', 'samples = 2', 'max_new_tokens = 4')]
    args = ['jaxalign', '--algo=grpo', f'--workdir={tmp_path / "w"}', '--steps=3', '--eval_every=1', *gin]
    args += ['--reward=tests.rl.rollouts_test:busy_at_third', '--gin=evaluate.Samples.count = 2', '--log_every=1']
    CALLS.clear()  # The first evaluation, the first rollout, and the evaluation of the step by it.
    assert main.main(args) == 1
    assert 'ConnectionError: busy' in capsys.readouterr().err.splitlines()[-1]
    assert sorted(runs.logged(tmp_path / 'w')) == [1] and (tmp_path / 'w' / 'checkpoints' / '1').exists()

  def test_are_evaluated_as_they_go_from_where_they_began(self, tmp_path, capsys):
    args = [
        'jaxalign',
        '--algo=grpo',
        f'--workdir={tmp_path / "w"}',
        '--steps=3',
        '--eval_every=2',
        '--save_every=2',
        '--reward=tests.runs:vowels',
        '--log_every=1',
        '--gin=checkpoint.Options.keep = 1',
        '--gin=recipe.Recipe.sync = @reference.Sync()',
        '--gin=reference.Sync.every = 1',
        '--gin=reference.Sync.alpha = 1.0',
        '--gin=optim.constant.lr = 1e-2',
        *(f'--gin=rollouts.Options.{one}' for one in ('prompts = 2', 'samples = 2', 'max_new_tokens = 8')),
        *(f'--gin=evaluate.Samples.{one}' for one in ('count = 2', 'per_prompt = 2')),
    ]
    assert main.main(args) == 0, capsys.readouterr().err
    lines = runs.logged(tmp_path / 'w')
    assert [step for step, line in lines.items() if 'eval/reward' in line] == [2, 3]
    assert abs(lines[3]['kl']) < 1e-3 and abs(lines[3]['eval/kl']) > 0.1  # the reference has moved with the policy
    best = max((2, 3), key=lambda step: lines[step]['eval/reward'])
    steps = {int(path.name) for path in (tmp_path / 'w' / 'checkpoints').iterdir() if path.name.isdigit()}
    assert steps == {best, 3}
    summary = json.loads((tmp_path / 'w' / 'summary.json').read_text())
    assert (summary['eval/kl'], summary['eval/reward_after']) == (lines[3]['eval/kl'], lines[3]['eval/reward'])

  @pytest.mark.parametrize('own', [True, False], ids=['two values of a critic', 'of a head on the policy'])
  def test_of_a_constraint_are_resumed_bit_for_bit_in_the_midst_of_a_rollout(self, own, tmp_path):
    head = '' if own else "critic = ''; critic_outputs = 1; score_outputs = 2"
    rewards = 'tests.runs:vowels', 'jaxalign.rewards.lengths:near_length(wanted_length=4, tolerated=8):-1'
    more = *(f'--gin=recipe.Recipe.{one}' for one in head.split('; ') if one), *(f'--reward={one}' for one in rewards)
    self.resumed('lagrangian_ppo', tmp_path, *more)
    for item in ('critic', 'loss') if own else ('loss',):
      runs.assert_same(*(runs.item_of(tmp_path / name, 4, item) for name in ('straight', 'halves')))
    found = runs.logged(tmp_path / 'straight')
    assert (found[1]['values'], found[1]['cost_values'], found[1]['objective/lambda']) == (0, 0, 1)
    assert found[4]['values'] != found[4]['cost_values'] != 0
    cost = found[1]['rewards/near_length/mean']  # of two steps, by whose costs lambda then moves
    assert 0 < cost < 1 and np.log(found[3]['objective/lambda']) == pytest.approx(2 * 0.025 * (cost - 0.3), rel=0.03)

  def args(self, algo, workdir, steps, *more):
    return [
        'jaxalign',
        f'--algo={algo}',
        '--gin=rollouts.Options.epochs = 1',
        f'--workdir={workdir}',
        f'--steps={steps}',
        '--log_every=1',
        '--save_every=0',
        '--mesh=data:8',
        '--gin=train.train.samples = None',
        '--gin=rollouts.Options.prompts = 4',
        '--gin=rollouts.Options.samples = 2',
        '--gin=rollouts.Options.max_new_tokens = 8',
        '--gin=rollouts.Options.minibatches = 2',
        '--gin=loader.Packing.row_length = 96',
        '--gin=loader.Packing.rows = 8',
        *more,
    ]

  def run(self, *args):
    assert main.main(self.args(*args)) == 0

  def resumed(self, algo, tmp_path, *more):
    self.run(algo, tmp_path / 'straight', 4, *more)
    for steps in (3, 4):
      self.run(algo, tmp_path / 'halves', steps, *more)
    runs.assert_same(runs.params_of(tmp_path / 'straight'), runs.params_of(tmp_path / 'halves'))

  @pytest.mark.parametrize('in_bfloat16', [False, True], ids=['asked for', 'by default, asynchronous'])
  def test_that_replay_experts_are_resumed_bit_for_bit_in_the_midst_of_a_rollout(self, in_bfloat16, tmp_path):
    sizes = 'num_experts = 8', 'experts_per_token = 2', 'num_layers = 3'
    more = ['--gin=rollouts.Options.' + ('asynchronous' if in_bfloat16 else 'replay_experts') + ' = True']
    more += ["--gin=recipe.Recipe.dtype = 'bfloat16'"] * in_bfloat16
    more += [
        '--reward=tests.runs:vowels',
        '--model=tiny',
        '--tokenizer=builtin:stories260K',
        '--mesh=fsdp:4,expert:2',
        '--gin=optim.adamw.schedule = @optim.constant',
        '--gin=optim.constant.lr = 1e-3',
    ]
    self.resumed('grpo', tmp_path, *more, *(f'--gin=architecture.Config.{one}' for one in sizes))
    lines = [json.loads(line) for line in (tmp_path / 'straight/rollouts/000001.jsonl').read_text().splitlines()]
    for line in lines:
      experts = experience.experts_of_text(line['experts'])
      assert experts.shape == (len(line['prompt_ids']) + len(line['ids']) - 1, 3, 2)
      assert 0 <= experts.min() < experts.max() < 8
      if not in_bfloat16:
        np.testing.assert_allclose(line['token_labels']['old_logps'], line['sampler_logps'], atol=1e-5)
    text = (tmp_path / 'straight/rollouts/000001.jsonl').read_text()
    groups = experience.of_text(text, len(lines) // len({line['prompt'] for line in lines})).groups()
    trained_on = [one.experts for index in range(len(groups)) for one in groups[index].sequences]
    assert [x.tolist() for x in trained_on] == [experience.experts_of_text(line['experts']).tolist() for line in lines]
    assert runs.logged(tmp_path / 'straight')[1]['grad_norm'] > 0

  def test_that_are_one_rollout_old_are_weighed_by_how_far_the_policy_has_moved(self, tmp_path):
    found = {}
    for name, weights in ('weighed', '[@policy_parts.truncated_importance]'), ('plain', '[]'):
      rate = '--gin=optim.adamw.schedule = @optim.constant', '--gin=optim.constant.lr = 1e-2'
      more = *rate, '--reward=tests.runs:vowels', f'--gin=policy.regularised.weights = {weights}'
      self.run('tis_grpo', tmp_path / name, 3, *more, '--gin=rollouts.Options.minibatches = 1')
      found[name] = runs.logged(tmp_path / name)
    weighed, plain = found['weighed'], found['plain']
    # The second was sampled before the first update, the third before the second.
    assert [weighed[step]['rollouts/staleness'] for step in (2, 3)] == [1, 1]
    weights = [weighed[step]['policy/weight_avg'] for step in (1, 2, 3)]
    assert weights[0] == pytest.approx(1, abs=1e-5) and max(abs(np.subtract(weights[1:], 1))) > 0.02
    assert weighed[1]['grad_norm'] == pytest.approx(plain[1]['grad_norm'], rel=1e-5)
    assert weighed[2]['grad_norm'] != pytest.approx(plain[2]['grad_norm'], rel=0.01)

  def test_refuse_to_replay_experts_that_there_are_not(self, tmp_path, capsys):
    for mode in (f'--workdir={tmp_path / "w"}',), ('--mode=plan', '--topology=h100:8', '--model=tiny'):
      args = '--algo=grpo', *mode, '--gin=rollouts.Options.replay_experts = True'
      assert main.main(['jaxalign', *args]) == 2
      assert 'replay_experts = True: the model has no experts' in capsys.readouterr().err

  def test_of_a_critic_are_resumed_bit_for_bit_in_the_midst_of_a_rollout(self, tmp_path, capsys):
    self.resumed('ppo_adaptive', tmp_path)
    for item in ('critic', 'loss'):
      runs.assert_same(*(runs.item_of(tmp_path / name, 4, item) for name in ('straight', 'halves')))
    few = 'count = 2', 'per_prompt = 2', 'max_new_tokens = 4'
    capsys.readouterr()
    args = '--mode=eval', f'--checkpoint={tmp_path / "straight"}', *(f'--gin=evaluate.Samples.{one}' for one in few)
    assert main.main(['jaxalign', *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['eval/mean_length'] == 4
    assert found['eval/kl'] != 0
    assert main.main(['jaxalign', *args, '--gin=rollouts.Options.top_k = 2']) == 0
    assert 'eval/kl' not in json.loads(capsys.readouterr().out)  # of what was drawn as the rollouts are
    first = runs.logged(tmp_path / 'straight')[1]
    assert (first['values'], first['objective/kl_coef'], first['val/ratio']) == (0, 1, pytest.approx(1, abs=1e-4))
    assert abs(first['objective/kl']) < 1e-4
    assert {'reward', 'reward_std', 'completions/mean_length'} <= first.keys()
