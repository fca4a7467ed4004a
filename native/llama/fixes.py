"""Faults of llama.cpp that the fork repairs for every type of cache, also for F16; tools/insert.py describes the form.

docs/llama-cpp-fixes.md lists them for users: `make fixes` writes it anew.
"""

from typing import TypedDict


class Fix(TypedDict):
    """One fault: what it is called, what it did (one sentence), and what repairs it."""

    name: str
    fault: str
    insertions: list[dict[str, str]]


RPC = "ggml/src/ggml-rpc/ggml-rpc.cpp"
TRANSPORT = "ggml/src/ggml-rpc/transport.cpp"

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
    # a worker is another process, perhaps on another machine: it may end at any moment, and so may its clients
    {
        "name": "a worker that is lost is an error of the call",
        "fault": "A client of RPC workers ended its whole process when one of them could not be reached or did not "
                 "answer any more, and did not say which one; one whose machine was gone it waited for forever.",
        "insertions": [
            {"name": "worker: header", "file": RPC, "in": "file", "after": "#include <future>",
             "text": "#include <functional>"},
            {"name": "worker: state", "file": RPC, "in": "struct rpc_dispatcher", "after": "rpc_dispatcher() {",
             "text": """

                std::string       endpoint;
                std::atomic_bool  lost { false };
                rpc_msg_hello_rsp hello = {}; // what the worker said of itself

                // from here on nothing is asked of the worker, and answers are zeros
                const std::function<void(const char *, void *, size_t)> lose =
                    [this](const char * why, void * output, size_t output_size) {
                        if (!lost.exchange(true)) {
                            GGML_LOG_ERROR("RPC worker %s is lost: %s\\n", endpoint.c_str(), why);
                            sock = nullptr;
                        }
                        if (output) {
                            memset(output, 0, output_size);
                        }
                        if (!running.exchange(true)) { // it never answered; messages come all the same
                            thread = std::thread([this] { work(); });
                        }
                    };
             """},
            {"name": "worker: not yet running", "file": RPC, "in": "struct rpc_dispatcher",
             "instead": "std::atomic_bool running;", "text": "std::atomic_bool running { false };"},
            {"name": "worker: name", "file": RPC, "in": "rpc_dispatcher::start", "at": "begin",
             "text": "this->endpoint = endpoint;"},
            {"name": "worker: bad endpoint", "file": RPC, "in": "rpc_dispatcher::start",
             "instead": 'GGML_ABORT("Failed to parse endpoint: %s\\n", endpoint.c_str());',
             "text": 'return lose("an endpoint must be host:port", nullptr, 0);'},
            {"name": "worker: no transport", "file": RPC, "in": "rpc_dispatcher::start",
             "instead": 'GGML_ABORT("RPC transport initialization failed\\n");',
             "text": 'return lose("the transport cannot be used", nullptr, 0);'},
            {"name": "worker: no connection", "file": RPC, "in": "rpc_dispatcher::start",
             "instead": 'GGML_ABORT("Failed to connect to %s\\n", endpoint.c_str());',
             "text": 'return lose("it cannot be reached", nullptr, 0);'},
            {"name": "worker: no handshake", "file": RPC, "in": "rpc_dispatcher::start",
             "instead": 'GGML_ABORT("RPC handshake failed for %s\\n", endpoint.c_str());',
             "text": 'return lose("it speaks another version, or something else", nullptr, 0);'},
            {"name": "worker: answer of the handshake", "file": RPC, "in": "file",
             "before": "static bool negotiate_hello(const std::shared_ptr<socket_t> & sock) {", "text": """
                // what the last one on this thread answered
                static thread_local rpc_msg_hello_rsp last_hello = {};

             """},
            {"name": "worker: note the answer", "file": RPC, "in": "negotiate_hello",
             "before": "sock->update_caps(response.conn_caps);", "text": "last_hello = response;"},
            {"name": "worker: handshake fails", "file": RPC, "in": "negotiate_hello",
             "instead": "RPC_STATUS_ASSERT(status);", "text": "if (!status) { return false; }"},
            {"name": "worker: keep the answer", "file": RPC, "in": "rpc_dispatcher::start", "before": "running = true;",
             "text": "hello = last_hello;"},
            {"name": "worker: messages to a lost one", "file": RPC, "in": "rpc_dispatcher::work",
             "instead": "if (msg_ptr->cmd != RPC_CMD_NONE) {", "text": """
                if (lost) {
                    lose("", msg_ptr->output, msg_ptr->output_size);
                } else if (msg_ptr->cmd != RPC_CMD_NONE) {
             """},
            {"name": "worker: no answer", "file": RPC, "in": "rpc_dispatcher::work",
             "instead": "RPC_STATUS_ASSERT(status);", "times": "2", "text": """
                if (!status) {
                    lose("its answer did not come, or cannot be read", msg_ptr->output, msg_ptr->output_size);
                }
             """},
            {"name": "worker: try again", "file": RPC, "in": "get_dispatcher",
             "instead": "if (auto dispatcher = it->second.lock())",
             "text": "if (auto dispatcher = it->second.lock(); dispatcher && !dispatcher->lost)"},
            {"name": "worker: no base", "file": RPC, "in": "ggml_backend_rpc_buffer_get_base",
             "before": "ctx->base_ptr = reinterpret_cast<void *>(response.base_ptr);", "text": """
                if (response.base_ptr == 0) { // nobody will ask what lies there
                    return reinterpret_cast<void *>(4096);
                }
             """},
            {"name": "worker: no alignment", "file": RPC, "in": "get_alignment",
             "instead": "return response.alignment;", "text": "return std::max<uint64_t>(response.alignment, 1);"},
            {"name": "worker: forget the sizes", "file": RPC, "in": "ggml_backend_rpc_buffer_type",
             "before": "buft_map[buft_name] = buft;", "text": """
                if (dispatcher->lost) {
                    return buft;
                }
             """},
            {"name": "worker: graphs", "file": RPC, "in": "ggml_backend_rpc_graph_compute",
             "instead": "return GGML_STATUS_SUCCESS;",
             "text": "return rpc_ctx->dispatcher->lost ? GGML_STATUS_FAILED : GGML_STATUS_SUCCESS;"},
            {"name": "worker: tell who is lost", "file": RPC, "in": "ggml_backend_rpc_get_proc_address", "at": "begin",
             "text": """
                if (std::strcmp(name, "ggml_backend_rpc_lost") == 0) {
                    // the endpoint of a backend whose worker is lost, else null
                    return (void *) +[](ggml_backend_t backend) -> const char * {
                        const auto & dispatcher = ((ggml_backend_rpc_context *) backend->context)->dispatcher;
                        return dispatcher->lost ? dispatcher->endpoint.c_str() : nullptr;
                    };
                }
             """},
            {"name": "worker: its machine is gone", "file": TRANSPORT, "in": "set_no_delay", "at": "begin", "text": """
                #ifdef __linux__
                // after 10 s of silence it is asked three times whether it is there; what was sent must arrive in 40 s
                const int on = 1, idle = 10, times = 3, ms = 40000;
                setsockopt(sockfd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
                setsockopt(sockfd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
                setsockopt(sockfd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof(idle));
                setsockopt(sockfd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof(times));
                setsockopt(sockfd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof(ms));
                #endif
             """},
            {"name": "worker: hooks", "file": "src/llama-context.cpp", "in": "file", "after": '#include "llama-ext.h"',
             "text": '#include "xquant-hooks.h"'},
            {"name": "worker: decode", "file": "src/llama-context.cpp", "in": "llama_decode",
             "instead": "const int ret = ctx->decode(batch);",
             "text": "const int ret = xquant::with_all_workers(*ctx, ctx->decode(batch));"},
            {"name": "worker: encode", "file": "src/llama-context.cpp", "in": "llama_encode",
             "instead": "const int ret = ctx->encode(batch);",
             "text": "const int ret = xquant::with_all_workers(*ctx, ctx->encode(batch));"},
            *({"name": f"worker: {function}", "file": "src/llama-context.cpp", "in": f"llama_context::{function}",
               "before": "return io.n_bytes();", "text": """
                xquant::require_all_workers(*this);

               """} for function in ("state_write_data", "state_read_data", "state_seq_write_data",
                                     "state_seq_read_data")),
            {"name": "worker: option of the front ends", "file": "common/arg.cpp", "in": "add_rpc_devices",
             "before": "ggml_backend_register(reg);", "text": """
                if (!reg) {
                    throw std::invalid_argument("no RPC worker answers at " + server);
                }
             """},
        ],
    },
    {
        "name": "a worker outlives its clients",
        "fault": "An RPC worker ended when a client left while it was answering, when a graph of a client could not be "
                 "computed, and when a tensor of a client did not lie within its buffer.",
        "insertions": [
            {"name": "client: it left", "file": TRANSPORT, "in": "socket_t::impl::send_data",
             "instead": "send(fd, (const char *)data + bytes_sent, size_to_send, 0)",
             "text": "send(fd, (const char *)data + bytes_sent, size_to_send, RPC_SEND_FLAGS)"},
            {"name": "client: no signal", "file": TRANSPORT, "in": "file", "before": "static const char * RPC_DEBUG",
             "text": """
                #ifdef MSG_NOSIGNAL
                static constexpr int RPC_SEND_FLAGS = MSG_NOSIGNAL; // a peer that is gone is an error, not a signal
                #else
                static constexpr int RPC_SEND_FLAGS = 0;
                #endif

             """},
            *({"name": f"client: {function} fails", "file": RPC, "in": f"rpc_server::{function}",
               "before": "GGML_ASSERT(status == GGML_STATUS_SUCCESS &&", "text": """
                if (status != GGML_STATUS_SUCCESS) {
                    GGML_LOG_ERROR("[%s] a graph failed: %s\\n", __func__, ggml_status_to_string(status));
                    return false;
                }
               """} for function in ("graph_compute", "graph_recompute")),
            {"name": "client: tensor wraps around", "file": RPC, "in": "rpc_server::deserialize_tensor",
             "instead": "GGML_ASSERT(tensor->data + tensor_size >= tensor->data);", "text": """
                if (tensor->data + tensor_size < tensor->data) {
                    return nullptr;
                }
             """},
            {"name": "client: tensor out of its buffer", "file": RPC, "in": "rpc_server::deserialize_tensor",
             "before": "GGML_ASSERT(tensor->data >= buffer_start &&", "text": """
                if (tensor->data < buffer_start || tensor->data + tensor_size > buffer_start + buffer_size) {
                    return nullptr;
                }
             """},
        ],
    },
    {
        "name": "AMX works when GCC 12.2 compiled it",
        "fault": "GCC's `_tile_loadconfig` says that it reads 8 of its 64 bytes, so that GCC left out what writes the "
                 "others, and the first product with AMX was an illegal instruction.",
        "insertions": [
            {"name": "AMX: all of the configuration is read", "file": "ggml/src/ggml-cpu/amx/mmq.cpp",
             "in": "ggml_tile_config_init", "before": "_tile_loadconfig(&tc);",
             "text": '__asm__ volatile("" : : "r"(&tc) : "memory");'},
        ],
    },
    {
        "name": "threads wait for the next token",
        "fault": "Without OpenMP, as in wheels, the CPU backend started threads for every graph that was given none, "
                 "and ended them: for every token of llama_cpp, of a worker, of an image encoder.",
        "insertions": [
            {"name": "threads: header", "file": "ggml/src/ggml-cpu/ggml-cpu.cpp", "in": "file",
             "after": '#include "ggml-cpu.h"', "text": '#include "cpu-threads.h"'},
            {"name": "threads: a backend's", "file": "ggml/src/ggml-cpu/ggml-cpu.cpp",
             "in": "struct ggml_backend_cpu_context", "before": "int                 n_threads;",
             "text": "waiting_threads     waiting;"},
            {"name": "threads: of a graph", "file": "ggml/src/ggml-cpu/ggml-cpu.cpp",
             "in": "ggml_backend_cpu_graph_compute", "before": "return ggml_graph_compute", "text": """
                if (!cplan.threadpool) {
                    cplan.threadpool = cpu_ctx->waiting.of(cplan.n_threads);
                }

             """},
        ],
    },
]
