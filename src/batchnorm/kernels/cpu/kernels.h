// Drivers: they cut a tensor into parts, and share the parts among threads and caches.
// Included once per instruction set.
//
// The parts whose sums are merged (chunks) depend on the shape alone, never on the number of
// threads, so results are bitwise the same for any number. What does depend on it is only which
// thread visits a chunk.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>

#include <unistd.h>

#include "core.h"
#include "vec.h"
// vec.h first: the others build on it.
#include "activation.h"
#include "rows.h"

namespace batchnorm::BATCHNORM_ISA {

constexpr int64_t block_elements = 4096;    // summed in float lanes before going to float64
constexpr int64_t block_rows = 128;         // the same in columns, where a lane is a channel
constexpr int64_t chunk_elements = 65536;   // planes: the unit of work inside a channel
// Larger outputs go past the caches; of 16 bits those of so many times what a core has for itself, as
// whoever reads smaller ones next loses more than is saved.
constexpr int64_t stream_bytes = 512 << 10;
constexpr int64_t stream_short_caches = 2;
constexpr int64_t line_bytes = 64;          // what goes past them does so in whole lines:
constexpr int64_t stage_bytes = 8192;       // a piece of short rows is finished in L1 before
constexpr int64_t long_row_bytes = 1024;    // and of longer rows few lines are shared by two
constexpr int64_t serial_elements = 32768;  // below, waking threads costs more than the work
constexpr int64_t tile_columns = 1024;      // of a row, so many at a time: coefficients stay in L1
constexpr int64_t joined_columns = 512;     // short rows are taken together up to this width
constexpr int64_t group_channels = 32;      // planes: neighbours that are visited together
constexpr int64_t ahead_bytes = 4096;       // how far ahead large inputs are asked for in order
constexpr int64_t joined_rows = 8;          // planes: rows of a channel that are summed together,
constexpr int64_t joined_elements = 1024;   // up to so many elements
constexpr int64_t joined_run = 64;          // planes: shorter rows are written together, as columns are,
constexpr int64_t joined_at_once = 4;       // so many at a time, which load their coefficients once;
constexpr int64_t joined_visits = 16;       // longer ones if there are so many to pay for theirs

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a core has for itself.
inline int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t l2 = 0;
#endif
  return l2 > 0 ? l2 : 1 << 20;
}
// What one thread can read again before it leaves that.
inline int64_t kept_bytes() { return cache_bytes() / 4 * 3; }

inline bool is_large(const Shape& s, int64_t size) {
  return s.numel() * size >= (size < 4 ? stream_short_caches * cache_bytes() : stream_bytes);
}
// In elements: large inputs have left the cache since their sums were taken.
inline int64_t in_order_ahead(const Shape& s, int64_t size) {
  return is_large(s, size) ? ahead_bytes / size : 0;
}

template <class F>
void parallel(const Problem& p, int64_t count, F body) {
  if (count <= 1 || p.pool.threads <= 1 || p.shape.numel() < serial_elements) {
    if (count > 0) body(0, count);
    return;
  }
  p.pool.run(count, &body, [](void* f, int64_t begin, int64_t end) { (*(F*)f)(begin, end); });
}

template <class T>
struct Buffer {
  explicit Buffer(int64_t n)
      : data((T*)std::aligned_alloc(64, ceil_div(std::max<int64_t>(n, 1) * sizeof(T), 64) * 64)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T& operator[](int64_t i) { return data[i]; }
  T* data;
};

// Moments merge by Chan, Golub and LeVeque's formula.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void merge(const Moments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, delta = o.mean - mean;
    m2 += o.m2 + delta * delta * (count * o.count / total);
    mean += delta * (o.count / total);
    count = total;
  }
};

// From sums of d = x - shift and of d * d.
inline Moments shifted(double count, double shift, double sum, double square) {
  const double mean = sum / count;
  return {count, shift + mean, std::max(square - sum * mean, 0.0)};
}
// Float squares overflow around 1e19 and vanish around 1e-19: such moments are taken again.
template <class C>
inline bool doubtful(double count, double m2) {
  if constexpr (std::is_same_v<C, double>) return false;
  else return !(m2 < 1e37) | !(m2 > 1e-28 * count);  // without a branch, for loops over columns
}

// The slow way, in float64 and two passes, over any strides.
template <class T>
Moments careful(const T* x, int64_t rows, int64_t ld, int64_t len, int64_t step) {
  auto value = [&](int64_t r, int64_t i) {
    return (double)Simd<T>::load_n(x + r * ld + i * step, 1, 0)[0];
  };
  const double count = (double)rows * len;
  double sum = 0, m2 = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < len; ++i) sum += value(r, i);
  const double mean = sum / count;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < len; ++i) { const double d = value(r, i) - mean; m2 += d * d; }
  return {count, mean, m2};
}

// What a loop writes: y, or dx and dz, either of which may be null.
template <class T>
struct Outputs {
  T *first, *second;
  Outputs at(int64_t offset) const {
    return {first ? first + offset : nullptr, second ? second + offset : nullptr};
  }
};

// Whether rows, so many bytes apart, are streamed as they are written; if not, by way of a stage.
// A gate's bytes have to begin where lines do.
template <class T>
bool in_lines(const Outputs<T>& to, int64_t stride_bytes, int64_t row_bytes, bool gate) {
  const uintptr_t first = (uintptr_t)to.first, second = (uintptr_t)to.second;
  if (first && second && (first - second) % line_bytes) return false;
  const uintptr_t starts = (first ? first : second) | (uintptr_t)stride_bytes;
  return starts % line_bytes == 0 ||
         (row_bytes >= long_row_bytes && (!gate || starts % (8 * sizeof(T)) == 0));
}

// Where a piece is finished before it is streamed to its place.
constexpr int64_t stage_elements(int64_t size) { return stage_bytes / size; }
template <class T>
struct Stage {
  alignas(64) T data[2][stage_elements(sizeof(T))];
  Outputs<T> instead_of(const Outputs<T>& o) {
    return {o.first ? data[0] : nullptr, o.second ? data[1] : nullptr};
  }
  void flush(const Outputs<T>& to, int64_t count) const {
    if (to.first) stream_out(to.first, data[0], count * sizeof(T));
    if (to.second) stream_out(to.second, data[1], count * sizeof(T));
  }
};

