"""A caller's limits as response headers: OpenAI's and the IETF's."""

from __future__ import annotations

import math

from shared.settings import Settings
from shared.store import Limited

EXPOSED = (
    "Retry-After",
    "retry-after-ms",
    "RateLimit",
    "RateLimit-Policy",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)
"""What browsers of other origins may read."""


def limit_headers(settings: Settings, limited: Limited) -> dict[str, str]:
    """The headers for what is left of the buckets; a limit that is off has none."""
    headers, policies, states = {}, [], []
    for kind, limit, left, reset_ms in (
        (
            "requests",
            settings.requests_per_minute,
            limited.requests_left,
            limited.requests_reset_ms,
        ),
        ("tokens", settings.tokens_per_minute, limited.tokens_left, limited.tokens_reset_ms),
    ):
        if not limit:
            continue
        left = max(0, left)
        headers[f"x-ratelimit-limit-{kind}"] = str(limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(left)
        headers[f"x-ratelimit-reset-{kind}"] = f"{reset_ms / 1000:.3f}s"
        policies.append(f'"{kind}";q={limit};w=60')
        states.append(f'"{kind}";r={left};t={math.ceil(reset_ms / 1000)}')
    if policies:
        headers["RateLimit-Policy"] = ", ".join(policies)
        headers["RateLimit"] = ", ".join(states)
    return headers
