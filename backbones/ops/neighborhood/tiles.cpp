// Neighbourhood attention over one strip of query rows. kernels.cpp includes this file once per instruction set, inside
// a namespace.
//
// The lanes of a vector are neighbouring columns of the map. A row of tokens is kept as a line: its transpose,
// [dim][columns], with zeros before and after. The scores of LANES queries with the keys `s` positions to their right, in
// one row of keys, are then
//
//     S[s] = bias[s] + sum_d Q[d] * (K[d] read s * dilation columns further on)
//
// for every lane at once: no sum over lanes, and a softmax that needs none either. Inside the map a query sees the kw
// planes s = -kw/2 .. kw/2. At the borders windows slide inwards, and a block of LANES columns sees up to 2 kw - 1 planes;
// but a window of kw neighbours has one plane of each class modulo kw, so kw vectors always do, and in the first classes
// of such a block some lanes read at s and the others at s + kw. A dilation of the columns is another reading distance; a
// dilation of the rows makes residue groups, each with its own strips. Where the map is narrower than half a vector,
// several heads lie side by side in a line.
//
// Work goes by bands of BAND query rows. A row of keys is read once for all rows of the band, which is what feeds the
// arithmetic:
//
//     scores   BAND x PARTS accumulators: per d one load of K for each class, one of Q for each row
//     weigh    O[d] += sum_s P[s] * (V[d] read s * dilation further on), with BAND x PARTS weights in registers
//
// Scattered tokens, bfloat16 and head dims that are no multiple of LANES cost one copy and meet the same loops. Scores
// are in units of log2, so that the softmax is a power of two.
//
// The backward recomputes the probabilities P from the saved maximum and 1 / sum of each query and needs
//
//     dP = dO V^T    dS = P (dP - sum P dP)    dQ = dS K    dK = dS^T Q    dV = P^T dO    dbias = sum dS
//
// dP is `scores` again, the others are `weigh`: dK and dV gather, for LANES columns of keys, from the queries that see
// them, which lie at -s * dilation; for that P and dS of a band are also kept as lines, one per plane. Lines of dK and dV
// go to memory when the band has passed them. Strips of one colour (kernels.cpp) share no key row, so these additions need no lock
// and always happen in the same order.

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

