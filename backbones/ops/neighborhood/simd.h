// The registers of one instruction set: vectors of REGISTER_BYTES, what is done with them lane by lane, the power of two of the
// softmax, float32 and bfloat16 numbers into and out of them, the transpose, and the choice of lanes by a mask or an index.
//
// kernels.cpp includes the three headers once per instruction set, inside a namespace, and undefines their guards in between.

#ifndef NEIGHBORHOOD_SIMD_H
#define NEIGHBORHOOD_SIMD_H

constexpr int64_t LANES = REGISTER_BYTES / 4;

// The compiler's own vector type of the very size of a register, so that nothing is left for it to lower.
typedef float lanes __attribute__((vector_size(REGISTER_BYTES)));
typedef float loose __attribute__((vector_size(REGISTER_BYTES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(REGISTER_BYTES)));

INLINE lanes load(const float* p) { return *(const loose*)p; }
INLINE void store(float* p, const lanes& x) { *(loose*)p = x; }
INLINE lanes splat(float x) { return x - lanes{}; }
// x in a register: left alone, the compiler would repeat the load in every instruction that uses it.
INLINE lanes once(lanes x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
}

// 2^x for x <= 0 to 2e-7 relative, never below 2^-126. NaN stays NaN.
INLINE lanes power_of_two(const lanes& x) {
    const lanes low = splat(-126.f), magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const lanes clipped = low > x ? low : x, shifted = clipped + magic;
    const lanes f = clipped - (shifted - magic);  // in [-0.5, 0.5]
    lanes y = splat(0.0013264727f);               // the polynomial of least relative error that is 1 at 0
    y = y * f + 0.009671513f;
    y = y * f + 0.055507336f;
    y = y * f + 0.24022242f;
    y = y * f + 0.693147f;
    y = y * f + 1.f;
    return y * (lanes)(((bits)shifted << 23) + (127 << 23));
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {  // bfloat16
    uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, uint16_t& y) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` <= LANES numbers of either type as floats and back.
template <typename T>
INLINE lanes load_as_float(const T* p, int64_t count) {
    if (std::is_same<T, float>::value && count == LANES) return load((const float*)p);
    float lane[LANES] = {};
    for (int64_t i = 0; i < count; i++) lane[i] = to_float(p[i]);
    return load(lane);
}
template <typename T>
INLINE void store_from_float(T* p, const lanes& x, int64_t count) {
    if (std::is_same<T, float>::value && count == LANES) return store((float*)p, x);
    float lane[LANES];
    store(lane, x);
    for (int64_t i = 0; i < count; i++) from_float(lane[i], p[i]);
}

// One round of a transpose: a and b exchange the lanes whose index differs in bit STEP.
template <int STEP>
INLINE void exchange(lanes& a, lanes& b) {
#define UPPER(l) ((l) & STEP ? (int)LANES + (l) - STEP : (l))
#define LOWER(l) ((l) & STEP ? (int)LANES + (l) : (l) + STEP)
#if REGISTER_BYTES == 64
#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif REGISTER_BYTES == 32
#define EACH(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define EACH(f) f(0), f(1), f(2), f(3)
#endif
    lanes upper = __builtin_shufflevector(a, b, EACH(UPPER));
    b = __builtin_shufflevector(a, b, EACH(LOWER));
    a = upper;
#undef UPPER
#undef LOWER
#undef EACH
}

template <int STEP>
INLINE void exchange_all(lanes* r) {
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) exchange<STEP>(r[i], r[i | STEP]);
}

INLINE void transpose(lanes* r) {
    if constexpr (LANES > 8) exchange_all<8>(r);
    if constexpr (LANES > 4) exchange_all<4>(r);
    exchange_all<2>(r);
    exchange_all<1>(r);
}

// Where `mask` (as many bits, or vectors) says so the numbers at p + more, else those at p.
#if REGISTER_BYTES == 64
constexpr bool PICKS = true;
typedef __mmask16 choice;
INLINE choice choice_of(const int32_t* mask) { return _mm512_movepi32_mask(_mm512_loadu_si512(mask)); }
INLINE lanes load_either(const float* p, int64_t more, const choice& mask) {
    return (lanes)_mm512_mask_loadu_ps((__m512)load(p), mask, p + more);
}
INLINE lanes pick(const lanes& a, const lanes& b, const int32_t* index) {
    return (lanes)_mm512_permutex2var_ps((__m512)a, _mm512_loadu_si512(index), (__m512)b);
}
#else
constexpr bool PICKS = false;
typedef bits choice;
INLINE choice choice_of(const int32_t* mask) {
    choice x;
    std::memcpy(&x, mask, sizeof(x));
    return x;
}
INLINE lanes load_either(const float* p, int64_t more, const choice& mask) { return mask < 0 ? load(p + more) : load(p); }
INLINE lanes pick(const lanes& a, const lanes&, const int32_t*) { return a; }  // nothing is NEAR
#endif

#endif  // NEIGHBORHOOD_SIMD_H
