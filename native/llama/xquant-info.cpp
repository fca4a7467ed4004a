/* xquant-info.cpp: what is told of a cache, and its F16 rows for calibration. */
#include "xquant-cells.h"
#include "xquant-offsets.h"

#include "llama-impl.h"
#include "llama-model.h"

namespace xquant {

uint64_t kv_cache::count_nonfinite() const {
    uint64_t n = 0;
    for (const auto &l : layers_) {
        if (l->nodes.aux->data) {
            uint64_t of_layer = 0;
            ggml_backend_tensor_get(l->nodes.aux, &of_layer, 0, sizeof(of_layer));
            n += of_layer;
        }
    }
    return n;
}

void kv_cache::warn_of_nonfinite() {
    // reading a device's counters waits for it: only now and then
    if (!warned_ && n_batches_ % 256 == 1 && count_nonfinite() > 0) {
        warned_ = true;
        LLAMA_LOG_WARN(
            "xquant: keys or values that are not finite were stored as 0 or +-65504; with this model, use the "
            "cache type f32 or bf16\n");
    }
}

void kv_cache::info(xquant_llama_info &out) const {
    out = {};
    int64_t sealed = 0, rows = 0, in_bytes = 0; // bytes of one page of each kind, all layers
    for (const auto &l : layers_) {
        for (const ggml_tensor *t : {l->nodes.blocks, l->nodes.rows, l->nodes.aux, l->factors.keys, l->factors.queries,
                                     l->transform.keys, l->transform.queries}) {
            out.bytes_allocated += t ? (int64_t)ggml_nbytes(t) : 0;
        }
        sealed += l->block_bytes * l->shape.n_head_kv;
        rows += page_rows(*l);
        in_bytes += page_bytes(*l);
    }
    for (const auto &[where, rotation] : rotations_) {
        out.bytes_allocated += (int64_t)ggml_nbytes(rotation);
    }
    const xq::page_shape &shape = table_->shape();
    const cells_view view(*this);
    out.bytes_allocated += (int64_t)table_->bytes();
    for (int32_t s = 0; s < shape.n_streams; ++s) {
        for (int32_t p = 0; p < shape.n_pages(); ++p) {
            const int32_t state = table_->state(s, p);
            if (state == XQ_SLOT_NONE || !view.is_any_used(s, p)) {
                out.pages_free++;
            } else if (state == XQ_SLOT_SEALED) {
                out.pages_sealed++;
            } else {
                out.pages_open++;
                out.pages_bytes += xq::is_bytes(state);
            }
        }
    }
    out.bytes_used = out.pages_sealed * sealed + out.pages_bytes * in_bytes + (out.pages_open - out.pages_bytes) * rows;
    out.n_nonfinite = (int64_t)count_nonfinite();
    out.page_tokens = XQ_PAGE;
    out.n_slots = shape.n_slots;
    out.n_bytes = shape.n_bytes;
    out.n_streams = shape.n_streams;
    out.n_layers = plan_.n_layers;
    out.window = plan_.window;
    out.pinned = plan_.pinned;
    out.open_bits = plan_.open_bits;
    out.expected_kld = origin_->expected_kld;
}

void kv_cache::plan(xq_plan &out, int32_t *d, int32_t *e, int32_t *n_head_kv) const {
    out = plan_;
    std::copy(d_.begin(), d_.end(), d);
    std::copy(e_.begin(), e_.end(), e);
    std::fill(n_head_kv, n_head_kv + XQ_MAX_LAYERS, 0);
    for (const auto &l : layers_) {
        n_head_kv[l->il] = l->shape.n_head_kv;
    }
}

int32_t kv_cache::pages(uint32_t stream, int32_t n, xquant_llama_page *out) const {
    if (stream >= n_stream) {
        return -1;
    }
    const int32_t n_pages = table_->shape().n_pages();
    const cells_view view(*this);
    for (int32_t p = 0; p < std::min(n, n_pages); ++p) {
        const auto content = view.content((int32_t)stream, p);
        out[p] = {table_->state((int32_t)stream, p), 0, table_->age(view, (int32_t)stream, p)};
        for (const uint32_t word : content.valid) {
            out[p].n_cells += __builtin_popcount(word);
        }
    }
    return n_pages;
}

/* Calls move(rows tensor, offset, bytes, element of the caller's rows) for each page of the first cells of stream 0. */
template <typename F>
bool kv_cache::each_run(int32_t il, bool is_value, int32_t head, int32_t n_cells, const F &move) const {
    const layer *l = find(il);
    if (!l || head < 0 || head >= l->shape.n_head_kv || n_cells < 0 || (uint32_t)n_cells > get_size()) {
        return false;
    }
    for (int32_t p = 0; p < pages_of((uint64_t)n_cells); ++p) {
        if (table_->state(0, p) < 0) {
            return false;
        }
    }
    const int32_t width = is_value ? l->shape.e : l->shape.d;
    for (int32_t p = 0; p < pages_of((uint64_t)n_cells); ++p) {
        const int64_t n = std::min<int64_t>(XQ_PAGE, n_cells - (int64_t)p * XQ_PAGE) * width;
        move(l->nodes.rows, (size_t)row_offset(*l, !is_value, 0, head, table_->state(0, p)),
             (size_t)n * sizeof(uint16_t), (size_t)p * XQ_PAGE * width);
    }
    return true;
}

bool kv_cache::read_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, uint16_t *rows) const {
    return each_run(il, is_value, head, n_cells, [rows](ggml_tensor *t, size_t offset, size_t bytes, size_t at) {
        ggml_backend_tensor_get(t, rows + at, offset, bytes);
    });
}

bool kv_cache::write_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, const uint16_t *rows) const {
    return each_run(il, is_value, head, n_cells, [rows](ggml_tensor *t, size_t offset, size_t bytes, size_t at) {
        ggml_backend_tensor_set(t, rows + at, offset, bytes);
    });
}

} // namespace xquant
