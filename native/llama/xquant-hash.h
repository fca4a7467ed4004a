/* xquant-hash.h: FNV-1a, against mix-ups and accidents, not against forgery. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace xquant {

struct hasher {
    uint64_t value = 0xcbf29ce484222325u;

    void add(const void *data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            value = (value ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
        }
    }
    template <typename T> void add(const T &number) { add(&number, sizeof(number)); }
};

} // namespace xquant
