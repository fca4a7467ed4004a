/* xquant-graph.cpp: the three operations of xquant-cache.h as nodes of a ggml graph, on the CPU.
 *
 * They are GGML_OP_CUSTOM nodes; the arguments of ours lie in op_params behind those of ggml_custom_op_params.
 *
 *     update  [1]                         <- input, k_cur, v_cur, blocks, window, others
 *     attend  [state, head, token, part]  <- q, input, mask, blocks, window, others, update
 *     merge   [e, head, token]            <- attend, sinks
 *
 * Others are the blocks of three layers: the owners of K's and V's codes, and the source of V's map.
 *
 * A state is that of xq_attention: 2 e + 2 numbers, 3 e + 2 where values are mapped.
 */
#include "xquant-cache.h"

#include "llama-cparams.h"
#include "llama-hparams.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace xquant {

using layer = cache::layer;

/* Query rows that one call of the attention kernel takes: their state stays in cache while pages stream by. */
static constexpr int max_rows = 64;
/* Pieces of work per thread, so that threads end together. */
static constexpr int pieces_per_thread = 4;

/* ---- input ---- */

cache::input_layout cache::layout_of(int64_t n_tokens) const {
    const int64_t capacity = (int64_t)n_streams * n_slots; // a page is sealed, or unsealed, at most once a slot
    input_layout at;
    at.table = in_header;
    at.rows = at.table + (int64_t)n_streams * n_pages;
    at.seals = at.rows + n_tokens;
    at.unseals = at.seals + capacity * (int64_t)(sizeof(seal_op) / sizeof(int32_t));
    at.size = at.unseals + capacity * (int64_t)(sizeof(unseal_op) / sizeof(int32_t));
    return at;
}

ggml_tensor *cache::build_input(ggml_context *ctx, int64_t n_tokens) const {
    // llama.cpp compares the first dimension with the number of tokens when it decides whether to reuse a graph
    const int64_t size = layout_of(n_tokens).size;
    ggml_tensor *input = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_tokens, (size + n_tokens - 1) / n_tokens);
    ggml_set_input(input);
    ggml_set_name(input, "xquant_input");
    return input;
}

/* Writes the seal and unseal operations of the current micro-batch. */
void cache::fill_operations(int32_t *input, const input_layout &at) const {
    input[in_n_seal] = (int32_t)pending_seals.size();
    input[in_n_unseal] = (int32_t)pending_unseals.size();
    memcpy(input + at.seals, pending_seals.data(), pending_seals.size() * sizeof(seal_op));
    memcpy(input + at.unseals, pending_unseals.data(), pending_unseals.size() * sizeof(unseal_op));
}

void cache::set_input(ggml_tensor *tensor, const slot_info &sinfo) {
    GGML_ASSERT(ggml_backend_buffer_is_host(tensor->buffer));
    const int64_t n_tokens = tensor->ne[0];
    const input_layout at = layout_of(n_tokens);
    int32_t *input = (int32_t *)tensor->data;

    fill_operations(input, at);
    input[in_n_rows] = (int32_t)n_tokens;
    input[in_first_stream] = (int32_t)sinfo.s0;
    input[in_epoch] = (int32_t)epoch;
    for (uint32_t s = 0; s < n_streams; ++s) {
        for (int32_t p = 0; p < n_pages; ++p) {
            input[at.table + (int64_t)s * n_pages + p] = streams[s].pages[p].state;
        }
    }
    int32_t *row = input + at.rows; // [token] = row of the window, counted over streams
    for (uint32_t i = 0; i < sinfo.n_stream(); ++i) {
        const int32_t s = (int32_t)sinfo.strm[i];
        for (const uint32_t cell : sinfo.idxs[i]) {
            const int32_t slot = streams[s].pages[cell / XQ_PAGE].state;
            *row++ = (s * n_slots + slot) * XQ_PAGE + (int32_t)(cell % XQ_PAGE);
        }
    }
}

/* ---- attend ---- */

struct attend_params {
    float scale, softcap, max_bias;
    int32_t n_parts;
};

/* ALiBi's slope of a head (arXiv 2108.12409); 1 without a bias. */
static float slope_of(float max_bias, int head, int n_head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n_log2 = 1 << (int)std::floor(std::log2((float)n_head));
    const float m0 = std::pow(2.0f, -max_bias / n_log2), m1 = std::pow(2.0f, -max_bias / 2.0f / n_log2);
    return head < n_log2 ? std::pow(m0, (float)(head + 1)) : std::pow(m1, (float)(2 * (head - n_log2) + 1));
}

