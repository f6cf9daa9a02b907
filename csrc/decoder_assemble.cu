// Decoder input: visible tokens and fill rows in one sequence, positions added, in one pass over the output.
#include "cuda_sums.cuh"
#include "cuda_tables.cuh"

namespace fastkd::cuda {
namespace {

// out[b, i] = (i < given ? tokens[b, i] : fill[0 or id]) + position[i < R ? i : R + id], id = ids[b, i - R]. An id
// outside [0, patches) gives NaN; it is not followed.
template <class T, bool vector>
__global__ void __launch_bounds__(kMaxThreads, 1)
    assemble_kernel(Rows<T> tokens, TableRows<T> fill, bool per_patch, TableRows<T> position, const int64_t* ids,
                    int64_t ids_b, int64_t ids_k, int64_t patches, unsigned num_prefix, Rows<T> out, unsigned rows) {
  const unsigned row = row_index();
  if (row >= rows) return;
  const unsigned image = row / out.tokens, i = row % out.tokens;
  const bool patch = i >= num_prefix;
  int64_t id = patch ? ids[image * ids_b + (i - num_prefix) * ids_k] : 0;
  const bool valid = id >= 0 && id < patches;
  if (!valid) id = 0;
  for (int base = 0; base < out.width; base += span()) {
    float x[kItems], more[kItems];
    if (i < tokens.tokens)
      tokens[image * tokens.tokens + i].template read<vector>(base, x);
    else
      fill.template read<vector>(per_patch ? id : 0, base, x);
    if (position.data) {
      position.template read<vector>(patch ? num_prefix + id : i, base, more);
#pragma unroll
      for (int k = 0; k < kItems; ++k) x[k] += more[k];
    }
    if (!valid) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) x[k] = NAN;
    }
    out[row].template write<vector>(base, x);
  }
}

// place[b, l]: the token of image b that is filled from fill row l, or -1; a block an image.
__global__ void __launch_bounds__(256)
    place_kernel(const int64_t* ids, int64_t ids_b, int64_t ids_k, int given, int total, int num_prefix, int patches,
                 int* place) {
  int* mine = place + int64_t{blockIdx.x} * patches;
  for (int l = threadIdx.x; l < patches; l += blockDim.x) mine[l] = -1;
  __syncthreads();
  for (int i = given + threadIdx.x; i < total; i += blockDim.x) {
    const int64_t id = ids[blockIdx.x * ids_b + (i - num_prefix) * ids_k];
    if (id >= 0 && id < patches) mine[id] = i;
  }
}

// out[l] = sum over images of token place[b, l], where there is one.
template <class T, class Out>
__global__ void __launch_bounds__(32 * kSumRows)
    patch_sum_kernel(Rows<T> grad, bool vector, const int* place, int images, int patches, Out* out, bool vector_out) {
  const int patch = blockIdx.x, column = blockIdx.y * kSumColumns + threadIdx.x * kVector;
  float sum[kVector] = {};
#pragma unroll 4
  for (int b = threadIdx.y; b < images; b += kSumRows) {
    const int i = place[int64_t{b} * patches + patch];
    if (i < 0) continue;
    float value[kVector];
    read_eight(grad.data + b * grad.stride_b + i * grad.stride_t, column, grad.width, vector, value);
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum[k] += value[k];
  }
  sum_block_rows(sum);
  if (threadIdx.y == 0) write_eight(out + int64_t{patch} * grad.width, column, grad.width, vector_out, sum);
}

}  // namespace

const char* decoder_assemble(const Assemble& op, Stream stream) {
  return for_float(op.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Rows<T> tokens(op.tokens), out(op.out);
    const int64_t rows = op.out.size[0] * op.out.size[1], width = out.width;
    const TableRows<T> fill(op.fill, width), position(op.pos_embed, width);
    const bool vector = tokens.vector() && out.vector() && fill.vector() && position.vector();
    return launch(vector ? assemble_kernel<T, true> : assemble_kernel<T, false>, row_geometry(rows, width), stream,
                  tokens, fill, op.fill_rows > 1, position, static_cast<const int64_t*>(op.ids.data), op.ids.stride[0],
                  op.ids.stride[1], op.patches, static_cast<unsigned>(op.num_prefix), out, static_cast<unsigned>(rows));
  });
}

const char* decoder_assemble_backward(const AssembleBackward& op, float* partial, int* place, Stream stream) {
  return for_float(op.grad_out.dtype, [&](auto type) {
    return for_float(op.grad_fill.dtype, [&](auto fill_type) -> const char* {
      using T = typename decltype(type)::type;
      using F = typename decltype(fill_type)::type;
      if constexpr (!std::is_same_v<F, T> && !std::is_same_v<F, float>) {
        return "grad_fill must have the dtype of grad_out or float32";
      } else {
        const Rows<T> grad(op.grad_out);
        const int64_t images = op.grad_out.size[0], total = op.grad_out.size[1], patches = op.grad_fill.size[0];
        F* out = static_cast<F*>(op.grad_fill.data);
        T* no_copy = nullptr;
        if (patches == 1) return sum_tokens(grad, images, op.given, total - op.given, 1, partial, out, no_copy, stream);
        if (images > 0) {
          const char* error = launch(place_kernel, {dim3(images), dim3(256)}, stream,
                                     static_cast<const int64_t*>(op.ids.data), op.ids.stride[0], op.ids.stride[1],
                                     static_cast<int>(op.given), static_cast<int>(total),
                                     static_cast<int>(op.num_prefix), static_cast<int>(patches), place);
          if (error) return error;
        }
        const unsigned columns = (grad.width + kSumColumns - 1) / kSumColumns;
        return launch(patch_sum_kernel<T, F>, {dim3(patches, columns), dim3(32, kSumRows)}, stream, grad, grad.vector(),
                      static_cast<const int*>(place), static_cast<int>(images), static_cast<int>(patches), out,
                      dense_vector(out, grad.width));
      }
    });
  });
}

}  // namespace fastkd::cuda
