r"""Every op: its schema once, its reference, its fake, its derivative.

The schemas (`schemas.py` defines them, this is what they mean)::

    training_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,
                     float eps, int activation)
        -> (Tensor y, Tensor mean, Tensor var, Tensor gate)
    training_backward(Tensor dy, Tensor x, Tensor mean, Tensor var,
                      Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate,
                      float eps, int activation)
        -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)
    moments(Tensor x) -> (Tensor mean, Tensor var)
    normalize(Tensor x, Tensor mean, Tensor var,
              Tensor? weight, Tensor? bias, Tensor? residual,
              float eps, int activation)
        -> Tensor y
    backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor var,
                  Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate,
                  float eps, int activation)
        -> (Tensor sum_dz, Tensor sum_dz_xhat, Tensor dz)
    backward_apply(Tensor dy, Tensor x, Tensor mean, Tensor var,
                   Tensor? weight, Tensor? bias,
                   Tensor? mean_dz, Tensor? mean_dz_xhat,
                   float eps, int activation)
        -> Tensor dx
    update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches,
                   Tensor mean, Tensor var, float n, float? momentum)
        -> ()

    synchronized_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask,
                         float eps, int activation, str group, SymInt ranks)
        -> (Tensor y, Tensor mean, Tensor var, Tensor n)

With σ = √(var+ε) and per channel: x̂ = (x−mean)/σ, z = weight·x̂ + bias + residual,
y = act(z), dz = dy·act′(z)::

    sum_dz = Σ dz            (= dbias)
    sum_dz_xhat = Σ dz·x̂     (= dweight)
    dx = weight/σ · (dz − mean_dz − x̂·mean_dz_xhat)

where ``mean_dz`` and ``mean_dz_xhat`` are the two sums over the number of values per
channel (over all ranks, when synchronised). Both absent: the statistics were constants.

``update_running`` adds 1 to ``num_batches`` (int64, one value), and with w = momentum, or
1/``num_batches`` without one (0 when there is neither), replaces ``running_mean`` by
running_mean + w·(mean − running_mean) and ``running_var`` by the same with var·n/(n−1), ``n``
being the number of values per channel. The running statistics are float32 or float64.

``synchronized_forward`` normalises by the moments of the values of all ``ranks`` processes of the
group of that name, ``n`` values for each channel, where ``mask`` (N, \*) is true. It is made of
the other ops and of torch's functional collectives, so there is nothing to implement. ``x`` may
be empty.

**Shapes and layouts.** ``x`` is (N, C, \*), two or more axes, not empty. *Contiguous* and
*channels last* of any rank (``x.movedim(1, -1).is_contiguous()``) are kept: ``y``, ``dx``
and ``dz`` have the strides of ``x``. An ``x`` laid out otherwise is made contiguous first,
and so are they. ``dy`` and ``residual`` have the shape of ``x`` and any strides.

**Types.** ``x`` is float32, float64, bfloat16 or float16; ``y``, ``dx``, ``dy``, ``dz``,
``residual``, ``dresidual`` have its type. Arithmetic is float64 for float64, else float32.
``mean``, ``var``, ``sum_*`` and ``mean_dz*`` are per-channel vectors of shape (C,), and what
an op returns of them is float64 whatever ``x`` is: they cost nothing, ``var`` of inputs
around 1e30 does not overflow, and ``mean`` keeps what float32 would round away when it is
large. As arguments ``mean`` and ``var`` may be float32 too (running statistics). ``weight``
and ``bias`` may have any floating type; ``dweight`` and ``dbias`` are float64 for float64
``x``, else float32. ``var`` is biased (divided by n).

**Normalising.** So that nothing is lost at large mean/std, the mean is split, and every
implementation computes z as ::

    hi = float(mean);  scale = float(weight/σ);  shift = float(bias − (mean−hi)·weight/σ)
    z = (x − hi)·scale + shift (+ residual)

with the per-channel values computed in float64. Backward recomputes z in the same way, so
that the sign of z is the same in both.

**Activation.** 0 none, 1 relu, 2 relu6, 3 leaky_relu (slope 0.01), 4 silu, 5 gelu (erf),
6 hardswish. The slope at a kink is torch's: 0 at z = 0 (leaky_relu: 0.01) and z = 6;
hardswish: 0 up to −3, 1 from 3 on, else z/3 + ½.

**Gate.** ``training_forward`` with a residual and one of relu, relu6, leaky_relu returns one
bit per value, 1 where the slope is 1, so that backward reads neither residual nor y. It is
uint8 of shape (rows, ⌈length/8⌉), where a row is a run of y's memory: with S = ∏\*,
N·C rows of S values when x is contiguous, N rows of C·S when 1 < S < 16, and N·S rows of C
when x is channels last or S = 1. Value i of a row is bit
i mod 8 of byte i div 8; the bits that pad a row are 0. In every other case the gate is empty
(shape (0,)). Given a gate, backward takes the slope from it; otherwise it recomputes z, with
``residual`` where one was given.

**What may be empty.** ``dresidual`` is empty (shape (0,)) unless a residual or gate was given
and there is an activation (without activation the gradient of the residual is ``dy``). ``dz``
likewise; when it is there, pass it to ``backward_apply`` as ``dy`` with activation 0.
``dweight`` and ``dbias`` are always computed.

**Adding an implementation.** The reference is registered under ``CompositeExplicitAutograd``,
so a library that registers ``CPU`` or ``CUDA`` implementations of these schemas is used from
the moment that it is loaded, with no branch in Python. Derivatives, fakes and batching rules
belong to the schema and are never written again.
"""

from batchnorm.ops.active import kernels
from batchnorm.ops.autograd import (
    backward_apply,
    backward_sums,
    moments,
    normalize,
    training_backward,
    training_forward,
    update_running,
)
from batchnorm.ops.reference import ACTIVATIONS
from batchnorm.ops.synchronized import synchronized_forward

__all__ = [
    "ACTIVATIONS",
    "backward_apply",
    "backward_sums",
    "kernels",
    "moments",
    "normalize",
    "synchronized_forward",
    "training_backward",
    "training_forward",
    "update_running",
]
