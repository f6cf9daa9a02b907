"""Class vectors of a vision-language model: text features stored once, and the layer that leads to their width."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

UNIT = 1e-3  # how far a norm may be from 1: text features are often stored in 16 bits


class ClassVectorBank:
    """Unit text features of classes, with their names; takes the place of a text encoder (PromptKD, section 3.2).

    Args:
        text_features: [C, D] floating, rows of norm 1; kept in float32, without gradient.
        class_names: C different names.

    Raises:
        ValueError: rows that are not of norm 1, names that do not fit.
    """

    def __init__(self, text_features: Tensor, class_names: Sequence[str]) -> None:
        features, names = text_features.detach().float(), tuple(map(str, class_names))
        if features.ndim != 2 or len(features) != len(names):
            raise ValueError(
                f"ClassVectorBank: got features of shape {tuple(features.shape)} and {len(names)} names, "
                "expected [C, D] and C names"
            )
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"ClassVectorBank: got class names more than once: {', '.join(twice[:5])}")
        away = (torch.linalg.vector_norm(features, dim=1) - 1).abs().max().item() if len(names) else 0.0
        if not away <= UNIT:
            raise ValueError(
                f"ClassVectorBank: text_features: got a row whose norm is {away:.3g} away from 1, expected unit rows; "
                "pass torch.nn.functional.normalize(text_features, dim=1)"
            )
        self.text_features, self.class_names = features, names

    def __len__(self) -> int:
        return len(self.class_names)

    def __repr__(self) -> str:
        return f"ClassVectorBank({len(self)} classes, {self.text_features.shape[1]} wide)"

    def subset(self, classes: Iterable[int | str]) -> ClassVectorBank:
        """The bank of some classes, by index or name, in the given order."""
        index = {name: i for i, name in enumerate(self.class_names)}
        unknown = [c for c in classes if isinstance(c, str) and c not in index]
        if unknown:
            raise ValueError(f"ClassVectorBank: no class {unknown[0]!r} among {len(self)}")
        rows = [index[c] if isinstance(c, str) else int(c) for c in classes]
        return ClassVectorBank(self.text_features[rows], [self.class_names[i] for i in rows])

    def halves(self) -> tuple[ClassVectorBank, ClassVectorBank]:
        """Base and novel classes of base-to-novel evaluation: the first ceil(C / 2), and the rest."""
        middle = (len(self) + 1) // 2
        return self.subset(range(middle)), self.subset(range(middle, len(self)))

    def logits(self, features: Tensor, scale: float = 100.0) -> Tensor:
        """Scaled cosines of features [B, D] with every class."""
        return scale * nn.functional.normalize(features.float(), dim=1) @ self.text_features.to(features.device).t()

    def save(self, path: str | Path) -> None:
        """Writes .safetensors or .npz."""
        path, names = Path(path), list(self.class_names)
        if path.suffix == ".npz":
            import numpy as np

            np.savez(path, text_features=self.text_features.cpu().numpy(), class_names=np.array(names, dtype=str))
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            features = self.text_features.cpu().contiguous()
            save_file({"text_features": features}, path, metadata={"class_names": json.dumps(names)})
        else:
            raise ValueError(f"ClassVectorBank: got {path.name}, expected a name that ends in .safetensors or .npz")

    @classmethod
    def load(cls, path: str | Path) -> ClassVectorBank:
        """Reads what `save` wrote."""
        path = Path(path)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as file:
                return cls(torch.from_numpy(file["text_features"]), file["class_names"].tolist())
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names = (file.metadata() or {}).get("class_names")
            if names is None or "text_features" not in file.keys():  # noqa: SIM118
                raise ValueError(f"ClassVectorBank: {path} has no text_features with class_names")
            return cls(file.get_tensor("text_features"), json.loads(names))


class FeatureProjector(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: a student's features [B, in_dim] at the teacher's width (PromptKD, section 3.3).

    The released code has 1 x 1 convolutions on [B, in_dim, 1, 1]: the same, with weights [out, in, 1, 1].
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim), nn.ReLU(), nn.Linear(out_dim, out_dim))

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) < 2:
            raise ValueError(
                f"FeatureProjector: got a batch of {len(features)}, expected 2 or more in training: it normalises over "
                "the batch; drop the last batch, or call eval()"
            )
        return super().forward(features)
