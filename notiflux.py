#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=15.0.1,<18", "PyJWT>=2.10.1,<3", "cryptography>=43.0.0,<51"]
# ///
# SPDX-License-Identifier: MIT
"""notiflux: subscribe to topics over a WebSocket, broadcast to them with one HTTP POST.

A message's way: HTTPConnection -> Router.process_request -> TokenVerifier -> Hub.broadcast
-> WebSocketSubscriber.deliver -> its socket. One process, one event loop, no threads, no locks.

  notiflux.py               run the daemon; its settings come from the environment
  notiflux.py dev           run it with a throwaway key, and print what to type next
  notiflux.py keygen        make the key pair: private.pem signs tokens, public.pem is the daemon's
  notiflux.py token         print a token that lets its holder subscribe or broadcast
  notiflux.py check         check settings and key, or say what a token grants

What it promises: a 2xx to a publisher means that the broadcast happened, exactly once, and any
other answer that it did not. A subscriber that does not keep up is dropped, never waited for.
No token, key or message text is ever logged.

What it does not do: store messages for good, tell whether somebody read them, or let a
subscriber send anything but commands.

The rooms below, each using only what stands above it:
  Errors        what can go wrong, and how a peer hears of it
  Settings      what can be set, from one table
  Tokens        who may do what
  Messages      what is sent, and where the server is
  Hub           who listens to which topic
  Subscribers   a WebSocket connection and its commands
  HTTP          bytes to requests, answers to bytes
  Routes        where a path and a method become an answer
  Observation   what the operator sees
  Daemon        from listening to drained
  Command line  one function a command
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("notiflux: needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import argparse
import asyncio
import base64
import contextlib
import email.utils
import errno
import functools
import json
import logging
import math
import os
import re
import resource
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, cast

VERSION = "0.1.0"
INSTALL = "python3 -m venv venv && venv/bin/pip install 'websockets<18' 'PyJWT<3' cryptography"
try:
    import cryptography
    import jwt
    import websockets.asyncio.server
    import websockets.version
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from websockets.datastructures import Headers
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import Frame, Opcode
    from websockets.http11 import Request as HandshakeRequest
    from websockets.http11 import Response
    from websockets.protocol import State
except (ImportError, ValueError) as exc:  # ValueError: websockets reads variables of its own
    sys.exit(f"notiflux: cannot load a package it needs ({exc}); to install them: {INSTALL}")

for _package, _floor, _found in (
    ("websockets", (15, 0), websockets.version.version),
    ("PyJWT", (2, 10), jwt.__version__),
    ("cryptography", (43, 0), cryptography.__version__),
):
    if tuple(int(part) for part in re.findall(r"\d+", _found)[:2]) < _floor:
        sys.exit(f"notiflux: {_package} {_found} is too old; to install a newer one: {INSTALL}")

LEEWAY_S = 60  # how far clocks may drift apart before a token is refused
TOKEN_MAX = 8 * 1024  # bytes of a token, before anything looks at it
TOKENS_REMEMBERED = 1024  # verified tokens kept, at most 8 MiB of them
TOPIC_MAX = 512  # bytes of a topic in UTF-8
TOPICS_PER_BROADCAST = 1000
JSON_DEPTH_MAX = 64
COMMAND_MAX = 16 * 1024  # bytes of a command: a token, a topic and room to spare
COMMANDS_REFUSED_MAX = 16
LINE_MAX = 8 * 1024  # bytes of the request line, and of one header line, without CRLF
HEAD_MAX = 16 * 1024  # bytes of a whole head, with its empty line
HEADERS_MAX = 64
CHUNK_LINE_MAX = 256  # bytes of a chunk's size line; extensions are short where they exist
READ_MAX = 32 * 1024  # bytes read at once, so that no peer keeps the loop busy for long
FRAMES_READ_MAX = 4 * 1024  # the same once they are frames: an empty one has 6 bytes
ACCEPT_MAX = 8  # connections taken in one turn; it takes some turns until a surplus one is gone
LISTEN_QUEUE = 4096  # connections that wait in the kernel
REQUESTS_PER_TURN = 16  # answered before other connections have their turn of the loop
TIMEOUTS_S = {"head": 10, "body": 10, "idle": 75}  # each in all, however slowly bytes come
WRITE_TIMEOUT_S = 10  # for a peer to take what is queued for it
LINGER_S = 1  # for a peer to read the answer that ends its connection
CLOSE_TIMEOUT_S = 10  # for a subscriber to take its close frame and go
SWEEP_S = 1.0  # between two looks at every connection's deadline

log = logging.getLogger("notiflux")
"".encode("unicode_escape")  # loads the codec now, while there are descriptors


# --- Errors: what can go wrong, and how a peer hears of it. ---

# RFC 9110's phrases, which Python has from 3.13 on
PHRASES = {status.value: status.phrase for status in HTTPStatus}
PHRASES |= {413: "Content Too Large", 414: "URI Too Long"}
STATUS_HEADERS = {  # what such an answer always says: RFC 6750 section 3, RFC 6455 section 4.4
    401: {"WWW-Authenticate": "Bearer"},
    426: {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"},
    503: {"Retry-After": "1"},
}


class CommandError(Exception):
    """What the user of the command line can mend: one line that says what, and an exit code."""

    exit_code = 1


class SettingsError(CommandError):
    """A setting or a key that the program cannot start with."""

    exit_code = 78  # EX_CONFIG of sysexits.h


class Refusal(Exception):
    """The one way in which anything says no to a peer.

    `status` is the HTTP status, `code` the `error` of the answer, `detail` one sentence out of a
    finite set: it never holds a peer's own text. `headers` go into an HTTP answer.
    """

    def __init__(self, status: int, detail: str, code: str = "", **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        known = {400: "invalid_request", 401: "invalid_token"}
        self.code = code or known.get(status) or PHRASES[status].lower().replace(" ", "_")
        self.detail = detail
        self.headers = STATUS_HEADERS.get(status, {}) | headers


def printable(text: str, limit: int = 200) -> str:
    """Return `text` in printable ASCII, escaped as Python would, cut to `limit` characters."""
    text = text if len(text) <= limit else text[:limit] + "..."
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return text.encode("unicode_escape").decode("ascii")


def log_refusal(peer: str, operation: str, refusal: Refusal) -> None:
    """Log a refusal in the one stable form that other programs may read."""
    log.info('refused peer=%s op=%s why=%s detail="%s"', peer, operation, refusal.code, refusal)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("duplicate name")
    return names


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):  # nor is it read alike everywhere
        raise ValueError("not a number, or out of range")
    return value


def _integer(number: str) -> int:
    if len(number) > 300:
        _finite(number)
    return int(number)


JSON_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_finite
)
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """Return the JSON value in `data`, read strictly (RFC 8259).

    Raises ValueError for anything but one value in UTF-8 without a byte order mark, and for what
    would not survive being written again: duplicate names, numbers beyond a double, unpaired
    surrogates. Also where it nests deeper than 64.
    """
    text = data.decode()
    try:
        value = JSON_DECODER.decode(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX:
        level = [value]
        for _ in range(JSON_DEPTH_MAX + 1):  # level by level, since recursion has its own limit
            containers = [item for item in level if type(item) in (dict, list)]
            if not containers:
                break
            level = [c for i in containers for c in (i.values() if type(i) is dict else i)]
        else:
            raise ValueError("nested too deeply")
    if SURROGATE_ESCAPE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def dump_json(value: Any) -> str:
    """Return `value` as compact JSON text, its characters as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# --- Settings: what can be set. One table; parsing, errors and help all come from it. ---


