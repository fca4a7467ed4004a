/* Instances of attend_decode.cuh for heads of 128: one token, at most four heads to a KV head. */
#include "attend_decode.cuh"

namespace xq {

template int launch_decode_of<128, true, 1>(const xq_store &, const xq_attend_args &, cudaStream_t);

} // namespace xq
