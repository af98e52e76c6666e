"""What a start learned of a model, so that the next one has neither to learn nor to check it again.

To import transformers, to have it load a model and to run it beside ours is most of a worker's
start. What comes of it are sizes, names of weights in their files, tables of positions, and that
the backend computes them rightly: that is kept, under a name that changes with the model's files,
with the code that read, packs and computes them, and with what the backend is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from worker.engine import EngineOptions, ModelFiles
from worker.engine.decoder import Sizes, Weight
from worker.engine.loader import LoadedModel, dtype_for, version_of
from worker.engine.native.build import best_level, library
from worker.engine.native.library import Part

log = logging.getLogger(__name__)

_RECIPE: Final = "recipe.json"
_TABLES: Final = "tables.safetensors"
_IN_TABLES: Final = (Part.ROPE_COS, Part.ROPE_SIN)
"""Parts that are in no file of the model."""
_UNUSED_S: Final = 30 * 86400
"""A recipe that no start has used for so long is removed. Not sooner: while a cluster rolls, two
programs may have a folder in common."""


class Ingredient(msgspec.Struct, frozen=True):
    """A `Weight` without its numbers.

    Attributes:
        names: of tensors in the model's files, or in tables.safetensors; a number is so many zeros.
    """

    layer: int
    part: Part
    names: list[str | int]
    dtype: str
    plus: float


class Recipe(msgspec.Struct, frozen=True):
    """All that a start needs beside the model's own files.

    Attributes:
        files: what is published of it. weights_bytes: what transformers' module of it took.
    """

    files: ModelFiles
    weights_bytes: int
    sizes: Sizes
    ingredients: list[Ingredient]


class Known:
    """A model whose recipe there is.

    Attributes:
        files, weights_bytes, sizes: see `Recipe`. folder: of the model.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        """Reads the recipe.

        Args:
            folder: of the model.
            place: of the recipe.

        Raises:
            Exception: something is missing or broken.
        """
        self.folder = folder
        recipe = msgspec.json.decode((place / _RECIPE).read_bytes(), type=Recipe)
        self.files, self.sizes = recipe.files, recipe.sizes
        self.weights_bytes = recipe.weights_bytes
        self._ingredients = recipe.ingredients
        self._tensors = _Tensors([*_files(folder), place / _TABLES])
        names = {name for each in self._ingredients for name in each.names if isinstance(name, str)}
        if missing := names - self._tensors.keys():
            raise KeyError(f"no {missing.pop()}")

    def weights(self) -> Iterator[Weight]:
        """The decoder's parts, read as they are asked for; once."""
        with self._tensors as tensors:
            yield from _mixed(self._ingredients, tensors, self.sizes.torch_dtype)


def find(folder: Path, options: EngineOptions) -> Known | None:
    """What is known of the model in a folder, for the native backend; None: nothing of use."""
    try:
        place = _place(options, version_of(folder))
        if not place.is_dir():
            return None
        known = Known(folder, place)
        with suppress(OSError):
            os.utime(place)
    except Exception as error:
        log.warning(f"what is known of {folder} is of no use: {error}")
        return None
    return known


def keep(
    loaded: LoadedModel, options: EngineOptions, sizes: Sizes, weights: Sequence[Weight]
) -> None:
    """Writes a recipe down, if the model can be read back by it; says why where it cannot.

    Args:
        loaded: the model; without a folder nothing is kept.
        options: of the engine that checked it.
        sizes: as they were checked.
        weights: the same.
    """
    folder = loaded.folder
    if folder is None:
        return
    try:
        place = _place(options, loaded.files.version)
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(place.parent)
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as scratch:
            made = Path(scratch) / place.name
            made.mkdir()
            ingredients = _written(made, folder, loaded.model, sizes, weights)
            recipe = Recipe(loaded.files, loaded.weights_bytes, sizes, ingredients)
            (made / _RECIPE).write_bytes(msgspec.json.encode(recipe))
            for file in made.iterdir():
                file.chmod(0o644)
            # What is there is broken, or of a start at the same time, which is as good.
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)
    except Exception as error:
        log.info("the next start will check the model again", extra={"why": str(error)})


def _remove_unused(recipes: Path) -> None:
    for place in recipes.iterdir():
        with suppress(OSError):
            if time.time() - place.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(place, ignore_errors=True)


def _written(
    made: Path, folder: Path, model: torch.nn.Module, sizes: Sizes, weights: Sequence[Weight]
) -> list[Ingredient]:
    """Writes what is in no file of the model into a folder; what the weights are made of then.

    Raises:
        KeyError: they cannot be made of that.
    """
    tables: dict[str, torch.Tensor] = {}
    with _Tensors(_files(folder)) as tensors:
        names = _names(model, tensors)
    ingredients = [_ingredient(weight, names, tables) for weight in weights]
    save_file(tables, made / _TABLES)
    with _Tensors([*_files(folder), made / _TABLES]) as tensors:
        again = _mixed(ingredients, tensors, sizes.torch_dtype)
        for weight, other in zip(weights, again, strict=True):
            if not torch.equal(weight.tensor(), other.tensor()):
                raise KeyError(f"{weight.part.name} is not what its file says")
    return ingredients


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _place(options: EngineOptions, version: str) -> Path:
    """Where a recipe is, or would be."""
    level = best_level()
    code = library(level, options.data_dir / "native")
    dtype = dtype_for(options.dtype, native=True)
    kind = "exact" if options.deterministic else "fast"
    digest = hashlib.sha256(_code() + code.read_bytes()).hexdigest()[:16]
    return options.data_dir / "recipes" / f"{version}-{dtype}-{level}-{kind}-{digest}"


@functools.cache
def _code() -> bytes:
    """Changes with our code and with the packages that read models."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for package in ("transformers", "tokenizers", "safetensors", "torch"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.digest()


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of some files, by name, read one by one; without those that two files have."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        files = [self._stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        count = Counter(name for file in files for name in file.keys())  # noqa: SIM118  (no dict)
        self._file_of: dict[str, Any] = {
            name: file
            for file in files
            for name in file.keys()  # noqa: SIM118
            if count[name] == 1
        }

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _names(model: torch.nn.Module, tensors: _Tensors) -> dict[int, str]:
    """By what a parameter is in memory, its name in the files; what is tied has several there."""
    return {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in tensors
    }


def _ingredient(
    weight: Weight, names: Mapping[int, str], tables: dict[str, torch.Tensor]
) -> Ingredient:
    found: list[str | int] = []
    for source in weight.sources:
        if isinstance(source, int):
            found.append(source)
        elif weight.part in _IN_TABLES:
            name = f"{weight.part.name}.{weight.layer}"
            tables[name] = source
            found.append(name)
        elif id(source) in names:
            found.append(names[id(source)])
        else:
            raise KeyError(f"{weight.part.name} is in no file under its name")
    dtype = str(weight.dtype).removeprefix("torch.")
    return Ingredient(weight.layer, weight.part, found, dtype, weight.plus)


def _mixed(
    ingredients: Iterable[Ingredient], tensors: _Tensors, dtype: torch.dtype
) -> Iterator[Weight]:
    """The weights; what is the model's own is rounded to its dtype first, as transformers does."""
    for each in ingredients:
        is_table = each.part in _IN_TABLES
        sources: list[torch.Tensor | int] = []
        for name in each.names:
            if isinstance(name, int):
                sources.append(name)
            else:
                sources.append(tensors[name] if is_table else tensors[name].to(dtype))
        yield Weight(each.layer, each.part, sources, getattr(torch, each.dtype), each.plus)
