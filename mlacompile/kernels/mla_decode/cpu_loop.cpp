// Decoding attention on a latent cache in float32: one pass over the cache, a few tokens at a time.
//
// Heads and queries are rows. A vector holds one number of as many rows as it is wide, so that scores, their maximum and
// their exponentials need no sum across a vector: keys are broadcast to rows, then values are added up by rows. Tokens
// are fetched once, while those before them are computed with; the product with values finds them in the processor's
// second cache. Threads share out tokens, and what they found is merged at the end.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDE)));
typedef int32_t Int __attribute__((vector_size(4 * WIDE)));

#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX__) && defined(__FMA__)
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

constexpr int AT_ONCE = 12;          // tokens whose scores are summed at the same time, each in a register
constexpr int TILE = 4 * AT_ONCE;    // tokens between two products with values
constexpr float LN2 = 0.693147180559945309f;

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x that are not positive, 0 below the smallest normal number, NaN for NaN.
inline Vec exp2_of(Vec x) {
  const Vec near = larger(all(-126.0f), x);       // NaN is no larger: it stays
  const Vec shifted = near + 12582912.0f;         // rounds to an integer, in the last bits
  const Vec rest = near - (shifted - 12582912.0f);
  Vec sum = all(1.5252734e-5f);
  for (float c : {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = fma(sum, rest, all(c));
  const Vec power = (Vec)(((Int)shifted << 23) + (127 << 23));
  return x < all(-126.0f) ? Vec{} : sum * power;
}

struct Call {
  const float *q_latent, *q_pe, *c_kv, *k_pe;   // rows of queries contiguous
  int64_t c_batch, c_token, k_batch, k_token;   // strides
  const int64_t *starts, *ends;                 // [B], and [B, S]: tokens start <= t < end are seen
  float *out, *lse, *room;
  int64_t batch, heads, queries, rank, rope;
  int64_t splits, parts;                        // of the tokens and of the groups of rows of a batch row: one item each
  float scale;

  int64_t rows() const { return heads * queries; }
  int64_t groups() const { return (rows() + WIDE - 1) / WIDE; }
  int64_t width() const { return rank + rope; }
  // What is kept of a group of rows and a split: queries by columns, sums of values by rows, largest score, sum of shares.
  int64_t kept() const { return WIDE * (width() + rank + 2); }
};

struct Group {
  float *queries, *sums, *largest, *total;
  Group(const Call& c, int64_t b, int64_t split, int64_t group) {
    queries = c.room + ((b * c.splits + split) * c.groups() + group) * c.kept();
    sums = queries + WIDE * c.width();
    largest = sums + WIDE * c.rank;
    total = largest + WIDE;
  }
};

void begin(const Call& c, int64_t b, int64_t group, const Group& g) {
  const float factor = c.scale / LN2;
  std::memset(g.queries, 0, sizeof(float) * c.kept());
  for (int i = 0; i < WIDE; i++) {
    g.largest[i] = -INFINITY;
    const int64_t row = group * WIDE + i;
    if (row >= c.rows()) continue;
    const float* latent = c.q_latent + (b * c.rows() + row) * c.rank;
    const float* pe = c.q_pe + (b * c.rows() + row) * c.rope;
    for (int64_t d = 0; d < c.rank; d++) g.queries[d * WIDE + i] = latent[d] * factor;
    for (int64_t d = 0; d < c.rope; d++) g.queries[(c.rank + d) * WIDE + i] = pe[d] * factor;
  }
}

// Adds the products of AT_ONCE keys with the queries of a group; ``ahead`` tokens later lies what comes next.
inline void add_scores(Vec* scores, const float* queries, const float* const* keys, int64_t width, int64_t ahead) {
  Vec sum[AT_ONCE];
  for (int i = 0; i < AT_ONCE; i++) sum[i] = scores[i];
  for (int64_t d = 0; d < width; d++) {
    if (ahead && d % 16 < AT_ONCE) __builtin_prefetch(keys[d % 16] + ahead + d / 16 * 16, 0, 2);
    const Vec query = load(queries + d * WIDE);
    for (int i = 0; i < AT_ONCE; i++) sum[i] = fma(query, all(keys[i][d]), sum[i]);
  }
  for (int i = 0; i < AT_ONCE; i++) scores[i] = sum[i];
}

// Scores of the tokens first .. first + count of a batch row, of which none are read beyond ``last``.
void score(const Call& c, int64_t b, const Group& g, int64_t first, int count, int64_t last, bool fetch, Vec* scores) {
  for (int from = 0; from < count; from += AT_ONCE) {
    const float *latents[AT_ONCE], *ropes[AT_ONCE];
    for (int i = 0; i < AT_ONCE; i++) {
      const int64_t t = first + from + i < last ? first + from + i : last - 1;
      latents[i] = c.c_kv + b * c.c_batch + t * c.c_token;
      ropes[i] = c.k_pe + b * c.k_batch + t * c.k_token;
      scores[from + i] = Vec{};
    }
    add_scores(scores + from, g.queries, latents, c.rank, fetch ? AT_ONCE * c.c_token : 0);
    add_scores(scores + from, g.queries + c.rank * WIDE, ropes, c.rope, fetch ? AT_ONCE * c.k_token : 0);
  }
}

// sums = sums * kept + shares^T values, for one group of rows.
void add_values(const Call& c, int64_t b, const Group& g, int64_t first, int count, const Vec* shares, Vec kept) {
  const float* values = c.c_kv + b * c.c_batch + first * c.c_token;
  for (int64_t d = 0; d < c.rank; d += WIDE) {
    Vec sum[WIDE] = {};
    for (int t = 0; t < count; t++) {
      const Vec value = load(values + t * c.c_token + d);
      const float* share = (const float*)(shares + t);
      for (int i = 0; i < WIDE; i++) sum[i] = fma(value, all(share[i]), sum[i]);
    }
    for (int i = 0; i < WIDE; i++) {
      float* before = g.sums + i * c.rank + d;
      store(before, fma(load(before), all(kept[i]), sum[i]));
    }
  }
}

void attend(const Call& c, int64_t b, int64_t split, int64_t part) {
  const int64_t first_group = part * c.groups() / c.parts, end_group = (part + 1) * c.groups() / c.parts;
  const int64_t* ends = c.ends + b * c.queries;
  int64_t start = c.starts[b], end = start, shortest = ends[0];
  for (int64_t s = 0; s < c.queries; s++) {
    end = ends[s] > end ? ends[s] : end;
    shortest = ends[s] < shortest ? ends[s] : shortest;
  }
  const int64_t each = (end - start + c.splits - 1) / c.splits;
  start += split * each;
  end = start + each < end ? start + each : end;
  for (int64_t group = first_group; group < end_group; group++) begin(c, b, group, Group(c, b, split, group));
  Vec scores[TILE];
  for (int64_t first = start; first < end; first += TILE) {
    const int count = end - first < TILE ? int(end - first) : TILE;
    for (int64_t group = first_group; group < end_group; group++) {
      const Group g(c, b, split, group);
      score(c, b, g, first, count, end, group == first_group, scores);
      if (first + count > shortest)
        for (int t = 0; t < count; t++)
          for (int i = 0; i < WIDE; i++)
            if (first + t >= ends[(group * WIDE + i) % c.queries]) scores[t][i] = -INFINITY;
      const Vec before = load(g.largest);
      Vec largest = before;
      for (int t = 0; t < count; t++) largest = larger(scores[t], largest);
      store(g.largest, largest);
      const Vec base = largest == all(-INFINITY) ? Vec{} : largest;
      const Vec kept = exp2_of(before - base);
      Vec total = {};
      for (int t = 0; t < count; t++) total += scores[t] = exp2_of(scores[t] - base);
      store(g.total, fma(load(g.total), kept, total));
      add_values(c, b, g, first, count, scores, kept);
    }
  }
}

// One row of the result, of what the splits found.
void merge(const Call& c, int64_t b, int64_t row) {
  const int64_t group = row / WIDE, i = row % WIDE;
  float largest = -INFINITY, total = 0.0f;
  for (int64_t s = 0; s < c.splits; s++) {
    const float found = Group(c, b, s, group).largest[i];
    largest = found > largest ? found : largest;
  }
  float* out = c.out + (b * c.rows() + row) * c.rank;
  std::memset(out, 0, sizeof(float) * c.rank);
  const float base = largest == -INFINITY ? 0.0f : largest;
  for (int64_t s = 0; s < c.splits; s++) {
    const Group g(c, b, s, group);
    const float share = std::exp2(g.largest[i] - base);
    if (share == 0.0f) continue;
    total += g.total[i] * share;
    const float* sums = g.sums + i * c.rank;
    for (int64_t d = 0; d < c.rank; d += WIDE) store(out + d, fma(load(sums + d), all(share), load(out + d)));
  }
  const float whole = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < c.rank; d += WIDE) store(out + d, load(out + d) * whole);
  c.lse[b * c.rows() + row] = total == 0.0f ? -INFINITY : LN2 * (largest + std::log2(total));
}

}  // namespace

