"""Adam with moments in fewer bits, against Adam in float64 and against the levels counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import checkpoint
from jaxalign import moments
from jaxalign import optim
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import lora as lora_lib
from jaxalign.models import transformer

B1, B2, EPS = 0.9, 0.999, 1e-8
SHAPE = 32, 256  # above `moments.SMALL`; blocks are rows
ALL = np.arange(2**16, dtype=np.uint32)  # every chance there is
# The number that a code stands for, of a block whose largest is 1: 8 steps in each power of 2, less that of code 0.
LEVELS = {
    kind: np.array([2.0 ** (code // 8) * (1 + code % 8 / 8) - 1 for code in range(most + 1)])
    for kind, most in (('int8', 127), ('uint8', 255))
}
LEVELS = {kind: levels / levels[-1] for kind, levels in LEVELS.items()}
LIKE = {
    'int8': moments.Blocks(jnp.zeros(SHAPE, 'int8'), jnp.zeros((32, 1))),
    'uint8': moments.Blocks(jnp.zeros(SHAPE, 'uint8'), jnp.zeros((32, 1))),
    'bfloat16': jnp.zeros(SHAPE, 'bfloat16'),
}
rounded = jax.jit(lambda x, like, chance: moments.wide(moments.rounded(x, like, chance)))


def heavy_tailed(kind, seed=0):
  """Numbers over many powers of 10, of both signs where the kind has one."""
  rng = np.random.default_rng(seed)
  x = np.exp(rng.normal(0, 4, SHAPE)) * rng.choice([-1, 1], SHAPE)
  return (np.abs(x) if kind == 'uint8' else x).astype(np.float32)


def adam(grads):
  """Steps, first and second moments of Adam (Kingma and Ba, 2015, Alg. 1), float64."""
  mu = nu = 0.0
  for t, g in enumerate(grads, 1):
    mu, nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g * g
    yield mu / (1 - B1**t) / (np.sqrt(nu / (1 - B2**t)) + EPS), mu, nu


def made(kind, **more):
  none = lambda params: jax.tree.map(lambda _: False, params)
  return moments.scale_by_adam(B1, B2, EPS, kind=kind, is_wide=none, **more)


class TestWide:

  @pytest.mark.parametrize('kind', LEVELS)
  def test_reads_each_code_as_its_level(self, kind):
    codes = np.arange(len(LEVELS[kind])).astype(kind)
    for sign in (1, -1) if kind == 'int8' else (1,):
      blocks = moments.Blocks(jnp.asarray(sign * codes, kind), jnp.full((1,), 3.0))
      np.testing.assert_allclose(moments.wide(blocks), 3 * sign * LEVELS[kind], rtol=2e-7)


class TestRounded:

  @pytest.mark.parametrize('kind', LIKE)
  @pytest.mark.parametrize('chance', [0, 1, 30_000, 2**16 - 1])
  def test_errs_by_no_more_than_is_said(self, kind, chance):
    x = heavy_tailed(kind)
    found = np.asarray(rounded(x, LIKE[kind], jnp.full(SHAPE, chance, jnp.uint32)))
    if kind == 'bfloat16':
      bound = np.abs(x) / 2**7
    else:
      e = {'int8': 15, 'uint8': 31}[kind]
      bound = (np.abs(x) + np.abs(x).max(axis=1, keepdims=True) / (2**e * 15 / 8 - 1)) / 8
    assert (np.abs(found - x) <= bound * (1 + 1e-6)).all()
    assert np.abs(found - x).max() > 0

  @pytest.mark.parametrize('kind', LIKE)
  def test_is_right_in_the_mean_over_all_chances(self, kind):
    x, like = heavy_tailed(kind)[:2], jax.tree.map(lambda whole: whole[:2], LIKE[kind])
    each = jax.jit(jax.vmap(lambda chance: rounded(x, like, jnp.full(x.shape, chance, jnp.uint32))))
    mean = np.mean(np.concatenate([np.asarray(each(part), np.float64) for part in np.split(ALL, 16)]), axis=0)
    # Of a distance between levels, an eighth of x and of the lowest, 2^-16 is lost, and what float32 has not of z.
    e = {'int8': 15, 'uint8': 31}.get(kind)
    unit = 0 if e is None else np.abs(x).max(axis=1, keepdims=True) / (2**e * 15 / 8 - 1)
    wrong = np.abs(mean - x) > 2**-18 * (np.abs(x) + unit)
    if kind == 'uint8':
      wrong &= x > unit / 8  # smaller ones are never 0
    assert not wrong.any()

  @pytest.mark.parametrize('kind', LEVELS)
  def test_keeps_levels_and_zeros_whatever_the_chance(self, kind):
    codes = np.arange(len(LEVELS[kind]))
    x, like = LEVELS[kind].astype(np.float32)[None], moments.Blocks(jnp.zeros((1, len(codes)), kind), jnp.zeros((1, 1)))
    # A level is met to the precision of float32: by no more than half of a step it may be off.
    low = np.asarray(moments.rounded(x, like, jnp.full(x.shape, 2**15, jnp.uint32)).codes)
    np.testing.assert_array_equal(low[0], codes)
    zeros = moments.rounded(jnp.zeros((2, 3)), moments.Blocks(jnp.zeros((2, 3), kind), None), jnp.full((2, 3), 65535))
    np.testing.assert_array_equal(moments.wide(zeros), 0)

  def test_never_makes_a_second_moment_nothing(self):
    x = jnp.asarray([[1.0, 1e-13, 1e-30, 0.0]])
    found = moments.rounded(
        x, moments.Blocks(jnp.zeros((1, 4), 'uint8'), jnp.zeros((1, 1))), jnp.zeros((1, 4), 'uint32')
    )
    np.testing.assert_array_equal(found.codes, [[255, 1, 1, 0]])


class TestScaleByAdam:

  @pytest.mark.parametrize('kind,mean,most', [('float32', 2e-5, 1e-4), ('bfloat16', 0.01, 0.2), ('int8', 0.15, 5.0)])
  def test_follows_adam(self, kind, mean, most):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(50, *SHAPE)) * np.exp(rng.normal(size=SHAPE))
    tx = made(kind)
    state, update = tx.init({'w': jnp.zeros(SHAPE)}), jax.jit(tx.update)
    exact = list(adam(grads))
    for t, (g, (wanted, _, _)) in enumerate(zip(grads, exact)):
      found, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
      off = np.abs(found['w'] - wanted)
      # The first is of moments that nothing has rounded.
      assert off.max() < (1e-4 if t == 0 else most)
      assert off.mean() < mean * np.abs(wanted).mean()
    _, mu, nu = exact[-1]
    kept = moments.wide(state.mu['w']), moments.wide(state.nu['w'])
    assert abs(np.mean(kept[1] / nu) - 1) < 0.01
    assert np.std(kept[1] / nu) < {'float32': 1e-5, 'bfloat16': 0.03, 'int8': 0.25}[kind]
    assert np.abs(kept[0] - mu).mean() < mean * np.abs(mu).mean()

  def test_gets_small_again_where_rounding_to_the_nearest_stays(self):
    """Minimises |w - w*| (its gradient is a sign) behind ten steps whose gradients were 30 times as large."""
    far = jnp.full((64, 64), 10.0)

    def travelled(tx):
      def one(carry, t):
        w, state = carry
        step, state = tx.update({'w': jnp.sign(w - far) * jnp.where(t < 10, 30.0, 1.0)}, state)
        return (w - 1e-3 * step['w'], state), None

      start = jnp.zeros((64, 64)), tx.init({'w': jnp.zeros((64, 64))})
      (w, state), _ = jax.jit(lambda: jax.lax.scan(one, start, jnp.arange(1500)))()
      return float(w.mean()), float(moments.wide(state.nu['w']).mean())

    exact, of_kind = made('float32'), {kind: travelled(made(kind)) for kind in ('bfloat16', 'int8')}

    def nearest(grads, state):
      step, new = exact.update(grads, jax.tree.map(lambda x: x.astype(jnp.result_type(x, 'float32')), state))
      return step, new._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16), new.nu))

    def init(params):
      state = exact.init(params)
      return state._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.nu))

    wanted = travelled(exact)
    stalled = travelled(optax.GradientTransformation(init, _counted(nearest)))
    assert stalled[1] > 2 * wanted[1]
    assert stalled[0] < 0.85 * wanted[0]
    for kind, far_off in (('bfloat16', 0.01), ('int8', 0.03)):
      assert of_kind[kind] == pytest.approx(wanted, rel=far_off)

  @pytest.mark.parametrize('kind,size', [('float32', 8), ('bfloat16', 4), ('int8', 2 + 8 / 256)])
  def test_takes_the_bytes_a_parameter_that_are_said(self, kind, size):
    params = {'w': jnp.zeros((64, 256)), 'norm': jnp.zeros((64, 256)), 'small': jnp.zeros((63, 65))}
    opt = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-3), moments=kind)
    state = opt.tx.init(params)[1]
    of = lambda name: sum(x.nbytes for x in jax.tree.leaves((state.mu[name], state.nu[name])))
    assert of('w') == size * 64 * 256
    assert (of('norm'), of('small')) == (8 * 64 * 256, 8 * 63 * 65)

  @pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
  def test_draws_anew_at_each_step_and_the_same_again(self, kind):
    tx, g = made(kind), {'w': jnp.asarray(heavy_tailed('int8'))}
    fresh = tx.init(g)
    at = lambda count: jax.tree.leaves(tx.update(g, fresh._replace(count=jnp.int32(count)))[1]._replace(count=None))
    same = lambda a, b: all((x == y).all() for x, y in zip(a, b))
    assert same(at(3), at(3))
    assert not same(at(3), at(4))


def _counted(update):
  """With the count in float32 made whole again."""

  def whole(grads, state, params=None):
    step, new = update(grads, state)
    return step, new._replace(count=new.count.astype(jnp.int32))

  return whole


class TestAdamw:

  @pytest.mark.parametrize(
      ('bound', 'said'),
      [
          ({'moments': 'int4'}, "optim.adamw.moments = 'int4': it is one of float32, bfloat16, int8"),
          ({'memory': 'host'}, "optim.adamw.memory = 'host': it is one of device, pinned_host"),
          (
              {'memory': 'pinned_host', 'moments': 'int8'},
              "memory = 'pinned_host': with moments 'float32' or 'bfloat16'",
          ),
      ],
  )
  def test_refuses_by_name(self, bound, said):
    with pytest.raises(types.UsageError, match=said):
      optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-3), **bound)


SHAPES = {
    'layers': {
        'gate': ((2, 64, 256), ('layers', 'embed', 'mlp')),
        'down': ((2, 256, 64), ('layers', 'mlp', 'embed')),
        'norm': ((2, 64), ('layers', 'norm')),
    },
    'embed': ((128, 64), ('vocab', 'embed')),
}


def laid_out(mesh, kind, memory='device'):
  """Shapes of parameters, an optimizer of `kind`, and its state's shapes and shardings."""
  place = lambda of: jax.ShapeDtypeStruct(of[0], jnp.float32, sharding=sharding.named(mesh, *of[1]))
  params = jax.tree.map(place, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
  schedule = functools.partial(optim.constant, lr=1e-2)
  opt = optim.adamw(10, schedule=schedule, clip_norm=0.0, moments=kind, memory=memory)
  return params, opt, step_lib.abstract_state(mesh, params, opt.tx, 0, memory=memory)


def two_updates(mesh, kind, memory='device'):
  """Steps and moments of two updates on a mesh, and the program's text."""
  shapes, opt, abstract = laid_out(mesh, kind, memory)
  where = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
  out = jax.tree.map(lambda x: x.sharding, shapes), where
  rng = np.random.default_rng(0)
  draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32) / 1e2, x.sharding)
  params, grads = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
  state = jax.jit(opt.tx.init, out_shardings=where)(params)
  with jax.set_mesh(mesh):
    update = jax.jit(opt.tx.update, out_shardings=out, donate_argnums=1).lower(grads, state, params).compile()
  for _ in range(2):
    steps, state = update(grads, state, params)
  jax.tree.map(lambda x, at: np.testing.assert_equal(x.sharding.spec, at.spec), state, where)
  return jax.device_get((steps, state)), update.as_text()


