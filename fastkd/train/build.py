"""From a config to a model: names and paths become modules, defaults become numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastkd import _native
from fastkd.data import ImageLoader, PackedImages, PairedLoader, open_images
from fastkd.methods.dmae import DMAE
from fastkd.models import MaskedAutoencoderViT, Teacher, VisionTransformer, load_vit, mae_vit
from fastkd.models.mae import SIZES
from fastkd.models.quantized import why_not_fast
from fastkd.models.saving import encoder

from .checkpoint import weights_of
from .config import ConfigError, DistillConfig, RunConfig, problem
from .distributed import Processes, own_cores
from .optimizer import make_optimizer

_NAME = re.compile(r"(?:mae_)?vit_(\w+?)_patch(\d+)(?:_(\d+))?")
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
# What loading a model reports when the source is wrong, as opposed to a bug.
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def build_student(config: DistillConfig) -> MaskedAutoencoderViT:
    """The student: a new one by name, or one from a checkpoint. ValueError where it is neither."""
    if Path(config.student).expanduser().exists():
        student = load_vit(weights_of(config.student), img_size=config.img_size)
        if not isinstance(student, MaskedAutoencoderViT):
            raise ValueError("got an encoder without decoder, expected a masked autoencoder")
        student.norm_pix_loss = config.norm_pix_loss
        return student
    size, patch, img_size = _parse_name(config.student)
    return mae_vit(
        size,
        patch_size=patch,
        img_size=config.img_size or img_size,
        in_chans=config.in_chans,
        norm_pix_loss=config.norm_pix_loss,
        decoder=config.decoder,
        decoder_depth=config.decoder_depth,
        decoder_embed_dim=config.decoder_embed_dim,
        decoder_num_heads=config.decoder_num_heads,
    )


def build_encoder(config: RunConfig) -> VisionTransformer:
    """A student without decoder: a new one by name, or the encoder of a checkpoint or run."""
    if Path(config.student).expanduser().exists():
        student = load_vit(weights_of(config.student), img_size=config.img_size)
        return encoder(student) if isinstance(student, MaskedAutoencoderViT) else student
    size, patch, img_size = _parse_name(config.student)
    width = SIZES[size]
    return VisionTransformer(
        patch_size=patch, img_size=config.img_size or img_size, in_chans=config.in_chans,
        **dict(zip(("embed_dim", "depth", "num_heads"), width)),
    )  # fmt: skip


def _parse_name(name: str) -> tuple[str, int, int]:
    """(size, patch size, image size) of a name such as vit_tiny_patch16_224."""
    match = _NAME.fullmatch(name)
    if not match or match[1] not in SIZES:
        names = ", ".join(f"vit_{size}_patch16" for size in SIZES)
        raise ValueError(f"got {name!r}, expected one of {names} (any patch size), or a checkpoint or run")
    return match[1], int(match[2]), int(match[3] or 224)


def build_teacher(config: DistillConfig, img_size: tuple[int, int]) -> VisionTransformer | None:
    """The teacher, whole, for images of this size; None for a plain masked autoencoder."""

    return None if config.teacher == "none" else load_vit(weights_of(config.teacher), img_size=img_size)


def build(config: DistillConfig, device: torch.device) -> tuple[DMAE, DistillConfig]:
    """The method with student and teacher on a device, and the config with everything resolved that depends on them.

    The new weights are fixed by ``config.seed``. A teacher that runs in 16 bits keeps its weights so.

    Raises:
        ConfigError: names, paths, blocks or sizes that do not fit; as many problems at once as can be found.
    """
    problems: list[str] = []
    student = teacher = None
    torch.manual_seed(config.seed)
    try:
        student = build_student(config)
    except EXPECTED as error:
        problems.append(f"--student: {error}")
    try:
        teacher = build_teacher(config, student.img_size if student is not None else config.img_size)
    except EXPECTED as error:
        problems.append(f"--teacher: {error}")
    if problems:
        raise ConfigError(problems)
    changes = dict(img_size=student.img_size, in_chans=student.in_chans, amp=choose_amp(config.amp, device))
    student.residual_dtype = torch.float32 if config.residual == "fp32" else None
    if teacher is not None:
        changes["student_blocks"] = config.student_blocks or (default_block(student.depth),)
        changes["teacher_blocks"] = config.teacher_blocks or (default_block(teacher.depth),)
        for argument, depth in (("student_blocks", student.depth), ("teacher_blocks", teacher.depth)):
            if not all(0 <= block < depth for block in changes[argument]):
                problems.append(problem(argument, changes[argument], f"indices from 0 to {depth - 1}"))
    config = dataclasses.replace(config, **changes)
    slow = why_not_fast(config.teacher_precision, device, AMP[config.amp] or torch.float32)
    if slow and teacher is not None:
        problems.append(problem("teacher_precision", config.teacher_precision, "exact", slow))
    patches = student.num_patches
    visible = int(patches * (1 - config.mask_ratio))
    if not 0 < visible < patches:
        bounds = f"{1 / patches:.3g} to {1 - 1 / patches:.3g} for {patches} patches"
        problems.append(problem("mask_ratio", config.mask_ratio, bounds, "at least one patch visible and one masked"))
    if problems:
        raise ConfigError(problems)
    try:
        if teacher is not None:
            teacher = Teacher(teacher, config.teacher_blocks, dtype=AMP[config.amp], precision=config.teacher_precision)
        torch.manual_seed(config.seed + 1)  # projectors: the same whatever was drawn above
        model = DMAE(
            student,
            teacher,
            config.student_blocks or (),
            config.teacher_blocks or (),
            projector=None if config.projector == "none" else config.projector,
            loss=config.loss,
            alpha=config.alpha,
            decode_fraction=config.decode_fraction,
            reconstruct=config.reconstruct,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError([str(error)]) from error
    return model.to(device).train(), config


def default_block(depth: int) -> int:
    """Index of the block that ends three quarters of the depth (8 of 12, 17 of 24)."""
    return max(depth * 3 // 4 - 1, 0)


def choose_amp(amp: str, device: torch.device) -> str:
    """``bf16``, ``fp16`` or ``off``: what ``auto`` means on this device."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _native.cpu_features() & {"avx512_bf16", "amx_bf16"} else "off"


