// Rows times a panel with vectors of 16 floats, and with the tiles of AMX.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "simd.h"
#include "tiles.h"

namespace rts {

// Rows that a panel is multiplied with at once: two tiles.
constexpr int PANEL_ROWS = 32;

// Rows of one pass over a panel: 16 sums, of 32 registers.
constexpr int KERNEL_ROWS = 8;

// R rows times a panel. out: [R][PANEL].
template <class T, int R>
inline void multiply_rows(const T* a, size_t stride, const T* panel, int depth, float* out) {
    constexpr int V = PANEL / LANES;
    Vec sums[R][V];
    for (auto& row : sums)
        for (auto& one : row) one = zero();
    for (int k = 0; k < depth; k += DEPTH<T>) {
        const T* line = panel + place_in_panel<T>(k, 0);
        __builtin_prefetch(line + AHEAD_BYTES / sizeof(T));
        Columns<T> lanes[V];
        for (int v = 0; v < V; v++) lanes[v] = columns(line + place_in_panel<T>(0, v * LANES), 0);
        for (int r = 0; r < R; r++) {
            const Columns<T> x = factor(a + r * stride + k, 0);
            for (int v = 0; v < V; v++) sums[r][v] = multiply_add(sums[r][v], lanes[v], x);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * PANEL + v * LANES, sums[r][v]);
}

// Up to PANEL_ROWS rows times a panel. out: [rows][PANEL].
template <class T>
inline void multiply_panel(int rows, const T* a, size_t stride, const T* panel, int depth,
                           float* out, Part) {
    for (int r = 0; r < rows; r += KERNEL_ROWS)
        with_constant<KERNEL_ROWS>(rows - r, [&](auto some) {
            multiply_rows<T, some>(a + r * stride, stride, panel, depth, out + r * PANEL);
        });
}

#if RTS_TILES
// What is fetched while a panel is multiplied: so many lines for each TILE_DEPTH of the inner
// dimension.
struct Ahead {
    const char* from;
    int lines;
};

// Of a panel that is used once, what will be used so soon. Of one that several parts use, each
// fetches its piece of the next panel: the first alone would wait for the memory, and the others
// leave it idle.
template <class T>
Ahead ahead_of(const T* panel, int depth, Part part) {
    constexpr int PANEL_LINES = TILE_DEPTH * PANEL * sizeof(T) / LINE;
    const char* bytes = reinterpret_cast<const char*>(panel);
    if (part.count == 1) return {bytes + AHEAD_BYTES, PANEL_LINES};
    const int lines = (PANEL_LINES + part.count - 1) / part.count;
    const size_t steps = depth / TILE_DEPTH;
    return {bytes + steps * LINE * (PANEL_LINES + part.index * lines), lines};
}

// One tile of rows, or two. There must be so many rows of memory behind `a`.
template <bool TWO>
inline void multiply_tiles(const bf16* a, size_t stride, const bf16* panel, int depth, float* out,
                           Ahead ahead) {
    const size_t row_bytes = stride * sizeof(bf16);
    constexpr int W = 64, NEXT = TILE_DEPTH * TILE_COLUMNS;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < depth; k += TILE_DEPTH) {
        const bf16* w = panel + size_t(k) * PANEL;
        for (int i = 0; i < ahead.lines; i++, ahead.from += LINE)
            _mm_prefetch(ahead.from, _MM_HINT_T1);
        _tile_loadd(4, a + k, row_bytes);
        _tile_loadd(6, w, W);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + NEXT, W);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (TWO) {
            _tile_loadd(5, a + 16 * stride + k, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    if constexpr (TWO) {
        _tile_stored(2, out + 16 * PANEL, PANEL * 4);
        _tile_stored(3, out + 16 * PANEL + 16, PANEL * 4);
    }
    _tile_stored(0, out, PANEL * 4);
    _tile_stored(1, out + 16, PANEL * 4);
}

// There must be PANEL_ROWS rows of memory behind `a`.
template <>
inline void multiply_panel(int rows, const bf16* a, size_t stride, const bf16* panel, int depth,
                           float* out, Part part) {
    const Ahead ahead = ahead_of(panel, depth, part);
    if (rows > 16) return multiply_tiles<true>(a, stride, panel, depth, out, ahead);
    multiply_tiles<false>(a, stride, panel, depth, out, ahead);
}
#endif

}  // namespace rts
