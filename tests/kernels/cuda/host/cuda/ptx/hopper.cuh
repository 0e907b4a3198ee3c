#pragma once

// Stands in for csrc/cuda/ptx/hopper.cuh, function by function: what each operation does, in plain
// C++. Sources as there.

#include <deque>
#include <memory>
#include <vector>

#include "async.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/tensor_map.cuh"

#define SAFFRON_HOPPER 1

namespace saffron::cuda::ptx {

// --- barriers ---

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) host::fail("a barrier is not 8-byte aligned");
  host::Async::current().init(barrier, arrivals);
}

inline void barrier_arrive(uint64_t* barrier) { host::Async::current().arrive(barrier); }

inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  host::Async::current().expect(barrier, bytes);
  host::Async::current().arrive(barrier);
}

inline void barrier_await_copies(uint64_t* barrier) {
  host::Async::current().await_copies(barrier);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  host::Async::current().wait(barrier, parity);
}

template <int kNumber, int kThreads>
void sync_some() {
  host::some_barrier(kNumber, kThreads);
}

template <int kRegisters>
void give_up_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
}

inline void fence_async() { host::Async::current().fence(); }

inline void check_fenced() {
  if (host::current().unfenced) host::fail("a box or a product without a proxy fence before it");
}

// --- boxes ---

/// An address as matrix descriptors and swizzling see it. Shared memory begins at 1024.
inline uint32_t shared_address(const void* shared) {
  const auto* block = host::current().block;
  const auto offset = static_cast<const unsigned char*>(shared) - block->shared;
  if (offset < 0 || static_cast<size_t>(offset) >= block->shared_bytes) {
    host::fail("an address is not in shared memory");
  }
  return static_cast<uint32_t>(offset) + 1024;
}

inline unsigned char* at_shared_address(uint32_t address) {
  const auto* block = host::current().block;
  if (address < 1024 || address - 1024 >= block->shared_bytes) {
    host::fail("an operand reaches beyond shared memory");
  }
  return block->shared + (address - 1024);
}

/// Where the byte of a matrix in rows of 128 bytes lies: 16 bytes change places within a row, in a
/// pattern that repeats after 1024 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* barrier) {
  check_fenced();
  const uint32_t to = shared_address(shared);
  if (to % 128 != 0) host::fail("a box is not copied to a multiple of 128 bytes");
  const size_t bytes = 2 * static_cast<size_t>(map.box[0] * map.box[1] * map.box[2]);
  at_shared_address(to + static_cast<uint32_t>(bytes) - 1);
  unsigned char* const begin = at_shared_address(1024);
  host::Async::current().copy_box(barrier, begin + (to - 1024), bytes, [=] {
    const auto within = [&](int dimension, int64_t at) {
      return at >= 0 && at < map.size[dimension];
    };
    for (int row = 0; row < map.box[2]; ++row) {
      for (int i = 0; i < map.box[0]; ++i) {
        const uint32_t address = swizzled(to + static_cast<uint32_t>(128 * row + 2 * i));
        const unsigned char* from =
            map.data + (x + i) * map.stride[0] + y * map.stride[1] + (z + row) * map.stride[2];
        if (within(0, x + i) && within(1, y) && within(2, z + row)) {
          std::memcpy(begin + (address - 1024), from, 2);
        } else {
          std::memset(begin + (address - 1024), 0, 2);
        }
      }
    }
  });
}

inline void prefetch(const TensorMap&) {}

// --- products ---

inline uint64_t matrix(const void* shared, uint32_t leading, uint32_t stride) {
  return 1ull << 62 | static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         (shared_address(shared) & 0x3ffff) >> 4;
}

/// One product of one warp: its 16 rows of D and A.
struct Product {
  int columns;
  bool transposed, add;
  float (*to_float)(uint16_t);
  uint64_t b;
  std::vector<uint16_t> bits;  // of B, [16, columns], as it was in the beginning
  float a[16][16];
  float* acc[32];           // of every lane
  std::vector<float> held;  // what they hold, while there is NaN; empty: see the product before
};

/// A warp's products under way.
struct Products : host::Kept {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<uint64_t> begun;  // the first warp of a warpgroup keeps what all of them begin
  size_t count = 0;
  Products* first = nullptr;  // that of the first warp
  int warps = 0;              // of the warpgroup, where this is the first

  template <class Each>
  void each(Each run) {
    for (auto& group : groups) {
      for (auto& product : group) run(product);
    }
    for (auto& product : open) run(product);
  }

  void end() override {
    if (!open.empty() || !groups.empty()) host::fail("a block ends before its products");
    if (first == nullptr) return;
    if (count != first->begun.size() || first->warps != 4) {
      host::fail("warps of a warpgroup begin different products");
    }
  }
};

inline Products& products_of(unsigned warp) {
  auto& kept = host::kept_by_warp(warp);
  if (!kept) kept = std::make_shared<Products>();
  return static_cast<Products&>(*kept);
}

inline unsigned own_warp() { return host::current().thread_index.x / 32; }

inline void wgmma_fence() {
  int nothing = 0;
  host::collective(host::kWholeWarp, &nothing, "wgmma.fence", [](void**, unsigned) {});
  host::current().registers_fenced = true;
}

inline void wgmma_commit() {
  int nothing = 0;
  host::collective(host::kWholeWarp, &nothing, "wgmma.commit_group", [](void**, unsigned) {
    Products& all = products_of(own_warp());
    all.groups.push_back(std::move(all.open));
    all.open.clear();
  });
}

