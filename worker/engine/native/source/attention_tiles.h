// Attention of many rows of one sequence with AMX: a tile's 16 rows are queries of several tokens
// and of all heads that share their keys.
#pragma once

#include "attention.h"
#include "tiles.h"

#if RTS_TILES
namespace rts {

constexpr int TILE_ROWS = 16;

struct TileScratch {
    alignas(64) bf16 queries[TILE_ROWS * MOST_HEAD_SIZE];
    alignas(64) float scores[TILE_ROWS * CHUNK];
    alignas(64) bf16 weights[TILE_ROWS * CHUNK];
    alignas(64) float sums[TILE_ROWS * MOST_HEAD_SIZE];
    alignas(64) float result[TILE_ROWS * MOST_HEAD_SIZE];
};

// queries x keys of one block. scores: [TILE_ROWS][CHUNK].
inline void score_tiles(const bf16* queries, const bf16* keys, int key_size, float* scores) {
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < key_size; d += 32) {
        _tile_loadd(4, queries + d, key_size * sizeof(bf16));
        _tile_loadd(6, keys + d * HALF, HALF * 2 * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, keys + (key_size + d) * HALF, HALF * 2 * sizeof(bf16));
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, scores, CHUNK * sizeof(float));
    _tile_stored(1, scores + HALF, CHUNK * sizeof(float));
}

// weights x values of some blocks, C tiles of 16 columns. sums: [TILE_ROWS][size].
template <int C>
inline void weigh_tiles(const bf16* weights, const Context<bf16>& context, int first_block,
                        int blocks, int column, int size, float* sums) {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (C > 2) _tile_zero(2);
    if constexpr (C > 3) _tile_zero(3);
    const size_t stride = size_t(size) * 2 * sizeof(bf16);
    for (int b = 0; b < blocks; b++) {
        const bf16* values = context.values(first_block + b) + column * 2;
        _tile_loadd(4, weights + b * BLOCK, CHUNK * sizeof(bf16));
        _tile_loadd(5, values, stride);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (C > 1) {
            _tile_loadd(6, values + 32, stride);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (C > 2) {
            _tile_loadd(7, values + 64, stride);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (C > 3) {
            _tile_loadd(5, values + 96, stride);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, sums + column, size * sizeof(float));
    if constexpr (C > 1) _tile_stored(1, sums + column + 16, size * sizeof(float));
    if constexpr (C > 2) _tile_stored(2, sums + column + 32, size * sizeof(float));
    if constexpr (C > 3) _tile_stored(3, sums + column + 48, size * sizeof(float));
}

// `tokens` rows of a sequence from `position` on, `heads` query heads each (at most 16 queries).
// q, out: [tokens][...][head_size], a token's heads side by side, `q_stride` and `out_stride`
// from token to token.
inline void attend_tile(int tokens, int heads, const bf16* q, size_t q_stride,
                        const Context<bf16>& context, const Look& look, int position, bf16* out,
                        size_t out_stride, TileScratch& scratch) {
    const int size = context.cache->head_size(), key_size = context.cache->key_size();
    const int rows = tokens * heads, last = position + tokens - 1;
    for (int r = 0; r < rows; r++) {
        bf16* to = scratch.queries + r * key_size;
        std::memcpy(to, q + r / heads * q_stride + size_t(r % heads) * size, size * sizeof(bf16));
        std::memset(to + size, 0, (key_size - size) * sizeof(bf16));
    }
    std::fill(scratch.result, scratch.result + rows * size, 0.f);
    Softmax softmax[TILE_ROWS];
    const int first = look.first(position);
    for (int chunk = first / CHUNK * CHUNK; chunk <= last; chunk += CHUNK) {
        const int begin = std::max(chunk, first / BLOCK * BLOCK);
        const int blocks = (std::min(chunk + CHUNK, last + 1) - begin + BLOCK - 1) / BLOCK;
        for (int b = 0; b < blocks; b++)
            score_tiles(scratch.queries, context.keys(begin / BLOCK + b), key_size,
                        scratch.scores + b * BLOCK);
        float fades[TILE_ROWS];
        for (int r = 0; r < rows; r++) {
            const int own = position + r / heads;
            fades[r] =
                softmax[r].fold(scratch.scores + r * CHUNK, blocks * BLOCK, look.first(own) - begin,
                                own + 1 - begin, look, scratch.weights + r * CHUNK);
        }
        int column = 0;
        for (; column + 64 <= size; column += 64)
            weigh_tiles<4>(scratch.weights, context, begin / BLOCK, blocks, column, size,
                           scratch.sums);
        for (; column < size; column += 16)
            weigh_tiles<1>(scratch.weights, context, begin / BLOCK, blocks, column, size,
                           scratch.sums);
        for (int r = 0; r < rows; r++)
            for (int j = r * size; j < (r + 1) * size; j += LANES)
                store(scratch.result + j,
                      fma(load(scratch.result + j), broadcast(fades[r]), load(scratch.sums + j)));
    }
    for (int r = 0; r < rows; r++)
        finish_result(scratch.result + r * size, size, softmax[r].total,
                      out + r / heads * out_stride + size_t(r % heads) * size);
}

// As attend_rows, in as many tiles as it takes.
inline void attend_in_tiles(int count, const QueryRows<bf16>& rows, const Context<bf16>& context,
                            const Look& look, TileScratch& scratch) {
    const int size = context.cache->head_size();
    for (int h = 0; h < rows.heads; h += TILE_ROWS) {
        const int some = std::min(TILE_ROWS, rows.heads - h), tokens = TILE_ROWS / some;
        for (int t = 0; t < count; t += tokens)
            attend_tile(std::min(tokens, count - t), some,
                        rows.q + t * rows.q_stride + size_t(h) * size, rows.q_stride, context, look,
                        rows.position + t, rows.out + t * rows.out_stride + size_t(h) * size,
                        rows.out_stride, scratch);
    }
}

}  // namespace rts
#endif
