"""Where files lie: on a disk, or in a bucket of Google Cloud Storage (gs://BUCKET/NAME).

Files in buckets are read and written by etils.epath by way of gcsfs, arrays by Orbax. What is mapped into memory is
read from a copy on this machine's disk, which each host makes for itself.
"""

import argparse
from collections.abc import Iterator
import contextlib
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import TypeAlias

from absl import logging
from etils import epath
import fsspec

from jaxalign import types

Path: TypeAlias = pathlib.Path | epath.Path

# TensorFlow, where it is installed, has a file system of its own, with errors of its own.
os.environ.setdefault('EPATH_USE_TF', 'false')
_BUCKET = re.compile(r'gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/.*)?')
_copies: pathlib.Path | None = None


def path(text: str | os.PathLike) -> Path:
  """The path that a text names; asks neither disk nor bucket.

  Raises:
    UsageError: it is a URL of something else than a bucket of Google's, or gcsfs is not installed.
  """
  if isinstance(text, pathlib.Path | epath.Path):
    return text
  text = os.fspath(text)
  if not re.match(r'\w+://', text):
    return pathlib.Path(text)
  if not _BUCKET.fullmatch(text):
    raise types.UsageError(f'{text}: write gs://BUCKET/NAME, or the path of a file or folder')
  if importlib.util.find_spec('gcsfs') is None:
    raise types.UsageError(f'{text}: paths in buckets need gcsfs: pip install "jaxalign[gcs]"')
  # Read when gcsfs is first imported: to ask of what kind a bucket is needs one more permission.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  # What others write is seen: Orbax does not write by gcsfs, and there may be other hosts.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return epath.Path(text)


def is_remote(place: str | os.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(place).startswith('gs://')


def on_disk(text: str) -> pathlib.Path:
  """A path for a flag of `argparse`, which then names the flag where the path is not one of a disk."""
  if '://' in text:
    raise argparse.ArgumentTypeError(f'{text}: give a path on a disk, and copy from or to buckets by gcloud storage cp')
  return pathlib.Path(text)


def absolute(text: str | os.PathLike) -> Path:
  """The same as `path`, from the root of the disk."""
  found = path(text)
  return found if is_remote(found) else found.absolute()


def errors() -> tuple[type[Exception], ...]:
  """What is raised where a file cannot be read or written."""
  if 'gcsfs' not in sys.modules:
    return (OSError,)
  import aiohttp  # pylint: disable=g-import-not-at-top
  import gcsfs.retry  # pylint: disable=g-import-not-at-top
  import google.auth.exceptions  # pylint: disable=g-import-not-at-top

  return OSError, gcsfs.retry.HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError


def reason(err: Exception) -> str:
  """Why, in words, of one of `errors`."""
  if isinstance(err, OSError) and err.strerror:
    return err.strerror
  if isinstance(err, FileNotFoundError):  # gcsfs says no more than where it looked
    return 'there is no such bucket or object'
  return ' '.join(str(err).split()) or type(err).__name__


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
  """Raises UsageError of `what` where a bucket or file is not there, RunError of it where another of `errors` comes."""
  try:
    yield
  except errors() as err:
    kind = types.UsageError if isinstance(err, FileNotFoundError) else types.RunError
    raise kind(f'{what}: {reason(err)}') from err


def write_text(place: Path, text: str) -> None:
  """Writes a whole file or none: on a disk to a neighbour first, then renamed; folders are made."""
  if is_remote(place):
    place.write_bytes(text.encode())
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  part = place.with_name(f'{place.name}.part')
  with part.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())  # Or a machine that goes down may leave the new name without the text.
  os.replace(part, place)


def keep_copies(folder: pathlib.Path) -> None:
  """Says where `local` keeps its copies in this process."""
  global _copies
  _copies = folder


def cache_dir() -> pathlib.Path:
  """The default of --cache_dir."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')) / 'jaxalign'


def local(place: str | os.PathLike) -> pathlib.Path:
  """The file itself, or a copy of an object of a bucket: one is made of each generation that the object has.

  Raises:
    FileNotFoundError: it is not there.
    RunError: it cannot be copied.
  """
  found = path(place)
  if isinstance(found, pathlib.Path):
    return found
  files, name = fsspec.core.url_to_fs(os.fspath(found))
  info = files.info(name)
  if info['type'] != 'file':
    raise IsADirectoryError(f'{found} is a folder')
  key = hashlib.blake2b(f'{name}#{info["generation"]}'.encode(), digest_size=16).hexdigest()
  copy = (_copies or cache_dir() / 'copies') / key / found.name
  if copy.exists():
    return copy
  logging.info('copying %s (%.1f MB) to %s', found, info['size'] / 1e6, copy.parent)
  try:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix='.part-') as scratch:
      part = pathlib.Path(scratch, 'whole')
      files.get_file(name, str(part))
      if part.stat().st_size != info['size']:
        raise OSError(f'{part.stat().st_size} of {info["size"]} bytes came')
      os.replace(part, copy)
  except errors() as err:
    raise types.RunError(f'{found}: cannot be copied to {copy.parent}: {reason(err)}') from err
  return copy


class Growing:
  """Files of a folder that grow. A bucket cannot append: there they grow on this machine's disk and are sent whole.

  Attributes:
    folder: where they are written.
  """

  def __init__(self, place: Path, *names: str):
    """Begins with what the files of these names have there."""
    self._place, self._sent, self._last = place, dict[str, int](), -float('inf')
    self._scratch = None
    self.folder = pathlib.Path(place)
    if is_remote(place):
      self._scratch = tempfile.TemporaryDirectory(prefix='jaxalign-')
      self.folder = pathlib.Path(self._scratch.name)
      for name in names:
        if (place / name).exists():
          (self.folder / name).write_bytes((place / name).read_bytes())

  def is_due(self, seconds: float) -> bool:
    """Whether nothing was sent to a bucket for so long."""
    return self._scratch is not None and time.monotonic() - self._last > seconds

  def send(self) -> None:
    """Sends what has grown since it was last sent; raises one of `errors`."""
    if self._scratch is None:
      return
    self._last = time.monotonic()
    for file in sorted(one for one in self.folder.rglob('*') if one.is_file()):
      name, size = file.relative_to(self.folder).as_posix(), file.stat().st_size
      if self._sent.get(name) != size:
        (self._place / name).write_bytes(file.read_bytes())
        self._sent[name] = size

  def close(self) -> None:
    """Sends the rest."""
    self.send()
    if self._scratch is not None:
      self._scratch.cleanup()
