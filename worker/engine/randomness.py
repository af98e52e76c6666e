"""Random numbers from (seed, choice, position), so that any engine can go on with a sequence."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finalizer of splitmix64: a bijection in which every bit depends on every bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def random_bits(seed: int, choice: int, position: int) -> int:
    """64 random bits for one token.

    Args:
        seed: of the request.
        choice: index of the choice.
        position: index of the generated token, from 0.
    """
    state = _mix((seed + _GAMMA) & _MASK)
    state = _mix((state ^ choice) + _GAMMA & _MASK)
    return _mix((state + (position + 1) * _GAMMA) & _MASK)


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (random_bits(seed, choice, position) >> 11) * 2.0**-53
