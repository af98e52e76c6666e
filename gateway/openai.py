"""Bodies of OpenAI's endpoints. What is not supported is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.requests import (
    MAX_INT,
    Count,
    ModelName,
    Order,
    SamplingFields,
    Seconds,
    priority_class,
)
from shared.errors import InvalidRequest

_TIERS = {"auto": "normal", "default": "normal", "priority": "high", "flex": "low"}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "min_tokens": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
}
"""Fields we do not act on, and their values, beside null, that ask for what we do anyway."""

_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "function_call": (),
    "reasoning_content": (),
}
"""Fields of a message we do not act on; most are of answers, sent back as they came."""


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag="text", tag_field="type"):
    """A part of a message."""

    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None
    tool_calls: Any = None
    function_call: Any = None
    reasoning_content: Any = None

    def plain(self) -> dict[str, str]:
        """For a chat template: they know texts, and no developers."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a stream contains beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Generation(SamplingFields, kw_only=True):
    """Fields of both endpoints. null counts as left out; fields of type Any take neutral values."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    priority: str | None = None
    ignore_eos: bool | None = None
    timeout_s: Seconds | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    n: Any = None
    min_tokens: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    store: Any = None
    metadata: Any = None

    def common(self) -> dict[str, Any]:
        """The fields of an Order that both endpoints fill alike.

        Raises:
            InvalidRequest: a field that is not supported has another value than a neutral one.
        """
        _check_neutral(self, _NEUTRAL, "")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is for stream=true", "stream_options")
        tier = _TIERS[self.service_tier or "auto"]
        options = self.stream_options
        return {
            "model": self.model,
            "cls": tier if self.priority is None else priority_class(self.priority),
            "stream": bool(self.stream),
            "include_usage": bool(options and options.include_usage),
            "ignore_eos": bool(self.ignore_eos),
            "timeout_s": self.timeout_s,
            **self.chosen(),
        }


class ChatRequest(_Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    top_logprobs: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def order(self) -> Order:
        """The order.

        Raises:
            InvalidRequest: a field has a value that its type does not rule out.
        """
        for i, message in enumerate(self.messages):
            _check_neutral(message, _NEUTRAL_IN_MESSAGE, f"messages[{i}].")
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same and must not differ",
                "max_completion_tokens",
            )
        return Order(
            api="chat",
            chat=[message.plain() for message in self.messages],
            max_tokens=old if new is None else new,
            max_tokens_param="max_tokens" if new is None else "max_completion_tokens",
            **self.common(),
        )


class CompletionRequest(_Generation):
    """Body of /v1/completions."""

    prompt: str | list[Annotated[int, Meta(ge=0, le=MAX_INT)] | str]
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    def order(self) -> Order:
        """The order.

        Raises:
            InvalidRequest: a field has a value that its type does not rule out.
        """
        return Order(
            api="completions",
            prompt=self._one_prompt(),
            max_tokens=self.max_tokens,
            **self.common(),
        )

    def _one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return ids
        if len(self.prompt) == 1:
            return str(self.prompt[0])
        raise InvalidRequest(
            "prompt must be one text or one list of token ids: one prompt a request", "prompt"
        )


def _check_neutral(
    struct: msgspec.Struct, neutral: dict[str, tuple[Any, ...]], inside: str
) -> None:
    for name in struct.__struct_fields__:
        if name not in neutral:
            continue
        value = getattr(struct, name)
        # True == 1, but it is not the same request.
        if value is not None and not any(
            value == good and isinstance(value, bool) == isinstance(good, bool)
            for good in neutral[name]
        ):
            raise InvalidRequest(
                f"{inside}{name} is not supported by this server",
                inside + name,
                "unsupported_parameter" if not neutral[name] else "unsupported_value",
            )
