"""The kernels for GPUs: device code, and how tensors are cut for it (:mod:`.cut`).

:mod:`batchnorm.ops.triton` launches them.
"""
