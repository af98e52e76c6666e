// Vectors of floats, and what is multiplied with them. Instructions are named here, and those of
// AMX in tiles.h and the kernels that use tiles; other files only ask how many registers there are.
//
// A multiplication takes DEPTH neighbours of the inner dimension at once: two bf16 (what one
// 32-bit lane holds), or one float. Everything that is multiplied - weights, keys, values - is laid
// out as [inner / DEPTH][outer][DEPTH], in tiles or whole, so one kernel serves both types
// everywhere.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace rts {

// The upper half of a float.
struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) {
        bits = 0x7fc00000;  // rounding could make an infinity of it
    } else {
        bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    }
    out->bits = uint16_t(bits >> 16);
}

template <class T>
constexpr int DEPTH = 1;
template <>
constexpr int DEPTH<bf16> = 2;

#if defined(__AVX512F__)

constexpr int LANES = 16;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vec v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Of two of which one is no number, the second.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// A bit a lane.
inline uint32_t not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t no_numbers(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

inline Vec exp2_of(Vec n, Vec fraction_power) { return _mm512_scalef_ps(fraction_power, n); }
inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, 0); }
inline Vec zero_below(Vec x, Vec limit, Vec v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}

// What rows are kept as that are multiplied with weights, keys or values of T.
template <class T>
using Operand = T;

// As how many vectors a line of DEPTH neighbours is taken, one after the other.
template <class T>
constexpr int PARTS = 1;

// Pairs of bf16, one a lane.
struct Pairs {
    __m512i v;
};

// A part of a line, for LANES columns, and the same part of one row, in all lanes.
inline Vec columns(const float* line, int) { return load(line); }
inline Pairs columns(const bf16* line, int) { return {_mm512_loadu_si512(line)}; }
inline Vec factor(const float* x, int) { return broadcast(*x); }
inline Pairs factor(const bf16* x, int) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return {_mm512_set1_epi32(pair)};
}
inline Vec multiply_add(Vec sum, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a.v, (__m512bh)b.v);
}

#else  // AVX2 and FMA

constexpr int LANES = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
// To the nearest bf16, ties to even, in the upper half of each lane; the lower means nothing.
inline __m256i round_to_bf16(Vec v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline void store(bf16* p, Vec v) {
    __m256i high = _mm256_srli_epi32(round_to_bf16(v), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Of two of which one is no number, the second.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline uint32_t not_below(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline uint32_t no_numbers(Vec a) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}

inline Vec exp2_of(Vec n, Vec fraction_power) {
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    __m256i bits = _mm256_add_epi32(_mm256_castps_si256(fraction_power), exponent);
    return _mm256_castsi256_ps(bits);
}
inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Vec zero_below(Vec x, Vec limit, Vec v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), v);
}

// A float that is a bf16. Without an instruction for pairs, rows that are multiplied are kept as
// such: made floats once, where they are written, and not again for every 16 columns.
struct Rounded {
    float value;
};
inline float to_float(Rounded x) { return x.value; }
inline void from_float(float x, Rounded* out) {
    bf16 rounded;
    from_float(x, &rounded);
    out->value = to_float(rounded);
}

// The first of each pair, or the second.
inline Vec first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Vec second_of(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}
inline void store(Rounded* p, Vec v) { store(&p->value, second_of(round_to_bf16(v))); }

template <class T>
struct OperandOf {
    using Type = T;
};
template <>
struct OperandOf<bf16> {
    using Type = Rounded;
};
// What rows are kept as that are multiplied with weights, keys or values of T.
template <class T>
using Operand = typename OperandOf<T>::Type;

// As how many vectors a line of DEPTH neighbours is taken, one after the other.
template <class T>
constexpr int PARTS = DEPTH<T>;

// A part of a line, for LANES columns, and the same part of one row, in all lanes.
inline Vec columns(const float* line, int) { return load(line); }
inline Vec columns(const bf16* line, int part) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)line);
    return part ? second_of(pairs) : first_of(pairs);
}
inline Vec factor(const float* x, int) { return broadcast(*x); }
inline Vec factor(const Rounded* x, int part) { return broadcast(x[part].value); }

#endif

template <class T>
using Columns = decltype(columns(static_cast<const T*>(nullptr), 0));

inline Vec multiply_add(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }

// Calls use(n), or use(MOST) where n is more, with a constant: how many sums a kernel keeps in
// registers is part of its type.
template <int MOST, class Use>
inline void with_constant(int n, Use use) {
    if constexpr (MOST > 0) {
        if (n >= MOST) return use(std::integral_constant<int, MOST>());
        with_constant<MOST - 1>(n, use);
    }
}

// e^x with a relative error below 3e-7; 0 below e^-87, not a number for what is none.
inline Vec exp(Vec x) {
    const Vec low = broadcast(-87.f);
    Vec clamped = min(broadcast(88.f), max(low, x));
    Vec t = mul(clamped, broadcast(1.44269504f)), n = nearest(t);
    // 2^n times e^r: what is left of x after n ln 2, taken away in two parts to stay exact.
    Vec r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.f / 720);
    p = fma(p, r, broadcast(1.f / 120));
    p = fma(p, r, broadcast(1.f / 24));
    p = fma(p, r, broadcast(1.f / 6));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p, r, broadcast(1.f));
    p = fma(p, r, broadcast(1.f));
    return zero_below(x, low, exp2_of(n, p));
}

// 1 - 2 / (e^2x + 1): exact enough for scores and activations, and it does not overflow.
inline Vec tanh(Vec x) {
    Vec e = exp(add(x, x));
    return sub(broadcast(1.f), div(broadcast(2.f), add(e, broadcast(1.f))));
}

}  // namespace rts
