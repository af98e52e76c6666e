#include "model.h"

#include <stdexcept>

namespace rts {
namespace {

// Rows of one sequence and one head of its cache, attended to by one thread.
struct Piece {
    int row, count, head;
    // Of all rows of its sequence in this step: what it looks at, nobody else writes.
    bool whole;
    int64_t cost;
};

// Long prompts are cut, so that threads share them.
constexpr int PIECE_ROWS = 64;

[[noreturn]] void refuse(const std::string& why) { throw std::invalid_argument(why); }

void expect(int64_t got, int64_t want, const char* what) {
    if (got != want)
        refuse(std::string(what) + " has " + std::to_string(got) + " numbers, not " +
               std::to_string(want));
}

template <class T>
struct Layer {
    rts_layer asks;
    Array<float> norm_attention, norm_attention_out, norm_ffn, norm_ffn_out;
    Array<float> norm_query, norm_key;
    Matrix<T> qkv, out, gate_up, down;
};

template <class T>
class Decoder final : public Engine {
 public:
    Decoder(const rts_shape& shape, const rts_layer* layers)
        : shape_(shape),
          team_(shape.threads),
          width_(round_up(shape.hidden, PANEL)),
          qkv_width_(round_up((shape.heads + 2 * shape.kv_heads) * shape.head_size, PANEL)),
          attention_width_(round_up(shape.heads * shape.head_size, PANEL)),
          ffn_width_(round_up(shape.ffn, PANEL)),
          vocab_width_(round_up(shape.vocab, PANEL)),
          cache_(memory_, shape.layers, shape.blocks, shape.kv_heads, shape.head_size),
          layers_(shape.layers),
          cos_(shape.rope_tables),
          sin_(shape.rope_tables),
          samplers_(shape.threads) {
        for (int i = 0; i < shape.layers; i++) layers_[i].asks = layers[i];
        const size_t rows = round_up(shape.most_rows, PANEL_ROWS),
                     outs = round_up(shape.most_outs, PANEL_ROWS);
        x_ = memory_.zeros<float>(rows * width_);
        y_ = memory_.zeros<float>(rows * width_);
        h_ = memory_.zeros<Operand<T>>(std::max(rows, outs) * width_);
        qkv_ = memory_.zeros<T>(rows * qkv_width_);
        attention_ = memory_.zeros<Operand<T>>(rows * attention_width_);
        ffn_ = memory_.zeros<Operand<T>>(rows * ffn_width_);
        logits_ = memory_.zeros<float>(outs * vocab_width_);
#if RTS_TILES
        for (int i = 0; i < shape.threads; i++) scratch_.push_back(std::make_unique<TileScratch>());
#endif
    }

    void set(int layer, int part, const void* data, int64_t count) override {
        const bool of_layer = part < RTS_EMBEDDING;
        const bool of_table = part == RTS_ROPE_COS || part == RTS_ROPE_SIN;
        const int most = of_layer ? shape_.layers : of_table ? shape_.rope_tables : 0;
        if (of_layer || of_table ? layer < 0 || layer >= most : layer != -1)
            refuse("there is no layer or table " + std::to_string(layer));
        if (!data) refuse("a part needs data");
        if (of_layer)
            set_layer(layers_[layer], part, data, count);
        else
            set_model(layer, part, data, count);
    }

    void check_complete() const override {
        const auto need = [](bool there, const char* what) {
            if (!there) refuse(std::string(what) + " is missing");
        };
        for (const auto& l : layers_) {
            need(!l.norm_attention.empty() && !l.norm_ffn.empty(), "a norm");
            need(l.norm_query.empty() == l.norm_key.empty(), "the other norm of queries and keys");
            need(l.norm_attention_out.empty() == l.norm_ffn_out.empty(),
                 "the other norm of results");
            need(l.qkv.outputs && l.out.outputs && l.gate_up.outputs && l.down.outputs, "a matrix");
        }
        need(!embedding_.empty(), "the embedding");
        need(!norm_final_.empty(), "the final norm");
        need(head_.outputs, "the head");
        for (const auto& table : cos_) need(!table.empty(), "a table of cosines");
        for (const auto& table : sin_) need(!table.empty(), "a table of sines");
    }

