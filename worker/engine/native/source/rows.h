// What is done to one row at a time: embedding, norms, rotary positions, activations.
// Rows are padded with zeros to a multiple of PANEL, so there are no tails.
#pragma once

#include "simd.h"

namespace rts {

// out = x / rms(x) * weight, over `size` values, padded to `width`. Source: RMSNorm (Zhang and
// Sennrich, 2019), with everything in float32.
template <class Out>
inline void rms_norm(const float* x, const float* weight, int size, int width, float eps,
                     Out* out) {
    Vec squares = zero();
    for (int j = 0; j < width; j += LANES) squares = fma(load(x + j), load(x + j), squares);
    const Vec scale = broadcast(1 / std::sqrt(sum(squares) / float(size) + eps));
    for (int j = 0; j < width; j += LANES)
        store(out + j, mul(mul(load(x + j), scale), load(weight + j)));
}

// x += y, over `width`.
inline void add_to(float* x, const float* y, int width) {
    for (int j = 0; j < width; j += LANES) store(x + j, add(load(x + j), load(y + j)));
}

// x = embedding * scale. The embedding has no padding; that of x may hold what a failed sequence
// made of it, since zero times no number is none.
template <class T>
inline void embed(const T* embedding, int size, int width, float scale, float* x) {
    for (int j = 0; j < size; j++) x[j] = to_float(embedding[j]) * scale;
    for (int j = size; j < width; j++) x[j] = 0;
}

// One head of queries or keys, in float32: its own norm if it has one, then rotary positions by
// halves, as transformers' models have them. Source: RoPE (Su et al., 2021).
// cos, sin: [size / 2] of the row's position.
template <class T>
inline void rotate(const T* head, const float* norm, int size, float eps, const float* cos,
                   const float* sin, float* out) {
    for (int j = 0; j < size; j += LANES) store(out + j, load(head + j));
    if (norm) rms_norm(out, norm, size, size, eps, out);
    const int half = size / 2;
    for (int j = 0; j < half; j++) {
        const float a = out[j], b = out[j + half];
        // Which product is rounded is said, so that it is the same wherever this is inlined.
        out[j] = std::fma(a, cos[j], -(b * sin[j]));
        out[j + half] = std::fma(b, cos[j], a * sin[j]);
    }
}

enum class Activation { silu = 0, gelu_tanh = 1 };

inline Vec silu(Vec x) { return div(x, add(broadcast(1.f), exp(sub(zero(), x)))); }

// Source: the tanh form of GELU (Hendrycks and Gimpel, 2016).
inline Vec gelu_tanh(Vec x) {
    Vec cubic = fma(mul(mul(x, x), x), broadcast(0.044715f), x);
    Vec t = tanh(mul(cubic, broadcast(0.7978845608f)));
    return mul(mul(x, broadcast(0.5f)), add(t, broadcast(1.f)));
}

// values: 16 of the gate, 16 of up. out: 16.
template <class Out>
inline void gate(Activation activation, const float* values, Out* out) {
    for (int j = 0; j < 16; j += LANES) {
        Vec x = load(values + j);
        Vec y = activation == Activation::silu ? silu(x) : gelu_tanh(x);
        store(out + j, mul(y, load(values + 16 + j)));
    }
}

// size * tanh(x / size), over `width`: Gemma 2 bounds scores and logits so.
inline void soft_cap(float* x, int width, float size) {
    const Vec s = broadcast(size), inverse = broadcast(1 / size);
    for (int j = 0; j < width; j += LANES) store(x + j, mul(tanh(mul(load(x + j), inverse)), s));
}

}  // namespace rts
