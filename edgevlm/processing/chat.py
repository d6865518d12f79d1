"""Messages to one prompt string, through a chat template that is foreign code in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgevlm.core.config import read_json, read_text
from edgevlm.core.errors import ConfigError, InputError

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
CONTENT_TYPES = ("image", "text")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_PROMPT_CHARACTERS = 4_000_000
MAX_REPEATED = 1_000_000  # characters or items that one multiplication may make
MAX_INTEGER_BITS = 4_096


def user_message(prompt: str, *, num_images: int = 0) -> Message:
    """A user's turn: the pictures first, then the text."""
    images = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*images, {"type": "text", "text": prompt}]}


def num_images(messages: Iterable[Message]) -> int:
    """How many pictures ``messages`` speak of."""
    return sum(part["type"] == "image" for message in messages for part in _parts(message))


class ChatTemplate:
    """A Jinja2 chat template with the helpers that transformers gives it, and nothing else.

    A template may loop for long, which nothing here stops, but it reaches no attribute, file or module, and
    writes at most 4 million characters.  Raises ConfigError for a syntax error.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source, self.special_tokens = source, dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template does not parse: {_one_line(error)}") from error

    @classmethod
    def from_folder(cls, folder: str | Path, default: str | None = None) -> ChatTemplate:
        """The template in chat_template.jinja, else chat_template.json, tokenizer_config.json, processor_config.json.

        Raises ConfigError when there is none and no ``default``.
        """
        folder = Path(folder)
        settings = _json_or_empty(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        sources = (
            read_text(file) if file.is_file() else None,
            _named(_json_or_empty(folder / "chat_template.json").get("chat_template")),
            _named(settings.get("chat_template")),
            _named(_json_or_empty(folder / "processor_config.json").get("chat_template")),
            default,
        )
        source = next(filter(None, sources), None)
        if source is None:
            raise ConfigError(f"{folder}: no chat template; expected the file chat_template.jinja")
        return cls(source, _special_tokens(settings))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """``messages`` as one string, ending where the assistant speaks if ``add_generation_prompt``.

        A message has a ``role`` and a ``content``: text, or a list of ``{"type": "image"}`` and
        ``{"type": "text", "text": …}``.  Raises InputError for messages that are malformed or that the
        template refuses, ConfigError for a template that fails or oversteps.
        """
        check_messages(messages)
        variables = {**self.special_tokens, "messages": _plain(messages), "tools": None, "documents": None}
        try:
            pieces = self._template.generate(**variables, add_generation_prompt=add_generation_prompt)
            return _joined(pieces)
        except (ConfigError, InputError):
            raise
        except SecurityError as error:
            raise ConfigError(f"the chat template oversteps its sandbox: {_one_line(error)}") from error
        except Exception as error:  # foreign code: it can fail in any way
            raise ConfigError(f"the chat template fails on these messages: {_one_line(error)}") from error


def check_messages(messages: Sequence[Any]) -> None:
    """Raises InputError unless ``messages`` have the form that ``ChatTemplate.render`` describes."""
    if not messages or isinstance(messages, (str, Mapping)):
        raise InputError(f"expected a list of messages, found {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"a message needs 'role' and 'content'; found {message!r}")
        if message["role"] not in ROLES:
            raise InputError(f"a message's role must be one of {', '.join(ROLES)}; found {message['role']!r}")
        if not isinstance(message["content"], str):
            _check_parts(message["content"])


def _check_parts(content: object) -> None:
    if not isinstance(content, (list, tuple)):
        raise InputError(f"a message's content must be text or a list of parts; found {content!r}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in CONTENT_TYPES:
            raise InputError(f"a part of a message must have type image or text; found {part!r}")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise InputError(f"a text part needs 'text'; found {part!r}")


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return () if isinstance(content, str) else content


def _plain(value: Any) -> Any:
    """``value`` in JSON's types: an object's methods must not reach a template, so it stays outside."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return str.__str__(value) if isinstance(value, str) else f"<{type(value).__name__}>"


def _joined(pieces: Iterable[str]) -> str:
    result, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_PROMPT_CHARACTERS:
            raise ConfigError(f"the chat template writes more than {MAX_PROMPT_CHARACTERS:,} characters; repair it")
        result.append(piece)
    return "".join(result)


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named(template: object) -> str | None:
    """A template, or the one named ``default`` in a list of several."""
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its kin, which templates write; hubs store a string or a table with ``content``."""
    values = {name: settings.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, but it speaks up where that prints nothing, and does not multiply without end."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = _power_bits(left, right) if operator == "**" else _product_size(left, right)
        if size:
            raise SecurityError(f"{operator!r} would make something too large")
        return super().call_binop(context, operator, left, right)


def _power_bits(base: Any, exponent: Any) -> bool:
    both = isinstance(base, int) and isinstance(exponent, int)
    return both and base.bit_length() * exponent > MAX_INTEGER_BITS


def _product_size(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() > MAX_INTEGER_BITS
    for items, count in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(count, int):
            return len(items) * count > MAX_REPEATED
    return False


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _say(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """``namespace()`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does: without the HTML escapes of Jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise InputError(f"the chat template refuses these messages: {' '.join(str(message).split())}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
