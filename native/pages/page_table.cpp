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
    }
}

/* ---- what has moved ---- */

/* A page leaves its slot for codes, or for nothing. */
void page_table::give_back(const page_move &move, int32_t state) {
    stream &st = streams_[move.stream];
    page &pg = st.pages[move.page];
    if (pg.state >= 0 && !is_staged(pg.state)) {
        st.free_slots.push_back(pg.state);
    }
    pg.state = state;
}

void page_table::commit_seals(const page_plan &plan) {
    for (const page_move &move : plan.released) {
        give_back(move, XQ_SLOT_NONE);
    }
    for (const page_move &move : plan.seals) {
        give_back(move, XQ_SLOT_SEALED);
    }
}

void page_table::commit_opens(const page_plan &plan) {
    for (const auto *moves : {&plan.unseals, &plan.opens}) {
        for (const page_move &move : *moves) {
            stream &st = streams_[move.stream];
            if (!is_staged(move.slot)) {
                st.free_slots.erase(std::find(st.free_slots.begin(), st.free_slots.end(), move.slot));
            }
            st.pages[move.page].state = move.slot;
        }
    }
}

void page_table::commit_after(const page_plan &plan) {
    for (const page_move &move : plan.after) {
        give_back(move, XQ_SLOT_SEALED);
    }
    for (const page_move &move : plan.after) {
        if (move.refill == XQ_SLOT_NONE) {
            continue;
        }
        stream &st = streams_[move.stream];
        st.free_slots.erase(std::find(st.free_slots.begin(), st.free_slots.end(), move.slot));
        std::find_if(st.pages.begin(), st.pages.end(), [&](const page &pg) { return pg.state == move.refill; })->state =
            move.slot;
    }
}

void page_table::commit_undone(const page_plan &plan, bool some_done) {
    for (const page_move &move : plan.opens) {
        if (is_staged(move.slot)) {
            streams_[move.stream].pages[move.page].state = XQ_SLOT_NONE;
        }
    }
    for (const page_move &move : plan.after) {
        if (some_done && !is_staged(move.slot)) {
            give_back(move, XQ_SLOT_SEALED);
        }
    }
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

void page_table::place(int32_t stream, int32_t page, bool sealed, int32_t sequence, uint64_t age) {
    struct stream &st = streams_[stream];
    auto &pg = st.pages[page];
    if (sealed && pg.state >= 0) {
        st.free_slots.push_back(pg.state);
    }
    // clocks wrap where the page is older than they are, and age() wraps back
    pg = {sealed ? XQ_SLOT_SEALED : pg.state, sequence, st.clock - age, st.clock_of(sequence) - age};
}

void page_table::grow(int32_t n_slots, int32_t reserved, int32_t staged) {
    for (stream &st : streams_) {
        for (int32_t slot = shape_.n_slots; slot < n_slots; ++slot) {
            st.free_slots.insert(st.free_slots.begin(), slot); // the lowest is taken first
        }
    }
    shape_.n_slots = n_slots;
    shape_.reserved = reserved;
    shape_.staged = staged;
}

} // namespace xq
