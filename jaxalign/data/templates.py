"""Ready chat templates, for tokenizers that come without one; each marks what the assistant says."""

# Renders the turns of `chat.parse_transcript` to the same text. A response starts with the space after the colon.
HH = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content -}}
{%- elif message.role in ('user', 'assistant') -%}
{{- '\\n\\n' + ('Human' if message.role == 'user' else 'Assistant') + ':' -}}
{{- (' ' if message.content else '') + message.content -}}
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\nAssistant:' -}}{%- endif -%}
"""

# OpenAI's chat markup, as Qwen and SmolLM use it; any role, tools among them.
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Llama 3 Instruct, without the date that later versions write; the results of tools are said by "ipython".
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Of families without a turn of the system: what it says, `first`, precedes the user's first turn.
_BEGIN = """\
{{- bos_token -}}
{%- set first = messages[0].content + '\\n\\n' if messages and messages[0].role == 'system' else '' -%}
{%- for message in messages -%}
{%- set before = first if loop.index0 == (1 if first else 0) else '' -%}
"""
_END = """\
{%- elif message.role != 'system' or loop.index0 -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
"""

# As Gemma 3 does it.
GEMMA = (
    _BEGIN
    + """\
{%- if message.role == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}
{%- generation -%}{{- message.content | trim + '<end_of_turn>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message.role == 'user' -%}
{{- '<start_of_turn>user\\n' + before + message.content | trim + '<end_of_turn>\\n' -}}
"""
    + _END
    + """\
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

# Mistral Instruct 0.1 to 0.3, without a prompt for generation: the user's turn ends in it.
MISTRAL = _BEGIN + """\
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- ' ' + message.content | trim + eos_token -}}{%- endgeneration -%}
{%- elif message.role == 'user' -%}
{{- '[INST] ' + before + message.content + ' [/INST]' -}}
""" + _END

BY_NAME = {'hh': HH, 'chatml': CHATML, 'llama3': LLAMA3, 'gemma': GEMMA, 'mistral': MISTRAL}