def _number(kind: str, pattern: str, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(pattern, text) or not low <= float(text) <= high:
            raise ValueError(f"{kind} from {low} to {high}")
        return int(text) if text.isdigit() else float(text)

    return parse


_whole = functools.partial(_number, "a whole number", r"[0-9]{1,18}")
_seconds = functools.partial(_number, "seconds", r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


HOST_SETTING = re.compile(
    r"[0-9A-Za-z_-]{1,63}(?:\.[0-9A-Za-z_-]{1,63})*\.?"  # a name, or an IPv4 address
    r"|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[0-9A-Za-z_.-]+)?"  # an IPv6 address, with its zone
)


def _host(text: str) -> str:
    if text.startswith("unix:"):
        if not re.fullmatch(r"unix:/[^\0]{1,100}", text):
            raise ValueError("unix: and an absolute path of at most 100 characters")
    elif len(text) > 253 or not HOST_SETTING.fullmatch(text):
        raise ValueError("a host name, an address, or unix:/path")
    return text


def _origins(text: str) -> frozenset[str]:
    origins = frozenset(origin.strip().lower() for origin in text.split(","))
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin) for origin in origins):
        raise ValueError("origins such as https://example.org, separated by commas")
    return origins


def _level(text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise ValueError("debug, info, warning or error")
    return text.lower()


def setting(parse: Callable[[str], Any], default: str, meaning: str) -> Any:
    """Declare a setting. Its `parse` raises ValueError with what it expects; "" is unset."""
    value = parse(default) if default else None
    return field(default=value, metadata={"parse": parse, "default": default, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """Every setting; the environment variable has the field's name in capitals."""

    host: str = setting(_host, "127.0.0.1", "address to listen on; unix:/path for a Unix socket")
    port: int = setting(_whole(0, 65535), "8080", "0 picks a free one and logs it")
    jwt_public_key_b64: str | None = setting(
        str, "", "base64 of a PEM with one or more public keys; this or the next is required"
    )
    jwt_public_key_file: str | None = setting(str, "", "path of such a PEM; read again on SIGHUP")
    history_size: int = setting(_whole(0, 10**6), "100", "messages kept per topic; 0 keeps none")
    history_seconds: float = setting(_seconds(0, 10**8), "600", "how long they are kept")
    history_bytes: int = setting(
        _whole(0, 2**40), "67108864", "what all of history may hold; the oldest go first"
    )
    max_connections: int | None = setting(
        _whole(1, 10**7), "", "further ones get 503; what the open-file limit allows, less 64"
    )
    max_topics: int = setting(_whole(1, 10**6), "1000", "topics one connection may subscribe to")
    max_message_bytes: int = setting(_whole(1, 2**30), "1048576", "largest body of a POST")
    max_buffer_bytes: int = setting(
        _whole(1, 2**31), "4194304", "unsent bytes that drop a subscriber; >= MAX_MESSAGE_BYTES"
    )
    ping_interval: float = setting(
        _seconds(0.1, 86400), "15", "seconds between pings; a peer silent for two is dropped"
    )
    stop_timeout: float = setting(_seconds(0, 86400), "5", "seconds a stop may take")
    allowed_origins: frozenset[str] | None = setting(
        _origins, "", "comma-separated; a browser from elsewhere gets 403; any when unset"
    )
    tls_cert_file: str | None = setting(str, "", "serve https and wss with this certificate")
    tls_key_file: str | None = setting(str, "", "and this key")
    log_level: str = setting(_level, "info", "debug, info, warning or error")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings. Raises SettingsError that names the variable and what it expects."""
        values = {}
        for setting_ in fields(cls):
            name = setting_.name.upper()
            if text := environment.get(name, ""):
                try:
                    values[setting_.name] = setting_.metadata["parse"](text)
                except ValueError as exc:
                    raise SettingsError(f"{name}: expected {exc}") from exc
        settings = cls(**values)
        if settings.max_buffer_bytes < settings.max_message_bytes:
            raise SettingsError("MAX_BUFFER_BYTES: expected at least MAX_MESSAGE_BYTES")
        if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
            raise SettingsError("TLS_CERT_FILE, TLS_KEY_FILE: expected both or neither")
        return settings


# --- Tokens: who may do what. No sockets. ---

PublicKey = ec.EllipticCurvePublicKey
PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.{1,20000}?-----END \1-----", re.DOTALL)
TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


def _public_key(label: bytes, pem: bytes) -> PublicKey:
    """Return the P-256 key in one PEM block. Raises ValueError with what it is instead."""
    if b"PRIVATE KEY" in label:
        raise ValueError("a private key, which must stay with those who sign tokens")
    if b"CERTIFICATE" in label:
        raise ValueError("a certificate")
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ValueError("a PEM block that is no public key") from exc
    if not isinstance(key, PublicKey):
        kind = type(key).__name__.strip("_").removesuffix("PublicKey")
        raise ValueError(f"{'a' if kind[0] == 'D' else 'an'} {kind} key")  # RSA, Ed25519; DSA
    if not isinstance(key.curve, ec.SECP256R1):
        curves = {"secp384r1": "P-384", "secp521r1": "P-521"}
        raise ValueError(f"a {curves.get(key.curve.name, key.curve.name)} key")
    return key


def load_keys(settings: Settings) -> tuple[PublicKey, ...]:
    """Return the public keys, at least one. Raises SettingsError that says what is wrong."""
    encoded, path = settings.jwt_public_key_b64 or "", settings.jwt_public_key_file or ""
    if bool(encoded) == bool(path):
        raise SettingsError(
            "JWT_PUBLIC_KEY_B64, JWT_PUBLIC_KEY_FILE: expected exactly one of them; "
            "'notiflux.py keygen' makes a key, 'notiflux.py dev' runs without"
        )
    expected = f"JWT_PUBLIC_KEY_{'FILE' if path else 'B64'}: expected EC P-256 public keys in PEM"
    try:
        if path:
            with open(path, "rb") as file:
                pem = file.read(100_000)
        else:
            pem = base64.b64decode("".join(encoded.split()), validate=True)
    except OSError as exc:
        raise SettingsError(f"{expected}, found: {exc.strerror} ({printable(path)})") from exc
    except ValueError as exc:
        raise SettingsError(f"{expected} in base64, found what is not base64") from exc
    try:
        keys = tuple(_public_key(block[1], block[0]) for block in PEM_BLOCK.finditer(pem))
        if not keys or len(keys) != pem.count(b"-----BEGIN "):
            raise ValueError("what is not PEM")
    except ValueError as exc:
        raise SettingsError(f"{expected}, found {exc}") from exc
    return keys


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says (RFC 7519 section 4). Times are seconds since 1970."""

    scope: str
    topics: frozenset[str]
    topic_prefixes: tuple[str, ...]
    exp: int
    nbf: int | None = None
    expire_at: int | None = None

    def grant(self, topic: str) -> bool:
        """Tell whether the token is for `topic`: whole strings, or a prefix where one is given."""
        return topic in self.topics or topic.startswith(self.topic_prefixes)

    def check_time(self, now: float) -> None:
        """Raise Refusal unless the token is good at `now`, give or take LEEWAY_S."""
        if now >= self.exp + LEEWAY_S:
            raise Refusal(401, "the token has expired")
        if self.nbf is not None and now < self.nbf - LEEWAY_S:
            raise Refusal(401, "the token is not valid yet")
        if self.expire_at is not None and now >= self.expire_at:
            raise Refusal(401, "the token's expire_at has passed")


def is_texts(value: Any) -> bool:
    """Tell whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_date(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**53


def parse_claims(payload: Any) -> Claims:
    """Return the claims in a token's payload. Raises Refusal for a missing or wrong one."""

    def claim(name: str, good: Callable[[Any], bool], required: bool = True) -> Any:
        value = payload.get(name)
        if not good(value) and (required or name in payload):
            raise Refusal(401, f"the token's claim {name} is missing or wrong")
        return value

    if not isinstance(payload, dict):
        raise Refusal(401, "the token is malformed")
    if "aud" in payload:
        raise Refusal(401, "the token is for another audience: it has a claim aud")
    claim("sub", lambda value: isinstance(value, str))
    return Claims(
        scope=claim("scope", lambda value: value in ("subscribe", "broadcast")),
        topics=frozenset(claim("topics", is_texts, "topic_prefixes" not in payload) or ()),
        topic_prefixes=tuple(claim("topic_prefixes", is_texts, required=False) or ()),
        exp=claim("exp", _is_date),
        nbf=claim("nbf", _is_date, required=False),
        expire_at=claim("expire_at", _is_date, required=False),
    )


class TokenVerifier:
    """Verifies ES256 tokens (RFC 7515, RFC 7519), and remembers those that were good.

    Only a token that passed every check but that of time is remembered; time is checked at each
    use, and new keys empty the memory.
    """

    def __init__(self, keys: Iterable[PublicKey], clock: Callable[[], float] = time.time) -> None:
        self._jws = jwt.PyJWS(algorithms=["ES256"])
        self._clock = clock
        self._verified: dict[str, Claims] = {}
        self.replace_keys(keys)

    def replace_keys(self, keys: Iterable[PublicKey]) -> None:
        """Trust these keys from now on, and no others."""
        self._keys = tuple(keys)
        self._verified.clear()

    def authorize(self, token: str, scope: str, topics: Iterable[str]) -> Claims:
        """Return the claims of a token that grants `scope` on every one of `topics`.

        Raises Refusal: 401 for a token that is no good, 403 for a good one of another kind.
        """
        claims = self.verify(token)
        if claims.scope != scope:
            raise Refusal(403, f"this takes a token with scope {scope}", "insufficient_scope")
        if not all(map(claims.grant, topics)):
            raise Refusal(403, "the token does not grant this topic", "insufficient_scope")
        return claims

    def verify(self, token: str) -> Claims:
        """Return the claims of a good token. Raises Refusal (401) with the check it fails."""
        claims = self._verified.get(token)
        if claims is None:
            if len(token) > TOKEN_MAX or not TOKEN.fullmatch(token):
                raise Refusal(401, "the token is malformed")
            claims = parse_claims(self._decode(token))
            if len(self._verified) >= TOKENS_REMEMBERED:
                del self._verified[next(iter(self._verified))]
            self._verified[token] = claims
        claims.check_time(self._clock())
        return claims

    def _decode(self, token: str) -> Any:
        """Return the payload, once a key was found that signed it. Raises Refusal (401)."""
        encoded = token.partition(".")[0]
        try:
            header = parse_json(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
            if {"crit", "b64", "zip", "enc", "cty"} & header.keys():
                raise ValueError("a header that changes the meaning of the rest")
            if not isinstance(header.get("kid", ""), str):  # PyJWT 2.10 takes it, 2.15 does not
                raise ValueError("kid is no string")
            for key in self._keys:
                with contextlib.suppress(jwt.InvalidSignatureError):
                    return parse_json(self._jws.decode_complete(token, key, ["ES256"])["payload"])
        except jwt.InvalidAlgorithmError as exc:
            raise Refusal(401, "the token is not signed with ES256") from exc
        except Exception as exc:  # PyJWT 2.15 lets out errors that are none of its own, too
            raise Refusal(401, "the token is malformed") from exc
        raise Refusal(401, "the token's signature is of no key known here")


# --- Messages: what is sent, and where the server is. No sockets, no tokens. ---

CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f-\x9f]")
SINCE = re.compile(r"latest|all|[0-9a-f]{1,32}-[0-9]{1,19}")


def check_topic(topic: str) -> None:
    """Raise Refusal unless `topic` is 1 to 512 bytes of UTF-8 without control characters."""
    if not 1 <= len(topic.encode()) <= TOPIC_MAX:
        raise Refusal(400, "a topic is 1 to 512 bytes long")
    if CONTROL_CHARACTER.search(topic):
        raise Refusal(400, "a topic has no control characters")


def text_frame(text: str) -> bytes:
    """Return an unmasked WebSocket text frame (RFC 6455 section 5.2), the same for every client.

    Raises UnicodeEncodeError for an unpaired surrogate, which parse_json lets nobody bring in.
    """
    return Frame(Opcode.TEXT, text.encode()).serialize(mask=False)


def event_frame(event: str, **members: Any) -> bytes:
    """Return an event of JSON mode as a frame."""
    return text_frame(dump_json({"event": event, **members}))


class Message:
    """One message on one topic, and its encodings, each made once at most and then shared."""

    def __init__(self, message_id: str, topic: str, time_ms: int, value: Any) -> None:
        self.id = message_id
        self.topic = topic
        self.time_ms = time_ms
        self.value = value

    @functools.cached_property
    def plain_frame(self) -> bytes:
        """The message for plain mode: a string as it is, another value as its JSON text."""
        return text_frame(self.value if isinstance(self.value, str) else dump_json(self.value))

    @functools.cached_property
    def json_frame(self) -> bytes:
        """The message for JSON mode."""
        about = {"topic": self.topic, "id": self.id, "time": self.time_ms}
        return event_frame("message", **about, message=self.value)


class History:
    """Numbers the messages, so that a subscriber can say what it heard last.

    An id is `<epoch>-<seq>`: epoch is random per start, seq counts up over all topics.
    """

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._seq = 0

    @property
    def position(self) -> str:
        """The id of the newest message; where the server is now."""
        return f"{self._epoch}-{self._seq}"

    def add(self, topic: str, value: Any) -> Message:
        """Return `value` as the next message on `topic`."""
        self._seq += 1
        return Message(self.position, topic, time.time_ns() // 1_000_000, value)


# --- Hub: who listens to which topic. No I/O, no await. ---


class Subscriber(Protocol):
    """Whatever listens to topics. The hub alone changes `topics`."""

    topics: set[str]

    def deliver(self, message: Message) -> bool:
        """Queue `message`; say whether it was. Does not wait, and does not raise."""


class Hub:
    """The one owner of who listens to what.

    `topics` has a set of subscribers for each topic that somebody listens to, and each
    subscriber's own `topics` mirrors it, so that leaving takes as long as that subscriber has
    topics: s in topics[t] if and only if t in s.topics, and no set is empty.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.topics: dict[str, set[Subscriber]] = {}

    def subscribe(self, subscriber: Subscriber, topic: str) -> None:
        """Let `subscriber` hear what is broadcast to `topic` from now on; once is enough."""
        self.topics.setdefault(topic, set()).add(subscriber)
        subscriber.topics.add(topic)

    def unsubscribe(self, subscriber: Subscriber, topic: str) -> None:
        """Let it hear nothing more of `topic`; nothing happens where it was not subscribed."""
        if topic in subscriber.topics:
            subscriber.topics.discard(topic)
            self.topics[topic].discard(subscriber)
            if not self.topics[topic]:
                del self.topics[topic]

    def leave(self, subscriber: Subscriber) -> list[str]:
        """Unsubscribe from everything, and return what that was."""
        left = sorted(subscriber.topics)
        for topic in left:
            self.unsubscribe(subscriber, topic)
        return left

    def broadcast(self, topics: Sequence[str], value: Any) -> tuple[str, int]:
        """Queue `value` to every subscriber of each topic, as one message a topic.

        Returns the id of the last one, and to how many subscribers it was queued in all.
        """
        delivered = 0
        for topic in topics:
            message = self.history.add(topic, value)
            # A copy, since a subscriber that proves too slow leaves while it is delivered to.
            for subscriber in tuple(self.topics.get(topic, ())):
                delivered += subscriber.deliver(message)
        return self.history.position, delivered


@dataclass(frozen=True, slots=True)
class Shared:
    """What every connection works with."""

    settings: Settings
    verifier: TokenVerifier
    hub: Hub
    connections: set[Any]  # all that are open, of either kind
    connections_max: int


# --- Subscribers: a WebSocket connection, and the commands it understands. ---

SUBPROTOCOL = "notiflux.v1"
PING_FRAME = Frame(Opcode.PING, b"").serialize(mask=False)
KEEPALIVE_FRAME = event_frame("keepalive")
INVALID_SUBSCRIBE = "Invalid subscribe command, it should be: /subscribe <topic> <token>"


def peer_name(transport: asyncio.BaseTransport) -> str:
    """Return the other end of a connection for the log: address:port, or unix."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return "unix"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


class WebSocketSubscriber(websockets.asyncio.server.ServerConnection):
    """One WebSocket connection: the library's own, which also hears from the hub.

    It writes whole frames straight to the transport, beside the library's: both write at once
    or not at all, so frames never mix.
    """

    def __init__(self, shared: Shared, *arguments: Any, json_mode: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shared = shared
        self._hub = shared.hub
        # per connection
        self.topics: set[str] = set()
        self._expiring: dict[str, int] = {}  # topic: when its subscription ends, since 1970
        self._json_mode = json_mode
        self._refused = 0
        self._pings_unanswered = 0
        self._ping_at = self.loop.time() + shared.settings.ping_interval
        self._abort: asyncio.TimerHandle | None = None  # set once it is on its way out

    # from asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # What a client sends ahead of the 101 would be answered ahead of it, too.
        cast(asyncio.Transport, transport).pause_reading()
        super().connection_made(transport)
        self._shared.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._pings_unanswered = 0
        super().data_received(data)
        if self.state in (State.CLOSING, State.CLOSED):
            self._retire()

    def pause_writing(self) -> None:
        """Drop the subscriber: its unsent bytes passed MAX_BUFFER_BYTES."""
        super().pause_writing()
        self.transport.pause_reading()  # or its pings would go on adding pongs
        if self._abort is None:
            log.warning("dropped peer=%s why=slow topics=%d", self._peer, len(self.topics))
            self._retire()
            # Not now: the library may be in the middle of writing several frames.
            self.loop.call_soon(self.dismiss, 4100, "too slow: reconnect and resume")

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.connections.discard(self)
        self._retire().cancel()  # commands may still be queued, and are not obeyed any more
        log.debug("disconnected peer=%s", self._peer)
        super().connection_lost(exc)

    @property
    def _peer(self) -> str:
        return peer_name(self.transport)

    # from the hub and the daemon

    def deliver(self, message: Message) -> bool:
        return self._send(message.json_frame if self._json_mode else message.plain_frame)

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection behind what is queued; cut it if that takes too long."""
        if self.state is State.OPEN:
            # The library's own close would wait for a peer that takes nothing (15.0 to 17.4).
            self.protocol.send_close(code, reason)
            for data in self.protocol.data_to_send():
                self.transport.write(data)
        self._retire()

    def shut_down(self) -> None:
        """Tell the subscriber that the server restarts."""
        self.dismiss(1012, "the server restarts: reconnect after a random pause")

    def tick(self, now: float) -> None:
        """Look at what is due by the loop's clock: a ping, a subscription's end, or the cut."""
        if self.state is State.CONNECTING:
            return
        if self.state is not State.OPEN:
            self._retire()
            return
        if self._expiring:
            self._expire(time.time())
        if now >= self._ping_at:
            # Counted, not timed: after a pause of the whole machine nobody is to blame.
            if self._pings_unanswered >= 2:
                log.info("dropped peer=%s why=silent topics=%d", self._peer, len(self.topics))
                self.transport.abort()
                return
            self._pings_unanswered += 1
            self._ping_at = now + self._shared.settings.ping_interval
            self._send(PING_FRAME + KEEPALIVE_FRAME if self._json_mode else PING_FRAME)

    def _send(self, frame: bytes) -> bool:
        """Queue a frame, unless the connection is on its way out; say whether it was."""
        if self._abort is not None or self.state is not State.OPEN:
            return False
        self.transport.write(frame)
        return True

    def _retire(self) -> asyncio.TimerHandle:
        """Leave every topic, obey nothing more, and see to it that the connection ends."""
        if self._abort is None:
            self._hub.leave(self)
            self._abort = self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)
        return self._abort

    def _expire(self, now_s: float) -> None:
        for topic in [topic for topic, end in self._expiring.items() if end <= now_s]:
            self._unsubscribe([topic], error="token_expired")
            if not self._json_mode:
                self._send(text_frame(f"Subscription to {topic} expired"))

    # commands

    def answer_handshake(self, request: object, response: Response) -> None:
        """Name the subprotocol: the hook between a handshake and its answer.

        The `select_subprotocol` of serve() takes what create_connection made for this very
        connection (websockets 15.0 to 17.4), and that is an HTTPConnection here.
        """
        if self._json_mode and response.status_code == 101:
            response.headers["Sec-WebSocket-Protocol"] = SUBPROTOCOL

    async def run(self) -> None:
        """Obey commands until the connection is closed."""
        self.transport.resume_reading()
        log.debug("connected peer=%s mode=%s", self._peer, "json" if self._json_mode else "plain")
        if self._json_mode:
            position, keepalive = self._hub.history.position, self._shared.settings.ping_interval
            self._send(event_frame("open", id=position, keepalive=keepalive))
        with contextlib.suppress(ConnectionClosed):
            async for text in self:
                if isinstance(text, str) and self._abort is None:
                    self._obey(text.strip())

    def _obey(self, text: str) -> None:
        """Obey one command; the grammar is the Rust program's: words, one space between them."""
        command, _, rest = text.partition(" ")
        words = rest.split(" ")
        if command == "/subscribe" and rest:
            if len(words) in (2, 3) and all(words):
                self._subscribe(*words)
            else:
                self._refuse("subscribe", Refusal(400, INVALID_SUBSCRIBE))
        elif command == "/unsubscribe" and rest:
            self._unsubscribe([rest])
        elif text == "/unsubscribe-all":
            self._unsubscribe(sorted(self.topics))
        elif text.startswith("/"):
            self._refuse("command", Refusal(400, "Unknown command"))

    def _subscribe(self, topic: str, token: str, since: str = "") -> None:
        try:
            check_topic(topic)
            claims = self._shared.verifier.authorize(token, "subscribe", [topic])
            if since and not SINCE.fullmatch(since):
                raise Refusal(400, "since is an id, latest or all")
            if topic not in self.topics and len(self.topics) >= self._shared.settings.max_topics:
                raise Refusal(403, "this connection has as many topics as it may")
        except Refusal as refusal:
            self._refuse("subscribe", refusal, topic)
            return
        self._hub.subscribe(self, topic)
        self._expiring.pop(topic, None)
        if claims.expire_at is not None:
            self._expiring[topic] = claims.expire_at
        if self._json_mode:
            position = self._hub.history.position
            # Nothing is held yet, so nothing is missing only where nothing came since.
            recovered = {"recovered": since == position} if "-" in since else {}
            self._send(event_frame("subscribed", topic=topic, id=position, replayed=0, **recovered))

    def _unsubscribe(self, topics: list[str], **error: str) -> None:
        for topic in topics:
            self._hub.unsubscribe(self, topic)
            self._expiring.pop(topic, None)
        if self._json_mode:
            self._send(event_frame("unsubscribed", topics=topics, **error))

    def _refuse(self, operation: str, refusal: Refusal, topic: str | None = None) -> None:
        """Answer a refused command; the last one that is allowed ends the connection."""
        log_refusal(self._peer, operation, refusal)
        if topic is not None and (CONTROL_CHARACTER.search(topic) or len(topic) > TOPIC_MAX):
            topic = printable(topic, 64)
        if self._json_mode:
            command = "/subscribe" if operation == "subscribe" else None
            members = {"error": refusal.code, "detail": refusal.detail, "command": command}
            self._send(event_frame("error", **members, topic=topic))
        elif topic is not None:
            self._send(text_frame(f"Not allowed to subscribe to {topic}: {refusal.detail}"))
        else:
            self._send(text_frame(refusal.detail))
        self._refused += 1
        if self._refused >= COMMANDS_REFUSED_MAX:
            self.dismiss(1008, "too many refused commands")


# --- HTTP: bytes to requests, answers to bytes. Knows no topics and no tokens. ---

REQUEST_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) "
    # RFC 3986's characters, no control characters behind a %, no fragment; RFC 9112 section 3.2
    rb"(?:[hH][tT][tT][pP][sS]?://([0-9A-Za-z.:\[\]_-]+))?"
    rb"(\*|(?:/(?:[0-9A-Za-z._~!$&'()*+,;=:@/-]|%(?:[2-689A-Fa-f][0-9A-Fa-f]|7[0-9A-Ea-e]))*"
    rb"(?:\?(?:[0-9A-Za-z._~!$&'()*+,;=:@/?-]|%(?:[2-689A-Fa-f][0-9A-Fa-f]|7[0-9A-Ea-e]))*)?)?)"
    rb" HTTP/([0-9])\.([0-9])"
)
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
HOST = re.compile(r"(?:[0-9A-Za-z._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
MEMBER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTENT_LENGTH = re.compile(r"0|[1-9][0-9]{0,18}")
HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n\r\n"
)
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")


class Request(HandshakeRequest):
    """A request as the library knows it, path and headers, and what its handshakes never have."""

    method = "GET"
    body = b""
    version = (1, 1)

    def tokens(self, name: str) -> list[str]:
        """Return a list-valued header's members, lower case. Raises Refusal where it is none."""
        members = ",".join(self.headers.get_all(name)).lower().split(",")
        # Empty ones are nothing: RFC 9110 section 5.6.1.
        members = [member for member in (member.strip(" \t") for member in members) if member]
        if not all(map(MEMBER.fullmatch, members)):
            raise Refusal(400, "a malformed header")
        return members


class RequestReader:
    """Reads requests from bytes, strictly: a full match or a Refusal, never a repair.

    No I/O and no clock: feed() what came, then ask for next_request() until there is none. How
    the bytes were cut never changes the outcome. After a Refusal nothing more can be read.
    """

    def __init__(self, body_max: int) -> None:
        self._body_max = body_max
        self._buffer = bytearray()
        self._budget = 0  # bytes that the lines of this head or chunk line may still take
        self._steps = self._read()
        self.request: Request | None = None  # the newest, as far as it is known
        self.stage = "idle"  # then "head", then "body"
        self.wants_continue = False  # the client waits for a 100 (RFC 9110 section 10.1.1)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next_request(self) -> Request | None:
        """Return the next complete request, None if more bytes are needed. Raises Refusal."""
        return next(self._steps)

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what was fed, not even part of a request."""
        return self.stage == "idle" and not self._buffer

    def _read(self) -> Generator[Request | None, None, None]:
        while True:
            while not self._buffer:
                yield None
            self.stage, self.request, self._budget = "head", None, HEAD_MAX
            # One empty line before a request is tolerated: RFC 9112 section 2.2.
            line = (yield from self._line(414)) or (yield from self._line(414))
            self.request = request = self._request_line(line)
            request.headers = yield from self._header_lines()
            length = self._check_head(request)
            if length != 0:
                self.stage = "body"
                expected = request.version == (1, 1) and "100-continue" in request.tokens("Expect")
                self.wants_continue = expected and not self._buffer
                body = self._chunks() if length is None else self._exactly(length)
                request.body = yield from body
            self.stage = "idle"
            yield request
            request.body = b""  # or an idle connection would keep it

    def _line(self, too_long: int) -> Generator[None, None, bytes]:
        """Read a line and drop its CRLF. Raises Refusal, with status `too_long` for a long one."""
        limit = min(LINE_MAX + 2, self._budget)
        while not (end := self._buffer.find(b"\n", 0, limit) + 1):
            if len(self._buffer) >= limit:
                raise Refusal(too_long, "a line, or all lines together, are too long")
            yield
        self._budget -= end
        line = yield from self._exactly(end)
        if not line.endswith(b"\r\n"):
            raise Refusal(400, "a line that does not end in CRLF")
        return line[:-2]

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _request_line(self, line: bytes) -> Request:
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise Refusal(400, "a malformed request line")
        method, authority, target, major, minor = (part.decode() for part in match.groups(b""))
        elsewhere = authority and (target == "*" or not HOST.fullmatch(authority))
        if elsewhere or not (authority or target) or (target == "*" and method != "OPTIONS"):
            raise Refusal(400, "a malformed request line")
        if major != "1" or minor not in "01":
            raise Refusal(505, "this server speaks HTTP/1.1")
        request = Request(target or "/", Headers())
        request.method, request.version = method, (1, int(minor))
        return request

    def _header_lines(self) -> Generator[None, None, Headers]:
        headers: list[tuple[str, str]] = []
        while line := (yield from self._line(431)):
            match = HEADER_LINE.fullmatch(line)
            if not match:
                raise Refusal(400, "a malformed header")
            if len(headers) == HEADERS_MAX:
                raise Refusal(431, "more headers than are read")
            headers.append((match[1].decode(), match[2].strip(b" \t").decode("latin-1")))
        return Headers(headers)

    def _check_head(self, request: Request) -> int | None:
        """Return the body's length, None for chunked (RFC 9112 section 6). Raises Refusal."""
        headers = request.headers
        hosts = headers.get_all("Host")
        if len(hosts) > 1 or (not hosts and request.version == (1, 1)):
            raise Refusal(400, "not exactly one Host header")
        if hosts and not HOST.fullmatch(hosts[0]):
            raise Refusal(400, "a malformed Host header")
        codings, lengths = headers.get_all("Transfer-Encoding"), headers.get_all("Content-Length")
        if codings:
            if lengths or len(codings) > 1 or request.version == (1, 0):
                raise Refusal(400, "a body of ambiguous length")
            if codings[0].lower() != "chunked":  # exactly, since others may read a list otherwise
                known = all(MEMBER.fullmatch(member.strip(" ")) for member in codings[0].split(","))
                raise Refusal(501 if known else 400, "a transfer coding other than chunked")
        elif lengths and (len(lengths) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0])):
            raise Refusal(400, "a malformed Content-Length")
        length = None if codings else int(lengths[0]) if lengths else 0
        if length != 0 and request.method in ("GET", "HEAD"):
            raise Refusal(400, "a body where none belongs")
        if request.version == (1, 1) and set(request.tokens("Expect")) - {"100-continue"}:
            raise Refusal(417, "an expectation other than 100-continue")
        if set(request.tokens("Content-Encoding")) - {"identity"}:
            raise Refusal(415, "a compressed body")
        if length is not None and length > self._body_max:
            raise Refusal(413, "the body is larger than MAX_MESSAGE_BYTES")
        return length

    def _chunks(self) -> Generator[None, None, bytes]:
        """Read a chunked body; extensions and trailers are dropped (RFC 9112 section 7.1)."""
        body = bytearray()
        while True:
            self._budget = CHUNK_LINE_MAX
            match = CHUNK_LINE.fullmatch((yield from self._line(400)))
            if not match:
                raise Refusal(400, "a malformed chunk")
            size = int(match[1], 16)
            if len(body) + size > self._body_max:
                raise Refusal(413, "the body is larger than MAX_MESSAGE_BYTES")
            if size == 0:
                self._budget = HEAD_MAX
                yield from self._header_lines()
                return bytes(body)
            chunk = yield from self._exactly(size + 2)
            if not chunk.endswith(b"\r\n"):
                raise Refusal(400, "a malformed chunk")
            body += chunk[:-2]


WebSocketMaker = Callable[..., WebSocketSubscriber]


class HTTPConnection(asyncio.Protocol):
    """One client's connection, from its first byte until it closes or turns into a WebSocket.

    Requests are answered one after the other, in the order in which they came.
    """

    def __init__(self, shared: Shared, router: Router, make_websocket: WebSocketMaker) -> None:
        self._shared = shared
        self._router = router
        # per connection
        self._make_websocket = make_websocket
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader(shared.settings.max_message_bytes)
        self.transport: asyncio.Transport
        self._writing_paused = False
        self._closing = False  # the last answer is written
        self._ended = False  # the client sends nothing more
        # per request
        self._stage: object = None  # what the deadline is for
        self._deadline = self._loop.time() + TIMEOUTS_S["head"]

    # from asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # An attribute of asyncio's socket transports (3.11 to 3.13); elsewhere it does nothing.
        self.transport.max_size = READ_MAX  # type: ignore[attr-defined]
        self._shared.connections.add(self)
        if len(self._shared.connections) > self._shared.connections_max:
            self._refuse(Refusal(503, "the server has as many connections as it may"))

    def data_received(self, data: bytes) -> None:
        if not self._closing:
            self._reader.feed(data)
            self._advance()

    def eof_received(self) -> bool:
        """Keep the connection while an answer is owed; the last one ends it."""
        self._ended = True
        self._advance()
        return not self._closing

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._deadline = self._loop.time() + WRITE_TIMEOUT_S
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._stage = None
        self.transport.resume_reading()
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._shared.connections.discard(self)

    # from the daemon

    def tick(self, now: float) -> None:
        """End the connection where its deadline has passed by the loop's clock."""
        if now < self._deadline:
            return
        if self._closing or self._writing_paused:
            self.transport.abort()
        elif self._reader.stage == "idle":
            self._close()
        else:
            self._refuse(Refusal(408, f"the {self._reader.stage} took too long"))

    def shut_down(self) -> None:
        """End a connection that owes no answer with the next tick; another's next is its last."""
        if self._reader.empty and not self._closing and not self._writing_paused:
            self._deadline = self._loop.time()

    # requests and answers

    def _advance(self) -> None:
        """Answer every request that is complete, then wait for the next one's bytes."""
        try:
            for _ in range(REQUESTS_PER_TURN):
                if self._closing or self._writing_paused:
                    return
                request = self._reader.next_request()
                if request is None:
                    self._wait()
                    return
                self._stage = None
                self._answer(request)
        except Refusal as refusal:
            self._refuse(refusal)
        else:  # there may be more, after the others had their turn
            self.transport.pause_reading()
            self._loop.call_soon(self._advance)

    def _wait(self) -> None:
        """See to it that more bytes come, and in time. Raises Refusal where none will."""
        if self._ended and not self._reader.empty:
            raise Refusal(400, "the request ended early")
        if self._ended:
            self._close()
            return
        self.transport.resume_reading()
        if self._reader.wants_continue:
            self._reader.wants_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._reader.stage != self._stage:
            self._stage = self._reader.stage
            self._deadline = self._loop.time() + TIMEOUTS_S[self._reader.stage]

    def _answer(self, request: Request) -> None:
        # May refuse, so before anything happens. RFC 9112 section 9.3.
        last = "close" in request.tokens("Connection") or request.version == (1, 0)
        response = self._router.process_request(self, request)
        if response is None:
            self._upgrade(request)
        else:
            self._write(request, response, last or self._router.stopping)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what could not be read as a request, and end the connection."""
        request = self._reader.request
        self._write(request, self._router.refuse(self, request, refusal), True)

    def _write(self, request: Request | None, response: Response, last: bool) -> None:
        response.headers["Date"] = email.utils.formatdate(usegmt=True)
        if last:
            response.headers["Connection"] = "close"
        if request and request.method == "HEAD":
            response.body = b""
        self.transport.write(response.serialize())
        if last:
            self._close()

    def _close(self) -> None:
        """End the connection so that the client can read the last answer.

        To close a socket with bytes unread resets it, and the answer is lost: so where more may
        come, only our side is closed, and what still comes is read and dropped for LINGER_S.
        """
        self._closing = True
        self._deadline = self._loop.time() + WRITE_TIMEOUT_S
        if self._ended or self._reader.empty or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self._deadline = self._loop.time() + LINGER_S
            self.transport.resume_reading()
            self.transport.write_eof()

    def _upgrade(self, request: Request) -> None:
        """Hand the connection over to websockets, for the handshake and all that follows."""
        if not self._reader.empty:
            raise Refusal(400, "bytes behind a handshake that was not answered yet")
        self._closing = True
        self._shared.connections.discard(self)
        offered = ",".join(request.headers.get_all("Sec-WebSocket-Protocol")).split(",")
        json_mode = SUBPROTOCOL in (name.strip(" \t") for name in offered)
        self.transport.max_size = FRAMES_READ_MAX  # type: ignore[attr-defined]
        websocket = self._make_websocket(json_mode=json_mode)
        self.transport.set_protocol(websocket)
        websocket.connection_made(self.transport)
        # What was checked, and nothing else that a client may have put around it.
        key = request.headers["Sec-WebSocket-Key"]
        websocket.data_received(HANDSHAKE.format(key).encode())


# --- Routes: where a path and a method become an answer. No bytes of HTTP. ---

ROUTES = {"/broadcast": ["POST"], "/ws": ["GET", "HEAD"], "/health": ["GET", "HEAD"]}
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
    "Access-Control-Max-Age": "86400",
}
WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64: RFC 6455 section 4.1


class Router:
    """Answers requests: those that HTTPConnection read, and those that websockets asks about."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.stopping = False

    def process_request(self, connection: Any, request: HandshakeRequest) -> Response | None:
        """Return the answer, None to go on with a WebSocket handshake.

        The hook of websockets.asyncio.server.serve. HTTPConnection calls it for every request,
        and hands over only where it says None; websockets then asks again about the handshake.
        """
        if not isinstance(request, Request):  # websockets' own: a GET, without a body
            request = Request(request.path, request.headers)
        try:
            return self._route(request)
        except Refusal as refusal:
            return self.refuse(connection, request, refusal)

    def refuse(self, connection: Any, request: Request | None, refusal: Refusal) -> Response:
        """Return the answer that says no, and log it; `request` as far as it was read."""
        path = request.path.partition("?")[0] if request else ""
        operation = path.lstrip("/") if path in ROUTES else "request"
        log_refusal(peer_name(connection.transport), operation, refusal)
        body = {"error": refusal.code, "detail": refusal.detail}
        return self._respond(request, refusal.status, body, **refusal.headers)

    def _route(self, request: Request) -> Response | None:
        self._check_origin(request)
        method, path = request.method, request.path
        allowed = ROUTES.get(path)
        if method == "OPTIONS" and (allowed or path == "*"):
            return self._respond(request, 204, None, **PREFLIGHT)
        if allowed is None:
            if path.partition("?")[0] in ROUTES:
                raise Refusal(404, "this path takes no query; a token goes into a message or body")
            raise Refusal(404, "no such path; there are " + ", ".join(ROUTES))
        if method not in allowed:
            methods = ", ".join([*allowed, "OPTIONS"])
            raise Refusal(405, f"this path takes {methods}", Allow=methods)
        if path == "/ws":
            self._check_handshake(request)
            return None
        if path == "/broadcast":
            return self._broadcast(request)
        status, word = (503, "stopping") if self.stopping else (200, "ok")
        return self._respond(request, status, {"status": word})

    def _respond(self, request: Request | None, status: int, value: Any, **more: str) -> Response:
        """Return a response with `value` as its JSON, None for one that never has a body."""
        headers, body = Headers(more), b""
        if value is not None:
            body = json.dumps(value).encode() + b"\n"
            headers.update({"Content-Type": "application/json", "Content-Length": str(len(body))})
        allowed = self._shared.settings.allowed_origins
        if allowed is None:
            headers["Access-Control-Allow-Origin"] = "*"
        else:
            headers["Vary"] = "Origin"
            origins = request.headers.get_all("Origin") if request else []
            if len(origins) == 1 and origins[0].lower() in allowed:
                headers["Access-Control-Allow-Origin"] = origins[0].lower()
        return Response(status, PHRASES[status], headers, body)

    def _check_origin(self, request: Request) -> None:
        """Raise Refusal for a browser's page that ALLOWED_ORIGINS does not name (RFC 6454)."""
        origins = request.headers.get_all("Origin")
        if len(origins) > 1:
            raise Refusal(400, "more than one Origin header")
        allowed = self._shared.settings.allowed_origins
        if origins and allowed is not None and origins[0].lower() not in allowed:
            raise Refusal(403, "this origin is not one of ALLOWED_ORIGINS")

    def _check_handshake(self, request: Request) -> None:
        """Raise Refusal unless this is a good WebSocket handshake (RFC 6455 section 4.2.1)."""
        upgrade = "upgrade" in request.tokens("Connection") and request.version == (1, 1)
        if not upgrade or request.tokens("Upgrade") != ["websocket"] or request.method != "GET":
            why = "no WebSocket handshake: a proxy in front probably did not forward Upgrade"
            raise Refusal(426, why)
        versions = request.headers.get_all("Sec-WebSocket-Version")
        keys = request.headers.get_all("Sec-WebSocket-Key")
        if len(versions) != 1 or len(keys) != 1 or not WEBSOCKET_KEY.fullmatch(keys[0]):
            raise Refusal(400, "a malformed WebSocket handshake")
        if versions[0] != "13":
            raise Refusal(426, "this server speaks WebSocket version 13")
        request.tokens("Sec-WebSocket-Protocol")
        if self.stopping:
            raise Refusal(503, "the server is stopping")

    def _broadcast(self, request: Request) -> Response:
        try:
            body = parse_json(request.body)
        except ValueError as exc:
            raise Refusal(400, "the body is not JSON") from exc
        if not isinstance(body, dict):
            raise Refusal(400, "the body is not a JSON object")
        topics = self._topics(body)
        if "message" not in body:
            raise Refusal(400, "message is missing")
        self._shared.verifier.authorize(self._token(request, body), "broadcast", topics)
        if self.stopping:
            raise Refusal(503, "the server is stopping")
        message_id, delivered = self._shared.hub.broadcast(topics, body["message"])
        return self._respond(request, 200, {"id": message_id, "delivered": delivered})

    def _topics(self, body: dict[str, Any]) -> list[str]:
        """Return the topics of a broadcast, each once. Raises Refusal."""
        if ("topic" in body) == ("topics" in body):
            raise Refusal(400, "either topic or topics is needed")
        topics = [body["topic"]] if "topic" in body else body["topics"]
        if not is_texts(topics):
            raise Refusal(400, "topic is a string, topics a list of strings")
        if not 1 <= len(topics) <= TOPICS_PER_BROADCAST:
            raise Refusal(400, f"topics has 1 to {TOPICS_PER_BROADCAST} members")
        for topic in topics:
            check_topic(topic)
        return list(dict.fromkeys(topics))

    def _token(self, request: Request, body: dict[str, Any]) -> str:
        """Return the token in the header or the body. Raises Refusal."""
        headers = request.headers.get_all("Authorization")
        tokens = [value[7:].strip(" ") for value in headers if value[:7].lower() == "bearer "]
        tokens += [body["token"]] if "token" in body else []
        if len(headers) > 1 or len(tokens) > 1:
            raise Refusal(400, "more than one token")
        if not tokens:
            raise Refusal(401, "no token: it goes into the body, or Authorization: Bearer")
        if not isinstance(tokens[0], str) or not tokens[0]:
            raise Refusal(400, "token is a string")
        return tokens[0]


# --- Observation: what the operator sees. ---

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4}  # syslog's; else 3


