"""Faults of llama.cpp that the fork repairs for every type of cache, also for F16; tools/insert.py describes the form.

docs/llama-cpp-fixes.md lists them for users: `make fixes` writes it anew.
"""

from typing import TypedDict


class Fix(TypedDict):
    """One fault: what it is called, what it did (one sentence), and what repairs it."""

    name: str
    fault: str
    insertions: list[dict[str, str]]


# fmt: off
FIXES: list[Fix] = [
    {
        "name": "divided positions turn keys the right way",
        "fault": "`llama_memory_seq_div` remembered for a key that moves from position p to p/d a rotation by p - p/d, "
                 "the opposite of what the move needs, so that attention read keys at wrong positions.",
        "insertions": [
            {"name": "seq_div: direction", "file": "src/llama-kv-cells.h", "in": "llama_kv_cells::pos_div",
             "instead": "shift[i] += p_old - pos[i];", "text": "shift[i] += pos[i] - p_old;"},
        ],
    },
    # a state is input from outside: each length is compared with what is left of it, and each cell with what can be
    {
        "name": "strings of a state are no longer than the state",
        "fault": "A string's length was read from a saved state and believed, so that a damaged state of a few bytes "
                 "could ask for 4 GiB of memory; a length of 0 copied to a null pointer.",
        "insertions": [
            {"name": "strings: what is left to read", "file": "src/llama-io.h", "in": "struct llama_io_read_i",
             "after": "virtual void read_tensor", "text": """

                // bytes that are left to read, if that is known
                virtual size_t n_left() { return SIZE_MAX; }
             """},
            {"name": "strings: length", "file": "src/llama-io.cpp", "in": "llama_io_read_i::read_string",
             "before": "buf(str_size)", "text": """
                if (str_size > n_left()) {
                    throw std::runtime_error("a string is longer than what is left of the state");
                }
                if (str_size == 0) { // no bytes, and no place for them
                    str.clear();
                    return;
                }

             """},
            {"name": "strings: header", "file": "src/llama-io.cpp", "in": "file", "after": '#include "llama-io.h"',
             "text": """

                #include <stdexcept>
             """},
            {"name": "strings: what is left in memory", "file": "src/llama-context.cpp",
             "in": "struct llama_io_read_host", "after": "public:", "text": """
                size_t n_left() override { return buf_size; }

             """},
            {"name": "strings: what is left of a file", "file": "src/llama-context.cpp",
             "in": "struct llama_io_read_file", "after": "public:", "text": """
                size_t n_left() override { return file->size() - file->tell(); }

             """},
        ],
    },
    {
        "name": "a file that ends before its state does is refused",
        "fault": "Where a state file ended early, the reader said nothing and left in memory what was there before, "
                 "which then passed for keys, values and lengths.",
        "insertions": [
            {"name": "file ends", "file": "src/llama-context.cpp", "in": "llama_io_read_file::read", "at": "begin",
             "text": """
                if (size > n_left()) {
                    throw std::runtime_error("the file ends before the state does");
                }
             """},
        ],
    },
    {
        "name": "cells of a state are cells that can be",
        "fault": "A saved cell's position, and how many sequences it has, were believed, so that a damaged state made "
                 "cells that count as used and as empty at once, or that belong to no sequence and stay taken until "
                 "the whole cache is cleared.",
        "insertions": [
            {"name": "cells: of one sequence", "file": "src/llama-kv-cache.cpp",
             "in": "llama_kv_cache::state_read_meta", "before": "if (n_seq_id != 1) {", "text": """
                if (!xquant::may_load_cell(pos, n_seq_id, 1)) {
                    return false;
                }

             """},
            {"name": "cells: of all sequences", "file": "src/llama-kv-cache.cpp",
             "in": "llama_kv_cache::state_read_meta", "before": "cells.pos_set(i, pos);", "text": """
                if (!xquant::may_load_cell(pos, n_seq_id, n_seq_max)) {
                    return false;
                }

             """},
        ],
    },
    {
        "name": "a cell of a state has each sequence once",
        "fault": "A damaged state may name a sequence twice in one cell, which the cells take for a mistake of the "
                 "program: a build with assertions stops the whole process.",
        "insertions": [
            {"name": "cells: sequence twice", "file": "src/llama-kv-cache.cpp",
             "in": "llama_kv_cache::state_read_meta", "before": "cells.seq_add(i, seq_id);", "text": """
                if (cells.seq_has(i, seq_id)) {
                    LLAMA_LOG_ERROR("%s: sequence %d comes twice in a cell\\n", __func__, seq_id);
                    return false;
                }

             """},
        ],
    },
]
