"""Sampling: the tokens of the full forward pass, whatever the layout."""

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sharding
from jaxalign import types
from jaxalign.generation import decoding
from jaxalign.generation import sampling
from jaxalign.models import architecture
from jaxalign.models import transformer

CONFIG = architecture.Config(20, 2, 16, 4, 2, 8, 24, 96, tie_embeddings=False)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, MESH, length=64)
PARAMS = jax.tree.map(lambda x: 4 * x, transformer.init_params(MODEL, jax.random.key(0), MESH))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2], [19]]
SHAPED = {'temperature': 0.7, 'top_k': 6, 'min_p': 0.05, 'repetition_penalty': 1.3}


@jax.jit
def hidden(params, ids):
  return MODEL.apply({'params': params}, ids[None], jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))[0]


def logits_of(ids, params=PARAMS):
  """Logits of what follows each token, in float64, by the pass that has no cache."""
  states = np.asarray(hidden(params, np.pad(np.array(ids), (0, 64 - len(ids)))), np.float64)[: len(ids)]
  return (states @ np.asarray(params['head'], np.float64))[:, : CONFIG.vocab_size]


def logp_of(ids, params=PARAMS):
  logits = logits_of(ids, params)
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def draw(prompts=PROMPTS, **options):
  options = {'max_new_tokens': 6} | options
  return sampling.sample(options.pop('model', MODEL), options.pop('params', PARAMS), prompts, **options)


def shaped_by(logits, seen, *, temperature, top_k, min_p, repetition_penalty):
  """Log-probabilities of the draw, by the definitions."""
  lowered = np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
  x = np.where(np.isin(np.arange(len(logits)), seen), lowered, logits) / temperature
  x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)
  x = np.where(np.exp(x - x.max()) >= min_p, x, -np.inf)
  return x - np.log(np.exp(x).sum())


def mixed(logits_BV, guides):
  return 1.5 * logits_BV - 0.5 * guides[0].logits_BV


def scored(logits_BV, guides):
  """Of the four likeliest tokens the one of the best sum of logit and score."""
  top_BC, tokens_BC = jax.lax.top_k(logits_BV, 4)
  rewards_BC = top_BC + 2.0 * guides[0].scores_of(tokens_BC)[..., 0] + 0.5 * guides[0].scores_BO
  return jnp.full_like(logits_BV, -1e9).at[jnp.arange(len(top_BC))[:, None], tokens_BC].set(rewards_BC)


