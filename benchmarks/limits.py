"""What the machine itself allows: its bandwidth and its matrix rate, and what follows for a model.

`python -m benchmarks.limits` measures both in a process of its own and answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.companion import Companion, answer
from benchmarks.load import Load

_MEASURE_S = 120.0
_TRIES = 7
_BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True)
class Machine:
    """Both limits, measured.

    Attributes:
        bytes_per_s: read from memory by all cores. flops: of matrix products a second, in bfloat16
            or, where the processor has no instruction for that, in float32.
    """

    bytes_per_s: float
    flops: float

    def or_better(self, other: Machine | None) -> Machine:
        """What both show together: neighbours on the same hardware take from one or the other."""
        if other is None:
            return self
        return Machine(max(self.bytes_per_s, other.bytes_per_s), max(self.flops, other.flops))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model of the Llama family costs.

    Attributes:
        layers: parameters that every row passes. head: those of the output, for rows that sample.
        kv_bytes: of the keys and values of a token. width: of all layers' queries together.
    """

    layers: int
    head: int
    kv_bytes: int
    width: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Reads a model's config.json."""
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        count = config["num_hidden_layers"]
        attention = 2 * hidden * heads * size + 2 * hidden * kv_heads * size
        return cls(
            layers=count * (attention + 3 * hidden * config["intermediate_size"]),
            head=hidden * config["vocab_size"],
            kv_bytes=2 * count * kv_heads * size * _BYTES,
            width=count * heads * size,
        )


def serving_limit(machine: Machine, shape: Shape, load: Load) -> float:
    """Tokens a second that no engine can exceed in bfloat16 on this machine under this load.

    A step reads the weights and every stream's keys and values once, or computes every stream's
    row, whichever takes longer; and between two tokens of a stream its share of a prompt is read,
    which is bound by the matrix rate.
    """
    mean = load.prompt_tokens + load.output_tokens / 2
    weights = (shape.layers + shape.head) * _BYTES
    reading_s = (weights + load.streams * mean * shape.kv_bytes) / machine.bytes_per_s
    row = 2 * (shape.layers + shape.head) + 4 * shape.width * mean
    computing_s = load.streams * row / machine.flops
    prompt_row = 2 * shape.layers + 4 * shape.width * load.prompt_tokens / 2
    prompts_s = load.streams * load.prompt_tokens / load.output_tokens * prompt_row / machine.flops
    return load.streams / (max(reading_s, computing_s) + prompts_s)


def measure() -> Machine:
    """Measures both in a process of its own, so that none of its threads and memory stay."""
    with Companion("benchmarks.limits") as companion:
        return Machine(**companion.hear(_MEASURE_S, json.loads))


def main() -> int:
    """Answers with the fastest of several tries: whatever is slower was disturbed."""
    import torch

    big = torch.ones(1 << 27)  # 512 MiB: no cache holds it
    read_s = _best(lambda: big.sum())

    def flops(dtype: torch.dtype, side: int) -> float:
        left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
        return 2 * side**3 / _best(lambda: left @ right)

    # A small product tells which type is faster: a large one of the other may take minutes.
    faster = max((torch.bfloat16, torch.float32), key=lambda dtype: flops(dtype, 256))
    answer(json.dumps({"bytes_per_s": big.nbytes / read_s, "flops": flops(faster, 2048)}))
    return 0


def _best(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    sys.exit(main())