class LogFormatter(logging.Formatter):
    """One record, one line of printable ASCII; for the journal with its priority, no time."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = printable(record.getMessage(), 2000)
        if record.exc_info:
            line += f" traceback={printable(self.formatException(record.exc_info), 8000)}"
        if self._journal:
            return f"<{PRIORITIES.get(record.levelno, 3)}>{line}"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return f"{when} {record.levelname.lower()} {line}"


def start_logging(level: str, journal_stream: str) -> None:
    """Send every log line to standard error; libraries speak only of what went wrong.

    `journal_stream` is $JOURNAL_STREAM, device:inode where the journal reads (systemd.exec(5)).
    """
    stderr = os.fstat(sys.stderr.fileno()) if journal_stream else None
    journal = stderr is not None and journal_stream == f"{stderr.st_dev}:{stderr.st_ino}"
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(journal))
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    log.setLevel(level.upper())
    # websockets logs whole frames below WARNING, tokens included.
    logging.getLogger("websockets").setLevel(logging.ERROR)


# --- Daemon: wires the rooms, and carries them from listening to drained. ---


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the context for https and wss, None without. Raises SettingsError."""
    if settings.tls_cert_file is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and newer
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")
    except OSError as exc:  # ssl.SSLError is one
        expected = "a certificate chain in PEM and its key"
        raise SettingsError(f"TLS_CERT_FILE, TLS_KEY_FILE: expected {expected}") from exc
    return context


