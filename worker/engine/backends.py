"""Which backend computes a model: compiled code where it can, transformers' modules elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from worker.engine import EngineError, EngineOptions
from worker.engine.backend import Backend
from worker.engine.cpu import CpuBackend
from worker.engine.load_check import refuse_by_config
from worker.engine.loader import LoadedModel
from worker.engine.native.build import NativeUnavailable
from worker.engine.reference import ReferenceBackend

log = logging.getLogger(__name__)


def make_backend(
    loaded: LoadedModel,
    options: EngineOptions,
    size: Callable[[int], int],
    *,
    device: torch.device,
    rows: int,
) -> Backend:
    """The fastest backend that computes a model rightly here.

    Args:
        loaded: the model; a backend takes it over.
        options: of the engine.
        size: from the bytes of one block of the cache to how many blocks are wanted.
        device: where it runs.
        rows: most rows of a step.

    Raises:
        EngineError: none does what the options ask for.
        ModelLoadError: none computes the model rightly.
        MemoryError, torch.OutOfMemoryError: there is not enough.
    """
    refuse_by_config(loaded.model)
    why = ""
    if options.backend == "reference":
        why = "RTS_BACKEND=reference"
    elif device.type != "cpu":
        why = f"the device is {device}"
    else:
        options.progress("preparing the native backend", 0.0)
        try:
            backend = CpuBackend(
                loaded.model,
                size,
                positions=loaded.files.context_length,
                most_rows=rows,
                most_outs=options.max_batch_size,
                threads=options.threads,
                exact=options.deterministic,
                folder=options.data_dir / "native",
            )
        except NativeUnavailable as error:
            why = str(error)
        else:
            log.info("backend", extra={"backend": "cpu", "level": backend.level})
            return backend
    if options.backend == "cpu":
        raise EngineError(f"the native CPU backend cannot be used: {why}")
    if options.deterministic:
        raise EngineError(f"RTS_DETERMINISTIC needs the native CPU backend: {why}")
    log.info("backend", extra={"backend": "reference", "why": why})
    return ReferenceBackend(loaded.model, device, size)
