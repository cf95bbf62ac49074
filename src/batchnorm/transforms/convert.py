"""Put our batch norms in the place of torch's, and take them out again."""

from torch import nn

from batchnorm.nn import batchnorm, lazy

__all__ = ["convert", "revert"]

_PAIRS = [
    (getattr(nn, cls.__name__), cls)
    for cls in (
        batchnorm.BatchNorm1d,
        batchnorm.BatchNorm2d,
        batchnorm.BatchNorm3d,
        lazy.LazyBatchNorm1d,
        lazy.LazyBatchNorm2d,
        lazy.LazyBatchNorm3d,
    )
]
_OURS: dict[type[nn.Module], type[nn.Module]] = dict(_PAIRS)
_THEIRS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in _PAIRS}
BEYOND = ("activation", "statistics", "guard")


def convert(model: nn.Module) -> nn.Module:
    """Turn every batch norm of torch's into ours, which computes the same.

    The layers stay the objects that they are and only change their class, so that whoever holds
    one still does: optimisers, hooks, shared layers, wrappers. Running statistics narrower than
    float32 are widened. Only exactly torch's classes change: a subclass may do something else.

    Args:
        model: The network, changed in place. A batch norm alone is allowed.

    Returns:
        The same network.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> type(convert(model)[1]).__module__
        'batchnorm.nn.batchnorm'
        >>> isinstance(model[1], nn.BatchNorm2d)
        True
    """
    for layer in model.modules():
        ours = _OURS.get(type(layer))
        if ours is not None:
            layer.__class__ = ours
            for option in BEYOND:
                setattr(layer, option, None)
            if isinstance(layer, batchnorm._BatchNorm) and layer.num_features:
                layer._widen_running_statistics()
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every batch norm of ours into torch's: the opposite of :func:`convert`.

    For tools that know only torch's own, such as exporters to ONNX. Running statistics take the
    type of the parameters.

    Args:
        model: The network, changed in place. A batch norm alone is allowed.

    Returns:
        The same network.

    Raises:
        ValueError: A layer does what torch's cannot: it activates, its statistics are not those
            of the batch, or it is of any rank. Nothing is changed then.

    Example:
        >>> import batchnorm
        >>> revert(batchnorm.BatchNorm1d(3))
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> type(revert(batchnorm.BatchNorm1d(3))).__module__
        'torch.nn.modules.batchnorm'
    """
    for name, layer in model.named_modules():
        if type(layer) is batchnorm.BatchNorm:
            raise ValueError(
                f"{name or 'the layer'} is a batch norm for inputs of any rank, which torch has "
                "not; give it the one that it gets, as by layer.__class__ = batchnorm.BatchNorm2d"
            )
        for option in BEYOND[:2] if type(layer) in _THEIRS else ():
            value = getattr(layer, option)
            if value is not None:
                raise ValueError(
                    f"{name or 'the layer'} has {option}={value!r}, which torch's batch norm has "
                    "not; set it to None and put what it does beside the layer"
                )
    for layer in model.modules():
        theirs = _THEIRS.get(type(layer))
        if theirs is not None:
            layer.__class__ = theirs
            for option in BEYOND:
                delattr(layer, option)
            narrow_running_statistics(layer)
    return model


def narrow_running_statistics(layer: nn.Module) -> None:
    """Give running statistics the type of the parameters."""
    # torch's layer refuses statistics that are wider than its parameters.
    weight = layer._parameters["weight"]
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers[name]
        if weight is not None and buffer is not None and buffer.dtype != weight.dtype:
            layer._buffers[name] = buffer.to(weight.dtype)
