"""Tiny models with random weights, and what transformers itself generates with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from worker.engine import ModelFiles
from worker.engine.loader import LoadedModel

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Tied, a random model mostly repeats its last token.
    "tie_word_embeddings": False,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "layer_types": KINDS},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 11},
    "gpt2": {"n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 10,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 16,
        "layer_types": KINDS,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 10,
        "query_pre_attn_scalar": 16,
        "layer_types": KINDS,
    },
    "gpt_neox": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
}


def tiny_model(family: str, **overrides: Any) -> Any:
    """A model of a family, always with the same weights."""
    sizes = {} if family == "gpt2" else dict(SIZES)
    if family == "gpt2":
        sizes = {
            key: SIZES[key]
            for key in (
                "vocab_size",
                "initializer_range",
                "bos_token_id",
                "eos_token_id",
                "tie_word_embeddings",
            )
        }
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def loaded(model: Any, eos_ids: tuple[int, ...] = ()) -> LoadedModel:
    """A model as the loader would hand it over, without a tokenizer."""
    return LoadedModel(
        model,
        ModelFiles(
            version="00000000",
            tokenizer_json="{}",
            chat_template=None,
            context_length=int(model.config.get_text_config().max_position_embeddings),
            eos_ids=eos_ids,
            bos_token="",
            eos_token="",
            vocab_size=VOCAB,
        ),
    )


def save(model: Any, folder: Path, eos_id: int = 96) -> None:
    """Writes a model as a folder, with a tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{eos_id}").save_pretrained(
        folder
    )


@dataclass(frozen=True)
class Expected:
    """A greedy continuation, and by how much each token won."""

    tokens: list[int]
    margins: list[float]

    def check(self, got: list[int]) -> None:
        """Compares until two answers were equally good to within rounding."""
        assert len(got) <= len(self.tokens)
        for i, (token, right) in enumerate(zip(got, self.tokens, strict=False)):
            if token != right:
                assert self.margins[i] < 1e-4, f"token {i} is {token}, not {right}: {got}"
                return


def expected(model: Any, prompt: list[int], count: int, **more: Any) -> Expected:
    """What transformers generates for a prompt alone; `more` are its own options."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **more,
    )
    best = torch.stack(output.scores, 1)[0].topk(2, -1).values
    return Expected(output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())
