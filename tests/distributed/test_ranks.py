"""Two and four real processes, on CPU with gloo: as one process on the whole batch."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from tests import tolerances
from tests.distributed import layers, networks
from tests.distributed.processes import WHEN_KILLED, run

CHECKS = [
    layers.even,
    layers.uneven,
    layers.one_value_each,
    layers.one_empty,
    layers.channels_innermost,
    layers.residual_and_relu,
    layers.residual_and_gelu,
    layers.masked,
    layers.masked_and_empty,
    layers.bfloat16,
    layers.float16,
    layers.float32,
    layers.subgroups,
    layers.far_from_zero,
    layers.second_derivatives,
    layers.too_few,
    networks.trained_evenly,
    networks.trained_unevenly_with_one_empty,
    networks.trained_with_checkpoints,
    networks.trained_with_accumulation,
    networks.recalibrated,
    networks.recalibration_fails,
    networks.adapted,
]
# Slow, and no more is to be seen of them in four processes.
OF_TWO = [layers.finite_differences, layers.torch_func, layers.skipped, networks.compiled]
BY_WORLD = {2: CHECKS + OF_TWO, 4: CHECKS}
TOLERANCES = {
    "bfloat16": tolerances.KERNEL_BY_TYPE[torch.bfloat16],
    "float16": tolerances.KERNEL_BY_TYPE[torch.float16],
    "float32": tolerances.KERNEL_BY_TYPE[torch.float32],
    "compiled": tolerances.LIKE_TORCH,
}


@functools.cache
def started(world):
    """Return what there is of the processes, an error as well: they start once."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run(world, BY_WORLD[world], Path(folder))
        except AssertionError as error:
            return error


def ended(world):
    result = started(world)
    if isinstance(result, AssertionError):
        raise result
    return result


@pytest.mark.parametrize(
    ("world", "check"),
    [(world, check.__name__) for world, checks in BY_WORLD.items() for check in checks],
)
def test_as_one_process(world, check):
    results, _, _ = ended(world)
    tolerance = TOLERANCES.get(check, tolerances.DOUBLE)
    assert results[0][0][check]
    for rank, (found, _) in enumerate(results):
        for name, value in found[check].items():
            if isinstance(value, bool):
                assert value, f"{name}, rank {rank}"
            else:
                assert value < tolerance, f"{name}, rank {rank}: {value}"


@pytest.mark.parametrize("world", BY_WORLD)
def test_a_killed_process_ends_the_others(world):
    """With an error within the time-out of the group, which says where to look."""
    _, codes, ends = ended(world)
    assert codes == [-9 if rank == 1 else 1 for rank in range(world)]
    assert len(ends) == world - 1
    for seconds, said in ends:
        assert seconds < WHEN_KILLED.total_seconds() + 5
        assert "One of them ended" in said
