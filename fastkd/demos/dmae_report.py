"""Tables, notes, figures and exported students of the DMAE demo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd.evaluation.pictures import features
from fastkd.models.mae import MaskedAutoencoderViT

from . import report
from .training import visible_ratio

if TYPE_CHECKING:
    from .dmae import Demo

PROBES = (("kNN", "knn"), ("linear probe", "linear"))


def write(demo: Demo) -> None:
    """Prints the tables, writes results.md (and the page given with --markdown) and draws the figures."""
    tables = [main_table(demo)] + ([options_table(demo)] if demo.option_ratios else [])
    for item in [*(table.rich() for table in tables), *notes(demo)]:
        demo.console.print(item, highlight=False)
    markdown = "\n".join([*(table.markdown() for table in tables), *(f"{note}\n" for note in notes(demo))])
    (demo.out / "results.md").write_text(markdown)
    if demo.config.markdown:
        report.write_between_markers(demo.config.markdown, markdown)
    draw(demo)
    figures = ", ".join(str(path) for path in sorted(demo.out.glob("*.png")))
    demo.console.print(f"Figures: {figures}", highlight=False, soft_wrap=True)


def main_table(demo: Demo) -> report.Table:
    """Every ratio with and without teacher, between the untrained student and the teacher."""
    rows = [("", "untrained student", *demo.results.cells("untrained"))]
    for ratio in demo.ratios:
        rows.append(())
        for name in ("MAE", "DMAE"):
            cells = demo.results.cells(name, ratio, baseline="MAE" if name != "MAE" else None)
            rows.append((f"{100 * ratio:g} %", name, *cells))
    rows += [(), ("", "teacher", *demo.results.cells("teacher"))]
    if demo.config.full:
        rows.append(("", "raw pixels", *demo.results.cells("raw pixels")))
    return report.Table("DMAE beside plain MAE: held-out accuracy, %", _columns("− MAE"), rows)


def options_table(demo: Demo) -> report.Table:
    """What the inexact options of DMAE do to the features."""
    rows = []
    for ratio in demo.option_ratios:
        rows += [()] if rows else []
        for name in ("DMAE", *demo.options):
            cells = demo.results.cells(name, ratio, baseline="DMAE" if name != "DMAE" else None)
            rows.append((f"{100 * ratio:g} %", "exact" if name == "DMAE" else name, *cells))
    return report.Table("Inexact options of DMAE: held-out accuracy, %", _columns("− exact"), rows)


def _columns(difference: str) -> tuple[str, ...]:
    return ("masked", "", "kNN", difference, "linear", difference, "CPU, s")


def notes(demo: Demo) -> list[str]:
    """How the numbers were made."""
    config, teacher, student = demo.config, demo.teacher, demo.student(demo.seeds[0])
    counts = [(visible_ratio(teacher.num_patches, ratio)[0], ratio) for ratio in demo.ratios]
    visible = ", ".join(f"{count} at {100 * ratio:g} %" for count, ratio in counts)
    seeds = f"Seed {demo.seeds[0]}."
    if len(demo.seeds) > 1:
        numbers = ", ".join(map(str, demo.seeds))
        seeds = f"Mean ± deviation of seeds {numbers}; differences: paired by seed, mean ± half of the 95 % t-interval."
    train, test = demo.probe
    return [
        f"Student: {student.embed_dim} wide, {student.depth} blocks; block {demo.aligned[0]} is aligned with block "
        f"{demo.aligned[1]} of the teacher ({teacher.embed_dim} wide, {teacher.depth} blocks). {config.steps} steps of "
        f"{config.batch_size} pictures from {len(demo.train.labels):,}, AdamW, peak learning rate {config.lr:g} (MAE "
        f"{config.mae_lr:g}), alpha {config.alpha:g}. Visible patches of {teacher.num_patches}: {visible}. CPU: "
        "seconds of processor time that the training took.",
        "kNN: 10 neighbours by cosine; linear: logistic regression on standardised features; both on the mean of the "
        f"unmasked patch tokens, fitted on {len(train.labels):,} and tested on {len(test.labels):,} pictures. {seeds}",
    ]


def draw(demo: Demo) -> None:
    """Writes scores.png and curves.png."""
    values = demo.results.values
    scores = {
        title: {
            f"{100 * ratio:g} %": {name: values(column, name, ratio) for name in ("MAE", "DMAE")}
            for ratio in demo.ratios
        }
        for title, column in PROBES
    }
    levels = {title: {name: values(column, name) for name in ("untrained", "teacher")} for title, column in PROBES}
    report.scores_figure(scores, levels, demo.out / "scores.png")
    start = (0, demo.knn(demo.student(demo.seeds[0])))
    curves = {
        (name, ratio): [start, *values("curve", name, ratio, demo.seeds[:1])[0]]
        for ratio in demo.ratios
        for name in ("MAE", "DMAE")
    }
    report.curves_figure(curves, demo.knn(demo.teacher), demo.out / "curves.png")


def keep_student(demo: Demo, student: MaskedAutoencoderViT, ratio: float) -> None:
    """Draws reconstructions, exports the student for timm and checks that timm reads it strictly, equal features."""
    from fastkd.models.export import export_timm
    from fastkd.train.plots import reconstruction

    from .exports import timm_features

    shown = demo.test.balanced(1, seed=1).images[:8].to(demo.device)
    reconstruction(student, shown, ratio, demo.out / f"reconstruction_{100 * ratio:g}.png")
    path = demo.out / f"student_{100 * ratio:g}_timm.safetensors"
    export_timm(student, path)
    some = demo.test.images[:64].to(demo.device)
    gap = (timm_features(student, path, some) - features(student, some)).abs().max().item()
    if gap > 1e-4:
        raise RuntimeError(f"{path}: features in timm differ by {gap:.2g} from the student's")
    said = f"{path}: timm loads it strictly, features differ by {gap:.0e} at most"
    demo.console.print(said, highlight=False, soft_wrap=True)  # a path that is broken cannot be copied
