"""Holds core/ to 100 % branch coverage, each file by its own test file: `python tests/core_coverage.py`.

Coverage of the whole suite says little about a pure function: a test of the worker runs it too, and checks nothing.
Here `streamflow/core/a/b.py` is measured while `tests/core/a/test_b.py` runs, and nothing else. A core file without
such a test file fails, and so does one whose tests fail. An `__init__.py` holds no code of its own.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

PARALLEL: Final = max(2, (os.cpu_count() or 2) // 2)
FAILED_TESTS: Final = 1
NOT_COVERED: Final = 2


def test_file_of(root: Path, core_file: Path) -> Path:
    """Where the tests of a core file must be."""
    inside = core_file.relative_to(root / "streamflow/core")
    return root / "tests/core" / inside.parent / f"test_{inside.name}"


def has_code(core_file: Path) -> bool:
    """Whether there is something to run: more than a docstring, imports and names given once more."""
    harmless = ast.Import | ast.ImportFrom | ast.Expr | ast.Assign
    return any(not isinstance(node, harmless) for node in ast.parse(core_file.read_text(encoding="utf-8")).body)


def gaps(report: dict[str, Any]) -> list[str]:
    """What a JSON report of coverage says was not run: lines, then branches as `from -> to`."""
    files = report["files"].values()
    lines = [str(line) for each in files for line in each["missing_lines"]]
    branches = [
        f"{start} -> {'exit' if end < 0 else end}"
        for each in files
        for start, end in each["missing_branches"]
        if not {start, end} & set(each["missing_lines"])
    ]
    return lines + branches


def measure(core_file: str, test_file: str, report: str) -> int:
    """Run one test file under coverage of one core file, in this process, and write the JSON report."""
    import coverage
    import pytest

    # An empty `source` replaces the package of pyproject.toml, beside which `include` would be ignored.
    watch = coverage.Coverage(data_file=None, branch=True, source=[], include=[core_file], data_suffix=False)
    watch.set_option("run:patch", [])
    watch.start()
    # The same examples each time: coverage by luck would make this check flaky.
    # Without our own plugin, too: it is of the installed package, and what is measured may be another tree.
    without = ("-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:streamflow")
    status = pytest.main(["-q", *without, "--hypothesis-seed=0", test_file])
    watch.stop()
    if status != pytest.ExitCode.OK:
        return FAILED_TESTS
    try:
        watch.json_report(outfile=report)
    except coverage.exceptions.NoDataError:
        return NOT_COVERED
    return 0


def judge(root: Path, core_file: Path) -> str | None:
    """What is wrong with the coverage of one core file, or None."""
    name = core_file.relative_to(root).as_posix()
    test_file = test_file_of(root, core_file)
    test_name = test_file.relative_to(root).as_posix()
    if core_file.name == "__init__.py":
        return f"{name}: holds code; move it to a module of its own" if has_code(core_file) else None
    if not test_file.exists():
        return f"{name}: has no test file of its own; write {test_name}"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, __file__, "--measure", name, test_name, str(report)]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if ran.returncode == NOT_COVERED:
            return f"{name}: {test_name} never imports it"
        if ran.returncode:
            return f"{name}: {test_name} failed\n{ran.stdout}{ran.stderr}"
        missing = gaps(json.loads(report.read_text(encoding="utf-8")))
    return f"{name}: not run by {test_name}: {', '.join(missing)}" if missing else None


def main(root: Path) -> int:
    """Judge every core file; print what is missing; 0 only if nothing is."""
    started = time.perf_counter()
    files = sorted((root / "streamflow/core").rglob("*.py"))
    if not files:
        print(f"no core files under {root}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(PARALLEL) as pool:
        problems = [problem for problem in pool.map(lambda file: judge(root, file), files) if problem]
    print(*problems, sep="\n", file=sys.stderr, end="\n" if problems else "")
    outcome = f"{len(problems)} of {len(files)} fall short" if problems else f"all {len(files)} files at 100 %"
    print(f"core coverage: {outcome}, in {time.perf_counter() - started:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.exit(measure(*sys.argv[2:5]))
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()))
