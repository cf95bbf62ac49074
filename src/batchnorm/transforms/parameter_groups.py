"""Parameters for an optimiser: which decay and which do not."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    r"""Return the parameters in two groups: weights decay; γ, β and biases do not.

    Behind a batch norm the size of a weight does not change the function, only the effective
    learning rate η/‖w‖², which is what its decay acts through. The decay of γ and β has no such
    excuse: it pulls the function itself towards zero.

    Args:
        model: The network. Frozen parameters are included: an optimiser skips what has no
            gradient, and takes them up if they thaw.
        weight_decay: Of the first group, 0 or more.

    Returns:
        Two groups, as every optimiser of torch takes them: the one with decay, and the one
        without: parameters of normalisation layers, and whatever is called ``bias``.

    Raises:
        ValueError: ``weight_decay`` is negative.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(model, 5e-4)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.0005), (3, 0.0)]
        >>> optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    References:
        He et al. 2019, *Bag of Tricks*, arXiv 1812.01187, section 3.1; van Laarhoven 2017,
        arXiv 1706.05350, for the effective learning rate.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
    exempt = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or name.endswith("_bias") or isinstance(module, _NORMS)
    }
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in exempt], "weight_decay": 0.0},
    ]
