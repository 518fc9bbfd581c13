#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=15.0.1,<18", "PyJWT>=2.10.1,<3", "cryptography>=43.0.0,<51"]
# ///
# SPDX-License-Identifier: MIT
"""notiflux: subscribe to topics over a WebSocket, broadcast to them with one HTTP POST.

HTTPConnection -> Router.process_request -> TokenVerifier -> Hub.broadcast -> deliver -> a socket.
One process, one event loop, no threads, no locks. A 2xx means that the broadcast happened, exactly
once; any other answer that it did not. Nothing is stored for good, no token, key or message text is
logged. Without a command this runs the daemon. Each room uses only those above it.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11) or sys.platform != "linux":  # which has epoll
    sys.exit("notiflux: needs Linux and Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import argparse
import asyncio
import base64
import bisect
import contextlib
import functools
import gc
import http.client
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import time
import urllib.request
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

VERSION = "0.1.0"
INSTALL = "python3 -m venv venv && venv/bin/pip install 'websockets<18' 'PyJWT<3' cryptography"
try:
    import cryptography.exceptions
    import jwt
    import websockets.asyncio.server
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from websockets.frames import Frame, Opcode
    from websockets.protocol import Protocol, Side, State
    from websockets.utils import accept_key

    for _package, *_floor in ((websockets, 15, 0, 1), (jwt, 2, 10, 1), (cryptography, 43, 0, 0)):
        if [*map(int, re.findall(r"\d+", _package.__version__))] < _floor:
            raise ImportError(f"{_package.__name__} {_package.__version__} is too old")
    ES256: Any = jwt.get_algorithm_by_name("ES256")
except (ImportError, ValueError) as exc:  # ValueError: websockets reads variables of its own
    sys.exit(f"notiflux: cannot use a package ({exc}); to run it with venv/bin/python: {INSTALL}")

TOKEN_MAX, TOKENS_REMEMBERED = 8 * 1024, 1024  # bytes of one; those kept once verified: 8 MiB
LEEWAY_S, STRANGER_MAX = 60, 16 * 1024  # clocks' drift; bytes parsed before a good token is seen
TOPIC_MAX, JSON_DEPTH_MAX = 512, 64  # bytes of a topic in UTF-8; arrays and objects in one another
MESSAGE_OVERHEAD = 800  # bytes it takes to hold a message, beside its text and its topic's
REPLAY_PIECE, BATCH_MAX = 16 * 1024, 64 * 1024  # bytes unsent, or sent in a turn; in one write
TURN_BYTES, DELIVERY_BYTES = 8 * 1024 * 1024, 4 * 1024  # sent in a turn: 20 ms; added for each one
COMMAND_MAX, COMMANDS_REFUSED_MAX = 16 * 1024, 16  # bytes of one: a token, a topic, room to spare
HEAD_MAX, HEADERS_MAX = 16 * 1024, 64  # bytes of a whole head with its empty line; header lines
LINE_MAX, HEADS_REMEMBERED = 8 * 1024, 128  # bytes of a line without CRLF; good heads kept: 2 MiB
CHUNKS_MAX, CHUNK_LINE_MAX = 256, 256  # in one step: some 1 ms; bytes of a size line
UNSENT_MAX, READ_MAX = 64 * 1024, 32 * 1024  # bytes: with more unsent none are read; read at once
FRAMES_READ_MAX = 1024  # the same of frames, of which an empty one has 6; of HTTP without a step
FRAMES_MAX = 5_000  # from one peer between two pings, or two for each of MAX_TOPICS
ACCEPT_MAX, LISTEN_QUEUE = 8, 4096  # connections taken in one turn; that wait in the kernel
# write: without progress; linger: after our half has closed; close: for a subscriber to go.
TIMEOUTS_S = {"head": 10, "body": 10, "idle": 75, "write": 10, "linger": 0.5, "close": 10}
READY_MAX, BEATS_MAX = 16, 500  # sockets between two looks at the clock; pinged in one turn
NAPS, NAP_S = 10, 0.001  # short waits behind a broadcast, since a long sleep empties the caches
TOOK_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # of a broadcast
LINES_MAX = 100  # of one event in the log in a second; what is more is counted
TURN_S, SWEEP_S = 0.005, 1.0  # for who is ready, and for what can wait; between looks at deadlines
log = logging.getLogger("notiflux")


# --- Errors: what can go wrong, and how a peer hears of it. ---

PHRASES = http.client.responses | {413: "Content Too Large", 414: "URI Too Long"}  # RFC 9110's
# What such an answer always says: RFC 6750 section 3, RFC 6455 section 4.4.
ALWAYS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
ALWAYS[426] = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}


class CommandError(Exception):
    """What the user of the command line can mend, in one line. The exit code is 1."""


class SettingsError(CommandError):
    """A setting or a key that the program cannot start with: EX_CONFIG of sysexits.h, 78."""


class Refusal(Exception):
    """The one way to say no to a peer; `detail` is of a finite set, and has no text of the peer."""

    def __init__(self, status: int, detail: str, code: str = "", **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        known = {400: "invalid_request", 401: "invalid_token"}
        self.code = code or known.get(status) or PHRASES[status].lower().replace(" ", "_")
        self.headers = ALWAYS.get(status, {}) | headers


def refuse_if(condition: object, status: int, detail: str) -> None:
    """Raise that Refusal if `condition` holds."""
    if condition:
        raise Refusal(status, detail)


def printable(text: str, limit: int = 200) -> str:
    """Return `text` in printable ASCII, escaped as Python would, cut to `limit` characters."""
    return (text[:limit] + "..." * (len(text) > limit)).encode("unicode_escape").decode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := dict(pairs)) != len(pairs):
        raise ValueError("duplicate name")
    return names


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):  # readers differ: RFC 8259 section 6
        raise ValueError("not a number, or out of range")
    return value


_how: Any = {"object_pairs_hook": _unique, "parse_float": _finite, "parse_constant": _finite}
JSON_DECODER = json.JSONDecoder(parse_int=lambda n: (len(n) < 300 or _finite(n)) and int(n), **_how)
dump_json = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))  # compact
JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # one without an end, too
LEVELS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff"), bytes({*range(256)} - {*b"[{]}"})


def parse_json(data: bytes) -> Any:
    """Return the JSON value in `data` (RFC 8259, and no doubtful one). Raises ValueError."""
    nested = b"[" in data or data.find(b"{", 1) > 0  # to look is cheap, to count is not
    if nested and data.count(b"[") + data.count(b"{") > JSON_DEPTH_MAX:
        steps = memoryview(JSON_STRING.sub(b"", data).translate(*LEVELS)).cast("b")
        if any(level > JSON_DEPTH_MAX for level in itertools.accumulate(steps)):
            raise ValueError("nested too deeply")
    value, end = JSON_DECODER.raw_decode(text := data.decode().strip(" \t\n\r"))
    if end != len(text):
        raise ValueError("more than one value")
    if b"\\" in data and b"\\u" in data:  # the one way in for half a surrogate pair
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


# --- Settings: what can be set. One table; parsing, errors and help all come from it. ---

# A kind: the pattern of a text in lower case, what is expected, and what makes a value of a text.
ANY = "(?s:.*)", "", str
WHOLE = "[0-9]{1,18}", "a whole number from {} to {}", int
SECONDS = r"[0-9]{1,9}(\.[0-9]{1,9})?", "seconds from {} to {}", json.loads  # 15: an int
LEVEL = "debug|info|warning|error", "debug, info, warning or error", str.lower
ORIGIN = r"\s*[a-z][a-z0-9+.-]*://[^/\s,]+\s*"
ORIGINS_ARE = "origins such as https://example.org, separated by commas"
ORIGINS = f"{ORIGIN}(,{ORIGIN})*", ORIGINS_ARE, lambda t: "".join(t.lower().split()).split(",")
NETWORKS_ARE = "addresses or networks such as 127.0.0.1,10.0.0.0/8, separated by commas"
NETWORKS = r"\S+", NETWORKS_ARE, lambda t: [*map(ipaddress.ip_network, t.lower().split(","))]


def setting(kind: tuple[str, str, Any], default: Any, meaning: str, *limits: float) -> Any:
    """Declare a setting of that kind; a number keeps to `limits`, and None is unset."""
    return field(default=default, metadata={"kind": (*kind, *limits), "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """Every setting; the environment variable has the field's name in capitals."""

    host: str = setting(ANY, "127.0.0.1", "address to listen on; unix:/path for a Unix socket")
    port: int = setting(WHOLE, 8080, "0 picks a free one and logs it", 0, 65535)
    jwt_public_key_b64: str | None = setting(ANY, None, "base64 of a PEM with public keys")
    jwt_public_key_file: str | None = setting(ANY, None, "path of such a PEM; read again on SIGHUP")
    history_size: int = setting(WHOLE, 100, "messages held per topic; 0 holds none", 0, 10**4)
    history_seconds: float = setting(SECONDS, 600, "how long they are kept", 0, 10**8)
    history_bytes: int = setting(WHOLE, 67108864, "for all; the oldest go first", 0, 2**40)
    max_connections: int = setting(WHOLE, None, "further ones get 503 (open files)", 1, 10**7)
    max_topics: int = setting(WHOLE, 1000, "topics one connection may subscribe to", 1, 10**6)
    max_message_bytes: int = setting(WHOLE, 1048576, "largest body of a POST", 1, 2**30)
    max_buffer_bytes: int = setting(WHOLE, 4194304, "unsent ones drop a subscriber", 1, 2**31)
    ping_interval: float = setting(SECONDS, 15, "seconds; silent for two: dropped", 0.1, 86400)
    stop_timeout: float = setting(SECONDS, 5, "seconds a stop may take", 0, 86400)
    allowed_origins: Sequence[str] | None = setting(ORIGINS, None, "pages from elsewhere get 403")
    trusted_proxies: Sequence[Any] | None = setting(NETWORKS, None, "whose X-Forwarded-For counts")
    tls_cert_file: str | None = setting(ANY, None, "serve https and wss with this certificate")
    tls_key_file: str | None = setting(ANY, None, "and this key")
    log_level: str = setting(LEVEL, "info", "debug, info, warning or error")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings. Raises SettingsError that names the variable and what it expects."""
        values = {}
        for each in fields(cls):
            pattern, expected, convert, *limits = each.metadata["kind"]
            if text := environment.get(name := each.name.upper()):
                with contextlib.suppress(ValueError):  # whose words are not ours
                    good = re.fullmatch(pattern, text.lower())
                    if good and (not limits or limits[0] <= float(text) <= limits[1]):
                        values[each.name] = convert(text)
                if each.name not in values:
                    raise SettingsError(f"{name}: expected {expected.format(*limits)}")
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
TOKEN_MEMBER = re.compile(r'"token"\s*:\s*"([A-Za-z0-9_.-]+)"')


def _public_key(label: bytes, pem: bytes) -> PublicKey:
    """Return the P-256 key in one PEM block. Raises ValueError with what it is instead."""
    if b"PRIVATE KEY" in label:
        raise ValueError("a private key, which must stay with those who sign tokens")
    if b"CERTIFICATE" in label:
        raise ValueError("a certificate")
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, cryptography.exceptions.UnsupportedAlgorithm) as exc:
        raise ValueError("a PEM block that is no public key") from exc
    kind = getattr(getattr(key, "curve", key), "name", type(key).__name__)
    if isinstance(key, PublicKey) and kind == "secp256r1":
        return key
    raise ValueError(f"a key of another kind: {kind}")


def load_keys(settings: Settings) -> tuple[PublicKey, ...]:
    """Return the public keys, at least one. Raises SettingsError that says what is wrong."""
    encoded, path = settings.jwt_public_key_b64 or "", settings.jwt_public_key_file or ""
    if bool(encoded) == bool(path):
        how = "'notiflux.py keygen' makes a key, 'notiflux.py dev' runs without"
        raise SettingsError(f"JWT_PUBLIC_KEY_B64, JWT_PUBLIC_KEY_FILE: expected exactly one; {how}")
    try:
        in_b64 = "".join(encoded.split())
        pem = Path(path).read_bytes() if path else base64.b64decode(in_b64, validate=True)
        keys = tuple(_public_key(block[1], block[0]) for block in PEM_BLOCK.finditer(pem))
        if not keys or len(keys) != pem.count(b"-----BEGIN "):
            raise ValueError("what is not PEM")
    except (OSError, ValueError) as exc:
        name, form = ("FILE", "PEM") if path else ("B64", "PEM, in base64")
        found = f"{exc.strerror} ({printable(path)})" if isinstance(exc, OSError) else exc
        expected = f"JWT_PUBLIC_KEY_{name}: expected EC P-256 public keys in {form}"
        raise SettingsError(f"{expected}; found {found}") from exc
    return keys


class Claims(NamedTuple):
    """What a verified token says (RFC 7519 section 4). Times are seconds since 1970."""

    scope: str
    topics: frozenset[str]
    topic_prefixes: tuple[str, ...]
    exp: int
    nbf: int
    expire_at: float  # infinite where there is none


CLAIMS: Any = {"sub": lambda v: type(v) is str, "scope": lambda v: v in ("subscribe", "broadcast")}
CLAIMS["topics"] = lambda v: type(v) is list and {*map(type, v)} <= {str}
CLAIMS |= dict.fromkeys(("exp", "nbf", "expire_at"), lambda v: type(v) is int and 0 <= v <= 2**53)
CLAIMS["topic_prefixes"] = CLAIMS["topics"]  # in the order in which they are looked at


def _decode(keys: Sequence[PublicKey], token: str) -> Claims:
    refuse_if(token[TOKEN_MAX:] or not TOKEN.fullmatch(token), 401, "the token is malformed")
    try:
        raw = [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]
        header, payload = map(parse_json, raw[:2])
        odd = {"crit", "b64", "zip", "enc", "cty"} & header.keys()  # which change the meaning
        refuse_if(odd or type(header.get("kid", "")) is not str, 401, "the token is malformed")
    except (ValueError, AttributeError) as exc:
        raise Refusal(401, "the token is malformed") from exc
    refuse_if(header.get("alg") != "ES256", 401, "the token is not signed with ES256")
    signed = token.rpartition(".")[0].encode()
    good = any(ES256.verify(signed, key, raw[2]) for key in keys)
    refuse_if(not good, 401, "the token's signature is of no key known here")
    refuse_if(not isinstance(payload, dict), 401, "the token is malformed")
    refuse_if("aud" in payload, 401, "the token is for another audience: it has a claim aud")
    needed = ["sub", "scope", "exp"] + ["topics"] * ("topic_prefixes" not in payload)
    for name, is_good in CLAIMS.items():
        if not is_good(payload[name]) if name in payload else name in needed:
            raise Refusal(401, f"the token's claim {name} is missing or wrong")
    get = payload.get
    grants = frozenset(get("topics", ())), tuple(get("topic_prefixes", ()))
    return Claims(get("scope"), *grants, get("exp"), get("nbf", 0), get("expire_at", math.inf))


class TokenVerifier:
    """Verifies ES256 tokens (RFC 7515, RFC 7519); remembers those that passed all but time."""

    def __init__(self, keys: Sequence[PublicKey], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._claims = functools.lru_cache(TOKENS_REMEMBERED)(functools.partial(_decode, keys))

    def authorize(self, token: str, scope: str, topics: Iterable[str]) -> Claims:
        """Return the claims of a token that grants `scope` on `topics`. Raises Refusal."""
        claims, code = self.verify(token), "insufficient_scope"
        if claims.scope != scope:
            raise Refusal(403, f"this takes a token with scope {scope}", code)
        for topic in topics:
            if topic not in claims.topics and not topic.startswith(claims.topic_prefixes):
                raise Refusal(403, "the token does not grant this topic", code)
        return claims

    def verify(self, token: str) -> Claims:
        """Return the claims of a good token. Raises Refusal (401) with the check it fails."""
        claims, now = self._claims(token), self._clock()
        refuse_if(now >= claims.exp + LEEWAY_S, 401, "the token has expired")
        refuse_if(now < claims.nbf - LEEWAY_S, 401, "the token is not valid yet")
        refuse_if(now >= claims.expire_at, 401, "the token's expire_at has passed")
        return claims


# --- Messages: what is sent, and what is held of it. No sockets, no tokens. ---

CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f-\x9f]")
SINCE = re.compile(r"latest|all|[0-9a-f]{1,32}-[0-9]{1,19}")


def check_topics(topics: list[str], limit: int = 1) -> list[str]:
    """Return each topic once. Raises Refusal for a bad one, for none, and for more than `limit`."""
    refuse_if(not 1 <= len(topics) <= limit, 400, f"at least one topic, and at most {limit}")
    for topic in topics:
        if not (0 < len(topic) <= TOPIC_MAX and topic.isascii() and topic.isprintable()):
            refuse_if(not 1 <= len(topic.encode()) <= TOPIC_MAX, 400, "a topic has 1 to 512 bytes")
            refuse_if(CONTROL_CHARACTER.search(topic), 400, "a topic has no control characters")
    return list(dict.fromkeys(topics)) if len(topics) > 1 else topics


def text_frame(payload: bytes) -> bytes:
    """Return an unmasked WebSocket text frame (RFC 6455 section 5.2), the same for every client."""
    if len(payload) < 126:  # most are
        return b"\x81%c%b" % (len(payload), payload)
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


@dataclass(slots=True, eq=False)
class Message:
    """One message on one topic. Its frames are made where they are needed, and not held."""

    id: str  # <epoch>-<seq>
    topic: str
    payload: bytes  # what plain mode delivers
    is_text: bool  # a string was broadcast, no other JSON value
    size: int  # bytes that it takes to hold it, at most
    time_ms: int  # since 1970
    added_s: float  # by the monotonic clock

    def members(self) -> str:
        """Return what JSON says about it, without the braces."""
        text = self.payload.decode()
        value, topic = dump_json(text) if self.is_text else text, dump_json(self.topic)
        return f'"topic":{topic},"id":"{self.id}","time":{self.time_ms},"message":{value}'

    def plain_frame(self) -> bytes:
        """Return it for plain mode: a string as it is, another value as its JSON text."""
        return text_frame(self.payload)

    def json_frame(self) -> bytes:
        """Return it for JSON mode."""
        return text_frame(f'{{"event":"message",{self.members()}}}'.encode())

    def event_lines(self) -> bytes:
        """Return it for an event stream (HTML Living Standard section 9.2)."""
        data = f'{{"event":"message",{self.members()}}}'
        return f"id: {self.id}\nevent: message\ndata: {data}\n\n".encode()


class History:
    """Numbers the messages, and holds the last `size` of each topic for those who come back."""

    def __init__(self, size: int, seconds: float, bytes_max: int) -> None:
        self._size, self._seconds, self._bytes_max = size, seconds, bytes_max
        self._epoch, self._seq = os.urandom(4).hex(), 0  # random per start; over all topics
        self.position = f"{self._epoch}-0"  # the id of the newest message: where the server is now
        self.held: OrderedDict[int, Message] = OrderedDict()  # by seq
        # A topic's seqs: the newest that is not held any more, then those that are, at least one.
        self._topics: dict[str, list[int]] = {}
        self.bytes_held = self._forgotten = 0  # now; the newest seq of topics with nothing held

    def add(self, topic: str, payload: bytes, is_text: bool = True) -> Message:
        """Return `payload` as the next message on `topic`, and hold it within the bounds."""
        self._seq = seq = self._seq + 1
        self.position = f"{self._epoch}-{seq}"
        size = MESSAGE_OVERHEAD + len(payload) + 4 * len(topic)
        times = time.time_ns() // 10**6, time.monotonic()
        message = self.held[seq] = Message(self.position, topic, payload, is_text, size, *times)
        self.bytes_held += size
        seqs = self._topics.setdefault(topic, [self._forgotten])
        seqs.append(seq)
        if len(seqs) - 1 > self._size:
            self._forget(seqs[1])
        while self.bytes_held > self._bytes_max:
            self._forget(next(iter(self.held)))
        return message

    def expire(self, now_s: float, at_most: int) -> None:
        """Forget what is too old by the monotonic clock, up to `at_most` messages."""
        held = self.held
        while at_most and held and now_s - next(iter(held.values())).added_s >= self._seconds:
            self._forget(next(iter(held)))
            at_most -= 1

    def _forget(self, seq: int) -> None:
        message = self.held.pop(seq)
        self.bytes_held -= message.size
        seqs = self._topics[message.topic]
        del seqs[0]  # which puts this one into its place
        if len(seqs) == 1:
            del self._topics[message.topic]
            self._forgotten = max(self._forgotten, seq)
        if not self._topics:  # what is deleted from them does not shrink the tables
            self._topics, self.held = {}, OrderedDict()

    def since(self, topics: Iterable[str], since: str) -> tuple[list[Message], bool]:
        """Return what is held of `topics` after `since`, oldest first, and whether that is all."""
        epoch, _, number = since.partition("-")
        after = int(number) if epoch == self._epoch and int(number) <= self._seq else -1
        lists = [self._topics.get(topic, [self._forgotten]) for topic in topics]
        first = -1 if since == "latest" else 0  # of what is newer
        newer = [seqs[bisect.bisect(seqs, after, lo=1) :][first:] for seqs in lists]
        messages = [self.held[seq] for seq in sorted(itertools.chain(*newer))]
        return messages, after >= 0 and all(after >= seqs[0] for seqs in lists)


# --- Hub: who listens to which topic, and what is on its way to them. No I/O, no await. ---

Batch = NamedTuple("Batch", [("topic", str), ("audience", set[Any]), ("messages", list[Any])])


class Hub:
    """The one owner of who listens to what: s in topics[t] if and only if t in s.topics.

    No such set is empty. A subscriber has a set `topics`, which the hub alone changes, a function
    `encode` that makes its frames, and a `deliver` that queues one at once. What is broadcast waits
    until a turn brings no more, and gets ids and audience only then: none hears it twice, or late.
    """

    def __init__(self, history: History, batch_max: int, call_soon: Callable[..., Any]) -> None:
        self.history, self._batch_max, self.call_soon = history, batch_max, call_soon
        self.topics: dict[str, set[Any]] = {}
        self._waiting: deque[tuple[str, bytes, bool, Any]] = deque()  # and whom to tell
        self._batch: Batch | None = None  # on its way: one write to each who has yet to get it
        self.sending = ""  # its topic, while it is queued to subscribers
        self.subscriptions = self.deliveries = self._delivered = 0  # now; in all; of this batch
        self.took_s, self.took = 0.0, [0] * (len(TOOK_S) + 1)  # all broadcasts; how many a bucket

    def subscribe(self, subscriber: Any, topic: str) -> None:
        """Let `subscriber` hear what is sent to `topic` from now on; once is enough."""
        self.subscriptions += topic not in subscriber.topics
        self.topics.setdefault(topic, set()).add(subscriber)
        subscriber.topics.add(topic)

    def unsubscribe(self, subscriber: Any, topic: str) -> None:
        """Let it hear nothing more of `topic`, not even what is on its way."""
        if topic in subscriber.topics:
            self.subscriptions -= 1
            subscriber.topics.discard(topic)
            self.topics[topic].discard(subscriber)
            if not self.topics[topic]:
                del self.topics[topic]
            if self._batch and self._batch.topic == topic:
                self._batch.audience.discard(subscriber)

    def broadcast(self, topics: Sequence[str], value: Any, done: Callable[..., None]) -> None:
        """Queue `value` on each topic; then call `done` with the last id, and to how many."""
        total, is_text, start_s = 0, isinstance(value, str), time.perf_counter()
        payload = (value if is_text else dump_json(value)).encode()

        def sent(message: Message, delivered: int) -> None:
            nonlocal total
            total += delivered
            if message.topic == topics[-1]:
                took_s = time.perf_counter() - start_s
                self.took[bisect.bisect_left(TOOK_S, took_s)] += 1
                self.took_s += took_s
                self.deliveries += total
                done(message.id, total)

        if not self._waiting and self._batch is None:
            self.call_soon(self._flush)
        self._waiting += [(topic, payload, is_text, sent) for topic in topics]

    def _next_batch(self) -> Batch:
        queue, limit, size, self._delivered = self._waiting, self._batch_max, 0, 0
        topic = queue[0][0]
        batch = Batch(topic, set(self.topics.get(topic, ())), [])
        while queue and queue[0][0] == topic and (not size or size + len(queue[0][1]) <= limit):
            _, payload, is_text, sent = queue.popleft()
            message = self.history.add(topic, payload, is_text)
            batch.messages.append((message, sent))  # and whom to tell to how many it went
            size += message.size
        self.history.expire(message.added_s, 2 * len(batch.messages))  # faster than it grows
        return batch

    def _flush(self) -> None:
        """Send what waits, as far as one turn of the loop may take."""
        room = TURN_BYTES
        try:
            while room > 0 and (self._batch or self._waiting):
                topic, audience, messages = self._batch = self._batch or self._next_batch()
                self.sending, frames = topic, dict[Any, bytes]()  # by what made them, each once
                while audience and room > 0:
                    subscriber = audience.pop()
                    if not (frame := frames.get(encode := subscriber.encode)):
                        frame = frames[encode] = b"".join([encode(one) for one, _ in messages])
                    self._delivered += subscriber.deliver(frame) is not False
                    room -= len(frame) + DELIVERY_BYTES
                room -= DELIVERY_BYTES
                while messages and not audience:
                    message, sent = messages.pop(0)  # first, since it may raise
                    sent(message, self._delivered)
                self._batch = self._batch if audience else None
        finally:  # whatever a subscriber may raise, the others get theirs
            self.sending = ""
            if self._batch or self._waiting:
                self.call_soon(self._flush)


# --- Sockets: whose turn it is, and what each sends and receives. Knows no protocol. ---

READ, WRITE = select.EPOLLIN, select.EPOLLOUT


def address(name: Any) -> str:
    """Return a socket's name for log and URL: address:port, or unix: and its path."""
    if not isinstance(name, tuple):
        return f"unix:{name or ''}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


