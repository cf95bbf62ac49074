"""What the page says of what was run."""

from __future__ import annotations

from tests.report.runs import Builder, measured

from batchnorm.report import page


def test_changes_to_the_network_are_listed(builder: Builder) -> None:
    changes = ["bn1 became an identity", "conv1 got its bias back"]
    builder.cell("none", 0.1, 0, measured("none"), changes=changes)
    text = page.render(builder.run())
    assert "Changed in the network to train it without normalization" in text
    assert all(change in text for change in changes)
