"""Records survive what can happen to a file."""

import json
import math
from pathlib import Path

import pytest

from batchnorm.records import (
    Record,
    RecordError,
    RecordWriter,
    cell_hash,
    read_json,
    read_records,
    write_json,
)

ROWS = [
    Record(0, "", "batch/loss", 2.5),
    Record(0, "layers.0", "activation/histogram", 0.25, 3),
    Record(1, "", "batch/loss", math.inf),
    Record(1, "", "batch/loss", -math.inf),
    Record(2, "", "batch/loss", math.nan),
    Record(3, "", "batch/loss", 0.1 + 0.2),
]


def test_every_value_comes_back_exactly(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(ROWS)
    found = list(read_records(tmp_path / "r"))
    assert [r for r in found if r.value == r.value] == [r for r in ROWS if r.value == r.value]
    assert math.isnan(found[4].value)


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(ROWS)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "r").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_what_follows_the_kept_part_is_discarded(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(ROWS[:2])
        keep = writer.sync()
        writer.write(ROWS[2:])
    with RecordWriter(tmp_path / "r", keep=keep) as writer:
        writer.write(ROWS[5:])
    assert list(read_records(tmp_path / "r")) == [*ROWS[:2], ROWS[5]]


def test_a_line_cut_off_by_a_kill_is_no_record(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(ROWS[:2])
    content = (tmp_path / "r").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        assert list(read_records(tmp_path / "cut")) == ROWS[: content[:length].count(b"\n")]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"step": 1}\n')
    with pytest.raises(RecordError, match="line 1 is not a record"):
        list(read_records(tmp_path / "r"))


def test_an_interrupted_write_leaves_the_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.json"
    write_json(path, {"format": 1, "a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"format": 1, "a": object()})
    assert read_json(path)["a"] == 1


def test_the_hash_depends_on_every_value_and_not_on_order() -> None:
    assert cell_hash({"a": 1, "b": 2}) == cell_hash({"b": 2, "a": 1})
    assert cell_hash({"a": 1, "b": 2}) != cell_hash({"a": 1, "b": 3})
