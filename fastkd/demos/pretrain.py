"""Pre-trains the teacher of the demos: a masked autoencoder (DMAE without teacher) on pictures in memory.

    python -m fastkd.demos.pretrain --fashion /usr/share/datasets/fashion-mnist --out teacher.safetensors

made the teacher in `assets`; its log lies beside it. With --data FOLDER it makes one for any labelled image folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastkd.evaluation.pictures import evaluate
from fastkd.methods.dmae import DMAE
from fastkd.models.saving import save

from . import pictures
from .training import Recipe, fit, masked_autoencoder, one_thread, statistics

SHAPE = dict(embed_dim=128, depth=6, num_heads=4, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4)


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.demos.pretrain", description="Pre-trains a demo teacher.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fashion", type=Path, help="folder with the four idx files of Fashion-MNIST")
    source.add_argument("--data", type=Path, help="any image folder, one folder per class")
    parser.add_argument("--size", type=int, default=32, help="side in pixels for --data")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="grey or colour for --data")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True, help=".safetensors to write; the log goes beside it")
    o = parser.parse_args(options)

    train, test = pictures.fashion(o.fashion) if o.fashion else pictures.folder(o.data, o.size, o.channels)
    shape = dict(SHAPE, img_size=train.images.shape[1:3], in_chans=train.images.shape[3], patch_size=o.patch_size)
    model = masked_autoencoder({**shape, **statistics(train.images)}, o.seed)
    recipe = Recipe(o.steps, o.batch_size, o.lr)
    probe = train.balanced(600, seed=0), test.balanced(200, seed=0)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    log = o.out.with_suffix(".log.jsonl")
    log.write_text("")
    running = None

    def report(step: int, losses: dict[str, float]) -> None:
        nonlocal running
        loss = losses["pixel_loss"]
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % max(1, o.steps // 12) and step != o.steps:
            return
        row = dict(step=step, pixel_loss=round(running, 4))
        if step % max(1, o.steps // 3) == 0 or step == o.steps:
            scores = evaluate(model, *probe)
            row.update(knn=round(scores.knn, 4), linear=round(scores.linear, 4))
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    with one_thread():
        seconds = fit(DMAE(model, teacher=None), train.images, o.mask_ratio, recipe, o.seed, report)
    save(model, o.out)
    print(f"{o.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {seconds:.0f} s of processor time")


if __name__ == "__main__":
    main()
