"""Rewards that are functions of a user's own file: how they are found, called, refused and combined."""

import asyncio
import functools
import math
import sys
import threading

import numpy as np
import pytest

from jaxalign import types
from jaxalign.rewards import calling
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import panels

MINE = """
import asyncio
import mine_helper

def length(responses):
  return [len(text) for text in responses]

def right(responses, answer, **rest):
  print('judging', sorted(rest))
  return [None if a is None else float(a == text) for a, text in zip(answer, responses)]

def scaled(responses, answer=None, *, by=1.0, plus=0):
  return [by * len(text) + plus for text in responses]

async def later(responses, prompts):
  await asyncio.sleep(0)
  return [mine_helper.of(prompt, text) for prompt, text in zip(prompts, responses)]

def by_batch(responses):
  if len(responses) > 1:
    raise RuntimeError('of several')
  return [0.0]

def inverse(responses):
  return [_over(len(text)) for text in responses]

def _over(n):
  return 1 / n

def deep(responses):
  return mine_helper.of(None, responses)

def odd(responses, what):
  return {'short': [1.0], 'number': 1.0, 'text': 'ab', 'dict': {0: 1.0, 1: 1.0}}.get(what[0]) or [0.5, eval(what[0])]

NUMBER = 3
class Thing:
  def method(self, responses):
    return [7.0] * len(responses)
thing = Thing()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """The path of a user's file, with a module beside it."""
  monkeypatch.setattr(sys, 'path', sys.path[:])
  (tmp_path / 'mine_helper.py').write_text('of = lambda prompt, text: len(prompt) + 10 * len(text)\n')
  (tmp_path / 'mine.py').write_text(MINE)
  yield str(tmp_path / 'mine.py')
  sys.modules.pop('mine_helper', None)


def responses(*texts, **fields):
  where = [f'd.jsonl:{i + 1}' for i in range(len(texts))]
  return functions.Responses(['p' * (i + 1) for i in range(len(texts))], texts, fields, where)


def judged(spec, given):
  reward = functions.parse(spec)
  with panels.Panel([reward]) as panel:
    return panel(given)[reward.name].values.tolist()


class TestParse:

  @pytest.mark.parametrize(
      ('written', 'weight', 'value'),
      [
          ('scaled', 1.0, 2.0),
          ('scaled:0.5', 0.5, 2.0),
          ('scaled:-2', -2.0, 2.0),
          ('scaled(by=3)', 1.0, 6.0),
          ('scaled(by=3, plus=-1):1e-1', 0.1, 5.0),
          ('scaled():2', 2.0, 2.0),
          ('thing.method', 1.0, 7.0),
      ],
  )
  def test_reads_function_options_and_weight(self, mine, written, weight, value):
    reward = functions.parse(f'{mine}:{written}')
    assert reward.weight == weight
    assert judged(f'{mine}:{written}', responses('ab')) == [value]
    assert (reward.processes, reward.timeout) == (0, None)

  def test_reads_how_it_runs(self, mine):
    reward = functions.parse(f'{mine}:scaled(processes=3, by=2, timeout=0.5)')
    assert (reward.processes, reward.timeout, reward.target) == (3, 0.5, (mine, 'scaled', {'by': 2}))
    assert functions.parse(f'{mine}:scaled(timeout=1)').processes == 1

  def test_finds_modules_in_the_current_folder(self, mine, tmp_path, monkeypatch):
    (tmp_path / 'mine_by_import.py').write_text('def one(responses):\n  return [1] * len(responses)\n')
    monkeypatch.chdir(tmp_path)
    assert judged('mine_by_import:one', responses('a', 'b')) == [1.0, 1.0]
    assert judged('jaxalign.rewards.rules:vader', responses('the cat')) == [0.0]

  @pytest.mark.parametrize(
      ('spec', 'said'),
      [
          ('mine', 'write MODULE:FUNCTION'),
          ('{mine}', 'write MODULE:FUNCTION'),
          ('{mine}:length:much', "could not convert string to float: 'much'"),
          ('{mine}:length:nan', 'the weight nan is not finite'),
          ('{mine}:length:', 'could not convert'),
          ('{mine}:absent', 'mine.py has no absent; write MODULE:FUNCTION'),
          ('{mine}:NUMBER', 'NUMBER is no function but a int'),
          ('{mine}:length(by=2)', 'length has no option by; it has responses'),
          ('{mine}:scaled(2)', '(2) is not (option=value, ...)'),
          ('{mine}:scaled(by=two)', 'by=two has no literal value (text is quoted)'),
          ('{mine}:scaled(by=)', 'invalid syntax'),
          ('{mine}:scaled(processes=-1)', 'processes=-1: it is a whole number from 0 on'),
          ('{mine}:scaled(timeout=0)', 'timeout=0: it is a number of seconds above 0'),
          ('nowhere/mine.py:length', 'there is no file nowhere/mine.py'),
          ('no_such_module:length', "No module named 'no_such_module'; the current folder and PYTHONPATH are searched"),
          ('{folder}:nan', 'is a directory, behind which a weight may stand, and nan is no finite number'),
          ('{broken}:length', 'ZeroDivisionError: division by zero'),
      ],
  )
  def test_says_what_is_wrong(self, mine, tmp_path, spec, said):
    broken = tmp_path / 'broken.py'
    broken.write_text('x = 1 / 0\n')
    spec = spec.format(mine=mine, broken=broken, folder=tmp_path)
    with pytest.raises(types.UsageError) as caught:
      functions.parse(spec)
    assert str(caught.value).startswith(f'--reward={spec}: ')
    assert said in str(caught.value)


