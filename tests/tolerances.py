"""Every tolerance of the tests, with its reason. None is relaxed by environment."""

import torch

DOUBLE = 1e-10
"""Relative, float64: sums of some hundred products, each rounded at 1e-16."""

SINGLE = 2e-5
"""Relative, float32 arithmetic against float64: some hundred roundings of 6e-8."""

DIFFERENCE = 1e-6
"""Relative, a difference of nearly equal float64 gradients: 1e-16 over the share that is left."""

EPSILON = 0.01
"""Absolute, batch norm's output variance σ²/(σ²+ε) against 1, for σ² above 1e-3 and ε = 1e-5."""

MEASURED = 0.015
"""Absolute, moments of a layer whose statistics were measured over the same 200 examples: while
they are, the layers before it divide by biased variances, afterwards by unbiased ones, 1/200 more,
and ε = 1e-5 counts for variances of 1e-3."""

EXACT_STANDARD = 2e-6
"""Absolute, float32 y of standardised input against float64: a dozen roundings of 6e-8, |y| < 6."""

EXACT_OFFSET = 2e-6
"""Absolute, the same at mean/std 1e3: the mean is split, so that x − mean loses nothing."""

HALF = 8e-3
"""Relative, bfloat16 results: rounded once, to 8 bits."""

LIKE_TORCH = 1e-5
"""Relative, two float32 calculations of the same thing, both some dozen roundings off."""

MOMENTS = 1e-6
"""Of a standard deviation (the mean), relative (the variance): float32 sums of blocks of centred
values, a dozen roundings of 6e-8, merged in float64."""

KERNEL = 2e-6
"""Relative to the largest value, or to 1 (sums of n: to √n): a float32 kernel on standardised
input. y is four roundings of 6e-8 at values up to 5; the sums are merged in float64."""

KERNEL_OFF_CENTRE = 1e-4
"""The same at mean/std up to 1e3, where x itself is known to 6e-5 of a standard deviation."""

KERNEL_BY_TYPE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
"""The fuzz test's: several hundred roundings of the type (float64); weight/σ up to 10 on values of
any scale (float32); one rounding of the output, and dz rounded once more between the two halves
of a synchronised backward (2^-8 and 2^-11, each on values a few times the typical one)."""

ROUNDED_ONCE = 2**-23
"""A value of order 1 that was computed in float64 and rounded once to float32."""

SAMPLED = 0.02
"""Relative, a standard deviation of heavy-tailed noise from a million samples, after a mean and a
slope of 20,000 each were taken out: well above three standard errors of 0.15 %."""

DIFFERENT_EPSILON = 1e-4
"""Absolute, standardised weights before and after a change of scale: ε = 1e-5 against their
variance of about 1 is worth 5e-6 of each of 50 terms of order 1/√50."""

FINITE_WIDTH = 0.05
"""Relative, the mean over a dozen layers of 300 units of a factor that theory has for infinite
width: a layer is off by some 1/√300, and 1 % is left by all of them and by 150 examples."""

SPILLED = 128
"""Bytes that a thread of a GPU may put aside, of the 512 that its registers hold. A kernel that
holds its tile has no loop, so they are written and read once; more would mean that it does not
fit."""
