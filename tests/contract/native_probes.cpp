// Single kernels of the native backend, for tests/contract/test_native_kernels.py.
#include <chrono>
#include <vector>

#include "attention_tiles.h"
#include "matmul.h"
#include "rows.h"
#include "sampling.h"

#if RTS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace rts;

namespace {

template <class T>
void multiply_probe(int rows, int inputs, int outputs, int gate_up, const T* a, const T* weights,
                    const float* bias, float* out) {
    Memory memory;
    Team team(2);
    const Order order = gate_up ? Order::gate_up : Order::plain;
    Matrix<T> m = pack(memory, team, weights, outputs, inputs, order);
    if (bias) m.bias = pack_bias(memory, m, bias, order);
    auto padded = memory.zeros<Operand<T>>(size_t(round_up(rows, PANEL_ROWS)) * m.depth);
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < inputs; k++)
            from_float(to_float(a[r * inputs + k]), &padded[size_t(r) * m.depth + k]);
    const int width = m.panels * PANEL;
    team.run([&](int thread) {
        Tiles tiles;
        multiply(team, thread, padded.data(), m.depth, rows, m,
                 [&](int p, int r, const float* values) {
                     for (int j = 0; j < PANEL; j++)
                         out[size_t(r) * width + p * PANEL + j] = values[j];
                 });
    });
}

template <class T>
int attention_probe(int tiles, int heads, int kv_heads, int size, int count, int position,
                    int window, float scale, float soft_cap, const int64_t* table, int blocks,
                    const T* q, const T* k, const T* v, T* out) {
    Memory memory;
    Cache<T> cache(memory, 2, blocks, kv_heads, size);
    const int group = heads / kv_heads, length = position + count;
    for (int t = 0; t < length; t++)
        for (int h = 0; h < kv_heads; h++) {
            const size_t at = (size_t(t) * kv_heads + h) * size;
            cache.write(1, table[t / BLOCK], h, t % BLOCK, k + at, v + at);
        }
    const Look look{scale, window, soft_cap};
    const size_t stride = size_t(heads) * size;
    Operand<T> nothing;
    from_float(NAN, &nothing);
    std::vector<Operand<T>> results(count * stride, nothing);
    Tiles on;
    for (int h = 0; h < kv_heads; h++) {
        const Context<T> context{&cache, 1, h, table};
        const size_t offset = size_t(h) * group * size;
        const QueryRows<T> rows{group,  q + offset, stride, results.data() + offset,
                                stride, position};
        if (!tiles) {
            attend_rows(count, rows, context, look);
            continue;
        }
#if RTS_TILES
        if constexpr (sizeof(T) == sizeof(bf16)) {
            auto scratch = std::make_unique<TileScratch>();
            attend_in_tiles(count, rows, context, look, *scratch);
            continue;
        }
#endif
        return -1;
    }
    for (size_t j = 0; j < results.size(); j++) from_float(to_float(results[j]), out + j);
    return 0;
}

}  // namespace

