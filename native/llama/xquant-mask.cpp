/* xquant-mask.cpp: which cells each token of a micro-batch sees: llama.cpp's mask, made faster where that is simple.
 *
 *     mask F16 [cell, token]     0 or, where the token does not see the cell, minus infinity
 *
 * llama.cpp looks at every cell for the first token of a sequence and copies what it found for the others: at 131,072
 * cells and 512 tokens 134 MB, which it then copies to the GPU.  That takes as long as the attention of ten layers.
 *
 * A sequence that has the first cells of its stream to itself needs no look at them: its tokens see all that are used,
 * but for those of later positions.  And if all layers lie on one GPU, the mask of a prompt is made there:
 *
 *     mask = row F16 [cell] for every token, but for a patch F16 [cell of the patch, token]
 *
 * where row says what the last token sees, and the patch covers all cells that it sees and some other token does not:
 * those that the micro-batch writes.  Two nodes of llama.cpp's make the mask of these two.
 */
#include "xquant-kv-cache.h"

#include "xquant-worker.h"

#include "llama-cparams.h"
#include "llama-hparams.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace xquant {

/* Of fewer tokens, or of fewer cells beside the patch, the mask is copied as fast. */
static constexpr int64_t least_tokens = 64, least_patches = 2;
/* Positions behind a token's up to which its row is made from those of later cells. */
static constexpr llama_pos most_later = 1024;

/* A patch has whole blocks of cells: then it lies where that of the micro-batch before lay, as often as llama.cpp sees
 * as many cells as before, and the graph serves again. */
static constexpr int64_t block = 256;

/* The longest patch. */
static int64_t most_cells(int64_t n_tokens, int64_t n_kv) {
    return std::min(2 * (n_tokens + block), n_kv / least_patches);
}

/* ---- one row ---- */

static constexpr ggml_fp16_t seen = 0, hidden = 0xfc00; /* 0 and minus infinity */

/* Whether the cells that are used are the first of n_kv, and all of them the sequence's. */
static bool has_first_cells(const llama_kv_cells &cells, llama_seq_id id, int64_t n_kv) {
    const uint32_t n = cells.get_used();
    return n > 0 && n <= n_kv && cells.used_min() == 0 && cells.used_max_p1() == n && cells.seq_pos_get(id).size() == n;
}

/* What a token sees of n_kv cells, of a sequence that has the first of them. */
static void fill_simple(ggml_fp16_t *row, int64_t n_kv, const llama_kv_cells &cells, llama_seq_id id, llama_pos pos) {
    const uint32_t n = cells.get_used();
    std::fill(row, row + n, seen);
    std::fill(row + n, row + n_kv, hidden);
    const auto &in_order = cells.seq_pos_get(id); // (position, cell)
    for (auto later = in_order.lower_bound({pos + 1, 0}); later != in_order.end(); ++later) {
        row[later->second] = hidden;
    }
}

/* The same of any cells. */
static void fill_any(ggml_fp16_t *row, int64_t n_kv, const llama_kv_cells &cells, llama_seq_id id, llama_pos pos) {
    for (uint32_t c = 0; c < (uint32_t)n_kv; ++c) {
        row[c] = !cells.is_empty(c) && cells.seq_has(c, id) && cells.pos_get(c) <= pos ? seen : hidden;
    }
}

/* ---- a mask on the host ---- */

void kv_cache::set_input_kq_mask(ggml_tensor *mask, const llama_ubatch *ubatch, bool causal) const {
    if (!mask->buffer) {
        return; // a mask on the device has taken its place
    }
    const int64_t n_kv = mask->ne[0], n_tokens = ubatch->n_tokens;
    const auto cells_of = [&](int64_t i) -> const llama_kv_cells & {
        return v_cells[seq_to_stream[ubatch->seq_id[i][0]]];
    };
    bool simple = causal && mask->type == GGML_TYPE_F16 && n_tokens == mask->ne[1] * mask->ne[3] &&
                  !hparams.use_alibi && !ubatch->is_pos_2d();
    for (int64_t i = 0; simple && i < n_tokens; ++i) {
        const llama_seq_id id = ubatch->seq_id[i][0];
        simple = has_first_cells(cells_of(i), id, n_kv) && cells_of(i).seq_pos_max(id) - ubatch->pos[i] <= most_later;
    }
    if (!simple) {
        llama_kv_cache::set_input_kq_mask(mask, ubatch, causal);
        return;
    }
    for (int64_t i = 0; i < n_tokens; ++i) {
        fill_simple((ggml_fp16_t *)mask->data + i * n_kv, n_kv, cells_of(i), ubatch->seq_id[i][0], ubatch->pos[i]);
    }
}

/* ---- a mask on the device ---- */

