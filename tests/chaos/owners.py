"""Which owner of a request wrote a token, where the engine's tokens tell: `engine.Signed`."""

from __future__ import annotations

from gateway_site import LETTERS

from worker.engine.echo import echo_token

SIGNED = "chaos.engine:Signed"
"""As RTS_ENGINE."""


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
