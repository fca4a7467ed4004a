/* xquant-graph.cpp: the three operations of xquant-cache.h as nodes of a ggml graph, and what they do on the CPU.
 *
 *     update, attend, merge and, on other devices, unpack: see xquant-node.h
 *
 * A state is that of xq_attention: 2 e + 2 numbers, 3 e + 2 where values are mapped.
 */
#include "xquant-cache.h"

#include "alibi.h"

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
    std::copy(pending_seals.begin(), pending_seals.end(), (seal_op *)(input + at.seals));
    std::copy(pending_unseals.begin(), pending_unseals.end(), (unseal_op *)(input + at.unseals));
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

/* llama.cpp looks at every cell for every token, which takes longer than the attention of a layer on a GPU. */
bool cache::set_mask(ggml_tensor *mask, const llama_ubatch &ubatch, bool causal) const {
    const int64_t n_kv = mask->ne[0];
    if (!causal || mask->type != GGML_TYPE_F16 || ubatch.n_tokens != mask->ne[3] || kv.hparams.use_alibi ||
        kv.swa_type != LLAMA_SWA_TYPE_NONE || ubatch.is_pos_2d()) {
        return false;
    }
    const auto stream_of = [&](uint32_t i) { return kv.seq_to_stream[ubatch.seq_id[i][0]]; };
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto &c = cells(stream_of(i));
        const uint32_t n_used = c.get_used();
        if (n_used == 0 || n_used > n_kv || c.used_min() != 0 || c.used_max_p1() != n_used) {
            return false;
        }
        for (llama_seq_id id = 0; id < (llama_seq_id)kv.n_seq_max; ++id) {
            if (c.seq_pos_max(id) > (id == ubatch.seq_id[i][0] ? ubatch.pos[i] : -1)) {
                return false;
            }
        }
    }
    ggml_fp16_t *row = (ggml_fp16_t *)mask->data;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i, row += n_kv) {
        const uint32_t n_used = cells(stream_of(i)).get_used();
        std::fill(row, row + n_used, ggml_fp32_to_fp16(0.0f));
        std::fill(row + n_used, row + n_kv, ggml_fp32_to_fp16(-INFINITY));
    }
    return true;
}

/* ---- attend ---- */

static void attend(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const layer &l = *(const layer *)userdata;
    const ggml_tensor *q = dst->src[0], *mask = dst->src[2], *blocks = dst->src[3], *window = dst->src[4];
    const ggml_tensor *k_codes = dst->src[5], *v_codes = dst->src[6], *source = dst->src[7];
    const int32_t *input = (const int32_t *)dst->src[1]->data;
    const node_params params = get_params(dst->op_params);

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
        const int stream = input[in_first_stream] + s;

        const float *q_rows[max_rows];
        const uint16_t *mask_rows[max_rows];
        float slopes[max_rows], *partial[max_rows];
        const int first = group * max_rows, end = std::min(first + max_rows, n_rows);
        for (int row = first; row < end; ++row) {
            const int t = row / n_rep, h = head * n_rep + row % n_rep, token = s * n_tokens + t;
            const int i = row - first;
            q_rows[i] = (const float *)((const char *)q->data + h * q->nb[1] + token * q->nb[2]);
            mask_rows[i] = (const uint16_t *)((const char *)mask->data + t * mask->nb[1] + s * mask->nb[3]);
            slopes[i] = xq::slope_of(params.max_bias, h, n_head);
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
        a.page_slot = input + in_header + (int64_t)stream * l.n_pages;
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
        const float sink = sinks != states ? ((const float *)sinks->data)[h] : -INFINITY;
        const float *weight = l.weight((int)(h / (n_head / l.n_head_kv)));
        const int status = xq_attention_merge(n_parts, partial.data(), l.e, l.plan.v.rotate, sink, weight,
                                              (float *)((char *)dst->data + h * dst->nb[1] + t * dst->nb[2]));
        GGML_ASSERT(status == XQ_OK);
    }
}

/* ---- graph ---- */

/* Rows of KV heads that are unpacked at a time: bounds the F16 copy, 1 GiB for keys and values of width 128.  Pieces
 * cost nodes, for which the insertions make room. */
