// Neighbourhood attention over one strip of query rows. kernels.cpp includes this file once per instruction set, inside
// a namespace.
//
// Scores want the queries in the lanes of a vector, so that no sum and no softmax goes over lanes: the lanes are
// neighbouring columns of the map, a row of tokens is kept as a line, its transpose [dim][columns] with zeros before and
// after, and the scores of LANES queries with the keys `s` positions to their right, in one row of keys, are
//
//     S[s] = bias[s] + sum_d Q[d] * (K[d] read s columns further on)
//
// Inside the map a query sees the kw planes s = -kw/2 .. kw/2. At the borders windows slide inwards, and a block of LANES
// columns sees up to 2 kw - 1 planes; but a window of kw neighbours has one plane of each class modulo kw, so kw vectors
// always do, and in the first classes of such a block some lanes read at s and the others at s + kw. A dilation of the
// columns only orders them: those of one residue lie side by side. A dilation of the rows makes residue groups, each with its
// own strips. Where the map is narrower than half a vector, several heads lie side by side in a line.
//
// Sums weighted with the scores want the numbers of a token in the lanes: a weight is then one number for all of them, and
// borders and ragged widths are nothing but other tokens. Rows of tokens are kept as [columns][dim].
//
// Work goes by bands of BAND query rows, which share what is read:
//
//     scores    BAND x PARTS accumulators: per d one load of K for each class, one of Q for each row
//     gather    O = sum_s P[s] V: the accumulators are the outputs of two columns in all rows of the band
//     scatter   dX += sum over the queries that see a key: the accumulators are a column of keys in all rows that one row of
//               queries sees
//
// Scattered tokens, bfloat16 and head dims that are no multiple of LANES cost one copy and meet the same loops. Scores
// are in units of log2, so that the softmax is a power of two.
//
// The backward recomputes the probabilities P from the saved maximum and 1 / sum of each query and needs
//
//     dP = dO V^T    dS = P (dP - sum P dP)    dQ = dS K    dK = dS^T Q    dV = P^T dO    dbias = sum dS
//
// dP is `scores` again, dQ `gather`, dK and dV are `scatter`, from the P and dS of a whole band. Rows of dK and dV go to
// memory when the band has passed them. Strips of one colour (kernels.cpp) share no key row, so these additions need no lock
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

// A residue group of the rows or columns: its position p is row residue + p * dilation.
struct Group {
    int64_t residue, size, kernel, dilation;
    Group(const Axis& axis, int64_t residue)
        : residue(residue),
          size((axis.length - residue + axis.dilation - 1) / axis.dilation),
          kernel(axis.kernel),
          dilation(axis.dilation) {}
    int64_t index(int64_t p) const { return residue + p * dilation; }
    int64_t start(int64_t p) const { return std::min(std::max<int64_t>(p - kernel / 2, 0), size - kernel); }
    int64_t band() const { return kernel < BAND ? 1 : BAND; }  // rows of a band share a key row
};

// LANES columns. As queries they see the planes first <= s < first + kw + twice: class c is plane first + c, and for
// c < twice in some lanes first + c + kw. The keys of its queries begin `lowest` columns from its first lane; `near` if
// they are NEAR.
struct Block {
    int64_t first, twice, lowest;
    bool near;
    int64_t table;  // number of its tables of masks and biases: blocks in the interior of the map share theirs
};

// One query that sees a key: where its numbers are in a row of tokens, and its weight among those of a band's row.
struct Seen {
    int32_t query, weight;
};

// What one call's columns look like, and the scratch of one thread.
struct Scratch {
    int64_t kh, kw, window, dilation, width, dim, padded, blocks, stride, line, row, ring, weights_size, head, tables;
    std::vector<Block> block;
    std::vector<int32_t> column;  // of each lane of a line, its column of the map
    std::vector<int32_t> second;  // of each table [kw][LANES]: -1 where a lane takes the second plane of a class, else 0
    std::vector<int32_t> near;    // of each table [kw][LANES]: the key's column from the block's lowest on
    std::vector<int32_t> keys;    // [columns][kw]: where the key of each class is in a row of tokens
    std::vector<Seen> seen;       // of each column the queries that see it ...
    std::vector<int32_t> seen_from;  // ... from this one on, [columns + 1]
    std::unique_ptr<float[]> memory;
    float *next, *zeros, *tile, *bias, *dbias, *weights, *dscores;
    float *q_line, *k_line, *v_line, *dout_line;              // [BAND or ring][padded][stride]
    float *q_row, *k_row, *v_row, *dout_row, *dk_row, *dv_row;  // [BAND or ring][columns][padded]