/// All warps of a warpgroup have to begin the same products.
inline void check_alike(uint64_t b) {
  Products &own = products_of(own_warp()), &first = products_of(own_warp() / 4 * 4);
  if (own.first == nullptr) ++first.warps;
  own.first = &first;
  if (own.count == first.begun.size()) first.begun.push_back(b);
  if (first.begun[own.count++] != b) host::fail("warps of a warpgroup begin different products");
}

/// The bits of B, [16, columns], by its descriptor and the canonical layouts with a swizzle of 128
/// bytes. In units of 16 bytes, T elements, these are
/// ((8, n), (T, 2)) : ((8 T, stride), (1, T)) of rows of k, and
/// ((T, 8, n), (8, k)) : ((1, T, leading), (8 T, stride)) of rows of n (kTransposed).
inline std::vector<uint16_t> read_b(const Product& product) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(product.b >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (product.b >> 62 != 1 || (product.b >> 46 & 0xffff) != 0x0000 || (product.b >> 14 & 3) != 0 ||
      (product.b >> 30 & 3) != 0) {
    host::fail("an unknown layout of B");
  }
  std::vector<uint16_t> bits(16 * static_cast<size_t>(product.columns));
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < product.columns; ++n) {
      const uint32_t offset = product.transposed
                                  ? 2 * (n % 64) + n / 64 * leading + k % 8 * 128 + k / 8 * stride
                                  : 2 * k + n % 8 * 128 + n / 8 * stride;
      const unsigned char* from = at_shared_address(swizzled(start + offset));
      std::memcpy(&bits[static_cast<size_t>(k * product.columns + n)], from, 2);
    }
  }
  return bits;
}

inline void finish(Products& all, Product& product) {
  if (read_b(product) != product.bits) host::fail("B is written while a product is under way");
  const int each = product.columns / 2;  // accumulators of a lane
  std::vector<float> sums(16 * static_cast<size_t>(product.columns));
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < product.columns; ++n) {
      const float b = product.to_float(product.bits[static_cast<size_t>(k * product.columns + n)]);
      for (int i = 0; i < 16; ++i) {
        sums[static_cast<size_t>(i * product.columns + n)] += product.a[i][k] * b;
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < each; ++i) {
      const float x = sums[static_cast<size_t>((g + i / 2 % 2 * 8) * product.columns + i / 4 * 8 +
                                               2 * t + i % 2)];
      float& held = product.held[static_cast<size_t>(lane * each + i)];
      held = product.add ? held + x : x;
    }
  }
  // The next one on the same accumulators goes on from here.
  bool found = false;
  all.each([&](Product& other) {
    if (found || &other == &product || other.acc[0] != product.acc[0] || !other.held.empty())
      return;
    other.held = product.held;
    found = true;
  });
  if (found) return;
  for (int lane = 0; lane < 32; ++lane) {
    std::copy_n(&product.held[static_cast<size_t>(lane * each)], each, product.acc[lane]);
  }
}

template <int kPending, int kBlocks>
void wgmma_wait(float (&)[kBlocks][4]) {
  int nothing = 0;
  host::may_switch();
  host::collective(host::kWholeWarp, &nothing, "wgmma.wait_group", [](void**, unsigned) {
    Products& all = products_of(own_warp());
    while (all.groups.size() > kPending) {
      for (auto& product : all.groups.front()) finish(all, product);
      all.groups.pop_front();
    }
  });
  host::current().registers_fenced = false;
}

struct Operands {
  float* acc;
  const uint32_t* a;
  uint64_t b;
};

template <bool kTransposed, bool kAdd, int kBlocks, float (*kToFloat)(uint16_t)>
void begin_product(void** lanes, unsigned) {
  Products& all = products_of(own_warp());
  Product product{8 * kBlocks, kTransposed, kAdd, kToFloat, 0, {}, {}, {}, {}};
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Operands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &product.a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      to[0] = kToFloat(static_cast<uint16_t>(own.a[i]));
      to[1] = kToFloat(static_cast<uint16_t>(own.a[i] >> 16));
    }
    product.acc[lane] = own.acc;
    if (lane > 0 && own.b != product.b) host::fail("lanes of a warp give different matrices");
    product.b = own.b;
  }
  check_alike(product.b);
  product.bits = read_b(product);
  bool under_way = false;
  all.each([&](Product& other) { under_way |= other.acc[0] == product.acc[0]; });
  for (int lane = 0; lane < 32 && !under_way; ++lane) {
    product.held.insert(product.held.end(), product.acc[lane], product.acc[lane] + 4 * kBlocks);
  }
  for (float* acc : product.acc) std::fill_n(acc, 4 * kBlocks, NAN);
  all.open.push_back(std::move(product));
}

template <bool kTransposed, bool kAdd, int kBlocks, float (*kToFloat)(uint16_t)>
void wgmma(float (&acc)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  if (!host::current().registers_fenced) host::fail("a product without a fence before it");
  check_fenced();
  Operands own{&acc[0][0], a, b};
  host::collective(host::kWholeWarp, &own, "wgmma",
                   begin_product<kTransposed, kAdd, kBlocks, kToFloat>);
}

template <bool kTransposed, bool kAdd, int kBlocks>
void wgmma_bf16(float (&acc)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  wgmma<kTransposed, kAdd, kBlocks, bf16_to_float>(acc, a, b);
}

template <bool kTransposed, bool kAdd, int kBlocks>
void wgmma_half(float (&acc)[kBlocks][4], const uint32_t (&a)[4], uint64_t b) {
  wgmma<kTransposed, kAdd, kBlocks, half_to_float>(acc, a, b);
}

}  // namespace saffron::cuda::ptx
