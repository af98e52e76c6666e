"""Streams a chat answer, and goes on where it stopped when worker, gateway or connection dies.

    .venv/bin/python examples/stream.py "What is the capital of France?"

RTS_URL names the server, http://127.0.0.1:8000 by default, or several gateways with commas.
"""

import os
import sys

from realtime_serve import APIError, Client

URLS = os.environ.get("RTS_URL", "http://127.0.0.1:8000").split(",")
question = " ".join(sys.argv[1:]) or "What is the capital of France?"

try:
    with Client(URLS) as client:
        model = next(iter(client.models()))
        messages = [{"role": "user", "content": question}]
        for token in client.stream_chat(messages, model=model, temperature=0.2):
            print(token.text, end="", flush=True)
        print()
except APIError as error:
    sys.exit(error.message)
except KeyboardInterrupt:
    sys.exit(130)
