"""What a layer in training normalises by: the batch, unless one of these says otherwise."""

from dataclasses import dataclass
from pickle import PicklingError
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm import functional
from batchnorm.functional import Moments, TrainingResult

__all__ = ["Frozen", "Ghost", "Lp", "Ramp", "Renorm", "Statistics", "Sync"]


class Running(NamedTuple):
    """The running statistics of a layer, those that it keeps."""

    mean: Tensor | None
    var: Tensor | None
    num_batches: Tensor | None


class Options(TypedDict):
    """What a layer does besides normalising."""

    residual: Tensor | None
    activation: str | None
    mask: Tensor | None


class Statistics:
    """A choice of statistics: a value, shared by as many layers as one likes."""

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise a batch in training.

        The moments returned go into the running statistics, unless they are of no values.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Ghost(Statistics):
    """Statistics of each group of ``size`` samples: :func:`batchnorm.functional.ghost_batch_norm`.

    More noise, and a batch that is large for the machine stays small for the layer. The running
    statistics are those of the whole batch, and evaluation is plain.

    Args:
        size: Samples in a group; a remainder joins the last group.

    Example:
        >>> from batchnorm import BatchNorm1d
        >>> BatchNorm1d(3, statistics=Ghost(32)).statistics
        Ghost(size=32)

    References:
        Hoffer, Hubara & Soudry 2017, arXiv 1705.08741.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise each group by its own moments."""
        if options["mask"] is not None:
            raise ValueError(
                "mask cannot be used with Ghost statistics, as a group may have no values left; "
                "use the statistics of the batch"
            )
        return functional.ghost_batch_norm(
            *(x, self.size, weight, bias, eps),
            residual=options["residual"],
            activation=options["activation"],
        )


@dataclass(frozen=True)
class Ramp:
    """The schedule of Batch Renormalization: plain at first, then ever wider clips.

    Up to ``start`` batches r is 1 and d is 0; from there their limits grow linearly to r_max at
    ``r_end`` batches and to d_max at ``d_end``. The defaults are those of the paper.

    Args:
        start: Batches of plain batch normalization.
        r_end: Batches until r_max is reached.
        d_end: Batches until d_max is reached.

    References:
        Ioffe 2017, arXiv 1702.03275, section 4.2.
    """

    start: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    def __post_init__(self) -> None:
        if not 0 <= self.start < min(self.r_end, self.d_end):
            raise ValueError(f"start must be from 0 to below r_end and d_end, got {self}")

    def __call__(self, batches: Tensor, r_max: float, d_max: float) -> tuple[Tensor, Tensor]:
        """Return the limits after so many batches."""
        done = batches.to(torch.float64) - self.start
        r = 1 + (r_max - 1) * (done / (self.r_end - self.start)).clamp(0, 1)
        d = d_max * (done / (self.d_end - self.start)).clamp(0, 1)
        return r, d


@dataclass(frozen=True)
class Renorm(Statistics):
    """Statistics of the batch corrected to the running ones: :func:`functional.batch_renorm`.

    Training computes what evaluation will, as far as the clips allow: for small or dependent
    batches.

    Args:
        r_max: The largest correction of scale, 1 or more.
        d_max: The largest correction of mean, in standard deviations, 0 or more.
        schedule: How the limits grow with the number of batches. None: they are in force at
            once, which a network that starts with running statistics of 0 and 1 may not survive.

    Example:
        >>> from batchnorm import BatchNorm1d
        >>> BatchNorm1d(3, statistics=Renorm(schedule=Ramp(start=100, r_end=800, d_end=500)))
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, \
statistics=Renorm(r_max=3.0, d_max=5.0, schedule=Ramp(start=100, r_end=800, d_end=500)))

    References:
        Ioffe 2017, *Batch Renormalization*, arXiv 1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    schedule: Ramp | None = Ramp()

    def __post_init__(self) -> None:
        if not self.r_max >= 1:
            raise ValueError(f"r_max must be 1 or more, got {self.r_max}")
        if not self.d_max >= 0:
            raise ValueError(f"d_max must be 0 or more, got {self.d_max}")

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise by the moments of the batch, corrected."""
        mean, var, batches = running
        if mean is None or var is None:
            raise ValueError("Renorm needs running statistics; set track_running_stats=True")
        r_max: float | Tensor = self.r_max
        d_max: float | Tensor = self.d_max
        if self.schedule is not None:
            if batches is None:
                raise ValueError("the schedule of Renorm needs num_batches_tracked, which is None")
            r_max, d_max = self.schedule(batches, self.r_max, self.d_max)
        return functional.batch_renorm(
            *(x, mean, var, weight, bias, eps),
            r_max=r_max,
            d_max=d_max,
            **options,
        )