def _connections_max(settings: Settings) -> int:
    """Return how many connections to take. Raises SettingsError where files do not suffice."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64
    if (settings.max_connections or 1) > allowed:
        raise SettingsError(f"MAX_CONNECTIONS: expected at most {allowed}, as open files allow")
    return settings.max_connections or allowed


def _check_stale(path: str) -> None:
    """Raise OSError where a server listens on a Unix socket; asyncio removes any other."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        error = client.connect_ex(path) or errno.EADDRINUSE
    if error not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(error, os.strerror(error))


class Daemon:
    """The server. All of it runs in the loop that calls run()."""

    def __init__(self, settings: Settings) -> None:
        verifier = TokenVerifier(load_keys(settings))
        room = _connections_max(settings)
        self.settings = settings
        self.connections: set[HTTPConnection | WebSocketSubscriber] = set()
        self.hub = Hub(History())
        self._shared = Shared(settings, verifier, self.hub, self.connections, room)
        self._router = Router(self._shared)
        self._tls = _tls_context(settings)
        self._stop = asyncio.Event()

    async def run(self, listening: Callable[[list[str]], None] = lambda urls: None) -> None:
        """Serve until stop() is called. Raises CommandError where the address cannot be had.

        `listening` is called with the URLs once connections are accepted.
        """
        try:
            server = await self._serve()
        except OSError as exc:
            port = "" if self.settings.host.startswith("unix:") else f":{self.settings.port}"
            address = f"{self.settings.host}{port}"
            raise CommandError(f"cannot listen on {address}: {exc.strerror or exc}") from exc
        for listener in server.sockets:
            # asyncio takes as many at once as may wait: too many then fail with EMFILE.
            with socket.socket(fileno=os.dup(listener.fileno())) as same:
                same.listen(LISTEN_QUEUE)
        urls = [self._url(listener) for listener in server.sockets]
        for url in urls:
            log.info("listening url=%s version=%s", url, VERSION)
        listening(urls)
        self._sweep()
        await self._stop.wait()
        await self._drain(server)

    def stop(self) -> None:
        """Begin to drain; called once more, cut whoever is left."""
        if self._stop.is_set():
            self._cut()
        self._stop.set()

    def reload(self) -> None:
        """Read the keys again. A bad file leaves the old keys in force, and is logged."""
        try:
            keys = load_keys(self.settings)
        except SettingsError as exc:
            log.error("reload failed, the old keys stay: %s", exc)
            return
        self._shared.verifier.replace_keys(keys)
        log.info("reloaded keys=%d", len(keys))

    async def _serve(self) -> websockets.asyncio.server.Server:
        settings = self.settings
        where: dict[str, Any] = {"host": settings.host, "port": settings.port}
        if settings.host.startswith("unix:"):
            where = {"unix": True, "path": settings.host.removeprefix("unix:")}
            _check_stale(where["path"])
        return await websockets.asyncio.server.serve(
            WebSocketSubscriber.run,  # type: ignore[arg-type]
            **where,
            create_connection=self._create_connection,  # type: ignore[arg-type]
            process_request=self._router.process_request,
            process_response=WebSocketSubscriber.answer_handshake,  # type: ignore[arg-type]
            compression=None,
            server_header=None,
            max_size=COMMAND_MAX,
            ping_interval=None,  # _sweep pings everybody, without a task for each
            close_timeout=CLOSE_TIMEOUT_S,
            write_limit=settings.max_buffer_bytes,
            ssl=self._tls,
            backlog=ACCEPT_MAX,
        )

    def _create_connection(self, *arguments: Any, **options: Any) -> Any:
        """Make what owns a new connection: the factory that serve() takes."""
        maker = functools.partial(WebSocketSubscriber, self._shared, *arguments, **options)
        return HTTPConnection(self._shared, self._router, maker)

    def _url(self, listener: socket.socket) -> str:
        name = listener.getsockname()
        if listener.family == socket.AF_UNIX:
            return f"unix:{name}"
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{'https' if self._tls else 'http'}://{host}:{name[1]}"

    def _sweep(self) -> None:
        """Look at every connection's deadlines, again and again."""
        loop = asyncio.get_running_loop()
        if not self._stop.is_set():  # then _drain looks
            loop.call_later(min(SWEEP_S, self.settings.ping_interval / 4), self._sweep)
        for connection in tuple(self.connections):
            connection.tick(loop.time())

    async def _drain(self, server: websockets.asyncio.server.Server) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.stop_timeout
        log.info("stopping connections=%d", len(self.connections))
        self._router.stopping = True
        # Closes the listening sockets at once; a close code is taken from websockets 17 on only.
        server.close(close_connections=False)
        for connection in tuple(self.connections):
            connection.shut_down()
        while self.connections and loop.time() < deadline:
            await asyncio.sleep(0.02)
            for connection in tuple(self.connections):
                connection.tick(loop.time())
        log.info("stopped connections_cut=%d", len(self.connections))
        # Not server.wait_closed(): from Python 3.12 on it waits for TLS handshakes, which nothing
        # here can cut. The end of the loop ends what is left.
        self._cut()

    def _cut(self) -> None:
        for connection in tuple(self.connections):
            connection.transport.abort()


