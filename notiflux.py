#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=15.0.1,<18", "PyJWT>=2.10.1,<3", "cryptography>=43.0.0,<51"]
# ///
# SPDX-License-Identifier: MIT
"""notiflux: subscribe to topics over a WebSocket, broadcast to them with one HTTP POST.

A message's way: HTTPConnection -> Router.process_request -> TokenVerifier -> Hub.broadcast
-> WebSocketSubscriber.deliver -> its socket. One process, one event loop, no threads, no locks.

A 2xx to a publisher means that the broadcast happened, exactly once; any other answer that it did
not. A subscriber that does not keep up is dropped, never waited for, and resumes from history when
it is back. No token, key or message text is ever logged. Nothing is stored for good, and nobody
can tell whether a message was read. Without a command this runs the daemon.

The rooms, each using only what stands above it: Errors, Settings, Tokens, Messages, Hub,
Subscribers, HTTP, Browser, Routes, Observation, Daemon, Command line.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("notiflux: needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2])

import argparse
import asyncio
import base64
import bisect
import contextlib
import email.utils
import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import signal
import socket
import ssl
import time
import urllib.parse
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

VERSION = "0.1.0"
INSTALL = "python3 -m venv venv && venv/bin/pip install 'websockets<18' 'PyJWT<3' cryptography"
try:
    import cryptography.exceptions
    import jwt
    import websockets.asyncio.client
    import websockets.asyncio.server
    import websockets.version
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.frames import Frame, Opcode
    from websockets.protocol import State

    for _name, _floor, _found in (
        ("websockets", (15, 0), websockets.version.version),
        ("PyJWT", (2, 10), jwt.__version__),
        ("cryptography", (43, 0), cryptography.__version__),
    ):
        if tuple(int(part) for part in re.findall(r"\d+", _found)[:2]) < _floor:
            raise ImportError(f"{_name} {_found} is too old")
except (ImportError, ValueError) as exc:  # ValueError: websockets reads variables of its own
    sys.exit(f"notiflux: cannot use a package it needs ({exc}); to install them: {INSTALL}")

LEEWAY_S = 60  # how far clocks may drift apart before a token is refused
TOKEN_MAX = 8 * 1024  # bytes of a token, before anything looks at it
TOKENS_REMEMBERED = 1024  # verified tokens kept, at most 8 MiB of them
TOPIC_MAX = 512  # bytes of a topic in UTF-8
JSON_DEPTH_MAX = 64
MESSAGE_OVERHEAD = 700  # bytes it takes to hold a message, beside its text and its topic's
REPLAY_PIECE = 16 * 1024  # bytes of a replay that may be unsent, or are sent in one turn
COMMAND_MAX = 16 * 1024  # bytes of a command: a token, a topic and room to spare
COMMANDS_REFUSED_MAX = 16
LINE_MAX = 8 * 1024  # bytes of the request line, and of one header line, without CRLF
HEAD_MAX = 16 * 1024  # bytes of a whole head, with its empty line
HEADERS_MAX = 64
HEADS_REMEMBERED = 128  # that were read without a fault, at most 2 MiB of them
CHUNK_LINE_MAX = 256  # bytes of a chunk's size line; extensions are short where they exist
READ_MAX = 32 * 1024  # bytes read at once, so that no peer keeps the loop busy for long
FRAMES_READ_MAX = 4 * 1024  # the same once they are frames: an empty one has 6 bytes
ACCEPT_MAX = 8  # connections taken in one turn; it takes some turns until a surplus one is gone
LISTEN_QUEUE = 4096  # connections that wait in the kernel
# In all, however slowly bytes come; while it writes, since the last progress.
TIMEOUTS_S = {"head": 10, "body": 10, "idle": 75, "write": 10, "linger": 0.5}
CLOSE_TIMEOUT_S = 10  # for a subscriber to take its close frame and go
SWEEP_S = 1.0  # between two looks at every connection's deadline

log = logging.getLogger("notiflux")


# --- Errors: what can go wrong, and how a peer hears of it. ---

PHRASES = {status.value: status.phrase for status in HTTPStatus}  # and, as RFC 9110 has them:
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
    """The one way to say no to a peer; `detail` is of a finite set, and has no text of the peer."""

    def __init__(self, status: int, detail: str, code: str = "", **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        known = {400: "invalid_request", 401: "invalid_token"}
        self.code = code or known.get(status) or PHRASES[status].lower().replace(" ", "_")
        self.detail = detail
        self.headers = STATUS_HEADERS.get(status, {}) | headers

    def log(self, peer: str, operation: str) -> None:
        """Log it in the one stable form that other programs may read."""
        log.info('refused peer=%s op=%s why=%s detail="%s"', peer, operation, self.code, self)


def refuse_if(condition: object, status: int, detail: str, code: str = "") -> None:
    """Raise that Refusal if `condition` holds."""
    if condition:
        raise Refusal(status, detail, code)


def printable(text: str, limit: int = 200) -> str:
    """Return `text` in printable ASCII, escaped as Python would, cut to `limit` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return cut.encode("unicode_escape").decode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := dict(pairs)) != len(pairs):
        raise ValueError("duplicate name")
    return names


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):  # nor is it read alike everywhere
        raise ValueError("not a number, or out of range")
    return value


