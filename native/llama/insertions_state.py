"""What the fork changes in llama.cpp where states are saved and loaded; in the form of insertions.py.

A state is input from outside: each length is compared with what is left of it, and each cell with what can be.
"""

INSERTIONS: list[tuple[str, str, str, str]] = [
    # -- also of llama.cpp's own caches, which sliding layers have: cells that a damaged state makes up
    (
        "src/llama-kv-cache.cpp",
        "            if (n_seq_id != 1) {\n",
        "            if (!xquant::may_load_cell(pos, n_seq_id, 1)) {\n                return false;\n            }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "            cells.pos_set(i, pos);\n",
        "            if (!xquant::may_load_cell(pos, n_seq_id, n_seq_max)) {\n"
        "                return false;\n            }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "                cells.seq_add(i, seq_id);\n",
        "                if (cells.seq_has(i, seq_id)) {\n"
        '                    LLAMA_LOG_ERROR("%s: sequence %d comes twice in a cell\\n", __func__, seq_id);\n'
        "                    return false;\n                }\n\n",
        "before",
    ),
    (
        "src/llama-io.h",
        "    // drop tensor data that has been read",
        "    // bytes that are left to read, if that is known\n    virtual size_t n_left() { return SIZE_MAX; }\n\n",
        "before",
    ),
    (
        "src/llama-io.cpp",
        "    std::vector<char> buf(str_size);\n",
        "    if (str_size > n_left()) {\n"
        '        throw std::runtime_error("a string is longer than what is left of the state");\n    }\n'
        "    if (str_size == 0) { // no bytes, and no place for them\n        str.clear();\n        return;\n    }\n\n",
        "before",
    ),
    ("src/llama-io.cpp", '#include "llama-io.h"\n', "\n#include <stdexcept>\n", "after"),
    (
        "src/llama-context.cpp",
        "    llama_io_read_host(const uint8_t * p, size_t len) : ptr(p), buf_size(len) {}\n",
        "    size_t n_left() override { return buf_size; }\n\n",
        "before",
    ),
    (
        "src/llama-context.cpp",
        "    llama_io_read_file(llama_file * f) : file(f) {}\n",
        "    size_t n_left() override { return file->size() - file->tell(); }\n\n",
        "before",
    ),
    # -- a file may end too early: llama.cpp's reader then says nothing and leaves what was there
    (
        "src/llama-context.cpp",
        "        file->read_raw(dst, size);\n",
        "        if (size > n_left()) {\n"
        '            throw std::runtime_error("the file ends before the state does");\n        }\n',
        "before",
    ),
    # -- a key at position p that moves to p / d is to be rotated by p / d - p
    (
        "src/llama-kv-cells.h",
        "        shift[i] += p_old - pos[i];\n",
        "        shift[i] += pos[i] - p_old;\n",
        "instead",
    ),
]