class Sockets(selectors.EpollSelector):
    """What the loop waits in: serves whoever is ready, then what can wait, and so on for a turn."""

    def __init__(self) -> None:
        super().__init__()  # for what is asyncio's own; all clients are in one of ours
        self.epoll, self.ready = select.epoll(), dict[int, Callable[[int], None]]()  # by descriptor
        self.steps, self._soon = OrderedDict[Any, Any](), deque[Callable[[], None]]()
        # call_soon: when nobody is ready any more. later: a step, once, and its transport, which is
        # aborted if the step fails.
        self.call_soon, self.later = self._soon.append, self.steps.setdefault
        self._naps, self._others = 0, list[int]()  # short waits to come; asyncio's are ready
        self.ready[self.fileno()] = self._others.append
        self.epoll.register(self.fileno(), READ)

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait for `timeout` seconds at most, or for ever; serve; return what is asyncio's own."""
        self._others.clear()
        if self._naps and (timeout is None or timeout > NAP_S):
            timeout, self._naps = NAP_S, self._naps - 1
        owner, until_s = None, 0.0
        try:
            found = self.epoll.poll(0 if self.steps or self._soon else timeout, READY_MAX)
            until_s = time.perf_counter() + TURN_S
            while found or self.steps or self._soon:
                for fd, events in found:
                    self.ready[fd](events)
                is_over = self._others or time.perf_counter() > until_s
                if not is_over and (found := self.epoll.poll(0, READY_MAX)):
                    continue
                steps_until_s = time.perf_counter() + TURN_S
                while self.steps and time.perf_counter() < steps_until_s:
                    step, owner = self.steps.popitem(last=False)
                    step()
                owner = None
                for _ in range(len(self._soon)):
                    self._soon.popleft()()
                    self._naps = NAPS
                if is_over or time.perf_counter() > until_s:
                    break
                found = self.epoll.poll(0, READY_MAX)
        except Exception as exc:  # of one client's turn: the others have theirs, as in asyncio
            if owner:
                owner.abort()
            loop = asyncio.get_running_loop()
            loop.call_exception_handler({"message": "failed: a client's turn", "exception": exc})
        # Behind each full turn, too, since it is one among many that wait for theirs in ours.
        return super().select(0) if self._others or time.perf_counter() > until_s else []

    def close(self) -> None:
        self.epoll.close()
        super().close()


