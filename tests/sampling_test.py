"""Sampling: the tokens of the full forward pass, whatever the layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sampling
from jaxalign import sharding
from jaxalign.models import architecture
from jaxalign.models import transformer

CONFIG = architecture.Config(20, 2, 16, 2, 1, 8, 24, 96, tie_embeddings=False)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, MESH, length=64)
PARAMS = jax.tree.map(lambda x: 4 * x, transformer.init_params(MODEL, jax.random.key(0), MESH))
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2], [19]]


@jax.jit
def hidden(params, ids):
  return MODEL.apply({'params': params}, ids[None], jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))[0]


def logp_of(ids, params=PARAMS):
  """Log-probabilities of what follows each token, in float64, by the pass that has no cache."""
  states = np.asarray(hidden(params, np.pad(np.array(ids), (0, 64 - len(ids)))), np.float64)[: len(ids)]
  logits = (states @ np.asarray(params['head'], np.float64))[:, : CONFIG.vocab_size]
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def draw(prompts=PROMPTS, **options):
  options = {'max_new_tokens': 6} | options
  return sampling.sample(options.pop('model', MODEL), options.pop('params', PARAMS), prompts, **options)


class TestSample:

  def test_of_temperature_zero_is_the_most_probable_token_at_each_step(self):
    for prompt, found in zip(PROMPTS, draw(temperature=0.0)):
      ids = list(prompt)
      for token in found.ids:
        assert token == np.argmax(logp_of(ids)[-1])
        ids.append(token)

  @pytest.mark.parametrize('options', [{}, {'temperature': 0.5}, {'top_k': 3}, {'top_p': 0.5}])
  def test_gives_the_log_probabilities_of_the_model_itself(self, options):
    for prompt, found in zip(PROMPTS, draw(seed=3, **options)):
      logp = logp_of([*prompt, *found.ids])
      wanted = [logp[len(prompt) - 1 + i, token] for i, token in enumerate(found.ids)]
      np.testing.assert_allclose(found.logps, wanted, atol=1e-4)

  def test_in_bfloat16_stays_near_them(self):
    model = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
    mild = jax.tree.map(lambda x: x / 4, PARAMS)
    for prompt, found in zip(PROMPTS, draw(model=model, params=mild)):
      logp = logp_of([*prompt, *found.ids], mild)
      wanted = [logp[len(prompt) - 1 + i, token] for i, token in enumerate(found.ids)]
      np.testing.assert_allclose(found.logps, wanted, atol=2e-2)

  def test_does_not_depend_on_how_many_rows_are_decoded_at_once(self):
    prompts = PROMPTS * 4
    assert [x.ids for x in draw(prompts, rows=8)] == [x.ids for x in draw(prompts, rows=128)]
    assert draw(prompts)[0].ids != draw(prompts)[5].ids  # the same prompt again is another draw

  def test_does_not_depend_on_the_mesh(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    params = transformer.init_params(MODEL, jax.random.key(0), mesh)
    with jax.set_mesh(mesh):
      found = draw(params=params, model=transformer.build(CONFIG, mesh, length=64))
    single = transformer.init_params(MODEL, jax.random.key(0), MESH)
    assert [x.ids for x in found] == [x.ids for x in draw(params=single)]

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

  @pytest.mark.parametrize(
      'options,change',
      [
          ({}, lambda p: p),
          ({'temperature': 2.0}, lambda p: p**0.5),
          ({'top_k': 2}, lambda p: np.where(p >= np.sort(p)[-2], p, 0)),
          # The fewest tokens that reach 0.6.
          (
              {'top_p': 0.6},
              lambda p: np.where(p >= np.sort(p)[::-1][np.argmax(np.cumsum(np.sort(p)[::-1]) >= 0.6)], p, 0),
          ),
      ],
  )
  def test_draws_each_token_as_often_as_it_is_probable(self, options, change):
    count = 4000
    found = draw([[7, 3]] * count, max_new_tokens=1, rows=4000, **options)
    wanted = change(np.exp(logp_of([7, 3])[-1]))
    wanted = wanted / wanted.sum()
    share = np.bincount([x.ids[0] for x in found], minlength=CONFIG.vocab_size) / count
    assert (share[wanted == 0] == 0).all()
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

  def test_of_no_prompts_is_nothing(self):
    assert draw([]) == []