    void step(const rts_step& step, int64_t* tokens) override {
        if (step.temperature && !tokens) refuse("tokens need a place");
        check(step);
        plan(step);
        best_.assign(size_t(team_.size()) * step.outs, Best());
        team_.run([&](int thread) {
            Tiles tiles;
            forward(step, thread);
            if (step.temperature) {
                team_.barrier();
                draw(step, tokens, thread);
            }
        });
    }

    const float* logits() const override { return logits_.data(); }
    int logits_stride() const override { return vocab_width_; }

    void clear(int64_t block) override {
        if (block < 0 || block >= shape_.blocks)
            refuse("there is no block " + std::to_string(block));
        cache_.clear(block);
    }

    void set_alone(bool alone) override { team_.set_alone(alone); }

 private:
    void set_layer(Layer<T>& l, int part, const void* data, int64_t count) {
        const int64_t hidden = shape_.hidden, heads = int64_t(shape_.heads) * shape_.head_size;
        const int64_t qkv = heads + 2 * int64_t(shape_.kv_heads) * shape_.head_size;
        switch (part) {
            case RTS_NORM_ATTENTION: return set_vector(l.norm_attention, data, count, hidden);
            case RTS_NORM_ATTENTION_OUT:
                return set_vector(l.norm_attention_out, data, count, hidden);
            case RTS_NORM_FFN: return set_vector(l.norm_ffn, data, count, hidden);
            case RTS_NORM_FFN_OUT: return set_vector(l.norm_ffn_out, data, count, hidden);
            case RTS_NORM_QUERY: return set_vector(l.norm_query, data, count, shape_.head_size);
            case RTS_NORM_KEY: return set_vector(l.norm_key, data, count, shape_.head_size);
            case RTS_QKV: return set_matrix(l.qkv, data, count, qkv, hidden, Order::plain);
            case RTS_QKV_BIAS: return set_bias(l.qkv, data, count, Order::plain);
            case RTS_OUT: return set_matrix(l.out, data, count, hidden, heads, Order::plain);
            case RTS_OUT_BIAS: return set_bias(l.out, data, count, Order::plain);
            case RTS_GATE_UP:
                return set_matrix(l.gate_up, data, count, 2 * int64_t(shape_.ffn), hidden,
                                  Order::gate_up);
            case RTS_GATE_UP_BIAS: return set_bias(l.gate_up, data, count, Order::gate_up);
            case RTS_DOWN: return set_matrix(l.down, data, count, hidden, shape_.ffn, Order::plain);
            case RTS_DOWN_BIAS: return set_bias(l.down, data, count, Order::plain);
            default: refuse("there is no part " + std::to_string(part));
        }
    }

    void set_model(int index, int part, const void* data, int64_t count) {
        const int64_t table = int64_t(shape_.positions) * (shape_.head_size / 2);
        switch (part) {
            case RTS_EMBEDDING:
                expect(count, int64_t(shape_.vocab) * shape_.hidden, "the embedding");
                embedding_ = memory_.zeros<T>(count);
                std::memcpy(embedding_.data(), data, count * sizeof(T));
                return;
            case RTS_NORM_FINAL: return set_vector(norm_final_, data, count, shape_.hidden);
            case RTS_HEAD:
                set_matrix(head_, data, count, shape_.vocab, shape_.hidden, Order::plain);
                if (head_.bias.empty()) head_.bias = beyond_vocabulary();
                return;
            case RTS_HEAD_BIAS: {
                set_bias(head_, data, count, Order::plain);
                for (int j = shape_.vocab; j < vocab_width_; j++) head_.bias[j] = -INFINITY;
                return;
            }
            case RTS_ROPE_COS: return set_vector(cos_[index], data, count, table);
            case RTS_ROPE_SIN: return set_vector(sin_[index], data, count, table);
            default: refuse("there is no part " + std::to_string(part));
        }
    }

    // What fills up the last panel of the logits must never be drawn.
    Array<float> beyond_vocabulary() {
        if (vocab_width_ == shape_.vocab) return {};
        auto bias = memory_.zeros<float>(vocab_width_);
        for (int j = shape_.vocab; j < vocab_width_; j++) bias[j] = -INFINITY;
        return bias;
    }

    void set_vector(Array<float>& to, const void* data, int64_t count, int64_t want) {
        expect(count, want, "a vector");
        // Padded with zeros: rows are computed in whole panels.
        to = memory_.zeros<float>(round_up(int(count), PANEL));
        std::memcpy(to.data(), data, count * sizeof(float));
    }

