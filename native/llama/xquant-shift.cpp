/* xquant-shift.cpp: context shift.  Keys are stored after RoPE, so a cell whose position changes by n needs its key
 * rotated by n more.
 *
 * Only pages with such cells are touched, a few at a time: sealed or open, their keys are read as F32 [d, KV head,
 * token], rotated by llama.cpp's own operation, and stored as they were, sealed or open, all on the device where the
 * layer lies.
 */
#include "xquant-cache.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace xquant {

using layer = cache::layer;

/* Pages of one graph: bounds the F32 copy to a few hundred tokens. */
static constexpr size_t pages_a_graph = 4;

namespace {

struct keys {
    const layer &l;
    const ggml_tensor *blocks, *window, *codes; /* codes: blocks of the owner */

    uint8_t *owner_codes(const shift_op &p, int head) const {
        return part(block_of(*l.k_owner, codes, p.stream, head, p.page), l.k_owner->layout.k_codes);
    }
    uint8_t *param(const shift_op &p, int head) const {
        return part(block_of(l, blocks, p.stream, head, p.page), l.layout.k_param);
    }
    ggml_fp16_t *rows(const shift_op &p, int head) const {
        return window_of(window, p.stream) + l.k_window(head) + p.slot * l.k_slot();
    }
};

/* Calls f(page, number of the page, head) for this thread's share. */
template <typename F> void each_page_and_head(const ggml_tensor *pages, const layer &l, int ith, int nth, const F &f) {
    const int n = (int)(ggml_nbytes(pages) / sizeof(shift_op));
    for (int task = ith; task < n * l.n_head_kv; task += nth) {
        f(((const shift_op *)pages->data)[task / l.n_head_kv], task / l.n_head_kv, task % l.n_head_kv);
    }
}

/* dst F32 [d, KV head, token of all pages] <- pages, blocks, window, blocks of the owner */
void read_keys(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const layer &l = *(const layer *)userdata;
    const keys k = {l, dst->src[1], dst->src[2], dst->src[3]};
    ggml_fp16_t scratch[XQ_PAGE * XQ_MAX_HEAD_DIM];
    each_page_and_head(dst->src[0], l, ith, nth, [&](const shift_op &p, int i, int head) {
        const ggml_fp16_t *rows = scratch;
        if (p.slot == cache::page_sealed) {
            const int status = xq_unseal_k(&l.plan.k, l.d, k.owner_codes(p, head), l.k_owner->plan.k.bits,
                                           k.param(p, head), scratch, l.d);
            GGML_ASSERT(status == XQ_OK);
        } else {
            rows = k.rows(p, head);
        }
        for (int t = 0; t < XQ_PAGE; ++t) {
            float *out = (float *)((char *)dst->data + head * dst->nb[1] + (i * XQ_PAGE + t) * dst->nb[2]);
            ggml_cpu_fp16_to_fp32(rows + (int64_t)t * l.d, out, l.d);
        }
    });
}

/* [1] <- keys F32 [d, KV head, token of all pages], pages, blocks, window, blocks of the owner */
void write_keys(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const layer &l = *(const layer *)userdata;
    const ggml_tensor *src = dst->src[0];
    const keys k = {l, dst->src[2], dst->src[3], dst->src[4]};
    ggml_fp16_t scratch[XQ_PAGE * XQ_MAX_HEAD_DIM];
    each_page_and_head(dst->src[1], l, ith, nth, [&](const shift_op &p, int i, int head) {
        ggml_fp16_t *rows = p.slot == cache::page_sealed ? scratch : k.rows(p, head);
        for (int t = 0; t < XQ_PAGE; ++t) {
            const auto *in =
                (const float *)((const char *)src->data + head * src->nb[1] + (i * XQ_PAGE + t) * src->nb[2]);
            ggml_cpu_fp32_to_fp16(in, rows + (int64_t)t * l.d, l.d);
        }
        if (p.slot == cache::page_sealed) {
            const bool own = l.k_owner == &l;
            uint8_t *codes = k.owner_codes(p, head);
            const int n = xq_seal_k(&l.plan.k, l.d, rows, l.d, p.valid, own ? codes : nullptr, k.param(p, head),
                                    own ? nullptr : codes, l.k_owner->plan.k.bits);
            GGML_ASSERT(n >= 0);
        }
    });
}

/* The backend that a layer's nodes run on: the CPU's is the last. */
ggml_backend_t backend_of(ggml_backend_sched_t sched, const layer &l) {
    const int n = ggml_backend_sched_get_n_backends(sched);
    for (int i = 0; l.extra && i < n; ++i) {
        if (ggml_backend_supports_buft(ggml_backend_sched_get_backend(sched, i), l.buft)) {
            return ggml_backend_sched_get_backend(sched, i);
        }
    }
    return ggml_backend_sched_get_backend(sched, n - 1);
}

} // namespace