// Floats of ``room`` that a call needs.
extern "C" int64_t mla_decode_room(int64_t batch, int64_t rows, int64_t rank, int64_t rope, int64_t splits) {
  Call c{};
  c.heads = rows, c.queries = 1, c.rank = rank, c.rope = rope;
  return batch * splits * c.groups() * c.kept();
}

extern "C" void mla_decode(const float* q_latent, const float* q_pe, const float* c_kv, const float* k_pe,
                           int64_t c_batch, int64_t c_token, int64_t k_batch, int64_t k_token, const int64_t* starts,
                           const int64_t* ends, float* out, float* lse, float* room, int64_t batch, int64_t heads,
                           int64_t queries, int64_t rank, int64_t rope, int64_t splits, int64_t threads, float scale) {
  Call c{q_latent, q_pe, c_kv, k_pe, c_batch, c_token, k_batch, k_token, starts, ends, out,
         lse, room, batch, heads, queries, rank, rope, splits, 1, scale};
  c.parts = (threads + batch * splits - 1) / (batch * splits);
  if (c.parts > c.groups()) c.parts = c.groups();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < batch * splits * c.parts; item++)
      attend(c, item / c.parts / splits, item / c.parts % splits, item % c.parts);
#pragma omp for
    for (int64_t row = 0; row < batch * c.rows(); row++) merge(c, row / c.rows(), row % c.rows());
  }
}
