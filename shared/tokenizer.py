"""Text to token ids: a model's tokenizer and its chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from shared import messages
from shared.errors import TemplateError


class PromptTokenizer:
    """What the files of one model version make of a prompt. Safe to use from several threads.

    Args:
        card: the files, as the version's workers published them.

    Raises:
        TemplateError: the chat template has a syntax error.
        Exception: whatever `tokenizers` says of a file it cannot read.
    """

    def __init__(self, card: messages.ModelCard) -> None:
        self._tokenizer: Any = Tokenizer.from_str(card.tokenizer)
        # A tokenizer.json may carry the settings of its training; a silent cut would hide tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokens = {"bos_token": card.bos_token, "eos_token": card.eos_token}
        self._template = _compile(card.chat_template) if card.chat_template else None

    @property
    def has_template(self) -> bool:
        """Whether the model can chat."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a plain prompt, with what the model puts around a text by default."""
        # The batch call gives up the GIL, the single one does not.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def encode_chat(self, chat: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of a conversation up to where the model's answer starts.

        Raises:
            TemplateError: there is no template, or it refuses these messages.
        """
        return self.encode(self.render(chat), add_special_tokens=False)

    def render(self, chat: Sequence[dict[str, Any]]) -> str:
        """The conversation as the model's text.

        Raises:
            TemplateError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise TemplateError("this model has no chat template")
        try:
            return self._template.render(
                messages=list(chat),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:
            # A template is a program of the model's author: it may fail in any way.
            raise TemplateError(str(error) or type(error).__name__) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks answers for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    # The names and options that templates are written for: transformers.utils.chat_template_utils.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.update(helpers)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TemplateError(f"chat template: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
