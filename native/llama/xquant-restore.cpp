/* xquant-restore.cpp: puts saved pages back, one by one, wherever they fit.
 *
 * A page that finds an empty one takes it: in codes, or in bytes where a byte slot is free, its block is copied; else
 * its rows go into a slot.  Without an empty page its rows go into whatever cells are free.  Room for rows is made as
 * for a micro-batch: older pages are sealed first (settle()), so that nothing that lies in a slot is lost.
 */
#include "xquant-state.h"

#include "xquant-cells.h"
#include "xquant-offsets.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>

namespace xquant {

/* Memory that kernels may read: on cache lines, never null. */
static std::unique_ptr<uint8_t, aligned_deleter> aligned(size_t size) {
    std::unique_ptr<uint8_t, aligned_deleter> out(
        (uint8_t *)::operator new((size + 127) / 64 * 64, cache_line, std::nothrow));
    return out ? std::move(out) : throw std::bad_alloc();
}

void kv_cache::page_data::decode(const std::vector<std::unique_ptr<layer>> &layers, uint32_t kind) {
    if (!decoded[0].empty()) {
        return;
    }
    std::map<const layer *, xq_store> stores;
    const bool sealed = kind == page_sealed;
    const int32_t state = sealed ? XQ_SLOT_SEALED : XQ_SLOT_BYTES;
    int64_t most_rows = 0;
    for (const auto &l : layers) {
        most_rows = std::max(most_rows, page_rows(*l) + page_bytes(*l));
    }
    const auto rows_of_layer = aligned((size_t)most_rows); // one slot, of which nothing is read, and one byte slot
    uint8_t *at = bytes.get();
    for (const auto &l : layers) {
        xq_shape shape = l->shape;
        shape.n_pages = shape.n_slots = shape.n_streams = 1;
        shape.n_bytes = sealed ? 0 : 1;
        shape.first_block = 0;
        xq_store &store = stores[l.get()];
        int status =
            xq_store_init(&store, &l->plan, &shape, sealed ? at : nullptr, 0, (uint16_t *)rows_of_layer.get(), 0);
        if (!sealed) {
            memcpy(rows_of_layer.get() + page_rows(*l), at, (size_t)page_bytes(*l));
        }
        at += sealed ? l->block_bytes * shape.n_head_kv : page_bytes(*l);
        if (status == XQ_OK && sealed && l->k_owner != l.get()) {
            status = xq_store_borrow(&store, 1, &stores.at(l->k_owner));
        }
        if (status == XQ_OK && l->latent > 0) {
            status = xq_store_latent(&store, l->latent);
        }
        if (status == XQ_OK && sealed && l->v_owner != l.get()) {
            status = xq_store_borrow(&store, 0, &stores.at(l->v_owner));
        }
        if (status == XQ_OK && sealed && l->map) {
            status = xq_store_map(&store, &stores.at(l->v_source), l->map->heads.data(), l->map->weight.data());
        }
        for (const bool is_k : {true, false}) {
            std::vector<uint16_t> rows((size_t)XQ_PAGE * shape.n_head_kv * (is_k ? shape.d : shape.e));
            if (rows.empty()) { // nothing is stored of V
                decoded[1].emplace_back();
                continue;
            }
            xq_unpack_args args = {};
            args.table = &state;
            args.n_streams = args.n_kv_pages = 1;
            args.is_k = is_k;
            args.n_heads = shape.n_head_kv;
            args.rows = rows.data();
            const xq_exec exec = {0, 1, nullptr};
            status = status == XQ_OK ? xq_cpu()->unpack(&store, &args, &exec) : status;
            decoded[is_k ? 0 : 1].push_back(std::move(rows));
        }
        if (status != XQ_OK) {
            refuse_state(std::string("a page cannot be decoded: ") + xq_cpu()->error());
        }
    }
}

/* ---- data to its place ---- */

/* state: codes, or a free byte slot. */
void kv_cache::put_block(uint32_t stream, const saved_page &page, int32_t at, int32_t state, page_data &data) {
    const auto s = (int32_t)stream;
    const bool sealed = state == XQ_SLOT_SEALED;
    const uint8_t *from = data.bytes.get();
    for (const auto &l : layers_) {
        const int64_t size = sealed ? l->block_bytes : xq_byte_block_bytes(l->shape.d, l->shape.e);
        for (int32_t head = 0; head < l->shape.n_head_kv; ++head, from += size) {
            ggml_backend_tensor_set(sealed ? l->nodes.blocks : l->nodes.rows, from,
                                    sealed ? block_offset(*l, s, head, at) : byte_offset(*l, s, head, state),
                                    (size_t)size);
        }
    }
    table_->place(s, at, state, page.cells[0].sequences[0], page.age);
}

/* Rows of the saved cells first, first + 1, ... to cells of the cache, whose pages are open. */
void kv_cache::put_rows(uint32_t stream, const saved_page &page, const std::vector<uint32_t> &cells, size_t first,
                        page_data &data) {
    std::vector<int32_t> tokens; // of the saved page, by saved cell
    for (int32_t t = 0; t < XQ_PAGE; ++t) {
        if (has_token(page.valid, t)) {
            tokens.push_back(t);
        }
    }
    const auto *from = (const uint16_t *)data.bytes.get();
    for (size_t number = 0; number < layers_.size(); ++number) {
        const layer &l = *layers_[number];
        for (int32_t head = 0; head < l.shape.n_head_kv; ++head) {
            for (const bool is_k : {true, false}) {
                const size_t width = (size_t)(is_k ? l.shape.d : l.shape.e), size = width * sizeof(uint16_t);
                if (width == 0) {
                    continue;
                }
                std::vector<uint16_t> rows(cells.size() * width);
                for (size_t i = 0; i < cells.size(); ++i) {
                    const uint16_t *row = page.kind == page_rows_f16
                                              ? from + (first + i) * width
                                              : data.decoded[is_k ? 0 : 1][number].data() +
                                                    ((size_t)tokens[first + i] * l.shape.n_head_kv + head) * width;
                    memcpy(rows.data() + i * width, row, size);
                }
                for (size_t i = 0, end; i < cells.size(); i = end) { // runs of neighbouring cells of a page
                    const uint32_t p = cells[i] / XQ_PAGE;
                    for (end = i + 1;
                         end < cells.size() && cells[end] == cells[end - 1] + 1 && cells[end] / XQ_PAGE == p;) {
                        end++;
                    }
                    const int32_t slot = table_->state((int32_t)stream, (int32_t)p);
                    ggml_backend_tensor_set(
                        l.nodes.rows, rows.data() + i * width,
                        row_offset(l, is_k, (int32_t)stream, head, slot) + cells[i] % XQ_PAGE * size, (end - i) * size);
                }
                from += page.kind == page_rows_f16 ? tokens.size() * width : 0;
            }
        }
    }
}

void kv_cache::put_cell(uint32_t stream, uint32_t index, const saved_cell &cell) {
    auto &cells = v_cells[stream];
    cells.pos_set(index, cell.pos - cell.shift);
    cells.ext_set(index, cell.ext);
    for (const llama_seq_id id : cell.sequences) {
        cells.seq_add(index, id);
    }
    if (cell.shift != 0) {
        cells.pos_add(index, cell.shift);
    }
}

/* ---- pages ---- */

/* An empty page whose cells reach as far as the saved one's: that of the same number if it can be, and for codes one
 * that can be sealed if there is one; -1: there is none. */
int32_t kv_cache::free_page_for(uint32_t stream, const saved_page &page) const {
    const cells_view view(*this);
    int32_t last = XQ_PAGE - 1;
    while (!has_token(page.valid, last)) {
        last--;
    }
    const auto fits = [&](int32_t p) {
        return !view.is_any_used((int32_t)stream, p) && (uint32_t)(p * XQ_PAGE + last) < v_cells[stream].size();
    };
    const int32_t n_pages = table_->shape().n_pages();
    const int32_t first = page.kind == page_sealed ? table_->shape().first_block : 0;
    if (page.number >= (uint32_t)first && page.number < (uint32_t)n_pages && fits((int32_t)page.number)) {
        return (int32_t)page.number;
    }
    for (int32_t i = 0; i < n_pages; ++i) {
        if (const int32_t p = (first + i) % n_pages; fits(p)) {
            return p;
        }
    }
    return -1;
}

void kv_cache::restore_page(uint32_t stream, const saved_page &page, page_data &data) {
    const int32_t at = free_page_for(stream, page);
    std::vector<uint32_t> same; // cells at the same places in page `at`
    for (int32_t t = 0; t < XQ_PAGE && at >= 0; ++t) {
        if (has_token(page.valid, t)) {
            same.push_back((uint32_t)(at * XQ_PAGE + t));
        }
    }
    const int32_t to = page.kind == page_in_bytes                         ? table_->free_byte_slot((int32_t)stream)
                       : page.kind == page_sealed && table_->can_seal(at) ? (int32_t)XQ_SLOT_SEALED
                                                                          : (int32_t)XQ_SLOT_NONE;
    if (at >= 0 && to != XQ_SLOT_NONE) {
        put_block(stream, page, at, to, data);
        for (size_t i = 0; i < same.size(); ++i) {
            put_cell(stream, same[i], page.cells[i]);
        }
        return;
    }
    if (page.kind != page_rows_f16) {
        data.decode(layers_, page.kind);
    }
    for (size_t done = 0; done < page.cells.size();) {
        xq::page_write write = {(int32_t)stream, same};
        xq::page_plan plan = table_->plan(cells_view(*this), {write}, false);
        const auto fits = [&] { return !write.cells.empty() && plan.fits; };
        for (size_t n = page.cells.size() - done; !fits() && n > 0; n /= 2) {
            std::vector<int32_t> sequences;
            for (size_t i = done; i < done + n; ++i) {
                sequences.push_back(page.cells[i].sequences[0]);
            }
            write.cells = table_->find_cells(cells_view(*this), (int32_t)stream, sequences, 0);
            plan = table_->plan(cells_view(*this), {write}, false);
        }
        if (!fits() || !settle(plan)) {
            refuse_state("no room could be made for page " + std::to_string(page.number));
        }
        put_rows(stream, page, write.cells, done, data);
        for (size_t i = 0; i < write.cells.size(); ++i) {
            put_cell(stream, write.cells[i], page.cells[done + i]);
        }
        if (at >= 0) {
            table_->place((int32_t)stream, at, table_->state((int32_t)stream, at), page.cells[0].sequences[0],
                          page.age);
        } else {
            table_->wrote(cells_view(*this), write);
        }
        done += write.cells.size();
    }
}

void kv_cache::state_read(llama_io_read_i &from, llama_seq_id seq_id, llama_state_seq_flags) {
    if (seq_id >= 0 && !has_sequence(seq_id, __func__)) {
        refuse_state("there is no such sequence");
    }
    checked_reader io(from);
    saved_state saved = parse(io, seq_id);
    check_room(saved, seq_id);
    for (const auto &[stream, page] : saved.pages) {
        const auto size = (size_t)saved_bytes(page);
        saved.data.push_back({aligned(size), {}});
        io.read(saved.data.back().bytes.get(), size);
        check_data(page, saved.data.back());
    }
    uint64_t checksum;
    from.read(&checksum, sizeof(checksum));
    if (checksum != io.checksum()) {
        refuse_state("its checksum does not fit: it is damaged");
    }
    const auto remove = [&] {
        if (seq_id < 0) {
            clear(false);
        } else {
            seq_rm(seq_id, -1, -1);
        }
    };
    if (!is_idle()) {
        refuse_state("a micro-batch that failed could not be undone");
    }
    remove();
    release_pages();
    std::set<llama_seq_id> sequences;
    for (const auto &[stream, page] : saved.pages) {
        for (const saved_cell &cell : page.cells) {
            sequences.insert(cell.sequences.begin(), cell.sequences.end());
        }
    }
    make_room(std::move(sequences));
    try {
        for (size_t i = 0; i < saved.pages.size(); ++i) {
            restore_page(saved.pages[i].first, saved.pages[i].second, saved.data[i]);
            saved.data[i] = {};
        }
        for (uint32_t s = 0; seq_id < 0 && s < n_stream && s < saved.heads.size(); ++s) {
            v_heads[s] = std::min(saved.heads[s], v_cells[s].size());
        }
    } catch (...) { // a page could not be decoded, or moving others failed
        remove();
        throw;
    }
}

} // namespace xquant