class Transport:
    """A connected socket. Above `limit` bytes unsent it is `paused`; at a quarter, it goes on."""

    def __init__(self, sock: Any, peer: Any, sockets: Sockets, tls: Any) -> None:
        sock.setblocking(False)
        self._sock, self._sockets, self.peer, self.tls, self._plain = sock, sockets, peer, tls, b""
        if tls:  # OpenSSL on the socket itself would read as long as its peer sends
            self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = tls.wrap_bio(self._in, self._out, server_side=True)
        self.fd, self._epoll, self.watched = sock.fileno(), sockets.epoll, 0  # for READ and WRITE
        self.unsent, self.limit, self.read_max = bytearray(), UNSENT_MAX, READ_MAX  # bytes
        self.protocol: Any = None  # with data_received, eof_received, go_on, connection_lost
        self._gone = self.paused = False
        self._then: Callable[[], None] | None = None  # what comes when nothing is unsent
        self.read(True)  # which may fail
        sockets.ready[self.fd] = self._ready

    def read(self, on: bool) -> None:
        """Read on, or nothing until then."""
        self._watch(self.watched & WRITE | READ * on)

    def later(self, step: Callable[[], None]) -> None:
        """Run `step` once, behind those that wait, and read nothing until then."""
        self.read(False)
        self._sockets.later(step, self)

    def _watch(self, events: int) -> None:
        old, new = self.watched, 0 if self._gone else events
        if old and not new:  # or a dead one would be ready all the time
            self._epoll.unregister(self.fd)
        elif old != new:
            (self._epoll.modify if old else self._epoll.register)(self.fd, new)
        self.watched = new  # if it has not failed

    def _ready(self, events: int) -> None:
        if self.watched & WRITE and events != READ:
            self._flush()
        if not self.watched & READ or events == WRITE:
            return
        try:
            ended = not (data := self._sock.recv(self.read_max))
            if data and self.tls:
                data, ended = self._decrypt(data)
            if data:
                self.protocol.data_received(data)
            if ended:
                self.read(False)
                if not self.protocol.eof_received():
                    self.close()
        except BaseException as exc:
            if not isinstance(exc, BlockingIOError):
                self.abort()
            if not isinstance(exc, OSError):
                raise

    def _decrypt(self, data: bytes) -> tuple[bytes, bool]:
        plain = b""
        try:
            self._in.write(data)
            while part := self.tls.read(READ_MAX):
                plain += part
            return plain, True  # it has said that it ends
        except ssl.SSLWantReadError:
            return plain, False
        finally:  # what TLS itself has to say, such as an alert, and what waited for its handshake
            self.write(b"")
            self._flush()

    def write(self, data: Any) -> None:
        """Send it, now or as soon as can be."""
        if self.tls and not self._gone:
            self._plain += data
            with contextlib.suppress(ssl.SSLError):  # the handshake is not done, or has failed
                while self._plain:
                    self._plain = self._plain[self.tls.write(self._plain) :]
            data = self._out.read()
        if not (self.unsent or self._gone):  # mostly, and then nothing is copied
            try:
                sent = self._sock.send(data)
            except OSError:  # which _flush will see, too
                sent = 0
            data = data[sent:]
        if data and not self._gone:
            self.unsent += data
            if not self.watched & WRITE:
                self._flush()
            if len(self.unsent) > self.limit:
                self.paused = True
                self.read(False)

    def close(self, half: bool = False) -> None:
        """Close it behind what is unsent, or our half, and read on until theirs is."""
        self._then = self._shut if half else self.abort
        self.read(half or bool(self._plain))
        self._flush()

    def abort(self) -> None:
        """Close it now."""
        if not self._gone:
            self._gone, self.paused = True, False
            self._watch(0)
            self._sockets.later(self._lost)

    def _flush(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self._sock.send(self.unsent)]
            self._watch(self.watched & READ)
        except BlockingIOError:
            self._watch(self.watched & READ | WRITE)
        except OSError:
            self.abort()
        if self.paused and len(self.unsent) <= self.limit // 4:
            self.paused = False
            self._sockets.later(self.protocol.go_on, self)
        if self._then and not (self.unsent or self._plain):
            self._then()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it is gone, which is not known here yet
            if self.tls:
                with contextlib.suppress(OSError):  # it has not said so itself
                    self.tls.unwrap()
                self._sock.send(self._out.read())
            self._sock.shutdown(socket.SHUT_WR)

    def _lost(self) -> None:
        del self._sockets.ready[self.fd]
        if self.tls and not self.unsent:
            self._shut()
        self._sock.close()
        protocol, self.protocol, self._then = self.protocol, None, None  # they would be a cycle
        protocol.connection_lost(None)


# --- Subscribers: a WebSocket with its commands, and an event stream. ---

SUBPROTOCOL = "notiflux.v1"
# Why a subscriber is sent away: a WebSocket's close code (RFC 6455 section 7.4) and its reason.
GOODBYES = {"silent": (1001, ""), "refused": (1008, "too many refused commands")}
GOODBYES |= {"flood": (1008, "too many frames"), "slow": (4100, "too slow: reconnect and resume")}
GOODBYES["stopping"] = (1012, "the server restarts: reconnect after a random pause")
INVALID_SUBSCRIBE = "Invalid subscribe command, it should be: /subscribe <topic> <token>"


