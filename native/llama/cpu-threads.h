/* cpu-threads.h: threads of a CPU backend, for graphs that are given none.
 *
 * Without OpenMP ggml would start threads for each of these graphs, that is for every token, and end them.  Here they
 * sleep between graphs, so that nothing is kept busy when there is no work, and end with the backend.  Whoever gives
 * the backend threads of his own has those.
 */
#pragma once

#include "ggml-cpu.h"

#include <cstdint>
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
    ~waiting_threads() {
        forget_others();
        for (const auto &pool : pools) {
            ggml_threadpool_free(pool.second);
        }
    }

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
        forget_others();
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
    std::map<int, ggml_threadpool *> pools; /* single tokens and prompts may have different numbers */

    /* In a process that was forked there are the pools, but none of their threads. */
    void forget_others() {
#ifndef _WIN32
        if (process != getpid()) {
            process = getpid();
            pools.clear();
        }
    }
    pid_t process = getpid();
#else
    }
#endif
};

} // namespace
