"""Memory in huge pages, which the C library gives a process only where its environment says so from the start."""

import os
import pathlib
import sys

_KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
_NAME = 'GLIBC_TUNABLES'
_SETTING = 'glibc.malloc.hugetlb'
_SINCE = (2, 35)


def begin_with_huge() -> None:
  """Begins this process anew with memory in huge pages, where it has none and they are had for the asking.

  The arrays of XLA on CPUs come from the C library. In pages of 4 KiB a step looks up hundreds of thousands of them,
  and makes many of them anew: a step of DPO of 15 million parameters took 5 to 10 % longer. Call it before anything
  is done: nothing before it is kept but the process id. Whoever sets `glibc.malloc.hugetlb` in GLIBC_TUNABLES, to 0
  for none, is not asked, and nothing happens below a debugger.
  """
  asked = os.environ.get(_NAME, '')
  if _SETTING in asked or not _offered() or _is_debugged():
    return
  environ = os.environ | {_NAME: ':'.join(filter(None, [asked, f'{_SETTING}=1']))}
  sys.stdout.flush()
  sys.stderr.flush()
  os.execve(sys.executable, sys.orig_argv, environ)


def _offered() -> bool:
  """Whether the kernel gives huge pages to those who ask (not to all, who then have them), and the C library asks."""
  try:
    name, _, version = (os.confstr('CS_GNU_LIBC_VERSION') or '').partition(' ')
    found = tuple(int(part) for part in version.split('.')[:2])
    return name == 'glibc' and found >= _SINCE and '[madvise]' in _KERNEL.read_text(encoding='ascii')
  except (OSError, ValueError):
    return False


def _is_debugged() -> bool:
  return sys.gettrace() is not None or any(name in sys.modules for name in ('debugpy', 'pydevd', 'pdb'))
