/* graph_nodes.c: the verb of attention, a plain read of memory and plain arithmetic, as nodes of a ggml graph: so they
 * run in the same threads, with the same barriers, as llama.cpp's own operation beside them.  Compiled by op_graph.py
 * when a benchmark starts.
 */
#include "xquant.h"

struct ggml_tensor;

/* cdef: begin */

typedef struct attend_job {
    const xq_backend *backend;
    const xq_store *store;
    const xq_attend_args *args;
    int32_t failed;
} attend_job;

typedef struct read_job {
    const uint64_t *data;
    int64_t n; /* numbers, a multiple of 64 for each thread */
    uint64_t sum[64];
} read_job;

typedef struct sum_job {
    int64_t n; /* steps, of all threads together */
    float sum[64];
} sum_job;

/* cdef: end */

void attend_node(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    attend_job *job = userdata;
    (void)dst;
    const xq_exec exec = {ith, nth, 0};
    if (job->backend->attend(job->store, job->args, &exec) != XQ_OK) {
        job->failed = 1;
    }
}

void read_node(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    read_job *job = userdata;
    (void)dst;
    const int64_t n = job->n / nth / 64 * 64;
    const uint64_t *x = job->data + ith * n;
    uint64_t sum[64] = {0};
    for (int64_t i = 0; i < n; i += 64) {
        for (int k = 0; k < 64; ++k) {
            sum[k] ^= x[i + k];
        }
    }
    for (int k = 1; k < 64; ++k) {
        sum[0] ^= sum[k];
    }
    job->sum[ith] = sum[0];
}

/* Multiplies and adds in registers: what threads gain where no memory and no other thread holds them up. */
void sum_node(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    sum_job *job = userdata;
    (void)dst;
    float x[48];
    for (int k = 0; k < 48; ++k) {
        x[k] = (float)(ith + k);
    }
    for (int64_t i = job->n / nth; i > 0; --i) {
        for (int k = 0; k < 48; ++k) {
            x[k] = x[k] * 0.999f + 0.001f;
        }
    }
    for (int k = 1; k < 48; ++k) {
        x[0] += x[k];
    }
    job->sum[ith] = x[0];
}
