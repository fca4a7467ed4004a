/* graph_nodes.c: our attention, and a plain read of memory, as nodes of a ggml graph: so they run in the same threads,
 * with the same barriers, as llama.cpp's own operation beside them.  Compiled by op_graph.py when a benchmark starts.
 */
#include "xquant.h"

struct ggml_tensor;

/* cdef: begin */

typedef struct attention_job {
    int32_t n_tasks; /* KV heads times groups of rows times parts of the pages */
    int32_t n_rows, n_parts, e, rotate;
    const xq_attention *tasks;
    const float *const *states; /* [n_rows][n_parts] */
    float *out;                 /* [n_rows][e] */
    int (*attend)(const xq_attention *);
    int (*merge)(int32_t, const float *const *, int32_t, int32_t, float, const float *, float *);
    int32_t failed;
} attention_job;

typedef struct read_job {
    const uint64_t *data;
    int64_t n; /* numbers, a multiple of 64 for each thread */
    uint64_t sum[64];
} read_job;

/* cdef: end */

void attend_node(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    attention_job *job = userdata;
    (void)dst;
    for (int i = ith; i < job->n_tasks; i += nth) {
        if (job->attend(&job->tasks[i]) != 0) {
            job->failed = 1;
        }
    }
}

void merge_node(struct ggml_tensor *dst, int ith, int nth, void *userdata) {
    attention_job *job = userdata;
    (void)dst;
    for (int row = ith; row < job->n_rows; row += nth) {
        if (job->merge(job->n_parts, job->states + (int64_t)row * job->n_parts, job->e, job->rotate, -__builtin_inff(),
                       0, job->out + (int64_t)row * job->e) != 0) {
            job->failed = 1;
        }
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