class Subscriber(asyncio.Protocol):
    """Where messages go; as it stands an event stream, a GET /sse whose answer does not end."""

    __slots__ = "__dict__", "__weakref__", "_idle", "_queue", "encode"  # what each delivery reads

    def __init__(self, daemon: Any, peer: str, response: Any, *asked: Any) -> None:
        self._daemon, self._hub, self._settings = daemon, daemon.hub, daemon.settings
        self._loop = asyncio.get_running_loop()
        self.peer, self.response, self._asked = peer, response, asked  # topics, claims and since
        self.topics, self.encode = set[str](), Message.event_lines
        self._queue: Callable[[bytes], Any] = self._write  # to the transport, or behind a replay
        self._idle, self.since_s = -1, self._loop.time()  # a socket with nothing ahead; its start
        self.expiring: dict[str, float] = {}  # topic: when its subscription ends, since 1970
        self._replay: deque[tuple[str, Message | bytes]] | None = None  # what waits, and its topic
        self._behind, self._why = 0, "gone"  # bytes of frames in it; or why it was sent away
        self._abort: asyncio.TimerHandle | None = None  # set once it is on its way out

    def take_over(self, transport: Transport, head: bytes) -> None:
        """Answer its request with `head`, and begin."""
        self.transport, transport.protocol = transport, self
        transport.limit, transport.read_max = self._settings.max_buffer_bytes, FRAMES_READ_MAX
        transport.read(True)  # which a pipeline may have ended
        self._daemon.beats[self] = self.since_s + self._settings.ping_interval
        self._write(head)
        if not self._asked:
            self.tell("open", id=self._hub.history.position, keepalive=self._settings.ping_interval)
        elif self._abort is None:
            self._follow(*self._asked, topics=self._asked[0])

    def deliver(self, frame: bytes) -> Any:
        """Queue a frame; while nothing is unsent, past the transport, which is a fifth cheaper."""
        try:
            sent = os.write(self._idle, frame) if self._idle >= 0 else 0
        except OSError:  # which the transport will see, too
            sent = 0
        return sent == len(frame) or self._queue(frame[sent:])

    def _write(self, data: bytes) -> None:
        self.transport.write(data)
        if self.transport.paused and self._replay is None:  # over MAX_BUFFER_BYTES
            self._drop("slow")
        other = self.transport.unsent or self.transport.tls or self._replay is not None
        self._idle = -1 if other or self._abort else self.transport.fd

    def connection_lost(self, exc: Exception | None) -> None:
        del self._daemon.beats[self]
        self._retire().cancel()  # commands may still be queued, and are not obeyed any more
        self._daemon.counts["disconnects"][f'{{reason="{self._why}"}}'] += 1
        log.debug("disconnected peer=%s", self.peer)

    def _hold(self, frame: bytes) -> bool:
        cast(deque[Any], self._replay).append((self._hub.sending, frame))
        self._behind += len(frame)
        if self._behind > self._settings.max_buffer_bytes:
            self._drop("slow")
        return self._abort is None

    def tell(self, event: str, **members: Any) -> None:
        """Queue an event; its id is to resume from, and so never ahead of what is replayed."""
        at = f"id: {members['id']}\n" if "id" in members and not members.get("replayed") else ""
        data = dump_json({"event": event, **members})
        self.deliver(f"{at}event: {event}\ndata: {data}\n\n".encode())

    def beat(self) -> None:
        """Keep the line alive, and see whether it is."""
        self.deliver(b":\n\n")

    def dismiss(self, why: str) -> None:
        """Close it behind what is queued, for one of GOODBYES; a stream may be expired, too."""
        self._why = why
        self._retire()  # at once: it resumes all topics, in the order of ids
        self.transport.close()

    def end(self, topics: list[str]) -> None:
        """End subscriptions whose expire_at has come; a stream, which resumes all, as a whole."""
        self._queue = self.transport.write  # past a replay, which ends here
        self.tell("unsubscribed", topics=topics, error="token_expired")
        self.dismiss("expired")

    def _follow(self, topics: Sequence[str], claims: Claims, since: str, /, **about: Any) -> None:
        """Subscribe, and replay what came after `since`: one stream with what comes live."""
        messages, recovered = self._hub.history.since(topics, since) if since else ([], False)
        if since:
            self._leave(topics)  # another replay of them is not wanted any more
        for topic in topics:
            self._hub.subscribe(self, topic)
            self.expiring.pop(topic, None)
            if claims.expire_at < math.inf:
                self.expiring[topic] = claims.expire_at
        about |= {"id": self._hub.history.position, "replayed": len(messages)}
        self.tell("subscribed", **about, **({"recovered": recovered} if "-" in since else {}))
        if messages and self._abort is None:
            self._queue, self._idle, self.transport.limit = self._hold, -1, REPLAY_PIECE
            self._replay = deque([*(self._replay or ()), *((one.topic, one) for one in messages)])
            self.go_on()

    def go_on(self) -> None:
        """Read on, and send the next piece of a replay."""
        if self.transport.paused:
            return
        self.transport.read(True)
        piece = bytearray()
        while self._replay and len(piece) < REPLAY_PIECE:
            _, item = self._replay.popleft()
            self._behind -= len(item) if isinstance(item, bytes) else 0
            piece += item if isinstance(item, bytes) else self.encode(item)
        if piece:
            self.transport.write(piece)
            self._daemon.sockets.later(self.go_on, self.transport)
        elif self._replay is not None:  # all of it is on its way
            self._replay, self._queue = None, self._write
            self.transport.limit = self._settings.max_buffer_bytes

    def _leave(self, topics: Sequence[str]) -> None:
        for topic in topics:
            self._hub.unsubscribe(self, topic)
            self.expiring.pop(topic, None)
        if self._replay is not None:
            self._replay = deque(one for one in self._replay if not one[0] or one[0] in self.topics)
            self._behind = sum(len(one) for _, one in self._replay if isinstance(one, bytes))

    def _drop(self, why: str) -> None:
        if self._abort is None:
            log.warning("dropped peer=%s why=%s topics=%d", self.peer, why, len(self.topics))
            self._retire()
            self._loop.call_soon(self.dismiss, why)

    def _retire(self) -> asyncio.TimerHandle:
        """Leave every topic, obey nothing more, and see to it that the connection ends."""
        if self._abort is None:
            self._replay, self._queue, self._idle = None, lambda frame: False, -1
            self._leave(tuple(self.topics))
            self._abort = self._loop.call_later(TIMEOUTS_S["close"], self.transport.abort)
        return self._abort


