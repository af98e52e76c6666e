"""The one way into the queue: an Order becomes an accepted request with a subscription."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Any

from gateway.edge import WITHDRAW_TRIES, Edge
from gateway.errors import IdempotencyConflict, ModelNotReady, QueueFull, RateLimited
from gateway.formats import Subject
from gateway.headers import Terms
from gateway.hub import Subscription
from gateway.limits import limit_headers
from gateway.models import ServedModel
from gateway.recovery import Recovery
from gateway.requests import Order
from shared import keys, messages
from shared.errors import InvalidRequest, StoreUnavailable
from shared.store import Enqueued, unavailable

ADMISSION_S = 0.8
"""All of Redis' part together: an outage is answered within a second."""
PLAIN_GRACE_MS = 5000
"""A plain request outlives this gateway's connection to Redis by this, for a reconnect."""
KEY_GRACE_S = 30.0
"""A request with an Idempotency-Key waits this long for its client to come again."""
THREAD_FROM = 2048
"""Longer texts than this are tokenized in a thread."""
MESSAGE_SIZE = 64
"""A message counts as so many characters beside its own."""
_ADVISED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What a model may advise for requests that leave it out, and OpenAI's values."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """An accepted request.

    Attributes:
        subject: what the answer is about. subscription: its tokens. cls: its priority.
        kept: it outlives its connection. attached: it had been accepted before.
        headers: rate-limit headers for the response.
    """

    subject: Subject
    caller: str
    cls: str
    subscription: Subscription
    kept: bool
    attached: bool
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Sender:
    """Who orders.

    Attributes:
        rid: the request id, unless an Idempotency-Key gives one.
        label: the client's own name for it, or "".
    """

    caller: str
    rid: str
    label: str
    terms: Terms


async def submit(edge: Edge, order: Order, sender: Sender) -> Ticket:
    """Queues what a client ordered.

    Raises:
        RtsError: it was refused, and nothing was charged or queued.
    """
    _check(edge, order, sender.terms)
    try:
        async with asyncio.timeout(None) as limit:
            return await _submit(edge, order, sender, limit)
    except TimeoutError as error:
        raise StoreUnavailable("no answer in time") from error


async def _submit(edge: Edge, order: Order, sender: Sender, limit: asyncio.Timeout) -> Ticket:
    clock = asyncio.get_running_loop().time
    ends_at = clock() + ADMISSION_S
    for _ in range(2):
        limit.reschedule(ends_at)
        model = await edge.models.resolve(order.model)
        # The limit is for Redis: a long text takes the time that it takes.
        limit.reschedule(None)
        began = clock()
        prompt = await _token_ids(model, order)
        ends_at += clock() - began
        limit.reschedule(ends_at)
        max_tokens = _room(edge, model, order, len(prompt))
        if not edge.healthy:
            raise StoreUnavailable("no connection")
        rid = await _request_id(edge, sender)
        request = _request(edge, model, order, sender, rid, prompt, max_tokens)
        ticket = await _Admission(edge, order, sender, request).run()
        if ticket is not None:
            return ticket
        # The version was closed a moment ago: another one has taken its place.
        await edge.models.refresh()
    raise ModelNotReady(f"No version of the model {order.model!r} takes requests")


class _Admission:
    """One request's way through limits and queue, undone where it ends early."""

    def __init__(self, edge: Edge, order: Order, sender: Sender, request: messages.Request) -> None:
        self._edge = edge
        self._order = order
        self._sender = sender
        self._request = request
        self._tokens = len(request.prompt) + request.sampling.max_tokens
        # What limit, enqueue and refund know this attempt by; rid may be older than it.
        self._attempt = secrets.token_hex(8)
        self._charged = False
        self._sent = False
        s, terms = edge.settings, sender.terms
        self._kept = terms.grace_s is not None or terms.idempotency_key is not None
        self._timeout_s = order.timeout_s or terms.timeout_s or s.timeout_s
        self._keep_s = s.resumable_retention_s if self._kept else s.retention_s
        if terms.grace_s is not None:
            self._grace_ms = int(terms.grace_s * 1000)
        else:
            self._grace_ms = int(KEY_GRACE_S * 1000) if self._kept else PLAIN_GRACE_MS
        # It outlives this admission, so it holds none of its parts.
        self._queue = functools.partial(
            edge.store.enqueue,
            cls=order.cls,
            grace_ms=self._grace_ms,
            keep_ms=int(self._keep_s * 1000),
            attempt=self._attempt,
            queue_limit=s.queue_limit,
            queue_bytes=s.queue_bytes,
            resumable=self._kept,
            strict=s.strict,
        )

    async def run(self) -> Ticket | None:
        """The ticket, or None when the version is closed."""
        edge, rid, caller = self._edge, self._request.rid, self._request.caller
        subscription: Subscription | None = None
        try:
            subscription = await edge.hub.subscribe(rid)
            headers: dict[str, str] = {}
            answer = None
            if self._sender.terms.idempotency_key is not None:
                # Before the charge: who comes again must get in at the limit, too.
                answer = await edge.store.attach(
                    self._request, grace_ms=self._grace_ms, strict=edge.settings.strict
                )
            if answer is None:
                headers = await self._charge()
                answer = await self._enqueue()
        except BaseException:
            if subscription is not None:
                subscription.close()
            if self._charged or self._sent:
                edge.send(self._undo())
            raise
        if answer.outcome != "accepted" and self._charged:
            edge.send(self._undo())
        if answer.outcome in ("accepted", "attached"):
            if self._sender.terms.idempotency_key is not None:
                subscription.forget()
            if answer.outcome == "attached":
                subscription.run = answer.run
                edge.send(edge.store.heard(rid))
            else:
                subscription.run = self._attempt.encode()
                # Not of what was attached to: that may be another version's, and has its deadline.
                subscription.recovery = self._recovery(answer.t0)
            view = answer.view or self._request.view(resumable=self._kept)
            return Ticket(
                Subject(rid, view, len(self._request.prompt)),
                caller,
                self._order.cls,
                subscription,
                self._kept,
                answer.outcome == "attached",
                headers,
            )
        subscription.close()
        if answer.outcome == "conflict":
            raise IdempotencyConflict("This Idempotency-Key was used for a different request")
        if answer.outcome == "full":
            raise QueueFull(
                f"{answer.waiting} requests are waiting for {self._order.model!r}; try again later"
            )
        return None

    async def _charge(self) -> dict[str, str]:
        edge, s = self._edge, self._edge.settings
        if not (s.requests_per_minute or s.tokens_per_minute):
            return {}
        self._charged = True
        limited = await edge.store.limit(
            self._request.caller,
            s.requests_per_minute,
            s.tokens_per_minute,
            self._tokens,
            self._attempt,
        )
        headers = limit_headers(s, limited)
        if not limited.refused:
            return headers
        self._charged = False
        edge.metrics.count_limited(self._request.model, self._order.cls)
        if limited.refused == "size":
            raise InvalidRequest(
                f"The prompt and max_tokens are {self._tokens} tokens together; "
                f"the limit is {s.tokens_per_minute} a minute",
                self._order.max_tokens_param,
                "request_too_large",
            )
        raise RateLimited(limited.refused, limited.retry_ms, headers)

    async def _enqueue(self) -> Enqueued:
        self._sent = True
        timeout_ms = max(1, int(self._timeout_s * 1000))
        try:
            return await self._queue(self._request, timeout_ms=timeout_ms)
        except StoreUnavailable:
            # It may or may not be queued; the same attempt again is harmless.
            return await self._queue(self._request, timeout_ms=timeout_ms)

    def _recovery(self, t0: int) -> Recovery:
        return Recovery(
            self._request,
            self._queue,
            t0=t0,
            ends_at=asyncio.get_running_loop().time() + self._timeout_s,
            keep_s=self._keep_s,
        )

    async def _undo(self) -> None:
        """Ends what this attempt may have queued, or gives back what it may have been charged."""
        for _ in range(WITHDRAW_TRIES):
            with contextlib.suppress(StoreUnavailable):
                await self._edge.store.refund(
                    self._request.rid, self._request.caller, self._attempt
                )
                return
            await asyncio.sleep(0.5)


