"""The flags of the command line: how they are read, explained and refused."""

from absl import flags
import pytest

from jaxalign import types
from jaxalign.cli import command
from jaxalign.cli import flag_table


def parse(*words):
  return command.parse(['jaxalign', *words])


class TestParse:

  def test_reads_values_and_repeated_flags(self):
    args = parse('--algo=dpo', '--steps=7', '--gin=a.b=1', '--gin=c.d=2', '--debug', '--temperature=0')
    assert (args.algo, args.steps, args.gin, args.debug, args.temperature) == ('dpo', 7, ['a.b=1', 'c.d=2'], True, 0)

  def test_begins_afresh_at_each_call(self):
    parse('--algo=dpo', '--gin=a.b=1')
    args = parse()
    assert (args.algo, args.gin, args.steps, args.seed) == (None, [], None, None)

  @pytest.mark.parametrize(
      'word',
      [
          '--stepz=1',
          '--steps=0',
          '--steps=1.5',
          '--log_every=0',
          '--eval_every=-1',
          '--temperature=-0.1',
          '--debug=maybe',
      ],
  )
  def test_refuses_unknown_flags_and_wrong_values(self, word):
    with pytest.raises(flags.Error, match=word.split('=')[0].lstrip('-')):
      parse(word)

  def test_refuses_what_is_no_flag(self):
    with pytest.raises(types.UsageError, match="'dpo'"):
      parse('--steps=1', 'dpo')


class TestCheckMode:

  @pytest.mark.parametrize(
      'words',
      [
          ('--algo=dpo', '--steps=1', '--seed=1', '--mesh=fsdp:1'),
          ('--mode=show', '--algo=dpo', '--steps=1', '--workdir=x'),
          ('--mode=eval', '--checkpoint=x', '--eval_data=y', '--gin=a.b=1', '--seed=1', '--mesh=fsdp:1'),
          ('--mode=sample', '--checkpoint=x', '--prompt=y', '--temperature=1', '--seed=1'),
      ],
  )
  def test_accepts_what_the_mode_reads(self, words):
    command.check_mode(parse(*words))

  @pytest.mark.parametrize(
      ('words', 'flag'),
      [
          (('--prompt=x',), '--prompt'),
          (('--checkpoint=x',), '--checkpoint; --model=DIR'),
          (('--mode=eval', '--data=x'), '--data; --eval_data'),
          (('--mode=eval', '--steps=1'), '--steps'),
          (('--mode=sample', '--eval_data=x'), '--eval_data'),
          (('--mode=sample', '--gin=a.b=1'), '--gin'),
          (('--markdown',), '--markdown; it goes with --list'),
      ],
  )
  def test_names_a_flag_that_the_mode_does_not_read(self, words, flag):
    with pytest.raises(types.UsageError, match=f'does not read {flag}'):
      command.check_mode(parse(*words))

  def test_knows_every_flag_that_it_names(self):
    names = {name for _, name, _, _ in flag_table.FLAGS}
    assert {name for unread in command._UNREAD.values() for name in unread} <= names
    assert set(command._INSTEAD) <= names


class TestDescribe:

  def test_says_of_each_flag_what_it_is(self):
    text = command.describe('Intro.')
    assert text.startswith('Intro.\n')
    for _, name, _, explained in flag_table.FLAGS:
      first = explained.split()[0]
      assert f'\n  --{name}\n      {first}' in text
