// What launch.cuh means on a GPU, fifth part: products of 64 rows on the tensor cores of a Hopper,
// by a group of four warps, beside the threads. Compiled for anything else they do nothing, and
// kernels that use them are empty behind kGroupProducts.
#pragma once

#include "cuda/launch_copies.cuh"

namespace tk::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kGroupProducts = true;
#define TK_WGMMA(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kGroupProducts = false;
#define TK_WGMMA(...)
#endif

namespace detail {

// Never launched: the shared memory that it has tells for what this object was compiled.
constexpr int kMark = 4096;
template <class T>
__global__ void group_products_kernel(T* to) {
  if constexpr (kGroupProducts) {
    __shared__ T mark[kMark / sizeof(T)];
    mark[threadIdx.x] = to[threadIdx.x];
    __syncthreads();
    to[threadIdx.x] = mark[threadIdx.x ^ 1];
  }
}

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

// To the compiler registers change here, so that nothing is done to them earlier or later.
__device__ inline void tie(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ inline void tie(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }
template <class T, int count>
__device__ void tie(T (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) tie(values[i]);
}

}  // namespace detail

// Kernels of this object have them on this GPU, or not. A template: only files that ask carry the
// kernel.
template <class T = int>
GroupProducts group_products() {
  static int there[kDevices] = {};
  const int yes = known_of_device(there, [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, detail::group_products_kernel<T>) == cudaSuccess &&
                   attributes.sharedSizeBytes >= detail::kMark
               ? 1
               : -1;
  });
  return yes > 0 ? GroupProducts::kWhereFaster : GroupProducts::kNowhere;
}

// The same in all lanes, as the compiler can see.
__device__ inline int group() { return __shfl_sync(kAllLanes, thread() / kGroup, 0); }

template <class... Registers>
__device__ void fence_products(Registers&... registers) {
  (detail::tie(registers), ...);
  TK_WGMMA("wgmma.fence.sync.aligned;" :: : "memory");
}

__device__ inline void commit_products() {
  TK_WGMMA("wgmma.commit_group.sync.aligned;" :: : "memory");
}

template <int left, class... Registers>
__device__ void wait_products(Registers&... registers) {
  TK_WGMMA("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
  (detail::tie(registers), ...);
}

// The registers of the sums: their numbers, and what they are.
#define TK_NUMBERS_32                                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22" \
  ",%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TK_NUMBERS_64                                                                    \
  TK_NUMBERS_32                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52" \
  ",%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TK_NUMBERS_96                                                                    \
  TK_NUMBERS_64                                                                          \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84" \
  ",%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define TK_NUMBERS_128                                                                \
  TK_NUMBERS_96                                                                       \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112" \
  ",%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define TK_SUMS_4(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define TK_SUMS_16(j) TK_SUMS_4(j), TK_SUMS_4(j + 1), TK_SUMS_4(j + 2), TK_SUMS_4(j + 3)
#define TK_SUMS_32 TK_SUMS_16(0), TK_SUMS_16(4)
#define TK_SUMS_64 TK_SUMS_32, TK_SUMS_16(8), TK_SUMS_16(12)
#define TK_SUMS_96 TK_SUMS_64, TK_SUMS_16(16), TK_SUMS_16(20)
#define TK_SUMS_128 TK_SUMS_96, TK_SUMS_16(24), TK_SUMS_16(28)

// The numbers of what follows them.
#define TK_INPUTS_32 "%32", "%33", "%34", "%35", "%36", "%37", "%38"
#define TK_INPUTS_64 "%64", "%65", "%66", "%67", "%68", "%69", "%70"
#define TK_INPUTS_96 "%96", "%97", "%98", "%99", "%100", "%101", "%102"
#define TK_INPUTS_128 "%128", "%129", "%130", "%131", "%132", "%133", "%134"

// One instruction for each width, kind of numbers and place of the left operand.
#define TK_FROM_SHARED(count, shape, flags, a, b, c, d, e, f, g)                                  \
  TK_WGMMA("{.reg .pred more; setp.ne.b32 more, " c ", 0; wgmma.mma_async.sync.aligned." shape    \
           " {" TK_NUMBERS_##count                                                                \
           "}, " a ", " b ", more, 1, 1" flags(", " d ", " e) ";}" : TK_SUMS_##count : "l"(left), \
           "l"(right), "r"(static_cast<int>(add)), "n"(static_cast<int>(across)),                 \
           "n"(static_cast<int>(transposed)))
#define TK_FROM_REGISTERS(count, shape, flags, a, b, c, d, e, f, g)                            \
  TK_WGMMA("{.reg .pred more; setp.ne.b32 more, " f ", 0; wgmma.mma_async.sync.aligned." shape \
           " {" TK_NUMBERS_##count                                                             \
           "}, {" a ", " b ", " c ", " d "}, " e                                               \
           ", more, 1, 1" flags(", " g) ";}" : TK_SUMS_##count : "r"(left[0]),                 \
           "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(static_cast<int>(add)),   \
           "n"(static_cast<int>(transposed)))
#define TK_FLAGS(text) text
#define TK_NO_FLAGS(text)
#define TK_CALL(macro, ...) macro(__VA_ARGS__)
#define TK_KINDS(from, n, count)                                                        \
  if constexpr (sizeof(T) == 4) {                                                       \
    TK_CALL(from, count, "m64n" #n "k8.f32.tf32.tf32", TK_NO_FLAGS, TK_INPUTS_##count); \
  } else if constexpr (detail::kIsHalf<T>) {                                            \
    TK_CALL(from, count, "m64n" #n "k16.f32.f16.f16", TK_FLAGS, TK_INPUTS_##count);     \
  } else {                                                                              \
    TK_CALL(from, count, "m64n" #n "k16.f32.bf16.bf16", TK_FLAGS, TK_INPUTS_##count);   \
  }
#define TK_WIDTHS(from)                                       \
  static_assert(N == 64 || N == 128 || N == 192 || N == 256); \
  if constexpr (N == 64) {                                    \
    TK_KINDS(from, 64, 32)                                    \
  } else if constexpr (N == 128) {                            \
    TK_KINDS(from, 128, 64)                                   \
  } else if constexpr (N == 192) {                            \
    TK_KINDS(from, 192, 96)                                   \
  } else {                                                    \
    TK_KINDS(from, 256, 128)                                  \
  }

template <class T, int N, bool transposed = false, bool across = false>
__device__ void multiply_add_group(float (&sums)[N / 8][4], uint64_t left, uint64_t right,
                                   bool add = true) {
  TK_WIDTHS(TK_FROM_SHARED)
}

template <class T, int N, bool transposed = false>
__device__ void multiply_add_group(float (&sums)[N / 8][4], const uint32_t (&left)[4],
                                   uint64_t right, bool add = true) {
  TK_WIDTHS(TK_FROM_REGISTERS)
}

#undef TK_WGMMA
#undef TK_WIDTHS
#undef TK_KINDS
#undef TK_CALL
#undef TK_NO_FLAGS
#undef TK_FLAGS
#undef TK_FROM_REGISTERS
#undef TK_FROM_SHARED

}  // namespace tk::cuda