static void attend(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const layer &l = *(const layer *)userdata;
    const ggml_tensor *q = dst->src[0], *mask = dst->src[2], *blocks = dst->src[3], *window = dst->src[4];
    const ggml_tensor *k_codes = dst->src[5], *v_codes = dst->src[6], *source = dst->src[7];
    const int32_t *input = (const int32_t *)dst->src[1]->data;
    attend_params params;
    memcpy(&params, dst->op_params + 8, sizeof(params));

    const int n_head = (int)q->ne[1], n_rep = n_head / l.n_head_kv;
    const int n_streams = (int)mask->ne[3], n_tokens = (int)q->ne[2] / n_streams; // of each stream
    const int n_pages = (int)(mask->ne[0] / XQ_PAGE);
    const int pages_a_part = (n_pages + params.n_parts - 1) / params.n_parts;
    const int n_rows = n_tokens * n_rep, n_groups = (n_rows + max_rows - 1) / max_rows;

    for (int task = ith; task < n_streams * n_groups * params.n_parts * l.n_head_kv; task += nth) {
        const int head = task % l.n_head_kv;
        const int piece = task / l.n_head_kv % params.n_parts;
        const int group = task / l.n_head_kv / params.n_parts % n_groups;
        const int s = task / l.n_head_kv / params.n_parts / n_groups;
        const int stream = input[cache::in_first_stream] + s;

        const float *q_rows[max_rows];
        const uint16_t *mask_rows[max_rows];
        float slopes[max_rows], *partial[max_rows];
        const int first = group * max_rows, end = std::min(first + max_rows, n_rows);
        for (int row = first; row < end; ++row) {
            const int t = row / n_rep, h = head * n_rep + row % n_rep, token = s * n_tokens + t;
            const int i = row - first;
            q_rows[i] = (const float *)((const char *)q->data + h * q->nb[1] + token * q->nb[2]);
            mask_rows[i] = (const uint16_t *)((const char *)mask->data + t * mask->nb[1] + s * mask->nb[3]);
            slopes[i] = slope_of(params.max_bias, h, n_head);
            partial[i] = (float *)((char *)dst->data + h * dst->nb[1] + token * dst->nb[2] + piece * dst->nb[3]);
        }

        uint8_t *block = block_of(l, blocks, stream, head, 0);
        xq_attention a = {};
        a.d = l.d;
        a.e = l.e;
        a.k = l.plan.k;
        a.v = l.plan.v;
        a.k_code_bits = l.k_owner->plan.k.bits;
        a.v_code_bits = l.v_owner->plan.v.bits;
        a.k_codes = part(block_of(*l.k_owner, k_codes, stream, head, 0), l.k_owner->layout.k_codes);
        a.v_codes = part(block_of(*l.v_owner, v_codes, stream, head, 0), l.v_owner->layout.v_codes);
        a.k_param = part(block, l.layout.k_param);
        a.v_param = part(block, l.layout.v_param);
        a.k_codes_stride = l.k_owner->block_stride();
        a.v_codes_stride = l.v_owner->block_stride();
        a.k_param_stride = a.v_param_stride = l.block_stride();
        if (l.map) {
            uint8_t *from = block_of(*l.v_source, source, stream, l.map->heads[head], 0);
            a.mapped = 1;
            a.source = l.v_source->plan.v;
            a.source_codes = part(from, l.v_source->layout.v_codes);
            a.source_param = part(from, l.v_source->layout.v_param);
            a.source_codes_stride = a.source_param_stride = l.v_source->block_stride();
        }
        a.k_window = window_of(window, stream) + l.k_window(head);
        a.v_window = window_of(window, stream) + l.v_window(head);
        a.page_slot = input + cache::in_header + (int64_t)stream * l.n_pages;
        a.page_begin = std::min(piece * pages_a_part, n_pages);
        a.page_end = std::min(a.page_begin + pages_a_part, n_pages);
        a.n_rows = end - first;
        a.q = q_rows;
        a.mask = mask_rows;
        a.slope = params.max_bias > 0.0f ? slopes : nullptr;
        a.scale = params.scale;
        a.softcap = params.softcap;
        a.partial = partial;
        const int status = xq_attend(&a);
        GGML_ASSERT(status == XQ_OK);
    }
}

/* ---- merge ---- */

