"""Our sandbox renders what transformers renders."""

from __future__ import annotations

from typing import Any

import pytest

from edgevlm.processing.chat import ChatTemplate

BLANKS = """\
{% for m in messages %}
  {% if m.role == 'user' %}
  U {{ m.content }}
  {%- endif %}
{# a comment #}
{% endfor %}
"""
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMESPACE = """\
{%- set ns = namespace(found=false) -%}
{%- for m in messages[::-1] -%}
    {%- if m.role == 'user' and not ns.found -%}
        {%- set ns.found = true -%}{{ m | tojson(indent=2) }}
    {%- endif -%}
    {%- if loop.last -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- generation -%}{{ messages[0].content.split('\n')[0].upper() }}{%- endgeneration -%}
{{- tools is none }}{{ documents is defined }}{{ missing }}
"""


@pytest.mark.parametrize("source", [BLANKS, CHATML, NAMESPACE], ids=["blanks", "chatml", "namespace"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_alike(source: str, add_generation_prompt: bool) -> None:
    reference: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "<a>\n&é "}, {"role": "assistant", "content": "b"}]
    (expected,), _ = reference.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt
    )
    assert ChatTemplate(source).render(messages, add_generation_prompt) == expected
