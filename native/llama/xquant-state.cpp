/* xquant-state.cpp: the cache to and from a stream of bytes, page by page; nothing is decoded or encoded again.
 *
 *     header   magic, version, fingerprint of plan and shapes, whole cache or one sequence, number of streams
 *     pages    per stream: number of pages, then per page: index, open or sealed, tokens since its newest one,
 *              bits of the cells that are saved, then per cell: position, shift that its key still
 *              lacks, sequences, the rest of llama_kv_cell_ext
 *     data     per stream, layer, page and KV head: the block, or the F16 rows of K and of V
 *
 * All of header and pages is read and checked, and the length of data, before anything is changed.
 */
#include "xquant-cache.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

namespace xquant {

static constexpr uint32_t magic = 0x32535158; // "XQS2"

namespace {

struct saved_cell {
    llama_pos pos, shift;
    std::vector<llama_seq_id> sequences;
    llama_kv_cell_ext ext;
};

template <typename T> void put(llama_io_write_i &io, const T &value) {
    io.write(&value, sizeof(value));
}

template <typename T> T get(llama_io_read_i &io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

bool bit(const uint32_t valid[4], uint32_t i) {
    return valid[i / 32] >> (i % 32) & 1u;
}

[[noreturn]] void refuse_state(const std::string &reason) {
    throw std::runtime_error("xquant: cannot restore the state: " + reason);
}

} // namespace

struct cache::saved_page {
    int32_t index = 0; /* its number in the cache that was saved */
    uint32_t open = 0;
    uint64_t age = 0; /* tokens written since its newest one */
    uint32_t valid[4] = {};
    std::vector<saved_cell> cells; /* one per valid bit */
};

/* FNV-1a over everything that the bytes of a page depend on. */
uint64_t cache::fingerprint() const {
    uint64_t hash = 0xcbf29ce484222325u;
    const auto add = [&hash](const void *data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
        }
    };
    for (const auto &l : layers_) {
        char text[256];
        xq_layer_format(&l->plan, text, sizeof(text));
        add(text, strlen(text));
        const int32_t shape[] = {(int32_t)l->il, l->d, l->e, l->n_head_kv, (int32_t)seals};
        add(shape, sizeof(shape));
        if (l->map) {
            add(l->map->heads.data(), l->map->heads.size() * sizeof(l->map->heads[0]));
            add(l->map->weight.data(), l->map->weight.size() * sizeof(l->map->weight[0]));
        }
    }
    return hash;
}

/* Reads or writes the data of one page of one layer through f(tensor, offset, bytes). */
template <typename F>
static void each_part(const cache::layer &l, uint32_t stream, int32_t page, int32_t state, const F &f) {
    for (int head = 0; head < l.n_head_kv; ++head) {
        if (state == cache::page_sealed) {
            f(l.blocks, stream * l.blocks->nb[1] + (size_t)(head * l.head_blocks() + page * l.block_stride()),
              (size_t)l.block_stride());
        } else {
            const size_t base = stream * l.window->nb[1], half = sizeof(ggml_fp16_t);
            f(l.window, base + (size_t)(l.k_window(head) + state * l.k_slot()) * half, (size_t)l.k_slot() * half);
            f(l.window, base + (size_t)(l.v_window(head) + state * l.v_slot()) * half, (size_t)l.v_slot() * half);
        }
    }
}

void cache::state_write(llama_io_write_i &io, llama_seq_id seq_id) const {
    if (seq_id >= 0 && !has_sequence(seq_id, __func__)) {
        throw std::runtime_error("xquant: cannot save the state: there is no such sequence");
    }
    put(io, magic);
    put(io, fingerprint());
    put(io, (uint32_t)(seq_id < 0));
    const uint32_t first = seq_id < 0 ? 0 : kv.seq_to_stream[seq_id], end = seq_id < 0 ? n_streams : first + 1;
    put(io, end - first);

    std::vector<std::vector<int32_t>> saved(n_streams);
    for (uint32_t s = first; s < end; ++s) {
        const auto &c = cells(s);
        std::vector<std::array<uint32_t, 4>> bits(n_pages, {0, 0, 0, 0});
        for (uint32_t i = 0; i < c.size(); ++i) {
            if (!c.is_empty(i) && (seq_id < 0 || c.seq_has(i, seq_id))) {
                bits[i / XQ_PAGE][i % XQ_PAGE / 32] |= 1u << (i % 32);
            }
        }
        for (int32_t p = 0; p < n_pages; ++p) {
            if (bits[p] != std::array<uint32_t, 4>{0, 0, 0, 0}) {
                saved[s].push_back(p);
            }
        }
        put(io, kv.v_heads[s]);
        put(io, (uint32_t)saved[s].size());
        for (const int32_t p : saved[s]) {
            const page &pg = streams[s].pages[p];
            put(io, p);
            put(io, (uint32_t)(pg.state >= 0));
            put(io, streams[s].age(p));
            io.write(bits[p].data(), sizeof(bits[p]));
            for (uint32_t i = 0; i < XQ_PAGE; ++i) {
                if (!bit(bits[p].data(), i)) {
                    continue;
                }
                const uint32_t cell = (uint32_t)p * XQ_PAGE + i;
                put(io, c.pos_get(cell));
                put(io, c.get_shift(cell));
                std::vector<llama_seq_id> ids;
                for (llama_seq_id id = 0; id < (llama_seq_id)kv.n_seq_max; ++id) {
                    if (c.seq_has(cell, id) && (seq_id < 0 || id == seq_id)) {
                        ids.push_back(id);
                    }
                }
                put(io, (uint32_t)ids.size());
                io.write(ids.data(), ids.size() * sizeof(ids[0]));
                put(io, c.ext_get(cell));
            }
        }
    }

    for (uint32_t s = first; s < end; ++s) {
        for (const auto &l : layers_) {
            for (const int32_t p : saved[s]) {
                each_part(*l, s, p, streams[s].pages[p].state,
                          [&](ggml_tensor *t, size_t offset, size_t bytes) { io.write_tensor(t, offset, bytes); });
            }
        }
    }
}

/* Reads and checks the description of one page; dest: the sequence that is restored, or -1. */
cache::saved_page cache::read_page(llama_io_read_i &io, llama_seq_id dest) const {
    const uint32_t n_seq_max = kv.n_seq_max;
    saved_page page;
    page.index = get<int32_t>(io);
    page.open = get<uint32_t>(io);
    page.age = get<uint64_t>(io);
    io.read(page.valid, sizeof(page.valid));
    if (page.index < 0 || page.open > 1 || (dest < 0 && page.index >= n_pages)) {
        refuse_state("page " + std::to_string(page.index) + " of " + std::to_string(n_pages) +
                     ": the context is too small, or the state is damaged");
    }
    for (uint32_t i = 0; i < XQ_PAGE; ++i) {
        if (!bit(page.valid, i)) {
            continue;
        }
        saved_cell cell;
        cell.pos = get<llama_pos>(io);
        cell.shift = get<llama_pos>(io);
        const uint32_t n = get<uint32_t>(io);
        const int64_t stored = (int64_t)cell.pos - cell.shift; // the position that its key was rotated to
        if (cell.pos < 0 || cell.pos > max_position || stored < 0 || stored > max_position) {
            refuse_state("a cell at position " + std::to_string(cell.pos) + ", shifted by " +
                         std::to_string(cell.shift) + ": must be 0 to " + std::to_string(max_position));
        }
        if (n < 1 || n > n_seq_max || (dest >= 0 && n != 1)) {
            refuse_state("a cell at position " + std::to_string(cell.pos) + " of " + std::to_string(n) +
                         " sequences: at most " + std::to_string(n_seq_max) + " are allowed");
        }
        for (uint32_t j = 0; j < n; ++j) {
            const auto id = get<llama_seq_id>(io);
            if (id < 0 || (dest < 0 && (uint32_t)id >= n_seq_max)) {
                refuse_state("sequence " + std::to_string(id) + " is not below " + std::to_string(n_seq_max));
            }
            if (j > 0 && id <= cell.sequences.back()) {
                refuse_state("sequence " + std::to_string(id) + " of a cell comes after " +
                             std::to_string(cell.sequences.back()) + ": must be ascending");
            }
            cell.sequences.push_back(dest < 0 ? id : dest);
        }
        cell.ext = get<llama_kv_cell_ext>(io);
        page.cells.push_back(std::move(cell));
    }
    return page;
}

void cache::state_read(llama_io_read_i &io, llama_seq_id seq_id) {
    if (seq_id >= 0 && !has_sequence(seq_id, __func__)) {
        refuse_state("there is no such sequence");
    }
    if (get<uint32_t>(io) != magic) {
        refuse_state("it was not saved from an XQuant cache of this version");
    }
    if (get<uint64_t>(io) != fingerprint()) {
        refuse_state("it was saved with another plan, model or context size class");
    }
    const bool whole = get<uint32_t>(io) != 0;
    const uint32_t count = get<uint32_t>(io);
    if (whole != (seq_id < 0) || count != (whole ? n_streams : 1)) {
        refuse_state("it holds " + std::string(whole ? "a whole cache" : "one sequence") + " of " +
                     std::to_string(count) + " streams");
    }
    const uint32_t first = whole ? 0 : kv.seq_to_stream[seq_id];

    std::vector<std::vector<saved_page>> saved(count);
    std::vector<std::vector<int32_t>> at(count); // where its pages go
    std::vector<uint32_t> heads(count);
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < count; ++i) {
        heads[i] = get<uint32_t>(io);
        const uint32_t n = get<uint32_t>(io);
        if (n > (uint32_t)n_pages) {
            refuse_state(std::to_string(n) + " pages do not fit into " + std::to_string(n_pages));
        }
        int32_t n_open = 0;
        for (uint32_t j = 0; j < n; ++j) {
            saved[i].push_back(read_page(io, seq_id));
            const auto &page = saved[i].back();
            if (j > 0 && page.index <= saved[i][j - 1].index) {
                refuse_state("page " + std::to_string(page.index) + " comes after " +
                             std::to_string(saved[i][j - 1].index) + ": must be ascending");
            }
            if (!page.open && !seals) {
                refuse_state("it holds sealed pages, and this context is too small to seal any");
            }
            n_open += (int32_t)page.open;
            for (const auto &l : layers_) {
                n_bytes += l->page_bytes(page.open != 0);
            }
        }
        if (n_open > n_slots) {
            refuse_state(std::to_string(n_open) + " open pages do not fit into " + std::to_string(n_slots) + " slots");
        }
        at[i] = find_pages(first + i, saved[i], seq_id);
    }
    if (n_bytes > io.n_left()) {
        refuse_state("its pages need " + std::to_string(n_bytes) + " bytes, " + std::to_string(io.n_left()) +
                     " are left: it was cut off, or is damaged");
    }

