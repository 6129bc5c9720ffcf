// The fused CPU engine: runs a list of operations (plan.py) on one image at a time, in one arena, in fp32.
//
// Layout. A feature map is a set of planes, one per channel. A plane holds its rows one behind the other, with a gap of
// zeros behind each row and above and below the map where a convolution reads over the edge. The lanes of a vector are
// *pixels*, never channels, so a group of 8 channels fills the arithmetic units as well as a dense layer.
//
// A convolution is a list of `depth` taps: offsets into the planes of its group, one weight each. Kernel size, dilation,
// and, over planes that are split into phases, stride: all of it is in the offsets. One micro-kernel serves them all: it
// keeps a tile of BLOCK output channels x TILE vectors of pixels in registers, multiplies, and applies everything that
// follows the convolution (norm, activation, residual, the cycle's subtraction) before it stores the tile once.
//
// The file is compiled once per instruction set: LANES is 16 (AVX-512), 8 (AVX2 and FMA) or 4 (any machine).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int L = LANES;
constexpr int BLOCK = L == 16 ? 8 : 4;  // 8 x 3 accumulators fill 32 registers, 4 x 3 fill 16
constexpr int TILE = 3;
constexpr int DEPTH_BLOCK = 256;  // taps whose pixels stay in the first-level cache while all output blocks use them
constexpr int64_t SCRATCH_FLOATS = 4096;