class kv_cache::mask_input final : public llm_graph_input_i {
  public:
    mask_input(const kv_cache &kv, const llm_graph_context &graph, ggml_tensor *replaced, const mask_patch &at)
        : kv(kv), replaced(replaced), at(at), n_tokens(graph.n_tokens) {
        const auto new_input = [&](const char *name, int64_t n, int64_t n_rows) {
            ggml_tensor *tensor = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F16, n, n_rows);
            ggml_set_input(tensor);
            ggml_set_name(tensor, name);
            return tensor;
        };
        row = new_input("xquant_mask_row", replaced->ne[0], 1);
        patch = new_input("xquant_mask_patch", at.n, n_tokens);
        mask = ggml_repeat(graph.ctx0, row, replaced);
        ggml_tensor *place =
            ggml_view_2d(graph.ctx0, mask, at.n, n_tokens, mask->nb[1], (size_t)at.first * mask->nb[0]);
        // all that reads the mask comes later in the graph
        ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx0, patch, place));
    }

    void set_input(const llama_ubatch *ubatch) override {
        if (row->buffer && patch->buffer) {
            kv.set_mask(row, patch, at.first, *ubatch);
        }
    }
    bool can_reuse(const llm_graph_params &params) override { // llama.cpp's own input compares the cells
        const mask_patch now = kv.patch_of(params.ubatch, params.cparams.causal_attn, replaced);
        return params.ubatch.n_tokens == n_tokens && now.first == at.first && now.n == at.n;
    }

    const kv_cache &kv;
    ggml_tensor *replaced, *row, *patch, *mask; /* replaced: llama.cpp's mask, which has no memory then */
    mask_patch at;
    int64_t n_tokens;
};

/* Where the patch lies; n = 0: the mask is llama.cpp's. */
kv_cache::mask_patch kv_cache::patch_of(const llama_ubatch &ubatch, bool causal, const ggml_tensor *mask) const {
    const mask_patch none = {0, 0};
    const int64_t n_tokens = ubatch.n_tokens, n_kv = mask->ne[0], most = most_cells(n_tokens, n_kv);
    if (n_tokens < least_tokens || !causal || mask->type != GGML_TYPE_F16 || mask->ne[1] != n_tokens ||
        mask->ne[3] != 1 || hparams.use_alibi || layers_.empty()) {
        return none;
    }
    ggml_backend_buffer_type_t buft = layers_.front()->buft;
    const bool one_gpu =
        std::all_of(layers_.begin(), layers_.end(), [&](const auto &l) { return l->buft == buft && !l->cpu_kernels; });
    if (!one_gpu || is_worker(ggml_backend_buft_get_device(buft))) {
        return none;
    }
    if (!running_) { // only measured
        return most >= n_tokens ? mask_patch{0, most} : none;
    }
    const llama_seq_id id = ubatch.seq_id[0][0];
    llama_pos low = std::numeric_limits<llama_pos>::max(), high = -1;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.seq_id[i][0] != id) {
            return none;
        }
        low = std::min(low, ubatch.pos[i]);
        high = std::max(high, ubatch.pos[i]);
    }
    if (ubatch.is_pos_2d()) {
        return none;
    }
    int64_t first = n_kv, end = 0;
    const auto &in_order = v_cells[seq_to_stream[id]].seq_pos_get(id); // (position, cell)
    for (auto at = in_order.lower_bound({low + 1, 0}); at != in_order.end() && at->first <= high; ++at) {
        first = std::min(first, (int64_t)at->second);
        end = std::max(end, (int64_t)at->second + 1);
    }
    if (first >= end || end > n_kv) {
        return none;
    }
    first = first / block * block;
    end = std::min((end + block - 1) / block * block, n_kv);
    return end - first <= most ? mask_patch{first, end - first} : none;
}

/* patch: of the cells from `first` on. */
void kv_cache::set_mask(ggml_tensor *row, ggml_tensor *patch, int64_t first, const llama_ubatch &ubatch) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(row->buffer) && ggml_backend_buffer_is_host(patch->buffer));
    const int64_t n_kv = row->ne[0], n = patch->ne[0];
    const llama_seq_id id = ubatch.seq_id[0][0];
    const auto &cells = v_cells[seq_to_stream[id]];
    const llama_pos last = *std::max_element(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    auto *out = (ggml_fp16_t *)row->data;
    if (has_first_cells(cells, id, n_kv) && cells.seq_pos_max(id) - last <= most_later) {
        fill_simple(out, n_kv, cells, id, last);
    } else {
        fill_any(out, n_kv, cells, id, last);
    }
    std::vector<llama_pos> from((size_t)n, std::numeric_limits<llama_pos>::max()); // which position on a cell is seen
    for (int64_t i = 0; i < n; ++i) {
        const auto c = (uint32_t)(first + i);
        from[(size_t)i] = !cells.is_empty(c) && cells.seq_has(c, id) ? cells.pos_get(c) : from[(size_t)i];
    }
    out = (ggml_fp16_t *)patch->data;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (const llama_pos pos : from) {
            *out++ = pos <= ubatch.pos[i] ? seen : hidden;
        }
    }
}

/* The mask that attention reads instead of llama.cpp's; or that one. */
ggml_tensor *kv_cache::mask_for(const llm_graph_context &graph, ggml_tensor *kq_mask) const {
    for (const auto &input : graph.res->inputs) {
        if (const auto *ours = dynamic_cast<const mask_input *>(input.get()); ours && ours->replaced == kq_mask) {
            return ours->mask;
        }
    }
    const mask_patch at = patch_of(graph.ubatch, graph.cparams.causal_attn, kq_mask);
    if (at.n == 0) {
        return kq_mask;
    }
    return ((mask_input *)graph.res->add_input(std::make_unique<mask_input>(*this, graph, kq_mask, at)))->mask;
}

} // namespace xquant