class WebSocketSubscriber(Subscriber):
    """One WebSocket, whose handshake is answered with `response`: commands in, messages out."""

    def __init__(self, daemon: Any, peer: str, response: Any, json_mode: bool) -> None:
        super().__init__(daemon, peer, response)
        self.encode = Message.json_frame if json_mode else Message.plain_frame
        self._json_mode = json_mode
        self._protocol: Any = Protocol(Side.SERVER, state=State.OPEN, max_size=COMMAND_MAX)
        self._unread, self._is_text, self._received = b"", False, b""  # frames; a command so far
        self._refused = self._unanswered = self._frames = 0  # commands; pings; since the last ping

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._protocol.parser = itertools.repeat(None)  # for frames that wait; its own is a cycle

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        self._unread += data
        if len(self._unread) < FRAMES_READ_MAX // 2:
            self._read()
        else:
            self.transport.later(self._read)

    def _read(self) -> None:
        data, self._unread = self._unread, b""
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            self._frames += 1
            if self._frames > max(FRAMES_MAX, 2 * self._settings.max_topics):
                self._drop("flood")
            if event.opcode > Opcode.BINARY or self._abort is not None:  # a control frame
                continue
            if event.opcode is not Opcode.CONT:
                self._is_text, self._received = event.opcode is Opcode.TEXT, b""
            self._received += event.data  # the library sees to it that this is at most COMMAND_MAX
            try:
                if event.fin and self._is_text:
                    self._obey(self._received.decode().strip())
            except UnicodeDecodeError:
                self._protocol.fail(1007, "not UTF-8")
                self._retire()
        self._send()
        if self._replay is None:  # which goes on, and reads on, in steps of its own
            self.go_on()

    def _send(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._write(data)
            else:
                self.transport.close(half=True)
        if self._protocol.state is not State.OPEN:
            self._retire()

    def dismiss(self, why: str) -> None:
        if self._protocol.state is State.OPEN:
            self._why = why
            self._protocol.send_close(*GOODBYES[why])
        self._send()  # which retires it

    def tell(self, event: str, plain: str = "", **members: Any) -> None:
        if text := dump_json({"event": event, **members}) if self._json_mode else plain:
            self.deliver(text_frame(text.encode()))

    def beat(self) -> None:
        if self._unanswered >= 2:  # counted, not timed: nobody is to blame for a suspended machine
            self._drop("silent")
            self.transport.abort()
        elif self._abort is None:
            self._write(b"\x89\0")  # a ping: RFC 6455 section 5.5.2
            self.tell("keepalive")
        self._unanswered += self.transport.watched & READ  # or its pongs are not seen
        self._frames = 0

    def end(self, topics: list[str]) -> None:
        self._leave(topics)
        for topic in topics:
            plain = f"Subscription to {topic} expired"
            self.tell("unsubscribed", plain, topics=[topic], error="token_expired")

    def _obey(self, text: str) -> None:
        """Obey one command; the grammar is the Rust program's: words, one space between them."""
        command, _, rest = text.partition(" ")
        if command == "/subscribe" and rest:
            self._subscribe(rest.split(" "))
        elif (command == "/unsubscribe" and rest) or text == "/unsubscribe-all":
            self._leave(topics := [rest] if rest else sorted(self.topics))
            self.tell("unsubscribed", topics=topics)
        elif text.startswith("/"):
            self._refuse(Refusal(400, "Unknown command"))

    def _subscribe(self, words: list[str]) -> None:
        topic: str | None = None
        try:
            refuse_if(len(words) not in (2, 3) or not all(words), 400, INVALID_SUBSCRIBE)
            topic, token, since = [*words, ""][:3]
            claims = self._daemon.verifier.authorize(token, "subscribe", check_topics([topic]))
            refuse_if(since and not SINCE.fullmatch(since), 400, "since is an id, latest or all")
            full = topic not in self.topics and len(self.topics) >= self._settings.max_topics
            refuse_if(full, 403, "this connection has as many topics as it may")
            self._follow([topic], claims, since, topic=topic)
        except Refusal as refusal:
            self._refuse(refusal, "/subscribe", topic)

    def _refuse(self, refusal: Refusal, command: str = "", topic: str | None = None) -> None:
        self._daemon.refused(self.peer, command[1:] or "command", refusal)
        if topic is not None and CONTROL_CHARACTER.search(topic):  # the answer is one line
            topic = printable(topic)
        start = "" if topic is None else f"Not allowed to subscribe to {topic}: "
        about = {"error": refusal.code, "detail": refusal.detail, "command": command or None}
        self.tell("error", start + refusal.detail, **about, topic=topic)
        self._refused += 1
        if self._refused >= COMMANDS_REFUSED_MAX:
            self.dismiss("refused")


# --- HTTP: bytes to requests, answers to bytes. Knows no topics and no tokens. ---

TCHAR = rb"!#$%&'*+.^_`|~0-9A-Za-z-"  # as a set of characters: RFC 9110 section 5.6.2
HEAD_START = re.compile(rb"[\r" + TCHAR + rb"]")  # a TLS hello may have no line end, ever
REQUEST_LINE = re.compile(  # RFC 9112 section 3.2; no fragment, no control characters behind a %
    rb"([" + TCHAR + rb"]+) (?! )"
    rb"(?:(?i:https?)://(?:[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?)?"
    rb"((?<=^OPTIONS )\*|(?:/(?:[0-9A-Za-z._~!$&'()*+,;=:@/?-]"
    rb"|%(?:[2-689A-Fa-f][0-9A-Fa-f]|7[0-9A-Ea-e]))*)?) HTTP/([0-9])\.([0-9])"
)
HEADER_LINE = re.compile(rb"([" + TCHAR + rb"]+):([\t\x20-\x7e\x80-\xff]*)")
HOST = re.compile(r"(?:[0-9A-Za-z._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
MEMBER = re.compile(f"[{TCHAR.decode()}]+")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")
Response = NamedTuple("Response", [("status", int), ("headers", tuple[Any, ...]), ("body", bytes)])
HEADS: dict[bytes, Head] = {}  # without a fault; one who stays sends the same again and again


@dataclass(slots=True, eq=False)
class Head:
    """The head of all requests with its bytes; `headers` has the values of each lower-case name."""

    method: str
    path: str
    query: str  # with its question mark
    is_old: bool  # HTTP/1.0
    headers: defaultdict[str, list[str]]
    length: int | None = 0  # of the body; None for a chunked one
    last: bool = False  # the client wants no answer behind this one's

    def members(self, name: str, case: Any = str.lower) -> list[str]:
        """Return a list-valued header's, by default lower case. Raises Refusal for no list."""
        parts = case(",".join(self.headers[name])).split(",")
        members = [text for part in parts if (text := part.strip(" \t"))]  # RFC 9110 section 5.6.1
        refuse_if(not all(map(MEMBER.fullmatch, members)), 400, "a malformed header")
        return members


def _parse_lines(head: bytes) -> tuple[bytes, defaultdict[str, list[str]]]:
    """Return the first line and the headers; an empty line ahead of it is tolerated."""
    first, *lines = head.removeprefix(b"\r\n").removesuffix(b"\r\n\r\n").split(b"\r\n")
    refuse_if(len(first) > LINE_MAX, 414, "a line that is too long")
    refuse_if(max(map(len, lines), default=0) > LINE_MAX, 431, "a line that is too long")
    refuse_if(len(lines) > HEADERS_MAX, 431, "more headers than are read")
    headers = defaultdict(list)
    for line in lines:
        if not (match := HEADER_LINE.fullmatch(line)):
            raise Refusal(400, "a malformed header")
        headers[match[1].decode().lower()].append(match[2].strip(b" \t").decode("latin-1"))
    return first, headers


class RequestReader:
    """Reads requests from bytes, however cut: a full match, or a Refusal that ends it. No I/O."""

    def __init__(self, body_max: int) -> None:
        self._body_max, self.buffer = body_max, bytearray()  # what was received, and is not read
        self.requests = self._read()  # each once complete; None: not yet; False: not in this step
        self.head: Head | None = None  # the newest, as far as it is known
        self.stage, self.wants_continue = "idle", False  # then "head", then "body"; for a 100

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what was fed, not even part of a request."""
        return self.stage == "idle" and not self.buffer

    def feed(self, data: bytes) -> tuple[Head, bytes] | None:
        """Take what was received; return it at once if it is one request whose head is known."""
        end = data.find(b"\r\n\r\n") + 4
        head = HEADS.get(data[:end]) if self.empty else None
        if head and head.length == len(data) - end <= self._body_max:
            self.head = head
            return head, data[end:]
        self.buffer += data
        return None

    def _read(self) -> Generator[Any, None, None]:
        while True:
            while not self.buffer:
                yield None
            self.stage, self.head = "head", None
            while not (end := self._head_end()):
                yield None
            if not (head := HEADS.get(raw := bytes(self.buffer[:end]))):
                head = self._parse_head(raw)
                if len(HEADS) == HEADS_REMEMBERED:
                    HEADS.clear()
            self.head = HEADS[raw] = head
            length = head.length or 0
            refuse_if(length > self._body_max, 413, "the body is over MAX_MESSAGE_BYTES")
            self.stage = "body"
            waits = len(self.buffer) == end and head.length != 0 and not head.is_old
            self.wants_continue = waits and bool(head.members("expect"))  # RFC 9110 section 10.1.1
            while len(self.buffer) < end + length:
                yield None
            body = bytes(self.buffer[end : end + length])
            del self.buffer[: end + length]
            if head.length is None:
                body = yield from self._chunks()
            self.stage = "idle"
            yield head, body

    def _head_end(self) -> int:
        """Return where an empty line ends, 0 where there is none yet. Raises Refusal."""
        end = self.buffer.find(b"\r\n\r\n", 0, HEAD_MAX)
        head = self.buffer[: end if end >= 0 else HEAD_MAX]
        refuse_if(not HEAD_START.match(self.buffer), 400, "a malformed request line")
        refuse_if(head.count(b"\n") != head.count(b"\r\n"), 400, "a line that does not end in CRLF")
        status = 414 if head.find(b"\n", 0, LINE_MAX + 2) < 0 else 431
        refuse_if(end < 0 and len(head) == HEAD_MAX, status, "a line, or all of them, are too long")
        return end + 4 if end >= 0 else 0

    def _parse_head(self, raw: bytes) -> Head:
        line, headers = _parse_lines(raw)  # RFC 9112 section 2.2
        if not (match := REQUEST_LINE.fullmatch(line)):
            raise Refusal(400, "a malformed request line")
        method, target, major, minor = (part.decode() for part in match.groups())
        refuse_if(major != "1" or minor not in "01", 505, "this server speaks HTTP/1.1")
        hosts, is_old = headers["host"], minor == "0"
        refuse_if(len(hosts) > 1 or not (hosts or is_old), 400, "not exactly one Host header")
        refuse_if(hosts and not HOST.fullmatch(hosts[0]), 400, "a malformed Host header")
        path, mark, query = (target or "/").partition("?")
        self.head = head = Head(method, path, mark + query, is_old, headers)  # to refuse it by
        codings, lengths = headers["transfer-encoding"], headers["content-length"]
        if codings:
            refuse_if(lengths or len(codings) > 1 or is_old, 400, "a length in doubt")
            if codings[0].lower() != "chunked":  # exactly, since others may read a list otherwise
                known = all(MEMBER.fullmatch(each.strip(" ")) for each in codings[0].split(","))
                raise Refusal(501 if known else 400, "a transfer coding other than chunked")
        elif lengths and (len(lengths) > 1 or not re.fullmatch("0|[1-9][0-9]{0,18}", lengths[0])):
            raise Refusal(400, "a malformed Content-Length")
        head.length = None if codings else int(lengths[0]) if lengths else 0
        refuse_if(head.length != 0 and method in ("GET", "HEAD"), 400, "a body where none belongs")
        expected = set() if is_old else set(head.members("expect"))
        refuse_if(expected - {"100-continue"}, 417, "an expectation other than 100-continue")
        refuse_if(set(head.members("content-encoding")) - {"identity"}, 415, "a compressed body")
        head.last = "close" in head.members("connection") or is_old
        return head

    def _chunks(self) -> Generator[Any, None, bytes]:
        """Read a chunked body; extensions and trailers are dropped (RFC 9112 section 7.1)."""
        body = bytearray()
        for number in itertools.count(1):
            if number % CHUNKS_MAX == 0:
                yield False
            while (end := self.buffer.find(b"\r\n", 0, CHUNK_LINE_MAX)) < 0:
                refuse_if(len(self.buffer) >= CHUNK_LINE_MAX, 400, "a malformed chunk")
                yield None
            if not (match := CHUNK_LINE.fullmatch(self.buffer[:end])):
                raise Refusal(400, "a malformed chunk")
            size = int(match[1], 16)
            refuse_if(len(body) + size > self._body_max, 413, "the body is over MAX_MESSAGE_BYTES")
            del self.buffer[:end]  # but not its CRLF, so that what follows has one on both sides
            if size == 0:
                break
            while len(self.buffer) < size + 4:
                yield None
            refuse_if(self.buffer[size + 2 : size + 4] != b"\r\n", 400, "a malformed chunk")
            body += self.buffer[2 : size + 2]
            del self.buffer[: size + 4]
        while not (end := self._head_end()):
            yield None
        _parse_lines(b"0" + self.buffer[:end])  # as if behind the last size line
        del self.buffer[:end]
        return bytes(body)


def forwarded_for(name: Any, values: list[str], trusted: Sequence[Any]) -> str:
    """Return whom a request comes from: the last of X-Forwarded-For that no trusted proxy is."""
    client, at = address(name), name[0] if isinstance(name, tuple) else ""  # "": a Unix socket
    with contextlib.suppress(ValueError):  # what is no address ends the chain
        for hop in reversed(",".join(values).split(",")):
            if at and not any(ipaddress.ip_address(at) in network for network in trusted):
                break
            client = at = str(ipaddress.ip_address(hop.strip()))
    return client


@functools.lru_cache(64)
def _render(status: int, headers: Any, length: int, last: bool, now_s: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {PHRASES[status]}", *map(": ".join, headers)]
    lines += [f"Content-Length: {length}"] if length else []
    lines += [time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime(now_s))]
    lines += ["Connection: close"] if last else []
    return "\r\n".join([*lines, "", ""]).encode()


class HTTPConnection:
    """One client's connection, from its first byte until it closes or turns into a subscriber."""

    def __init__(self, daemon: Any, transport: Transport) -> None:
        self._daemon, self._router = daemon, daemon.router
        self.transport, self.peer, transport.protocol = transport, address(transport.peer), self
        self._reader = RequestReader(daemon.settings.max_message_bytes)
        self._closing = self._ended = self._owed = False  # last answer sent; no more asked; one due
        self._state: tuple[str, object, int] = ("", None, 0)  # what it does, and how far it is
        daemon.clients.add(self)
        if daemon.connected() > daemon.settings.max_connections:
            self._refuse(Refusal(503, "the server has as many connections as it may"))

    def data_received(self, data: bytes) -> None:
        if len(data) < FRAMES_READ_MAX and not (self._closing or self._owed):
            self.go_on(self._reader.feed(data))
        elif not self._closing:
            self._reader.buffer += data
            self.transport.later(self.go_on)

    def eof_received(self) -> bool:
        self._ended = True
        self.go_on()
        return not self._closing  # kept while an answer is owed; the last one ends it

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._daemon.clients.discard(self)
        self._reader.requests.close()  # or reader and generator, a cycle, would stay for a while

    def tick(self, now: float) -> None:
        """End the connection where it does the same for too long, by the loop's clock."""
        unsent = len(self.transport.unsent)
        doing = "write" if unsent else "linger" if self._closing else self._reader.stage
        state = doing, self._reader.head, unsent
        if state != self._state:
            new = doing == "idle" and self._reader.head is None  # which has to say something
            self._state, self._deadline = state, now + TIMEOUTS_S["head" if new else doing]
        due, idle = now >= self._deadline, doing == "idle"
        if idle and (due or self._router.stopping) and self._reader.empty and not self._owed:
            self._close()
        elif due and doing in ("write", "linger"):
            self.transport.abort()
        elif due and not idle:
            self._refuse(Refusal(408, f"the {doing} took too long"))

    def go_on(self, request: Any = None) -> None:
        if self._closing or self.transport.paused or self._owed:
            return
        try:
            if request := request or next(self._reader.requests):
                self._handle(request)
            elif request is False:
                self.transport.later(self.go_on)
            elif self._ended:
                refuse_if(not self._reader.empty, 400, "the request ended early")
                self._close()
            else:
                self.transport.read(True)
                if self._reader.wants_continue:
                    self._reader.wants_continue = False
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except Refusal as refusal:
            self._refuse(refusal)

    def _handle(self, request: tuple[Head, bytes]) -> None:
        self._state = "", None, 0  # the next head is another one
        if trusted := self._daemon.settings.trusted_proxies:
            hops = request[0].headers["x-forwarded-for"]
            self.peer = forwarded_for(self.transport.peer, hops, trusted)
        answer = self._router.process_request(self, request)
        self._owed = answer is None
        if isinstance(answer, Response):
            self.answer(answer)
        elif answer:  # a subscriber, which takes over
            early = not self._reader.empty and isinstance(answer, WebSocketSubscriber)
            refuse_if(early, 400, "bytes behind a handshake without an answer yet")
            self.connection_lost(None)  # for this side of it
            answer.take_over(self.transport, self._head(answer.response))

    def _refuse(self, refusal: Refusal) -> None:
        self.answer(self._router.refuse(self, self._reader.head, refusal), True)

    def _head(self, answer: Response, last: bool = False) -> bytes:
        self._daemon.counts["http_requests"][f'{{code="{answer.status}"}}'] += 1
        return _render(answer.status, answer.headers, len(answer.body), last, int(time.time()))

    def answer(self, response: Response, last: bool = False) -> None:
        """Write an answer, unless the last one is written already."""
        self._owed = False
        if self._closing:
            return
        body, head = response.body, self._reader.head
        last = last or head is None or head.last or self._router.stopping
        data = self._head(response, last)
        self.transport.write(data if head and head.method == "HEAD" else data + body)
        if last:
            self._close()
        elif self._ended or not (self._reader.empty and self.transport.watched & READ):
            self.transport.later(self.go_on)  # its next request

    def _close(self) -> None:
        # A close with bytes unread would reset it, and lose the answer: they are dropped a while.
        self._closing, half = True, not (self._ended or self._reader.empty)
        self._reader.buffer.clear()
        self.transport.close(half)


# --- Browser: notiflux.js, and the console that is built on it. ---

CLIENT = r"""// new Notiflux(url, {token: async topic => "...", onstatus, WebSocket}): see README.md
export class Notiflux {
  #url; #options; #socket; #timer; #ready; #topics = new Map(); #keepalive = 15; #tries = 0;
  constructor(url, options) {
    this.#options = {onstatus() {}, WebSocket: globalThis.WebSocket, ...options};
    this.#url = String(url).replace(/^http/, "ws"); this.#connect();
  }
  subscribe(topic, callback, {since = ""} = {}) {  // since: an id, "latest" or "all", to replay
    if (!/^\S+$/.test(topic)) throw new TypeError("a topic is text without spaces");
    this.#topics.set(topic, {callback, since, refused: false}); if (this.#ready) this.#join(topic);
  }
  unsubscribe(topic) { if (this.#topics.delete(topic)) this.#ready?.send(`/unsubscribe ${topic}`); }
  close() { this.#leave("closed"); clearTimeout(this.#timer); }
  #connect() {
    const socket = this.#socket = new this.#options.WebSocket(this.#url, "notiflux.v1");
    socket.onmessage = ({data}) => socket === this.#socket && this.#hear(JSON.parse(data));
    socket.onclose = socket.onerror = () => socket === this.#socket && this.#retry();
    this.#watch(); this.#options.onstatus({state: "connecting"});
  }
  #leave(state, pause) {
    const socket = this.#socket; this.#socket = this.#ready = undefined; socket?.close();
    if (pause >= 0) this.#after(pause, () => this.#connect()); this.#options.onstatus({state});
  }
  #retry() { this.#leave("waiting", Math.random() * Math.min(30_000, 1000 * 2 ** this.#tries++)); }
  #after(pause, act) { clearTimeout(this.#timer); this.#timer = setTimeout(act, pause); }
  #watch() { this.#after(2000 * this.#keepalive, () => this.#retry()); }
  async #join(topic) {
    const socket = this.#socket, known = this.#topics.get(topic);
    const current = () => socket === this.#socket && known === this.#topics.get(topic);
    try {
      const token = await this.#options.token(topic);
      if (current()) socket.send(`/subscribe ${topic} ${token} ${known.since}`);
    } catch { if (current()) this.#retry(); }
  }
  #hear({event, id, topic, topics, keepalive, replayed, recovered, error, detail, time, message}) {
    const known = this.#topics.get(topic), status = about => this.#options.onstatus(about);
    this.#keepalive = keepalive ?? this.#keepalive; this.#watch();
    if (event === "open") { this.#ready = this.#socket; status({state: "open"}); }
    const again = event === "open" ? [...this.#topics.keys()] : error && topics || [];
    for (const name of again) if (this.#topics.has(name)) this.#join(name); if (!known) return;
    if (id) { known.refused = false; this.#tries = 0; if (!replayed) known.since = id; }
    if (event === "message") known.callback(message, {topic, id, time});
    else if (event === "subscribed") status({state: event, topic, replayed, recovered});
    else if (error && !known.refused) { known.refused = true; this.#join(topic); }  // once more
    else if (error && this.#topics.delete(topic)) status({state: "refused", topic, error, detail});
  }
}"""
CONSOLE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<title>notiflux</title><meta name="viewport" content="width=device-width, initial-scale=1"><style>
  :root { color-scheme: light dark; font: 1rem/1.45 system-ui, sans-serif } small { display: block }
  body { max-width: 60rem; margin: auto; padding: 0 1rem } [name=topic] { grid-column: 1 / 3 }
  form { display: grid; grid: auto / 1fr auto; gap: .5rem } form * { font: inherit; padding: .4rem }
  li { list-style: none; overflow-wrap: anywhere; white-space: pre-wrap } output { float: right }
  output::before { content: "\25cf  "; color: #d70 } .open::before { color: #2a3 } ol { padding: 0 }
</style><h1>notiflux <output></output></h1><form autocomplete="off"><input name="topic" required
  placeholder="Topic" pattern="\S+"><input name="subscribe" placeholder="Token to subscribe">
  <button>Subscribe</button><input name="broadcast" placeholder="Token to broadcast">
  <button>Broadcast</button><textarea name="message" placeholder="Message"></textarea></form>
<ol id="messages" aria-label="Messages" aria-live="polite"></ol><script type="module">
  import {Notiflux} from "./notiflux.js"; const at = name => document.querySelector(name);
  const tokens = new Map(), show = (text, about, time = Date.now()) => {
    const [item, small] = ["li", "small"].map(name => document.createElement(name));
    small.textContent = `${new Date(time).toLocaleString()} · ${about}`;
    item.append(small, typeof text === "string" ? text : JSON.stringify(text));  // never as markup
    at("ol").prepend(item); at("ol").children[500]?.remove();
  };
  const onstatus = ({state, topic, replayed, recovered, error, detail}) => {
    const missed = recovered === false ? "messages may have been missed, " : "";
    const news = error ? `${error}: ${detail}` : `subscribed, ${missed}${replayed} from history`;
    if (topic) show(news, topic); else at("output").textContent = at("output").className = state;
  };
  const client = new Notiflux(new URL("ws", location), {token: t => tokens.get(t), onstatus});
  at("form").onsubmit = async event => { event.preventDefault();
    const {topic, message, subscribe, broadcast} = Object.fromEntries(new FormData(at("form")));
    const heard = (message, {id, time}) => show(message, `${topic} · ${id}`, time);
    if (event.submitter.textContent === "Subscribe")
      return tokens.set(topic, subscribe) && client.subscribe(topic, heard, {since: "all"});
    const body = JSON.stringify({topic, message, token: broadcast});
    const asked = fetch("broadcast", {method: "POST", body}).then(reply => reply.json());
    const said = await asked.catch(error => `no answer, so it may have happened: ${error.message}`);
    show(said.detail ?? said, `broadcast to ${topic}`);
  };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1)))
    if (name in at("form")) at("form")[name].value = value;</script>"""
POLICY = "default-src 'self' 'unsafe-inline' data:; base-uri 'none'; frame-ancestors 'none'"
PAGES = {"/": (CONSOLE.encode(), "text/html"), "/notiflux.js": (CLIENT.encode(), "text/javascript")}


# --- Observation: what the operator, Prometheus and systemd see. ---


class LogHandler(logging.Handler):
    """One record, one line of printable ASCII; none for a stuck reader, nor many that are alike."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        stderr = os.fstat(2)  # systemd.exec(5): where the journal reads, it says so
        self.journal = environment.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
        self._second, self._lines = 0, Counter[str]()  # of each event in it

    def emit(self, record: logging.LogRecord) -> None:
        if self._second != int(record.created):
            lines, self._second, self._lines = self._lines, int(record.created), Counter()
            for event, count in (lines - Counter(dict.fromkeys(lines, LINES_MAX))).items():
                log.warning("suppressed lines=%d event=%s", count, event.split(" ")[0])
        self._lines[record.msg] += 1
        with contextlib.suppress(OSError):
            if self._lines[record.msg] <= LINES_MAX and select.select([], [2], [], 0)[1]:
                os.write(2, f"{self.format(record)[:4000]}\n".encode())  # < PIPE_BUF

    def format(self, record: logging.LogRecord) -> str:
        level, line = record.levelname.lower(), printable(record.getMessage(), 2000)
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            line += f" traceback={printable(trace, 2000)}"
        priority = {"debug": 7, "info": 6, "warning": 4}.get(level, 3)  # syslog's
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return f"<{priority}>{line}" if self.journal else f"{when} {level} {line}"


