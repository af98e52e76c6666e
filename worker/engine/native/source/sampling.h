// The next token of one row of logits.
//
// The order of what is done is vLLM's: penalties, temperature, min_p, top_k, top_p. The whole
// vocabulary is never sorted: candidates are the few logits above a threshold, which is lowered
// until they suffice. A row's token depends on its logits, its parameters and its random number
// alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "matrix.h"
#include "simd.h"

namespace rts {

constexpr int64_t FAILED = -1;   // the largest logit is no finite number
constexpr float GREEDY = 1e-5f;  // temperatures below are zero

// Ids that a row has seen, and how often it generated each.
struct Seen {
    int64_t count;
    const int32_t* ids;
    const float* generated;  // 0 for those of the prompt alone
};

struct Draw {
    float temperature, top_p, min_p;
    float repetition, presence, frequency;
    int64_t top_k;
    double uniform;  // in [0, 1)
    Seen seen;
};

// Splitmix64 over (seed, choice, position), as in worker/engine/randomness.py.
inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
inline double uniform(uint64_t seed, uint64_t choice, uint64_t position) {
    constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;
    uint64_t state = mix(seed + GAMMA);
    state = mix((state ^ choice) + GAMMA);
    return double(mix(state + (position + 1) * GAMMA) >> 11) * 0x1p-53;
}

// The most likely token of those that were looked at, the first of equals.
struct Best {
    float value = -INFINITY;
    int32_t id = 0;
    bool failed = false;  // one was no number

    // values: PANEL logits, of the ids from `first` on. Calls may come in any order.
    void look_at(const float* values, int first) {
        Vec high = broadcast(-INFINITY);
        uint32_t bad = 0;
        for (int j = 0; j < PANEL; j += LANES) {
            bad |= no_numbers(load(values + j));
            high = max(high, load(values + j));
        }
        failed |= bad != 0;
        const float most = largest(high);
        if (!is_better(most, first)) return;
        value = most;
        for (int j = 0; j < PANEL; j += LANES)
            if (uint32_t found = not_below(load(values + j), broadcast(most))) {
                id = first + j + __builtin_ctz(found);
                return;
            }
    }

    void merge(const Best& other) {
        failed |= other.failed;
        if (is_better(other.value, other.id)) value = other.value, id = other.id;
    }

 private:
    bool is_better(float its_value, int its_id) const {
        return its_value > value || (its_value == value && its_id < id);
    }
};

class Sampler {
 public:
    // logits: [width], width a multiple of PANEL; what is beyond the vocabulary is -infinity.
    int64_t choose(float* logits, int width, const Draw& draw) {
        punish(logits, draw);
        if (!survey(logits, width)) return FAILED;
        if (draw.temperature < GREEDY) return first_at_least(logits, width, most_);
        if (draw.top_k == 0 && draw.top_p >= 1 && draw.min_p <= 0)
            return from_all(logits, width, draw);
        return from_best(logits, width, draw);
    }

 private:
    static constexpr int STRIPE = 256;
    static constexpr int FEW = 64;
    static constexpr int LIMITS = 7;

    struct Candidate {
        float logit;
        int32_t id;
        double weight;
    };

    static void punish(float* logits, const Draw& draw) {
        constexpr float MOST = std::numeric_limits<float>::max();
        for (int64_t i = 0; i < draw.seen.count; i++) {
            float& x = logits[draw.seen.ids[i]];
            if (!std::isfinite(x)) continue;
            float y = x > 0 ? x / draw.repetition : x * draw.repetition;
            const float times = draw.seen.generated[i];
            y -= draw.frequency * times;
            if (times > 0) y -= draw.presence;
            // A finite logit stays one: a row that can be sampled from still can be.
            x = std::clamp(y, -MOST, MOST);
        }
    }