JSON_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_float=_finite,
    parse_int=lambda digits: int(digits) if len(digits) < 300 or _finite(digits) else 0,
    parse_constant=_finite,
)
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """Return the JSON value in `data` (RFC 8259). Raises ValueError for anything else.

    Also for duplicate names, numbers beyond a double, unpaired surrogates, and more than 64 levels.
    """
    text = data.decode()
    try:
        value = JSON_DECODER.decode(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if text.count("[") + text.count("{") > JSON_DEPTH_MAX:
        level: list[Any] = [[value]]
        for _ in range(JSON_DEPTH_MAX + 1):  # level by level, since recursion has its own limit
            inner = (each.values() if type(each) is dict else each for each in level)
            level = [i for i in itertools.chain.from_iterable(inner) if type(i) in (dict, list)]
        if level:
            raise ValueError("nested too deeply")
    if SURROGATE_ESCAPE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


# Compact JSON text of a value, its characters as they are.
dump_json = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


# --- Settings: what can be set. One table; parsing, errors and help all come from it. ---


def _number(kind: str, pattern: str, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(pattern, text) or not low <= float(text) <= high:
            raise ValueError(f"{kind} from {low} to {high}")
        return int(text) if text.isdigit() else float(text)

    return parse


_whole = functools.partial(_number, "a whole number", r"[0-9]{1,18}")
_seconds = functools.partial(_number, "seconds", r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


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

    host: str = setting(str, "127.0.0.1", "address to listen on; unix:/path for a Unix socket")
    port: int = setting(_whole(0, 65535), "8080", "0 picks a free one and logs it")
    jwt_public_key_b64: str | None = setting(str, "", "base64 of a PEM with public keys")
    jwt_public_key_file: str | None = setting(str, "", "path of such a PEM; read again on SIGHUP")
    history_size: int = setting(_whole(0, 10**4), "100", "messages held per topic; 0 holds none")
    history_seconds: float = setting(_seconds(0, 10**8), "600", "how long they are kept")
    history_bytes: int = setting(_whole(0, 2**40), "67108864", "for all; the oldest go first")
    max_connections: int = setting(_whole(1, 10**7), "", "further ones get 503 (open files)")
    max_topics: int = setting(_whole(1, 10**6), "1000", "topics one connection may subscribe to")
    max_message_bytes: int = setting(_whole(1, 2**30), "1048576", "largest body of a POST")
    max_buffer_bytes: int = setting(_whole(1, 2**31), "4194304", "unsent ones drop a subscriber")
    ping_interval: float = setting(_seconds(0.1, 86400), "15", "seconds; silent for two: dropped")
    stop_timeout: float = setting(_seconds(0, 86400), "5", "seconds a stop may take")
    allowed_origins: frozenset[str] | None = setting(_origins, "", "pages from elsewhere get 403")
    tls_cert_file: str | None = setting(str, "", "serve https and wss with this certificate")
    tls_key_file: str | None = setting(str, "", "and this key")
    log_level: str = setting(_level, "info", "debug, info, warning or error")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the settings. Raises SettingsError that names the variable and what it expects."""
        values = {}
        for setting_ in fields(cls):
            name = setting_.name.upper()
            try:
                if text := environment.get(name, ""):
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
    except (ValueError, cryptography.exceptions.UnsupportedAlgorithm) as exc:
        raise ValueError("a PEM block that is no public key") from exc
    kind = type(key).__name__.strip("_").removesuffix("PublicKey")
    if isinstance(key, PublicKey):
        if isinstance(key.curve, ec.SECP256R1):
            return key
        kind = key.curve.name.replace("secp384r1", "P-384").replace("secp521r1", "P-521")
    raise ValueError(f"{'an' if kind[0] in 'RE' else 'a'} {kind} key")  # RSA, Ed25519; DSA


def load_keys(settings: Settings) -> tuple[PublicKey, ...]:
    """Return the public keys, at least one. Raises SettingsError that says what is wrong."""
    encoded, path = settings.jwt_public_key_b64 or "", settings.jwt_public_key_file or ""
    if bool(encoded) == bool(path):
        raise SettingsError(
            "JWT_PUBLIC_KEY_B64, JWT_PUBLIC_KEY_FILE: expected exactly one of them; "
            "'notiflux.py keygen' makes a key, 'notiflux.py dev' runs without"
        )
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


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says (RFC 7519 section 4). Times are seconds since 1970."""

    scope: str
    topics: frozenset[str]
    topic_prefixes: tuple[str, ...]
    exp: int
    nbf: int
    expire_at: float  # infinite where there is none


def is_texts(value: Any) -> bool:
    """Tell whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def parse_claims(payload: Any) -> Claims:
    """Return the claims in a token's payload. Raises Refusal for a missing or wrong one."""
    refuse_if(not isinstance(payload, dict), 401, "the token is malformed")
    refuse_if("aud" in payload, 401, "the token is for another audience: it has a claim aud")
    checks: dict[str, Callable[[Any], bool]] = {
        "sub": lambda value: isinstance(value, str),
        "scope": lambda value: value in ("subscribe", "broadcast"),
        **dict.fromkeys(("topics", "topic_prefixes"), is_texts),
        **dict.fromkeys(("exp", "nbf", "expire_at"), lambda v: type(v) is int and 0 <= v <= 2**53),
    }
    required = {"sub", "scope", "exp"} | ({"topics"} if "topic_prefixes" not in payload else set())
    for name, good in checks.items():
        wrong = not good(payload[name]) if name in payload else name in required
        refuse_if(wrong, 401, f"the token's claim {name} is missing or wrong")
    get = payload.get
    grants = frozenset(get("topics", ())), tuple(get("topic_prefixes", ()))
    return Claims(get("scope"), *grants, get("exp"), get("nbf", 0), get("expire_at", math.inf))


class TokenVerifier:
    """Verifies ES256 tokens (RFC 7515, RFC 7519); remembers those that passed all but time."""

    def __init__(self, keys: Iterable[PublicKey], clock: Callable[[], float] = time.time) -> None:
        self._jws = jwt.PyJWS(algorithms=["ES256"])
        self._clock = clock
        remember = functools.lru_cache(TOKENS_REMEMBERED)
        self._claims = remember(lambda token: parse_claims(self._decode(token)))
        self.replace_keys(keys)

    def replace_keys(self, keys: Iterable[PublicKey]) -> None:
        """Trust these keys from now on, and no others."""
        self._keys = tuple(keys)
        self._claims.cache_clear()

    def authorize(self, token: str, scope: str, topics: Iterable[str]) -> Claims:
        """Return the claims of a token that grants `scope` on `topics`. Raises Refusal."""
        claims, code = self.verify(token), "insufficient_scope"
        refuse_if(claims.scope != scope, 403, f"this takes a token with scope {scope}", code)
        granted = all(t in claims.topics or t.startswith(claims.topic_prefixes) for t in topics)
        refuse_if(not granted, 403, "the token does not grant this topic", code)
        return claims

    def verify(self, token: str) -> Claims:
        """Return the claims of a good token. Raises Refusal (401) with the check it fails."""
        claims, now = self._claims(token), self._clock()
        refuse_if(now >= claims.exp + LEEWAY_S, 401, "the token has expired")
        refuse_if(now < claims.nbf - LEEWAY_S, 401, "the token is not valid yet")
        refuse_if(now >= claims.expire_at, 401, "the token's expire_at has passed")
        return claims

    def _decode(self, token: str) -> Any:
        """Return the payload, once a key was found that signed it. Raises Refusal (401)."""
        well_formed = len(token) <= TOKEN_MAX and TOKEN.fullmatch(token)
        refuse_if(not well_formed, 401, "the token is malformed")
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


# --- Messages: what is sent, and what is held of it. No sockets, no tokens. ---

CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f-\x9f]")
BAD_SINCE = "since is an id, latest or all"
SINCE = re.compile(r"latest|all|[0-9a-f]{1,32}-[0-9]{1,19}")


def check_topics(topics: list[str], limit: int = 1) -> list[str]:
    """Return each topic once. Raises Refusal for a bad one, for none, and for more than `limit`."""
    refuse_if(not 1 <= len(topics) <= limit, 400, f"at least one topic, and at most {limit}")
    for topic in topics:
        refuse_if(not 1 <= len(topic.encode()) <= TOPIC_MAX, 400, "a topic is 1 to 512 bytes long")
        refuse_if(CONTROL_CHARACTER.search(topic), 400, "a topic has no control characters")
    return list(dict.fromkeys(topics))


def text_frame(payload: bytes) -> bytes:
    """Return an unmasked WebSocket text frame (RFC 6455 section 5.2), the same for every client."""
    return Frame(Opcode.TEXT, payload).serialize(mask=False)


def event_lines(event: str, data: str, event_id: str = "") -> bytes:
    """Return an event of an event stream (HTML Living Standard section 9.2)."""
    about = f"id: {event_id}\n" if event_id else ""
    return f"{about}event: {event}\ndata: {data}\n\n".encode()


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

    @property
    def members(self) -> str:
        """What JSON says about it, without the braces."""
        text = self.payload.decode()
        value, topic = dump_json(text) if self.is_text else text, dump_json(self.topic)
        return f'"topic":{topic},"id":"{self.id}","time":{self.time_ms},"message":{value}'

    def plain_frame(self) -> bytes:
        """Return it for plain mode: a string as it is, another value as its JSON text."""
        return text_frame(self.payload)

    def json_frame(self) -> bytes:
        """Return it for JSON mode."""
        return text_frame(f'{{"event":"message",{self.members}}}'.encode())

    def event_lines(self) -> bytes:
        """Return it for an event stream."""
        return event_lines("message", f'{{"event":"message",{self.members}}}', self.id)


class History:
    """Numbers the messages, and holds the last ones of each topic for those who come back.

    An id is `<epoch>-<seq>`: epoch is random per start, seq counts up over all topics. What is
    held has bounds: `size` messages of a topic, `seconds` of age, `bytes_max` bytes in all.
    """

    def __init__(self, size: int, seconds: float, bytes_max: int) -> None:
        self._size, self._seconds, self._bytes_max = size, seconds, bytes_max
        self._epoch = secrets.token_hex(4)
        self._seq = 0
        self._held: OrderedDict[int, Message] = OrderedDict()  # by seq
        # A topic's seqs: the newest that is not held any more, then those that are, at least one.
        self._topics: dict[str, list[int]] = {}
        self._forgotten = 0  # the newest seq of all topics of which nothing is held any more
        self.bytes_held = 0

    @property
    def position(self) -> str:
        """The id of the newest message; where the server is now."""
        return f"{self._epoch}-{self._seq}"

    def add(self, topic: str, payload: bytes, is_text: bool = True) -> Message:
        """Return `payload` as the next message on `topic`, and hold it within the bounds."""
        self._seq += 1
        size = MESSAGE_OVERHEAD + sys.getsizeof(payload) + sys.getsizeof(topic)
        times = time.time_ns() // 10**6, time.monotonic()
        message = Message(self.position, topic, payload, is_text, size, *times)
        self._held[self._seq] = message
        self.bytes_held += size
        seqs = self._topics.setdefault(topic, [self._forgotten])
        seqs.append(self._seq)
        if len(seqs) - 1 > self._size:
            self._forget(seqs[1])
        while self.bytes_held > self._bytes_max:
            self._forget(next(iter(self._held)))
        self.expire(message.added_s, at_most=2)  # so that it shrinks faster than it grows
        return message

    def expire(self, now_s: float, at_most: int) -> None:
        """Forget what is too old by the monotonic clock, up to `at_most` messages."""
        for seq, message in list(itertools.islice(self._held.items(), at_most)):
            if now_s - message.added_s < self._seconds:
                break
            self._forget(seq)

    def _forget(self, seq: int) -> None:
        """Hold that message no more, which is its topic's oldest."""
        message = self._held.pop(seq)
        self.bytes_held -= message.size
        seqs = self._topics[message.topic]
        del seqs[0]  # which puts this one into its place
        if len(seqs) == 1:
            del self._topics[message.topic]
            self._forgotten = max(self._forgotten, seq)
        if not self._topics:  # what is deleted from them does not shrink the tables
            self._topics, self._held = {}, OrderedDict()

    def since(self, topics: Iterable[str], since: str) -> tuple[list[Message], bool]:
        """Return what is held of `topics` after `since`, oldest first, and whether that is all.

        `since` is an id, "all" (as is an id never given), or "latest": the newest of each topic.
        """
        epoch, _, number = since.partition("-")
        known = epoch == self._epoch and int(number) <= self._seq
        after = int(number) if known else -1
        lists = [self._topics.get(topic, [self._forgotten]) for topic in topics]
        newer = [seqs[bisect.bisect(seqs, after, lo=1) :] for seqs in lists]
        if since == "latest":
            newer = [seqs[-1:] for seqs in newer]
        messages = [self._held[seq] for seq in sorted(itertools.chain(*newer))]
        return messages, known and all(after >= seqs[0] for seqs in lists)


# --- Hub: who listens to which topic. No I/O, no await. ---


class Hub:
    """The one owner of who listens to what: s in topics[t] if and only if t in s.topics.

    No set of `topics` is empty. A subscriber is anything with a set `topics`, which the hub alone
    changes, a function `encode` that makes its frames, and a `deliver` that queues one at once.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.topics: dict[str, set[Any]] = {}

    def subscribe(self, subscriber: Any, topic: str) -> None:
        """Let `subscriber` hear what is broadcast to `topic` from now on; once is enough."""
        self.topics.setdefault(topic, set()).add(subscriber)
        subscriber.topics.add(topic)

    def unsubscribe(self, subscriber: Any, topic: str) -> None:
        """Let it hear nothing more of `topic`; nothing happens where it was not subscribed."""
        if topic in subscriber.topics:
            subscriber.topics.discard(topic)
            self.topics[topic].discard(subscriber)
            if not self.topics[topic]:
                del self.topics[topic]

    def broadcast(self, topics: Sequence[str], value: Any) -> tuple[str, int]:
        """Queue `value` on each topic; return the last message's id, and to how many in all."""
        delivered, is_text = 0, isinstance(value, str)
        payload = (value if is_text else dump_json(value)).encode()
        for topic in topics:
            message = self.history.add(topic, payload, is_text)
            frames: dict[Any, bytes] = {}  # by what made them, each once
            # A copy, since a subscriber that proves too slow leaves while it is delivered to.
            for subscriber in tuple(self.topics.get(topic, ())):
                encode = subscriber.encode
                frame = frames.get(encode) or frames.setdefault(encode, encode(message))
                delivered += subscriber.deliver(frame)
        return self.history.position, delivered


@dataclass(frozen=True, slots=True)
class Shared:
    """What every connection works with."""

    settings: Settings
    verifier: TokenVerifier
    hub: Hub
    connections: set[Any]  # all that are open, of whatever kind


# --- Subscribers: a WebSocket with its commands, and an event stream. ---

SUBPROTOCOL: Any = "notiflux.v1"
PING_FRAME = Frame(Opcode.PING, b"").serialize(mask=False)
INVALID_SUBSCRIBE = "Invalid subscribe command, it should be: /subscribe <topic> <token>"


def address(name: Any) -> str:
    """Return a socket's name for log and URL: address:port, or unix: and its path."""
    if not isinstance(name, tuple):
        return f"unix:{name or ''}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


class BaseSubscriber(asyncio.Protocol):
    """What both kinds have in common: what they hear, how fast, and until when.

    Whole frames go straight to the transport, beside the library's. One with more than
    MAX_BUFFER_BYTES unsent is slow, and dropped. A replay may be larger: it goes out piece by
    piece, as fast as the peer takes it, and what is sent meanwhile waits behind it.
    """

    __slots__ = (  # since more than 30 attributes in a dict cost 1 KiB (Python 3.11 to 3.13)
        *("_shared", "_hub", "_settings", "_loop", "peer", "topics", "encode", "_expiring"),
        *("_replay", "_behind", "_paused", "_beat_at", "_abort"),
    )
    # each kind in its own way
    tell: Callable[..., None]  # queue an event
    beat: Callable[[], None]  # keep the line alive, and see whether it is
    end: Callable[[list[str]], None]  # end subscriptions whose expire_at has come
    dismiss: Callable[[int, str], None]  # close behind what is queued
    transport: asyncio.Transport

    def __init__(self, shared: Shared, encode: Callable[[Message], bytes]) -> None:
        self._shared = shared
        self._hub = shared.hub
        self._settings = shared.settings
        self._loop = asyncio.get_running_loop()
        # per connection
        self.topics: set[str] = set()
        self.encode = encode
        self._expiring: dict[str, float] = {}  # topic: when its subscription ends, since 1970
        self._replay: deque[Message | bytes] | None = None  # what waits, while there is one
        self._behind = 0  # bytes of the frames in it, which were not there at its start
        self._paused = False  # by the transport, until the peer has taken what is unsent
        self._beat_at = self._loop.time() + shared.settings.ping_interval
        self._abort: asyncio.TimerHandle | None = None  # set once it is on its way out

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(self._settings.max_buffer_bytes)
        self.peer = address(transport.get_extra_info("peername"))
        self._shared.connections.add(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = True
        self.transport.pause_reading()  # or its pings would go on adding pongs
        if self._replay is None:
            self._drop()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused = False
        self.transport.resume_reading()
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.connections.discard(self)
        self._retire().cancel()  # commands may still be queued, and are not obeyed any more
        log.debug("disconnected peer=%s", self.peer)
        super().connection_lost(exc)

    def deliver(self, frame: bytes) -> bool:
        """Queue a frame, unless the connection is on its way out; say whether it was."""
        if self._abort is not None:
            return False
        if self._replay is None:
            self.transport.write(frame)
            return True
        self._replay.append(frame)
        self._behind += len(frame)
        if self._behind > self._settings.max_buffer_bytes:
            self._drop()
        return self._abort is None

    def tick(self, now: float) -> None:
        """Look at what is due by the loop's clock: a ping, or a subscription's end."""
        if self._expiring and (ended := [t for t, s in self._expiring.items() if s <= time.time()]):
            self.end(ended)
        if now >= self._beat_at and self._abort is None:
            self._beat_at = now + self._settings.ping_interval
            self.beat()

    def _follow(self, topics: Sequence[str], claims: Claims, since: str, /, **about: Any) -> None:
        """Subscribe, and replay what came after `since`: one stream with what comes live."""
        messages, recovered = self._hub.history.since(topics, since) if since else ([], False)
        self._forget(topics if since else ())  # another replay of them is not wanted any more
        for topic in topics:
            self._hub.subscribe(self, topic)
            self._expiring.pop(topic, None)
            if claims.expire_at < math.inf:
                self._expiring[topic] = claims.expire_at
        about |= {"id": self._hub.history.position, "replayed": len(messages)}
        self.tell("subscribed", **about, **({"recovered": recovered} if "-" in since else {}))
        if messages and self._abort is None:
            if self._replay is None:
                self._replay = deque()
                self.transport.set_write_buffer_limits(REPLAY_PIECE)
            self._replay += messages
            self._pump()

    def _pump(self) -> None:
        """Send the next piece of a replay, unless the peer has yet to take the last one."""
        if self._replay is None or self._paused:
            return
        piece = bytearray()
        while self._replay and len(piece) < REPLAY_PIECE:
            item = self._replay.popleft()
            self._behind -= len(item) if isinstance(item, bytes) else 0
            piece += item if isinstance(item, bytes) else self.encode(item)
        if piece:
            self.transport.write(piece)
            self._loop.call_soon(self._pump)  # after the others had their turn
        else:
            self._replay = None
            self.transport.set_write_buffer_limits(self._settings.max_buffer_bytes)

    def _forget(self, topics: Sequence[str]) -> None:
        for topic in topics:
            self._hub.unsubscribe(self, topic)
            self._expiring.pop(topic, None)
        if self._replay is not None:
            gone = set(topics)
            waits = (m for m in self._replay if isinstance(m, bytes) or m.topic not in gone)
            self._replay = deque(waits)

    def _drop(self) -> None:
        """Give up a subscriber that is too slow; it may come back and resume."""
        if self._abort is None:
            log.warning("dropped peer=%s why=slow topics=%d", self.peer, len(self.topics))
            self._retire()
            # Not now: a library may be in the middle of writing several frames.
            self._loop.call_soon(self.dismiss, 4100, "too slow: reconnect and resume")

    def _retire(self) -> asyncio.TimerHandle:
        """Leave every topic, obey nothing more, and see to it that the connection ends."""
        if self._abort is None:
            self._replay = None
            self._forget(tuple(self.topics))
            self._abort = self._loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)
        return self._abort


class WebSocketSubscriber(BaseSubscriber, websockets.asyncio.server.ServerConnection):
    """One WebSocket connection: the library's own, which also hears from the hub."""

    def __init__(self, shared: Shared, *arguments: Any, json_mode: bool, **options: Any) -> None:
        encode = Message.json_frame if json_mode else Message.plain_frame
        BaseSubscriber.__init__(self, shared, encode)
        websockets.asyncio.server.ServerConnection.__init__(self, *arguments, **options)
        self.protocol.available_subprotocols = [SUBPROTOCOL] if json_mode else None
        self._refused = 0
        self._unanswered = 0  # pings

    def connection_made(self, transport: Any) -> None:
        # What a client sends ahead of the 101 would be answered ahead of it, too.
        transport.pause_reading()
        super().connection_made(transport)
        # Or the library reads on once it has obeyed what it had (15.0 to 17.4): endless pongs.
        self.recv_messages.resume = lambda: self._paused or transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._unanswered = 0
        super().data_received(data)
        if self.state in (State.CLOSING, State.CLOSED):
            self._retire()

    def dismiss(self, code: int, reason: str) -> None:
        if self.state is State.OPEN:
            # The library's own close would wait for a peer that takes nothing (15.0 to 17.4).
            self.protocol.send_close(code, reason)
            self.transport.write(b"".join(self.protocol.data_to_send()))
        self._retire()

    def tell(self, event: str, plain: str = "", **members: Any) -> None:
        if self.subprotocol or plain:
            text = dump_json({"event": event, **members}) if self.subprotocol else plain
            self.deliver(text_frame(text.encode()))

    def tick(self, now: float) -> None:
        if self.state is State.OPEN:
            super().tick(now)
        elif self.state is not State.CONNECTING:
            self._retire()

    def beat(self) -> None:
        # Counted, not timed: after a pause of the whole machine nobody is to blame.
        if self._unanswered >= 2:
            log.info("dropped peer=%s why=silent topics=%d", self.peer, len(self.topics))
            self.transport.abort()
            return
        self._unanswered += not self._paused  # or its pongs are not read
        self.transport.write(PING_FRAME)
        self.tell("keepalive")

    def end(self, topics: list[str]) -> None:
        self._forget(topics)
        for topic in topics:
            plain = f"Subscription to {topic} expired"
            self.tell("unsubscribed", plain, topics=[topic], error="token_expired")

    async def run(self) -> None:
        """Obey commands until the connection is closed."""
        for done_with in (self.request, self.response):
            cast(Any, done_with).headers.clear()  # 2 KiB
        self.transport.resume_reading()
        self.tell("open", id=self._hub.history.position, keepalive=self._settings.ping_interval)
        with contextlib.suppress(ConnectionClosed):
            async for text in self:
                if isinstance(text, str) and self._abort is None:
                    self._obey(text.strip())

    def _obey(self, text: str) -> None:
        """Obey one command; the grammar is the Rust program's: words, one space between them."""
        command, _, rest = text.partition(" ")
        words = rest.split(" ")
        if command == "/subscribe" and rest and (len(words) not in (2, 3) or not all(words)):
            self._refuse("subscribe", Refusal(400, INVALID_SUBSCRIBE))
        elif command == "/subscribe" and rest:
            self._subscribe(*words)
        elif command == "/unsubscribe" and rest:
            self._unsubscribe([rest])
        elif text == "/unsubscribe-all":
            self._unsubscribe(sorted(self.topics))
        elif text.startswith("/"):
            self._refuse("command", Refusal(400, "Unknown command"))

    def _subscribe(self, topic: str, token: str, since: str = "") -> None:
        try:
            check_topics([topic])
            claims = self._shared.verifier.authorize(token, "subscribe", [topic])
            refuse_if(since and not SINCE.fullmatch(since), 400, BAD_SINCE)
            full = topic not in self.topics and len(self.topics) >= self._settings.max_topics
            refuse_if(full, 403, "this connection has as many topics as it may")
        except Refusal as refusal:
            self._refuse("subscribe", refusal, topic)
        else:
            self._follow([topic], claims, since, topic=topic)

    def _unsubscribe(self, topics: list[str]) -> None:
        self._forget(topics)
        self.tell("unsubscribed", topics=topics)

    def _refuse(self, operation: str, refusal: Refusal, topic: str | None = None) -> None:
        """Answer a refused command; the last one that is allowed ends the connection."""
        refusal.log(self.peer, operation)
        if topic is not None and CONTROL_CHARACTER.search(topic):  # the answer is one line
            topic = printable(topic)
        command = "/subscribe" if operation == "subscribe" else None
        about = {"error": refusal.code, "detail": refusal.detail, "command": command}
        start = "" if topic is None else f"Not allowed to subscribe to {topic}: "
        self.tell("error", start + refusal.detail, **about, topic=topic)
        self._refused += 1
        if self._refused >= COMMANDS_REFUSED_MAX:
            self.dismiss(1008, "too many refused commands")


class EventStream(BaseSubscriber):
    """One event stream, a GET /sse whose answer does not end; what still comes in is dropped."""

    def __init__(self, shared: Shared, head: Any, topics: list[str], *how: Any) -> None:
        super().__init__(shared, Message.event_lines)
        self.head = head
        self._start = functools.partial(self._follow, topics, *how, topics=topics)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def dismiss(self, code: int, reason: str) -> None:
        self._retire()
        self.transport.close()

    def tell(self, event: str, **members: Any) -> None:
        # What is replayed has ids of its own, which the client must not be ahead of.
        event_id = "" if members.get("replayed") else members.get("id", "")
        self.deliver(event_lines(event, dump_json({"event": event, **members}), event_id))

    def beat(self) -> None:
        self.deliver(b":\n\n")

    def end(self, topics: list[str]) -> None:
        self._replay = None
        self.tell("unsubscribed", topics=topics, error="token_expired")
        self.dismiss(1000, "token_expired")


# --- HTTP: bytes to requests, answers to bytes. Knows no topics and no tokens. ---

HEAD_START = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z\r-]")  # TLS may have no line's end, ever
HEAD_END = re.compile(rb"\r\n\r\n|(?<!\r)\n")  # or a line that does not end in CRLF
REQUEST_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) "
    # RFC 3986's characters, no control characters behind a %, no fragment; RFC 9112 section 3.2
    rb"(?:[hH][tT][tT][pP][sS]?://([0-9A-Za-z.:\[\]_-]+))?"
    rb"(\*|(?:/(?:[0-9A-Za-z._~!$&'()*+,;=:@/?-]|%(?:[2-689A-Fa-f][0-9A-Fa-f]|7[0-9A-Ea-e]))*)?)"
    rb" HTTP/([0-9])\.([0-9])"
)
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
HOST = re.compile(r"(?:[0-9A-Za-z._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
MEMBER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CONTENT_LENGTH = re.compile(r"0|[1-9][0-9]{0,18}")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?")
TOO_LARGE = "the body is larger than MAX_MESSAGE_BYTES"
HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
)


