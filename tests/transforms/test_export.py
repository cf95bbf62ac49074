"""Folded networks leave torch: as exported programs, and under ONNX Runtime."""

import io

import onnxruntime
import pytest
import torch
from tests import tolerances
from tests.transforms.test_fold import trained
from torch import nn

from batchnorm.transforms.fold import fold

pytestmark = [
    # torch's exporter copies tree specs, which its own tree module warns of
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Tokens(nn.Module):
    """Linear of rank 3, its features moved to where batch norm wants them, and Conv1d."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)
        self.mix, self.mix_norm = nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.BatchNorm1d(6)
        self.up, self.up_norm = nn.ConvTranspose1d(6, 4, 3, stride=2), nn.BatchNorm1d(4)
        self.front, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.embed(x).transpose(1, 2)).relu()
        x = self.up_norm(self.up(self.mix_norm(self.mix(x)).relu())).relu()
        return self.head(self.front(x.mean(2)))


def images():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6), nn.BatchNorm2d(6), nn.Hardswish(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, dilation=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(), nn.Linear(4 * 15 * 15, 5), nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip


def volumes():
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, groups=2), nn.BatchNorm3d(4), nn.ReLU(),
        nn.ConvTranspose3d(4, 4, 2, groups=2), nn.BatchNorm3d(4),
    )  # fmt: skip


NETWORKS = {
    "images": (images, (3, 7, 7), 5),
    "tokens": (Tokens, (7, 5), 4),
    "volumes": (volumes, (2, 4, 3, 3), 2),
}


@pytest.fixture(params=NETWORKS)
def folded(request):
    """A folded network with an example, other input, and what it gave for both before."""
    make, shape, count = NETWORKS[request.param]
    torch.manual_seed(0)
    model = trained(make()).float()
    example, other = torch.randn(2, *shape), torch.randn(5, *shape)
    with torch.no_grad():
        before = [model(example), model(other)]
    report = fold(model, example)
    assert len(report.folded) == count, report.left
    return model, [example, other], before


def assert_close(found, expected):
    largest = (found - expected).abs().max() / expected.abs().max()
    assert largest < tolerances.SINGLE


def test_exported_programs(folded):
    model, inputs, before = folded
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=({0: batch},))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    for x, y in zip(inputs, before, strict=True):
        assert_close(program.module()(x), y)


def test_onnx_runtime_agrees(folded):
    model, inputs, before = folded
    program = torch.onnx.export(
        model, (inputs[0],), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    file = io.BytesIO()
    program.save(file)
    kinds = {node.op_type for node in program.model_proto.graph.node}
    assert "BatchNormalization" not in kinds
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for x, y in zip(inputs, before, strict=True):
        (found,) = session.run(None, {name: x.numpy()})
        assert_close(torch.from_numpy(found), y)
