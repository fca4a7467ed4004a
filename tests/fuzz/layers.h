/* layers.h: what the fuzz targets of libxquant make of their input: sides, widths, memory, kernel sets.
 *
 * Pointers are what xquant.h says of them and as long as it says, each in memory of its own; everything else is taken
 * from the input.
 */
#pragma once

#include "fuzz.h"

#include "xquant.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <memory>

namespace fuzz {

using input = FuzzedDataProvider;

/* Mostly a number of a list, sometimes any. */
inline int32_t number(input &in, std::initializer_list<int32_t> usual) {
    const auto which = in.ConsumeIntegralInRange<size_t>(0, 31);
    return which < 31 ? usual.begin()[which % usual.size()] : in.ConsumeIntegral<int32_t>();
}

inline float real(input &in, std::initializer_list<float> usual) {
    const auto which = in.ConsumeIntegralInRange<size_t>(0, 31);
    return which < 31 ? usual.begin()[which % usual.size()] : in.ConsumeFloatingPoint<float>();
}

inline xq_side side(input &in, bool is_k) {
    xq_side s = {};
    s.bits = number(in, {0, 1, 2, 3, 4});
    s.group = number(in, {32, 64, 128, is_k ? 32 : 0});
    s.fit = number(in, {0, 1, 2, 3, 4});
    s.param = number(in, {0, 1});
    s.rotate = number(in, {0, 1});
    s.owner = number(in, {-1, -1, -1, 0});
    s.source = number(in, {-1, -1, -1, is_k ? -1 : 0});
    s.eta = real(in, {0.0f, 0.09f, 0.3f});
    return s;
}

inline int32_t width(input &in) {
    return number(in, {16, 64, 96, 512});
}

/* n elements of their own, from the input as far as it goes, then repeated: reading past the end is seen. */
template <typename T> std::unique_ptr<T[]> block(input &in, int64_t n) {
    std::unique_ptr<T[]> out(new T[(size_t)std::max<int64_t>(n, 1)]());
    const auto bytes = in.ConsumeBytes<uint8_t>(in.ConsumeIntegralInRange<size_t>(0, 256));
    for (size_t i = 0; i < (size_t)std::max<int64_t>(n, 0) * sizeof(T) && !bytes.empty(); ++i) {
        ((uint8_t *)out.get())[i] = bytes[i % bytes.size()];
    }
    return out;
}

const char *const sets[] = {"scalar", nullptr}; // null: the best there is

inline void force(const char *name) {
    static const std::string best = xq_kernels();
    xq_kernels_force(name ? name : best.c_str());
}

} // namespace fuzz