// ---------------------------------------------------------------------------------- planes

struct PlaneChunk {
  int64_t row, rows, begin, len;  // rows [row, row + rows), elements [begin, begin + len) of each
};

struct Planes {
  explicit Planes(const Shape& s) : shape(s) {
    if (s.s > chunk_elements) {
      parts = ceil_div(s.s, chunk_elements);
      rows = 1;
      count = s.n * parts;
    } else {
      rows = std::max<int64_t>(1, chunk_elements / s.s);
      count = ceil_div(s.n, rows);
    }
  }
  PlaneChunk chunk(int64_t i) const {
    if (parts > 1) {
      const int64_t begin = i % parts * chunk_elements;
      return {i / parts, 1, begin, std::min(chunk_elements, shape.s - begin)};
    }
    return {i * rows, std::min(rows, shape.n - i * rows), 0, shape.s};
  }
  int64_t offset(int64_t row, int64_t channel) const { return (row * shape.c + channel) * shape.s; }

  // So many short rows are summed together, so that a channel's sums are loaded and stored once;
  static int64_t together(const PlaneChunk& k) {
    return std::clamp<int64_t>(joined_elements / k.len, 1, joined_rows);
  }
  // and behind these elements of a row float sums go to float64: after block_elements, or fewer.
  static bool ends_block(const PlaneChunk& k, int64_t row, int64_t end) {
    const int64_t some = together(k), rows = std::max<int64_t>(1, block_elements / (some * k.len)) * some;
    const int64_t done = row + 1 - k.row;
    return (end == k.len || end % block_elements == 0) && (done % rows == 0 || done == k.rows);
  }
  // visit(row, rows, begin, len): pieces of a chunk; after(): at the end of a block.
  template <class Visit, class After>
  void blocks(const PlaneChunk& k, Visit visit, After after) const {
    const int64_t most = together(k);
    for (int64_t r = k.row; r < k.row + k.rows; r += most) {
      const int64_t some = std::min(most, k.row + k.rows - r);
      for (int64_t at = 0; at < k.len; at += block_elements) {
        const int64_t len = std::min(block_elements, k.len - at);
        visit(r, some, k.begin + at, len);
        if (ends_block(k, r + some - 1, at + len)) after();
      }
    }
  }

  Shape shape;
  int64_t parts = 1, rows, count;
};

// first: part(c0, c1, chunk, out) takes a P of each channel of [c0, c1); finish(c, P) the merged one.
// second: apply(c0, c1, chunk, ahead, c2, out) normalises them and takes a P of each of [c1, c2), which
// come next. It asks for what lies `ahead` elements further on (0: for nothing).
template <class P, class Part, class Finish, class Apply>
void drive_planes(const Problem& p, const Planes& planes, int64_t tensors, int64_t size, bool first,
                  bool second, Part part, Finish finish, Apply apply) {
  const Shape& s = p.shape;
  if (!first) {
    // One visit: in the order of memory, row by row, short rows in runs.
    const int64_t run = std::clamp<int64_t>(stage_elements(size) / s.s, 1, s.c);
    const int64_t runs = ceil_div(s.c, run), parts = planes.parts;
    parallel(p, s.n * runs * parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i / parts % runs * run, n = i / parts / runs;
        const int64_t c1 = std::min(c0 + run, s.c);
        const int64_t index = n * parts + i % parts;
        apply(c0, c1, parts > 1 ? planes.chunk(index) : PlaneChunk{n, 1, 0, s.s}, 0, c1, nullptr);
      }
      stream_fence();
    });
    return;
  }
  if (s.c < 2 * p.pool.threads && planes.count > 1) {
    // Few channels: the chunks are shared, too.
    std::unique_ptr<P[]> partial(new P[s.c * planes.count]);
    parallel(p, s.c * planes.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i / planes.count;
        part(c, c + 1, i % planes.count, &partial[i]);
      }
    });
    for (int64_t c = 0; c < s.c; ++c) {
      P total;
      for (int64_t i = 0; i < planes.count; ++i) total.merge(partial[c * planes.count + i]);
      finish(c, total);
    }
    if (second)
      parallel(p, s.c * planes.count, [&](int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; --i) {
          const int64_t c = i / planes.count;
          apply(c, c + 1, planes.chunk(i % planes.count), 0, c + 1, nullptr);
        }
        stream_fence();
      });
    return;
  }
  // Neighbouring channels together, so that what is read and written is long runs; all of a group's
  // inputs stay in cache until they are read again, and the next group's arrive meanwhile.
  const int64_t channel_bytes = s.count() * size * tensors;
  int64_t group = std::max<int64_t>(
      1, std::min({kept_bytes() / 2 / std::max<int64_t>(channel_bytes, 1), stage_elements(size) / s.s,
                   group_channels, ceil_div(s.c, 2 * p.pool.threads)}));
  // Its rows start on lines, if they can.
  const int64_t unit = line_bytes / std::gcd(line_bytes, s.s * size);
  if (group > unit) group = group / unit * unit;
  // What is read ahead stays in L2 or in the cache behind it until its turn comes.
  const bool stays = second && channel_bytes <= 4 * kept_bytes();
  parallel(p, ceil_div(s.c, group), [&](int64_t begin, int64_t end) {
    P total[group_channels];
    std::unique_ptr<P[]> parts(new P[planes.count * group_channels]);
    const int64_t last = std::min(end * group, s.c);
    for (int64_t c0 = begin * group; c0 < last; c0 += group) {
      const int64_t c1 = std::min(c0 + group, last), c2 = stays ? std::min(c1 + group, last) : c1;
      if (!stays || c0 == begin * group)
        for (int64_t i = 0; i < planes.count; ++i) part(c0, c1, i, &parts[i * group_channels]);
      std::copy(&parts[0], &parts[c1 - c0], total);
      for (int64_t i = 1; i < planes.count; ++i)
        for (int64_t c = 0; c < c1 - c0; ++c) total[c].merge(parts[i * group_channels + c]);
      for (int64_t c = c0; c < c1; ++c) finish(c, total[c - c0]);
      if (second)
        for (int64_t i = planes.count - 1; i >= 0; --i)
          apply(c0, c1, planes.chunk(i), in_order_ahead(s, size), c2, &parts[i * group_channels]);
    }
    if (second) stream_fence();
  });
}

