"""The tokenizer of models without a vocabulary of their own: one id a byte, and an end id."""

from __future__ import annotations

import hashlib
from typing import Final

from worker.engine import ModelFiles

END_TOKEN: Final = "<|end|>"
END_ID: Final = 256
VOCAB_SIZE: Final = 257
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_id(byte: int) -> int:
    """The id of a byte, 0..255: GPT-2's order, printable bytes first."""
    if 0x21 <= byte <= 0x7E:
        return byte - 0x21
    if 0xA1 <= byte <= 0xAC:
        return byte - 0xA1 + 94
    if 0xAE <= byte <= 0xFF:
        return byte - 0xAE + 106
    if byte <= 0x20:
        return byte + 188
    return byte - 0x7F + 221 if byte <= 0xA0 else 255


def tokenizer_json() -> str:
    """A `tokenizers` file with ids 0..255 for bytes and 256 for the end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Sorted, the alphabet is in GPT-2's order: the printable bytes stand for themselves, the others
    # are code points from 256 up.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer.to_str()


def byte_files(name: str, context_length: int) -> ModelFiles:
    """The files of an engine whose tokens are bytes.

    Args:
        name: of the engine, part of the version.
        context_length: in tokens.
    """
    text = tokenizer_json()
    version = hashlib.sha256(
        f"{name}\n{context_length}\n{CHAT_TEMPLATE}\n{text}".encode()
    ).hexdigest()
    return ModelFiles(
        version=version[:8],
        tokenizer_json=text,
        chat_template=CHAT_TEMPLATE,
        context_length=context_length,
        eos_ids=(END_ID,),
        bos_token="",
        eos_token=END_TOKEN,
        vocab_size=VOCAB_SIZE,
    )
