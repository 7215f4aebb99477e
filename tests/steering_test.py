"""--decode from the command line: each method, on tiny models, against samples of the models alone."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import main
from jaxalign import recipe
from jaxalign import sharding
from jaxalign.data import tokenizers
from jaxalign.generation import guidance
from jaxalign.generation import sampling
from jaxalign.models import hf
from jaxalign.models import hf_export
from jaxalign.models import transformer
from tests import runs

STORIES = recipe.asset('stories260K')
TOKENIZER = tokenizers.load(STORIES)
ONE = sharding.make_mesh('', devices=jax.devices()[:1])
HEAD = np.random.default_rng(0).standard_normal((64, 1)).astype(np.float32)
PROMPTS = ['Tom had 2', 'Lily']
CONFIG = dataclasses.replace(hf.read_config(STORIES), num_layers=1)
ORIGIN = hf.read_json(STORIES / 'config.json') | {'num_hidden_layers': 1}
MODEL = transformer.build(CONFIG, ONE, length=64)


@functools.cache
def params_of(seed):
  return jax.tree.map(lambda x: 2 * x, transformer.init_params(MODEL, jax.random.key(seed), ONE))


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Directories of models of one layer by name; `rm` has a head, and `other` reads other ids."""
  folder = tmp_path_factory.mktemp('models')
  for seed, name in enumerate(('policy', 'aligned', 'rm', 'other')):
    config = dataclasses.replace(CONFIG, score_outputs=int(name == 'rm'))
    params = params_of(seed) | ({'score': HEAD} if name == 'rm' else {})
    hf_export.write(folder / name, params, config, ORIGIN, 'float32', TOKENIZER.eos_id)
    TOKENIZER.save(folder / name)
  byte = folder / 'other' / 'tokenizer.model'
  model = tokenizers.sentencepiece_model_pb2.ModelProto.FromString(byte.read_bytes())
  model.pieces[400].piece, model.pieces[401].piece = model.pieces[401].piece, model.pieces[400].piece
  byte.write_bytes(model.SerializeToString())
  return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def sample(models, tmp_path, capsys, caplog):
  """Runs --mode=sample on two records; gives them, or what was said."""
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps({'prompt': p, 'answer': '5'}) + '\n' for p in PROMPTS))

  def run(*flags, code=0, model='policy', data=True):
    more = [f'--data=jsonl:{tmp_path / "in.jsonl"}'] if data else []
    args = [f'--model={models[model]}', '--max_new_tokens=6', '--seed=3', '--mesh=data:1', *more, *flags]
    caplog.clear()
    assert main.main(['jaxalign', '--mode=sample', *args]) == code
    found = capsys.readouterr()
    if code:
      return found.err.splitlines()[-1]
    return [json.loads(line) for line in found.out.splitlines()] if data else found.out

  return run


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  made = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda text, *rest: made(text, *rest, devices=jax.devices()[:1]))


def samples(records):
  return [record['samples'] for record in records]


@jax.jit
def hidden(params, ids):
  return MODEL.apply({'params': params}, ids[None], jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))[0]


def states_of(seed, ids):
  """Hidden states by the pass that has no cache, in float64."""
  return np.asarray(hidden(params_of(seed), np.pad(np.array(ids), (0, 64 - len(ids)))), np.float64)[: len(ids)]


def logp_of(seed, prompt, ids):
  """Sum of log-probabilities of a response."""
  logits = states_of(seed, [*prompt, *ids]) @ np.asarray(params_of(seed)['embed'], np.float64)[: CONFIG.vocab_size].T
  logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(ids))


@pytest.fixture
def drawn(monkeypatch):
  """What was sampled last: prompts, and ids of each response."""
  seen, sample = {}, sampling.sample

  def noted(model, params, prompts, **options):
    found = sample(model, params, prompts, **options)
    seen.update(prompts=[list(p) for p in prompts for _ in range(options['n'])], ids=[one.ids for one in found])
    return found

  monkeypatch.setattr(sampling, 'sample', noted)
  return seen