bool cache::shift(llama_context *lctx) {
    finish_interrupted();
    std::vector<shift_op> pages;
    std::vector<int32_t> shifts; // by token of pages
    for (uint32_t s = 0; s < n_streams; ++s) {
        const auto &c = cells(s);
        for (int32_t p = 0; p < n_pages; ++p) {
            std::vector<int32_t> by(XQ_PAGE, 0);
            for (uint32_t i = 0; i < XQ_PAGE && p * XQ_PAGE + i < c.size(); ++i) {
                const uint32_t cell = (uint32_t)p * XQ_PAGE + i;
                by[i] = c.is_empty(cell) ? 0 : c.get_shift(cell);
            }
            const int32_t state = streams[s].pages[p].state;
            if (state != page_free && std::any_of(by.begin(), by.end(), [](int32_t n) { return n != 0; })) {
                shift_op page = {(int32_t)s, p, state, {}};
                valid_cells(s, p, page.valid);
                pages.push_back(page);
                shifts.insert(shifts.end(), by.begin(), by.end());
            }
        }
    }

    auto *sched = lctx->get_sched();
    const auto &cparams = lctx->get_cparams();
    const auto place = [&](ggml_tensor *node, const layer &l, node_kind kind) {
        if (l.extra) {
            set_params(node->op_params, {node_magic, kind, &l.device, 0.0f, 0.0f, 0.0f, 0});
        }
        ggml_backend_sched_set_tensor_backend(sched, node, backend_of(sched, l));
    };
    for (size_t first = 0; first < pages.size(); first += pages_a_graph) {
        const int64_t n = (int64_t)std::min(pages_a_graph, pages.size() - first);
        lctx->synchronize(); // the inputs are about to be written again
        ggml_backend_sched_reset(sched);
        auto *res = lctx->get_gf_res_reserve();
        res->reset();
        ggml_context *ctx = res->get_ctx();
        ggml_tensor *list = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n * (int64_t)(sizeof(shift_op) / sizeof(int32_t)));
        ggml_tensor *by = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n * XQ_PAGE);
        ggml_set_input(list);
        ggml_set_input(by);
        const auto rotated = [&](layer &l) {
            const int il = (int)l.il;
            ggml_tensor *args[] = {list, l.blocks, l.window, l.k_owner->blocks};
            ggml_tensor *k = ggml_custom_4d(ctx, GGML_TYPE_F32, l.d, l.n_head_kv, n * XQ_PAGE, 1, args, 4, read_keys,
                                            GGML_N_TASKS_MAX, &l);
            place(k, l, node_kind::read_keys);
            k = kv.build_rope_shift(cparams, ctx, k, by, nullptr, kv.model.get_rope_factors(cparams, il),
                                    kv.model.get_rope_freq_base(cparams, il), kv.model.get_rope_freq_scale(cparams, il),
                                    il);
            ggml_build_forward_expand(res->get_gf(), k);
            return k;
        };
        // a layer that borrows codes reads its keys before the owner writes new codes
        std::map<const layer *, ggml_tensor *> borrowed;
        for (const auto &l : layers_) {
            if (l->k_owner != l.get() && kv.hparams.has_rope((int)l->il)) {
                borrowed[l.get()] = rotated(*l);
            }
        }
        for (const auto &l : layers_) {
            if (!kv.hparams.has_rope((int)l->il)) {
                continue;
            }
            ggml_tensor *k = borrowed.count(l.get()) ? borrowed[l.get()] : rotated(*l);
            ggml_tensor *stores[] = {k, list, l->blocks, l->window, l->k_owner->blocks};
            ggml_tensor *stored =
                ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, stores, 5, write_keys, GGML_N_TASKS_MAX, l.get());
            place(stored, *l, node_kind::write_keys);
            ggml_build_forward_expand(res->get_gf(), stored);
        }
        if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
            LLAMA_LOG_ERROR("%s: xquant: failed to allocate the graph of a context shift\n", __func__);
            return false;
        }
        ggml_backend_tensor_set(list, pages.data() + first, 0, ggml_nbytes(list));
        ggml_backend_tensor_set(by, shifts.data() + first * XQ_PAGE, 0, ggml_nbytes(by));
        if (lctx->graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: xquant: failed to compute a context shift\n", __func__);
            return false;
        }
    }
    return true;
}

} // namespace xquant
