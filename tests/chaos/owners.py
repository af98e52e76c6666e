"""Which owner of a request wrote a token, where the engine's tokens tell: `engine.Signed`."""

from __future__ import annotations

from typing import Any

from gateway_site import LETTERS

from worker.engine.echo import echo_token

SIGNED = "chaos.engine:Signed"
"""As RTS_ENGINE."""
BY_OWNER: dict[str, Any] = {
    # No stop string: what comes is not known in advance.
    "kinds": ("keyed", "key", "chat", "infer", "flaky"),
    "tokens": (100, 160),
    # No room for all on one: whichever stands still owns some.
    "settings": {"tokens_per_minute": 6000, "engine": SIGNED, "max_batch_size": 32},
}
"""Of a scenario whose streams are told apart that way."""


def wrong_owner(seed: int, text: str, epochs: int) -> str:
    """What is wrong with a text that signed engines generated; "" when nothing is.

    Whoever owned the request at a token, no earlier owner wrote after it.
    """
    epoch = 1
    for position, letter in enumerate(text):
        while LETTERS[echo_token(seed, epoch, position)] != letter:
            epoch += 1
            if epoch > epochs:
                return f"token {position + 1} was written by no owner, or by one before the last"
    return ""