extern "C" {

int probe_start(void) {
#if RTS_TILES
    return int(syscall(SYS_arch_prctl, 0x1023, 18));
#else
    return 0;
#endif
}

void probe_multiply(int bf, int rows, int inputs, int outputs, int gate_up, const void* a,
                    const void* weights, const float* bias, float* out) {
    if (bf)
        multiply_probe(rows, inputs, outputs, gate_up, static_cast<const bf16*>(a),
                       static_cast<const bf16*>(weights), bias, out);
    else
        multiply_probe(rows, inputs, outputs, gate_up, static_cast<const float*>(a),
                       static_cast<const float*>(weights), bias, out);
}

int probe_attention(int bf, int tiles, int heads, int kv_heads, int size, int count, int position,
                    int window, float scale, float soft_cap, const int64_t* table, int blocks,
                    const void* q, const void* k, const void* v, void* out) {
    if (bf)
        return attention_probe(tiles, heads, kv_heads, size, count, position, window, scale,
                               soft_cap, table, blocks, static_cast<const bf16*>(q),
                               static_cast<const bf16*>(k), static_cast<const bf16*>(v),
                               static_cast<bf16*>(out));
    return attention_probe(tiles, heads, kv_heads, size, count, position, window, scale, soft_cap,
                           table, blocks, static_cast<const float*>(q),
                           static_cast<const float*>(k), static_cast<const float*>(v),
                           static_cast<float*>(out));
}

// 0 exp, 1 tanh, 2 silu, 3 gelu_tanh. n: a multiple of 16.
void probe_function(int which, int n, const float* x, float* out) {
    for (int j = 0; j < n; j += LANES) {
        Vec v = load(x + j);
        store(out + j, which == 0   ? exp(v)
                       : which == 1 ? tanh(v)
                       : which == 2 ? silu(v)
                                    : gelu_tanh(v));
    }
}

// as_operand: the floats that rows of bf16 are multiplied as.
void probe_to_bf16(int n, const float* x, uint16_t* by_vector, uint16_t* by_one,
                   float* as_operand) {
    std::vector<Operand<bf16>> operands(n);
    for (int j = 0; j < n; j += LANES) {
        store(reinterpret_cast<bf16*>(by_vector) + j, load(x + j));
        store(operands.data() + j, load(x + j));
    }
    for (int j = 0; j < n; j++) as_operand[j] = to_float(operands[j]);
    for (int j = 0; j < n; j++) from_float(x[j], reinterpret_cast<bf16*>(by_one) + j);
}

// size: a multiple of 32.
void probe_norm(int size, const float* x, const float* weight, float eps, float* out) {
    rms_norm(x, weight, size, size, eps, out);
}

void probe_rotate(int size, const float* head, const float* norm, float eps, const float* cos,
                  const float* sin, float* out) {
    rotate(head, norm, size, eps, cos, sin, out);
}

int64_t probe_choose(float* logits, int width, float temperature, float top_p, float min_p,
                     float repetition, float presence, float frequency, int64_t top_k, int64_t seed,
                     int64_t choice, int64_t position, int64_t seen, const int32_t* ids,
                     const float* generated) {
    static thread_local Sampler sampler;
    return sampler.choose(logits, width,
                          {temperature,
                           top_p,
                           min_p,
                           repetition,
                           presence,
                           frequency,
                           top_k,
                           uniform(uint64_t(seed), uint64_t(choice), uint64_t(position)),
                           {seen, ids, generated}});
}

// Whose thread did each of `count` jobs, in two runs of two rounds each; the jobs of the last
// thread take 100 ms. In the second run the caller may be alone. who: [4][count], of zeros; each
// job adds 100 and its thread's number.
void probe_spread(int threads, int count, int alone, int32_t* who) {
    Team team(threads);
    for (int run = 0; run < 2; run++) {
        team.set_alone(run == 1 && alone);
        team.run([&](int thread) {
            for (int round = 2 * run; round < 2 * run + 2; round++) {
                const auto share_of = [&](int whose) { return Share(count, whose, team.size()); };
                team.spread(thread, share_of, [&](int i, Share) {
                    if (thread > 0 && thread == threads - 1)
                        std::this_thread::sleep_for(std::chrono::milliseconds(100));
                    who[round * count + i] += 100 + thread;
                });
                if (round == 2 * run) team.barrier();
            }
        });
    }
}

// The best of panels that are looked at in the order of `panels`, by two who are merged.
int64_t probe_best(const float* logits, int count, const int32_t* panels) {
    Best best[2];
    for (int i = 0; i < count; i++)
        best[i % 2].look_at(logits + panels[i] * PANEL, panels[i] * PANEL);
    best[0].merge(best[1]);
    return best[0].failed ? -1 : best[0].id;
}

double probe_uniform(int64_t seed, int64_t choice, int64_t position) {
    return uniform(uint64_t(seed), uint64_t(choice), uint64_t(position));
}
}
