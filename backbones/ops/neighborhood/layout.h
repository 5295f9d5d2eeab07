// How a map lies while it is worked on: residue groups, blocks of columns with their masks and biases, the scratch of one
// thread, the ways from the map's memory into it and back, and the rows to ask for ahead.
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

#ifndef NEIGHBORHOOD_LAYOUT_H
#define NEIGHBORHOOD_LAYOUT_H

#include "simd.h"

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

// How the keys of LANES queries and one class lie in a line: side by side; in two such places, kw apart; or anywhere
// among 2 LANES columns, from which a register's worth is picked where an instruction does that.
enum Reach { BESIDE, TWICE, NEAR };

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

#endif  // NEIGHBORHOOD_LAYOUT_H
