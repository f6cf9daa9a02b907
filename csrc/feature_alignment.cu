// Feature alignment: a warp (or a block) holds a student and a teacher row in registers; the maths is in align_math.h.
#include "cuda_rows.cuh"

namespace fastkd::cuda {
namespace {

// One row in up to three passes: squares, (backward) u . g, result. Up to 16 elements a thread, the row is read once and
// stays in registers; wider rows are read again in each pass. Passes and spans are loops so that the code exists once.
template <class T, class U, bool backward>
__global__ void __launch_bounds__(kMaxThreads, 1)
    align_kernel(Rows<T> students, Rows<U> teachers, unsigned rows, bool vector, int kind, bool normalize,
                 Align<float> math, const float* grad_loss, Rows<T> gradients, float* partial) {
  const unsigned row = row_index();
  if (row >= rows) return;  // whole warps: a block of several rows has one warp a row
  const Row<T> student = students[row];
  const Row<U> teacher = teachers[row];
  const int width = student.width;
  const float scale = backward ? *grad_loss * math.scale : 0.0f;
  float u[kItems], v[kItems], squares = 1, factor_u = 1, factor_v = 1, along = 0;
  bool loaded = false;

#pragma unroll 1
  for (int pass = normalize ? 0 : backward ? 2 : 1; pass < (backward ? 3 : 2); ++pass) {
    float sum[2] = {0, 0};
#pragma unroll 1
    for (int base = 0; base < width; base += span()) {
      if (!loaded || width > span()) {
        if (vector) {
          student.template read<true>(base, u);
          teacher.template read<true>(base, v);
        } else {
          student.template read<false>(base, u);
          teacher.template read<false>(base, v);
        }
        loaded = true;
      }
      if (pass == 0) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          sum[0] += u[i] * u[i];
          sum[1] += v[i] * v[i];
        }
        continue;
      }
      float result[kItems];
      for_kind(kind, [&](auto k) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          // __fmul_rn: contracted into the difference, the product would make equal rows differ by a rounding.
          const float a = __fmul_rn(u[i], factor_u), b = __fmul_rn(v[i], factor_v);
          result[i] = backward ? scale * Align<float>::template gradient<k>(a, b, math.inverse_beta)
                               : math.template value<k>(a, b);  // 0 beyond the row, where a = b = 0
        }
      });
      if (!backward) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sum[0] += result[i];
      } else if (pass == 1) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) sum[0] += u[i] * factor_u * result[i];
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) result[i] = (result[i] - u[i] * factor_u * along) * factor_u;
        vector ? gradients[row].template write<true>(base, result) : gradients[row].template write<false>(base, result);
      }
    }
    if (backward && pass == 2) return;
    row_sum(sum);
    if (pass == 0) {
      squares = sum[0];
      factor_u = Align<float>::inverse_norm(sum[0]);
      factor_v = Align<float>::inverse_norm(sum[1]);
    } else if (backward) {
      along = Align<float>::below_floor(squares) ? 0.0f : sum[0];
    } else if (threadIdx.x == 0) {
      partial[row] = math.finish(kind, sum[0]);
    }
  }
}

template <bool backward>
const char* run(const Alignment& op, const float* grad_loss, void* grad_student, float* partial, Stream stream) {
  return for_float(op.student.dtype, [&](auto student) {
    return for_float(op.teacher.dtype, [&](auto teacher) {
      using T = typename decltype(student)::type;
      using U = typename decltype(teacher)::type;
      const Rows<T> s(op.student), g(grad_student, op.student);
      const Rows<U> t(op.teacher);
      return launch(align_kernel<T, U, backward>, row_geometry(op.rows(), s.width), stream, s, t,
                    static_cast<unsigned>(op.rows()), s.vector() && t.vector() && g.vector(), op.kind, op.normalize,
                    op.math, grad_loss, g, partial);
    });
  });
}

}  // namespace

const char* feature_alignment_loss(const Alignment& op, float* partial, float* loss, Stream stream) {
  const char* error = run<false>(op, nullptr, nullptr, partial, stream);
  return error ? error : ordered_sum(partial, op.rows(), loss, stream);
}

const char* feature_alignment_loss_backward(const Alignment& op, const float* grad_loss, void* grad_student,
                                            Stream stream) {
  return run<true>(op, grad_loss, grad_student, nullptr, stream);
}

}  // namespace fastkd::cuda
