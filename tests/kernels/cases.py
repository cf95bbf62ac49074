"""What the kernel tests share: layouts, a call of every op, and its error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.device import DEVICE
from torch import Tensor

from batchnorm import ops
from batchnorm.ops import reference

op = torch.ops.batchnorm


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def strided(t: Tensor) -> Tensor:
    """Every second element of a larger tensor: no layout that the kernels know."""
    wide = torch.zeros([2 * size for size in t.shape], dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


LAYOUTS = {f.__name__: f for f in (contiguous, channels_last, strided)}


@dataclass
class Case:
    """One call: inputs, and what the reference makes of them in float64."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    activation: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(DEVICE))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return op.training_forward.default(  # type: ignore[no-any-return]
            self.x, self.weight, self.bias, self.residual, self.eps, self.activation
        )

    def backward(self, mean: Tensor, var: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        return op.training_backward.default(  # type: ignore[no-any-return]
            *(self.dy, self.x, mean, var, self.weight, self.bias),
            *self.saved(gate),
            *(self.eps, self.activation),
        )

    def saved(self, gate: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Residual and gate as autograd keeps them."""
        if reference.uses_gate(self.residual, self.activation):
            return None, gate
        return (self.residual if self.activation else None), None

    def run(self) -> dict[str, Tensor]:
        """Every result of every op."""
        with torch.no_grad():
            y, mean, var, gate = self.forward()
            dx, dz, dweight, dbias = self.backward(mean, var, gate)
            given = (mean, var, self.weight, self.bias)
            how = (self.eps, self.activation)
            saved = self.saved(gate)
            alone = op.moments.default(self.x)
            normalized = op.normalize.default(self.x, *given, self.residual, *how)
            sums = op.backward_sums.default(self.dy, self.x, *given, *saved, *how)
            count = self.x.numel() // self.x.shape[1]
            first, activation = (sums[2], 0) if sums[2].numel() else (self.dy, self.activation)
            applied = op.backward_apply.default(
                first, self.x, *given, sums[0] / count, sums[1] / count, self.eps, activation
            )
        return {
            "y": y,
            "mean": mean,
            "var": var,
            "gate": gate,
            "dx": dx,
            "dz": dz,
            "dweight": dweight,
            "dbias": dbias,
            "moments.mean": alone[0],
            "moments.var": alone[1],
            "normalize": normalized,
            "sum_dz": sums[0],
            "sum_dz_xhat": sums[1],
            "sums.dz": sums[2],
            "apply": applied,
        }

    def slope(self, mean: Tensor, var: Tensor) -> Tensor:
        """The derivative of the activation at the z that the kernels round to, so that a value at
        a kink does not count as an error.
        """
        x = self.x
        centre, scale, shift = reference.scale_and_shift(
            x, mean, var, self.weight, self.bias, self.eps
        )
        d = x.to(centre.dtype) - centre
        z = (d.double() * scale.double() + shift.double()).to(centre.dtype)  # one rounding: an fma
        if self.residual is not None:
            z = z + self.residual
        return reference.slope(z.double(), self.activation)

    def expected(self, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        """The same from the reference in float64."""
        x, dy, weight, bias, residual = (
            None if t is None else t.double()
            for t in (self.x, self.dy, self.weight, self.bias, self.residual)
        )
        y, true_mean, true_var, _ = reference.training_forward(
            x, weight, bias, residual, self.eps, self.activation
        )
        dz = dy * self.slope(mean, var)
        dx, _, dweight, dbias = reference.training_backward(
            dz, x, mean, var, weight, bias, None, None, self.eps, 0
        )
        if self.residual is None or self.activation == 0:
            dz = x.new_empty(0)
        return {
            "y": y,
            "mean": true_mean,
            "var": true_var,
            "dx": dx,
            "dz": dz,
            "dweight": dweight,
            "dbias": dbias,
            "moments.mean": true_mean,
            "moments.var": true_var,
            "normalize": y,
            "sum_dz": dbias,
            "sum_dz_xhat": dweight,
            "sums.dz": dz,
            "apply": dx,
        }

    def errors(self) -> dict[str, float]:
        """The largest error of each result."""
        got = self.run()
        want = self.expected(got["mean"], got["var"])
        for name, expected in want.items():
            assert got[name].shape == expected.shape, name
        # A sum that cancels is known to the size of its random walk, not to its own.
        walk = (self.x.numel() / self.x.shape[1]) ** 0.5
        sums = ("dweight", "dbias", "sum_dz", "sum_dz_xhat")
        return {
            name: error(got[name], expected, walk if name in sums else 1.0)
            for name, expected in want.items()
        }


def error(got: Tensor, want: Tensor, least: float = 1.0) -> float:
    """Return the largest absolute difference over the largest value, or over ``least``."""
    if not want.numel():
        return 0.0
    difference = (got.double() - want.double()).abs().max()
    return float(difference / want.abs().max().clamp(min=least).double())


def are_kernels() -> bool:
    return not ops.kernels()[DEVICE].startswith("reference")
