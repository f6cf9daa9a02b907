"""Bugs planted in the losses and methods beside DMAE, see `mutants`."""

from __future__ import annotations

from .kinds import FEATURES, MASKED, Mutant, accuracy

LOGITS = "fastkd/ops/logits"
MIX, GATHER = "layer_mix", "gather_whiten_smooth_l1"


def linear(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_linear.py", "-k", f"{what} and {backend}")


def maskalign(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_maskalign.py", "-k", f"{what} and {backend}")


PYTHON = [
    Mutant("class vectors: the floor is added to the norm", f"{LOGITS}/class_vectors.py",
           "factor / norms.clamp_min(NORM_FLOOR)[:, None], out=grad_x", "factor / (norms + 1e-3)[:, None], out=grad_x",
           linear("class_vector", "reference")),
    Mutant("class vectors: no way back through the norm", f"{LOGITS}/class_vectors.py",
           "torch.mul(grad - unit * along,", "torch.mul(grad,", linear("class_vector", "reference")),
    Mutant("linear head: chunks overwrite the gradient of the weight", f"{LOGITS}/linear_products.py",
           "torch.addmm(out, grad, x, out=out)", "_product(grad, x, out)", linear("linear_cross", "reference")),
    Mutant("linear head: ignored rows count in the mean", f"{LOGITS}/linear_loss.py",
           "(target != ignore_index).sum().clamp_min(1)", "len(rows)", linear("linear_jsd", "reference")),
    Mutant("linear head: the slope of the cap is left out", f"{LOGITS}/linear_loss.py",
           "grad.mul_(z.div_(options.cap).square_().neg_().add_(1))", "pass",
           ("test_linear_losses.py", "-k", "scale_and_cap and reference")),
    Mutant("linear head: beta counts the student", f"{LOGITS}/linear_loss.py", '{0.0: "kl", 1.0: "reverse_kl"}',
           '{1.0: "kl", 0.0: "reverse_kl"}', linear("linear_jsd", "reference")),
    Mutant("top-k teacher: the tail has no slope", f"{LOGITS}/linear_topk.py", "mass - slope * (1 - mine)", "mass",
           linear("topk and tail", "reference")),
    Mutant("gather: the loss is torch's smooth L1, not twice it", f"{FEATURES}/gather_whiten.py",
           "return 2 * F.smooth_l1_loss(d", "return F.smooth_l1_loss(d", maskalign("align_loss", "reference")),
    Mutant("gather: deviation of the batch by the biased variance", f"{FEATURES}/gather_whiten.py",
           "correction=1", "correction=0", maskalign("teacher_target", "reference")),
    Mutant("layer mix: the gradient of the weights is transposed", f"{FEATURES}/layer_mix.py",
           "grad_weight.copy_(above @ below.T)", "grad_weight.view(-1).copy_((below @ above.T).flatten())",
           maskalign("align_loss", "reference")),
    Mutant("alignment: the unit matrix without 0.01 beside it", f"{FEATURES}/dynamic_alignment.py",
           "torch.eye(num_teacher_layers) + 0.01", "torch.eye(num_teacher_layers)",
           ("test_dynamic_alignment.py", "-k", "plain_formula and linear")),
    Mutant("attention masks: unimportant patches first", f"{MASKED}/attention_masking.py",
           "ordered_masking(-(", "ordered_masking((", maskalign("attention_mask", "reference")),
    Mutant("attention masks: patches are raced without the CLS token's share", f"{MASKED}/attention_masking.py",
           ".softmax(-1)\n        return attention[:, :, num_prefix:]",
           "[:, :, num_prefix:].softmax(-1)\n        return attention", maskalign("importance", "golden")),
    Mutant("MaskAlign: the teacher looks at the student's statistics", "fastkd/methods/maskalign.py",
           "by_attention, mean=self.mean, std=self.std", "by_attention", ("test_maskalign.py", "-k", "floating")),
    Mutant("dual view: mean over positions instead of the sum", f"{FEATURES}/dual_view.py",
           "difference.square().sum() * (alpha / len(plain))",
           "difference.square().sum() * (alpha / plain.shape[:2].numel())",
           ("test_golden_scalekd.py", "-k", "dual_view and reference")),
    Mutant("projector: residual of the attention instead of its norm", "fastkd/models/cross_attention_projector.py",
           "return y + self.ffn(y)", "return self.proj(attended) + self.ffn(y)",
           ("test_golden_scalekd.py", "-k", "projector")),
    Mutant("self-distillation: the class token sees its neighbour alone", "fastkd/models/vit.py",
           "self.attn.cross(head(h, 1).contiguous(), h)", "self.attn.cross(head(h, 1).contiguous(), head(h, 2))",
           ("test_self_distillation.py", "-k", "encode_is_the_full_forward and plain")),
    Mutant("self-distillation: mean over channels", f"{FEATURES}/cls_distillation.py",
           "return student.shape[-1] * feature_alignment_loss", "return feature_alignment_loss",
           ("test_golden_sdfp.py", "-k", "distill_loss and reference")),
    Mutant("self-distillation: cached tokens one place off", "fastkd/methods/self_distillation.py",
           "[prefix, ids + prefix.shape[1]]", "[prefix, ids]", ("test_self_distillation.py", "-k", "all-cache")),
    Mutant("self-distillation: padding is masked", "fastkd/methods/self_distillation_text.py",
           "(noise[0] < mask_ratio) & maskable", "noise[0] < mask_ratio",
           ("test_self_distillation.py", "-k", "masked_as_bert")),
    Mutant("logit loss: a gradient that is kept is scaled in place", f"{LOGITS}/logit_loss.py",
           "    return query is None or query()", "    return False",
           ("test_logit_losses.py", "-k", "backward_twice and reference")),
    Mutant("logit loss: ce is divided by rows where classes have weights", f"{LOGITS}/logit_loss.py",
           "if weight is not None and scores is None:", "if weight is None and scores is None:",
           ("test_logit_losses.py", "-k", "cross_entropy_is_that_of_torch and reference")),
    Mutant("logit loss: T^2 of DKD is left out", f"{LOGITS}/losses.py",
           "dkd_rest=beta * square", "dkd_rest=beta", ("test_golden_logits.py", "-k", "dkd and reference")),
]  # fmt: skip

TRITON = [
    Mutant("triton unit rows: no way back through the norm", f"{LOGITS}/class_vectors_triton.py",
           "(g - u * along)", "g", accuracy("class_vector_kd", "triton")),
    Mutant("triton dual view: the mean of the gradient stays", f"{FEATURES}/dual_view_triton.py",
           "second = (second - lost) * scale_y", "second = second * scale_y",
           ("test_golden_scalekd.py", "-k", "dual_view and triton")),
    Mutant("triton layer mix: every tile writes the first share", f"{FEATURES}/layer_mix_triton.py",
           "partial + program * (MIXTURES * LAYERS)", "partial + program * 0", accuracy(MIX, "triton")),
    Mutant("triton gather: the row beside", f"{FEATURES}/gather_whiten_triton.py",
           "num_prefix + seen, k)", "seen, k)", maskalign("teacher_target", "triton")),
    Mutant("triton logit loss: the target stays among the others", f"{LOGITS}/logit_loss_triton.py",
           "logits = tl.where(column[None, :] == y[:, None], NOTHING, logits)", "logits = logits",
           ("test_golden_logits.py", "-k", "dkd and triton")),
    Mutant("triton logit loss: parts keep their own base", f"{LOGITS}/logit_row_triton.py",
           "tl.sum(e * se, axis=1)", "tl.sum(e, axis=1)", accuracy("logit_loss-long", "triton")),
]  # fmt: skip

NATIVE = [
    Mutant("C++ unit rows: the gradient's projection keeps the scale", "csrc/class_vectors.cpp",
           "along / A(scale * scale)", "along / A(scale)", accuracy("class_vector_kd", "cpp")),
    Mutant("C++ linear head: the bias is not scaled", "csrc/linear_loss.cpp",
           "_mm512_mul_ps(by, _mm512_maskz_loadu_ps(valid, bias + half))", "_mm512_maskz_loadu_ps(valid, bias + half)",
           accuracy("linear_cross_entropy", "cpp"), "amx"),
    Mutant("C++ top-k rows: the last classes are left out of the sum", "csrc/linear_loss.cpp",
           "for (int64_t i = whole; i < n; ++i) total += std::exp(x[i] - most);", "", linear("topk", "cpp")),
    Mutant("C++ dual view: a norm below the floor is projected", "csrc/dual_view.cpp",
           "px < A(1e12) ? along_x : A(0)", "along_x", ("test_dual_view.py", "-k", "norm_floor and cpp")),
    Mutant("C++ gather: epsilon of the students' norms", "csrc/gather_whiten.cpp", "squares / n + A(1e-5)",
           "squares / n + A(1e-6)", maskalign("teacher_target", "cpp")),
    Mutant("C++ layer mix: the last elements of a tile are not written", "csrc/layer_mix.cpp",
           "convert_row(lines, count, mutable_data", "convert_row(lines, count - 1, mutable_data",
           accuracy(MIX, "cpp")),
    Mutant("C++ logit loss: blocks keep their own base", "csrc/logit_loss.h", "e *= se, f *= sf,", "f *= sf,",
           ("test_logit_losses.py", "-k", "several_blocks")),
    Mutant("C++ logit loss: the target is not told from the others", "csrc/logit_loss.h",
           "of_e -= of_slope * (slope + r.q.p * lead);", "of_e -= of_slope * slope;",
           accuracy("logit_loss-two_classes", "cpp")),
    Mutant("C++ logit loss: float16 divides twice", "csrc/logit_loss.cpp", "call.scale = 1, call.ce_scale",
           "call.ce_scale", accuracy("logit_loss", "cpp")),
]  # fmt: skip

METHODS = PYTHON + TRITON + NATIVE