    void set_matrix(Matrix<T>& to, const void* data, int64_t count, int64_t outputs, int64_t inputs,
                    Order order) {
        expect(count, outputs * inputs, "a matrix");
        to = pack(memory_, team_, static_cast<const T*>(data), int(outputs), int(inputs), order);
    }

    void set_bias(Matrix<T>& to, const void* data, int64_t count, Order order) {
        if (!to.outputs) refuse("a bias comes after its matrix");
        expect(count, to.outputs, "a bias");
        to.bias = pack_bias(memory_, to, static_cast<const float*>(data), order);
    }

    // Everything that is used as an index, before anything is touched.
    void check(const rts_step& s) const {
        const auto inside = [](int64_t x, int64_t end) { return x >= 0 && x < end; };
        if (s.rows < 1 || s.rows > shape_.most_rows)
            refuse("a step of " + std::to_string(s.rows) + " rows; the most is " +
                   std::to_string(shape_.most_rows));
        if (!inside(s.outs, shape_.most_outs + 1))
            refuse("logits of " + std::to_string(s.outs) + " rows; the most is " +
                   std::to_string(shape_.most_outs));
        if (!s.ids || !s.positions || !s.sequence || !s.table || (s.outs && !s.out_rows))
            refuse("a step lacks an array");
        for (int64_t r = 0; r < s.rows; r++) {
            if (!inside(s.ids[r], shape_.vocab))
                refuse("id " + std::to_string(s.ids[r]) + " is outside the vocabulary");
            if (!inside(s.positions[r], shape_.positions))
                refuse("position " + std::to_string(s.positions[r]) + " is outside the context");
            if (!inside(s.sequence[r], s.sequences)) refuse("a row is of no sequence");
            const bool same = r && s.sequence[r] == s.sequence[r - 1];
            if (same ? s.positions[r] != s.positions[r - 1] + 1
                     : s.sequence[r] != (r ? s.sequence[r - 1] + 1 : 0))
                refuse("the rows of a sequence are not in order");
            const bool last = r + 1 == s.rows || s.sequence[r + 1] != s.sequence[r];
            if (last) check_blocks(s, s.sequence[r], s.positions[r]);
        }
        for (int64_t i = 0; i < s.outs; i++)
            if (!inside(s.out_rows[i], s.rows)) refuse("logits of a row that is not there");
        if (s.temperature) check_draws(s);
    }

    void check_blocks(const rts_step& s, int64_t sequence, int64_t position) const {
        if (position / BLOCK >= s.table_width) refuse("a sequence has too few blocks");
        for (int64_t b = 0; b <= position / BLOCK; b++) {
            const int64_t block = s.table[sequence * s.table_width + b];
            if (block < 0 || block >= shape_.blocks)
                refuse("there is no block " + std::to_string(block));
        }
    }

    void check_draws(const rts_step& s) const {
        if (!s.top_p || !s.min_p || !s.repetition || !s.presence || !s.frequency || !s.top_k ||
            !s.seed || !s.choice || !s.position || !s.seen_start)
            refuse("a draw lacks an array");
        for (int64_t i = 0; i < s.outs; i++) {
            const int64_t from = s.seen_start[i], to = s.seen_start[i + 1];
            if (from < 0 || to < from || (to > from && (!s.seen_ids || !s.seen_generated)))
                refuse("a draw lacks an array");
            for (int64_t j = from; j < to; j++)
                if (s.seen_ids[j] < 0 || s.seen_ids[j] >= shape_.vocab)
                    refuse("a seen id is outside the vocabulary");
            if (s.top_k[i] < 0) refuse("top_k is negative");
        }
    }

