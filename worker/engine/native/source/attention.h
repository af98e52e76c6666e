// Grouped-query attention over the paged cache, by real lengths: online softmax over chunks of the
// context. Source: FlashAttention (Dao et al., 2022), Milakov and Gimelshein (2018).
//
// A row's result depends on its own queries and on its own sequence alone. Chunks begin at
// multiples of CHUNK whatever a row sees, so that the sums are the same in every batch; what a row
// does not see of what its neighbours do is a number times zero.
#pragma once

#include <algorithm>
#include <limits>

#include "cache.h"
#include "rows.h"
#include "simd.h"

namespace rts {

constexpr int CHUNK = 512;  // tokens whose scores are kept, a multiple of BLOCK

// What a layer asks for.
struct Look {
    float scale;
    int window;      // positions a row sees, itself included; 0 for all
    float soft_cap;  // 0 for none

    int first(int position) const { return window ? std::max(0, position - window + 1) : 0; }
};

// Where the keys and values of one head of one sequence are.
template <class T>
struct Context {
    Cache<T>* cache;
    int layer;
    int head;
    const int64_t* table;  // the sequence's blocks

    const T* keys(int block) const { return cache->keys(layer, table[block], head); }
    const T* values(int block) const { return cache->values(layer, table[block], head); }
};

// Queries that are answered in one pass over keys and values.
constexpr int MOST_QUERIES = 4;

// Halves of a block of keys, and vectors of columns of values, that G queries see at once: as many
// as there are registers for their sums.
#if defined(__AVX512F__)
template <int G>
constexpr int HALVES = 2;
template <int G>
constexpr int COLUMN_VECTORS = 4;
#else
template <int G>
constexpr int HALVES = G > 2 ? 1 : 2;
template <int G>
constexpr int COLUMN_VECTORS = G > 2 ? 2 : 4;
#endif

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Scores of G queries with a block of keys. q: [G][stride]. out: [G][CHUNK], BLOCK written.
template <class T, int G>
inline void score_block(const Operand<T>* q, size_t stride, const T* keys, int head_size,
                        int key_size, float* out) {
    constexpr int H = HALVES<G>, V = HALF / LANES, D = DEPTH<T>;
    for (int first = 0; first < 2; first += H, keys += size_t(key_size) * HALF, out += HALF) {
        Vec sums[H][V][G];
        for (auto& half : sums)
            for (auto& lanes : half)
                for (auto& one : lanes) one = zero();
        for (int d = 0; d < head_size; d += D)
            for (int part = 0; part < PARTS<T>; part++) {
                Columns<T> lanes[H][V];
                for (int h = 0; h < H; h++)
                    for (int v = 0; v < V; v++)
                        lanes[h][v] = columns(
                            keys + size_t(h) * key_size * HALF + size_t(d) * HALF + v * LANES * D,
                            part);
                for (int g = 0; g < G; g++) {
                    const Columns<T> x = factor(q + g * stride + d, part);
                    for (int h = 0; h < H; h++)
                        for (int v = 0; v < V; v++)
                            sums[h][v][g] = multiply_add(sums[h][v][g], lanes[h][v], x);
                }
            }
        for (int g = 0; g < G; g++)
            for (int h = 0; h < H; h++)
                for (int v = 0; v < V; v++)
                    store(out + g * CHUNK + h * HALF + v * LANES, sums[h][v][g]);
    }
}

// Adds to C vectors of G results what `blocks` blocks of values give.
// weights: [G][CHUNK]. result: [G][head_size], from the column on.
template <class T, int G, int C>
inline void weigh_columns(const Operand<T>* weights, const Context<T>& context, int first_block,
                          int blocks, int column, int head_size, float* result) {
    constexpr int D = DEPTH<T>;
    Vec sums[G][C];
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) sums[g][c] = load(result + g * head_size + column + c * LANES);
    for (int b = 0; b < blocks; b++) {
        const T* values = context.values(first_block + b) + size_t(column) * D;
        const T* next = context.values(first_block + std::min(b + 1, blocks - 1)) + column * D;
        for (int t = 0; t < BLOCK; t += D) {
            for (int c = 0; c < C; c++)
                _mm_prefetch(reinterpret_cast<const char*>(next + t * head_size + c * LANES * D),
                             _MM_HINT_T0);
            for (int part = 0; part < PARTS<T>; part++) {
                Columns<T> lanes[C];
                for (int c = 0; c < C; c++)
                    lanes[c] = columns(values + size_t(t) * head_size + c * LANES * D, part);
                for (int g = 0; g < G; g++) {
                    const Columns<T> w = factor(weights + g * CHUNK + b * BLOCK + t, part);
                    for (int c = 0; c < C; c++) sums[g][c] = multiply_add(sums[g][c], lanes[c], w);
                }
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int c = 0; c < C; c++) store(result + g * head_size + column + c * LANES, sums[g][c]);
}

template <class T, int G>
inline void weigh(const Operand<T>* weights, const Context<T>& context, int first_block, int blocks,
                  int head_size, float* result) {
    constexpr int C = COLUMN_VECTORS<G>;
    int column = 0;
    for (; column + C * LANES <= head_size; column += C * LANES)
        weigh_columns<T, G, C>(weights, context, first_block, blocks, column, head_size, result);
    for (; column < head_size; column += LANES)
        weigh_columns<T, G, 1>(weights, context, first_block, blocks, column, head_size, result);
}

// Running maximum and sum of one query.
struct Softmax {
    float most = NEVER, total = 0;

    // Turns scores[0 .. count) into weights, those outside [from, to) into zeros.
    // Returns what earlier results are to be multiplied with.
    template <class Out>
    float fold(float* scores, int count, int from, int to, const Look& look, Out* weights) {
        from = std::max(from, 0), to = std::min(to, count);
        if (from >= to) {
            std::memset(weights, 0, count * sizeof(Out));
            return 1;
        }
        float scale = look.scale;
        if (look.soft_cap) {
            for (int j = 0; j < count; j += LANES)
                store(scores + j, mul(load(scores + j), broadcast(scale)));
            soft_cap(scores, count, look.soft_cap);
            scale = 1;
        }
        // Whole vectors outside are passed over.
        const int first = from / LANES * LANES, last = (to + LANES - 1) / LANES * LANES;
        std::fill(scores + first, scores + from, NEVER);
        std::fill(scores + to, scores + last, NEVER);
        std::memset(weights, 0, first * sizeof(Out));
        std::memset(weights + last, 0, (count - last) * sizeof(Out));
        Vec high = broadcast(NEVER);
        for (int j = first; j < last; j += LANES) high = max(high, load(scores + j));
        const float before = most;
        most = std::max(most, largest(high) * scale);
        const Vec factor = broadcast(scale), shift = broadcast(-most);
        Vec sums = zero();
        for (int j = first; j < last; j += LANES) {
            Vec e = exp(fma(load(scores + j), factor, shift));
            sums = add(sums, e);
            store(weights + j, e);
        }
        const float fade = before == NEVER ? 0 : std::exp(before - most);
        // Said, not left to the compiler: it may round once here and twice there.
        total = std::fma(total, fade, sum(sums));
        return fade;
    }
};

inline void fade_result(float* result, int size, float by) {
    for (int j = 0; j < size; j += LANES) store(result + j, mul(load(result + j), broadcast(by)));
}

template <class Out>
inline void finish_result(const float* result, int size, float total, Out* out) {
    const Vec share = broadcast(1 / total);
    for (int j = 0; j < size; j += LANES) store(out + j, mul(load(result + j), share));
}

constexpr int MOST_HEAD_SIZE = 256;

// Rows of one sequence from `position` on, with all heads that share the context's head.
// q, out: [rows][...][head_size], a row's heads side by side, the strides from row to row.
template <class T>
struct QueryRows {
    int heads;
    const T* q;
    size_t q_stride;
    Operand<T>* out;
    size_t out_stride;
    int position;
};

// G queries from the index-th on, counted row by row: those of a prompt's neighbours share keys,
// too.
template <class T, int G>
inline void attend_queries(const QueryRows<T>& rows, int index, const Context<T>& context,
                           const Look& look) {
    const int size = context.cache->head_size(), key_size = context.cache->key_size();
    alignas(64) float scores[G * CHUNK];
    alignas(64) Operand<T> weights[G * CHUNK];
    alignas(64) float result[G * MOST_HEAD_SIZE];
    alignas(64) Operand<T> queries[G * MOST_HEAD_SIZE];
    int row[G], head[G], position[G];
    for (int g = 0; g < G; g++) {
        row[g] = (index + g) / rows.heads, head[g] = (index + g) % rows.heads;
        position[g] = rows.position + row[g];
        const T* q = rows.q + row[g] * rows.q_stride + size_t(head[g]) * size;
        for (int j = 0; j < size; j += LANES) store(queries + g * size + j, load(q + j));
    }
    std::fill(result, result + G * size, 0.f);
    Softmax softmax[G];
    const int first = look.first(position[0]), last = position[G - 1];
    for (int chunk = first / CHUNK * CHUNK; chunk <= last; chunk += CHUNK) {
        const int begin = std::max(chunk, first / BLOCK * BLOCK);
        const int blocks = (std::min(chunk + CHUNK, last + 1) - begin + BLOCK - 1) / BLOCK;
        for (int b = 0; b < blocks; b++) {
            const T* keys = context.keys(begin / BLOCK + b);
            const char* next =
                reinterpret_cast<const char*>(b + 1 < blocks ? context.keys(begin / BLOCK + b + 1)
                                                             : context.values(begin / BLOCK));
            for (int i = 0; i < int(size * BLOCK * sizeof(T)); i += 64)
                _mm_prefetch(next + i, _MM_HINT_T0);
            score_block<T, G>(queries, size, keys, size, key_size, scores + b * BLOCK);
        }
        for (int g = 0; g < G; g++) {
            const float fade =
                softmax[g].fold(scores + g * CHUNK, blocks * BLOCK, look.first(position[g]) - begin,
                                position[g] + 1 - begin, look, weights + g * CHUNK);
            fade_result(result + g * size, size, fade);
        }
        weigh<T, G>(weights, context, begin / BLOCK, blocks, size, result);
    }
    for (int g = 0; g < G; g++)
        finish_result(result + g * size, size, softmax[g].total,
                      rows.out + row[g] * rows.out_stride + size_t(head[g]) * size);
}

template <class T>
inline void attend_rows(int count, const QueryRows<T>& rows, const Context<T>& context,
                        const Look& look) {
    const int all = count * rows.heads;
    for (int i = 0; i < all; i += MOST_QUERIES)
        with_constant<MOST_QUERIES>(
            all - i, [&](auto some) { attend_queries<T, some>(rows, i, context, look); });
}

}  // namespace rts
