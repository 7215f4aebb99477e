"""Writes tests/goldens: tiny models of every family by transformers, adapters by PEFT, conversations, what they become.

  pip install -e '.[goldens]'
  python tools/make_goldens.py [--only=gemma2,peft_phi3]

Each folder holds what `save_pretrained` wrote and golden.npz: ids, float32 logits of every position, and, of a model, a
greedy continuation; of a reward model, scores of whole rows. The same seed gives the same numbers up to rounding, so
that fixtures change only where the libraries do. `templates` holds the ids of conversations by templates of TRL's.
"""

import argparse
import importlib.resources
import json
import pathlib
import shutil

import numpy as np
import peft
import tokenizers
import torch
import transformers

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'goldens'
_NEW = 64
_SIZES = {
    'vocab_size': 96,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 128,
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': None,
}
_LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
_YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
_GEMMA = {'head_dim': 8, 'hidden_activation': 'gelu_pytorch_tanh'}
_WINDOWED = _GEMMA | {'query_pre_attn_scalar': 6, 'sliding_window': 12}
_MOE = {'moe_intermediate_size': 12, 'num_experts': 4, 'num_experts_per_tok': 2, 'head_dim': 8}

# Folder: (configuration class, what differs from _SIZES). Between them they use every key that a family has.
CASES = {
    'llama': ('LlamaConfig', {'rope_theta': 5000.0}),
    'llama3': ('LlamaConfig', {'rope_scaling': _LLAMA3, 'rope_theta': 500000.0, 'tie_word_embeddings': True}),
    'llama_linear': ('LlamaConfig', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}, 'head_dim': 8}),
    'llama_biases': ('LlamaConfig', {'attention_bias': True, 'mlp_bias': True}),
    'mistral': ('MistralConfig', {'sliding_window': 10, 'head_dim': 8}),
    'mixtral': ('MixtralConfig', {'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': None}),
    'qwen2': ('Qwen2Config', {'tie_word_embeddings': True}),
    'qwen2_yarn': ('Qwen2Config', {'rope_scaling': _YARN}),
    'qwen3': ('Qwen3Config', {'head_dim': 8}),
    'qwen3_moe': ('Qwen3MoeConfig', _MOE | {'norm_topk_prob': True}),
    'qwen3_moe_raw': ('Qwen3MoeConfig', _MOE | {'norm_topk_prob': False}),
    'gemma': ('GemmaConfig', _GEMMA),
    'gemma2': ('Gemma2Config', _WINDOWED | {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0}),
    'gemma3': ('Gemma3TextConfig', _WINDOWED | {'num_hidden_layers': 8}),
    'phi3': ('Phi3Config', {'sliding_window': None}),
    'phi3_window': ('Phi3Config', {'sliding_window': 9, 'partial_rotary_factor': 0.5}),
    'olmo2': ('Olmo2Config', {}),
    'smollm3': ('SmolLM3Config', {'num_hidden_layers': 4, 'use_sliding_window': False}),
}

# Folder: (folder of the base, what a LoraConfig is given).
ADAPTERS = {
    'peft_llama3': ('llama3', {'r': 4, 'lora_alpha': 6, 'target_modules': 'all-linear', 'use_rslora': True}),
    'peft_gemma2': ('gemma2', {'r': 3, 'target_modules': ['q_proj', 'o_proj', 'down_proj'], 'use_dora': True}),
    'peft_phi3': (
        'phi3',
        {'r': 4, 'target_modules': 'all-linear', 'rank_pattern': {'qkv_proj': 2}, 'alpha_pattern': {'o_proj': 20}},
    ),
    'peft_reward': ('llama3', {'r': 2, 'target_modules': ['q_proj', 'gate_proj'], 'task_type': 'SEQ_CLS'}),
}


