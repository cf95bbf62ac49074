"""All charts of the report, built once from a run and drawn elsewhere.

One concept a file, as in :mod:`batchnorm.probes`, each with its charts and with what they show in
a sentence. No sentence claims what was not measured.
"""

from batchnorm.report.charts import (
    activations,
    gradients,
    landscape,
    performance,
    running,
    shift,
    weights,
)
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart
from batchnorm.report.summary import Summary

__all__ = ["build"]


def build(grid: Grid, summary: Summary) -> list[Chart]:
    """Every chart for which something was measured, in the order of the page."""
    charts = [
        performance.loss(grid),
        performance.accuracy(grid),
        performance.against_learning_rate(grid, summary),
        activations.percentiles(grid),
        activations.moments(grid),
        activations.histograms(grid),
        gradients.by_depth(grid),
        shift.distance(grid),
        shift.cosine(grid),
        landscape.loss_variation(grid),
        landscape.predictiveness(grid),
        landscape.smoothness(grid),
        running.mean(grid),
        running.variance(grid),
        weights.norm(grid),
        weights.effective_learning_rate(grid),
    ]
    return [chart for chart in charts if chart.panels]