class TestGuided:

  @pytest.mark.parametrize(
      ('method', 'guides', 'bindings', 'same_as'),
      [
          ('dera', ['aligned'], ['guidance.dera.lam=0.0'], 'policy'),
          ('contrastive', ['aligned'], ['guidance.contrastive.beta=0.0', 'guidance.contrastive.alpha=0.0'], 'policy'),
          ('proxy', ['aligned', 'policy'], [], 'aligned'),
      ],
  )
  def test_where_guides_do_nothing_or_all_is_what_a_model_alone_samples(
      self, sample, models, method, guides, bindings, same_as
  ):
    flags = [f'--decode={method}', *(f'--guide={models[name]}' for name in guides), *(f'--gin={b}' for b in bindings)]
    assert samples(sample(*flags)) == samples(sample(model=same_as))

  def test_reports_reward_and_divergence(self, sample, drawn, models, caplog):
    caplog.set_level('INFO')
    flags = '--decode=dera', '--gin=guidance.dera.lam=1.0', '--reward=tests.runs:vowels'
    found = sample(f'--guide={models["aligned"]}', *flags, '--samples_per_prompt=4')
    said = re.search(r'dera: 8 kept, mean reward ([\d.]+), KL from the policy ([\d.]+) nats', caplog.text)
    wanted = [logp_of(1, *one) - logp_of(0, *one) for one in zip(drawn['prompts'], drawn['ids'])]
    np.testing.assert_allclose([x for record in found for x in record['log_ratios']], wanted, atol=2e-3)
    assert [record['scores'] for record in found] == [runs.vowels(record['samples']) for record in found]
    rewards = [x for record in found for x in record['scores']]
    np.testing.assert_allclose([float(x) for x in said.groups()], [np.mean(rewards), np.mean(wanted)], rtol=1e-2)
    assert samples(found) == samples(sample('--samples_per_prompt=4', model='aligned'))
    assert samples(found) != samples(sample('--samples_per_prompt=4'))

  def test_by_a_head_raises_what_it_gives(self, sample, drawn, models):
    scores = lambda: [states_of(2, [*p, *ids])[-1] @ HEAD[:, 0] for p, ids in zip(drawn['prompts'], drawn['ids'])]
    sample('--samples_per_prompt=4')
    plain = scores()
    for method, binding in (('rad', 'guidance.rad.beta=5.0'), ('cd', 'guidance.controlled.lam=5.0')):
      sample(f'--decode={method}', f'--guide={models["rm"]}', f'--gin={binding}', '--samples_per_prompt=4')
      assert np.mean(scores()) > np.mean(plain) + np.std(plain), method


class TestUrial:

  def test_is_what_follows_the_longer_prompt_up_to_a_text(self, sample):
    text = guidance.urial([{'role': 'user', 'content': 'Lily'}], instruction='', examples=[('a', 'b')])
    said = sample(f'--prompt={text}', data=False).removeprefix(text)
    stop = said[2:4]
    bind = "--gin=guidance.urial.instruction=''", "--gin=guidance.urial.examples=(('a', 'b'),)", '--decode=urial'
    cut = sample('--prompt=Lily', *bind, f'--gin=steering.Options.stop=({stop!r},)', data=False)
    assert cut == 'Lily' + said[: said.index(stop)] + '\n'
    assert len(cut) > 6


class TestChosen:

  def test_is_the_best_of_n_of_what_is_sampled_without(self, sample):
    many = sample('--samples_per_prompt=6')
    best = sample(
        '--decode=best_of_n', '--gin=steering.Options.n=3', '--samples_per_prompt=2', '--reward=tests.runs:vowels'
    )
    for record, kept in zip(many, best):
      halves = record['samples'][:3], record['samples'][3:]
      assert kept['samples'] == [max(half, key=lambda text: runs.vowels([text])[0]) for half in halves]
      assert kept['scores'] == [max(runs.vowels(half)) for half in halves]

  def test_by_a_vote_has_the_answer_of_most(self, sample, tmp_path):
    (tmp_path / 'own.py').write_text('def first(text):\n  return text.strip()[:1].lower() or None\n')
    first = lambda text: text.strip()[:1].lower() or None
    found = sample(
        '--decode=vote', '--gin=steering.Options.n=8', f"--gin=candidates.vote.parser='{tmp_path}/own.py:first'"
    )
    for record, kept in zip(sample('--samples_per_prompt=8'), found):
      answers = [first(text) for text in record['samples']]
      most = max(answers.count(answer) for answer in answers if answer)
      assert kept['samples'] == [next(t for t in record['samples'] if first(t) and answers.count(first(t)) == most)]

  def test_by_mbr_is_judged_by_a_model(self, sample, models, caplog):
    caplog.set_level('INFO')
    flags = '--gin=steering.Options.n=3', f'--reward={models["rm"]}'
    plain = sample('--decode=best_of_n', *flags)
    assert re.search(r'best_of_n: 2 kept, each of 3 candidates, .* at most 0\.4319 nats', caplog.text)
    assert sample('--decode=mbr', '--gin=candidates.mbr.beta=0.0', *flags) == plain
    assert re.search(r'mbr: 2 kept, each of 3 candidates, .* at most 1\.099 nats', caplog.text)