def exposition(daemon: Any) -> bytes:
    """Return the metrics in Prometheus' text format, in the same time whoever is connected."""
    hub, history, counts, resident, lines = daemon.hub, daemon.hub.history, daemon.counts, 0, []
    with contextlib.suppress(OSError):  # where /proc is hidden
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    broadcasts, below = sum(hub.took), itertools.accumulate(hub.took)
    took = {f'_bucket{{le="{le}"}}': n for le, n in zip((*TOOK_S, "+Inf"), below, strict=True)}
    took |= {"_sum": hub.took_s, "_count": broadcasts}
    for name, kind, about, value in (
        ("notiflux_connections", "gauge", "Open connections", daemon.connected()),
        ("notiflux_subscriptions", "gauge", "Topics of all subscribers", hub.subscriptions),
        ("notiflux_topics", "gauge", "Topics with a subscriber", len(hub.topics)),
        ("notiflux_broadcasts_total", "counter", "Broadcasts that happened", broadcasts),
        ("notiflux_deliveries_total", "counter", "Messages queued to subscribers", hub.deliveries),
        ("notiflux_refusals_total", "counter", "Refused requests and commands", counts["refusals"]),
        ("notiflux_disconnects_total", "counter", "Subscribers that went", counts["disconnects"]),
        ("notiflux_http_requests_total", "counter", "Answered requests", counts["http_requests"]),
        ("notiflux_history_messages", "gauge", "Messages held for resume", len(history.held)),
        ("notiflux_history_bytes", "gauge", "Memory that they take", history.bytes_held),
        ("notiflux_broadcast_seconds", "histogram", "From a broadcast to its answer", took),
        ("process_cpu_seconds_total", "counter", "CPU time", time.process_time()),
        ("process_resident_memory_bytes", "gauge", "Memory", resident),
        ("process_start_time_seconds", "gauge", "When it started, since 1970", daemon.started_s),
    ):
        lines += [f"# HELP {name} {about}.", f"# TYPE {name} {kind}"]
        values = value if isinstance(value, dict) else {"": value}
        lines += [f"{name}{labels} {number}" for labels, number in values.items()]
    return "\n".join([*lines, ""]).encode()


