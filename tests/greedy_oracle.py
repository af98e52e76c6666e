"""Compares token ids of greedy streams with transformers' own model, one stream at a time.

    python tests/greedy_oracle.py MODEL_FOLDER RUNS.json

RUNS.json is a list of {prompt, ids, text}. Exits with an error at the first difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEAR_TIE = 1e-4


def main(folder: str, job: str) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs = json.loads(Path(job).read_text())
    ties = 0
    for run in runs:
        prompt = tokenizer(run["prompt"]).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + run["ids"]])).logits[0, len(prompt) - 1 : -1]
        for position, (row, token) in enumerate(zip(logits, run["ids"], strict=True)):
            if int(row.argmax()) != token:
                # After a near-tie either choice is right, and so is what follows from it.
                assert float(row.max() - row[token]) < NEAR_TIE, (run, position)
                ties += 1
        shown = tokenizer.decode(run["ids"], skip_special_tokens=True)
        assert shown == run["text"], (shown, run)
    print(f"{len(runs)} streams, {ties} near-ties")


if __name__ == "__main__":
    main(*sys.argv[1:])
