"""Plain text in a pipe: stable, aligned, whole."""

from __future__ import annotations

import pytest

from streamflow.cli.output import Cell, Output


def test_a_table_in_a_pipe_is_aligned_and_nothing_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    Output(as_json=False).table(
        ("#", "name", "error"),
        [(Cell("9"), Cell("a", "red"), Cell("")), (Cell("10"), Cell("bcdefg"), Cell(long))],
        right=("#",),
    )
    assert capsys.readouterr().out.splitlines() == [
        " #  name    error",
        " 9  a       -",
        f"10  bcdefg  {long}",
    ]


def test_fields_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).fields([("id", Cell("a")), ("waiting on", Cell("b")), ("waiting on", Cell("c"))])
    assert capsys.readouterr().out.splitlines() == ["id          a", "waiting on  b", "            c"]


def test_a_json_document_is_one_line_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).document({"a": [1, None]})
    assert capsys.readouterr().out == '{"a":[1,null]}\n'
