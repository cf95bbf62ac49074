"""convert, fold and recalibrate as a user runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.studies import networks

from batchnorm import weights
from batchnorm.cli import main
from batchnorm.studies.tasks import load_task
from batchnorm.transforms.fold import fold
from batchnorm.transforms.recalibrate import recalibrate

Inside = Callable[..., tuple[int, str, str]]
NET = f"{networks.__name__}:trained"


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str]) -> Inside:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Weights other than those that the callable makes."""
    model = networks.trained()
    with torch.no_grad():
        for layer in (model[1], model[5]):
            layer.weight.uniform_(0.5, 2)
            layer.running_mean.normal_()
    weights.write_state(tmp_path / "trained.safetensors", model)
    return tmp_path / "trained.safetensors"


def loaded(path: Path) -> torch.nn.Module:
    model = networks.trained().eval()
    weights.load(model, weights.read(path))
    return model


def test_fold_says_what_went_where_and_writes_a_program(
    tmp_path: Path, trained: Path, inside: Inside
) -> None:
    out = tmp_path / "folded.pt2"
    code, stdout, stderr = inside(
        "fold", NET, "--weights", str(trained), "--shape", "1,8,8", "--out", str(out)
    )
    assert (code, stderr) == (0, "")
    first, second, summary, layout, written = stdout.splitlines()
    assert first.startswith("1  into 0  ")
    assert second.startswith("5  into 4  ")
    assert "2 of 2 batch norms folded" in summary
    assert layout == "Their two-dimensional convolutions are laid out channels last."
    assert written == f"Written: {out} (exported program)"
    program = torch.export.load(out)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), loaded(trained)(x))


def test_fold_as_a_document_and_as_a_state_dict(
    tmp_path: Path, trained: Path, inside: Inside
) -> None:
    out = tmp_path / "folded.safetensors"
    code, stdout, stderr = inside(
        "fold", NET, "--weights", str(trained), "--task", "digits", "--out", str(out), "--json"
    )
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["layers"]["1"]["into"] == ["0"]
    assert document["channels_last"] is True
    assert document["out"] == str(out)
    x = torch.randn(5, 1, 8, 8)
    folded = networks.trained().eval()
    fold(folded, x)
    weights.load(folded, weights.read(out))
    torch.testing.assert_close(folded(x), loaded(trained)(x))


def test_recalibrate_does_what_the_verb_does(tmp_path: Path, trained: Path, inside: Inside) -> None:
    out = tmp_path / "recalibrated.safetensors"
    arguments = ("--task", "digits", "--limit", "200", "--batch-size", "50", "--out", str(out))
    code, stdout, stderr = inside("recalibrate", NET, "--weights", str(trained), *arguments)
    assert (code, stderr) == (0, "")
    assert "1  7200 values  mean moved by up to" in stdout
    assert "2 of 2 batch norms recalibrated on 200 examples in 4 batches" in stdout
    x = load_task("digits", "unit", 200).train.x
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    model = loaded(trained)
    recalibrate(model, [x[part] for part in order.split(50)])
    written = weights.read(out)
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
    assert not torch.equal(written["1.running_var"], weights.read(trained)["1.running_var"])


def test_recalibrate_leaves_no_batch_of_one(inside: Inside) -> None:
    code, stdout, _ = inside(
        "recalibrate", NET, "--task", "digits", "--limit", "65", "--batch-size", "64", "--json"
    )
    assert code == 0
    document = json.loads(stdout)
    assert (document["batches"], document["layers"]["5"]["values"]) == (2, 65)


def test_convert_and_back(tmp_path: Path, trained: Path, inside: Inside) -> None:
    program, same = tmp_path / "ours.pt2", tmp_path / "same.safetensors"
    arguments = ("convert", NET, "--weights", str(trained), "--task", "digits")
    code, stdout, stderr = inside(*arguments, "--out", str(program))
    assert (code, stderr) == (0, "")
    assert "2 of 2 batch norms converted to batchnorm's" in stdout
    exported = torch.export.load(program)
    assert any("batchnorm" in str(node.target) for node in exported.graph.nodes)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(exported.module()(x), loaded(trained)(x))
    code, stdout, _ = inside(*arguments, "--to", "torch", "--out", str(same))
    assert code == 0
    assert "1  BatchNorm2d  left: is one of torch's" in stdout
    assert weights.read(same).keys() == weights.read(trained).keys()


