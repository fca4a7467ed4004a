/* xquant-cells.cpp: cells and sequences: which cells a micro-batch gets, what moves before it, what may be done to
 * sequences.
 *
 * What llama.cpp would stop the process for is an error in the log: sequences that do not exist, positions out of
 * range.
 */
#include "xquant-cells.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>

namespace xquant {

/* ---- micro-batches ---- */

kv_cache::slot_info kv_cache::find_slot(const llama_ubatch &ubatch, bool) const {
    const uint32_t n_seqs = n_stream > 1 ? ubatch.n_seqs_unq : 1, n_tokens = ubatch.n_tokens / n_seqs;
    slot_info out = {LLAMA_MAX_SEQ, 0, {}, {}};
    out.resize(n_seqs);
    for (uint32_t i = 0; i < n_seqs; ++i) {
        const uint32_t s = seq_to_stream[ubatch.seq_id_unq[i]];
        std::vector<int32_t> sequences;
        for (uint32_t t = i * n_tokens; t < (i + 1) * n_tokens; ++t) {
            sequences.push_back(ubatch.seq_id[t][0]);
        }
        // as llama.cpp does: with enough free cells before the head, the search starts anew
        const uint32_t head = v_heads[s] > v_cells[s].get_used() + 2 * n_tokens ? 0 : v_heads[s];
        out.s0 = std::min(out.s0, s);
        out.s1 = std::max(out.s1, s);
        out.strm[i] = (llama_seq_id)s;
        out.idxs[i] = table_->find_cells(cells_view(*this), (int32_t)s, sequences, head);
        if (out.idxs[i].size() < n_tokens) {
            return {};
        }
    }
    return out;
}

/* llama.cpp looks for all micro-batches' cells before the first is computed: what removal emptied is free already. */
void kv_cache::release_pages() {
    std::vector<xq::page_write> nothing;
    for (uint32_t s = 0; s < n_stream; ++s) {
        nothing.push_back({(int32_t)s, {}});
    }
    table_->commit_seals(table_->plan(cells_view(*this), nothing, false));
}

void kv_cache::make_room(const llama_batch_allocr &balloc) {
    if (is_idle()) {
        release_pages();
    }
    std::set<llama_seq_id> sequences;
    const llama_batch &batch = balloc.get_batch();
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        sequences.insert(batch.seq_id[i], batch.seq_id[i] + batch.n_seq_id[i]);
    }
    make_room(std::move(sequences));
}

llama_memory_context_ptr kv_cache::init_batch(llama_batch_allocr &balloc, uint32_t n_ubatch, bool embd_all) {
    return in_fewer_tokens(*this, balloc, n_ubatch,
                           [&](uint32_t n) { return llama_kv_cache::init_batch(balloc, n, embd_all); });
}

llama_memory_context_ptr kv_cache::init_update(llama_context *lctx, bool optimize) {
    runner_.attach(lctx->get_sched(), lctx->get_cparams().n_threads_batch);
    return llama_kv_cache::init_update(lctx, optimize);
}

std::vector<xq::page_write> kv_cache::writes_of(const slot_info &sinfo) const {
    std::vector<xq::page_write> out;
    for (size_t i = 0; i < sinfo.n_stream(); ++i) {
        out.push_back({(int32_t)sinfo.strm[i], sinfo.idxs[i]});
    }
    return out;
}

bool kv_cache::begin(const slot_info &sinfo) {
    if (!is_idle()) {
        return false;
    }
    const std::vector<xq::page_write> writes = writes_of(sinfo);
    xq::page_plan plan = table_->plan(cells_view(*this), writes);
    if (!plan.fits) {
        LLAMA_LOG_ERROR("%s: xquant: a micro-batch writes more pages than the %d that fit\n", __func__,
                        table_->shape().n_slots + table_->shape().staged);
        return false;
    }
    if (!settle(plan)) {
        return false;
    }
    after_ = std::move(plan);
    running_ = true;
    serial_ = serial_ == INT32_MAX ? 1 : serial_ + 1;
    for (const auto &write : writes) {
        table_->wrote(cells_view(*this), write);
    }
    current_ = sinfo;
    n_batches_++;
    warn_of_nonfinite();
    return true;
}

void kv_cache::end(bool ran) {
    if (running_ && ran) {
        table_->commit_after(after_);
        running_ = false;
    } else if (running_) {
        table_->commit_lost(after_);
        running_ = !finish_moves();
    }
}

bool kv_cache::is_idle() {
    end(false); // of a micro-batch that nobody ended
    return !running_;
}

/* What some layers have done of a step the others do too, but for what the stage held: the tokens that failed. */
bool kv_cache::finish_moves() {
    for (const int step : {0, 1}) {
        const auto undone = undone_layers(step);
        if (undone.size() == layers_.size()) {
            break;
        }
        const auto moves = table_->left_to_do(after_, step, writes_of(current_));
        if (!move_pages(moves, true, undone)) {
            return false;
        }
        table_->commit_moves(moves);
        after_.after[step].clear();
    }
    return true;
}

/* Layers that have not done a step of clearing the stage of the last micro-batch. */
std::vector<const layer *> kv_cache::undone_layers(int step) {
    std::vector<const layer *> out;
    runner_.synchronize();
    for (const layer *l : all_layers()) {
        int32_t serial = 0;
        ggml_backend_tensor_get(l->nodes.aux, &serial, aux_serials + step * sizeof(serial), sizeof(serial));
        if (serial != serial_) {
            out.push_back(l);
        }
    }
    return out;
}

void end_ubatch(llama_memory_i *memory, bool ran) {
    if (kv_cache *cache = kv_cache_of(memory)) {
        cache->end(ran);
    }
}

