"""The command line: what is configured by default, what is refused and how, and runs of every algorithm."""

import pytest

from jaxalign import command
from jaxalign import config
from jaxalign import main


def configured(*flags):
  """The recipe that a command line configures."""
  return main._configure(command.parse(['jaxalign', *flags]))


class TestConfigure:

  @pytest.mark.parametrize('flags', [(), ('--data=builtin:sentiment:train',), ('--data=builtin:sentiment[:64]',)])
  def test_takes_the_options_of_the_embedded_data_named_or_not(self, flags):
    recipe = configured('--algo=dpo', *flags)
    assert recipe.eval_data == 'builtin:sentiment:test'
    assert (recipe.packing.rows, recipe.packing.groups_per_step) == (64, 32)
    assert recipe.packing.row_length < 128
    samples = config.get('evaluate.Samples')()
    assert (samples.count, samples.per_prompt) == (64, 8)
    assert samples.judge(['I love this wonderful day!'])[0] > 0.5

  def test_takes_those_of_the_algorithm(self):
    recipe = configured('--algo=sft')
    assert (recipe.data, recipe.eval_data) == ('builtin:stories:train', 'builtin:stories:test')
    assert recipe.packing.rows == 32
    assert recipe.packing.row_length < 128

  @pytest.mark.parametrize('data', ['jsonl:mine.jsonl', 'builtin:sentiment:0.5,jsonl:mine.jsonl:0.5'])
  def test_of_the_users_data_judges_nothing_and_holds_nothing_out(self, data):
    recipe = configured('--algo=dpo', f'--data={data}')
    assert recipe.eval_data == ''
    assert (recipe.packing.rows, recipe.packing.row_length, recipe.packing.groups_per_step) == (16, 512, None)
    samples = config.get('evaluate.Samples')()
    assert samples.judge is None and samples.prompts is None

  def test_lets_the_user_win_over_the_data(self):
    recipe = configured('--algo=dpo', '--gin=loader.Packing.rows = 4', "--gin=recipe.Recipe.eval_data = ''")
    assert (recipe.packing.rows, recipe.packing.groups_per_step, recipe.eval_data) == (4, 32, '')
