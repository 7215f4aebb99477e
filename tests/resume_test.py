"""How the bindings of two runs are compared."""

from jaxalign import resume
from jaxalign.cli import config


class TestDiff:

  def texts(self, *bindings):
    found = []
    for bound in (), bindings:
      config.parse('dpo', files=(), user_files=(), bindings=bound)
      found.append(config.bindings())
    return found

  def test_is_empty_for_equal_bindings(self):
    assert resume.diff(*self.texts()) == []

  def test_names_what_was_changed_added_and_taken_away(self):
    old, new = self.texts('preference.dpo.beta = 0.2', 'optim.adamw.b1 = 0.5')
    assert resume.diff(old, new) == ['optim.adamw.b1: unset -> 0.5', 'preference.dpo.beta: 0.1 -> 0.2']
    assert resume.diff(new, old) == ['optim.adamw.b1: 0.5 -> unset', 'preference.dpo.beta: 0.2 -> 0.1']

  def test_leaves_out_what_is_ignored(self):
    old, new = self.texts('preference.dpo.beta = 0.2', 'loop.Options.steps = 3')
    assert resume.diff(old, new, ['loop.Options.steps']) == ['preference.dpo.beta: 0.1 -> 0.2']