def head_of(ids):
  """What the head of `rm` makes of the last token."""
  return states_of(2, ids)[-1] @ HEAD[:, 0].astype(np.float64)


class TestInBlocks:

  @pytest.fixture
  def calls(self, monkeypatch):
    """What was sampled, call by call: what was read, the continuations, and the most tokens."""
    seen, sample = [], sampling.sample

    def noted(model, params, prompts, **options):
      found = sample(model, params, prompts, **options)
      seen.append(([list(p) for p in prompts], found, options['n'], options['max_new_tokens']))
      return found

    monkeypatch.setattr(sampling, 'sample', noted)
    return seen

  def test_goes_on_from_the_continuation_of_the_highest_value(self, sample, calls, models, caplog):
    caplog.set_level('INFO')
    flags = '--decode=cd_blockwise', '--gin=steering.Options.n=3', '--gin=steering.Options.block=4'
    found = sample(*flags, f'--guide={models["rm"]}', '--max_new_tokens=10', '--samples_per_prompt=2')
    assert [most for *_, most in calls] == [4, 4, 2]
    own, others = dict(enumerate(calls[0][0])), 0
    assert len(own) == 4
    for read, continuations, n, _ in calls:
      assert n == 3 and read == list(own.values())
      for i, ids in own.items():
        group = continuations[3 * i : 3 * i + 3]
        best = max(group, key=lambda one: head_of([*ids, *one.ids]))
        others += best is not group[0]
        own[i] = [*ids, *best.ids]
    assert others > 3
    prompts = calls[0][0]
    texts = [TOKENIZER.decode(ids[len(p) :], continuation=True) for p, ids in zip(prompts, own.values())]
    assert [*found[0]['samples'], *found[1]['samples']] == texts
    ratios = [x for record in found for x in record['log_ratios']]
    np.testing.assert_allclose(ratios, 0, atol=1e-4)  # each continuation is the policy's own
    limit = 3 * (np.log(3) - 2 / 3)
    said = re.search(r'cd_blockwise: 4 kept, each of 3 candidates, in 3 blocks, KL .* at most ([\d.]+)', caplog.text)
    np.testing.assert_allclose(float(said[1]), limit + np.mean(ratios), rtol=1e-3)

  def test_of_all_tokens_is_by_brute_force_the_most_valuable_of_each(self, sample, models):
    # So many draws of one token of the two likeliest that both are among them.
    flags = '--decode=cd_blockwise', '--gin=steering.Options.n=24', '--gin=steering.Options.block=1', '--top_k=2'
    found = sample(*flags, f'--guide={models["rm"]}', '--prompt=Lily', '--temperature=5', data=False)
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode('Lily')]
    prompt = len(ids)
    for _ in range(6):
      logits = states_of(0, ids)[-1] @ np.asarray(params_of(0)['embed'], np.float64)[: CONFIG.vocab_size].T
      ids.append(int(max(np.argsort(logits)[-2:], key=lambda token: head_of([*ids, token]))))
    assert found == 'Lily' + TOKENIZER.decode(ids[prompt:], continuation=True) + '\n'

  def test_as_long_as_a_response_is_best_of_n(self, sample):
    flags = '--gin=steering.Options.n=3', '--samples_per_prompt=2', '--reward=tests.runs:vowels', '--decode=best_of_n'
    assert sample(*flags, '--gin=steering.Options.block=6') == sample(*flags)
    shorter = sample(*flags, '--gin=steering.Options.block=2')
    for record in shorter:
      assert record['scores'] == runs.vowels(record['samples'])

  def test_ends_with_a_text_though_a_block_ends_within(self, sample, calls):
    flags = '--decode=best_of_n', '--gin=steering.Options.n=1', '--reward=tests.runs:vowels', '--temperature=0'
    whole = sample('--prompt=Lily', '--temperature=0', data=False)
    assert sample('--prompt=Lily', *flags, '--gin=steering.Options.block=2', data=False) == whole
    said = whole.removeprefix('Lily').rstrip('\n')
    for at in range(1, len(said) - 2):
      calls.clear()
      cut = sample('--prompt=Lily', *flags, '--gin=steering.Options.block=1', f'--stop={said[at : at + 3]}', data=False)
      assert cut == 'Lily' + said[: said.index(said[at : at + 3])] + '\n'
      ids = [found[0].ids[0] for _, found, *_ in calls]
      holds = [said[at : at + 3] in TOKENIZER.decode(ids[: n + 1], continuation=True) for n in range(len(ids))]
      assert holds == [False] * (len(ids) - 1) + [True]  # nothing is written behind it

  def test_draws_the_same_when_others_have_ended(self, sample):
    flags = '--decode=best_of_n', '--gin=steering.Options.n=1', '--gin=steering.Options.block=2'
    first, second = samples(sample(*flags, '--reward=tests.runs:vowels'))
    stop = next(first[0][at : at + 2] for at in range(3) if first[0][at : at + 2] not in second[0])
    ended, same = samples(sample(*flags, '--reward=tests.runs:vowels', f'--stop={stop}'))
    assert len(ended[0]) < 3 and same == second


