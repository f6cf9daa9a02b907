// Patch embedding of visible patches: the memory-bound steps around two matrix products of the vendor's library.
#include "pixels.h"
#include "token_rows.h"

namespace fastkd {

// rows[b n + j] = normalised pixels of patch ids[b, j] in (channel, row, column) order.
void visible_patch_rows(const Tensor& images, const Tensor& ids, const Tensor& affine,
                        const std::vector<int64_t>& patch, const Tensor& rows) {
  constexpr const char* op = "visible_patch_rows";
  check_contiguous(rows, op, "rows");
  const PatchShape shape(images, patch);
  const int64_t visible = ids.size(1), pixels = shape.pixels();
  for_float(rows.scalar_type(), op, [&](auto type) {
    for_pixel(images.scalar_type(), op, [&](auto pixel) {
      using T = typename decltype(type)::type;
      using A = Accumulate<T>;
      const PatchReader<typename decltype(pixel)::type, A> reader(images, affine, shape);
      const At<int64_t> id(ids);
      T* out = mutable_data<T>(rows);
      parallel(ids.size(0) * visible, 16384 / pixels + 1, [&](int64_t begin, int64_t end) {
        std::vector<A> scratch(std::is_same_v<T, A> ? 0 : pixels);
        for (int64_t row = begin; row < end; ++row) {
          A* line = line_for(out + row * pixels, scratch);
          reader.read_channels_first(row / visible, *id(row / visible, row % visible), line);
          convert_row(line, pixels, out + row * pixels);
        }
      });
    });
  });
}

// out[b, r] = prefix[r]; out[b, R + j] = projected[b n + j] + bias + pos_embed[ids[b, j]]. Without prefix rows,
// `projected` may be `out` itself.
void visible_patch_finish(const Tensor& projected, const Tensor& ids, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& pos_embed, const std::optional<Tensor>& prefix,
                          const Tensor& out) {
  constexpr const char* op = "visible_patch_finish";
  check_contiguous(projected, op, "projected");
  check_contiguous(out, op, "out");
  const int64_t visible = ids.size(1), tokens = out.size(1), width = out.size(2), first = tokens - visible;
  for_float(out.scalar_type(), op, [&](auto type) {
    using T = typename decltype(type)::type;
    for_same_or_wide<T>(pos_embed, op, [&](auto position) {
      using A = Accumulate<T>;
      using P = typename decltype(position)::type;
      const T* shift = bias ? data<T>(*bias) : nullptr;
      const T* head = prefix ? data<T>(*prefix) : nullptr;
      const P* table = pos_embed ? data<P>(*pos_embed) : nullptr;
      const T* x = data<T>(projected);
      T* y = mutable_data<T>(out);
      const At<int64_t> id(ids);
      parallel(out.size(0) * tokens, 16384 / width + 1, [&](int64_t begin, int64_t end) {
        std::vector<A> scratch(std::is_same_v<T, A> ? 0 : width);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / tokens, j = row % tokens - first;
          T* to = y + row * width;
          if (j < 0) {
            std::copy_n(head + (j + first) * width, width, to);
            continue;
          }
          A* line = line_for(to, scratch);
          convert_row(x + (b * visible + j) * width, width, line);
          if (shift) add_row(shift, width, line);
          if (table) add_row(table + *id(b, j) * width, width, line);
          convert_row(line, width, to);
        }
      });
    });
  });
}

// One pass over the upstream gradient [B, R + n, D], unit stride in D: sums for bias and prefix, and the patches' rows
// side by side, [B n, D], for the matrix product (where `patches` is given).
void visible_patch_sums(const Tensor& grad_out, const std::optional<Tensor>& patches, const Tensor& grad_bias,
                        const Tensor& grad_prefix) {
  constexpr const char* op = "visible_patch_sums";
  const int64_t prefix = grad_prefix.size(0), width = grad_out.size(2), visible = grad_out.size(1) - prefix;
  for_float(grad_out.scalar_type(), op, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    const At<T> grad(grad_out);
    T* copy = patches ? mutable_data<T>(*patches) : nullptr;
    const auto sums = sum_over_images<A>(grad_out.size(0), (prefix + 1) * width, [&](int64_t b, A* sum) {
      for (int64_t r = 0; r < prefix; ++r) add_row(grad(b, r), width, sum + r * width);
      for (int64_t j = 0; j < visible; ++j) {
        const T* row = grad(b, prefix + j);
        add_row(row, width, sum + prefix * width);
        if (copy) std::copy_n(row, width, copy + (b * visible + j) * width);
      }
    });
    convert_row(sums.data(), prefix * width, mutable_data<T>(grad_prefix));
    convert_row(sums.data() + prefix * width, width, mutable_data<T>(grad_bias));
  });
}

}  // namespace fastkd
