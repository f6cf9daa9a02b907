"""Planted bugs: what is replaced, where, and which tests must notice."""

from __future__ import annotations

from typing import NamedTuple

MASKED = "fastkd/ops/masked"
FEATURES = "fastkd/ops/features"


class Mutant(NamedTuple):
    """One planted bug: `old` occurs once in `file` and becomes `new`; `tests` are arguments of pytest.

    `cpu`: the CPU variant that must run, where the file is compiled in one alone.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    cpu: str = ""


def golden(what: str, backend: str = "") -> tuple[str, ...]:
    return ("test_golden_dmae.py", "-k", f"{what} and {backend}" if backend else what)


def models(what: str) -> tuple[str, ...]:
    return ("test_golden_models.py", "-k", f"{what} and reference and float64")


def unpinned(what: str) -> tuple[str, ...]:
    return ("test_unpinned.py", "-k", what)


def linear(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_linear.py", "-k", f"{what} and {backend}")


def accuracy(op: str, backend: str) -> tuple[str, ...]:
    return ("test_ops.py", "-k", f"test_accuracy and {op} and {backend}")


PIXEL, ALIGN, MASKING = "masked_pixel_loss", "feature_alignment_loss", "random_masking"
LINEAR_PIXEL = "linear_pixel_loss"
EMBED, ASSEMBLE = "visible_patch_embed", "decoder_assemble"

LOGITS = "fastkd/ops/logits"

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
MIX, GATHER = "layer_mix", "gather_whiten_smooth_l1"


def maskalign(what: str, backend: str) -> tuple[str, ...]:
    return ("test_golden_maskalign.py", "-k", f"{what} and {backend}")


PYTHON = [
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
    Mutant("packed crops forget the flip's draw", "fastkd/data/crops.py", "flips.append(random.random() < self.flip)",
           "flips.append(False)", ("test_pack.py", "-k", "those_of_the_folder")),
    Mutant("several masks: the same key for all", "fastkd/data/loader.py",
           "random.integers(1 << 63, size=masks)", "np.repeat(random.integers(1 << 63, size=1), masks)",
           ("test_pack.py", "-k", "several_masks")),
    Mutant("pixel loss: the mask is dropped", f"{MASKED}/{PIXEL}.py",
           "weight = (mask / total).contiguous()", "weight = torch.full_like(mask, 1 / mask.numel())", golden("pixel")),
    Mutant("pixel loss: mean over images instead of the batch", f"{MASKED}/{PIXEL}.py",
           "weight = (mask / total).contiguous()", "weight = (mask / mask.sum(1, True) / batch).contiguous()",
           unpinned("mean_over_the_batch")),
    Mutant("pixel loss: biased variance", f"{MASKED}/{PIXEL}.py",
           "target.var(-1, keepdim=True)", "target.var(-1, keepdim=True, unbiased=False)",
           golden("pixel", "reference")),
    Mutant("pixel loss: another epsilon", f"{MASKED}/{PIXEL}.py", "+ eps).sqrt()", "+ 10 * eps).sqrt()",
           golden("pixel", "reference")),
    Mutant("pixel loss: half the gradient", f"{MASKED}/{PIXEL}.py", "* (2.0 / pred.shape[-1])",
           "* (1.0 / pred.shape[-1])", golden("pixel", "reference")),
    Mutant("linear pixel loss: the residual has no unit", f"{MASKED}/{LINEAR_PIXEL}.py",
           "return 2.0 ** -(rows.bit_length() // 2)", "return 1.0",
           ("test_linear_pixel_loss.py", "-k", "float16_keeps and reference")),
    Mutant("linear pixel loss: chunks count alike", f"{MASKED}/{LINEAR_PIXEL}.py", "alpha=(stop - start) / batch",
           "alpha=step / batch", ("test_linear_pixel_loss.py", "-k", "chunks")),
    Mutant("patchify: channel before row and column", f"{MASKED}/images.py",
           "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)", golden("patchify")),
    Mutant("uint8 pixels are not divided by 255", f"{MASKED}/images.py", "unit = 255.0 if", "unit = 1.0 if",
           unpinned("uint8")),
    Mutant("mean is not divided by std", f"{MASKED}/images.py", "-mean / std", "-mean", unpinned("uint8")),
    Mutant("visible count is rounded", f"{MASKED}/{MASKING}.py", "return int(num_patches * (1 - mask_ratio))",
           "return round(num_patches * (1 - mask_ratio))", golden("visible_count")),
    Mutant("keep is off by one in the mask", f"{MASKED}/{MASKING}.py", "(ids_restore >= keep)", "(ids_restore > keep)",
           golden("masking", "reference")),
    Mutant("patches get the position of their place, not their own", f"{MASKED}/{EMBED}.py",
           "x + pos_embed.to(wide)[ids]", "x + pos_embed.to(wide)[: ids.shape[1]]", models("teacher_forward")),
    Mutant("the gradient of the patch bias counts one image", f"{MASKED}/{EMBED}.py",
           "grad_bias.copy_(grad.sum(0, dtype=wide))", "grad_bias.copy_(grad_out[0, num_prefix:].sum(0, dtype=wide))",
           models("student_grads")),
    Mutant("the gradient of the mask token includes visible rows", f"{MASKED}/{ASSEMBLE}.py",
           "grad_fill.copy_(total.index_put((rows,), grad, accumulate=True))",
           "grad_fill.copy_(total.index_put((rows,), grad, accumulate=True) + grad_out.sum((0, 1)))",
           models("student_grads")),
    Mutant("no floor under the norm", f"{FEATURES}/feature_alignment.py", "NORM_FLOOR = 1e-12", "NORM_FLOOR = 1e-20",
           ("test_feature_alignment.py", "-k", "norm_floor and reference")),
    Mutant("sign of the l1 gradient", f"{FEATURES}/feature_alignment.py", "g = (u - t).sign() * scale",
           "g = (t - u).sign() * scale", golden("distill", "reference")),
    Mutant("dual view: mean over positions instead of the sum", f"{FEATURES}/dual_view.py",
           "difference.square().sum() * (alpha / len(plain))",
           "difference.square().sum() * (alpha / plain.shape[:2].numel())",
           ("test_golden_scalekd.py", "-k", "dual_view and reference")),
    Mutant("projector: residual of the attention instead of its norm", "fastkd/models/cross_attention_projector.py",
           "return y + self.ffn(y)", "return self.proj(attended) + self.ffn(y)",
           ("test_golden_scalekd.py", "-k", "projector")),
    Mutant("a teacher that requires grad is accepted", f"{FEATURES}/feature_alignment.py",
           '    _check.check_no_grad(OP, "teacher", teacher, "a distillation loss must not train the teacher")\n', "",
           ("test_feature_alignment.py",)),
    Mutant("taps are one block late", "fastkd/models/vit.py", "if index in taps:", "if index + 1 in taps:",
           models("teacher_forward")),
    Mutant("the teacher is cut at its first tap", "fastkd/models/teacher.py", "encoder(vit, max(self.blocks) + 1)",
           "encoder(vit, max(self.blocks))", models("teacher_forward")),
    Mutant("alpha is ignored", "fastkd/methods/dmae.py",
           "+ self.alpha * align_loss", "+ align_loss", unpinned("alpha")),
    Mutant("the CLS row is not aligned", "fastkd/methods/dmae.py",
           "        if ours == theirs <= 1:\n            return student, teacher\n",
           "        if ours == theirs <= 1:\n            return student[:, 1:], teacher[:, 1:]\n",
           models("student_forward")),
    Mutant("only the last pair counts", "fastkd/methods/dmae.py", "align_loss = align_loss + self._align(",
           "align_loss = self._align(", unpinned("pairs")),
    Mutant("the teacher gets the student's statistics", "fastkd/methods/dmae.py",
           "mean, std = self.teacher.mean, self.teacher.std", "mean, std = self.student.mean, self.student.std",
           unpinned("statistics")),
    Mutant("shared first block without positions", "fastkd/models/mae.py",
           "self.mask_token[0] + self.decoder_pos_embed[0, prefix:]",
           "self.mask_token[0] + 0 * self.decoder_pos_embed[0, prefix:]", models("student_forward")),
    Mutant("positions: rows and columns swapped", "fastkd/models/positions.py", "for position in (x, y)]",
           "for position in (y, x)]", golden("pos_embed")),
    Mutant("masks from keys: the upper word is off by a bit", f"{MASKED}/{MASKING}.py", "(keys[:, None] >> 32)",
           "(keys[:, None] >> 31)", ("test_masks.py", "-k", "every_backend and cpp")),
    Mutant("philox: nine rounds", f"{MASKED}/{MASKING}.py", "for _ in range(10):", "for _ in range(9):",
           ("test_masks.py", "-k", "known_answers")),
    Mutant("a graph keeps its first masks", "fastkd/train/step.py", "buffer.copy_(value, non_blocking=True)",
           "buffer.copy_(value) if name == 'images' or not self._replays else None",
           ("test_step.py", "-k", "captured_steps")),
    Mutant("gradients of a step are not dropped", "fastkd/train/step.py", "            self.optimizer.zero_grad()\n\n",
           "\n", ("test_step.py", "-k", "training_curve")),
    Mutant("losses of the last micro-batch alone", "fastkd/train/step.py", "losses if first else self.losses + losses",
           "losses", ("test_train.py", "-k", "accumulation")),
    Mutant("linear: bias without its gradient", "fastkd/ops/blocks/linear.py", "bias_gradient.to(ctx.bias_dtype) if",
           "0 * bias_gradient.to(ctx.bias_dtype) if", accuracy("linear", "reference")),
    Mutant("8-bit teacher: scales are cast with the model", "fastkd/models/quantized.py",
           "setattr(self, name, value.to(getattr(self, name).device))", "pass",
           ("test_teacher_precision.py", "-k", "survive")),
    Mutant("8-bit teacher: the first block too", "fastkd/models/quantized.py", "EXACT_BLOCKS = 1", "EXACT_BLOCKS = 0",
           ("test_teacher_precision.py", "-k", "features_are_close")),
    Mutant("warm-up starts above 0", "fastkd/train/schedule.py", "return lr * epoch / warmup_epochs",
           "return lr * (epoch + 1) / warmup_epochs", ("test_golden_models.py", "-k", "lr_schedule")),
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
]  # fmt: skip

TRITON = [
    Mutant("triton unit rows: no way back through the norm", f"{LOGITS}/class_vectors_triton.py",
           "(g - u * along)", "g", accuracy("class_vector_kd", "triton")),
    Mutant("triton crop: sums are cut before they are shifted", "fastkd/ops/images/resized_crop_triton.py",
           "tl.minimum(tl.maximum(sums >> _PLACES, 0), 255)", "tl.minimum(tl.maximum(sums, 0) >> _PLACES, 254)",
           ("test_resized_crop.py", "-k", "order_of_the_axes and triton")),
    Mutant("triton masking: off by one", f"{MASKED}/{MASKING}_triton.py", "(rank >= keep)", "(rank > keep)",
           golden("masking", "triton")),
    Mutant("triton masking: ties the other way", f"{MASKED}/{MASKING}_triton.py",
           "y = tl.where(y != y, float(\"inf\"), y)\n        before = (y[None, :] < x[:, None])",
           "y = tl.where(y != y, float(\"inf\"), y)\n        before = (y[None, :] <= x[:, None])",
           unpinned("ties and triton")),
    Mutant("triton masks from keys: the next patch's noise", f"{MASKED}/{MASKING}_triton.py",
           "tl.randint4x(key, patch)", "tl.randint4x(key, patch + 1)",
           ("test_masks.py", "-k", "every_backend and triton")),
    Mutant("triton pixel loss: biased variance", f"{MASKED}/{PIXEL}_triton.py", "axis=0) / (P - 1)", "axis=0) / P",
           golden("pixel", "triton")),
    Mutant("triton pixel loss: the upstream gradient is ignored", f"{MASKED}/{PIXEL}_triton.py",
           "tl.load(grad_loss).to(tl.float32) * w", "w", golden("pixel", "triton")),
    Mutant("triton linear pixel loss: no bias", f"{MASKED}/{LINEAR_PIXEL}_triton.py", "x += tl.load(bias + i",
           "x += 0.0 * tl.load(bias + i", accuracy(LINEAR_PIXEL, "triton")),
    Mutant("triton alignment: gradient is not projected", f"{FEATURES}/feature_alignment_triton.py",
           "g = (g - u * along)", "g = (g - u * 0.0)", golden("distill", "triton")),
    Mutant("triton dual view: the mean of the gradient stays", f"{FEATURES}/dual_view_triton.py",
           "second = (second - lost) * scale_y", "second = second * scale_y",
           ("test_golden_scalekd.py", "-k", "dual_view and triton")),
    Mutant("triton assembly: fill of another patch", f"{MASKED}/{ASSEMBLE}_triton.py",
           "fill_row = patch if PER_PATCH else patch * 0", "fill_row = patch * 0", accuracy(ASSEMBLE, "triton")),
    Mutant("triton quantisation: float8 ties away from even", "fastkd/ops/blocks/quantize_rows_triton.py",
           "+ 0x7FFFF + ((size >> 20) & 1)", "+ 0x80000",
           ("test_teacher_precision.py", "-k", "every_float8_value")),
    Mutant("triton embedding: no bias", f"{MASKED}/{EMBED}_triton.py", "    if BIAS:\n        sums +=",
           "    if BIAS:\n        sums += 0.0 *", accuracy(EMBED, "triton")),
    Mutant("triton attention: heads of a tile see each other", "fastkd/ops/blocks/attention_triton.py",
           "(head[:, None] == head_k[None, :])", "(head[:, None] >= 0)", accuracy("attention-few_tokens", "triton")),
    Mutant("triton attention: a new maximum leaves the sums", "fastkd/ops/blocks/attention_triton.py",
           "value, result * shrink[:, None]", "value, result", accuracy("attention-sharp", "triton")),
    Mutant("triton attention: the row sum of many keys is taken for 1", "fastkd/ops/blocks/attention_long_triton.py",
           "    delta /= total\n", "    delta /= total + 1.0\n", accuracy("attention-long", "triton")),
    Mutant("triton layer norm: every second tile of rows", "fastkd/ops/blocks/residual_layer_norm_triton.py",
           "rows, programs * ROWS)", "rows, 2 * programs * ROWS)", accuracy("layer_norm-many_rows", "triton")),
    Mutant("triton mlp: the bias gradient of the last tile", "fastkd/ops/blocks/mlp_triton.py",
           "sums += grad", "sums = grad", ("test_blocks.py", "-k", "products and mlp and triton")),
    Mutant("triton layer mix: every tile writes the first share", f"{FEATURES}/layer_mix_triton.py",
           "partial + program * (MIXTURES * LAYERS)", "partial + program * 0", accuracy(MIX, "triton")),
    Mutant("triton gather: the row beside", f"{FEATURES}/gather_whiten_triton.py",
           "num_prefix + seen, k)", "seen, k)", maskalign("teacher_target", "triton")),
]  # fmt: skip

NATIVE = [
    Mutant("C++ unit rows: the gradient's projection keeps the scale", "csrc/class_vectors.cpp",
           "along / A(scale * scale)", "along / A(scale)", accuracy("class_vector_kd", "cpp")),
    Mutant("C++ linear head: the bias is not scaled", "csrc/linear_loss.cpp",
           "_mm512_mul_ps(by, _mm512_maskz_loadu_ps(valid, bias + half))", "_mm512_maskz_loadu_ps(valid, bias + half)",
           accuracy("linear_cross_entropy", "cpp"), "amx"),
    Mutant("C++ top-k rows: the last classes are left out of the sum", "csrc/linear_loss.cpp",
           "for (int64_t i = whole; i < n; ++i) total += std::exp(x[i] - most);", "", linear("topk", "cpp")),
    Mutant("C++ masking: ties the other way", f"csrc/{MASKING}.cpp", "(j < i));", "(j > i));",
           unpinned("ties and cpp")),
    Mutant("C++ masks from keys: nine rounds", "csrc/philox.h", "round < 10", "round < 9",
           ("test_masks.py", "-k", "every_backend and cpp")),
    Mutant("C++ pixel loss: biased variance", "csrc/pixels.h", "std::sqrt(square / (n - 1) + eps)",
           "std::sqrt(square / n + eps)", golden("pixel", "cpp")),
    Mutant("C++ pixel loss: writes one element too many", f"csrc/{PIXEL}.cpp", "std::fill_n(out + row * n, n, T(0));",
           "std::fill_n(out + row * n, n + 1, T(0));",
           ("test_fuzz.py", "-k", f"test_fuzz and {PIXEL} and cpp")),
    Mutant("C++ pixel loss: visible rows are not cleared", f"csrc/{PIXEL}.cpp",
           "std::fill_n(out + row * n, n, T(0));", "(void)row;", accuracy(PIXEL, "cpp")),
    Mutant("C++ pixels: column before row", "csrc/pixels.h",
           "          *out++ = static_cast<A>(corner[y * sh_ + x * sw_ + c * sc_]) * scale_[c] + shift_[c];",
           "          *out++ = static_cast<A>(corner[y * sw_ + x * sh_ + c * sc_]) * scale_[c] + shift_[c];",
           accuracy(PIXEL, "cpp")),
    Mutant("C++ linear pixel loss: the second run of a line is not read", f"csrc/{LINEAR_PIXEL}.cpp",
           "bytes = _mm_mask_loadu_epi8(bytes, w.second, corner + w.jump);", "", accuracy(LINEAR_PIXEL, "cpp"), "amx"),
    Mutant("C++ linear pixel loss: values beyond the patch count", f"csrc/{LINEAR_PIXEL}.cpp",
           "return _mm512_maskz_mov_ps(lanes[half], d);", "return d;", accuracy(LINEAR_PIXEL, "cpp"), "amx"),
    Mutant("C++ pixels: the first line for all", "csrc/pixels.h", "++y, corner += sh_, out += line)",
           "++y, out += line)", accuracy(PIXEL, "cpp")),
    Mutant("C++ alignment: sign(0) is 1", "csrc/align_math.h", "return A(d > 0) - A(d < 0);",
           "return A(d >= 0) - A(d < 0);", ("test_feature_alignment.py", "-k", "equal_rows and cpp")),
    Mutant("C++ alignment: another floor", "csrc/align_math.h", "kFloor = A(1e-12)", "kFloor = A(1e-6)",
           ("test_feature_alignment.py", "-k", "norm_floor and cpp")),
    Mutant("C++ dual view: a norm below the floor is projected", "csrc/dual_view.cpp",
           "px < A(1e12) ? along_x : A(0)", "along_x", ("test_dual_view.py", "-k", "norm_floor and cpp")),
    Mutant("C++ assembly: the last filled row has no gradient", f"csrc/{ASSEMBLE}.cpp",
           "for (int64_t i = given; i < total; ++i) add_row(grad(b, i), width, sum);",
           "for (int64_t i = given; i < total - 1; ++i) add_row(grad(b, i), width, sum);", accuracy(ASSEMBLE, "cpp")),
    Mutant("C++ attention: softmax scale", "csrc/attention.cpp",
           "q.load(s.queries, Q, dp, A(1) / std::sqrt(A(s.dim)));",
           "q.load(s.queries, Q, dp, A(1) / A(s.dim));", accuracy("attention", "cpp")),
    Mutant("C++ gather: epsilon of the students' norms", "csrc/gather_whiten.cpp", "squares / n + A(1e-5)",
           "squares / n + A(1e-6)", maskalign("teacher_target", "cpp")),
    Mutant("C++ layer mix: the last elements of a tile are not written", "csrc/layer_mix.cpp",
           "convert_row(lines, count, mutable_data", "convert_row(lines, count - 1, mutable_data",
           accuracy(MIX, "cpp")),
    Mutant("C++ GELU: the density is left out of the slope", "csrc/gelu_math.h", "area + x * bell * 0.39894228f",
           "area + 0 * bell", accuracy("gelu", "cpp")),
    Mutant("int8: deep products start again", "csrc/gemm_int8.h", "block(i), l > 0);", "block(i), false);",
           accuracy("linear_int8", "cpp")),
    Mutant("int8: the last channels do not count for the scale", "csrc/linear_int8.cpp", "i < width; i += 16",
           "i + 16 < width; i += 16", accuracy("linear_int8", "cpp")),
    Mutant("C++ linear: deep products start again", "csrc/gemm_amx.h",
           "multiply<true>(length, x, strip, y, strip, block, l > 0",
           "multiply<true>(length, x, strip, y, strip, block, false", accuracy("linear", "cpp"), "amx"),
    Mutant("C++ linear: the last rows of a deep sum replace the first", "csrc/linear.cpp", "if (start > 0) value",
           "if (start < 0) value", accuracy("linear", "cpp"), "amx"),
    Mutant("C++ linear: blocks of a deep sum share their memory", "csrc/gemm_amx.h", "(sweeps > 1 ? i :",
           "(sweeps > 99 ? i :", accuracy("linear", "cpp"), "amx"),
    Mutant("C++ linear: the last block is not written", "csrc/gemm_amx.h", "      finish_share(1, 1);\n", "",
           accuracy("linear", "cpp"), "amx"),
    Mutant("C++ linear: a block's first rows are finished again", "csrc/gemm_amx.h",
           "before.c + 32 * finished", "before.c", accuracy("linear", "cpp"), "amx"),
    Mutant("C++ MLP: the slope of GELU is left out", "csrc/mlp.cpp", "_mm512_mul_ps(g, (__m512)slope)", "g",
           accuracy("mlp", "cpp"), "amx"),
    Mutant("C++ linear: bias gradient without the last columns", "csrc/gemm_amx.h", "_mm512_storeu_ps(sums + i, sum);",
           "if (i < 16) _mm512_storeu_ps(sums + i, sum);", accuracy("linear", "cpp"), "amx"),
    Mutant("C++ crop: negative weights are rounded up", "csrc/resized_crop.cpp",
           "scaled < 0 ? scaled - 0.5 : scaled + 0.5", "scaled + 0.5", ("test_resized_crop.py", "-k", "bits and cpp")),
    Mutant("C++ crop: columns always first", "csrc/resized_crop.cpp",
           "if (tall > height && tall - height > 2 * (wide - width)) {", "if (false) {",
           ("test_resized_crop.py", "-k", "order_of_the_axes and cpp")),
    Mutant("AMX attention: delta of the row before", "csrc/attention_amx.h",
           "_mm512_loadu_ps(slope[r] + j), delta[r])", "_mm512_loadu_ps(slope[r] + j), delta[0])",
           accuracy("attention", "cpp"), "amx"),
]  # fmt: skip

CUDA = [  # the emulation compiles them for the CPU
    Mutant("CUDA attention: the next queries come before the last ones are read", "csrc/attention_backward.cu",
           "if (first > 0) __syncthreads();", "", ("test_cuda_emulation.py", "-k", "awkward_sizes and attention")),
    Mutant("CUDA sums: every group is the first", "csrc/cuda_sums.cuh", "(first + group * count + m % count)",
           "(first + m % count)", ("test_cuda_emulation.py", "-k", "test_accuracy and registers")),
]  # fmt: skip

# No bug: shows that the judge does not call everything found.
HARMLESS = Mutant("a comment", "fastkd/train/schedule.py", "import math\n", "import math  # changes nothing\n",
                  ("test_golden_models.py", "-k", "lr_schedule"))  # fmt: skip
MUTANTS = PYTHON + TRITON + NATIVE + CUDA
# Run by the test suite itself; the rest by `python tests/mutation/run.py`.
QUICK = ("pixel loss: mean over images instead of the batch", "triton masking: off by one")
