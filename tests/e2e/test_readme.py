"""What the README tells a newcomer to do works, word for word but for the port and the model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cluster import ROOT, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(
        tmp_path_factory.mktemp("readme"), model="smollm2-135m=echo", echo_step_ms=1
    ) as it:
        yield it.up(control=False)


def run(cluster: Cluster, command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "RTS_URL": cluster.url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(language: str, word: str) -> list[str]:
    found = [text for kind, text in BLOCKS if kind == language and word in text]
    assert found, f"no {language} block with {word!r}"
    return found


def test_every_curl_answers(cluster: Cluster) -> None:
    blocks = commands("sh", "curl")
    text = "".join(blocks).replace("http://127.0.0.1:8000", cluster.url)
    calls = re.findall(r"^curl (?:.|\\\n)*?(?<!\\)$", text, re.MULTILINE)
    assert len(calls) == text.count("curl ") >= 4
    for call in calls:
        out = run(cluster, ["bash", "-c", call.replace("curl ", "curl --fail-with-body -sS ", 1)])
        assert out.strip(), call
        assert '"error"' not in out, out
        if "-N" in call:
            assert out.rstrip().endswith("data: [DONE]")


def test_the_python_block(cluster: Cluster) -> None:
    (block,) = commands("python", "OpenAI(")
    code = block.replace("http://127.0.0.1:8000", cluster.url)
    assert len(run(cluster, [sys.executable, "-c", code]).strip()) > 10


def test_the_client_block(cluster: Cluster) -> None:
    (block,) = commands("python", 'Client("http')
    code = block.replace("http://127.0.0.1:8000", cluster.url)
    text, _, usage = run(cluster, [sys.executable, "-c", code]).partition("Usage(")
    assert len(text) == 64
    assert "completion_tokens=64" in usage


def test_the_example_client(cluster: Cluster) -> None:
    (line,) = re.findall(r'^\.venv/bin/python (examples/stream.py) "(.*)"$', README, re.MULTILINE)
    assert run(cluster, [sys.executable, *line]).strip()


def test_the_targets_and_settings_it_names_exist() -> None:
    from shared.settings import Settings, env_name

    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    known = {env_name(name) for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"\bRTS_[A-Z_]+", README)) <= known


def test_the_files_it_links_exist() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("http") or (ROOT / name).exists(), name