typedef float vec __attribute__((vector_size(4 * L)));
typedef float loose __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef int32_t iloose __attribute__((vector_size(4 * L), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
INLINE vec splat(float s) { return s - vec{}; }
INLINE void store_part(float* p, vec v, int lanes) {
  alignas(64) float kept[L];
  *reinterpret_cast<vec*>(kept) = v;
  for (int i = 0; i < lanes; ++i) p[i] = kept[i];
}
// Comparisons are written so that a NaN survives.
INLINE vec at_least(vec v, vec low) { return low > v ? low : v; }
INLINE vec at_most(vec v, vec high) { return high < v ? high : v; }

// e^x to about 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, times 2^n.
INLINE vec exponential(vec x) {
  const vec clamped = at_most(at_least(x, splat(-87.3f)), splat(88.3f));
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (clamped * 1.44269504f + shift) - shift;
  const vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec finite = x == x ? n : vec{};
  const ivec power = (__builtin_convertvector(finite, ivec) + 127) << 23;
  return x > 88.72f ? splat(__builtin_inff()) : p * (vec)power;
}
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE vec hyperbolic_tangent(vec x) { return 1.0f - 2.0f / (1.0f + exponential(x + x)); }
// The error function by Abramowitz and Stegun 7.1.26: absolute error below 2e-7.
INLINE vec error_function(vec x) {
  const vec a = x < 0.0f ? -x : x;
  const vec t = 1.0f / (1.0f + 0.3275911f * a);
  vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec y = 1.0f - p * t * exponential(-a * a);
  return x < 0.0f ? -y : y;
}

enum StepKind : int32_t {
  ADD, SUBTRACT, SUBTRACT_FROM, MULTIPLY,                                  // with a map of the same size
  CHANNEL_ADD, CHANNEL_SUBTRACT, CHANNEL_SUBTRACT_FROM, CHANNEL_MULTIPLY,  // with one number per channel, computed
  AFFINE,                                                                  // scale[c] v + shift[c], constants
  RELU, CLAMP, LEAKY_RELU, HARD_SIGMOID, HARD_SWISH, SIGMOID, SILU, TANH, GELU, GELU_TANH, ELU
};

struct Step {  // one thing that happens to a result before it is stored
  int32_t kind;
  float a, b;      // bounds or slope of an activation
  int64_t offset;  // of the other operand in the arena
  const float* scale;
  const float* shift;
};

enum OpKind : int32_t { CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE_POOL, MEAN, MAP, PHASES, RESIZE, ZERO, FLATTEN, LOAD, STORE };

struct Op {
  int32_t kind, steps_count;
  const Step* steps;
  int64_t x, y;              // offset of the first pixel in the arena
  int64_t x_plane, y_plane;  // from channel to channel
  int32_t x_row, y_row;      // from row to row
  int32_t in_channels, in_height, in_width;
  int32_t channels, height, width;
  // A convolution walks `rows` rows of `length` pixels; where input and output have the same row distance, a single long one.
  int32_t groups, depth, rows, length;
  int32_t exact, port, ahead;  // exact: nothing may be written behind the end of a row; port: which tensor LOAD and STORE mean
  const int32_t* taps;
  const float* weight;  // [group][block of outputs][tap][output]
  const float* bias;
  const int32_t* mask;  // zeroes what lies in the gaps; null if nobody reads them
  // Windows: depthwise convolutions and pooling. `phases`: (row, column) pairs in `taps`, `depth` of them.
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t multiplier;
};

// Activations with an exponential, apart from the rest: they are rare, and inlined everywhere they would fill the cache.
__attribute__((noinline)) vec curve(const Step& s, vec v) {
  switch (s.kind) {
    case SIGMOID: return sigmoid(v);
    case SILU: return v * sigmoid(v);
    case TANH: return hyperbolic_tangent(v);
    case GELU: return 0.5f * v * (1.0f + error_function(v * 0.70710678f));
    case GELU_TANH: return 0.5f * v * (1.0f + hyperbolic_tangent(0.79788456f * (v + 0.044715f * v * v * v)));
    default: return v < 0.0f ? s.a * (exponential(v) - 1.0f) : v;  // ELU
  }
}

// Apply the steps to a tile: element (i, j) lies at offset at + i * spread + j * L of a map, in channel + i * next_channel.
// With CHANNEL_LANES the map is a vector of channels, and its lanes are channels.
template <int N, int M, bool CHANNEL_LANES = false>
INLINE void finish(vec (&acc)[N][M], const Op& op, float* arena, int64_t at, int64_t spread, int channel, int next_channel) {
#define EACH(expression)                            \
  UNROLL for (int i = 0; i < N; ++i)                \
      UNROLL for (int j = 0; j < M; ++j) {          \
    const vec v = acc[i][j];                        \
    acc[i][j] = (expression);                       \
  }                                                 \
  break;
#define OPERAND load(arena + s.offset + at + i * spread + j * L)
#define PER_CHANNEL(p) (CHANNEL_LANES ? load((p) + channel + j * L) : splat((p)[channel + i * next_channel]))
  for (int k = 0; k < op.steps_count; ++k) {
    const Step& s = op.steps[k];
    switch (s.kind) {
      case RELU: EACH(at_least(v, vec{}))
      case ADD: EACH(v + OPERAND)
      case SUBTRACT: EACH(v - OPERAND)
      case SUBTRACT_FROM: EACH(OPERAND - v)
      case MULTIPLY: EACH(v * OPERAND)
      case CHANNEL_ADD: EACH(v + PER_CHANNEL(arena + s.offset))
      case CHANNEL_SUBTRACT: EACH(v - PER_CHANNEL(arena + s.offset))
      case CHANNEL_SUBTRACT_FROM: EACH(PER_CHANNEL(arena + s.offset) - v)
      case CHANNEL_MULTIPLY: EACH(v * PER_CHANNEL(arena + s.offset))
      case AFFINE: EACH(v * PER_CHANNEL(s.scale) + PER_CHANNEL(s.shift))
      case CLAMP: EACH(at_most(at_least(v, splat(s.a)), splat(s.b)))
      case LEAKY_RELU: EACH(v < 0.0f ? v * s.a : v)
      case HARD_SIGMOID: EACH(at_most(at_least(v + 3.0f, vec{}), splat(6.0f)) * (1.0f / 6.0f))
      case HARD_SWISH: EACH(v * (at_most(at_least(v + 3.0f, vec{}), splat(6.0f)) * (1.0f / 6.0f)))
      default: EACH(curve(s, v))
    }
  }
#undef EACH
#undef OPERAND
#undef PER_CHANNEL
}

// The share of `count` things that thread `me` of `threads` does.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int me, int threads) : begin(count * me / threads), end(count * (me + 1) / threads) {}
};

// convolution

template <int M, bool FOR_WRITING>
INLINE void prefetch(const float* p) {
  constexpr int line = 16;
  UNROLL for (int j = 0; j * line < M * L; ++j) __builtin_prefetch(p + j * line, FOR_WRITING, 3);
}

// The steps behind a convolution that networks use most have kernels of their own, without a branch.
enum Pattern { NOTHING, RECTIFIED, RESIDUAL, RESIDUAL_RECTIFIED, RESIDUAL_RECTIFIED_LESS, ANY };

Pattern pattern_of(const Op& op) {
  const auto is = [&](std::initializer_list<int> kinds) {
    return op.steps_count == int(kinds.size()) &&
           std::equal(kinds.begin(), kinds.end(), op.steps, [](int kind, const Step& s) { return kind == s.kind; });
  };
  if (is({})) return NOTHING;
  if (is({RELU})) return RECTIFIED;
  if (is({ADD})) return RESIDUAL;
  if (is({ADD, RELU})) return RESIDUAL_RECTIFIED;
  if (is({ADD, RELU, SUBTRACT})) return RESIDUAL_RECTIFIED_LESS;
  return ANY;
}

// The pixels that the next chunk needs and this one does not: of so many channels, from this address on.
struct Ahead {
  const float* pixels;
  int channels;
};

// Blocks of N output channels, one behind the other, over one chunk of M vectors of pixels.
template <int N, int M, Pattern P>
void conv_blocks(const Op& op, float* arena, int group, int from, int to, int first, int last, int row, int begin,
                 const Ahead& next) {
  const int outputs = op.channels / op.groups, inputs = op.in_channels / op.groups;
  const int64_t plane = op.y_plane;
  const int channel = group * outputs + from;
  const float* x = arena + op.x + int64_t(group) * inputs * op.x_plane + int64_t(row) * op.x_row + begin;
  int64_t at = channel * plane + int64_t(row) * op.y_row + begin;
  const float* w = op.weight + int64_t(channel) * op.depth;
  const float* bias = op.bias + channel;
  const float* added = P >= RESIDUAL && P != ANY ? arena + op.steps[0].offset : nullptr;
  const float* subtracted = P == RESIDUAL_RECTIFIED_LESS ? arena + op.steps[2].offset : nullptr;
  const int rest = op.exact ? op.length - begin - (M - 1) * L : L;  // lanes of the last vector that may be written
  const int share = (next.channels * N + to - from - 1) / (to - from);  // fetched while a block is computed: all at once would wait
  const float *fetched = next.pixels, *fetch_end = next.pixels + next.channels * op.x_plane;
  for (int block = from; block < to; block += N, at += N * plane, w += int64_t(N) * op.depth, bias += N) {
    float* y = arena + op.y + at;
    for (int i = 0; i < share && fetched < fetch_end; ++i, fetched += op.x_plane) prefetch<TILE, false>(fetched);
    vec acc[N][M];
    if (P != ANY || first == 0) {
      UNROLL for (int i = 0; i < N; ++i) UNROLL for (int j = 0; j < M; ++j) acc[i][j] = splat(bias[i]);
    } else {
      UNROLL for (int i = 0; i < N; ++i) UNROLL for (int j = 0; j < M; ++j) acc[i][j] = load(y + i * plane + j * L);
    }
    if (op.ahead) {
      // Large maps: the lines that a later tile writes, and adds at its end, are fetched while this one is computed.
      const bool over = block + op.ahead * N >= outputs;
      const int64_t there = at + (over ? op.ahead * N - outputs : op.ahead * N) * plane + (over ? M * L : 0);
      UNROLL for (int i = 0; i < N; ++i) prefetch<M, true>(arena + op.y + there + i * plane);
      if (P == ANY) {
        for (int k = 0; k < op.steps_count; ++k)
          if (op.steps[k].kind <= MULTIPLY)
            UNROLL for (int i = 0; i < N; ++i) prefetch<M, false>(arena + op.steps[k].offset + there + i * plane);
      }
      if (added)
        UNROLL for (int i = 0; i < N; ++i) prefetch<M, false>(added + there + i * plane);
      if (subtracted)
        UNROLL for (int i = 0; i < N; ++i) prefetch<M, false>(subtracted + there + i * plane);
    }
    const float* weight = w + int64_t(first) * N;
    const int32_t* taps = op.taps;
    asm("" : "+r"(x), "+r"(taps));  // keeps the compiler from splitting the address into more sums than one
    for (int k = first; k < last; ++k, weight += N) {
      const float* p = x + taps[k];
      vec v[M];
      UNROLL for (int j = 0; j < M; ++j) v[j] = load(p + j * L);
      UNROLL for (int i = 0; i < N; ++i) {
        const vec s = splat(weight[i]);
        UNROLL for (int j = 0; j < M; ++j) acc[i][j] += s * v[j];
      }
    }
    if (last == op.depth) {
      if (P == ANY) finish<N, M>(acc, op, arena, at, plane, group * outputs + block, 1);
      UNROLL for (int i = 0; i < N; ++i) UNROLL for (int j = 0; j < M; ++j) {
        vec v = acc[i][j];
        if (added) v += load(added + at + i * plane + j * L);
        if (P == RECTIFIED || P == RESIDUAL_RECTIFIED || P == RESIDUAL_RECTIFIED_LESS) v = at_least(v, vec{});
        if (subtracted) v -= load(subtracted + at + i * plane + j * L);
        acc[i][j] = v;
      }
      if (op.mask) {
        UNROLL for (int j = 0; j < M; ++j) {
          const ivec m = *reinterpret_cast<const iloose*>(op.mask + begin + j * L);
          UNROLL for (int i = 0; i < N; ++i) acc[i][j] = (vec)((ivec)acc[i][j] & m);
        }
      }
    }
    if (rest < L) {  // rows of their own: the next one must not be touched
      UNROLL for (int i = 0; i < N; ++i) {
        UNROLL for (int j = 0; j < M - 1; ++j) store(y + i * plane + j * L, acc[i][j]);
        store_part(y + i * plane + (M - 1) * L, acc[i][M - 1], rest);
      }
    } else {
      UNROLL for (int i = 0; i < N; ++i) UNROLL for (int j = 0; j < M; ++j) store(y + i * plane + j * L, acc[i][j]);
    }
  }
}

using ConvBlocks = void (*)(const Op&, float*, int, int, int, int, int, int, int, const Ahead&);

// [vectors - 1]: the kernels for whole blocks of output channels.
template <Pattern P>
constexpr ConvBlocks WHOLE[TILE] = {conv_blocks<BLOCK, 1, ANY>, conv_blocks<BLOCK, 2, P>, conv_blocks<BLOCK, 3, P>};
constexpr const ConvBlocks* BY_PATTERN[] = {WHOLE<NOTHING>,           WHOLE<RECTIFIED>, WHOLE<RESIDUAL>, WHOLE<RESIDUAL_RECTIFIED>,
                                            WHOLE<RESIDUAL_RECTIFIED_LESS>, WHOLE<ANY>};
// [log2 of the channels][vectors - 1]: those for what is left.
constexpr ConvBlocks SMALLER[3][TILE] = {{conv_blocks<1, 1, ANY>, conv_blocks<1, 2, ANY>, conv_blocks<1, 3, ANY>},
                                         {conv_blocks<2, 1, ANY>, conv_blocks<2, 2, ANY>, conv_blocks<2, 3, ANY>},
                                         {conv_blocks<4, 1, ANY>, conv_blocks<4, 2, ANY>, conv_blocks<4, 3, ANY>}};

void conv(const Op& op, float* arena, int me, int threads) {
  const int outputs = op.channels / op.groups, inputs = op.in_channels / op.groups;
  const int vectors = (op.length + L - 1) / L, chunks = (vectors + TILE - 1) / TILE;
  const int64_t cells = int64_t(op.rows) * chunks;
  // Threads share the (group, pixels) pairs; where there are few, the output channels.
  const bool by_pixels = op.groups * cells >= 4 * threads;
  const Share pairs(by_pixels ? op.groups * cells : 0, me, threads);
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
  const Share mine(blocks, by_pixels ? 0 : me, by_pixels ? 1 : threads);
  const int from = int(mine.begin) * BLOCK, to = mine.end == blocks ? outputs : int(mine.end) * BLOCK;
  const int whole = from + (to - from) / BLOCK * BLOCK;
  const bool in_parts = op.depth > DEPTH_BLOCK + DEPTH_BLOCK / 2;
  const ConvBlocks* kernels = BY_PATTERN[in_parts ? ANY : pattern_of(op)];
  const int reach = op.taps[op.depth / inputs - 1];  // of the last tap: what the next chunk needs that is not there yet
  for (int group = 0; group < op.groups; ++group) {
    int64_t begin = 0, end = cells;
    if (by_pixels) {
      begin = pairs.begin - group * cells, end = pairs.end - group * cells;
      begin = begin < 0 ? 0 : begin, end = end > cells ? cells : end;
    }
    for (int first = 0, last = 0; first < op.depth && begin < end; first = last) {
      last = op.depth - first > DEPTH_BLOCK + DEPTH_BLOCK / 2 ? first + DEPTH_BLOCK : op.depth;
      for (int64_t cell = begin; cell < end; ++cell) {
        const int row = int(cell / chunks), chunk = int(cell % chunks);
        const int v0 = int(int64_t(vectors) * chunk / chunks), v1 = int(int64_t(vectors) * (chunk + 1) / chunks);
        const int m = v1 - v0 - 1;
        Ahead next{nullptr, 0};
        if (cell + 1 < end) {
          const int taps = op.depth / inputs, channel = group * inputs + first / taps;
          next = {arena + op.x + channel * op.x_plane + v1 * L + reach, (last - first) / taps};
        }
        if (from < whole) kernels[m](op, arena, group, from, whole, first, last, row, v0 * L, next);
        int block = whole;
        for (int log = 2; log >= 0; --log)
          if (const int size = 1 << log; size < BLOCK && block + size <= to) {
            SMALLER[log][m](op, arena, group, block, block + size, first, last, row, v0 * L, Ahead{nullptr, 0});
            block += size;
          }
      }
    }
  }
}

// layers on vectors: the lanes are output channels. Weights: [chunk of outputs][input][output], padded with zeros.

template <int M>
INLINE void linear_tile(const Op& op, float* arena, int group, int begin) {
  const int inputs = op.in_channels / op.groups, outputs = op.channels / op.groups;
  const float* x = arena + op.x + int64_t(group) * inputs;
  const int padded = (outputs + L - 1) / L * L;
  const float* w = op.weight + (int64_t(group) * padded + begin) * inputs;
  const int channel = group * outputs + begin;
  vec even[1][M], odd[1][M];
  UNROLL for (int j = 0; j < M; ++j) even[0][j] = load(op.bias + channel + j * L), odd[0][j] = vec{};
  int k = 0;
  for (; k + 2 <= inputs; k += 2, w += 2 * M * L) {
    const vec s = splat(x[k]), t = splat(x[k + 1]);
    UNROLL for (int j = 0; j < M; ++j) even[0][j] += s * load(w + j * L);
    UNROLL for (int j = 0; j < M; ++j) odd[0][j] += t * load(w + (M + j) * L);
  }
  if (k < inputs) {
    const vec s = splat(x[k]);
    UNROLL for (int j = 0; j < M; ++j) even[0][j] += s * load(w + j * L);
  }
  UNROLL for (int j = 0; j < M; ++j) even[0][j] += odd[0][j];
  finish<1, M, true>(even, op, arena, channel, 0, channel, 0);
  float* y = arena + op.y + channel;
  UNROLL for (int j = 0; j < M; ++j) {
    const int rest = outputs - begin - j * L;
    if (rest >= L) store(y + j * L, even[0][j]);
    else store_part(y + j * L, even[0][j], rest);
  }
}

void linear(const Op& op, float* arena, int me, int threads) {
  const int vectors = (op.channels / op.groups + L - 1) / L, chunks = (vectors + TILE) / (TILE + 1);
  const Share share(int64_t(op.groups) * chunks, me, threads);
  for (int64_t item = share.begin; item < share.end; ++item) {
    const int group = int(item / chunks), chunk = int(item % chunks), begin = chunk * (TILE + 1);
    switch (vectors - begin) {
      case 1: linear_tile<1>(op, arena, group, begin * L); break;
      case 2: linear_tile<2>(op, arena, group, begin * L); break;
      case 3: linear_tile<3>(op, arena, group, begin * L); break;
      default: linear_tile<4>(op, arena, group, begin * L);
    }
  }
}

// windows: depthwise convolutions and pooling. A channel is copied into a padded scratch whose columns are split by
// their remainder modulo the stride, so that neighbouring outputs read neighbouring floats.

struct Multiply {
  static constexpr bool WEIGHTED = true;
  static INLINE vec step(vec acc, vec w, vec x) { return acc + w * x; }
};
struct Sum {
  static constexpr bool WEIGHTED = false;
  static INLINE vec step(vec acc, vec, vec x) { return acc + x; }
};
struct Maximum {
  static constexpr bool WEIGHTED = false;
  static INLINE vec step(vec acc, vec, vec x) { return ((acc < x) | (x != x)) ? x : acc; }
};

struct Scratch {
  int columns, phase, row;  // columns that are read; floats of the columns of one remainder, and of a row
  explicit Scratch(const Op& op) {
    columns = (op.width + L - 1) / L * L + (op.kernel_w - 1) * op.dilation_w / op.stride_w;
    phase = columns + 2 * L;  // whole vectors are written
    row = phase * op.stride_w;
  }
};

template <int... I>
INLINE void deinterleave(vec a, vec b, float* even, float* odd, std::integer_sequence<int, I...>) {
  store(even, __builtin_shufflevector(a, b, (2 * I)...));
  store(odd, __builtin_shufflevector(a, b, (2 * I + 1)...));
}

// Copy a row of the map into a row of the scratch. Column q of remainder p is pixel q * stride + p - pad; around the pixels
// lies padding, before and after.
template <int S>
INLINE void scratch_row(const Op& op, const Scratch& s, const float* in, float* out, float padding) {
  ivec lane;
  UNROLL for (int i = 0; i < L; ++i) lane[i] = i;
  const auto pixels = [&](int i) {
    const vec v = load(in + i);
    return i + L <= op.in_width ? v : lane < op.in_width - i ? v : splat(padding);
  };
  if (S == 1) {
    for (int i = 0; i < op.in_width; i += L) store(out + op.pad_w + i, pixels(i));
  } else if (S == 2) {
    // Pixel 0 is column pad / 2 of one remainder; pixel 1 is in the other, one further if the first was the odd one.
    float* even = out + (op.pad_w & 1) * s.phase + op.pad_w / 2;
    float* odd = out + ((op.pad_w + 1) & 1) * s.phase + (op.pad_w + 1) / 2;
    for (int i = 0; i < op.in_width; i += 2 * L)
      deinterleave(pixels(i), pixels(i + L), even + i / 2, odd + i / 2, std::make_integer_sequence<int, L>());
  } else {
    for (int p = 0; p < op.stride_w; ++p) {
      const int q = op.pad_w > p ? (op.pad_w - p + op.stride_w - 1) / op.stride_w : 0;
      for (int i = q, at = q * op.stride_w + p - op.pad_w; at < op.in_width && i < s.columns; ++i, at += op.stride_w)
        out[p * s.phase + i] = in[at];
    }
  }
}

// Finish R rows of a vector of pixels each, from row y0 and column x on.
template <int R>
INLINE void store_rows(vec (&acc)[R][1], const Op& op, float* arena, int channel, int y0, int x) {
  const int64_t body = int64_t(op.height) * op.y_row, within = int64_t(y0) * op.y_row + x, at = channel * op.y_plane + within;
  finish<R, 1>(acc, op, arena, at, op.y_row, channel, 0);
  float* y = arena + op.y + at;
  UNROLL for (int r = 0; r < R; ++r) {
    // Short rows: what is written behind one is written again by the next; behind the last there may be no room.
    if (within + r * op.y_row + L <= body || op.width >= L) store(y + r * op.y_row, acc[r][0]);
    else store_part(y + r * op.y_row, acc[r][0], op.width - x);
  }
}

// Write the zeros behind the rows of a channel, if somebody reads them.
void clear_gaps(const Op& op, float* arena, int channel) {
  if (!op.mask) return;
  float* y = arena + op.y + channel * op.y_plane;
  const int gap = op.y_row - op.width;
  for (int r = 0; r < op.height; ++r) std::memset(y + int64_t(r) * op.y_row + op.width, 0, sizeof(float) * size_t(gap));
  const int64_t body = int64_t(op.height) * op.y_row, full = (body + L - 1) / L * L;
  std::memset(y + body, 0, sizeof(float) * size_t(full - body));
}

// A depthwise convolution of stride 1 that keeps the size of the map needs no copy: what lies beside the rows is masked, and
// rows above (TOP) and below (BOTTOM) the map are left out. R rows of output at once, each row of input loaded once for all.
template <int K, int R, bool TOP, bool BOTTOM>
void same_rows(const Op& op, float* arena, int channel, int y0) {
  constexpr int PAD = K / 2, BEGIN = TOP ? PAD : 0, END = R + K - 1 - (BOTTOM ? PAD : 0);
  const float* w = op.weight + channel * K * K;
  const float* rows = arena + op.x + channel * op.x_plane + int64_t(y0 + BEGIN - PAD) * op.x_row;
  ivec lane;
  UNROLL for (int i = 0; i < L; ++i) lane[i] = i;
  for (int column = 0; column < op.width; column += L) {
    const int x = op.width - column < L && op.width >= L ? op.width - L : column;  // the last vector overlaps the one before
    vec acc[R][1];
    UNROLL for (int r = 0; r < R; ++r) acc[r][0] = splat(op.bias[channel]);
    UNROLL for (int kx = 0; kx < K; ++kx) {
      const int at = x + kx - PAD;
      const ivec inside = (lane >= -at) & (lane < op.width - at);
      const float* p = rows + at;
      UNROLL for (int q = BEGIN; q < END; ++q, p += op.x_row) {
        const vec v = kx == PAD ? load(p) : (vec)((ivec)load(p) & inside);
        UNROLL for (int r = 0; r < R; ++r)
          if (q - r >= 0 && q - r < K) acc[r][0] += splat(w[(q - r) * K + kx]) * v;
      }
    }
    store_rows<R>(acc, op, arena, channel, y0, x);
  }
}

template <int K, int R>
void same_size(const Op& op, float* arena, int me, int threads) {
  const Share share(op.channels, me, threads);
  for (int channel = int(share.begin); channel < share.end; ++channel) {
    for (int y = 0; y < op.height; y += R) {
      const bool bottom = y + R == op.height;
      if (y) (bottom ? same_rows<K, R, false, true> : same_rows<K, R, false, false>)(op, arena, channel, y);
      else (bottom ? same_rows<K, R, true, true> : same_rows<K, R, true, false>)(op, arena, channel, y);
    }
    clear_gaps(op, arena, channel);
  }
}

// R rows of output at once: each row of input is loaded once for all of them. K x K windows of stride S; 0: any.
template <class Act, int K, int S, int R>
INLINE void window_rows(const Op& op, float* arena, const float* scratch, const Scratch& s, const float* w, float start, int channel,
                        int y0, const float* inverse_counts) {
  const int height = K ? K : op.kernel_h, width = K ? K : op.kernel_w;
  for (int column = 0; column < op.width; column += L) {
    const int x = op.width - column < L && op.width >= L ? op.width - L : column;  // as above
    vec acc[R][1];
    UNROLL for (int r = 0; r < R; ++r) acc[r][0] = splat(start);
    if (S) {
      UNROLL for (int kx = 0; kx < K; ++kx) {
        const float* p = scratch + (kx % (S ? S : 1)) * s.phase + kx / (S ? S : 1) + x;
        UNROLL for (int q = 0; q < (R - 1) * S + K; ++q) {
          const vec v = load(p + int64_t(q) * s.row);
          UNROLL for (int r = 0; r < R; ++r) {
            const int ky = q - r * S;
            if (ky >= 0 && ky < K) acc[r][0] = Act::step(acc[r][0], Act::WEIGHTED ? splat(w[ky * K + kx]) : vec{}, v);
          }
        }
      }
    } else {
      for (int kx = 0; kx < width; ++kx) {
        const int at = kx * op.dilation_w;
        const float* p = scratch + (at % op.stride_w) * s.phase + at / op.stride_w + x;
        for (int ky = 0; ky < height; ++ky) {
          const vec weight = Act::WEIGHTED ? splat(w[ky * width + kx]) : vec{};
          UNROLL for (int r = 0; r < R; ++r)
            acc[r][0] = Act::step(acc[r][0], weight, load(p + int64_t(r * op.stride_h + ky * op.dilation_h) * s.row));
        }
      }
    }
    if (inverse_counts) {
      UNROLL for (int r = 0; r < R; ++r) acc[r][0] *= load(inverse_counts + int64_t(y0 + r) * op.width + x);
    }
    store_rows<R>(acc, op, arena, channel, y0, x);
  }
}

template <class Act, int K, int S>
void windows(const Op& op, float* arena, int me, int threads, float padding) {
  thread_local std::vector<float> memory;
  const Scratch s(op);
  const int rows = (op.height - 1) * op.stride_h + (op.kernel_h - 1) * op.dilation_h + 1;
  const size_t floats = size_t(rows) * size_t(s.row) + 2 * L;
  const Share share(op.channels / op.multiplier, me, threads);
  // Some channels are copied before the first is read: what was just stored cannot be loaded at once in other pieces.
  const int64_t together = std::clamp<int64_t>(SCRATCH_FLOATS / int64_t(floats), 1, 8);
  if (memory.size() < floats * size_t(together)) memory.resize(floats * size_t(together));
  std::fill_n(memory.data(), floats * size_t(together), padding);
  const int last = std::min(rows - op.pad_h, op.in_height);
  for (int64_t begin = share.begin; begin < share.end; begin += together) {
    const int64_t end = std::min(begin + together, share.end);
    for (int64_t source = begin; source < end; ++source) {
      const float* x = arena + op.x + source * op.x_plane;
      float* scratch = memory.data() + (source - begin) * int64_t(floats) + int64_t(op.pad_h) * s.row;
      for (int r = 0; r < last; ++r) scratch_row<S>(op, s, x + int64_t(r) * op.x_row, scratch + int64_t(r) * s.row, padding);
    }
    for (int channel = int(begin) * op.multiplier; channel < int(end) * op.multiplier; ++channel) {
      const float* scratch = memory.data() + (channel / op.multiplier - begin) * int64_t(floats);
      const float* w = Act::WEIGHTED ? op.weight + int64_t(channel) * op.kernel_h * op.kernel_w : nullptr;
      const float start = Act::WEIGHTED ? op.bias[channel] : padding;
      const float* counts = Act::WEIGHTED ? nullptr : op.weight;
      int y = 0;
      const auto from = [&](int row) { return scratch + int64_t(row) * op.stride_h * s.row; };
      if (Act::WEIGHTED && S)
        for (; y + 7 <= op.height; y += 7) window_rows<Act, K, S, 7>(op, arena, from(y), s, w, start, channel, y, counts);
      for (; y + 4 <= op.height; y += 4) window_rows<Act, K, S, 4>(op, arena, from(y), s, w, start, channel, y, counts);
      for (; y < op.height; y += 1) window_rows<Act, K, S, 1>(op, arena, from(y), s, w, start, channel, y, counts);
      clear_gaps(op, arena, channel);
    }
  }
}

template <class Act, int K>
void windows_of_stride(const Op& op, float* arena, int me, int threads, float padding) {
  const bool square = op.stride_h == op.stride_w && op.dilation_h == 1 && op.dilation_w == 1;
  if constexpr (Act::WEIGHTED && K != 0) {
    const bool same = square && op.stride_h == 1 && op.pad_h == K / 2 && op.pad_w == K / 2 && op.in_height == op.height &&
                      op.in_width == op.width && op.multiplier == 1;
    if (same && op.height % 7 == 0) return same_size<K, 7>(op, arena, me, threads);
    if (same && op.height % 4 == 0) return same_size<K, 4>(op, arena, me, threads);
  }
  if (square && op.stride_h == 1) return windows<Act, K, 1>(op, arena, me, threads, padding);
  if (square && op.stride_h == 2) return windows<Act, K, 2>(op, arena, me, threads, padding);
  return windows<Act, 0, 0>(op, arena, me, threads, padding);
}

template <class Act>
void windows_of_kernel(const Op& op, float* arena, int me, int threads, float padding) {
  const int kernel = op.kernel_h == op.kernel_w ? op.kernel_h : 0;
  if (kernel == 3) return windows_of_stride<Act, 3>(op, arena, me, threads, padding);
  if (Act::WEIGHTED && kernel == 5) return windows_of_stride<Act, 5>(op, arena, me, threads, padding);
  if (Act::WEIGHTED && kernel == 7) return windows_of_stride<Act, 7>(op, arena, me, threads, padding);
  return windows<Act, 0, 0>(op, arena, me, threads, padding);
}

// the rest: a pass over the data each

void map(const Op& op, float* arena, int me, int threads) {
  const bool vector = op.height * op.width == 1;
  if (vector) {
    if (me) return;
    for (int c = 0; c < op.channels; c += L) {
      alignas(64) float gathered[L] = {};
      for (int i = 0; i < L && c + i < op.channels; ++i) gathered[i] = arena[op.x + (op.taps ? op.taps[c + i] : c + i)];
      vec acc[1][1] = {{load(gathered)}};
      finish<1, 1, true>(acc, op, arena, c, 0, c, 0);
      if (op.channels - c >= L) store(arena + op.y + c, acc[0][0]);
      else store_part(arena + op.y + c, acc[0][0], op.channels - c);
    }
    return;
  }
  const int vectors = (op.height * op.y_row + L - 1) / L;
  const Share share(op.channels, me, threads);
  for (int64_t c = share.begin; c < share.end; ++c) {
    const float* x = arena + op.x + (op.taps ? op.taps[c] : c) * op.x_plane;  // taps: the channel each channel comes from
    const int64_t plane = c * op.y_plane;
    for (int i = 0; i < vectors;) {
      const int64_t at = plane + int64_t(i) * L;
      const auto masked = [&](vec v, int k) {
        if (!op.mask) return v;
        const ivec bits = (ivec)v & *reinterpret_cast<const iloose*>(op.mask + (i + k) * L);
        return (vec)bits;
      };
      if (i + 4 <= vectors) {
        vec acc[1][4];
        UNROLL for (int j = 0; j < 4; ++j) acc[0][j] = load(x + (i + j) * L);
        finish<1, 4>(acc, op, arena, at, 0, int(c), 0);
        UNROLL for (int j = 0; j < 4; ++j) store(arena + op.y + at + j * L, masked(acc[0][j], j));
        i += 4;
      } else {
        vec acc[1][1] = {{load(x + i * L)}};
        finish<1, 1>(acc, op, arena, at, 0, int(c), 0);
        store(arena + op.y + at, masked(acc[0][0], 0));
        i += 1;
      }
    }
  }
}

void mean(const Op& op, float* arena, int me, int threads) {
  const bool whole = op.x_row == op.in_width;
  const int rows = whole ? 1 : op.in_height, width = whole ? op.in_width * op.in_height : op.in_width;
  const float scale = 1.0f / (float(op.in_width) * float(op.in_height));
  ivec lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  const ivec tail = lane < width % L;
  // Blocks of channels, so that the steps see whole vectors and no two threads write one.
  const Share share((op.channels + L - 1) / L, me, threads);
  for (int64_t block = share.begin; block < share.end; ++block) {
    vec sums[L] = {};
    const int lanes = int(std::min<int64_t>(op.channels - block * L, L));
    for (int c = 0; c < lanes; ++c) {
      const float* x = arena + op.x + (block * L + c) * op.x_plane;
      vec part[4] = {};
      for (int r = 0; r < rows; ++r, x += op.x_row) {
        int i = 0;
        for (; i + 4 * L <= width; i += 4 * L) UNROLL for (int j = 0; j < 4; ++j) part[j] += load(x + i + j * L);
        for (; i + L <= width; i += L) part[0] += load(x + i);
        if (i < width) part[1] += (vec)((ivec)load(x + i) & tail);
      }
      sums[c] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    // Add neighbours until one vector holds the sum of each channel.
    for (int count = L; count > 1; count /= 2)
      for (int i = 0; i < count / 2; ++i) {
        alignas(64) float even[L], odd[L];
        deinterleave(sums[2 * i], sums[2 * i + 1], even, odd, std::make_integer_sequence<int, L>());
        sums[i] = load(even) + load(odd);
      }
    vec acc[1][1] = {{sums[0] * scale}};
    finish<1, 1, true>(acc, op, arena, block * L, 0, int(block) * L, 0);
    store_part(arena + op.y + block * L, acc[0][0], lanes);
  }
}

// Split planes by the remainder of their coordinates modulo the stride; what lies outside stays zero.
void phases(const Op& op, float* arena, int me, int threads) {
  const Share share(int64_t(op.in_channels) * op.depth, me, threads);
  for (int64_t item = share.begin; item < share.end; ++item) {
    const int64_t channel = item / op.depth, phase = item % op.depth;
    const int top = op.taps[2 * phase], left = op.taps[2 * phase + 1];
    const float* x = arena + op.x + channel * op.x_plane + int64_t(top) * op.x_row + left;
    float* y = arena + op.y + item * op.y_plane;
    const int rows = op.in_height > top ? (op.in_height - top + op.stride_h - 1) / op.stride_h : 0;
    const int columns = op.in_width > left ? (op.in_width - left + op.stride_w - 1) / op.stride_w : 0;
    const int height = rows < op.height ? rows : op.height, width = columns < op.width ? columns : op.width;
    for (int r = 0; r < height; ++r) {
      const float* in = x + int64_t(r) * op.stride_h * op.x_row;
      float* out = y + int64_t(r) * op.y_row;
      int i = 0;
      if (op.stride_w == 2)
        for (alignas(64) float unused[L]; i + L <= width; i += L)
          deinterleave(load(in + 2 * i), load(in + 2 * i + L), out + i, unused, std::make_integer_sequence<int, L>());
      for (; i < width; ++i) out[i] = in[i * op.stride_w];
      for (; i < op.y_row; ++i) out[i] = 0.0f;
    }
    if (op.height * op.width == 1 && height == 1) continue;  // a vector: its neighbours follow at once
    const int64_t end = op.height * op.width == 1 ? 1 : (int64_t(op.height) * op.y_row + L - 1) / L * L;
    for (int64_t i = int64_t(height) * op.y_row; i < end; ++i) y[i] = 0.0f;
  }
}

// Each output pixel mixes two rows and two columns. `taps`: (row, row, column, column) indices as [2 H + 2 W], `weight`: the
// second one's share, [H + W]. Nearest neighbour has share 0.
void resize(const Op& op, float* arena, int me, int threads) {
  const int32_t *rows = op.taps, *columns = op.taps + 2 * op.height;
  const float *row_share = op.weight, *column_share = op.weight + op.height;
  const Share share(op.channels, me, threads);
  for (int64_t c = share.begin; c < share.end; ++c) {
    const float* x = arena + op.x + c * op.x_plane;
    float* y = arena + op.y + c * op.y_plane;
    for (int r = 0; r < op.height; ++r) {
      const float* upper = x + int64_t(rows[2 * r]) * op.x_row;
      const float* lower = x + int64_t(rows[2 * r + 1]) * op.x_row;
      const float v = row_share[r];
      float* out = y + int64_t(r) * op.y_row;
      for (int i = 0; i < op.width; ++i) {
        const int a = columns[2 * i], b = columns[2 * i + 1];
        const float h = column_share[i];
        const float top = upper[a] * (1.0f - h) + upper[b] * h, bottom = lower[a] * (1.0f - h) + lower[b] * h;
        out[i] = top * (1.0f - v) + bottom * v;
      }
      for (int i = op.width; i < op.y_row; ++i) out[i] = 0.0f;
    }
    const int64_t end = int64_t(op.height) * op.y_row, full = (end + L - 1) / L * L;
    if (op.height * op.width > 1)
      for (int64_t i = end; i < full; ++i) y[i] = 0.0f;
  }
}

void zero(const Op& op, float* arena, int me, int threads) {
  const int64_t plane = op.height * op.width == 1 ? 1 : (int64_t(op.height) * op.y_row + L - 1) / L * L;
  const Share share(op.channels, me, threads);
  for (int64_t c = share.begin; c < share.end; ++c) std::memset(arena + op.y + c * op.y_plane, 0, sizeof(float) * size_t(plane));
}

void flatten(const Op& op, const float* arena, float* to, int me, int threads) {
  const Share share(op.in_channels, me, threads);
  for (int64_t c = share.begin; c < share.end; ++c)
    for (int r = 0; r < op.in_height; ++r)
      std::memcpy(to + (c * op.in_height + r) * op.in_width, arena + op.x + c * op.x_plane + int64_t(r) * op.x_row,
                  sizeof(float) * size_t(op.in_width));
}

void load_image(const Op& op, float* arena, const float* from, int me, int threads) {
  const Share share(op.channels, me, threads);
  const int gap = op.y_row - op.width;
  const int64_t end = int64_t(op.height) * op.y_row, full = op.height * op.width == 1 ? end : (end + L - 1) / L * L;
  for (int64_t c = share.begin; c < share.end; ++c) {
    float* y = arena + op.y + c * op.y_plane;
    for (int r = 0; r < op.height; ++r) {
      std::memcpy(y + int64_t(r) * op.y_row, from + (c * op.height + r) * op.width, sizeof(float) * size_t(op.width));
      std::memset(y + int64_t(r) * op.y_row + op.width, 0, sizeof(float) * size_t(gap));
    }
    std::memset(y + end, 0, sizeof(float) * size_t(full - end));
  }
}

// `images` holds, for each LOAD and STORE, the address of this image's data; they are counted in the order of the list.
void run_op(const Op& op, float* arena, float* const* images, int me, int threads) {
  switch (op.kind) {
    case CONV: return conv(op, arena, me, threads);
    case LINEAR: return linear(op, arena, me, threads);
    case DEPTHWISE: return windows_of_kernel<Multiply>(op, arena, me, threads, 0.0f);
    case MAX_POOL: return windows_of_kernel<Maximum>(op, arena, me, threads, -__builtin_inff());
    case AVERAGE_POOL: return windows_of_kernel<Sum>(op, arena, me, threads, 0.0f);
    case MEAN: return mean(op, arena, me, threads);
    case MAP: return map(op, arena, me, threads);
    case PHASES: return phases(op, arena, me, threads);
    case RESIZE: return resize(op, arena, me, threads);
    case ZERO: return zero(op, arena, me, threads);
    case FLATTEN: return flatten(op, arena, arena + op.y, me, threads);
    case LOAD: return load_image(op, arena, images[op.port], me, threads);
    case STORE: return flatten(op, arena, images[op.port], me, threads);
  }
}

// threads

INLINE void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
INLINE void wait_until(Condition ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < 20000) pause();
    else std::this_thread::yield();  // more threads than processors: let the others run
  }
}

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    const unsigned generation = generation_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

