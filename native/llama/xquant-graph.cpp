/* xquant-graph.cpp: attention of a layer in a model's graph: update, then attend, or unpack and llama.cpp's own
 * kernels.
 */
#include "xquant-kv-cache.h"

#include "xquant-shared.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

namespace xquant {

/* Blocks of threads that fill a large GPU. */
static constexpr int64_t device_blocks = 132;
/* Rows of KV heads that are unpacked at a time: bounds the F16 copy, 1 GiB for keys and values of width 128.  Pieces
 * cost nodes, for which an insertion makes room. */
static constexpr int64_t rows_at_once = 1 << 21, max_pieces = 8;

/* What a graph's nodes of our cache read besides tensors of layers. */
class kv_cache::page_input final : public llm_graph_input_i {
  public:
    page_input(const kv_cache &kv, const llm_graph_context &graph)
        : kv(kv), n_tokens((uint32_t)graph.n_tokens), n_staged(kv.staged_for(graph.ubatch)),
          generation(kv.generation_) {
        const auto new_input = [&](const char *name, int64_t width, int64_t n) {
            ggml_tensor *tensor = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I32, width, n);
            ggml_set_input(tensor);
            ggml_set_name(tensor, name);
            return tensor;
        };
        const xq::page_shape &shape = kv.table_->shape();
        input = new_input("xquant_input", input_size(shape.n_streams, shape.n_pages(), graph.n_tokens), 1);
        if (n_staged > 0) {
            const int64_t n_streams = std::min((int64_t)shape.n_streams, graph.n_tokens);
            const int64_t n_slots = n_staged + shape.n_slots * n_streams, n_bytes = shape.n_bytes * n_streams;
            moves[0] = new_input("xquant_to_codes", XQ_MOVE_WORDS, n_slots + n_bytes);
            moves[1] = n_bytes > 0 ? new_input("xquant_to_bytes", XQ_MOVE_WORDS, n_slots) : nullptr;
        }
    }

    void set_input(const llama_ubatch *) override {
        if (input->buffer) {
            kv.set_input(input);
        }
        for (const int step : {0, 1}) {
            if (moves[step] && moves[step]->buffer) {
                kv.set_moves(moves[step], step);
            }
        }
    }
    bool can_reuse(const llm_graph_params &params) override {
        const int32_t wanted = kv.after_.n_staged;
        return params.ubatch.n_tokens == n_tokens && generation == kv.generation_ && wanted <= n_staged &&
               (wanted > 0) == (n_staged > 0);
    }

    const kv_cache &kv;
    ggml_tensor *input, *moves[2] = {}; /* moves: steps of clearing the stage; null: there is none */
    uint32_t n_tokens;
    int32_t n_staged;                           /* slots of the stage */
    uint64_t generation;                        /* of the tensors that the graph's nodes name */
    std::map<const layer *, open_tensors> open; /* of layers whose update is in the graph */
};

kv_cache::page_input &kv_cache::input_of(const llm_graph_context &graph) const {
    for (const auto &input : graph.res->inputs) {
        if (auto *ours = dynamic_cast<page_input *>(input.get()); ours && &ours->kv == this) {
            return *ours;
        }
    }
    return *(page_input *)graph.res->add_input(std::make_unique<page_input>(*this, graph));
}

/* Slots of the stage in a graph: as many as micro-batches of the size want, so that they can share it.  A graph that is
 * only measured gets the stage of the worst of its size. */
int32_t kv_cache::staged_for(const llama_ubatch &ubatch) const {
    const auto n_tokens = (int32_t)ubatch.n_tokens;
    if ((running_ && after_.n_staged == 0) || n_tokens == 1 || !table_->seals()) {
        return 0;
    }
    const int32_t usual = pages_of((uint64_t)n_tokens) + (n_stream > 1 ? (int32_t)ubatch.n_seqs_unq : 1);
    return std::max(usual, running_ ? after_.n_staged : 0);
}

