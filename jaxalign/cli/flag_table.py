"""The flags of the command line, as a table: what there is, and what it means."""

from collections.abc import Callable
import functools
from typing import Any

from absl import flags

from jaxalign import recipe as recipe_lib

_DATA = (
    'jsonl:PATH (also .gz), parquet:PATH (both also gs://BUCKET/NAME), tfds:NAME[/CONFIG][:SPLIT], builtin:NAME[:SPLIT]'
)

_POSITIVE = functools.partial(flags.DEFINE_integer, lower_bound=1)
_COUNT = functools.partial(flags.DEFINE_integer, lower_bound=0)

# (kind, name, default, help), in the order of --help.
FLAGS: tuple[tuple[Callable[..., Any], str, Any, str], ...] = (
    (flags.DEFINE_bool, 'help', False, 'Show this.'),
    (flags.DEFINE_bool, 'list', False, 'List the algorithms, one line each.'),
    (flags.DEFINE_bool, 'markdown', False, 'With --list: a table with paper and test.'),
    (flags.DEFINE_string, 'mode', 'train', 'train, eval, sample, score, show or plan.'),
    (flags.DEFINE_string, 'algo', None, 'The algorithm: a file of gin_configs; --list names them.'),
    (
        flags.DEFINE_string,
        'model',
        None,
        'A Hugging Face directory, a checkpoint of jaxalign (either may be gs://BUCKET/NAME), or a name in'
        ' gin_configs/models (random initialisation).'
        f' Default: {recipe_lib.DEFAULT_MODEL}, which the package holds.',
    ),
    (
        flags.DEFINE_string,
        'tokenizer',
        None,
        'A SentencePiece .model, a tokenizer.json, or a directory with one (also gs://BUCKET/NAME). Default: the one'
        ' beside the model.',
    ),
    (
        flags.DEFINE_string,
        'data',
        None,
        f'Training data (with --mode=score: what is scored; with --mode=sample: what has prompts): {_DATA}; a'
        ' slice [a:b] may follow; a mixture is A:0.7,B:0.3. Default: the built-in data of the algorithm.',
    ),
    (flags.DEFINE_string, 'eval_data', None, 'Held-out data, written as --data; empty for none.'),
    (flags.DEFINE_string, 'data_dir', None, 'Where TFDS data sets lie.'),
    (
        flags.DEFINE_string,
        'cache_dir',
        None,
        'Where tokenised data, reference log-probabilities, compiled programs and copies from buckets are kept, on a'
        ' disk. Default: jaxalign in $XDG_CACHE_HOME or ~/.cache.',
    ),
    (
        flags.DEFINE_bool,
        'skip_bad_records',
        False,
        'Skip and count malformed records instead of stopping at the first.',
    ),
    (
        flags.DEFINE_string,
        'mesh',
        '',
        'Sizes of the mesh axes data, fsdp, tensor, context, expert, as fsdp:4,tensor:2; -1 is the rest. Default:'
        ' fsdp:-1.',
    ),
    (flags.DEFINE_string, 'dcn_mesh', '', 'The same between the slices of a multi-slice TPU job. Default: data:-1.'),
    (
        flags.DEFINE_string,
        'topology',
        '',
        'For --mode=plan: the devices to compile for, as v5e:4x4, v5p:4x4x4, v6e:8x8 or h100:8 (an estimate).',
    ),
    (_POSITIVE, 'num_slices', 1, 'For --mode=plan: how many slices of that topology. Default: 1.'),
    (flags.DEFINE_bool, 'json', False, 'For --mode=plan: print one JSON object, with --search an array of them.'),
    (
        flags.DEFINE_bool,
        'search',
        False,
        'For --mode=plan: compile the step with other meshes (without --mesh), remat policies, rows and micro-batches,'
        ' as many rows of a step in all, and print those than which none is both smaller and faster, and the command'
        ' line of the fastest, of which the whole run is compiled.',
    ),
    (
        flags.DEFINE_string,
        'lora',
        '',
        'Train low-rank adapters of a frozen model: rank:16,alpha:32,dropout:0.05,targets:q+v,rslora:true,dora:true,'
        'base:bfloat16 (or int8, nf4), or adapter:DIR (a PEFT directory to start from); what is left out has its'
        ' default, see models/lora.py.',
    ),
    (
        flags.DEFINE_string,
        'workdir',
        None,
        'Where the run is kept, a folder or gs://BUCKET/NAME; the same command resumes it. Default: runs/ALGO.',
    ),
    (_POSITIVE, 'steps', None, 'Optimizer steps of the whole run.'),
    (
        flags.DEFINE_integer,
        'seed',
        None,
        'Seed of data order, initialisation and sampling. Default: 0; with --mode=eval the seed of the run.',
    ),
    (_POSITIVE, 'log_every', None, 'Steps between logged lines.'),
    (_COUNT, 'eval_every', None, 'Steps between evaluations; 0: only before and after.'),
    (_COUNT, 'save_every', None, 'Steps between checkpoints; 0: only the last.'),
    (
        flags.DEFINE_string,
        'profile',
        '',
        "Steps that JAX's profiler records, FIRST:LAST, as 3:5; TensorBoard or xprof shows `profile` in --workdir.",
    ),
    (
        flags.DEFINE_multi_string,
        'gin_file',
        [],
        'A gin file of your own, applied after those of the algorithm; with --mode=score after what the run bound, for'
        ' a recipe.Recipe.scored_fn of your own.',
    ),
    (
        flags.DEFINE_multi_string,
        'gin',
        [],
        "A gin binding, applied after all gin files, as 'preference.dpo.beta=0.2'; flags that bind come after it.",
    ),
    (
        flags.DEFINE_string,
        'checkpoint',
        None,
        'For --mode=eval, sample and score: a workdir, or one checkpoint in it, also gs://BUCKET/NAME.',
    ),
    (flags.DEFINE_multi_string, 'prompt', [], 'For --mode=sample: what to continue, instead of --data.'),
    (
        flags.DEFINE_bool,
        'chat',
        False,
        'For --mode=sample: --prompt is what a user says; the chat template (or that of HH) writes it.',
    ),
    (_POSITIVE, 'samples_per_prompt', 1, 'For --mode=sample: responses to each prompt. Default: 1.'),
    (_POSITIVE, 'max_new_tokens', 128, 'For --mode=sample: length of the response. Default: 128.'),
    (
        functools.partial(flags.DEFINE_float, lower_bound=0.0),
        'temperature',
        1.0,
        'For --mode=sample: 0 is greedy. Default: 1.',
    ),
    (_COUNT, 'top_k', 0, 'For --mode=sample: draw from the k most probable tokens; 0 from all. Default: 0.'),
    (
        flags.DEFINE_float,
        'top_p',
        1.0,
        'For --mode=sample: draw from the fewest tokens whose probability reaches p. Default: 1.',
    ),
    (
        flags.DEFINE_float,
        'min_p',
        0.0,
        "For --mode=sample: draw from tokens with at least this share of the most probable one's probability."
        ' Default: 0.',
    ),
    (
        flags.DEFINE_float,
        'repetition_penalty',
        1.0,
        'For --mode=sample: above 1 makes tokens of prompt and response less likely to come again. Default: 1.',
    ),
    (
        flags.DEFINE_multi_string,
        'stop',
        [],
        'For --mode=sample: a text that ends a response, and is left out of it. Repeatable.',
    ),
    (
        flags.DEFINE_string,
        'cache_dtype',
        '',
        'For --mode=sample: int8 keeps keys and values in 8 bits. Default: in the precision of the model.',
    ),
    (
        flags.DEFINE_bool,
        'stream',
        None,
        'For --mode=sample with one --prompt: show text as it is written. Default: on a terminal.',
    ),
    (
        flags.DEFINE_string,
        'decode',
        '',
        'For --mode=sample: alignment without training, a file of gin_configs/decode: best_of_n, mbr and vote choose'
        ' one of several candidates; rad, cd, cd_blockwise, dera, contrastive and proxy are guided by other models;'
        ' urial shows examples first. Its parameters are bound by --gin. Default: none.',
    ),
    (
        flags.DEFINE_multi_string,
        'guide',
        [],
        'For --decode: a model that guides, as --model, with the same tokenizer. Repeatable: proxy wants the tuned,'
        ' then the base model.',
    ),
    (
        flags.DEFINE_multi_string,
        'reward',
        [],
        'What judges responses: those that an online algorithm or --mode=sample samples (there --decode=best_of_n and'
        ' mbr choose by it, and the mean is logged), or with --mode=score those of --data. A'
        ' function is MODULE:FUNCTION or path/to/file.py:FUNCTION; options and a weight may follow, as in'
        " 'my.py:score(goal=3, processes=4, timeout=10):0.5'; jaxalign.rewards.rules, lengths and instructions have"
        ' some. A model is DIR, a'
        ' checkpoint or a Hugging Face directory: a reward model (output=0 is which output of several), one of steps'
        " (reduce='min', 'mean', 'last' or 'product' of the probabilities that they are right), or a policy with its"
        " reference (beta times the log-ratio, as 'runs/dpo(beta=0.1):2'); dtype='bfloat16' keeps it in that,"
        " mesh='data:-1' lays it on a mesh of its own. A+B are several models, of which how='mean', 'worst' or"
        " 'uncertainty' (with penalty) makes one, and centre=True takes each one's mean from it first. Repeatable.",
    ),
    (
        flags.DEFINE_string,
        'environment',
        '',
        'For online algorithms: what answers the policy, for up to rollouts.Options.turns turns; its rewards are'
        ' added up, and those of --reward, if any, to them. MODULE:FUNCTION as for --reward, a step(state, text) ->'
        ' (observation, reward, done); jaxalign.rewards.environments has some.',
    ),
    (
        flags.DEFINE_string,
        'combine',
        'sum',
        'For --reward: sum (weighted), normalised (each over all responses first), or gated (the others count where'
        ' the first is above 0). Default: sum.',
    ),
    (
        flags.DEFINE_string,
        'per',
        'response',
        'For --mode=score: what is scored, each response, token, or step (an item of the column completions).',
    ),
    (
        _POSITIVE,
        'row_length',
        None,
        'For --mode=score: tokens of the longest sequence; longer ones are cut. Default: 1024, or the context of the'
        ' model.',
    ),
    (
        flags.DEFINE_bool,
        'debug',
        False,
        'Locate NaNs, forbid implicit transfers between host and device, and print shapes. Slow.',
    ),
)
