"""The contract between a worker and the model it runs: token ids in, token ids out.

An engine is synchronous and owned by one thread. It knows nothing of text, HTTP or Redis. Whatever
implements `Engine` (echo, torch, a user's own) passes one suite, tests/contract/test_engines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one sequence is chosen.

    In this order: repetition, frequency and presence penalty, temperature, min_p, top_k, top_p.
    Each looks at what the one before it left. Tokens that an earlier owner generated count as
    generated.

    Attributes:
        max_tokens: most tokens to generate, >= 1, counted from the end of the prompt.
        temperature: below 1e-5 is greedy; otherwise logits are divided by it, up to 2.
        top_p: keep the most likely tokens whose probability sums to at least this, in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        seed: 0 .. 2**63-1. The random number of a token is a function of (seed, choice, position)
            alone, so a sequence continues the same on another engine.
        stop_ids: token ids that end the sequence, beside the model's own end-of-sequence ids.
        ignore_eos: do not end at the model's own end-of-sequence ids.
        min_p: keep tokens with at least this share of the largest probability, 0 .. 1.
        presence_penalty: taken from the logits of tokens that were generated, -2 .. 2.
        frequency_penalty: taken from a token's logit each time that it was generated, -2 .. 2.
        repetition_penalty: logits of tokens of the prompt and of generated ones are divided by it
            where they are positive, else multiplied; 0.01 .. 100, 1 changes nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalized(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate.

    Attributes:
        rid: the request id, unique among the engine's sequences.
        prompt: token ids, at least one.
        sampling: how to choose tokens.
        generated: ids that an earlier owner already generated; they are computed again as if they
            were a prompt, are not output again, and count towards `max_tokens`.
        priority: 0 high, 1 normal, 2 low; decides who waits when memory is short.
        choice: index of the choice, part of the random number's key.
    """

    rid: str
    prompt: Sequence[int]
    sampling: SamplingParams
    generated: Sequence[int] = ()
    priority: int = 1
    choice: int = 0


@dataclass(slots=True)
class StepOutput:
    """What one step did for one sequence.

    Attributes:
        rid: the sequence.
        tokens: ids sampled in this step, in order; empty while the prompt is being read. The id
            that ended the sequence (end-of-sequence or a stop id) is included as the last one.
        prefilled: rows of prompt + generated in the KV cache: progress before the first token.
            The last of them was computed in this step, also where the others were in the cache
            already: what counts as progress is a step that the engine survived. WAITS
            (shared.messages): it waits for room, before its first row or having given all up.
        finish: None while the sequence goes on. "stop": an end id; "length": max_tokens or the
            context length was reached; "error": this sequence failed (others go on).
        error: a sentence, only with finish == "error".
    """

    rid: str
    tokens: list[int]
    prefilled: int = 0
    finish: Finish | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine lives.

    Attributes:
        name: "echo", "torch", ...
        max_batch_size: most sequences at once, 1-256.
        context_length: most tokens of prompt and output together.
        vocab_size: ids are in [0, vocab_size).
        eos_ids: the model's end-of-sequence ids.
        device: "cpu", "cuda:0", "none".
        dtype: "bfloat16", "float32", "none".
    """

    name: str
    max_batch_size: int
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int] = frozenset()
    device: str = "none"
    dtype: str = "none"


@dataclass(slots=True)
class EngineStats:
    """Counters and gauges since the start, for metrics.

    Attributes:
        running: sequences that a step may advance now.
        waiting: sequences accepted but held back for memory.
        kv_usage: share of the KV cache's blocks in use, 0..1.
        steps: steps run. preemptions: sequences whose cache was dropped to be recomputed.
        prompt_tokens, generated_tokens: rows computed of prompts, tokens sampled.
        prefix_queries: tokens of admitted sequences that were looked for in the prefix cache.
        prefix_hits: how many of them were there, and not computed again.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Engine(Protocol):
    """A continuously batched model. One thread calls everything, the constructor included."""

    info: EngineInfo

    def warm_up(self) -> None:
        """Compiles, allocates and runs what the first request would otherwise wait for.

        Raises:
            worker.engine.EngineError: the engine cannot serve here, and why.
        """

    def room(self) -> int:
        """How many more sequences `add` would accept now, and could start soon: 0 when full."""

    def add(self, request: EngineRequest) -> None:
        """Admits a sequence; it joins at the next step.

        Raises:
            ValueError: the rid is known, the prompt is empty, an id is out of the vocabulary, or
                prompt + generated leaves no room in the context.
        """

    def abort(self, rid: str) -> None:
        """Drops a sequence and frees what it holds. An unknown rid is ignored."""

    def step(self) -> list[StepOutput]:
        """Runs one iteration over the sequences that fit. Empty when there is nothing to do."""

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""

    def close(self) -> None:
        """Frees the device. The engine is not used again."""
