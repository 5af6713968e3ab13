"""A broker with TLS, SASL and authorization, certificates made on the spot, and what ACL commands say, carried out."""

from __future__ import annotations

import argparse
import base64
import datetime
import json
import shlex
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported by its stubs only since 2.17
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from streamflow.broker import Cluster

USERS = ("worker", "client", "step-worker", "projection", "nobody")
SECRET = "s3cret+&/§-of-"
"""The password of a user is this and the name: with characters that a URL must encode."""

_PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
_SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
_BEARER = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required;"


def password(user: str) -> str:
    return SECRET + user


def make_certificates(folder: Path) -> None:
    """`ca.pem`, and `broker.pem` with key and certificate for 127.0.0.1, self-signed, valid for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "streamflow test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "broker.pem").write_bytes(private + pem)


_ANYTHING: Any = None
"""The stubs know nothing of the None that means any."""
EVERYTHING = AclBindingFilter(
    ResourceType.ANY, _ANYTHING, ResourcePatternType.ANY, _ANYTHING, _ANYTHING, AclOperation.ANY, AclPermissionType.ANY
)


class Secured:
    """One node: PLAINTEXT for administrators, SASL, SASLTLS and TLS for all others, who may nothing until granted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        make_certificates(folder)
        self.ca = folder / "ca.pem"
        users = " ".join(f'user_{user}="{password(user)}"' for user in USERS)
        settings = {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,OAUTHBEARER",
        }
        for listener in ("sasl", "sasltls"):
            settings |= {
                f"listener.name.{listener}.plain.sasl.jaas.config": _escaped(f"{_PLAIN} {users};"),
                f"listener.name.{listener}.scram-sha-256.sasl.jaas.config": _SCRAM,
                f"listener.name.{listener}.oauthbearer.sasl.jaas.config": _BEARER,
            }
        for listener in ("tls", "sasltls"):
            settings |= {
                f"listener.name.{listener}.ssl.keystore.type": "PEM",
                f"listener.name.{listener}.ssl.keystore.location": str(folder / "broker.pem"),
            }
        listeners = {"SASL": "SASL_PLAINTEXT", "SASLTLS": "SASL_SSL", "TLS": "SSL"}
        self.cluster = Cluster(folder / "broker", settings=settings, listeners=listeners)

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.cluster.bootstrap})

    def url(self, user: str, *, mechanism: str = "PLAIN", listener: str = "SASL", secret: str | None = None) -> str:
        """The URL of a user, with the password in it."""
        shown = quote(secret if secret is not None else password(user), safe="")
        return f"{self.url_without_password(user, mechanism=mechanism, listener=listener)}&sasl.password={shown}"

    def url_without_password(self, user: str, *, mechanism: str = "PLAIN", listener: str = "SASL") -> str:
        tls = listener == "SASLTLS"
        return (
            f"kafka://{self.cluster.address(listener)}?security.protocol={'SASL_SSL' if tls else 'SASL_PLAINTEXT'}"
            f"&sasl.mechanism={mechanism}&sasl.username={user}{f'&ssl.ca.location={self.ca}' if tls else ''}"
        )

    def add_scram_users(self) -> None:
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        alterations: list[Any] = [UserScramCredentialUpsertion(user, info, password(user).encode()) for user in USERS]
        admin = self.admin()  # what it was asked ends with it
        for future in admin.alter_user_scram_credentials(alterations).values():
            future.result(15)

    def run_acl_commands(self, lines: Iterable[str]) -> None:
        """Carry out what `topics create --acls` prints: the tool itself is in no jar of the broker's."""
        bindings = [binding for line in lines if not line.startswith("#") for binding in parse_acl_command(line)]
        admin = self.admin()
        for future in admin.create_acls(bindings).values():
            future.result(15)
        # The controller has them now; the broker learns of them a moment later.
        deadline = time.monotonic() + 15
        while missing := set(bindings) - set(admin.describe_acls(EVERYTHING).result(15)):
            assert time.monotonic() < deadline, missing


def _escaped(text: str) -> str:
    """As a properties file takes it: Java reads them as Latin-1."""
    return "".join(each if each.isascii() else f"\\u{ord(each):04x}" for each in text)


def parse_acl_command(line: str) -> list[AclBinding]:
    """What a `kafka-acls.sh --add` would ask the cluster for."""
    program, *words = shlex.split(line)
    assert program == "kafka-acls.sh", line
    parser = argparse.ArgumentParser()
    parser.add_argument("--bootstrap-server", required=True)
    parser.add_argument("--command-config")
    parser.add_argument("--add", action="store_true", required=True)
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--resource-pattern-type", default="literal")
    for name in ("--allow-principal", "--operation", "--topic", "--group"):
        parser.add_argument(name, action="append", default=[])
    found = parser.parse_args(words)
    resources = [(ResourceType.TOPIC, name) for name in found.topic]
    resources += [(ResourceType.GROUP, name) for name in found.group]
    resources += [(ResourceType.BROKER, "kafka-cluster")] if found.cluster else []
    pattern = ResourcePatternType[found.resource_pattern_type.upper()]
    return [
        AclBinding(kind, name, pattern, principal, "*", _operation(operation), AclPermissionType.ALLOW)
        for kind, name in resources
        for principal in found.allow_principal
        for operation in found.operation
    ]


def _operation(name: str) -> Any:
    return AclOperation["".join(f"_{each}" if each.isupper() else each for each in name).lstrip("_").upper()]


@contextmanager
def token_server(user: str, client_secret: str) -> Iterator[str]:
    """An OAuth token endpoint that knows one client; its tokens are unsigned, as Kafka takes them in tests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            allowed = given == f"{user}:{client_secret}"
            body = json.dumps(_token(user) if allowed else {"error": "invalid_client"}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the test says what went wrong."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/token"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _token(user: str) -> dict[str, object]:
    now = int(time.time())
    parts = ({"alg": "none"}, {"sub": user, "iat": now, "exp": now + 600, "scope": "kafka"})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return {"access_token": f"{'.'.join(encoded)}.", "token_type": "bearer", "expires_in": 600}
