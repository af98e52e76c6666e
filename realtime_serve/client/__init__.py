"""The Python client: streams that survive their worker, their gateway and their connection."""

from realtime_serve.client.aio import AsyncClient, AsyncStream
from realtime_serve.client.answers import Answer, RequestState, Token, Usage
from realtime_serve.client.errors import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    DeadlineError,
    NotFoundError,
    RateLimitError,
    RequestCancelledError,
    ServerError,
    StreamLostError,
)
from realtime_serve.client.orders import Options
from realtime_serve.client.sync import Client, Stream

__all__ = [
    "APIConnectionError",
    "APIError",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "DeadlineError",
    "NotFoundError",
    "Options",
    "RateLimitError",
    "RequestCancelledError",
    "RequestState",
    "ServerError",
    "Stream",
    "StreamLostError",
    "Token",
    "Usage",
]
