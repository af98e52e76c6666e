"""Log lines of a process: JSON for machines, one readable line for people.

Facts go into `extra=`, not into the message: `log.info("ended", extra={"request_id": rid})`.
Prompts and generated text are never logged.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from typing import Any, TextIO

from shared.settings import Settings

_OURS = ("gateway", "worker", "control", "shared", "realtime_serve")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(settings: Settings, process: str, stream: TextIO | None = None) -> None:
    """Send this process's log to `stream`. The first call counts, later ones do nothing.

    Args:
        settings: gives the format and the lowest level of our own loggers; of other people's
            libraries only warnings are shown.
        process: the name of this process, as in "worker-0".
        stream: stderr by default.
    """
    root = logging.getLogger()
    if any(isinstance(handler.formatter, _OneLine) for handler in root.handlers):
        return
    stream = stream or sys.stderr
    as_json = settings.log_format == "json" or (
        settings.log_format == "auto" and not stream.isatty()
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(process) if as_json else ConsoleFormatter(process))
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())
    logging.captureWarnings(True)


class _OneLine(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process


class JsonFormatter(_OneLine):
    """One JSON object a line: time (UTC), level, process, logger, message, then the extras."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of strict JSON."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in _extras(record).items():
            not_json = isinstance(value, float) and not math.isfinite(value)
            line.setdefault(key, str(value) if not_json else value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class ConsoleFormatter(_OneLine):
    """`12:00:01 worker-0 loading model=smollm2-135m`; the level is shown from warnings up."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one readable line, followed by a traceback if it has one."""
        parts = [time.strftime("%H:%M:%S", time.localtime(record.created)), self._process]
        if record.levelno >= logging.WARNING:
            parts.append(record.levelname.lower() + ":")
        parts.append(record.getMessage())
        parts += [f"{key}={_short(value)}" for key, value in _extras(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return repr(text) if not text or any(char.isspace() for char in text) else text
