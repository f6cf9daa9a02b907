"""Cross attention projector (ScaleKD, Fan et al., NeurIPS 2024, section 3.2): student features in, teacher tokens out.

Queries shaped like the teacher's tokens look for what they need in the student's feature map:

    k = relu(norm(conv3x3(x))) + pos_embed                   [B, Cs, Hp, Wp], then tokens [B, Hp * Wp, Cs]
    q = relu(linear(query))                                  [B, Nq, Ct]; a learned query is the same for all images
    o = linear(softmax(softmax_scale / sqrt(d) * Q(q) K(k)^T) V(k))          d = Ct / num_heads; nothing is added to it
    y = layer_norm(o)
    out = y + linear(relu(linear(y)))                        the residual is the normalised y; 4 Ct wide inside
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.ops import _check

NAME = "CrossAttentionProjector"
NORMS = ("batch", "layer")


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CrossAttentionProjector(nn.Module):
    """Student features [B, Cs, Hp, Wp] -> tokens [B, Nq, Ct] in the teacher's shape.

    Exact savings: queries that are the same for all images are projected once; the attention maps are not stored
    (scaled_dot_product_attention); keys and values come from one product.

    Args:
        student_dim: Cs. teacher_dim: Ct, a multiple of num_heads.
        query_hw: grid of the output tokens, so Nq = height * width.
        pos_hw: grid of the student's features; default query_hw (variant v2 of the released code, v1 where it differs).
        num_heads: 16 at stage 3 and 24 at stage 4 for convolutional students, 8 for others, in the released
            configurations.
        softmax_scale: sharpens the attention, beside 1 / sqrt(d).
        learned_query: whether it has a query of its own; else `forward` needs one.
        norm: ``batch``, or ``layer`` (over channels) as for ConvNeXt students.

    Raises:
        ValueError: no positive sizes, teacher_dim that num_heads does not divide, an unknown norm.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        query_hw: int | tuple[int, int],
        pos_hw: int | tuple[int, int] | None = None,
        num_heads: int = 8,
        softmax_scale: float = 5.0,
        learned_query: bool = True,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.query_hw = _check.pair(NAME, "query_hw", query_hw)
        self.pos_hw = self.query_hw if pos_hw is None else _check.pair(NAME, "pos_hw", pos_hw)
        for name, value in (("student_dim", student_dim), ("teacher_dim", teacher_dim), ("num_heads", num_heads)):
            if value < 1:
                _check.fail(NAME, name, value, "a positive number")
        if teacher_dim % num_heads:
            _check.fail(NAME, "num_heads", num_heads, f"a divisor of teacher_dim = {teacher_dim}")
        if norm not in NORMS:
            _check.fail(NAME, "norm", repr(norm), "'batch' or 'layer'")
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.num_heads, self.softmax_scale = num_heads, softmax_scale
        normalisation = nn.BatchNorm2d if norm == "batch" else ChannelLayerNorm
        self.stem = nn.Sequential(
            nn.Conv2d(student_dim, student_dim, 3, padding=1), normalisation(student_dim), nn.ReLU()
        )
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, student_dim, *self.pos_hw), std=0.02))
        positions = self.query_hw[0] * self.query_hw[1]
        self.query = nn.Parameter(torch.randn(positions, teacher_dim)) if learned_query else None
        self.query_stem = nn.Sequential(nn.Linear(teacher_dim, teacher_dim), nn.ReLU())
        self.q = nn.Linear(teacher_dim, teacher_dim)
        self.kv = nn.Linear(student_dim, 2 * teacher_dim)
        self.proj = nn.Linear(teacher_dim, teacher_dim)
        self.norm = nn.LayerNorm(teacher_dim)
        self.ffn = nn.Sequential(
            nn.Linear(teacher_dim, 4 * teacher_dim), nn.ReLU(), nn.Linear(4 * teacher_dim, teacher_dim)
        )

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Tokens in the teacher's shape.

        Args:
            x: [B, Cs, Hp, Wp], the student's features.
            query: [B, Nq, Ct]; default the learned query. A gradient flows into it.

        Returns:
            [B, Nq, Ct], token index h * W + w.

        Raises:
            ValueError: shapes that do not fit, or no query where none was learned.
        """
        _check.check_tensor(NAME, "x", x, 4)
        _check.check_shape(NAME, "x", x, (len(x), self.student_dim, *self.pos_hw), "(B, student_dim, *pos_hw)")
        if query is None:
            if self.query is None:
                _check.fail(NAME, "query", "none", "tokens [B, Nq, Ct]: it was built with learned_query=False")
            query = self.query[None]
        else:
            _check.check_tensor(NAME, "query", query, 3)
            shape = len(x), self.query_hw[0] * self.query_hw[1], self.teacher_dim
            _check.check_shape(NAME, "query", query, shape, "(B, Nq, teacher_dim)")
        keys = (self.stem(x) + self.pos_embed).flatten(2).transpose(1, 2)
        q = self._heads(self.q(self.query_stem(query))).expand(len(x), -1, -1, -1)
        k, v = (self._heads(t) for t in self.kv(keys).chunk(2, dim=-1))
        scale = self.softmax_scale * (self.teacher_dim // self.num_heads) ** -0.5
        attended = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        y = self.norm(self.proj(attended))
        return y + self.ffn(y)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.student_dim} -> {self.teacher_dim}, query_hw={self.query_hw}, pos_hw={self.pos_hw}, "
            f"num_heads={self.num_heads}, softmax_scale={self.softmax_scale}"
        )
