// Rows times a packed matrix. What becomes of the result is the caller's: a function that gets 32
// columns of one row at a time, while they are in the nearest cache.
//
// A row's result does not depend on how many other rows there are: whatever the kernel, the inner
// dimension is summed up in the same order. Determinism rests on that.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "simd.h"
#include "tiles.h"

namespace rts {

// Rows are multiplied in blocks that stay in the second-level cache while a panel passes by.
constexpr size_t BLOCK_BYTES = size_t(1) << 20;
constexpr int BLOCK_ROWS = 256;

template <class T>
int block_rows(int depth) {
    int rows = int(BLOCK_BYTES / (size_t(depth) * sizeof(T))) / 32 * 32;
    return std::clamp(rows, 32, BLOCK_ROWS);
}

// What one pass over weights takes: KERNEL_ROWS rows, as many as there are registers for their
// sums, and KERNEL_COLUMNS columns; of the inner dimension a tile's, or all of it.
#if defined(__AVX512F__)
template <class T>
constexpr int KERNEL_ROWS = 8;  // 16 sums, of 32 registers
constexpr int KERNEL_COLUMNS = PANEL;
constexpr bool TILE_BY_TILE = false;
#else
template <class T>
constexpr int KERNEL_ROWS = 6;  // 12 sums, of 16 registers
template <>
constexpr int KERNEL_ROWS<bf16> = 4;  // 8: each vector of bf16 is two of floats
constexpr int KERNEL_COLUMNS = TILE_COLUMNS;
// In the order in which they lie in memory: the processor sees it and fetches what comes next, and
// all rows read a tile from the nearest cache. That is worth the sums' way to memory and back.
constexpr bool TILE_BY_TILE = true;
#endif

// How far ahead weights are fetched: what hides the memory's latency at the speed of their use.
constexpr int AHEAD_BYTES = 8192;

// R rows times the columns from `w` on. out: [R][PANEL], what earlier tiles have summed up, unless
// this begins. depth: of the panel. FETCHES: weights AHEAD_BYTES behind these, too.
template <class T, bool FETCHES, int R>
inline void multiply_rows(const T* a, size_t stride, const T* w, int depth, float* out,
                          bool begins) {
    constexpr int D = DEPTH<T>, V = KERNEL_COLUMNS / LANES;
    Vec sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sums[r][v] = TILE_BY_TILE && !begins ? load(out + r * PANEL + v * LANES) : zero();
    // A constant where it can be one: that makes the loop a fifth faster.
    const int end = TILE_BY_TILE ? TILE_DEPTH : depth;
    for (int k = 0; k < end; k += D) {
        const T* line = w + place_in_panel<T>(k, 0);
        if constexpr (FETCHES) __builtin_prefetch(line + AHEAD_BYTES / sizeof(T));
        Lanes<T> lanes[V];
        for (int v = 0; v < V; v++) lanes[v] = load_lanes(line + place_in_panel<T>(0, v * LANES));
        for (int r = 0; r < R; r++) {
            Factor<T> x = factor(a + r * stride + k);
            for (int v = 0; v < V; v++) sums[r][v] = multiply_add(sums[r][v], lanes[v], x);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * PANEL + v * LANES, sums[r][v]);
}

template <class T, bool FETCHES, int R = KERNEL_ROWS<T>>
inline void multiply_some(int rows, const T* a, size_t stride, const T* w, int depth, float* out,
                          bool begins) {
    if constexpr (R > 0) {
        if (rows >= R) return multiply_rows<T, FETCHES, R>(a, stride, w, depth, out, begins);
        multiply_some<T, FETCHES, R - 1>(rows, a, stride, w, depth, out, begins);
    }
}

// What is fetched while a block is computed: so many lines for each TILE_DEPTH of the inner
// dimension.
struct Ahead {
    const char* from;
    int lines;
};

// Of a panel that is used once, what will be used so soon. Of one that several blocks use, each
// fetches its part of the next panel: the first alone would wait for the memory, and the others
// leave it idle.
template <class T>
Ahead ahead_of(const T* panel, int depth, int block, int blocks) {
    constexpr int PANEL_LINES = TILE_DEPTH * PANEL * sizeof(T) / LINE;
    const char* bytes = reinterpret_cast<const char*>(panel);
    if (blocks == 1) return {bytes + AHEAD_BYTES, PANEL_LINES};
    const int lines = (PANEL_LINES + blocks - 1) / blocks;
    const size_t steps = depth / TILE_DEPTH;
    return {bytes + steps * LINE * (PANEL_LINES + block * lines), lines};
}

// Up to 32 rows times one panel. out: [32][PANEL].
template <class T>
inline void multiply_panel(int rows, const T* a, size_t stride, const T* panel, int depth,
                           float* out) {
    constexpr int R = KERNEL_ROWS<T>;
    // A tile stays in the nearest cache for the rows that come later, a panel does not.
    constexpr bool AGAIN = !TILE_BY_TILE;
    for (int k = 0; k < depth; k += TILE_BY_TILE ? TILE_DEPTH : depth)
        for (int column = 0; column < PANEL; column += KERNEL_COLUMNS) {
            const T* w = panel + place_in_panel<T>(k, column);
            const T* x = a + k;
            float* to = out + column;
            multiply_some<T, true>(std::min(R, rows), x, stride, w, depth, to, k == 0);
            for (int r = R; r < rows; r += R)
                multiply_some<T, AGAIN>(std::min(R, rows - r), x + r * stride, stride, w, depth,
                                        to + r * PANEL, k == 0);
        }
}

// As multiply_panel. There must be 32 rows of memory behind `a`.
template <class T>
inline void multiply_block(int rows, const T* a, size_t stride, const T* panel, int depth,
                           float* out, Ahead) {
    multiply_panel(rows, a, stride, panel, depth, out);
}

#if !defined(__AVX512F__)
// Without an instruction for pairs, each row's are taken apart again for every TILE_COLUMNS
// columns: half of the work. For more rows than one pass takes, both sides are made floats first, a
// tile of each at a time. The sums are the same: the factors are, and their order is.
template <>
inline void multiply_block(int rows, const bf16* a, size_t stride, const bf16* panel, int depth,
                           float* out, Ahead) {
    if (rows <= KERNEL_ROWS<bf16>) return multiply_panel(rows, a, stride, panel, depth, out);
    constexpr int R = KERNEL_ROWS<float>;
    alignas(64) float x[32][TILE_DEPTH], w[TILE_DEPTH][TILE_COLUMNS];
    for (int k = 0; k < depth; k += TILE_DEPTH) {
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < TILE_DEPTH; i += LANES)
                store(x[r] + i, load(a + r * stride + k + i));
        for (int column = 0; column < PANEL; column += TILE_COLUMNS) {
            const bf16* tile = panel + place_in_panel<bf16>(k, column);
            for (int i = 0; i < TILE_DEPTH; i += DEPTH<bf16>) {
                const bf16* line = tile + place_in_panel<bf16>(i, 0);
                __builtin_prefetch(line + AHEAD_BYTES / sizeof(bf16));
                for (int c = 0; c < TILE_COLUMNS; c += LANES) {
                    const auto [first, second] = load_lanes(line + place_in_panel<bf16>(0, c));
                    store(w[i] + c, first);
                    store(w[i + 1] + c, second);
                }
            }
            for (int r = 0; r < rows; r += R)
                multiply_some<float, false>(std::min(R, rows - r), x[r], TILE_DEPTH, w[0],
                                            TILE_DEPTH, out + r * PANEL + column, k == 0);
        }
    }
}
#endif

#if RTS_TILES
template <>
inline void multiply_block(int rows, const bf16* a, size_t stride, const bf16* panel, int depth,
                           float* out, Ahead ahead) {
    const size_t row_bytes = stride * sizeof(bf16);
    constexpr int W = 64, NEXT = TILE_DEPTH * TILE_COLUMNS;
    auto fetch = [&] {
        for (int i = 0; i < ahead.lines; i++, ahead.from += LINE)
            _mm_prefetch(ahead.from, _MM_HINT_T1);
    };
    _tile_zero(0);
    _tile_zero(1);
    if (rows > 16) {
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < depth; k += 32) {
            const bf16* w = panel + size_t(k) * PANEL;
            fetch();
            _tile_loadd(4, a + k, row_bytes);
            _tile_loadd(6, w, W);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + NEXT, W);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * stride + k, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, out + 16 * PANEL, PANEL * 4);
        _tile_stored(3, out + 16 * PANEL + 16, PANEL * 4);
    } else {
        for (int k = 0; k < depth; k += 32) {
            const bf16* w = panel + size_t(k) * PANEL;
            fetch();
            _tile_loadd(4, a + k, row_bytes);
            _tile_loadd(6, w, W);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + NEXT, W);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, out, PANEL * 4);
    _tile_stored(1, out + 16, PANEL * 4);
}
#endif