@dataclass(slots=True, eq=False)
class Request:
    """One request; `headers` has the values of each name, which is in lower case."""

    method: str
    path: str
    version: tuple[int, int]
    headers: defaultdict[str, list[str]]
    body: bytes = b""

    def tokens(self, name: str) -> list[str]:
        """Return a list-valued header's members, lower case. Raises Refusal where it is none."""
        if name not in self.headers:
            return []
        parts = ",".join(self.headers[name]).lower().split(",")
        members = [text for part in parts if (text := part.strip(" \t"))]  # RFC 9110 section 5.6.1
        refuse_if(not all(map(MEMBER.fullmatch, members)), 400, "a malformed header")
        return members


@dataclass(slots=True)
class Response:
    """One answer; `body` is empty where there is none."""

    status: int
    headers: dict[str, str]
    body: bytes


def _parse_headers(lines: Iterable[bytes]) -> defaultdict[str, list[str]]:
    headers = defaultdict(list)
    for line in lines:
        if not (match := HEADER_LINE.fullmatch(line)):
            raise Refusal(400, "a malformed header")
        value = match[2].strip(b" \t").decode("latin-1")
        headers[match[1].decode().lower()].append(value)
    return headers


def _split(head: bytes) -> list[bytes]:
    """Return the lines of a head or trailer. Raises Refusal: 414 where the first is too long."""
    lines = head.split(b"\r\n")[:-2]
    if max(map(len, lines)) > LINE_MAX:
        raise Refusal(414 if len(lines[0]) > LINE_MAX else 431, "a line that is too long")
    refuse_if(len(lines) - 1 > HEADERS_MAX, 431, "more headers than are read")
    return lines


