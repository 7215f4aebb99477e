"""What a run reads: batches with what the loss was found to need, counts, and what --mode=show prints."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxalign import metrics
from jaxalign import objectives
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import sharding
from jaxalign import streams as streams_lib
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import loader
from jaxalign.losses import listwise
from jaxalign.losses import preference
from jaxalign.losses import supervised
from jaxalign.models import architecture
from jaxalign.models import transformer

DPO = recipe_lib.Recipe(
    objective=objectives.preference,
    loss_fn=functools.partial(preference.dpo, beta=0.1),
    example_fn=examples.preference,
    packing=loader.Packing(rows=8, row_length=32),
    data='',
)
SFT = dataclasses.replace(
    DPO, objective=objectives.supervised, loss_fn=supervised.cross_entropy, example_fn=examples.supervised
)


def write(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return f'jsonl:{path}'


def pair(n):
  return {'prompt': 'Once upon a time', 'chosen': ' a cat ' + 'a' * n, 'rejected': ' a dog'}


@pytest.fixture
def job(tmp_path):
  """Twelve pairs to train on, one of them without a difference, and three that are held out, one of them long."""
  data = write(tmp_path / 'train.jsonl', [*map(pair, range(11)), pair(0) | {'chosen': ' a dog'}])
  held = write(tmp_path / 'held.jsonl', [pair(1), pair(2), pair(0) | {'prompt': 'Once upon a time ' * 20}])
  return recipe_lib.Job(
      algo='dpo',
      workdir=tmp_path / 'run',
      mesh=sharding.make_mesh(),
      seed=0,
      model=recipe_lib.DEFAULT_MODEL,
      tokenizer='',
      data=data,
      eval_data=held,
      data_dir=None,
      cache_dir=tmp_path / 'cache',
      skip_bad_records=False,
      debug=False,
  )


@pytest.fixture(scope='module')
def tiny():
  """A model of one layer and its parameters."""
  mesh = sharding.make_mesh()
  config = architecture.Config(512, 1, 16, 2, 1, 8, 32, 64)
  model = transformer.build(config, mesh, length=32)
  return model, transformer.init_params(model, jax.random.key(0), mesh)


def open_streams(job, recipe, model, params, steps=4):
  tokenizer = recipe_lib.open_tokenizer(job)
  with jax.set_mesh(job.mesh):
    opened = streams_lib.open_streams(job, recipe, tokenizer, train=steps > 0)
    if not opened.cached:
      return opened
    ref, counter = reference.Reference.of(model, params, {}), metrics.Compilations()
    return streams_lib.with_reference(opened, job, recipe, ref, steps=steps, counter=counter)


class TestOpenStreams:

  def test_counts_what_became_of_records(self, job, tiny):
    report = open_streams(job, dataclasses.replace(DPO, reference='live'), *tiny).report
    counts = {'kept': 11, 'truncated': 0, 'bad': 0, 'dropped': 1}
    held = {'kept': 3, 'truncated': 1, 'bad': 0, 'dropped': 0}
    assert report == {f'data/{k}': v for k, v in counts.items()} | {f'eval_data/{k}': v for k, v in held.items()}

  def test_caches_a_reference_unless_the_step_is_to_compute_it(self, job, tiny):
    cached, live = (open_streams(job, dataclasses.replace(DPO, reference=r), *tiny) for r in ('cached', 'live'))
    follows = open_streams(job, dataclasses.replace(DPO, sync=reference.Sync(every=1, alpha=1.0)), *tiny)
    assert all(one.needs.reference for one in (cached, live, follows))
    assert (cached.live, live.live, follows.live) == (False, True, True)
    for pull in (lambda s: next(s.training_batches((0, 0), dict))[1], lambda s: next(s.held_batches())):
      one, other = pull(cached), pull(live)
      assert np.asarray(one.ref_logps_BT)[np.asarray(one.mask_BT) > 0].max() < 0
      np.testing.assert_array_equal(one.inputs_BT, other.inputs_BT)
      assert other.ref_logps_BT is None

  def test_refuses_a_reference_that_follows_where_the_loss_reads_none(self, job, tiny):
    data = write(job.workdir.parent / 'texts.jsonl', [{'prompt': 'Once', 'completion': ' a cat'}] * 3)
    recipe = dataclasses.replace(SFT, sync=reference.Sync(every=1, alpha=1.0))
    with pytest.raises(types.UsageError, match='the loss reads no reference that could follow'):
      open_streams(dataclasses.replace(job, data=data, eval_data=''), recipe, *tiny)

  def test_computes_no_reference_for_a_loss_that_reads_none(self, job, tiny):
    data = write(job.workdir.parent / 'texts.jsonl', [{'prompt': 'Once', 'completion': ' a cat'}] * 3)
    streams = open_streams(dataclasses.replace(job, data=data, eval_data=''), SFT, *tiny)
    assert not streams.needs.reference
    assert next(streams.training_batches((0, 0), dict))[1].ref_logps_BT is None
    assert not list(job.cache_dir.glob('ref-*'))

  def test_opens_for_evaluation_alone_where_there_are_no_steps(self, job, tiny):
    recipe = dataclasses.replace(DPO, reference='live')
    streams = open_streams(dataclasses.replace(job, data='jsonl:gone.jsonl'), recipe, *tiny, steps=0)
    assert streams.train is None
    assert set(streams.report) == {'eval_data/kept', 'eval_data/truncated', 'eval_data/bad', 'eval_data/dropped'}

  @pytest.mark.parametrize('held', [False, True])
  def test_refuses_sources_of_longer_and_shorter_lists_for_a_loss_on_whole_ones(self, job, tiny, held):
    of = lambda count: {'prompt': 'Once', 'completions': [f' a {i}' for i in range(count)], 'scores': [*range(count)]}
    specs = {n: write(job.workdir.parent / f'{n}.jsonl', [of(n)] * 3) for n in (2, 4)}
    mixture, alone = f'{specs[4]},{specs[2]}', specs[4]
    job = dataclasses.replace(job, data=alone if held else mixture, eval_data=mixture if held else '')
    whole = lambda policy, ref, labels, *, state: types.LossOut(
        policy.logps_GK[:, 0] * labels['score'][:, -1], {}, state
    )
    recipe = dataclasses.replace(DPO, example_fn=feedback.ranked, loss_fn=whole)
    with pytest.raises(types.UsageError, match='the loss reads 4 responses to every prompt, but some have fewer'):
      open_streams(job, recipe, *tiny)
    streams = open_streams(
        job, dataclasses.replace(recipe, loss_fn=functools.partial(listwise.rrhf, weight=1.0)), *tiny
    )
    assert streams.train.dataset.group_size == 4


class TestStreams:

  def test_yields_the_state_to_resume_from(self, job, tiny):
    packing = dataclasses.replace(DPO.packing, groups_per_step=4)
    streams = open_streams(job, dataclasses.replace(DPO, reference='live', packing=packing), *tiny)
    from_start = [next(pulled) for pulled in [streams.training_batches((0, 0), dict)] for _ in range(5)]
    assert [state for state, _ in from_start] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    resumed = streams.training_batches((0, 2), dict)
    for state, batch in from_start[2:4]:
      again_state, again = next(resumed)
      assert again_state == state
      np.testing.assert_array_equal(again.inputs_BT, batch.inputs_BT)

  def test_holds_out_each_record_once_and_none_where_there_is_none(self, job, tiny):
    recipe = dataclasses.replace(DPO, reference='live')
    streams = open_streams(job, recipe, *tiny)
    for _ in range(2):
      assert sum(int((np.asarray(b.group_BS) >= 0).sum()) for b in streams.held_batches()) == 2 * 3
    without = open_streams(dataclasses.replace(job, eval_data=''), recipe, *tiny)
    assert list(without.held_batches()) == []


class TestShow:

  def test_ends_with_counts_and_packing(self, job):
    lines = streams_lib.show(job, DPO).splitlines()
    assert lines[-8:-4] == ['data/kept: 11', 'data/truncated: 0', 'data/bad: 0', 'data/dropped: 1']
    assert [line.split(':')[0] for line in lines[-4:]] == [
        'packing/groups',
        'packing/steps',
        'packing/slots_per_group',
        'packing/used',
    ]
    assert lines[-4] == 'packing/groups: 11'
