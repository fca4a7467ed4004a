/* attention_pages.h: attention over pages with an online softmax; what every kernel set shares.
 *
 *     score(t) = softcap(scale * q . k_t) + slope * mask_t        p_t = exp(score_t - m)        out = sum_t p_t v_t
 *
 * A set gives the struct Set: scores of 128 tokens for a few rows, softmax of one row, and sums of p v, for open (F16)
 * and sealed (codes) pages.  For sealed pages with scale s and zero z per i,
 *
 *     K: q . k_j = sum_i (q_i s_i) c[i][j] + sum_i q_i z_i          i = channel, j = token
 *     V: out_j   = sum_i (p_i s_i) c[i][j] + sum_i p_i z_i          i = token, j = channel
 *
 * so that one primitive serves both, y[j] += sum_i a[i] c[i][j].
 *
 * A masked token takes no part, whatever lies in its cell: its score is replaced, not added to, and its p is 0.
 */
#pragma once

#include "codec_format.h"
#include "half.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace xq {

/* Rows that share one pass over a page; their scores lie on the stack. */
constexpr int block_rows = 64;

/* Where the state of a row lies in partial: maximum, sum of p, then the sums of p v [e]. */
struct row_state {
    float *max, *sum, *sealed, *open, *source;
    row_state(float *partial, int e)
        : max(partial), sum(partial + 1), sealed(partial + 2), open(sealed + e), source(open + e) {}
};
/* Numbers of the sums of a row: sealed, open and, if mapped, source. */
static inline int n_sums(const xq_attention &a) {
    return (a.mapped ? 3 : 2) * a.e;
}
/* The same pages with the values of the layer that a map reads. */
static inline xq_attention source_of(const xq_attention &a) {
    xq_attention b = a;
    b.v = a.source;
    b.v_code_bits = a.source.bits;
    b.v_codes = a.source_codes;
    b.v_param = a.source_param;
    b.v_codes_stride = a.source_codes_stride;
    b.v_param_stride = a.source_param_stride;
    return b;
}

enum mask_kind { mask_none, mask_zero, mask_mixed }; /* nothing visible; all visible, nothing to add; else */

static inline mask_kind kind_of(const uint16_t *mask /* [XQ_PAGE] */) {
    uint64_t first, any_other = 0;
    memcpy(&first, mask, 8);
    for (int t = 0; t < XQ_PAGE; t += 4) {
        uint64_t four;
        memcpy(&four, mask + t, 8);
        any_other |= four ^ first;
    }
    if (any_other != 0) {
        return mask_mixed;
    }
    return first == 0 ? mask_zero : first == 0xfc00fc00fc00fc00u ? mask_none : mask_mixed;
}

/* Calls f<R>(first row) over n rows, four at a time while there are four. */
template <typename F> static inline void by_rows(int n, const F &f) {
    int row = 0;
    for (; row + 4 <= n; row += 4) {
        f(std::integral_constant<int, 4>(), row);
    }
    if (n - row >= 2) {
        f(std::integral_constant<int, 2>(), row);
        row += 2;
    }
    if (n - row >= 1) {
        f(std::integral_constant<int, 1>(), row);
    }
}

template <typename Set> void attend_block(const xq_attention &a, int first, int n_rows) {
    alignas(64) float scores[block_rows][XQ_PAGE];
    const float *q[block_rows];
    float *p[block_rows], *sums[block_rows], *source_sums[block_rows];
    int rows[block_rows];
    const xq_attention source = source_of(a);

    for (int page = a.page_begin; page < a.page_end; ++page) {
        const int32_t slot = a.page_slot[page];
        if (slot == -2) {
            continue;
        }
        mask_kind kinds[block_rows];
        int n = 0; // rows that see something of this page
        for (int row = first; row < first + n_rows; ++row) {
            // the rows of one token share its mask
            const bool same = n > 0 && a.mask && a.mask[row] == a.mask[rows[n - 1]];
            const mask_kind kind = same     ? kinds[n - 1]
                                   : a.mask ? kind_of(a.mask[row] + (int64_t)page * XQ_PAGE)
                                            : mask_zero;
            if (kind == mask_none) {
                continue;
            }
            kinds[n] = kind;
            rows[n] = row;
            q[n] = a.q[row];
            p[n] = scores[n];
            n++;
        }
        if (n == 0) {
            continue;
        }

        const bool open = slot >= 0;
        if (open) {
            Set::open_scores(a.d, n, q, a.k_window + (int64_t)slot * XQ_PAGE * a.d, p);
        } else {
            Set::sealed_scores(a, page, n, q, p);
        }
        int kept = 0; // rows with a finite score
        for (int i = 0; i < n; ++i) {
            const int row = rows[i];
            row_state state(a.partial[row], a.e);
            const uint16_t *mask = kinds[i] == mask_zero ? nullptr : a.mask[row] + (int64_t)page * XQ_PAGE;
            const float before = *state.max;
            if (!Set::softmax(p[i], a.scale, a.softcap, mask, a.slope ? a.slope[row] : 1.0f, state.max, state.sum)) {
                continue;
            }
            if (*state.max != before) {
                const float factor = std::exp(before - *state.max);
                for (int j = 0; j < n_sums(a); ++j) {
                    state.sealed[j] *= factor;
                }
            }
            sums[kept] = open ? state.open : state.sealed;
            source_sums[kept] = state.source;
            p[kept] = p[i];
            kept++;
        }
        if (kept == 0) {
            continue;
        }
        if (open) {
            Set::open_values(a.e, kept, p, a.v_window + (int64_t)slot * XQ_PAGE * a.e, sums);
        } else {
            Set::sealed_values(a, page, kept, p, sums);
            if (a.mapped) {
                Set::sealed_values(source, page, kept, p, source_sums);
            }
        }
    }
}

template <typename Set> void attend(const xq_attention &a) {
    for (int row = 0; row < a.n_rows; ++row) {
        const row_state state(a.partial[row], a.e);
        std::fill(state.sealed, state.sealed + n_sums(a), 0.0f);
        *state.max = -INFINITY;
        *state.sum = 0.0f;
    }
    for (int first = 0; first < a.n_rows; first += block_rows) {
        attend_block<Set>(a, first, std::min(block_rows, a.n_rows - first));
    }
}

} // namespace xq
