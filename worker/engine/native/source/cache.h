// The paged KV cache: blocks of BLOCK tokens, for each head first the keys, then the values.
#pragma once

#include "memory.h"
#include "simd.h"

namespace rts {

constexpr int BLOCK = 32;  // tokens; worker.engine.blocks.BLOCK_SIZE
constexpr int HALF = 16;   // tokens that lie side by side in the keys

// Keys and values lie as the multiplications read them, so that nothing is laid out again when
// they are used: for the scores the inner dimension is that of the head, for the result it is the
// tokens.
//   keys:   [2 halves][key_size / DEPTH][HALF tokens][DEPTH]
//   values: [BLOCK / DEPTH tokens][value_size][DEPTH]
// A half of the keys, and 16 columns of the values, are tiles of AMX as they are.
template <class T>
class Cache {
 public:
    Cache() = default;
    Cache(Memory& memory, int layers, int blocks, int kv_heads, int head_size)
        : layers_(layers),
          blocks_(blocks),
          heads_(kv_heads),
          head_size_(head_size),
          key_size_(round_up(head_size, 32)),
          numbers_(memory.zeros<T>(size_t(layers) * blocks * block_size())) {}

    size_t block_size() const { return size_t(heads_) * (key_size_ + head_size_) * BLOCK; }
    int head_size() const { return head_size_; }
    int key_size() const { return key_size_; }  // padded with zeros to whole tiles

    T* keys(int layer, int64_t block, int head) {
        return numbers_.data() + (size_t(layer) * blocks_ + block) * block_size() +
               size_t(head) * (key_size_ + head_size_) * BLOCK;
    }
    T* values(int layer, int64_t block, int head) {
        return keys(layer, block, head) + size_t(key_size_) * BLOCK;
    }

    // key, value: [head_size].
    void write(int layer, int64_t block, int head, int offset, const T* key, const T* value) {
        constexpr int D = DEPTH<T>;
        T* k = keys(layer, block, head) + size_t(offset / HALF) * key_size_ * HALF;
        T* v = values(layer, block, head) + size_t(offset / D) * head_size_ * D + offset % D;
        k += offset % HALF * D;
        for (int d = 0; d < head_size_; d += D) std::memcpy(k + d * HALF, key + d, D * sizeof(T));
        for (int d = 0; d < head_size_; d++) v[d * D] = value[d];
    }

    void clear(int64_t block) {
        for (int layer = 0; layer < layers_; layer++)
            std::memset(keys(layer, block, 0), 0, block_size() * sizeof(T));
    }

 private:
    int layers_ = 0, blocks_ = 0, heads_ = 0, head_size_ = 0, key_size_ = 0;
    Array<T> numbers_;
};

}  // namespace rts
