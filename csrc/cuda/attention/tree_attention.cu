// Attention over a flattened trie in one launch. Rows of a tile are (query, query head) pairs that
// share a KV head, so K and V are read once for all of them.
//
// The work, counted in chunks of tokens that a block of rows may see, is cut into equal shares, one
// for every block of the launch (work.cuh). For each segment of its share a block lists the tokens
// that any of its queries sees, in order, then streams their K and V rows through shared memory,
// whole tiles of live tokens at a time. A warp leaves out the tiles that none of its own rows see.
// Softmax is online, in fp32.
//
// Rows of fp8 are copied as they are and converted once for all warps, each 16 bytes by the thread
// that copied them; the scale of K is that of the scores, and V's is the result's.
//
// A segment that is not all of its group leaves a partial result in fp32. When the last part of a
// group has arrived, the parts are joined in slices of rows, each in the order of the tokens: the
// same bits, whoever joins. The last block to arrive joins what nobody else has claimed; the others
// wait for it for a while, to help.

#include "cuda/attention/arguments.cuh"
#include "cuda/attention/choose.cuh"
#include "cuda/attention/work.cuh"

namespace saffron::cuda {
namespace {

constexpr int kLookThreads = 256;

/// A warp a chunk.
__global__ void __launch_bounds__(kLookThreads) look_kernel(const Arguments a, int3* found) {
  const int chunk = static_cast<int>((blockIdx.x * kLookThreads + threadIdx.x) / 32);
  if (chunk >= chunks_of(a)) return;
  const int3 of_chunk = look_through(a, chunk, tokens_of(a));
  if (threadIdx.x % 32 == 0) found[chunk] = of_chunk;
}

/// Floats of workspace for what it finds, before the partial results; a multiple of 16 bytes.
int64_t look_floats(int64_t tokens) { return tokens > kLookedThrough ? 3 * kMostChunks : 0; }

}  // namespace

void launch_look(const Arguments& a, int64_t chunks, Stream stream) {
  launch<look_kernel>(dim3(blocks_for(chunks, kLookThreads / 32)), kLookThreads, 0, stream, a,
                      const_cast<int3*>(a.looked_through));
}

uint64_t capture_id(Stream stream) { return graph_of(stream); }

const char* tree_attention_path(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                DType stored) {
  if (queries == 0 || heads == 0) return "mma";
  return hopper_takes(queries, heads / kv_heads, head_dim, stored) ? "wgmma" : "mma";
}

int64_t tree_attention_workspace(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 int64_t tokens, DType stored) {
  if (queries == 0 || heads == 0) return 0;
  const int64_t group = heads / kv_heads;
  if (hopper_takes(queries, group, head_dim, stored)) {
    return hopper_workspace(queries, group, kv_heads, head_dim, tokens) + look_floats(tokens);
  }
  const auto workspace = [&](auto tile) {
    return workspace_for<decltype(tile)>(queries, group, kv_heads, tokens, device_properties()) +
           look_floats(tokens);
  };
  // Products in fp16 need as much.
  if (stored == DType::kFloat8) {
    return with_tile<Float8Tile, BFloat16>(head_dim, queries * group, device_properties(),
                                           workspace);
  }
  return with_tile<Tile, BFloat16>(head_dim, queries * group, device_properties(), workspace);
}

void tree_attention(const View& q, const KVCaches& caches, const TriePlan& plan,
                    const Scoring& scoring, const Attended& result, const Scratch& scratch,
                    const Launch& on) {
  const int64_t queries = q.shape[0], heads = q.shape[1];
  const int64_t kv_heads = caches.k.shape[1], tokens = plan.slot.shape[0];
  if (queries == 0 || heads == 0) return;
  Arguments a = {};
  a.q = q.data;
  a.k = caches.k.data;
  a.v = caches.v.data;
  a.q_stride_n = q.stride[0];
  a.q_stride_h = q.stride[1];
  a.k_stride_s = caches.k.stride[0];
  a.k_stride_h = caches.k.stride[1];
  a.v_stride_s = caches.v.stride[0];
  a.v_stride_h = caches.v.stride[1];
  a.slot = plan.slot.as<int32_t>();
  a.begin = plan.begin.as<int32_t>();
  a.end = plan.end.as<int32_t>();
  a.count = plan.count.as<int32_t>();
  a.k_scale = caches.k_scale.as<float>();
  a.v_scale = caches.v_scale.as<float>();
  a.sinks = scoring.sinks.as<float>();
  a.out = result.out.data;
  a.lse = result.lse.as<float>();
  a.looked_through = scratch.workspace.as<int3>();
  a.part = scratch.workspace.as<float>() + look_floats(tokens);
  a.left = scratch.counters.as<uint32_t>();
  a.arrived = a.left + 1;
  a.tokens = static_cast<int>(tokens);
  a.queries = static_cast<int>(queries);
  a.group = static_cast<int>(heads / kv_heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.head_dim = static_cast<int>(q.shape[2]);
  a.v_dim = static_cast<int>(caches.v.shape[2]);
  a.num_slots = static_cast<int>(caches.k.shape[0]);
  constexpr double kLog2E = 1.4426950408889634;
  a.capped = scoring.softcap != 0;  // NaN makes NaN of all scores
  a.scale = static_cast<float>(a.capped ? scoring.scale / scoring.softcap : scoring.scale * kLog2E);
  a.cap = static_cast<float>(a.capped ? scoring.softcap * kLog2E : 0);
  a.fault = on.fault.as<int32_t>();
  const DType dtype = q.dtype, stored = caches.k.dtype;
  if (hopper_takes(queries, a.group, a.wide(), stored)) return launch_hopper(a, dtype, on.stream);
  const bool is_bf16 = dtype == DType::kBFloat16;
  if (stored == DType::kFloat8) {
    return is_bf16 ? launch_bf16_fp8(a, on.stream) : launch_fp16_fp8(a, on.stream);
  }
  return is_bf16 ? launch_bf16(a, on.stream) : launch_fp16(a, on.stream);
}

}  // namespace saffron::cuda