def activated_sockets(environment: Mapping[str, str]) -> list[socket.socket]:
    """Return those on which systemd listens for us: sd_listen_fds(3). Raises SettingsError."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        found = [socket.socket(fileno=3 + n) for n in range(int(environment.get("LISTEN_FDS", "")))]
        if not all(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for one in found):
            raise ValueError
    except (OSError, ValueError) as exc:
        raise SettingsError("LISTEN_FDS: expected listening sockets, from descriptor 3 on") from exc
    return found


# --- Routes: where a path and a method become an answer. No bytes of HTTP. ---

PREFLIGHT = {"Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS"}
PREFLIGHT["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Last-Event-ID"
CORS = (("Access-Control-Allow-Origin", "*"), ("Vary", "Origin"))
JSON, NO_STORE = {"Content-Type": "application/json"}, {"Cache-Control": "no-store"}
STREAM = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"} | NO_STORE  # for nginx
PLAIN = {"topic", "message", "token"}  # most broadcasts have these, and nothing else


class Router:
    """Answers the requests that HTTPConnection read, at once or when a broadcast was queued."""

    def __init__(self, daemon: Any) -> None:
        self._daemon, self.stopping = daemon, False
        routes: dict[str, Any] = {"/broadcast": self._broadcast, "/ws": self._websocket}
        routes |= {"/sse": self._event_stream, "/messages": self._messages, "/health": self._health}
        self._routes = routes | {"/metrics": self._metrics} | dict.fromkeys(PAGES, self._page)

    def process_request(self, connection: Any, request: Any) -> Any:
        """Return a Response, a subscriber that takes over the connection, or None for later."""
        try:
            return self._route(request[0])(connection, *request)
        except Refusal as refusal:
            return self.refuse(connection, request[0], refusal)

    def refuse(self, connection: Any, head: Head | None, refusal: Refusal) -> Response:
        """Return the answer that says no, and log it; `head` as far as it was read."""
        operation = head.path.lstrip("/") if head and head.path in self._routes else ""
        self._daemon.refused(connection.peer, operation or "request", refusal)
        body = {"error": refusal.code, "detail": refusal.detail}
        return self._respond(head, refusal.status, body, refusal.headers)

    def _route(self, head: Head) -> Any:
        if origins := head.headers["origin"]:
            refuse_if(len(origins) > 1, 400, "more than one Origin header")
            refuse_if(not self._open(head), 403, "this origin is not one of ALLOWED_ORIGINS")
        path = head.path if not head.query or head.path in ("/sse", "/messages") else ""
        answer = self._routes.get(path)
        if head.method == "OPTIONS" and (answer or head.path == "*"):
            return lambda *_: self._respond(head, 204, b"", PREFLIGHT)
        if answer is None:
            raise Refusal(404, f"no such path, or no query for it: {' '.join(self._routes)}")
        methods = ("POST", "OPTIONS") if path == "/broadcast" else ("GET", "HEAD", "OPTIONS")
        if head.method not in methods:
            raise Refusal(405, f"this path takes {', '.join(methods)}", Allow=", ".join(methods))
        refuse_if(self.stopping and head.path != "/health", 503, "the server is stopping")
        return answer

    def _respond(self, head: Head | None, status: int, content: Any, more: Any) -> Response:
        if not isinstance(content, bytes):
            content, more = json.dumps(content).encode() + b"\n", JSON | more
        return Response(status, (*more.items(), *CORS[not self._open(head) :]), content)

    def _open(self, head: Head | None) -> bool:
        allowed = self._daemon.settings.allowed_origins
        origins = head.headers["origin"] if head else []
        return allowed is None or (len(origins) == 1 and origins[0].lower() in allowed)

    def _page(self, connection: Any, head: Head, data: bytes) -> Response:
        body, kind = PAGES[head.path]
        more = {"Content-Type": f"{kind}; charset=utf-8", "Content-Security-Policy": POLICY}
        return self._respond(head, 200, body, more | {"Cache-Control": "no-cache"})

    def _health(self, connection: Any, head: Head, data: bytes) -> Response:
        status, word = (503, "stopping") if self.stopping else (200, "ok")
        return self._respond(head, status, {"status": word}, NO_STORE)

    def _metrics(self, connection: Any, head: Head, data: bytes) -> Response:
        more = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"} | NO_STORE
        return self._respond(head, 200, exposition(self._daemon), more)

    def _websocket(self, connection: Any, head: Head, data: bytes) -> WebSocketSubscriber:
        upgrade = "upgrade" in head.members("connection") and not head.is_old
        asked = upgrade and head.members("upgrade") == ["websocket"] and head.method == "GET"
        refuse_if(not asked, 426, "no WebSocket handshake: a proxy in front must forward Upgrade")
        versions, keys = (head.headers[f"sec-websocket-{name}"] for name in ("version", "key"))
        good = len(versions) == len(keys) == 1 and re.fullmatch(r"[A-Za-z0-9+/]{22}==", keys[0])
        refuse_if(not good, 400, "a malformed WebSocket handshake")  # RFC 6455 section 4.2
        refuse_if(versions[0] != "13", 426, "this server speaks WebSocket version 13")
        json_mode = SUBPROTOCOL in head.members("sec-websocket-protocol", str)
        more = {"Upgrade": "websocket", "Connection": "Upgrade"}
        more |= {"Sec-WebSocket-Accept": accept_key(keys[0]), "Sec-WebSocket-Protocol": SUBPROTOCOL}
        response = Response(101, tuple(more.items())[: 3 + json_mode], b"")
        return WebSocketSubscriber(self._daemon, connection.peer, response, json_mode)

    def _bearer_tokens(self, head: Head) -> list[str]:  # RFC 6750 section 2.1
        values = head.headers["authorization"]
        return [value[7:].strip(" ") for value in values if value[:7].lower() == "bearer "]

    def _recognize(self, head: Head, data: bytes) -> Any:
        found = self._bearer_tokens(head) or TOKEN_MEMBER.findall(data.decode("latin-1"))
        refuse_if(not found, 401, "no token in so large a body: send Authorization: Bearer")
        for token in found[:4] + found[-4:]:  # a message may have others, but on one side only
            with contextlib.suppress(Refusal):
                return self._daemon.verifier.verify(token)
        return self._daemon.verifier.verify(found[0])  # which says why not

    def _broadcast(self, connection: Any, head: Head, data: bytes) -> None:
        if len(data) > STRANGER_MAX:  # others wait while it is parsed: some token has to be good
            self._recognize(head, data)
        try:
            body = parse_json(data)
        except ValueError as exc:
            raise Refusal(400, "the body is not JSON") from exc
        refuse_if(not isinstance(body, dict), 400, "the body is not a JSON object")
        plain = body.keys() == PLAIN and not head.headers["authorization"]
        if plain and type(body["topic"]) is type(body["token"]) is str and body["token"]:
            topics = check_topics([body["topic"]])
            self._daemon.verifier.authorize(body["token"], "broadcast", topics)
        else:
            refuse_if(("topic" in body) == ("topics" in body), 400, "needs either topic or topics")
            topics = [body["topic"]] if "topic" in body else body["topics"]
            refuse_if(not CLAIMS["topics"](topics), 400, "topic is a string, topics a list of them")
            topics = check_topics(topics, limit=1000)
            refuse_if("message" not in body, 400, "message is missing")
            self._authorize(head, body, "broadcast", topics)

        def done(message_id: str, delivered: int) -> None:
            content = f'{{"id": "{message_id}", "delivered": {delivered}}}\n'.encode()
            connection.answer(self._respond(head, 200, content, JSON))

        self._daemon.hub.broadcast(topics, body["message"], done)

    def _event_stream(self, connection: Any, head: Head, data: bytes) -> Response | Subscriber:
        query, more = self._query(head), {} if head.method == "HEAD" else {"Connection": "close"}
        start = self._respond(head, 200, b"", STREAM | more)
        return Subscriber(self._daemon, connection.peer, start, *query) if more else start

    def _messages(self, connection: Any, head: Head, data: bytes) -> Response:
        (topics, _, since), history = self._query(head), self._daemon.hub.history
        held, recovered = history.since(topics, since or "all")
        sizes = itertools.accumulate(message.size for message in held)
        some = [m for m, n in zip(held, sizes, strict=True) if n <= 4 * BATCH_MAX] or held[:1]
        about = {"id": some[-1].id if some != held else history.position, "recovered": recovered}
        start = dump_json(about)[:-1]
        body = f'{start},"messages":[{",".join(f"{{{m.members()}}}" for m in some)}]}}\n'.encode()
        return self._respond(head, 200, body, JSON | NO_STORE)

    def _query(self, head: Head) -> tuple[list[str], Claims, str]:
        try:
            query = urllib.parse.parse_qs(head.query[1:], True, True, errors="strict")
        except ValueError as exc:
            raise Refusal(400, "a malformed query") from exc
        topics, sinces = query.pop("topic", []), query.pop("since", [])
        refuse_if(query or sinces[1:], 400, "a query has topics, and one since at most; no token")
        topics = check_topics(topics, self._daemon.settings.max_topics)
        since = ([v for v in head.headers["last-event-id"] if v] or sinces or [""])[0]
        refuse_if(since and not SINCE.fullmatch(since), 400, "since is an id, latest or all")
        return topics, self._authorize(head, {}, "subscribe", topics), since

    def _authorize(self, head: Head, body: Any, scope: str, topics: list[str]) -> Any:
        tokens = self._bearer_tokens(head) + ([body["token"]] if "token" in body else [])
        refuse_if(tokens[1:] or head.headers["authorization"][1:], 400, "more than one token")
        refuse_if(not tokens, 401, "no token: it goes into the body, or Authorization: Bearer")
        refuse_if(type(tokens[0]) is not str or not tokens[0], 400, "token is a string")
        return self._daemon.verifier.authorize(tokens[0], scope, topics)


# --- Daemon: wires the rooms, and carries them from listening to drained. ---


class Daemon:
    """The server, run by a SelectorEventLoop(daemon.sockets). Raises SettingsError."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.verifier, self._environment = TokenVerifier(load_keys(settings)), environment
        self.started_s, allowed = time.time(), resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64
        if (settings.max_connections or 1) > allowed:
            raise SettingsError(f"MAX_CONNECTIONS: expected at most {allowed}, as open files allow")
        self.settings = replace(settings, max_connections=settings.max_connections or allowed)
        bounds = settings.history_size, settings.history_seconds, settings.history_bytes
        self.sockets, batch_max = Sockets(), min(BATCH_MAX, settings.max_buffer_bytes // 8)
        self.hub = Hub(History(*bounds), batch_max, self.sockets.call_soon)
        self.clients: set[HTTPConnection] = set()  # that may send requests
        self.beats: OrderedDict[Subscriber, float] = OrderedDict()  # and when each is due
        self.counts = defaultdict[str, Counter[Any]](Counter)  # by what, and by label
        self.router, self._stop = Router(self), asyncio.Event()
        self._tls = self._load_certificate()

    def refused(self, peer: str, op: str, refusal: Refusal) -> None:
        """Count a refusal, and log it in the one stable form that other programs may read."""
        self.counts["refusals"][f'{{reason="{refusal.code}"}}'] += 1
        log.info('refused peer=%s op=%s why=%s detail="%s"', peer, op, refusal.code, refusal.detail)

    def _load_certificate(self) -> ssl.SSLContext | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if cert := self.settings.tls_cert_file:
                context.load_cert_chain(cert, self.settings.tls_key_file, "")
        except OSError as exc:  # ssl.SSLError is one
            expected = "a certificate chain in PEM and its key"
            raise SettingsError(f"TLS_CERT_FILE, TLS_KEY_FILE: expected {expected}") from exc
        return context if cert else None

    def connected(self) -> int:
        """How many are open, of whatever kind."""
        return len(self.clients) + len(self.beats)

    async def run(self, listening: Callable[[list[str]], None] = lambda urls: None) -> None:
        """Serve until stop() is called; call `listening` with the URLs. Raises CommandError."""
        try:
            servers = await self._serve()
        except (OSError, UnicodeError) as exc:
            port = "" if self.settings.host.startswith("unix:") else f":{self.settings.port}"
            why = f"{self.settings.host}{port}: {getattr(exc, 'strerror', None) or exc}"
            raise CommandError(f"HOST, PORT: cannot listen on {why}") from exc
        urls = []
        for name in (address(listener.getsockname()) for listener in self._listeners):
            scheme = "" if name.startswith("unix:") else "https://" if self._tls else "http://"
            urls.append(scheme + name)
            log.info("listening url=%s version=%s", urls[-1], VERSION)
            if not (self._tls or name.startswith(("127.", "[::1]", "unix:"))):
                log.warning("tokens can be read on the way: url=%s has no TLS", urls[-1])
        listening(urls)
        self._notify("READY=1")
        self._sweep()
        await self._stop.wait()
        usec = int(self.settings.stop_timeout * 1e6 + 5e6)
        self._notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={usec}")
        await self._drain(servers)

    def stop(self) -> None:
        """Begin to drain; called once more, cut whoever is left."""
        for one in itertools.chain[Any](self.clients, self.beats) if self._stop.is_set() else ():
            one.transport.abort()
        self._stop.set()

    def reload(self) -> None:
        """Read keys and certificate again. Bad ones leave the old in force, and are logged."""
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            keys = load_keys(self.settings)
            self._tls = self._load_certificate()  # for those that come from now on
            self.verifier = TokenVerifier(keys)  # which remembers nothing of the old ones
            log.info("reloaded keys=%d", len(keys))
        except SettingsError as exc:
            log.error("reload failed, the old keys stay: %s", exc)
        self._notify("READY=1")

    def _notify(self, *lines: str) -> None:  # systemd, where it wants to hear: sd_notify(3)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            where = re.sub("^@", "\0", self._environment.get("NOTIFY_SOCKET", ""))
            end.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, where)

    async def _serve(self) -> list[websockets.asyncio.server.Server]:
        where: list[Any] = [{"sock": each} for each in activated_sockets(self._environment)]
        if not where and self.settings.host.startswith("unix:"):
            where = [{"unix": True, "path": self.settings.host.removeprefix("unix:")}]
            nobody = contextlib.suppress(ConnectionRefusedError, FileNotFoundError)
            with nobody, socket.socket(socket.AF_UNIX) as client:  # asyncio removes what is left
                client.setblocking(False)
                client.connect(where[0]["path"])
                raise OSError("Address already in use")
        where = where or [{"host": self.settings.host, "port": self.settings.port}]
        # Neither is called: HTTPConnection asks the router itself, and no connection needs a task.
        how: Any = {"handler": None, "process_request": self.router.process_request}
        how["start_serving"] = False  # it only binds; _accept serves
        servers = [await websockets.asyncio.server.serve(**each, **how) for each in where]
        if "path" in where[0]:
            os.chmod(where[0]["path"], 0o666)  # a proxy is another user; tokens say who may what
        silence_ms = int(2000 * self.settings.ping_interval)  # nothing acknowledged: it is gone
        self._listeners = [each.dup() for server in servers for each in server.sockets]
        for listener in self._listeners:  # copies: what asyncio has cannot accept()
            listener.listen(LISTEN_QUEUE)  # from here on _sweep accepts
            with contextlib.suppress(OSError):  # a Unix socket
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
        return servers

    def _accept(self, listener: socket.socket) -> None:
        try:
            for _ in range(ACCEPT_MAX):
                client, peer = listener.accept()
                with contextlib.suppress(OSError):  # it is gone again
                    HTTPConnection(self, Transport(client, peer, self.sockets, self._tls))
        except OSError as exc:
            if not isinstance(exc, BlockingIOError | ConnectionError):  # else nobody waits any more
                log.error("cannot accept: %s", exc.strerror)
                asyncio.get_running_loop().remove_reader(listener)  # until the next sweep

    def _sweep(self) -> None:
        loop, beats, now_s = asyncio.get_running_loop(), self.beats, time.time()
        now = loop.time()
        due = [one for one, _ in itertools.takewhile(lambda item: item[1] <= now, beats.items())]
        if not self._stop.is_set():  # then _drain calls it; first, or what fails here would end it
            pause = 0.01 if len(due) > BEATS_MAX else min(SWEEP_S, self.settings.ping_interval / 4)
            loop.call_later(pause, self._sweep)
            for listener in self._listeners:
                loop.add_reader(listener, self._accept, listener)
        for connection in tuple(self.clients):
            connection.tick(now)
        for subscriber in [one for one in beats if one.expiring]:
            if ended := [topic for topic, at_s in subscriber.expiring.items() if at_s <= now_s]:
                subscriber.end(ended)
        for subscriber in due[:BEATS_MAX]:
            beats[subscriber] = now + self.settings.ping_interval
            beats.move_to_end(subscriber)
            subscriber.beat()
        if self.connected() >= self.settings.max_connections:  # to make room
            for idle in [one for one in beats if not one.topics and one.since_s < now - 10]:
                idle.dismiss("silent")
        self.hub.history.expire(time.monotonic(), at_most=10_000)  # some 20 ms
        topics = len(self.hub.topics)
        self._notify("WATCHDOG=1", f"STATUS=connections={self.connected()} topics={topics}")

    async def _drain(self, servers: list[websockets.asyncio.server.Server]) -> None:
        loop, subscribers = asyncio.get_running_loop(), list(self.beats)
        deadline = loop.time() + self.settings.stop_timeout
        log.info("stopping connections=%d", self.connected())
        self.router.stopping = True
        for server in servers:
            server.close(close_connections=False)
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        share = math.ceil(len(subscribers) / max(1, self.settings.stop_timeout / 2 / 0.02))
        while self.connected() and loop.time() < deadline:
            for subscriber in subscribers[:share]:
                subscriber.dismiss("stopping")
            del subscribers[:share]
            await asyncio.sleep(0.02)
            self._sweep()
        log.info("stopped connections_cut=%d", self.connected())
        self.stop()  # once more: cut whoever is left
        while self.sockets.steps:  # until all are closed
            await asyncio.sleep(0)


