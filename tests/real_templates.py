"""Chat templates of real models out of an installed package, and small ones of ours with the features of others."""

from importlib.util import find_spec
from pathlib import Path


def published() -> dict[str, str]:
    """The templates that trl ships, by name, without those that it changed for training."""
    package = find_spec("trl")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja")) if "_training" not in path.stem}


GRANITE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + ".\\n" %}
    {%- if documents %}{%- set system_message = system_message + "Answer from the documents." %}{%- endif %}
    {%- if thinking %}{%- set system_message = system_message + "Think first." %}{%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""
"""Date inside a default system message, documents, an argument `thinking`, tojson with an indent."""

MISTRAL_SMALL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "The current date is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' and message.tool_calls is defined and message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' + message['content'] + '[/TOOL_RESULTS]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system, tool and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
"""Date at the top, ids of nine letters and digits, a refusal, no opened turn of its own."""

SMOLLM3 = """\
{%- if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = "/think" if enable_thinking else "/no_think" %}
{{- "<|im_start|>system\\nToday Date: " }}
{%- set today = strftime_now("%d %B %Y") %}
{{- today ~ "\\nReasoning Mode: " ~ mode ~ "\\n\\n" }}
{%- if messages[0].role == "system" %}{{ messages[0].content.rstrip() }}{% endif -%}
{{- "<|im_end|>\\n" }}
{%- for message in messages -%}
    {%- if message.role == "system" %}{% continue %}{% endif -%}
    {%- if message.role == "assistant" %}
{%- generation -%}
{{ "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
{%- endgeneration -%}
    {%- else %}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{% if not enable_thinking %}
{{- "<think>\\n\\n</think>\\n" }}{% endif %}{% endif %}"""
"""Date, loop controls, generation blocks, a mode that an argument chooses."""

DATE_STRING = """\
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if builtin_tools is defined %}{{ "Tools: " + builtin_tools | join(", ") + "\\n" }}{% endif %}
{%- set ns = namespace(count=0) %}
{{- "Today Date: " + date_string + "\\n" }}
{%- for m in messages %}
    {%- set ns.count = ns.count + 1 %}{{ "#" ~ ns.count ~ " " + m.role + ": " + m.content + "</s>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "#" ~ (ns.count + 1) ~ " assistant: " }}{% endif %}"""
"""A date that an argument replaces, `builtin_tools`, a namespace: the features of Llama 3.1."""

DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- '<｜call｜>' + call['function']['name'] + '\\n' + call['function']['arguments'] + '<｜end｜>' }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- elif message['role'] == 'tool' %}{{ '<｜output｜>' + message['content'] + '<｜end｜>' }}
    {%- elif message['role'] == 'system' %}{{ message['content'] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
"""Arguments as text, a call only where the content is null, an opened thought, thoughts of answers left out."""

OURS = {
    "granite": GRANITE,
    "mistral_small": MISTRAL_SMALL,
    "smollm3": SMOLLM3,
    "date_string": DATE_STRING,
    "deepseek": DEEPSEEK,
}