# --- Command line: one function a command. The one place that touches the process. ---

WELCOME = """\
notiflux {version}, with a throwaway key: FOR TRYING IT OUT, NOT FOR PRODUCTION. Ctrl-C stops it.

1. Subscribe, in a second terminal: this opens a prompt ...

   {python} -m websockets {ws}/ws

   ... and this goes into it:

   /subscribe news {subscribe}

2. Broadcast, in a third terminal:

   curl {http}/broadcast -d '{{"topic": "news", "message": "hello", "token": "{broadcast}"}}'

The tokens are good for every topic, until this stops. What next: README.md, "Deployment".
"""


def _new_keys() -> tuple[bytes, bytes]:
    """Return a new private key and its public key, in PEM."""
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, spki)


def _sign(key: Any, scope: str, topics: list[str], prefixes: list[str], expires_s: float) -> str:
    claims = {"sub": "notiflux", "exp": int(time.time() + expires_s), "scope": scope}
    claims |= {"topics": topics} | ({"topic_prefixes": prefixes} if prefixes else {})
    return jwt.encode(claims, key, "ES256")


def _duration(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError("expected a number and s, m, h or d, such as 60s")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _serve_until_stopped(settings: Settings, listening: Callable[[list[str]], None]) -> None:
    """Run the daemon in this process, with its signals."""
    if os.environ.get("WORKER_COUNT"):
        log.info("ignored WORKER_COUNT: one process serves all")

    async def serve() -> None:
        daemon = Daemon(settings)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, daemon.stop)
        loop.add_signal_handler(signal.SIGINT, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, daemon.reload)
        await daemon.run(listening)

    asyncio.run(serve())


