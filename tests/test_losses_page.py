"""docs/losses.md: its blocks run where their framework is installed, with the numbers of what they replace."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from pages import ROOT, blocks, text
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from fastkd import ops

PAGE = "docs/losses.md"
SECTIONS = ["PyTorch", "timm", "Lightning", "transformers Trainer", "torchdistill"]
BLOCKS = dict(zip(SECTIONS, (block.code for block in blocks(PAGE, "python"))))
PAIRS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", text(PAGE), re.MULTILINE)


def run(section: str, **names) -> dict:
    """Runs a block of the page; its names afterwards."""
    exec(compile(BLOCKS[section], f"{PAGE}, {section}", "exec"), names)  # classes need their module's names
    return names


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 5)) for width in (6, 9))


def batches(count: int = 8) -> TensorDataset:
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 4, generator=random), torch.randint(0, 5, (count,), generator=random))


def formula(student_logits, teacher_logits, target, temperature: float, ce_weight: float, kd_weight: float):
    q, p = ((logits.detach() / temperature).log_softmax(1) for logits in (student_logits, teacher_logits))
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return ce_weight * F.cross_entropy(student_logits, target) + kd_weight * temperature**2 * kl


def weights(*modules: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def changed(before: list[torch.Tensor], *modules: nn.Module) -> list[bool]:
    return [not torch.equal(old, new) for old, new in zip(before, weights(*modules))]


def test_every_section_has_its_block():
    found = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n", text(PAGE), re.DOTALL | re.MULTILINE)
    assert found == SECTIONS and len(blocks(PAGE, "python")) == len(SECTIONS) and len(PAIRS) == 8


def test_the_example_has_the_same_trainer():
    own = BLOCKS["transformers Trainer"].split("\n\n\n")[1]
    assert own.startswith("class DistillationTrainer") and own in (ROOT / "examples/trainer.py").read_text()


@pytest.mark.parametrize("theirs, ours", PAIRS, ids=[ours.split("(")[0] + str(i) for i, (_, ours) in enumerate(PAIRS)])
def test_the_same_numbers(theirs, ours):
    random = torch.Generator().manual_seed(1)
    z, v, s, t = (2 * torch.randn(6, 9, generator=random) for _ in range(4))
    names = dict(F=F, ops=ops, z=z, v=v, s=s, t=t, y=torch.randint(0, 9, (6,), generator=random), T=3.0)
    torch.testing.assert_close(eval(ours, names), eval(theirs, names))


def test_pytorch():
    (student, teacher), (images, target) = networks(), batches()[:]
    want = formula(student(images), teacher(images), target, 4, 0.1, 0.9)
    before, frozen = weights(student), weights(teacher)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    done = run("PyTorch", student=student, teacher=teacher, optimizer=optimizer, loader=DataLoader(batches(), 8))
    torch.testing.assert_close(done["loss"].detach(), want)
    assert all(changed(before, student)) and not any(changed(frozen, teacher))


def test_timm():
    task = pytest.importorskip("timm.task", reason="this timm has no timm.task")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = dict(task_loss_weight=0.3, temperature=3.0, verbose=False)
    student, teacher = (timm.create_model("test_vit", num_classes=5).eval() for _ in range(2))
    images, target = torch.randn(2, 3, 160, 160), torch.tensor([1, 4])
    theirs = task.LogitDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss(), **options)(images, target)
    got = run("timm")["DistillationTask"](student, teacher, **options)(images, target)
    torch.testing.assert_close(got["loss"], theirs["loss"])
    torch.testing.assert_close(got["output"], theirs["output"])
    parameters = list(student.parameters())
    for ours, want in zip(*(torch.autograd.grad(result["loss"], parameters) for result in (got, theirs))):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    (student, teacher), (images, target) = networks(), batches()[:]
    want = formula(student(images), teacher(images), target, 4, 0.1, 0.9)
    module = run("Lightning")["Distillation"](student, teacher)
    assert all(name.startswith("student.") for name in module.state_dict())
    torch.testing.assert_close(module.training_step((images, target), 0).detach(), want)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    before, frozen = weights(student), weights(teacher)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(batches(), 4))
    assert all(changed(before, student)) and not any(changed(frozen, teacher)) and not teacher.training


class Texts(Dataset):
    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 20, (8, 6), generator=random)
        self.labels = torch.randint(0, 3, (8,), generator=random)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return dict(
            input_ids=self.ids[index], attention_mask=torch.ones(6, dtype=torch.long), labels=self.labels[index]
        )


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, teacher = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    frozen, made = weights(teacher), run("transformers Trainer")["DistillationTrainer"]

    def train(batch_size: int, accumulate: int):
        student = copy.deepcopy(model)
        options = transformers.TrainingArguments(
            output_dir=tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
            max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = made(student, options, train_dataset=Texts(), teacher=teacher)
        trainer.train()
        return trainer, student

    trainer, student = train(8, 1)
    batch = {name: torch.stack([item[name] for item in Texts()]) for name in Texts()[0]}
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    torch.testing.assert_close(loss.detach(), formula(outputs.logits, teacher(**inputs).logits, labels, 2, 0.5, 0.5))
    assert any(changed(weights(model), student)) and not any(changed(frozen, teacher))
    for whole, halves in zip(weights(student), weights(train(4, 2)[1])):  # accumulation changes nothing
        torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)


def test_torchdistill():
    pytest.importorskip("torchdistill")
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.losses.registry import get_mid_level_loss

    run("torchdistill")
    (student, teacher), (images, target) = networks(), batches()[:]
    io = [{"3": {"output": model(images).detach()}} for model in (student, teacher)]
    places = {f"{who}_module_{what}": value for who in ("student", "teacher")
              for what, value in (("path", "3"), ("io", "output"))}  # fmt: skip
    for alpha, options in ((0.1, dict(ce_weight=0.1, kd_weight=0.9)), (0, dict(t_square=False))):
        theirs = get_mid_level_loss(dict(key="KDLoss", kwargs=dict(temperature=4, alpha=alpha, **places)))
        ours = get_mid_level_loss(dict(key="FastKDLoss", kwargs=dict(path="3", temperature=4, **options)))
        torch.testing.assert_close(ours(*io, target), theirs(*io, target))
    loader = dict(dataset_id="train", kwargs=dict(batch_size=8), sampler=dict(class_or_func=SequentialSampler))
    hooked = dict(forward_hook=dict(output=["3"]), sequential=[], forward_proc="forward_batch_only")
    term = dict(criterion=dict(key="FastKDLoss", kwargs=dict(path="3", temperature=4)), weight=1.0)
    box = get_distillation_box(
        teacher, student, dict(train=batches()),
        dict(
            num_epochs=1, train_data_loader=loader, teacher=hooked | dict(requires_grad=False), student=hooked,
            optimizer=dict(key="SGD", kwargs=dict(lr=0.1)),
            criterion=dict(key="WeightedSumLoss", kwargs=dict(sub_terms=dict(kd=term))),
        ),
        torch.device("cpu"), None, False, 1,
    )  # fmt: skip
    before, frozen = weights(student), weights(teacher)
    for sample, targets, supplement in box.train_data_loader:
        box.post_forward_process(box.forward_process(sample, targets, supplement))
    assert all(changed(before, student)) and not any(changed(frozen, teacher))