def _check(edge: Edge, order: Order, terms: Terms) -> None:
    if order.timeout_s is not None and order.timeout_s > edge.settings.timeout_s:
        raise InvalidRequest(
            f"timeout_s must be at most {edge.settings.timeout_s:g}, not {order.timeout_s:g}",
            "timeout_s",
        )
    if terms.grace_s is not None and not order.stream:
        raise InvalidRequest("X-Resumable is for streams", "X-Resumable")
    if terms.queue_status and not order.stream:
        raise InvalidRequest("X-Queue-Status is for streams", "X-Queue-Status")


async def _token_ids(model: ServedModel, order: Order) -> list[int]:
    tokenizer = model.tokenizer
    if order.prompt is not None and not order.prompt:
        # Some tokenizers make a token of nothing.
        raise InvalidRequest("The prompt is empty", "prompt", "empty_prompt")
    if isinstance(order.prompt, list):
        for i, token in enumerate(order.prompt):
            if token >= model.vocab_size:
                raise InvalidRequest(
                    f"{token} is no token id of this model: it has {model.vocab_size}",
                    f"prompt[{i}]",
                )
        ids = order.prompt
    elif order.prompt is not None:
        if len(order.prompt) < THREAD_FROM:
            ids = tokenizer.encode(order.prompt)
        else:
            ids = await asyncio.to_thread(tokenizer.encode, order.prompt)
    else:
        if not tokenizer.has_template:
            raise InvalidRequest(
                f"The model {model.name!r} has no chat template; use /v1/completions",
                "messages",
                "no_chat_template",
            )
        # A template's work is by the message, too, even where they are empty.
        size = sum(len(message["content"]) + MESSAGE_SIZE for message in order.chat)
        if size < THREAD_FROM:
            ids = tokenizer.encode_chat(order.chat)
        else:
            ids = await asyncio.to_thread(tokenizer.encode_chat, order.chat)
    if not ids:
        raise InvalidRequest("The prompt is empty", "prompt", "empty_prompt")
    return ids


