"""`streamflow bench`, scaled down but real: every workload gives its figures, and wrong results are not measured."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from streamflow.cli.bench import NAMES, _medians, _notes, _quantity, _show, bench
from streamflow.cli.bench_kafka import with_partitions
from streamflow.cli.bench_machine import describe, sqlite_commit_ms
from streamflow.cli.bench_stand import Figures, WrongResult, check, in_flight, quantile
from streamflow.cli.bench_workloads import RESTORED, WORKLOADS, Figure, Workload, restored_per_second
from streamflow.cli.output import Output

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "streamflow", "bench"]


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_workload_gives_its_figures(name: str, tmp_path: Path) -> None:
    ran = run_bench("--only", name, "--scale", "0.02", "--runs", "1", "--json", "--dir", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert set(found) == {"machine", "settings", "workloads", "notes", "failures"}
    assert found["failures"] == []
    assert found["machine"]["sqlite_commit_p50_ms"] > 0
    assert list(found["workloads"]) == [name]
    measured = found["workloads"][name]
    assert len(measured["runs"]) == 1
    missing = {figure.key for figure in WORKLOADS[name].figures} - set(measured["medians"])
    assert missing <= {RESTORED}  # of so few runs; then a note says so
    assert any("--scale 10" in note for note in found["notes"]) == (RESTORED in missing)
    assert measured["medians"]["seconds"] > 0
    assert measured["medians"].get("completed_steps_run_again", 0) == 0
    assert any("scaled" in note for note in found["notes"])
    assert list(tmp_path.iterdir()) == []


def test_what_is_restored_counts_from_the_first_record_to_the_last() -> None:
    written = (
        "2026-11-23 23:59:59,000 INFO    streamflow.worker: partition 1: restored 500 of 1500 records (900/s)\n"
        "2026-11-23 23:59:59,500 INFO    streamflow.worker: partition 1: restored 15000 records in 1.500 s\n"
        "2026-11-24 00:00:02,000 INFO    streamflow.worker: partition 0: restored 35000 records in 1.000 s\n"
    )
    assert restored_per_second(written) == 50_000 / 4.0
    assert restored_per_second("\n".join(written.splitlines()[:2])) is None, "too few"


@pytest.mark.slow
def test_a_log_of_ones_own_and_a_profile(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    ran = run_bench("--only", "w1", "--scale", "0.02", "--runs", "2", "--url", url, "--profile", str(tmp_path / "p"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "start to result, p50" in ran.stdout
    assert "cProfile" in ran.stdout
    assert "W1 latency" in ran.stderr
    assert sorted(each.name for each in (tmp_path / "p").iterdir()) == ["W1-1.prof", "W1-2.prof"]
    assert (tmp_path / "mine.db").exists()


def test_a_workload_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(workload: Workload, *rest: object) -> Figures:
        if workload.name == "W2":
            raise WrongResult("run 3: expected 1, found 2")
        return dict.fromkeys((figure.key for figure in workload.figures), 1.0) | {
            "client_cpu_share": 0.1,
            "worker_cpu_share": 0.9,
        }

    monkeypatch.setattr("streamflow.cli.bench._measure", measure)
    ran = CliRunner().invoke(bench, ["--only", "W1,W2,W3", "--runs", "1", "--json"])
    assert ran.exit_code == 1
    found = json.loads(ran.stdout)
    assert list(found["workloads"]) == ["W1", "W3"]
    assert found["failures"] == ["W2, repetition 1: run 3: expected 1, found 2"]
    assert "FAILED: W2" in ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "W1,W9"), "no workload 'W9': choose of W1,W2,W3,W4,W5,W6"),
        (("--only", ""), "no workload '': choose of"),
        (("--scale", "nan"), "expected more than 0 and at most 1000, found nan"),
        (("--scale", "inf"), "expected more than 0 and at most 1000, found inf"),
        (("--url", "memory://x"), "a log in memory is one process's alone"),
        (("--profile", "/proc/nowhere/p"), "/proc/nowhere/p cannot be made"),
    ],
)
def test_options_without_a_meaning_are_refused(options: tuple[str, str], said: str) -> None:
    ran = CliRunner().invoke(bench, options)
    assert ran.exit_code == 2
    assert said in ran.output


def test_every_result_is_checked() -> None:
    check([0, 1], [0, 1], "run 3")
    with pytest.raises(WrongResult, match=r"run 3: expected \[0, 1\], found \[0\]"):
        check([0], [0, 1], "run 3")


def test_no_more_are_in_flight_than_allowed() -> None:
    now = most = 0
    seen = []

    async def one(number: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        seen.append(number)

    asyncio.run(in_flight(3, 10, one))
    assert (most, sorted(seen)) == (3, list(range(10)))


def test_quantiles_are_values_that_were_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, share) for share in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert quantile([7.0], 0.5) == 7.0


def test_medians_go_over_the_repetitions() -> None:
    assert _medians([{"a_ms": 1.0}, {"a_ms": 9.0}, {"a_ms": 2.0}]) == {"a_ms": 2.0}


def test_notes_say_what_limits_a_figure() -> None:
    busy, idle = {"client_cpu_share": 0.97, "worker_cpu_share": 0.6}, {"client_cpu_share": 0.3, "worker_cpu_share": 0.9}
    notes = _notes({"W3": busy, "W2": idle}, 1.0, None, {"file_system": "ext4"})
    assert len(notes) == 1
    assert notes[0].startswith("W3: the client used 97% of a core")
    assert any("in memory" in note for note in _notes({}, 1.0, None, {"file_system": "tmpfs"}))
    assert any("cProfile" in note for note in _notes({}, 1.0, Path("p"), {"file_system": "ext4"}))


def test_the_machine_is_described(tmp_path: Path) -> None:
    machine = describe(tmp_path)
    assert machine["cores"] >= 1
    assert machine["python_calls_per_second"] > 1e4
    assert machine["memory_bytes"] > 0
    assert machine["file_system"]
    assert list(tmp_path.iterdir()) == []
    assert len(sqlite_commit_ms(tmp_path, commits=3)) == 3


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (6123.4, "/s", "6,123/s"),
        (7.1234, "ms", "7.12 ms"),
        (0.0, "", "0"),
        (3.0, "s", "3 s"),
        (5000.0, "B", "4.9 KiB"),
        (80 * 2**20, "B", "80 MiB"),
    ],
)
def test_figures_read_well(value: float, unit: str, expected: str) -> None:
    assert _quantity(value, Figure("key", "label", unit)) == expected


def test_the_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    machine = {
        "processor": "P", "cores": 2, "memory_bytes": 2**34, "file_system": "ext4", "system": "Linux", "python": "3.11",
        "python_calls_per_second": 4.2e6, "sqlite": "3.40", "sqlite_commit_p50_ms": 1.0, "sqlite_commit_p99_ms": 2.0,
    }  # fmt: skip
    measured = {
        name: [{figure.key: 1.0 * run for figure in workload.figures} for run in (1, 2, 3)]
        for name, workload in WORKLOADS.items()
    }
    _show(Output(as_json=False), machine, WORKLOADS, measured, ["mind this"])
    shown = capsys.readouterr().out
    for name, workload in WORKLOADS.items():
        assert f"{name} {workload.title}" in shown
        for figure in workload.figures:
            assert figure.label in shown
    assert "Note: mind this" in shown


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        ("kafka://a:1", "kafka://a:1?partitions=4"),
        ("kafka://a:1?linger.ms=1", "kafka://a:1?linger.ms=1&partitions=4"),
        ("kafka://a:1?partitions=12", "kafka://a:1?partitions=12"),
    ],
)
def test_kafka_is_measured_with_as_many_partitions_as_sqlite(given: str, measured: str):
    assert with_partitions(given) == measured
