"""What a user asks for becomes a request: its body, its key, its course."""

from __future__ import annotations

import json
import secrets
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Required, TypedDict

from realtime_serve.client.course import Course, Post
from realtime_serve.client.wire import Wire, request_path


class Options(TypedDict, total=False):
    """How an answer is to be generated, as docs/api.md says; None counts as left out.

    Attributes:
        model: its name.
        max_tokens: most tokens of the answer. temperature: 0 to 2. top_p: above 0, to 1.
        top_k: 0 is all. min_p: 0 to 1, a share of the largest probability.
        presence_penalty, frequency_penalty: -2 to 2, over the tokens of the answer.
        repetition_penalty: 0.01 to 100, over those of the prompt, too.
        seed: the same one gives the same answer. stop: up to 4 strings.
        priority: high, normal or low. timeout_s: deadline at the server, queue included.
        idempotency_key: with the same key and the same request again, the answer is the same
            one and nothing runs twice; leaving its stream early does not cancel it. By default
            each request has a key of its own.
    """

    model: Required[str]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    priority: str | None
    timeout_s: float | None
    idempotency_key: str | None


class Orders:
    """Makes the courses of one client's requests, from any thread."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._lock = threading.Lock()
        self._courses: weakref.WeakSet[Course] = weakref.WeakSet()

    def infer(self, prompt: str, options: Options) -> Course:
        """Continues a text."""
        return self._make("/infer_stream", {"prompt": prompt}, options)

    def chat(self, messages: Iterable[Mapping[str, Any]], options: Options) -> Course:
        """Answers a conversation."""
        body = {
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self._make("/v1/chat/completions", body, options)

    def resume(self, request_id: str, after: int) -> Course:
        """Goes on with a request that is there.

        Raises:
            ValueError: an empty id, or a negative number.
        """
        if after < 0:
            raise ValueError(f"after must be the number of a token or 0, not {after}")
        request_path(request_id)
        return self._keep(Course(self._wire, None, request_id, after))

    def leave(self) -> None:
        """Leaves all that are not over."""
        with self._lock:
            courses = list(self._courses)
        for course in courses:
            course.leave(cancel=True)

    def _make(self, path: str, body: Mapping[str, Any], options: Options) -> Course:
        fields: dict[str, Any] = dict(options)
        key = fields.pop("idempotency_key", None)
        given = {name: value for name, value in fields.items() if value is not None}
        # Not msgspec: it makes null of NaN, and the server could not refuse it.
        data = json.dumps({**body, **given}).encode()
        post = Post(path, data, key or secrets.token_hex(16), shared=bool(key))
        return self._keep(Course(self._wire, post))

    def _keep(self, course: Course) -> Course:
        with self._lock:
            self._courses.add(course)
        return course