def test_a_subclass_is_left_with_the_reason(inside: Inside) -> None:
    name = f"{networks.__name__}:activated"
    code, stdout, _ = inside("convert", name, "--shape", "1,8,8", "--json")
    assert code == 0
    assert json.loads(stdout)["layers"]["1"]["converted"] is False
    assert "left: may do more than torch's" in inside("convert", name, "--shape", "1,8,8")[1]


def test_quiet_is_nothing(inside: Inside) -> None:
    assert inside("fold", NET, "--shape", "1,8,8", "--quiet") == (0, "", "")


BAD = [
    (("fold", NET), "give either --task"),
    (("fold", NET, "--task", "digits", "--shape", "1,8,8"), "give either --task"),
    (("fold", NET, "--shape", "3,8,8"), "fails on an input of shape (8, 3, 8, 8)"),
    (("fold", NET, "--shape", "0,8"), "numbers above 0"),
    (("fold", NET, "--shape", "1,8,8", "--batch-size", "0"), "--batch-size must be at least 1"),
    (("fold", "resnet"), "not of the form module:callable"),
    (("fold", f"{networks.__name__}:raises"), "RuntimeError: no network today"),
    (("fold", NET, "--shape", "1,8,8", "--out", "net.onnx"), "must end in .safetensors"),
    (("fold", NET, "--shape", "1,8,8", "--out", "none/net.pt2"), "not a folder"),
    (("fold", NET, "--shape", "1,8,8", "--weights", "none.pt"), "--weights: none.pt: there is no"),
    (("recalibrate", NET), "--task"),
    (("recalibrate", NET, "--task", "digit"), "Did you mean 'digits'?"),
    (("recalibrate", NET, "--task", "digits", "--batch-size", "1"), "--batch-size must be at"),
    (("recalibrate", NET, "--task", "digits", "--limit", "1"), "--limit must be at least 2"),
    (("recalibrate", NET, "--task", "digits", "--method", "median"), "pooled"),
    (("convert", NET, "--shape", "1,8,8", "--to", "keras"), "batchnorm"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(inside: Inside, arguments: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = inside(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("batchnorm: ")
    assert message in stderr


def test_weights_of_another_network(tmp_path: Path, inside: Inside) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pt")
    code, _, stderr = inside(
        "fold", NET, "--shape", "1,8,8", "--weights", str(tmp_path / "other.pt")
    )
    assert code == 2
    assert "--weights: the weights are not those of Sequential" in stderr
    assert "1 not of the network: fc.weight" in stderr


@pytest.mark.parametrize(
    ("net", "message"),
    [("reuses", "Reuses has no batch norm"), ("branching", "decides on values")],
)
def test_what_a_verb_refuses_writes_nothing(
    tmp_path: Path, inside: Inside, net: str, message: str
) -> None:
    shape = {"reuses": "64", "branching": "1,8,8"}[net]
    out = tmp_path / "net.safetensors"
    code, stdout, stderr = inside(
        "fold", f"{networks.__name__}:{net}", "--shape", shape, "--out", str(out)
    )
    assert (code, stdout) == (1, "")
    assert message in stderr
    assert stderr.endswith("Nothing was written.\n")
    assert not out.exists()


def test_a_file_is_replaced_only_when_asked(tmp_path: Path, inside: Inside) -> None:
    out = tmp_path / "net.safetensors"
    out.write_text("years of work")
    arguments = ("fold", NET, "--shape", "1,8,8", "--out", str(out))
    code, _, stderr = inside(*arguments)
    assert code == 2
    assert "is there already; pass --overwrite" in stderr
    assert out.read_text() == "years of work"
    assert inside(*arguments, "--overwrite")[0] == 0
    assert weights.read(out)


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    out = tmp_path / "net.safetensors"
    assert inside("fold", NET, "--shape", "1,8,8", "--out", str(out)) == (130, "", "")
    assert not list(tmp_path.iterdir())


def test_a_program_of_ours_needs_the_import(tmp_path: Path, inside: Inside) -> None:
    out = tmp_path / "ours.pt2"
    assert inside("convert", NET, "--shape", "1,8,8", "--out", str(out))[0] == 0
    load = (
        f"import torch; print(torch.export.load({str(out)!r}).module()(torch.ones(2,1,8,8)).shape)"
    )
    ours = "import batchnorm.nn; " + load
    result = subprocess.run([sys.executable, "-c", ours], capture_output=True, text=True)
    assert result.stdout == "torch.Size([2, 10])\n", result.stderr


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom batchnorm.cli import main\n"
        "try: main(['fold', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--weights" in result.stdout
