"""The programs that a run would compile, from shapes alone: nothing is loaded, and the mesh need not be there."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import forward
from jaxalign import needs as needs_lib
from jaxalign import opening
from jaxalign import optim
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import streams as streams_lib
from jaxalign import tracing
from jaxalign import types
from jaxalign.data import dataset
from jaxalign.data import loader
from jaxalign.data import rows as rows_lib
from jaxalign.data import tokenizers
from jaxalign.generation import buckets
from jaxalign.generation import decoding
from jaxalign.generation import next_token
from jaxalign.generation import sampling
from jaxalign.models import architecture
from jaxalign.models import experts
from jaxalign.models import lora
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rl import collect
from jaxalign.rl import credit as credit_lib
from jaxalign.rl import iterations
from jaxalign.rl import rollouts

_A_FEW = 64  # records of the built-in data, which tell what the loss is given


class Program(NamedTuple):
  """A program of a run.

  Attributes:
    name: what it does.
    lower: traces it, `jax.stages.Lowered`.
    roles: its arguments, shapes with shardings, by what they are.
    tokens: that it reads, of the whole mesh.
    model_flops: that its work takes on a device, without what is computed again.
  """

  name: str
  lower: Callable[[], Any]
  roles: Mapping[str, types.PyTree]
  tokens: int
  model_flops: float


class Abstract(NamedTuple):
  """Shapes of what a run holds.

  Attributes:
    model: of the policy.
    critic_model: of a critic with parameters of its own, or None.
    own: of a live reference, None where there is none.
    needs: of the loss.
    trained: parameters, with those of the critic.
    frozen: parameters of the base that adapters share.
    state: of the step.
    ref: what a live reference does not share.
    batch: of a step.
  """

  model: transformer.Transformer
  critic_model: transformer.Transformer | None
  own: reference.Own | None
  needs: tracing.Needs
  trained: types.PyTree
  frozen: types.PyTree
  state: step_lib.TrainState
  ref: types.PyTree
  batch: types.Batch


def of_run(
    job: recipe_lib.Job, recipe: recipe_lib.Recipe, optimizer: optim.Optimizer, *, is_data_known: bool
) -> list[Program]:
  """The programs of training: the step, and what is computed before or between steps.

  Call `Program.lower` under the mesh of the job.

  Args:
    job: names model and data, and the mesh.
    recipe: the algorithm.
    optimizer: of the run.
    is_data_known: whether the data are those of the run, which tell how many responses a row has; else a row holds one
      sequence that fills it.
  """
  tokenizer = recipe_lib.open_tokenizer(job)
  model, _ = opening.open_model(job, recipe, tokenizer)
  known = _known(job, recipe, tokenizer, model, is_data_known)
  of = _abstract(job, recipe, tokenizer, model, optimizer, *known)
  with jax.set_mesh(job.mesh):
    found = [_step(job, recipe, optimizer, of)]
    if recipe.rollouts is not None:
      if judges := list(filter(functions.is_model, recipe.rollouts.rewards)):
        said = '--reward=%s: what a model that judges takes of a device, and of time, is not planned'
        logging.log_first_n(logging.WARNING, said, 1, ', '.join(judges))
      return [*found, *_rollout(job, recipe, tokenizer, of)]
    if of.needs.reference and of.own is None:
      found.append(_cached_reference(job, of))
    if job.eval_data:
      found.append(_evaluation(job, recipe, of))
    return found


def _known(job, recipe: recipe_lib.Recipe, tokenizer, model, is_data_known: bool) -> tuple[types.Batch, tracing.Needs]:
  """A batch of shapes, and what the loss reads; raises UsageError where a run would not have room for its rows."""
  specs = job.data if is_data_known else f'{job.data.split("[")[0]}[:{_A_FEW}]'
  sets = recipe_lib.open_data(job, recipe, tokenizer, specs)
  data, packing, options = dataset.Joined(sets), recipe.packing, recipe.rollouts
  loader.check_mesh(packing, job.mesh)
  if options is not None:
    texts = streams_lib.open_texts(job, options, tokenizer, packing.row_length)
    packing = iterations.packing_of(options, packing)
    iterations.check_fit(options, data, packing, model.config.max_length, texts)
    return _sampled_batch(recipe, options, packing)
  most = packing.max_responses or 1
  if is_data_known:
    most = recipe_lib.open_loader(job, recipe, sets, specs).shape.max_responses
  needs = streams_lib.needs_of(recipe, data)
  live = streams_lib.is_live(recipe, needs)
  shape = rows_lib.Shape(packing.micro_batches, packing.rows, packing.row_length, most, packing.share_prompts)
  return jax.eval_shape(lambda: rows_lib.empty(data, shape, packing.rows, needs.reference and not live)), needs


def _sampled_batch(recipe, options: rollouts.Options, packing: loader.Packing) -> tuple[types.Batch, tracing.Needs]:
  """The same of what is sampled."""
  needs = needs_lib.of_rollouts(recipe, options)
  of_responses, of_tokens = needs_lib.labels_of(recipe, options)
  names = {*of_tokens, 'sampler_logps'} | ({'old_logps'} if options.updates > 1 else set())
  tokens = packing.micro_batches, packing.rows, packing.row_length
  responses = packing.micro_batches, packing.rows, packing.max_responses or 1
  number = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
  batch = types.Batch(
      **{f'{name}_BT': number(tokens) for name in ('inputs', 'targets', 'positions', 'segments', 'responses')},
      mask_BT=number(tokens, jnp.float32),
      group_BS=number(responses),
      slot_BS=number(responses),
      labels_BS={name: number(responses, jnp.float32) for name in of_responses},
      labels_BT={name: number(tokens, jnp.float32) for name in names | ({'is_text'} if options.texts else set())},
      branches_BT=number(tokens) if packing.share_prompts and options.samples > 1 else None,
      num_groups=max(1, packing.rows * (packing.max_responses or 1) // options.samples),
      group_size=options.samples,
  )
  return batch, needs


def _abstract(job, recipe, tokenizer, model, optimizer: optim.Optimizer, batch, needs: tracing.Needs) -> Abstract:
  mesh = job.mesh
  critic_model, _ = opening.open_critic(job, recipe, tokenizer)
  params = transformer.abstract_params(model, mesh)
  trained, frozen = lora.split(params) if model.lora is not None else (params, {})
  if critic_model is not None:
    critic = transformer.abstract_params(critic_model, mesh, recipe.critic_rules)
    trained = trained | {forward.CRITIC: lora.split(critic)[0] if critic_model.lora is not None else critic}
  own, ref, options = None, {}, recipe.rollouts
  if options is not None and options.replays(model):
    batch = batch.replace(experts_BTLk=experts.shape_of(model.config, batch.inputs_BT.shape))
  compared = needs.reference or (options is not None and bool(options.credit.reads & credit_lib.OF_REFERENCE))
  if compared and (options is not None or streams_lib.is_live(recipe, needs)):
    own = recipe_lib.reference_of(recipe, mesh, model)
    if model.lora is None and recipe.sync is None:
      ref = transformer.abstract_params(own.model, mesh, recipe.reference_rules)
      ref = jax.tree.map(lambda x: x.update(dtype=own.dtype or x.dtype), ref)
  of_run = needs.state, recipe.sync is not None, optimizer.memory
  state = step_lib.abstract_state(mesh, trained, optimizer.tx, job.seed, *of_run)
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  batch = jax.tree.map(place, batch, sharding.batch_shardings(mesh, batch, stacked=True))
  return Abstract(model, critic_model, own, needs, trained, frozen, state, ref, batch)


def _roles(of: Abstract, *names: str) -> dict[str, types.PyTree]:
  """What a program reads of a run, by what it is."""
  policy, critic = forward.divided(of.state.params)
  roles = {
      'parameters': policy,
      'critic': critic or {},
      'frozen base': of.frozen,
      'optimizer': of.state.opt_state,
      'reference': of.ref or of.state.reference or {},
      'batch': of.batch,
  }
  return {name: roles[name] for name in names if jax.tree.leaves(roles[name])}


RESIDENT = ('parameters', 'critic', 'frozen base', 'optimizer', 'reference')  # what a run holds all the time


def resident(programs: list[Program]) -> Mapping[str, types.PyTree]:
  """What a run holds all the time, by what it is: the roles of its step."""
  return {name: tree for name, tree in programs[0].roles.items() if name in RESIDENT}


def _forward(of: Abstract, mesh, *models: transformer.Transformer | None, head: bool = True) -> float:
  """Model FLOPs of a device for a pass forward of each over all tokens of a step."""
  count = lambda one: architecture.flops_per_token(one.config, of.batch.inputs_BT.shape[-1], head=head) / 3
  return sum(map(count, filter(None, models))) * math.prod(of.batch.inputs_BT.shape) / mesh.size


def _step(job, recipe, optimizer: optim.Optimizer, of: Abstract) -> Program:
  options = recipe.rollouts
  ref_model = of.own.model if of.own is not None else None
  objective = needs_lib.bind(recipe, of.model, of.needs, ref_model, of.critic_model)
  max_kl = options.max_kl if options is not None else None
  step = step_lib.jitted(step_lib.make_step(objective, optimizer, recipe.sync, max_kl), job.mesh, of.state)
  tokens, live = math.prod(of.batch.inputs_BT.shape), of.own is not None and of.needs.reference
  flops = needs_lib.flops_per_token(of.needs, of.model, of.critic_model, recipe.packing.row_length, live=live)
  return Program(
      'step',
      lambda: step.lower(of.state, of.frozen, of.batch, of.ref or None),
      _roles(of, *RESIDENT, 'batch'),
      tokens,
      flops * tokens / job.mesh.size,
  )


def _cached_reference(job, of: Abstract) -> Program:
  model = reference.model_of(of.model)
  run = jax.jit(functools.partial(forward.ref_logps, model=model), out_shardings=sharding.named(job.mesh))
  whole = lora.join(forward.divided(of.trained)[0], of.frozen)
  kept = {name: x for name, x in whole.items() if name not in lora.HEAD} if model.lora is None else whole
  params = lora.split(kept)[1] if of.frozen and model.lora is None else kept
  tokens = math.prod(of.batch.inputs_BT.shape)
  batch = dataclasses.replace(of.batch, ref_logps_BT=None)
  return Program(
      'reference',
      lambda: run.lower(params, batch),
      {'parameters': params, 'batch': batch},
      tokens,
      _forward(of, job.mesh, model),
  )


def _evaluation(job, recipe, of: Abstract) -> Program:
  model = transformer.without_dropout(of.model)
  ref_model = of.own.model if of.own is not None else None
  objective = needs_lib.bind(recipe, model, of.needs, ref_model)
  run = jax.jit(step_lib.make_eval_step(objective), out_shardings=sharding.named(job.mesh))
  args = of.state.params, of.frozen, of.batch, of.state.loss_state, of.ref or of.state.reference or None
  return Program(
      'evaluation',
      lambda: run.lower(*args),
      _roles(of, 'parameters', 'frozen base', 'reference', 'batch'),
      math.prod(of.batch.inputs_BT.shape),
      _forward(of, job.mesh, model, ref_model if of.needs.reference else None, head=of.needs.writes),
  )


def _rollout(job, recipe, tokenizer: tokenizers.Tokenizer, of: Abstract) -> Iterator[Program]:
  """Reading prompts, writing a token of every row, and what the training program makes of what was written."""
  options, mesh = recipe.rollouts, job.mesh
  prompt = recipe.packing.row_length - options.longest
  if prompt < 1:
    raise types.UsageError(
        f'loader.Packing.row_length = {recipe.packing.row_length}: it has no room for a prompt and a response of'
        f' {options.longest} tokens'
    )
  model = sampling.prepared(of.model)
  sizes = buckets.Sizes.of([prompt], [options.max_new_tokens] * options.prompts, options.samples, options.rows)
  rule = next_token.Rule(options.temperature, options.top_k, options.top_p, options.min_p)
  told = options.cache_dtype, options.temperature, options.replays(model)
  program = decoding.Program((model,), rule, (tokenizer.eos_id,), None, *told)
  policy = lora.join(forward.divided(of.trained)[0], of.frozen)
  params = _as_prepared(model, policy, sampling.as_pairs(options.sampling_rules))
  counts = np.zeros((sizes.together, sizes.longest[0]), np.int32), np.zeros(sizes.together, np.int32)
  ids, lengths = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in counts)
  of_token = lambda length, head: architecture.flops_per_token(model.config, length, head=head) / 3 / mesh.size
  of_logits = of_token(1, True) - of_token(1, False)  # a prompt's last token alone has any
  yield Program(
      'prefill',
      lambda: decoding.read.lower(program, (params,), (ids,), (lengths,)),
      {'weights for sampling': params},
      math.prod(ids.shape),
      math.prod(ids.shape) * of_token(sizes.longest[0], False) + sizes.together * of_logits,
  )
  rows = _placed(lambda: decoding.start.lower(program, sizes.rows, sizes.most, sizes.new), sizes, program)
  number, ended = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((sizes.rows,), bool)
  yield Program(
      'decode',
      lambda: decoding.write.lower(program, (params,), rows, ended, number, number),
      {'weights for sampling': params, 'kv cache': rows.readings[0].cache},
      sizes.rows,
      sizes.rows * of_token(sizes.most[0], True),
  )
  if options.annotations:
    yield _annotation(job, recipe, of, policy)


def _annotation(job, recipe, of: Abstract, policy: types.PyTree) -> Program:
  models = rollouts.Models(
      transformer.without_dropout(of.model),
      of.critic_model and transformer.without_dropout(of.critic_model),
      of.own.model if of.own is not None else None,
  )
  run = jax.jit(collect.annotate_fn(recipe.rollouts, models), out_shardings=sharding.named(job.mesh))
  critic = of.state.params.get(forward.CRITIC)
  ref = lora.join(of.ref or of.state.reference or {}, of.frozen)
  params = rollouts.Params(policy, None if critic is None else lora.join(critic, of.frozen), ref or None, (), 0)
  batch = dataclasses.replace(of.batch, labels_BS={}, labels_BT={})
  _, critic_model, ref_model = models.making(recipe.rollouts.annotations)
  writes = critic_model is not None and not critic_model.config.score_outputs
  return Program(
      'annotation',
      lambda: run.lower(params, batch),
      _roles(of, 'parameters', 'critic', 'frozen base', 'reference') | {'batch': batch},
      math.prod(batch.inputs_BT.shape),
      _forward(of, job.mesh, of.model, ref_model) + _forward(of, job.mesh, critic_model, head=writes),
  )


def _as_prepared(model: transformer.Transformer, params: types.PyTree, rules: sharding.Pairs | None) -> types.PyTree:
  """Parameters as `decoding.prepare` gives them."""
  made, mesh = jax.eval_shape(lambda x: decoding.prepare(model, x, rules), params), jax.sharding.get_mesh()
  if model.apart:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh)), made)
  placed = params if rules is None else transformer.abstract_params(model, mesh, dict(rules))
  return jax.tree.map(lambda x, of: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of.sharding), made, placed)


def _placed(lower: Callable[[], Any], sizes: buckets.Sizes, program: decoding.Program) -> decoding.Rows:
  """The rows that sampling begins with, where the program that makes them puts them."""
  where = lower().compile().output_shardings
  made = jax.eval_shape(lambda: decoding.start(program, sizes.rows, sizes.most, sizes.new))
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), made, where)
