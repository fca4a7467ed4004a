/* Instances of attend_decode.cuh for heads of 128: scores with a cap or slopes, key tiles or LOG8 parameters. */
#include "attend_decode.cuh"

namespace xq {

template int launch_decode_of<128, false, 2>(const xq_store &, const xq_attend_args &, cudaStream_t);

} // namespace xq
