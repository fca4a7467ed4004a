/* attention_pages.h: attention over pages with an online softmax; what every kernel set shares.
 *
 *     score(t) = softcap(scale * q . k_t) + slope * mask_t        p_t = exp(score_t - m)        out = sum_t p_t v_t
 *
 * A set gives the struct Set: scores of 128 tokens for a few rows, softmax of one row, and sums of p v, for open pages
 * (F16 rows, or bytes, which become numbers as they are loaded: centre + scale * byte in single precision) and sealed
 * ones (codes).  For sealed pages with scale s and zero z per i,
 *
 *     K: q . k_j = sum_i (q_i s_i) c[i][j] + sum_i q_i z_i          i = channel, j = token
 *     V: out_j   = sum_i (p_i s_i) c[i][j] + sum_i p_i z_i          i = token, j = channel
 *
 * so that one primitive serves both, y[j] += sum_i a[i] c[i][j].  Of values that are channels i of the
 * keys, with their scale s and zero z,
 *
 *     out_i   = s_i sum_t p_t c[i][t] + z_i sum_t p_t
 *
 * A masked token takes no part, whatever lies in its cell: its score is replaced, not added to, and its p is 0.
 *
 * Scratch lies on the stack: 85 KiB at most.
 */
#pragma once

#include "codec_format.h"
#include "half.h"
#include "inline.h"
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

namespace xq {
namespace {

/* Channels of the values that are read. */
inline int value_width(const attention &a) {
    return a.latent + a.v.width;
}
/* Where the state of a row lies: maximum, sum of p, then the sums of p v [value_width]. */
struct row_state {
    float *max, *sum, *sealed, *open, *source;
    row_state(float *state, int width)
        : max(state), sum(state + 1), sealed(state + 2), open(sealed + width), source(open + width) {}
};
/* Numbers of the sums of a row: sealed, open and, if mapped, source. */
inline int n_sums(const attention &a) {
    return (a.mapped ? 3 : 2) * value_width(a);
}

inline void fill(float *x, int n, float value) {
    for (int i = 0; i < n; ++i) {
        x[i] = value;
    }
}

enum mask_kind { mask_none, mask_zero, mask_mixed }; /* nothing visible; all visible, nothing to add; else */

inline mask_kind kind_of(const uint16_t *mask /* [XQ_PAGE] */) {
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
template <typename F> inline void by_rows(int n, const F &f) {
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

/* Rows that see something of a page. */
struct seen_rows {
    int n = 0;
    int row[XQ_CPU_GROUP_ROWS];
    mask_kind kind[XQ_CPU_GROUP_ROWS];

    seen_rows(const attention &a, int page) {
        for (int r = 0; r < a.n_rows; ++r) {
            // the rows of one token share its mask
            const bool same = n > 0 && a.mask && a.mask[r] == a.mask[row[n - 1]];
            const mask_kind of = same ? kind[n - 1] : a.mask ? kind_of(a.mask[r] + (int64_t)page * XQ_PAGE) : mask_zero;
            if (of != mask_none) {
                row[n] = r;
                kind[n++] = of;
            }
        }
    }
};

/* One side of an open page. */
struct open_side {
    const uint16_t *rows; /* F16 [XQ_PAGE][width]; null: the page lies in bytes */
    byte_page bytes;
    int width;
};
inline open_side open_at(const side_view &side, bool is_k, int slot) {
    if (is_bytes(slot)) {
        return {nullptr, bytes_at(side, is_k, slot), side.width};
    }
    return {slot_rows(side, slot), {}, side.width};
}

/* One page, for the rows that see something of it.  In line: it saves a twentieth over open pages. */
template <typename Set> XQ_INLINE void attend_page(const attention &a, int page) {
    alignas(64) float scores[XQ_CPU_GROUP_ROWS][XQ_PAGE];
    const float *q[XQ_CPU_GROUP_ROWS];
    float *p[XQ_CPU_GROUP_ROWS], *sums[XQ_CPU_GROUP_ROWS], *source_sums[XQ_CPU_GROUP_ROWS];
    const int32_t slot = a.page_slot[page];
    const seen_rows seen(a, page);
    if (seen.n == 0) {
        return;
    }
    for (int i = 0; i < seen.n; ++i) {
        q[i] = a.q[seen.row[i]];
        p[i] = scores[i];
    }
    const bool open = is_open(slot);
    if (open) {
        Set::open_scores(open_at(a.k, true, slot), seen.n, q, p);
    } else {
        Set::sealed_scores(a.k, page, seen.n, q, p);
    }
    int kept = 0; // rows with a finite score
    for (int i = 0; i < seen.n; ++i) {
        const int row = seen.row[i];
        const row_state state(a.states[row], value_width(a));
        const uint16_t *mask = seen.kind[i] == mask_zero ? nullptr : a.mask[row] + (int64_t)page * XQ_PAGE;
        const float before = *state.max;
        if (!Set::softmax(p[i], a.scale, a.softcap, mask, a.slope ? a.slope[row] : 1.0f, state.max, state.sum)) {
            continue;
        }
        if (*state.max != before) {
            const float factor = expf(before - *state.max);
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
        return;
    }
    if (open) { // channels of the keys, then V's own: one call, whose scratch is large
        for (int own = a.latent == 0; own <= (a.v.width > 0); ++own) {
            Set::open_values(open_at(own ? a.v : a.k, !own, slot), own ? a.v.width : a.latent, kept, p, sums);
            for (int i = 0; i < kept; ++i) {
                sums[i] += a.latent;
            }
        }
        return;
    }
    if (a.latent > 0) {
        Set::latent_values(a.k, a.latent, page, kept, p, sums);
        for (int i = 0; i < kept; ++i) {
            sums[i] += a.latent;
        }
    }
    if (a.v.width == 0) {
        return;
    }
    Set::sealed_values(a.v, page, kept, p, sums);
    if (a.mapped) {
        Set::sealed_values(a.source, page, kept, p, source_sums);
    }
}

/* Writes, per row, the state of an online softmax over the pages.  A row that sees no cell: -inf, 0, zeros. */
template <typename Set> void attend(const attention &a) {
    for (int row = 0; row < a.n_rows; ++row) {
        const row_state state(a.states[row], value_width(a));
        fill(state.sealed, n_sums(a), 0.0f);
        *state.max = -INFINITY;
        *state.sum = 0.0f;
    }
    for (int page = a.page_begin; page < a.page_end; ++page) {
        if (a.page_slot[page] != XQ_SLOT_NONE) {
            attend_page<Set>(a, page);
        }
    }
}

} // namespace
} // namespace xq
