"""Chat templates of other projects, made to say what their own code says around them."""

from __future__ import annotations

import logging

from edgevlm.families.folder import ModelFolder
from edgevlm.families.reading import read_template
from edgevlm.processing.chat import ChatTemplate, user_message
from edgevlm.processing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Templates that look for parts in a content lose one that is plain text.
AS_PARTS = (
    "{%- set all = namespace(turns=[]) -%}{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- set content = [{'type': 'text', 'text': content}] if content is string else content -%}"
    "{%- set all.turns = all.turns + [{'role': message['role'], 'content': content}] -%}"
    "{%- endfor -%}{%- set messages = all.turns -%}"
)
# LLaVA-1.5, as its authors wrote it for Vicuna: a blank behind the system text and a question, </s> behind an answer.
VICUNA = AS_PARTS + (
    "{{- bos_token | default('<s>') -}}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- 'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user\\'s questions. ' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- {'system': '', 'assistant': 'ASSISTANT: '}[message['role']] | default('USER: ') -}}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{{- eos_token | default('</s>') if message['role'] == 'assistant' else ' ' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def template_of(folder: ModelFolder, tokenizer: Tokenizer, image_token: str) -> ChatTemplate:
    """The folder's template, else Vicuna's, that takes plain text and writes what the tokenizer puts in front.

    A template without ``image_token`` is the language model's own, which says nothing about pictures.  transformers
    lets the tokenizer add its first token (``<s>``) where a template writes none; we encode a prompt as it stands.
    """
    default = VICUNA.replace("<image>", image_token)
    found = read_template(folder, default)
    own = found.source != default
    if own and image_token not in found.source:
        logger.warning("%s: its chat template never writes %s; taking LLaVA-1.5's instead", folder.path, image_token)
    source = AS_PARTS + found.source if own and image_token in found.source else default
    template = ChatTemplate(source, found.special_tokens)
    first = "".join(tokenizer.token(id) or "" for id in tokenizer.encode("", add_special_tokens=True)[:1])
    if not first or template.render([user_message("?", num_images=1)]).startswith(first):
        return template
    return ChatTemplate(f"{{{{- {first!r} -}}}}{source}", template.special_tokens)