def _room(edge: Edge, model: ServedModel, order: Order, prompt: int) -> int:
    """max_tokens, checked against the context."""
    context = model.context_length
    param = "prompt" if order.prompt is not None else "messages"
    if prompt >= context:
        raise InvalidRequest(
            f"This model's maximum context length is {context} tokens, of which at least one is "
            f"for the output. However, your {param} resulted in {prompt} tokens. "
            f"Please reduce the length of the {param}.",
            param,
            "context_length_exceeded",
        )
    if order.max_tokens is None:
        return min(edge.settings.default_max_tokens, context - prompt)
    if prompt + order.max_tokens > context:
        raise InvalidRequest(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{prompt + order.max_tokens} tokens ({prompt} in the {param}, {order.max_tokens} "
            f"in the output). Please reduce the length of the {param} or {order.max_tokens_param}.",
            order.max_tokens_param,
            "context_length_exceeded",
        )
    return order.max_tokens


async def _request_id(edge: Edge, sender: Sender) -> str:
    key = sender.terms.idempotency_key
    if key is None:
        return sender.rid
    fresh = secrets.token_bytes(32)
    async with unavailable():
        # The first to ask sets it; everyone gets the same one.
        known = await edge.store.client.set(keys.SECRET, fresh, nx=True, get=True)
    secret = known if isinstance(known, bytes) else fresh
    text = f"{len(sender.caller)}:{sender.caller}{key}"
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def _request(
    edge: Edge,
    model: ServedModel,
    order: Order,
    sender: Sender,
    rid: str,
    prompt: list[int],
    max_tokens: int,
) -> messages.Request:
    advised = model.sampling if edge.settings.generation_config == "auto" else {}
    asked = {name: getattr(order, name) for name in _ADVISED}
    chosen: dict[str, Any] = {
        name: advised.get(name, _ADVISED[name]) if value is None else value
        for name, value in asked.items()
    }
    sampling = messages.Sampling(
        max_tokens=max_tokens,
        temperature=chosen["temperature"],
        top_p=chosen["top_p"],
        top_k=int(chosen["top_k"]),
        # From the id, so that a repeated Idempotency-Key means the same work.
        seed=int(rid[:16], 16) >> 1 if order.seed is None else order.seed,
        stop=order.stop,
        ignore_eos=order.ignore_eos,
        min_p=chosen["min_p"],
        presence_penalty=order.presence_penalty,
        frequency_penalty=order.frequency_penalty,
        repetition_penalty=chosen["repetition_penalty"],
    )
    return messages.Request(
        sampling.version,
        rid,
        model.name,
        model.version,
        sender.caller,
        prompt,
        sampling,
        order.api,
        order.stream,
        sender.label,
        sender.terms.traceparent,
        int(time.time()),
        order.include_usage,
    )
