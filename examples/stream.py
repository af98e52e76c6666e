"""Streams a chat answer, and goes on where it stopped when the connection breaks.

    python examples/stream.py "What is the capital of France?"

Needs nothing but Python. RTS_URL names the server, http://127.0.0.1:8000 by default.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

URL = os.environ.get("RTS_URL", "http://127.0.0.1:8000")
GRACE_S = 30


def first_model() -> str:
    """The name of the first model that is served."""
    with urllib.request.urlopen(f"{URL}/v1/models") as reply:
        return str(json.load(reply)["data"][0]["id"])


def stream(question: str) -> Iterator[str]:
    """Yields pieces of the answer. A broken connection is opened again, and nothing is lost."""
    body = {
        "model": first_model(),
        "stream": True,
        "temperature": 0.2,
        "messages": [{"role": "user", "content": question}],
    }
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("X-Resumable", str(GRACE_S))
    request_id, last, failed_at = "", "0", 0.0
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                request_id, failed_at = reply.headers["X-Request-Id"], 0.0
                for line in reply:
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name == "id":
                        last = value
                    elif name == "data":
                        if value == "[DONE]":
                            return
                        event = json.loads(value)
                        if "error" in event:
                            raise SystemExit(event["error"]["message"])
                        for choice in event["choices"]:
                            yield choice["delta"].get("content") or ""
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise SystemExit(json.load(error)["error"]["message"]) from None
        except (OSError, http.client.HTTPException):
            pass
        # The request goes on without us; any gateway gives us the rest.
        failed_at = failed_at or time.monotonic()
        if not request_id or time.monotonic() - failed_at > GRACE_S:
            raise SystemExit(f"no answer from {URL}")
        time.sleep(0.2)
        request = urllib.request.Request(f"{URL}/requests/{request_id}/stream")
        request.add_header("Last-Event-ID", last)


if __name__ == "__main__":
    for piece in stream(" ".join(sys.argv[1:]) or "What is the capital of France?"):
        print(piece, end="", flush=True)
    print()
