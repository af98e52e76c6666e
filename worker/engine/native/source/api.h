// The C interface of the native backend. Functions return 0, or -1 and leave a sentence in
// rts_error(engine). One thread at a time uses an engine; a process may have several.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Changes with every change of this file: a library built from another version is not used.
#define RTS_API_VERSION 1

enum { RTS_BF16 = 0, RTS_F32 = 1 };
enum { RTS_SILU = 0, RTS_GELU_TANH = 1 };

// What does not change while an engine lives.
typedef struct {
    int32_t dtype;       // of weights, activations and cache
    int32_t activation;  // of the gated feed-forward part
    int32_t layers, hidden, heads, kv_heads, head_size, ffn, vocab;
    int32_t rope_tables;  // 1, or 2 where kinds of layers have their own
    int32_t positions;    // of the rotary tables: longest context
    int32_t blocks;       // of the cache, 32 tokens each
    int32_t most_rows;    // of a step
    int32_t most_outs;    // rows of a step whose logits are wanted
    int32_t threads;      // the caller included
    int32_t exact;        // a row's result is the same in every batch and every piece
    float norm_eps;
    float embedding_scale;
    float logit_soft_cap;  // 0 for none
} rts_shape;

typedef struct {
    int32_t rope_table;
    int32_t window;  // positions that a row sees, itself included; 0 for all
    float scale;     // of the scores
    float soft_cap;  // of the scores; 0 for none
} rts_layer;

// Parts of a layer. Matrices are [outputs][inputs] in the engine's dtype; norms, biases and
// tables are float32. Those marked optional may be left out.
enum {
    RTS_NORM_ATTENTION = 0,      // [hidden], before attention
    RTS_NORM_ATTENTION_OUT = 1,  // [hidden], after it (optional, with the next but one)
    RTS_NORM_FFN = 2,            // [hidden], before the feed-forward part
    RTS_NORM_FFN_OUT = 3,        // [hidden], after it (optional)
    RTS_NORM_QUERY = 4,          // [head_size] (optional, with the next)
    RTS_NORM_KEY = 5,            // [head_size]
    RTS_QKV = 6,                 // [(heads + 2 kv_heads) * head_size][hidden]
    RTS_QKV_BIAS = 7,            // (optional, like all biases)
    RTS_OUT = 8,                 // [hidden][heads * head_size]
    RTS_OUT_BIAS = 9,
    RTS_GATE_UP = 10,  // [2 ffn][hidden], the gate first
    RTS_GATE_UP_BIAS = 11,
    RTS_DOWN = 12,  // [hidden][ffn]
    RTS_DOWN_BIAS = 13,
    // Parts of the model; the layer is -1, or the index of the table.
    RTS_EMBEDDING = 20,   // [vocab][hidden]
    RTS_NORM_FINAL = 21,  // [hidden]
    RTS_HEAD = 22,        // [vocab][hidden]
    RTS_HEAD_BIAS = 23,
    RTS_ROPE_COS = 24,  // [positions][head_size / 2]
    RTS_ROPE_SIN = 25,
};

// One step; see worker/engine/backend.py. Rows of a sequence are neighbours, positions ascending
// by one. With `temperature` null there is nothing to draw, only logits.
typedef struct {
    int64_t rows, sequences, table_width, outs;
    const int64_t* ids;        // [rows]
    const int64_t* positions;  // [rows]
    const int64_t* sequence;   // [rows], not falling, from 0
    const int64_t* table;      // [sequences][table_width], -1 where there is no block
    const int64_t* out_rows;   // [outs]
    const float* temperature;  // [outs], like all of the following
    const float* top_p;
    const float* min_p;
    const float* repetition;
    const float* presence;
    const float* frequency;
    const int64_t* top_k;
    const int64_t* seed;
    const int64_t* choice;
    const int64_t* position;
    const int64_t* seen_start;  // [outs + 1]: where each row's seen ids begin
    const int32_t* seen_ids;
    const float* seen_generated;
} rts_step;

typedef struct rts_engine rts_engine;

int rts_api_version(void);
// Null when there is no memory or the shape makes no sense; then `error` says why.
rts_engine* rts_create(const rts_shape* shape, const rts_layer* layers, char* error,
                       int64_t error_size);
void rts_destroy(rts_engine* engine);
const char* rts_error(rts_engine* engine);
// Copies a part; `count` numbers are checked against the shape.
int rts_set(rts_engine* engine, int32_t layer, int32_t part, const void* data, int64_t count);
// Whether all parts are there.
int rts_complete(rts_engine* engine);
// tokens: [outs], -1 where the logits are no numbers; may be null if nothing is drawn.
int rts_run(rts_engine* engine, const rts_step* step, int64_t* tokens);
// Of the last step that drew nothing, [outs][stride], valid until the next.
const float* rts_logits(rts_engine* engine, int64_t* stride);
int rts_clear(rts_engine* engine, int64_t block);
// Whether the caller computes without the other threads, until it is told otherwise.
void rts_alone(rts_engine* engine, int alone);

#ifdef __cplusplus
}
#endif