template <class Work>
void in_parallel(int threads, const Work& work) {
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(threads - 1));
  for (int t = 1; t < threads; ++t) helpers.emplace_back([&work, t] { work(t); });
  work(0);
  for (auto& helper : helpers) helper.join();
}

}  // namespace

extern "C" {

int mgic_lanes() { return L; }
int mgic_block() { return BLOCK; }
int64_t mgic_op_size() { return sizeof(Op); }
int64_t mgic_step_size() { return sizeof(Step); }

// Run the list on `batch` images. `arenas`: one per thread that works on images of its own. `images`: for each image, the
// addresses that LOAD and STORE use, `ports` of them.
void mgic_run(const Op* ops, int count, float* const* arenas, float* const* images, int ports, int batch, int threads) {
  if (threads <= 1 || batch >= threads) {
    std::atomic<int> next{0};
    const auto work = [&](int me) {
      for (int image; (image = next.fetch_add(1)) < batch;)
        for (int i = 0; i < count; ++i) run_op(ops[i], arenas[me], images + int64_t(image) * ports, 0, 1);
    };
    if (threads <= 1) work(0);
    else in_parallel(threads, work);
    return;
  }
  Barrier barrier(threads);
  in_parallel(threads, [&](int me) {
    for (int image = 0; image < batch; ++image)
      for (int i = 0; i < count; ++i) {
        run_op(ops[i], arenas[0], images + int64_t(image) * ports, me, threads);
        barrier.wait();
      }
  });
}

// Run the list on one image, on one thread, and add to `seconds` what each operation took.
void mgic_profile(const Op* ops, int count, float* arena, float* const* images, double* seconds) {
  for (int i = 0; i < count; ++i) {
    const auto began = std::chrono::steady_clock::now();
    run_op(ops[i], arena, images, 0, 1);
    seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  }
}

}  // extern "C"
