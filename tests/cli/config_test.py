"""gin: which file wins, what is found from where, and which mistakes are refused by name."""

import logging
import pathlib
import re
import sys
import textwrap

import gin
import pytest

from jaxalign import types
from jaxalign.cli import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMPORTS = (
    'from __gin__ import dynamic_registration\nfrom jaxalign import optim\nfrom jaxalign.losses import preference\n'
)
HOSTILE = 'this is not gin at all ('


@pytest.fixture
def write(tmp_path):
  """A function that writes a file of the user's and returns its path."""

  def run(name, text):
    path = tmp_path / 'user' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding='utf-8')
    return str(path)

  return run


@pytest.fixture(autouse=True)
def no_trace_of_user_modules(monkeypatch):
  """Takes the folders and modules of a test's user out of the process again."""
  monkeypatch.setattr(sys, 'path', list(sys.path))
  before = set(sys.modules)
  yield
  for name in set(sys.modules) - before:
    if '/user/' in str(sys.modules[name]):
      del sys.modules[name]


def parse(algo='dpo', files=(), user_files=(), bindings=()):
  config.parse(algo, files=files, user_files=user_files, bindings=bindings)


def refusal(**what):
  with pytest.raises(types.UsageError) as caught:
    parse(**what)
  message = str(caught.value)
  assert '\n' not in message
  return message


