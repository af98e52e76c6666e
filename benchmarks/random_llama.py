"""A Llama of a billion random parameters: the shape that people serve, without a download.

Its config is Llama 3.2 1B's but for the vocabulary, which is the demo model's, as is its tokenizer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import BenchError

NAME = "random-llama-1b"
_MAKE_S = 900.0
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(demo: Path) -> Path:
    """The folder of the model, beside the demo model; made in a process of its own if need be.

    Raises:
        BenchError: it could not be made.
    """
    folder = demo.with_name(NAME)
    if folder.is_dir():
        return folder
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=demo.parent))
    try:
        command = [sys.executable, "-m", "benchmarks.random_llama", str(demo), str(scratch)]
        root = Path(__file__).parents[1]
        ran = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=_MAKE_S, check=False
        )
        if ran.returncode != 0:
            raise BenchError(f"could not make {NAME}:\n{ran.stderr[-2000:]}")
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main(demo: str, folder: str) -> int:
    """Makes it here."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    like = AutoConfig.from_pretrained(demo)
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER:
        if (source := Path(demo, name)).exists():
            shutil.copy(source, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
