/* inline.h: functions that must be in line, for the registers that they keep or the instructions that they hold. */
#pragma once

#define XQ_INLINE inline __attribute__((always_inline))

namespace xq {
namespace {

/* std::min is a template that files compiled for different instructions would share. */
XQ_INLINE int least(int a, int b) {
    return a < b ? a : b;
}

} // namespace
} // namespace xq