static constexpr int64_t rows_at_once = 1 << 21, max_pieces = 8;
/* Blocks of threads that fill a large GPU. */
static constexpr int64_t device_blocks = 132;

/* A custom node: the sources that ggml_custom_4d takes, and one more. */
static ggml_tensor *new_node(ggml_context *ctx, ggml_type type, const int64_t ne[4],
                             std::initializer_list<ggml_tensor *> sources, ggml_custom_op_t run, layer *l,
                             const node_params &params) {
    ggml_tensor *none = nullptr;
    ggml_tensor *node = ggml_custom_4d(ctx, type, ne[0], ne[1], ne[2], ne[3], &none, 0, run, GGML_N_TASKS_MAX, l);
    GGML_ASSERT(sources.size() <= GGML_MAX_SRC);
    std::copy(sources.begin(), sources.end(), node->src);
    static_assert(node_params_at * sizeof(int32_t) + sizeof(params) <= GGML_MAX_OP_PARAMS, "op_params is full");
    set_params(node->op_params, params);
    return node;
}

ggml_tensor *cache::build_attention(const llm_graph_context &graph, ggml_tensor *input, ggml_tensor *q,
                                    ggml_tensor *k_cur, ggml_tensor *v_cur, ggml_tensor *kq_b, ggml_tensor *kq_mask,
                                    ggml_tensor *sinks, ggml_tensor *v_mla, float kq_scale, int il) const {
    if (kq_b || v_mla || kq_mask->type != GGML_TYPE_F16) {
        refuse("this model's attention has a bias on the scores or a latent projection; use the cache type f16");
    }
    ggml_context *ctx = graph.ctx0;
    sched = graph.sched;
    // layers without keys and values of their own read an earlier layer's cache
    layer *l = layers_[kv.map_layer_ids.at(il)].get();
    ggml_tensor *k_codes = l->k_owner->blocks, *v_codes = l->v_owner->blocks, *source = l->v_source->blocks;
    node_params params = {node_magic, node_kind::update, &l->device, kq_scale, 0.0f, graph.hparams.f_max_alibi_bias, 1};
    params.softcap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;

    ggml_tensor *stored = nullptr;
    if (k_cur && v_cur) {
        k_cur = k_cur->type == GGML_TYPE_F32 ? k_cur : ggml_cast(ctx, k_cur, GGML_TYPE_F32);
        v_cur = v_cur->type == GGML_TYPE_F32 ? v_cur : ggml_cast(ctx, v_cur, GGML_TYPE_F32);
        // attention may begin before the update has ended: all else that it reads comes first
        ggml_build_forward_expand(graph.gf, q);
        ggml_build_forward_expand(graph.gf, kq_mask);
        // a view of the window: it runs where the layer lies
        ggml_tensor *args[] = {input, k_cur, v_cur, l->blocks, k_codes, v_codes, source, l->extra};
        stored = ggml_custom_inplace(ctx, l->window, args, 8, update_pages, GGML_N_TASKS_MAX, l);
        set_params(stored->op_params, params);
        graph.cb(stored, "xquant_update", il);
        ggml_build_forward_expand(graph.gf, stored);
    }

    const int64_t n_head = q->ne[1], n_tokens = q->ne[2], n_streams_q = kq_mask->ne[3], n_kv = kq_mask->ne[0];
    const int64_t n_rows = n_tokens / n_streams_q * (n_head / l->n_head_kv); // of one KV head and stream
    if (l->extra && n_rows >= rows_to_unpack) {
        // ALiBi's slopes belong to the number of a head among all
        const int64_t all = l->n_head_kv, wanted = (all * n_kv * n_streams_q + rows_at_once - 1) / rows_at_once;
        const int64_t pieces = params.max_bias > 0.0f ? 1 : std::min(wanted, max_pieces);
        const int64_t n_heads_kv = (all + pieces - 1) / pieces, n_rep = n_head / all;
        ggml_tensor *out = nullptr;
        for (int64_t first = 0; first < l->n_head_kv; first += n_heads_kv) {
            const int64_t n = std::min(n_heads_kv, l->n_head_kv - first);
            ggml_tensor *rows[2];
            for (const auto kind : {node_kind::unpack_k, node_kind::unpack_v}) {
                const bool is_k = kind == node_kind::unpack_k;
                params.kind = kind;
                params.first_head = (int32_t)first;
                const int64_t ne[] = {is_k ? l->d : l->e, n, n_kv, n_streams_q};
                rows[is_k ? 0 : 1] = new_node(ctx, GGML_TYPE_F16, ne,
                                              {input, l->blocks, l->window, k_codes, v_codes, source, l->extra, stored},
                                              nullptr, l, params);
                graph.cb(rows[is_k ? 0 : 1], is_k ? "xquant_k" : "xquant_v", il);
            }
            ggml_tensor *heads = ggml_view_3d(ctx, q, q->ne[0], n * n_rep, n_tokens, q->nb[1], q->nb[2],
                                              (size_t)(first * n_rep) * q->nb[1]);
            ggml_tensor *sink =
                sinks ? ggml_view_1d(ctx, sinks, n * n_rep, (size_t)(first * n_rep) * sinks->nb[0]) : nullptr;
            ggml_tensor *part = graph.build_attn_mha(heads, rows[0], rows[1], nullptr, kq_mask, sink, nullptr,
                                                     kv.get_size(), kq_scale, il);
            out = out ? ggml_concat(ctx, out, part, 0) : part;
        }
        ggml_build_forward_expand(graph.gf, out);
        return out;
    }

    const int64_t n_threads = n_tokens == 1 ? graph.cparams.n_threads : graph.cparams.n_threads_batch;
    const int64_t pieces = l->extra ? device_blocks : pieces_per_thread * n_threads;
    const int64_t rows_a_group = l->extra ? 8 : max_rows;
    const int64_t n_groups = n_streams_q * l->n_head_kv * ((n_rows + rows_a_group - 1) / rows_a_group);
    const int64_t wanted = l->extra ? pieces / n_groups : (pieces + n_groups - 1) / n_groups;
    const int64_t n_pages = n_kv / XQ_PAGE;
    params.n_parts = (int32_t)std::clamp<int64_t>(wanted, 1, n_pages);
    if (l->extra) { // as many blocks again and again, until none has too many pages
        const int64_t most = (int64_t)params.n_parts * XQ_CUDA_PART_PAGES;
        params.n_parts *= (int32_t)((n_pages + most - 1) / most);
    }

    params.kind = node_kind::attend;
    const int64_t n_out = l->e * n_head * n_tokens, n_states = l->state_width() * n_head * n_tokens * params.n_parts;
    const int64_t device_ne[] = {n_out + n_states, 1, 1, 1};
    const int64_t host_ne[] = {l->state_width(), n_head, n_tokens, params.n_parts};
    ggml_tensor *states =
        new_node(ctx, GGML_TYPE_F32, l->extra ? device_ne : host_ne,
                 {q, input, kq_mask, l->blocks, stored ? stored : l->window, k_codes, v_codes, source, l->extra, sinks},
                 attend, l, params);
    graph.cb(states, "xquant_attend", il);
    ggml_tensor *out;
    if (l->extra) {
        out = ggml_view_2d(ctx, states, l->e * n_head, n_tokens, l->e * n_head * sizeof(float), 0);
    } else {
        params.kind = node_kind::merge;
        const int64_t out_ne[] = {l->e, n_head, n_tokens, 1};
        out = new_node(ctx, GGML_TYPE_F32, out_ne, {states, sinks ? sinks : states, l->blocks, l->extra}, merge, l,
                       params);
        graph.cb(out, "xquant_merge", il);
        // the layer lies in the CPU's memory: nothing of it shall be copied to a device
        ggml_backend_sched_set_tensor_backend(graph.sched, states, graph.backend_cpu);
        ggml_backend_sched_set_tensor_backend(graph.sched, out, graph.backend_cpu);
        out = ggml_reshape_2d(ctx, out, l->e * n_head, n_tokens);
    }
    ggml_build_forward_expand(graph.gf, out);
    return out;
}

} // namespace xquant