// The moments of channels [c0, c1) in a chunk.
template <class T>
struct PlaneMoments {
  using S = Simd<T>;
  using C = typename S::C;
  PlaneMoments(const T* x, const Planes& planes, int64_t c0, int64_t c1, const PlaneChunk& k)
      : x(x + planes.offset(k.row, c0) + k.begin), planes(planes), k(k), count(c1 - c0) {
    const int few = (int)std::min<int64_t>(k.len, S::W);
    for (int64_t c = 0; c < count; ++c) {
      const T* start = this->x + c * planes.shape.s;
      channels[c].m = (C)(S::sum(few == S::W ? S::load(start) : S::load_n(start, few, 0)) / few);
    }
  }
  void drain() {
    for (int64_t c = 0; c < count; ++c) {
      lanes[c].drain(sum[c], square[c]);
      lanes[c] = {};
    }
  }
  void take(Moments* out) const {
    for (int64_t c = 0; c < count; ++c) {
      out[c] = shifted((double)k.rows * k.len, channels[c].m, sum[c], square[c]);
      if (doubtful<C>(out[c].count, out[c].m2))
        out[c] = careful(x + c * planes.shape.s, k.rows, planes.shape.c * planes.shape.s, k.len, 1);
    }
  }

  const T* x;
  const Planes& planes;
  const PlaneChunk k;
  const int64_t count;
  Channel<C> channels[group_channels];  // m is the shift
  Lanes<S> lanes[group_channels];
  double sum[group_channels] = {}, square[group_channels] = {};
};

template <class T>
void plane_moments(const T* x, const Planes& planes, int64_t c0, int64_t c1, const PlaneChunk& k,
                   Moments* out) {
  PlaneMoments<T> of(x, planes, c0, c1, k);
  planes.blocks(
      k,
      [&](int64_t r, int64_t rows, int64_t begin, int64_t len) {
        const T* row = x + planes.offset(r, c0) + begin;
        for (int64_t c = 0; c < c1 - c0; ++c)
          moments_run<T>(row + c * planes.shape.s, rows, planes.shape.c * planes.shape.s, len,
                         of.channels[c].m, of.lanes[c]);
      },
      [&] { of.drain(); });
  of.take(out);
}

// The sums of some channels in a chunk.
template <class T>
struct PlaneSums {
  PlaneSums(int64_t count, Sums* out) : count(count), out(out) { std::fill(out, out + count, Sums{}); }
  void drain() {
    for (int64_t c = 0; c < count; ++c) {
      lanes[c].drain(out[c].dz, out[c].dz_d);
      lanes[c] = {};
    }
  }
  const int64_t count;
  Sums* out;
  Lanes<Simd<T>> lanes[group_channels];
};

// Calls run(offset, row, begin, len, out, past) for the pieces of a chunk of channels [c0, c1), and
// streams what it writes when asked; after() at the end of a block.
template <class T, class Run, class After>
void plane_pieces(const Planes& planes, int64_t c0, int64_t c1, const PlaneChunk& k, bool stream,
                  bool gate, const Outputs<T>& outputs, Run run, After after) {
  Stage<T> stage;
  const int64_t size = sizeof(T), capacity = stage_elements(size);
  const bool past = stream && in_lines(outputs.at(planes.offset(k.row, c0) + k.begin),
                                       planes.shape.s * size, k.len * size, gate);
  const bool staged = stream && !past;
  for (int64_t r = k.row; r < k.row + k.rows; ++r) {
    // Whole rows of several channels are one run of memory, which fits the stage.
    const int64_t start = planes.offset(r, c0) + k.begin;
    const int64_t step = c1 - c0 > 1 ? k.len : staged ? capacity : block_elements;
    for (int64_t i = 0; i < k.len; i += step) {
      const int64_t len = std::min(step, k.len - i);
      const Outputs<T> to = outputs.at(start + i), out = staged ? stage.instead_of(to) : to;
      run(start + i, r, k.begin + i, len, out, past);
      if (staged) stage.flush(to, len * (c1 - c0));
      if (planes.ends_block(k, r, i + len)) after();
    }
  }
}

// Rows of a few elements leave vectors half empty: those of neighbouring channels, one run of memory,
// are written as one, with a coefficient for each element; their gates are one run of bits meanwhile.
template <class T>
struct JoinedRows {
  using C = typename Simd<T>::C;
  // In 16 bits arithmetic takes the time, and of longer rows the coefficients cost more than the ends.
  static bool suits(const Shape& s, const PlaneChunk& k, int64_t c0, int64_t c1, bool gate) {
    const int64_t row_bytes = s.s * sizeof(T);
    const bool few = s.s < joined_run || (sizeof(T) >= 4 && row_bytes < long_row_bytes &&
                                          row_bytes % line_bytes);
    // Behind what is written up to the first line, the bits go on at a byte.
    const bool in_bytes = s.c * s.s % 8 == 0 && c0 * s.s % 8 == 0;
    const int64_t least = s.s < joined_run ? joined_at_once : joined_visits;
    return few && (!gate || in_bytes) && c1 - c0 > 1 && k.rows >= least;
  }
  JoinedRows(const Channel<C>* v, int64_t channels, int64_t s)
      : at_once(s < joined_run ? joined_at_once : 1) {
    for (int64_t c = 0; c < channels; ++c) {
      const C values[] = {v[c].m, v[c].a, v[c].b, v[c].k, v[c].c};
      for (int u = 0; u < 5; ++u) std::fill(data[u] + c * s, data[u] + (c + 1) * s, values[u]);
    }
  }
  Coefficients<C> coefficients() const { return {data[0], data[1], data[2], data[3], data[4]}; }
  alignas(64) C data[5][stage_elements(sizeof(T)) + 16];  // the last vector is read whole
  static constexpr int64_t gate_bytes = stage_elements(sizeof(T)) / 8 + 8;  // the last by the word
  uint8_t gate[joined_at_once][gate_bytes];
  const int64_t at_once;
};

