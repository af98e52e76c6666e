// The next token of one row of logits.
//
// The order of what is done is vLLM's: penalties, temperature, min_p, top_k, top_p. The whole
// vocabulary is never sorted: candidates are the few logits above a threshold, which is lowered
// until they suffice. A row's token depends on its logits, its parameters and its random number
// alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "matrix.h"
#include "simd.h"

namespace rts {

constexpr int64_t FAILED = -1;  // the largest logit is no finite number
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

    struct Candidate {
        float logit;
        int32_t id;
        double weight;
    };

    static void punish(float* logits, const Draw& draw) {
        for (int64_t i = 0; i < draw.seen.count; i++) {
            float& x = logits[draw.seen.ids[i]];
            if (draw.repetition != 1) x = x > 0 ? x / draw.repetition : x * draw.repetition;
            const float times = draw.seen.generated[i];
            if (times > 0) x -= draw.presence + draw.frequency * times;
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

    // Sums of e^((logit - most) / temperature) over each stripe; their sum.
    double weigh_all(const float* logits, int width, float temperature) {
        const Vec shift = broadcast(most_), heat = broadcast(1 / temperature);
        stripes_.resize((width + STRIPE - 1) / STRIPE);
        double total = 0;
        for (size_t s = 0; s < stripes_.size(); s++) {
            Vec sums = zero();
            const int end = std::min(width, int(s + 1) * STRIPE);
            for (int j = int(s) * STRIPE; j < end; j += LANES)
                sums = add(sums, exp(mul(sub(load(logits + j), shift), heat)));
            stripes_[s] = sum(sums);
            total += stripes_[s];
        }
        return total;
    }

    // In the order of ids. The stripe first, then the token in it.
    int64_t from_all(const float* logits, int width, const Draw& draw) {
        double left = draw.uniform * weigh_all(logits, width, draw.temperature);
        size_t s = 0;
        while (s + 1 < stripes_.size() && left >= stripes_[s]) left -= stripes_[s++];
        const int end = std::min(width, int(s + 1) * STRIPE);
        int64_t last = FAILED;
        for (int j = int(s) * STRIPE; j < end; j++) {
            const double weight = std::exp(double(logits[j] - most_) / draw.temperature);
            if (weight <= 0) continue;
            last = j;
            if (left < weight) return j;
            left -= weight;
        }
        // Rounding pushed it to the very end.
        return last != FAILED ? last : first_at_least(logits, width, most_);
    }

    // In the order of likelihood, among those that min_p, top_k and top_p keep.
    int64_t from_best(const float* logits, int width, const Draw& draw) {
        const float floor =
            draw.min_p > 0 ? most_ + draw.temperature * std::log(draw.min_p) : -INFINITY;
        // What top_p is a share of: all, unless min_p or top_k leave less.
        const bool shares_all = draw.min_p <= 0 && draw.top_k == 0;
        const double all = shares_all ? weigh_all(logits, width, draw.temperature) : 0;
        const float thresholds[] = {std::max(floor, panel_threshold()),
                                    std::max(floor, most_ - 10 * draw.temperature), floor};
        for (const float threshold : thresholds) {
            gather(logits, threshold, draw.temperature);
            const bool complete = threshold <= floor;
            size_t kept = candidates_.size();
            if (draw.top_k > 0 && size_t(draw.top_k) <= kept)
                kept = size_t(draw.top_k);
            else if (!complete && !shares_all)
                continue;
            double mass = all;
            if (!shares_all) {
                mass = 0;
                for (size_t i = 0; i < kept; i++) mass += candidates_[i].weight;
            }
            const double goal = double(draw.top_p) * mass;
            double sum = 0;
            size_t n = 0;
            while (n < kept && sum < goal) sum += candidates_[n++].weight;
            if (sum < goal && !complete && shares_all) continue;
            double left = draw.uniform * sum;
            for (size_t i = 0; i < n; i++) {
                if (left < candidates_[i].weight) return candidates_[i].id;
                left -= candidates_[i].weight;
            }
            return candidates_[n ? n - 1 : 0].id;
        }
        return candidates_[0].id;  // not reached: the last threshold is complete
    }

    // At least FEW logits are not below it, if there are so many panels.
    float panel_threshold() {
        if (panels_.size() <= FEW) return -INFINITY;
        sorted_ = panels_;
        std::nth_element(sorted_.begin(), sorted_.begin() + FEW, sorted_.end(), std::greater<>());
        return sorted_[FEW];
    }

    // All logits that are not below the threshold, the most likely first, equal ones by id.
    void gather(const float* logits, float threshold, float temperature) {
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
    }

    float most_ = 0;
    std::vector<float> panels_, sorted_;
    std::vector<double> stripes_;
    std::vector<Candidate> candidates_;
};

}  // namespace rts
