"""The registry's protocol, spoken to a server that answers as the test says."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from streamflow.codec.registry import COMPATIBILITY, RegistryRefused, RegistrySettings
from streamflow.codec.registry_client import ANSWER_BYTES_MAX, RegistryClient
from streamflow.errors import InvalidArguments, Unavailable


class Server(HTTPServer):
    """Answers are by "METHOD path"; what it was asked is kept, with its headers and its body."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, object]] = {}
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.bodies: list[object] = []
        self.url = f"http://127.0.0.1:{self.server_port}/api"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self):
        question = f"{self.command} {self.path.removeprefix('/api')}"
        self.server.asked.append(question)
        self.server.headers = dict(self.headers)
        if length := int(self.headers.get("Content-Length", 0)):
            self.server.bodies.append(json.loads(self.rfile.read(length)))
        status, body = self.server.answers.get(question, (404, {"message": "there is none"}))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/api/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = answer

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client(server, **more):
    return RegistryClient(RegistrySettings((server.url,), **more))


def test_a_schema_by_its_id(server):
    server.answers["GET /schemas/ids/7"] = (200, {"schema": '{"type": "string"}'})
    assert client(server).schema(7) == {"type": "string"}
    assert "Authorization" not in server.headers


def test_credentials_are_sent(server):
    server.answers["GET /schemas/ids/7"] = (200, {"schema": '"null"'})
    client(server, user_info="me:s:e").schema(7)
    assert server.headers["Authorization"] == "Basic " + base64.b64encode(b"me:s:e").decode()
    client(server, token="abc").schema(7)
    assert server.headers["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((404, {"message": "Schema 7 not found."}), r"HTTP 404: Schema 7 not found\."),
        ((404, b"<html>"), "HTTP 404: Not Found"),
        ((200, {"schema": "{}", "schemaType": "PROTOBUF"}), "it is of type PROTOBUF, expected AVRO"),
        ((200, {"schema": "{}", "references": [{"name": "x"}]}), "refers to other subjects"),
        ((200, {"schema": "{"}), "it is not JSON"),
        ((200, {}), "it is not JSON"),
    ],
)
def test_what_is_no_schema_is_refused(server, answer, why):
    server.answers["GET /schemas/ids/7"] = answer
    with pytest.raises(RegistryRefused, match=why):
        client(server).schema(7)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((500, {"message": "broken"}), "answered HTTP 500: broken"),
        ((401, {"message": "who?"}), "answered HTTP 401: who?"),
        ((302, b""), "answered HTTP 302"),
        ((200, b"no JSON"), "something else than a JSON object"),
        ((200, [1]), "something else than a JSON object"),
        ((200, b'"' + b"x" * ANSWER_BYTES_MAX + b'"'), "something else than a JSON object"),
    ],
)
def test_the_registrys_own_trouble_says_nothing_of_the_schema(server, answer, why):
    server.answers["GET /schemas/ids/7"] = answer
    with pytest.raises(Unavailable, match=f"the schema registry cannot be asked .{server.url}.*{why}"):
        client(server, user_info="me:secret").schema(7)
    assert server.asked == ["GET /schemas/ids/7"]


def test_the_second_url_is_asked_when_the_first_is_away(server):
    server.answers["GET /schemas/ids/7"] = (200, {"schema": '"null"'})
    both = RegistryClient(RegistrySettings(("http://127.0.0.1:1", server.url + "/")))
    assert both.schema(7) == "null"
    assert both.name == f"http://127.0.0.1:1,{server.url}/"


def test_a_new_subject_gets_its_compatibility_before_its_schema(server):
    server.answers["PUT /config/shop.x-value"] = (200, {})
    server.answers["POST /subjects/shop.x-value/versions"] = (200, {"id": 4})
    assert client(server).register("shop.x-value", '"null"') == 4
    assert server.asked == [
        "GET /config/shop.x-value",
        "PUT /config/shop.x-value",
        "POST /subjects/shop.x-value",
        "POST /subjects/shop.x-value/versions",
    ]
    schema = {"schema": '"null"', "schemaType": "AVRO"}
    assert server.bodies == [{"compatibility": COMPATIBILITY}, schema, schema]


def test_a_registry_that_has_it_all_is_only_read(server):
    server.answers["GET /config/shop.x-value"] = (200, {"compatibilityLevel": "NONE"})
    server.answers["POST /subjects/shop.x-value"] = (200, {"id": 4})
    assert client(server).register("shop.x-value", '"null"') == 4
    assert server.asked == ["GET /config/shop.x-value", "POST /subjects/shop.x-value"]


@pytest.mark.parametrize("refused", ["GET /config/x", "POST /subjects/x", "POST /subjects/x/versions"])
def test_what_the_registry_refuses_is_told(server, refused):
    server.answers |= {"GET /config/x": (200, {}), refused: (422, {"message": "not that"})}
    with pytest.raises(RegistryRefused, match="HTTP 422: not that"):
        client(server).register("x", '"null"')


def test_an_answer_without_an_id_is_refused(server):
    server.answers |= {"GET /config/x": (200, {}), "POST /subjects/x": (200, {"id": "7"})}
    with pytest.raises(RegistryRefused, match="expected the id of a schema, found '7'"):
        client(server).register("x", '"null"')


def test_authorities_that_cannot_be_read_are_told(server):
    with pytest.raises(InvalidArguments, match=r"schema\.registry\.ssl\.ca\.location=/none cannot be used"):
        client(server, ca="/none")
