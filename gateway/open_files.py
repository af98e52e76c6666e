"""How many files a gateway may have open: each connection is one.

Beyond that the event loop closes what it accepts, without a word, a probe's connection too. Where
containers start with 1,024 that is less than RTS_MAX_CONNECTIONS.
"""

from __future__ import annotations

import resource

OTHERS = 128
"""Connections to Redis, the listener, and callers who are being told that there are too many."""


def make_room(connections: int) -> int:
    """Raises this process's limit of open files as far as that is needed and allowed.

    Args:
        connections: most open ones of clients.

    Returns:
        As many, or how many fit if the limit is lower and cannot be raised so far; at least one.
    """
    # As many again, who come at once, can still be refused.
    wanted = 2 * connections + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):
        # macOS says that there is no limit, and has one.
        limit = soft
    return max(1, min(connections, limit - OTHERS))
