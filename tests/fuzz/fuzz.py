"""Coverage-guided fuzzing with atheris:  python tests/fuzz/fuzz.py TARGET|all [-runs=N …] [FOLDER|FILE …]

Everything behind the target is libFuzzer's: its options, a folder where it keeps what it finds, or files to replay.
The valid examples of the target are always part of the corpus. What fails is kept in .fuzz/, named by its target.
Without -seed=N the seed is that of the tree: another with each change, the same for all who check the same one. It is
printed, and with each failure the commands that have it again.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FunctionType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
FOUND: Final = ROOT / ".fuzz"
OPTIONS: Final = ("-max_len=8192", "-timeout=20", "-rss_limit_mb=1024", "-print_final_stats=0", "-verbosity=0")
"""Unless others are given. A record may have a megabyte; what is short is read faster and says more."""
SEED: Final = "-seed="
SEED_DIGITS: Final = 7
"""Of the tree's hash: libFuzzer takes seeds of 32 bits, and of 0 it makes one of its own."""
EXTRA: Final = "needs the extra 'fuzz': pip install -e '.[dev,fuzz]'. It has wheels for CPython on x86-64 Linux only"


def main(arguments: list[str]) -> int:
    """Fuzz what the arguments name; the exit code."""
    sys.path.insert(0, str(ROOT))
    try:
        import atheris
    except ImportError as error:
        print(f"atheris cannot be imported ({error}): fuzzing {EXTRA}", file=sys.stderr)
        return 1
    name, options = (arguments[0], arguments[1:]) if arguments else ("", [])
    with atheris.instrument_imports(include=["streamflow", "fastavro"]):
        from tests.fuzz.targets import TARGETS
    if name != "all" and name not in TARGETS:
        print(f"expected a target, found {name!r}: known are all, {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if not any(option.startswith(SEED) for option in options):
        options.append(f"{SEED}{tree_seed(ROOT)}")
    seed = next(option for option in options if option.startswith(SEED)).removeprefix(SEED)
    print(f"seed {seed}, PYTHONHASHSEED={os.environ.get('PYTHONHASHSEED', 'random')}", flush=True)
    logging.disable()  # what the intake sets aside it says, once per record
    _instrument_generated(atheris)
    FOUND.mkdir(exist_ok=True)
    names = list(TARGETS) if name == "all" else [name]
    failed = [each for each in names if not _passes(atheris, each, options, quiet=name == "all")]
    if failed:
        print(f"failed: {', '.join(failed)}; the inputs are in {FOUND}, see tests/fuzz/README.md", file=sys.stderr)
    for each in failed:
        for what, command in commands(each, options, FOUND).items():
            print(f"{what}: {command}", file=sys.stderr)
    return 1 if failed else 0


def tree_seed(root: Path) -> int:
    """A seed that changes with what is committed, 1 outside of a repository."""
    asked = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD^{tree}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return 1 + (int(asked.stdout[:SEED_DIGITS], 16) if asked.returncode == 0 else 0)


def commands(name: str, options: list[str], found: Path) -> dict[str, str]:
    """What repeats a failure of the target: the same run, and each input that was kept."""
    fuzz = "PYTHONHASHSEED=0 .venv/bin/python tests/fuzz/fuzz.py"
    inputs = sorted(path for path in found.glob(f"{name}-*") if path.is_file())
    again = {f"to replay {path.name}": f"{fuzz} {name} {shlex.quote(str(path))}" for path in inputs}
    return {f"to repeat {name}": f"{fuzz} {name} {shlex.join(options)}", **again}


def _instrument_generated(atheris: Any) -> None:
    """The readers of Avro are made at run time, so that no import shows them."""
    from tests.codec.records import KINDS

    for kind in KINDS.values():
        space = kind.codec()._read.__globals__  # a function that was made by exec
        for made in list(space.values()):
            if isinstance(made, FunctionType) and made.__name__.startswith(("read_", "decode")):
                atheris.instrument_func(made)


def _passes(atheris: Any, name: str, options: list[str], *, quiet: bool) -> bool:
    """Fuzz one target in a process of its own: libFuzzer ends the process that it runs in."""
    folder, parent = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")), os.getpid()
    try:
        return _passes_in(folder, atheris, name, options, quiet=quiet)
    finally:
        # What fails comes out of the child as an exception, up to its end, where libFuzzer keeps the input. The folder
        # is its parent's.
        if os.getpid() == parent:
            shutil.rmtree(folder)


def _passes_in(folder: Path, atheris: Any, name: str, options: list[str], *, quiet: bool) -> bool:
    from tests.fuzz.targets import examples_of

    places = [option for option in options if not option.startswith("-")]
    with (folder / "log").open("wb") as log:
        if not any(Path(place).is_file() for place in places):
            (corpus := folder / "corpus").mkdir()
            (examples := folder / "examples").mkdir()
            for number, example in enumerate(examples_of(name)):
                (examples / str(number)).write_bytes(example)
            # The first folder is where libFuzzer writes.
            places = [*(places or [str(corpus)]), str(examples)]
        given = [option for option in options if option.startswith("-")]
        started = time.monotonic()
        if (child := os.fork()) == 0:
            if quiet:
                os.dup2(log.fileno(), 2)
            _fuzz(atheris, name, [*given, *places])
        _, status = os.waitpid(child, 0)
        result = "passed" if status == 0 else f"failed, exit {os.waitstatus_to_exitcode(status)}"
        print(f"{name:<12}{result} in {time.monotonic() - started:.1f} s", flush=True)
        if quiet and status:
            sys.stderr.write(Path(log.name).read_text(errors="backslashreplace")[-5_000:])
    return status == 0


def _fuzz(atheris: Any, name: str, options: list[str]) -> None:
    """Never returns."""
    from tests.fuzz.targets import TARGETS

    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    atheris.Setup([sys.argv[0], *OPTIONS, f"-artifact_prefix={FOUND}/{name}-", *options], check)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