void kv_cache::set_input(ggml_tensor *tensor) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(tensor->buffer));
    const int32_t n_pages = table_->shape().n_pages(), n_slots = table_->shape().n_slots;
    int32_t *input = (int32_t *)tensor->data, *out = input + input_table;
    input[0] = (int32_t)current_.s0;
    input[input_serial] = serial_;
    for (uint32_t s = 0; s < n_stream; ++s) {
        for (int32_t p = 0; p < n_pages; ++p) {
            *out++ = table_->state((int32_t)s, p);
        }
    }
    for (size_t i = 0; i < current_.n_stream(); ++i) { // the row of each token, counted over streams
        const int32_t s = (int32_t)current_.strm[i];
        for (const uint32_t cell : current_.idxs[i]) {
            const int32_t slot = table_->state(s, (int32_t)(cell / XQ_PAGE)); // of the stage: behind all streams
            const int64_t nth = (int64_t)(slot < n_slots ? s : (int32_t)n_stream - 1) * n_slots + slot;
            *out++ = (int32_t)(nth * XQ_PAGE + cell % XQ_PAGE);
        }
    }
}

/* What a step does with the stage; the rest of the list moves nothing. */
void kv_cache::set_moves(ggml_tensor *tensor, int step) const {
    const auto &moves = after_.after[step];
    GGML_ASSERT(ggml_backend_buffer_is_host(tensor->buffer) && (int64_t)moves.size() <= tensor->ne[1]);
    auto *out = (xq::page_move *)tensor->data;
    auto *end = std::copy(moves.begin(), moves.end(), out);
    std::fill(end, out + tensor->ne[1], xq::page_move{0, 0, XQ_SLOT_NONE, XQ_SLOT_NONE, {}});
}

/* Parts that the pages of a KV head are split into, so that a backend is busy.
 *
 * n_rows: query rows of a KV head and stream; n_heads: KV heads of all streams. */
static int32_t parts_of(const layer &l, int64_t n_rows, int64_t n_heads, int64_t n_pages, int64_t n_threads) {
    const auto groups_of = [&](int64_t rows) { return (n_rows + rows - 1) / rows; };
    if (groups_of(l.cpu_kernels ? XQ_CPU_GROUP_ROWS : XQ_CUDA_GROUP_ROWS) > max_split_groups) {
        return 1; // no counters for their arrivals
    }
    if (l.cpu_kernels) {
        return xq_cpu_parts(groups_of(XQ_CPU_GROUP_ROWS) * n_heads, n_pages, (int32_t)n_threads);
    }
    const bool narrow = l.latent == 0 && !l.map && xq::is_narrow(l.plan.k, l.plan.v, l.shape.d, l.shape.e);
    const int64_t n = groups_of(narrow ? XQ_CUDA_GROUP_ROWS : XQ_CUDA_WIDE_ROWS) * n_heads;
    const int64_t parts = std::clamp<int64_t>(device_blocks / n, 1, n_pages), most = parts * XQ_CUDA_PART_PAGES;
    return (int32_t)(parts * ((n_pages + most - 1) / most)); // again and again, until none has too many pages
}

/* Nothing of a layer in the CPU's memory shall be copied to a device. */
static void keep_on_host(const llm_graph_context &graph, const layer &l, ggml_tensor *node) {
    if (l.on_host) {
        ggml_backend_sched_set_tensor_backend(graph.sched, node, graph.backend_cpu);
    }
}

/* Whether the layer's own nodes rotate keys and queries: on a GPU, where that takes two launches less. */
static bool nodes_rotate(const layer &l) {
    return l.rotation && !l.cpu_kernels;
}

ggml_tensor *kv_cache::attend_codes(const llm_graph_context &graph, const layer &l, const page_input &input,
                                    const open_tensors &open, bool after_update, ggml_tensor *q, ggml_tensor *mask,
                                    ggml_tensor *sinks, float scale, int il) const {
    const int64_t n_head = q->ne[1], n_tokens = q->ne[2], n_streams = mask->ne[3], n_head_kv = l.shape.n_head_kv;
    const int64_t n_threads = n_tokens == 1 ? graph.cparams.n_threads : graph.cparams.n_threads_batch;
    attend_options options = {};
    options.scale = scale;
    options.softcap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
    options.max_bias = graph.hparams.f_max_alibi_bias;
    options.after_update = after_update;
    options.rotate = nodes_rotate(l);
    options.n_parts = parts_of(l, n_tokens / n_streams * (n_head / n_head_kv), n_streams * n_head_kv,
                               mask->ne[0] / XQ_PAGE, n_threads);
    ggml_tensor *node = new_attend(graph.ctx0, l.nodes, open, input.input, q, mask, sinks, options);
    graph.cb(node, "xquant_attend", il);
    keep_on_host(graph, l, node);
    const int64_t width = (l.latent + l.shape.e) * n_head;
    return ggml_view_2d(graph.ctx0, node, width, n_tokens, width * sizeof(float), 0);
}