@functools.lru_cache(HEADS_REMEMBERED)  # one who stays sends the same head again and again
def _parse_head(head: bytes) -> tuple[str, str, tuple[int, int], defaultdict[str, list[str]]]:
    """Return method, path, version and headers. Raises Refusal."""
    lines = _split(head)
    if not lines[0]:  # one empty line is tolerated: RFC 9112 section 2.2
        del lines[0]
    if not lines or not (match := REQUEST_LINE.fullmatch(lines[0])):
        raise Refusal(400, "a malformed request line")
    method, authority, target, major, minor = (part.decode() for part in match.groups(b""))
    elsewhere = authority and (target == "*" or not HOST.fullmatch(authority))
    if elsewhere or not (authority or target) or (target == "*" and method != "OPTIONS"):
        raise Refusal(400, "a malformed request line")
    refuse_if(major != "1" or minor not in "01", 505, "this server speaks HTTP/1.1")
    headers = _parse_headers(lines[1:])
    hosts = headers["host"]
    refuse_if(len(hosts) > 1 or (not hosts and minor == "1"), 400, "not exactly one Host header")
    refuse_if(hosts and not HOST.fullmatch(hosts[0]), 400, "a malformed Host header")
    return method, target or "/", (1, int(minor)), headers


def _body_length(request: Request, most: int) -> int | None:
    """Return the body's length, None for chunked (RFC 9112 section 6). Raises Refusal."""
    codings, lengths = request.headers["transfer-encoding"], request.headers["content-length"]
    if codings:
        doubtful = lengths or len(codings) > 1 or request.version == (1, 0)
        refuse_if(doubtful, 400, "a length in doubt")
        if codings[0].lower() != "chunked":  # exactly, since others may read a list otherwise
            known = all(MEMBER.fullmatch(member.strip(" ")) for member in codings[0].split(","))
            raise Refusal(501 if known else 400, "a transfer coding other than chunked")
    elif lengths and (len(lengths) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0])):
        raise Refusal(400, "a malformed Content-Length")
    length = None if codings else int(lengths[0]) if lengths else 0
    refuse_if(length != 0 and request.method in ("GET", "HEAD"), 400, "a body where none belongs")
    if request.version == (1, 1) and set(request.tokens("expect")) - {"100-continue"}:
        raise Refusal(417, "an expectation other than 100-continue")
    refuse_if(set(request.tokens("content-encoding")) - {"identity"}, 415, "a compressed body")
    refuse_if((length or 0) > most, 413, TOO_LARGE)
    return length


