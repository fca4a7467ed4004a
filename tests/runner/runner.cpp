/* runner.cpp: libxquant's verbs on another CPU or system, for a process on this one: commands from standard input,
 * replies to standard output.
 *
 * Both are byte strings, each as its length (u64) and its bytes; numbers are i64.  A reply is a status, the message if
 * that is negative, and what the command gives.  Memory is one area at a fixed address, which the other side deals out.
 *
 *     write     address, bytes
 *     read      address, n                        -> bytes
 *     verb      name, n_threads, xq_store, args   -> most bytes of stack that a thread used
 *     kernels   -> name        available -> names        force  name        calls  name -> number
 *     attend_kernel  xq_store  -> name
 *
 * Structs are as they lie in memory, which is the same on both sides.  Each thread of a verb has its own stack, of
 * 128 KiB as musl's have (system.h; on Windows they are the system's, and nothing is said of their use).
 */
#include "system.h"
#include "xquant.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr uint64_t area = 0x1000000000, area_bytes = 1ull << 30;

std::string read_bytes() {
    uint64_t n;
    if (fread(&n, sizeof(n), 1, stdin) != 1) {
        exit(0); // the other side is done
    }
    std::string bytes(n, '\0');
    if (n > 0 && fread(&bytes[0], 1, n, stdin) != n) {
        fprintf(stderr, "runner: a command ends within itself\n");
        exit(1);
    }
    return bytes;
}

int64_t read_number() {
    int64_t n = 0;
    const std::string bytes = read_bytes();
    memcpy(&n, bytes.data(), bytes.size() < sizeof(n) ? bytes.size() : sizeof(n));
    return n;
}

void reply(const void *bytes, uint64_t n) {
    fwrite(&n, sizeof(n), 1, stdout);
    fwrite(bytes, 1, n, stdout);
}
void reply_number(int64_t n) {
    reply(&n, sizeof(n));
}
void reply_status(int64_t status, const std::string &message) {
    reply_number(status);
    if (status < 0) {
        reply(message.data(), message.size());
    }
}
void reply_name(const char *name) {
    reply_status(name ? XQ_OK : XQ_ERR_KERNELS, xq_error());
    if (name) {
        reply(name, strlen(name));
    }
}

/* ---- verbs ---- */

int call_verb(const std::string &name, const void *store, const void *args, const xq_exec &exec) {
    const xq_backend &cpu = *xq_cpu();
    const auto *s = (const xq_store *)store;
    if (name == "update") {
        return cpu.update(s, (const xq_update_args *)args, &exec);
    }
    if (name == "attend") {
        return cpu.attend(s, (const xq_attend_args *)args, &exec);
    }
    if (name == "unpack") {
        return cpu.unpack(s, (const xq_unpack_args *)args, &exec);
    }
    if (name == "read_keys") {
        return cpu.read_keys(s, (const xq_keys_args *)args, &exec);
    }
    if (name == "write_keys") {
        return cpu.write_keys(s, (const xq_keys_args *)args, &exec);
    }
    fprintf(stderr, "runner: there is no verb %s\n", name.c_str());
    exit(1);
}

struct worker {
    std::string verb;
    const void *store, *args;
    xq_exec exec;
    small_thread thread;
    int status = XQ_OK;
    std::string message;

    static void run(void *of) {
        auto &w = *(worker *)of;
        w.status = call_verb(w.verb, w.store, w.args, w.exec);
        w.message = w.status < 0 ? xq_error() : "";
    }
};

void run_verb() {
    const std::string verb = read_bytes();
    std::vector<worker> workers((size_t)read_number());
    const std::string store = read_bytes(), args = read_bytes();
    for (size_t i = 0; i < workers.size(); ++i) {
        workers[i].verb = verb;
        workers[i].store = store.empty() ? nullptr : store.data();
        workers[i].args = args.empty() ? nullptr : args.data();
        workers[i].exec = {(int32_t)i, (int32_t)workers.size(), nullptr};
    }
    for (auto &w : workers) {
        if (!w.thread.start(worker::run, &w)) {
            fprintf(stderr, "runner: no thread\n");
            exit(1);
        }
    }
    int64_t used = 0;
    int status = XQ_OK;
    std::string message;
    for (auto &w : workers) {
        const int64_t n = w.thread.join();
        used = n > used ? n : used;
        if (w.status < 0) {
            status = w.status;
            message = w.message;
        }
    }
    reply_status(status, message);
    if (status == XQ_OK) {
        reply_number(used);
    }
}

} // namespace

int main() {
    pass_bytes();
    if (!map_memory((void *)area, area_bytes)) {
        fprintf(stderr, "runner: no memory at the address\n");
        return 1;
    }
    for (;; fflush(stdout)) {
        const std::string command = read_bytes();
        if (command == "write") {
            void *at = (void *)read_number();
            const std::string bytes = read_bytes();
            memcpy(at, bytes.data(), bytes.size());
            reply_status(XQ_OK, "");
        } else if (command == "read") {
            const void *at = (const void *)read_number();
            const uint64_t n = (uint64_t)read_number();
            reply_status(XQ_OK, "");
            reply(at, n);
        } else if (command == "verb") {
            run_verb();
        } else if (command == "available") {
            reply_name(xq_kernels_available());
        } else if (command == "kernels") {
            reply_name(xq_kernels());
        } else if (command == "force") {
            const int status = xq_kernels_force(read_bytes().c_str());
            reply_status(status, xq_error());
        } else if (command == "calls") {
            const uint64_t n = xq_kernels_calls(read_bytes().c_str());
            reply_status(XQ_OK, "");
            reply_number((int64_t)n);
        } else if (command == "attend_kernel") {
            const std::string store = read_bytes();
            reply_name(xq_cpu()->attend_kernel((const xq_store *)store.data()));
        } else {
            fprintf(stderr, "runner: no command is called %s\n", command.c_str());
            return 1;
        }
    }
}
