"""Replace the batch norms of a network by another normalisation, or by none."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.nn.norms import make_norm
from batchnorm.transforms.dataflow import trace

__all__ = ["channels_and_rank", "replace"]


def channels_and_rank(linear: nn.Module) -> tuple[int, int]:
    """Output channels and number of spatial dimensions of a linear operation."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, 0
    assert isinstance(linear, nn.modules.conv._ConvNd)
    return linear.out_channels, len(linear.kernel_size)


def _rank(module: nn.Module) -> int:
    for rank, kind in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        if isinstance(module, kind):
            return rank
    return 1


def _only_normalizes(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.nn."):
        return True
    ours = type(module).__module__.startswith("batchnorm.")
    return ours and getattr(module, "activation", None) is None


def replace(model: nn.Module, norm: str, example: Tensor) -> list[str]:
    """Replace every batch norm of ``model`` by the normalisation ``norm``, in place.

    With ``none`` the layers become identities, and a linear operation that had given up its bias
    for the batch norm behind it gets one again, starting at zero as β does.

    Args:
        model: the network.
        norm: ``none``, ``layer``, ``group`` or another registered name.
        example: a batch that the network accepts; it is run once to see what feeds what.

    Returns:
        One sentence for each change.

    Raises:
        ValueError: a layer derives from torch's batch norm and may do more than normalise.

    """
    batch_norms = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for name, module in batch_norms.items():
        if not _only_normalizes(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which may do more than normalise (an "
                "activation, say), so that removing it could change more than the normalisation. "
                "Let your callable take norm= and build each arm itself."
            )
    sources = {flow.norm: flow for flow in trace(model, example) if flow.norm in batch_norms}
    made: dict[nn.Module, nn.Module] = {}  # a shared layer stays shared
    changes = []
    for name, module in batch_norms.items():
        if module not in made:
            made[module] = make_norm(norm, module.num_features, _rank(module))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
        by = "identity" if norm == "none" else f"{norm} norm"
        change = f"{name}: {type(module).__name__} replaced by {by}"
        flow = sources.get(name)
        if (
            norm == "none"
            and flow is not None
            and "bias" not in dict(flow.module.named_parameters())
        ):
            channels, _ = channels_and_rank(flow.module)
            bias = flow.module.get_parameter("weight").new_zeros(channels)
            flow.module.register_parameter("bias", nn.Parameter(bias))
            change += f", bias of {flow.name} restored"
        changes.append(change)
    return changes