    finish_interrupted();
    pending_seals.clear();
    pending_unseals.clear();
    if (whole) {
        kv.clear(false);
    } else {
        kv.seq_rm(seq_id, -1, -1);
    }

    try {
        for (uint32_t i = 0; i < count; ++i) {
            place(first + i, saved[i], at[i]);
            for (const auto &l : layers_) {
                for (const int32_t p : at[i]) {
                    each_part(*l, first + i, p, streams[first + i].pages[p].state,
                              [&](ggml_tensor *t, size_t offset, size_t bytes) { io.read_tensor(t, offset, bytes); });
                }
            }
            if (whole) {
                kv.v_heads[first + i] = std::min(heads[i], cells(first + i).size());
            }
        }
    } catch (...) { // the file could not be read; pages without cells count as free, whatever was read into them
        if (whole) {
            kv.clear(false);
        } else {
            kv.seq_rm(seq_id, -1, -1);
        }
        throw;
    }
}

/* The pages that saved ones go to: the whole cache (dest < 0) keeps their numbers, a sequence takes pages in which
 * nothing but itself lies. */
std::vector<int32_t> cache::find_pages(uint32_t s, const std::vector<saved_page> &saved, llama_seq_id dest) const {
    const auto &c = cells(s);
    const auto is_free = [&](int32_t p) {
        const uint32_t first = (uint32_t)p * XQ_PAGE, end = std::min(first + XQ_PAGE, c.size());
        for (uint32_t i = first; i < end; ++i) {
            if (!c.is_empty(i) && !(c.seq_has(i, dest) && c.seq_count(i) == 1)) {
                return false;
            }
        }
        return true;
    };
    std::vector<int32_t> at;
    int32_t next = 0;
    for (const auto &page : saved) {
        int32_t p = page.index;
        if (dest >= 0) {
            while (next < n_pages && !is_free(next)) {
                next++;
            }
            p = next++;
        }
        if (p >= n_pages) {
            refuse_state("no " + std::to_string(saved.size()) + " pages of " + std::to_string(n_pages) + " are free");
        }
        for (uint32_t i = 0; i < XQ_PAGE; ++i) {
            if (bit(page.valid, i) && (uint32_t)p * XQ_PAGE + i >= c.size()) {
                refuse_state("cell " + std::to_string(p * XQ_PAGE + i) + " of " + std::to_string(c.size()));
            }
        }
        at.push_back(p);
    }
    return at;
}

