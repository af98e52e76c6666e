"""Which backend computes a model: compiled code where it can, transformers' modules elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from worker.engine import EngineError, EngineOptions, recipe
from worker.engine.backend import Backend
from worker.engine.cpu import CpuBackend
from worker.engine.decoder import Sizes, Weight
from worker.engine.load_check import LoadCheck, refuse_by_config
from worker.engine.loader import (
    LoadedModel,
    ModelLoadError,
    dtype_for,
    load,
    locate,
    model_type,
)
from worker.engine.native.build import NativeUnavailable, best_level, library
from worker.engine.recipe import Known

log = logging.getLogger(__name__)


class OtherDtype(Exception):
    """Compiled code cannot compute a model, and torch should not in the dtype it was loaded in.

    The message says why compiled code cannot.
    """


def open_model(options: EngineOptions, device: torch.device) -> LoadedModel | Known:
    """The model that the options name: what an earlier start learned of it, or all of it.

    Raises:
        ModelLoadError: there is no such model, or it is broken.
    """
    folder = locate(options.source, options.data_dir, options.progress)
    native = device.type == "cpu" and options.backend != "reference" and _is_compiled(options)
    if native:
        if (known := recipe.find(folder, options)) is not None:
            return known
        native = _is_dense(folder)
    return _load(folder, options, native=native)


def make_backend(
    model: LoadedModel | Known,
    options: EngineOptions,
    size: Callable[[int], int],
    *,
    device: torch.device,
    rows: int,
) -> Backend:
    """The fastest backend that computes a model rightly here.

    Args:
        model: it; a backend takes it over.
        options: of the engine.
        size: from the bytes of one block of the cache to how many blocks are wanted.
        device: where it runs.
        rows: most rows of a step.

    Raises:
        EngineError: none does what the options ask for.
        OtherDtype: the reference could, had the model been loaded for it.
        ModelLoadError: none computes the model rightly.
        MemoryError, torch.OutOfMemoryError: there is not enough.
    """
    if isinstance(model, Known):
        try:
            backend = _native(model.sizes, model.weights(), None, options, size, rows)
        except (EngineError, MemoryError):
            raise
        except Exception as error:
            log.warning(f"what is known of {model.folder} is of no use: {error}")
            model = _load(model.folder, options, native=True)
        else:
            log.info("backend", extra={"backend": "cpu", "level": backend.level, "known": True})
            return backend
    refuse_by_config(model.model)
    why = ""
    if options.backend == "reference":
        why = "RTS_BACKEND=reference"
    elif device.type != "cpu":
        why = f"the device is {device}"
    else:
        options.progress("preparing the native backend", 0.0)
        try:
            backend = _checked(model, options, size, rows)
        except NativeUnavailable as error:
            why = str(error)
        else:
            log.info("backend", extra={"backend": "cpu", "level": backend.level})
            return backend
    if options.backend == "cpu":
        raise EngineError(f"the native CPU backend cannot be used: {why}")
    if options.deterministic:
        raise EngineError(f"RTS_DETERMINISTIC needs the native CPU backend: {why}")
    # Not converted: what was rounded stays rounded, and the dtype stands for the tokens served.
    if model.dtype is not None and model.dtype != dtype_for(options.dtype):
        raise OtherDtype(why)
    log.info("backend", extra={"backend": "reference", "why": why})
    from worker.engine.reference import ReferenceBackend

    return ReferenceBackend(model.model, device, size)


def _is_compiled(options: EngineOptions) -> bool:
    """Whether there is code for this processor, once it has been tried to compile it."""
    options.progress("preparing the native backend", 0.0)
    try:
        library(best_level(), options.data_dir / "native")
    except NativeUnavailable:
        return False
    return True


def _is_dense(folder: Path) -> bool:
    """Whether a model is of a family that the code knows, as far as its config tells."""
    from worker.engine.dense import FAMILIES

    try:
        return model_type(folder) in FAMILIES
    except ModelLoadError:
        # To load it will say more.
        return False


def _load(folder: Path, options: EngineOptions, *, native: bool) -> LoadedModel:
    dtype = dtype_for(options.dtype, native=native)
    return load(folder, dtype, options.source, options.progress)


def _checked(
    loaded: LoadedModel, options: EngineOptions, size: Callable[[int], int], rows: int
) -> CpuBackend:
    """The native backend, once it has said what transformers says.

    Raises:
        NativeUnavailable: it cannot, or does not know such models.
    """
    from worker.engine.dense import Dense, NotDense

    try:
        dense = Dense(loaded.model, loaded.files.context_length)
    except NotDense as why:
        raise NativeUnavailable(str(why)) from why
    weights = list(dense.weights())
    check = LoadCheck(loaded.model, dense.sizes.vocab)
    backend = _native(dense.sizes, weights, check, options, size, rows)
    recipe.keep(loaded, options, dense.sizes, weights)
    return backend


def _native(
    sizes: Sizes,
    weights: Iterable[Weight],
    check: LoadCheck | None,
    options: EngineOptions,
    size: Callable[[int], int],
    rows: int,
) -> CpuBackend:
    return CpuBackend(
        sizes,
        _told(weights, len(sizes.layers), options),
        check,
        size,
        most_rows=rows,
        most_outs=options.max_batch_size,
        threads=options.threads,
        exact=options.deterministic,
        folder=options.data_dir / "native",
    )


def _told(weights: Iterable[Weight], layers: int, options: EngineOptions) -> Iterator[Weight]:
    """The weights, while somebody hears how far it is."""
    for weight in weights:
        options.progress("packing weights", max(0, weight.layer) / layers)
        yield weight
    options.progress("packing weights", 1.0)
