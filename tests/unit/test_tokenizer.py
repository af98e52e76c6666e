"""Prompts to ids: the tokenizer's own defaults, chat templates as transformers runs them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shared import messages
from shared.errors import TemplateError
from shared.tokenizer import PromptTokenizer

CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and messages[0]['role'] != 'system' %}\n"
    "<s>sys</s>\n"
    "    {% endif %}\n"
    "<s>{{ message['role'] }}:{{ message['content'] }}</s>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "a b"}]


def tokenizer_text(**changed: Any) -> str:
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "user": 4, "assistant": 5, ":": 6, "sys": 7}
    tokenizer = Tokenizer(models.WordLevel({**words, "?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    if changed.get("truncated"):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=64)
    return str(tokenizer.to_str())


def make(template: str = "", **changed: Any) -> PromptTokenizer:
    text = tokenizer_text(**changed)
    return PromptTokenizer(
        messages.ModelCard(1, "m", "v", text, template, 100, 9, bos_token="<s>", eos_token="</s>")
    )


def test_a_plain_prompt_gets_the_special_tokens_of_the_tokenizer() -> None:
    assert make().encode("a b") == [0, 2, 3]
    assert make().encode("a b", add_special_tokens=False) == [2, 3]


def test_truncation_and_padding_of_the_file_are_off() -> None:
    assert make(truncated=True).encode("a b a b") == [0, 2, 3, 2, 3]


def test_a_template_is_rendered_as_transformers_does() -> None:
    assert make(CHATML).render(CHAT) == "<s>sys</s>\n<s>user:a b</s>\n<s>assistant:"


def test_special_tokens_in_a_template_are_ids_and_none_is_added() -> None:
    tokenizer = make("<s>{{ messages[0].content }}</s>{{ eos_token }}{{ bos_token }}")
    assert tokenizer.encode_chat(CHAT) == [0, 2, 3, 1, 1, 0]


def test_the_helpers_of_templates() -> None:
    source = (
        "{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    text = make(source).render([{"role": "user", "content": "<é>"}])
    assert text == '[{"role": "user", "content": "<é>"}]014True'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ messages[99].content }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_whatever_a_template_comes_up_with_is_one_kind_of_error(source: str) -> None:
    with pytest.raises(TemplateError):
        make(source).render(CHAT)


def test_the_reason_of_a_template_reaches_the_client() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        make("{{ raise_exception('roles must alternate') }}").encode_chat(CHAT)


def test_without_a_template_there_is_no_chat() -> None:
    assert not make().has_template
    with pytest.raises(TemplateError, match="no chat template"):
        make().encode_chat(CHAT)


def test_a_broken_template_is_found_when_it_is_loaded() -> None:
    with pytest.raises(TemplateError, match="chat template"):
        make("{% for %}")