def build_optimizer(config: RunConfig, method: nn.Module, capturable: bool) -> torch.optim.Optimizer:
    """The optimiser of a run; ConfigError where its package is missing or cannot run on this device."""
    device = next(method.parameters()).device
    kind = config.optimizer
    if kind.startswith("apex") and device.type != "cuda":
        instead = "lamb" if kind == "apex-lamb" else "adamw"
        raise ConfigError([problem("optimizer", kind, f"{instead} on {device}", "apex has kernels for GPUs alone")])
    options = dict(betas=config.betas, momentum=config.momentum, capturable=capturable)
    try:
        return make_optimizer(kind, config.param_groups(method), config.lr, **options)
    except ImportError as error:
        raise ConfigError([f"--optimizer {kind}: {error}"]) from error


def recompute_activations(config: RunConfig, method: nn.Module) -> None:
    """Makes the student keep less for backward where the config asks for it; ConfigError where it cannot."""
    if not config.activation_checkpointing:
        return
    student, argument = method.student, "activation_checkpointing"
    if any(isinstance(module, _NormBase) and module.track_running_stats for module in student.modules()):
        what = f"{type(student).__name__} with BatchNorm, whose statistics would see each batch twice"
        raise ConfigError([problem(argument, what, "a ViT or another model without BatchNorm")])
    try:
        student.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # no such method; timm's answer of a model that cannot
        what = f"{type(student).__name__}, which cannot compute its blocks again"
        raise ConfigError([problem(argument, what, "a ViT or another model of timm's")]) from error


def build_loader(config: RunConfig, group: Processes) -> tuple[ImageLoader | PairedLoader, RunConfig]:
    """The training images, and the config with length and learning rate in numbers."""
    loader = _one_loader(config, "data", group)
    if getattr(config, "target", None) is not None:
        loader = PairedLoader(loader, _one_loader(config, "target", group))
    steps_per_epoch = loader.batches_per_epoch / config.accumulate
    steps = config.steps or max(1, math.floor(config.epochs * steps_per_epoch))
    epochs = config.epochs if config.steps is None else steps / steps_per_epoch
    return loader, dataclasses.replace(
        config,
        steps=steps,
        epochs=epochs,
        warmup_epochs=epochs / 5 if config.warmup_epochs is None else config.warmup_epochs,
        lr=config.blr * loader.global_batch * config.accumulate / 256 if config.lr is None else config.lr,
        val_every=config.val_every or max(1, steps // 10),
    )


def _one_loader(config: RunConfig, argument: str, group: Processes) -> ImageLoader:
    """The loader of the folder that an argument names; ConfigError where it cannot be read."""
    source = getattr(config, argument)
    try:
        folder = open_images(source)
    except (OSError, ValueError) as error:
        raise ConfigError([f"--{argument}: {error}"]) from error
    packed = isinstance(folder, PackedImages)
    if packed != (config.loader == "packed") and config.loader != "auto":
        kind = "packed images (--loader auto or packed)" if packed else "image files (--loader auto, pil or dali)"
        raise ConfigError([problem("loader", config.loader, f"what reads {source}, {kind}")])
    on_gpu = group.device.type == "cuda"
    try:
        return choose_loader(config.loader)(
            folder,
            config.img_size,
            config.batch_size,
            channels=config.in_chans,
            seed=config.seed,
            workers=choose_workers(config.workers, on_gpu, group.cores),
            rank=group.rank,
            world_size=group.world_size,
            device=group.device,
            masks_per_image=getattr(config, "masks_per_image", 1),
            **config.augmentation(),
        )
    except (ValueError, ImportError) as error:
        raise ConfigError([f"--{argument}: {error}"]) from error


def choose_loader(name: str) -> type[ImageLoader]:
    """The loader class behind --loader. ImportError where DALI is wanted and missing."""
    if name == "dali":
        from fastkd.data.dali import DaliLoader

        return DaliLoader
    return ImageLoader


def choose_workers(workers: int, on_gpu: bool, cores: int | None = None) -> int:
    """Decoding processes: on a GPU machine all cores; on a CPU a quarter of them, for training needs the others.

    Args:
        workers: as wanted; -1 chooses.
        on_gpu: whether training runs on one.
        cores: of this machine, the share of this training process; default all on which it may run.
    """
    if workers >= 0:
        return workers
    cores = len(own_cores()) if cores is None else cores
    return min(16, max(1, cores)) if on_gpu else max(1, cores // 4)
