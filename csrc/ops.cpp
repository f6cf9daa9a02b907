// Every native op in one list. The same list serves two libraries:
//   fastkd_cpu   this file includes the kernels (csrc/<op>.cpp), one compile per CPU variant
//   fastkd_cuda  built with FASTKD_CUDA; the kernels are in csrc/<op>.cu
// Outputs are allocated by the caller and filled: hence (a!) and no return values.
#include "common.h"

#ifdef FASTKD_CUDA
#include "cuda_ops.h"
#else
#include "random_masking.cpp"
#include "masked_pixel_loss.cpp"
#include "feature_alignment.cpp"
#endif

namespace fastkd {

#ifdef FASTKD_CUDA
#define FASTKD_LIBRARY fastkd_cuda
#define FASTKD_DEVICE CUDA
#else
#define FASTKD_LIBRARY fastkd_cpu
#define FASTKD_DEVICE CPU
#endif

STABLE_TORCH_LIBRARY(FASTKD_LIBRARY, m) {
  m.def("random_masking(Tensor noise, int keep, Tensor(a!) ids_shuffle, Tensor(b!) ids_restore, Tensor(c!) mask) -> ()");
  m.def("masked_pixel_loss(Tensor pred, Tensor images, Tensor ids, Tensor? weight, Tensor affine, int[] patch, "
        "bool norm_pix, float eps, Tensor(a!) loss) -> ()");
  m.def("masked_pixel_loss_backward(Tensor grad_loss, Tensor pred, Tensor images, Tensor ids, Tensor? weight, "
        "Tensor affine, int[] patch, bool norm_pix, float eps, Tensor(a!) grad_pred) -> ()");
  m.def("feature_alignment_loss(Tensor student, Tensor teacher, int kind, bool normalize, float beta, "
        "Tensor(a!) loss) -> ()");
  m.def("feature_alignment_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, int kind, bool normalize, "
        "float beta, Tensor(a!) grad_student) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_DEVICE, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking));
  m.impl("masked_pixel_loss", TORCH_BOX(&masked_pixel_loss));
  m.impl("masked_pixel_loss_backward", TORCH_BOX(&masked_pixel_loss_backward));
  m.impl("feature_alignment_loss", TORCH_BOX(&feature_alignment_loss));
  m.impl("feature_alignment_loss_backward", TORCH_BOX(&feature_alignment_loss_backward));
}

}  // namespace fastkd
