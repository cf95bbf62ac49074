"""Probes: one measurement a file. Measuring never draws, and never touches the training."""

from batchnorm.probes.accumulation import Accumulation
from batchnorm.probes.activations import Activations
from batchnorm.probes.averages import Averages
from batchnorm.probes.gradients import Gradients
from batchnorm.probes.inference import Population, TestBatches
from batchnorm.probes.landscape import Landscape
from batchnorm.probes.layers import Layer, find_layers
from batchnorm.probes.performance import BatchLoss, Performance
from batchnorm.probes.probe import Probe
from batchnorm.probes.running import Running
from batchnorm.probes.shift import Shift
from batchnorm.probes.step import Observation, Step, observe
from batchnorm.probes.weights import Weights

__all__ = [
    "Accumulation",
    "Activations",
    "Averages",
    "BatchLoss",
    "Gradients",
    "Landscape",
    "Layer",
    "Observation",
    "Performance",
    "Population",
    "Probe",
    "Running",
    "Shift",
    "Step",
    "TestBatches",
    "Weights",
    "find_layers",
    "observe",
]
