"""Batch normalization end to end: the layer, the model, the evidence."""

__version__ = "0.1.0"
