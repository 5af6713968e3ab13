"""A broker with TLS, SASL and authorization: the printed ACLs suffice, what is missing is said, no secret shows."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    ResourceType,
)

import streamflow as sf
from streamflow.cli.main import cli
from streamflow.errors import InvalidArguments, Unavailable
from streamflow.logs import open_log
from streamflow.logs.base import COMMANDS, DEAD_LETTERS, HISTORY, STATUS, Log, Outgoing, Record
from tests.cli import driver
from tests.kafka.secured import EVERYTHING, SECRET, Secured, parse_acl_command, password, token_server

app = sf.App("secured")
DEADLINE_SECONDS = 30
PARTITIONS = 2


@app.step
async def double(number: int) -> int:
    return 2 * number


@app.workflow
async def doubling(number: int) -> int:
    await asyncio.sleep(0.01)
    return await double(number)


@pytest.fixture(scope="module")
def secured(kafka_runtime: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A broker of its own, on which app `secured` has all its grants; other apps have none."""
    broker = Secured(tmp_path_factory.mktemp("secured"))
    with broker.cluster:
        broker.add_scram_users()
        broker.run_acl_commands(acl_lines(broker, "secured"))
        yield broker


def acl_lines(broker: Secured, name: str, *options: str) -> list[str]:
    said = CliRunner().invoke(
        cli,
        ["topics", "create", "--acls", "--app", name, "--url", broker.cluster.url, *options],
        catch_exceptions=False,
    )
    assert said.exit_code == 0, said.output
    return said.stdout.splitlines()


async def first(batches: AsyncIterator[list[Record]]) -> list[Record]:
    return await asyncio.wait_for(anext(batches), DEADLINE_SECONDS)


def worker_url(broker: Secured) -> str:
    return broker.url("worker") + f"&partitions={PARTITIONS}"


# ---------------------------------------------------------------------------------------------------------------- ACLs


def test_each_role_does_its_work_with_exactly_the_printed_acls(secured: Secured, tmp_path: Path):
    async def test() -> None:
        async with app.serve(worker_url(secured), state_dir=tmp_path), app.connect(secured.url("client")) as client:
            handle = await client.start(doubling, 4, id="roles")
            assert await handle.result(timeout=DEADLINE_SECONDS) == 8
            assert (await handle.status()).state == "completed" and len((await handle.steps()).items) == 2
            assert "RunCompleted" in {event.type for event in await handle.history()}
            assert "roles" in {run.id for run in (await client.list()).items}
            await step_worker_answers()
            await projection_reads()

    async def step_worker_answers() -> None:
        worker = await open_log(secured.url("worker"), app="secured")
        await worker.publish([Outgoing("steps.gpu", 0, b"roles", b"attempt")])
        await worker.close()
        log = await open_log(secured.url("step-worker"), app="secured", create=False)
        assert [record.value for record in await log.read("steps.gpu", 0, 0)] == [b"attempt"]
        end = await log.end_offset(COMMANDS, 0)
        await log.publish([Outgoing(COMMANDS, 0, b"roles", b"not a command: it goes to the dead letters")])
        assert await log.end_offset(COMMANDS, 0) == end + 1
        await log.close()

    async def projection_reads() -> None:
        log = await open_log(secured.url("projection"), app="secured", create=False)
        for topic in (HISTORY, STATUS):
            records = [record for number in range(PARTITIONS) for record in await log.read(topic, number, 0)]
            assert b"roles" in {record.key for record in records}
            filled = [number for number in range(PARTITIONS) if await log.end_offset(topic, number)]
            assert await first(log.follow(topic, filled[0], 0))
        await log.close()

    asyncio.run(test())


