"""The chat templates of mPLUG-Owl2 (Specification §1.5)."""

# Rounds are concatenated without a separator. The space before an answer is
# part of the answer's first token. Contents may be strings or lists of parts, for other tools that
# use this file.
DEFAULT_CHAT_TEMPLATE = """\
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {{- part['text'] if part['type'] == 'text' else '<|image|>' -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + body(message['content']) -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ASSISTANT:' -}}
    {%- generation -%}
      {{- ' ' + body(message['content']) + eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- raise_exception('the format of mPLUG-Owl2 has no ' + message['role'] + ' prompt; \
put that text at the start of the first user turn') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ' ASSISTANT:' -}}
{%- endif -%}
"""

# The authors' training format: the same with a system text, which system messages replace.
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
_V1_LOOP = f"""\
{{%- for message in messages if message['role'] == 'system' -%}}
  {{{{- body(message['content']) + ' ' -}}}}
{{%- else -%}}
  {{{{- "{V1_SYSTEM}" -}}}}
{{%- endfor -%}}
{{%- for message in messages if message['role'] != 'system' -%}}
"""
V1_CHAT_TEMPLATE = DEFAULT_CHAT_TEMPLATE.replace("{%- for message in messages -%}\n", _V1_LOOP)
# mPLUG-Owl2.1 (Model family §7.5): in a prompt, earlier answers end with the characters `</s>`; in
# training with the end token.
OWL2_1_CHAT_TEMPLATE = DEFAULT_CHAT_TEMPLATE.replace(
    "body(message['content']) + eos_token",
    "body(message['content']) + ('</s>' if add_generation_prompt else eos_token)",
)
CHAT_TEMPLATES = {
    "mplug_owl2": DEFAULT_CHAT_TEMPLATE,
    "v1": V1_CHAT_TEMPLATE,
    "mplug_owl2_1": OWL2_1_CHAT_TEMPLATE,
}
