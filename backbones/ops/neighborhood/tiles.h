// Neighbourhood attention over one strip of query rows, forward and backward: the sums over tiles of the layout (layout.h) in
// the registers of one instruction set (simd.h), and the tasks that a thread is given.
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

#ifndef NEIGHBORHOOD_TILES_H
#define NEIGHBORHOOD_TILES_H

#include "layout.h"
#include "simd.h"

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

#endif  // NEIGHBORHOOD_TILES_H