class RequestReader:
    """Reads requests from bytes, strictly: a full match or a Refusal, never a repair.

    No I/O, no clock. How the bytes were cut changes nothing; after a Refusal there is no more.
    """

    def __init__(self, body_max: int) -> None:
        self._body_max = body_max
        self._buffer = bytearray()
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
            self.stage, self.request = "head", None
            refuse_if(not HEAD_START.match(self._buffer), 400, "a malformed request line")
            self.request = request = Request(*_parse_head((yield from self._head())))
            length = _body_length(request, self._body_max)
            if length != 0:
                self.stage = "body"
                expected = request.version == (1, 1) and "100-continue" in request.tokens("expect")
                self.wants_continue = expected and not self._buffer
                body = self._chunks() if length is None else self._exactly(length)
                request.body = yield from body
            self.stage = "idle"
            yield request
            request.body = b""  # or an idle connection would keep it

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _head(self) -> Generator[None, None, bytes]:
        """Read lines through an empty one. Raises Refusal where that is too far away."""
        start = 0
        while not (end := HEAD_END.search(self._buffer, start, HEAD_MAX)):
            if len(self._buffer) >= HEAD_MAX:
                long = self._buffer.find(b"\n", 0, LINE_MAX + 2) < 0
                raise Refusal(414 if long else 431, "a line, or all lines together, are too long")
            start = max(0, len(self._buffer) - 3)
            yield
        refuse_if(end[0] == b"\n", 400, "a line that does not end in CRLF")
        return (yield from self._exactly(end.end()))

    def _chunks(self) -> Generator[None, None, bytes]:
        """Read a chunked body; extensions and trailers are dropped (RFC 9112 section 7.1)."""
        body = bytearray()
        while True:
            while (end := self._buffer.find(b"\r\n", 0, CHUNK_LINE_MAX)) < 0:
                refuse_if(len(self._buffer) >= CHUNK_LINE_MAX, 400, "a malformed chunk")
                yield
            if not (match := CHUNK_LINE.fullmatch(self._buffer[:end])):
                raise Refusal(400, "a malformed chunk")
            size = int(match[1], 16)
            refuse_if(len(body) + size > self._body_max, 413, TOO_LARGE)
            del self._buffer[:end]  # but not its CRLF, so that what follows has one on both sides
            if size == 0:
                _parse_headers(_split((yield from self._head()))[1:])
                return bytes(body)
            chunk = yield from self._exactly(size + 4)
            refuse_if(not chunk.endswith(b"\r\n"), 400, "a malformed chunk")
            body += chunk[2:-2]


@functools.lru_cache(1)
def _date(now_s: int) -> str:
    return email.utils.formatdate(now_s, usegmt=True)


