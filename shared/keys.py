"""All names in Redis: type, what, who writes and reads, how long it lives.

Scripts compute the same names themselves (shared/scripts/common.lua); tests/contract checks that
the two agree. `mv` is `model@version`; a queue is `mv:class`.
"""

from __future__ import annotations

PREFIX = "rts:"
CLASSES = ("high", "normal", "low")
GROUP = "workers"
NOBODY = "-"
CONTROL_GROUP = "control"

MODELS = PREFIX + "models"
"""Set of model names. Written by heartbeat, read by gateways. Stays."""

DUE = PREFIX + "due"
"""Sorted set rid -> deadline (ms) of open requests. enqueue and finish write, expire reads."""

ENDED = PREFIX + "ended"
"""Stream of one fact for each ended request. Written by finish, read by control. Capped."""

DEAD = PREFIX + "dead"
"""Stream of dead letters. Written by take, read by operators. Trimmed by control after 7 days."""

SERVER = PREFIX + "server"
"""Hash run (id of the server's process), since (ms, when it was first met). greet, take. Stays."""

IDENTITY = PREFIX + "id"
"""String, random: another one after the data were lost. Whoever asks first; gateways. Stays."""

SECRET = PREFIX + "secret"
"""String, random: makes request ids of Idempotency-Keys. First gateway that needs it. Stays."""

MARK = PREFIX + "mark"
"""Channel that nobody listens to. A strict enqueue publishes on it: a write without a key."""


def model_version(model: str, version: str) -> str:
    """`model@version`, what queues and engines belong to."""
    return f"{model}@{version}"


def queue(mv: str, cls: str) -> str:
    """Stream of waiting and running requests, group `workers`. enqueue, take, finish. Stays."""
    return f"{PREFIX}q:{mv}:{cls}"


def lane(mv: str, cls: str, caller: str) -> str:
    """List of a caller's further waiting requests. enqueue, promote. Gone when empty."""
    return f"{PREFIX}lane:{mv}:{cls}:{caller}"


def turn(mv: str, cls: str) -> str:
    """Hash caller -> rid of its entry waiting in the stream. enqueue, promote. Gone when empty."""
    return f"{PREFIX}turn:{mv}:{cls}"


def count(mv: str, cls: str) -> str:
    """Hash of what the scripts count for a queue. Stays.

    Fields: waiting, running, bytes: now. ticket: last given. head: left the queue. redelivered:
    taken over from another engine. dead: became dead letters.
    """
    return f"{PREFIX}count:{mv}:{cls}"


def request(rid: str) -> str:
    """Hash of a request. enqueue, take, emit, leave, finish; gateways. Deadline + 300 s; keep.

    Fields:
        st: w waiting, r running, e ended. mv, cls, caller: whose. eid: its entry in the queue, ""
            while it is in a lane.
        dig: digest of the body. body, size: messages.Request, until the end, and its bytes.
            view: messages.View.
        own: `<epoch>:<engine>`, the fence. ep: the last epoch given.
        seq: last token in the log. pr: rows computed, while no token comes. hw: most rows of the
            prompt that any owner computed. mark: hw + seq when it was taken. deaths: of owners in a
            row that added nothing to that.
        dl: deadline (ms). grace, keep: durations (ms). unheard: since when nobody listens (ms),
            if nobody heard the token after `quiet`, either.
        t0, t1, t2, t3: queued, first taken, first token, ended (ms). reason: how it ended.
        pt: prompt tokens. charge: tokens charged. tk: ticket.
        run: which run of the request it is, named by the attempt that queued it. att: that attempt,
            while it may take it back; "" once a client has attached to it.
        ct: a gateway has counted its end; set by the first one (HSETNX).
    """
    return f"{PREFIX}r:{rid}"


def log(rid: str) -> str:
    """Stream of a request's tokens, and channel of the same name. emit, finish; gateways. keep."""
    return f"{PREFIX}l:{rid}"


def leases(mv: str) -> str:
    """Sorted set engine -> last progress (ms), of engines that own requests.

    take, emit, finish, release; read by gateways.
    """
    return f"{PREFIX}leases:{mv}"


def owns(mv: str) -> str:
    """Hash engine -> how many requests it owns. take, finish, release. Gone when empty."""
    return f"{PREFIX}owns:{mv}"


def engines(mv: str) -> str:
    """Sorted set engine -> last heartbeat (ms). heartbeat, depart. Entries drop out after 5 s."""
    return f"{PREFIX}engines:{mv}"


def cards(mv: str) -> str:
    """Hash engine -> messages.EngineCard. heartbeat, depart; read by gateways."""
    return f"{PREFIX}cards:{mv}"


def control_channel(engine: str) -> str:
    """Channel an engine is subscribed to as a sign of life; counted by take."""
    return f"{PREFIX}w:{engine}"


def is_open(mv: str) -> str:
    """String: the version takes requests. heartbeat; read by enqueue. Stays."""
    return f"{PREFIX}open:{mv}"


def wake(mv: str) -> str:
    """List of tokens that wake idle workers (BLPOP). enqueue, release. At most 256."""
    return f"{PREFIX}wake:{mv}"


def model(name: str) -> str:
    """Hash live -> version of new requests, v:<version> -> last heartbeat. heartbeat. Stays."""
    return f"{PREFIX}m:{name}"


def files(mv: str) -> str:
    """String, messages.ModelCard: tokenizer, template. Workers write, gateways read. Stays."""
    return f"{PREFIX}f:{mv}"


def bucket(caller: str) -> str:
    """Hash of a caller's rate limits. limit, refund, settle. Until the bucket is full."""
    return f"{PREFIX}b:{caller}"


def charge(attempt: str) -> str:
    """String: tokens charged to an attempt to enqueue. limit; enqueue or refund take it. 1 min."""
    return f"{PREFIX}charge:{attempt}"


def settled(fact: str) -> str:
    """String: the budget of this entry of `ended` was settled. settle. One hour."""
    return f"{PREFIX}settled:{fact}"
