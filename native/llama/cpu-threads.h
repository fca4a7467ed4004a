/* cpu-threads.h: threads of a CPU backend, for graphs that are given none.
 *
 * Without OpenMP ggml would start threads for each of these graphs, that is for every token, and end them.  Here they
 * sleep between graphs, so that nothing is kept busy when there is no work, and end with the backend.  Whoever gives
 * the backend threads of his own has those.
 */
#pragma once

#include "ggml-cpu.h"

#include <cstddef>
#include <map>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace { // each build of ggml-cpu has its own

class waiting_threads {
  public:
    waiting_threads() = default;
    waiting_threads(const waiting_threads &) = delete;
    waiting_threads &operator=(const waiting_threads &) = delete;
    ~waiting_threads() { end(); }

    /* A pool of so many threads; null: a graph needs one alone, or OpenMP has some.  By one thread at a time, as a
     * backend's graphs are. */
    ggml_threadpool *of(int n_threads) {
#ifdef GGML_USE_OPENMP
        (void)n_threads;
        return nullptr;
#else
        if (n_threads <= 1) {
            return nullptr;
        }
        if (is_forked() || (pools.size() == most_pools && pools.count(n_threads) == 0)) {
            end();
        }
        ggml_threadpool *&pool = pools[n_threads];
        if (!pool) {
            ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
            params.poll = 0;
            pool = ggml_threadpool_new(&params);
        }
        return pool;
#endif
    }

  private:
    static constexpr size_t most_pools = 4; /* whoever tries all numbers of threads must not keep them all */
    std::map<int, ggml_threadpool *> pools; /* single tokens and prompts may have different numbers */

    void end() {
        for (const auto &pool : pools) {
            if (!is_forked()) { // such a process has the pools, but none of their threads
                ggml_threadpool_free(pool.second);
            }
        }
        pools.clear();
        process = this_process();
    }
    bool is_forked() const { return process != this_process(); }
#ifdef _WIN32
    static int this_process() { return 0; }
#else
    static int this_process() { return getpid(); }
#endif
    int process = this_process();
};

} // namespace