class HTTPConnection(asyncio.Protocol):
    """One client's connection, from its first byte until it closes or turns into a subscriber."""

    def __init__(self, shared: Shared, router: Any, *arguments: Any, **options: Any) -> None:
        self._shared = shared
        self._router = router
        # per connection
        self._make_websocket = functools.partial(WebSocketSubscriber, shared, *arguments, **options)
        self._reader = RequestReader(shared.settings.max_message_bytes)
        self.transport: asyncio.Transport
        self._paused = False  # by the transport, until the client has taken what is unsent
        self._closing = False  # the last answer is written
        self._ended = False  # the client sends nothing more
        # per request
        self._state: tuple[str, object, int] = ("", None, 0)  # what it does, and how far it is
        self._deadline = 0.0  # for that, by the loop's clock

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.peer = address(transport.get_extra_info("peername"))
        # An attribute of asyncio's socket transports (3.11 to 3.13); elsewhere it does nothing.
        self.transport.max_size = READ_MAX  # type: ignore[attr-defined]
        self._shared.connections.add(self)
        if len(self._shared.connections) > self._shared.settings.max_connections:
            self._refuse(Refusal(503, "the server has as many connections as it may"))

    def data_received(self, data: bytes) -> None:
        if not self._closing:
            self._reader.feed(data)
            self._advance()

    def eof_received(self) -> bool:
        self._ended = True
        self._advance()
        return not self._closing  # kept while an answer is owed; the last one ends it

    def pause_writing(self) -> None:
        self._paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self.transport.resume_reading()
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._shared.connections.discard(self)

    def tick(self, now: float) -> None:
        """End the connection where it does the same for too long, by the loop's clock."""
        unsent = self.transport.get_write_buffer_size()
        doing = "write" if unsent else "linger" if self._closing else self._reader.stage
        state = doing, self._reader.request, unsent
        if state != self._state:
            new = doing == "idle" and self._reader.request is None  # which has to say something
            self._state, self._deadline = state, now + TIMEOUTS_S["head" if new else doing]
        if doing == "idle" and (now >= self._deadline or self._router.stopping):
            self._close()
        elif now >= self._deadline and doing in ("write", "linger"):
            self.transport.abort()
        elif now >= self._deadline:
            self._refuse(Refusal(408, f"the {doing} took too long"))

    def _advance(self) -> None:
        """Answer every request that is complete, then see to it that more bytes come."""
        try:
            while not self._closing and not self._paused:
                if request := self._reader.next_request():
                    self._answer(request)
                    if not (self._closing or self._reader.empty):  # others have their turn first
                        self.transport.pause_reading()
                        asyncio.get_running_loop().call_soon(self._advance)
                        break
                elif self._ended:
                    refuse_if(not self._reader.empty, 400, "the request ended early")
                    self._close()
                else:
                    self.transport.resume_reading()
                    if self._reader.wants_continue:
                        self._reader.wants_continue = False
                        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    break
        except Refusal as refusal:
            self._refuse(refusal)

    def _answer(self, request: Request) -> None:
        self._state = "", None, 0  # the next head is another one
        # May refuse, so before anything happens. RFC 9112 section 9.3.
        last = "close" in request.tokens("connection") or request.version == (1, 0)
        response = self._router.process_request(self, request)
        if response is None:  # a WebSocket
            refuse_if(not self._reader.empty, 400, "bytes behind a handshake without an answer yet")
            offers = ",".join(request.headers["sec-websocket-protocol"])
            json_mode = SUBPROTOCOL in re.split("[, \t]+", offers)  # case matters
            websocket = self._make_websocket(json_mode=json_mode)
            self._hand_over(websocket)
            # What was checked, and nothing else that a client may have put around it.
            offer = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n" if json_mode else ""
            key = f"Sec-WebSocket-Key: {request.headers['sec-websocket-key'][0]}\r\n"
            websocket.data_received(f"{HANDSHAKE}{key}{offer}\r\n".encode())
        elif isinstance(response, EventStream):
            response.head.headers["Connection"] = "close"
            self._write(request, response.head, False)
            self._hand_over(response)
        else:
            self._write(request, response, last or self._router.stopping)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what could not be read as a request, and end the connection."""
        request = self._reader.request
        self._write(request, self._router.refuse(self, request, refusal), True)

    def _write(self, request: Request | None, response: Response, last: bool) -> None:
        response.headers["Date"] = _date(int(time.time()))
        if last:
            response.headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {response.status} {PHRASES[response.status]}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        body = b"" if request and request.method == "HEAD" else response.body
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        if last:
            self._close()

    def _close(self) -> None:
        """End the connection so that the client can read the last answer.

        To close a socket with bytes unread would reset it: so where more may come, only our side
        is closed, and what still comes is read and dropped for a while.
        """
        self._closing = True
        if self._ended or self._reader.empty or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.resume_reading()
            self.transport.write_eof()

    def _hand_over(self, protocol: asyncio.Protocol) -> None:
        self._closing = True
        self._shared.connections.discard(self)
        self.transport.max_size = FRAMES_READ_MAX  # type: ignore[attr-defined]
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)


# --- Browser: notiflux.js, and the console that is built on it. ---

CLIENT = r"""// new Notiflux(url, {token: async topic => "...", onstatus, WebSocket}), in Node too:
// reconnects, and resumes each topic after its last message with a fresh token. onstatus hears
// {state}: connecting, open, waiting, closed; and of one topic {topic, state}: subscribed (with
// recovered: false where messages may be missing) or refused ({error, detail}).
export class Notiflux {
  #url; #options; #socket; #timer; #topics = new Map(); #ready = false; #keepalive = 15; #tries = 0;
  constructor(url, options) {
    this.#url = String(url).replace(/^http/, "ws");
    this.#options = {onstatus() {}, WebSocket: globalThis.WebSocket, ...options};
    this.#connect();
  }
  // callback(message, {topic, id, time}); since is an id, "latest" or "all", to replay first
  subscribe(topic, callback, {since = ""} = {}) {
    if (!/^\S+$/.test(topic)) throw new TypeError("a topic is text without spaces");
    this.#topics.set(topic, {callback, since, refused: false});
    if (this.#ready) this.#join(topic);
  }
  unsubscribe(topic) {
    if (this.#topics.delete(topic) && this.#ready) this.#socket.send(`/unsubscribe ${topic}`);
  }
  close() { this.#leave("closed"); }
  #connect() {
    const socket = this.#socket = new this.#options.WebSocket(this.#url, "notiflux.v1");
    const current = act => event => { if (socket === this.#socket) act(event); };
    socket.onmessage = current(({data}) => this.#hear(JSON.parse(data)));
    socket.onclose = current(() => this.#retry());
    socket.onerror = () => {};  // a close follows
    this.#watch();
    this.#options.onstatus({state: "connecting"});
  }
  #leave(state) {
    const socket = this.#socket;
    [this.#socket, this.#ready] = [undefined, false];  // what it still says comes too late
    clearTimeout(this.#timer);
    socket?.close();
    this.#options.onstatus({state});
  }
  #retry() {
    this.#leave("waiting");
    const most = Math.min(30_000, 1000 * 2 ** this.#tries++);
    this.#timer = setTimeout(() => this.#connect(), Math.random() * most);
  }
  #watch() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#retry(), 2000 * this.#keepalive);
  }
  async #join(topic) {
    const socket = this.#socket, subscription = this.#topics.get(topic);
    const current = () => socket === this.#socket && subscription === this.#topics.get(topic);
    try {
      const token = await this.#options.token(topic);
      if (current()) socket.send(`/subscribe ${topic} ${token} ${subscription.since}`);
    } catch {
      if (current()) this.#retry();
    }
  }
  #hear({event, id, topic, topics, keepalive, replayed, recovered, error, detail, ...rest}) {
    const subscription = this.#topics.get(topic);
    this.#keepalive = keepalive ?? this.#keepalive;
    this.#watch();
    if (event === "open") {
      this.#ready = true;
      this.#options.onstatus({state: "open"});
      for (const name of this.#topics.keys()) this.#join(name);
    } else if (event === "unsubscribed" && error) {
      for (const name of topics) if (this.#topics.has(name)) this.#join(name);
    } else if (event === "error" && subscription && !subscription.refused) {
      subscription.refused = true;  // a fresh token may help, once
      this.#join(topic);
    } else if (event === "error" && subscription) {
      this.#topics.delete(topic);
      this.#options.onstatus({state: "refused", topic, error, detail});
    } else if (event === "subscribed" && subscription) {
      [subscription.refused, this.#tries] = [false, 0];
      if (!replayed) subscription.since = id;
      this.#options.onstatus({state: "subscribed", topic, replayed, recovered});
    } else if (event === "message" && subscription) {
      subscription.since = id;
      subscription.callback(rest.message, {topic, id, time: rest.time});
    }
  }
}
"""

CONSOLE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>notiflux</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.45 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 0 1rem }
  main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) }
  form { padding: 0 1rem 1rem; border: 1px solid #8888 }
  form, label { display: grid; gap: .4rem; align-content: start }
  input, textarea, button { font: inherit; padding: .4rem; min-width: 0 }
  #state { float: right; font-size: 1rem; font-weight: normal } small { display: block }
  #state::before { content: "\25cf  "; color: #d70 } #state[data-state=open]::before { color: #2a3 }
  ol { list-style: none; padding: 0; overflow-wrap: anywhere } label, small { font-size: .9rem }
  li { border-top: 1px solid #8888; padding: .4rem 0; white-space: pre-wrap }
</style>
<h1>notiflux <output id="state"></output></h1><main>
<form id="subscribe"><h3>Subscribe</h3>
  <label>Token <input name="token" required autocomplete="off"></label>
  <label>Topic <input name="topic" required pattern="\S+"></label>
  <button>Subscribe</button>
</form>
<form id="broadcast"><h3>Broadcast</h3>
  <label>Token <input name="token" required autocomplete="off"></label>
  <label>Topic <input name="topic" required></label>
  <label>Message <textarea name="message" rows="2"></textarea></label>
  <button>Broadcast</button> <output id="answer"></output>
</form></main>
<ol id="messages" aria-label="Messages" aria-live="polite"></ol>
<script type="module">
  import {Notiflux} from "./notiflux.js";
  const at = id => document.getElementById(id), tokens = new Map();
  const show = (text, about, time = Date.now()) => {
    const [item, small] = ["li", "small"].map(name => document.createElement(name));
    small.textContent = `${new Date(time).toLocaleString()} · ${about}`;
    item.append(small, text);  // as text, never as markup
    at("messages").prepend(item);
    if (at("messages").childElementCount > 500) at("messages").lastChild.remove();
  };
  const onstatus = ({state, topic, replayed, recovered, error, detail}) => {
    const missed = recovered === false ? "messages may have been missed, " : "";
    if (!topic) at("state").textContent = at("state").dataset.state = state;
    else if (state === "refused") show(`${error}: ${detail}`, topic);
    else show(`subscribed, ${missed}${replayed} from history`, topic);
  };
  const client = new Notiflux(new URL("ws", location), {token: t => tokens.get(t), onstatus});
  at("subscribe").onsubmit = event => {
    event.preventDefault();
    const {token, topic} = Object.fromEntries(new FormData(event.target));
    const text = message => typeof message === "string" ? message : JSON.stringify(message);
    const heard = (message, {id, time}) => show(text(message), `${topic} · ${id}`, time);
    tokens.set(topic, token);
    client.subscribe(topic, heard, {since: "all"});
  };
  at("broadcast").onsubmit = async event => {
    event.preventDefault();
    const body = JSON.stringify(Object.fromEntries(new FormData(event.target)));
    try {
      const answer = await (await fetch("broadcast", {method: "POST", body})).json();
      at("answer").textContent = answer.error ? answer.detail : JSON.stringify(answer);
    } catch (error) {
      at("answer").textContent = `no answer, so it may or may not have happened: ${error.message}`;
    }
  };
  const given = new URLSearchParams(location.hash.slice(1));
  for (const form of document.forms)
    for (const [field, name] of [["token", form.id], ["topic", "topic"]])
      form.elements[field].value = given.get(name) ?? "";
</script>
"""

INLINE = re.findall(r"<(?:style|script)[^>]*>(.*?)</", CONSOLE, re.DOTALL)
STYLE, SCRIPT = (base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in INLINE)
POLICY = (
    f"default-src 'none'; script-src 'self' 'sha256-{SCRIPT}'; style-src 'sha256-{STYLE}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGES = {"/": (CONSOLE.encode(), "text/html"), "/notiflux.js": (CLIENT.encode(), "text/javascript")}


# --- Routes: where a path and a method become an answer. No bytes of HTTP. ---

PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
}
STREAM = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # or nginx would gather events before it sends them on
}
WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64: RFC 6455 section 4.1


class Router:
    """Answers requests: those that HTTPConnection read, and those that websockets asks about."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.stopping = False
        read = ["GET", "HEAD"]
        self._routes: dict[str, tuple[list[str], Any]] = {
            "/broadcast": (["POST"], self._broadcast),
            "/ws": (read, self._websocket),
            "/sse": (read, self._event_stream),
            "/messages": (read, self._messages),
            "/health": (read, self._health),
            **dict.fromkeys(PAGES, (read, self._page)),
        }

    def process_request(self, connection: Any, request: Any) -> Any:
        """Return a Response, an EventStream, or None for a WebSocket: the hook of serve()."""
        if not isinstance(request, Request):  # websockets asks about what was handed over to it
            return None
        try:
            return self._route(request)
        except Refusal as refusal:
            return self.refuse(connection, request, refusal)

    def refuse(self, connection: Any, request: Request | None, refusal: Refusal) -> Response:
        """Return the answer that says no, and log it; `request` as far as it was read."""
        path = request.path.partition("?")[0] if request else ""
        operation = path.lstrip("/") if path in self._routes else ""
        refusal.log(connection.peer, operation or "request")
        body = {"error": refusal.code, "detail": refusal.detail}
        return self._respond(request, refusal.status, body, refusal.headers)

    def _route(self, request: Request) -> Any:
        origins, allowed = request.headers["origin"], self._shared.settings.allowed_origins
        refuse_if(len(origins) > 1, 400, "more than one Origin header")
        elsewhere = origins and allowed is not None and origins[0].lower() not in allowed
        refuse_if(elsewhere, 403, "this origin is not one of ALLOWED_ORIGINS")
        path, query, _ = request.path.partition("?")
        methods, answer = self._routes.get(path, ([], None))
        if query and path not in ("/sse", "/messages"):
            answer = None
        if request.method == "OPTIONS" and (answer or path == "*"):
            return self._respond(request, 204, b"", PREFLIGHT)
        if answer is None:
            raise Refusal(404, f"no such path, or no query for it: {' '.join(self._routes)}")
        if request.method not in methods:
            allow = ", ".join([*methods, "OPTIONS"])
            raise Refusal(405, f"this path takes {allow}", Allow=allow)
        refuse_if(self.stopping and path != "/health", 503, "the server is stopping")
        return answer(request)

    def _respond(self, request: Request | None, status: int, content: Any, more: Any) -> Response:
        """Return a response with `content`: bytes as they are, anything else as its JSON."""
        headers, body = {**more}, content
        if not isinstance(content, bytes):
            body = json.dumps(content).encode() + b"\n"
            headers["Content-Type"] = "application/json"
        if body:
            headers["Content-Length"] = str(len(body))
        allowed = self._shared.settings.allowed_origins
        origins = request.headers["origin"] if request else []
        if allowed is None or (len(origins) == 1 and origins[0].lower() in allowed):
            headers["Access-Control-Allow-Origin"] = "*"
        headers["Vary"] = "Origin"
        return Response(status, headers, body)

    def _page(self, request: Request) -> Response:
        body, kind = PAGES[request.path]
        more = {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"}
        return self._respond(request, 200, body, more | {"Content-Security-Policy": POLICY})

    def _health(self, request: Request) -> Response:
        status, word = (503, "stopping") if self.stopping else (200, "ok")
        return self._respond(request, status, {"status": word}, {"Cache-Control": "no-store"})

    def _websocket(self, request: Request) -> None:
        """Raise Refusal unless this is a good WebSocket handshake (RFC 6455 section 4.2.1)."""
        upgrade = "upgrade" in request.tokens("connection") and request.version == (1, 1)
        if not upgrade or request.tokens("upgrade") != ["websocket"] or request.method != "GET":
            why = "no WebSocket handshake: a proxy in front probably did not forward Upgrade"
            raise Refusal(426, why)
        versions, keys = (request.headers[f"sec-websocket-{name}"] for name in ("version", "key"))
        good = len(versions) == len(keys) == 1 and WEBSOCKET_KEY.fullmatch(keys[0])
        refuse_if(not good, 400, "a malformed WebSocket handshake")
        refuse_if(versions[0] != "13", 426, "this server speaks WebSocket version 13")
        request.tokens("sec-websocket-protocol")

    def _broadcast(self, request: Request) -> Response:
        try:
            body = parse_json(request.body)
        except ValueError as exc:
            raise Refusal(400, "the body is not JSON") from exc
        refuse_if(not isinstance(body, dict), 400, "the body is not a JSON object")
        refuse_if(("topic" in body) == ("topics" in body), 400, "either topic or topics is needed")
        topics = [body["topic"]] if "topic" in body else body["topics"]
        refuse_if(not is_texts(topics), 400, "topic is a string, topics a list of strings")
        topics = check_topics(topics, limit=1000)
        refuse_if("message" not in body, 400, "message is missing")
        self._authorize(request, body, "broadcast", topics)
        message_id, delivered = self._shared.hub.broadcast(topics, body["message"])
        return self._respond(request, 200, {"id": message_id, "delivered": delivered}, {})

    def _event_stream(self, request: Request) -> Response | EventStream:
        query, head = self._query(request), self._respond(request, 200, b"", STREAM)
        return head if request.method == "HEAD" else EventStream(self._shared, head, *query)

    def _messages(self, request: Request) -> Response:
        topics, _, since = self._query(request)
        history, room = self._shared.hub.history, self._shared.settings.max_buffer_bytes
        found, recovered = history.since(topics, since or "all")
        sizes = itertools.accumulate(message.size for message in found)
        page = [m for m, size in zip(found, sizes, strict=True) if size <= room] or found[:1]
        position = history.position if page == found else page[-1].id
        items = ",".join(f"{{{message.members}}}" for message in page)
        body = f'{{"id":"{position}","recovered":{dump_json(recovered)},"messages":[{items}]}}\n'
        more = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        return self._respond(request, 200, body.encode(), more)

    def _query(self, request: Request) -> tuple[list[str], Claims, str]:
        """Return the topics and `since` of a query, and what grants it. Raises Refusal."""
        try:
            query = request.path.partition("?")[2]
            pairs = urllib.parse.parse_qsl(query, True, True, errors="strict")
        except ValueError as exc:
            raise Refusal(400, "a malformed query") from exc
        topics, sinces = ([v for name, v in pairs if name == n] for n in ("topic", "since"))
        known = len(sinces) <= 1 and len(topics) + len(sinces) == len(pairs)
        refuse_if(not known, 400, "a query has topics, and one since at most; no token")
        topics = check_topics(topics, self._shared.settings.max_topics)
        since = ([v for v in request.headers["last-event-id"] if v] or sinces or [""])[0]
        refuse_if(since and not SINCE.fullmatch(since), 400, BAD_SINCE)
        return topics, self._authorize(request, {}, "subscribe", topics), since

    def _authorize(self, request: Request, body: Any, scope: str, topics: list[str]) -> Claims:
        """Return the claims of the token in the header or the body. Raises Refusal."""
        headers = request.headers["authorization"]
        tokens = [value[7:].strip(" ") for value in headers if value[:7].lower() == "bearer "]
        tokens += [body["token"]] if "token" in body else []
        refuse_if(len(headers) > 1 or len(tokens) > 1, 400, "more than one token")
        refuse_if(not tokens, 401, "no token: it goes into the body, or Authorization: Bearer")
        refuse_if(not isinstance(tokens[0], str) or not tokens[0], 400, "token is a string")
        return self._shared.verifier.authorize(tokens[0], scope, topics)


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
    """Log to standard error; to the journal where that is `journal_stream` (systemd.exec(5))."""
    stderr = os.fstat(sys.stderr.fileno()) if journal_stream else None
    handler = logging.StreamHandler()
    journal = stderr is not None and journal_stream == f"{stderr.st_dev}:{stderr.st_ino}"
    handler.setFormatter(LogFormatter(journal))
    # Below that websockets logs whole frames, tokens included.
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    log.setLevel(level.upper())


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


class Daemon:
    """The server. All of it runs in the loop that calls run(). Raises SettingsError."""

    def __init__(self, settings: Settings) -> None:
        verifier = TokenVerifier(load_keys(settings))
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64
        if (settings.max_connections or 1) > allowed:
            raise SettingsError(f"MAX_CONNECTIONS: expected at most {allowed}, as open files allow")
        self.settings = replace(settings, max_connections=settings.max_connections or allowed)
        self.connections: set[HTTPConnection | WebSocketSubscriber | EventStream] = set()
        bounds = settings.history_size, settings.history_seconds, settings.history_bytes
        self.hub = Hub(History(*bounds))
        self._shared = Shared(self.settings, verifier, self.hub, self.connections)
        self._router = Router(self._shared)
        self._tls = _tls_context(settings)
        self._stop = asyncio.Event()

    async def run(self, listening: Callable[[list[str]], None] = lambda urls: None) -> None:
        """Serve until stop() is called; call `listening` with the URLs. Raises CommandError."""
        try:
            server = await self._serve()
        except (OSError, UnicodeError) as exc:
            port = "" if self.settings.host.startswith("unix:") else f":{self.settings.port}"
            why = f"{self.settings.host}{port}: {getattr(exc, 'strerror', None) or exc}"
            raise CommandError(f"HOST, PORT: cannot listen on {why}") from exc
        for listener in server.sockets:
            # asyncio takes as many at once as may wait: too many then fail with EMFILE.
            with socket.socket(fileno=os.dup(listener.fileno())) as same:
                same.listen(LISTEN_QUEUE)
            with contextlib.suppress(AttributeError, OSError):  # Linux: a peer that acknowledges
                silence_ms = int(2000 * self.settings.ping_interval)  # nothing is gone
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
        names = [address(listener.getsockname()) for listener in server.sockets]
        scheme = "https://" if self._tls else "http://"
        urls = [name if name.startswith("unix:") else scheme + name for name in names]
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
            self._shared.verifier.replace_keys(keys)
            log.info("reloaded keys=%d", len(keys))
        except SettingsError as exc:
            log.error("reload failed, the old keys stay: %s", exc)

    async def _serve(self) -> websockets.asyncio.server.Server:
        settings = self.settings
        where: dict[str, Any] = {"host": settings.host, "port": settings.port}
        if settings.host.startswith("unix:"):
            where = {"unix": True, "path": settings.host.removeprefix("unix:")}
            with socket.socket(socket.AF_UNIX) as client:  # asyncio removes one that nobody serves
                client.setblocking(False)
                error = client.connect_ex(where["path"]) or errno.EADDRINUSE
            if error not in (errno.ECONNREFUSED, errno.ENOENT):
                raise OSError(error, os.strerror(error))

        connection = functools.partial(HTTPConnection, self._shared, self._router)
        return await websockets.asyncio.server.serve(
            WebSocketSubscriber.run,  # type: ignore[arg-type]
            **where,
            create_connection=connection,  # type: ignore[arg-type]
            process_request=self._router.process_request,
            compression=None,
            server_header=None,
            max_size=COMMAND_MAX,
            ping_interval=None,  # _sweep pings everybody, without a task for each
            close_timeout=CLOSE_TIMEOUT_S,
            ssl=self._tls,
            backlog=ACCEPT_MAX,
        )

    def _sweep(self) -> None:
        """Look at every connection's deadlines, again and again."""
        loop = asyncio.get_running_loop()
        if not self._stop.is_set():  # then _drain calls it
            loop.call_later(min(SWEEP_S, self.settings.ping_interval / 4), self._sweep)
        for connection in tuple(self.connections):
            connection.tick(loop.time())
        self.hub.history.expire(time.monotonic(), at_most=10_000)  # some 20 ms

    async def _drain(self, server: websockets.asyncio.server.Server) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.stop_timeout
        log.info("stopping connections=%d", len(self.connections))
        self._router.stopping = True
        server.close(close_connections=False)  # the listening sockets, at once
        for connection in tuple(self.connections):
            if isinstance(connection, BaseSubscriber):
                connection.dismiss(1012, "the server restarts: reconnect after a random pause")
        while self.connections and loop.time() < deadline:
            await asyncio.sleep(0.02)
            self._sweep()
        log.info("stopped connections_cut=%d", len(self.connections))
        # Not wait_closed(): from Python 3.12 on it waits for TLS handshakes, which nothing can cut.
        self._cut()

    def _cut(self) -> None:
        for connection in tuple(self.connections):
            connection.transport.abort()


# --- Command line: one function a command. The one place that touches the process. ---

WELCOME = """\
notiflux {version}, with a throwaway key: FOR TRYING IT OUT, NOT FOR PRODUCTION. Ctrl-C stops it.
In a browser:
   {url}/#topic=news&subscribe={subscribe}&broadcast={broadcast}
In two more terminals:
   {python} {file} subscribe news --url {url} --token {subscribe}
   curl {url}/broadcast -d '{{"topic": "news", "message": "hello", "token": "{broadcast}"}}'
The tokens are good for every topic, until this stops. What next: README.md, "Deployment".
"""


def _new_keys() -> tuple[bytes, bytes]:
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, spki)


def _private_key(path: str) -> ec.EllipticCurvePrivateKey:
    with contextlib.suppress(ValueError, TypeError, cryptography.exceptions.UnsupportedAlgorithm):
        try:
            key = serialization.load_pem_private_key(Path(path).read_bytes(), None)
        except OSError as exc:
            raise CommandError(f"cannot read {path}: {exc.strerror}") from exc
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
            return key
    raise CommandError(f"{path}: expected an EC P-256 private key in PEM")


def _sign(key: Any, scope: str, topics: list[str], prefixes: list[str], expires_s: float) -> str:
    claims = {"sub": "notiflux", "exp": int(time.time() + expires_s), "scope": scope}
    claims |= {"topics": topics} | ({"topic_prefixes": prefixes} if prefixes else {})
    return jwt.encode(claims, key, "ES256")


def _client_token(options: argparse.Namespace, scope: str, topics: list[str]) -> str:
    """Return the token that a client command was given, or a new one made with its key."""
    given = options.token or ("" if options.key else os.environ.get("NOTIFLUX_TOKEN"))
    path = options.key or os.environ.get("NOTIFLUX_KEY_FILE", "")
    if not given and not path:
        options.wrong_usage("expected --token, --key, NOTIFLUX_TOKEN or NOTIFLUX_KEY_FILE")
    return given or _sign(_private_key(path), scope, topics, [], 60)


def _duration(text: str) -> int:
    if not (match := re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)):
        raise argparse.ArgumentTypeError("expected a number and s, m, h or d, such as 60s")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _settings(**changes: str) -> Settings:
    settings = Settings.from_environment({**os.environ, **changes})
    start_logging(settings.log_level, os.environ.get("JOURNAL_STREAM", ""))
    return settings


async def _serve(settings: Settings, listening: Callable[[list[str]], None]) -> None:
    """Run the daemon in this process, with its signals."""
    if os.environ.get("WORKER_COUNT"):
        log.info("ignored WORKER_COUNT: one process serves all")
    daemon, loop = Daemon(settings), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, daemon.stop)
    loop.add_signal_handler(signal.SIGINT, daemon.stop)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    gc.freeze()  # with rarer collections, a third less for a crowd that connects at once
    gc.set_threshold(50_000, 20, 50)
    await daemon.run(listening)


def run_command(options: argparse.Namespace) -> None:
    """run the daemon; its settings come from the environment"""
    asyncio.run(_serve(_settings(), lambda urls: None))


def dev_command(options: argparse.Namespace) -> None:
    """run the daemon with a throwaway key, and print what to type next"""
    private, public = _new_keys()
    encoded = base64.b64encode(public).decode()
    settings = _settings(JWT_PUBLIC_KEY_B64=encoded, JWT_PUBLIC_KEY_FILE="")

    def welcome(urls: list[str]) -> None:
        tokens = {s: _sign(private, s, [], [""], 365 * 86400) for s in ("subscribe", "broadcast")}
        places = {"url": urls[0], "python": sys.executable, "file": sys.argv[0]}
        print(WELCOME.format(version=VERSION, **places, **tokens), flush=True)

    asyncio.run(_serve(settings, welcome))


def keygen_command(options: argparse.Namespace) -> None:
    """make the key pair: private.pem signs tokens, public.pem is the daemon's"""
    private, public = _new_keys()
    files = [("private.pem", 0o600, private), ("public.pem", 0o644, public)]
    if any(Path(options.directory, name).exists() for name, _, _ in files):
        raise CommandError(f"{options.directory}: private.pem or public.pem is there already")
    for name, mode, pem in files:
        path = Path(options.directory, name)
        try:
            path.parent.mkdir(0o700, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(pem)
        except OSError as exc:
            raise CommandError(f"cannot write {path}: {exc.strerror}") from exc
    print(f"JWT_PUBLIC_KEY_B64={base64.b64encode(public).decode()}")


def token_command(options: argparse.Namespace) -> None:
    """print a token that lets its holder subscribe or broadcast"""
    if not options.key or not (options.topic or options.prefix):
        options.wrong_usage("expected --key or NOTIFLUX_KEY_FILE, and a topic or --prefix")
    key = _private_key(options.key)
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
        Daemon(settings)
        claims = options.token and TokenVerifier(load_keys(settings)).verify(options.token)
    except (SettingsError, Refusal) as exc:
        raise CommandError(str(exc)) from exc
    print("settings and key are good")
    if claims:
        topics = [*sorted(claims.topics), *(prefix + "..." for prefix in claims.topic_prefixes)]
        print(f"{claims.scope}: {', '.join(map(printable, topics))}")
        print(f"good for another {max(0, round(claims.exp - time.time()))} s")


def publish_command(options: argparse.Namespace) -> None:
    """broadcast one message, and print its id and how many it reached"""
    import http.client  # large, and of no use to the daemon
    import urllib.request

    token, message = _client_token(options, "broadcast", [options.topic]), options.message
    try:
        if message == "-":
            message = sys.stdin.buffer.read().decode().removesuffix("\n")
        body = json.dumps({"topic": options.topic, "message": message, "token": token}).encode()
        with urllib.request.urlopen(f"{options.url}/broadcast", body, timeout=30) as response:
            answer = json.load(response)
            print(answer["id"], answer["delivered"])
    except urllib.error.HTTPError as exc:
        said = ""
        with contextlib.suppress(OSError, http.client.HTTPException):  # a proxy's, cut off
            said = printable(exc.read(1000).decode(errors="replace").strip(), 1000)
        raise CommandError(f"not broadcast: {exc.code} {said}") from exc
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as exc:
        raise CommandError(f"no answer, so it may or may not have happened: {exc}") from exc


def _print_event(event: Any, positions: dict[str, str], as_json: bool) -> Iterable[str]:
    """Print what there is to print, and return which topics to subscribe to after it."""
    kind, topic = event["event"], event.get("topic")
    if kind == "error":
        raise CommandError(f"{topic}: {event['detail']}")
    if kind == "subscribed" and event.get("recovered") is False:
        print(f"notiflux: {topic}: messages may have been missed", file=sys.stderr)
    if kind == "message" or (kind == "subscribed" and not event["replayed"]):
        positions[topic] = event["id"]
    if kind == "message":
        text = event if as_json else event["message"]
        print(text if isinstance(text, str) else dump_json(text), flush=True)
    return positions if kind == "open" else event["topics"] if kind == "unsubscribed" else ()


async def _print_messages(options: argparse.Namespace) -> None:
    "".join(options.topic).encode()  # or what cannot be sent would be tried for ever
    positions = dict.fromkeys(options.topic, options.since)

    def failed(exc: Exception) -> Exception | None:
        print(f"notiflux: cannot connect: {exc}", file=sys.stderr)
        # The library's own choice: None to try again. Not exported (15.0 to 17.4).
        return websockets.asyncio.client.process_exception(exc)  # type: ignore[attr-defined]

    url, offered = re.sub("^http", "ws", options.url) + "/ws", [SUBPROTOCOL]
    connect = functools.partial(websockets.asyncio.client.connect, process_exception=failed)
    async for connection in connect(url, subprotocols=offered, max_size=None):
        with contextlib.suppress(ConnectionClosed):
            async for text in connection:
                for topic in _print_event(json.loads(text), positions, options.json):
                    token = _client_token(options, "subscribe", [topic])
                    await connection.send(f"/subscribe {topic} {token} {positions[topic]}")
        await asyncio.sleep(random.random())


def subscribe_command(options: argparse.Namespace) -> None:
    """print messages as they come; reconnect and resume by itself"""
    try:
        asyncio.run(_print_messages(options))
    except (WebSocketException, ValueError, LookupError, TypeError) as exc:
        raise CommandError(f"{options.url} does not answer as notiflux would: {exc}") from exc


def _parser() -> argparse.ArgumentParser:
    settings = (
        f"  {f.name.upper()} ({f.metadata['default'] or 'unset'})\n      {f.metadata['meaning']}"
        for f in fields(Settings)
    )
    epilog = "\n".join(["Settings, from the environment:", *settings])
    parser = argparse.ArgumentParser("notiflux.py", description=__doc__, epilog=epilog)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(command=run_command)
    commands = parser.add_subparsers(title="commands", metavar="")

    def add(command: Callable[[argparse.Namespace], None]) -> Callable[..., Any]:
        name, text = command.__name__.removesuffix("_command"), command.__doc__
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command, wrong_usage=added.error)
        return added.add_argument

    add(dev_command)
    add(keygen_command)("directory", nargs="?", default=".", help="where to (here)")
    token = add(token_command)
    token("scope", choices=["subscribe", "broadcast"])
    token("topic", nargs="*", help="a topic that the token is for")
    token("--prefix", action="append", default=[], help="all topics that begin so")
    key_file = os.environ.get("NOTIFLUX_KEY_FILE")
    token("--key", default=key_file, help="private.pem (NOTIFLUX_KEY_FILE)")
    token("--expires", type=_duration, default=60, help="how long it is good (60s)")
    add(check_command)("token", nargs="?")
    publish, subscribe = add(publish_command), add(subscribe_command)
    publish("topic")
    publish("message", help="a text, or - for all of standard input")
    subscribe("topic", nargs="+")
    subscribe("--since", default="", help="replay first: an id, latest or all")
    subscribe("--json", action="store_true", help="one JSON object a line")
    url = os.environ.get("NOTIFLUX_URL") or "http://127.0.0.1:8080"
    for client in (publish, subscribe):
        client(
            "--url", default=url, type=lambda u: u.rstrip("/"), help="of the daemon (%(default)s)"
        )
        client("--token", help="one to use (NOTIFLUX_TOKEN)")
        client("--key", help="private.pem, to make tokens with (NOTIFLUX_KEY_FILE)")
    for each in (parser, *commands.choices.values()):
        each.add_argument("--version", action="version", version=f"notiflux {VERSION}")
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
    except KeyboardInterrupt:
        return 130  # as a shell says it
    except OSError as exc:  # standard output is full, or closed
        print(f"notiflux: cannot write: {exc.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the exit would try once more, and fail
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
