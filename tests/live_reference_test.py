"""A reference inside the step: as one that is cached, what only it gives, and one that follows the policy."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import checkpoint
from jaxalign import forward
from jaxalign import main
from jaxalign import metrics
from jaxalign import objectives
from jaxalign import optim
from jaxalign import reference
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import batchwise
from jaxalign.losses import compose
from jaxalign.losses import listwise
from jaxalign.losses import preference
from jaxalign.losses import shaped
from jaxalign.losses import supervised
from jaxalign.models import architecture
from jaxalign.models import transformer
from tests import packed
from tests import runs

CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64, score_outputs=1)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, MESH, length=16)
PARAMS, OTHER = (
    jax.tree.map(lambda x: 2 * x, transformer.init_params(MODEL, jax.random.key(seed), MESH)) for seed in (0, 1)
)
PAIRS = packed.pairs(0, 4)
OPTIMIZER = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-2))
KEY = jax.random.key(7)


def batch_of(pairs=PAIRS):
  rows = [[(g, k, pair[0], pair[1 + k]) for k in range(2)] for g, pair in enumerate(pairs)]
  micro = packed.micro_batch(rows, groups=4, size=2, length=20, slots=2)
  return dataclasses.replace(micro, labels_BS={'score': np.where(micro.group_BS >= 0, 1.0 - micro.slot_BS, 0.0)})


def objective_of(loss_fn, make=objectives.preference, ref_model=MODEL, **more):
  needs = tracing.trace(loss_fn, group_size=2, labels=('score',))
  return make(model=MODEL, loss_fn=loss_fn, needs=needs, ref_model=ref_model, **more)


def log_probs(params, batch):
  """Of every token at every position, float64 `[B, T, V]`."""
  hidden = forward.hidden_states(params, jax.tree.map(jnp.asarray, batch), model=MODEL)
  logits = np.asarray(hidden, np.float64) @ np.asarray(transformer.output_matrix(params), np.float64)
  logits = logits[..., : CONFIG.vocab_size]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def of_responses(x_BT, batch):
  found = np.zeros((4, 2))
  for b, t in np.argwhere(batch.responses_BT >= 0):
    place = batch.responses_BT[b, t]
    found[batch.group_BS[b, place], batch.slot_BS[b, place]] += x_BT[b, t]
  return found


class TestLive:

  @pytest.mark.usefixtures('optimised')
  def test_gives_the_loss_and_gradient_of_a_cached_one(self):
    loss = functools.partial(preference.dpo, beta=0.5)
    batch = batch_of()
    run = lambda objective, batch, ref: jax.jit(jax.value_and_grad(objective.of_micro, has_aux=True))(
        PARAMS, {}, batch, KEY, (), ref
    )
    logps_BT = forward.ref_logps(OTHER, jax.tree.map(lambda x: jnp.asarray(x)[None], batch), model=MODEL)[0]
    cached = run(objective_of(loss, ref_model=None), dataclasses.replace(batch, ref_logps_BT=logps_BT), None)
    live = run(objective_of(loss), batch, OTHER)
    assert abs(float(cached[0][0]) - 4 * np.log(2)) > 0.01
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), live, cached)

  def test_knows_divergence_and_entropy_exactly(self):
    batch = batch_of()
    log_p, log_q = log_probs(PARAMS, batch), log_probs(OTHER, batch)
    q = np.exp(log_q)
    wanted = {
        'kl': of_responses((q * (log_q - log_p)).sum(-1), batch),
        'entropy': of_responses(-(q * log_q).sum(-1) / np.log(CONFIG.vocab_size), batch),
    }

    def loss_fn(policy, ref, labels, *, state):
      del labels
      return types.LossOut(ref.entropy_GK[:, 0] + ref.kl_BT[:2, 0] + policy.logps_GK[:, 0], {}, state)

    objective = objective_of(loss_fn)
    stats = objective.stats(PARAMS, {}, jax.tree.map(jnp.asarray, batch), KEY, OTHER)
    np.testing.assert_allclose(of_responses(np.asarray(stats['ref_kl']), batch), wanted['kl'], rtol=1e-5)
    np.testing.assert_allclose(of_responses(np.asarray(stats['ref_entropy']), batch), wanted['entropy'], rtol=1e-5)

  def test_is_computed_only_where_the_loss_reads_more_of_it_than_can_be_kept(self):
    live = lambda loss, **more: tracing.trace(loss, group_size=2, labels=('score',), **more).live
    assert live(functools.partial(shaped.tdpo1, beta=0.1))
    assert live(functools.partial(shaped.mallows_dpo, beta=0.1, scale=1.0))
    assert live(functools.partial(supervised.quark, beta=0.1))
    assert not live(functools.partial(preference.dpo, beta=0.1))

  def test_makes_tdpo_log_2_where_it_is_the_policy(self):
    for loss in (functools.partial(shaped.tdpo1, beta=0.5), functools.partial(shaped.tdpo2, beta=0.5, alpha=0.5)):
      total, sums = objective_of(loss).of_micro(PARAMS, {}, jax.tree.map(jnp.asarray, batch_of()), KEY, (), PARAMS)
      np.testing.assert_allclose(total / sums.weight, np.log(2), rtol=1e-6)


class TestRivals:

  def test_are_likely_tokens_other_than_the_target(self):
    batch = jax.tree.map(jnp.asarray, batch_of())
    cringe = functools.partial(shaped.pairwise_cringe, alpha=1.0, gate_margin=1.0, temperature=1.0)
    stats = objective_of(cringe, ref_model=None, rivals=1).stats(PARAMS, {}, batch, KEY)
    log_p = log_probs(PARAMS, batch)
    np.put_along_axis(log_p, np.asarray(batch.targets_BT)[..., None], -np.inf, axis=-1)
    counts = np.asarray(batch.mask_BT) > 0
    np.testing.assert_allclose(np.asarray(stats['rival_logps'])[counts], log_p.max(-1)[counts], rtol=1e-5)

  @pytest.mark.parametrize(
      'make,loss',
      [
          (objectives.preference, functools.partial(preference.dpo, beta=0.5)),
          (objectives.supervised, supervised.cross_entropy),
      ],
  )
  def test_are_refused_where_the_loss_reads_none(self, make, loss):
    with pytest.raises(types.UsageError, match='rivals = 5: bound, but the loss reads no rivals; leave it out'):
      objective_of(loss, make, ref_model=None, rivals=5)

  @pytest.mark.parametrize('rivals', [0, 50])
  def test_are_no_more_than_there_are(self, rivals):
    cringe = functools.partial(shaped.pairwise_cringe, alpha=1.0, gate_margin=1.0, temperature=1.0)
    with pytest.raises(types.UsageError, match=f'rivals = {rivals}: the model has 50 tokens, of which one is right'):
      objective_of(cringe, ref_model=None, rivals=rivals)


class TestValues:

  def test_are_read_where_the_prompt_has_been_read(self):
    batch = jax.tree.map(jnp.asarray, batch_of())
    params = PARAMS | {'score': jax.random.normal(jax.random.key(3), PARAMS['score'].shape)}
    seen = []

    def loss_fn(policy, ref, labels, *, state):
      out = listwise.dro_v(policy, ref, labels, state=state, tau=1.0)
      seen.append(out.metrics['values'])
      return out

    objective_of(loss_fn).of_micro(params, {}, batch, KEY, (), OTHER)
    scores_BT = np.asarray(forward.scores(params, batch, model=MODEL))[..., 0]
    for b in range(4):
      for place in range(2):
        first = int(np.flatnonzero(np.asarray(batch.responses_BT[b]) == place)[0])
        group, slot = int(batch.group_BS[b, place]), int(batch.slot_BS[b, place])
        np.testing.assert_allclose(seen[-1][group, slot], scores_BT[b, first], rtol=1e-5)
        assert int(batch.inputs_BT[b, first]) == PAIRS[group][0][-1]


class TestMicroBatches:
  # All that a live reference gives, and rivals; more than one of them would be drawn of each micro-batch anew.
  LOSSES = (
      (1.0, functools.partial(shaped.tdpo2, beta=0.5, alpha=0.5)),
      (1.0, functools.partial(shaped.mallows_dpo, beta=0.5, scale=1.0)),
      (0.1, functools.partial(shaped.pairwise_cringe, alpha=1.0, gate_margin=1.0, temperature=1.0)),
  )

  @pytest.mark.parametrize(
      'more,sync',
      [((), reference.Sync(every=2, alpha=0.25)), (((1.0, functools.partial(batchwise.aot, beta=0.5)),), None)],
      ids=['each alone, and a reference that moves', 'the whole step, and one that stays'],
  )
  def test_give_the_update_of_one(self, more, sync):
    objective = objective_of(functools.partial(compose.mixture, losses=self.LOSSES + more), rivals=1)
    assert objective.whole_step == bool(more)
    quick = {'xla_backend_optimization_level': 0}
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER, sync), compiler_options=quick)
    found = []
    for ways in (1, 2):
      parts = [PAIRS[i : i + 4 // ways] for i in range(0, 4, 4 // ways)]
      state = step_lib.init_state(PARAMS, OPTIMIZER.tx, 0, follows=sync is not None)
      for _ in range(3):
        state, measured = step(state, {}, packed.stack(*map(batch_of, parts)), None if sync else OTHER)
      means = {name: pair.mean() for name, pair in measured.means.items()}
      found.append((means, measured.gauges['grad_norm'], state.opt_state[1].mu, state.reference))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *found)


class TestSync:

  def test_mixes_the_policy_into_the_reference_every_so_many_steps(self):
    sync = reference.Sync(every=2, alpha=0.25)
    objective = objective_of(functools.partial(preference.dpo, beta=0.5))
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER, sync))
    state = step_lib.init_state(PARAMS, OPTIMIZER.tx, 0, follows=True)
    wanted = PARAMS
    for done in range(1, 7):
      if done in (3, 5):  # what the first two, and the next two, led to
        wanted = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * p, wanted, state.params)
      state, measured = step(state, {}, packed.stack(batch_of()))
      if done == 1:
        np.testing.assert_allclose(measured.means['loss'].mean(), np.log(2), rtol=1e-6)
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.reference, wanted)
    assert not np.allclose(state.reference['embed'], PARAMS['embed'])

  def test_that_copies_starts_again_from_log_2(self):
    objective = objective_of(functools.partial(preference.dpo, beta=0.5))
    step = jax.jit(step_lib.make_step(objective, OPTIMIZER, reference.Sync(every=2, alpha=1.0)))
    state, losses = step_lib.init_state(PARAMS, OPTIMIZER.tx, 0, follows=True), []
    for _ in range(4):
      state, measured = step(state, {}, packed.stack(batch_of()))
      losses.append(float(measured.means['loss'].mean()))
    np.testing.assert_allclose(losses[::2], np.log(2), rtol=1e-6)
    assert losses[1] < 0.69 and losses[3] < 0.69

  @pytest.mark.parametrize(
      'wrong', [{'every': 0, 'alpha': 0.5}, {'every': 1, 'alpha': 0.0}, {'every': 1, 'alpha': 2.0}]
  )
  def test_refuses_numbers_that_make_no_sense(self, wrong):
    with pytest.raises(types.UsageError, match='every must be at least 1, alpha above 0 and at most 1'):
      reference.Sync(**wrong)


def arrays(workdir):
  """Policy and reference of the newest checkpoint."""
  mesh = sharding.make_mesh('', devices=jax.devices()[:1])
  loaded = checkpoint.load(workdir, mesh)
  return jax.device_get((loaded.params, checkpoint.load_reference(workdir, loaded).params))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.folder_with_pairs(tmp_path_factory, 'live')


class TestRuns:

  @pytest.mark.parametrize('more', [(), ('--lora=rank:2,targets:q+v',)])
  def test_with_a_reference_that_follows_are_resumed_bit_for_bit_and_evaluated_with_it(self, folder, more, capsys):
    workdir = folder / f'run{len(more)}'
    held = f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:6]'
    sync = ('--algo=tr_dpo', '--gin=reference.Sync.every = 4')
    flags = runs.flags(folder, workdir, *sync, *more, held, '--save_every=3', steps=6)
    assert main.main(flags) == 0, capsys.readouterr().err
    params, ref = ended = arrays(workdir)
    assert any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(ref)))
    summary = json.loads((workdir / 'summary.json').read_text())
    capsys.readouterr()
    elsewhere = ('--mesh=data:4,tensor:2', '--gin=evaluate.evaluate.samples = None')
    assert main.main(['jaxalign', '--mode=eval', f'--checkpoint={workdir}', *elsewhere]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ('eval/loss', 'eval/rewards/margins'):
      assert found[name] == pytest.approx(summary[name], rel=1e-3, abs=1e-5)
    shutil.rmtree(workdir / 'checkpoints' / '6')
    (workdir / 'summary.json').unlink()
    assert main.main(flags) == 0
    runs.assert_same(arrays(workdir), ended)

  def test_that_need_a_live_reference_have_one_without_being_told(self, folder, capsys, monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    workdir = folder / 'tdpo'
    flags = runs.flags(folder, workdir, '--algo=tdpo2', '--lora=rank:2', '--eval_data=', steps=3)
    assert main.main(flags) == 0, capsys.readouterr().err
    losses = [line['loss'] for line in runs.logged(workdir).values()]
    assert losses[0] == pytest.approx(np.log(2), rel=1e-6) and losses[2] != losses[0]
    assert not list((folder / 'cache').glob('ref-*'))
    last = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
    products, attention = 16 * (16 + 2 * 8 + 16 + 3 * 32) + 16 * 512, 2 * 8 * 64 / 2
    flops = (2 + 1) * 2 * products + (3 + 1) * 4 * attention  # the frozen weights have no gradient
    assert last['mfu'] == pytest.approx(flops * last['tokens_per_s'] / (1e9 * 8), rel=1e-6)

  def test_of_adapters_and_a_value_head_have_a_reference_without_either(self, folder, capsys):
    lists = [{'prompt': f'Tom {i}', 'completions': [' ran', ' sat'], 'scores': [1.0, i / 8]} for i in range(8)]
    (folder / 'lists.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in lists))
    given = (f'--data=jsonl:{folder / "lists.jsonl"}', f'--eval_data=jsonl:{folder / "lists.jsonl"}')
    flags = runs.flags(folder, folder / 'dro_v', '--algo=dro_v', '--lora=rank:2', *given, steps=3)
    assert main.main(flags) == 0, capsys.readouterr().err
    capsys.readouterr()
    more = '--gin=evaluate.evaluate.samples = None', f'--cache_dir={folder / "cache"}'
    kept = sorted((folder / 'cache').iterdir())
    assert main.main(['jaxalign', '--mode=eval', f'--checkpoint={folder / "dro_v"}', *more]) == 0
    assert sorted((folder / 'cache').iterdir()) == kept  # What was tokenised for training serves here too.
    summary = json.loads((folder / 'dro_v' / 'summary.json').read_text())
    found = json.loads(capsys.readouterr().out)
    assert found['eval/loss'] == pytest.approx(summary['eval/loss'], rel=1e-4)

  def test_that_end_where_the_reference_moves_are_compared_with_what_they_were_trained_against(self, folder, capsys):
    held = f'--eval_data=jsonl:{folder / "pairs.jsonl"}[:6]'
    flags = runs.flags(folder, folder / 'sdpo', '--algo=sdpo', '--gin=reference.Sync.every = 3', held, steps=6)
    assert main.main(flags) == 0, capsys.readouterr().err
    losses = [line['loss'] for line in runs.logged(folder / 'sdpo').values()]
    np.testing.assert_allclose(losses[::3], np.log(2), rtol=1e-6)
    assert json.loads((folder / 'sdpo' / 'summary.json').read_text())['eval/loss'] < 0.69
