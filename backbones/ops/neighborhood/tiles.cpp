// Neighbourhood attention over one strip of query rows. kernels.cpp includes this file once per instruction set, inside
// a namespace.
//
// A strip is a range of rows of one residue group of one image and head. Its columns are cut into blocks of N <= 16
// queries whose keys lie in one window of 16 columns, so that a row of keys is one vector of 16 lanes and
//
//     S[n][l] = sum_d Q^T[d][n] * K^T[d][l]          N broadcasts and one load per d, N accumulators in registers.
//
// The accumulators start from the bias, which is laid out per query as [2 kh - 1][16] with -inf in the lanes out of
// sight. Query rows go down the strip; a ring of kh slots holds the key rows in sight, so every key row is read and
// transposed once per strip and block. Everything is packed as float32: scattered tokens (any stride, any dilation),
// bfloat16 and head dims that are no multiple of 16 (zero padded) cost one copy and meet the same loops. Scores are in
// units of log2, so that the softmax is a power of two.
//
// The backward recomputes the probabilities P from the saved maximum and 1 / sum of each query and needs, per row of
// queries,
//
//     dP = dO V^T    dS = P (dP - sum P dP)    dQ = dS K    dK += dS^T Q    dV += P^T dO    dbias += dS
//
// where dK and dV of the kh rows in sight are rings too, added to memory when a row leaves. Strips of one colour
// (kernels.cpp) share no key row, so these additions need no lock and always happen in the same order.

constexpr int64_t LANES = 16;

