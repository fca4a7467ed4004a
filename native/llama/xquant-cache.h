/* xquant-cache.h: the KV cache of the fork: pages that are open (F16) or sealed (codes).
 *
 * Cells are numbered by llama.cpp (llama_kv_cells); XQ_PAGE consecutive cells of a stream are one page, in all layers
 * together.  A page is free, open (its rows lie in one of n_slots window slots) or sealed (one block per layer and KV
 * head).  Per micro-batch and layer the graph runs three operations:
 *
 *     update   seals the pages that left the window, unseals those about to be written, writes the new rows
 *     attend   one online softmax over open and sealed pages: partial states, split over pages
 *     merge    partial states to the output
 *
 * The graph's topology depends on none of this: which pages go where is one input tensor, filled by set_input().
 *
 * Layout of one layer, per stream:    blocks  I8   [KV head][page][block of xq_block_layout]
 *                                     window  F16  K [KV head][slot][XQ_PAGE][d], then V [KV head][slot][XQ_PAGE][e]
 *
 * Rule of sealing: before a micro-batch is written, a page is sealed if at least `window` tokens were written after its
 * newest one, unless it is among the pinned first pages of a sequence.  If a micro-batch needs more slots than are
 * free, the pages that were written longest ago are sealed early, the first of a sequence last: precision gives way,
 * never correctness.
 *
 * Rule of writing: free cells of sealed pages are written last, when no others are left.  A beginning that many prompts
 * share may end inside a page: were the rest of it written again and again, its codes would be made anew each time, and
 * each time lose as much.
 */
#pragma once

#include "llama-kv-cache.h"

#include "xquant-metadata.h"
#include "xquant-node.h"
#include "xquant.h"
#include "xquant_llama.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace xquant {

/* Called before a context's memory is made: throws what XQuant cannot serve, keeps what the cache needs to know. */
void announce(const llama_model &model, const llama_memory_params &params, const llama_cparams &cparams);

/* Micro-batch size of the context that announce() saw last on this thread. */
uint32_t announced_n_ubatch();

/* Records why a context cannot be created (xquant_llama_error) and throws it. */
[[noreturn]] void refuse(const std::string &reason);

/* The plan by model layer from the model's metadata; d, e [XQ_MAX_LAYERS]: head widths, 0 where a layer has no cache.
 */
void resolve_plan(const llama_model &model, const int32_t *d, const int32_t *e, xq_plan &plan);

inline int32_t pages_of(uint64_t tokens) {
    return (int32_t)((tokens + XQ_PAGE - 1) / XQ_PAGE);
}

/* Sums of two positions fit into 32 bits. */
constexpr llama_pos max_position = 1 << 30;

class cache {
  public:
    using slot_info = llama_kv_cache::slot_info;

    cache(llama_kv_cache &kv, uint32_t kv_size, const llama_memory_i::layer_filter_cb &filter);
    cache(const cache &) = delete;
    cache &operator=(const cache &) = delete;

    /* Tensors of model layer il, in ctx, which will be allocated from buft: blocks and window. */
    std::pair<ggml_tensor *, ggml_tensor *> add_layer(ggml_context *ctx, ggml_backend_buffer_type_t buft, uint32_t il);
    /* Whether a device has our kernels; if not, a warning says what follows. */
    bool runs_on(ggml_backend_dev_t device);

    /* ---- pages ---- */

    void clear();
    /* Decides what to seal, unseal and open for a micro-batch whose cells are already taken. */
    bool begin(const slot_info &sinfo);
    /* Pages without cells are free again. */
    void release_pages();
    /* Cells for a micro-batch; empty: there are too few. */
    slot_info find_slot(const llama_ubatch &ubatch) const;
    void copy_stream(uint32_t from, uint32_t to);
    /* What llama.cpp would stop the process for is an error in the log: sequences that do not exist, ... */
    bool has_sequence(llama_seq_id id, const char *caller) const;
    bool may_add(llama_seq_id id, llama_pos shift) const;
    bool may_divide(llama_seq_id id, int divisor) const;
    /* Rotates the keys of all cells whose position was shifted; false: it failed, with a message in the log. */
    bool shift(llama_context *lctx);

