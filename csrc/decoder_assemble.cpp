// Decoder input: visible tokens and fill rows in one sequence, positions added, in one pass over the output.
#include "token_rows.h"

namespace fastkd {

// out[b, i] = (i < given ? tokens[b, i] : fill[0 or id]) + pos_embed[i < R ? i : R + id], id = ids[b, i - R].
void decoder_assemble(const Tensor& tokens, const Tensor& fill, const std::optional<Tensor>& pos_embed,
                      const Tensor& ids, int64_t num_prefix, const Tensor& out) {
  constexpr const char* op = "decoder_assemble";
  check_contiguous(out, op, "out");
  const int64_t given = tokens.size(1), total = out.size(1), width = out.size(2), fill_rows = fill.size(0);
  const int64_t patches = pos_embed ? pos_embed->size(0) - num_prefix : fill_rows > 1 ? fill_rows : INT64_MAX;
  for_float(out.scalar_type(), op, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    for_same_or_wide<T>(fill, op, [&](auto fill_type) {
      for_same_or_wide<T>(pos_embed, op, [&](auto position) {
        using F = typename decltype(fill_type)::type;
        using P = typename decltype(position)::type;
        const P* table = pos_embed ? data<P>(*pos_embed) : nullptr;
        // Fill plus position is the same row for every image: computed once, then copied.
        const int64_t rows = table ? patches : fill_rows;
        const F* bare = data<F>(fill);
        const bool as_it_is = !table && std::is_same_v<F, T>;
        std::vector<T> sums(as_it_is ? 0 : rows * width);
        const T* filled = as_it_is ? reinterpret_cast<const T*>(bare) : sums.data();
        parallel(as_it_is ? 0 : rows, 16384 / width + 1, [&](int64_t begin, int64_t end) {
          std::vector<A> line(width);
          for (int64_t l = begin; l < end; ++l) {
            convert_row(bare + (fill_rows > 1 ? l * width : 0), width, line.data());
            if (table) add_row(table + (num_prefix + l) * width, width, line.data());
            convert_row(line.data(), width, sums.data() + l * width);
          }
        });
        const At<T> token(tokens);
        const At<int64_t> place(ids);
        T* y = mutable_data<T>(out);
        parallel(out.size(0) * total, 16384 / width + 1, [&](int64_t begin, int64_t end) {
          std::vector<A> scratch(std::is_same_v<T, A> ? 0 : width);
          for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / total, i = row % total, j = i - num_prefix, id = j < 0 ? 0 : *place(b, j);
            STD_TORCH_CHECK(id >= 0 && id < patches, "fastkd ", op, ": patch id ", id, " outside [0, ", patches, ")");
            T* to = y + row * width;
            if (i >= given) {
              std::copy_n(filled + (rows > 1 ? id * width : 0), width, to);
              continue;
            }
            A* line = line_for(to, scratch);
            convert_row(token(b, i), width, line);
            if (table) add_row(table + (j < 0 ? i : num_prefix + id) * width, width, line);
            convert_row(line, width, to);
          }
        });
      });
    });
  });
}

// grad_fill[0 or id] = sum of the upstream gradient (unit stride in D) over the rows filled from it.
void decoder_assemble_backward(const Tensor& grad_out, const Tensor& ids, int64_t given, int64_t num_prefix,
                               const Tensor& grad_fill) {
  constexpr const char* op = "decoder_assemble_backward";
  check_contiguous(grad_fill, op, "grad_fill");
  const int64_t batch = grad_out.size(0), total = grad_out.size(1), width = grad_out.size(2);
  const int64_t patches = grad_fill.size(0), filled = total - given;
  for_float(grad_out.scalar_type(), op, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulate<T>;
    for_same_or_wide<T>(grad_fill, op, [&](auto fill_type) {
      using F = typename decltype(fill_type)::type;
      const At<T> grad(grad_out);
      F* out = mutable_data<F>(grad_fill);
      if (patches == 1) {
        const auto sum = sum_over_images<A>(batch, width, [&](int64_t b, A* sum) {
          for (int64_t i = given; i < total; ++i) add_row(grad(b, i), width, sum);
        });
        return convert_row(sum.data(), width, out);
      }
      // Filled rows by patch, images in order: those of patch l are rows[start[l]] up to rows[start[l + 1] - 1].
      const At<int64_t> place(ids);
      std::vector<int64_t> start(patches + 2, 0);
      std::vector<const T*> rows(batch * filled);
      const auto for_filled = [&](const auto& visit) {
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t i = given; i < total; ++i) visit(*place(b, i - num_prefix), grad(b, i));
      };
      for_filled([&](int64_t id, const T*) {
        STD_TORCH_CHECK(id >= 0 && id < patches, "fastkd ", op, ": patch id ", id, " outside [0, ", patches, ")");
        ++start[id + 2];
      });
      for (int64_t l = 0; l < patches; ++l) start[l + 2] += start[l + 1];
      for_filled([&](int64_t id, const T* row) { rows[start[id + 1]++] = row; });
      parallel(patches, 1, [&](int64_t begin, int64_t end) {
        std::vector<A> sum(width);
        for (int64_t l = begin; l < end; ++l) {
          std::fill(sum.begin(), sum.end(), A(0));
          for (int64_t i = start[l]; i < start[l + 1]; ++i) add_row(rows[i], width, sum.data());
          convert_row(sum.data(), width, out + l * width);
        }
      });
    });
  });
}

}  // namespace fastkd
