"""Apps: what they hold, and how they are served and connected to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import streamflow as sf
from streamflow.worker import Worker

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_there():
    for name in sf.__all__:
        assert getattr(sf, name) is not None
    assert set(sf.__all__) <= set(dir(sf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sf.nothing


def test_the_logger_is_not_hidden_by_a_module_of_its_name():
    program = "import streamflow as sf, streamflow.serve; sf.log.warning('said'); sf.log.isEnabledFor(10)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_optimised_python_is_refused():
    command = [sys.executable, "-O", "-c", "import streamflow"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "does not run under python -O" in ran.stderr


@pytest.mark.parametrize("name", ["", "Shop", "a b", "a" * 65, 5])
def test_a_wrong_name(name: Any):
    with pytest.raises(ValueError, match="app name must match"):
        sf.App(name)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"retry must be a streamflow\.Retry"):
        sf.App("shop", retry=3)  # type: ignore[arg-type]
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_parallel_steps must be an int of at least 1"):
            sf.App("shop", max_parallel_steps=wrong)  # type: ignore[arg-type]


def test_the_app_decides_last_how_often_its_steps_are_tried():
    app = sf.App("shop", retry=sf.Retry(max_attempts=7))

    @app.workflow
    async def fulfil() -> None: ...

    assert app.workflows["fulfil"] is fulfil
    assert fulfil.app_retry.max_attempts == 7


def test_a_registry_in_two_apps_keeps_them_apart():
    registry = sf.Registry()

    @registry.step
    async def charge() -> None: ...

    @registry.workflow
    async def fulfil() -> None: ...

    one, two = sf.App("one", retry=sf.Retry(max_attempts=1)), sf.App("two", retry=sf.Retry(max_attempts=2))
    one.include(registry)
    two.include(registry)
    assert [app.workflows["fulfil"].app_retry.max_attempts for app in (one, two)] == [1, 2]
    assert one.steps["charge"] is charge is two.steps["charge"]
    with pytest.raises(ValueError, match="registered twice"):
        one.include(registry)
    for wrong in (two, 5):
        with pytest.raises(ValueError, match=r"can include a streamflow\.Registry"):
            one.include(wrong)  # type: ignore[arg-type]


def test_the_url_comes_from_the_environment_or_is_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    app = sf.App("shop")
    monkeypatch.chdir(tmp_path)

    async def serve() -> None:
        async with app.serve() as client:
            assert (await client.list()).items == []

    asyncio.run(serve())
    assert (tmp_path / "streamflow.db").exists()
    monkeypatch.setenv("STREAMFLOW_URL", "sqlite:///other.db")
    asyncio.run(serve())
    assert (tmp_path / "other.db").exists()


def test_connecting_needs_topics(tmp_path: Path):
    async def main() -> None:
        with pytest.raises(sf.Unavailable):
            async with sf.connect(f"sqlite:///{tmp_path}/none.db", app="shop"):
                pass
        with pytest.raises(sf.Unavailable, match="holds no topics of app 'shop'"):
            async with sf.App("shop").connect("memory://nobody"):
                pass
        with pytest.raises(sf.Unavailable, match="holds no topics of app 'shop'"):
            async with sf.App("shop").serve("memory://nobody", create_topics=False):
                pass

    asyncio.run(main())


def test_wrong_ways_to_serve():
    app = sf.App("shop")
    wrong: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ("memory://", {"queues": "gpu"}, sf.InvalidArguments, "queues must be a list of names, found the str 'gpu'"),
        ("memory://", {"queues": ["G P U"]}, sf.InvalidArguments, "queue must match"),
        ("memory://", {"queues": [7]}, sf.InvalidArguments, "queue must match"),
        ("memory://", {"metrics_port": -1}, sf.InvalidArguments, "metrics_port must be 0 to 65535"),
        ("memory://", {"max_parallel_steps": 0}, sf.InvalidArguments, "max_parallel_steps"),
        ("ftp://x", {}, sf.InvalidArguments, "log URL must start with"),
        (5, {}, sf.InvalidArguments, "url must be a str"),
    ]

    async def main() -> None:
        for url, options, error, text in wrong:
            with pytest.raises(error, match=text):
                async with app.serve(url, **options):
                    pass
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_metrics_are_served(unused_port: int):
    async def main() -> None:
        async with sf.App("shop").serve("memory://", metrics_port=unused_port):
            url = f"http://127.0.0.1:{unused_port}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
            assert "streamflow_" in text
            with pytest.raises(sf.InvalidArguments, match=f"metrics_port {unused_port} cannot be used"):
                async with sf.App("other").serve("memory://", metrics_port=unused_port):
                    pass

    asyncio.run(main())


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_what_the_block_raises_comes_out_as_it_is():
    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            async with sf.App("shop").serve("memory://"):
                raise KeyError("mine")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_worker_that_dies_ends_the_block(monkeypatch: pytest.MonkeyPatch):
    async def die(worker: Worker) -> None:
        await asyncio.sleep(0)
        raise sf.CorruptLog("page someone")

    monkeypatch.setattr(Worker, "wait", die)

    async def main() -> None:
        with pytest.raises(sf.CorruptLog, match="page someone"):
            async with sf.App("shop").serve("memory://"):
                await asyncio.Event().wait()
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    asyncio.run(main())


def test_cancelling_the_block_from_outside_stays_a_cancellation():
    async def serve(entered: asyncio.Event) -> None:
        async with sf.App("shop").serve("memory://"):
            entered.set()
            await asyncio.Event().wait()

    async def main() -> None:
        entered = asyncio.Event()
        serving = asyncio.create_task(serve(entered))
        await entered.wait()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
