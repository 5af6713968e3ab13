"""The pytest plugin: a seed of each test's own, told where it fails, and nothing heavy before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "streamflow.testing.plugin"
INSTALLED = any(each.value == PLUGIN for each in entry_points(group="pytest11"))
"""Not where the package was installed before it had the plugin; then it is named."""

APP = """
    import asyncio
    import streamflow as sf

    app = sf.App("small")

    @app.workflow
    async def sleep(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "slept"

    async def scenario(client):
        return await (await client.start(sleep, 86_400)).result()
"""


def run(folder: Path, test: str, *options: str) -> str:
    """What pytest says of the test, run in a process and a folder of its own."""
    (folder / "test_it.py").write_text(dedent(APP) + dedent(test))
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    named = [] if INSTALLED else ["-p", PLUGIN]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named, *options, "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    return ran.stdout + ran.stderr


def test_the_fixture_plays_a_scenario_and_gives_a_world(tmp_path: Path):
    said = run(
        tmp_path,
        """
        def test_a(streamflow):
            assert streamflow.simulate(app, scenario).result == "slept"
            assert streamflow.simulate(app, scenario, seed=4).seed == 4
            assert len({each.trace for each in streamflow.simulate(app, scenario, seeds=3)}) == 3
            assert [each.seed for each in streamflow.simulate(app, scenario, seeds=[5, 6])] == [5, 6]

        def test_b(streamflow):
            async def test():
                async with streamflow.world(app) as world:
                    assert world.seed == streamflow.seed
                    return await (await world.client.start(sleep, 10)).result()

            assert asyncio.run(test()) == "slept"
        """,
    )
    assert "2 passed" in said, said


SEED = r"seed (\d+); play it again: pytest 'test_it.py::(test_\w)' --streamflow-seed=(\d+)"
FAILING = """
    def test_a(streamflow):
        def check(world):
            assert world.seed == 0

        async def bad(client, world):
            check(world)

        streamflow.simulate(app, bad, seeds=3)

    def test_b(streamflow):
        print("seed of b:", streamflow.seed)
        assert streamflow.simulate(app, scenario).result == "never"
"""


def test_a_failure_names_its_seed_and_how_to_play_it_again(tmp_path: Path):
    first, again = run(tmp_path, FAILING), run(tmp_path, FAILING)
    found = re.findall(SEED, first)
    assert sorted(test for _, test, _ in found) == ["test_a", "test_b"], first
    assert sorted(found) == sorted(re.findall(SEED, again))
    assert len({seed for seed, _, _ in found}) == 2
    assert re.search(r"assert \d+ == 0", first), "the assertion's own difference is shown"
    assert "SimulationFailed: seed " in first


def test_no_seeds_are_refused(tmp_path: Path):
    said = run(
        tmp_path,
        """
        import pytest

        @pytest.mark.parametrize("seeds", [0, ()])
        def test_a(streamflow, seeds):
            with pytest.raises(sf.InvalidArguments, match="seeds must be at least one int"):
                streamflow.simulate(app, scenario, seeds=seeds)

        def test_b(streamflow):
            with pytest.raises(TypeError, match="async with"):
                with streamflow.world(app):
                    pass
            with pytest.raises(TypeError, match="has no option 'crash'"):
                streamflow.simulate(app, scenario, seeds=3, crash=True)
        """,
    )
    assert "3 passed" in said, said


def test_a_told_seed_is_the_only_one_that_is_played(tmp_path: Path):
    said = run(
        tmp_path,
        """
        def test_a(streamflow):
            assert [each.seed for each in streamflow.simulate(app, scenario, seeds=50)] == [7]
            assert streamflow.simulate(app, scenario, seed=3).seed == 7
        """,
        "--streamflow-seed=7",
    )
    assert "1 passed" in said, said


def test_a_test_without_the_fixture_loads_nothing_of_the_simulator(tmp_path: Path):
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light():\n"
        "    heavy = ('streamflow.sim', 'streamflow.worker', 'streamflow.client', 'msgspec', 'fastavro')\n"
        "    assert 'streamflow.testing.plugin' in sys.modules\n"
        "    assert [name for name in sys.modules if name.startswith(heavy)] == []\n"
    )
    named = [] if INSTALLED else ["-p", PLUGIN]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named, "test_light.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert ran.returncode == 0, ran.stdout


def test_it_works_beside_anyios_plugin(tmp_path: Path):
    pytest.importorskip("anyio", reason="its plugin is what is tested")
    said = run(
        tmp_path,
        """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_a(streamflow):
            async with streamflow.world(app) as world:
                assert await (await world.client.start(sleep, 10)).result() == "slept"
            assert streamflow.simulate(app, scenario).result == "slept"
        """,
    )
    assert "1 passed" in said, said
