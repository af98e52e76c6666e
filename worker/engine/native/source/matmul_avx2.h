// Rows times a panel with vectors of 8 floats, without an instruction for bf16.
#pragma once

#include <algorithm>
#include <type_traits>

#include "matrix.h"
#include "simd.h"
#include "team.h"

namespace rts {

// Rows that a panel is multiplied with at once: what it takes to make the most of a panel that lies
// in the second-level cache, and is taken from there again for as many more.
constexpr int PANEL_ROWS = 64;

// Rows of one pass over a tile: 10 sums, of 16 registers. 8 hide how long an addition takes; with
// 12 GCC keeps some in memory, and a pass takes a third longer.
constexpr int KERNEL_ROWS = 5;

// So much of the inner dimension goes into the sums of all rows before more does: of one tile's
// columns it stays in the nearest cache. A few rows are faster than the memory, so they take
// weights in the order in which they lie there: the processor sees it and fetches what comes next.
constexpr int FEW_ROWS = 16;
constexpr int DEPTH_OF_FEW = TILE_DEPTH, DEPTH_OF_MANY = 8 * TILE_DEPTH;

// R rows times the TILE_COLUMNS columns from `w` on. depth: of the inner dimension, whole tiles.
// out: [R][PANEL], what was summed up earlier, unless this begins.
// FETCHES: weights AHEAD_BYTES behind these, too.
template <class T, bool FETCHES, int R>
inline void multiply_rows(const Operand<T>* a, size_t stride, const T* w, int depth, float* out,
                          bool begins) {
    constexpr int D = DEPTH<T>, V = TILE_COLUMNS / LANES;
    Vec sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sums[r][v] = begins ? zero() : load(out + r * PANEL + v * LANES);
    for (int tile = 0; tile < depth; tile += TILE_DEPTH, w += TILE_DEPTH * PANEL, a += TILE_DEPTH)
        for (int k = 0; k < TILE_DEPTH; k += D) {
            const T* line = w + k * TILE_COLUMNS;
            if constexpr (FETCHES) __builtin_prefetch(line + AHEAD_BYTES / sizeof(T));
            // Of a pair first the one, then the other: both at once would need more registers.
            for (int part = 0; part < PARTS<T>; part++) {
                Vec lanes[V];
                for (int v = 0; v < V; v++) lanes[v] = columns(line + v * LANES * D, part);
                for (int r = 0; r < R; r++) {
                    const Vec x = factor(a + r * stride + k, part);
                    for (int v = 0; v < V; v++) sums[r][v] = multiply_add(sums[r][v], lanes[v], x);
                }
            }
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * PANEL + v * LANES, sums[r][v]);
}

// Up to PANEL_ROWS rows times a panel. out: [rows][PANEL].
template <class T>
inline void multiply_panel(int rows, const Operand<T>* a, size_t stride, const T* panel, int depth,
                           float* out, Part) {
    // Passes of about the same number of rows: a last one of one or two would take as long as four.
    const int passes = (rows + KERNEL_ROWS - 1) / KERNEL_ROWS;
    const int most = rows <= FEW_ROWS ? DEPTH_OF_FEW : DEPTH_OF_MANY;
    for (int k = 0; k < depth; k += most)
        for (int column = 0; column < PANEL; column += TILE_COLUMNS) {
            const T* w = panel + place_in_panel<T>(k, column);
            const int deep = std::min(most, depth - k);
            float* to = out + column;
            const auto pass = [&](auto fetches, int i) {
                constexpr bool FETCHES = decltype(fetches)::value;
                const Share share(rows, i, passes);
                with_constant<KERNEL_ROWS>(share.last - share.first, [&](auto some) {
                    multiply_rows<T, FETCHES, some>(a + share.first * stride + k, stride, w, deep,
                                                    to + share.first * PANEL, k == 0);
                });
            };
            pass(std::true_type(), 0);
            for (int i = 1; i < passes; i++) pass(std::false_type(), i);
        }
}

}  // namespace rts