    // Which piece of the attention is whose: the same in all layers. Neighbours stay together, and
    // each thread gets about the same number of keys to look at.
    void plan(const rts_step& s) {
        pieces_.clear();
        shared_rows_.clear();
        int64_t total = 0;
        for (int r = 0; r < s.rows;) {
            int n = 1;
            while (r + n < s.rows && n < PIECE_ROWS && s.sequence[r + n] == s.sequence[r]) n++;
            const bool begins = r == 0 || s.sequence[r - 1] != s.sequence[r];
            const bool ends = r + n == s.rows || s.sequence[r + n] != s.sequence[r];
            const bool whole = begins && ends;
            if (!whole)
                for (int i = 0; i < n; i++) shared_rows_.push_back(r + i);
            for (int h = 0; h < shape_.kv_heads; h++) {
                // What a row costs beside its keys is about that of 48 of them.
                const int64_t cost = int64_t(n) * (s.positions[r + n - 1] + 48);
                pieces_.push_back({r, n, h, whole, total + cost / 2});
                total += cost;
            }
            r += n;
        }
        shares_.assign(team_.size() + 1, int(pieces_.size()));
        shares_[0] = 0;
        for (int t = 1, p = 0; t < team_.size(); t++) {
            while (p < int(pieces_.size()) && pieces_[p].cost < total * t / team_.size()) p++;
            shares_[t] = p;
        }
    }

    void forward(const rts_step& s, int thread) {
        const int rows = int(s.rows), threads = team_.size();
        const Share own(rows, thread, threads);
        for (int r = own.first; r < own.last; r++)
            embed(embedding_.data() + size_t(s.ids[r]) * shape_.hidden, shape_.hidden, width_,
                  shape_.embedding_scale, row(x_, r, width_));
        for (int i = 0; i < shape_.layers; i++) {
            Layer<T>& l = layers_[i];
            normalize(own, l.norm_attention);
            team_.barrier();
            multiply(team_, thread, h_.data(), width_, rows, l.qkv,
                     [&](int p, int r, const float* values) {
                         T* to = row(qkv_, r, qkv_width_) + p * PANEL;
                         for (int j = 0; j < PANEL; j += LANES) store(to + j, load(values + j));
                     });
            team_.barrier();
            place_shared(s, i, thread);
            team_.spread(
                thread, [&](int whose) { return Share(shares_[whose], shares_[whose + 1]); },
                [&](int p, Share) { attend(s, i, pieces_[p], thread); });
            team_.barrier();
            add_product(attention_.data(), attention_width_, rows, l.out, thread,
                        !l.norm_attention_out.empty());
            team_.barrier();
            if (!l.norm_attention_out.empty()) add_normalized(own, l.norm_attention_out);
            normalize(own, l.norm_ffn);
            team_.barrier();
            const auto activation = Activation(shape_.activation);
            multiply(team_, thread, h_.data(), width_, rows, l.gate_up,
                     [&](int p, int r, const float* values) {
                         gate(activation, values, row(ffn_, r, ffn_width_) + p * 16);
                     });
            team_.barrier();
            add_product(ffn_.data(), ffn_width_, rows, l.down, thread, !l.norm_ffn_out.empty());
            team_.barrier();
            if (!l.norm_ffn_out.empty()) add_normalized(own, l.norm_ffn_out);
        }
        // Another thread may have added to a row, but all of that is behind a barrier, except for
        // results that are normalized first.
        if (!layers_.empty() && !layers_.back().norm_ffn_out.empty()) team_.barrier();
        const int outs = int(s.outs);
        const Share out(outs, thread, threads);
        for (int i = out.first; i < out.last; i++)
            rms_norm(row(x_, int(s.out_rows[i]), width_), norm_final_.data(), shape_.hidden, width_,
                     shape_.norm_eps, row(h_, i, width_));
        team_.barrier();
        Best* best = best_.data() + size_t(thread) * outs;
        multiply(team_, thread, h_.data(), width_, outs, head_, [&](int p, int r, float* values) {
            if (shape_.logit_soft_cap) cap_logits(p, values);
            if (is_plain(s, r)) return best[r].look_at(values, p * PANEL);
            float* to = row(logits_, r, vocab_width_) + p * PANEL;
            for (int j = 0; j < PANEL; j += LANES) store(to + j, load(values + j));
        });
    }

    template <class A>
    static A* row(Array<A>& array, int index, int width) {
        return array.data() + size_t(index) * width;
    }

    void normalize(Share own, const Array<float>& weight) {
        for (int r = own.first; r < own.last; r++)
            rms_norm(row(x_, r, width_), weight.data(), shape_.hidden, width_, shape_.norm_eps,
                     row(h_, r, width_));
    }

