#include "api.h"

#include <cstdio>
#include <exception>

#include "model.h"

#if RTS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct rts_engine {
    std::unique_ptr<rts::Engine> engine;
};

namespace {

// The system lends the state of the tiles to a process that asks for it.
bool may_use_tiles() {
#if RTS_TILES
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return true;
#endif
}

// No exception may reach C.
template <class Call>
int guarded(rts_engine* engine, Call call) {
    try {
        call(*engine->engine);
        return 0;
    } catch (const std::bad_alloc&) {
        engine->engine->error = "out of memory";
    } catch (const std::exception& error) {
        engine->engine->error = error.what();
    }
    return -1;
}

}  // namespace

int rts_api_version(void) { return RTS_API_VERSION; }

rts_engine* rts_create(const rts_shape* shape, const rts_layer* layers, char* error,
                       int64_t error_size) {
    const char* why = "the system does not let this process use AMX";
    try {
        if (may_use_tiles()) return new rts_engine{rts::make_engine(*shape, layers)};
        std::snprintf(error, size_t(error_size), "%s", why);
    } catch (const std::bad_alloc&) {
        std::snprintf(error, size_t(error_size), "out of memory");
    } catch (const std::exception& failure) {
        std::snprintf(error, size_t(error_size), "%s", failure.what());
    }
    return nullptr;
}

void rts_destroy(rts_engine* engine) { delete engine; }

const char* rts_error(rts_engine* engine) { return engine->engine->error.c_str(); }

int rts_set(rts_engine* engine, int32_t layer, int32_t part, const void* data, int64_t count) {
    return guarded(engine, [&](rts::Engine& e) { e.set(layer, part, data, count); });
}

int rts_complete(rts_engine* engine) {
    return guarded(engine, [](rts::Engine& e) { e.check_complete(); });
}

int rts_run(rts_engine* engine, const rts_step* step, int64_t* tokens) {
    return guarded(engine, [&](rts::Engine& e) { e.step(*step, tokens); });
}

const float* rts_logits(rts_engine* engine, int64_t* stride) {
    *stride = engine->engine->logits_stride();
    return engine->engine->logits();
}

int rts_clear(rts_engine* engine, int64_t block) {
    return guarded(engine, [&](rts::Engine& e) { e.clear(block); });
}

void rts_alone(rts_engine* engine, int alone) { engine->engine->set_alone(alone != 0); }
