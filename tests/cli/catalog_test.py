"""What gin_configs holds: the algorithms, how they are listed, and what is suggested for a slip of the finger."""

import pathlib
import re

import pytest

from jaxalign import types
from jaxalign.cli import catalog

ROOT = pathlib.Path(__file__).resolve().parents[2]


class TestAlgorithms:

  def test_are_the_gin_files_at_the_top_but_for_base(self, tmp_path):
    (tmp_path / 'models').mkdir()
    for name, header in (('b', '# b: second. B et al.'), ('base', '# base: no'), ('a', '# a: first'), ('models/m', '')):
      (tmp_path / f'{name}.gin').write_text(header + '\n# more\n')
    assert catalog.algorithms(tmp_path) == {'a': 'first', 'b': 'second. B et al.'}

  def test_of_the_package_have_a_paper(self):
    found = catalog.algorithms()
    assert {'sft', 'rm', 'prm', 'dpo'} <= found.keys()
    assert all('https://' in text for text in found.values())


class TestCheckAlgorithm:

  def test_accepts_a_known_name(self):
    catalog.check_algorithm('dpo')

  @pytest.mark.parametrize(
      ('wrong', 'near'),
      [
          ('dop', 'dpo'),
          ('DPO', 'dpo'),
          ('dppo', 'dpop or ppo or dpo'),
          ('orpoo', 'orpo'),
          ('stf', 'sft'),
          ('rmm', 'rm'),
      ],
  )
  def test_names_the_choices_and_the_nearest(self, wrong, near):
    with pytest.raises(types.UsageError, match=f'--algo={wrong}: .*did you mean {near}\\b.*dpo, .*prm, .*rm, .*sft'):
      catalog.check_algorithm(wrong)

  def test_suggests_nothing_where_nothing_is_near(self):
    with pytest.raises(types.UsageError, match='unknown algorithm') as caught:
      catalog.check_algorithm('xyzzy')
    assert 'did you mean' not in str(caught.value)


class TestListing:

  def test_is_one_line_for_each_algorithm(self):
    lines = catalog.listing().splitlines()
    assert [line.split()[0] for line in lines] == list(catalog.algorithms())
    assert any(line.startswith('dpo') and 'Direct Preference Optimization' in line for line in lines)


class TestTable:

  def test_names_paper_file_and_test_that_exist(self):
    rows = [re.split(r'\s*\|\s*', line)[1:-1] for line in catalog.table().splitlines()[2:]]
    assert [row[0].strip('`') for row in rows] == list(catalog.algorithms())
    for name, what, paper, _, loss, test in rows:
      assert what and 'http' not in what
      assert re.fullmatch(r'\[[^,\]]+\]\(https://[^,)]+\)', paper)
      assert (ROOT / 'gin_configs' / f'{name.strip("`")}.gin').is_file()
      module, function = loss.strip('`').split('.')
      assert f'\ndef {function}(' in (ROOT / 'jaxalign' / 'losses' / f'{module}.py').read_text()
      tested = (ROOT / 'tests' / 'losses' / test.strip('`')).read_text()
      assert re.search(rf'\b(free|{module})\.{function}\b', tested), f'{loss} in {test}'

  def test_is_the_one_of_the_readme(self):
    assert f'<!-- jaxalign --list --markdown -->\n\n{catalog.table()}' in (ROOT / 'README.md').read_text()


class TestDecodings:

  def test_are_in_the_readme_with_their_paper_and_command(self):
    readme = (ROOT / 'README.md').read_text()
    found = catalog.algorithms(catalog.ROOT / 'decode')
    assert len(found) > 8
    for name, text in found.items():
      (row,) = (line for line in readme.splitlines() if line.startswith(f'| `{name}` |'))
      assert text.rpartition('/')[2] in row
      assert f' --decode={name}' in readme
      header = (catalog.ROOT / 'decode' / f'{name}.gin').read_text().splitlines()[:4]
      assert f'#   python -m jaxalign.main --mode=sample --decode={name} ' in header[1]
      assert [line.split()[1].strip(':,') for line in header[2:]] == ['Surveys', 'Expect']

  def test_suggest_the_nearest(self):
    with pytest.raises(types.UsageError, match='--decode=best_of: unknown method; did you mean best_of_n'):
      catalog.check_decoding('best_of')


class TestExists:

  def test_knows_files_by_their_name_in_the_gin_folder(self):
    assert catalog.exists('models/stories260K.gin')
    assert not catalog.exists('models/nothing.gin')
    assert not catalog.exists('models')