def test_what_is_granted_is_what_is_printed(secured: Secured):
    wanted = {
        (each.restype, each.name, each.principal, each.operation)
        for line in acl_lines(secured, "secured")
        if not line.startswith("#")
        for each in parse_acl_command(line)
    }
    admin = secured.admin()
    found = admin.describe_acls(EVERYTHING).result(DEADLINE_SECONDS)
    mine = {(each.restype, each.name, each.principal, each.operation) for each in found if "probe" not in each.name}
    assert mine - {each for each in mine if each[0] == ResourceType.BROKER} == {
        each for each in wanted if each[0] != ResourceType.BROKER
    }


def test_a_principal_without_any_is_told_so(secured: Secured):
    async def test() -> None:
        for create in (False, True):
            with pytest.raises(InvalidArguments, match=r"this principal may not: grant it .*--acls") as caught:
                await open_log(secured.url("nobody"), app="secured", create=create)
            assert "secured.commands" in str(caught.value) and password("nobody") not in str(caught.value)

    asyncio.run(test())


def test_a_client_must_not_do_a_workers_work(secured: Secured):
    async def test() -> None:
        await (await open_log(worker_url(secured), app="secured")).close()
        log = await open_log(secured.url("client"), app="secured", create=False)
        try:
            with pytest.raises(InvalidArguments, match=r"topic secured\.commands cannot be read .*this principal may"):
                await read_one(log, COMMANDS)
            with pytest.raises(InvalidArguments, match=r"topic secured\.commands cannot be read"):
                await first(log.follow(COMMANDS, 0, 0))
            with pytest.raises(InvalidArguments, match=r"topic secured\.dead-letters cannot be written"):
                await log.publish([Outgoing(DEAD_LETTERS, 0, b"k", b"v")])
            with pytest.raises(Unavailable, match=r"history\[0\]"):
                await log.append(0, await log.end_offset(HISTORY, 0), [(b"k", b"v")])
            with pytest.raises(InvalidArguments, match="group secured cannot be used"):
                await asyncio.wait_for(log.join("a-client"), DEADLINE_SECONDS)
            with pytest.raises(InvalidArguments, match=r"secured\.history\[0\]|history\[0\] cannot be trimmed"):
                await log._topics.delete_before(HISTORY, 0, 0)  # type: ignore[attr-defined]
        finally:
            await log.close()

    async def read_one(log: Log, topic: str) -> None:
        writer = await open_log(secured.url("step-worker"), app="secured", create=False)
        await writer.publish([Outgoing(topic, 0, b"k", b"v")])
        await writer.close()
        await log.read(topic, 0, 0)

    asyncio.run(test())


def test_topics_are_made_by_an_administrator_where_the_worker_may_not(secured: Secured, tmp_path: Path):
    lines = [
        line.replace(" --operation Create --operation DescribeConfigs", "").replace(" --operation Delete", "")
        for line in acl_lines(secured, "probe", "--role", "worker", "--role", "client")
    ]
    secured.run_acl_commands(lines)
    probe = sf.App("probe")
    probe.workflow(name="nothing")(_nothing)

    async def test() -> None:
        with pytest.raises(InvalidArguments, match=r"topic probe\.commands cannot be created: this principal may not"):
            async with probe.serve(worker_url(secured), state_dir=tmp_path):
                pass
        made = await asyncio.to_thread(
            CliRunner().invoke, cli, ["topics", "create", "--app", "probe", "--url", secured.cluster.url]
        )
        assert made.exit_code == 0, made.output
        serving = probe.serve(secured.url("worker"), state_dir=tmp_path, create_topics=False)
        async with serving, probe.connect(secured.url("client")) as client:
            assert await (await client.start("nothing")).result(timeout=DEADLINE_SECONDS) is None

    asyncio.run(test())


async def _nothing() -> None: ...


# ------------------------------------------------------------------------------------------------- mechanisms, secrets