@dataclass(frozen=True)
class Lp(Statistics):
    """A scale of p-th powers in place of the variance: :func:`functional.lp_batch_norm`.

    ``running_var`` follows the square of that scale.

    Args:
        p: 1 or more, ``math.inf`` included.
        central: Whether the powers are of x − μ, rather than of x as [P2] has it.

    Example:
        >>> from batchnorm import BatchNorm1d
        >>> BatchNorm1d(3, statistics=Lp(1)).statistics
        Lp(p=1, central=False)

    References:
        [P2] Santurkar et al. 2018, arXiv 1805.11604, section 3.3; central: Hoffer et al. 2018,
        arXiv 1803.01814.
    """

    p: float
    central: bool = False

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"p must be 1 or more, got {self.p}; the usual are 1, 2 and math.inf")

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Centre by the mean and divide by the scale."""
        return functional.lp_batch_norm(
            *(x, self.p, weight, bias, eps), central=self.central, **options
        )


@dataclass(frozen=True)
class Frozen(Statistics):
    """The running statistics, in training too, and they do not change.

    It survives ``train()``, unlike ``eval()`` on the layer, and leaves γ and β alone: to freeze
    these as well, ``layer.requires_grad_(False)``.

    Example:
        >>> import torch
        >>> from batchnorm import BatchNorm1d
        >>> layer = BatchNorm1d(3, statistics=Frozen()).train()
        >>> layer(torch.zeros(1, 3)).tolist(), layer.num_batches_tracked.item()
        ([[0.0, 0.0, 0.0]], 0)
    """

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise by the running statistics."""
        mean, var, _ = running
        if mean is None or var is None:
            raise ValueError("Frozen needs running statistics; set track_running_stats=True")
        y = functional.normalize(
            *(x, mean, var, weight, bias, eps),
            residual=options["residual"],
            activation=options["activation"],
        )
        return TrainingResult(y, Moments(mean, var, 0))


@dataclass(frozen=True, repr=False)
class Sync(Statistics):
    """Statistics of the batches of all processes: :func:`batchnorm.functional.sync_batch_norm`.

    Training computes what one process would on the whole batch, with any back end of
    :mod:`torch.distributed`: gloo on CPU, NCCL on GPU. The running statistics are those of the
    whole batch too, the same bits on every process, and evaluation is plain: no communication.
    Outside of any process group, and in one of a single process, it is the batch.

    Args:
        process_group: The processes, this one among them. Default: all.

    Raises:
        TypeError: ``process_group`` is not one, or this process is not in it.

    Example:
        >>> from batchnorm import BatchNorm1d
        >>> BatchNorm1d(3, statistics=Sync()).statistics
        Sync()

    References:
        Peng et al. 2017, *MegDet*, arXiv 1711.07240, section 3.2.
    """

    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        group = self.process_group
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}; "
                "new_group returns no group to a process that is not in it"
            )

    def __repr__(self) -> str:
        group = self.process_group
        return f"Sync({'' if group is None else f'process_group=<ProcessGroup of {group.size()}>'})"

    def __deepcopy__(self, memo: Any) -> "Sync":
        return self  # a group cannot be copied

    def __reduce__(self) -> Any:
        if self.process_group is not None:
            raise PicklingError(
                f"{self} cannot be saved, as its group exists only while its processes run; save "
                "the state_dict, or call desynchronize(model) first"
            )
        return Sync, ()

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise by the moments of all processes' values."""
        return functional.sync_batch_norm(
            *(x, weight, bias, eps), process_group=self.process_group, **options
        )