class TestParse:

  def test_gives_a_function_its_bindings(self):
    parse()
    assert config.query('losses.preference.dpo.beta') == 0.1

  def test_later_sources_win(self, write):
    user = write('my.gin', IMPORTS + 'from jaxalign.data import loader\nloader.Packing.rows = 20\n')
    other = write('more.gin', IMPORTS + 'from jaxalign.data import loader\nloader.Packing.rows = 30\n')
    model = ['models/stories260K.gin']
    found = []
    for what in (
        {},
        {'files': model},
        {'files': model, 'user_files': [user]},
        {'files': model, 'user_files': [user, other]},
        {'files': model, 'user_files': [user, other], 'bindings': ['loader.Packing.rows = 40']},
        {'files': model, 'user_files': [user], 'bindings': ['loader.Packing.rows = 40', 'loader.Packing.rows=50']},
    ):
      parse(**what)
      found.append(config.query('data.loader.Packing.rows'))
    assert found[0] < found[1] < found[2]
    assert found[2:] == [20, 30, 40, 50]

  def test_forgets_the_parse_before(self):
    parse(bindings=['preference.dpo.beta=7.0'])
    parse()
    assert config.query('losses.preference.dpo.beta') == 0.1

  def test_ignores_gin_files_of_the_current_folder(self, tmp_path, monkeypatch):
    for name in ('base.gin', 'dpo.gin', 'models/stories260K.gin'):
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    parse(files=['models/stories260K.gin'])
    assert config.query('losses.preference.dpo.beta') == 0.1
    assert pathlib.Path.cwd() == tmp_path

  def test_ignores_gin_files_beside_the_file_of_the_user(self, write):
    write('base.gin', HOSTILE)
    user = write('my.gin', 'from __gin__ import dynamic_registration\n')
    parse(user_files=[user])

  def test_finds_what_a_user_file_includes_beside_it(self, write, tmp_path, monkeypatch):
    write('common.gin', IMPORTS + 'optim.linear.lr = 0.5\n')
    write('my.gin', "include 'common.gin'\n")
    (tmp_path / 'common.gin').write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    parse(user_files=['user/my.gin'])
    assert config.query('optim.linear.lr') == 0.5

  def test_finds_what_a_user_file_includes_of_the_package_without_a_complaint(self, write, caplog):
    user = write('my.gin', "include 'models/stories260K.gin'\n")
    with caplog.at_level(logging.WARNING):
      parse(user_files=[user])
    assert config.query('data.loader.Packing.row_length') == 512
    assert not caplog.records

  def test_serves_a_user_module_named_as_one_of_the_package(self, write):
    write('preference.py', 'def mine(policy, *, beta):\n  return policy * beta\n\n\ndef dpo(*, beta):\n  return beta\n')
    user = write(
        'my.gin',
        """
        from __gin__ import dynamic_registration
        import preference
        from jaxalign import recipe
        recipe.Recipe.loss_fn = @preference.mine
        preference.mine.beta = 3.0
        preference.dpo.beta = 4.0
        """,
    )
    parse(user_files=[user], bindings=['preference.mine.beta = 5.0'])
    loss_fn = config.query('recipe.Recipe.loss_fn').scoped_configurable_fn
    assert loss_fn(2.0) == 10.0
    assert config.query('losses.preference.dpo.beta') == 0.1

  def test_serves_a_user_module_that_only_an_included_file_imports(self, write):
    write('losses_of_mine.py', 'def mine(policy, *, beta):\n  return policy * beta\n')
    write(
        'common.gin',
        'from __gin__ import dynamic_registration\nimport losses_of_mine\nlosses_of_mine.mine.beta = 1.0\n',
    )
    user = write('my.gin', "include 'common.gin'\n")
    parse(
        user_files=[user], bindings=['losses_of_mine.mine.beta = 5.0', 'recipe.Recipe.loss_fn = @losses_of_mine.mine']
    )
    assert config.query('recipe.Recipe.loss_fn').scoped_configurable_fn(2.0) == 10.0

  def test_lets_a_binding_name_any_module_that_gin_files_of_the_package_name(self):
    files = sorted((ROOT / 'gin_configs').rglob('*.gin'))
    names = {
        line for file in files for line in re.findall(r'^from jaxalign.*import \w+$', file.read_text(), re.MULTILINE)
    }
    assert len(names) > 5
    assert names <= set(config._HEADER.splitlines())

  @pytest.mark.parametrize(
      ('line', 'parts'),
      [
          ('optim.cosine.lrr = 1', ["optim.cosine has no parameter 'lrr'", 'it has lr, ', 'my.gin:4']),
          ('preference.dp.beta = 1', ['jaxalign.losses.preference has no attribute dp', 'my.gin:4']),
          ('prefrence.dpo.beta = 1', ["'prefrence'", 'import', 'my.gin:4']),
          ('preference.dpo.beta =', ['my.gin:4', 'preference.dpo.beta =']),
          ('preference.dpo.beta 1', ['my.gin:4', 'preference.dpo.beta 1']),
          ('preference.dpo.beta = (1,', ['my.gin', 'not closed']),
          ('preference.dpo.beta = high', ['my.gin:4', 'high', 'quoted']),
          ('preference.dpo.beta = @preference.nothing', ['my.gin:4', 'nothing']),
          ('preference.dpo.beta = %nothing', ['%nothing', 'nothing binds it']),
          ('import nothing_of_this_name', ['my.gin:4', 'nothing_of_this_name']),
          ("include 'nothing.gin'", ['my.gin:4', 'nothing.gin']),
          ('import torn', ['torn.py:1']),
      ],
  )
  def test_quotes_the_line_that_is_wrong(self, write, line, parts):
    write('torn.py', 'x = = 1\n')
    user = write('my.gin', IMPORTS + line + '\n')
    message = refusal(user_files=[user])
    assert f'--gin_file={user}' in message or line.endswith('%nothing')
    for part in parts:
      assert part in message

  @pytest.mark.parametrize('line', ['recipe.kept_logits = 1', 'preference.beta = 1'])
  def test_says_what_a_binding_of_a_module_alone_lacks(self, line):
    message = refusal(bindings=[line])
    assert line in message and 'write MODULE.NAME.PARAMETER=VALUE' in message

  def test_names_the_innermost_file_that_is_wrong(self, write):
    write('inner.gin', IMPORTS + 'optim.linear.rate = 1\n')
    user = write('my.gin', "# a comment\ninclude 'inner.gin'\n")
    message = refusal(user_files=[user])
    assert 'inner.gin:4: optim.linear.rate = 1' in message

  @pytest.mark.parametrize(
      ('binding', 'part'),
      [
          ('optim.cosine.lrr=1', "no parameter 'lrr'"),
          ('preference.ipoo.tau=1', 'ipo'),
          ('prefrence.dpo.beta=1', "'prefrence'"),
          ('preference.dpo.beta', 'NAME.PARAMETER=VALUE'),
          ('recipe.Recipe.dtype=bfloat16', "'bfloat16'"),
          ('preference.dpo.beta=(', 'closed'),
      ],
  )
  def test_quotes_the_binding_that_is_wrong(self, binding, part):
    message = refusal(bindings=[binding])
    assert message.startswith(f'--gin={binding}: ')
    assert part in message

  @pytest.mark.parametrize(
      'binding,said',
      [
          ("preference.dpo.beta='0.2'", "preference.dpo.beta = '0.2': it must be float"),
          ('loop.Options.steps=1.5', 'loop.Options.steps = 1.5: it must be int'),
          ('loader.Packing.rows=True', 'loader.Packing.rows = True: it must be int'),
          ('recipe.Recipe.attention=3', 'recipe.Recipe.attention = 3: it must be None or str'),
      ],
  )
  def test_refuses_a_value_of_another_type(self, binding, said):
    with pytest.raises(types.UsageError, match=re.escape(said)):
      parse(bindings=[binding])

  def test_takes_a_list_where_a_parameter_is_a_sequence_of_numbers(self, write):
    user = write('user.gin', IMPORTS + 'from jaxalign.data import texts\ntexts.quantiled.edges = (0.2, 0.8)\n')
    parse(user_files=[user])
    assert 'texts.quantiled.edges = (0.2, 0.8)' in config.bindings()

  @pytest.mark.parametrize('binding', ['preference.dpo.beta=1', 'loader.Packing.max_responses=None'])
  def test_takes_a_value_that_the_type_includes(self, binding):
    parse(bindings=[binding])

  def test_names_a_missing_user_file(self):
    assert refusal(user_files=['nowhere/my.gin']) == '--gin_file=nowhere/my.gin: no such file'

  def test_returns_to_the_current_folder_after_a_mistake(self, write):
    before = pathlib.Path.cwd()
    refusal(user_files=[write('my.gin', HOSTILE)])
    assert pathlib.Path.cwd() == before


