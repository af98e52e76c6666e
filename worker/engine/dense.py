"""What the native backend has to know of a dense decoder of transformers: sizes and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AttentionInterface

from worker.engine.attention import NAME, Layer, LayerRecorder, paged_attention
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


@dataclass(frozen=True, slots=True)
class Weight:
    """A part of the model.

    Attributes:
        layer: index of the layer or of the rotary table; -1 for others.
        part: which.
        tensor: contiguous, on the CPU; matrices in the model's dtype, others in float32.
    """

    layer: int
    part: Part
    tensor: torch.Tensor


class Dense:
    """A model that the native backend can run.

    Args:
        model: a causal language model of transformers, on the CPU.
        positions: longest context that is wanted.

    Attributes:
        activation: of the gated feed-forward part, a number of api.h.
        layers: what each asks of attention. scales: of each one's scores.
        rope_of: each layer's rotary table. rope_tables: how many there are.

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
        self.positions = positions
        self.dtype: torch.dtype = model.dtype
        self.vocab_size = int(model.lm_head.weight.shape[0])
        self.hidden = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.ffn = int(config.intermediate_size)
        self.norm_eps = float(config.rms_norm_eps)
        self.logit_soft_cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        scale = getattr(model.model.embed_tokens, "embed_scale", None)
        self.embedding_scale = 1.0 if scale is None else float(scale.to(self.dtype))
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in _ACTIVATIONS:
            raise NotDense(f"it does not know the activation {name}")
        self.activation = _ACTIVATIONS[name]
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise NotDense(f"it does not compute in {self.dtype}")
        self._record()
        first = self.layers[0]
        self.head_size, self.kv_heads = first.key_dim, first.kv_heads
        if any(
            (layer.key_dim, layer.value_dim, layer.kv_heads)
            != (self.head_size, self.head_size, self.kv_heads)
            for layer in self.layers
        ):
            raise NotDense("its heads differ in size")
        if self.head_size % 16 or not 16 <= self.head_size <= 256:
            raise NotDense(f"it does not know heads of size {self.head_size}")
        kinds = list(getattr(config, "layer_types", None) or [])
        # Gemma 3 has one table for each kind of layer.
        self._kinds = sorted(set(kinds)) if hasattr(self._rotary, "layer_types") else []
        self.rope_of = [self._kinds.index(kind) for kind in kinds] if self._kinds else []
        self.rope_of = self.rope_of or [0] * len(self.layers)
        self.rope_tables = max(1, len(self._kinds))

    @property
    def _rotary(self) -> Any:
        return self._model.model.rotary_emb

    def _record(self) -> None:
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
        self.layers: list[Layer] = [recorder.layers[i] for i in range(count)]
        self.scales = [recorder.scales[i] for i in range(count)]

    def weights(self) -> Iterator[Weight]:
        """All parts, matrices before their biases."""
        for index, layer in enumerate(self._model.model.layers):
            yield from self._of_layer(index, layer)
        yield Weight(-1, Part.EMBEDDING, self._matrix(self._model.model.embed_tokens.weight))
        yield Weight(-1, Part.NORM_FINAL, self._norm(self._model.model.norm))
        yield from self._linear(-1, Part.HEAD, Part.HEAD_BIAS, [self._model.lm_head])
        for index in range(self.rope_tables):
            cos, sin = self._rope(index)
            yield Weight(index, Part.ROPE_COS, cos)
            yield Weight(index, Part.ROPE_SIN, sin)

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
            yield Weight(index, part, self._norm(norm))
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        yield from self._linear(index, Part.QKV, Part.QKV_BIAS, qkv)
        yield from self._linear(index, Part.OUT, Part.OUT_BIAS, [attention.o_proj])
        yield from self._linear(
            index, Part.GATE_UP, Part.GATE_UP_BIAS, [ffn.gate_proj, ffn.up_proj]
        )
        yield from self._linear(index, Part.DOWN, Part.DOWN_BIAS, [ffn.down_proj])

    def _linear(self, layer: int, part: Part, bias: Part, modules: list[Any]) -> Iterator[Weight]:
        """One matrix of the outputs of several modules."""
        matrices = [module.weight.detach() for module in modules]
        yield Weight(
            layer, part, self._matrix(matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        )
        biases = [module.bias for module in modules]
        if any(one is not None for one in biases):
            parts = [
                torch.zeros(module.weight.shape[0]) if one is None else one.detach().float()
                for module, one in zip(modules, biases, strict=True)
            ]
            yield Weight(layer, bias, torch.cat(parts))

    def _matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.dtype).contiguous()

    def _norm(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight.detach().float()
        return (weight + 1 if self._family.adds_one else weight).contiguous()

    def _rope(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, head_size / 2], by transformers' own module."""
        # Its dtype is that of the result.
        like = torch.zeros(1, dtype=torch.float32)
        positions = torch.arange(self.positions).unsqueeze(0)
        kind = [self._kinds[index]] if self._kinds else []
        with torch.inference_mode():
            tables = self._rotary(like, positions, *kind)
        half = self.head_size // 2
        cos, sin = (table[0, :, :half].contiguous() for table in tables)
        return cos, sin
