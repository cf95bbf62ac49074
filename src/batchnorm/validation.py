"""What every function and layer checks: an error names the argument, its value and the way out."""

import math

import torch
from torch import Tensor

from batchnorm import ops

__all__ = [
    "ACTIVATIONS",
    "activation_code",
    "check_count",
    "check_eps",
    "check_input",
    "check_mask",
    "check_masked_count",
    "check_not_empty",
    "check_residual",
    "check_total_count",
    "check_vectors",
]

ACTIVATIONS = ops.ACTIVATIONS[1:]
"""The activations that are fused: :func:`torch.nn.functional.relu` and its like."""

_CODES: dict[str | None, int] = {None: 0} | {
    name: ops.ACTIVATIONS.index(name) for name in ACTIVATIONS
}


def check_input(x: Tensor) -> None:
    """Refuse what has no channels or is not floating."""
    if x.dim() < 2:
        raise ValueError(
            f"x must have two or more axes, (N, C, *), got shape {tuple(x.shape)}; "
            "add the missing axis, for one sample x.unsqueeze(0)"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}; convert it, as by x.float()")


def check_not_empty(x: Tensor) -> None:
    """Refuse what has no values."""
    if x.numel() == 0:
        raise ValueError(
            f"x has no values to take moments of, its shape is {tuple(x.shape)}; "
            "leave empty batches out of training"
        )


def check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    """Refuse vectors that do not have one value for each channel of x, beside it."""
    channels = x.shape[1]
    for name, v in vectors.items():
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(
                f"{name} must have one value for each of the {channels} channels of x "
                f"(axis 1 of {tuple(x.shape)}), got shape {tuple(v.shape)}"
            )
        if v.device != x.device:
            raise ValueError(
                f"{name} is on {v.device} but x is on {x.device}; move one to the other"
            )
        if v.dtype != x.dtype and v.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} must be float32, float64 or of the type of x, {x.dtype}, got {v.dtype}; "
                "convert one, as by module.to(x.dtype)"
            )


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Refuse what cannot be added to x."""
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "broadcast it, as by residual.expand_as(x)"
        )
    if residual.device != x.device:
        raise ValueError(
            f"residual is on {residual.device} but x is on {x.device}; move one to the other"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual must have the type of x, {x.dtype}, got {residual.dtype}; "
            "convert it, as by residual.to(x.dtype)"
        )


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Refuse what does not tell which positions of x count."""
    expected = (x.shape[0], *x.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask must have the shape of x without its channels, {tuple(expected)}, "
            f"got {tuple(mask.shape)}; broadcast it, as by mask.expand(...)"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}; compare it, as by mask > 0")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} but x is on {x.device}; move one to the other")


def check_eps(eps: float) -> None:
    """Refuse what no variance can be made safe by."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be positive (or 0) and finite, got {eps}; the usual is 1e-5")


def check_count(count: int, x: Tensor) -> None:
    """Refuse to normalise single values in training."""
    if count > 1:
        return
    check_not_empty(x)
    # The first words are torch's, which people search for.
    raise ValueError(
        f"Expected more than 1 value per channel when training, got input size {x.shape}: "
        "each value would be normalised to 0 by itself. Use a larger batch (DataLoader's "
        "drop_last=True leaves out a last batch of one), or call eval() to normalise by the "
        "running statistics"
    )


def check_masked_count(count: Tensor) -> None:
    """Refuse a mask that leaves single values or none."""
    if torch._C._are_functorch_transforms_active():
        return  # the count is not a number there
    message = (
        "mask must leave more than 1 value per channel when training; "
        "leave batches that are all padding out of training"
    )
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        if count < 2:
            raise ValueError(message)
    else:
        torch._assert_async(count > 1, message)  # without waiting for the device


def check_total_count(count: Tensor, visible: bool) -> None:
    """Refuse single values over all processes."""
    message = (
        "Expected more than 1 value per channel when training, got 1 in all processes together: "
        "use larger batches, or call eval() to normalise by the running statistics"
    )
    if not visible:
        torch._assert_async(count > 1, message)
    elif count < 2:
        raise ValueError(message)


def activation_code(activation: str | None) -> int:
    """Return the code of an activation, or say which there are."""
    try:
        return _CODES[activation]
    except KeyError:
        raise ValueError(
            f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
            "apply any other to the result"
        ) from None