class TestParseOfModels:

  def test_reads_directories_options_and_weight(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('runs/rm', 'a+b', 'rm1'):
      (tmp_path / name).mkdir(parents=True)
    of = functions.parse
    assert of('runs/rm') == modelled.Model('runs/rm', ('runs/rm',))
    assert of('runs/rm:-0.5') == modelled.Model('runs/rm', ('runs/rm',), -0.5)
    name = "runs/rm(beta=0.1, dtype='bfloat16')"
    assert of(f'{name}:2') == modelled.Model(name, ('runs/rm',), 2.0, beta=0.1, dtype='bfloat16')
    assert of('a+b').directories == ('a+b',)
    assert of('runs/rm+rm1') == modelled.Model('runs/rm+rm1', ('runs/rm', 'rm1'), how='mean')
    assert of("runs/rm+rm1(how='uncertainty', penalty=2):3").weight == 3.0

  @pytest.mark.parametrize(
      ('spec', 'said'),
      [
          ('nowhere/rm', 'there is no directory nowhere/rm; write MODULE:FUNCTION'),
          ('{rm}+nowhere', 'there is no directory nowhere; write'),
          ('{rm}:', 'could not convert'),
          ('{rm}:1e999', 'the weight inf is not finite'),
          (
              '{rm}(gamma=1)',
              'a model has no option gamma; it has beta, reduce, output, dtype, mesh, how, penalty, centre',
          ),
          ("{rm}(beta='1')", "beta='1': it is a number"),
          ("{rm}(reduce='max')", "reduce='max': it is one of min, mean, last, product"),
          ('{rm}(output=-1)', 'output=-1: it is a whole number from 0 on'),
          ("{rm}(dtype='int8')", "dtype='int8': it is one of float32, bfloat16, float16"),
          ("{rm}(how='worst')", 'how is of several models, A+B'),
          ("{rm}+{rm}(how='best')", "how='best': it is one of mean, worst, uncertainty"),
          ('{rm}+{rm}(penalty=0.5)', "penalty is of how='uncertainty'"),
      ],
  )
  def test_says_what_is_wrong(self, tmp_path, spec, said):
    spec = spec.format(rm=tmp_path)
    with pytest.raises(types.UsageError) as caught:
      functions.parse(spec)
    assert str(caught.value).startswith(f'--reward={spec}: ')
    assert said in str(caught.value)


class TestPanel:

  def test_gives_each_function_what_it_names(self, mine, capsys):
    given = responses('a', 'bb', 'c', answer=['a', 'b', None], other=[1, 2, 3])
    assert judged(f'{mine}:length', given) == [1.0, 2.0, 1.0]
    assert np.array_equal(judged(f'{mine}:right', given), [1.0, 0.0, math.nan], equal_nan=True)
    assert judged(f'{mine}:later', given) == [11.0, 22.0, 13.0]
    out, err = capsys.readouterr()
    assert out == '' and "judging ['other', 'prompts']" in err

  def test_keeps_an_option_where_a_column_has_its_name(self, mine):
    assert judged(f'{mine}:scaled(by=4)', responses('ab', by=[9])) == [8.0]

  def test_gives_token_ids_where_there_are_some(self):
    count = functions.Reward('count', lambda ids: list(map(len, ids)))
    plain = responses('a', 'b')
    with panels.Panel([count]) as panel:
      given = functions.Responses(plain.prompts, plain.responses, {}, plain.where, ids=[[1, 2], []])
      assert panel(given)['count'].values.tolist() == [2.0, 0.0]
      with pytest.raises(
          types.RunError, match='reward count, d.jsonl:1 to d.jsonl:2: it wants `ids`, and there is only'
      ):
        panel(plain)

  def test_leaves_to_a_wrapper_what_it_binds(self):
    def scaled(responses, by):
      return [by * len(text) for text in responses]

    bound = functools.wraps(scaled)(lambda *args, **kwargs: scaled(*args, **({'by': 3} | kwargs)))
    with panels.Panel([functions.Reward('bound', bound)]) as panel:
      assert panel(responses('ab'))['bound'].values.tolist() == [6.0]

  def test_keeps_values_by_name(self, mine):
    rewards = [functions.parse(f'{mine}:{name}') for name in ('length', 'scaled(by=2):0.5')]
    with panels.Panel(rewards) as panel:
      found = panel(responses('a', 'bb'))
    assert {name: judged.values.tolist() for name, judged in found.items()} == {
        f'{mine}:length': [1.0, 2.0],
        f'{mine}:scaled(by=2)': [2.0, 4.0],
    }

  def test_takes_arrays_of_any_numbers(self):
    for found in ([True, np.float32(0.5)], np.array([1.0, 0.5]), (1, np.array(0.5)), [np.bool_(True), 0.5]):
      with panels.Panel([functions.Reward('r', lambda found=found: found)]) as panel:
        assert panel(responses('a', 'b'))['r'].values.tolist() == [1.0, 0.5]

  def test_names_function_record_and_line_of_what_is_raised(self, mine):
    with pytest.raises(types.RunError) as caught:
      judged(f'{mine}:inverse', responses('a', '', 'b'))
    line = 1 + MINE[: MINE.index('return 1 / n')].count('\n')
    assert str(caught.value) == (
        f'reward {mine}:inverse, d.jsonl:2: ZeroDivisionError: division by zero (mine.py:{line}: return 1 / n)'
    )

  def test_names_the_line_of_the_users_file_that_led_to_it(self, mine):
    with pytest.raises(types.RunError, match=r'TypeError: .* \(mine.py:[0-9]+: return mine_helper.of\(None, resp'):
      judged(f'{mine}:deep', responses('a'))

  def test_finds_the_one_of_many_by_halves(self, mine):
    calls = []

    def fails(responses):
      calls.append(len(responses))
      return [1 / len(one) for one in responses]

    with pytest.raises(types.RunError, match='reward r, d.jsonl:11: ZeroDivisionError'):
      with panels.Panel([functions.Reward('r', fails)]) as panel:
        panel(responses(*'aaaaaaaaaa', '', *'aaaaa'))
    assert calls == [16, 8, 4, 2, 1, 1]

  def test_does_not_ask_one_by_one_again_where_what_fails_comes_and_goes(self):
    calls = []

    def fails(responses):
      calls.append(len(responses))
      if len(calls) == 1:
        raise ConnectionError('busy')
      return [0.0] * len(responses)

    with pytest.raises(types.RunError, match='reward r, d.jsonl:1 to d.jsonl:64: ConnectionError: busy'):
      with panels.Panel([functions.Reward('r', fails)]) as panel:
        panel(responses(*'a' * 64))
    assert sum(calls[1:]) == 64 and len(calls) == 8

  def test_names_a_coroutine_that_was_cancelled(self):
    async def cancelled(responses):
      raise asyncio.CancelledError

    with pytest.raises(types.RunError, match='reward r, d.jsonl:1: CancelledError'):
      with panels.Panel([functions.Reward('r', cancelled)]) as panel:
        panel(responses('a'))

  def test_gives_stdout_back_whatever_order_threads_leave_in(self):
    before, events = sys.stdout, [threading.Event() for _ in range(3)]

    def waits(mine, other):
      def judge(responses):
        events[mine].set()
        assert events[other].wait(60) and sys.stdout is sys.stderr
        return [0.0] * len(responses)

      return judge

    # The first in is the first out; the second is in before, and out behind it.
    first = threading.Thread(target=lambda: calling.call(waits(0, 1), {'responses': ['a']}, 1))
    second = threading.Thread(target=lambda: calling.call(waits(1, 2), {'responses': ['a']}, 1))
    first.start()
    assert events[0].wait(60)
    second.start()
    first.join()
    assert sys.stdout is sys.stderr
    events[2].set()
    second.join()
    assert sys.stdout is before

  def test_names_all_records_where_each_by_itself_is_fine(self, mine):
    with pytest.raises(types.RunError, match=r'by_batch, d.jsonl:1 to d.jsonl:3: RuntimeError: of several \(mine.py:'):
      judged(f'{mine}:by_batch', responses('a', '', 'b'))

  @pytest.mark.parametrize(
      ('what', 'said'),
      [
          ('short', 'd.jsonl:1 to d.jsonl:2: it returned 1 numbers for 2 responses'),
          ('number', 'it returned float where a list of 2 numbers is wanted'),
          ('text', 'it returned str where'),
          ('dict', 'it returned dict where'),
          ("float('nan')", 'd.jsonl:2: it returned nan where a finite number, or None to abstain, is wanted'),
          ("float('inf')", 'd.jsonl:2: it returned inf where'),
          ("'1.0'", "d.jsonl:2: it returned '1.0' where"),
          ('[1.0]', r'd.jsonl:2: it returned \[1.0\] where'),
          ('10 ** 400', 'd.jsonl:2: it returned 1000'),
      ],
  )
  def test_refuses_what_is_no_list_of_numbers(self, mine, what, said):
    with pytest.raises(types.RunError, match=f'odd, .*{said}'):
      judged(f'{mine}:odd', responses('a', 'b', what=[what, what]))

  def test_runs_functions_beside_models(self, tmp_path):
    both = threading.Barrier(2, timeout=20)  # Neither gets past it alone.

    def function(responses):
      both.wait()
      return [1.0] * len(responses)

    def model(responses):
      both.wait()
      return functions.Scores(np.array([2.0, 3.0]), [np.zeros(1), np.ones(2)])

    rewards = [functions.Reward('f', function), functions.parse(str(tmp_path))]
    with panels.Panel(rewards, {str(tmp_path): model}) as panel:
      found = panel(responses('a', 'b'))
    assert list(found) == ['f', str(tmp_path)]
    assert [one.values.tolist() for one in found.values()] == [[1.0, 1.0], [2.0, 3.0]]
    assert found['f'].tokens is None and found[str(tmp_path)].tokens is not None

  def test_refuses_the_same_reward_twice(self, mine):
    with pytest.raises(types.UsageError, match='length: it is given twice'):
      panels.Panel([functions.parse(f'{mine}:length'), functions.parse(f'{mine}:length:2')])


class TestCheckColumns:

  def test_names_what_a_function_wants_and_no_record_has(self, mine):
    rewards = [functions.parse(f'{mine}:length'), functions.parse(f'{mine}:right')]
    with pytest.raises(
        types.UsageError,
        match='right: it wants `answer`, and of --data and what is sampled there is ids, level, prompts, responses$',
    ):
      functions.check_columns(rewards, {'prompt', 'level'})
    functions.check_columns(rewards, {'prompt', 'answer'})
    with pytest.raises(types.UsageError, match='it wants `prompt`'):
      functions.check_columns([functions.Reward('r', lambda prompt, responses: [])], {'prompt'})

  def test_lets_pass_what_options_and_wrappers_give(self, mine):
    @functools.wraps(lambda responses, answer: None)
    def wrapper(**columns):
      return [0.0]

    rewards = [functions.parse(f'{mine}:odd(what="short")'), functions.parse(f'{mine}:scaled')]
    functions.check_columns([*rewards, functions.Reward('wrapped', functools.partial(wrapper))], {'prompt'})


class TestCombine:

  A, B = [1.0, 3.0, math.nan, 2.0, math.nan], [10.0, math.nan, 20.0, 60.0, math.nan]

  def of(self, *values, weights, how):
    return functions.combine([np.array(one) for one in values], weights, how).tolist()

  def test_sums_what_does_not_abstain(self):
    found = self.of(self.A, self.B, weights=[1.0, -0.5], how='sum')
    assert found[:4] == [-4.0, 3.0, -10.0, -28.0] and math.isnan(found[4])

  def test_normalises_each_over_those_that_do_not_abstain(self):
    # A: mean 2, variance (1 + 1 + 0) / 3. B: mean 30, variance (400 + 100 + 900) / 3.
    a, b = math.sqrt(2 / 3), math.sqrt(1400 / 3)
    found = self.of(self.A, self.B, weights=[2.0, 1.0], how='normalised')
    assert found[:4] == pytest.approx([-2 / a - 20 / b, 2 / a, -10 / b, 30 / b]) and math.isnan(found[4])

  def test_normalises_what_is_always_the_same_to_zero(self):
    assert self.of([0.1] * 3, [1.0, 2.0, 3.0], weights=[5.0, 0.0], how='normalised') == [0.0] * 3

  def test_gates_the_others_by_the_first(self):
    gate, other = [1.0, 0.0, -1.0, math.nan, 2.0], [10.0, 10.0, 10.0, 10.0, math.nan]
    found = self.of(gate, other, other, weights=[1.0, 1.0, 0.1], how='gated')
    assert found[:3] == [12.0, 0.0, -1.0] and math.isnan(found[3]) and found[4] == 2.0

  def test_is_that_of_one_alone(self):
    for how in ('sum', 'gated'):
      assert self.of([1.0, -2.0], weights=[3.0], how=how) == [3.0, -6.0]

  def test_refuses_another_way(self):
    with pytest.raises(types.UsageError, match='--combine=best: it is one of sum, normalised, gated'):
      functions.combine([np.ones(2)], [1.0], 'best')
