/* xquant-worker.h: workers: processes on this or another machine that run layers for this one, through llama.cpp's RPC.
 *
 * A worker's layers keep their cache in its memory, and our nodes run there.  What it says of itself when a connection
 * is made decides whether a cache may lie there (xquant_worker() in xquant-ops.h).  A worker that is lost answers
 * zeros from then on, so whoever reads from one, or computes there, asks afterwards.
 */
#pragma once

#include "ggml-backend.h"

#include <cstdint>

namespace xquant {

/* Whether a device runs our operations.  One that does not is announced in the log, and the cache of its layers stays
 * on the CPU; a worker that does not is refused, by throwing. */
bool runs_on(ggml_backend_dev_t device);
/* The largest tensor of one stream that a device may hold: numbers of elements and strides go to a worker in 32 bits.
 */
int64_t most_bytes(ggml_backend_dev_t device);
/* Whether nodes on a device are run by the CPU's kernels: of this machine, or of a worker. */
bool has_cpu_kernels(ggml_backend_dev_t device);
bool is_worker(ggml_backend_dev_t device);

/* The endpoint of the first worker of a scheduler that is lost; null: none is. */
const char *lost_worker(ggml_backend_sched_t sched);

} // namespace xquant
