/* xquant-kv-cache.h: a KV cache whose pages are open (F16 or bytes) or sealed (codes), as llama.cpp's memory of
 * attention layers.
 *
 * llama_kv_cache keeps the cells: which position of which sequence lies in which cell.  xq::page_table says which page
 * of cells is open or sealed, and what must move.  Here lies the data, in tensors as node.h describes them:
 *
 *     find_slot()        llama.cpp asks for cells: the table's choice
 *     begin()            before a micro-batch's graph: pages that left the window are sealed, written ones are opened
 *     build_attention()  in the graph: rows are stored, then attention reads open and sealed pages; then a layer clears
 *                        the stage, in which lies what the micro-batch fills beyond the slots that there are
 *     end()              after it: this is how pages lie now
 *     state_*(), shift   both want nothing else of the table than where pages lie
 *
 * Moves before a graph go through settle(), which runs a small graph of its own and only then commits: whatever fails
 * or is aborted leaves every page where the table says that it is.  A micro-batch's own graph may stop between two
 * layers, or between the two steps in which a layer clears the stage: those that have done a step say so in their aux,
 * and the others do it then.
 */
#pragma once

#include "llama-kv-cache.h"

#include "node.h"
#include "page_table.h"
#include "xquant-metadata.h"
#include "xquant-rotation.h"
#include "xquant-runner.h"
#include "xquant-transform.h"
#include "xquant_llama.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

namespace xquant {

/* Records why a context cannot be created (xquant_llama_error) and throws it. */
[[noreturn]] void refuse(const std::string &reason);
/* Likewise for all contexts of a model's architecture. */
[[noreturn]] void refuse_model(const llama_model &model, const std::string &why,
                               const std::string &instead = "f16 or q8_0");

/* The plan that a new cache follows, and the block that it was read from (empty: a preset).  d, e, n_head_kv
 * [XQ_MAX_LAYERS]: of the layers that the cache holds, else 0; e: what is stored of V, which says nothing where that is
 * 0. */
std::shared_ptr<const metadata> resolve_plan(const llama_model &model, const int32_t *d, const int32_t *e,
                                             const int32_t *n_head_kv, xq_plan &plan);

/* Sums of two positions fit into 32 bits. */
constexpr llama_pos max_position = 1 << 30;

inline int32_t pages_of(uint64_t tokens) {
    return (int32_t)((tokens + XQ_PAGE - 1) / XQ_PAGE);
}

/* One layer of a cache. */
struct layer {
    int32_t il; /* of the model */
    xq_layer plan;
    xq_shape shape; /* e: what is stored of the values */
    int32_t latent; /* channels of the values that are the first of the keys: what attention gives is latent + e wide */
    int32_t turned; /* see xquant-shared.h; -1: the layer has values of its own */
    const layer *k_owner, *v_owner, *v_source; /* whose codes are read, and whose values a map reads; itself: its own */
    const value_map *map;                      /* null: not mapped */
    ggml_tensor *rotation;   /* F32 [n][n], a normalised Hadamard matrix, which keys are stored and queries read by, n
                                channels at a time; null: they are as they came */
    channel_factors factors; /* that come before it */
    key_transform transform; /* instead of both */
    ggml_backend_buffer_type_t buft;
    bool on_host;
    bool cpu_kernels; /* run its nodes, perhaps another process's */
    layer_tensors nodes;
    std::vector<ggml_tensor *> block_streams, row_streams; /* views, one a stream: what a copy of a stream copies */
    int64_t block_bytes;                                   /* of one page and KV head */
    int32_t last_reader; /* of the model's layers, the last whose attention reads it */
};

class kv_cache final : public llama_kv_cache {
  public:
    kv_cache(const llama_model &model, const llama_hparams &hparams, bool offload, bool unified, uint32_t kv_size,
             uint32_t n_seq_max, uint32_t n_pad, const layer_filter_cb &filter, const layer_reuse_cb &reuse,
             uint32_t n_ubatch);

    /* ---- llama_memory_i ---- */