def _settings(**changes: str) -> Settings:
    settings = Settings.from_environment({**os.environ, **changes})
    start_logging(settings.log_level, os.environ.get("JOURNAL_STREAM", ""))
    return settings


def run_command(options: argparse.Namespace) -> None:
    """run the daemon; its settings come from the environment"""
    _serve_until_stopped(_settings(), lambda urls: None)


def dev_command(options: argparse.Namespace) -> None:
    """run the daemon with a throwaway key, and print what to type next"""
    private, public = _new_keys()
    encoded = base64.b64encode(public).decode()
    settings = _settings(JWT_PUBLIC_KEY_B64=encoded, JWT_PUBLIC_KEY_FILE="")
    if settings.host.startswith("unix:"):
        raise SettingsError("HOST: expected an address; what dev prints needs one")

    def welcome(urls: list[str]) -> None:
        year_s = 365 * 86400
        tokens = {s: _sign(private, s, [], [""], year_s) for s in ("subscribe", "broadcast")}
        places = {"python": sys.executable, "http": urls[0], "ws": urls[0].replace("http", "ws", 1)}
        print(WELCOME.format(version=VERSION, **places, **tokens), flush=True)

    _serve_until_stopped(settings, welcome)


def keygen_command(options: argparse.Namespace) -> None:
    """make the key pair: private.pem signs tokens, public.pem is the daemon's"""
    private, public = _new_keys()
    with contextlib.suppress(OSError):  # where it cannot be made, the first file says why
        Path(options.directory).mkdir(0o700, exist_ok=True)
    paths = [Path(options.directory, name) for name in ("private.pem", "public.pem")]
    for path in paths:  # both before either, so that no half of a pair is left
        if path.exists():
            raise CommandError(f"cannot write {path}: it is there already")
    for path, mode, pem in zip(paths, (0o600, 0o644), (private, public), strict=True):
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(pem)
        except OSError as exc:
            raise CommandError(f"cannot write {path}: {exc.strerror}") from exc
    print(f"JWT_PUBLIC_KEY_B64={base64.b64encode(public).decode()}")


