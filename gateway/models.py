"""The models there are: name -> live version -> what this gateway needs to serve it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.errors import ModelNotFound, ModelNotReady
from shared import keys, messages, tasks
from shared.errors import StoreUnavailable
from shared.store import Store, unavailable
from shared.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.2
"""An unknown model makes us ask Redis at once, but not more often than this."""
LOOK_S = 0.8
"""Longest that a request waits for that: an outage is answered within a second."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model version that this gateway can serve.

    Attributes:
        sampling: what its authors advise for requests that leave it out.
    """

    name: str
    version: str
    context_length: int
    vocab_size: int
    created: int
    tokenizer: PromptTokenizer
    sampling: dict[str, float]

    @property
    def mv(self) -> str:
        """`model@version`."""
        return keys.model_version(self.name, self.version)


class Models:
    """A copy of what Redis says of models, refreshed by its owner each second.

    Args:
        store: where they are. healthy: whether Redis can be reached as far as is known.
    """

    def __init__(self, store: Store, healthy: Callable[[], bool] = lambda: True) -> None:
        self._store = store
        self._healthy = healthy
        self._served: dict[str, ServedModel] = {}
        self._known: dict[str, str] = {}
        self._broken: set[str] = set()
        self._refreshing = asyncio.Lock()
        self._refreshed_at = float("-inf")
        self._look: asyncio.Task[StoreUnavailable | None] | None = None
        self._looked_at = float("-inf")

    def served(self) -> list[ServedModel]:
        """All models that can be served now, by name."""
        return [self._served[name] for name in sorted(self._served)]

    def find(self, name: str) -> ServedModel | None:
        """The live version of a model as far as is known, without asking Redis."""
        return self._served.get(name)

    async def resolve(self, name: str) -> ServedModel:
        """The live version of a model.

        Raises:
            ModelNotFound: there is no such model.
            ModelNotReady: there is, but it cannot be served yet.
            StoreUnavailable: it is not known here and Redis cannot be asked.
        """
        model = self._served.get(name)
        if model is None:
            await self._look_again(name)
            model = self._served.get(name)
        if model is not None:
            return model
        if name in self._known:
            raise ModelNotReady(f"The model {name!r} is being loaded")
        if not self._known:
            raise ModelNotReady("No model is served yet; a worker may be loading one")
        raise ModelNotFound(name, sorted(self._known))

    async def refresh(self) -> None:
        """Reads names and live versions, and the files of versions that are new.

        Raises:
            StoreUnavailable: what is known stays as it is.
        """
        async with self._refreshing:
            self._known = await self._live_versions()
            for name in self._served.keys() - self._known.keys():
                del self._served[name]
            for name, version in self._known.items():
                served = self._served.get(name)
                if served is None or served.version != version:
                    await self._load(name, version)
            self._refreshed_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        """Stops, leaving no task behind."""
        if self._look is not None:
            await tasks.end(self._look)

    async def _look_again(self, name: str) -> None:
        """One look for all who ask at the same time, and its failure is theirs, too."""
        now = asyncio.get_running_loop().time()
        if now - self._refreshed_at < LOOK_AGAIN_S:
            return
        if not self._healthy():
            raise StoreUnavailable("no connection")
        look = self._look
        if look is None or (look.done() and now - self._looked_at >= LOOK_AGAIN_S):
            look = self._look = asyncio.create_task(self._look_once(), name="look for a model")
        await asyncio.wait([look], timeout=LOOK_S)
        error = look.result() if look.done() else None
        if error is not None:
            raise StoreUnavailable(error.reason)
        if not look.done() and name not in self._known:
            raise StoreUnavailable("no answer in time")

    async def _look_once(self) -> StoreUnavailable | None:
        try:
            await self.refresh()
        except StoreUnavailable as error:
            return error
        finally:
            self._looked_at = asyncio.get_running_loop().time()
        return None

    async def _live_versions(self) -> dict[str, str]:
        client: Any = self._store.client
        async with unavailable():
            names = sorted(name.decode() for name in await client.smembers(keys.MODELS))
            if not names:
                return {}
            async with client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hget(keys.model(name), "live")
                versions = await pipe.execute()
        return {
            name: version.decode()
            for name, version in zip(names, versions, strict=True)
            if version is not None
        }

    async def _load(self, name: str, version: str) -> None:
        mv = keys.model_version(name, version)
        if mv in self._broken:
            return
        async with unavailable():
            data = await self._store.client.get(keys.files(mv))
        if data is None:
            return
        try:
            self._served[name] = await asyncio.to_thread(_serve, name, version, data)
        except Exception as error:
            # The tokenizers library raises plain Exception for a file that it cannot read.
            self._broken.add(mv)
            log.error("cannot read a model's files", extra={"model": mv, "error": str(error)})
        else:
            log.info("serving a model", extra={"model": name, "version": version})


def _serve(name: str, version: str, data: bytes) -> ServedModel:
    card = messages.decode(data, messages.ModelCard)
    return ServedModel(
        name,
        version,
        card.context_length,
        card.vocab_size,
        card.created,
        PromptTokenizer(card),
        card.sampling,
    )
