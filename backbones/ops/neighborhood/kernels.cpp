// Neighbourhood attention on the CPU: operators, instruction-set dispatch and the division of the work. The arithmetic
// is in tiles.h, on the layout of layout.h, in the registers of simd.h.
//
// These headers are compiled once per instruction set into this one library, and the first call picks by what torch and the
// processor report, so a cached build is good on another machine.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Map {  // strides in elements; the dim of a token is contiguous
    void* data;
    int64_t image, row, column, head;
};
struct Axis {
    int64_t length, kernel, dilation;
};
struct Problem {
    int64_t images, heads, dim;
    Axis rows, columns;
    float scale;
    bool bfloat16;
    const float* bias;  // [heads, 2 kh - 1, 2 kw - 1] or null
    int64_t strips;     // per residue group of the rows
    int64_t pack;       // heads side by side in one line
    Map q, k, v, out;
    float* stats;          // [images, H, 2, heads W]: the maximum of each query's scores (in log2) and 1 / sum
    Map dout, dq, dk, dv;  // dk and dv are float32
};

// BAND x PARTS sums fit into the registers of the instruction set, with what they are fed from.
constexpr int64_t BAND = 3;
#define INLINE inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

namespace baseline {
#define REGISTER_BYTES 16
constexpr int64_t PARTS = 4;
#include "tiles.h"
#undef REGISTER_BYTES
#undef NEIGHBORHOOD_SIMD_H
#undef NEIGHBORHOOD_LAYOUT_H
#undef NEIGHBORHOOD_TILES_H
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define REGISTER_BYTES 32
constexpr int64_t PARTS = 4;
#include "tiles.h"
#undef REGISTER_BYTES
#undef NEIGHBORHOOD_SIMD_H
#undef NEIGHBORHOOD_LAYOUT_H
#undef NEIGHBORHOOD_TILES_H
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
#define REGISTER_BYTES 64
constexpr int64_t PARTS = 8;
#include "tiles.h"
#undef REGISTER_BYTES
#undef NEIGHBORHOOD_SIMD_H
#undef NEIGHBORHOOD_LAYOUT_H
#undef NEIGHBORHOOD_TILES_H
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct Kernels {
    int64_t lanes;
    void (*forward)(const Problem&, int64_t, int64_t);
    void (*backward)(const Problem&, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
};

// What torch reports obeys ATEN_CPU_CAPABILITY; the processor's word is asked for too because torch's level says
// nothing of fma.
const Kernels& kernels() {
    static const Kernels chosen = [] {
#if defined(__x86_64__)
        const std::string level = at::get_cpu_capability();
        const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (wide && level.rfind("AVX512", 0) == 0) return Kernels{avx512::LANES, avx512::forward, avx512::backward};
        if (fma && level.rfind("AVX", 0) == 0) return Kernels{avx2::LANES, avx2::forward, avx2::backward};
#endif
        return Kernels{baseline::LANES, baseline::forward, baseline::backward};
    }();
    return chosen;
}

Map map_of(const at::Tensor& t) {
    TORCH_CHECK(t.numel() == 0 || t.size(4) == 1 || t.stride(4) == 1, "the last dimension must be contiguous");
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Problem problem_of(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias,
    at::IntArrayRef kernel, at::IntArrayRef dilation, double scale
) {
    TORCH_CHECK(
        q.dim() == 5 && k.sizes() == q.sizes() && v.sizes() == q.sizes(), "q, k, v must be [B, H, W, heads, dim]"
    );
    TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "q must be float32 or bfloat16");
    TORCH_CHECK(
        k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "k and v must have the dtype of q"
    );
    TORCH_CHECK(
        kernel.size() == 2 && dilation.size() == 2 && kernel[0] <= 15 && kernel[1] <= 15, "kernels up to 15 x 15"
    );
    Problem p{};
    p.images = q.size(0), p.heads = q.size(3), p.dim = q.size(4);
    p.rows = {q.size(1), kernel[0], dilation[0]}, p.columns = {q.size(2), kernel[1], dilation[1]};
    for (const Axis& axis : {p.rows, p.columns})
        TORCH_CHECK(
            axis.kernel % 2 && axis.dilation > 0 && axis.length >= axis.kernel * axis.dilation,
            "the map is smaller than kernel * dilation"
        );
    p.scale = (float)scale, p.bfloat16 = q.scalar_type() == at::kBFloat16;
    p.pack = std::clamp<int64_t>(kernels().lanes / std::max<int64_t>(1, p.columns.length), 1, std::max<int64_t>(1, p.heads));
    p.q = map_of(q), p.k = map_of(k), p.v = map_of(v);
    if (bias) {
        TORCH_CHECK(bias->is_contiguous() && bias->scalar_type() == at::kFloat, "bias must be contiguous float32");
        TORCH_CHECK(
            bias->numel() == p.heads * (2 * kernel[0] - 1) * (2 * kernel[1] - 1),
            "bias must be [heads, 2 kh - 1, 2 kw - 1]"
        );
        p.bias = bias->data_ptr<float>();
    }
    return p;
}

std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias,
    at::IntArrayRef kernel, at::IntArrayRef dilation, double scale
) {
    Problem p = problem_of(q, k, v, bias, kernel, dilation, scale);
    at::Tensor out = at::empty(q.sizes(), q.options());
    at::Tensor stats =
        at::empty({p.images, p.rows.length, 2, p.heads * p.columns.length}, q.options().dtype(at::kFloat));
    p.out = map_of(out), p.stats = stats.data_ptr<float>();
    // Long strips read each key row once; shorter ones are worth their overlap only to give every thread four tasks.
    const int64_t head_groups = (p.heads + p.pack - 1) / p.pack, groups = p.images * head_groups * p.rows.dilation,
                  shortest = p.rows.length / p.rows.dilation;
    const int64_t threads = at::get_num_threads(),
                  wanted = threads == 1 || groups == 0 ? 1 : (4 * threads + groups - 1) / groups;
    p.strips = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, shortest / p.rows.kernel));
    at::parallel_for(0, groups * p.strips, 1, [&](int64_t begin, int64_t end) { kernels().forward(p, begin, end); });
    return {out, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& bias, const at::Tensor& stats, at::IntArrayRef kernel, at::IntArrayRef dilation,
    double scale
) {
    Problem p = problem_of(q, k, v, bias, kernel, dilation, scale);
    TORCH_CHECK(
        dout.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type(),
        "the gradient must have the shape and dtype of q"
    );
    const auto wide = q.options().dtype(at::kFloat);
    at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(q.sizes(), wide), dv = at::empty(q.sizes(), wide);
    p.stats = stats.data_ptr<float>();
    p.dout = map_of(dout), p.dq = map_of(dq), p.dk = map_of(dk), p.dv = map_of(dv);
    // Strips s and s + 2 share no key row when a strip has at least kh - 1 rows: even strips first, then odd ones.
    // Their number depends on the shapes alone, and so does the order of every sum: enough for 64 tasks, but none so short
    // that the kh - 1 rows of keys which it reads beyond its own cost more than a third.
    const int64_t least = 3 * kernel[0], shortest = p.rows.length / p.rows.dilation;
    const int64_t head_groups = (p.heads + p.pack - 1) / p.pack;
    const int64_t groups = std::max<int64_t>(1, p.images * head_groups * p.rows.dilation);
    p.strips = std::clamp<int64_t>((64 + groups - 1) / groups, 1, std::max<int64_t>(1, shortest / least));
    const int64_t tasks = p.images * p.rows.dilation * ((p.strips + 1) / 2);
    const int64_t slots =
        std::clamp<int64_t>(head_groups ? (64 + head_groups - 1) / head_groups : 1, 1, std::max<int64_t>(tasks, 1));
    at::Tensor partial =
        bias ? at::zeros({p.heads, slots, 2 * kernel[0] - 1, 2 * kernel[1] - 1}, wide) : at::empty({0}, wide);
    float* sums = bias ? partial.data_ptr<float>() : nullptr;
    const int64_t colours = std::min<int64_t>(2, p.strips), step = at::get_num_threads() == 1 ? colours : 1;
    for (int64_t colour = 0; colour < colours; colour += step)
        at::parallel_for(0, head_groups * slots, 1, [&](int64_t begin, int64_t end) {
            kernels().backward(p, colour, colour + step, slots, begin, end, sums);
        });
    at::Tensor dbias = !bias ? partial : slots == 1 ? partial.squeeze(1) : partial.sum(1);
    return {dq, dk.to(q.scalar_type()), dv.to(q.scalar_type()), dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(backbones, m) {
    m.def(
        "neighborhood_cpu(Tensor q, Tensor k, Tensor v, Tensor? bias, int[2] kernel, int[2] dilation, float scale) -> "
        "(Tensor, Tensor)"
    );
    m.def(
        "neighborhood_cpu_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor stats, int[2] "
        "kernel, int[2] dilation, "
        "float scale) -> (Tensor, Tensor, Tensor, Tensor)"
    );
}

TORCH_LIBRARY_IMPL(backbones, CPU, m) {
    m.impl("neighborhood_cpu", &forward);
    m.impl("neighborhood_cpu_backward", &backward);
}