template <class T>
void forward_planes(const Problem& p, const Forward& f, const ForwardLoops<T>& loops, bool moments,
                    bool normalize) {
  using C = typename Simd<T>::C;
  const Planes planes(p.shape);
  const bool stream = is_large(p.shape, sizeof(T));
  const int64_t gate_row = ceil_div(p.shape.s, 8);
  Buffer<Channel<C>> channels(normalize ? p.shape.c : 0);
  auto* x = (const T*)f.x;
  auto* residual = (const T*)f.residual;
  if (normalize && !moments)
    for (int64_t c = 0; c < p.shape.c; ++c) channels[c].forward(f.statistics, f.affine, c);
  auto apply = [&](int64_t c0, int64_t c1, const PlaneChunk& k, bool join,
                   const Following<Simd<T>>& following, auto after) {
    if (join) {
      JoinedRows<T> joined(&channels[c0], c1 - c0, p.shape.s);
      for (int64_t r = k.row; r < k.row + k.rows; r += joined.at_once) {
        const int64_t o = planes.offset(r, c0);
        const int64_t some = std::min(joined.at_once, k.row + k.rows - r);
        loops.columns(x + o, moved(residual, o), (T*)f.y + o, joined.gate[0],
                      {some, (c1 - c0) * p.shape.s, p.shape.c * p.shape.s, joined.gate_bytes},
                      joined.coefficients(), following.ahead, stream);
        if (loops.gate)
          for (int64_t u = 0; u < some; ++u)
            pad_rows(joined.gate[u], f.gate + ((r + u) * p.shape.c + c0) * gate_row, p.shape.s,
                     c1 - c0);
      }
      return;
    }
    plane_pieces<T>(
        planes, c0, c1, k, stream, loops.gate, {(T*)f.y, nullptr},
        [&](int64_t o, int64_t r, int64_t begin, int64_t len, const Outputs<T>& out, bool past) {
          uint8_t* gate =
              loops.gate ? f.gate + (r * p.shape.c + c0) * gate_row + begin / 8 : nullptr;
          loops.planes(x + o, moved(residual, o), out.first, gate, len, gate_row, c1 - c0,
                       &channels[c0], following, past);
        },
        after);
  };
  drive_planes<Moments>(
      p, planes, 1, sizeof(T), moments, normalize,
      [&](int64_t c0, int64_t c1, int64_t i, Moments* out) {
        plane_moments(x, planes, c0, c1, planes.chunk(i), out);
      },
      [&](int64_t c, const Moments& m) {
        f.statistics.mean[c] = m.mean;
        f.statistics.var[c] = m.m2 / m.count;
        if (normalize) channels[c].forward(f.statistics, f.affine, c);
      },
      [&](int64_t c0, int64_t c1, const PlaneChunk& k, int64_t ahead, int64_t c2, Moments* out) {
        const int64_t by = (c1 - c0) * p.shape.s;
        const bool joined = moments && JoinedRows<T>::suits(p.shape, k, c0, c1, loops.gate);
        if (joined || !loops.also || c1 == c2) {
          apply(c0, c1, k, joined, {c1 < c2 ? by : ahead}, [] {});
          if (c1 < c2) plane_moments(x, planes, c1, c2, k, out);
          return;
        }
        PlaneMoments<T> next(x, planes, c1, c2, k);
        apply(c0, c1, k, false,
              {p.shape.c * p.shape.s, by, 0, c2 - c1, next.channels, next.lanes},
              [&] { next.drain(); });
        next.take(out);
      });
}

template <class T>
void backward_planes(const Problem& p, const Backward& f, const BackwardLoops<T>& loops,
                     const Means* means, bool sums) {
  using S = Simd<T>;
  using C = typename S::C;
  const Planes planes(p.shape);
  const bool stream = is_large(p.shape, sizeof(T));
  const int64_t gate_row = ceil_div(p.shape.s, 8);
  Buffer<Channel<C>> channels(p.shape.c);
  auto* x = (const T*)f.x;
  auto* dy = (const T*)f.dy;
  auto* residual = (const T*)f.residual;
  auto gate = [&](int64_t r, int64_t c, int64_t begin) {
    return loops.gate ? f.gate + (r * p.shape.c + c) * gate_row + begin / 8 : nullptr;
  };
  for (int64_t c = 0; c < p.shape.c; ++c) {
    channels[c].forward(f.statistics, f.affine, c);
    if (means) channels[c].backward(f.statistics, c, means->of_dz(c), means->of_dz_xhat(c));
  }
  auto sums_of = [&](int64_t c0, int64_t c1, const PlaneChunk& k, Sums* out) {
    PlaneSums<T> of(c1 - c0, out);
    planes.blocks(
        k,
        [&](int64_t r, int64_t rows, int64_t begin, int64_t len) {
          const int64_t o = planes.offset(r, c0) + begin;
          loops.sums(dy + o, x + o, moved(residual, o), gate(r, c0, begin), rows, len, gate_row,
                     c1 - c0, p.shape.s, p.shape.c, &channels[c0], of.lanes);
        },
        [&] { of.drain(); });
  };
  auto apply = [&](int64_t c0, int64_t c1, const PlaneChunk& k, bool join,
                   const Following<S>& following, auto after) {
    if (join) {
      JoinedRows<T> joined(&channels[c0], c1 - c0, p.shape.s);
      for (int64_t r = k.row; r < k.row + k.rows; r += joined.at_once) {
        const int64_t o = planes.offset(r, c0);
        const int64_t some = std::min(joined.at_once, k.row + k.rows - r);
        if (loops.gate)
          for (int64_t u = 0; u < some; ++u)
            join_rows(gate(r + u, c0, 0), joined.gate[u], p.shape.s, c1 - c0);
        loops.columns(dy + o, x + o, moved(residual, o), joined.gate[0], moved((T*)f.dx, o),
                      moved((T*)f.dz, o),
                      {some, (c1 - c0) * p.shape.s, p.shape.c * p.shape.s, joined.gate_bytes},
                      joined.coefficients(), following.ahead, stream);
      }
      return;
    }
    plane_pieces<T>(
        planes, c0, c1, k, stream, loops.gate, {(T*)f.dx, (T*)f.dz},
        [&](int64_t o, int64_t r, int64_t begin, int64_t len, const Outputs<T>& out, bool past) {
          loops.planes(dy + o, x + o, moved(residual, o), gate(r, c0, begin), out.first, out.second,
                       len, gate_row, c1 - c0, &channels[c0], following, past);
        },
        after);
  };
  drive_planes<Sums>(
      p, planes, 2 + loops.residual, sizeof(T), sums, f.dx || f.dz,
      [&](int64_t c0, int64_t c1, int64_t i, Sums* out) { sums_of(c0, c1, planes.chunk(i), out); },
      [&](int64_t c, const Sums& s) {
        const double count = (double)p.shape.count();
        f.sum_dz[c] = s.dz;
        f.sum_dz_xhat[c] = channels[c].xhat_sum(s, f.statistics, c);
        channels[c].backward(f.statistics, c, s.dz / count, f.sum_dz_xhat[c] / count);
      },
      [&](int64_t c0, int64_t c1, const PlaneChunk& k, int64_t ahead, int64_t c2, Sums* out) {
        const int64_t by = (c1 - c0) * p.shape.s;
        const bool joined = sums && JoinedRows<T>::suits(p.shape, k, c0, c1, loops.gate);
        if (joined || !loops.also || c1 == c2) {
          apply(c0, c1, k, joined, {c1 < c2 ? by : ahead}, [] {});
          if (c1 < c2) sums_of(c1, c2, k, out);
          return;
        }
        PlaneSums<T> next(c2 - c1, out);
        apply(c0, c1, k, false,
              {p.shape.c * p.shape.s, by, (c1 - c0) * gate_row, c2 - c1, &channels[c1], next.lanes},
              [&] { next.drain(); });
      });
}

