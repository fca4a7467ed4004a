/* xquant-shift.cpp: context shift.  Keys are stored after RoPE, so a cell whose position changes by n needs its key
 * rotated by n more.
 *
 * Only pages with such cells are touched, a few at a time: sealed or open, their keys are read as F32 [d, KV head,
 * token], rotated by llama.cpp's own operation, and stored as they were, on the device where the layer lies.  The cells
 * of a graph's pages forget their shift when it has run: a later one that fails turns nothing twice.
 */
#include "xquant-cells.h"
#include "xquant-shared.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <map>

namespace xquant {

/* Pages of one graph: bounds the F32 copy to a few hundred tokens. */
static constexpr size_t pages_a_graph = 4;
/* Nodes that a layer takes: keys are read, rotated, and written; up to ten more where they lie in other coordinates. */
static constexpr size_t nodes_a_layer = 18;

bool kv_cache::shift_pages(llama_context *lctx, const std::vector<xq::page_move> &pages,
                           const std::vector<int32_t> &by) {
    const auto &cparams = lctx->get_cparams();
    ggml_tensor *list = nullptr, *angles = nullptr;
    const auto by_hadamard = [&](ggml_context *ctx, ggml_tensor *k, const layer &l) {
        ggml_tensor *out = llama_mul_mat_hadamard(ctx, k, l.rotation);
        runner_.place(out->src[0], l.buft);
        return out;
    };
    const auto times = [&](ggml_context *ctx, ggml_tensor *matrix, ggml_tensor *k, const layer &l) {
        ggml_tensor *view = times_matrix(ctx, matrix, k), *out = ggml_cont(ctx, view);
        for (ggml_tensor *node : {view->src[0], out}) {
            runner_.place(node, l.buft);
        }
        return out;
    };
    const auto rotated = [&](ggml_context *ctx, ggml_cgraph *graph, const layer &l) {
        ggml_tensor *k = new_read_keys(ctx, l.nodes, list);
        runner_.place(k, l.buft);
        if (l.turned >= 0) {
            k = from_stored_order(ctx, k, l.turned);
        }
        k = l.rotation ? by_hadamard(ctx, k, l) : k; // which is its own inverse
        if (l.factors.keys) {
            k = ggml_div(ctx, k, l.factors.keys);
            runner_.place(k, l.buft);
        }
        if (l.transform.keys) {
            ggml_tensor *inverse = ggml_cont(ctx, ggml_transpose(ctx, l.transform.queries));
            runner_.place(inverse, l.buft);
            k = times(ctx, inverse, k, l);
        }
        // of latent rows the last channels are rotated, and of the keys that are made of them
        const int64_t n_rot = hparams.n_rot((uint32_t)l.il), first = hparams.n_lora_kv > 0 ? k->ne[0] - n_rot : 0;
        ggml_tensor *part = ggml_view_3d(ctx, k, first > 0 ? n_rot : k->ne[0], k->ne[1], k->ne[2], k->nb[1], k->nb[2],
                                         (size_t)first * k->nb[0]);
        part = build_rope_shift(cparams, ctx, part, angles, nullptr, model.get_rope_factors(cparams, l.il),
                                model.get_rope_freq_base(cparams, l.il), model.get_rope_freq_scale(cparams, l.il),
                                (uint32_t)l.il);
        runner_.place(part, l.buft); // in place: elsewhere it would write what lies here
        ggml_build_forward_expand(graph, part);
        if (l.factors.keys) {
            k = ggml_mul(ctx, k, l.factors.keys);
            runner_.place(k, l.buft);
        }
        return l.turned >= 0      ? to_stored_order(ctx, k, l.turned)
               : l.rotation       ? by_hadamard(ctx, k, l)
               : l.transform.keys ? times(ctx, l.transform.keys, k, l)
                                  : k;
    };
    const auto build = [&](ggml_context *ctx, ggml_cgraph *graph) {
        list = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, XQ_MOVE_WORDS, (int64_t)pages.size());
        angles = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t)by.size());
        ggml_set_input(list);
        ggml_set_input(angles);
        // all keys are read before any is written: a layer that borrows codes reads them before their owner has new
        // ones
        std::map<const layer *, ggml_tensor *> keys;
        for (const auto &l : layers_) {
            if (hparams.has_rope((uint32_t)l->il)) {
                keys[l.get()] = rotated(ctx, graph, *l);
                ggml_build_forward_expand(graph, keys[l.get()]);
            }
        }
        for (const auto &l : layers_) {
            if (const auto found = keys.find(l.get()); found != keys.end()) {
                ggml_tensor *stored = new_write_keys(ctx, l->nodes, list, found->second);
                runner_.place(stored, l->buft);
                ggml_build_forward_expand(graph, stored);
            }
        }
    };
    return runner_.run(nodes_a_layer * layers_.size() + 2, build, [&] {
        ggml_backend_tensor_set(list, pages.data(), 0, ggml_nbytes(list));
        ggml_backend_tensor_set(angles, by.data(), 0, ggml_nbytes(angles));
    });
}

