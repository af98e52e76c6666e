"""Log lines: strict JSON for machines, one readable line for people."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from shared.logging import setup_logging
from shared.settings import Settings


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("gateway", "worker", "control", "shared", "realtime_serve"):
        logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_lines_hold_the_extras() -> None:
    stream = io.StringIO()
    setup_logging(Settings(), "worker-1", stream)
    logging.getLogger("worker.intake").info(
        "took %d", 3, extra={"request_id": "r1", "rate": float("nan"), "level": "mine"}
    )
    line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert line["message"] == "took 3"
    assert line["process"] == "worker-1"
    assert line["logger"] == "worker.intake"
    assert line["request_id"] == "r1"
    assert line["rate"] == "nan"
    assert line["level"] == "info"
    assert line["time"].endswith("Z")


def test_json_lines_hold_tracebacks_and_stay_one_line() -> None:
    stream = io.StringIO()
    setup_logging(Settings(log_format="json"), "gateway", stream)
    try:
        raise RuntimeError("broken\ntwice")
    except RuntimeError:
        logging.getLogger("gateway").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "RuntimeError: broken" in json.loads(stream.getvalue())["exception"]


def test_console_lines_on_a_terminal() -> None:
    stream = Terminal()
    setup_logging(Settings(), "worker-0", stream)
    logging.getLogger("worker").info("loading", extra={"model": "a b", "seconds": 1.23456})
    logging.getLogger("worker").warning("slow")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("worker-0 loading model='a b' seconds=1.235")
    assert second.endswith("worker-0 warning: slow")


def test_levels_are_ours_and_libraries_only_warn() -> None:
    stream = io.StringIO()
    setup_logging(Settings(log_level="debug"), "control", stream)
    logging.getLogger("control.janitor").debug("ours")
    logging.getLogger("some_library").info("theirs")
    logging.getLogger("some_library").warning("their warning")
    messages = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert messages == ["ours", "their warning"]


def test_the_first_setting_up_counts() -> None:
    stream = io.StringIO()
    setup_logging(Settings(), "worker-3", stream)
    setup_logging(Settings(), "worker")
    logging.getLogger("worker").info("once")
    assert json.loads(stream.getvalue())["process"] == "worker-3"
