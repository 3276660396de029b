"""Chat templates of the five families, in the format of each family's instruction-tuned model (own wording).

In: nothing. Out: Jinja text for `tokenizer.chat_template`. As in the originals, contents are trimmed in
llama2, llama3 and gemma but not in qwen and mixtral, and gemma and mixtral have no system role.
"""

_NO_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
"""
_ALTERNATE = """\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
"""

LLAMA2 = (
    """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
"""
    + _ALTERNATE
    + """\
{%- if message['role'] == 'user' -%}
{%- set content = system + message['content'] if loop.first else message['content'] -%}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{ message['content'].strip() + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Qwen2.5 puts a default system prompt before conversations that have none, and tells how a call is written;
# the miniature does without both. Tools, calls and results stand where and as they stand in the original.
QWEN = """\
{%- set opened = messages[0]['role'] == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' + (messages[0]['content'] + '\\n\\n' if opened else '') + '# Tools\\n<tools>' -}}
{%- for tool in tools -%}
{{ '\\n' }}{{ tool | tojson }}
{%- endfor -%}
{{ '\\n</tools><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- elif message['tool_calls'] -%}
{{ '<|im_start|>assistant' }}
{%- if message['content'] -%}{{ '\\n' + message['content'] }}{%- endif -%}
{%- for call in message['tool_calls'] -%}
{%- set call = call['function'] if 'function' in call else call -%}
{{ '\\n<tool_call>\\n{"name": "' + call['name'] + '", "arguments": ' }}{{ call['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif not (tools and opened and loop.first) -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

GEMMA = (
    _NO_SYSTEM
    + """\
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ALTERNATE
    + """\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'].strip() + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
)

MIXTRAL = (
    _NO_SYSTEM
    + """\
{{- bos_token -}}
{%- for message in messages -%}
"""
    + _ALTERNATE
    + """\
{%- if message['role'] == 'user' -%}
{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
)
