"""The official openai client, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from gateway_site import Site, letters, open_site, until

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=site.url("/v1"), api_key="none", max_retries=0, timeout=20
    ) as found:
        yield found


async def test_chat(site: Site, client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="echo", messages=MESSAGES, max_completion_tokens=12, seed=3, temperature=0
    )
    assert reply.choices[0].message.content == letters(3, 12)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.object == "chat.completion"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12
    assert reply.id.startswith("chatcmpl-")
    assert reply._request_id == reply.id.removeprefix("chatcmpl-")
    # The prompt is what the template makes of it.
    assert len(site.worker.seen[-1].prompt) == len("user: hello\nassistant: ")
    # An answer can be sent back as it came.
    again: Any = [*MESSAGES, reply.choices[0].message.model_dump(), *MESSAGES]
    reply = await client.chat.completions.create(model="echo", messages=again, max_tokens=1)
    assert reply.choices[0].finish_reason == "length"


async def test_chat_as_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo",
        messages=MESSAGES,
        max_tokens=12,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == letters(3, 12)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_streaming_helper(site: Site, client: openai.AsyncOpenAI) -> None:
    site.worker.finish = "stop"
    async with client.chat.completions.stream(
        model="echo", messages=MESSAGES, max_tokens=5, seed=3
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == letters(3, 5)


async def test_completions(client: openai.AsyncOpenAI) -> None:
    for prompt in ("abc", ["abc"], [1, 2, 3]):
        reply = await client.completions.create(
            model="echo", prompt=prompt, max_tokens=5, seed=3, stop=["#"], user="me"
        )
        assert reply.choices[0].text == letters(3, 5)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 3
    stream = await client.completions.create(
        model="echo", prompt="abc", max_tokens=5, seed=3, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == letters(3, 5)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_extensions(site: Site, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="echo",
        messages=MESSAGES,
        max_tokens=1,
        service_tier="flex",
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "timeout_s": 30,
        },
    )
    sampling = site.worker.seen[-1].sampling
    assert sampling.top_k == 5
    assert sampling.ignore_eos
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5)


async def test_models(client: openai.AsyncOpenAI) -> None:
    found = [model async for model in client.models.list()]
    assert [model.id for model in found] == ["echo"]
    assert (await client.models.retrieve("echo")).object == "model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_errors_are_the_clients_own_classes(site: Site, client: openai.AsyncOpenAI) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="echo", messages=MESSAGES, n=2)
    assert bad.value.param == "n"
    assert bad.value.code == "unsupported_value"
    site.worker.end = ("engine_failed", "", "")
    with pytest.raises(openai.InternalServerError):
        await create(model="echo", messages=MESSAGES)
    stream = await create(model="echo", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="died"):
        async for _ in stream:
            pass


async def test_a_stream_waits_in_the_queue(redis_url: str) -> None:
    async with (
        open_site(redis_url, keep_alive_s=0.05) as site,
        openai.AsyncOpenAI(base_url=site.url("/v1"), api_key="none", max_retries=0) as client,
    ):
        site.worker.room = 0
        stream = await client.chat.completions.create(
            model="echo", messages=MESSAGES, max_tokens=5, seed=3, stream=True
        )
        (flow,) = site.edge.flows
        waited = flow.wrote_at
        # Some keep-alives go out while nothing happens.
        await until(lambda: flow.wrote_at > waited + 0.2)
        site.worker.room = 8
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == letters(3, 5)


async def test_the_synchronous_client_retries_what_is_refused_for_now(redis_url: str) -> None:
    async with open_site(redis_url, queue_limit=1) as site:
        site.worker.room = 0
        held = await site.http.post(
            site.url("/infer_stream"), json={"model": "echo", "prompt": "x", "max_tokens": 1}
        )

        def ask() -> str:
            with openai.OpenAI(base_url=site.url("/v1"), api_key="none", max_retries=5) as client:
                reply = client.chat.completions.create(
                    model="echo", messages=MESSAGES, max_tokens=5, seed=3
                )
                return reply.choices[0].message.content or ""

        asked = asyncio.create_task(asyncio.to_thread(ask))
        await until(lambda: site.edge.connections() > 1)
        site.worker.room = 8
        assert await asked == letters(3, 5)
        held.close()


async def test_a_stream_goes_on_while_the_gateway_drains(
    site: Site, client: openai.AsyncOpenAI
) -> None:
    site.worker.step_s = 0.01
    stream = await client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=30, seed=3, stream=True
    )
    draining = asyncio.create_task(site.server.drain(10))
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == letters(3, 30)
    await draining
    with pytest.raises(openai.InternalServerError) as refused:
        await client.chat.completions.create(model="echo", messages=MESSAGES)
    assert refused.value.status_code == 503
