"""The peers of the step benchmark, in plain PyTorch and independent of fastkd: same parameter names, same maths."""

from __future__ import annotations

import dataclasses

# name -> (width, blocks, heads) of the encoder
SIZES = {
    "micro": (32, 4, 2),  # for tests
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is distilled into what. The pair of aligned blocks sits at three quarters of both depths."""

    teacher: str
    student: str
    image: int = 224
    patch: int = 16
    channels: int = 3
    decoder_width: int = 512
    decoder_blocks: int = 8
    decoder_heads: int = 16

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def pixels(self) -> int:
        """Values in one patch."""
        return self.channels * self.patch**2

    @property
    def teacher_tap(self) -> int:
        return 3 * SIZES[self.teacher][1] // 4 - 1

    @property
    def student_tap(self) -> int:
        return 3 * SIZES[self.student][1] // 4 - 1

    def visible(self, mask_ratio: float) -> int:
        return int(self.patches * (1 - mask_ratio))