def token_command(options: argparse.Namespace) -> None:
    """print a token that lets its holder subscribe or broadcast"""
    if not options.key:
        options.wrong_usage("--key or NOTIFLUX_KEY_FILE: expected the path of the private key")
    if not options.topic and not options.prefix:
        options.wrong_usage("expected a topic, or --prefix")
    try:
        key = serialization.load_pem_private_key(Path(options.key).read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise ValueError("another kind of key")
    except OSError as exc:
        raise CommandError(f"cannot read {options.key}: {exc.strerror}") from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise CommandError(f"{options.key}: expected an EC P-256 private key in PEM") from exc
    token = _sign(key, options.scope, options.topic, options.prefix, options.expires)
    try:
        TokenVerifier([key.public_key()]).verify(token)
    except Refusal as refusal:  # too long, or a topic that is no text
        raise CommandError(f"no daemon would take this token: {refusal}") from refusal
    print(token)


def check_command(options: argparse.Namespace) -> None:
    """check settings and key, or say what a token grants"""
    try:
        settings = _settings()
        verifier = TokenVerifier(load_keys(settings))
        _tls_context(settings)
        _connections_max(settings)
    except SettingsError as exc:
        raise CommandError(str(exc)) from exc
    if options.token is None:
        print("settings and key are good")
        return
    try:
        claims = verifier.verify(options.token)
    except Refusal as refusal:
        raise CommandError(refusal.detail) from refusal
    topics = [*sorted(claims.topics), *(prefix + "..." for prefix in claims.topic_prefixes)]
    print(f"{claims.scope}: {', '.join(map(printable, topics))}")
    print(f"good for another {max(0, round(claims.exp - time.time()))} s")


def _parser() -> argparse.ArgumentParser:
    table = "\n".join(
        f"  {f.name.upper()} ({f.metadata['default'] or 'unset'})\n      {f.metadata['meaning']}"
        for f in fields(Settings)
    )
    epilog = f"Settings, from the environment:\n{table}"
    parser = argparse.ArgumentParser("notiflux.py", description=__doc__, epilog=epilog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"notiflux {VERSION}")
    parser.set_defaults(command=run_command)
    commands = parser.add_subparsers(title="commands", metavar="")

    def add(command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        name, text = command.__name__.removesuffix("_command"), command.__doc__
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        added.add_argument("--version", action="version", version=f"notiflux {VERSION}")
        return added

    add(dev_command)
    keygen = add(keygen_command)
    keygen.add_argument("directory", nargs="?", default=".", help="where to (here)")
    token = add(token_command)
    token.set_defaults(wrong_usage=token.error)
    token.add_argument("scope", choices=["subscribe", "broadcast"])
    token.add_argument("topic", nargs="*", help="a topic that the token is for")
    token.add_argument("--prefix", action="append", default=[], help="all topics that begin so")
    key_file = os.environ.get("NOTIFLUX_KEY_FILE")
    token.add_argument("--key", default=key_file, help="private.pem (NOTIFLUX_KEY_FILE)")
    token.add_argument("--expires", type=_duration, default=60, help="how long it is good (60s)")
    check = add(check_command)
    check.add_argument("token", nargs="?")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 for a failure, 78 for bad settings; argparse exits with 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except CommandError as exc:
        print(f"notiflux: {exc}", file=sys.stderr)
        return exc.exit_code
    except OSError as exc:  # standard output is full, or closed
        print(f"notiflux: cannot write: {exc.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would try once more, and fail
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