class TestRefuses:

  @pytest.mark.parametrize(
      ('flags', 'said'),
      [
          (['--decode=dara'], '--decode=dara: unknown method; did you mean .*there are best_of_n, cd, '),
          (['--decode=dera'], '--guide: one --guide=DIR for each of aligned, in this order is wanted; given: none'),
          (['--decode=dera', '--guide='], 'for each of aligned, in this order is wanted; given: none'),
          (['--decode=proxy', '--guide={aligned}'], 'for each of tuned and base, in this order is wanted; given: /'),
          (['--decode=vote', '--guide={aligned}'], '--guide: no --guide is wanted'),
          (['--decode=best_of_n'], '--reward: candidates are chosen by it; give --reward=MODULE:FUNCTION'),
          (['--decode=dera', '--guide={other}'], '--guide=.*other: its tokenizer has other ids'),
          (['--decode=dera', '--guide={rm}'], '--guide=.*rm: it has a head that scores responses, and writes none'),
          (['--decode=rad', '--guide={aligned}'], '`reward` has a head that scores'),
          (['--decode=dera', '--guide={aligned}', '--gin=guidance.rad.beta=1.0'], 'not used by this run: guidance.rad'),
          (['--decode=vote', "--gin=candidates.vote.parser='x'"], "candidates.vote.parser = 'x': write MODULE"),
          (['--decode=vote', "--gin=a/candidates.vote.parser='x:y'"], 'not used by this run: a/candidates.vote.parser'),
          (['--decode=vote', '--temperature=0'], '--temperature=0 draws the same 32 times'),
          (['--decode=vote', '--gin=steering.Options.block=-1'], r'steering.Options.block = -1: it is at least 0'),
          (['--decode=dera', '--gin=steering.Options.block=2'], r'block = 2: it goes with a choice'),
          (
              ['--decode=cd_blockwise'],
              '--guide: one --guide=DIR for each of value, in this order is wanted; given: none',
          ),
          (['--decode=cd_blockwise', '--guide={aligned}'], '`value` has a head that scores'),
          (['--decode=vote', '--gin=steering.Options.n=0'], r'steering.Options.n = 0: it is at least 1'),
          (['--decode=dera', "--gin=steering.Options.guides='x'"], "guides = 'x': write a list"),
          (['--decode=vote', '--combine=gated'], '--combine=gated: it goes with --reward'),
          (['--decode=urial', '--max_new_tokens=450'], r'exceed the context of `shown`, 512'),
          (['--guide={aligned}'], '--mode=sample does not read --guide; it goes with --decode'),
          (['--gin=guidance.rad.beta=1.0'], '--mode=sample does not read --gin'),
          (['--decode=vote', '--steps=3'], 'does not read --steps'),
      ],
      ids=lambda value: ' '.join(value) if isinstance(value, list) else None,
  )
  def test_what_cannot_be(self, sample, models, flags, said):
    assert re.search(said, sample(*(flag.format(**models) for flag in flags), code=2))