// --------------------------------------------------------------------------------- columns

// Rows of `width` elements; element j belongs to channel (j / span) % c. Two tricks keep vectors
// full and loops long: several short rows are taken as one, and short runs of contiguous N,C,*
// (2x2, 3x3) are columns of their own. Columns are merged into channels afterwards.
struct Columns {
  explicit Columns(const Shape& s, bool gate) : c(s.c) {
    if (s.columns) {
      // A row of the gate must start on a byte; and columns cost something each, to be paid by rows.
      const int64_t repeat =
          gate && s.c % 8
              ? 1
              : std::max<int64_t>(1, std::min(s.n / 256, joined_columns / s.c));
      span = 1;
      width = s.c * repeat;
      rows = s.n / repeat;
      tail = s.n % repeat * s.c;
    } else {
      span = s.s;
      width = s.c * s.s;
      rows = s.n;
      tail = 0;
    }
    const int64_t most = std::clamp<int64_t>(131072 / std::min(width, tile_columns), block_rows, 8192);
    chunks = std::max<int64_t>(1, ceil_div(rows, most));
    // As many for each of 2, 4 or 8 threads.
    if (chunks > 1) chunks = ceil_div(chunks, chunks < 8 ? 2 : 8) * (chunks < 8 ? 2 : 8);
    chunk_rows = ceil_div(rows, chunks);
    chunks = std::max<int64_t>(1, ceil_div(rows, chunk_rows));
  }
  static bool suits(const Shape& s) { return s.columns || s.s < short_run; }
  int64_t begin(int64_t chunk) const { return chunk * chunk_rows; }
  int64_t count(int64_t chunk) const { return std::min(chunk_rows, rows - begin(chunk)); }
  // Elements of the unfinished last row that fall to columns [j0, j1) of a chunk.
  int64_t left(int64_t chunk, int64_t j0, int64_t j1) const {
    return chunk == chunks - 1 ? std::clamp<int64_t>(tail - j0, 0, j1 - j0) : 0;
  }
  int64_t channel(int64_t j) const { return j / span % c; }
  // visit(channel, j): the first column of each channel that has columns in [j0, j1).
  template <class Visit>
  void channels(int64_t j0, int64_t j1, Visit visit) const {
    for (int64_t j = j0; j < std::min(j1, j0 + c * span); j += span) visit(channel(j), j);
  }
  int64_t gate_row() const { return ceil_div(width, 8); }

  int64_t c, span, width, rows, tail, chunk_rows, chunks;
};

// first: part(j0, j1, chunk); finish(j0, j1); second: apply(j0, j1, chunk, whether that is in cache).
template <class Part, class Finish, class Apply>
void drive_columns(const Problem& p, const Columns& k, int64_t tensors, int64_t size, bool first,
                   bool second, Part part, Finish finish, Apply apply) {
  // Tiles hold whole channels and start on a byte of the gate.
  const int64_t unit = std::lcm(k.span, int64_t(8));
  auto whole_channels = [&](int64_t w) {
    return k.width == k.c * k.span ? std::min(k.width, std::max(unit, w / unit * unit)) : k.width;
  };
  // With few rows a narrow tile stays in cache for the second visit. With many it would not: their
  // distance is mostly a power of two, which puts them into a few sets of the cache. Then
  // everything is streamed twice, the second time backwards.
  const int64_t fits = kept_bytes() / (std::max<int64_t>(k.rows, 1) * size * tensors);
  const int64_t share = ceil_div(k.width, p.pool.threads);
  const int64_t narrow =
      whole_channels(std::min({fits, tile_columns, std::max<int64_t>(share, 64)}));
  const bool tiled = k.rows <= 512 && fits >= 64 && ceil_div(k.width, narrow) >= p.pool.threads;
  if (tiled && first && second) {
    parallel(p, ceil_div(k.width, narrow), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j0 = t * narrow, j1 = std::min(j0 + narrow, k.width);
        for (int64_t i = 0; i < k.chunks; ++i) part(j0, j1, i);
        finish(j0, j1);
        for (int64_t i = k.chunks - 1; i >= 0; --i) apply(j0, j1, i, true);
      }
      stream_fence();
    });
    return;
  }
  const int64_t wide = whole_channels(tile_columns);
  const int64_t tiles = ceil_div(k.width, wide);
  auto each = [&](int64_t i, auto visit, auto... more) {
    const int64_t j0 = i % tiles * wide;
    visit(j0, std::min(j0 + wide, k.width), i / tiles, more...);
  };
  if (first) {
    parallel(p, tiles * k.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) each(i, part);
    });
    parallel(p, tiles, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        each(i, [&](int64_t j0, int64_t j1, int64_t) { finish(j0, j1); });
    });
  }
  if (second)
    parallel(p, tiles * k.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) each(i, apply, false);
      stream_fence();
    });
}

