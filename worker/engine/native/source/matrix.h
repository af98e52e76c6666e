// Weights as the multiplication reads them.
#pragma once

#include "memory.h"
#include "simd.h"
#include "team.h"

namespace rts {

// Columns of a panel: two tiles of AMX, two or four vectors.
constexpr int PANEL = 32;

// Inner dimension of a tile, and its columns.
constexpr int TILE_DEPTH = 32, TILE_COLUMNS = 16;

// How far ahead weights are fetched: what hides the memory's latency at the speed of their use.
constexpr int AHEAD_BYTES = 8192;

// Of the rows that a panel is multiplied with, the index-th of so many parts.
struct Part {
    int index, count;
};

// A linear layer, y = x W' + b, with W in panels of PANEL outputs, and a panel in tiles:
// [panel][inner / TILE_DEPTH][2][TILE_DEPTH / DEPTH][TILE_COLUMNS][DEPTH]. Where there are few
// rows, or tiles of AMX, a panel is read from its beginning to its end, so it streams from memory;
// a tile of bf16 is one of AMX, 1 KiB side by side, and a line of it is one or two vectors. What
// fills up the last panel and the inner dimension is zero.
template <class T>
struct Matrix {
    int outputs = 0, inputs = 0;
    int depth = 0;  // inputs, rounded up to TILE_DEPTH
    int panels = 0;
    Array<T> weights;
    Array<float> bias;  // [panels * PANEL], or empty

    const T* panel(int index) const { return weights.data() + size_t(index) * PANEL * depth; }
};

// Which row of the source is which column of the packed matrix.
enum class Order {
    plain,
    // The source is gate over up. A panel takes 16 of each, so that whoever has computed a panel
    // can multiply the one with the other.
    gate_up,
};

inline int source_row(Order order, int outputs, int column) {
    if (order == Order::plain) return column < outputs ? column : -1;
    int half = outputs / 2, index = column / PANEL * 16 + column % 16;
    if (index >= half) return -1;
    return column % PANEL < 16 ? index : half + index;
}

// Where a weight is in its panel.
template <class T>
size_t place_in_panel(int k, int column) {
    constexpr int D = DEPTH<T>;
    const size_t tile = size_t(k / TILE_DEPTH) * 2 + column / TILE_COLUMNS;
    const int line = k % TILE_DEPTH / D;
    return tile * TILE_DEPTH * TILE_COLUMNS + (line * TILE_COLUMNS + column % TILE_COLUMNS) * D +
           k % D;
}

template <class T>
Matrix<T> pack(Memory& memory, Team& team, const T* source, int outputs, int inputs, Order order) {
    Matrix<T> m;
    m.outputs = outputs, m.inputs = inputs, m.depth = round_up(inputs, TILE_DEPTH);
    m.panels =
        order == Order::plain ? round_up(outputs, PANEL) / PANEL : round_up(outputs / 2, 16) / 16;
    m.weights = memory.zeros<T>(size_t(m.panels) * PANEL * m.depth);
    team.run([&](int thread) {
        Share share(m.panels, thread, team.size());
        for (int p = share.first; p < share.last; p++) {
            T* panel = m.weights.data() + size_t(p) * PANEL * m.depth;
            for (int c = 0; c < PANEL; c++) {
                int row = source_row(order, outputs, p * PANEL + c);
                if (row < 0) continue;
                const T* from = source + size_t(row) * inputs;
                for (int k = 0; k < inputs; k++) panel[place_in_panel<T>(k, c)] = from[k];
            }
        }
    });
    return m;
}

template <class T>
Array<float> pack_bias(Memory& memory, const Matrix<T>& m, const float* source, Order order) {
    auto bias = memory.zeros<float>(size_t(m.panels) * PANEL);
    for (int c = 0; c < m.panels * PANEL; c++) {
        int row = source_row(order, m.outputs, c);
        if (row >= 0) bias[c] = source[row];
    }
    return bias;
}

}  // namespace rts
