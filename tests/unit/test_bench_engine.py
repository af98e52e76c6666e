"""The engine's benchmark: its limit, its page, and what is not installed."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import _groups
from benchmarks.engine_report import EngineReport, Start
from benchmarks.figures import BenchError, Figures, Rounds
from benchmarks.limits import Machine, Shape, serving_limit
from benchmarks.load import Load, Target, ask
from benchmarks.rivals.environments import Environment, NotInstalled
from benchmarks.rivals.servers import RIVALS, interpreter
from realtime_serve.screen import Screen

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
LOAD = Load(streams=8, requests=1)


def shape(tmp_path: Path) -> Shape:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    return Shape.of(tmp_path)


def test_the_shape_of_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    found = shape(tmp_path)
    # 134,515,008 parameters, of which the norms are left out.
    assert found.layers + found.head == 134_515_008 - 61 * 576
    assert found.kv_bytes == 2 * 30 * 3 * 64 * 2


@pytest.mark.parametrize(("streams", "known"), [(1, 87), (8, 628), (32, 1865), (64, 2777)])
def test_the_limit_is_that_of_an_earlier_account(
    streams: int, known: float, tmp_path: Path
) -> None:
    machine = Machine(bytes_per_s=23.5e9, flops=2.33e12)
    limit = serving_limit(machine, shape(tmp_path), replace(LOAD, streams=streams))
    assert limit == pytest.approx(known, rel=0.05)


def test_many_streams_are_bound_by_the_matrix_rate(tmp_path: Path) -> None:
    slow = Machine(bytes_per_s=1e15, flops=1e12)
    fast = replace(slow, flops=2e12)
    model = shape(tmp_path)
    once, twice = (serving_limit(machine, model, LOAD) for machine in (slow, fast))
    assert twice == pytest.approx(2 * once)


def report() -> EngineReport:
    machine = {
        "cpu": "a CPU",
        "cores": 2,
        "memory_gb": 8.0,
        "load_before": [0.25, 0.0, 0.0],
        "system": "Linux 6",
        "python": "3.11",
        "server": "redis 7.2",
        "packages": {"uvloop": "1"},
    }
    http = {"engine alone": False, "cluster": True, "other": True, "library": False}
    return EngineReport(machine, "a-model", 2, http)


def rounds(*speeds: int) -> Rounds:
    return Rounds([Figures(speed, 1.0, {}, [10.0], [1.0, 2.0, 3.0]) for speed in speeds])


def test_the_page_compares_like_with_like_and_pair_by_pair() -> None:
    page = report()
    page.rounds[LOAD, "engine alone"] = rounds(200, 400)
    page.rounds[LOAD, "cluster"] = rounds(100, 300)
    page.rounds[LOAD, "other"] = rounds(50, 100)
    page.rounds[LOAD, "library"] = rounds(100, 100)
    page.rounds[replace(LOAD, temperature=0.8, top_p=0.95), "cluster"] = rounds(90, 300)
    page.starts["cluster"] = Start(1.25, "a b", "bfloat16", 512.0)
    page.skipped["absent"] = "not installed: no network"
    text = page.markdown()
    assert "| 8 | other | 75 (50-100) |  | 10.0 | 2.0 | 3.0 | 3.0 | 2.50 (2.00-3.00) |" in text
    assert "| 8 | library, in process | 100 (100-100) |" in text
    assert "3.00 (2.00-4.00) |" in text
    assert "| 8 | cluster | 0.95 (0.90-1.00) |" in text
    assert "| cluster | bfloat16 | 1.2 | 512 | 'a b' |" in text
    assert "- absent: not installed: no network" in text
    assert [part["name"] for part in json.loads(page.json())["measured"]][:2] == [
        "engine alone",
        "cluster",
    ]


def test_the_limit_is_the_best_of_what_was_measured() -> None:
    better = Machine(2e9, 1e12).or_better(Machine(1e9, 3e12))
    assert better == Machine(2e9, 3e12)
    assert better.or_better(None) == better


def test_a_sampled_load_is_measured_beside_its_greedy_one() -> None:
    sampled = replace(LOAD, temperature=0.8, top_p=0.95)
    other = replace(LOAD, prompt_tokens=512)
    assert _groups((LOAD, other, sampled)) == [[(0, LOAD), (2, sampled)], [(1, other)]]


def test_the_limit_is_a_row_and_a_share_of_each() -> None:
    page = report()
    page.limit, page.shape = Machine(2e9, 1e15), Shape(500_000, 500_000, 0, 0)
    page.rounds[replace(LOAD, streams=1), "cluster"] = rounds(500)
    assert "| 1 | cluster | 500 | 50% |" in page.markdown()
    assert "| 1 | *the machine's limit* | 1,000 |" in page.markdown()


def test_what_pip_cannot_install_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    # An environment without the seconds that making one takes.
    (tmp_path / "absent" / "bin").mkdir(parents=True)
    (tmp_path / "absent" / "bin" / "python").symlink_to(sys.executable)
    absent = Environment("absent", ("no-such-package-as-this==1",))
    with pytest.raises(NotInstalled, match="pip could not install no-such-package-as-this==1"):
        absent.python(tmp_path, Screen())
    assert not (tmp_path / "absent" / ".complete").exists()


def test_an_environment_that_is_complete_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".complete").write_text("a==1\nb")
    python = Environment("here", ("a==1", "b")).python(tmp_path, Screen())
    assert python == str(tmp_path / "here" / "bin" / "python")


def test_a_program_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rival = next(each for each in RIVALS if each.environment is None)
    with pytest.raises(NotInstalled, match="no llama-server on the PATH"):
        interpreter(rival, tmp_path, None, Screen())
    (tmp_path / "llama-server").touch(0o755)
    with pytest.raises(NotInstalled, match="--gguf"):
        interpreter(rival, tmp_path, None, Screen())
    assert interpreter(rival, tmp_path, tmp_path / "model.gguf", Screen()) == ""


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    status, body = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target("127.0.0.1", server.server_port, "/")
        server.shutdown()
        thread.join()


def _event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    "target",
    [(200, _event("") + _event(" Pa") + _event("ris") + b"data: [DONE]\n\n")],
    indirect=True,
)
def test_an_answer_is_put_together(target: Target) -> None:
    answer = ask(target, "France?", 2)
    assert answer.text == " Paris"
    assert answer.first_at > 0


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ((503, b"no"), "status 503: b'no'"),
        ((200, b"data: [DONE]\n\n"), "without text"),
        ((200, b"data: {\n\n"), "no answer: JSONDecodeError"),
    ],
    indirect=["target"],
)
def test_no_answer_is_told(target: Target, why: str) -> None:
    with pytest.raises(BenchError, match=why):
        ask(target, "France?", 2)
