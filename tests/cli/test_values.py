"""JSON, durations and instants on the command line, and the texts for what they are not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from streamflow.cli.values import DURATION, INSTANT, JSON, JsonCommand


def convert(kind: Any, text: str) -> Any:
    return kind.convert(text, None, None)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_json_is_taken(value: Any) -> None:
    assert convert(JSON, json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello", ["column 1", "found 'hello'", "'\"hello\"'", "single quotes"]),
        ('{"a" 1}', ["':' delimiter", "column 6", "found '1}'"]),
        ("[1, 2", ["column 6", "found its end"]),
        ("5 6", ["extra data", "column 3", "found '6'"]),
        ('{\n "a": x}', ["line 2, column 7", "found 'x}'"]),
        ("", ["found its end"]),
        ("NaN", ["NaN is no JSON number"]),
        ("[" * 100_000, ["nested too deeply"]),
    ],
)
def test_what_is_not_json_is_told_how_to_quote(text: str, said: list[str]) -> None:
    with pytest.raises(click.BadParameter) as caught:
        convert(JSON, text)
    for part in said:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("2.5", 2.5),
        (".5", 0.5),
        ("500ms", 0.5),
        ("90s", 90),
        ("1h30m", 5400),
        ("1h 30min", 5400),
        ("7d", 604800),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert convert(DURATION, text) == seconds


@pytest.mark.parametrize("text", ["", "-5", "soon", "5x", "1h-30m", "nan", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter, match="1h30m"):
        convert(DURATION, text)


def test_an_instant_says_its_zone() -> None:
    assert convert(INSTANT, "2031-05-01T06:00:00+02:00").utcoffset() == timedelta(hours=2)
    assert convert(INSTANT, "2031-05-01T06:00Z") == datetime(2031, 5, 1, 6, tzinfo=UTC)
    with pytest.raises(click.BadParameter, match="2031-05-01T06:00Z for UTC"):
        convert(INSTANT, "2031-05-01T06:00")
    with pytest.raises(click.BadParameter, match="ISO 8601"):
        convert(INSTANT, "tomorrow")


@click.command(cls=JsonCommand)
@click.argument("values", nargs=-1, type=JSON)
@click.option("--flag", is_flag=True)
def show(values: tuple[Any, ...], flag: bool) -> None:
    click.echo(repr((values, flag)))


def test_a_negative_number_is_a_value_and_stdin_can_hold_one() -> None:
    runner = CliRunner()
    assert runner.invoke(show, ["-5", "-0.5", "--flag"]).output == "((-5, -0.5), True)\n"
    assert runner.invoke(show, ["1", "-"], input='{"a":\n 1}').output == "((1, {'a': 1}), False)\n"
    assert "stdin is not JSON" in runner.invoke(show, ["-"], input="oops").output
    assert runner.invoke(show, ["--falg"]).exit_code == 2
