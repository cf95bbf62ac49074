"""Compile for a Hopper GPU, without one, what an op would launch there."""

import os
import re
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from batchnorm.ops import reference
from batchnorm.ops import triton as ours

TARGET = GPUTarget("cuda", 90, 32)
PROCESSORS = 132
OPTIONS = ("num_warps", "launch_cooperative_grid")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Compiled:
    """What is known of a kernel without running it."""

    name: str
    ptx: str
    registers: int
    stack: int  # bytes a thread: what does not fit into its registers


def watch(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return where kernel and arguments of every launch will be found, instead of launching."""
    seen: list = []
    monkeypatch.setattr(ours, "_launch", lambda kernel, _, **args: seen.append((kernel, args)))
    monkeypatch.setattr(ours, "_processors", lambda _: PROCESSORS)
    monkeypatch.setattr(ours, "_on", lambda _: nullcontext())
    return seen


def launches(monkeypatch: pytest.MonkeyPatch, x: Tensor, residual: bool, activation: int) -> list:
    """Return kernel and arguments of every launch of a forward and a backward."""
    seen = watch(monkeypatch)
    r = torch.empty_like(x) if residual else None
    weight, bias = torch.empty(x.shape[1]), torch.empty(x.shape[1])
    _, mean, var, gate = ours.training_forward(x, weight, bias, r, 1e-5, activation)
    saved = (None, gate) if reference.uses_gate(r, activation) else (r, None)
    dy = torch.empty_like(x)
    ours.training_backward(dy, x, mean, var, weight, bias, *saved, 1e-5, activation)
    return seen


def compiled(kernel: object, args: dict[str, object], cache: Path) -> Compiled:
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = args[parameter.name]
        is_one = type(value) is int and value == 1  # such an argument Triton compiles in
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    options = {name: args[name] for name in OPTIONS if name in args}
    options["enable_fp_fusion"] = True
    source = ASTSource(kernel, signature, constants, attributes)
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache)):
        assembled = triton.compile(source, target=TARGET, options=options).asm
    file = cache / "kernel.cubin"
    file.write_bytes(assembled["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return Compiled(kernel.__name__, assembled["ptx"], int(registers), int(stack))
