/* attention.cpp: the former per-head ABI of attention over today's kernels, until nobody calls it. */
#include "kernels.h"

#include <algorithm>
#include <cmath>

using namespace xq;

static bool width_ok(int32_t n) {
    return n >= 16 && n <= XQ_MAX_HEAD_DIM && n % 16 == 0;
}

int xq_attend(const xq_attention *a) {
    if (!a || !width_ok(a->d) || !width_ok(a->e)) {
        return fail(XQ_ERR_ARGUMENT, "head widths are %d and %d, must be multiples of 16 from 16 to %d", a ? a->d : 0,
                    a ? a->e : 0, XQ_MAX_HEAD_DIM);
    }
    if (a->page_begin < 0 || a->page_end < a->page_begin || a->n_rows < 0) {
        return fail(XQ_ERR_ARGUMENT, "pages %d to %d for %d rows", a->page_begin, a->page_end, a->n_rows);
    }
    if (!a->page_slot || !a->q || !a->partial || !a->k_window || !a->v_window) {
        return fail(XQ_ERR_ARGUMENT, "page_slot, q, partial, k_window and v_window must not be null");
    }
    bool sealed = false;
    for (int32_t p = a->page_begin; p < a->page_end; ++p) {
        sealed = sealed || a->page_slot[p] == -1;
    }
    const auto readable = [](const xq_side &side, int32_t code_bits, const void *codes, const void *param) {
        return param && side.bits >= 0 && side.bits <= 4 && code_bits == side.bits && (side.bits == 0 || codes);
    };
    const auto values_readable = [&](const xq_side &v, int32_t code_bits, const void *codes, const void *param) {
        return readable(v, code_bits, codes, param) && v.group >= 0 && v.group % 16 == 0 &&
               (v.group == 0 || v.group >= a->e || a->e % v.group == 0);
    };
    if (sealed && (!readable(a->k, a->k_code_bits, a->k_codes, a->k_param) || a->k.group < 16 || a->k.group % 16 != 0 ||
                   XQ_PAGE % a->k.group != 0 || !values_readable(a->v, a->v_code_bits, a->v_codes, a->v_param) ||
                   (a->mapped && !values_readable(a->source, a->source.bits, a->source_codes, a->source_param)))) {
        return fail(XQ_ERR_ARGUMENT, "a sealed page needs codes, parameters and groups that divide it");
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    set->calls->fetch_add(1, std::memory_order_relaxed);
    // there is nothing to step over where there are no codes
    const auto view = [](const xq_side &side, int32_t width, const uint8_t *codes, int64_t codes_page,
                         const uint8_t *param, int64_t param_page, const uint16_t *rows) {
        return side_view{
            side,       width,           (uint8_t *)codes, (uint8_t *)param, side.bits == 0 ? 0 : codes_page,
            param_page, (uint16_t *)rows};
    };
    attention b = {};
    b.k = view(a->k, a->d, a->k_codes, a->k_codes_stride, a->k_param, a->k_param_stride, a->k_window);
    b.v = view(a->v, a->e, a->v_codes, a->v_codes_stride, a->v_param, a->v_param_stride, a->v_window);
    b.source = view(a->source, a->e, a->source_codes, a->source_codes_stride, a->source_param, a->source_param_stride,
                    nullptr);
    b.mapped = a->mapped != 0;
    b.page_slot = a->page_slot;
    b.page_begin = a->page_begin;
    b.page_end = a->page_end;
    b.scale = a->scale;
    b.softcap = a->softcap;
    for (int32_t first = 0; first < a->n_rows; first += XQ_CPU_GROUP_ROWS) {
        b.n_rows = std::min<int32_t>(XQ_CPU_GROUP_ROWS, a->n_rows - first);
        b.q = a->q + first;
        b.mask = a->mask ? a->mask + first : nullptr;
        b.slope = a->slope ? a->slope + first : nullptr;
        b.states = a->partial + first;
        set->attend(b);
    }
    return XQ_OK;
}
int xq_attention_merge(int32_t n_parts, const float *const *partial, int32_t e, int32_t rotate, float sink,
                       const float *weight, float *out) {
    if (n_parts < 1 || !partial || !out || !width_ok(e)) {
        return fail(XQ_ERR_ARGUMENT, "merge of %d parts of width %d", n_parts, e);
    }
    const kernel_set *set = active_kernels();
    if (!set) {
        return XQ_ERR_KERNELS;
    }
    float max = sink;
    for (int32_t i = 0; i < n_parts; ++i) {
        max = std::max(max, partial[i][0]);
    }
    if (max == -INFINITY) {
        std::fill(out, out + e, 0.0f); // nothing is visible
        return XQ_OK;
    }
    float sum = std::exp(sink - max);
    float sums[3 * XQ_MAX_HEAD_DIM] = {}; // sealed, open, source
    const int32_t n = (weight ? 3 : 2) * e;
    for (int32_t i = 0; i < n_parts; ++i) {
        const float factor = std::exp(partial[i][0] - max);
        if (factor == 0.0f) {
            continue;
        }
        sum += factor * partial[i][1];
        for (int32_t j = 0; j < n; ++j) {
            sums[j] += factor * partial[i][2 + j];
        }
    }
    std::copy(sums, sums + e, out);
    const float *open = sums + e, *source = open + e;
    for (int32_t k = 0; k < e && weight; ++k) {
        for (int32_t j = 0; j < e; ++j) {
            out[j] += source[k] * weight[(int64_t)k * e + j];
        }
    }
    if (rotate) {
        set->hadamard(out, 1, e);
    }
    for (int32_t j = 0; j < e; ++j) {
        out[j] = (out[j] + open[j]) / sum;
    }
    return XQ_OK;
}
