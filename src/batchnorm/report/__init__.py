"""Reads the records of a run and presents them: a page, pictures, a summary.

It knows nothing of training, and needs no torch.
"""

from batchnorm.report.headline import summarize
from batchnorm.report.page import write_html
from batchnorm.report.png import write_png
from batchnorm.report.replication import Replication, render_replications
from batchnorm.report.shell import write_page
from batchnorm.report.summary import Summary

__all__ = [
    "Replication",
    "Summary",
    "render_replications",
    "summarize",
    "write_html",
    "write_page",
    "write_png",
]
