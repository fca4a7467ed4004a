"""What the fork changes in llama.cpp where states are saved and loaded; in the form of insertions.py.

A state is input from outside: each length is compared with what is left of it, and each cell with what can be.
"""

INSERTIONS: list[tuple[str, str, str, str]] = [
    # -- a cache's state is its own
    (
        "src/llama-kv-cache.cpp",
        "    GGML_UNUSED(flags);\n\n    io.write(&n_stream, sizeof(n_stream));\n",
        "    if (xq) {\n        xq->state_write(io, seq_id);\n        return;\n    }\n\n",
        "before",
    ),
    (
        "src/llama-kv-cache.cpp",
        "    GGML_UNUSED(flags);\n\n    // TODO: fix incosistent handling",
        "    if (xq) {\n        xq->state_read(io, seq_id);\n        return;\n    }\n\n",
        "before",
    ),
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
    # -- a model with sliding layers has two caches
    ("src/llama-kv-cache-iswa.cpp", '#include "llama-model.h"\n', '#include "xquant-cache.h"\n', "after"),
    (
        "src/llama-kv-cache-iswa.cpp",
        "void llama_kv_cache_iswa::state_write(llama_io_write_i & io, llama_seq_id seq_id,"
        " llama_state_seq_flags flags) const {\n",
        "    // the sliding layers first: what follows is checked before anything changes\n"
        "    if (kv_base->xq) {\n        kv_swa->state_write(io, seq_id, flags);\n"
        "        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {\n"
        "            kv_base->state_write(io, seq_id, flags);\n        }\n        return;\n    }\n\n",
        "after",
    ),
    (
        "src/llama-kv-cache-iswa.cpp",
        "void llama_kv_cache_iswa::state_read(llama_io_read_i & io, llama_seq_id seq_id,"
        " llama_state_seq_flags flags) {\n",
        "    if (kv_base->xq) {\n        xquant::state_read_sliding(*kv_base, *kv_swa, io, seq_id, flags);\n"
        "        return;\n    }\n\n",
        "after",
    ),
]