class TestParseSaved:

  def test_restores_what_was_bound(self, write):
    write('saved_losses.py', 'def mine(policy, *, beta):\n  return policy * beta\n')
    user = write(
        'my.gin',
        """
        from __gin__ import dynamic_registration
        import saved_losses
        from jaxalign import recipe
        recipe.Recipe.loss_fn = @saved_losses.mine
        saved_losses.mine.beta = %strength
        strength = 3.0
        """,
    )
    parse('sft', user_files=[user], bindings=["recipe.Recipe.dtype = 'bfloat16'"])
    text = config.bindings()
    config.parse_saved([text], [], [])
    assert config.bindings() == text
    assert config.query('recipe.Recipe.data') == 'builtin:stories:train'
    assert config.query('recipe.Recipe.loss_fn').scoped_configurable_fn(2.0) == 6.0

  def test_lets_the_user_bind_anew(self):
    parse()
    config.parse_saved([config.bindings()], [], ['optim.linear.lr = 9.0'])
    assert config.query('optim.linear.lr') == 9.0

  def test_lets_later_texts_win(self):
    parse()
    texts = [
        config.bindings(),
        'from __gin__ import dynamic_registration\nfrom jaxalign import optim\noptim.linear.lr = 8.0\n',
    ]
    config.parse_saved(texts, [], [])
    assert config.query('optim.linear.lr') == 8.0
    assert config.query('recipe.Recipe.data') == 'builtin:sentiment:train'

  def test_holds_the_user_to_bindings_but_not_to_files(self, write):
    parse()
    saved = [config.bindings()]
    user = write('my.gin', IMPORTS + 'optim.cosine.end = 1.0\n')
    config.parse_saved(saved, [user], [])
    config.check_reachable('evaluate.evaluate', 'recipe.Recipe')
    config.parse_saved(saved, [user], ['optim.cosine.lr = 1.0'])
    with pytest.raises(types.UsageError, match=r'optim\.cosine\.lr') as caught:
      config.check_reachable('evaluate.evaluate', 'recipe.Recipe')
    assert 'end' not in str(caught.value).split(';')[0]

  def test_names_a_module_that_is_gone(self):
    with pytest.raises(types.UsageError, match='bindings of the checkpoint.*gone_module'):
      config.parse_saved(['from __gin__ import dynamic_registration\nimport gone_module\n'], [], [])


class TestGet:

  def test_is_the_function_with_its_bindings(self):
    parse(bindings=['optim.linear.lr = 0.5'])
    assert config.get('optim.linear')(10)(0) == pytest.approx(0.5)

  def test_is_the_function_of_the_package_where_the_user_has_one_of_that_name(self, write):
    write('optim.py', 'def linear(steps, *, lr):\n  return "not this one"\n')
    user = write('my.gin', 'from __gin__ import dynamic_registration\nimport optim\noptim.linear.lr = 1.0\n')
    parse(user_files=[user])
    assert config.get('optim.linear').__module__ == 'jaxalign.optim'

  def test_names_what_is_not_there(self):
    with pytest.raises(types.UsageError, match='train.nothing'):
      config.get('train.nothing')


