// A dense decoder: its weights, its cache, and one step of it in one parallel region.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "attention_tiles.h"
#include "cache.h"
#include "matmul.h"
#include "rows.h"
#include "sampling.h"
#include "team.h"

namespace rts {

// What the C interface sees, whatever the type of the weights.
class Engine {
 public:
    virtual ~Engine() = default;
    virtual void set(int layer, int part, const void* data, int64_t count) = 0;
    virtual void check_complete() const = 0;
    virtual void step(const rts_step& step, int64_t* tokens) = 0;
    virtual const float* logits() const = 0;
    virtual int logits_stride() const = 0;
    virtual void clear(int64_t block) = 0;
    virtual void set_alone(bool alone) = 0;
    std::string error;
};

std::unique_ptr<Engine> make_engine(const rts_shape& shape, const rts_layer* layers);

}  // namespace rts
