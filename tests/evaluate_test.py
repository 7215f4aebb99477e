"""Evaluation: sums over held-out batches, what is sampled and how it is judged, samples.md."""

import dataclasses
import functools
import json
import types as pytypes

import jax
import numpy as np
import pytest

from jaxalign import evaluate
from jaxalign import main
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.cli import config
from jaxalign.data import examples
from jaxalign.data import texts
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import verdicts
from jaxalign.rl import experience


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizers.load(recipe_lib.asset('stories260K'))


@pytest.fixture(scope='module')
def model_and_params():
  mesh = sharding.make_mesh()
  config = architecture.Config(512, 1, 16, 2, 1, 8, 32, 64)
  model = transformer.build(config, mesh, length=64)
  with jax.set_mesh(mesh):
    yield model, transformer.init_params(model, jax.random.key(0), mesh)


class TestSample:

  def draw(self, model_and_params, tokenizer, **options):
    judge, records = options.pop('judge', None), options.pop('records', [{}, {}, {}])
    ref_logps, ways = options.pop('ref_logps', None), options.pop('ways', {})
    samples = evaluate.Samples(**({'max_new_tokens': 6, 'per_prompt': 2} | options))
    texts = ('Once upon a time', 'The cat', 'Tom')
    ids = [examples.prompt_ids(tokenizer, text) for text in texts]
    prompts = [verdicts.Prompt(one, record, f'here {n}') for n, (one, record) in enumerate(zip(ids, records))]
    rewards = [functions.Reward('judge', judge)] if judge is not None else []
    setting = evaluate.Setting(rewards, ways=ways)
    return evaluate.sample(*model_and_params, tokenizer, samples, prompts, 1, setting, ref_logps)

  def test_judges_every_response_and_shows_the_first_of_each_prompt(self, model_and_params, tokenizer):
    judged = []

    def judge(responses):
      judged.extend(responses)
      return [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    found = self.draw(model_and_params, tokenizer, judge=judge, shown=2)
    assert len(judged) == 6
    assert found.shown == [('Once upon a time', judged[0]), ('The cat', judged[2])]
    assert found.metrics['reward'] == pytest.approx(3.5)
    assert found.metrics['reward_std'] == pytest.approx(np.std([1, 2, 3, 4, 5, 6]))

  def test_tells_the_judge_prompts_and_ids_and_leaves_out_what_it_abstains_on(self, model_and_params, tokenizer):
    told = {}

    def judge(prompts, ids, **others):
      told.update(prompts=prompts, ids=ids, others=set(others))
      return [None, 1.0, None, 4.0, None, None]

    found = self.draw(model_and_params, tokenizer, judge=judge)
    assert [prompt.strip() for prompt in told['prompts'][::2]] == ['Once upon a time', 'The cat', 'Tom']
    assert [len(one) for one in told['ids']] == [6] * 6 and told['others'] == {'responses'}
    assert (found.metrics['reward'], found.metrics['reward_std']) == (2.5, 1.5)
    assert 'reward' not in self.draw(model_and_params, tokenizer, judge=lambda responses: [None] * 6).metrics

  def test_says_where_the_judge_fails(self, model_and_params, tokenizer):
    with pytest.raises(types.RunError, match='reward judge, here 1: it returned nan where a finite'):
      self.draw(model_and_params, tokenizer, judge=lambda responses: [0.0, 0.0, float('nan'), 0.0, 0.0, 0.0])

  def test_tells_the_judge_columns_and_says_how_often_one_of_several_is_right(self, model_and_params, tokenizer):
    told = []

    def judge(responses, prompts, answer):
      told.extend(zip(prompts, answer))
      return [0.0, 0.0, -1.0, 1.0, 1.0, 1.0]

    records = [{'prompt': f'asked {n}', 'answer': n} for n in range(3)]
    found = self.draw(model_and_params, tokenizer, judge=judge, records=records, pass_at=(1, 2)).metrics
    assert told == [(f'asked {n}', n) for n in (0, 0, 1, 1, 2, 2)]
    assert (found['pass@1'], found['pass@2']) == (pytest.approx(0.5), pytest.approx(2 / 3))

  def test_measures_without_a_judge(self, model_and_params, tokenizer):
    found = self.draw(model_and_params, tokenizer)
    assert set(found.metrics) == {'distinct_2', 'mean_length'}
    assert 1 <= found.metrics['mean_length'] <= 6
    assert 0.5 < found.metrics['distinct_2'] <= 1

  def test_draws_as_the_rollouts_of_the_run_do(self, model_and_params, tokenizer):
    others = lambda ids, drawn: np.zeros(len(drawn))
    draw = functools.partial(self.draw, model_and_params, tokenizer, ref_logps=others)
    free, greedy = draw(), draw(temperature=0.0)
    likeliest = draw(ways={'top_k': 1})
    assert likeliest.shown == greedy.shown != free.shown
    # Where tokens are ruled out, it is another policy than the one whose log-probabilities are told.
    assert 'kl' in free.metrics and 'kl' not in likeliest.metrics
    text = free.shown[0][1][1:3]
    ended = draw(ways={'stop': sampling.Stop((text,), functools.partial(tokenizer.decode, continuation=True))})
    assert ended.shown[0][1] == free.shown[0][1][: free.shown[0][1].index(text) + 2]
    assert ended.metrics['mean_length'] < free.metrics['mean_length'] and 'kl' in ended.metrics

  def test_tells_word_loops(self, model_and_params, tokenizer):
    # Random weights with a single likely token: the greedy one, over and over.
    found = self.draw(model_and_params, tokenizer, temperature=0.0, max_new_tokens=30, per_prompt=8)
    assert found.metrics['distinct_2'] < 0.3


class TestEvaluator:

  @pytest.mark.parametrize('dtype, replays', [('bfloat16', True), ('float32', False)])
  def test_reads_with_the_experts_of_the_sampler_as_training_does(self, dtype, replays, tmp_path, monkeypatch):
    read = []

    def summed(models, sequences, *how):
      read.extend(sequences)
      return whole(models, sequences, *how)

    whole = experience.summed
    monkeypatch.setattr(experience, 'summed', summed)
    sizes = 'num_experts = 4', 'experts_per_token = 2', 'num_layers = 2'
    few = 'rollouts.Options.prompts = 4', 'rollouts.Options.samples = 2', 'rollouts.Options.max_new_tokens = 8'
    bound = *(f'architecture.Config.{one}' for one in sizes), *few, f'recipe.Recipe.dtype = {dtype!r}'
    bound += 'evaluate.Samples.count = 2', 'loader.Packing.row_length = 96', 'loader.Packing.rows = 8'
    flags = '--algo=grpo', '--model=tiny', '--tokenizer=builtin:stories260K', '--reward=tests.runs:vowels', '--steps=1'
    args = ['jaxalign', *flags, f'--workdir={tmp_path / "w"}', *(f'--gin={one}' for one in bound)]
    assert main.main(args) == 0
    assert np.isfinite(json.loads((tmp_path / 'w' / 'summary.json').read_text())['eval/kl'])
    assert read and all((one.experts is not None) == replays for one in read)
    if replays:
      assert all(one.experts.shape == (len(one.ids) - 1, 2, 2) and one.experts.max() < 4 for one in read)

  def test_compares_with_where_a_run_began_whose_reference_follows(self):
    evaluator = evaluate.Evaluator.__new__(evaluate.Evaluator)
    evaluator._live, evaluator._ref, evaluator._frozen = object(), None, {}
    evaluator._kept = lambda: pytypes.SimpleNamespace(params={'a': 'first'})
    for follows, wanted in ((True, 'first'), (False, 'live')):
      evaluator._follows = follows
      assert evaluator._ref_logps({'a': 'live'}).args == ({'a': wanted},)


class Held(list):
  """Groups, each of a record of the same number."""

  place, where = staticmethod(lambda index: (0, index)), staticmethod('here {}'.format)


class TestPromptsOf:

  def held(self, *lengths):
    sequence = lambda n: examples.Sequence(np.arange(n + 2, dtype=np.int32), np.arange(n + 2) >= n)
    return Held([examples.Group((sequence(n), sequence(n)), {}, prompt_tokens=n) for n in lengths])

  def ids_of(self, samples, tokenizer, held, context):
    records = [pytypes.SimpleNamespace(at=lambda place: {'n': place})]
    found = evaluate.prompts_of(samples, tokenizer, held, records, context - (samples.max_new_tokens or 64))
    assert samples.prompts is not None or all(f'here {one.record["n"]}' == one.where for one in found)
    return [one.ids for one in found]

  def test_takes_texts_where_there_are_some(self, tokenizer):
    samples = evaluate.Samples(prompts=lambda: ['The cat', 'Tom', 'Lily'], count=2)
    found = self.ids_of(samples, tokenizer, self.held(5), 512)
    assert found == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ('The cat', 'Tom')]

  def test_takes_prompts_of_the_held_out_data_otherwise(self, tokenizer):
    found = self.ids_of(evaluate.Samples(count=2), tokenizer, self.held(5, 3, 4), 512)
    assert found == [[0, 1, 2, 3, 4], [0, 1, 2]]

  def test_passes_over_those_that_leave_no_room_for_a_response(self, tokenizer):
    found = self.ids_of(evaluate.Samples(count=2, max_new_tokens=60), tokenizer, self.held(5, 3, 4, 2), 64)
    assert found == [[0, 1, 2], [0, 1, 2, 3]]

  def test_asks_for_good_responses_as_training_tagged_them(self, tokenizer):
    samples = evaluate.Samples(prompts=lambda: ['Tom'], prefix='Good: ', suffix='\n\nWell:')
    (found,) = self.ids_of(samples, tokenizer, None, 512)
    suffix = tokenizer.encode('\n\nWell:', continuation=True)
    assert found == [tokenizer.bos_id, *tokenizer.encode('Good: Tom'), *suffix]
    assert tokenizer.decode(found) == 'Good: Tom\n\nWell:'

  def test_takes_held_out_prompts_that_are_tagged_as_good(self, tokenizer):
    pair = lambda text: {'prompt': text, 'chosen': ' yes', 'rejected': ' no'}
    tagged = lambda text: texts.tagged(pair(text), tokenizer, row_length=99)[::-1]
    held = Held([*tagged('Tom'), *tagged('The cat')])
    found = self.ids_of(evaluate.Samples(prefix='Good: '), tokenizer, held, 512)
    assert [tokenizer.decode(ids) for ids in found] == ['Good: Tom', 'Good: The cat']

  def test_leaves_out_what_hindsight_writes_between(self, tokenizer):
    pair = {'prompt': 'Tom', 'chosen': ' yes', 'rejected': ' no'}
    group = texts.hindsight(pair, tokenizer, row_length=99, bad=' Bad:', good=' Good:')
    held = Held([group])
    samples = evaluate.Samples(suffix=' Good:', max_new_tokens=20)
    (found,) = self.ids_of(samples, tokenizer, held, 512)
    assert tokenizer.decode(found) == 'Tom Good:'
    # Its tokens are those that training reads before a good response.
    ids, suffix = group.sequences[0].ids.tolist(), found[group.prompt_tokens :]
    assert any(ids[i : i + len(suffix)] == suffix for i in range(group.prompt_tokens, len(ids)))
    assert self.ids_of(samples, tokenizer, held, 20 + len(found) - 1) == []

  @pytest.mark.parametrize('algo', ['csft', 'c_rlft', 'hindsight'])
  def test_files_of_tags_sample_with_them(self, algo, tokenizer):
    config.parse(algo, files=[], user_files=[], bindings=[])
    samples, example_fn = (config.get(name)() for name in ('evaluate.Samples', 'recipe.Recipe'))
    record = {'prompt': 'Tom', 'chosen': ' yes', 'rejected': ' no'}
    groups = example_fn.example_fn(record, tokenizer, row_length=99)
    group = groups[0] if isinstance(groups, list) else groups
    read = tokenizer.decode(group.sequences[0].ids[:-1])
    (asked,) = self.ids_of(dataclasses.replace(samples, prompts=lambda: ['Tom']), tokenizer, None, 512)
    assert read.endswith(tokenizer.decode(asked).removeprefix('Tom') + ' yes')
    assert samples.prefix or samples.suffix

  def test_finds_none_where_nothing_is_held_out(self, tokenizer):
    assert self.ids_of(evaluate.Samples(), tokenizer, None, 512) == []


class TestSamples:

  def test_refuse_to_look_for_one_of_more_than_there_are(self):
    with pytest.raises(types.UsageError, match=r'pass_at = \(1, 4\): 4 is not from 1 to .*per_prompt = 3'):
      evaluate.Samples(per_prompt=3, pass_at=(1, 4))


class TestBuiltinPrompts:

  def test_are_64_different_openings(self):
    prompts = evaluate.builtin_prompts()
    assert len(set(prompts)) == 64
    assert all(prompt.strip() for prompt in prompts)


class TestWhole:

  def test_survives_json(self):
    whole = evaluate.Whole({'eval/loss': 1.5}, evaluate.Sampled({'reward': 0.5}, [('a', 'b')]))
    assert evaluate.Whole.from_json(whole.to_json()) == whole