class TestSample:

  def test_of_temperature_zero_is_the_most_probable_token_at_each_step(self):
    for prompt, found in zip(PROMPTS, draw(temperature=0.0)):
      ids = list(prompt)
      for token in found.ids:
        assert token == np.argmax(logp_of(ids)[-1])
        ids.append(token)

  @pytest.mark.parametrize('options', [{}, SHAPED], ids=['plain', 'shaped'])
  def test_gives_the_log_probabilities_of_the_model_itself_and_of_the_draw(self, options):
    for prompt, found in zip(PROMPTS, draw(seed=3, **options)):
      logits, logp = logits_of([*prompt, *found.ids]), logp_of([*prompt, *found.ids])
      for i, token in enumerate(found.ids):
        here = len(prompt) - 1 + i
        np.testing.assert_allclose(found.logps[i], logp[here, token], atol=1e-4)
        shaped = shaped_by(logits[here], [*prompt, *found.ids[:i]], **options) if options else logp[here]
        np.testing.assert_allclose(found.processed_logps[i], shaped[token], atol=5e-4)

  def test_in_bfloat16_stays_near_them(self):
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
    mild = jax.tree.map(lambda x: x / 4, PARAMS)
    for prompt, found in zip(PROMPTS, draw(model=model, params=mild)):
      logp = logp_of([*prompt, *found.ids], mild)
      wanted = [logp[len(prompt) - 1 + i, token] for i, token in enumerate(found.ids)]
      np.testing.assert_allclose(found.logps, wanted, atol=2e-2)

  def test_does_not_depend_on_rows_order_or_calls(self):
    limits, options = [3, 30, 1, 12, 7], {'n': 3, 'seed': 2, 'max_new_tokens': 32}
    whole = [x.ids for x in draw(**options | {'max_new_tokens': limits})]
    assert [len(ids) for ids in whole] == [limit for limit in limits for _ in range(3)]
    assert whole[0] != whole[1][:3]  # the same prompt again is another draw
    few = draw(rows=2, **options | {'max_new_tokens': limits})
    assert [x.ids for x in few] == whole
    order = [3, 0, 4]
    part = draw([PROMPTS[i] for i in order], requests=order, **options | {'max_new_tokens': [limits[i] for i in order]})
    assert [x.ids for x in part] == [whole[3 * i + k] for i in order for k in range(3)]

  def test_reads_each_prompt_once_for_all_its_samples(self, monkeypatch):
    seen, read = [], decoding.read

    def counted(program, params, ids, lengths, experts):
      assert experts is None
      seen.extend(ids[0][row, :length].tolist() for row, length in enumerate(lengths[0]))
      return read(program, params, ids, lengths, experts)

    monkeypatch.setattr(decoding, 'read', counted)
    draw(n=5, rows=8)
    assert [ids for ids in seen if ids != [0]] == PROMPTS

  @pytest.mark.parametrize('seed', [0, 1])
  def test_gives_rows_that_have_ended_to_what_waits(self, monkeypatch, seed):
    lengths = np.random.default_rng(seed).geometric(1 / 16, 64).clip(max=64)
    steps, write = [], decoding.write

    def counted(*args):
      found = write(*args)
      steps.append(int(found[0].steps))
      return found

    monkeypatch.setattr(decoding, 'write', counted)
    compiled = decoding.compilations.count
    found = draw([[1 + i % 19] for i in range(64)], rows=8, max_new_tokens=lengths.tolist())
    assert [len(one.ids) for one in found] == lengths.tolist()
    assert {one.stop_reason for one in found} == {'length'}
    # Of these lengths: others may have a last response that is longer than all that others have left.
    assert lengths.sum() / 8 <= steps[-1] <= 1.15 * lengths.sum() / 8
    ends = [0] * 8
    for length in lengths:
      heapq.heapreplace(ends, ends[0] + length)
    assert steps[-1] == max(ends)  # no step is lost while something waits
    assert decoding.compilations.count - compiled <= 7

  @pytest.mark.parametrize('cache_dtype', [None, 'int8'])
  def test_does_not_depend_on_the_mesh(self, monkeypatch, cache_dtype):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    params = transformer.init_params(MODEL, jax.random.key(0), mesh)
    caches, wanted, write = [], set(), decoding.write

    def looked_at(*args):
      arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
      wanted.add(str([(x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)) for x in arrays]))
      found = write(*args)
      caches.append(found[0].readings[0].cache)
      return found

    monkeypatch.setattr(decoding, 'write', looked_at)
    # As other platforms have it: layers in stacks.
    monkeypatch.setattr(sampling, 'prepared', lambda model: model)
    with jax.set_mesh(mesh):
      model = transformer.build(CONFIG, mesh, length=64)
      found = draw(params=params, model=model, cache_dtype=cache_dtype, rows=8, n=2)
    monkeypatch.undo()
    assert len(caches) > 1  # the first ends when some rows have ended
    assert len(wanted) == 1  # what a program gives lies where the next wants it
    for x in jax.tree.leaves([(one.k_LBKSH, one.v_LBKSH) for one in caches]):
      assert x.dtype == (cache_dtype or 'float32')
      assert x.sharding.shard_shape(x.shape) == (2, 2, 1, x.shape[3], 8)  # of 8 rows and 2 heads
    single = transformer.init_params(MODEL, jax.random.key(0), MESH)
    assert [x.ids for x in found] == [x.ids for x in draw(params=single, cache_dtype=cache_dtype, rows=8, n=2)]

  @pytest.mark.parametrize('apart', [False, True])
  def test_keeps_weights_by_other_rules_while_it_writes(self, apart, monkeypatch):
    mesh, given, read = sharding.make_mesh('fsdp:4,tensor:2'), [], decoding.read
    params = transformer.init_params(MODEL, jax.random.key(0), mesh)
    assert params['head'].sharding.shard_shape((16, 128)) == (4, 64)

    def looked_at(program, params, *args):
      given.append(params[0])
      return read(program, params, *args)

    monkeypatch.setattr(decoding, 'read', looked_at)
    monkeypatch.setattr(sampling, 'prepared', lambda model: dataclasses.replace(model, apart=apart))
    with jax.set_mesh(mesh):
      model = transformer.build(CONFIG, mesh, length=64)
      found = draw(params=params, model=model, rows=8, n=2, rules={'embed': ()})
    monkeypatch.undo()
    head = given[0]['head']
    assert head.sharding.shard_shape(head.shape) == (16, 64)
    single = transformer.init_params(MODEL, jax.random.key(0), MESH)
    assert [x.ids for x in found] == [x.ids for x in draw(params=single, rows=8, n=2)]

  @pytest.mark.parametrize('text,apart', [('', True), ('', False), ('fsdp:2,expert:2,tensor:2', False)])
  def test_tells_which_experts_tokens_took(self, text, apart, monkeypatch):
    config = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2)
    mesh = sharding.make_mesh(text, devices=None if text else jax.devices()[:1])
    monkeypatch.setattr(sampling, 'prepared', lambda model: dataclasses.replace(model, apart=apart))
    with jax.set_mesh(mesh):
      model = transformer.build(config, mesh, length=64)
      params = jax.tree.map(lambda x: 4 * x, transformer.init_params(model, jax.random.key(0), mesh))
      found = draw(params=params, model=model, rows=4, n=2, max_new_tokens=[3, 30, 1, 12, 7], keep_experts=True)
      ids, taken = np.zeros((len(found), 64), np.int32), np.zeros((len(found), 64, 2, 2), np.uint8)
      counted, segments = np.zeros(ids.shape, bool), np.zeros_like(ids)
      for row, one in enumerate(found):
        whole = [*PROMPTS[row // 2], *one.ids]
        assert one.experts.shape == (len(whole) - 1, 2, 2) and one.experts.dtype == np.uint8
        ids[row, : len(whole)], taken[row, : len(whole) - 1] = whole, one.experts
        counted[row, : len(whole) - 1], segments[row, : len(whole)] = True, 1
      tokens = ids, np.broadcast_to(np.arange(64), ids.shape), segments
      read = jax.jit(lambda experts: model.apply({'params': params}, *tokens, experts_BTLk=experts))
      free, replayed, others = (np.asarray(read(x))[counted] for x in (None, taken, (taken + 1) % 4))
      # The first token of each prompt is told which to take.
      told = [(one.experts[:1] + 1) % 4 for one in found[::2]]
      again = draw(params=params, model=model, rows=4, max_new_tokens=9, keep_experts=True, experts=told)
      taken, first = np.full((2, 5, 64, 2, 2), 255, np.uint8)
      ids, segments = np.zeros((2, 5, 64), np.int32)
      for row, (prompt, one) in enumerate(zip(PROMPTS, again)):
        np.testing.assert_array_equal(one.experts[:1], told[row])
        ids[row, : len(prompt) + 8], segments[row, : len(prompt) + 8] = [*prompt, *one.ids[:-1]], 1
        taken[row, : len(prompt) + 8], first[row, :1] = one.experts, told[row]
      tokens = ids, np.broadcast_to(np.arange(64), ids.shape), segments
      read = jax.jit(lambda experts: model.apply({'params': params}, *tokens, experts_BTLk=experts))
      left, whole = (np.asarray(read(x))[segments > 0] for x in (first, taken))
    np.testing.assert_allclose(replayed, free, atol=1e-5)
    assert np.abs(others - free).max(axis=1).min() > 1e-2
    np.testing.assert_allclose(whole, left, atol=1e-5)

  def test_depends_on_the_seed_alone(self):
    assert [x.ids for x in draw(seed=1)] == [x.ids for x in draw(seed=1)]
    assert [x.ids for x in draw(seed=1)] != [x.ids for x in draw(seed=2)]

  def test_ends_with_a_stop_token_and_keeps_it(self):
    free = draw(seed=5, max_new_tokens=12)
    stop = free[0].ids[2]
    for before, found in zip(free, draw(seed=5, max_new_tokens=12, stop_ids=(stop,))):
      end = before.ids.index(stop) + 1 if stop in before.ids else 12
      assert found.ids == before.ids[:end]
      assert found.finished == (stop in before.ids)

  def test_ends_with_the_token_behind_which_there_is_a_text(self):
    free = draw(seed=5, max_new_tokens=24, n=2)
    decode = lambda ids: ''.join(chr(ord('a') + i) for i in ids)
    text = decode(free[0].ids)[2:4]
    seen = {}
    watch = lambda response, ids: seen.setdefault(response, []).append(ids)
    found = draw(seed=5, max_new_tokens=24, n=2, rows=4, stop=sampling.Stop((text, 'zz'), decode), watch=watch)
    for i, (before, one) in enumerate(zip(free, found)):
      end = decode(before.ids).find(text)
      assert one.ids == (before.ids if end < 0 else before.ids[: end + 2])
      assert one.logps == pytest.approx(before.logps[: len(one.ids)], abs=1e-5)
      assert one.stop_reason == ('length' if end < 0 else 'stop')
      assert one.finished == (end >= 0)
      assert seen[i][-1] == one.ids
      assert all(now == one.ids[: len(now)] for now in seen[i])
    assert found[0].stop_reason == 'stop'

  def test_draws_each_token_as_often_as_it_is_probable(self):
    count = 4000
    found = draw([[7, 3]], n=count, max_new_tokens=1, rows=4000)
    wanted = np.exp(logp_of([7, 3])[-1])
    share = np.bincount([x.ids[0] for x in found], minlength=CONFIG.vocab_size) / count
    np.testing.assert_allclose(share, wanted, atol=4 * np.sqrt(wanted.max() / count))

  def test_never_gives_a_token_of_the_padding(self):
    uniform = jax.tree.map(lambda x: 0 * x, PARAMS)
    found = draw([[1]] * 64, params=uniform, max_new_tokens=30)
    assert max(token for one in found for token in one.ids) < CONFIG.vocab_size

  def test_draws_every_token_of_a_response_anew(self):
    uniform = jax.tree.map(lambda x: 0 * x, PARAMS)
    # A token comes again at once in 1 of 20 places; with one random number per response it would in all.
    pairs = [pair for one in draw([[1]] * 64, params=uniform, max_new_tokens=30) for pair in zip(one.ids, one.ids[1:])]
    assert np.mean([a == b for a, b in pairs]) < 0.1

  def test_mixes_models_as_whole_passes_of_both_do(self):
    other = jax.tree.map(lambda x: x[::-1], PARAMS) | {'embed': PARAMS['embed']}
    texts = [[3, 1], *PROMPTS[1:]]  # what the other reads
    guidance = sampling.Guidance(mixed, (sampling.Guide(MODEL, other, texts),))
    for options in ({'temperature': 0.0}, {'seed': 4}):
      for prompt, text, found in zip(PROMPTS, texts, draw(guidance=guidance, rows=2, **options)):
        for i, token in enumerate(found.ids):
          own, guide = logits_of([*prompt, *found.ids[:i]])[-1], logits_of([*text, *found.ids[:i]], other)[-1]
          mixture = 1.5 * own - 0.5 * guide
          logp = mixture - np.log(np.exp(mixture).sum())
          if options == {'temperature': 0.0}:
            assert token == np.argmax(logp)
          else:
            np.testing.assert_allclose(found.processed_logps[i], logp[token], atol=1e-3)  # logits are some tens
          np.testing.assert_allclose(found.logps[i], own[token] - np.log(np.exp(own).sum()), atol=1e-4)

  @pytest.mark.parametrize('apart', [True, False])
  def test_is_guided_by_what_a_head_makes_of_the_likeliest_tokens(self, monkeypatch, apart):
    if not apart:
      monkeypatch.setattr(sampling, 'prepared', lambda model: model)
    model = MODEL.clone(config=dataclasses.replace(CONFIG, score_outputs=1, pattern=('local',), window=4))
    params = PARAMS | {'score': jax.random.normal(jax.random.key(7), (16, 1))}
    guidance = sampling.Guidance(scored, (sampling.Guide(model, params),))
    run = jax.jit(
        lambda ids: model.apply({'params': params}, ids[None], jnp.arange(64)[None], jnp.ones((1, 64), int))[0]
    )

    def score(ids):
      states = np.asarray(run(np.pad(np.array(ids), (0, 64 - len(ids)))), np.float64)
      return states[len(ids) - 1] @ np.asarray(params['score'], np.float64)[:, 0]

    changed = 0
    for prompt, found in zip(PROMPTS, draw(guidance=guidance, temperature=0.0)):
      ids = list(prompt)
      for token in found.ids:
        logits = logits_of(ids)[-1]
        among = np.argsort(-logits)[:4]
        rewards = [logits[v] + 2.0 * score([*ids, v]) + 0.5 * score(ids) for v in among]
        assert token == among[np.argmax(rewards)]
        changed += token != among[0]
        ids.append(token)
    assert changed

  def test_refuses_guides_of_another_vocabulary(self):
    other = MODEL.clone(config=dataclasses.replace(CONFIG, vocab_size=21))
    with pytest.raises(types.UsageError, match=r'\[20, 21\] tokens'):
      draw(guidance=sampling.Guidance(mixed, (sampling.Guide(other, PARAMS),)))

  def test_of_no_prompts_is_nothing(self):
    assert draw([]) == []