def _randomise(model: torch.nn.Module, seed: int) -> None:
  """Weights, biases and norms that all matter."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for x in model.parameters():
      x.add_(torch.randn(x.shape, generator=generator) * (0.2 if x.ndim == 1 else 0.15))


def make(name: str) -> None:
  """Writes the folder of one case."""
  kind, changes = CASES[name]
  torch.manual_seed(0)
  config = getattr(transformers, kind)(**(_SIZES | changes))
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation='eager').eval()
  _randomise(model, seed=len(name))
  ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, 40))
  with torch.no_grad():
    logits = model(torch.tensor(ids)).logits.numpy()
    greedy = torch.tensor(ids[:1, :8])
    for _ in range(_NEW):
      greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], dim=1)
  folder = GOLDENS / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  np.savez_compressed(folder / 'golden.npz', ids=ids, logits=logits, greedy=greedy[0].numpy())


# Of each family one case with a head for rewards, and one with a head for steps where transformers has that.
FAMILIES = 'llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3 phi3 olmo2 smollm3'.split()
_KINDS = {'reward': ('ForSequenceClassification', 1), 'steps': ('ForTokenClassification', 2)}
HEADS = [f'heads/{family}_{kind}' for family in FAMILIES for kind in _KINDS]
HEADS = [name for name in HEADS if name not in ('heads/gemma3_steps', 'heads/olmo2_steps')]


def make_head(name: str) -> None:
  """Writes the folder of a small model with a head, and what it makes of rows of 24 and 17 tokens."""
  family, _, suffix = name.removeprefix('heads/').rpartition('_')
  kind, changes = CASES[family]
  head, outputs = _KINDS[suffix]
  sizes = _SIZES | changes | {'num_hidden_layers': 1, 'vocab_size': 48, 'num_labels': outputs}
  config = getattr(transformers, kind)(**sizes)
  torch.manual_seed(0)
  model = getattr(transformers, kind.removesuffix('Config') + head)(config).eval()
  _randomise(model, seed=len(name))
  ids = np.random.default_rng(1).integers(3, config.vocab_size, (2, 24))
  ids[1, 17:] = config.pad_token_id
  with torch.no_grad():
    logits = model(torch.tensor(ids), attention_mask=torch.tensor(ids != config.pad_token_id)).logits.numpy()
  folder = GOLDENS / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  np.savez_compressed(folder / 'golden.npz', ids=ids, logits=logits)


# Case of templates.json: (template of ours, file of TRL's collection of the families' own, BOS, EOS, messages).
_SYSTEM = {'role': 'system', 'content': 'Be kind & brief.'}
_TALK = [
    {'role': 'user', 'content': 'What is 2 + 2?'},
    {'role': 'assistant', 'content': 'It is 4.\n\nShall I go on?'},
    {'role': 'user', 'content': 'Yes, please: 3 + 3?'},
    {'role': 'assistant', 'content': ' 6, caf\u00e9 \u732b '},
]
_TOOL = {'role': 'tool', 'content': '{"sum": 4}'}
TEMPLATES = {
    'chatml': ('chatml', 'qwen2_5', None, '<|im_end|>', [_SYSTEM, *_TALK]),
    'llama3': ('llama3', 'llama3', '<|begin_of_text|>', '<|eot_id|>', [_SYSTEM, *_TALK]),
    'gemma': ('gemma', 'gemma', '<bos>', '<end_of_turn>', _TALK),
    'gemma_system': ('gemma', 'gemma3', '<bos>', '<end_of_turn>', [_SYSTEM, *_TALK]),
    'own_spans': (None, 'qwen2_5_training', None, '<|im_end|>', [_SYSTEM, *_TALK]),
    'own_no_spans': (None, 'qwen3_instruct_2507', None, '<|im_end|>', _TALK),
    'own_tool': (None, 'qwen3_instruct_2507', None, '<|im_end|>', [*_TALK[:1], _TALK[1], _TOOL, _TALK[3]]),
}
_SPECIALS = [
    '<|im_start|>',
    '<|im_end|>',
    '<|endoftext|>',
    '<|begin_of_text|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
]
_SPECIALS += ['<|eot_id|>', '<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>']


def make_templates(name: str) -> None:
  """Writes a tokenizer of bytes and some merges, and the ids that transformers makes of conversations with it."""
  folder = GOLDENS / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=_SPECIALS)
  tokenizer.train_from_iterator([message['content'] for message in [_SYSTEM, *_TALK] * 3], trainer)
  tokenizer.save(str(folder / 'tokenizer.json'), pretty=False)
  cases = {}
  for case, (ours, theirs, bos, eos, messages) in TEMPLATES.items():
    text = importlib.resources.files('trl').joinpath('chat_templates', f'{theirs}.jinja').read_text(encoding='utf-8')
    special = {'eos_token': eos} | ({'bos_token': bos} if bos else {})
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), **special)
    options = {'chat_template': text, 'return_dict': False}
    cases[case] = special | {
        'ours': ours,
        'messages': messages,
        'ids': loaded.apply_chat_template(messages, **options),
        'prompt_ids': loaded.apply_chat_template(messages[:-1], add_generation_prompt=True, **options),
        'template': None if ours else text,
    }
  (folder / 'NOTICE').write_text("The templates in templates.json are Qwen's, in the form of TRL; both: Apache-2.0.\n")
  (folder / 'templates.json').write_text(json.dumps(cases, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def make_adapter(name: str) -> None:
  """Writes the folder of one adapter."""
  base, options = ADAPTERS[name]
  scores = options.get('task_type') == 'SEQ_CLS'
  kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
  more = {'num_labels': 1} if scores else {}
  model = kind.from_pretrained(GOLDENS / base, dtype=torch.float32, attn_implementation='eager', **more)
  model = peft.get_peft_model(model, peft.LoraConfig(**({'task_type': 'CAUSAL_LM'} | options))).eval()
  generator = torch.Generator().manual_seed(len(name))
  with torch.no_grad():
    for x in model.parameters():
      if x.requires_grad:
        x.add_(torch.randn(x.shape, generator=generator) * 0.2)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, 40))
    logits = model(torch.tensor(ids)).logits.numpy()
  folder = GOLDENS / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / 'README.md').unlink(missing_ok=True)
  config = json.loads((folder / 'adapter_config.json').read_text(encoding='utf-8'))
  config |= {'base_model_name_or_path': base, 'target_modules': sorted(config['target_modules'])}
  (folder / 'adapter_config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  np.savez_compressed(folder / 'golden.npz', ids=ids, logits=logits)


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default=','.join([*CASES, *HEADS, *ADAPTERS, 'templates']), help='folders to write')
  for name in parser.parse_args().only.split(','):
    makers = {**dict.fromkeys(CASES, make), **dict.fromkeys(HEADS, make_head), **dict.fromkeys(ADAPTERS, make_adapter)}
    makers.get(name, make_templates)(name)
    print(name)


if __name__ == '__main__':
  main()