class TestSharding:

  @pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
  def test_changes_nothing_and_moves_no_moment(self, kind):
    alone, _ = two_updates(sharding.make_mesh('', devices=jax.devices()[:1]), kind)
    found, text = two_updates(sharding.make_mesh('fsdp:4,tensor:2'), kind)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)
    jax.tree.map(near, found[0], alone[0])
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(alone[1]), strict=True):
      # A moment that is a rounding error apart may be rounded to the next number.
      assert (np.asarray(a, np.float32) != np.asarray(b, np.float32)).mean() < 1e-3 if a.ndim else a == b
    for moved in ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter'):
      assert f' {moved}' not in text

  def test_lays_blocks_like_their_parameter(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    params, _, state = laid_out(mesh, 'int8')
    adam = state.opt_state[1]
    for name, largest, part in (('gate', (2, 64, 1), (2, 16, 1)), ('down', (2, 1, 64), (2, 1, 16))):
      for moment, dtype in ((adam.mu, jnp.int8), (adam.nu, jnp.uint8)):
        one = moment['layers'][name]
        assert (one.codes.shape, one.codes.dtype) == (params['layers'][name].shape, dtype)
        assert one.codes.sharding == params['layers'][name].sharding
        assert (one.largest.shape, one.largest.sharding.shard_shape(largest)) == (largest, part)
    assert adam.mu['layers']['norm'].dtype == jnp.float32

  def test_lays_blocks_like_adapters(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    config = architecture.Config(64, 2, 64, 4, 2, 16, 128, 64)
    model = transformer.build(config, mesh, length=16, lora=lora_lib.Lora(rank=32))
    params, _ = lora_lib.split(transformer.abstract_params(model, mesh))
    opt = optim.adamw(10, schedule=functools.partial(optim.constant, lr=1e-2), moments='int8')
    mu = step_lib.abstract_state(mesh, params, opt.tx, 0).opt_state[1].mu
    kept = jax.tree.leaves(mu, is_leaf=moments.is_blocks)
    assert sum(map(moments.is_blocks, kept)) > 4
    for one, x in zip(kept, jax.tree.leaves(params), strict=True):
      assert (one.codes if moments.is_blocks(one) else one).sharding == x.sharding


class TestCheckpoints:

  @pytest.mark.parametrize('kind,memory', [('int8', 'device'), ('bfloat16', 'pinned_host')])
  def test_hold_every_bit_for_any_mesh(self, kind, memory, tmp_path):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    shapes, opt, abstract = laid_out(mesh, kind, memory)
    draw = lambda x: jax.device_put(np.random.default_rng(0).normal(size=x.shape).astype(np.float32), x.sharding)
    begin = functools.partial(step_lib.init_state, tx=opt.tx, seed=0)
    state = jax.jit(begin, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(jax.tree.map(draw, shapes))
    state = state.replace(opt_state=opt.tx.update(state.params, state.opt_state, state.params)[1])
    store = checkpoint.Store(tmp_path, checkpoint.Options())
    store.save(state, 3, {'epoch': 0, 'step': 3}, {})
    store.wait()
    for text in ('fsdp:4,tensor:2', 'fsdp:8'):
      wanted = laid_out(sharding.make_mesh(text), kind, memory)[2]
      found, _ = store.restore(3, wanted)
      jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
      jax.tree.map(
          lambda x, like: np.testing.assert_equal(x.sharding, like.sharding), found.opt_state, wanted.opt_state
      )
      jax.tree.map(lambda x, like: np.testing.assert_equal(x.dtype, like.dtype), found.opt_state, wanted.opt_state)
    store.close()


def put_away(state):
  """A state with moments in the memory of the host."""
  place = lambda x: jax.device_put(x, jax.memory.Space.Host)
  return state._replace(mu=jax.tree.map(place, state.mu), nu=jax.tree.map(place, state.nu))


class TestOnHost:

  @pytest.mark.parametrize('text', ['', 'fsdp:4,tensor:2'])
  def test_is_the_same_adam(self, text):
    mesh = sharding.make_mesh(text, devices=jax.devices()[: 8 if text else 1])
    wanted, _ = two_updates(mesh, 'float32')
    found, _ = two_updates(mesh, 'float32', 'pinned_host')
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found, wanted)

  def test_is_where_it_is_said_to_be(self):
    _, _, state = laid_out(sharding.make_mesh('fsdp:8'), 'bfloat16', 'pinned_host')
    adam = state.opt_state[1]
    assert {x.sharding.memory_kind for x in jax.tree.leaves((adam.mu, adam.nu))} == {'pinned_host'}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {'device'}

  def test_draws_other_chances_for_each_layer_of_a_stack(self):
    tx = made('bfloat16', is_stacked=optim.stacked)
    g = {'layers': jnp.tile(jnp.asarray(heavy_tailed('int8'))[None], (2, 1, 1))}
    mu = jax.jit(tx.update)(g, put_away(tx.init(g)))[1].mu['layers']
    assert (mu[0] != mu[1]).mean() > 0.1

  def test_stays_as_it_was_where_a_step_is_not_good(self):
    tx = made('float32', is_stacked=optim.stacked)
    g = {'layers': jnp.ones((2, 3)), 'head': jnp.ones(3)}
    good = jax.jit(tx.update)(g, put_away(tx.init(g)), good=True)[1]
    bad = jax.jit(tx.update)(jax.tree.map(lambda x: x * jnp.nan, g), good, good=False)[1]
    jax.tree.map(np.testing.assert_array_equal, (bad.mu, bad.nu), (good.mu, good.nu))

  def test_is_refused_where_there_is_no_such_memory(self, monkeypatch):
    monkeypatch.setattr(sharding, '_memories', lambda device: ['device'])
    with pytest.raises(types.UsageError, match="optim.adamw.memory = 'pinned_host': cpu devices have device memory"):
      laid_out(sharding.make_mesh('fsdp:8'), 'float32', 'pinned_host')