    /* ---- graph ---- */

    ggml_tensor *build_input(ggml_context *ctx, int64_t n_tokens) const;
    void set_input(ggml_tensor *input, const slot_info &sinfo);
    /* Fills the mask of a micro-batch of one token in each stream whose cells it sees all; false: some other case. */
    bool set_mask(ggml_tensor *mask, const llama_ubatch &ubatch, bool causal) const;
    /* k_cur and v_cur may be null: a layer that reads the cache of an earlier one. */
    ggml_tensor *build_attention(const llm_graph_context &graph, ggml_tensor *input, ggml_tensor *q, ggml_tensor *k_cur,
                                 ggml_tensor *v_cur, ggml_tensor *kq_b, ggml_tensor *kq_mask, ggml_tensor *sinks,
                                 ggml_tensor *v_mla, float kq_scale, int il) const;

    /* ---- state ---- */

    void state_write(llama_io_write_i &io, llama_seq_id seq_id) const;
    void state_read(llama_io_read_i &io, llama_seq_id seq_id);

    void info(xquant_llama_info &out) const;
    /* F16 rows [cell][width] of the first cells of stream 0, which must all lie in open pages. */
    bool read_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, uint16_t *rows) const;
    bool write_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, const uint16_t *rows) const;
    void plan(xq_plan &out, int32_t *d, int32_t *e, int32_t *n_head_kv) const;

    static constexpr int32_t page_free = -2, page_sealed = -1; /* else: the slot of an open page */

    /* One layer's storage and how to read it. */
    struct layer {
        const cache *home = nullptr;
        uint32_t il = 0;
        int32_t d = 0, e = 0, n_head_kv = 0;
        int32_t n_pages = 0, n_slots = 0;
        xq_layer plan = {};
        xq_block_layout layout = {};
        const layer *k_owner = nullptr, *v_owner = nullptr; /* whose codes are read: itself or an earlier layer */
        const layer *v_source = nullptr;                    /* whose values predict these; itself: not mapped */
        const value_map *map = nullptr;                     /* how they do; null: not mapped */
        ggml_tensor *blocks = nullptr, *window = nullptr;
        ggml_tensor *extra = nullptr; /* see xquant-node.h; null: the layer lies in the CPU's memory */
        ggml_backend_buffer_type_t buft = nullptr;
        xq_cuda_layer device = {}; /* the same for other backends, without pointers to data */
        std::vector<ggml_tensor *> blocks_stream, window_stream; /* views, one per stream */
        std::atomic<uint64_t> *n_nonfinite = nullptr;
        uint64_t done = 0; /* the last micro-batch whose update ran */

        /* The map of a KV head, [e of the source][e]; null: not mapped. */
        const float *weight(int head) const { return map ? map->weight.data() + (int64_t)head * e * e : nullptr; }
        /* Width of attend's states of a row. */
        int64_t state_width() const { return (map ? 3 : 2) * (int64_t)e + 2; }
        int64_t block_stride() const { return layout.bytes; }
        int64_t head_blocks() const { return (int64_t)n_pages * layout.bytes; } /* bytes of one KV head */
        int64_t k_slot() const { return (int64_t)XQ_PAGE * d; }                 /* elements of one slot */
        int64_t v_slot() const { return (int64_t)XQ_PAGE * e; }
        int64_t window_elements() const { return (k_slot() + v_slot()) * n_slots * n_head_kv; } /* of one stream */
        /* Bytes of one page, all KV heads. */
        uint64_t page_bytes(bool open) const {
            return (uint64_t)n_head_kv * (open ? (k_slot() + v_slot()) * sizeof(ggml_fp16_t) : block_stride());
        }
        int64_t k_window(int head) const { return k_slot() * n_slots * head; }
        int64_t v_window(int head) const { return k_slot() * n_slots * n_head_kv + v_slot() * n_slots * head; }
    };

    input_layout layout_of(int64_t n_tokens) const { return {n_streams, n_pages, n_slots, n_tokens}; }

    const std::vector<std::unique_ptr<layer>> &layers() const { return layers_; }

  private:
    struct page {
        int32_t state = page_free;
        uint64_t written = 0; /* clock of its newest token */
    };
    struct stream {
        std::vector<page> pages;
        std::vector<int32_t> free_slots;
        uint64_t clock = 0; /* tokens written so far */

        /* Tokens written since page p's newest one: may exceed the clock, if the page was loaded. */
        uint64_t age(int32_t p) const { return clock - pages[p].written; }
    };

    const llama_kv_cells &cells(uint32_t s) const { return kv.v_cells[s]; }
    void valid_cells(uint32_t s, int32_t p, uint32_t valid[4]) const;
    bool has_cells(uint32_t s, int32_t p) const;
    llama_pos first_position(uint32_t s, int32_t p) const;
    /* Whether a page whose lowest position is this one is pinned. */
    bool pins(llama_pos lowest) const { return lowest < (int64_t)plan_.pinned * XQ_PAGE; }
    void seal(uint32_t s, int32_t p);
    int32_t take_slot(uint32_t s, const std::vector<int32_t> &keep);
    bool open(uint32_t s, int32_t p, const std::vector<int32_t> &keep);
    std::vector<uint32_t> find_cells(uint32_t s, uint32_t n, bool in_sealed) const;
    void finish_interrupted();
    void fill_extra();
    uint64_t count_nonfinite() const;
    void run_pending(const layer &l) const;
    void fill_operations(int32_t *input, const input_layout &at) const;
    const layer *find(int il) const;
    bool move_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells,
                   const std::function<void(ggml_tensor *window, size_t offset, size_t at, size_t bytes)> &move) const;
    uint64_t fingerprint() const;
    struct saved_page;
    saved_page read_page(llama_io_read_i &io, llama_seq_id dest) const;
    std::vector<int32_t> find_pages(uint32_t s, const std::vector<saved_page> &saved, llama_seq_id dest) const;
    void place(uint32_t s, const std::vector<saved_page> &saved, const std::vector<int32_t> &at);

    llama_kv_cache &kv;
    xq_plan plan_ = {};
    std::vector<int32_t> d_, e_; /* [XQ_MAX_LAYERS] head widths, 0: no cache */
    uint32_t n_streams = 1;
    int32_t n_pages = 0, n_slots = 0;
    uint64_t window = 0; /* tokens */
    bool seals = true;   /* false: every page has a slot of its own */
    std::vector<std::unique_ptr<layer>> layers_;
    std::vector<stream> streams;
    std::vector<seal_op> pending_seals;
    std::vector<unseal_op> pending_unseals;
    uint64_t epoch = 0; /* micro-batches so far */
    std::atomic<uint64_t> n_nonfinite{0};
    bool warned = false; /* about them */
    /* What ran the last graph: waited for before the host copies what a device may still be writing. */
    mutable ggml_backend_sched_t sched = nullptr;
    bool extra_filled = false; /* the layers' extra tensors hold what the host has */
};

