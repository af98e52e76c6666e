"""What is asked of a server or an engine, and the process that asks it."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from benchmarks.companion import Companion
from benchmarks.figures import BenchError, Figures
from benchmarks.transcript import text_of

BESIDE_ENGINE = 5
"""Nice value of the client, as of everything else that `up` runs beside an engine."""
_START_S = 60.0
WARM_UP_TOKENS = 8
"""Most that a request which only warms up asks for."""
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Load:
    """C clients, each of which sends its next request when the one before has been answered.

    Attributes:
        streams: how many clients. requests: most counted requests of each.
        temperature, top_p: how tokens are chosen; 0 is greedy.
        no_start_after_s: no client starts another request later than this.
        limit_s: when the run has failed.
    """

    streams: int
    requests: int
    prompt_tokens: int = 64
    output_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    no_start_after_s: float = 60.0
    limit_s: float = 240.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what they say beside prompt and length."""

    host: str
    port: int
    path: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt.

    Attributes:
        text: all of it. first_at: when its first token came, on `time.perf_counter`.
    """

    text: str
    first_at: float


class Prompts:
    """Texts of exactly so many tokens, no two alike.

    Args:
        tokenizer_json: of the model.
        seed: other seeds give other texts.
    """

    def __init__(self, tokenizer_json: str, seed: int = 0) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._random = random.Random(seed)
        texts = (self._tokenizer.decode([i]) for i in range(self._tokenizer.get_vocab_size()))
        self._words = [text for text in texts if re.fullmatch(" [a-z]{2,}", text)]
        # A vocabulary of bytes has no words.
        self._words = self._words or list("abcdefghijklmnopqrstuvwxyz")

    def text(self, tokens: int) -> str:
        """A text of random words."""
        for _ in range(_TRIES):
            text = "".join(self._random.choices(self._words, k=tokens))
            if len(self._tokenizer.encode(text).ids) == tokens:
                return text
        raise BenchError(f"found no text of {tokens} tokens for this tokenizer")

    def ids(self, tokens: int) -> list[int]:
        """The same as token ids."""
        return list(self._tokenizer.encode(self.text(tokens)).ids)


def run_load(
    target: Target, load: Load, prompts: Prompts, read_cpu: Callable[[], Mapping[str, float]]
) -> Figures:
    """Runs the client in a process of its own.

    Args:
        target: the server.
        load: on it.
        prompts: for it.
        read_cpu: the CPU times so far of the server's processes.

    Raises:
        BenchError: a request failed, or the client did.
    """
    job = {
        "host": target.host,
        "port": target.port,
        "path": target.path,
        "warm_up": [
            [_body(target, prompts, load.prompt_tokens, min(WARM_UP_TOKENS, load.output_tokens))]
            for _ in range(load.streams)
        ],
        "lanes": [
            [
                _body(target, prompts, load.prompt_tokens, load.output_tokens)
                for _ in range(load.requests)
            ]
            for _ in range(load.streams)
        ],
        "no_start_after_s": load.no_start_after_s,
        "limit_s": load.limit_s,
    }
    with Companion("benchmarks.client", nice=BESIDE_ENGINE) as client:
        client.say(job)
        before = client.hear(load.limit_s + _START_S, lambda line: read_cpu())
        after = client.hear(load.limit_s, lambda line: read_cpu())
        result = client.hear(_START_S, json.loads)
    return _figures(result, load, {name: after[name] - before[name] for name in before})


def ask(target: Target, prompt: str, output_tokens: int, limit_s: float = 60.0) -> Answer:
    """One prompt, streamed: does it answer, and since when?

    Raises:
        BenchError: it did not, or not with text.
    """
    body = json.dumps({**target.fields, "prompt": prompt, "max_tokens": output_tokens})
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection(target.host, target.port, timeout=limit_s)
    text, first_at = "", 0.0
    try:
        connection.request("POST", target.path, body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise BenchError(f"status {response.status}: {response.read(600)!r}")
        for line in response:
            payload = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or payload == b"[DONE]":
                continue
            text += text_of(json.loads(payload))
            if text and not first_at:
                first_at = time.perf_counter()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BenchError(f"no answer: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if not first_at:
        raise BenchError("an answer without text")
    return Answer(text, first_at)


def _body(target: Target, prompts: Prompts, prompt_tokens: int, output_tokens: int) -> str:
    prompt = prompts.text(prompt_tokens)
    return json.dumps({**target.fields, "prompt": prompt, "max_tokens": output_tokens})


def _figures(result: dict[str, Any], load: Load, cpu_s: dict[str, float]) -> Figures:
    errors = list(result["errors"])
    odd = [count for count in result["tokens"] if count != load.output_tokens]
    if odd:
        errors.append(f"{len(odd)} streams were not {load.output_tokens} tokens long: {odd[:5]}")
    if errors:
        shown = "\n  ".join(str(error)[:800] for error in errors[:3])
        raise BenchError(f"{len(errors)} errors, the first:\n  {shown}")
    return Figures(
        tokens=sum(result["tokens"]),
        seconds=result["seconds"],
        cpu_s={**cpu_s, "client": result["cpu_s"]},
        ttft_ms=result["ttft_ms"],
        gap_ms=result["gap_ms"],
    )
