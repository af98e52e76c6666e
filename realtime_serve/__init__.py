"""What users run and import: the command line, a whole cluster on one machine, the client."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realtime_serve.client import APIError, AsyncClient, Client

__all__ = ["APIError", "AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    # Not before it is asked for: the command line and its processes need none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from realtime_serve import client
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise ImportError(
            "the client needs aiohttp: pip install 'realtime-ai-serve[client]'"
        ) from error
    return getattr(client, name)
