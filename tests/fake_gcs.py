"""A fake of Google Cloud Storage on this machine: gcp-storage-emulator, and what TensorStore wants beside it.

OCDBT replaces a file only while it is of the generation that was read, so that two writers never lose what one wrote.
"""

import contextlib
import functools
import http.server
import logging
import re
import threading
import urllib.parse

import fsspec
from gcp_storage_emulator import exceptions
from gcp_storage_emulator import server
from gcp_storage_emulator import storage as emulator
from gcp_storage_emulator.handlers import buckets

DENIED = 'a@b.c does not have storage.objects.get access'


class _Handler(server.RequestHandler):
  """Answers as the emulator does, but with 403 for the bucket `private`, and by generations."""

  generation = ''

  def parse_request(self):
    if not super().parse_request():
      return False
    url = urllib.parse.urlsplit(self.path)
    asked = urllib.parse.parse_qs(url.query)
    place = re.search(r'/b/([^/]+)(?:/o/?(.*))?$', url.path)
    if place is None:
      return True
    bucket, name = place[1], urllib.parse.unquote(place[2] or asked.get('name', [''])[0])
    self.generation = self._generation(bucket, name)
    wanted, known = (asked.get(f'ifGeneration{kind}', [None])[0] for kind in ('Match', 'NotMatch'))
    if bucket == 'private':
      return self._answer(403, DENIED)
    if wanted not in (None, self.generation):
      return self._answer(412, 'conditionNotMet')
    return self._answer(304, '') if known == self.generation else True

  def _generation(self, bucket, name):
    try:
      return self.storage.get_file_obj(bucket, name)['generation']
    except exceptions.NotFound:
      return '0'

  def _answer(self, code, message):
    self.rfile.read(int(self.headers.get('Content-Length', 0)))
    self.send_response(code)
    self.end_headers()
    self.wfile.write(f'{{"error": {{"code": {code}, "message": "{message}"}}}}'.encode() if message else b'')
    return False

  def end_headers(self):
    if self.command == 'GET' and 'alt=media' in self.path:
      self.send_header('x-goog-generation', self.generation)
    super().end_headers()

  def handle(self):
    with contextlib.suppress(ConnectionError):  # gcsfs asks two things at once, and hangs up when one answer will do
      super().handle()


@contextlib.contextmanager
def serving():
  """Serves `gs://bucket`; yields the environment by which gcsfs and TensorStore find it."""
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  held = emulator.Storage(use_memory_fs=True)
  buckets.create_bucket('bucket', held)
  with http.server.HTTPServer(('127.0.0.1', 0), functools.partial(_Handler, held)) as served:
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    url = f'http://127.0.0.1:{served.server_port}'
    # No credentials are looked for, and nobody else is asked.
    nobody = {'GCE_METADATA_ROOT': '127.0.0.1:1', 'NO_GCE_CHECK': 'true'}
    yield {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url, **nobody}
    served.shutdown()
    thread.join()


def put(folder, target):
  """Puts all that a folder holds into a bucket."""
  fsspec.filesystem('gcs').put(f'{folder}/', f'{target}/', recursive=True)


def generations(place):
  """The generation of every object below a place, by its name."""
  return {name: info['generation'] for name, info in fsspec.filesystem('gcs').find(str(place), detail=True).items()}