// Rows times a matrix, by all threads. a: [rows rounded up to 32][stride], as wide as the matrix is
// deep. use(panel, row, values) gets PANEL values, the bias added.
template <class T, class Use>
void multiply(Team& team, int thread, const T* a, size_t stride, int rows, const Matrix<T>& m,
              Use use) {
    const int most = block_rows<T>(m.depth), blocks = (rows + most - 1) / most;
    const auto share_of = [&](int whose) {
        const Share panels(m.panels, whose, team.size());
        return Share(panels.first * blocks, panels.last * blocks);
    };
    team.spread(thread, share_of, [&](int at, Share share) {
        alignas(64) float out[32 * PANEL];
        // All panels of a share for one block of rows, then for the next.
        const int panels = (share.last - share.first) / blocks, i = at - share.first;
        const int p = share.first / blocks + i % panels;
        const int block = i / panels * most, end = std::min(rows, block + most);
        const int parts = (end - block + 31) / 32;
        for (int r = block; r < end; r += 32) {
            const int count = std::min(32, end - r);
            multiply_block<T>(count, a + r * stride, stride, m.panel(p), m.depth, out,
                              ahead_of(m.panel(p), m.depth, (r - block) / 32, parts));
            for (int i = 0; i < count; i++) {
                float* values = out + i * PANEL;
                if (!m.bias.empty())
                    for (int v = 0; v < PANEL; v += LANES)
                        store(values + v,
                              add(load(values + v), load(m.bias.data() + p * PANEL + v)));
                use(p, r + i, values);
            }
        }
    });
}

}  // namespace rts
