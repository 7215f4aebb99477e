"""Memory in huge pages: when a process begins anew to have it, and what it keeps."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign import pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Begins anew wherever it runs; the second time its environment holds it back.
PROGRAM = """
import json, os, sys
from jaxalign import pages
pages._offered = lambda: True
print('began', flush=True)
pages.begin_with_huge(['program.py'])
print(json.dumps([sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), os.getpid()]))
"""


def _environ(**more):
  given = {name: value for name, value in os.environ.items() if name not in ('GLIBC_TUNABLES', 'JAXALIGN_BEGUN')}
  return given | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'} | more


def _run(folder, args, **environ):
  (folder / 'program.py').write_text(PROGRAM)
  command = [sys.executable, 'program.py', *args]
  started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=_environ(**environ))
  *before, last = started.communicate(timeout=60)[0].splitlines()
  return started.pid, len(before), json.loads(last)


@pytest.mark.parametrize(
    'given, kept',
    [('', 'glibc.malloc.hugetlb=1'), ('glibc.malloc.perturb=0', 'glibc.malloc.perturb=0:glibc.malloc.hugetlb=1')],
)
def test_begins_anew_once_with_its_arguments_and_process_id(tmp_path, given, kept):
  pid, begun, found = _run(tmp_path, ['--a=b c', ''], GLIBC_TUNABLES=given)
  assert found == [['--a=b c', ''], kept, pid]
  assert begun == 2


def test_goes_on_where_it_cannot_begin_anew_or_has(tmp_path):
  (tmp_path / 'sitecustomize.py').write_text('import os\nos.environ.pop("GLIBC_TUNABLES", None)\n')
  assert _run(tmp_path, [], PYTHONPATH=f'{tmp_path}:{ROOT}')[1] == 2  # Not again and again.
  (tmp_path / 'sitecustomize.py').write_text('import sys\nsys.executable = "/is/not/there"\n')
  assert _run(tmp_path, [], PYTHONPATH=f'{tmp_path}:{ROOT}')[1] == 1


def test_who_has_set_it_is_not_asked(tmp_path):
  _, begun, (_, kept, _) = _run(tmp_path, [], GLIBC_TUNABLES='glibc.malloc.hugetlb=0')
  assert (begun, kept) == (1, 'glibc.malloc.hugetlb=0')


@pytest.mark.parametrize(
    'kernel, library, is_offered',
    [
        ('always [madvise] never', 'glibc 2.36', True),
        ('always [madvise] never', 'glibc 2.35', True),
        ('always [madvise] never', 'glibc 2.34', False),
        ('always [madvise] never', 'glibc 3.0', True),
        ('[always] madvise never', 'glibc 2.36', False),  # All have them already.
        ('always madvise [never]', 'glibc 2.36', False),
        (None, 'glibc 2.36', False),
        ('always [madvise] never', None, False),
    ],
)
def test_where_huge_pages_are_to_be_had(tmp_path, monkeypatch, kernel, library, is_offered):
  if kernel:
    (tmp_path / 'enabled').write_text(kernel + '\n')
  monkeypatch.setattr(pages, '_KERNEL', tmp_path / 'enabled')
  monkeypatch.setattr(os, 'confstr', lambda name: library)
  begun = []
  monkeypatch.setattr(os, 'execve', lambda *args: begun.append(args))
  monkeypatch.setattr(sys, 'gettrace', lambda: None)
  for name in pages._WATCHERS:
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  monkeypatch.delenv('JAXALIGN_BEGUN', raising=False)
  monkeypatch.setattr(sys, 'argv', ['where/main.py', '--a'])
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-u', '-m', 'a.main', '--a'])
  pages.begin_with_huge(['-m', 'a.main'])
  assert bool(begun) == is_offered
  pages.begin_with_huge(['-m', 'another.main'])
  monkeypatch.setitem(sys.modules, 'debugpy', pages)
  pages.begin_with_huge(['-m', 'a.main'])
  assert len(begun) == is_offered


def test_the_command_line_asks_before_it_imports_jax():
  command = [sys.executable, '-X', 'importtime', '-m', 'jaxalign.main', '--list']
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environ(), timeout=120, check=True)
  imported = [line.rpartition('|')[2].strip() for line in done.stderr.splitlines() if line.startswith('import time')]
  assert imported.index('jaxalign.pages') < imported.index('jax')
  assert imported.count('jaxalign.pages') == 1 + pages._offered()
  assert imported.count('jax') == 1
