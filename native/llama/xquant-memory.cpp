/* xquant-memory.cpp: the memory of the cache's tensors: blocks, which stay, and open pages, which grow with the
 * sequences that want some.
 *
 * A cache begins with the slots of one sequence.  Whoever brings more, a batch or a saved state, asks for room first:
 * rows move into larger tensors then, and graphs that name the old ones are not used again (generation_).
 */
#include "xquant-kv-cache.h"

#include "xquant-offsets.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>

namespace xquant {

ggml_context *kv_cache::context_of(contexts &of, ggml_backend_buffer_type_t buft) const {
    auto &ctx = of[buft];
    if (!ctx) {
        ggml_init_params params = {};
        // of each layer blocks, aux, at most three tensors by which keys and queries are multiplied, views of streams
        params.mem_size = hparams.n_layer_all * (5 + (size_t)n_stream) * ggml_tensor_overhead();
        params.no_alloc = true;
        ctx.reset(ggml_init(params));
    }
    return ctx.get();
}

kv_cache::rows_of_layer kv_cache::new_rows(const layer &l, contexts &open) const {
    ggml_context *ctx = context_of(open, l.buft);
    ggml_tensor *rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, xq_store_row_bytes(&l.shape) / 2, n_stream);
    ggml_format_name(rows, "cache_xq_rows_l%d", l.il);
    std::vector<ggml_tensor *> streams;
    for (uint32_t s = 0; s < n_stream; ++s) {
        streams.push_back(ggml_view_1d(ctx, rows, rows->ne[0], s * rows->nb[1]));
    }
    return {rows, std::move(streams)};
}

kv_cache::buffers kv_cache::allocate(contexts &of, const char *what) const {
    buffers out;
    for (auto &[buft, ctx] : of) {
        ggml_backend_buffer_ptr buffer;
        if (hparams.no_alloc) { // llama.cpp asks how large it would be
            buffer.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (ggml_tensor *t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buffer.get();
            }
        } else {
            buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        }
        if (!buffer) {
            refuse("its memory could not be allocated");
        }
        ggml_backend_buffer_clear(buffer.get(), 0);
        const double size = (double)ggml_backend_buffer_get_size(buffer.get()) / (1024.0 * 1024.0);
        LLAMA_LOG_INFO("xquant: %10s KV %s = %8.2f MiB (%d cells, %d layers)\n", ggml_backend_buffer_name(buffer.get()),
                       what, size, (int)get_size(), (int)layers_.size());
        out.emplace_back(std::move(ctx), std::move(buffer));
    }
    return out;
}

std::map<ggml_backend_buffer_type_t, size_t> kv_cache::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> out;
    for (const buffers *some : {&fixed_, &open_}) {
        for (const auto &[ctx, buffer] : *some) {
            ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buffer.get());
            out[buft] += hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
                                          : ggml_backend_buffer_get_size(buffer.get());
        }
    }
    return out;
}

/* ---- slots by need ---- */

kv_cache::slot_counts kv_cache::slots_for(uint32_t n_seq) const {
    const int32_t n = n_stream == 1 ? (int32_t)std::max(n_seq, 1u) : 1, n_pages = table_->shape().n_pages();
    const int32_t n_slots = xq_plan_slots(&plan_, n_pages, n), n_bytes = xq_plan_byte_slots(&plan_, n_pages, n);
    // in bytes, windows take no slots
    const int32_t windows = plan_.window < 0 || n_bytes > 0 ? 0 : n * pages_of((uint64_t)plan_.window);
    return {n_slots, n_bytes, std::min(windows, std::max(n_slots - 1, 0)), pages_of(n_ubatch_) + n};
}

void kv_cache::make_room(std::set<llama_seq_id> sequences) {
    for (llama_seq_id id = 0; id < (llama_seq_id)n_seq_max; ++id) {
        if (v_cells[seq_to_stream[id]].seq_pos_max(id) >= 0) {
            sequences.insert(id);
        }
    }
    const slot_counts counts = slots_for((uint32_t)sequences.size());
    const bool more = counts.n_slots > table_->shape().n_slots || counts.n_bytes > table_->shape().n_bytes;
    if (more && is_idle() && grow(counts)) {
        LLAMA_LOG_INFO("xquant: room for %d open pages, for %d sequences\n", counts.n_slots + counts.n_bytes,
                       (int)sequences.size());
    }
}

/* Copies the open pages of a layer into the same slots of a larger one. */
static void copy_rows(const layer &from, const layer &to, int32_t n_streams) {
    std::vector<uint8_t> bytes;
    const auto copy = [&](size_t here, size_t there) {
        ggml_backend_tensor_get(from.nodes.rows, bytes.data(), here, bytes.size());
        ggml_backend_tensor_set(to.nodes.rows, bytes.data(), there, bytes.size());
    };
    bytes.resize((size_t)(from.shape.n_bytes * xq_byte_block_bytes(from.shape.d, from.shape.e)));
    for (int32_t s = 0; s < n_streams && !bytes.empty(); ++s) {
        for (int32_t head = 0; head < from.shape.n_head_kv; ++head) {
            copy(byte_offset(from, s, head, XQ_SLOT_BYTES), byte_offset(to, s, head, XQ_SLOT_BYTES));
        }
    }
    for (const bool is_k : {true, false}) {
        if (!is_k && from.shape.e == 0) {
            continue;
        }
        bytes.resize((size_t)from.shape.n_slots * XQ_PAGE * (is_k ? from.shape.d : from.shape.e) * sizeof(uint16_t));
        for (int32_t s = 0; s < n_streams; ++s) {
            for (int32_t head = 0; head < from.shape.n_head_kv; ++head) {
                copy(row_offset(from, is_k, s, head, 0), row_offset(to, is_k, s, head, 0));
            }
        }
    }
}

bool kv_cache::grow(const slot_counts &counts) {
    contexts open;
    buffers memory;
    std::vector<layer> larger;
    for (const auto &l : layers_) {
        larger.push_back(*l);
        layer &more = larger.back();
        more.shape.n_slots = counts.n_slots;
        more.shape.n_bytes = more.nodes.params.n_bytes = counts.n_bytes;
        std::tie(more.nodes.rows, more.row_streams) = new_rows(more, open);
    }
    try {
        memory = allocate(open, "open pages");
    } catch (const std::exception &) {
        LLAMA_LOG_WARN("xquant: there is no memory for %d open pages: %d must do, and pages are sealed early\n",
                       counts.n_slots + counts.n_bytes, table_->shape().n_slots + table_->shape().n_bytes);
        return false;
    }
    runner_.synchronize();
    for (size_t i = 0; i < layers_.size(); ++i) {
        layer &l = *layers_[i];
        copy_rows(l, larger[i], (int32_t)n_stream);
        l.nodes = larger[i].nodes;
        l.row_streams = larger[i].row_streams;
        l.shape = larger[i].shape;
    }
    open_ = std::move(memory);
    table_->grow(counts.n_slots, counts.n_bytes, counts.reserved, counts.staged);
    generation_++;
    return true;
}

} // namespace xquant