// Coefficients by column.
template <class C>
struct ColumnCoefficients {
  explicit ColumnCoefficients(const Columns& k)
      : columns(k), padded(ceil_div(k.width, 16) * 16 + 16), data(5 * padded) {}
  void set(int64_t j0, int64_t j1, const Channel<C>& v) {
    for (int64_t j = j0; j < j1; ++j) {
      data[j] = v.m;
      data[padded + j] = v.a;
      data[2 * padded + j] = v.b;
      data[3 * padded + j] = v.k;
      data[4 * padded + j] = v.c;
    }
  }
  // value(channel) for the columns [j0, j1), whole channels of them.
  template <class Value>
  void fill(int64_t j0, int64_t j1, Value value) {
    int64_t c = columns.channel(j0);  // counted on, as a division takes longer than the rest
    for (int64_t j = j0; j < j1; j += columns.span) {
      set(j, j + columns.span, value(c));
      if (++c == columns.c) c = 0;
    }
  }
  Coefficients<C> refer(int64_t j) const {
    C* d = data.data + j;
    return {d, d + padded, d + 2 * padded, d + 3 * padded, d + 4 * padded};
  }
  const Columns& columns;
  int64_t padded;
  Buffer<C> data;
};

// Partial results of the chunks, by column.
struct Partial {
  explicit Partial(const Columns& k) : columns(k), data(2 * k.chunks * k.width) {}
  double* first(int64_t chunk) { return data.data + 2 * chunk * columns.width; }
  double* second(int64_t chunk) { return first(chunk) + columns.width; }
  double count(int64_t chunk, int64_t j) const {
    return (double)(columns.count(chunk) + columns.left(chunk, j, j + 1));
  }
  const Columns& columns;
  Buffer<double> data;
};

// Float sums of a block of rows into float64: block(row, rows, width, s, q).
template <class C, class Block>
void column_sums(const Columns& k, int64_t j0, int64_t j1, int64_t chunk, double* sum,
                 double* square, Block block) {
  constexpr int64_t most = tile_columns + 64;
  alignas(64) C s[most], q[most];
  const int64_t width = j1 - j0;
  auto add = [&](int64_t row, int64_t rows, int64_t some) {
    std::fill(s, s + ceil_div(width, 16) * 16, C(0));
    std::fill(q, q + ceil_div(width, 16) * 16, C(0));
    block(row, rows, some, s, q);
    for (int64_t j = 0; j < some; ++j) { sum[j] += s[j]; square[j] += q[j]; }
  };
  std::fill(sum, sum + width, 0.0);
  std::fill(square, square + width, 0.0);
  const int64_t begin = k.begin(chunk), end = begin + k.count(chunk);
  for (int64_t r = begin; r < end; r += block_rows) add(r, std::min(block_rows, end - r), width);
  if (const int64_t some = k.left(chunk, j0, j1)) add(k.rows, 1, some);
}

template <class T>
void column_moments(const T* x, const Columns& k, int64_t j0, int64_t j1, int64_t chunk,
                    Partial& partial) {
  using C = typename Simd<T>::C;
  alignas(64) C shift[tile_columns + 64], unused[tile_columns + 64];
  const int64_t width = j1 - j0, few = std::min<int64_t>(k.count(chunk), 4);
  const T* start = x + k.begin(chunk) * k.width + j0;
  double* mean = partial.first(chunk) + j0;
  double* m2 = partial.second(chunk) + j0;
  std::fill(unused, unused + ceil_div(width, 16) * 16, C(0));
  std::fill(shift, shift + ceil_div(width, 16) * 16, C(0));
  if (few) {
    alignas(64) C zero[tile_columns + 64] = {};
    moments_columns<T>(start, k.width, few, width, zero, shift, unused);
    for (int64_t j = 0; j < width; ++j) shift[j] *= C(1) / few;
  }
  column_sums<C>(k, j0, j1, chunk, mean, m2,
                 [&](int64_t row, int64_t rows, int64_t some, C* s, C* q) {
                   moments_columns<T>(x + row * k.width + j0, k.width, rows, some, shift, s, q);
                 });
  // Columns of equal counts together: the loop over them has neither divisions nor branches.
  const int64_t split = k.left(chunk, j0, j1);
  for (const auto& [from, to] : {std::pair{int64_t(0), split}, std::pair{split, width}}) {
    if (from == to) continue;
    const double count = partial.count(chunk, j0 + from), inverse = count > 0 ? 1 / count : 0;
    int64_t doubtfuls = 0;
    for (int64_t j = from; j < to; ++j) {
      const double mu = mean[j] * inverse, square = m2[j] - mean[j] * mu;
      mean[j] = shift[j] + mu;
      m2[j] = square > 0 ? square : 0;
      doubtfuls += doubtful<C>(count, m2[j]);
    }
    if (!doubtfuls || count == 0) continue;
    for (int64_t j = from; j < to; ++j)
      if (doubtful<C>(count, m2[j])) {
        const Moments m = careful(start + j, (int64_t)count, k.width, 1, 1);
        mean[j] = m.mean;
        m2[j] = m.m2;
      }
  }
}

// Merges the chunks of columns [j0, j1) into the first chunk's place.
inline void merge_moments(const Columns& k, int64_t j0, int64_t j1, Partial& partial) {
  // Columns of equal counts share the weights, so the loop over them is free of divisions.
  const int64_t split = std::clamp(k.tail, j0, j1);
  for (const auto& [from, to] : {std::pair{j0, split}, std::pair{split, j1}}) {
    if (from == to) continue;
    double count = partial.count(0, from);
    double *mean = partial.first(0), *m2 = partial.second(0);
    for (int64_t i = 1; i < k.chunks; ++i) {
      const double more = partial.count(i, from), share = more / (count + more);
      const double *other = partial.first(i), *other2 = partial.second(i);
      for (int64_t j = from; j < to; ++j) {
        const double delta = other[j] - mean[j];
        m2[j] += other2[j] + delta * delta * (count * share);
        mean[j] += delta * share;
      }
      count += more;
    }
  }
}

