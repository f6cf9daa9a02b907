// Weighted sums of layers, tile by tile: every layer's part of a tile is converted once and multiplied in the L1 cache.
#include "convert.h"
#include "simd.h"

namespace fastkd {
namespace {

constexpr int64_t kMixTile = 256;  // elements: 12 layers and 12 mixtures of float fill half of an L1 cache

// Calls f(tile, begin, count, scratch) for the tiles of [0, n); scratch holds `rows` lines of kMixTile numbers.
template <class A, class F>
void for_mix_tiles(int64_t n, int64_t rows, const F& f) {
  const int64_t tiles = (n + kMixTile - 1) / kMixTile;
  parallel(tiles, 8, [&](int64_t first, int64_t last) {
    std::vector<A> scratch(rows * kMixTile);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kMixTile;
      f(tile, begin, std::min(kMixTile, n - begin), scratch.data());
    }
  });
}

// One tile of each tensor as lines of kMixTile numbers, padded with zeros.
template <class A>
void read_mix_tile(const std::vector<Tensor>& tensors, int64_t begin, int64_t count, A* lines) {
  for (const Tensor& tensor : tensors) {
    for_float(tensor.scalar_type(), "layer_mix", [&](auto type) {
      using T = typename decltype(type)::type;
      convert_row(data<T>(tensor) + begin, count, lines);
    });
    std::fill(lines + count, lines + kMixTile, A(0));
    lines += kMixTile;
  }
}

template <class A>
void write_mix_tile(const A* lines, int64_t begin, int64_t count, const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    for_float(tensor.scalar_type(), "layer_mix", [&](auto type) {
      using T = typename decltype(type)::type;
      convert_row(lines, count, mutable_data<T>(tensor) + begin);
    });
    lines += kMixTile;
  }
}

template <class A>
std::vector<A> mix_weights(const Tensor& weight) {
  std::vector<A> values(weight.numel());
  for_float(weight.scalar_type(), "layer_mix", [&](auto type) {
    using T = typename decltype(type)::type;
    convert_row(data<T>(weight), weight.numel(), values.data());
  });
  return values;
}

void check_mix(const std::vector<Tensor>& tensors, int64_t count, int64_t n) {
  FASTKD_CHECK(static_cast<int64_t>(tensors.size()) == count, "layer_mix", "weight must have a row per mixture and a "
               "column per layer");
  for (const Tensor& tensor : tensors) {
    FASTKD_CHECK(tensor.numel() == n, "layer_mix", "all tensors must have one size");
    check_contiguous(tensor, "layer_mix", "each layer");
  }
}

// A sum over a tile in 4 vectors, added in a fixed order.
template <class A>
A mix_dot(const A* x, const A* y) {
  using S = Simd<A>;
  typename S::type sum[4] = {};
  for (int64_t i = 0; i < kMixTile; i += 4 * S::lanes)
    for (int64_t v = 0; v < 4; ++v) sum[v] += S::load(x + i + v * S::lanes) * S::load(y + i + v * S::lanes);
  const typename S::type total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  A result = 0;
  for (int64_t i = 0; i < S::lanes; ++i) result += total[i];
  return result;
}

template <class F>
void for_mix_type(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == ScalarType::Double) {
    f(Type<double>{});
  } else {
    f(Type<float>{});
  }
}

}  // namespace

void layer_mix(const std::vector<Tensor>& states, const Tensor& weight, const std::vector<Tensor>& mixed) {
  const int64_t mixtures = weight.size(0), layers = weight.size(1), n = states[0].numel();
  check_mix(states, layers, n);
  check_mix(mixed, mixtures, n);
  for_mix_type(states[0], [&](auto type) {
    using A = typename decltype(type)::type;
    const std::vector<A> w = mix_weights<A>(weight);
    for_mix_tiles<A>(n, layers + mixtures, [&](int64_t, int64_t begin, int64_t count, A* below) {
      A* above = below + layers * kMixTile;
      read_mix_tile(states, begin, count, below);
      small_gemm(mixtures, kMixTile, layers, w.data(), layers, 1, below, kMixTile, above, kMixTile);
      write_mix_tile(above, begin, count, mixed);
    });
  });
}

void layer_mix_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& states, const Tensor& weight,
                        const std::vector<Tensor>& grad_states, const Tensor& grad_weight) {
  const int64_t mixtures = weight.size(0), layers = weight.size(1), n = states[0].numel();
  check_mix(grads, mixtures, n);
  check_mix(states, layers, n);
  check_mix(grad_states, layers, n);
  check_contiguous(grad_weight, "layer_mix", "grad_weight");
  for_mix_type(states[0], [&](auto type) {
    using A = typename decltype(type)::type;
    const std::vector<A> w = mix_weights<A>(weight);
    const int64_t pairs = mixtures * layers;
    std::vector<A> shares(pairs * ((n + kMixTile - 1) / kMixTile));
    for_mix_tiles<A>(n, mixtures + 2 * layers, [&](int64_t tile, int64_t begin, int64_t count, A* above) {
      A *below = above + mixtures * kMixTile, *out = below + layers * kMixTile;
      read_mix_tile(grads, begin, count, above);
      read_mix_tile(states, begin, count, below);
      small_gemm(layers, kMixTile, mixtures, w.data(), 1, layers, above, kMixTile, out, kMixTile);
      write_mix_tile(out, begin, count, grad_states);
      A* share = shares.data() + tile * pairs;
      for (int64_t a = 0; a < mixtures; ++a)
        for (int64_t b = 0; b < layers; ++b) *share++ = mix_dot(above + a * kMixTile, below + b * kMixTile);
    });
    // Tiles are added in their order: the same bits for any number of threads.
    std::vector<double> sums(pairs);
    for (size_t i = 0; i < shares.size(); ++i) sums[i % pairs] += shares[i];
    for_float(grad_weight.scalar_type(), "layer_mix", [&](auto other) {
      using T = typename decltype(other)::type;
      T* out = mutable_data<T>(grad_weight);
      for (int64_t i = 0; i < pairs; ++i) out[i] = static_cast<T>(static_cast<A>(sums[i]));
    });
  });
}

}  // namespace fastkd