// 16 floats in as many registers of WIDTH floats as the instruction set needs. WIDTH is the compiler's own vector type,
// so that nothing is left for it to lower: a 64-byte vector without AVX-512 goes through memory.
constexpr int WIDTH = REGISTER_BYTES / 4, PARTS = LANES / WIDTH;
typedef float lanes __attribute__((vector_size(REGISTER_BYTES)));
typedef float loose __attribute__((vector_size(REGISTER_BYTES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(REGISTER_BYTES)));

struct vec {
    lanes part[PARTS];
};

#define EACH_PART(expression)                               \
    vec y;                                                  \
    for (int i = 0; i < PARTS; i++) y.part[i] = expression; \
    return y
INLINE vec load(const float* p) { EACH_PART(*(const loose*)(p + i * WIDTH)); }
INLINE vec splat(float x) { EACH_PART(x - lanes{}); }
INLINE vec operator+(const vec& a, const vec& b) { EACH_PART(a.part[i] + b.part[i]); }
INLINE vec operator-(const vec& a, const vec& b) { EACH_PART(a.part[i] - b.part[i]); }
INLINE vec operator*(const vec& a, const vec& b) { EACH_PART(a.part[i] * b.part[i]); }
INLINE vec operator-(const vec& a, float b) { EACH_PART(a.part[i] - b); }
INLINE vec operator*(const vec& a, float b) { EACH_PART(a.part[i] * b); }
INLINE vec larger(const vec& a, const vec& b) { EACH_PART(a.part[i] > b.part[i] ? a.part[i] : b.part[i]); }
INLINE void store(float* p, const vec& x) {
    for (int i = 0; i < PARTS; i++) *(loose*)(p + i * WIDTH) = x.part[i];
}
INLINE void add_product(vec& y, const vec& a, const vec& b) {
    for (int i = 0; i < PARTS; i++) y.part[i] += a.part[i] * b.part[i];
}
INLINE void add_product(vec& y, float a, const vec& b) {
    for (int i = 0; i < PARTS; i++) y.part[i] += a * b.part[i];
}

INLINE float sum(const vec& x) {
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

INLINE float largest(const vec& x) {
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

// 2^x for x <= 0 to 2e-7 relative, 0 below the normal range. NaN stays NaN.
INLINE lanes power_of_two(const lanes& x) {
    const lanes low = -126.f - lanes{}, magic = 12582912.f - lanes{};  // 1.5 * 2^23: adding it rounds to an integer
    lanes clipped = x < low ? low : x;
    lanes shifted = clipped + magic;
    lanes f = clipped - (shifted - magic);       // in [-0.5, 0.5]
    lanes y = 1.5403530393381609e-4f - lanes{};  // Taylor terms ln(2)^i / i!
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910072e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.f;
    y *= (lanes)(((bits)shifted - (bits)magic + 127) << 23);
    return x < low ? lanes{} : y;
}
INLINE vec power_of_two(const vec& x) { EACH_PART(power_of_two(x.part[i])); }
#undef EACH_PART

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

// 16 numbers of either type as floats and back.
INLINE vec load_as_float(const float* p) { return load(p); }
INLINE vec load_as_float(const uint16_t* p) {
    float lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = to_float(p[i]);
    return load(lane);
}
INLINE void store_from_float(float* p, const vec& x) { store(p, x); }
INLINE void store_from_float(uint16_t* p, const vec& x) {
    float lane[LANES];
    store(lane, x);
    for (int i = 0; i < LANES; i++) from_float(lane[i], p[i]);
}

// out = in * factor for `dim` numbers.
template <typename In, typename Out>
INLINE void scaled_copy(const In* in, float factor, int64_t dim, Out* out) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store_from_float(out + d, load_as_float(in + d) * factor);
    for (; d < dim; d++) from_float(to_float(in[d]) * factor, out[d]);
}

// out += in * factor
INLINE void scaled_add(const float* in, float factor, int64_t dim, float* out) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(out + d, load(out + d) + load(in + d) * factor);
    for (; d < dim; d++) out[d] += in[d] * factor;
}

// One round of a transpose: a and b exchange the lanes whose index differs in bit STEP.
template <int STEP>
INLINE void exchange(lanes& a, lanes& b) {
#define UPPER(l) ((l) & STEP ? WIDTH + (l) - STEP : (l))
#define LOWER(l) ((l) & STEP ? WIDTH + (l) : (l) + STEP)
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
    for (int i = 0; i < WIDTH; i++)
        if (!(i & STEP)) exchange<STEP>(r[i], r[i | STEP]);
}

// in: 16 rows of floats, `stride` apart; out: the transpose of their first 16 columns, 16 rows of 16. By squares of
// WIDTH.
INLINE void transpose16(const float* in, int64_t stride, float* out) {
    for (int row = 0; row < LANES; row += WIDTH)
        for (int column = 0; column < LANES; column += WIDTH) {
            lanes r[WIDTH];
            for (int i = 0; i < WIDTH; i++) r[i] = *(const loose*)(in + (row + i) * stride + column);
            if constexpr (WIDTH > 8) exchange_all<8>(r);
            if constexpr (WIDTH > 4) exchange_all<4>(r);
            exchange_all<2>(r);
            exchange_all<1>(r);
            for (int i = 0; i < WIDTH; i++) *(loose*)(out + (column + i) * LANES + row) = r[i];
        }
}

// A residue group on one axis: its position p is index residue + p * dilation.
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

// The tokens of one row of a group in a map: token(p) is `dim` consecutive numbers.
template <typename T>
struct Row {
    T* first;
    int64_t step;
    Row(const Map& map, int64_t image, int64_t head, const Group& rows, int64_t y, const Group& columns)
        : first(
              (T*)map.data + image * map.image + head * map.head + rows.index(y) * map.row +
              columns.index(0) * map.column
          ),
          step(columns.dilation * map.column) {}
    T* token(int64_t p) const { return first + p * step; }
};

// Scratch of one thread. A tile is 16 tokens as [16][padded] or transposed as [padded][16]; padded = dim rounded up
// to 16.
struct Scratch {
    int64_t kh, padded, tile, line, map, table, wide;
    std::vector<float> memory;
    float *next, *q, *qt, *kt, *k, *v, *scores, *bias, *lines, *spare, *vt, *dout, *doutt, *probs, *dbias, *dk, *dv;

    Scratch(const Problem& p, bool backward)
        : kh(p.rows.kernel),
          padded((p.dim + LANES - 1) / LANES * LANES),
          tile(padded * LANES),
          line(kh * LANES),
          map(LANES * line),
          table(LANES * (2 * kh - 1) * LANES),
          wide(2 * p.columns.kernel - 1 + 2 * LANES),
          memory((5 + 6 * kh) * tile + 2 * map + 2 * table + (2 * kh - 1) * wide + LANES) {
        next = (float*)(((uintptr_t)memory.data() + 63) / 64 * 64);
        q = take(tile), qt = take(tile), spare = take(tile);
        k = take(kh * tile), kt = take(kh * tile), v = take(kh * tile), scores = take(map), bias = take(table);
        lines = memory.data() + memory.size() - (2 * kh - 1) * wide;
        if (!backward) return;
        vt = take(kh * tile), dout = take(tile), doutt = take(tile), probs = take(map), dbias = take(table);
        dk = take(kh * tile), dv = take(kh * tile);
    }
    float* take(int64_t count) { return (next += count) - count; }
};

// Up to 16 tokens from p0 as a tile of floats times `factor`; the rows past `count` become 0 (columns past dim are 0
// from the start).
template <typename T>
void load_tile(const Row<T>& row, int64_t p0, int64_t count, int64_t dim, int64_t padded, float factor, float* tile) {
    for (int64_t i = 0; i < count; i++) scaled_copy(row.token(p0 + i), factor, dim, tile + i * padded);
    if (count < LANES) std::memset(tile + count * padded, 0, (LANES - count) * padded * sizeof(float));
}

// Asks for tokens that are needed one row later: rows lie far apart in memory, where the processor does not look by itself.
template <typename T>
void prefetch(const Row<T>& row, int64_t p0, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(row.token(p0 + i) + d);
}

inline void transpose_tile(const float* tile, int64_t padded, float* out) {
    for (int64_t d = 0; d < padded; d += LANES) transpose16(tile + d, padded, out + d * LANES);
}

// out[n][lane] = init[n][lane] + sum_d a[d][n] * b[d][lane] for n < N; a and b are transposed tiles.
template <int N>
void dot(
    const float* a, const float* b, int64_t dim, const float* init, int64_t init_stride, float* out, int64_t out_stride
) {
    vec acc[N];
    for (int n = 0; n < N; n++) acc[n] = init ? load(init + n * init_stride) : splat(0.f);
    for (int64_t d = 0; d < dim; d++) {
        vec x = load(b + d * LANES);
        for (int n = 0; n < N; n++) add_product(acc[n], a[d * LANES + n], x);
    }
    for (int n = 0; n < N; n++) store(out + n * out_stride, acc[n]);
}

// The same for any count: blocks of as many queries as the instruction set has accumulators for.
inline void dots(
    int64_t count, const float* a, const float* b, int64_t dim, const float* init, int64_t init_stride, float* out,
    int64_t out_stride
) {
    for (int64_t n = 0; n < count;) {
        const int64_t left = count - n, half = (left + 1) / 2;
        const int64_t step = left <= ACCUMULATORS ? left : half <= ACCUMULATORS ? half : ACCUMULATORS;
        const float* from = init ? init + n * init_stride : nullptr;
        float* to = out + n * out_stride;
        switch (step) {
#define CASE(N)                                                                                    \
    case N:                                                                                        \
        if constexpr (N <= ACCUMULATORS) dot<N>(a + n, b, dim, from, init_stride, to, out_stride); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
#undef CASE
        }
        n += step;
    }
}

// For two queries at once, o[d] = sum over key rows i and lanes first <= l < first + count of w[i][l] * x[i][l][d];
// count is even. w: [kh][16], 0 in lanes out of sight. Even and odd lanes have accumulators of their own, so that no
// addition waits for the last one.
template <int V>
void weighted(
    const float* w0, const float* w1, const float* const* x, int64_t kh, int64_t first, int64_t count, int64_t padded,
    float* o0, float* o1
) {
    vec even0[V], odd0[V], even1[V], odd1[V];
    for (int j = 0; j < V; j++) even0[j] = odd0[j] = even1[j] = odd1[j] = splat(0.f);
    for (int64_t i = 0; i < kh; i++) {
        const float *row = x[i] + first * padded, *a = w0 + i * LANES + first, *b = w1 + i * LANES + first;
        for (int64_t l = 0; l < count; l += 2, row += 2 * padded)
            for (int j = 0; j < V; j++) {
                vec even = load(row + j * LANES), odd = load(row + padded + j * LANES);
                add_product(even0[j], a[l], even), add_product(even1[j], b[l], even);
                add_product(odd0[j], a[l + 1], odd), add_product(odd1[j], b[l + 1], odd);
            }
    }
    for (int j = 0; j < V; j++) store(o0 + j * LANES, even0[j] + odd0[j]), store(o1 + j * LANES, even1[j] + odd1[j]);
}

// For two keys (lanes l and l + 1 of one key row) at once, over the queries [first, last):
//     dv[lane][d] += p[n][lane] * dout[n][d]    and    dk[lane][d] += ds[n][lane] * q[n][d]
template <int V>
void spread(
    const float* p, const float* ds, int64_t stride, int64_t first, int64_t last, const float* dout, const float* q,
    int64_t padded, float* dv, float* dk
) {
    vec v0[V], v1[V], k0[V], k1[V];
    for (int j = 0; j < V; j++) {
        v0[j] = load(dv + j * LANES), v1[j] = load(dv + padded + j * LANES);
        k0[j] = load(dk + j * LANES), k1[j] = load(dk + padded + j * LANES);
    }
    for (int64_t n = first; n < last; n++)
        for (int j = 0; j < V; j++) {
            vec g = load(dout + n * padded + j * LANES), x = load(q + n * padded + j * LANES);
            add_product(v0[j], p[n * stride], g), add_product(v1[j], p[n * stride + 1], g);
            add_product(k0[j], ds[n * stride], x), add_product(k1[j], ds[n * stride + 1], x);
        }
    for (int j = 0; j < V; j++) {
        store(dv + j * LANES, v0[j]), store(dv + padded + j * LANES, v1[j]);
        store(dk + j * LANES, k0[j]), store(dk + padded + j * LANES, k1[j]);
    }
}

// Columns of a strip that share one window of 16 key columns: queries x0 <= x < x0 + count, keys c0 <= c < c0 + lanes.
struct Block {
    int64_t x0, count, c0, lanes, offset[LANES];
    Block(const Group& columns, int64_t x0)
        : x0(x0), count(0), c0(columns.start(x0)), lanes(std::min(LANES, columns.size - c0)) {
        while (count < LANES && x0 + count < columns.size && columns.start(x0 + count) + columns.kernel <= c0 + lanes) {
            offset[count] = columns.start(x0 + count) - c0;
            count++;
        }
    }
    // An even number of lanes that covers what queries n and n + 1 see, starting at *first.
    int64_t pair(int64_t n, int64_t kernel, int64_t* first) const {
        int64_t last = offset[std::min(n + 1, count - 1)] + kernel, width = (last - offset[n] + 1) / 2 * 2;
        *first = std::min(offset[n], LANES - width);
        return width;
    }
};

// bias rows of every query of the block: [n][2 kh - 1][16], -inf in lanes that the query does not see, in units of
// log2.
inline void lay_out_bias(const Problem& p, const Scratch& s, const Group& columns, const Block& block) {
    const int64_t height = 2 * s.kh - 1;
    for (int64_t n = 0; n < block.count; n++) {
        float unseen[LANES];
        for (int64_t l = 0; l < LANES; l++)
            unseen[l] = l >= block.offset[n] && l < block.offset[n] + columns.kernel ? 0.f : -INFINITY;
        const vec mask = load(unseen);
        // entry of lane l: key column - query column + kw - 1
        const float* line = s.lines + LANES + block.c0 - (block.x0 + n) + columns.kernel - 1;
        for (int64_t r = 0; r < height; r++) store(s.bias + (n * height + r) * LANES, load(line + r * s.wide) + mask);
    }
}

// The bias table of a head in units of log2, 16 zeros before and after each line, so that 16 lanes can be read from any
// entry.
inline void pad_bias(const Problem& p, const Scratch& s, int64_t head) {
    const int64_t height = 2 * s.kh - 1, width = 2 * p.columns.kernel - 1;
    for (int64_t r = 0; p.bias && r < height; r++)
        for (int64_t c = 0; c < width; c++)
            s.lines[r * s.wide + LANES + c] = p.bias[(head * height + r) * width + c] * 1.4426950408889634f;
}

// Scores of the block's queries in row y: [n][kh][16]. The q tile holds q * scale * log2(e), transposed in qt.
inline void score(const Problem& p, Scratch& s, const Group& rows, const Block& block, int64_t y) {
    const int64_t start = rows.start(y);
    for (int64_t i = 0; i < s.kh; i++) {
        const float* bias = s.bias + (start + i - y + s.kh - 1) * LANES;
        dots(
            block.count, s.qt, s.kt + (start + i) % s.kh * s.tile, p.dim, bias, (2 * s.kh - 1) * LANES,
            s.scores + i * LANES, s.line
        );
    }
}

// o[n] = sum over keys of w[n][i][l] * x[slot of row i][l] for every query of the block, into the tile `out`.
inline void weighted_rows(
    Scratch& s, const Block& block, int64_t kernel, int64_t start, const float* w, const float* x, float* out
) {
    const float* row[LANES];
    for (int64_t d = 0; d < s.padded;) {
        const bool wide = VECTORS == 2 && s.padded - d >= 2 * LANES;
        for (int64_t i = 0; i < s.kh; i++) row[i] = x + (start + i) % s.kh * s.tile + d;
        for (int64_t n = 0; n < block.count; n += 2) {
            const bool last = n + 1 == block.count;
            int64_t first, width = block.pair(n, kernel, &first);
            const float *w0 = w + n * s.line, *w1 = last ? w0 : w0 + s.line;
            float *o0 = out + n * s.padded + d, *o1 = last ? o0 : o0 + s.padded;
            if (wide)
                weighted<2>(w0, w1, row, s.kh, first, width, s.padded, o0, o1);
            else
                weighted<1>(w0, w1, row, s.kh, first, width, s.padded, o0, o1);
        }
        d += wide ? 2 * LANES : LANES;
    }
}

template <typename T>
void forward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, const Group& rows, const Group& columns, int64_t y0,
    int64_t y1
) {
    const float scale = p.scale * 1.4426950408889634f;
    pad_bias(p, s, head);
    for (int64_t x0 = 0; x0 < columns.size;) {
        const Block block(columns, x0);
        lay_out_bias(p, s, columns, block);
        int64_t loaded = rows.start(y0);
        for (int64_t y = y0; y < y1; y++) {
            const int64_t start = rows.start(y);
            for (; loaded < start + s.kh; loaded++) {
                const int64_t slot = loaded % s.kh * s.tile;
                load_tile(
                    Row<T>(p.k, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim, s.padded, 1.f, s.k
                );
                transpose_tile(s.k, s.padded, s.kt + slot);
                load_tile(
                    Row<T>(p.v, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim, s.padded, 1.f,
                    s.v + slot
                );
            }
            if (loaded < rows.size) {
                prefetch(Row<T>(p.k, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim);
                prefetch(Row<T>(p.v, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim);
            }
            if (y + 1 < y1) prefetch(Row<T>(p.q, image, head, rows, y + 1, columns), block.x0, block.count, p.dim);
            load_tile(Row<T>(p.q, image, head, rows, y, columns), block.x0, block.count, p.dim, s.padded, scale, s.q);
            transpose_tile(s.q, s.padded, s.qt);
            score(p, s, rows, block, y);

            float inverse[LANES];
            float* stats = p.stats + ((image * p.heads + head) * p.rows.length + rows.index(y)) * p.columns.length * 2;
            for (int64_t n = 0; n < block.count; n++) {
                float* line = s.scores + n * s.line;
                vec high = load(line), total = splat(0.f);
                for (int64_t i = 1; i < s.kh; i++) high = larger(high, load(line + i * LANES));
                const float top = largest(high);
                for (int64_t i = 0; i < s.kh; i++) {
                    vec e = power_of_two(load(line + i * LANES) - top);
                    store(line + i * LANES, e);
                    total = total + e;
                }
                inverse[n] = 1.f / sum(total);
                float* stat = stats + columns.index(block.x0 + n) * 2;
                stat[0] = top, stat[1] = inverse[n];
            }
            weighted_rows(s, block, columns.kernel, start, s.scores, s.v, s.spare);
            const Row<T> out(p.out, image, head, rows, y, columns);
            for (int64_t n = 0; n < block.count; n++)
                scaled_copy(s.spare + n * s.padded, inverse[n], p.dim, out.token(block.x0 + n));
        }
        x0 += block.count;
    }
}

// Adds a row of the dK and dV rings to memory and clears it.
inline void retire(
    const Problem& p, Scratch& s, int64_t image, int64_t head, const Group& rows, const Group& columns,
    const Block& block, int64_t y
) {
    const int64_t slot = y % s.kh * s.tile;
    const Row<float> dk(p.dk, image, head, rows, y, columns), dv(p.dv, image, head, rows, y, columns);
    for (int64_t l = 0; l < block.lanes; l++) {
        scaled_add(
            s.dk + slot + l * s.padded, 0.6931471805599453f, p.dim, dk.token(block.c0 + l)
        );  // q carries log2(e)
        scaled_add(s.dv + slot + l * s.padded, 1.f, p.dim, dv.token(block.c0 + l));
    }
    std::memset(s.dk + slot, 0, s.tile * sizeof(float));
    std::memset(s.dv + slot, 0, s.tile * sizeof(float));
}

// dbias: [2 kh - 1][2 kw - 1] of this head, added to.
template <typename T>
void backward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, const Group& rows, const Group& columns, int64_t y0,
    int64_t y1, float* dbias
) {
    const float log2e = 1.4426950408889634f, scale = p.scale * log2e;
    const int64_t table = (2 * s.kh - 1) * LANES, width = 2 * columns.kernel - 1;
    pad_bias(p, s, head);
    for (int64_t x0 = 0; x0 < columns.size;) {
        const Block block(columns, x0);
        lay_out_bias(p, s, columns, block);
        if (dbias) std::memset(s.dbias, 0, block.count * table * sizeof(float));
        int64_t from[LANES / 2], to[LANES / 2];  // queries that see lane 2 j or 2 j + 1
        for (int64_t j = 0; j < LANES / 2; j++) {
            from[j] = block.count, to[j] = 0;
            for (int64_t n = 0; n < block.count; n++)
                if (block.offset[n] <= 2 * j + 1 && 2 * j < block.offset[n] + columns.kernel)
                    from[j] = std::min(from[j], n), to[j] = n + 1;
        }
        int64_t loaded = rows.start(y0), oldest = loaded;
        for (int64_t y = y0; y < y1; y++) {
            const int64_t start = rows.start(y);
            for (; oldest < start; oldest++) retire(p, s, image, head, rows, columns, block, oldest);
            for (; loaded < start + s.kh; loaded++) {
                const int64_t slot = loaded % s.kh * s.tile;
                load_tile(
                    Row<T>(p.k, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim, s.padded, 1.f,
                    s.k + slot
                );
                transpose_tile(s.k + slot, s.padded, s.kt + slot);
                load_tile(
                    Row<T>(p.v, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim, s.padded, 1.f,
                    s.spare
                );
                transpose_tile(s.spare, s.padded, s.vt + slot);
            }
            if (loaded < rows.size) {
                prefetch(Row<T>(p.k, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim);
                prefetch(Row<T>(p.v, image, head, rows, loaded, columns), block.c0, block.lanes, p.dim);
            }
            if (y + 1 < y1) {
                prefetch(Row<T>(p.q, image, head, rows, y + 1, columns), block.x0, block.count, p.dim);
                prefetch(Row<T>(p.dout, image, head, rows, y + 1, columns), block.x0, block.count, p.dim);
            }
            load_tile(Row<T>(p.q, image, head, rows, y, columns), block.x0, block.count, p.dim, s.padded, scale, s.q);
            transpose_tile(s.q, s.padded, s.qt);
            load_tile(
                Row<T>(p.dout, image, head, rows, y, columns), block.x0, block.count, p.dim, s.padded, 1.f, s.dout
            );
            transpose_tile(s.dout, s.padded, s.doutt);

            score(p, s, rows, block, y);
            for (int64_t i = 0; i < s.kh; i++)  // dP, where P will be once it is known
                dots(
                    block.count, s.doutt, s.vt + (start + i) % s.kh * s.tile, p.dim, nullptr, 0, s.probs + i * LANES,
                    s.line
                );
            const float* stats =
                p.stats + ((image * p.heads + head) * p.rows.length + rows.index(y)) * p.columns.length * 2;
            for (int64_t n = 0; n < block.count; n++) {
                const float* stat = stats + columns.index(block.x0 + n) * 2;
                float *scores = s.scores + n * s.line, *probs = s.probs + n * s.line,
                      *db = s.dbias + n * table + (start - y + s.kh - 1) * LANES;
                vec total = splat(0.f);
                for (int64_t i = 0; i < s.line; i += LANES) {
                    vec weight = power_of_two(load(scores + i) - stat[0]) * stat[1];
                    store(scores + i, weight);
                    add_product(total, weight, load(probs + i));
                }
                const float mean = sum(total);
                for (int64_t i = 0; i < s.line; i += LANES) {
                    vec weight = load(scores + i), ds = weight * (load(probs + i) - mean);
                    store(scores + i, ds), store(probs + i, weight);
                    if (dbias) store(db + i, load(db + i) + ds);
                }
            }
            for (int64_t i = 0; i < s.kh; i++) {
                const int64_t slot = (start + i) % s.kh * s.tile;
                for (int64_t l = 0; l < block.lanes; l += 2) {
                    const float *probs = s.probs + i * LANES + l, *ds = s.scores + i * LANES + l;
                    for (int64_t d = 0; d < s.padded;) {
                        const bool wide = VECTORS == 2 && s.padded - d >= 2 * LANES;
                        float *dv = s.dv + slot + l * s.padded + d, *dk = s.dk + slot + l * s.padded + d;
                        (wide ? spread<2> : spread<1>)(probs, ds, s.line, from[l / 2], to[l / 2], s.dout + d, s.q + d,
                                                       s.padded, dv, dk);
                        d += wide ? 2 * LANES : LANES;
                    }
                }
            }
            weighted_rows(s, block, columns.kernel, start, s.scores, s.k, s.spare);
            const Row<T> dq(p.dq, image, head, rows, y, columns);
            for (int64_t n = 0; n < block.count; n++)
                scaled_copy(s.spare + n * s.padded, p.scale, p.dim, dq.token(block.x0 + n));
        }
        for (; oldest < loaded; oldest++) retire(p, s, image, head, rows, columns, block, oldest);
        if (dbias)
            for (int64_t n = 0; n < block.count; n++)
                for (int64_t r = 0; r < 2 * s.kh - 1; r++)
                    for (int64_t l = block.offset[n]; l < block.offset[n] + columns.kernel; l++)
                        dbias[r * width + block.c0 - block.x0 - n + columns.kernel - 1 + l] +=
                            s.dbias[n * table + r * LANES + l];
        x0 += block.count;
    }
}

// Rows [size * strip / strips, size * (strip + 1) / strips) of one residue group.
void run_strip(
    const Problem& p, Scratch& s, bool backward, int64_t image, int64_t head, int64_t row_residue,
    int64_t column_residue, int64_t strip, float* dbias
) {
    const Group rows(p.rows, row_residue), columns(p.columns, column_residue);
    const int64_t y0 = rows.size * strip / p.strips, y1 = rows.size * (strip + 1) / p.strips;
    if (p.bfloat16) {
        if (backward)
            backward_strip<uint16_t>(p, s, image, head, rows, columns, y0, y1, dbias);
        else
            forward_strip<uint16_t>(p, s, image, head, rows, columns, y0, y1);
    } else {
        if (backward)
            backward_strip<float>(p, s, image, head, rows, columns, y0, y1, dbias);
        else
            forward_strip<float>(p, s, image, head, rows, columns, y0, y1);
    }
}

// Tasks [begin, end) of the forward: (image, head, row residue, column residue, strip), the last fastest.
void forward(const Problem& p, int64_t begin, int64_t end) {
    Scratch s(p, false);
    for (int64_t task = begin; task < end; task++) {
        const int64_t group = task / p.strips, dw = p.columns.dilation, dh = p.rows.dilation, outer = group / dw / dh;
        run_strip(p, s, false, outer / p.heads, outer % p.heads, group / dw % dh, group % dw, task % p.strips, nullptr);
    }
}

// Slots [begin, end) of one colour of the backward. A slot is one head and a contiguous share of its tasks (image, row
// residue, column residue, strip of this colour); it alone adds to partial[slot], so dbias does not depend on the
// number of threads.
void backward(const Problem& p, int64_t colour, int64_t slots, int64_t begin, int64_t end, float* partial) {
    Scratch s(p, true);
    const int64_t strips = (p.strips - colour + 1) / 2, dh = p.rows.dilation, dw = p.columns.dilation,
                  tasks = p.images * dh * dw * strips;
    const int64_t table = (2 * p.rows.kernel - 1) * (2 * p.columns.kernel - 1);
    for (int64_t slot = begin; slot < end; slot++) {
        const int64_t head = slot / slots, share = slot % slots;
        for (int64_t task = tasks * share / slots; task < tasks * (share + 1) / slots; task++) {
            const int64_t group = task / strips;
            run_strip(
                p, s, true, group / dw / dh, head, group / dw % dh, group % dw, task % strips * 2 + colour,
                partial ? partial + slot * table : nullptr
            );
        }
    }
}
