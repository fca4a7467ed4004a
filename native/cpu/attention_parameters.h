/* attention_parameters.h: scales and centres of a group of codes, and why codes are centred, for all but the exact set.
 *
 * With codes centred on the middle of their range, zero_i = centre_i - scale_i middle,
 *
 *     y_j = sum_i x_i (zero_i + scale_i c_ij) = sum_i a_i (c_ij - middle) + sum_i x_i centre_i      a_i = x_i scale_i
 *         ~ step (sum_i a8_i c_ij - middle sum_i a8_i) + sum_i x_i centre_i                         a_i ~ step a8_i
 *
 * Only the first sum is rounded, to 8 bits: step = max |a_i| / 127, an error of at most step / 2 for each i.
 */
#pragma once

#include "codec_format.h"

#include <cstdint>

namespace xq {
namespace {

/* Numbers i: channels of a key or tokens of a page. */
constexpr int max_i = XQ_MAX_HEAD_DIM;

/* Scale and centre of n numbers that share them along the other axis: read once a page, used for every row.
 *
 * Vector is the set's own: `type` of `lanes` numbers, load_half, load_log8, add_product(z, s, x) = z + s x, store,
 * prefetch. */
template <typename Vector> struct parameters_of {
    alignas(64) float scale[max_i], centre[max_i];
    int n;
    float middle; /* of the codes */

    /* The same parameters of the next page lie `ahead` bytes on. */
    parameters_of(const xq_side &side, int count, const uint8_t *param, int64_t ahead)
        : n(count), middle((float)((1 << side.bits) - 1) * 0.5f) {
        const int bytes = parameter_bytes(side, n);
        for (int i = 0; i < bytes; i += 64) {
            Vector::prefetch(param + ahead + i);
        }
        for (int i = 0; i < n; i += Vector::lanes) {
            typename Vector::type s = {}, c;
            if (side.bits == 0) {
                c = Vector::load_half(param + 2 * i);
            } else if (side.param == XQ_PARAM_F16) {
                s = Vector::load_half(param + 2 * i);
                c = Vector::add_product(Vector::load_half(param + 2 * (n + i)), s, middle);
            } else {
                Vector::load_log8(param + i, param + n + i, s, c);
            }
            Vector::store(scale + i, s);
            Vector::store(centre + i, c);
        }
    }
};

} // namespace
} // namespace xq
