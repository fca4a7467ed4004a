/* page_table.h: which pages of a cache are open, sealed or free, and what must move before cells are written.
 *
 * XQ_PAGE consecutive cells of a stream are a page, in all layers together.  A page is free (it has no cells), open
 * (it lies in one of the stream's slots, as F16 rows, or in one of its byte slots) or sealed (it lies in codes).  The
 * table knows no data and nobody who keeps it:
 *
 *     find_cells()   cells for new tokens                                               changes nothing
 *     plan()         what must move before cells are written, and after                 changes nothing
 *     commit_*()     the data has moved: this is how it lies now
 *
 * A page stays where it lies until its smaller form exists, and its slot is given away only then.  Whoever moves data
 * may stop half-way and loses nothing: the table still says where the data lies, and the next plan says the same again.
 *
 * A micro-batch may fill more pages than there are slots.  New pages that have no slot lie in the stage while it is
 * computed, memory that belongs to no layer and no stream, in slots from n_slots on.  After attention has read them,
 * each layer clears the stage in two steps (page_plan::after): what has left the window becomes codes; then what stays
 * open and has no slot becomes bytes, perhaps in byte slots that the first step left.  What is written next moves into
 * slots that became free.  Whoever stops half-way does the same in the other layers with the pages that had slots
 * (left_to_do): those of the stage held nothing but the tokens that failed.
 *
 * Rule of sealing: a page is sealed when at least `window` tokens of its sequence were written after its newest one,
 * unless it is among the pinned first pages of a sequence.  Its sequence is the one that wrote last; where others have
 * cells in the page, anybody's tokens count.  Pages before first_block stay open, whatever they hold: a sequence begins
 * there as a rule, so that they are pinned, and memory for their codes would never be used.
 *
 * Rule of bytes: pages are written as F16 rows, and stay so while nobody else needs their slot.  Then an open page that
 * is not written goes to a byte slot, a full one before others.  If there are none left either, the pages that were
 * written longest ago are sealed early, the first of a sequence last: precision gives way, never correctness.
 *
 * Rule of writing: a sequence writes into open pages that are its own, those in slots first, then into free pages, then
 * into any open page, and only then into sealed ones.  Pages of one sequence each keep what one user wrote out of
 * another's scales and states; and a beginning that many prompts share may end inside a sealed page, which would be
 * encoded anew each time.
 */
#pragma once

#include "store.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace xq {

/* Shape and policy of a cache. */
struct page_shape {
    int32_t n_streams, n_cells; /* n_cells: of a stream */
    int32_t n_slots;            /* open pages of a stream in F16 rows, at most */
    int32_t n_bytes;            /* open pages of a stream in bytes, at most */
    int32_t reserved;           /* slots that find_cells() leaves to windows */
    int32_t staged;             /* pages of a stream that may lie in the stage */
    int32_t window;             /* newest tokens of a sequence that stay open; negative: nothing is ever sealed */
    int32_t pinned;             /* first pages of a sequence that stay open */
    int32_t first_block;        /* pages before this one are never sealed */

    int32_t n_pages() const { return (int32_t)(((int64_t)n_cells + XQ_PAGE - 1) / XQ_PAGE); }
};

/* What the cells of a page hold. */
struct page_content {
    uint32_t valid[XQ_PAGE / 32] = {}; /* bit t: token t has a cell */
    int32_t lowest = INT32_MAX;        /* position; INT32_MAX: there are no cells */
};

/* The cells, as their keeper shows them. */
class cell_view {
  public:
    virtual ~cell_view() = default;
    virtual bool is_used(int32_t stream, int32_t cell) const = 0;
    virtual bool is_any_used(int32_t stream, int32_t page) const = 0;
    virtual page_content content(int32_t stream, int32_t page) const = 0;
    /* Whether all cells of a page that are used belong to a sequence. */
    virtual bool is_own(int32_t stream, int32_t page, int32_t sequence) const = 0;
    /* The first sequence of a cell that is used. */
    virtual int32_t owner(int32_t stream, int32_t cell) const = 0;
};

/* Cells that are about to be written, in the order of their tokens. */
struct page_write {
    int32_t stream;
    std::vector<uint32_t> cells;
};

/* What must happen, in this order; moves as the update verb reads them.  Cells are written before `after`. */
struct page_plan {
    bool fits = true;                /* false: more pages are written than there are slots; nothing else is said */
    std::vector<page_move> released; /* pages without cells, or none but those to be written, are free again */
    std::vector<page_move> seals;    /* data: what lies in `slot` to codes */
    std::vector<page_move> shrinks;  /* data: rows in `slot` to the byte slot `small` */
    std::vector<page_move> unseals;  /* data: codes, or what lies in the byte slot `small`, to rows in `slot` */
    std::vector<page_move> opens;    /* no data: an empty page gets `slot` */
    std::vector<page_move> after[2]; /* data: what lies in `slot` to codes, then others to `small`, a byte slot; in both
                                        steps rows in `refill` move to `slot` then */
    int32_t n_staged = 0;            /* slots of the stage that are used, of all streams */
};

