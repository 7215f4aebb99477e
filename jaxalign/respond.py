"""Responses of a model to prompts: of the command line, or of the records of a data set."""

from collections.abc import Sequence
from typing import Any

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import recipe as recipe_lib
from jaxalign import sampling
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import records
from jaxalign.data import sources
from jaxalign.data import tokenizers


def respond(
    spec: str,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str],
    *,
    chat: bool,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
  """Samples responses to each prompt from a checkpoint or a Hugging Face directory.

  Args:
    spec: as for `--model`.
    mesh: where the model lies.
    prompts: texts.
    chat: whether a prompt is what a user says, to be written by the tokenizer's chat template.
    per_prompt: responses to each prompt.
    max_new_tokens: length at which a response is cut.
    temperature: of sampling, 0 is greedy.
    seed: of sampling.

  Returns:
    Those of the first prompt, then those of the next.

  Raises:
    UsageError: a prompt is empty, or too long for the model's context, or the model is a reward model.
    RunError: the chat template fails.
  """
  with jax.set_mesh(mesh):
    loaded = _policy(spec, mesh)
    ids = [_ids(loaded.tokenizer, prompt, chat) for prompt in prompts]
    if not all(ids):
      raise types.UsageError('--prompt: an empty prompt has no token to begin with (this tokenizer has no BOS)')
    longest, context = max(map(len, ids)), loaded.model.config.max_length
    if longest + max_new_tokens > context:
      raise types.UsageError(
          f'--prompt: {longest} tokens and --max_new_tokens={max_new_tokens} exceed the context of the model, {context}'
      )
    drawn = _draw(loaded, ids, chat, per_prompt, max_new_tokens, temperature, seed)
  return [loaded.tokenizer.decode(one.ids, continuation=not chat) for one in drawn]


def to_records(
    job: recipe_lib.Job, *, chat: bool, per_prompt: int, max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
  """Samples responses to the column `prompt` (text or messages) of each record of `--data`.

  Args:
    job: names model, data, mesh and seed.
    chat: whether a prompt of text is what a user says.
    per_prompt: responses to each prompt.
    max_new_tokens: length at which a response is cut.
    temperature: of sampling, 0 is greedy.

  Returns:
    The records with a column `samples`, a list of texts, in place of any other list and its scores; a prompt that was
    said in a chat is then messages. Where a sample was cut, `append_eos` is false, so that no end is learned of the
    record. Records whose prompt leaves no room in the context are left out and counted.

  Raises:
    UsageError: the model is a reward model, or sources have weights.
    RunError: a record has no prompt or cannot be read, or prompts are of text and of messages, or none is left.
  """
  with jax.set_mesh(job.mesh):
    loaded = _policy(job.model, job.mesh)
    room = loaded.model.config.max_length - max_new_tokens
    kept, ids, is_chat = _prompts(job, loaded.tokenizer, chat, room)
    drawn = _draw(loaded, ids, is_chat, per_prompt, max_new_tokens, temperature, job.seed)
  for index, record in enumerate(kept):
    own = drawn[index * per_prompt : (index + 1) * per_prompt]
    if chat and isinstance(record['prompt'], str):
      record['prompt'] = records.messages(record, 'prompt', 'user')
    for name in ('completions', 'scores', 'ranks', *(['append_eos'] if 'samples' in record else [])):
      record.pop(name, None)  # They say something of another list.
    record['samples'] = [loaded.tokenizer.decode(one.ids, continuation=not is_chat) for one in own]
    if not all(one.finished for one in own):
      record['append_eos'] = False
  return kept


def _prompts(
    job: recipe_lib.Job, tokenizer: tokenizers.Tokenizer, chat: bool, room: int
) -> tuple[list[dict[str, Any]], list[list[int]], bool]:
  """The records of `--data` whose prompt fits, the ids of each prompt, and whether they are chats."""
  kept, ids, chats, left = [], [], set(), []
  for source in (sources.open_source(spec, job.data_dir) for spec in sources.parse_all(job.data)):
    for index in range(len(source)):
      record = source[index]
      try:
        if record.get('prompt') is None:
          raise records.missing(record, None, ('prompt',))
        one = _ids(tokenizer, record['prompt'], chat)
      except types.RunError as err:
        raise types.RunError(f'{source.where(index)}: {err}') from err
      if 0 < len(one) <= room:
        kept.append(record)
        ids.append(one)
        chats.add(chat or not isinstance(record['prompt'], str))
      else:
        left.append(source.where(index))
  if left:
    logging.warning('%d records left out: no prompt of 1 to %d tokens (first %s)', len(left), room, left[0])
  if len(chats) != 1:
    raise types.RunError(f'--data={job.data}: {"prompts are text and messages" if chats else "no record is left"}')
  return kept, ids, chats.pop()


def _policy(spec: str, mesh: jax.sharding.Mesh) -> checkpoint.Loaded:
  loaded = checkpoint.writer(recipe_lib.load(spec, mesh))
  if loaded.model.config.score_outputs:
    raise types.UsageError(f'{spec}: a reward model scores responses and writes none')
  return loaded


def _ids(tokenizer: tokenizers.Tokenizer, prompt: Any, chat: bool) -> list[int]:
  if isinstance(prompt, str) and not chat:
    return examples.prompt_ids(tokenizer, prompt)
  return examples.prompt_ids(tokenizer, records.messages({'prompt': prompt}, 'prompt', 'user'))


def _draw(
    loaded: checkpoint.Loaded,
    prompts: list[list[int]],
    chat: bool,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[sampling.Sampled]:
  return sampling.sample(
      loaded.model,
      loaded.params,
      [ids for ids in prompts for _ in range(per_prompt)],
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      seed=seed,
      stop_ids=prompts_lib.stop_ids(loaded.tokenizer, chat),
  )
