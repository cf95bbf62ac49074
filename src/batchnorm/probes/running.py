"""Running statistics against those of the batch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Running"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Running(Probe):
    """How far what ``eval()`` would use is from what training uses.

    For each batch norm, over its channels: the root mean square of (μ_run − μ_B)/σ_B and the mean
    of ln(σ²_run/σ²_B), both variances unbiased. The running statistics already hold this batch.
    Channels that did not vary in the batch are left out.
    """

    name = "running"

    def modules(self, model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
        """All batch norms that keep running statistics."""
        return list(self._batch_norms(model).values())

    @staticmethod
    def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }

    def before_update(self, step: Step) -> Iterator[Record]:
        """Two numbers a batch norm, under the name of the layer that it normalises."""
        behind = {layer.site: layer.name for layer in step.layers}
        for name, module in self._batch_norms(step.model).items():
            if module not in step.seen:
                continue
            x = step.seen[module].input.double().transpose(0, 1).flatten(1)
            running_mean, running_var = module.running_mean, module.running_var
            assert isinstance(running_mean, Tensor)
            assert isinstance(running_var, Tensor)
            var, mean = x.var(1), x.mean(1)
            varies = var > 0
            error = (running_mean.double() - mean)[varies] / var[varies].sqrt()
            ratio = (running_var.double()[varies] / var[varies]).log()
            layer = behind.get(module, name)
            yield Record(
                step.number, layer, "running/mean_error", float(error.square().mean().sqrt())
            )
            yield Record(step.number, layer, "running/log_variance_ratio", float(ratio.mean()))
