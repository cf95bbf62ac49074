"""Weight files: nothing in them runs, what does not fit changes nothing, writing is atomic."""

import os
import pickle
import stat

import pytest
import safetensors.torch
import torch
from torch import nn

from batchnorm import weights
from batchnorm.weights import WeightsError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.fixture
def state():
    return {name: value + 1 for name, value in network().state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_state_dicts_are_read(tmp_path, state, name):
    path = tmp_path / name
    (safetensors.torch.save_file if "safe" in name else torch.save)(state, path)
    assert same(weights.read(path), state)


def test_a_checkpoint_that_holds_more(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": state}, path)
    assert same(weights.read(path), state)
    average = {name: value * 2 for name, value in state.items()}
    torch.save({"model": state, "ema": average}, path)
    assert same(weights.read(path, "ema"), average)
    with pytest.raises(WeightsError, match="holds 2 state dicts: name one, model, ema"):
        weights.read(path)
    with pytest.raises(WeightsError, match="no state dict under 'net'; it holds model, ema"):
        weights.read(path, "net")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
def test_what_would_execute_code_is_refused(tmp_path, save):
    path, trace = tmp_path / "attack.pt", tmp_path / "trace"
    save({"weight": Attack(trace)}, path)
    with pytest.raises(WeightsError, match=r"would execute code to be read: .*Refused.*state_dict"):
        weights.read(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Attack(trace)))  # the attack is one
    assert trace.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"it refers to torch.nn.modules.container.Sequential"):
        weights.read(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.bin", b"", "none of .safetensors, .pt, .pth"),
        ("missing.pt", None, "no such file"),
        ("w.pt", b"", "is damaged"),
        ("w.pt", b"hello world", "is damaged"),
        ("w.safetensors", b"hello world", "not readable safetensors"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        weights.read(tmp_path / name)


def test_a_file_of_something_else(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"holds no state dict but epoch, lr; save model.state"):
        weights.read(tmp_path / "w.pt")
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no state dict but a Tensor"):
        weights.read(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_loading(state, prefix):
    model = network()
    weights.load(model, {prefix + name: value for name, value in state.items()})
    assert same(model.state_dict(), state)


def test_old_files_count_no_batches(state):
    model, count = network(), state.pop("1.num_batches_tracked")
    weights.load(model, state)
    assert model[1].num_batches_tracked == count - 1
    assert torch.equal(model[1].running_var, state["1.running_var"])


def test_what_does_not_fit_is_named_and_changes_nothing(state):
    model = network()
    state["0.weight"] = torch.zeros(3, 5)
    state["fc.bias"] = state.pop("0.bias")
    with pytest.raises(WeightsError) as caught:
        weights.load(model, state)
    message = str(caught.value)
    assert "1 missing: 0.bias" in message
    assert "1 not of the network: fc.bias" in message
    assert "1 of another shape: 0.weight ((3, 5) there, (3, 2) here)" in message
    assert same(model.state_dict(), network().state_dict())


def test_writing_is_read_back_and_shares_nothing(tmp_path):
    model = network()
    model.append(model[0])  # tied
    path = tmp_path / "w.safetensors"
    weights.write_state(path, model)
    assert same(weights.read(path), model.state_dict())
    mode = stat.S_IMODE(path.stat().st_mode)
    (tmp_path / "usual").touch()
    assert mode == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "w.safetensors"
    path.write_text("old")

    def half(file):
        file.write_text("ne")
        raise error

    with pytest.raises(error):
        weights.write(path, half)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_a_program_takes_any_size_of_batch(tmp_path):
    model, path = network().eval(), tmp_path / "w.pt2"
    weights.write_program(path, model, torch.randn(4, 2))
    x = torch.randn(7, 2)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


def test_what_cannot_be_exported(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(WeightsError, match=r"cannot capture Branching .*ends in .safetensors"):
        weights.write_program(tmp_path / "w.pt2", Branching(), torch.randn(4, 2))
    assert not list(tmp_path.iterdir())
