"""Models for OpenVINO, converted once by optimum-intel in its environment."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.rivals.environments import NotInstalled

_EXPORT_S = 1800.0


def export(python: str, model: Path, folder: Path) -> Path:
    """The folder with the converted model, weights in fp16, made if it is not there yet.

    Args:
        python: of the environment.
        model: folder to convert.
        folder: where the result belongs.

    Raises:
        NotInstalled: it cannot be converted.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".exporting-", dir=folder.parent))
    command = [str(Path(python).with_name("optimum-cli")), "export", "openvino"]
    command += ["--model", str(model), "--task", "text-generation-with-past"]
    command += ["--weight-format", "fp16", str(scratch)]
    try:
        # Away from here, so that it cannot import what this project calls the same.
        ran = subprocess.run(
            command,
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=_EXPORT_S,
            check=False,
        )
        if ran.returncode != 0:
            last = ran.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise NotInstalled(f"not measured: optimum-intel could not convert it ({last[0]})")
        scratch.rename(folder)
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"not measured: converting took over {_EXPORT_S:.0f} s") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
