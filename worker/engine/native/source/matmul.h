// Rows times a packed matrix. What becomes of the result is the caller's: a function that gets 32
// columns of one row at a time, while they are in the nearest cache.
//
// A row's result does not depend on how many other rows there are: whatever the kernel, the inner
// dimension is summed up in the same order. Determinism rests on that.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "simd.h"
#include "team.h"
#if defined(__AVX512F__)
#include "matmul_avx512.h"
#else
#include "matmul_avx2.h"
#endif

namespace rts {

// Rows are multiplied in blocks that stay in the second-level cache while a panel passes by; in
// part in the third, where they are twice as wide as T.
constexpr size_t BLOCK_BYTES = size_t(1) << 20;
constexpr int BLOCK_ROWS = 256;

template <class T>
int block_rows(int depth) {
    int rows = int(BLOCK_BYTES / (size_t(depth) * sizeof(T))) / PANEL_ROWS * PANEL_ROWS;
    return std::clamp(rows, PANEL_ROWS, BLOCK_ROWS);
}

// Rows times a matrix, by all threads. a: [rows rounded up to PANEL_ROWS][stride], as wide as the
// matrix is deep. use(panel, row, values) gets PANEL values, the bias added.
template <class T, class Use>
void multiply(Team& team, int thread, const Operand<T>* a, size_t stride, int rows,
              const Matrix<T>& m, Use use) {
    const int most = block_rows<T>(m.depth), blocks = (rows + most - 1) / most;
    const auto share_of = [&](int whose) {
        const Share panels(m.panels, whose, team.size());
        return Share(panels.first * blocks, panels.last * blocks);
    };
    team.spread(thread, share_of, [&](int at, Share share) {
        alignas(64) float out[PANEL_ROWS * PANEL];
        // All panels of a share for one block of rows, then for the next.
        const int panels = (share.last - share.first) / blocks, i = at - share.first;
        const int p = share.first / blocks + i % panels;
        const int block = i / panels * most, end = std::min(rows, block + most);
        const int parts = (end - block + PANEL_ROWS - 1) / PANEL_ROWS;
        for (int r = block; r < end; r += PANEL_ROWS) {
            const int count = std::min(PANEL_ROWS, end - r);
            multiply_panel<T>(count, a + r * stride, stride, m.panel(p), m.depth, out,
                              {(r - block) / PANEL_ROWS, parts});
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