// The sum over `span` columns of value(at), where at(p) reads p[0], p[1], ... in vectors.
template <class Value>
inline double sum_columns(int64_t span, Value value) {
  using S = OfDouble;
  S::V sum = {};
  int64_t i = 0;
  for (; i + S::W <= span; i += S::W) sum += value([&](const double* p) { return S::load_c(p + i); });
  double total = span >= S::W ? S::sum(sum) : 0;
  for (; i < span; ++i) total += value([&](const double* p) { return p[i]; });
  return total;
}

// The moments of one channel from its columns, the first of which is j.
inline Moments pool_columns(const Columns& k, int64_t j, int64_t j1, const double* mean,
                            const double* m2) {
  // Around the first column's mean, in two passes; no division inside.
  const double centre = mean[j];
  auto weighted = [&](auto deviation) {
    double sum = 0;
    for (int64_t u = j; u < j1; u += k.c * k.span)
      sum += (double)(k.rows + (u < k.tail)) *
             sum_columns(k.span, [&](auto at) { return deviation(at(mean + u)); });
    return sum;
  };
  double count = 0, within = 0;
  for (int64_t u = j; u < j1; u += k.c * k.span) {
    count += (double)k.span * (double)(k.rows + (u < k.tail));
    within += sum_columns(k.span, [&](auto at) { return at(m2 + u); });
  }
  const double shift = weighted([&](auto v) { return v - centre; }) / count;
  const double between = weighted([&](auto v) { return (v - centre - shift) * (v - centre - shift); });
  return {count, centre + shift, within + between};
}

// Calls run(offset, row, rows, len, out, past) for the rows of a chunk, and streams what it writes when
// asked: several at a time where they are in cache already, as memory is best read in order, or where
// they fit the stage.
template <class T, class Run>
void column_pieces(const Columns& k, int64_t j0, int64_t j1, int64_t chunk, bool cached, bool stream,
                   bool gate, const Outputs<T>& outputs, Run run) {
  Stage<T> stage;
  const int64_t width = j1 - j0;
  const int64_t begin = k.begin(chunk), end = begin + k.count(chunk), size = sizeof(T);
  const bool past = stream && in_lines(outputs.at(j0), k.width * size, width * size, gate);
  const bool staged = stream && !past;
  auto piece = [&](int64_t row, int64_t rows, int64_t len) {
    const int64_t start = row * k.width + j0;
    const Outputs<T> to = outputs.at(start), out = staged ? stage.instead_of(to) : to;
    run(start, row, rows, len, out, past);
    if (staged) stage.flush(to, (rows - 1) * width + len);
  };
  const int64_t fit = std::max<int64_t>(1, stage_elements(sizeof(T)) / width);
  const int64_t some = (staged ? width == k.width : cached) ? fit : 1;
  for (int64_t row = begin; row < end; row += some) piece(row, std::min(some, end - row), width);
  if (const int64_t rest = k.left(chunk, j0, j1)) piece(k.rows, 1, rest);
}

template <class T>
void forward_columns(const Problem& p, const Forward& f, const ForwardLoops<T>& loops, bool moments,
                     bool normalize) {
  using C = typename Simd<T>::C;
  const Columns k(p.shape, loops.gate);
  const bool stream = is_large(p.shape, sizeof(T));
  const int64_t ahead = moments ? in_order_ahead(p.shape, sizeof(T)) : 0;
  auto* x = (const T*)f.x;
  auto* residual = (const T*)f.residual;
  ColumnCoefficients<C> coefficients(k);
  Partial partial(k);
  auto coefficient = [&](int64_t c) {
    Channel<C> v;
    v.forward(f.statistics, f.affine, c);
    return v;
  };
  if (!moments) coefficients.fill(0, k.width, coefficient);
  drive_columns(
      p, k, 1, sizeof(T), moments, normalize,
      [&](int64_t j0, int64_t j1, int64_t i) { column_moments(x, k, j0, j1, i, partial); },
      [&](int64_t j0, int64_t j1) {
        merge_moments(k, j0, j1, partial);
        k.channels(j0, j1, [&](int64_t c, int64_t j) {
          const Moments m = k.span == 1 && k.width == k.c
                                ? Moments{(double)k.rows, partial.first(0)[j], partial.second(0)[j]}
                                : pool_columns(k, j, j1, partial.first(0), partial.second(0));
          f.statistics.mean[c] = m.mean;
          f.statistics.var[c] = m.m2 / m.count;
        });
        if (normalize) coefficients.fill(j0, j1, coefficient);
      },
      [&](int64_t j0, int64_t j1, int64_t i, bool cached) {
        column_pieces<T>(
            k, j0, j1, i, cached, stream, loops.gate, {(T*)f.y, nullptr},
            [&](int64_t o, int64_t row, int64_t rows, int64_t len, const Outputs<T>& out, bool past) {
              loops.columns(x + o, moved(residual, o), out.first,
                            loops.gate ? f.gate + row * k.gate_row() + j0 / 8 : nullptr,
                            {rows, len, k.width, k.gate_row()}, coefficients.refer(j0), ahead,
                            past);
            });
      });
}

