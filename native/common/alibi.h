/* alibi.h: ALiBi's slope of a head (arXiv 2108.12409), for CPU and CUDA. */
#pragma once

#include "codec_format.h"

#include <math.h>

namespace xq {

/* 1 without a bias. */
XQ_BOTH float slope_of(float max_bias, int head, int n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    int n_log2 = 1; // the largest power of two up to n_head
    while (2 * n_log2 <= n_head) {
        n_log2 *= 2;
    }
    return head < n_log2 ? powf(powf(2.0f, -max_bias / n_log2), (float)(head + 1))
                         : powf(powf(2.0f, -max_bias / 2.0f / n_log2), (float)(2 * (head - n_log2) + 1));
}

} // namespace xq
