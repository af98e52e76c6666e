// The tiles of AMX: eight of them, each of 16 rows of 64 bytes.
#pragma once

#if defined(__AMX_BF16__)
#define RTS_TILES 1

#include <immintrin.h>

#include <cstdint>

namespace rts {

// Eight tiles, all of the same shape. A constant: GCC believes that _tile_loadconfig reads 8 bytes
// of it, and would leave out the others of one that is made on the stack.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {};
    uint8_t rows[16] = {};
    constexpr TileConfig() {
        for (int i = 0; i < 8; i++) bytes_of_row[i] = 64, rows[i] = 16;
    }
};
inline constexpr TileConfig TILE_CONFIG;

// Every thread configures its tiles when a step begins: other libraries use them, too.
class Tiles {
 public:
    Tiles() { _tile_loadconfig(&TILE_CONFIG); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

}  // namespace rts

#else
#define RTS_TILES 0

namespace rts {
struct Tiles {
    Tiles() {}
    ~Tiles() {}
};
}  // namespace rts

#endif
