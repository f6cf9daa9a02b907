"""Builds models from golden files: every size comes from the parameters or from the file's config."""

from __future__ import annotations

import torch
from golden_files import Golden

from fastkd.methods.dmae import DMAE
from fastkd.models.mae import MaskedAutoencoderViT
from fastkd.models.teacher import Teacher
from fastkd.models.vit import VisionTransformer

HEADS = "aligned_feature_projection_heads."


def count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """Entries of a module list."""
    found = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    return max(found, default=-1) + 1


def encoder_options(state: dict[str, torch.Tensor], file: Golden, num_heads: int) -> dict:
    weight = state["patch_embed.proj.weight"]
    return dict(
        img_size=tuple(file["imgs"].shape[2:]),
        patch_size=tuple(weight.shape[2:]),
        in_chans=weight.shape[1],
        embed_dim=weight.shape[0],
        depth=count(state, "blocks."),
        num_heads=num_heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / weight.shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        class_token="cls_token" in state,
        norm_eps=file.option("layernorm_eps", default=1e-6),
    )


def load(model: torch.nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Loads the parameters; all of the file's must have a place, and all of the model's a value."""
    model = model.to(device, dtype)
    model.load_state_dict({name: value.to(device, dtype) for name, value in state.items()}, strict=True)
    return model


def teacher_vit(file: Golden, dtype: torch.dtype, device: str) -> VisionTransformer:
    """The teacher's encoder; decoder weights that a file may hold have no part in the method."""
    state = {k: v for k, v in file.group("param").items() if not k.startswith(("decoder_", "mask_token"))}
    return load(VisionTransformer(**encoder_options(state, file, file.option("ht"))), state, dtype, device)


def student_mae(file: Golden, dtype: torch.dtype, device: str, norm_pix_loss: bool) -> MaskedAutoencoderViT:
    state = {k: v for k, v in file.group("param").items() if not k.startswith(HEADS)}
    model = MaskedAutoencoderViT(
        decoder_embed_dim=state["decoder_embed.weight"].shape[0],
        decoder_depth=count(state, "decoder_blocks."),
        decoder_num_heads=file.option("hd"),
        norm_pix_loss=norm_pix_loss,
        **encoder_options(state, file, file.option("hs")),
    )
    return load(model, state, dtype, device)


class StoredTeacher(Teacher):
    """A teacher whose features are those of the file: for files without the teacher's parameters."""

    def __init__(self, student: MaskedAutoencoderViT, blocks: tuple[int, ...], features: list[torch.Tensor]) -> None:
        stand_in = VisionTransformer(
            img_size=student.img_size, patch_size=student.patch_size, in_chans=student.in_chans,
            embed_dim=features[0].shape[-1], depth=max(blocks) + 1, num_heads=1,
            class_token=student.cls_token is not None,
        )  # fmt: skip
        super().__init__(stand_in, blocks)
        self.features = features

    def forward(self, *args, **kwargs) -> list[torch.Tensor]:
        return self.features


def dmae(file: Golden, dtype: torch.dtype, device: str, *, norm_pix_loss: bool, share_first_block=None) -> DMAE:
    """The whole method, with the real truncated teacher where the split has its parameters."""
    student = student_mae(file, dtype, device, norm_pix_loss)
    if share_first_block is not None:
        decode = student.decode_features
        student.decode_features = lambda tokens, ids: decode(tokens, ids, share_first_block=share_first_block)
    blocks = tuple(file.option("al_t", default=()))
    teacher = None
    if blocks:
        partner = file.partner("dmae_student_forward", "dmae_teacher_forward")
        if partner is not None and (partner["imgs"] == file["imgs"]).all() and "ids_keep" in partner:
            teacher = Teacher(teacher_vit(partner, dtype, device), blocks, mean=student.mean, std=student.std)
        else:
            features = [file.tensor(f"teacher_feature_block{b}", dtype, device) for b in blocks]
            teacher = StoredTeacher(student, blocks, features)
    state = {k.removeprefix(HEADS): v for k, v in file.group("param").items() if k.startswith(HEADS)}
    projector = None if not state else "linear" if "0.weight" in state else "mlp"
    model = DMAE(
        student, teacher, tuple(file.option("al_s", default=())), blocks, projector,
        loss=str(file.option("crit", default="L1")).lower(), alpha=file.option("alpha", default=1.0),
    ).to(device, dtype)  # fmt: skip
    if projector == "mlp":  # two Linear layers whatever they are called in the file
        names = list(model.aligned_feature_projection_heads.state_dict())
        state = dict(zip(names, state.values()))
    model.aligned_feature_projection_heads.load_state_dict({k: v.to(device, dtype) for k, v in state.items()})
    return model


def noise_of(file: Golden, device: str) -> torch.Tensor:
    """Noise that gives the file's masking: its own, or the ranks of the permutation."""
    return file.tensor("noise" if "noise" in file else "ids_restore", device=device).double()
