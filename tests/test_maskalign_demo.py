"""The demo of MaskAlign: what its arms share, and a short run of all of them."""

from __future__ import annotations

import json

import pytest
import torch

from fastkd.demos import DEMOS, maskalign

pytest.importorskip("sklearn")


def quick(folder) -> maskalign.Config:
    return maskalign.Config(out=folder, quick=True, steps=2, teacher_steps=2, batch_size=16)


def test_arms_share_weights_batches_and_noise(tmp_path):
    study = maskalign.Study(quick(tmp_path))
    seen, start = {}, {}
    for arm in maskalign.CANDIDATES:
        student = maskalign.masked_autoencoder({**study.shape, **maskalign.STUDENT}, 3)
        model, loss = study._method(arm, {"lr": 1e-3, "alpha": 1.0}, student)
        trained = getattr(model, "student", student)
        start[arm] = torch.cat([p.detach().flatten() for p in trained.blocks.parameters()])

        def spied(index, noise, loss=loss, arm=arm):
            seen.setdefault(arm, []).append((index, noise))
            return loss(index, noise)

        study._fit(model, 1e-3, 2, 3, spied)
        after = torch.cat([p.detach().flatten() for p in trained.blocks.parameters()])
        assert not torch.equal(after, start[arm]), f"{arm} does not train the student"
    reference, *others = seen.values()
    for other in others:
        assert all(torch.equal(a, b) for mine, theirs in zip(reference, other) for a, b in zip(mine, theirs))
    assert all(torch.equal(value, start[maskalign.MAE]) for value in start.values())


def test_all_methods_see_as_many_patches(tmp_path):
    study = maskalign.Study(quick(tmp_path))
    images, noise = study.train.images[:2], torch.rand(2, 16)
    for arm in (maskalign.MAE, maskalign.DISTILLED, maskalign.RANDOM, maskalign.ATTENTION):
        student = maskalign.masked_autoencoder({**study.shape, **maskalign.STUDENT}, 0)
        model, _ = study._method(arm, {"alpha": 1.0}, student)
        arguments = (0.7, noise) if "MAE" in arm else ()
        result = model(images, *arguments, **({} if arguments else dict(noise=noise)))
        assert (result["mask"] == 0).sum(1).tolist() == [4, 4]


def test_quick_demo(tmp_path):
    assert "maskalign" in DEMOS
    assert maskalign.main(maskalign.Config(out=tmp_path, quick=True)) == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == [*maskalign.CHOSEN, "teacher"]
    assert all(0 <= row[probe] <= 1 for row in rows for probe in ("linear", "knn"))
    # The teacher is trained once: a second study reads it.
    again = maskalign.Study(maskalign.Config(out=tmp_path, quick=True, steps=3, teacher_steps=2))
    assert again.teacher_scores["linear"] == pytest.approx(rows[-1]["linear"])
