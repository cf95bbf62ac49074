"""Run by test_triton.py in the interpreter: what depends on how a tensor is cut."""

import pytest
import torch
from tests.kernels.cases import LAYOUTS, Case
from tests.tolerances import KERNEL

from batchnorm.kernels.triton import cut, tiles
from batchnorm.ops import triton

SHAPES = {"planes": (7, 3, 5, 9), "columns": (40, 70), "channels last": (6, 20, 5, 3)}


def draw(name: str, activation: int = 1) -> Case:
    g = torch.Generator().manual_seed(0)
    shape = SHAPES[name]
    layout = LAYOUTS["channels_last" if name == "channels last" else "contiguous"]
    x, dy, residual = (layout(torch.randn(shape, generator=g)) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=g) for _ in range(2))
    return Case(x, dy, weight, bias, residual, activation=activation)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, by name."""
    names: list[str] = []
    launch = triton._launch

    def spy(kernel: object, programs: int, **args: object) -> None:
        names.append(kernel.__name__)  # type: ignore[attr-defined]
        launch(kernel, programs, **args)

    monkeypatch.setattr(triton, "_launch", spy)
    return names


@pytest.mark.parametrize("name", SHAPES)
def test_programs_that_meet(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "HELD_BYTES", 1024)
    monkeypatch.setattr(triton, "_processors", lambda _: 64)
    case = draw(name)
    assert max(case.errors().values()) <= KERNEL
    # Twice each, see triton._cooperate.
    assert launched[:4] == ["forward_on_chip"] * 2 + ["backward_on_chip"] * 2


@pytest.mark.parametrize("name", SHAPES)
def test_a_refused_launch_is_not_tried_again(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []

    def refuse(*_: object, **__: object) -> None:
        refusals.append(1)
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(cut, "HELD_BYTES", 1024)
    monkeypatch.setattr(triton, "_processors", lambda _: 64)
    monkeypatch.setattr(triton, "_cooperate", refuse)
    monkeypatch.setattr(triton, "_refused", set())
    case = draw(name)
    for _ in range(2):
        assert max(case.errors().values()) <= KERNEL
    assert len(refusals) == 1
    assert launched[:2] == ["partial_moments", "forward_apply"]


def test_another_error_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cut, "HELD_BYTES", 1024)
    monkeypatch.setattr(triton, "_processors", lambda _: 64)
    monkeypatch.setattr(triton, "_cooperate", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        draw("planes").forward()


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with another number of programs the same but for rounding."""
    case = draw(name)
    first, second = case.run(), case.run()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    monkeypatch.setattr(cut, "HELD_BYTES", 0)
    for processors in (1, 9):
        monkeypatch.setattr(triton, "_processors", lambda _, n=processors: n)
        assert max(case.errors().values()) <= KERNEL


@pytest.mark.parametrize("shape", [(1280, 64), (256, 18, 2, 2)])
def test_more_parts_than_are_merged_at_once(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With means that differ from part to part, as samples in an order have."""
    monkeypatch.setattr(cut, "HELD_BYTES", 0)
    monkeypatch.setattr(triton, "_processors", lambda _: 64)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    x += torch.linspace(-3, 3, shape[0]).view(-1, *(1,) * (len(shape) - 1))
    view = triton._view(x)
    c = cut.streamed(view, x.element_size(), 64)
    assert c.parts * view.run > tiles.MERGED.value // c.cols
    assert max(Case(x, torch.randn(shape, generator=g), activation=1).errors().values()) <= KERNEL


@pytest.mark.parametrize("name", SHAPES)
def test_doubtful_moments_are_taken_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of 1e25 overflow, of 1e-25 vanish: in both ways to take moments."""
    for held in (cut.HELD_BYTES, 0):
        monkeypatch.setattr(cut, "HELD_BYTES", held)
        for scale in (1e25, 1e-25):
            case = draw(name, activation=0)
            case.x, case.residual, case.eps = case.x * scale, None, 0.0
            errors = case.errors()
            assert max(errors[key] for key in ("y", "dx", "normalize", "apply")) <= KERNEL