class XQ_API page_table {
  public:
    explicit page_table(const page_shape &shape) : shape_(shape) { clear(); }

    void clear();

    const page_shape &shape() const { return shape_; }
    bool seals() const { return shape_.window >= 0 && shape_.n_slots < shape_.n_pages(); }
    bool can_seal(int32_t page) const { return seals() && page >= shape_.first_block; }
    /* A slot, or an xq_slot; of the stage only between the commits of a plan. */
    int32_t state(int32_t stream, int32_t page) const { return at(stream, page).state; }
    /* Tokens written since the page's newest one, as the rule of sealing counts them. */
    uint64_t age(const cell_view &cells, int32_t stream, int32_t page) const;

    /* Cells for one token of each of the sequences, all in one stream, looked for from cell `head` on; empty: they do
     * not fit. */
    std::vector<uint32_t> find_cells(const cell_view &cells, int32_t stream, const std::vector<int32_t> &sequences,
                                     uint32_t head) const;
    /* What must happen when cells are written, which the view may show as used already.  in_graph: by a micro-batch's
     * graph, whose cells the view does show: pages that left the window are sealed as well, and not only those that
     * must make room, and new pages may lie in the stage. */
    page_plan plan(const cell_view &cells, const std::vector<page_write> &writes, bool in_graph = true) const;

    /* The parts of a plan, each once its data has moved, in this order. */
    void commit_seals(const page_plan &plan);
    void commit_opens(const page_plan &plan);
    void commit_after(const page_plan &plan);
    /* Instead of commit_after(): what lay in the stage is gone. */
    void commit_lost(const page_plan &plan);
    /* Of a step that some layers did before the graph stopped, what the others must do: pages that had slots, with
     * their cells that were stored before, and no slot is refilled; and the commit of that. */
    std::vector<page_move> left_to_do(const page_plan &plan, int step, const std::vector<page_write> &lost) const;
    void commit_moves(const std::vector<page_move> &moves);
    /* The cells are written: clocks of their stream and their sequences move on. */
    void wrote(const cell_view &cells, const page_write &write);
    /* More slots and byte slots, from now on. */
    void grow(int32_t n_slots, int32_t n_bytes, int32_t reserved, int32_t staged);

    /* Bytes that the table itself takes. */
    size_t bytes() const {
        const auto n_slots = (size_t)(shape_.n_slots + shape_.n_bytes);
        return streams_.size() * (shape_.n_pages() * sizeof(page) + n_slots * sizeof(int32_t));
    }

    /* Where a restored page of a sequence may lie as bytes; XQ_SLOT_NONE: nowhere. */
    int32_t free_byte_slot(int32_t stream) const;
    /* A restored page whose data comes from elsewhere: in codes, in a free byte slot, or in the slot that plan() gave
     * it; age: as it was. */
    void place(int32_t stream, int32_t page, int32_t state, int32_t sequence, uint64_t age);
    /* Stream `to` becomes what stream `from` is; its data was copied. */
    void copy_stream(int32_t from, int32_t to) { streams_[to] = streams_[from]; }

  private:
    struct page {
        int32_t state = XQ_SLOT_NONE;
        int32_t sequence = 0;          /* that wrote last */
        uint64_t written = 0, own = 0; /* clocks of its newest token: of the stream, of the sequence */
    };
    struct stream {
        std::vector<page> pages;
        std::vector<int32_t> free_slots, free_bytes; /* as states; the last is taken first */
        uint64_t clock = 0;                          /* tokens written so far */
        std::vector<uint64_t> clocks;                /* [sequence] */

        uint64_t &clock_of(int32_t sequence) {
            clocks.resize(std::max(clocks.size(), (size_t)sequence + 1));
            return clocks[sequence];
        }
    };
    class search;
    class planner;

    const page &at(int32_t stream, int32_t page) const { return streams_[stream].pages[page]; }
    bool is_pinned(int32_t lowest) const { return lowest < (int64_t)shape_.pinned * XQ_PAGE; }
    bool is_staged(int32_t state) const { return state >= shape_.n_slots; }
    std::vector<int32_t> *free_list(stream &st, int32_t state) const;
    void put(int32_t stream, int32_t page, int32_t state);
    bool plan_stream(const cell_view &cells, const page_write &write, bool in_graph, page_plan &out) const;
    static void advance(stream &st, const cell_view &cells, const page_write &write);
    static uint64_t age_in(const stream &st, const cell_view &cells, int32_t number, int32_t page);

    page_shape shape_;
    std::vector<stream> streams_;
};

} // namespace xq