/* The keys of a page's cells are rotated: what is left is their position. */
void kv_cache::forget_shifts(const xq::page_move &page) {
    auto &cells = v_cells[page.stream];
    const uint32_t first = (uint32_t)page.page * XQ_PAGE, end = std::min(first + XQ_PAGE, cells.size());
    for (uint32_t cell = first; cell < end; ++cell) {
        if (cells.is_empty(cell) || cells.get_shift(cell) == 0) {
            continue;
        }
        const llama_pos pos = cells.pos_get(cell);
        const llama_kv_cell_ext ext = cells.ext_get(cell);
        std::vector<llama_seq_id> ids;
        for (llama_seq_id id = 0; id < (llama_seq_id)n_seq_max; ++id) {
            if (cells.seq_has(cell, id)) {
                ids.push_back(id);
            }
        }
        cells.rm(cell);
        cells.pos_set(cell, pos);
        cells.ext_set(cell, ext);
        for (const llama_seq_id id : ids) {
            cells.seq_add(cell, id);
        }
    }
}

bool kv_cache::update(llama_context *lctx, bool do_shift, const stream_copy_info &) {
    if (!do_shift) {
        return false;
    }
    std::vector<xq::page_move> pages;
    std::vector<std::vector<int32_t>> shifts; // of each page, by token
    const cells_view view(*this);
    for (int32_t s = 0; s < table_->shape().n_streams; ++s) {
        const auto &cells = v_cells[s];
        for (int32_t p = 0; p < table_->shape().n_pages(); ++p) {
            std::vector<int32_t> by(XQ_PAGE, 0);
            for (uint32_t i = 0; i < XQ_PAGE && (uint32_t)p * XQ_PAGE + i < cells.size(); ++i) {
                const uint32_t cell = (uint32_t)p * XQ_PAGE + i;
                by[i] = cells.is_empty(cell) ? 0 : cells.get_shift(cell);
            }
            if (std::any_of(by.begin(), by.end(), [](int32_t n) { return n != 0; })) {
                xq::page_move page = {s, p, table_->state(s, p), XQ_SLOT_NONE, {}};
                const auto content = view.content(s, p);
                std::copy(std::begin(content.valid), std::end(content.valid), page.valid);
                pages.push_back(page);
                shifts.push_back(std::move(by));
            }
        }
    }
    lctx->synchronize();
    const bool turns = hparams.rope_type != LLAMA_ROPE_TYPE_NONE && !layers_.empty();
    for (size_t first = 0; first < pages.size() && turns; first += pages_a_graph) {
        const size_t end = std::min(first + pages_a_graph, pages.size());
        const std::vector<xq::page_move> some(pages.begin() + (int64_t)first, pages.begin() + (int64_t)end);
        std::vector<int32_t> by;
        for (size_t i = first; i < end; ++i) {
            by.insert(by.end(), shifts[i].begin(), shifts[i].end());
        }
        if (!shift_pages(lctx, some, by)) {
            return first > 0;
        }
        std::for_each(some.begin(), some.end(), [this](const auto &page) { forget_shifts(page); });
    }
    for (auto &cells : v_cells) {
        cells.reset_shift();
    }
    return true;
}

} // namespace xquant