    // x += a W'. With `apart` the product is kept in y, to be normalized first.
    void add_product(const Operand<T>* a, int stride, int rows, const Matrix<T>& m, int thread,
                     bool apart) {
        multiply(team_, thread, a, stride, rows, m, [&](int p, int r, const float* values) {
            float* to = row(apart ? y_ : x_, r, width_) + p * PANEL;
            if (apart)
                std::memcpy(to, values, PANEL * sizeof(float));
            else
                add_to(to, values, PANEL);
        });
    }

    void add_normalized(Share own, const Array<float>& weight) {
        for (int r = own.first; r < own.last; r++) {
            float* y = row(y_, r, width_);
            rms_norm(y, weight.data(), shape_.hidden, width_, shape_.norm_eps, y);
            add_to(row(x_, r, width_), y, width_);
        }
    }

    // Places what several pieces look at. What only one looks at is placed by whoever attends to
    // it: there it is near, and no thread waits for another's.
    void place_shared(const rts_step& s, int layer, int thread) {
        if (shared_rows_.empty()) return;
        const Share own(int(shared_rows_.size()) * shape_.kv_heads, thread, team_.size());
        for (int u = own.first; u < own.last; u++)
            place(s, layer, shared_rows_[u / shape_.kv_heads], u % shape_.kv_heads);
        team_.barrier();
    }

    // Rotates the queries that share a head of keys, and writes that head into the cache.
    void place(const rts_step& s, int layer, int r, int kv_head) {
        const Layer<T>& l = layers_[layer];
        const int size = shape_.head_size, group = shape_.heads / shape_.kv_heads;
        const int64_t position = s.positions[r];
        const float* cos = cos_[l.asks.rope_table].data() + position * (size / 2);
        const float* sin = sin_[l.asks.rope_table].data() + position * (size / 2);
        const auto norm = [](const Array<float>& a) { return a.empty() ? nullptr : a.data(); };
        alignas(64) float rotated[MOST_HEAD_SIZE];
        T* q = row(qkv_, r, qkv_width_) + size_t(kv_head) * group * size;
        for (int g = 0; g < group; g++, q += size) {
            rotate(q, norm(l.norm_query), size, shape_.norm_eps, cos, sin, rotated);
            for (int j = 0; j < size; j += LANES) store(q + j, load(rotated + j));
        }
        T* k = row(qkv_, r, qkv_width_) + size_t(shape_.heads + kv_head) * size;
        rotate(k, norm(l.norm_key), size, shape_.norm_eps, cos, sin, rotated);
        for (int j = 0; j < size; j += LANES) store(k + j, load(rotated + j));
        const int64_t block = s.table[s.sequence[r] * s.table_width + position / BLOCK];
        cache_.write(layer, block, kv_head, int(position % BLOCK), k,
                     k + size_t(shape_.kv_heads) * size);
    }

    void attend(const rts_step& s, int layer, const Piece& piece, [[maybe_unused]] int thread) {
        if (piece.whole)
            for (int i = 0; i < piece.count; i++) place(s, layer, piece.row + i, piece.head);
        const rts_layer& asks = layers_[layer].asks;
        const Look look{asks.scale, asks.window, asks.soft_cap};
        const int group = shape_.heads / shape_.kv_heads, size = shape_.head_size;
        const Context<T> context{&cache_, layer, piece.head,
                                 s.table + s.sequence[piece.row] * s.table_width};
        const size_t offset = size_t(piece.head) * group * size;
        const QueryRows<T> rows{group,
                                row(qkv_, piece.row, qkv_width_) + offset,
                                size_t(qkv_width_),
                                row(attention_, piece.row, attention_width_) + offset,
                                size_t(attention_width_),
                                int(s.positions[piece.row])};
#if RTS_TILES
        // The two kernels round differently: an exact engine has only one of them.
        if constexpr (sizeof(T) == sizeof(bf16))
            if (piece.count > 1 && !shape_.exact)
                return attend_in_tiles(piece.count, rows, context, look, *scratch_[thread]);
#endif
        attend_rows(piece.count, rows, context, look);
    }

    void cap_logits(int panel, float* values) const {
        soft_cap(values, PANEL, shape_.logit_soft_cap);
        for (int j = std::max(0, shape_.vocab - panel * PANEL); j < PANEL; j++)
            values[j] = -INFINITY;
    }

    // Whether a row's token is just its most likely one: then its logits are not even stored.
    static bool is_plain(const rts_step& s, int i) {
        return s.temperature && s.temperature[i] < GREEDY && s.seen_start[i] == s.seen_start[i + 1];
    }

