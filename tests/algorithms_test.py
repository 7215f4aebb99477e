"""Every algorithm that gin_configs names, for three steps on data of its own shape, from the command line."""

import json
import math

import pytest

from jaxalign import main
from jaxalign.cli import catalog
from tests import runs

# What data of an algorithm say that the package's data do not.
SAID = {
    'tis_dpo': {'chosen_spans': [[0, 4, 2.0]], 'rejected_spans': [[2, 5, 0.5]]},
    'step_dpo': {'steps': [' He had a cat.']},
    'soft_dpo': {'probability': 0.75},
    'group_robust': {'group': 1},
    'bco_udm': {'completion': ' ran away.', 'label': False, 'density_ratio': 1.0},
}
# What algorithms sample that train on their own samples.
FEW = ('prompts = 4', 'samples = 2', 'max_new_tokens = 16')
# What trains the model that says something of tokens, for those that read it.
JUDGED_BY = {'rto': 'dpo', 'prime_fixed': 'dpo', 'grpo_process': 'prm'}
LOG_2 = math.log(2)
# The loss before the first update, where the policy is its own reference and a new head is zero.
FIRST_LOSS = {
    **dict.fromkeys(('dpo', 'cdpo', 'robust', 'rso', 'chi_po', 'sigmoid_norm', 'dpop', 'margin_dpo', 'ld_dpo'), LOG_2),
    **dict.fromkeys(('f_dpo_forward_kl', 'f_dpo_jensen_shannon', 'f_dpo_alpha', 'aot', 'aot_unpaired', *SAID), LOG_2),
    **dict.fromkeys(('dr_dpo', 'beta_dpo', 'bco', 'rm', 'prm', 'orm', 'rm_all_pairs', 'rm_length_debiased'), LOG_2),
    **dict.fromkeys(('tdpo1', 'tdpo2', 'mallows_dpo', 'tr_dpo', 'sdpo', 'd2o'), LOG_2),
    **dict.fromkeys(('ipo', 'ipo_averaged'), 25.0),
    **dict.fromkeys(('hinge', 'gpo_exponential', 'gpo_quadratic', 'apo_zero', 'apo_down'), 1.0),
    **dict.fromkeys(('kto', 'apo_zero_unpaired'), 0.5),
    **dict.fromkeys(('nca_pair', 'bco_pair', 'nca'), 2 * LOG_2),
    'gpo_savage': 0.25,
    'exo_pair': -LOG_2 - 0.5 * math.log(0.999 * 0.001),
    'discopop': 0.5 * (1 + LOG_2),
    'sppo_hard': 50.0,
    'cal_dpo': LOG_2 + 25.0,
    'dro': None,
    'rm_classes': math.log(3),
    'preference_model': LOG_2,
}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def flags(algo, cache, workdir):
  return [
      'jaxalign',
      f'--algo={algo}',
      '--model=tiny',
      '--tokenizer=builtin:stories260K',
      f'--cache_dir={cache}',
      f'--workdir={workdir}',
      '--eval_data=',
      '--steps=3',
      '--log_every=1',
      '--save_every=0',
      '--mesh=data:8',
      '--gin=loader.Packing.rows = 8',
      '--gin=loader.Packing.row_length = 192',
      '--gin=loader.Packing.groups_per_step = 6',
      '--gin=optim.linear.lr = 1e-2',
      '--gin=train.train.samples = None',
      "--gin=recipe.Recipe.remat = 'none'",
  ]


@pytest.mark.parametrize('algo', catalog.algorithms())
def test_trains_from_the_loss_that_its_file_promises(algo, cache, tmp_path, capsys):
  more = []
  if algo in SAID:
    pair = {'prompt': 'Tom', 'chosen': ' was happy.', 'rejected': ' was sad and cried.'} | SAID[algo]
    (tmp_path / 'own.jsonl').write_text(8 * (json.dumps(pair) + '\n'))
    more = [f'--data=jsonl:{tmp_path / "own.jsonl"}']
  if catalog.is_online(algo):
    rewards = ['tests.runs:vowels']
    if algo in ('lagrangian_grpo', 'lagrangian_ppo'):
      rewards.append('jaxalign.rewards.lengths:repetition:-1')
    if algo in JUDGED_BY:
      assert main.main(flags(JUDGED_BY[algo], cache, tmp_path / 'judge')) == 0
      rewards.append(str(tmp_path / 'judge'))
    more = [*(f'--reward={one}' for one in rewards), *(f'--gin=rollouts.Options.{one}' for one in FEW)]
  assert main.main([*flags(algo, cache, tmp_path / 'w'), *more]) == 0, capsys.readouterr().err
  lines = runs.logged(tmp_path / 'w')
  assert list(lines) == [1, 2, 3]
  assert all(math.isfinite(value) for line in lines.values() for value in line.values())
  if catalog.is_online(algo):  # whose loss is 0 wherever the policy is the one that was sampled from
    assert lines[3]['grad_norm'] != lines[1]['grad_norm']
  else:
    assert lines[3]['loss'] != lines[1]['loss'] or lines[3]['grad_norm'] == 0
  assert lines[1]['grad_norm'] > 0
  assert lines[3]['skipped_steps'] == 0
  if FIRST_LOSS.get(algo) is not None:
    assert lines[1]['loss'] == pytest.approx(FIRST_LOSS[algo], rel=1e-5)
  assert json.loads((tmp_path / 'w' / 'summary.json').read_text())['steps'] == 3