class TestRecipe:

  def options(self, *bindings):
    parse(bindings=['recipe.Recipe.example_fn = @feedback.ranked', *bindings])
    return config.recipe().example_fn.options

  def test_tells_a_function_of_examples_what_is_bound_to_it(self):
    options = [
        self.options(*bindings)
        for bindings in (
            (),
            ('feedback.ranked.most = 41',),
            ('feedback.ranked.most = 60',),
            ('feedback.ranked.most = %most', 'most = 41'),
            ('feedback.ranked.most = %most', 'most = 60'),
            ('recipe.Recipe.example_fn = @a/feedback.ranked', 'feedback.ranked.most = 60'),
            (
                'recipe.Recipe.example_fn = @a/feedback.ranked',
                'feedback.ranked.most = 60',
                'a/feedback.ranked.most = 8',
            ),
            ('feedback.ranked.columns = {"prompt": @a/texts.tagged}', 'a/texts.tagged.good = "Yes: "'),
            ('feedback.ranked.columns = {"prompt": @a/texts.tagged}', 'a/texts.tagged.good = "So: "'),
        )
    ]
    assert len(set(options)) == len(options)

  def test_tells_it_nothing_else_and_no_default(self):
    plain = self.options()
    assert (
        self.options('preference.dpo.beta = 0.2', 'feedback.ranked.most = 8', 'feedback.binary.template = "a"') == plain
    )

  def test_tells_it_the_same_where_a_run_is_evaluated(self):
    options = self.options('feedback.ranked.most = 41')
    bindings = config.bindings()
    with pytest.raises(types.RunError):
      config.recipe().example_fn({}, None, row_length=8)
    operative = config.checked_operative()
    assert 'feedback.ranked.template = None' in operative
    config.parse_saved([bindings, operative], (), ())
    assert config.recipe().example_fn.options == options

  def test_tells_it_the_source_of_functions_that_it_is_given(self, write):
    write('given.py', 'def made(record, *, of):\n  return of()\ndef part():\n  return 12345\n')
    user = write('my.gin', 'from __gin__ import dynamic_registration\nimport given\ngiven.made.of = @given.part\n')
    parse(user_files=[user], bindings=['recipe.Recipe.example_fn = @given.made'])
    assert 'return 12345' in config.recipe().example_fn.options

  def test_tells_what_scores_responses_too(self):
    parse(bindings=['recipe.Recipe.scored_fn = @scored.responses', 'scored.responses.per = "step"'])
    assert "scored.responses.per = 'step'" in config.recipe().scored_fn.options
    parse()
    assert config.recipe().scored_fn is None


class TestUnbound:

  def error(self, name, *args):
    with pytest.raises(TypeError) as caught:
      config.get(name)(*args)
    return caught.value

  def test_names_what_a_function_lacks(self):
    parse(bindings=['optim.cosine.end = 0.5'])
    assert config.unbound(self.error('optim.cosine', 10)).startswith('cosine lacks lr: bind it in gin, as cosine.lr ')

  def test_names_all_that_a_class_lacks(self):
    parse(bindings=['architecture.Config.vocab_size = 7'])
    message = config.unbound(self.error('models.architecture.Config'))
    assert 'Config lacks num_layers, embed_dim, num_heads' in message
    assert 'vocab_size' not in message

  def test_is_silent_on_other_errors(self):
    parse()
    assert config.unbound(TypeError('x')) == ''
    assert config.unbound(self.error('optim.linear', 'ten')) == ''