    // The largest logit of each panel and of all; false if that is no finite number.
    bool survey(const float* logits, int width) {
        panels_.resize(width / PANEL);
        uint32_t bad = 0;
        Vec most = broadcast(-INFINITY);
        for (int p = 0; p < width / PANEL; p++) {
            Vec high = broadcast(-INFINITY);
            for (int j = 0; j < PANEL; j += LANES) {
                Vec x = load(logits + p * PANEL + j);
                bad |= no_numbers(x);
                high = max(high, x);
            }
            panels_[p] = largest(high);
            most = max(most, high);
        }
        most_ = largest(most);
        return !bad && std::isfinite(most_);
    }

    static int64_t first_at_least(const float* logits, int width, float limit) {
        for (int j = 0; j < width; j += LANES)
            if (uint32_t found = not_below(load(logits + j), broadcast(limit)))
                return j + __builtin_ctz(found);
        return FAILED;
    }

    // Weights e^((logit - most) / temperature), in (0, 1]; returns their sum.
    double weigh_all(const float* logits, int width, float temperature) {
        const Vec shift = broadcast(most_), heat = broadcast(1 / temperature);
        weights_.resize(width);
        for (int j = 0; j < width; j += LANES)
            store(weights_.data() + j, exp(mul(sub(load(logits + j), shift), heat)));
        return sum_from(0);
    }

    // Sum of the weights that are not below the limit; of each stripe, too.
    double sum_from(float limit) {
        const int width = int(weights_.size());
        stripes_.resize((width + STRIPE - 1) / STRIPE);
        double total = 0;
        for (size_t s = 0; s < stripes_.size(); s++) {
            Vec sums = zero();
            const int end = std::min(width, int(s + 1) * STRIPE);
            for (int j = int(s) * STRIPE; j < end; j += LANES) {
                Vec w = load(weights_.data() + j);
                sums = add(sums, zero_below(w, broadcast(limit), w));
            }
            stripes_[s] = sum(sums);
            total += stripes_[s];
        }
        return total;
    }

    // The token at `left` of the sums of the last sum_from, in the order of ids: first the stripe,
    // then the token in it.
    int64_t at(double left, float limit) const {
        size_t s = 0;
        while (s + 1 < stripes_.size() && left >= stripes_[s]) left -= stripes_[s++];
        int64_t last = FAILED;
        const int end = std::min(int(weights_.size()), int(s + 1) * STRIPE);
        for (int j = int(s) * STRIPE; j < end; j++) {
            const float w = weights_[j];
            if (w < limit || w <= 0) continue;
            last = j;
            if (left < w) return j;
            left -= w;
        }
        // Rounding pushed it to the very end.
        if (last == FAILED)
            for (int j = 0; j < int(weights_.size()); j++)
                if (weights_[j] >= limit && weights_[j] > 0) last = j;
        return last;
    }

    int64_t from_all(const float* logits, int width, const Draw& draw) {
        return at(draw.uniform * weigh_all(logits, width, draw.temperature), 0);
    }

    // Among those that min_p, top_k and top_p keep: mostly a few, and then the most likely first.
    int64_t from_best(const float* logits, int width, const Draw& draw) {
        const float floor = std::max(0.f, draw.min_p);
        double mass = draw.top_k > 0 ? 0 : weigh_all(logits, width, draw.temperature);
        if (draw.top_k == 0 && floor > 0) mass = sum_from(floor);
        if (draw.top_k == 0 && draw.top_p >= 1) return at(draw.uniform * mass, floor);
        const float lowest = floor > 0 ? most_ + draw.temperature * std::log(floor) : -INFINITY;
        const float few = std::max(lowest, panel_threshold());
        gather(logits, few, draw.temperature, floor);
        if (draw.top_k > 0) {
            if (size_t(draw.top_k) > candidates_.size() && few > lowest)
                gather(logits, lowest, draw.temperature, floor);
            candidates_.resize(std::min(candidates_.size(), size_t(draw.top_k)));
            for (const auto& c : candidates_) mass += c.weight;
        }
        const double goal = double(draw.top_p) * mass;
        double kept = 0;
        size_t n = 0;
        while (n < candidates_.size() && kept < goal) kept += candidates_[n++].weight;
        if (kept < goal && draw.top_k == 0 && few > lowest) return from_many(goal, floor, draw);
        return pick(n, draw.uniform * kept);
    }

