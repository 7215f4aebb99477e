"""Responses of a model to prompts: of the command line, or of the records of a data set."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import sys
from typing import Any
from typing import NamedTuple

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import recipe as recipe_lib
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import records
from jaxalign.data import sources
from jaxalign.data import tokenizers
from jaxalign.generation import next_token
from jaxalign.generation import sampling
from jaxalign.rewards import verdicts


@dataclasses.dataclass(frozen=True)
class Options:
  """How responses are sampled.

  Attributes:
    chat: whether a prompt is what a user says, to be written by the tokenizer's chat template.
    per_prompt: responses to each prompt.
    max_new_tokens: length at which a response is cut.
    temperature: 0 is greedy; see `next_token.Rule`, likewise the next four.
    top_k: likewise.
    top_p: likewise.
    min_p: likewise.
    repetition_penalty: likewise.
    stop: texts that end a response, and are left out of it.
    cache_dtype: see `sampling.sample`.
  """

  chat: bool = False
  per_prompt: int = 1
  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  stop: tuple[str, ...] = ()
  cache_dtype: str | None = None

  def __post_init__(self):
    if not all(self.stop):
      raise types.UsageError('--stop: an empty text ends every response at once')
    try:
      self.rule.check()
      sampling.check_cache_dtype(self.cache_dtype)
    except types.UsageError as err:
      raise types.UsageError(f'--{err}') from err

  @property
  def rule(self) -> next_token.Rule:
    """How tokens are chosen."""
    return next_token.Rule(**{name: getattr(self, name) for name in next_token.Rule._fields})

  def before_stop(self, text: str) -> str:
    """A text up to the first of the texts that end it."""
    return text[: min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]


class Asked(NamedTuple):
  """Prompts that responses are sampled to, and whether they are messages or said in a chat."""

  prompts: Sequence[verdicts.Prompt]
  is_chat: bool

  @property
  def ids(self) -> list[list[int]]:
    """Tokens of each."""
    return [prompt.ids for prompt in self.prompts]


class Drawn(NamedTuple):
  """As many responses to each prompt as were asked for, and columns by name that say something of each."""

  responses: list[sampling.Sampled]
  columns: Mapping[str, Sequence[Any]] = {}


# (the model, prompts, options, seed) -> responses, on the current mesh.
Draw = Callable[[checkpoint.Loaded, Asked, Options, int], Drawn]


def plainly(loaded: checkpoint.Loaded, asked: Asked, options: Options, seed: int) -> Drawn:
  """Draws from the model alone."""
  return Drawn(draw(loaded, asked.ids, options, seed, asked.is_chat))


def respond(
    spec: str,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str],
    options: Options,
    *,
    seed: int,
    tell: Callable[[str], None] | None = None,
    draw_fn: Draw = plainly,
) -> list[str]:
  """Samples responses to each prompt from a checkpoint or a Hugging Face directory.

  Args:
    spec: as for `--model`.
    mesh: where the model lies.
    prompts: texts.
    options: how.
    seed: of sampling.
    tell: of a single response, called with more of its text as it is written; it is then drawn plainly.
    draw_fn: what draws them.

  Returns:
    Those of the first prompt, then those of the next.

  Raises:
    UsageError: a prompt is empty, or too long for the model's context, or the model is a reward model.
    RunError: the chat template fails.
  """
  with jax.set_mesh(mesh):
    loaded = policy(spec, mesh)
    ids = [_ids(loaded.tokenizer, prompt, options.chat) for prompt in prompts]
    if not all(ids):
      raise types.UsageError('--prompt: an empty prompt has no token to begin with (this tokenizer has no BOS)')
    longest, context = max(map(len, ids)), loaded.model.config.max_length
    if longest + options.max_new_tokens > context:
      raise types.UsageError(
          f'--prompt: {longest} tokens and --max_new_tokens={options.max_new_tokens} exceed the context of the model,'
          f' {context}'
      )
    if tell is not None:
      return texts(loaded, ids, options, seed=seed, tell=tell)
    of_flag = lambda own, text: verdicts.Prompt(own, {'prompt': text}, f'--prompt={text!r}')
    drawn = draw_fn(loaded, Asked(list(map(of_flag, ids, prompts)), options.chat), options, seed)
    return [text_of(loaded.tokenizer, one, options, options.chat) for one in drawn.responses]


def text_of(tokenizer: tokenizers.Tokenizer, one: sampling.Sampled, options: Options, is_chat: bool) -> str:
  """What a response says."""
  return options.before_stop(tokenizer.decode(one.ids, continuation=not is_chat))


def write(
    spec: str,
    mesh: jax.sharding.Mesh,
    prompts: Sequence[str],
    options: Options,
    *,
    seed: int,
    as_written: bool,
    draw_fn: Draw = plainly,
) -> None:
  """Prints each prompt and what `respond` makes of it; `as_written`, a single response is shown while it grows."""
  between, end = ('\n\n', '\n\n') if options.chat else ('', '\n')

  def tell(text: str) -> None:
    if jax.process_index() == 0:
      sys.stdout.write(text)
      sys.stdout.flush()

  # The prompt is shown once it is known to be one.
  told = iter([prompts[0] + between])
  shown = (lambda text: tell(next(told, '') + text)) if as_written else None
  found = respond(spec, mesh, prompts, options, seed=seed, tell=shown, draw_fn=draw_fn)
  if as_written:
    tell(next(told, '') + end)
    return
  for prompt, text in zip([prompt for prompt in prompts for _ in range(options.per_prompt)], found, strict=True):
    tell(prompt + between + (text.strip() if options.chat else text) + end)


def texts(
    loaded: checkpoint.Loaded,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    seed: int,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
  """The same of a model that is there and prompts that are tokens, on the current mesh."""
  teller = _Teller(tell, options.stop) if tell is not None else None
  decode = lambda ids: loaded.tokenizer.decode(ids, continuation=not options.chat)
  watch = None if teller is None else lambda _, ids: teller.read(decode(ids))
  found = [options.before_stop(decode(one.ids)) for one in draw(loaded, prompts, options, seed, options.chat, watch)]
  if teller is not None:
    teller.end(found[0])
  return found


class _Teller:
  """Tells what is new of a text that grows, as far as it can no longer change."""

  def __init__(self, tell: Callable[[str], None], stop: Sequence[str]):
    self._tell, self._stop, self._told = tell, stop, 0

  def read(self, text: str) -> None:
    """Takes what there is, but for an unfinished character and what may be the begin of a text that ends it."""
    text = text.rstrip('\ufffd')
    starts = (len(text) - n for stop in self._stop for n in range(1, len(stop) + 1) if text.endswith(stop[:n]))
    self.end(text[: min(starts, default=len(text))])

  def end(self, text: str) -> None:
    """Takes the whole."""
    if len(text) > self._told:
      self._tell(text[self._told :])
      self._told = len(text)


def to_records(job: recipe_lib.Job, options: Options, draw_fn: Draw = plainly) -> list[dict[str, Any]]:
  """Samples responses to the column `prompt` (text or messages) of each record of `--data`.

  Args:
    job: names model, data, mesh and seed.
    options: how; `chat` says whether a prompt of text is what a user says.
    draw_fn: what draws them.

  Returns:
    The records with a column `samples`, a list of texts, in place of any other list and its scores, and those columns
    that `draw_fn` gives; a prompt that was
    said in a chat is then messages. Where a sample was cut, `append_eos` is false, so that no end is learned of the
    record. Records whose prompt leaves no room in the context are left out and counted.

  Raises:
    UsageError: the model is a reward model, or sources have weights.
    RunError: a record has no prompt or cannot be read, or prompts are of text and of messages, or none is left.
  """
  with jax.set_mesh(job.mesh):
    loaded = policy(job.model, job.mesh)
    room = loaded.model.config.max_length - options.max_new_tokens
    asked = _prompts(job, loaded.tokenizer, options.chat, room)
    drawn, columns = draw_fn(loaded, asked, options, job.seed)
  kept = [dict(prompt.record) for prompt in asked.prompts]
  for index, record in enumerate(kept):
    of_record = slice(index * options.per_prompt, (index + 1) * options.per_prompt)
    own = drawn[of_record]
    if options.chat and isinstance(record['prompt'], str):
      record['prompt'] = records.messages(record, 'prompt', 'user')
    for name in ('completions', 'scores', 'ranks', 'log_ratios', *(['append_eos'] if 'samples' in record else [])):
      record.pop(name, None)  # They say something of another list.
    record['samples'] = [text_of(loaded.tokenizer, one, options, asked.is_chat) for one in own]
    record |= {name: list(values[of_record]) for name, values in columns.items()}
    if not all(one.finished for one in own):
      record['append_eos'] = False
  return kept


def _prompts(job: recipe_lib.Job, tokenizer: tokenizers.Tokenizer, chat: bool, room: int) -> Asked:
  """The prompts of `--data` that fit, with their records."""
  kept, chats, left = [], set(), []
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
        kept.append(verdicts.Prompt(one, record, source.where(index)))
        chats.add(chat or not isinstance(record['prompt'], str))
      else:
        left.append(source.where(index))
  if left:
    logging.warning('%d records left out: no prompt of 1 to %d tokens (first %s)', len(left), room, left[0])
  if len(chats) != 1:
    raise types.UsageError(f'--data={job.data}: {"prompts are text and messages" if chats else "no record is left"}')
  return Asked(kept, chats.pop())


def policy(spec: str, mesh: jax.sharding.Mesh, flag: str = '') -> checkpoint.Loaded:
  """A model that writes, from a checkpoint or a Hugging Face directory; raises UsageError where it scores instead."""
  loaded = checkpoint.writer(recipe_lib.load(spec, mesh))
  if loaded.model.config.score_outputs:
    raise types.UsageError(f'{flag}{spec}: it has a head that scores responses, and writes none')
  return loaded


def _ids(tokenizer: tokenizers.Tokenizer, prompt: Any, chat: bool) -> list[int]:
  if isinstance(prompt, str) and not chat:
    return examples.prompt_ids(tokenizer, prompt)
  return examples.prompt_ids(tokenizer, records.messages({'prompt': prompt}, 'prompt', 'user'))


def draw(
    loaded: checkpoint.Loaded,
    prompts: Sequence[Sequence[int]],
    options: Options,
    seed: int,
    is_chat: bool,
    watch: Callable[[int, list[int]], None] | None = None,
    guidance: sampling.Guidance | None = None,
    requests: Sequence[int] | None = None,
) -> list[sampling.Sampled]:
  """Responses to prompts that are tokens, on the current mesh; see `sampling.sample`."""
  return sampling.sample(
      loaded.model,
      loaded.params,
      prompts,
      n=options.per_prompt,
      max_new_tokens=options.max_new_tokens,
      **options.rule._asdict(),
      seed=seed,
      stop_ids=prompts_lib.stop_ids(loaded.tokenizer, is_chat),
      stop=stop_of(loaded, options, is_chat),
      cache_dtype=options.cache_dtype,
      watch=watch,
      guidance=guidance,
      requests=requests,
  )


def stop_of(loaded: checkpoint.Loaded, options: Options, is_chat: bool) -> sampling.Stop:
  """The texts that end a response."""
  return sampling.Stop(options.stop, lambda ids: loaded.tokenizer.decode(ids, continuation=not is_chat))