    Scratch(const Problem& p, bool backward)
        : kh(p.rows.kernel),
          kw(p.columns.kernel),
          window(kh * kw * LANES),
          dilation(p.columns.dilation),
          width(p.columns.length),
          dim(p.dim),
          padded((p.dim + LANES - 1) / LANES * LANES),
          blocks((width * p.pack + LANES - 1) / LANES),
          row(blocks * LANES * padded),
          ring(kh + BAND - 1),
          weights_size((backward ? blocks : 1) * BAND * window),  // the forward needs those of one block at a time
          head(-1),
          tables(0) {
        cut(p, backward);
        const int64_t pad = (kw - 1 + LANES - 1) / LANES;  // blocks; one pad serves the line before and after
        stride = ((blocks + pad) | 1) * LANES;  // an odd number of blocks, so that the lines fall into different cache sets
        line = padded * stride;
        const int64_t nothing = std::max(padded, LANES), table = tables * (2 * kh - 1) * kw * LANES;
        const int64_t lines = backward ? 2 * BAND + 2 * ring : BAND + ring, rows = backward ? 2 * BAND + 3 * ring : ring;
        const int64_t either = nothing + BAND * padded * LANES + pad * LANES + lines * line + rows * row;
        const int64_t sums = (backward ? 2 : 1) * (table + weights_size);
        memory.reset(new float[either + sums + 16 + 2]);  // in_classes may look, in vain, two planes too far
        next = (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
        zeros = take(nothing), tile = take(BAND * padded * LANES), bias = take(table), weights = take(weights_size);
        (backward ? k_row : v_row) = take(ring * row);
        if (backward) {
            dscores = take(weights_size), dbias = take(table), dk_row = take(ring * row), dv_row = take(ring * row);
            q_row = take(BAND * row), dout_row = take(BAND * row);
            std::memset(dbias, 0, table * sizeof(float));
        }
        float *before = take(pad * LANES), *first = next;
        q_line = take(BAND * line), k_line = take(ring * line);
        if (backward) v_line = take(ring * line), dout_line = take(BAND * line);
        std::memset(zeros, 0, nothing * sizeof(float));
        std::memset(before, 0, pad * LANES * sizeof(float));
        for (float* at = first; at < next; at += stride)
            std::memset(at + blocks * LANES, 0, (stride - blocks * LANES) * sizeof(float));
    }
    float* take(int64_t count) { return (next += count) - count; }

    // Finds the planes and masks of every block, and who sees whom.
    void cut(const Problem& p, bool backward) {
        std::vector<int64_t> low;  // lowest plane of each lane
        for (int64_t segment = 0; segment < p.pack; segment++)
            for (int64_t residue = 0; residue < dilation; residue++) {
                const Group group(p.columns, residue);
                for (int64_t at = 0; at < group.size; at++)
                    column.push_back(group.index(at)), low.push_back(group.start(at) - at);
            }
        const int64_t columns = column.size();
        low.resize(blocks * LANES, INT64_MIN);
        int64_t interior = -1;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = INT64_MAX, last = INT64_MIN;
            for (int64_t i = b * LANES; i < std::min((b + 1) * LANES, columns); i++)
                first = std::min(first, low[i]), last = std::max(last, low[i]);
            const auto key = [&](int64_t i, int64_t c) { return i + first + c + (low[i] > first + c ? kw : 0); };
            int64_t lowest = INT64_MAX, highest = INT64_MIN;
            for (int64_t i = b * LANES; i < std::min((b + 1) * LANES, columns); i++)
                for (int64_t c = 0; c < kw; c++) {
                    keys.push_back(key(i, c) * padded);
                    lowest = std::min(lowest, key(i, c)), highest = std::max(highest, key(i, c));
                }
            const bool inside = last == first && first == -(kw / 2) && (b + 1) * LANES <= width;
            const bool near = last > first && highest - lowest < 2 * LANES;
            block.push_back({first, last - first, lowest - b * LANES, near, inside && interior >= 0 ? interior : tables});
            if (block[b].table < tables) continue;
            if (inside) interior = tables;
            tables++;
            for (int64_t c = 0; c < kw; c++)
                for (int64_t i = b * LANES; i < (b + 1) * LANES; i++) {
                    this->second.push_back(low[i] > first + c ? -1 : 0);
                    this->near.push_back(i < columns ? key(i, c) - lowest : 0);
                }
        }
        if (!backward) return;
        seen_from.assign(columns + 1, 0), seen.resize(columns * kw);
        for (const int32_t key : keys) seen_from[key / padded + 1]++;
        for (int64_t i = 0; i < columns; i++) seen_from[i + 1] += seen_from[i];
        std::vector<int32_t> place(seen_from);
        for (int64_t i = 0; i < columns; i++)
            for (int64_t c = 0; c < kw; c++) {
                const int64_t weight = i / LANES * BAND * window + c * kh * LANES + i % LANES;
                seen[place[keys[i * kw + c] / padded]++] = {(int32_t)(i * padded), (int32_t)weight};
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

    // Biases of `heads` heads from `first` on, in units of log2: of each table [kw][2 kh - 1][LANES].
    void lay_out_bias(const Problem& p, int64_t first, int64_t heads) {
        if (head == first) return;
        head = first;
        float* out = bias;
        each_table([&](const Block& at, const bits& segment, int64_t table) {
            for (int64_t c = 0; c < kw; c++)
                for (int64_t r = 0; r < 2 * kh - 1; r++, out += LANES) {
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
        const float* sum = dbias;
        each_table([&](const Block& at, const bits& segment, int64_t table) {
            for (int64_t c = 0; c < kw; c++)
                for (int64_t r = 0; r < 2 * kh - 1; r++, sum += LANES) {
                    float* first = out + r * (2 * kw - 1) + at.first + c + kw - 1;
                    if (heads == 1 && c >= at.twice) {  // one entry for all lanes
                        float total = 0.f;
                        for (int64_t i = 0; i < LANES; i++) total += sum[i];
                        *first += total;
                        continue;
                    }
                    const bits plane = mask(table, c) * (int32_t)kw;  // -kw where it is the second
                    for (int64_t i = 0; i < LANES; i++)
                        if (segment[i] < heads) first[segment[i] * slots * (2 * kh - 1) * (2 * kw - 1) - plane[i]] += sum[i];
                }
        });
        std::memset(dbias, 0, tables * (2 * kh - 1) * kw * LANES * sizeof(float));
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
        if (heads == 1 && s.dilation == 1)
            for (int64_t i = 0; i < LANES; i++) at[i] = i < count ? first + (lane + i) * map.column : nothing;
        else
            for (int64_t i = 0; i < LANES; i++)
                at[i] = i < count ? first + s.column[lane + i] * map.column + (lane + i) / s.width * map.head : nothing;
    }
};

// A row of the map, times `factor`, where they are given: as a row of tokens, as a line.
template <typename T>
void load_row(
    const Scratch& s, const Map& map, int64_t image, int64_t head, int64_t heads, int64_t y, float factor, float* row,
    float* line
) {
    for (int64_t b = 0; b < s.blocks; b++) {
        const Tokens<const T> tokens(s, map, image, head, heads, y, b * LANES, (const T*)s.zeros);
        for (int64_t d = 0; d < s.dim; d += LANES) {
            lanes r[LANES];
            if (std::is_same<T, float>::value && d + LANES <= s.dim) {
                UNROLLED for (int64_t i = 0; i < LANES; i++) r[i] = load((const float*)tokens.at[i] + d) * factor;
            } else {
                float floats[LANES * LANES];  // r itself stays in registers if no index into it is variable
                for (int64_t i = 0; i < LANES; i++)
                    store(floats + i * LANES, load_as_float(tokens.at[i] + d, std::min(LANES, s.dim - d)));
                UNROLLED for (int64_t i = 0; i < LANES; i++) r[i] = load(floats + i * LANES) * factor;
            }
            if (row) UNROLLED for (int64_t i = 0; i < LANES; i++) store(row + (b * LANES + i) * s.padded + d, r[i]);
            if (!line) continue;
            transpose(r);
            UNROLLED for (int64_t i = 0; i < LANES; i++) store(line + (d + i) * s.stride + b * LANES, r[i]);
        }
    }
}

// Tokens `row` of one block, times a factor for each, into the map; stored or added.
template <typename T>
void store_block(const Scratch& s, const float* row, const float* factor, const Tokens<T>& tokens, bool add) {
    for (int64_t i = 0; i < tokens.count; i++)
        for (int64_t d = 0; d < s.dim; d += LANES) {
            const int64_t count = std::min(LANES, s.dim - d);
            const lanes x = load(row + i * s.padded + d) * factor[i];
            store_from_float(tokens.at[i] + d, add ? x + load_as_float(tokens.at[i] + d, count) : x, count);
        }
}

// The rows of tokens that the next band reads. They are asked for while this one computes, since they lie far apart, where the
// processor does not look by itself; and a few at a time, or they would hold up the reads of this band.
struct Ahead {
    struct Row {
        const char* first;
        int64_t step, bytes;
    };
    Row row[4 * BAND];
    int64_t count = 0, next = 0;
    template <typename T>
    void add(const Scratch& s, const Map& map, int64_t image, int64_t head, int64_t y) {
        const T* first = (const T*)map.data + image * map.image + head * map.head + y * map.row;
        row[count++] = {(const char*)first, map.column * (int64_t)sizeof(T), s.dim * (int64_t)sizeof(T)};
    }
    // Block b of one row more. Inlined because GCC takes a function that only asks for one without effect, and drops the call.
    INLINE void ask(const Scratch& s, int64_t b) {
        if (next == count) return;
        const auto [first, step, bytes] = row[next++];
        for (int64_t i = b * LANES; i < std::min(s.width, (b + 1) * LANES); i++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + s.column[i] * step + at, 0, 2);
    }
};

// How the keys of LANES queries and one class lie in a line: side by side; in two such places, kw apart; or anywhere
// among 2 LANES columns, from which a register's worth is picked where an instruction does that.
enum Reach { BESIDE, TWICE, NEAR };

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

// out[r][p] = init[r][p] + sum over d of q[r][d] * x[d] read p further on, for R rows and P classes; no init is 0. `table` says
// of each class and lane whether it is `more` further on (TWICE) or which column it is (NEAR).
template <int R, int P, Reach REACH>
void scores(
    const float* q, int64_t q_row, const float* x, int64_t more, const int32_t* table, int64_t dim, int64_t stride,
    const float* const* init, int64_t init_class, float* const* out, int64_t out_class
) {
    lanes sum[R][P];
    choice mask[P];
    for (int p = 0; p < P; p++) {
        if (REACH == TWICE) mask[p] = choice_of(table + p * LANES);
        for (int r = 0; r < R; r++) sum[r][p] = init ? load(init[r] + p * init_class) : lanes{};
    }
    for (int64_t d = 0; d < dim; d++, q += stride, x += stride) {
        lanes factor[R], near[2];
        for (int r = 0; r < R; r++) factor[r] = load(q + r * q_row);
        if (REACH == NEAR) near[0] = load(x), near[1] = load(x + LANES);
        for (int p = 0; p < P; p++) {
            const lanes key = once(
                REACH == NEAR    ? pick(near[0], near[1], table + p * LANES)
                : REACH == TWICE ? load_either(x + p, more, mask[p])
                                 : load(x + p)
            );
            for (int r = 0; r < R; r++) sum[r][p] += factor[r] * key;
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) store(out[r] + p * out_class, sum[r][p]);
}

// f(n) with 0 < n <= MAX as a number known at compile time.
template <int64_t MAX, typename F>
INLINE void constant(int64_t n, const F& f) {
    if (n == MAX) return f(std::integral_constant<int, MAX>());
    if constexpr (MAX > 1) constant<MAX - 1>(n, f);
}

// first <= c < last in equal parts of at most PARTS: f(c, count).
template <typename F>
INLINE void in_parts(int64_t first, int64_t last, const F& f) {
    const int64_t count = last - first, parts = (count + PARTS - 1) / PARTS;
    for (int64_t i = 0; i < parts; i++) f(first + count * i / parts, count * (i + 1) / parts - count * i / parts);
}

// The classes of a block: all by picking, or those with two planes, then the others: f(reach, c, count). One or two others are
// not worth a part of their own.
template <typename F>
INLINE void in_classes(const Scratch& s, const Block& block, const F& f) {
    const auto part = [&](auto reach, int64_t from, int64_t to) {
        in_parts(from, to, [&](int64_t c, int64_t count) { f(reach, c, count); });
    };
    if constexpr (PICKS)
        if (block.near) return part(std::integral_constant<Reach, NEAR>(), 0, s.kw);
    const int64_t twice = block.twice + 2 < s.kw || block.twice == 0 ? block.twice : s.kw;
    part(std::integral_constant<Reach, TWICE>(), 0, twice);
    part(std::integral_constant<Reach, BESIDE>(), twice, s.kw);
}

// BAND or fewer query rows y .. y + count - 1 of a group, and the key rows they see: base <= i < end.
struct Band {
    int64_t y, count, base, end, start[BAND];
    Band(const Group& rows, int64_t y, int64_t y1) : y(y), count(std::min(rows.band(), y1 - y)) {
        for (int64_t r = 0; r < count; r++) start[r] = rows.start(y + r);
        base = start[0], end = start[count - 1] + rows.kernel;
    }
    // f(first, last, i) for each key row i, from 0 on, and the queries first <= r < last that see it, known at compile time.
    template <int R, typename F>
    INLINE void each_row(int64_t kernel, const F& f) const {
        const std::integral_constant<int, 0> none;
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, 2> two;
        const std::integral_constant<int, R> all;
        int64_t i = 0;
        if constexpr (R > 1)
            for (; i < start[1] - base; i++) f(none, one, i);
        if constexpr (R > 2)
            for (; i < start[2] - base; i++) f(none, two, i);
        for (; i < kernel; i++) f(none, all, i);
        if constexpr (R > 1)
            for (; i < start[1] - base + kernel; i++) f(one, all, i);
        if constexpr (R > 2)
            for (; i < start[2] - base + kernel; i++) f(two, all, i);
    }
    // Queries first <= r < last see key row i.
    void seeing(int64_t i, int64_t kernel, int64_t* first, int64_t* last) const {
        for (*first = 0; start[*first] + kernel <= i;) ++*first;
        for (*last = count; start[*last - 1] > i;) --*last;
    }
};

// out[r][class][key row - start[r]]: the products of block b of the rows q with the ring x; with `bias` they start from it.
inline void score(
    const Scratch& s, const Band& band, int64_t b, const float* q, const float* x, bool bias, float* out, Ahead& ahead
) {
    const Block& block = s.block[b];
    q += b * LANES, x += b * LANES;
    for (int64_t i = band.base; i < band.end; i++) {
        ahead.ask(s, b);
        int64_t r, last;
        band.seeing(i, s.kh, &r, &last);
        const float* line = x + i % s.ring * s.line;
        in_classes(s, block, [&](auto reach, int64_t c, int64_t count) {
            constexpr bool near = decltype(reach)::value == NEAR;
            const int32_t* table = (near ? s.near : s.second).data() + (block.table * s.kw + c) * LANES;
            const float* init[BAND];
            float* to[BAND];
            for (int64_t j = 0; j < last - r; j++) {
                init[j] = s.bias + ((block.table * s.kw + c) * (2 * s.kh - 1) + i - band.y - r - j + s.kh - 1) * LANES;
                to[j] = out + ((r + j) * s.kw * s.kh + c * s.kh + i - band.start[r + j]) * LANES;
            }
            constant<BAND>(last - r, [&](auto queries) {
                constant<PARTS>(count, [&](auto classes) {
                    scores<decltype(queries)::value, decltype(classes)::value, decltype(reach)::value>(
                        q + r * s.line, s.line, line + (near ? block.lowest : block.first + c), s.kw, table, s.dim, s.stride,
                        bias ? init : nullptr, (2 * s.kh - 1) * LANES, to, s.kh * LANES
                    );
                });
            });
        });
    }
}

// Of the columns first <= x < last, the N vectors from d on of tile[r][x] = sum over the keys of w[r][class][key row] times
// the ring x, for the band's R rows.
template <int R, int N>
void gather(
    const Scratch& s, const Band& band, int64_t first, int64_t last, const float* w, const float* x, int64_t d, float* tile
) {
    const float* rows[BAND + 15];
    for (int64_t i = band.base; i < band.end; i++) rows[i - band.base] = x + i % s.ring * s.row + d;
    for (int64_t at = first; at < last; at += 2) {  // two columns, so that additions need not wait for each other
        const int32_t* keys[2] = {s.keys.data() + at * s.kw, s.keys.data() + std::min(at + 1, last - 1) * s.kw};
        const float* weights[R];
        for (int r = 0; r < R; r++) weights[r] = w + r * s.window + (band.base - band.start[r]) * LANES + at % LANES;
        lanes sum[2][R][N] = {};
        band.template each_row<R>(s.kh, [&](auto from, auto to, int64_t i) __attribute__((always_inline)) {
            for (int64_t c = 0; c < s.kw; c++)
                for (int j = 0; j < 2; j++) {
                    lanes value[N];
                    for (int n = 0; n < N; n++) value[n] = once(load(rows[i] + keys[j][c] + n * LANES));
                    for (int r = decltype(from)::value; r < decltype(to)::value; r++) {
                        const lanes weight = once(splat(weights[r][(c * s.kh + i) * LANES + j]));
                        for (int n = 0; n < N; n++) sum[j][r][n] += weight * value[n];
                    }
                }
        });
        for (int j = 0; j < 2; j++)
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) store(tile + (r * LANES + at % LANES + j) * s.padded + d + n * LANES, sum[j][r][n]);
    }
}

// Adds to the columns first <= x < last of K rows of tokens, N vectors of each, the sum over the queries that see a key of
// w[class][key row] times y.
template <int K, int N>
void scatter(
    const Scratch& s, int64_t first, int64_t last, const float* w, const float* y, float* const* rows, int64_t d
) {
    for (int64_t x = first; x < last; x++) {
        lanes sum[K][N];
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) sum[k][n] = load(rows[k] + x * s.padded + d + n * LANES);
        for (int32_t i = s.seen_from[x]; i < s.seen_from[x + 1]; i++) {
            const Seen& by = s.seen[i];
            lanes value[N];
            for (int n = 0; n < N; n++) value[n] = load(y + by.query + d + n * LANES);
            for (int k = 0; k < K; k++)
                for (int n = 0; n < N; n++) sum[k][n] += w[by.weight + k * LANES] * value[n];
        }
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) store(rows[k] + x * s.padded + d + n * LANES, sum[k][n]);
    }
}

// f(d, N): the numbers of a token, N <= 2 vectors at a time.
template <typename F>
INLINE void in_vectors(const Scratch& s, const F& f) {
    int64_t d = 0;
    for (; d + 2 * LANES <= s.padded; d += 2 * LANES) f(d, std::integral_constant<int, 2>());
    if (d < s.padded) f(d, std::integral_constant<int, 1>());
}

inline void gather_block(const Scratch& s, const Band& band, int64_t b, int64_t columns, const float* w, const float* x) {
    const int64_t first = b * LANES, last = std::min(columns, first + LANES);
    in_vectors(s, [&](int64_t d, auto vectors) {
        constant<BAND>(band.count, [&](auto queries) {
            gather<decltype(queries)::value, decltype(vectors)::value>(s, band, first, last, w, x, d, s.tile);
        });
    });
}

// Adds to block b of the ring x the sums over the queries y of the band.
inline void scatter_block(
    const Scratch& s, const Band& band, int64_t b, int64_t columns, const float* w, const float* y, float* x
) {
    const int64_t first = b * LANES, last = std::min(columns, first + LANES);
    for (int64_t r = 0; r < band.count; r++, w += s.window, y += s.row)
        in_parts(0, s.kh, [&](int64_t k, int64_t count) {
            float* rows[PARTS];
            for (int64_t i = 0; i < count; i++) rows[i] = x + (band.start[r] + k + i) % s.ring * s.row;
            in_vectors(s, [&](int64_t d, auto vectors) {
                constant<PARTS>(count, [&](auto keys) {
                    scatter<decltype(keys)::value, decltype(vectors)::value>(s, first, last, w + k * LANES, y, rows, d);
                });
            });
        });
}

// Where a block's numbers in stats, [images, H, 2, heads W], begin; the second of the two is `heads * W` further on.
inline float* stats_of(const Problem& p, const Scratch& s, int64_t image, int64_t head, int64_t y, int64_t b) {
    return p.stats + (image * p.rows.length + y) * 2 * p.heads * s.width + head * s.width + b * LANES;
}

template <typename T>
void forward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, int64_t heads, const Group& rows, int64_t y0, int64_t y1
) {
    s.lay_out_bias(p, head, heads);
    const int64_t columns = s.width * heads;
    int64_t loaded = rows.start(y0);
    for (int64_t y = y0; y < y1; y += rows.band()) {
        const Band band(rows, y, y1);
        for (; loaded < band.end; loaded++) {
            const int64_t slot = loaded % s.ring, row = rows.index(loaded);
            load_row<T>(s, p.k, image, head, heads, row, 1.f, nullptr, s.k_line + slot * s.line);
            load_row<T>(s, p.v, image, head, heads, row, 1.f, s.v_row + slot * s.row, nullptr);
        }
        for (int64_t r = 0; r < band.count; r++) {
            float* line = s.q_line + r * s.line;
            load_row<T>(s, p.q, image, head, heads, rows.index(y + r), p.scale * 1.4426950408889634f, nullptr, line);
        }
        Ahead ahead;
        for (int64_t i = 0; i < BAND && heads == 1; i++) {  // several heads in a line are small maps
            if (y + BAND + i < y1) ahead.add<T>(s, p.q, image, head, rows.index(y + BAND + i));
            if (loaded + i < rows.size)
                for (const Map& map : {p.k, p.v}) ahead.add<T>(s, map, image, head, rows.index(loaded + i));
        }
        for (int64_t b = 0; b * LANES < columns; b++) {
            ahead.next = 0;
            score(s, band, b, s.q_line, s.k_line, true, s.weights, ahead);
            float inverse[BAND][LANES];
            const int64_t bytes = std::min(LANES, columns - b * LANES) * sizeof(float);
            for (int64_t r = 0; r < band.count; r++) {
                float* weights = s.weights + r * s.window;
                lanes high = load(weights), other = high, total = {};  // two, so that no comparison waits for the last one
                for (int64_t i = LANES; i < s.window; i += LANES) {
                    const lanes x = load(weights + i), more = x > other ? x : other;
                    other = high, high = more;
                }
                high = other > high ? other : high;
                for (int64_t i = 0; i < s.window; i += LANES) {
                    const lanes e = power_of_two(load(weights + i) - high);
                    store(weights + i, e);
                    total += e;
                }
                store(inverse[r], 1.f / total);
                float* stats = stats_of(p, s, image, head, rows.index(y + r), b);
                std::memcpy(stats, &high, bytes);
                std::memcpy(stats + p.heads * s.width, inverse[r], bytes);
            }
            gather_block(s, band, b, columns, s.weights, s.v_row);
            for (int64_t r = 0; r < band.count; r++) {
                const Tokens<T> out(s, p.out, image, head, heads, rows.index(y + r), b * LANES, nullptr);
                store_block<T>(s, s.tile + r * LANES * s.padded, inverse[r], out, false);
            }
        }
    }
}

// Puts a row of the dK and dV rings into memory: added if the strip of the other colour has been there.
inline void retire(
    const Problem& p, const Scratch& s, int64_t image, int64_t head, int64_t heads, int64_t y, int64_t slot, bool add
) {
    float log2[LANES], one[LANES];
    store(log2, splat(0.6931471805599453f)), store(one, splat(1.f));  // q carries log2(e)
    for (int64_t b = 0; b * LANES < s.width * heads; b++) {
        const int64_t from = slot * s.row + b * LANES * s.padded;
        store_block(s, s.dk_row + from, log2, Tokens<float>(s, p.dk, image, head, heads, y, b * LANES, nullptr), add);
        store_block(s, s.dv_row + from, one, Tokens<float>(s, p.dv, image, head, heads, y, b * LANES, nullptr), add);
    }
}

// Key rows below `before` and from `after` on have been written by strips of the other colour. s.dbias is added to.
template <typename T>
void backward_strip(
    const Problem& p, Scratch& s, int64_t image, int64_t head, int64_t heads, const Group& rows, int64_t y0, int64_t y1,
    int64_t before, int64_t after
) {
    s.lay_out_bias(p, head, heads);
    const int64_t columns = s.width * heads;
    int64_t loaded = rows.start(y0), oldest = loaded;
    const auto pass = [&](int64_t end) {
        for (; oldest < end; oldest++)
            retire(p, s, image, head, heads, rows.index(oldest), oldest % s.ring, oldest < before || oldest >= after);
    };
    float scale[LANES];
    store(scale, splat(p.scale));
    for (int64_t y = y0; y < y1; y += rows.band()) {
        const Band band(rows, y, y1);
        pass(band.base);
        for (; loaded < band.end; loaded++) {
            const int64_t slot = loaded % s.ring, row = rows.index(loaded);
            load_row<T>(s, p.k, image, head, heads, row, 1.f, s.k_row + slot * s.row, s.k_line + slot * s.line);
            load_row<T>(s, p.v, image, head, heads, row, 1.f, nullptr, s.v_line + slot * s.line);
            std::memset(s.dk_row + slot * s.row, 0, columns * s.padded * sizeof(float));
            std::memset(s.dv_row + slot * s.row, 0, columns * s.padded * sizeof(float));
        }
        for (int64_t r = 0; r < band.count; r++) {
            const float factor = p.scale * 1.4426950408889634f;
            const int64_t row = rows.index(y + r);
            load_row<T>(s, p.q, image, head, heads, row, factor, s.q_row + r * s.row, s.q_line + r * s.line);
            load_row<T>(s, p.dout, image, head, heads, row, 1.f, s.dout_row + r * s.row, s.dout_line + r * s.line);
        }
        Ahead ahead;
        for (int64_t i = 0; i < BAND && heads == 1; i++) {
            if (y + BAND + i < y1)
                for (const Map& map : {p.q, p.dout}) ahead.add<T>(s, map, image, head, rows.index(y + BAND + i));
            if (loaded + i < rows.size)
                for (const Map& map : {p.k, p.v}) ahead.add<T>(s, map, image, head, rows.index(loaded + i));
        }
        for (int64_t b = 0; b * LANES < columns; b++) {
            float *weights = s.weights + b * BAND * s.window, *dscores = s.dscores + b * BAND * s.window;
            ahead.next = 0;
            score(s, band, b, s.q_line, s.k_line, true, weights, ahead);
            score(s, band, b, s.dout_line, s.v_line, false, dscores, ahead);
            for (int64_t r = 0; r < band.count; r++) {
                float *w = weights + r * s.window, *ds = dscores + r * s.window;
                const float* stats = stats_of(p, s, image, head, rows.index(y + r), b);
                const int64_t bytes = std::min(LANES, columns - b * LANES) * sizeof(float);
                lanes high = splat(INFINITY), inverse = {}, mean = {};  // beyond the map probabilities are 0
                std::memcpy(&high, stats, bytes);
                std::memcpy(&inverse, stats + p.heads * s.width, bytes);
                for (int64_t i = 0; i < s.window; i += LANES) {
                    const lanes weight = power_of_two(load(w + i) - high) * inverse;
                    store(w + i, weight);
                    mean += weight * load(ds + i);
                }
                float* sums = s.dbias + (s.block[b].table * s.kw * (2 * s.kh - 1) + band.start[r] - y - r + s.kh - 1) * LANES;
                for (int64_t c = 0; c < s.kw; c++, sums += (2 * s.kh - 1) * LANES)
                    for (int64_t i = 0; i < s.kh * LANES; i += LANES) {
                        const lanes x = load(w + c * s.kh * LANES + i) * (load(ds + c * s.kh * LANES + i) - mean);
                        store(ds + c * s.kh * LANES + i, x);
                        store(sums + i, load(sums + i) + x);
                    }
            }
            gather_block(s, band, b, columns, dscores, s.k_row);
            for (int64_t r = 0; r < band.count; r++) {
                const Tokens<T> dq(s, p.dq, image, head, heads, rows.index(y + r), b * LANES, nullptr);
                store_block<T>(s, s.tile + r * LANES * s.padded, scale, dq, false);
            }
        }
        for (int64_t b = 0; b * LANES < columns; b++) {
            scatter_block(s, band, b, columns, s.weights, s.dout_row, s.dv_row);
            scatter_block(s, band, b, columns, s.dscores, s.q_row, s.dk_row);
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

// Slots [begin, end) of the colours [from, to) of the backward. A slot is one group of heads and a contiguous share of its
// tasks (image, row residue, strip of this colour); it alone adds to partial[head][share] of its heads, so dbias does not
// depend on the number of threads.
void backward(const Problem& p, int64_t from, int64_t to, int64_t slots, int64_t begin, int64_t end, float* partial) {
    Scratch s(p, true);
    const int64_t table = (2 * s.kh - 1) * (2 * s.kw - 1), groups = (p.heads + p.pack - 1) / p.pack;
    for (int64_t colour = from; colour < to; colour++) {
        const int64_t strips = (p.strips - colour + 1) / 2, dh = p.rows.dilation, tasks = p.images * dh * strips;
        for (int64_t slot = begin; slot < end; slot++) {
            const int64_t share = slot / groups, group = slot % groups;  // an image's heads lie together in memory
            for (int64_t task = tasks * share / slots; task < tasks * (share + 1) / slots; task++)
                run_strip(p, s, true, task / strips / dh, group, task / strips % dh, task % strips * 2 + colour);
            const int64_t head = group * p.pack;
            if (partial) s.add_dbias(partial + (head * slots + share) * table, slots, std::min(p.pack, p.heads - head));
        }
    }
}
