/* kernels.h: the function table that every CPU kernel set fills, and the set in force.
 *
 * A set is one struct of functions of the same names.  Arguments were checked by the callers in codec.cpp and
 * attention.cpp; shapes are those of xquant.h.  All sets give the same bytes in the codec.  In attention the scalar set
 * is the exact one (float); the others may round the folded vectors, as their files state.
 */
#pragma once

#include "xquant.h"

#include <atomic>
#include <cstdint>

namespace xq {

struct kernel_set {
    const char *name;
    bool (*supported)(); /* by this CPU and this operating system */

    void (*pack)(int bits, int n_i, int n_j, const uint8_t *codes, uint8_t *packed);
    void (*unpack)(int bits, int n_i, int n_j, const uint8_t *packed, uint8_t *codes);

    int (*seal_k)(const xq_side &side, int d, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int owner_bits);
    int (*seal_v)(const xq_side &side, int e, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
                  uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int owner_bits, const float *predicted);
    void (*unseal_k)(const xq_side &side, int d, const uint8_t *codes, int code_bits, const uint8_t *param,
                     uint16_t *rows, int64_t stride);
    void (*unseal_v)(const xq_side &side, int e, const uint8_t *codes, int code_bits, const uint8_t *param,
                     uint16_t *rows, int64_t stride, const float *predicted);
    void (*predict_v)(const xq_side &source, int e, const uint8_t *codes, const uint8_t *param, const float *weight,
                      float *predicted);
    void (*hadamard)(float *x, int n_rows, int n);

    void (*attend)(const xq_attention &args);

    std::atomic<uint64_t> *calls;
};

extern const kernel_set kernels_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const kernel_set kernels_avx512, kernels_avx2;
#elif defined(__aarch64__)
extern const kernel_set kernels_neon_i8mm, kernels_neon_dotprod, kernels_neon;
#endif

/* The set in force, or null when XQUANT_KERNELS names one that cannot run (xq_error() says so). */
const kernel_set *active_kernels();

/* Sets the message that xq_error() returns on this thread; printf-like. Returns status. */
int fail(int status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

} // namespace xq