/* ---- moves ---- */

std::vector<const layer *> kv_cache::all_layers() const {
    std::vector<const layer *> out;
    for (const auto &l : layers_) {
        out.push_back(l.get());
    }
    return out;
}

bool kv_cache::move_pages(const std::vector<xq::page_move> &moves, bool smaller,
                          const std::vector<const layer *> &layers) {
    if (moves.empty() || layers.empty()) {
        return true;
    }
    const auto n = (int64_t)moves.size();
    ggml_tensor *list = nullptr;
    return runner_.run(
        layers.size() + 1,
        [&](ggml_context *ctx, ggml_cgraph *graph) {
            list = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, XQ_MOVE_WORDS, n);
            ggml_set_input(list);
            for (const layer *l : layers) { // owners before those that read their codes
                ggml_build_forward_expand(graph, new_moves(ctx, l->nodes, list, smaller ? (int32_t)n : 0));
            }
        },
        [&] { ggml_backend_tensor_set(list, moves.data(), 0, ggml_nbytes(list)); });
}

bool kv_cache::settle(const xq::page_plan &plan) {
    const auto moved = [this](const std::vector<xq::page_move> &moves, bool smaller) {
        return moves.empty() || move_pages(moves, smaller, all_layers()); // mostly there are none
    };
    if (!moved(plan.seals, true)) {
        return false;
    }
    table_->commit_seals(plan);
    if (!moved(plan.shrinks, true)) { // into byte slots that are free only now
        return false;
    }
    table_->commit_moves(plan.shrinks);
    if (!moved(plan.unseals, false)) { // and into slots
        return false;
    }
    table_->commit_opens(plan);
    return true;
}

/* ---- sequences ---- */

bool may_load_cell(llama_pos pos, uint32_t n_sequences, uint32_t n_seq_max) {
    if (pos < 0 || pos > max_position || n_sequences < 1 || n_sequences > n_seq_max) {
        LLAMA_LOG_ERROR("xquant: a saved cell at position %d of %u sequences: must be 0 to %d, and 1 to %u\n", pos,
                        n_sequences, max_position, n_seq_max);
        return false;
    }
    return true;
}

bool kv_cache::has_sequence(llama_seq_id id, const char *caller) const {
    if (id < 0 || (uint32_t)id >= n_seq_max) {
        LLAMA_LOG_ERROR("%s: xquant: sequence is %d, must be 0 to %u\n", caller, id, n_seq_max - 1);
        return false;
    }
    return true;
}

void kv_cache::clear(bool data) {
    llama_kv_cache::clear(data);
    table_->clear();
    running_ = false;
    if (data) {
        for (const buffers *some : {&fixed_, &open_}) {
            for (const auto &[ctx, buffer] : *some) {
                ggml_backend_buffer_clear(buffer.get(), 0);
            }
        }
        fill_aux();
    }
}

bool kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return (seq_id == -1 || has_sequence(seq_id, __func__)) && llama_kv_cache::seq_rm(seq_id, p0, p1);
}

/* Between streams the data is copied at once, so that saving, loading and shifting need not wait for it. */
void kv_cache::seq_cp(llama_seq_id from, llama_seq_id to, llama_pos p0, llama_pos p1) {
    if (!has_sequence(from, __func__) || !has_sequence(to, __func__)) {
        return;
    }
    const uint32_t s0 = seq_to_stream[from], s1 = seq_to_stream[to];
    if (s0 == s1) {
        llama_kv_cache::seq_cp(from, to, p0, p1);
        return;
    }
    llama_kv_cache::seq_cp(from, to, -1, -1);
    sc_info = {};
    runner_.synchronize();
    for (const auto &l : layers_) {
        ggml_backend_tensor_copy(l->block_streams[s0], l->block_streams[s1]);
        ggml_backend_tensor_copy(l->row_streams[s0], l->row_streams[s1]);
    }
    table_->copy_stream((int32_t)s0, (int32_t)s1);
    if (p0 > 0) {
        seq_rm(to, 0, p0);
    }
    if (p1 >= 0) {
        seq_rm(to, p1, -1);
    }
}

void kv_cache::seq_keep(llama_seq_id seq_id) {
    if (has_sequence(seq_id, __func__)) {
        llama_kv_cache::seq_keep(seq_id);
    }
}

void kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (!has_sequence(seq_id, __func__)) {
        return;
    }
    const int64_t newest = v_cells[seq_to_stream[seq_id]].seq_pos_max(seq_id);
    if (newest + shift > max_position || (int64_t)shift < -max_position) {
        LLAMA_LOG_ERROR("%s: xquant: shift is %d for positions up to %d, must be at least %d, and end at %d\n",
                        __func__, shift, (int)newest, -max_position, max_position);
    } else if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: xquant: positions of this model cannot be shifted\n", __func__);
    } else {
        llama_kv_cache::seq_add(seq_id, p0, p1, shift);
    }
}

void kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (!has_sequence(seq_id, __func__)) {
        return;
    }
    if (d < 1) {
        LLAMA_LOG_ERROR("%s: xquant: divisor is %d, must be at least 1\n", __func__, d);
    } else if (!get_can_shift()) {
        LLAMA_LOG_ERROR("%s: xquant: positions of this model cannot be divided\n", __func__);
    } else {
        llama_kv_cache::seq_div(seq_id, p0, p1, d);
    }
}

llama_pos kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    return has_sequence(seq_id, __func__) ? llama_kv_cache::seq_pos_min(seq_id) : -1;
}

llama_pos kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    return has_sequence(seq_id, __func__) ? llama_kv_cache::seq_pos_max(seq_id) : -1;
}

} // namespace xquant