ggml_tensor *kv_cache::attend_unpacked(const llm_graph_context &graph, const layer &l, const page_input &input,
                                       const open_tensors &open, ggml_tensor *q, ggml_tensor *mask, ggml_tensor *sinks,
                                       float scale, int il) const {
    ggml_context *ctx = graph.ctx0;
    const int64_t n_kv = mask->ne[0], n_streams = mask->ne[3], all = l.shape.n_head_kv, n_rep = q->ne[1] / all;
    const int64_t wanted = (all * n_kv * n_streams + rows_at_once - 1) / rows_at_once;
    // ALiBi's slopes belong to the number of a head among all
    const int64_t pieces = graph.hparams.f_max_alibi_bias > 0.0f ? 1 : std::min(wanted, max_pieces);
    const int64_t heads_a_piece = (all + pieces - 1) / pieces;
    ggml_tensor *out = nullptr;
    for (int64_t first = 0; first < all; first += heads_a_piece) {
        const int64_t n = std::min(heads_a_piece, all - first);
        const auto unpacked = [&](bool is_k) {
            const int64_t ne[] = {is_k ? l.shape.d : l.shape.e, n, n_kv, n_streams};
            ggml_tensor *node = new_unpack(ctx, l.nodes, open, input.input, is_k, (int32_t)first, ne);
            graph.cb(node, is_k ? "xquant_k" : "xquant_v", il);
            return node;
        };
        ggml_tensor *heads =
            ggml_view_3d(ctx, q, q->ne[0], n * n_rep, q->ne[2], q->nb[1], q->nb[2], (size_t)(first * n_rep) * q->nb[1]);
        ggml_tensor *sink =
            sinks ? ggml_view_1d(ctx, sinks, n * n_rep, (size_t)(first * n_rep) * sinks->nb[0]) : nullptr;
        ggml_tensor *k = unpacked(true);
        ggml_tensor *v = l.shape.e > 0 ? unpacked(false) : nullptr;
        if (l.latent > 0) {
            ggml_tensor *latent =
                ggml_view_4d(ctx, k, l.latent, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
            v = v ? ggml_concat(ctx, latent, v, 0) : latent;
        }
        ggml_tensor *part = graph.build_attn_mha(heads, k, v, nullptr, mask, sink, nullptr, get_size(), scale, il);
        out = out ? ggml_concat(ctx, out, part, 0) : part;
    }
    return out;
}

/* Of latent attention: what attention gives is a mix of latent rows, from which v_mla [width, e of a head, head] makes
 * values of each head. */
static ggml_tensor *from_latent(const llm_graph_context &graph, ggml_tensor *latent /* [width * head, token] */,
                                ggml_tensor *v_mla) {
    ggml_context *ctx = graph.ctx0;
    const int64_t width = v_mla->ne[0], n_head = v_mla->ne[2], n_tokens = latent->ne[1];
    const size_t row = ggml_row_size(latent->type, width);
    ggml_tensor *by_head = ggml_view_3d(ctx, latent, width, n_tokens, n_head, latent->nb[1], row, 0);
    ggml_tensor *values = ggml_permute(ctx, ggml_mul_mat(ctx, v_mla, by_head), 0, 2, 1, 3); // [e, head, token]
    return ggml_cont_2d(ctx, values, values->ne[0] * n_head, n_tokens);
}

ggml_tensor *kv_cache::build_attention(const llm_graph_context &graph, ggml_tensor *q, ggml_tensor *k_cur,
                                       ggml_tensor *v_cur, ggml_tensor *kq_b, ggml_tensor *kq_mask, ggml_tensor *sinks,
                                       ggml_tensor *v_mla, float kq_scale, int il) const {
    const layer &l = *by_model_layer_.at(il); // of layers without keys and values of their own: an earlier one's
    if (kq_b || kq_mask->type != GGML_TYPE_F16 || (v_mla && v_mla->ne[0] != l.latent)) {
        refuse("this model's attention has a bias on the scores, or a latent projection of another width than its "
               "values; use the cache type f16");
    }
    ggml_context *ctx = graph.ctx0;
    page_input &input = input_of(graph);
    kq_mask = mask_for(graph, kq_mask);
    const bool shared = l.turned >= 0;
    q = shared ? to_stored_order(ctx, q, l.turned) : q;
    if (k_cur && shared) {
        k_cur = to_stored_order(ctx, k_cur, l.turned);
        v_cur = turned_channels(ctx, v_cur, l.turned);
    }
    const int64_t n_rows = q->ne[2] / kq_mask->ne[3] * (q->ne[1] / l.shape.n_head_kv); // of one KV head and stream
    const bool unpacks = !l.cpu_kernels && n_rows >= rows_to_unpack;
    const auto rotated = [&](ggml_tensor *x, ggml_tensor *factors, bool now) {
        if (factors) {
            x = ggml_mul(ctx, x, factors);
            keep_on_host(graph, l, x);
        }
        if (now) {
            x = llama_mul_mat_hadamard(ctx, x, l.rotation);
            keep_on_host(graph, l, x->src[0]);
        }
        return x;
    };
    if (l.rotation) {
        q = rotated(q, l.factors.queries, !nodes_rotate(l) || unpacks);
        k_cur = k_cur ? rotated(k_cur, l.factors.keys, !nodes_rotate(l)) : nullptr;
    }
    if (l.transform.keys) {
        const auto times = [&](ggml_tensor *matrix, ggml_tensor *x) {
            ggml_tensor *out = times_matrix(ctx, matrix, x);
            keep_on_host(graph, l, out->src[0]);
            return out;
        };
        q = times(l.transform.queries, q);
        k_cur = k_cur ? times(l.transform.keys, k_cur) : nullptr;
    }
    if (k_cur) {
        const auto f32 = [&](ggml_tensor *x) {
            return x->type == GGML_TYPE_F32 ? x : ggml_cast(ctx, x, GGML_TYPE_F32);
        };
        // attention may begin before the update has ended: all else that it reads comes first
        ggml_build_forward_expand(graph.gf, q);
        ggml_build_forward_expand(graph.gf, kq_mask);
        const open_tensors open = new_update(ctx, l.nodes, input.input, f32(k_cur),
                                             l.shape.e > 0 ? f32(v_cur) : nullptr, input.n_staged, nodes_rotate(l));
        ggml_tensor *update = open.stage ? open.stage : open.rows;
        graph.cb(update, "xquant_update", il);
        keep_on_host(graph, l, update);
        ggml_build_forward_expand(graph.gf, update);
        input.open[&l] = open;
    }
    const auto found = input.open.find(&l); // a layer may read what an earlier one of the graph wrote
    const open_tensors open = found == input.open.end() ? open_tensors{l.nodes.rows, nullptr} : found->second;
    ggml_tensor *out = unpacks ? attend_unpacked(graph, l, input, open, q, kq_mask, sinks, kq_scale, il)
                               : attend_codes(graph, l, input, open, k_cur != nullptr, q, kq_mask, sinks, kq_scale, il);
    out = v_mla    ? from_latent(graph, out, v_mla)
          : shared ? shared_values(graph, out, model.layers[(size_t)l.il].attn_k_norm, l.turned)
                   : out;
    ggml_build_forward_expand(graph.gf, out);
    for (const int step : {0, 1}) { // all that reads the stage comes before
        if (open.stage && il == l.last_reader && input.moves[step]) {
            ggml_tensor *cleared = new_clearing(ctx, l.nodes, input.input, input.moves[step], open.stage, step);
            graph.cb(cleared, "xquant_clear", il);
            keep_on_host(graph, l, cleared);
            ggml_build_forward_expand(graph.gf, cleared);
        }
    }
    return out;
}

} // namespace xquant

xquant::kv_cache *llama_kv_cache_context::xq() const {
    return dynamic_cast<xquant::kv_cache *>(kv);
}
