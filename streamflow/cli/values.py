"""What may stand on the command line: JSON, durations, instants; each with a text that says how to write it."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # generic since click 8.3 only

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(ms|min|[smhdw])\s*")
_DURATION_CHARACTERS_MAX: Final = 100
_FOUND_MAX: Final = 40


class JsonValue(_Type):
    """One JSON value; `-` reads it from stdin."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        from_stdin = value == "-"
        try:
            text = sys.stdin.read() if from_stdin else value
        except UnicodeDecodeError as error:
            self.fail(f"stdin is not JSON: it is not valid UTF-8 ({error.reason} at byte {error.start})")
        try:
            return json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            what = "stdin" if from_stdin else repr(_shorten(text.strip()))
            at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
            found = repr(_shorten(text[error.pos :])) if text[error.pos :] else "its end"
            why = error.msg.removesuffix(" at").replace("Expecting", "expected")
            why = why[:1].lower() + why[1:]
            self.fail(f"{what} is not JSON: {why} at {at}, found {found}.\n{_how_to_quote('' if from_stdin else text)}")
        except ValueError as error:
            self.fail(f"{_shorten(value)!r} is not JSON: {error}")
        except RecursionError:
            self.fail("it is nested too deeply")


class Duration(_Type):
    """Seconds: `2.5`, or with units: `500ms`, `90s`, `1h30m`, `7d`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):
            return float(value)
        text = value.strip().lower()
        # Looking for parts in a long text takes time by the square of its length.
        if len(text) <= _DURATION_CHARACTERS_MAX and re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
            return float(text)
        if not text or len(text) > _DURATION_CHARACTERS_MAX or _PART.sub("", text):
            found = _shorten(value.strip())
            self.fail(f"{found!r} is no duration: write seconds (2.5), or units, as in 500ms, 90s, 1h30m, 7d")
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


class Instant(_Type):
    """An ISO 8601 instant with its zone."""

    name = "instant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        example = datetime.now(UTC).astimezone().replace(hour=18, minute=0, second=0, microsecond=0)
        try:
            at = datetime.fromisoformat(value.strip())
        except ValueError:
            self.fail(f"{value!r} is not an instant: write ISO 8601 with a zone, as in {example.isoformat()}")
        if at.tzinfo is None:
            self.fail(
                f"{value!r} does not say its zone: write {value.strip()}Z for UTC, or as in {example.isoformat()}"
            )
        return at


JSON: Final = JsonValue()
DURATION: Final = Duration()
INSTANT: Final = Instant()


class JsonCommand(click.Command):
    """A command with JSON arguments, so that `-5` is a number and not an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # JSON allows blanks before a value, and click takes what begins with one for a value.
        return super().parse_args(ctx, [f" {each}" if re.match(r"-\.?\d", each) else each for each in args])


def _shorten(text: str) -> str:
    return text if len(text) <= _FOUND_MAX else f"{text[:_FOUND_MAX]}…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number: write null, or a text")


def _how_to_quote(text: str) -> str:
    """What was probably meant, ready for the shell."""
    lines = ["Quote JSON for the shell with single quotes:"]
    if text and re.fullmatch(r"[\w .:/@+-]+", text):
        lines.append(f"  a text      '{json.dumps(text, ensure_ascii=False)}'")
    else:
        lines.append("  a text      '\"hello\"'")
    lines += ['  an object   \'{"id": "o-1", "total": 5}\'', "  a number    5", "  from stdin  -"]
    return "\n".join(lines)
