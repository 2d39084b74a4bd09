"""The chat templates that recipes can name, in the formats that their authors published."""

from __future__ import annotations

AUTO = "auto"
"""Value of `chat_template` for the template that most of the recipe's models have."""

_ALPACA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}\
{% else %}{{ 'Below is an instruction that describes a task. \
Write a response that appropriately completes the request.\\n\\n' }}{% endif %}\
{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

_CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_EXAONE = """\
{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}\
{% for message in messages %}\
{{ '[|' + message['role'] + '|]' + message['content'] }}\
{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"""

_LLAMA3 = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """\
{{ bos_token }}\
{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}\
{% set first = 1 if system else 0 %}\
{% for message in messages[first:] %}\
{% if message['role'] == 'user' %}\
{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}\
{% endfor %}"""

CHAT_TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
