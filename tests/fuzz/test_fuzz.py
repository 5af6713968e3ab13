"""Every target of the table, with mutated examples: only its declared errors, bounded memory, and an end.

What is found here or by `fuzz.py` is mended in the product and kept in test_found.py.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz import commands, tree_seed
from tests.fuzz.targets import HUGE, TARGETS, Target, examples_of

ROOT = Path(__file__).resolve().parent.parent.parent
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))

TOKENS = (
    *HUGE, b"\0", b"\x02", b"\xff" * 9 + b"\x01", b"\xc3\x01", b"\0\0\0\0\5", b"\xed\xa0\x80", b"\xc2\xb2", b"\n\n",
    b"[", b"]", b"{", b"}", b'"', b'{"a":', b",", b"null", b"-1", b"1e999", b"NaN", b"99999999999999999999",
    b'"\\ud800"', b"%00", b"%ff", b"?", b"&", b"=", b"#", b"@", b"://",
)  # fmt: skip
"""What decoders look for, or stumble over."""

Edit = tuple[str, int, int, bytes]
PLACE = st.integers(0, 1_000)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable()  # what the intake sets aside it says, once per record
    yield
    logging.disable(logging.NOTSET)


def edits(target: Target) -> st.SearchStrategy[Edit]:
    """Changes of an example: bits, bytes, lengths, pieces taken out, doubled, or come from another example."""
    other = st.sampled_from(examples_of(target.name))
    return st.one_of(
        st.tuples(st.just("flip"), PLACE, st.integers(0, 7), st.just(b"")),
        st.tuples(st.just("put"), PLACE, st.integers(0, 9), st.sampled_from(TOKENS) | st.binary(max_size=4)),
        st.tuples(st.just("cut"), PLACE, PLACE, st.just(b"")),
        st.tuples(st.just("drop"), PLACE, st.integers(1, 16), st.just(b"")),
        st.tuples(st.just("splice"), PLACE, PLACE, other),
    )


def apply(data: bytes, edit: Edit) -> bytes:
    """One change."""
    kind, place, number, piece = edit
    at = place % (len(data) + 1)
    match kind:
        case "flip" if data:
            at %= len(data)
            return data[:at] + bytes([data[at] ^ 1 << number]) + data[at + 1 :]
        case "put":
            return data[:at] + piece + data[at + number :]
        case "cut":
            return data[:at]
        case "drop":
            return data[:at] + data[at + number :]
        case "splice":
            return data[:at] + piece[number % (len(piece) + 1) :]
    return data


@targets
def test_the_examples_are_taken(target: Target) -> None:
    assert examples_of(target.name)
    assert [example for example in examples_of(target.name) if not target.check(example)] == []


@targets
@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_example_is_taken_or_refused(target: Target, data: st.DataObject) -> None:
    changed = data.draw(st.sampled_from(examples_of(target.name)))
    for edit in data.draw(st.lists(edits(target), min_size=1, max_size=4)):
        changed = apply(changed, edit)
    assert target.check(changed) in (True, False)


@targets
@settings(max_examples=40)
@given(start=st.integers(0, 20), rest=st.binary(max_size=100))
def test_garbage_is_taken_or_refused(target: Target, start: int, rest: bytes) -> None:
    assert target.check(examples_of(target.name)[0][:start] + rest) in (True, False)


MEMORY = """
import logging, resource, sys
from tests.fuzz.targets import TARGETS, examples_of

logging.disable()
inputs = {name: target.hostile(list(examples_of(name))) for name, target in TARGETS.items()}
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, target in TARGETS.items():
    print(name, flush=True)
    for data in inputs[name]:
        try:
            target.check(data)
        except BaseException:
            print(repr(data[:200]), len(data), flush=True)
            raise
print("all", sum(map(len, inputs.values())))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux holds a process to its address space")
def test_hostile_inputs_end_within_bounded_memory_and_do_not_end_the_process() -> None:
    # In a process of its own: a limit on its memory, and what a recursion without an end would take with it.
    found = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"exit {found.returncode} in target {found.stdout[-500:]}{found.stderr[-3_000:]}"
    assert found.stdout.splitlines()[-1].startswith("all ")


def test_a_target_with_a_fault_is_found() -> None:
    def reads(data: bytes) -> object:
        if len(data) > 20:
            return data.index(b"{")
        raise KeyError("refused")

    target = Target("faulty", reads, (KeyError,), lambda: [b"{}"], lambda examples: examples)
    assert target.check(b"{}") is False
    with pytest.raises(ValueError, match="not found"):
        target.check(b"x" * 30)


def git(folder: Path, *args: str) -> None:
    named = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *named, *args], cwd=folder, check=True, capture_output=True)


def test_the_seed_is_another_with_each_change_and_the_same_for_one(tmp_path: Path) -> None:
    assert tree_seed(tmp_path) == 1, "no repository, and a seed all the same"
    git(tmp_path, "init")
    seeds = []
    for text in ("a", "b", "a"):
        (tmp_path / "file").write_text(text)
        git(tmp_path, "add", "file")
        git(tmp_path, "commit", "-m", text)
        seeds += [tree_seed(tmp_path), tree_seed(tmp_path)]
    a, _, b, _, *again = seeds
    assert seeds == [a, a, b, b, a, a] and a != b and again == [a, a]
    assert all(0 < seed < 1 << 32 for seed in seeds)


def test_a_failure_says_how_to_have_it_again(tmp_path: Path) -> None:
    (tmp_path / "intake-crash-0a").write_bytes(b"x")
    (tmp_path / "task-crash-0b").write_bytes(b"x")
    fuzz = "PYTHONHASHSEED=0 .venv/bin/python tests/fuzz/fuzz.py intake"
    assert commands("intake", ["-runs=9", "-seed=7"], tmp_path) == {
        "to repeat intake": f"{fuzz} -runs=9 -seed=7",
        "to replay intake-crash-0a": f"{fuzz} {tmp_path}/intake-crash-0a",
    }
