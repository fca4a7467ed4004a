/* xquant-state.cpp: saves the cache, and reads and checks what was saved; see xquant-state.h.
 *
 * All of header and pages is checked, and the length of data, before anything is changed (xquant-restore.cpp).
 */
#include "xquant-state.h"

#include "xquant-cells.h"
#include "xquant-offsets.h"

#include "llama-hparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

namespace xquant {

namespace {

template <typename T> void put(llama_io_write_i &io, const T &value) {
    io.write(&value, sizeof(value));
}

template <typename T> T get(llama_io_read_i &io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

} // namespace

/* Of everything that the bytes of a page depend on. */
uint64_t kv_cache::fingerprint() const {
    hasher hash;
    hash.add(model.xq->weights);
    for (const auto &l : layers_) {
        const int32_t shape[] = {l->il, l->shape.d, l->shape.e, l->shape.n_head_kv};
        hash.add(shape);
        for (const xq_side *side : {&l->plan.k, &l->plan.v}) {
            const int32_t fields[] = {side->bits,   side->group, side->fit,   side->param,
                                      side->rotate, side->owner, side->source};
            hash.add(fields);
            hash.add(side->eta);
        }
        if (l->transform.keys) {
            const std::vector<float> &weight = origin_->transforms.at(l->il);
            hash.add(weight.data(), weight.size() * sizeof(weight[0]));
        }
        if (l->map) {
            hash.add(l->map->heads.data(), l->map->heads.size() * sizeof(l->map->heads[0]));
            hash.add(l->map->weight.data(), l->map->weight.size() * sizeof(l->map->weight[0]));
        }
    }
    return hash.value();
}

/* ---- save ---- */

/* The pages of a stream that hold cells of a sequence (-1: of any), in the order in which they are saved. */
std::vector<kv_cache::saved_page> kv_cache::pages_to_save(uint32_t stream, llama_seq_id seq_id) const {
    const auto &cells = v_cells[stream];
    std::vector<saved_page> out;
    for (int32_t p = 0; p < table_->shape().n_pages(); ++p) {
        saved_page page;
        for (uint32_t t = 0; t < XQ_PAGE && (uint32_t)p * XQ_PAGE + t < cells.size(); ++t) {
            const uint32_t cell = (uint32_t)p * XQ_PAGE + t;
            if (cells.is_empty(cell) || (seq_id >= 0 && !cells.seq_has(cell, seq_id))) {
                continue;
            }
            page.valid[t / 32] |= 1u << (t % 32);
            saved_cell saved = {cells.pos_get(cell), cells.get_shift(cell), {}, cells.ext_get(cell)};
            for (llama_seq_id id = 0; id < (llama_seq_id)n_seq_max; ++id) {
                if (cells.seq_has(cell, id) && (seq_id < 0 || id == seq_id)) {
                    saved.sequences.push_back(id);
                }
            }
            page.cells.push_back(std::move(saved));
        }
        if (!page.cells.empty()) {
            page.number = seq_id < 0 ? (uint32_t)p : (uint32_t)out.size();
            const int32_t state = table_->state((int32_t)stream, p);
            page.kind = state >= 0 ? page_rows_f16 : xq::is_bytes(state) ? page_in_bytes : page_sealed;
            page.age = table_->age(cells_view(*this), (int32_t)stream, p);
            page.at = p;
            out.push_back(std::move(page));
        }
    }
    std::stable_sort(out.begin(), out.end(), [](const saved_page &a, const saved_page &b) {
        const bool a_open = a.kind != page_sealed, b_open = b.kind != page_sealed;
        return a_open != b_open ? b_open : a_open && a.age > b.age;
    });
    return out;
}

/* Bytes of the block of a KV head. */
static int64_t block_bytes(const layer &l, uint32_t kind) {
    return kind == page_sealed ? l.block_bytes : xq_byte_block_bytes(l.shape.d, l.shape.e);
}

void kv_cache::write_page(llama_io_write_i &io, uint32_t stream, const saved_page &page) const {
    const auto s = (int32_t)stream;
    const int32_t state = table_->state(s, page.at);
    const bool whole = page.cells.size() == XQ_PAGE, is_block = page.kind != page_rows_f16;
    std::vector<uint8_t> bytes;
    for (const auto &l : layers_) {
        for (int32_t head = 0; head < l->shape.n_head_kv; ++head) {
            if (is_block) {
                const bool sealed = page.kind == page_sealed;
                ggml_tensor *from = sealed ? l->nodes.blocks : l->nodes.rows;
                const size_t at = sealed ? block_offset(*l, s, head, page.at) : byte_offset(*l, s, head, state);
                bytes.resize((size_t)block_bytes(*l, page.kind));
                if (whole) {
                    io.write_tensor(from, at, bytes.size());
                    continue;
                }
                ggml_backend_tensor_get(from, bytes.data(), at, bytes.size());
                if (sealed) {
                    xq_clear_tokens(&l->plan, l->shape.d, l->shape.e, page.valid, bytes.data());
                } else {
                    xq_clear_bytes(l->shape.d, l->shape.e, page.valid, bytes.data());
                }
                io.write(bytes.data(), bytes.size());
                continue;
            }
            for (const bool is_k : {true, false}) {
                const size_t row = (size_t)(is_k ? l->shape.d : l->shape.e) * sizeof(uint16_t);
                const size_t base = row_offset(*l, is_k, s, head, state);
                for (int32_t t = 0; t < XQ_PAGE && row > 0; ++t) { // runs of saved cells
                    const int32_t first = t;
                    while (t < XQ_PAGE && has_token(page.valid, t)) {
                        t++;
                    }
                    if (t > first) {
                        io.write_tensor(l->nodes.rows, base + first * row, (t - first) * row);
                    }
                }
            }
        }
    }
}

void kv_cache::state_write(llama_io_write_i &to, llama_seq_id seq_id, llama_state_seq_flags) const {
    if (seq_id >= 0 && !has_sequence(seq_id, __func__)) {
        throw std::runtime_error("xquant: cannot save the state: there is no such sequence");
    }
    checked_writer io(to);
    const uint32_t ext_bytes = has_cell_ext() ? sizeof(llama_kv_cell_ext) : 0;
    put(io, state_magic);
    put(io, ext_bytes);
    put(io, fingerprint());
    put(io, seq_id < 0 ? n_stream : 0u);
    const uint32_t first = seq_id < 0 ? 0 : seq_to_stream[seq_id], end = seq_id < 0 ? n_stream : first + 1;
    std::vector<std::vector<saved_page>> saved;
    for (uint32_t s = first; s < end; ++s) {
        saved.push_back(pages_to_save(s, seq_id));
        put(io, seq_id < 0 ? v_heads[s] : 0u);
        put(io, (uint32_t)saved.back().size());
        for (const saved_page &page : saved.back()) {
            put(io, page.number);
            put(io, page.kind);
            put(io, page.age);
            io.write(page.valid, sizeof(page.valid));
            for (const saved_cell &cell : page.cells) {
                put(io, cell.pos);
                put(io, cell.shift);
                put(io, (uint32_t)cell.sequences.size());
                io.write(cell.sequences.data(), cell.sequences.size() * sizeof(cell.sequences[0]));
                io.write(&cell.ext, ext_bytes);
            }
        }
    }
    for (uint32_t s = first; s < end; ++s) {
        for (const saved_page &page : saved[s - first]) {
            write_page(io, s, page);
        }
    }
    put(to, io.checksum());
}

/* ---- read and check ---- */

/* Bytes of a page's data. */
int64_t kv_cache::saved_bytes(const saved_page &page) const {
    int64_t out = 0;
    for (const auto &l : layers_) {
        const int64_t row = (int64_t)(l->shape.d + l->shape.e) * (int64_t)sizeof(uint16_t);
        const bool rows = page.kind == page_rows_f16;
        out += l->shape.n_head_kv * (rows ? row * (int64_t)page.cells.size() : block_bytes(*l, page.kind));
    }
    return out;
}

/* What a page in bytes says of its values. */
void kv_cache::check_data(const saved_page &page, const page_data &data) const {
    const uint8_t *block = data.bytes.get();
    for (size_t i = 0; page.kind == page_in_bytes && i < layers_.size(); ++i) {
        const layer &l = *layers_[i];
        for (int32_t head = 0; head < l.shape.n_head_kv; ++head, block += block_bytes(l, page.kind)) {
            if (xq_check_bytes(l.shape.d, l.shape.e, block) != XQ_OK) {
                refuse_state("page " + std::to_string(page.number) + ", layer " + std::to_string(l.il) + ": " +
                             xq_error());
            }
        }
    }
}

kv_cache::saved_cell kv_cache::parse_cell(llama_io_read_i &io, llama_seq_id dest) const {
    saved_cell cell = {};
    cell.pos = get<llama_pos>(io);
    cell.shift = get<llama_pos>(io);
    const std::string name = "a cell at position " + std::to_string(cell.pos);
    const int64_t stored = (int64_t)cell.pos - cell.shift; // the position that its key was rotated to
    if (cell.pos < 0 || cell.pos > max_position || stored < 0 || stored > max_position) {
        refuse_state(name + ", shifted by " + std::to_string(cell.shift) + ": must be 0 to " +
                     std::to_string(max_position));
    }
    const uint32_t n = get<uint32_t>(io), most = dest >= 0 ? 1 : n_seq_max;
    if (n < 1 || n > most) {
        refuse_state(name + " of " + std::to_string(n) + " sequences: must be 1 to " + std::to_string(most));
    }
    for (uint32_t i = 0; i < n; ++i) {
        const auto id = get<llama_seq_id>(io);
        if (id < 0 || (dest < 0 && (uint32_t)id >= n_seq_max)) {
            refuse_state("sequence " + std::to_string(id) + " of a cell must be 0 to " + std::to_string(n_seq_max - 1));
        }
        if (i > 0 && id <= cell.sequences.back()) {
            refuse_state("sequence " + std::to_string(id) + " of a cell comes after " +
                         std::to_string(cell.sequences.back()) + ": must be ascending");
        }
        cell.sequences.push_back(dest < 0 ? id : dest);
    }
    if (has_cell_ext()) {
        cell.ext = get<llama_kv_cell_ext>(io);
    }
    return cell;
}

kv_cache::saved_page kv_cache::parse_page(llama_io_read_i &io, llama_seq_id dest) const {
    saved_page page;
    page.number = get<uint32_t>(io);
    page.kind = get<uint32_t>(io);
    page.age = get<uint64_t>(io);
    io.read(page.valid, sizeof(page.valid));
    if (page.kind > page_in_bytes) {
        refuse_state("page " + std::to_string(page.number) + " is " + std::to_string(page.kind) +
                     ", must be 0 (sealed), 1 (rows) or 2 (bytes)");
    }
    for (int32_t t = 0; t < XQ_PAGE; ++t) {
        if (has_token(page.valid, t)) {
            page.cells.push_back(parse_cell(io, dest));
        }
    }
    if (page.cells.empty()) {
        refuse_state("page " + std::to_string(page.number) + " has no cells");
    }
    return page;
}

/* The stream that a page's cells go to: that of their sequences. */
uint32_t kv_cache::stream_of(const saved_page &page) const {
    const uint32_t out = seq_to_stream[page.cells[0].sequences[0]];
    for (const saved_cell &cell : page.cells) {
        for (const llama_seq_id id : cell.sequences) {
            if (seq_to_stream[id] != out) {
                refuse_state("a page is shared by sequences " + std::to_string(page.cells[0].sequences[0]) + " and " +
                             std::to_string(id) + ", which have streams of their own here: use a unified cache");
            }
        }
    }
    return out;
}

kv_cache::saved_state kv_cache::parse(llama_io_read_i &io, llama_seq_id dest) const {
    const auto magic = get<uint32_t>(io);
    if (magic != state_magic) {
        refuse_state(magic == old_state_magic ? "it was saved by an earlier version of xquant_gguf (XQS2)"
                                              : "it was not saved from an XQuant cache");
    }
    const uint32_t ext_bytes = has_cell_ext() ? sizeof(llama_kv_cell_ext) : 0, their_bytes = get<uint32_t>(io);
    if (their_bytes != ext_bytes) {
        refuse_state("its cells have " + std::to_string(their_bytes) + " bytes of extension, here they have " +
                     std::to_string(ext_bytes) + ": another model or version of llama.cpp saved it");
    }
    if (get<uint64_t>(io) != fingerprint()) {
        refuse_state("it was saved with other weights or another plan");
    }
    const uint32_t n_streams = get<uint32_t>(io);
    if ((n_streams == 0) != (dest >= 0)) {
        refuse_state(n_streams == 0 ? "it holds one sequence, not a whole cache"
                                    : "it holds a whole cache, not one sequence");
    }
    saved_state out;
    int64_t n_bytes = sizeof(uint64_t); // the checksum
    for (uint32_t i = 0; i < std::max(n_streams, 1u); ++i) {
        out.heads.push_back(get<uint32_t>(io));
        const uint32_t n = get<uint32_t>(io);
        for (uint32_t j = 0; j < n; ++j) {
            saved_page page = parse_page(io, dest);
            n_bytes += saved_bytes(page);
            const uint32_t stream = stream_of(page);
            out.pages.emplace_back(stream, std::move(page));
        }
    }
    if ((uint64_t)n_bytes > io.n_left()) {
        refuse_state("its pages need " + std::to_string(n_bytes) + " bytes, " + std::to_string(io.n_left()) +
                     " are left: it was cut off, or is damaged");
    }
    return out;
}

/* Every saved cell finds a free one: then every page can be put back. */
void kv_cache::check_room(const saved_state &saved, llama_seq_id dest) const {
    std::vector<uint64_t> needed(n_stream);
    for (const auto &[stream, page] : saved.pages) {
        needed[stream] += page.cells.size();
    }
    for (uint32_t s = 0; s < n_stream; ++s) {
        const auto &cells = v_cells[s];
        uint64_t n_free = 0;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            n_free += dest < 0 || cells.is_empty(i) || (cells.seq_has(i, dest) && cells.seq_count(i) == 1);
        }
        if (needed[s] > n_free) {
            refuse_state("it needs " + std::to_string(needed[s]) + " cells, " + std::to_string(n_free) + " of " +
                         std::to_string(cells.size()) + " are free");
        }
    }
}

} // namespace xquant