class TestCheckReachable:

  def refusal(self, *bindings, algo='dpo', user_files=()):
    parse(algo, bindings=bindings, user_files=user_files)
    with pytest.raises(types.UsageError) as caught:
      config.check_reachable('train.train', 'recipe.Recipe')
    return str(caught.value)

  def test_refuses_what_no_reference_leads_to(self):
    message = self.refusal('optim.cosine.end = 0.5', 'optim.linear.lr = 0.5', 'reward.bradley_terry.centring = 0.5')
    assert 'optim.cosine.end, reward.bradley_terry.centring;' in message
    assert 'linear' not in message

  def test_refuses_it_even_where_the_package_binds_it(self):
    assert 'evaluate.evaluate.samples' in self.refusal('evaluate.evaluate.samples = None')

  def test_follows_references_through_lists_macros_and_functions_of_the_user(self, write):
    write('reachable.py', 'def outer(*, parts):\n  return parts\n')
    user = write(
        'my.gin',
        """
        from __gin__ import dynamic_registration
        import reachable
        from jaxalign import optim
        from jaxalign import train
        train.train.optimizer = %chosen
        chosen = @reachable.outer
        reachable.outer.parts = [1, {'a': @optim.cosine}]
        optim.cosine.end = %end
        end = 0.5
        """,
    )
    parse(user_files=[user])
    config.check_reachable('train.train', 'recipe.Recipe')
    message = self.refusal('train.train.optimizer = @optim.adamw', user_files=[user])
    assert 'run: chosen (a macro);' in message

  def test_leaves_to_modules_of_the_user_what_they_call_themselves(self, write):
    write('alone.py', 'def mine(*, beta):\n  return beta\n')
    user = write('my.gin', 'from __gin__ import dynamic_registration\nimport alone\nalone.mine.beta = 1.0\n')
    parse(user_files=[user])
    config.check_reachable('train.train', 'recipe.Recipe')

  def test_accepts_each_algorithm_as_it_is(self):
    for algo in ('dpo', 'prm', 'rm', 'sft'):
      parse(algo, bindings=['loop.Options.steps = 3', 'loader.Packing.rows = 8'])
      config.check_reachable('train.train', 'recipe.Recipe')


class TestCheckedOperative:

  def call(self, *names):
    for name in names:
      config.get(name)(10)

  def test_is_the_configuration_that_was_used(self):
    parse(bindings=['optim.linear.lr = 0.5', 'optim.linear.warmup = 0.25'])
    self.call('optim.linear')
    text = config.checked_operative()
    assert 'optim.linear.lr = 0.5' in text.splitlines()
    assert 'optim.linear.warmup = 0.25' in text.splitlines()
    assert 'preference' not in re.sub(r'(?m)^from.*', '', text)

  def test_refuses_a_binding_that_was_not_used_by_name(self):
    parse(bindings=['optim.linear.lr = 0.5', 'optim.cosine.end = 0.5', 'reward.bradley_terry.centring = 0.5'])
    self.call('optim.linear')
    with pytest.raises(types.UsageError) as caught:
      config.checked_operative()
    assert 'optim.cosine.end, reward.bradley_terry.centring' in str(caught.value)
    assert 'linear' not in str(caught.value)

  def test_refuses_it_where_the_package_binds_the_same_value(self):
    parse(bindings=['preference.dpo.beta = 0.1'])
    with pytest.raises(types.UsageError, match='preference.dpo.beta'):
      config.checked_operative()

  def test_refuses_it_in_a_file_of_the_user(self, write):
    user = write('my.gin', IMPORTS + 'optim.cosine.end = 1.0\n')
    parse(user_files=[user])
    with pytest.raises(types.UsageError, match=r'optim\.cosine\.end'):
      config.checked_operative()

  def test_refuses_a_parameter_that_the_caller_gives(self):
    parse(bindings=['optim.linear.lr = 0.5', 'optim.linear.steps = 7'])
    self.call('optim.linear')
    with pytest.raises(types.UsageError, match=r'optim\.linear\.steps'):
      config.checked_operative()

  def test_refuses_a_macro_that_nothing_reads(self):
    parse(bindings=['lr = 0.5', 'rate = 0.5', 'optim.linear.lr = %rate'])
    self.call('optim.linear')
    with pytest.raises(types.UsageError, match=r'lr \(a macro\)') as caught:
      config.checked_operative()
    assert 'rate' not in str(caught.value)

  def test_tells_scopes_apart(self):
    parse(bindings=['optim.linear.lr = 0.5', 'outer/optim.linear.warmup = 0.5', 'other/optim.linear.warmup = 0.5'])
    config.get('optim.linear')
    self.call('optim.linear')
    with gin.config_scope('outer'):
      self.call('optim.linear')
    with pytest.raises(types.UsageError, match=r'other/optim\.linear\.warmup') as caught:
      config.checked_operative()
    assert 'outer' not in str(caught.value)

  def test_lets_the_package_bind_what_a_run_does_not_reach(self):
    parse(bindings=['optim.linear.lr = 0.5'])
    self.call('optim.linear')
    config.checked_operative()


class TestBindings:

  def test_writes_each_on_one_line(self):
    parse(bindings=[f'recipe.Recipe.data = {"x" * 300!r}', f'train.train.optimizer = {list(range(100))}'])
    lines = config.bindings().splitlines()
    assert f'recipe.Recipe.data = {"x" * 300!r}' in lines
    assert f'train.train.optimizer = {list(range(100))}' in lines
    assert max(map(len, lines)) < 500
