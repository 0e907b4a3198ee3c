// tree_attention with products in bf16, fp8 caches: mma.cuh.

#include "cuda/attention/mma.cuh"

namespace saffron::cuda {

void launch_bf16_fp8(const Arguments& a, Stream stream) {
  launch_tiles<Float8Tile, BFloat16>(a, stream);
}

}  // namespace saffron::cuda
