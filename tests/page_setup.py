"""What the blocks of a page take for granted: pictures, models and names, small ones in place of large ones.

Each function prepares the current folder, which is empty but for ``photos``, and returns names for the page's blocks.
Files and models have the names of the page, but are small or untrained; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fastkd.methods  # noqa: F401  what is patched below must not be imported by the package afterwards
import fastkd.train.build  # noqa: F401
from fastkd import models

Names = dict[str, object]


def pictures(count: int = 2, side: int = 224) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=random)


def classifiers(*names: str, classes: int = 100) -> list[nn.Module]:
    timm = pytest.importorskip("timm")
    return [timm.create_model(name, num_classes=classes) for name in names]


def small_timm(patch: pytest.MonkeyPatch, **smaller: dict) -> None:
    """timm makes some models with other arguments, and never loads pretrained weights."""
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options) -> nn.Module:
        return create(name, **{**options, **smaller.get(name, {})})

    patch.setattr(timm, "create_model", create_model)


def small_runs(patch: pytest.MonkeyPatch, **teacher) -> None:
    """Every run of `fastkd.train.distill` is one step of two pictures, with a small decoder and a small teacher."""
    from fastkd.train import held_out, loop

    patch.setattr(held_out.HeldOut, "draw", lambda *_: None)  # plots take longer than the run
    small_teacher("small.safetensors", depth=1, **teacher)
    small = dict(
        teacher="small.safetensors", decoder_depth=1, decoder_embed_dim=32, decoder_num_heads=2, steps=1, batch_size=2,
        workers=0, device="cpu", amp="off",
    )  # fmt: skip
    run = loop.distill
    patch.setattr(loop, "distill", lambda config: run(dataclasses.replace(config, **small)))


def readme(patch: pytest.MonkeyPatch) -> Names:
    small_teacher("mae_pretrain_vit_large.pth", depth=18)
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    small_runs(patch, patch_size=14)
    patch.setattr(models, "mae_vit", lambda size, **options: _mae_vit("tiny", decoder_depth=1, **options))
    logits = torch.randn(2, 4, 10)
    return dict(
        images=pictures(), student_logits=logits[0].requires_grad_(), teacher_logits=logits[1],
        target=torch.tensor([1, 2, 3, 4]),
    )  # fmt: skip


_mae_vit = models.mae_vit


def small_teacher(path: str, **shape) -> None:
    """A file in the layout of facebookresearch/mae with a width of 192 instead of its own."""
    model = models.VisionTransformer(**{"embed_dim": 192, "num_heads": 3, "depth": 12, **shape})
    if path.endswith(".safetensors"):
        models.save(model, path)
    else:
        torch.save({"model": model.state_dict()}, path)


def quickstart(patch: pytest.MonkeyPatch) -> Names:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    small_runs(patch)
    return {}


def own_model(patch: pytest.MonkeyPatch) -> Names:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained("my-vit")
    student, teacher = (network(width) for width in (4, 8))
    vit = models.VisionTransformer(embed_dim=192, depth=9, num_heads=3)
    return dict(student=student, teacher=teacher, my_vit=vit, images=pictures(side=32))


def network(width: int) -> nn.Module:
    """Pictures [B, 3, H, W] to logits [B, 2]."""
    body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
    parts = dict(body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(width, 2))
    return nn.Sequential(OrderedDict(parts))


def data(patch: pytest.MonkeyPatch) -> Names:
    from fastkd.data import pack

    pack("photos", "packed", short_side=16)
    return {}


def methods(patch: pytest.MonkeyPatch) -> Names:
    student, teacher = classifiers("resnet10t", "resnet10t")
    return dict(student=student, teacher=teacher, images=pictures(side=64), target=torch.tensor([1, 2]))


def nkd(patch: pytest.MonkeyPatch) -> Names:
    from safetensors.torch import save_file

    small_timm(patch, resnet50=dict(layers=(1, 1, 1, 1)))
    import timm

    save_file(timm.create_model("resnet50", num_classes=100).state_dict(), "teacher.safetensors")
    return dict(images=pictures(side=64), target=torch.tensor([1, 2]))


def uskd(patch: pytest.MonkeyPatch) -> Names:
    pytest.importorskip("timm")
    return dict(images=pictures(side=64), target=torch.tensor([1, 2]))


def scalekd(patch: pytest.MonkeyPatch) -> Names:
    swin = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    small_timm(patch, swin_large_patch4_window7_224=swin, resnet50=dict(layers=(1, 1, 1, 1)))
    return dict(images=pictures(), labels=torch.tensor([1, 2]))


def maskalign(patch: pytest.MonkeyPatch) -> Names:
    shape = dict(embed_dim=192, depth=5, num_heads=3)
    teacher = models.VisionTransformer(patch_size=14, **shape)
    patch.setattr(models, "IntactTeacher", lambda source, *args, **options: _IntactTeacher(teacher, *args, **options))
    patch.setattr(models, "VisionTransformer", lambda **options: _VisionTransformer(**options, **shape))
    return dict(batches=[pictures()])


_IntactTeacher, _VisionTransformer = models.IntactTeacher, models.VisionTransformer


def mic(patch: pytest.MonkeyPatch) -> Names:
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    backbone.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    detector = detection.FasterRCNN(backbone, num_classes=4, rpn_anchor_generator=anchors, min_size=64, max_size=96)
    images = torch.rand(2, 3, 64, 64)
    box = dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1]))
    return dict(
        student=nn.Conv2d(3, 5, 3, padding=1), source=[(images, torch.zeros(2, 64, 64, dtype=torch.long))],
        target=[images.flip(0)], detector=detector, targets=[box, box],
    )  # fmt: skip


def promptkd(patch: pytest.MonkeyPatch) -> Names:
    transformers = pytest.importorskip("transformers")
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=10, num_attention_heads=2)
    for name in ("large", "small"):
        config = transformers.CLIPConfig(
            text_config=dict(**tower, vocab_size=30, max_position_embeddings=12, bos_token_id=1, eos_token_id=2),
            vision_config=dict(**tower, image_size=16, patch_size=4), projection_dim=12,
        )  # fmt: skip
        transformers.CLIPModel(config).save_pretrained(name)

    def tokenizer(texts: list[str], **options) -> transformers.BatchEncoding:
        words = [[1, *(3 + sum(map(ord, word)) % 27 for word in line.rstrip(".").split()), 4, 2] for line in texts]
        ids = torch.tensor(words)
        return transformers.BatchEncoding(dict(input_ids=ids, attention_mask=torch.ones_like(ids)))

    return dict(tokenizer=tokenizer, names=["cat", "dog", "owl"], images=torch.randn(4, 3, 16, 16))


def selfdist(patch: pytest.MonkeyPatch) -> Names:
    student = models.MaskedAutoencoderViT(embed_dim=192, depth=2, num_heads=3, decoder_depth=1, img_size=64)
    models.save(student, "mae_pretrain_vit_base.safetensors")
    patch.setattr(models, "load_vit", lambda path: _load_vit("mae_pretrain_vit_base.safetensors"))
    images = pictures(side=64)
    floats = torch.randn(2, 3, 64, 64)
    return dict(images=images, loader=[floats], index=torch.arange(2))


_load_vit = models.load_vit

SETUPS: dict[str, Callable[[pytest.MonkeyPatch], Names]] = {
    "README.md": readme,
    "docs/data.md": data,
    "docs/quickstart.md": quickstart,
    "docs/own_model.md": own_model,
    "docs/methods.md": methods,
    "docs/methods/maskalign.md": maskalign,
    "docs/methods/mic.md": mic,
    "docs/methods/nkd.md": nkd,
    "docs/methods/promptkd.md": promptkd,
    "docs/methods/scalekd.md": scalekd,
    "docs/methods/selfdist.md": selfdist,
    "docs/methods/uskd.md": uskd,
}


def prepare(page: str, folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """Everything that the blocks of a page need, in a folder that becomes the current one."""
    from tiny_run import write_pictures

    patch.chdir(folder)
    write_pictures(folder / "photos")
    torch.manual_seed(0)
    return SETUPS[page](patch) if page in SETUPS else {}
