"""A unit and its headers, of the shapes that packages with several instantiations have."""

from __future__ import annotations

CAUSAL = """\
// template void f<char>(char *); is not one
#include <c10/util/Half.h>
#ifndef USE_ROCM
    #include <cub/block/block_load.cuh>
    #define ROCM_ONLY(x)
#else
    namespace cub = hipcub;
    #define ROCM_ONLY(x) x
#endif
#include "common.h"

template<int kNThreads_, int kWidth_, bool kSilu, typename input_t_, typename weight_t_>
struct Traits {
    using input_t = input_t_;
    static constexpr int kNThreads = kNThreads_;
    static_assert(kWidth_ <= 4);
    static constexpr int kSmemSize = kNThreads * (sizeof(input_t) > 2 ? 1 : 2);
    using Load = cub::BlockLoad<input_t, kNThreads, 4, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
};

template<typename Ktraits>
__global__ __launch_bounds__(Ktraits::kNThreads)
void kernel(Params params) {
    constexpr int kN = Ktraits::kNThreads;
    extern __shared__ char smem_[];
    __shared__ float other[kN];
    #pragma unroll
    for (int i = 0; i < kN; ++i) { other[i] = i << 1; }
}

template<int kNThreads, typename input_t, typename weight_t>
void launch(Params &params, cudaStream_t stream) {
    BOOL_SWITCH(params.silu, kSilu, [&] {
        static constexpr int kChunk = kSilu ? 64 : 128;
        auto kernel_ = &kernel<Traits<kNThreads, 2, kSilu, input_t, weight_t>>;
        kernel_<<<dim3(1), kNThreads, kChunk, stream>>>(params);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
}

template<typename input_t, typename weight_t>
void f(Params &params, cudaStream_t stream) { launch<128, input_t, weight_t>(params, stream); }

template void f<float, float>(Params &params, cudaStream_t stream);
template void f<at::Half, float>(Params &params,
                                 cudaStream_t stream);   /* kept */ using A = int;
template void f<std::vector<std::vector<int>>, float>(Params &params, cudaStream_t stream);
"""
COMMON = """\
#pragma once
#include "static_switch.h"
#define HD __host__ __device__
#define INLINE_HD HD inline
#define DIV(a, b) (((a) + (b) - 1) / (b))
struct Params { bool silu; void *__restrict__ x = nullptr; };
struct Bwd : public Params { int y; };
enum class Mode : int { A, B = 3 };
union Bits { float f; int i; };
class Later;
template<typename T> struct Ref;
template<> struct Ref<float> { T operator()(T const &x, T const &y) { return x + y; } };
template<int N> struct Allreduce {
    static_assert(N == 32);
    template<typename T, typename Op>
    static __device__ inline T run(T x, Op &op) { return op(x, __shfl_xor_sync(uint32_t(-1), x, N)); }
    static const int kHalf = N / 2;
};
constexpr size_t custom_max(std::initializer_list<size_t> list) { return *std::max_element(list.begin()); }
constexpr float kTable[3] = {1, 2, 3};
inline constexpr int kAnswer = 42;
static const int kLimit = -(1 << 4);
template<typename T> constexpr bool is_half_v = std::is_same_v<T, at::Half>;
template<typename T> using Vec = std::vector<T, std::allocator<T>>;
typedef unsigned long long u64;
typedef struct { int a; } Pair;
inline __device__ float2 operator+(const float2 &a, const float2 &b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ complex_t cexp(complex_t z) { asm volatile("ex2 %0;" : "=f"(z.x)); return z; }
static INLINE_HD int twice(int x) { return 2 * x; }
HD inline int thrice(int x) { auto g = [=] __device__ (int y) mutable { return x; }; return 3 * x; }
namespace a { namespace b::c { void declared(const Params &p, int n = 3); at::Tensor made(int n); } }
template<typename T> struct Holder { Holder(int n); T x, y; };
template<typename T> inline Holder<T>::Holder(int n) : x(n), y{T(n)} { x = y; }
extern template struct Holder<int>;
template<typename T> __device__ auto pick(T x) -> decltype(x.y) { return x.y; }
void nothing();
void stream_it(cudaStream_t);
template <typename T, std::enable_if_t<(sizeof(T) > 2), int> = 0> void g(T) {}
int removed(int x) = delete;
"""
SWITCH = """\
#pragma once
#define BOOL_SWITCH(COND, NAME, ...)   \\
    [&] {                              \\
        if (COND) {                    \\
            constexpr bool NAME = true; \\
            return __VA_ARGS__();      \\
        } else {                       \\
            constexpr bool NAME = false; \\
            return __VA_ARGS__();      \\
        }                              \\
    }()
"""
HEADERS = {"/p/csrc/common.h": COMMON, "/p/include/static_switch.h": SWITCH}
