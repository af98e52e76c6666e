"""The C interface of the native backend (source/api.h), as ctypes see it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Final

from worker.engine.native.build import NativeUnavailable

API_VERSION: Final = 1
BFLOAT16: Final = 0
FLOAT32: Final = 1
_ERROR_BYTES: Final = 512


class Part(IntEnum):
    """Parts of a layer, then of the model; see api.h for their shapes."""

    NORM_ATTENTION = 0
    NORM_ATTENTION_OUT = 1
    NORM_FFN = 2
    NORM_FFN_OUT = 3
    NORM_QUERY = 4
    NORM_KEY = 5
    QKV = 6
    QKV_BIAS = 7
    OUT = 8
    OUT_BIAS = 9
    GATE_UP = 10
    GATE_UP_BIAS = 11
    DOWN = 12
    DOWN_BIAS = 13
    EMBEDDING = 20
    NORM_FINAL = 21
    HEAD = 22
    HEAD_BIAS = 23
    ROPE_COS = 24
    ROPE_SIN = 25


_SHAPE: Final = (
    *("dtype", "activation", "layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocab"),
    *("rope_tables", "positions", "blocks", "most_rows", "most_outs", "threads", "exact"),
)
_ROWS: Final = ("ids", "positions", "sequence", "table", "out_rows")
_DRAWS: Final = (
    *("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "top_k"),
    *("seed", "choice", "position", "seen_start", "seen_ids", "seen_generated"),
)


class CShape(ctypes.Structure):
    """`rts_shape`."""

    _fields_ = (
        *((name, c_int32) for name in _SHAPE),
        ("norm_eps", c_float),
        ("embedding_scale", c_float),
        ("logit_soft_cap", c_float),
    )


class CLayer(ctypes.Structure):
    """`rts_layer`."""

    _fields_ = (
        ("rope_table", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
    )


class CStep(ctypes.Structure):
    """`rts_step`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "sequences", "table_width", "outs")),
        *((name, c_void_p) for name in (*_ROWS, *_DRAWS)),
    )


class Library:
    """A loaded library. Calls release the GIL.

    Raises:
        NativeUnavailable: it is none, or of another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            c = ctypes.CDLL(str(path))
            version = c.rts_api_version()
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{path} cannot be loaded: {error}") from error
        if version != API_VERSION:
            raise NativeUnavailable(f"{path} has version {version}, not {API_VERSION}")
        c.rts_create.argtypes = (POINTER(CShape), POINTER(CLayer), POINTER(c_char), c_int64)
        c.rts_create.restype = c_void_p
        c.rts_destroy.argtypes = (c_void_p,)
        c.rts_destroy.restype = None
        c.rts_error.argtypes = (c_void_p,)
        c.rts_error.restype = c_char_p
        c.rts_set.argtypes = (c_void_p, c_int32, c_int32, c_void_p, c_int64)
        c.rts_complete.argtypes = (c_void_p,)
        c.rts_run.argtypes = (c_void_p, POINTER(CStep), c_void_p)
        c.rts_logits.argtypes = (c_void_p, POINTER(c_int64))
        c.rts_logits.restype = c_void_p
        c.rts_clear.argtypes = (c_void_p, c_int64)
        c.rts_alone.argtypes = (c_void_p, c_int)
        c.rts_alone.restype = None
        self.c: Final = c

    def create(self, shape: CShape, layers: list[CLayer]) -> Handle:
        """An engine without weights.

        Raises:
            MemoryError: there is not enough.
            ValueError: the shape makes no sense.
        """
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        array = (CLayer * len(layers))(*layers)
        pointer = self.c.rts_create(ctypes.byref(shape), array, error, _ERROR_BYTES)
        if not pointer:
            raise _exception(error.value.decode())
        return Handle(self, pointer)


class Handle:
    """One native engine. Failures raise ValueError, or MemoryError."""

    def __init__(self, library: Library, pointer: int) -> None:
        self._c = library.c
        self._pointer: int | None = pointer

    def set(self, layer: int, part: Part, data: int, count: int) -> None:
        """Copies `count` numbers at an address."""
        self._check(self._c.rts_set(self._pointer, layer, part, data, count))

    def complete(self) -> None:
        """Checks that all parts are there."""
        self._check(self._c.rts_complete(self._pointer))

    def run(self, step: CStep, tokens: int) -> None:
        """Runs a step; `tokens` is the address of an int64 for each out row, or 0."""
        self._check(self._c.rts_run(self._pointer, ctypes.byref(step), tokens))

    def logits(self) -> tuple[int, int]:
        """Address and row width, in floats, of the last step's logits."""
        stride = c_int64()
        address = self._c.rts_logits(self._pointer, ctypes.byref(stride))
        return int(address), stride.value

    def clear(self, block: int) -> None:
        """Fills a block of the cache with zeros."""
        self._check(self._c.rts_clear(self._pointer, block))

    def alone(self, alone: bool) -> None:
        """Whether the calling thread computes without the others."""
        self._c.rts_alone(self._pointer, int(alone))

    def close(self) -> None:
        """Frees it."""
        if self._pointer is not None:
            self._c.rts_destroy(self._pointer)
            self._pointer = None

    def _check(self, status: int) -> None:
        if status:
            raise _exception(self._c.rts_error(self._pointer).decode())


def _exception(why: str) -> Exception:
    return MemoryError(why) if why == "out of memory" else ValueError(why)