/* Takes pages, slots and cells for saved pages; find_pages() said where, and that they fit. */
void cache::place(uint32_t s, const std::vector<saved_page> &saved, const std::vector<int32_t> &at) {
    stream &st = streams[s];
    for (size_t i = 0; i < saved.size(); ++i) {
        auto &pg = st.pages[at[i]];
        if (pg.state >= 0) { // its cells are gone
            st.free_slots.push_back(pg.state);
        }
        pg.state = page_sealed;
    }
    auto &c = kv.v_cells[s];
    for (size_t i = 0; i < saved.size(); ++i) {
        auto &pg = st.pages[at[i]];
        if (saved[i].open) {
            pg.state = take_slot(s, at);
        }
        pg.written = st.clock - saved[i].age;
        auto cell = saved[i].cells.begin();
        for (uint32_t j = 0; j < XQ_PAGE; ++j) {
            if (!bit(saved[i].valid, j)) {
                continue;
            }
            const uint32_t index = (uint32_t)at[i] * XQ_PAGE + j;
            c.pos_set(index, cell->pos - cell->shift);
            c.ext_set(index, cell->ext);
            for (const llama_seq_id id : cell->sequences) {
                c.seq_add(index, id);
            }
            if (cell->shift != 0) {
                c.pos_add(index, cell->shift);
            }
            kv.v_heads[s] = index + 1;
            ++cell;
        }
    }
    // pages that had to make room are sealed before their slots are read into
    epoch++;
    finish_interrupted();
    pending_seals.clear();
}

} // namespace xquant