    llama_memory_context_ptr init_batch(llama_batch_allocr &balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_update(llama_context *lctx, bool optimize) override;
    void clear(bool data) override;
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;
    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;
    void state_write(llama_io_write_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read(llama_io_read_i &io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    /* ---- llama_kv_cache ---- */

    slot_info find_slot(const llama_ubatch &ubatch, bool cont) const override;
    /* Rotates the keys of cells whose position was shifted. */
    bool update(llama_context *lctx, bool do_shift, const stream_copy_info &sc_info) override;
    /* build_attention() stores and reads: these only let llama.cpp's graph pass by. */
    ggml_tensor *get_k(ggml_context *, int32_t, uint32_t, const slot_info &) const override { return nullptr; }
    ggml_tensor *get_v(ggml_context *, int32_t, uint32_t, const slot_info &) const override { return nullptr; }
    ggml_tensor *cpy_k(ggml_context *, ggml_tensor *k_cur, ggml_tensor *, int32_t, const slot_info &) const override {
        return k_cur;
    }
    ggml_tensor *cpy_v(ggml_context *, ggml_tensor *v_cur, ggml_tensor *, int32_t, const slot_info &) const override {
        return v_cur;
    }
    void set_input_kq_mask(ggml_tensor *dst, const llama_ubatch *ubatch, bool causal_attn) const override;

    /* ---- ours ---- */

    /* Called before cells are looked for: pages without cells are free, and the batch's sequences have slots. */
    void make_room(const llama_batch_allocr &balloc);
    /* Prepares pages for a micro-batch whose cells are taken; false: it cannot be, and the log says why. */
    bool begin(const slot_info &sinfo);
    /* The micro-batch's graph has run; or it has not, or not all of it: what was stored before is still there. */
    void end(bool ran);
    /* Attention of a model layer; k_cur and v_cur may be null: a layer that reads the cache of an earlier one. */
    ggml_tensor *build_attention(const llm_graph_context &graph, ggml_tensor *q, ggml_tensor *k_cur, ggml_tensor *v_cur,
                                 ggml_tensor *kq_b, ggml_tensor *kq_mask, ggml_tensor *sinks, ggml_tensor *v_mla,
                                 float kq_scale, int il) const;
    /* What build_attention's nodes read besides: fills the input tensor of the micro-batch that begin() prepared. */
    void set_input(ggml_tensor *input) const;
    void set_moves(ggml_tensor *moves, int step) const;

    void info(xquant_llama_info &out) const;
    void plan(xq_plan &out, int32_t *d, int32_t *e, int32_t *n_head_kv) const;
    /* F16 rows [cell][width] of the first cells of stream 0, which must all lie in open pages. */
    bool read_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, uint16_t *rows) const;
    bool write_rows(int32_t il, bool is_value, int32_t head, int32_t n_cells, const uint16_t *rows) const;
    /* Pages of a stream: state and age; how many there are, at most n of them are written. */
    int32_t pages(uint32_t stream, int32_t n, xquant_llama_page *out) const;

  private:
    class cells_view;
    class page_input;
    class mask_input;
    struct saved_cell;
    struct saved_page;
    struct saved_state;
    struct page_data;
    struct slot_counts {
        int32_t n_slots, n_bytes, reserved, staged; /* as in xq::page_shape */
    };

    /* Tensors of a kind of memory, and that memory. */
    using contexts = std::map<ggml_backend_buffer_type_t, ggml_context_ptr>;
    using buffers = std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>>;
    using rows_of_layer = std::pair<ggml_tensor *, std::vector<ggml_tensor *>>; /* and views of them by stream */

    const layer *find(int32_t il) const;
    void add_layer(int32_t il, bool offload, contexts &fixed);
    ggml_tensor *rotation_for(const layer &l, contexts &fixed);
    ggml_context *context_of(contexts &of, ggml_backend_buffer_type_t buft) const;
    rows_of_layer new_rows(const layer &l, contexts &open) const;
    buffers allocate(contexts &of, const char *what) const;
    void fill_aux() const;

    /* What so many sequences in a stream want, as far as a sixth of the pages goes. */
    slot_counts slots_for(uint32_t n_seq) const;
    /* More slots, if sequences want them beside those that have cells; without memory there are no more. */
    void make_room(std::set<llama_seq_id> sequences);
    bool grow(const slot_counts &counts);
    uint64_t count_nonfinite() const;
    void warn_of_nonfinite();

    /* Moves the pages of a plan where they lie, and commits it; false: something failed, and nothing is lost. */
    bool settle(const xq::page_plan &plan);
    bool move_pages(const std::vector<xq::page_move> &moves, bool smaller, const std::vector<const layer *> &layers);
    std::vector<const layer *> all_layers() const;
    /* After a graph that stopped half-way; false: something failed, and the next call tries again. */
    bool finish_moves();
    std::vector<const layer *> undone_layers(int step);
    /* No micro-batch is left half done; false: one is. */
    bool is_idle();
    /* Pages without cells are free from now on. */
    void release_pages();
    std::vector<xq::page_write> writes_of(const slot_info &sinfo) const;
    bool shift_pages(llama_context *lctx, const std::vector<xq::page_move> &pages, const std::vector<int32_t> &by);
    void forget_shifts(const xq::page_move &page);

    bool has_sequence(llama_seq_id id, const char *caller) const;
    page_input &input_of(const llm_graph_context &graph) const;
    /* Of a mask: the cells that not all tokens of a micro-batch see alike. */
    struct mask_patch {
        int64_t first, n;
    };
    ggml_tensor *mask_for(const llm_graph_context &graph, ggml_tensor *kq_mask) const;
    mask_patch patch_of(const llama_ubatch &ubatch, bool causal, const ggml_tensor *mask) const;
    void set_mask(ggml_tensor *row, ggml_tensor *patch, int64_t first, const llama_ubatch &ubatch) const;
    int32_t staged_for(const llama_ubatch &ubatch) const;
    ggml_tensor *attend_unpacked(const llm_graph_context &graph, const layer &l, const page_input &input,
                                 const open_tensors &open, ggml_tensor *q, ggml_tensor *mask, ggml_tensor *sinks,
                                 float scale, int il) const;
    ggml_tensor *attend_codes(const llm_graph_context &graph, const layer &l, const page_input &input,
                              const open_tensors &open, bool after_update, ggml_tensor *q, ggml_tensor *mask,
                              ggml_tensor *sinks, float scale, int il) const;
    template <typename F> bool each_run(int32_t il, bool is_value, int32_t head, int32_t n_cells, const F &move) const;

    uint64_t fingerprint() const;
    std::vector<saved_page> pages_to_save(uint32_t stream, llama_seq_id seq_id) const;
    void write_page(llama_io_write_i &io, uint32_t stream, const saved_page &page) const;
    saved_state parse(llama_io_read_i &io, llama_seq_id dest) const;
    saved_page parse_page(llama_io_read_i &io, llama_seq_id dest) const;
    saved_cell parse_cell(llama_io_read_i &io, llama_seq_id dest) const;
    uint32_t stream_of(const saved_page &page) const;
    void check_room(const saved_state &saved, llama_seq_id dest) const;
    int64_t saved_bytes(const saved_page &page) const;
    void check_data(const saved_page &page, const page_data &data) const;
    void restore_page(uint32_t stream, const saved_page &page, page_data &data);
    int32_t free_page_for(uint32_t stream, const saved_page &page) const;
    void put_block(uint32_t stream, const saved_page &page, int32_t at, int32_t state, page_data &data);
    void put_rows(uint32_t stream, const saved_page &page, const std::vector<uint32_t> &cells, size_t first,
                  page_data &data);
    void put_cell(uint32_t stream, uint32_t index, const saved_cell &cell);

    std::shared_ptr<const metadata> origin_; /* of the plan: maps, and what calibration measured */
    xq_plan plan_ = {};
    std::vector<int32_t> d_, e_; /* [XQ_MAX_LAYERS] head widths, 0: no cache */
    std::vector<std::unique_ptr<layer>> layers_;
    std::vector<const layer *> by_model_layer_; /* [model layer]; null: not in this cache */
    uint32_t n_ubatch_;
    /* layer::rotation, one for all layers of a kind of memory and a number of channels */
    std::map<std::pair<ggml_backend_buffer_type_t, int64_t>, ggml_tensor *> rotations_;
    buffers fixed_, open_;    /* blocks and what nodes keep; rows */
    uint64_t generation_ = 0; /* of the rows: how often they were moved into others */
    std::unique_ptr<xq::page_table> table_;
    runner runner_;
    slot_info current_;      /* of the micro-batch that begin() prepared last */
    xq::page_plan after_;    /* of it */
    bool running_ = false;   /* it has not ended */
    int32_t serial_ = 0;     /* its number, from 1 on */
    uint64_t n_batches_ = 0; /* micro-batches so far */
    bool warned_ = false;    /* of values that are not finite */
};

/* init_batch of a memory that holds the cache, with fewer and fewer tokens until it succeeds: a micro-batch writes no
 * more pages than there are slots, and in a fragmented cache fewer tokens fit at a time. */
template <typename F>
llama_memory_context_ptr in_fewer_tokens(kv_cache &cache, const llama_batch_allocr &balloc, uint32_t n_ubatch,
                                         const F &init_batch) {
    cache.make_room(balloc);
    llama_memory_context_ptr out = init_batch(n_ubatch);
    while (llama_memory_status_is_fail(out->get_status()) && n_ubatch > 1) {
        out = init_batch(n_ubatch /= 2);
    }
    return out;
}

/* The XQuant cache that is a context's memory, or the part of it for layers whose attention sees all tokens; null:
 * there is none. */
kv_cache *kv_cache_of(llama_memory_i *memory);

} // namespace xquant