static void merge(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const layer &l = *(const layer *)userdata;
    const ggml_tensor *states = dst->src[0], *sinks = dst->src[1];
    const int n_head = (int)dst->ne[1], n_parts = (int)states->ne[3];
    std::vector<const float *> partial(n_parts);
    for (int64_t row = ith; row < n_head * dst->ne[2]; row += nth) {
        const int64_t h = row % n_head, t = row / n_head;
        for (int i = 0; i < n_parts; ++i) {
            partial[i] =
                (const float *)((const char *)states->data + h * states->nb[1] + t * states->nb[2] + i * states->nb[3]);
        }
        const float sink = sinks ? ((const float *)sinks->data)[h] : -INFINITY;
        const float *weight = l.weight((int)(h / (n_head / l.n_head_kv)));
        const int status = xq_attention_merge(n_parts, partial.data(), l.e, l.plan.v.rotate, sink, weight,
                                              (float *)((char *)dst->data + h * dst->nb[1] + t * dst->nb[2]));
        GGML_ASSERT(status == XQ_OK);
    }
}

/* ---- graph ---- */

/* Arguments of ours behind those of ggml_custom_op_params. */
template <typename T> static void set_params(ggml_tensor *node, const T &params) {
    static_assert(8 * sizeof(int32_t) + sizeof(T) <= GGML_MAX_OP_PARAMS, "op_params is full");
    memcpy(node->op_params + 8, &params, sizeof(params));
}

ggml_tensor *cache::build_attention(const llm_graph_context &graph, ggml_tensor *input, ggml_tensor *q,
                                    ggml_tensor *k_cur, ggml_tensor *v_cur, ggml_tensor *kq_b, ggml_tensor *kq_mask,
                                    ggml_tensor *sinks, ggml_tensor *v_mla, float kq_scale, int il) const {
    if (kq_b || v_mla || kq_mask->type != GGML_TYPE_F16) {
        refuse("this model's attention has a bias on the scores or a latent projection; use the cache type f16");
    }
    ggml_context *ctx = graph.ctx0;
    // layers without keys and values of their own read an earlier layer's cache
    layer *l = layers_[kv.map_layer_ids.at(il)].get();
    ggml_tensor *k_codes = l->k_owner->blocks, *v_codes = l->v_owner->blocks, *source = l->v_source->blocks;

    ggml_tensor *stored = nullptr;
    if (k_cur && v_cur) {
        k_cur = k_cur->type == GGML_TYPE_F32 ? k_cur : ggml_cast(ctx, k_cur, GGML_TYPE_F32);
        v_cur = v_cur->type == GGML_TYPE_F32 ? v_cur : ggml_cast(ctx, v_cur, GGML_TYPE_F32);
        ggml_tensor *args[] = {input, k_cur, v_cur, l->blocks, l->window, k_codes, v_codes, source};
        stored = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 8, update_pages, GGML_N_TASKS_MAX, l);
        graph.cb(stored, "xquant_update", il);
        ggml_build_forward_expand(graph.gf, stored);
    }

    const int64_t n_head = q->ne[1], n_tokens = q->ne[2];
    const int64_t n_threads = n_tokens == 1 ? graph.cparams.n_threads : graph.cparams.n_threads_batch;
    const int64_t n_groups = kq_mask->ne[3] * l->n_head_kv *
                             ((n_tokens / kq_mask->ne[3] * (n_head / l->n_head_kv) + max_rows - 1) / max_rows);
    const int64_t wanted = (pieces_per_thread * n_threads + n_groups - 1) / n_groups;
    const attend_params params = {
        kq_scale,
        graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f,
        graph.hparams.f_max_alibi_bias,
        (int32_t)std::clamp<int64_t>(wanted, 1, kq_mask->ne[0] / XQ_PAGE),
    };
    ggml_tensor *args[] = {q, input, kq_mask, l->blocks, l->window, k_codes, v_codes, source, stored};
    ggml_tensor *states = ggml_custom_4d(ctx, GGML_TYPE_F32, l->state_width(), n_head, n_tokens, params.n_parts, args,
                                         stored ? 9 : 8, attend, GGML_N_TASKS_MAX, l);
    set_params(states, params);
    graph.cb(states, "xquant_attend", il);

    ggml_tensor *merge_args[] = {states, sinks};
    ggml_tensor *out = ggml_custom_4d(ctx, GGML_TYPE_F32, l->e, n_head, n_tokens, 1, merge_args, sinks ? 2 : 1, merge,
                                      GGML_N_TASKS_MAX, l);
    graph.cb(out, "xquant_merge", il);
    out = ggml_reshape_2d(ctx, out, l->e * n_head, n_tokens);
    ggml_build_forward_expand(graph.gf, out);
    return out;
}

} // namespace xquant
