/* codec.cpp: the codec's part of the ABI: checks every argument, then calls the kernel set in force. */
#include "kernels.h"

using namespace xq;

namespace {

/* XQ_OK if a side can be sealed, or read, at this width; codes: its own or its owner's, of code_bits. */
int check(const xq_side *side, bool is_k, int32_t width, const void *rows, int64_t stride, const void *param,
          const void *codes, int32_t code_bits) {
    if (!side || !rows || !param) {
        return fail(XQ_ERR_ARGUMENT, "side, rows and param must not be null");
    }
    if (width < 16 || stride < width) {
        return fail(XQ_ERR_ARGUMENT, "head width is %d with rows %lld apart", width, (long long)stride);
    }
    if (const int status = xq_check_side(side, is_k, width); status != XQ_OK) {
        return status;
    }
    if (side->bits > 0 && !codes) {
        return fail(XQ_ERR_ARGUMENT, "codes must not be null for %d bits", side->bits);
    }
    if (side->bits > 0 && code_bits != side->bits) {
        return fail(XQ_ERR_ARGUMENT, "codes of %d bits do not fit a side of %d bits", code_bits, side->bits);
    }
    return XQ_OK;
}

/* Calls f(kernel set in force) and counts it; status: of the checks. */
template <typename F> int with_kernels(int status, const F &f) {
    if (status != XQ_OK) {
        return status;
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    set->calls->fetch_add(1, std::memory_order_relaxed);
    return f(*set);
}

int check_matrix(int32_t bits, int32_t n_i, int32_t n_j) {
    if (bits < 1 || bits > 4 || n_i < 16 || n_j < 16 || n_i % 16 || n_j % 16 || n_i > 1 << 20 || n_j > 1 << 20) {
        return fail(XQ_ERR_ARGUMENT, "codes of %d bits, %d by %d: bits must be 1 to 4, the sides multiples of 16", bits,
                    n_i, n_j);
    }
    return XQ_OK;
}

/* As check, for sealing: which codes are meant. */
int check_seal(const xq_side *side, bool is_k, int32_t width, const void *rows, int64_t stride, const void *valid,
               const uint8_t *codes, const void *param, const uint8_t *owner_codes, int32_t owner_bits) {
    const bool own = side && side->owner < 0;
    const int status =
        check(side, is_k, width, rows, stride, param, own ? codes : owner_codes, own ? side->bits : owner_bits);
    return status != XQ_OK || valid ? status : fail(XQ_ERR_ARGUMENT, "valid must not be null");
}

/* Codes that are not the side's own are only read. */
sealed_side page_of(const xq_side *side, int32_t width, const uint8_t *codes, const uint8_t *param) {
    return {*side, width, const_cast<uint8_t *>(codes), const_cast<uint8_t *>(param)};
}

} // namespace

int64_t xq_packed_bytes(int32_t bits, int32_t n_i, int32_t n_j) {
    const int status = check_matrix(bits, n_i, n_j);
    return status == XQ_OK ? packed_bytes(bits, n_i, n_j) : status;
}

int xq_pack(int32_t bits, int32_t n_i, int32_t n_j, const uint8_t *codes, uint8_t *packed) {
    if (const int status = check_matrix(bits, n_i, n_j); status != XQ_OK) {
        return status;
    }
    if (!codes || !packed) {
        return fail(XQ_ERR_ARGUMENT, "codes and packed must not be null");
    }
    for (int64_t i = 0; i < (int64_t)n_i * n_j; ++i) {
        if (codes[i] >> bits) {
            return fail(XQ_ERR_ARGUMENT, "code %d does not fit %d bits", codes[i], bits);
        }
    }
    return with_kernels(XQ_OK, [&](const kernel_set &set) {
        set.pack(bits, n_i, n_j, codes, packed);
        return XQ_OK;
    });
}

int xq_unpack(int32_t bits, int32_t n_i, int32_t n_j, const uint8_t *packed, uint8_t *codes) {
    if (const int status = check_matrix(bits, n_i, n_j); status != XQ_OK) {
        return status;
    }
    if (!codes || !packed) {
        return fail(XQ_ERR_ARGUMENT, "codes and packed must not be null");
    }
    return with_kernels(XQ_OK, [&](const kernel_set &set) {
        set.unpack(bits, n_i, n_j, packed, codes);
        return XQ_OK;
    });
}

int xq_seal_k(const xq_side *side, int32_t d, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
              uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int32_t owner_bits) {
    const int status = check_seal(side, true, d, rows, stride, valid, codes, param, owner_codes, owner_bits);
    return with_kernels(status, [&](const kernel_set &set) {
        return set.seal_k(page_of(side, d, side->owner < 0 ? codes : owner_codes, param), rows, stride, valid);
    });
}

int xq_seal_v(const xq_side *side, int32_t e, const uint16_t *rows, int64_t stride, const uint32_t valid[4],
              uint8_t *codes, uint8_t *param, const uint8_t *owner_codes, int32_t owner_bits, const float *predicted) {
    const int status = check_seal(side, false, e, rows, stride, valid, codes, param, owner_codes, owner_bits);
    return with_kernels(status, [&](const kernel_set &set) {
        return set.seal_v(page_of(side, e, side->owner < 0 ? codes : owner_codes, param), rows, stride, valid,
                          {predicted, nullptr, nullptr});
    });
}

int xq_unseal_k(const xq_side *side, int32_t d, const uint8_t *codes, int32_t code_bits, const uint8_t *param,
                uint16_t *rows, int64_t stride) {
    return with_kernels(check(side, true, d, rows, stride, param, codes, code_bits), [&](const kernel_set &set) {
        set.unseal_k(page_of(side, d, codes, param), rows, stride);
        return XQ_OK;
    });
}

int xq_unseal_v(const xq_side *side, int32_t e, const uint8_t *codes, int32_t code_bits, const uint8_t *param,
                uint16_t *rows, int64_t stride, const float *predicted) {
    return with_kernels(check(side, false, e, rows, stride, param, codes, code_bits), [&](const kernel_set &set) {
        set.unseal_v(page_of(side, e, codes, param), rows, stride, {predicted, nullptr, nullptr});
        return XQ_OK;
    });
}

int xq_predict_v(const xq_side *source, int32_t e, const uint8_t *codes, const uint8_t *param, const float *weight,
                 float *predicted) {
    if (!weight || !predicted) {
        return fail(XQ_ERR_ARGUMENT, "weight and predicted must not be null");
    }
    if (source && source->owner >= 0) {
        return fail(XQ_ERR_ARGUMENT, "the source of a map must have codes of its own");
    }
    const int status = check(source, false, e, weight, e, param, codes, source ? source->bits : 0);
    return with_kernels(status, [&](const kernel_set &set) {
        set.predict_v(page_of(source, e, codes, param), weight, predicted);
        return XQ_OK;
    });
}

int xq_hadamard(float *x, int32_t n_rows, int32_t n) {
    if (!x) {
        return fail(XQ_ERR_ARGUMENT, "x must not be null");
    }
    if (n_rows < 0 || n < 1 || n > 1 << 20) {
        return fail(XQ_ERR_ARGUMENT, "n_rows is %d, must be 0 or more; n is %d, must be 1 to %d", n_rows, n, 1 << 20);
    }
    return with_kernels(XQ_OK, [&](const kernel_set &set) {
        set.hadamard(x, n_rows, n);
        return XQ_OK;
    });
}