/* The operation `update` of a graph: dst->src as build_attention gives them, userdata: the layer. */
void update_pages(ggml_tensor *dst, int ith, int nth, void *userdata);

/* Whether a saved cell may be one of a cache: its position, and how many sequences it has; if not, the log says why. */
bool may_load_cell(llama_pos pos, uint32_t n_sequences, uint32_t n_seq_max);

/* Restores the caches of a model with sliding layers: both, or neither. */
void state_read_sliding(llama_kv_cache &base, llama_kv_cache &sliding, llama_io_read_i &io, llama_seq_id seq_id,
                        llama_state_seq_flags flags);

/* Block of one page of one KV head; blocks: the layer's tensor as a graph holds it. */
inline uint8_t *block_of(const cache::layer &l, const ggml_tensor *blocks, int stream, int head, int page) {
    return (uint8_t *)blocks->data + stream * blocks->nb[1] + head * l.head_blocks() + page * l.block_stride();
}

/* Window rows of one stream. */
inline ggml_fp16_t *window_of(const ggml_tensor *window, int stream) {
    return (ggml_fp16_t *)((char *)window->data + stream * window->nb[1]);
}

/* The part of a block at an offset of xq_block_layout; null where the layer has no such part. */
inline uint8_t *part(uint8_t *block, int32_t offset) {
    return offset < 0 ? nullptr : block + offset;
}

} // namespace xquant