template <class T>
void backward_columns(const Problem& p, const Backward& f, const BackwardLoops<T>& loops,
                      const Means* means, bool sums) {
  using C = typename Simd<T>::C;
  const Columns k(p.shape, loops.gate);
  const bool stream = is_large(p.shape, sizeof(T));
  const int64_t ahead = sums ? in_order_ahead(p.shape, sizeof(T)) : 0;
  auto* x = (const T*)f.x;
  auto* dy = (const T*)f.dy;
  auto* residual = (const T*)f.residual;
  ColumnCoefficients<C> coefficients(k);
  Partial partial(k);
  Buffer<Channel<C>> channels(k.c);
  for (int64_t c = 0; c < k.c; ++c) {
    channels[c].forward(f.statistics, f.affine, c);
    if (means) channels[c].backward(f.statistics, c, means->of_dz(c), means->of_dz_xhat(c));
  }
  const auto coefficient = [&](int64_t c) -> const Channel<C>& { return channels[c]; };
  coefficients.fill(0, k.width, coefficient);
  auto gate = [&](int64_t row, int64_t j) {
    return loops.gate ? f.gate + row * k.gate_row() + j / 8 : nullptr;
  };
  drive_columns(
      p, k, 2 + loops.residual, sizeof(T), sums, f.dx || f.dz,
      [&](int64_t j0, int64_t j1, int64_t i) {
        column_sums<C>(k, j0, j1, i, partial.first(i) + j0, partial.second(i) + j0,
                       [&](int64_t row, int64_t rows, int64_t some, C* s, C* q) {
          const int64_t o = row * k.width + j0;
          loops.column_sums(dy + o, x + o, moved(residual, o), gate(row, j0),
                            k.width, k.gate_row(), rows, some, coefficients.refer(j0), s, q);
        });
      },
      [&](int64_t j0, int64_t j1) {
        for (int64_t i = 1; i < k.chunks; ++i)
          for (int64_t j = j0; j < j1; ++j) {
            partial.first(0)[j] += partial.first(i)[j];
            partial.second(0)[j] += partial.second(i)[j];
          }
        k.channels(j0, j1, [&](int64_t c, int64_t j) {
          Sums total;
          for (int64_t u = j; u < j1; u += k.c * k.span)
            total.merge({sum_columns(k.span, [&](auto at) { return at(partial.first(0) + u); }),
                         sum_columns(k.span, [&](auto at) { return at(partial.second(0) + u); })});
          const double count = (double)p.shape.count();
          f.sum_dz[c] = total.dz;
          f.sum_dz_xhat[c] = channels[c].xhat_sum(total, f.statistics, c);
          channels[c].backward(f.statistics, c, total.dz / count, f.sum_dz_xhat[c] / count);
        });
        coefficients.fill(j0, j1, coefficient);
      },
      [&](int64_t j0, int64_t j1, int64_t i, bool cached) {
        column_pieces<T>(
            k, j0, j1, i, cached, stream, loops.gate, {(T*)f.dx, (T*)f.dz},
            [&](int64_t o, int64_t row, int64_t rows, int64_t len, const Outputs<T>& out, bool past) {
              loops.columns(dy + o, x + o, moved(residual, o), gate(row, j0), out.first, out.second,
                            {rows, len, k.width, k.gate_row()}, coefficients.refer(j0), ahead,
                            past);
            });
      });
}

// ------------------------------------------------------------------------------- selection

template <class Visit>
void with_type(Type type, Visit visit) {
#if defined(__AVX512BF16__)
  if (type == Type::bf16) visit(bf16{});  // kernels(type) asks for no other
#else
  switch (type) {
    case Type::f32: return visit(float{});
    case Type::f64: return visit(double{});
    case Type::bf16: return visit(bf16{});
    case Type::f16: return visit(f16{});
  }
#endif
}

template <Activation A>
using activation = std::integral_constant<Activation, A>;

template <class Visit>
void with_activation(Activation a, Visit visit) {
  switch (a) {
    case Activation::none: return visit(activation<Activation::none>{});
    case Activation::relu: return visit(activation<Activation::relu>{});
    case Activation::relu6: return visit(activation<Activation::relu6>{});
    case Activation::leaky_relu: return visit(activation<Activation::leaky_relu>{});
    case Activation::silu: return visit(activation<Activation::silu>{});
    case Activation::gelu: return visit(activation<Activation::gelu>{});
    case Activation::hardswish: return visit(activation<Activation::hardswish>{});
  }
}

void forward_any(const Problem& p, const Forward& f, bool moments, bool normalize) {
  with_type(p.type, [&](auto t) {
    using T = decltype(t);
    ForwardLoops<T> loops{};
    with_activation(p.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      loops = f.residual ? ForwardLoops<T>::template of<A, true, false>()
                         : ForwardLoops<T>::template of<A, false, false>();
      if constexpr (Act<Simd<T>, A>::has_gate)
        if (f.gate) loops = ForwardLoops<T>::template of<A, true, true>();
    });
    if (Columns::suits(p.shape)) forward_columns<T>(p, f, loops, moments, normalize);
    else forward_planes<T>(p, f, loops, moments, normalize);
  });
}

void backward_any(const Problem& p, const Backward& f, const Means* means, bool sums) {
  with_type(p.type, [&](auto t) {
    using T = decltype(t);
    BackwardLoops<T> loops{};
    with_activation(p.activation, [&](auto a) {
      constexpr Activation A = decltype(a)::value;
      using From = Preactivation;
      loops = BackwardLoops<T>::template of<A, From::from_x>();
      if constexpr (A != Activation::none)
        if (f.preactivation == From::from_residual)
          loops = BackwardLoops<T>::template of<A, From::from_residual>();
      if constexpr (Act<Simd<T>, A>::has_gate)
        if (f.preactivation == From::from_gate)
          loops = BackwardLoops<T>::template of<A, From::from_gate>();
    });
    if (Columns::suits(p.shape)) backward_columns<T>(p, f, loops, means, sums);
    else backward_planes<T>(p, f, loops, means, sums);
  });
}

void moments(const Problem& p, const void* x, Statistics statistics) {
  forward_any(p, {x, nullptr, statistics, {}, nullptr, nullptr}, true, false);
}
void normalize(const Problem& p, const Forward& f) { forward_any(p, f, false, true); }
void forward(const Problem& p, const Forward& f) { forward_any(p, f, true, true); }
void backward_sums(const Problem& p, const Backward& f) { backward_any(p, f, nullptr, true); }
void backward_apply(const Problem& p, const Backward& f, const Means& means) {
  backward_any(p, f, &means, false);
}
void backward(const Problem& p, const Backward& f) { backward_any(p, f, nullptr, true); }

#define BATCHNORM_STRING(name) #name
#define BATCHNORM_NAME(name) BATCHNORM_STRING(name)

extern const Kernels table;
const Kernels table = {BATCHNORM_NAME(BATCHNORM_ISA), moments,        normalize, forward,
                       backward_sums,                 backward_apply, backward};

}  // namespace batchnorm::BATCHNORM_ISA