    int64_t pick(size_t count, double left) const {
        for (size_t i = 0; i < count; i++) {
            if (left < candidates_[i].weight) return candidates_[i].id;
            left -= candidates_[i].weight;
        }
        return candidates_[count ? count - 1 : 0].id;
    }

    // Where top_p keeps many: the weight at which its goal is reached is looked for with a few
    // limits at a time, down to a handful of tokens between two of them, which alone are sorted.
    int64_t from_many(double goal, float floor, const Draw& draw) {
        // What is not below `low` reaches the goal, what is not below `high` does not.
        float low = std::max(floor, 1e-30f), high = 1.0001f;
        for (int round = 0; round < 5; round++) {
            float limits[LIMITS];
            const float step = std::pow(high / low, 1.f / (LIMITS + 1));
            for (int i = 0; i < LIMITS; i++) limits[i] = low * std::pow(step, float(i + 1));
            double sums[LIMITS];
            sums_from(limits, sums);
            float next_low = low, next_high = high;
            for (int i = 0; i < LIMITS; i++) {
                if (sums[i] >= goal)
                    next_low = limits[i];
                else {
                    next_high = limits[i];
                    break;
                }
            }
            low = next_low, high = next_high;
        }
        double kept = sum_from(high);
        candidates_.clear();
        for (int j = 0; j < int(weights_.size()); j += LANES) {
            uint32_t found = not_below(load(weights_.data() + j), broadcast(low));
            for (; found; found &= found - 1) {
                const int id = j + __builtin_ctz(found);
                if (weights_[id] < high) candidates_.push_back({0, id, weights_[id]});
            }
        }
        std::sort(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) {
            return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
        });
        const double above = kept;
        size_t n = 0;
        while (n < candidates_.size() && kept < goal) kept += candidates_[n++].weight;
        const double left = draw.uniform * kept;
        return left < above || n == 0 ? at(left, high) : pick(n, left - above);
    }

    void sums_from(const float (&limits)[LIMITS], double (&sums)[LIMITS]) const {
        Vec parts[LIMITS], bounds[LIMITS];
        for (int i = 0; i < LIMITS; i++) parts[i] = zero(), bounds[i] = broadcast(limits[i]);
        for (int j = 0; j < int(weights_.size()); j += LANES) {
            Vec w = load(weights_.data() + j);
            for (int i = 0; i < LIMITS; i++) parts[i] = add(parts[i], zero_below(w, bounds[i], w));
        }
        for (int i = 0; i < LIMITS; i++) sums[i] = sum(parts[i]);
    }

    // At least FEW logits are not below it, if there are so many panels.
    float panel_threshold() {
        if (panels_.size() <= FEW) return -INFINITY;
        sorted_ = panels_;
        std::nth_element(sorted_.begin(), sorted_.begin() + FEW, sorted_.end(), std::greater<>());
        return sorted_[FEW];
    }

    // All logits that are not below the threshold, the most likely first, equal ones by id.
    void gather(const float* logits, float threshold, float temperature, float floor) {
        candidates_.clear();
        for (size_t p = 0; p < panels_.size(); p++) {
            if (panels_[p] < threshold) continue;
            for (int j = int(p) * PANEL; j < int(p + 1) * PANEL; j++)
                if (logits[j] >= threshold && logits[j] > -INFINITY)
                    candidates_.push_back({logits[j], j, 0});
        }
        std::sort(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) {
            return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
        });
        for (auto& c : candidates_) c.weight = std::exp(double(c.logit - most_) / temperature);
        // The logit of min_p is rounded.
        while (!candidates_.empty() && candidates_.back().weight < floor) candidates_.pop_back();
    }

    float most_ = 0;
    std::vector<float> panels_, sorted_, weights_;
    std::vector<double> stripes_;
    std::vector<Candidate> candidates_;
};

}  // namespace rts