// 2^x for x <= 0 to 2e-7 relative, 0 below the normal range. NaN stays NaN.
INLINE lanes power_of_two(const lanes& x) {
    const lanes low = splat(-126.f), magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    lanes clipped = x < low ? low : x;
    lanes shifted = clipped + magic;
    lanes f = clipped - (shifted - magic);     // in [-0.5, 0.5]
    lanes y = splat(1.5403530393381609e-4f);   // Taylor terms ln(2)^i / i!
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910072e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.f;
    y *= (lanes)(((bits)shifted - (bits)magic + 127) << 23);
    return x < low ? lanes{} : y;
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

// A residue group of the rows: its position p is row residue + p * dilation.
struct Group {
    int64_t residue, size, kernel, dilation;
    Group(const Axis& axis, int64_t residue)
        : residue(residue),
          size((axis.length - residue + axis.dilation - 1) / axis.dilation),
          kernel(axis.kernel),
          dilation(axis.dilation) {}
    int64_t index(int64_t p) const { return residue + p * dilation; }
    int64_t start(int64_t p) const { return std::min(std::max<int64_t>(p - kernel / 2, 0), size - kernel); }
};

// LANES columns. As queries they see the planes first <= s < first + kw + twice: class c is plane first + c, and for
// c < twice in some lanes first + c + kw. As keys they are seen in the planes key_first <= s < key_first + key_planes.
struct Block {
    int64_t first, twice, key_first, key_planes;
    int64_t table;  // number of its tables of masks and biases: blocks in the interior of the map share theirs
};

// What one call's columns look like, and the scratch of one thread.
struct Scratch {
    int64_t kh, kw, dilation, width, dim, padded, blocks, stride, line, ring, classes, planes, head, tables;
    std::vector<Block> block;
    std::vector<int32_t> second;  // of each table [kw][LANES]: -1 where a lane takes the second plane of a class, else 0
    std::unique_ptr<float[]> memory;
    float *next, *zeros, *q, *k, *v, *weights, *tile, *bias, *dout, *dscores, *dk, *dv, *dbias, *weight_lines, *dscore_lines;

    Scratch(const Problem& p, bool backward)
        : kh(p.rows.kernel),
          kw(p.columns.kernel),
          dilation(p.columns.dilation),
          width(p.columns.length),
          dim(p.dim),
          padded((p.dim + LANES - 1) / LANES * LANES),
          blocks((width * p.pack + LANES - 1) / LANES),
          ring(kh + BAND - 1),
          classes(BAND * ring * kw * LANES),
          head(-1),
          tables(0) {
        cut(p.pack);
        const int64_t pad = ((kw - 1) * dilation + LANES - 1) / LANES;  // blocks; one pad serves the line before and after
        stride = ((blocks + pad) | 1) * LANES;  // an odd number of blocks, so that the lines fall into different cache sets
        line = padded * stride, planes = BAND * ring * (2 * kw - 1) * stride;
        const int64_t nothing = std::max(padded, LANES), table = tables * (2 * kh - 1) * kw * LANES;
        const int64_t forward = nothing + BAND * padded * LANES + table + pad * LANES + (BAND + 2 * ring) * line + classes;
        const int64_t more = backward ? (BAND + 2 * ring) * line + classes + table + 2 * planes : 0;
        memory.reset(new float[forward + more + 16 + 2 * dilation]);  // in_classes may look, in vain, two planes too far
        next = (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        zeros = take(nothing), tile = take(BAND * padded * LANES), bias = take(table), weights = take(classes);
        if (backward) dscores = take(classes), dbias = take(table);
        float* before = take(pad * LANES);
        q = take(BAND * line), k = take(ring * line), v = take(ring * line);
        if (backward) dout = take(BAND * line), dk = take(ring * line), dv = take(ring * line);
        std::memset(zeros, 0, nothing * sizeof(float));
        std::memset(before, 0, pad * LANES * sizeof(float));
        for (float* row = q; row < next; row += stride)
            std::memset(row + blocks * LANES, 0, (stride - blocks * LANES) * sizeof(float));
        if (!backward) return;
        weight_lines = take(planes), dscore_lines = take(planes);
        std::memset(weight_lines, 0, 2 * planes * sizeof(float));  // planes that a block does not see stay 0
        std::memset(dbias, 0, table * sizeof(float));
    }
    float* take(int64_t count) { return (next += count) - count; }

    // Finds the planes and masks of every block.
    void cut(int64_t pack) {
        struct Span {
            int64_t low = INT64_MAX, high = INT64_MIN;
            void add(int64_t s) { low = std::min(low, s), high = std::max(high, s); }
        };
        std::vector<Span> queries(blocks), keys(blocks);
        std::vector<int64_t> low(blocks * LANES, INT64_MIN);  // lowest plane of each lane
        for (int64_t i = 0; i < width * pack; i++) {
            const int64_t x = i % width, p = x / dilation, size = (width - x % dilation + dilation - 1) / dilation;
            low[i] = std::min(std::max<int64_t>(p - kw / 2, 0), size - kw) - p;
            for (int64_t s = low[i]; s < low[i] + kw; s++) {
                queries[i / LANES].add(s);
                keys[(i + s * dilation) / LANES].add(s);
            }
        }
        int64_t interior = -1;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = queries[b].low, twice = queries[b].high - first + 1 - kw;
            const int64_t key_planes = std::max<int64_t>(0, keys[b].high - keys[b].low + 1);
            const bool inside = twice == 0 && first == -(kw / 2) && (b + 1) * LANES <= width;
            block.push_back({first, twice, keys[b].low, key_planes, inside && interior >= 0 ? interior : tables});
            if (block[b].table < tables) continue;
            if (inside) interior = tables;
            tables++;
            for (int64_t c = 0; c < kw; c++)
                for (int64_t i = b * LANES; i < (b + 1) * LANES; i++) second.push_back(low[i] > first + c ? -1 : 0);
        }
    }

    // f(b, segment, table) for one block b of each table: segment is the number of each lane's head in the line.
    template <typename F>
    void each_table(const F& f) const {
        for (int64_t b = 0, table = 0; b < blocks; b++) {
            if (block[b].table < table) continue;
            bits segment;
            for (int64_t i = 0; i < LANES; i++) segment[i] = (int32_t)((b * LANES + i) / width);
            f(block[b], segment, table++);
        }
    }

    // Biases of `heads` heads from `first` on, in units of log2: of each table [2 kh - 1][kw][LANES].
    void lay_out_bias(const Problem& p, int64_t first, int64_t heads) {
        if (head == first) return;
        head = first;
        float* out = bias;
        each_table([&](const Block& at, const bits& segment, int64_t table) {
            for (int64_t r = 0; r < 2 * kh - 1; r++)
                for (int64_t c = 0; c < kw; c++, out += LANES) {
                    lanes entry = {};
                    for (int64_t i = 0; p.bias && i < heads; i++) {
                        const float* from = p.bias + ((first + i) * (2 * kh - 1) + r) * (2 * kw - 1) + at.first + c + kw - 1;
                        lanes value = splat(from[0] * 1.4426950408889634f);
                        if (c < at.twice)
                            value = mask(table, c) < 0 ? splat(from[kw] * 1.4426950408889634f) : value;
                        if (heads == 1)
                            entry = value;
                        else
                            entry = segment == (int32_t)i ? value : entry;
                    }
                    store(out, entry);
                }
        });
    }

    // Adds the sums of dS to dbias, [heads, slots, 2 kh - 1, 2 kw - 1] at this slot of head `first`, and clears them.
    void add_dbias(float* out, int64_t slots, int64_t heads) {
        float* sum = dbias;
        each_table([&](const Block& at, const bits& segment, int64_t table) {
            for (int64_t r = 0; r < 2 * kh - 1; r++)
                for (int64_t c = 0; c < kw; c++)
                    for (int64_t i = 0; i < LANES; i++, sum++) {
                        const int64_t s = at.first + c - kw * second[(table * kw + c) * LANES + i];
                        if (heads == 1 || segment[i] < heads)
                            out[((heads == 1 ? 0 : segment[i]) * slots * (2 * kh - 1) + r) * (2 * kw - 1) + s + kw - 1] += *sum;
                        *sum = 0.f;
                    }
        });
    }
    bits mask(int64_t table, int64_t c) const {
        bits x;
        std::memcpy(&x, second.data() + (table * kw + c) * LANES, sizeof(x));
        return x;
    }
};

// The tokens of one row of the map, for up to LANES lanes from `lane` on; lanes beyond the map get `nothing`.
template <typename T>
struct Tokens {
    T* at[LANES];
    int64_t count;
    Tokens(const Scratch& s, const Map& map, int64_t image, int64_t head, int64_t heads, int64_t row, int64_t lane, T* nothing)
        : count(std::clamp<int64_t>(s.width * heads - lane, 0, LANES)) {
        T* first = (T*)map.data + image * map.image + head * map.head + row * map.row;
        for (int64_t i = 0; i < LANES; i++) {
            const int64_t segment = heads == 1 ? 0 : (lane + i) / s.width, x = lane + i - segment * s.width;
            at[i] = i < count ? first + x * map.column + segment * map.head : nothing;
        }
    }
};

// A row of the map as a line, times `factor`.
template <typename T>
void load_line(
    const Scratch& s, const Map& map, int64_t image, int64_t head, int64_t heads, int64_t row, float factor, float* line
) {
    for (int64_t b = 0; b < s.blocks; b++, line += LANES) {
        const Tokens<const T> tokens(s, map, image, head, heads, row, b * LANES, (const T*)s.zeros);
        for (int64_t d = 0; d < s.dim; d += LANES) {
            lanes r[LANES];
            if (d + LANES <= s.dim)
                UNROLLED for (int64_t i = 0; i < LANES; i++) r[i] = load_as_float(tokens.at[i] + d, LANES) * factor;
            else
                for (int64_t i = 0; i < LANES; i++) r[i] = load_as_float(tokens.at[i] + d, s.dim - d) * factor;
            transpose(r);
            UNROLLED for (int64_t i = 0; i < LANES; i++) store(line + (d + i) * s.stride, r[i]);
        }
    }
}

// The other way for one block: rows of LANES numbers, `stride` apart, times `factor`; stored or added.
template <typename T>
void store_block(const Scratch& s, const float* rows, int64_t stride, const lanes& factor, const Tokens<T>& tokens, bool add) {
    for (int64_t d = 0; d < s.dim; d += LANES) {
        lanes r[LANES];
        const int64_t count = std::min(LANES, s.dim - d);
        UNROLLED for (int64_t i = 0; i < LANES; i++) r[i] = load(rows + (d + i) * stride) * factor;
        transpose(r);
        if (!add && count == LANES && tokens.count == LANES) {
            UNROLLED for (int64_t i = 0; i < LANES; i++) store_from_float(tokens.at[i] + d, r[i], LANES);
            continue;
        }
        for (int64_t i = 0; i < tokens.count; i++)
            store_from_float(tokens.at[i] + d, add ? r[i] + load_as_float(tokens.at[i] + d, count) : r[i], count);
    }
}

// Asks for a row's tokens that are needed one band later: they lie far apart, where the processor does not look by itself.
template <typename T>
void prefetch(const Scratch& s, const Map& map, int64_t image, int64_t head, int64_t heads, int64_t row, int64_t block) {
    const Tokens<const T> tokens(s, map, image, head, heads, row, block * LANES, nullptr);
    for (int64_t i = 0; i < tokens.count; i++)
        for (int64_t d = 0; d < s.dim; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(tokens.at[i] + d, 0, 2);
}

// Where `mask` (as many bits, or vectors) says so the numbers at p + more, else those at p.
#if REGISTER_BYTES == 64
typedef __mmask16 choice;
INLINE choice choice_of(const int32_t* mask) { return _mm512_movepi32_mask(_mm512_loadu_si512(mask)); }
INLINE lanes load_either(const float* p, int64_t more, const choice& mask) {
    return (lanes)_mm512_mask_loadu_ps((__m512)load(p), mask, p + more);
}
#else
typedef bits choice;
INLINE choice choice_of(const int32_t* mask) {
    choice x;
    std::memcpy(&x, mask, sizeof(x));
    return x;
}
INLINE lanes load_either(const float* p, int64_t more, const choice& mask) { return mask < 0 ? load(p + more) : load(p); }
#endif

// out[r][p] = init[r][p] + sum over d of q[r][d] * x[d] read p * step further on, for R rows and P classes; no init is 0.
// TWICE: where `second` says so, another `more` further on.
template <int R, int P, bool TWICE>
void scores(
    const float* q, int64_t q_row, const float* x, int64_t step, int64_t more, const int32_t* second, int64_t dim,
    int64_t stride, const float* init, int64_t init_row, float* out, int64_t out_row
) {
    lanes sum[R][P];
    choice mask[P];
    for (int p = 0; p < P; p++) {
        if (TWICE) mask[p] = choice_of(second + p * LANES);
        for (int r = 0; r < R; r++) sum[r][p] = init ? load(init + r * init_row + p * LANES) : lanes{};
    }
    for (int64_t d = 0; d < dim; d++, q += stride, x += stride) {
        lanes factor[R];
        for (int r = 0; r < R; r++) factor[r] = load(q + r * q_row);
        for (int p = 0; p < P; p++) {
            const lanes key = once(TWICE ? load_either(x + p * step, more, mask[p]) : load(x + p * step));
            for (int r = 0; r < R; r++) sum[r][p] += factor[r] * key;
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(out + r * out_row + p * LANES, sum[r][p]);
}

// out[r][d] += sum over classes of w[r][p] * x[d] read p * step further on, for R rows and P classes; TWICE as above.
template <int R, int P, bool TWICE>
void weigh(
    const float* w, int64_t w_row, int64_t w_class, const float* x, int64_t step, int64_t more, const int32_t* second,
    int64_t dim, int64_t stride, float* const* out, int64_t out_stride
) {
    lanes weight[R][P];
    choice mask[P];
    float* row[R];
    for (int r = 0; r < R; r++) row[r] = out[r];
    for (int p = 0; p < P; p++) {
        if (TWICE) mask[p] = choice_of(second + p * LANES);
        for (int r = 0; r < R; r++) weight[r][p] = load(w + r * w_row + p * w_class);
    }
    for (int64_t d = 0; d < dim; d++, x += stride) {
        lanes sum[R];
        for (int r = 0; r < R; r++) sum[r] = load(row[r] + d * out_stride);
        for (int p = 0; p < P; p++) {
            const lanes value = once(TWICE ? load_either(x + p * step, more, mask[p]) : load(x + p * step));
            for (int r = 0; r < R; r++) sum[r] += weight[r][p] * value;
        }
        for (int r = 0; r < R; r++) store(row[r] + d * out_stride, sum[r]);
    }
}

// f<R, P, twice>(...) for R <= BAND and P <= PARTS known at run time.
#define CLASSES_OF(f, R, P, twice, ...)                                            \
    switch (P) {                                                                   \
        case 1: f<R, 1, twice>(__VA_ARGS__); break;                                \
        case 2: f<R, 2, twice>(__VA_ARGS__); break;                                \
        case 3: f<R, 3, twice>(__VA_ARGS__); break;                                \
        case 4: f<R, 4, twice>(__VA_ARGS__); break;                                \
        case 5: if constexpr (PARTS >= 5) f<R, 5, twice>(__VA_ARGS__); break;      \
        case 6: if constexpr (PARTS >= 6) f<R, 6, twice>(__VA_ARGS__); break;      \
        case 7: if constexpr (PARTS >= 7) f<R, 7, twice>(__VA_ARGS__); break;      \
        case 8: if constexpr (PARTS >= 8) f<R, 8, twice>(__VA_ARGS__); break;      \
    }
#define DISPATCH(f, rows, P, twice, ...)                                           \
    switch (rows) {                                                                \
        case 1: CLASSES_OF(f, 1, P, twice, __VA_ARGS__) break;                     \
        case 2: CLASSES_OF(f, 2, P, twice, __VA_ARGS__) break;                     \
        case 3: CLASSES_OF(f, 3, P, twice, __VA_ARGS__) break;                     \
    }

// first <= c < last in equal parts of at most PARTS: f(c, count).
template <typename F>
INLINE void in_parts(int64_t first, int64_t last, const F& f) {
    const int64_t count = last - first, parts = (count + PARTS - 1) / PARTS;
    for (int64_t i = 0; i < parts; i++) f(first + count * i / parts, count * (i + 1) / parts - count * i / parts);
}

// The classes of a block: those with two planes, f(std::true_type, c, count), then the others, f(std::false_type, ...). One
// or two others are not worth a part of their own.
template <typename F>
INLINE void in_classes(const Scratch& s, const Block& block, const F& f) {
    const int64_t twice = block.twice + 2 < s.kw || block.twice == 0 ? block.twice : s.kw;
    in_parts(0, twice, [&](int64_t c, int64_t count) { f(std::true_type(), c, count); });
    in_parts(twice, s.kw, [&](int64_t c, int64_t count) { f(std::false_type(), c, count); });
}

// BAND or fewer query rows y .. y + count - 1 of a group, and the key rows they see: base <= i < end.
struct Band {
    int64_t y, count, base, end, start[BAND];
    Band(const Group& rows, int64_t y, int64_t y1) : y(y), count(std::min(BAND, y1 - y)) {
        for (int64_t r = 0; r < count; r++) start[r] = rows.start(y + r);
        base = start[0], end = start[count - 1] + rows.kernel;
    }
    // Queries first <= r < last see key row i.
    void seeing(int64_t i, int64_t kernel, int64_t* first, int64_t* last) const {
        for (*first = 0; start[*first] + kernel <= i;) ++*first;
        for (*last = count; start[*last - 1] > i;) --*last;
    }
};

// out[r][key row - base][class]: the products of the block's rows of q with those of the ring x; with `bias` they start
// from it. q and x are at the block's first lane.
inline void score(const Scratch& s, const Band& band, const Block& block, const float* q, const float* x, bool bias, float* out) {
    for (int64_t i = band.base; i < band.end; i++) {
        int64_t r, last;
        band.seeing(i, s.kh, &r, &last);
        const float* row = x + i % s.ring * s.line + block.first * s.dilation;
        const float* table = s.bias + (block.table * (2 * s.kh - 1) + i - band.y - r + s.kh - 1) * s.kw * LANES;
        const int32_t* second = s.second.data() + block.table * s.kw * LANES;
        float* to = out + (r * s.ring + i - band.base) * s.kw * LANES;
        in_classes(s, block, [&](auto twice, int64_t c, int64_t count) {
            DISPATCH(
                scores, last - r, count, decltype(twice)::value, q + r * s.line, s.line, row + c * s.dilation, s.dilation,
                s.kw * s.dilation, second + c * LANES, s.dim, s.stride, bias ? table + c * LANES : nullptr, -s.kw * LANES,
                to + c * LANES, s.ring * s.kw * LANES
            )
        });
    }
}

// The tile [r][d][LANES] = sum over the keys of w[r][key row - base][class] times the ring x.
inline void weigh_keys(const Scratch& s, const Band& band, const Block& block, const float* w, const float* x, float* tile) {
    std::memset(tile, 0, band.count * s.padded * LANES * sizeof(float));
    for (int64_t i = band.base; i < band.end; i++) {
        int64_t r, last;
        band.seeing(i, s.kh, &r, &last);
        const float* row = x + i % s.ring * s.line + block.first * s.dilation;
        const int32_t* second = s.second.data() + block.table * s.kw * LANES;
        const float* from = w + (r * s.ring + i - band.base) * s.kw * LANES;
        float* out[BAND];
        for (int64_t j = 0; j < BAND; j++) out[j] = tile + (r + j) * s.padded * LANES;
        in_classes(s, block, [&](auto twice, int64_t c, int64_t count) {
            DISPATCH(
                weigh, last - r, count, decltype(twice)::value, from + c * LANES, s.ring * s.kw * LANES, LANES,
                row + c * s.dilation, s.dilation, s.kw * s.dilation, second + c * LANES, s.dim, s.stride, out, LANES
            )
        });
    }
}

// Adds to the block's lanes of the ring `out` the sum over the band's queries of the lines w[r][key row - base][plane] times
// x[r].
inline void weigh_queries(const Scratch& s, const Band& band, const Block& block, const float* w, const float* x, float* out) {
    const int64_t row = (2 * s.kw - 1) * s.stride;
    for (int64_t u = 0; u < band.end - band.base; u += BAND)
        for (int64_t r = 0; r < band.count; r++) {
            const int64_t first = std::max(u, band.start[r] - band.base);
            const int64_t last = std::min(u + BAND, band.start[r] - band.base + s.kh);
            if (first >= last) continue;
            float* rows[BAND];
            for (int64_t j = 0; j < BAND; j++) rows[j] = out + (band.base + first + j) % s.ring * s.line;
            const float* from = w + (r * s.ring + first) * row + (s.kw - 1) * s.stride;
            in_parts(block.key_first, block.key_first + block.key_planes, [&](int64_t plane, int64_t count) {
                DISPATCH(
                    weigh, last - first, count, false, from + plane * (s.stride - s.dilation), row, s.stride - s.dilation,
                    x + r * s.line - plane * s.dilation, -s.dilation, 0, nullptr, s.dim, s.stride, rows, s.stride
                )
            });
        }
}

// The classes of one row of keys as lines, one per plane; `out` is at the line of plane 0 and the block's first lane.
inline void spread(const Scratch& s, const Block& block, const float* classes, float* out) {
    for (int64_t c = 0; c < s.kw; c++) {
        const lanes x = load(classes + c * LANES);
        float* to = out + (block.first + c) * s.stride;
        if (c >= block.twice) {
            store(to, x);
            continue;
        }
        const bits second = s.mask(block.table, c);
        store(to, second < 0 ? lanes{} : x);
        store(to + s.kw * s.stride, second < 0 ? x : lanes{});
    }
}

// The maximum and 1 / sum of every query of a row: [images, heads, H, 2, W].
struct Stats {
    float* lane[LANES];  // the maximum of each lane, the other number is `width` further on
    Stats(const Problem& p, const Scratch& s, int64_t image, int64_t head, int64_t row, int64_t first, int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t segment = (first + i) / s.width, x = (first + i) % s.width;
            lane[i] = p.stats + (((image * p.heads + head + segment) * p.rows.length + row) * 2) * s.width + x;
        }
    }
};

template <typename T>
void forward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, int64_t heads, const Group& rows, int64_t y0, int64_t y1
) {
    s.lay_out_bias(p, head, heads);
    int64_t loaded = rows.start(y0);
    for (int64_t y = y0; y < y1; y += BAND) {
        const Band band(rows, y, y1);
        for (; loaded < band.end; loaded++) {
            const int64_t slot = loaded % s.ring * s.line, row = rows.index(loaded);
            load_line<T>(s, p.k, image, head, heads, row, 1.f, s.k + slot);
            load_line<T>(s, p.v, image, head, heads, row, 1.f, s.v + slot);
        }
        for (int64_t r = 0; r < band.count; r++)
            load_line<T>(s, p.q, image, head, heads, rows.index(y + r), p.scale * 1.4426950408889634f, s.q + r * s.line);
        for (int64_t b = 0; b < s.blocks; b++) {
            for (int64_t r = 0; r < BAND; r++) {
                if (loaded + r < rows.size) {
                    prefetch<T>(s, p.k, image, head, heads, rows.index(loaded + r), b);
                    prefetch<T>(s, p.v, image, head, heads, rows.index(loaded + r), b);
                }
                if (y + BAND + r < y1) prefetch<T>(s, p.q, image, head, heads, rows.index(y + BAND + r), b);
            }
            const Block& block = s.block[b];
            score(s, band, block, s.q + b * LANES, s.k + b * LANES, true, s.weights);
            lanes inverse[BAND];
            for (int64_t r = 0; r < band.count; r++) {
                float* row = s.weights + (r * s.ring + band.start[r] - band.base) * s.kw * LANES;
                const int64_t count = s.kh * s.kw * LANES;
                lanes high = load(row), other = high, total = {};  // two, so that no comparison waits for the last one
                for (int64_t i = LANES; i < count; i += LANES) {
                    const lanes x = load(row + i), more = x > other ? x : other;
                    other = high, high = more;
                }
                high = other > high ? other : high;
                for (int64_t i = 0; i < count; i += LANES) {
                    const lanes e = power_of_two(load(row + i) - high);
                    store(row + i, e);
                    total += e;
                }
                inverse[r] = 1.f / total;
                const Tokens<T> out(s, p.out, image, head, heads, rows.index(y + r), b * LANES, nullptr);
                const Stats stats(p, s, image, head, rows.index(y + r), b * LANES, out.count);
                for (int64_t i = 0; i < out.count; i++) stats.lane[i][0] = high[i], stats.lane[i][s.width] = inverse[r][i];
            }
            weigh_keys(s, band, block, s.weights, s.v + b * LANES, s.tile);
            for (int64_t r = 0; r < band.count; r++)
                store_block<T>(
                    s, s.tile + r * s.padded * LANES, LANES, inverse[r],
                    Tokens<T>(s, p.out, image, head, heads, rows.index(y + r), b * LANES, nullptr), false
                );
        }
    }
}

// Puts a row of the dK and dV rings into memory: added if the strip of the other colour has been there.
inline void retire(
    const Problem& p, const Scratch& s, int64_t image, int64_t head, int64_t heads, int64_t row, int64_t slot, bool add
) {
    for (int64_t b = 0; b < s.blocks; b++) {
        const Tokens<float> dk(s, p.dk, image, head, heads, row, b * LANES, nullptr);
        const Tokens<float> dv(s, p.dv, image, head, heads, row, b * LANES, nullptr);
        const float log2 = 0.6931471805599453f;  // q carries log2(e)
        store_block(s, s.dk + slot * s.line + b * LANES, s.stride, splat(log2), dk, add);
        store_block(s, s.dv + slot * s.line + b * LANES, s.stride, splat(1.f), dv, add);
    }
}

// Key rows below `before` and from `after` on have been written by strips of the other colour. s.dbias is added to.
template <typename T>
void backward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, int64_t heads, const Group& rows, int64_t y0, int64_t y1,
    int64_t before, int64_t after
) {
    s.lay_out_bias(p, head, heads);
    int64_t loaded = rows.start(y0), oldest = loaded;
    const auto pass = [&](int64_t end) {
        for (; oldest < end; oldest++)
            retire(p, s, image, head, heads, rows.index(oldest), oldest % s.ring, oldest < before || oldest >= after);
    };
    for (int64_t y = y0; y < y1; y += BAND) {
        const Band band(rows, y, y1);
        pass(band.base);
        for (; loaded < band.end; loaded++) {
            const int64_t slot = loaded % s.ring * s.line, row = rows.index(loaded);
            load_line<T>(s, p.k, image, head, heads, row, 1.f, s.k + slot);
            load_line<T>(s, p.v, image, head, heads, row, 1.f, s.v + slot);
            for (int64_t d = 0; d < s.dim; d++) {
                std::memset(s.dk + slot + d * s.stride, 0, s.blocks * LANES * sizeof(float));
                std::memset(s.dv + slot + d * s.stride, 0, s.blocks * LANES * sizeof(float));
            }
        }
        for (int64_t r = 0; r < band.count; r++) {
            const int64_t row = rows.index(y + r);
            load_line<T>(s, p.q, image, head, heads, row, p.scale * 1.4426950408889634f, s.q + r * s.line);
            load_line<T>(s, p.dout, image, head, heads, row, 1.f, s.dout + r * s.line);
        }
        for (int64_t b = 0; b < s.blocks; b++) {
            for (int64_t r = 0; r < BAND; r++) {
                if (loaded + r < rows.size) {
                    prefetch<T>(s, p.k, image, head, heads, rows.index(loaded + r), b);
                    prefetch<T>(s, p.v, image, head, heads, rows.index(loaded + r), b);
                }
                if (y + BAND + r < y1) {
                    prefetch<T>(s, p.q, image, head, heads, rows.index(y + BAND + r), b);
                    prefetch<T>(s, p.dout, image, head, heads, rows.index(y + BAND + r), b);
                }
            }
            const Block& block = s.block[b];
            score(s, band, block, s.q + b * LANES, s.k + b * LANES, true, s.weights);
            score(s, band, block, s.dout + b * LANES, s.v + b * LANES, false, s.dscores);
            for (int64_t r = 0; r < band.count; r++) {
                const int64_t first = r * s.ring + band.start[r] - band.base, size = s.kw * LANES;
                const int64_t count = std::clamp<int64_t>(s.width * heads - b * LANES, 0, LANES);
                const Stats stats(p, s, image, head, rows.index(y + r), b * LANES, count);
                lanes high = {}, inverse = {}, mean = {};
                for (int64_t i = 0; i < count; i++) high[i] = stats.lane[i][0], inverse[i] = stats.lane[i][s.width];
                float *weights = s.weights + first * size, *dscores = s.dscores + first * size;
                for (int64_t i = 0; i < s.kh * size; i += LANES) {
                    const lanes weight = power_of_two(load(weights + i) - high) * inverse;
                    store(weights + i, weight);
                    mean += weight * load(dscores + i);
                }
                float* sums = s.dbias + (block.table * (2 * s.kh - 1) + band.start[r] - y - r + s.kh - 1) * size;
                for (int64_t i = 0; i < s.kh * size; i += LANES) {
                    const lanes ds = load(weights + i) * (load(dscores + i) - mean);
                    store(dscores + i, ds);
                    store(sums + i, load(sums + i) + ds);
                }
                for (int64_t i = 0; i < s.kh; i++) {
                    const int64_t to = ((first + i) * (2 * s.kw - 1) + s.kw - 1) * s.stride + b * LANES;
                    spread(s, block, weights + i * size, s.weight_lines + to);
                    spread(s, block, dscores + i * size, s.dscore_lines + to);
                }
            }
            weigh_keys(s, band, block, s.dscores, s.k + b * LANES, s.tile);
            for (int64_t r = 0; r < band.count; r++)
                store_block<T>(
                    s, s.tile + r * s.padded * LANES, LANES, splat(p.scale),
                    Tokens<T>(s, p.dq, image, head, heads, rows.index(y + r), b * LANES, nullptr), false
                );
        }
        for (int64_t b = 0; b < s.blocks; b++) {
            weigh_queries(s, band, s.block[b], s.weight_lines + b * LANES, s.dout + b * LANES, s.dv + b * LANES);
            weigh_queries(s, band, s.block[b], s.dscore_lines + b * LANES, s.q + b * LANES, s.dk + b * LANES);
        }
    }
    pass(loaded);
}

// Rows [size * strip / strips, size * (strip + 1) / strips) of one residue group.
void run_strip(
    const Problem& p, Scratch& s, bool backward, int64_t image, int64_t group, int64_t residue, int64_t strip
) {
    const Group rows(p.rows, residue);
    const int64_t head = group * p.pack, heads = std::min(p.pack, p.heads - head);
    const auto edge = [&](int64_t i) { return rows.size * i / p.strips; };
    const int64_t y0 = edge(strip), y1 = edge(strip + 1);
    if (!backward)
        return (p.bfloat16 ? forward_strip<uint16_t> : forward_strip<float>)(p, s, image, head, heads, rows, y0, y1);
    // Strips of odd number come second, and add where their neighbours have written.
    const bool second = strip % 2;
    const int64_t before = second ? rows.start(y0 - 1) + rows.kernel : 0;
    const int64_t after = second && y1 < rows.size ? rows.start(y1) : rows.size;
    (p.bfloat16 ? backward_strip<uint16_t> : backward_strip<float>)(p, s, image, head, heads, rows, y0, y1, before, after);
}

// Tasks [begin, end) of the forward: (image, group of heads, row residue, strip), the last fastest.
void forward(const Problem& p, int64_t begin, int64_t end) {
    Scratch s(p, false);
    for (int64_t task = begin; task < end; task++) {
        const int64_t outer = task / p.strips, dh = p.rows.dilation, groups = (p.heads + p.pack - 1) / p.pack;
        run_strip(p, s, false, outer / dh / groups, outer / dh % groups, outer % dh, task % p.strips);
    }
}

// Slots [begin, end) of one colour of the backward. A slot is one group of heads and a contiguous share of its tasks
// (image, row residue, strip of this colour); it alone adds to partial[head][share] of its heads, so dbias does not
// depend on the number of threads.
void backward(const Problem& p, int64_t colour, int64_t slots, int64_t begin, int64_t end, float* partial) {
    Scratch s(p, true);
    const int64_t strips = (p.strips - colour + 1) / 2, dh = p.rows.dilation, tasks = p.images * dh * strips;
    const int64_t table = (2 * s.kh - 1) * (2 * s.kw - 1), groups = (p.heads + p.pack - 1) / p.pack;
    for (int64_t slot = begin; slot < end; slot++) {
        const int64_t share = slot / groups, group = slot % groups;  // an image's heads lie together in memory
        for (int64_t task = tasks * share / slots; task < tasks * (share + 1) / slots; task++)
            run_strip(p, s, true, task / strips / dh, group, task / strips % dh, task % strips * 2 + colour);
        const int64_t head = group * p.pack;
        if (partial) s.add_dbias(partial + (head * slots + share) * table, slots, std::min(p.pack, p.heads - head));
    }
}
