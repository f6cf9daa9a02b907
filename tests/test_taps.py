"""Features by name, frozen teachers, pixel statistics, and what all methods share."""

import copy

import pytest
import torch
from torch import nn

from fastkd.methods._method import Method
from fastkd.models.frozen import Frozen
from fastkd.models.pixels import normalize, renormalize, statistics_of
from fastkd.models.taps import Taps, blocks_of, find, places


class Net(nn.Module):
    def __init__(self, checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.unused, self.checkpoint = nn.Linear(4, 4), checkpoint

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        return x


class Conv(nn.Module):
    """Takes pictures of one channel."""

    mean, std = (0.25,), (0.5,)

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.layer2(self.layer1(x))).mean((2, 3))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_taps_give_outputs_and_leave_no_hooks():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4)
    output, features = Taps(model, (1, "blocks.0.0", -1))(x)
    first = model.blocks[0](x)
    assert torch.equal(features[0], model.blocks[1](first)) and torch.equal(features[1], model.blocks[0][0](x))
    assert features[2] is output and hooks(model) == 0
    with pytest.raises(RuntimeError):
        Taps(model, 0)(torch.randn(2, 5))
    assert hooks(model) == 0
    taps = Taps(model, 0)
    with taps:
        with taps:
            assert hooks(model) == 1
        assert torch.equal(taps(x).features[0], first)
        model(x)  # runs outside of a tapped call are not caught
    assert hooks(model) == 0


def test_taps_compile_and_checkpoint():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4)
    taps = Taps(model, (0, 2))

    def loss(x):
        output, features = taps(x)
        return output.sum() + features[0].square().sum()

    expected = loss(x)
    with taps:
        assert torch.allclose(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), expected)
    assert hooks(model) == 0
    expected.backward()
    again = copy.deepcopy(model)
    again.checkpoint = True
    again.zero_grad()
    output, features = Taps(again, (0, 2))(x)
    (output.sum() + features[0].square().sum()).backward()
    for a, b in zip(model.blocks.parameters(), again.blocks.parameters()):
        assert torch.allclose(a.grad, b.grad)


@pytest.mark.parametrize("where, message", [
    ("block.0", "got 'block.0', expected a submodule of Net, such as blocks.0"),
    (3, "got block 3, expected -3 to 2"),
    ("unused", "'unused': the module did not run"),
])  # fmt: skip
def test_taps_say_what_is_wrong(where, message):
    with pytest.raises(ValueError, match=message):
        Taps(Net(), where)(torch.zeros(1, 4))


def test_places():
    assert places({"student": 8, "teacher": ["a", 1]}, "teacher") == ("a", 1)
    assert places({"student": 8}, "student") == (8,) and places({}, "student") == ()
    with pytest.raises(ValueError, match="got 'pupil', expected 'student' and 'teacher'"):
        places({"pupil": 8}, "student")


@pytest.mark.parametrize("name, count", [
    ("resnet18", 4), ("vit_tiny_patch16_224", 12), ("swin_tiny_patch4_window7_224", 4), ("mixer_s32_224", 8),
    ("convnext_atto", 4), ("efficientnet_lite0", 7),
])  # fmt: skip
def test_blocks_of_timm_models(name, count):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(blocks_of(model)) == count
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        find(nn.Linear(1, 1), 0)


def test_frozen_teacher_is_not_part_of_a_method():
    torch.manual_seed(0)

    class Both(Method):
        def __init__(self):
            super().__init__(Conv())
            self.teacher, self.head = Frozen(Conv(), taps="layer1"), nn.Linear(3, 3)

    method = Both().train()
    assert method.student.training and not method.teacher.model.training
    assert not any(name.startswith("teacher") for name in method.state_dict())
    assert set(method.training_state()) == {"head.weight", "head.bias"}
    assert len(list(method.parameters())) == 6 and not any(p.requires_grad for p in method.teacher.model.parameters())
    method.double()
    assert method.teacher.model.layer1.weight.dtype == torch.float64
    images = torch.randint(0, 256, (2, 6, 5, 1), dtype=torch.uint8)
    output, (feature,) = method.teacher(images)
    assert not output.requires_grad and feature.shape == (2, 2, 4, 3)
    again = method.teacher(normalize(images, (0.1,), (0.3,)), mean=(0.1,), std=(0.3,)).output
    assert torch.allclose(output, again, atol=1e-6)
    other = Both()
    other.load_training_state(method.float().training_state())
    assert torch.equal(other.head.weight, method.head.weight)
    with pytest.raises(RuntimeError, match="head.bias"):
        other.load_training_state({"head.weight": method.head.weight})
    assert torch.equal(method.prepare(images), normalize(images, (0.25,), (0.5,)))


def test_pixel_statistics():
    images = torch.randint(0, 256, (2, 3, 4, 3), dtype=torch.uint8)
    plain = images.permute(0, 3, 1, 2).double() / 255
    a, b = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0.3, 0.1, 0.2), (0.2, 0.3, 0.4))

    def by_hand(values):
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in values)
        return (plain - mean) / std

    assert torch.allclose(normalize(images, *a).double(), by_hand(a), atol=1e-6)
    assert torch.allclose(renormalize(by_hand(a), a, b), by_hand(b))
    assert renormalize(plain, a, a) is plain
    assert statistics_of(Conv()) == ((0.25,), (0.5,)) and statistics_of(nn.Linear(1, 1))[0][0] == 0.485
    with pytest.raises(ValueError, match="mean: got 2 values, expected 3"):
        normalize(images, (0.1, 0.2), (0.3,))
