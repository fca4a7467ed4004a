/* page_table.cpp: see page_table.h for the rules. */
#include "page_table.h"

#include <algorithm>

namespace xq {

void page_table::clear() {
    streams_.assign(shape_.n_streams, {});
    for (stream &st : streams_) {
        st.pages.resize(shape_.n_pages());
        for (int32_t slot = shape_.n_slots - 1; slot >= 0; --slot) {
            st.free_slots.push_back(slot); // the lowest is taken first
        }
        for (int32_t slot = shape_.n_bytes - 1; slot >= 0; --slot) {
            st.free_bytes.push_back(slot_of_bytes(slot));
        }
    }
}

/* ---- what has moved ---- */

/* What keeps a state free for others; null: it belongs to nobody. */
std::vector<int32_t> *page_table::free_list(stream &st, int32_t state) const {
    return is_bytes(state) ? &st.free_bytes : state >= 0 && !is_staged(state) ? &st.free_slots : nullptr;
}

/* A page lies elsewhere now, and nothing where it was. */
void page_table::put(int32_t stream, int32_t page, int32_t state) {
    struct stream &st = streams_[stream];
    int32_t &now = st.pages[page].state;
    if (now == state) {
        return;
    }
    if (auto *left = free_list(st, now)) {
        left->push_back(now);
    }
    if (auto *taken = free_list(st, state)) {
        taken->erase(std::find(taken->begin(), taken->end(), state));
    }
    now = state;
}

void page_table::commit_moves(const std::vector<page_move> &moves) {
    for (const page_move &move : moves) {
        put(move.stream, move.page, move.small);
    }
}

void page_table::commit_seals(const page_plan &plan) {
    for (const page_move &move : plan.released) {
        put(move.stream, move.page, XQ_SLOT_NONE);
    }
    commit_moves(plan.seals);
}

void page_table::commit_opens(const page_plan &plan) {
    for (const auto *moves : {&plan.unseals, &plan.opens}) {
        for (const page_move &move : *moves) {
            put(move.stream, move.page, move.slot);
        }
    }
}

void page_table::commit_after(const page_plan &plan) {
    for (const auto &moves : plan.after) {
        commit_moves(moves);
        for (const page_move &move : moves) {
            if (move.refill != XQ_SLOT_NONE) {
                const auto &pages = streams_[move.stream].pages;
                const auto from =
                    std::find_if(pages.begin(), pages.end(), [&](const page &pg) { return pg.state == move.refill; });
                put(move.stream, (int32_t)(from - pages.begin()), move.slot);
            }
        }
    }
}

void page_table::commit_lost(const page_plan &plan) {
    for (const page_move &move : plan.opens) {
        if (is_staged(move.slot)) {
            put(move.stream, move.page, XQ_SLOT_NONE);
        }
    }
}

std::vector<page_move> page_table::left_to_do(const page_plan &plan, int step,
                                              const std::vector<page_write> &lost) const {
    std::vector<page_move> out;
    for (page_move move : plan.after[step]) {
        for (const page_write &write : lost) {
            for (const uint32_t cell : write.cells) {
                if (write.stream == move.stream && (int32_t)(cell / XQ_PAGE) == move.page) {
                    move.valid[cell % XQ_PAGE / 32] &= ~(1u << (cell % 32));
                }
            }
        }
        move.refill = XQ_SLOT_NONE;
        const bool any = std::any_of(std::begin(move.valid), std::end(move.valid), [](uint32_t w) { return w != 0; });
        if (any && !is_staged(move.slot)) {
            out.push_back(move);
        }
    }
    return out;
}

/* ---- clocks ---- */

uint64_t page_table::age_in(const stream &st, const cell_view &cells, int32_t number, int32_t page) {
    const auto &pg = st.pages[page];
    if ((size_t)pg.sequence < st.clocks.size() && cells.is_own(number, page, pg.sequence)) {
        return st.clocks[pg.sequence] - pg.own;
    }
    return st.clock - pg.written;
}

uint64_t page_table::age(const cell_view &cells, int32_t stream, int32_t page) const {
    return age_in(streams_[stream], cells, stream, page);
}

void page_table::wrote(const cell_view &cells, const page_write &write) {
    advance(streams_[write.stream], cells, write);
}

void page_table::advance(stream &st, const cell_view &cells, const page_write &write) {
    for (const uint32_t cell : write.cells) {
        const int32_t sequence = cells.owner(write.stream, (int32_t)cell);
        page &pg = st.pages[cell / XQ_PAGE];
        pg = {pg.state, sequence, ++st.clock, ++st.clock_of(sequence)};
    }
}

int32_t page_table::free_byte_slot(int32_t stream) const {
    const auto &free = streams_[stream].free_bytes;
    return free.empty() ? (int32_t)XQ_SLOT_NONE : free.back();
}

void page_table::place(int32_t stream, int32_t page, int32_t state, int32_t sequence, uint64_t age) {
    put(stream, page, state);
    struct stream &st = streams_[stream];
    // clocks wrap where the page is older than they are, and age() wraps back
    st.pages[page] = {state, sequence, st.clock - age, st.clock_of(sequence) - age};
}

void page_table::grow(int32_t n_slots, int32_t n_bytes, int32_t reserved, int32_t staged) {
    for (stream &st : streams_) { // the lowest is taken first
        for (int32_t slot = shape_.n_slots; slot < n_slots; ++slot) {
            st.free_slots.insert(st.free_slots.begin(), slot);
        }
        for (int32_t slot = shape_.n_bytes; slot < n_bytes; ++slot) {
            st.free_bytes.insert(st.free_bytes.begin(), slot_of_bytes(slot));
        }
    }
    shape_.n_slots = n_slots;
    shape_.n_bytes = n_bytes;
    shape_.reserved = reserved;
    shape_.staged = staged;
}

} // namespace xq
