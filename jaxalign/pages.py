"""Memory in huge pages, which the C library gives a process only where its environment says so from the start."""

from collections.abc import Sequence
import contextlib
import os
import pathlib
import sys

_KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
_NAME = 'GLIBC_TUNABLES'
_SETTING = 'glibc.malloc.hugetlb'
_SINCE = (2, 35)
_BEGUN = 'JAXALIGN_BEGUN'  # a process that began anew does not do so again, whatever became of the setting
_WATCHERS = ('debugpy', 'memray', 'pdb', 'pydevd')  # whose process must not begin anew


def begin_with_huge(program: Sequence[str]) -> None:
  """Begins this process anew with memory in huge pages, where it has none and they are had for the asking.

  The arrays of XLA on CPUs come from the C library. In pages of 4 KiB a step looks up hundreds of thousands of them,
  and makes many of them anew: a step of DPO of 15 million parameters took 5 to 10 % longer. Call it before anything
  is done: nothing before it is kept but the process id and what is open. Whoever sets `glibc.malloc.hugetlb` in
  GLIBC_TUNABLES, to 0 for none, is not asked; nothing happens below a debugger of Python, nor in a process that was
  started as anything else than `program`.

  Args:
    program: what stands before the arguments in the command line of Python: ['-m', 'a.module'] or ['a_script.py'].
  """
  asked = os.environ.get(_NAME, '')
  started = [*program, *sys.argv[1:]]
  if _SETTING in asked or _BEGUN in os.environ or sys.orig_argv[-len(started) :] != started:
    return
  if not sys.executable or not _offered() or sys.gettrace() is not None or any(map(sys.modules.get, _WATCHERS)):
    return
  environ = os.environ | {_NAME: ':'.join(filter(None, [asked, f'{_SETTING}=1'])), _BEGUN: '1'}
  with contextlib.suppress(OSError):  # It is no more than faster.
    os.execve(sys.executable, sys.orig_argv, environ)


def _offered() -> bool:
  """Whether the kernel gives huge pages to those who ask (not to all, who then have them), and the C library asks."""
  try:
    name, _, version = (os.confstr('CS_GNU_LIBC_VERSION') or '').partition(' ')
    found = tuple(int(part) for part in version.split('.')[:2])
    return name == 'glibc' and found >= _SINCE and '[madvise]' in _KERNEL.read_text(encoding='ascii')
  except (OSError, ValueError):
    return False