@pytest.mark.parametrize("listener", ["SASL", "SASLTLS"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_each_mechanism_gets_in_and_a_wrong_password_does_not(secured: Secured, mechanism: str, listener: str):
    async def test() -> None:
        await (await open_log(worker_url(secured), app="secured")).close()
        url = secured.url("client", mechanism=mechanism, listener=listener)
        await (await open_log(url, app="secured", create=False)).close()
        wrong = secured.url("client", mechanism=mechanism, listener=listener, secret=f"{SECRET}wrong")
        with pytest.raises(Unavailable, match="Authentication failed") as caught:
            await open_log(wrong, app="secured", create=False)
        assert SECRET not in str(caught.value) and quote(SECRET, safe="") not in str(caught.value)

    asyncio.run(test())


def test_tls_needs_the_certificate(secured: Secured):
    url = f"kafka://{secured.cluster.address('TLS')}?security.protocol=SSL"

    async def test() -> None:
        # A client without a certificate of its own is ANONYMOUS, the administrator here.
        await (await open_log(f"{url}&ssl.ca.location={secured.ca}&partitions=2", app="secured")).close()
        with pytest.raises(Unavailable, match="certificate verify failed"):
            await open_log(url, app="secured", create=False)

    asyncio.run(test())


def test_oauthbearer_asks_the_token_endpoint_itself(secured: Secured):
    url = (
        f"kafka://{secured.cluster.address('SASL')}?security.protocol=SASL_PLAINTEXT&sasl.mechanism=OAUTHBEARER"
        "&sasl.oauthbearer.method=oidc&sasl.oauthbearer.client.id=client"
    )

    async def test(endpoint: str) -> None:
        await (await open_log(worker_url(secured), app="secured")).close()
        place = f"&sasl.oauthbearer.token.endpoint.url={quote(endpoint, safe='')}"
        await (
            await open_log(f"{url}{place}&sasl.oauthbearer.client.secret=token-0815", app="secured", create=False)
        ).close()
        with pytest.raises(Unavailable, match="invalid_client") as caught:
            await open_log(f"{url}{place}&sasl.oauthbearer.client.secret=wrong-4711", app="secured", create=False)
        assert "4711" not in str(caught.value)

    with token_server("client", "token-0815") as endpoint:
        asyncio.run(test(endpoint))


def test_no_process_shows_the_secret(secured: Secured, tmp_path: Path):
    """In talkative logs, output, errors or titles; whether the secret is in the URL, a file or a variable."""
    (tmp_path / "shop.py").write_text(driver.SHOP.replace('App("shop")', 'App("secured")'))
    (tmp_path / "password").write_text(password("client"), encoding="utf-8")
    in_url = {"STREAMFLOW_URL": worker_url(secured) + "&debug=all", "STREAMFLOW_APP": "secured"}
    bare = secured.url_without_password("client")
    in_file = in_url | {"STREAMFLOW_URL": f"{bare}&sasl.password.file={tmp_path}/password"}
    in_variable = in_url | {"STREAMFLOW_URL": f"{bare}&sasl.password.env=OURS", "OURS": password("client")}
    wrong = in_variable | {"OURS": f"{SECRET}wrong"}
    worker = driver.Process(
        tmp_path, "worker", "shop:app", "--processes", "2", "--log-level", "debug", "--json", env=in_url
    )
    try:
        worker.wait_for('"partitions"')
        pids = [worker.process.pid, *children(worker.process.pid)]
        titles = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
        added = driver.run(tmp_path, "start", "add", "1", "2", "--wait", "--json", env=in_file)
        listed = driver.run(tmp_path, "list", "--json", env=in_variable)
        refused = driver.run(tmp_path, "list", env=wrong)
    finally:
        worker.send(signal.SIGTERM)
        worker.wait()
    assert len(titles) == 3 and all("worker" in title for title in titles)
    assert (added.returncode, listed.returncode, refused.returncode) == (0, 0, 1), added.stderr + listed.stderr
    assert json.loads(added.stdout) is not None and "Authentication failed" in refused.stderr
    texts = [*titles, worker.said, *[text for ran in (added, listed, refused) for text in (ran.stdout, ran.stderr)]]
    assert "SASL" in worker.said, "librdkafka talks"
    for text in texts:
        assert SECRET not in text and quote(SECRET, safe="") not in text


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