    int64_t best_of(int i, int outs) const {
        Best best;
        for (int t = 0; t < team_.size(); t++) best.merge(best_[size_t(t) * outs + i]);
        return best.failed || !std::isfinite(best.value) ? FAILED : best.id;
    }

    void draw(const rts_step& s, int64_t* tokens, int thread) {
        const Share own(int(s.outs), thread, team_.size());
        for (int i = own.first; i < own.last; i++) {
            if (is_plain(s, i)) {
                tokens[i] = best_of(i, int(s.outs));
                continue;
            }
            const int64_t from = s.seen_start[i], count = s.seen_start[i + 1] - from;
            const Seen seen{count, s.seen_ids + from, s.seen_generated + from};
            const Draw draw{
                s.temperature[i],
                s.top_p[i],
                s.min_p[i],
                s.repetition[i],
                s.presence[i],
                s.frequency[i],
                s.top_k[i],
                uniform(uint64_t(s.seed[i]), uint64_t(s.choice[i]), uint64_t(s.position[i])),
                seen};
            tokens[i] = samplers_[thread].choose(row(logits_, i, vocab_width_), vocab_width_, draw);
        }
    }

    const rts_shape shape_;
    Memory memory_;
    Team team_;
    // Of rows, rounded up to whole panels.
    const int width_, qkv_width_, attention_width_, ffn_width_, vocab_width_;
    Cache<T> cache_;
    std::vector<Layer<T>> layers_;
    Array<T> embedding_;
    Array<float> norm_final_;
    Matrix<T> head_;
    std::vector<Array<float>> cos_, sin_;
    // x: the residual stream. y: a product that is normalized before it is added. h: what is
    // multiplied. One row of each a row of the step.
    Array<float> x_, y_, logits_;
    Array<T> qkv_;
    Array<Operand<T>> h_, attention_, ffn_;
    std::vector<Piece> pieces_;
    std::vector<int> shared_rows_;  // of pieces that are not whole
    std::vector<int> shares_;
    std::vector<Sampler> samplers_;
    std::vector<Best> best_;  // [threads][outs]
#if RTS_TILES
    std::vector<std::unique_ptr<TileScratch>> scratch_;
#endif
};

void check_shape(const rts_shape& s, const rts_layer* layers) {
    const auto between = [](int64_t x, int64_t low, int64_t high, const char* what) {
        if (x < low || x > high)
            refuse(std::string(what) + " is " + std::to_string(x) + ", not " + std::to_string(low) +
                   " to " + std::to_string(high));
    };
    between(s.dtype, RTS_BF16, RTS_F32, "dtype");
    between(s.activation, RTS_SILU, RTS_GELU_TANH, "activation");
    between(s.layers, 1, 4096, "layers");
    between(s.hidden, 1, 1 << 20, "hidden");
    between(s.kv_heads, 1, 4096, "kv_heads");
    between(s.heads, 1, 4096, "heads");
    between(s.head_size, 16, MOST_HEAD_SIZE, "head_size");
    if (s.head_size % 16) refuse("head_size is not a multiple of 16");
    if (s.heads % s.kv_heads) refuse("heads is not a multiple of kv_heads");
    between(s.ffn, 1, 1 << 24, "ffn");
    between(s.vocab, 1, 1 << 24, "vocab");
    between(s.rope_tables, 1, 16, "rope_tables");
    between(s.positions, 1, 1 << 24, "positions");
    between(s.blocks, 1, 1 << 28, "blocks");
    between(s.most_rows, 1, 1 << 16, "most_rows");
    between(s.most_outs, 1, 1 << 16, "most_outs");
    between(s.threads, 1, 1024, "threads");
    for (int i = 0; i < s.layers; i++) {
        between(layers[i].rope_table, 0, s.rope_tables - 1, "rope_table");
        between(layers[i].window, 0, 1 << 24, "window");
    }
}

}  // namespace

std::unique_ptr<Engine> make_engine(const rts_shape& shape, const rts_layer* layers) {
    check_shape(shape, layers);
    if (shape.dtype == RTS_BF16) return std::make_unique<Decoder<bf16>>(shape, layers);
    return std::make_unique<Decoder<float>>(shape, layers);
}

}  // namespace rts
