/* Instances of attend_decode.cuh for heads of 64: the common case. */
#include "attend_decode.cuh"

namespace xq {

template int launch_decode_of<64, true, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);

} // namespace xq