# --- Command line: one function a command. The one place that touches the process. ---

WELCOME = """\
notiflux {v}, with a throwaway key: FOR TRYING IT OUT, NOT FOR PRODUCTION. Ctrl-C stops it.
In a browser: {url}/#topic=news&subscribe={subscribe}&broadcast={broadcast}
To subscribe: curl -N '{url}/sse?topic=news' -H 'Authorization: Bearer {subscribe}'
To broadcast: curl {url}/broadcast -d '{{"topic": "news", "message": "hi", "token": "{broadcast}"}}'
The tokens are good for every topic, until this stops. What next: README.md, "Deployment".\n"""


def _new_keys() -> tuple[bytes, bytes]:
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, spki)


def _private_key(path: str) -> ec.EllipticCurvePrivateKey:
    unsupported = cryptography.exceptions.UnsupportedAlgorithm
    with contextlib.suppress(OSError, ValueError, TypeError, unsupported):
        key = serialization.load_pem_private_key(Path(path).read_bytes(), None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
            return key
    raise CommandError(f"{path}: expected a file with an EC P-256 private key in PEM")


def _sign(key: Any, scope: str, topics: list[str], prefixes: list[str], life_s: float) -> str:
    claims = {"sub": "notiflux", "exp": int(time.time() + life_s), "scope": scope, "topics": topics}
    return jwt.encode(claims | ({"topic_prefixes": prefixes} if prefixes else {}), key, "ES256")


def _duration(text: str) -> int:
    if not (match := re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)):
        raise argparse.ArgumentTypeError("expected a number and s, m, h or d, such as 60s")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _settings(**changes: str) -> Settings:
    settings = Settings.from_environment({**os.environ, **changes})
    logging.basicConfig(handlers=[LogHandler(os.environ)], level=logging.ERROR, force=True)
    log.setLevel(settings.log_level.upper())  # below ERROR websockets logs whole frames, tokens too
    return settings


def _run(settings: Settings, listening: Callable[[list[str]], None] = lambda urls: None) -> None:
    if os.environ.get("WORKER_COUNT"):
        log.info("ignored WORKER_COUNT: one process serves all")
    daemon = Daemon(settings, os.environ)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(daemon.sockets)) as runner:
        acts = {"TERM": daemon.stop, "INT": daemon.stop, "HUP": daemon.reload}
        for name, act in (acts | dict.fromkeys(("USR1", "USR2"), lambda: None)).items():
            runner.get_loop().add_signal_handler(signal.Signals[f"SIG{name}"], act)
        gc.freeze()  # with rarer collections, a third less for a crowd that connects at once
        gc.set_threshold(50_000, 20, 50)
        runner.run(daemon.run(listening))


def _dev(options: argparse.Namespace) -> None:
    """run the daemon with a throwaway key, and print what to type next"""
    private, public = _new_keys()
    config = _settings(JWT_PUBLIC_KEY_B64=base64.b64encode(public).decode(), JWT_PUBLIC_KEY_FILE="")
    tokens = {s: _sign(private, s, [], [""], 365 * 86400) for s in ("subscribe", "broadcast")}
    _run(config, lambda urls: print(WELCOME.format(v=VERSION, url=urls[0], **tokens), flush=True))


def _keygen(options: argparse.Namespace) -> None:
    """make the key pair: private.pem signs tokens, public.pem is the daemon's"""
    (private, public), folder = _new_keys(), Path(options.directory)
    files = [(folder / "private.pem", 0o600, private), (folder / "public.pem", 0o644, public)]
    if any(path.exists() for path, _, _ in files):
        raise CommandError(f"{folder}: private.pem or public.pem is there already")
    folder.mkdir(0o700, exist_ok=True)
    for path, mode, pem in files:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(pem)
    print(f"JWT_PUBLIC_KEY_B64={base64.b64encode(public).decode()}")


def _token(options: argparse.Namespace) -> None:
    """print a token that lets its holder subscribe or broadcast"""
    path = options.key or os.environ.get("NOTIFLUX_KEY_FILE", "")
    if not path or not (options.topic or options.prefix):
        options.wrong_usage("expected --key or NOTIFLUX_KEY_FILE, and a topic or --prefix")
    key = _private_key(path)
    token = _sign(key, options.scope, options.topic, options.prefix, options.expires)
    TokenVerifier([key.public_key()]).verify(token)  # it may be too long
    print(token)


def _ask(options: Any, scope: str, path: str, body: bytes | None = None) -> Any:
    if not (options.key or options.token):  # then the environment's
        options.token, options.key = map(os.environ.get, ("NOTIFLUX_TOKEN", "NOTIFLUX_KEY_FILE"))
    if not (options.key or options.token) or not re.match(r"https?://[^/\s]", options.url):
        options.wrong_usage("expected --key or --token, and --url http://... or https://...")
    token = options.token or _sign(_private_key(options.key), scope, options.topic, [], 60)
    request = urllib.request.Request(options.url.rstrip("/") + path, body)
    request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as exc:
        if body is None and exc.code >= 500:  # may be tried again
            raise
        raise CommandError(f"{exc.code} {printable(exc.read(999).decode().strip())}") from exc


def _publish(options: argparse.Namespace) -> None:
    """broadcast a message, or standard input for -; print its id and how many it reached"""
    message = Path("/dev/stdin").read_text() if options.message == "-" else options.message
    body = dump_json({"topics": options.topic, "message": message}).encode()
    answer = _ask(options, "broadcast", "/broadcast", body).read().decode()
    if not (told := re.fullmatch(r'{"id": "(\S+)", "delivered": (\d+)}\n', answer)):
        raise CommandError(f"that is not how notiflux answers: {printable(answer)}")
    print(*told.groups())


def _events(options: Any) -> Iterable[bytes]:
    query = {"topic": options.topic, "since": options.since}
    while True:
        read = dict[bytes, bytes]()  # of an event; where the line is cut, half of one is dropped
        try:
            for line in _ask(options, "subscribe", f"/sse?{urllib.parse.urlencode(query, True)}"):
                name, _, read[name] = line.rstrip(b"\n").partition(b": ")
                if line == b"\n" and b"data" in read:  # the end of an event
                    query["since"] = read.get(b"id", query["since"])
                    yield read.pop(b"data")
        except (OSError, http.client.HTTPException) as exc:
            print(f"notiflux: {printable(str(exc))}; trying again", file=sys.stderr)
        time.sleep(random.uniform(0.5, 2))


def _subscribe(options: argparse.Namespace) -> None:
    """print messages as they come; reconnect and resume by itself"""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which ends it, without a word
    for event in map(json.loads, _events(options)):
        if event["event"] == "message":
            said = event if options.json else event["message"]
            print(said if isinstance(said, str) else dump_json(said), flush=True)
        elif event.get("recovered") is False:
            print("notiflux: messages may have been missed", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    """check settings and key, or say what a token grants"""
    verifier = Daemon(_settings(), {}).verifier
    claims = options.token and verifier.verify(options.token)
    print("settings and key are good")
    if claims:
        topics = [*sorted(claims.topics), *(f"{prefix}..." for prefix in claims.topic_prefixes)]
        print(f"{claims.scope}: {', '.join(map(printable, topics))}")
        print(f"good for another {max(0, round(claims.exp - time.time()))} s")


def _parser() -> argparse.ArgumentParser:
    epilog = "Settings, from the environment:"
    for name, one in ((each.name.upper(), each) for each in fields(Settings)):
        epilog += f"\n  {name} ({one.default or 'unset'})\n      {one.metadata['meaning']}"
    parser = argparse.ArgumentParser("notiflux.py", description=__doc__, epilog=epilog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(command=lambda options: _run(_settings()))
    commands = parser.add_subparsers(title="commands", metavar="")
    for run in (_dev, _keygen, _token, _publish, _subscribe, _check):
        added = commands.add_parser(run.__name__[1:], help=run.__doc__, description=run.__doc__)
        added.set_defaults(command=run, wrong_usage=added.error)
    add: dict[str, Any] = {name: each.add_argument for name, each in commands.choices.items()}
    add["keygen"]("directory", nargs="?", default=".", help="where to (here)")
    add["check"]("token", nargs="?")
    add["token"]("scope", choices=["subscribe", "broadcast"])
    add["token"]("--prefix", action="append", default=[], help="all topics that begin so")
    add["token"]("--expires", type=_duration, default=60, help="how long it is good (60s)")
    for name, nargs in {"token": "*", "publish": 1, "subscribe": "+"}.items():
        add[name]("topic", nargs=nargs, help="a topic that it is for")
        add[name]("--key", help="private.pem")
    add["publish"]("message")
    add["subscribe"]("--since", default="", help="an id, latest or all: what to replay first")
    add["subscribe"]("--json", action="store_true", help="one JSON object a line, with id and time")
    for name in ("publish", "subscribe"):
        add[name]("--url", default=os.environ.get("NOTIFLUX_URL") or "http://127.0.0.1:8080")
        add[name]("--token", help="or a key to make one")
    for each in (parser, *commands.choices.values()):
        each.add_argument("--version", action="version", version=f"notiflux {VERSION}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 for a failure, 78 for bad settings; argparse exits with 2."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # so that no connection becomes standard error
        pass
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        print(end="", flush=True)
    except (CommandError, Refusal, OSError, ValueError, http.client.HTTPException) as exc:
        print(f"{'<3>' * LogHandler(os.environ).journal}notiflux: {exc}", file=sys.stderr)
        if isinstance(exc, OSError):  # what cannot be written is not tried again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 78 if isinstance(exc, SettingsError) and options.command != _check else 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a word; the daemon has its own
    sys.exit(main())
