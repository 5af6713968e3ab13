"""`worker`: serves, stops gracefully on a signal, at once on a second one, and says what is wrong with its app."""

from __future__ import annotations

import json
import signal

import pytest

from tests.cli import driver
from tests.cli.conftest import Shop
from tests.cli.driver import Starter


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_gracefully(launch: Starter, shop: Shop, number: signal.Signals) -> None:
    worker = launch("worker", "shop:app")
    said = worker.wait_for("Serving app shop", stream="stderr")
    assert f"pid {worker.process.pid}" in said and "6 workflows, 4 steps" in said and "shop.db" in said
    assert driver.run(shop.folder, "start", "patient", "3600", "--id", "p", env=shop.env).returncode == 0
    worker.send(number)
    assert worker.wait() == 0, worker.said
    assert worker.stdout == []
    assert worker.stderr[-1] == "Stopped."
    # Another one takes over at once, and knows the run.
    launch("worker", "shop.py:app").wait_for("Serving", stream="stderr")
    status = driver.run(shop.folder, "status", "p", "--json", env=shop.env)
    assert json.loads(status.stdout)["state"] == "running"


def test_a_second_signal_exits_at_once_even_when_a_step_blocks_the_loop(launch: Starter) -> None:
    worker = launch("worker", "shop:app")
    worker.wait_for("Serving app shop", stream="stderr")
    run = launch("start", "stuck", "--wait")
    worker.wait_for("holding the event loop", stream="stderr")
    worker.send(signal.SIGINT)
    worker.wait_for("a second signal exits at once", stream="stderr")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 128 + signal.SIGTERM
    assert run.process.poll() is None


def test_a_step_in_a_thread_does_not_keep_it(launch: Starter) -> None:
    worker = launch("worker", "shop:app")
    worker.wait_for("Serving app shop", stream="stderr")
    launch("start", "slow")
    worker.wait_for("lingering in a thread", stream="stderr")
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0, worker.said


def test_json_says_on_stdout_when_it_serves(launch: Starter) -> None:
    worker = launch("worker", "shop:app", "--json", "--max-parallel-steps", "2", "--log-level", "error")
    said = json.loads(worker.wait_for("pid"))
    assert said["app"] == "shop" and said["pid"] == worker.process.pid and said["partitions"] >= 1


def test_local_state_goes_where_it_is_told(launch: Starter, shop: Shop) -> None:
    launch("worker", "shop:app", "--state-dir", "elsewhere").wait_for("Serving", stream="stderr")
    assert (shop.folder / "elsewhere").is_dir()


def test_a_step_worker_serves_its_queues_and_owns_nothing(launch: Starter, shop: Shop) -> None:
    (shop.folder / "queued.py").write_text(
        "import os\nfrom shop import app\n"
        "@app.step(queue='gpu')\nasync def embed() -> int: return os.getpid()\n"
        "@app.workflow\nasync def embedding() -> int: return await embed()\n"
    )
    owner = launch("worker", "queued:app")
    owner.wait_for("a share of its 4 partitions", stream="stderr")
    started = driver.run(shop.folder, "start", "embedding", "--id", "e", env=shop.env)
    assert started.returncode == 0, started.stderr
    status = json.loads(driver.run(shop.folder, "status", "e", "--json", env=shop.env).stdout)
    assert status["waiting_on"] == ["step embed on queue gpu"]
    gpu = launch("worker", "queued:app", "--queue", "gpu", "--queue", "cpu", "--json")
    said = json.loads(gpu.wait_for("pid"))
    assert (said["queues"], said["pid"]) == (["gpu", "cpu"], gpu.process.pid)
    assert gpu.wait_for("Warning", stream="stderr").startswith(
        "Warning: no step of app shop names the queue cpu; its steps name gpu. This worker gets only what calls put "
        "there with options(queue='cpu')"
    )
    assert "the queue gpu" not in gpu.said
    assert "queues gpu, cpu, pid" in gpu.wait_for("Serving app shop", stream="stderr")
    result = driver.run(shop.folder, "result", "e", env=shop.env)
    assert json.loads(result.stdout) == gpu.process.pid
    gpu.send(signal.SIGTERM)
    assert gpu.wait() == 0, gpu.said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["shop:app", "--queue", "G P U"], "queue must match"),
        (["idle:app", "--queue", "gpu"], "app idle has no steps, and a step worker runs nothing else"),
        (["nowhere:app"], "no module 'nowhere'"),
        (["shop:ap"], "Did you mean shop:app?"),
        (["shop:charge"], "is not an App"),
        (["shop"], "MODULE:APP"),
        (["shop:app", "--max-parallel-steps", "0"], "--max-parallel-steps"),
        (["shop:app", "--url", "memory://"], "inside one process"),
        (["shop:app", "--url", "postgres://x"], "must start with sqlite://"),
        (["shop:app", "--processes", "2", "--url", "kafka://x:y"], "expected HOST:PORT of a broker, found 'x:y'"),
        ([], "Missing argument 'MODULE:APP'"),
    ],
)
def test_a_wrong_call(shop: Shop, args: list[str], said: str) -> None:
    (shop.folder / "idle.py").write_text("import streamflow\napp = streamflow.App('idle')\n")
    ran = driver.run(shop.folder, "worker", *args, env=shop.env)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in " ".join(ran.stderr.split()) and "Traceback" not in ran.stderr


def test_a_module_that_fails_keeps_its_traceback(shop: Shop) -> None:
    (shop.folder / "faulty.py").write_text("def boom():\n    1 / 0\nboom()\n")
    ran = driver.run(shop.folder, "worker", "faulty:app", env=shop.env)
    assert ran.returncode == 1
    assert 'faulty.py", line 2, in boom' in ran.stderr and "ZeroDivisionError" in ran.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--no-create-topics"], "shop.db"),
        (["--url", "sqlite:///no/such/folder/shop.db"], "no/such/folder"),
    ],
)
def test_a_log_that_cannot_be_opened_is_one_line(shop: Shop, args: list[str], said: str) -> None:
    ran = driver.run(shop.folder, "worker", "shop:app", *args, env=shop.env)
    assert (ran.returncode, ran.stdout) == (1, ""), ran.stderr
    assert ran.stderr.startswith("Error: ") and ran.stderr.count("\n") == 1
    assert said in ran.stderr


def test_the_apps_own_logging_is_left_alone(launch: Starter, shop: Shop) -> None:
    (shop.folder / "loud.py").write_text(
        "import logging, sys\n"
        "logging.basicConfig(format='mine %(message)s', level='INFO', stream=sys.stderr)\n"
        "from shop import app\n"
        "@app.step\nasync def tell() -> None: logging.getLogger('loud').info('told')\n"
        "@app.workflow\nasync def telling() -> None: await tell()\n"
    )
    worker = launch("worker", "loud:app")
    worker.wait_for("Serving", stream="stderr")
    assert driver.run(shop.folder, "start", "telling", "--wait", env=shop.env).returncode == 0
    assert worker.wait_for("told", stream="stderr") == "mine told"
