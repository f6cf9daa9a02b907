"""Contrastive representation distillation with memory banks (CRD, Tian et al. 2020, section 3.2 and the authors' code).

Both features are embedded linearly in one space and normalised to s and t. A bank remembers the embedding of every
sample of the data set: m1 those of the student, m2 those of the teacher. Each side is told apart from K random entries
of the other side's bank (`crd_nce_loss`), then writes its own:

    loss = nce(s, m2, Z_s) + nce(t, m1, Z_t)           m[index] <- u(momentum m[index] + (1 - momentum) embedding)

The normalisers Z come from the first batch and stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from .crd_nce_loss import crd_nce_loss, crd_normaliser

OP = "CRDLoss"


class CRDLoss(nn.Module):
    """Contrastive representation distillation; usual weight 0.8.

    Its parameters (two linear embeddings) are trained with the student's. Its state holds banks and normalisers. A call
    in training writes the banks, so call it once per batch: not under gradient checkpointing. In several processes each
    has banks of its own (with DistributedDataParallel set broadcast_buffers=False).

    Args:
        student_dim: width of the student's feature vector.
        teacher_dim: width of the teacher's.
        n_data: samples in the training set: rows of each bank.
        feature_dim: width of the common space.
        nce_k: negatives per sample.
        temperature: of the scores, > 0.
        momentum: share of a bank's row that stays, in [0, 1].
        eps: added to K / n_data in the denominators.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        n_data: int,
        feature_dim: int = 128,
        nce_k: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            _check.fail(OP, "temperature", temperature, "a positive number")
        if not 0 <= momentum <= 1:
            _check.fail(OP, "momentum", momentum, "a number in [0, 1]")
        if min(n_data, nce_k) < 1:
            _check.fail(OP, "n_data, nce_k", (n_data, nce_k), "positive numbers")
        self.n_data, self.nce_k, self.temperature, self.momentum, self.eps = n_data, nce_k, temperature, momentum, eps
        self.embed_s = nn.Linear(student_dim, feature_dim)
        self.embed_t = nn.Linear(teacher_dim, feature_dim)
        bound = (feature_dim / 3) ** -0.5  # as the authors start: rows of about unit length
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(n_data, feature_dim).uniform_(-bound, bound))
        for name in ("z_s", "z_t"):  # not yet known
            self.register_buffer(name, torch.tensor(-1.0))
        self._normalised = False
        self.register_load_state_dict_post_hook(CRDLoss._know_normalisers)

    def _know_normalisers(self, *_) -> None:
        # Read back here, once, so that no training step has to wait for the device.
        self._normalised = bool(self.z_s > 0) and bool(self.z_t > 0)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        contrast_index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of one batch; in training mode it writes the banks as well.

        Args:
            student: [N, student_dim], or maps [N, C, ...] with that many elements; floating.
            teacher: [N, teacher_dim] likewise. Must not require grad.
            index: [N] int64, the samples' places in the data set, no place twice.
            contrast_index: [N, K + 1] int64, column 0 equal to `index`; by default K negatives are drawn uniformly from
                the whole set (a draw may hit the sample itself, as in the authors' code).
            generator: of these draws, on the device of `index`.

        Returns:
            Scalar, float32 (float64 for float64 modules): the sum of both sides.

        Raises:
            ValueError: shapes that do not fit, or a teacher that requires grad.
            TypeError: an index that is not int64.
        """
        _check.check_tensor(OP, "index", index, 1, (torch.int64,))
        _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")
        student, teacher = student.flatten(1), teacher.flatten(1)
        for name, feature, layer in (("student", student, self.embed_s), ("teacher", teacher, self.embed_t)):
            _check.check_shape(OP, name, feature, (len(index), layer.in_features), "(samples of index, width)")
        if contrast_index is None:
            shape = (len(index), self.nce_k + 1)
            contrast_index = torch.randint(self.n_data, shape, device=index.device, generator=generator)
            contrast_index[:, 0] = index
        s, t = (self._embed(layer, x) for layer, x in ((self.embed_s, student), (self.embed_t, teacher)))
        if not self._normalised:
            self.z_s.copy_(crd_normaliser(s, self.memory_t, contrast_index, self.temperature))
            self.z_t.copy_(crd_normaliser(t, self.memory_s, contrast_index, self.temperature))
            self._normalised = True
        loss = crd_nce_loss(s, self.memory_t, contrast_index, self.z_s, self.temperature, eps=self.eps)
        loss = loss + crd_nce_loss(t, self.memory_s, contrast_index, self.z_t, self.temperature, eps=self.eps)
        if self.training:
            self._remember(self.memory_s, index, s)
            self._remember(self.memory_t, index, t)
        return loss

    @staticmethod
    def _embed(layer: nn.Linear, x: Tensor) -> Tensor:
        y = layer(x)  # 16 bits under autocast; lengths are taken in float32
        return F.normalize(y.double() if y.dtype == torch.float64 else y.float(), dim=1)

    @torch.no_grad()
    def _remember(self, memory: Tensor, index: Tensor, embedding: Tensor) -> None:
        mixed = torch.lerp(embedding.detach(), memory[index].to(embedding.dtype), self.momentum)
        memory.index_copy_(0, index, F.normalize(mixed, dim=1).to(memory.dtype))

    def extra_repr(self) -> str:
        return f"n_data={self.n_data}, nce_k={self.nce_k}, temperature={self.temperature}, momentum={self.momentum}"
