"""Runs a work by TRL's trainers, or by transformers' `generate`, which is TRL's way of sampling without vLLM.

What TRL does by default stands, but for what makes it faster without changing the work: every core computes, and SFT is
packed. Where torch finds a GPU it is used, with 16-bit products where jaxalign has them; activations are computed again
(checkpointing) where jaxalign computes all of them again. Reading and collating a batch is not counted.
"""

import os
import tempfile
import time

import common
import datasets
import torch
import transformers
import trl


def tokenizer_of(work):
  """The tokenizer of words."""
  special = {'pad_token': '<pad>', 'eos_token': '<eos>', 'unk_token': '<pad>'}
  return transformers.PreTrainedTokenizerFast(tokenizer_file=f'{work["folder"]}/tokenizer.json', **special)


def model_of(work):
  """A model of random weights."""
  torch.manual_seed(work['seed'])
  fields = {name: value for name, value in work['hf_config'].items() if name not in ('model_type', 'architectures')}
  config = transformers.AutoConfig.for_model(work['hf_config']['model_type'], **fields)
  return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def finish():
  """Waits for the GPU, where there is one."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def timed(trainer_class):
  """The trainer, which notes of every step when it began and ended, and how many tokens it read that are no padding."""

  class Watch(transformers.TrainerCallback):

    def __init__(self):
      self.starts, self.ends = [], []

    def on_step_begin(self, *_, **__):
      self.starts.append(time.perf_counter())

    def on_step_end(self, *_, **__):
      finish()
      self.ends.append(time.perf_counter())

  class Timed(trainer_class):

    def __init__(self, **options):
      self.watch, self.tokens = Watch(), []
      super().__init__(callbacks=[self.watch], **options)

    def training_step(self, model, inputs, *rest):
      mask = inputs.get('attention_mask')
      count = int(inputs['input_ids'].numel() if mask is None else mask.sum())
      step = len(self.watch.starts) - 1
      self.tokens += [0] * (step + 1 - len(self.tokens))
      self.tokens[step] += count
      return super().training_step(model, inputs, *rest)

  return Timed


def options_of(work, folder):
  """What both trainers are told."""
  has_gpu = torch.cuda.is_available()
  return {
      'output_dir': folder,
      'max_steps': work['warm_up'] + work['steps'],
      'bf16': has_gpu and work['dtype'] == 'bfloat16',
      'fp16': False,
      'use_cpu': not has_gpu,
      'gradient_checkpointing': work['remat'] == 'full',
      'report_to': [],
      'save_strategy': 'no',
      'logging_steps': 1000,
      'disable_tqdm': True,
      'seed': work['seed'],
  }


def train(work, folder):
  """Steps of DPO, or of SFT."""
  shared = {'train_dataset': datasets.Dataset.from_list(common.records(work)), 'processing_class': tokenizer_of(work)}
  options = options_of(work, folder)
  if work['work'] == 'sft':
    settings = {'per_device_train_batch_size': work['rows']}
    settings |= {'packing': True, 'max_length': work['row_length']}
    trainer = timed(trl.SFTTrainer)(model=model_of(work), args=trl.SFTConfig(**options, **settings), **shared)
  else:
    cached = work['cached_reference']
    longest = work['row_length'] if work['work'] == 'hh' else work['prompt_tokens'] + work['response_tokens']
    settings = {'per_device_train_batch_size': work['pairs'], 'max_length': longest}
    # They are in random order already.
    settings |= {'precompute_ref_log_probs': cached, 'train_sampling_strategy': 'sequential'}
    reference = None if cached else model_of(work)
    trainer = timed(trl.DPOTrainer)(
        model=model_of(work), ref_model=reference, args=trl.DPOConfig(**options, **settings), **shared
    )
  trainer.train()
  watch, first = trainer.watch, work['warm_up']
  seconds = [end - start for start, end in zip(watch.starts, watch.ends)][first:]
  per_step = {'hh': [work['pairs']] * len(seconds)}.get(work['work'], trainer.tokens[first:])
  common.report(seconds, per_step, **more())


def roll_out(work):
  """Responses of a fixed length to random prompts."""
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  dtype = getattr(torch, work['dtype']) if device == 'cuda' else torch.float32
  model, seconds = model_of(work).to(device, dtype).eval(), []
  prompts = torch.randint(10, work['vocab_size'], (work['prompts'], work['prompt_tokens']), device=device)
  new = work['response_tokens']
  how = {'do_sample': True, 'temperature': 1.0, 'top_k': 50, 'max_new_tokens': new, 'min_new_tokens': new}
  for _ in range(work['warm_up'] + work['steps']):
    start = time.perf_counter()
    with torch.no_grad():
      model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, eos_token_id=2, **how)
    finish()
    seconds.append(time.perf_counter() - start)
  seconds = seconds[work['warm_up'] :]
  common.report(seconds, [work['prompts'] * new] * len(seconds), **more())


def more():
  """What was measured, and the most memory that tensors took on a GPU."""
  versions = {'trl': trl.__version__, 'transformers': transformers.__version__, 'torch': torch.__version__}
  memory = {'peak_memory_bytes': torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
  return {'versions': versions, **memory}


if __name__ == '__main__':
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  asked = common.read()
  if asked['work'] == 'rollouts':
    roll_out(asked)
  else:
    with tempfile.TemporaryDirectory() as scratch:
      train(asked, scratch)
