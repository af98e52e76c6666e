"""What the native backend has to know of a dense decoder of transformers: sizes and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AttentionInterface

from worker.engine.attention import NAME, LayerRecorder, paged_attention
from worker.engine.decoder import Asks, Sizes, Weight
from worker.engine.native.library import Part


class NotDense(Exception):
    """The native backend does not know this kind of model; the message says why."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of a family differ from Llama.

    Attributes:
        adds_one: norms multiply by 1 + their weight.
        norms_results: what attention and feed-forward give is normalized before it is added.
    """

    adds_one: bool = False
    norms_results: bool = False


FAMILIES: Final = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(adds_one=True),
    "gemma2": Family(adds_one=True, norms_results=True),
    "gemma3_text": Family(adds_one=True, norms_results=True),
}

_ACTIVATIONS: Final = {"silu": 0, "gelu_pytorch_tanh": 1}


class Dense:
    """A model that the native backend can run.

    Args:
        model: a causal language model of transformers, on the CPU.
        positions: longest context that is wanted.

    Attributes:
        sizes: all about it but its weights.

    Raises:
        NotDense: it is of no family that is known here.
        Exception: whatever a run of one token raises.
    """

    def __init__(self, model: Any, positions: int) -> None:
        config = model.config
        if config.model_type not in FAMILIES:
            raise NotDense(f"it does not know {config.model_type} models")
        self._family = FAMILIES[config.model_type]
        self._model = model
        self._dtype: torch.dtype = model.dtype
        scale = getattr(model.model.embed_tokens, "embed_scale", None)
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in _ACTIVATIONS:
            raise NotDense(f"it does not know the activation {name}")
        if self._dtype not in (torch.bfloat16, torch.float32):
            raise NotDense(f"it does not compute in {self._dtype}")
        recorder = self._record()
        layers = [recorder.layers[i] for i in range(len(recorder.layers))]
        head_size, kv_heads = layers[0].key_dim, layers[0].kv_heads
        if any(
            (layer.key_dim, layer.value_dim, layer.kv_heads) != (head_size, head_size, kv_heads)
            for layer in layers
        ):
            raise NotDense("its heads differ in size")
        if head_size % 16 or not 16 <= head_size <= 256:
            raise NotDense(f"it does not know heads of size {head_size}")
        kinds = list(getattr(config, "layer_types", None) or [])
        # Gemma 3 has one table for each kind of layer.
        self._kinds = sorted(set(kinds)) if hasattr(self._rotary, "layer_types") else []
        table_of = [self._kinds.index(kind) for kind in kinds] if self._kinds else []
        table_of = table_of or [0] * len(layers)
        self.sizes = Sizes(
            dtype=str(self._dtype).removeprefix("torch."),
            positions=positions,
            vocab=int(model.lm_head.weight.shape[0]),
            hidden=int(config.hidden_size),
            heads=int(config.num_attention_heads),
            kv_heads=kv_heads,
            head_size=head_size,
            ffn=int(config.intermediate_size),
            activation=_ACTIVATIONS[name],
            norm_eps=float(config.rms_norm_eps),
            embedding_scale=1.0 if scale is None else float(scale.to(self._dtype)),
            logit_soft_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
            rope_tables=max(1, len(self._kinds)),
            layers=[
                Asks(table_of[i], layer.window, float(recorder.scales[i]), layer.softcap)
                for i, layer in enumerate(layers)
            ],
        )

    @property
    def _rotary(self) -> Any:
        return self._model.model.rotary_emb

    def _record(self) -> LayerRecorder:
        """What the layers ask of attention, from a run of one token."""
        recorder = LayerRecorder()
        AttentionInterface.register(NAME, paged_attention)
        before = self._model.config._attn_implementation
        one = torch.zeros(1, 1, dtype=torch.int64)
        with torch.inference_mode():
            self._model.set_attn_implementation(NAME)
            self._model(input_ids=one, position_ids=one, use_cache=False, paged=recorder)
            self._model.set_attn_implementation(before)
        count = len(self._model.model.layers)
        if sorted(recorder.layers) != list(range(count)):
            raise NotDense(f"{len(recorder.layers)} of its {count} layers attend")
        return recorder

    def weights(self) -> Iterator[Weight]:
        """All parts, matrices before their biases."""
        for index, layer in enumerate(self._model.model.layers):
            yield from self._of_layer(index, layer)
        yield Weight(-1, Part.EMBEDDING, [self._model.model.embed_tokens.weight], self._dtype)
        yield self._norm(-1, Part.NORM_FINAL, self._model.model.norm)
        yield from self._linear(-1, Part.HEAD, Part.HEAD_BIAS, [self._model.lm_head])
        for index in range(self.sizes.rope_tables):
            cos, sin = self._rope(index)
            yield Weight(index, Part.ROPE_COS, [cos], torch.float32)
            yield Weight(index, Part.ROPE_SIN, [sin], torch.float32)

    def _of_layer(self, index: int, layer: Any) -> Iterator[Weight]:
        attention, ffn = layer.self_attn, layer.mlp
        norms = {Part.NORM_ATTENTION: layer.input_layernorm}
        if self._family.norms_results:
            norms[Part.NORM_ATTENTION_OUT] = layer.post_attention_layernorm
            norms[Part.NORM_FFN] = layer.pre_feedforward_layernorm
            norms[Part.NORM_FFN_OUT] = layer.post_feedforward_layernorm
        else:
            # It comes after attention, and before what follows.
            norms[Part.NORM_FFN] = layer.post_attention_layernorm
        if getattr(attention, "q_norm", None) is not None:
            norms[Part.NORM_QUERY], norms[Part.NORM_KEY] = attention.q_norm, attention.k_norm
        for part, norm in norms.items():
            yield self._norm(index, part, norm)
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        yield from self._linear(index, Part.QKV, Part.QKV_BIAS, qkv)
        yield from self._linear(index, Part.OUT, Part.OUT_BIAS, [attention.o_proj])
        yield from self._linear(
            index, Part.GATE_UP, Part.GATE_UP_BIAS, [ffn.gate_proj, ffn.up_proj]
        )
        yield from self._linear(index, Part.DOWN, Part.DOWN_BIAS, [ffn.down_proj])

    def _linear(self, layer: int, part: Part, bias: Part, modules: list[Any]) -> Iterator[Weight]:
        """One matrix of the outputs of several modules."""
        yield Weight(layer, part, [module.weight for module in modules], self._dtype)
        if any(module.bias is not None for module in modules):
            biases = [
                module.weight.shape[0] if module.bias is None else module.bias for module in modules
            ]
            yield Weight(layer, bias, biases, torch.float32)

    def _norm(self, layer: int, part: Part, module: Any) -> Weight:
        plus = 1.0 if self._family.adds_one else 0.0
        return Weight(layer, part, [module.weight], torch.float32, plus)

    def _rope(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, head_size / 2], by transformers' own module."""
        # Its dtype is that of the result.
        like = torch.zeros(1, dtype=torch.float32)
        positions = torch.arange(self.sizes.positions).unsqueeze(0)
        kind = [self._kinds[index]] if self._kinds else []
        with torch.inference_mode():
            tables = self._rotary(like, positions, *kind)
        half = self.sizes.head_size // 2
        cos, sin = (table[0, :, :half].contiguous() for table in tables)
        return cos, sin
