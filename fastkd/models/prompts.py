"""Learnable tokens inside a frozen transformer: deep prompts (Jia et al. 2022), for CLIP and for any ViT."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class DeepPrompts(nn.Module):
    """Tokens that enter a transformer at several places, each place with its own; later ones replace earlier ones.

    Hooks put them in, so the transformer's own forward runs, whichever version of its library that comes from.

    Args:
        places: modules whose first positional argument is the sequence [B, T, D]; tokens enter in front of each.
        tokens: [len(places), n, D], initial values.
        start: None appends the tokens to the sequence at the first place; a number has them take the place of tokens
            start to start + n - 1 everywhere.
        offset: [n, D], added at the first place (the position table of a text encoder).
    """

    def __init__(
        self, places: Sequence[nn.Module], tokens: Tensor, *, start: int | None = None, offset: Tensor | None = None
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().clone().float())
        self.register_buffer("offset", None if offset is None else offset.detach().clone(), persistent=False)
        self.start, self._on = start, True
        for index, place in enumerate(places):
            place.register_forward_pre_hook(functools.partial(self._enter, index))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the transformer runs as if there were no prompts."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _enter(self, index: int, module: nn.Module, args: tuple) -> tuple | None:
        if not self._on:
            return None
        x, *others = args
        tokens = self.tokens[index]
        if index == 0 and self.offset is not None:
            tokens = tokens + self.offset
        count = len(tokens)
        tokens = tokens.to(x.dtype).expand(len(x), -1, -1)
        if self.start is not None:
            parts = x[:, : self.start], tokens, x[:, self.start + count :]
        else:
            parts = x if index == 0 else x[:, :-count], tokens
        return torch.cat(parts, dim=1), *others

    def extra_repr(self) -> str:
        return f"{self.tokens.shape[0]} places x {self.tokens.shape[1]} tokens x {self.tokens.shape[2]}"


class PromptedEncoder(nn.Module):
    """A frozen image tower with visual prompts: images [B, C, H, W] -> features [B, D]. Only the prompts train.

    Args:
        tower: gives features of images; its parameters are frozen here, and it stays in eval mode.
        places: where prompts enter it, see `DeepPrompts`; ``[]``: no prompts, nothing trains.
        width: of the tower's tokens.
        length: prompts at each place.
        mean, std: pixel statistics of the tower, in units where white is 1.
        generator: draws the initial prompts, normal with deviation 0.02.
    """

    def __init__(
        self,
        tower: nn.Module,
        places: Sequence[nn.Module],
        width: int,
        length: int = 4,
        *,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.mean, self.std = tuple(mean), tuple(std)
        tokens = 0.02 * torch.randn(len(places), length, width, generator=generator)
        self.prompts = DeepPrompts(places, tokens) if places else None
        self.train(self.training)

    @classmethod
    def of_clip(
        cls, clip: nn.Module, length: int = 4, depth: int = 9, *, generator: torch.Generator | None = None
    ) -> PromptedEncoder:
        """From a transformers CLIPModel; the first prompts go in front of the first norm, as in the released code."""
        layers = _first(clip.vision_model.encoder.layers, depth, "vision")
        places = [clip.vision_model.pre_layrnorm, *layers[1:]][: max(depth, 0)]
        return cls(CLIPImageTower(clip), places, clip.config.vision_config.hidden_size, length, generator=generator)

    def train(self, mode: bool = True) -> PromptedEncoder:
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images)

    def without_prompts(self) -> contextlib.AbstractContextManager:
        """Inside, features are those of the frozen tower alone."""
        return contextlib.nullcontext() if self.prompts is None else self.prompts.off()


class CLIPImageTower(nn.Module):
    """Image side of a transformers CLIPModel: pixels [B, 3, H, W] -> projected features."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.model, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.model(pixel_values=images).pooler_output)


class PromptedText(nn.Module):
    """Text side of a transformers CLIPModel, frozen, with learnable context tokens behind the first token.

    Args:
        clip: the CLIPModel.
        input_ids: [C, L], tokenised names of classes behind a template that begins with `length` words, such as
            ``"a photo of a {}."``: those are the initial context, and the same in every row.
        attention_mask: [C, L] or None.
        length: context tokens.
        depth: layers that take context tokens of their own.
        generator: draws those of the deeper layers, normal with deviation 0.02.
    """

    def __init__(
        self,
        clip: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        length: int = 4,
        depth: int = 9,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.model = clip.text_model.requires_grad_(False)
        self.projection = clip.text_projection.requires_grad_(False)
        context = input_ids[:, 1 : 1 + length]
        if context.shape[1] < length or (context != context[:1]).any():
            raise ValueError(
                f"PromptedText: input_ids: expected {length} tokens of context behind the first token, the same in "
                'every row; use a template with more words in front of the name, such as "a photo of a {}.", or a '
                "smaller length"
            )
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("attention_mask", attention_mask, persistent=False)
        embeddings = self.model.embeddings
        width = embeddings.token_embedding.embedding_dim
        layers = _first(self.model.encoder.layers, depth, "text")
        tokens = 0.02 * torch.randn(len(layers), length, width, generator=generator)
        if layers:
            tokens[0] = embeddings.token_embedding.weight[context[0]].detach().float()
        offset = embeddings.position_embedding.weight[1 : 1 + length]
        self.prompts = DeepPrompts(layers, tokens, start=1, offset=offset)

    def train(self, mode: bool = True) -> PromptedText:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self) -> Tensor:
        """[C, D], not normalised."""
        return self.projection(self.model(input_ids=self.input_ids, attention_mask=self.attention_mask).pooler_output)


def _first(layers: Sequence[nn.Module], depth: int, tower: str) -> list[nn.Module]:
    if not 0 <= depth <= len(layers):
        raise ValueError(f"prompts: depth: got {depth}, expected 0 to {len(layers)}, the layers of the {tower} tower")
    return list(layers)[:depth]
