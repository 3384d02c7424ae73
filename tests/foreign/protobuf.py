"""The protobuf protocol, spoken by Google's library and a module that protoc makes of proto/memkv.proto.

What no library would send is put together by hand, field by field.
"""

import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import importlib.util
import io
import itertools
import math
import pathlib
import random
import re
import socket
import sys
import tempfile
import threading
import time
import zlib

import xxhash
from google.protobuf.message import DecodeError
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed
from grpc_tools import protoc
from hdrh.histogram import HdrHistogram

from support import MEBIBYTE, Raw, Server, client, equal, on_cores, raises, settled, start, until

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROTO = ROOT / "proto" / "memkv.proto"
U32_MAX, U64_MAX = (1 << 32) - 1, (1 << 64) - 1
ANY_BYTES = bytes(range(256))


def generated():
    """The module that protoc makes of the definition."""
    with tempfile.TemporaryDirectory() as folder:
        if protoc.main(["protoc", f"--proto_path={PROTO.parent}", f"--python_out={folder}", PROTO.name]):
            raise RuntimeError(f"protoc does not take {PROTO}")
        spec = importlib.util.spec_from_file_location("memkv_pb2", pathlib.Path(folder, "memkv_pb2.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


pb = generated()


def framed(message):
    """A message, or bytes in its place, behind its length."""
    if isinstance(message, bytes):
        return varint(len(message)) + message
    out = io.BytesIO()
    serialize_length_prefixed(message, out)
    return out.getvalue()


class Connection(Raw):
    """A client of the protobuf port."""

    def __init__(self, address, timeout=10):
        super().__init__(address, timeout)
        self.incoming = self.socket.makefile("rb", 1 << 18)
        self.id = 0

    def __exit__(self, *_):
        self.incoming.close()
        super().__exit__()

    def receive(self):
        """The next response; None when the server has closed."""
        return parse_length_prefixed(pb.Response, self.incoming)

    def ask(self, *requests):
        """The responses to requests that are sent at once."""
        self.send(b"".join(map(framed, requests)))
        return [self.receive() for _ in requests]

    def call(self, **command):
        """The response to one command."""
        self.id += 1
        (response,) = self.ask(pb.Message(id=self.id, **command))
        equal(response.id, self.id, "the id")
        return response

    def ok(self, **command):
        response = self.call(**command)
        equal((pb.Code.Name(response.code), response.message), ("CODE_OK", ""), str(command)[:200])
        return response

    def get(self, *keys, **options):
        return list(self.ok(get=pb.Get(keys=keys, **options)).results)

    def set(self, *entries):
        return list(self.ok(set=pb.Set(entries=entries)).results)

    def delete(self, *keys, conditions=()):
        return list(self.ok(delete=pb.Delete(keys=keys, conditions=conditions)).results)

    def txn(self, compare=(), success=(), failure=()):
        """Whether it succeeded, and the results."""
        response = self.ok(txn=pb.Txn(compare=compare, success=success, failure=failure))
        return response.txn.succeeded, list(response.results)

    def flush(self, **options):
        equal(self.ok(flush=pb.Flush(**options)), pb.Response(id=self.id), "the answer to Flush")

    def metrics(self):
        return self.ok(metrics=pb.Metrics()).metrics

    def topology(self):
        return self.ok(topology=pb.Topology()).topology

    def ends(self):
        """The server closes, and has nothing more to say."""
        with contextlib.suppress(ConnectionResetError):
            equal(self.incoming.read(), b"", "before the end of the stream")


OK, NOT_FOUND, CONDITION_FAILED, ABORTED = (
    pb.KeyResult(code=code) for code in (pb.CODE_OK, pb.CODE_NOT_FOUND, pb.CODE_CONDITION_FAILED, pb.CODE_ABORTED)
)
ABSENT, PRESENT = pb.Condition(absent=True), pb.Condition(present=True)


def entry(key, value=b"", **options):
    return pb.Entry(key=key, value=value, **options)


def found(value, **fields):
    return pb.KeyResult(value=value, **fields)


def is_version(version):
    return pb.Condition(version=version)


def now_ms():
    return time.time_ns() // 1_000_000


def wait_until(moment_ms):
    time.sleep(max(0, moment_ms - now_ms()) / 1000)


def eventually(condition, what):
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within 10 s: {what}")
        time.sleep(0.01)


def alive(server):
    """The server still answers on all ports."""
    with Connection(server.protobuf) as connection:
        equal(connection.set(entry(b"alive", b"hi")), [OK])
        equal(connection.get(b"alive"), [found(b"hi")])
    with Raw(server.memcached) as raw:
        raw.ask(b"get alive\r\n", b"VALUE alive 0 2\r\nhi\r\nEND\r\n")
    with Raw(server.text) as raw:
        raw.ask(b"get alive\r\n", b"VALUE alive 2 \r\nhi\r\nEND\r\n")


# --- by hand --------------------------------------------------------------------------------------


def varint(number, padding=0):
    """With padding: in so many bytes more than it needs."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    if padding:
        out[-1] |= 0x80
        out += b"\x80" * (padding - 1) + b"\0"
    return bytes(out)


def field(number, content):
    """A field of a number or of bytes."""
    if isinstance(content, bytes):
        return varint(number << 3 | 2) + varint(len(content)) + content
    return varint(number << 3) + varint(content)


def fixed32(number, content=b"1234"):
    return varint(number << 3 | 5) + content


def fixed64(number, content=b"12345678"):
    return varint(number << 3 | 1) + content


def group(number, content=b""):
    """A group, the form of nesting that protobuf gave up and parsers still skip."""
    return varint(number << 3 | 3) + content + varint(number << 3 | 4)


# --- commands -------------------------------------------------------------------------------------


@on_cores(1, 2, 8)
def test_protobuf_one_key_and_many(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        equal(connection.get(b"k"), [NOT_FOUND])
        equal(connection.delete(b"k"), [NOT_FOUND])
        equal(connection.set(entry(b"k", b"v")), [OK])
        equal(connection.get(b"k"), [found(b"v")])
        equal(connection.set(entry(b"k")), [OK])
        equal(connection.get(b"k"), [found(b"")], "an empty value")
        equal(connection.delete(b"k"), [OK])
        equal(connection.delete(b"k"), [NOT_FOUND])
        equal(connection.get(b"k"), [NOT_FOUND])

        keys = [b"key-%d" % number for number in range(300)]
        values = {key: key * (number % 9) for number, key in enumerate(keys)}
        equal(connection.set(*(entry(key, value) for key, value in values.items())), [OK] * 300)
        equal(connection.get(*keys), [found(values[key]) for key in keys])
        mixed = [b"none", *keys[7:3:-1], b"nor this", keys[5], keys[5]]
        equal(connection.get(*mixed), [found(values[key]) if key in values else NOT_FOUND for key in mixed])
        equal(connection.delete(b"none", *keys[10:20], keys[10]), [NOT_FOUND] + [OK] * 10 + [NOT_FOUND])
        equal(connection.get(*keys[9:21]), [found(values[keys[9]])] + [NOT_FOUND] * 10 + [found(values[keys[20]])])
        equal(connection.set(entry(b"twice", b"1"), entry(b"other"), entry(b"twice", b"2")), [OK] * 3)
        equal(connection.get(b"twice"), [found(b"2")], "the later of two entries with one key")

        for flags in (0, 1, 127, 128, 1 << 31, U32_MAX):
            equal(connection.set(entry(b"flags", b"v", flags=flags), entry(b"more flags", flags=flags ^ 1)), [OK, OK])
            want = [found(b"v", flags=flags), found(b"", flags=flags ^ 1)]
            equal(connection.get(b"flags", b"more flags"), want)
            equal(connection.get(b"flags"), want[:1])
        for id in (0, 1, 1 << 35, U64_MAX):
            for command in ({"ping": pb.Ping()}, {"get": pb.Get(keys=[b"none"])}, {"get": pb.Get(keys=[b"none"] * 20)}):
                (response,) = connection.ask(pb.Message(id=id, **command))
                equal(response.id, id)


@on_cores(1, 2, 8)
def test_protobuf_expiry(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        began = now_ms()
        moment = began + 900
        entries = {
            b"ttl": dict(ttl_ms=900),
            b"moment": dict(expires_at_ms=moment),
            b"ttl 0": dict(ttl_ms=0),
            b"moment 0": dict(expires_at_ms=0),
            b"long ago": dict(expires_at_ms=1),
            b"just now": dict(expires_at_ms=began - 1),
            b"long ttl": dict(ttl_ms=10**12),
            b"far moment": dict(expires_at_ms=began + 10**12),
            b"extended": dict(ttl_ms=900),
            b"freed": dict(ttl_ms=900),
            b"never": dict(),
        }
        equal(connection.set(*(entry(key, key, **options) for key, options in entries.items())), [OK] * len(entries))
        got = dict(zip(entries, connection.get(*entries)))
        for key in (b"long ago", b"just now"):
            equal(got[key], NOT_FOUND, key.decode())
        for key in (b"ttl 0", b"moment 0", b"never"):
            equal(got[key], found(key), key.decode())
        equal(got[b"moment"], found(b"moment", expires_at_ms=moment))
        equal(got[b"far moment"], found(b"far moment", expires_at_ms=began + 10**12))
        for key, ttl in ((b"ttl", 900), (b"long ttl", 10**12)):
            ends = got[key].expires_at_ms
            if not began + ttl - 50 <= ends <= now_ms() + ttl + 50:
                raise AssertionError(f"{key}: set at {began} for {ttl} ms, ends at {ends}")
        equal(connection.set(entry(b"extended", b"x", ttl_ms=10**6), entry(b"freed", b"y")), [OK, OK])
        # what there is is gone at once, too
        equal(connection.set(entry(b"here")), [OK])
        equal(connection.set(entry(b"here", expires_at_ms=1)), [OK])
        equal(connection.get(b"here"), [NOT_FOUND])

        wait_until(moment - 200)
        if now_ms() < moment - 100:
            equal([result.value for result in connection.get(b"ttl", b"moment")], [b"ttl", b"moment"], "before their time")
        wait_until(max(moment, got[b"ttl"].expires_at_ms) + 50)
        equal(connection.get(b"ttl", b"moment"), [NOT_FOUND, NOT_FOUND], "after their time")
        equal(connection.get(b"moment"), [NOT_FOUND])
        equal([result.value for result in connection.get(b"extended", b"freed", b"never")], [b"x", b"y", b"never"])
        # an item whose time is over is none
        equal(connection.delete(b"moment"), [NOT_FOUND])
        equal(connection.set(entry(b"moment", condition=PRESENT)), [CONDITION_FAILED])
        equal(connection.set(entry(b"ttl", b"new", condition=ABSENT)), [OK])
        equal(connection.get(b"ttl"), [found(b"new")])


@on_cores(1, 2, 8)
def test_protobuf_expiry_at_the_end_of_time(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        for options in (dict(ttl_ms=U64_MAX), dict(expires_at_ms=U64_MAX), dict(expires_at_ms=U64_MAX - 1)):
            want = options.get("expires_at_ms", U64_MAX)
            for key in (b"key-%d" % number for number in range(30)):
                equal(connection.set(entry(key, b"v", **options)), [OK])
                equal(connection.get(key), [found(b"v", expires_at_ms=want)], str(options))


@on_cores(1, 2, 8)
def test_protobuf_versions_and_conditions(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        (stored,) = connection.set(entry(b"k", b"1", with_version=True))
        equal(stored.version > 0, True, "a version")
        equal(connection.get(b"k", with_version=True), [found(b"1", version=stored.version)])
        equal(connection.get(b"k"), [found(b"1")], "without a version")
        # an item that was written without a wish for its version has one
        equal(connection.set(entry(b"l", b"1")), [OK])
        first, again = (connection.get(b"l", with_version=True)[0].version for _ in range(2))
        equal((first > 0, again), (True, first), "versions of two reads")
        seen = {first}
        for renew in (lambda: connection.set(entry(b"l", b"1")), lambda: connection.delete(b"l"), connection.flush):
            renew()
            equal(connection.set(entry(b"l", b"1", condition=is_version(first))), [CONDITION_FAILED])
            connection.set(entry(b"l", b"1"))
            (result,) = connection.get(b"l", with_version=True)
            equal(result.version in seen, False, "an old version comes back")
            seen.add(result.version)
        # of several entries, those that ask
        results = connection.set(*(entry(b"v%d" % number, with_version=number % 2 == 1) for number in range(10)))
        equal([result.version > 0 for result in results], [number % 2 == 1 for number in range(10)])
        got = connection.get(*(b"v%d" % number for number in range(10)), b"none", with_version=True)
        for number in range(1, 10, 2):
            equal(got[number].version, results[number].version)
        equal([result.version > 0 for result in got], [True] * 10 + [False])

        connection.flush()
        wrong = random.Random(11).getrandbits(60)
        for condition in (PRESENT, is_version(wrong), is_version(0)):
            equal(connection.set(entry(b"k", b"x", condition=condition, with_version=True)), [CONDITION_FAILED])
            equal(connection.get(b"k"), [NOT_FOUND])
        (stored,) = connection.set(entry(b"k", b"1", condition=ABSENT, with_version=True))
        equal(stored.code, pb.CODE_OK)
        for condition in (ABSENT, is_version(wrong), is_version(0), is_version(stored.version + 1)):
            equal(connection.set(entry(b"k", b"x", condition=condition, with_version=True)), [CONDITION_FAILED])
        equal(connection.get(b"k", with_version=True), [found(b"1", version=stored.version)], "unchanged")
        (newer,) = connection.set(entry(b"k", b"2", condition=is_version(stored.version), with_version=True))
        equal((newer.code, newer.version > 0, newer.version != stored.version), (pb.CODE_OK, True, True))
        equal(connection.set(entry(b"k", b"x", condition=is_version(stored.version))), [CONDITION_FAILED])
        equal(connection.set(entry(b"k", b"3", condition=PRESENT)), [OK])
        for nothing in (pb.Condition(absent=False), pb.Condition(present=False), pb.Condition()):
            equal(connection.set(entry(b"k", b"4", condition=nothing), entry(b"fresh", condition=nothing)), [OK, OK])
            equal(connection.delete(b"fresh", conditions=[nothing]), [OK])
        # all or none, and all conditions are of the moment before
        many = [entry(b"n-%d" % number, condition=ABSENT) for number in range(20)]
        results = connection.set(*many, entry(b"k", b"5", condition=ABSENT), entry(b"o", condition=PRESENT), entry(b"p"))
        equal(results, [ABORTED] * 20 + [CONDITION_FAILED] * 2 + [ABORTED])
        equal(connection.get(b"k", b"o", b"p", *(item.key for item in many)), [found(b"4")] + [NOT_FOUND] * 22)
        equal(connection.set(*many, entry(b"k", b"5", condition=PRESENT), entry(b"o", condition=ABSENT)), [OK] * 22)
        results = connection.set(entry(b"n", b"1", condition=ABSENT), entry(b"n", b"2", condition=PRESENT))
        equal(results, [ABORTED, CONDITION_FAILED])
        equal(connection.set(*(entry(b"n", value, condition=ABSENT) for value in (b"1", b"2"))), [OK, OK])
        equal(connection.get(b"k", b"n", b"o"), [found(b"5"), found(b"2"), found(b"")])

        k, n = connection.get(b"k", b"n", with_version=True)
        conditions = [is_version(k.version + 1), PRESENT, is_version(n.version), pb.Condition()]
        results = connection.delete(b"k", b"none", b"n", b"n", conditions=conditions)
        equal(results, [CONDITION_FAILED, CONDITION_FAILED, ABORTED, ABORTED])
        conditions = [is_version(k.version), pb.Condition(), is_version(n.version), is_version(n.version)]
        equal(connection.delete(b"k", b"none", b"n", b"n", conditions=conditions), [OK, NOT_FOUND, OK, NOT_FOUND])
        equal(connection.set(entry(b"k")), [OK])
        equal(connection.delete(b"k", conditions=[is_version(k.version)]), [CONDITION_FAILED])
        equal(connection.call(delete=pb.Delete(keys=[b"k"], conditions=[ABSENT])).code, pb.CODE_INVALID_ARGUMENT)

        # of many clients that count up with versions, none loses an addition
        equal(connection.set(entry(b"counter", b"0")), [OK])
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(count, server, 50) for _ in range(4)]:
                done.result()
        equal(connection.get(b"counter"), [found(b"200")])


def count(server, times):
    with Connection(server.protobuf) as connection:
        for _ in range(times):
            code = pb.CODE_CONDITION_FAILED
            while code == pb.CODE_CONDITION_FAILED:
                (old,) = connection.get(b"counter", with_version=True)
                new = entry(b"counter", b"%d" % (int(old.value) + 1), condition=is_version(old.version))
                code = connection.set(new)[0].code
            equal(code, pb.CODE_OK)


@on_cores(1, 2, 8)
def test_protobuf_transactions(cores):
    keys = [b"key-%d" % number for number in range(30)]
    absent = [pb.Compare(key=key, condition=ABSENT) for key in keys]
    reads = [pb.Operation(get=key) for key in keys]
    writes = [pb.Operation(set=entry(key, key, flags=7, ttl_ms=10**6, with_version=True)) for key in keys]
    with Server(cores) as server, Connection(server.protobuf) as connection:
        succeeded, stored = connection.txn(absent, writes, reads)
        equal((succeeded, [result.code for result in stored]), (True, [pb.CODE_OK] * 30))
        equal(all(result.version for result in stored), True, "versions")
        succeeded, got = connection.txn(absent, writes, [pb.Operation(get=key, with_version=True) for key in keys])
        equal(succeeded, False)
        equal([(result.value, result.flags, result.version) for result in got],
              [(key, 7, result.version) for key, result in zip(keys, stored)])
        for result in got:
            about(result.expires_at_ms, now_ms() + 10**6)
        equal(connection.txn(absent, writes), (False, []), "nothing to do")
        equal(connection.txn([pb.Compare(key=b"none", condition=ABSENT)]), (True, []), "a question")
        # every kind of comparison, and of one that does not hold among others
        versions = [pb.Compare(key=key, condition=is_version(result.version)) for key, result in zip(keys, stored)]
        fine = [*versions, pb.Compare(key=b"none", condition=ABSENT), pb.Compare(key=b"none"), pb.Compare(key=keys[0], condition=PRESENT)]
        equal(connection.txn(fine, [pb.Operation(get=b"none")], reads), (True, [NOT_FOUND]))
        for bad in (
            pb.Compare(key=b"none", condition=PRESENT), pb.Compare(key=keys[3], condition=ABSENT),
            pb.Compare(key=keys[3], condition=is_version(stored[3].version + 1)), pb.Compare(key=b"none", condition=is_version(1)),
        ):
            equal(connection.txn([*fine, bad], reads, [pb.Operation(get=b"none")]), (False, [NOT_FOUND]), str(bad))
        # without comparison; each operation sees those before it
        mixed = [
            (pb.Operation(delete=keys[0]), OK), (pb.Operation(get=keys[0]), NOT_FOUND), (pb.Operation(delete=keys[0]), NOT_FOUND),
            (pb.Operation(set=entry(keys[1], ANY_BYTES * 100)), OK), (pb.Operation(get=keys[1]), found(ANY_BYTES * 100)),
            (pb.Operation(set=entry(keys[1], b"short")), OK), (pb.Operation(get=keys[1]), found(b"short")),
        ]
        operations, want = zip(*mixed)
        equal(connection.txn(success=operations, failure=reads), (True, list(want)))
        equal(connection.get(keys[0], keys[1]), [NOT_FOUND, found(b"short")])


@on_cores(1, 2, 8)
def test_protobuf_many_keys_are_one_instant(cores):
    """Money goes to and fro between accounts, and every look at all of them finds the same sum."""
    accounts = [b"account-%d" % number for number in range(20)]
    done = threading.Event()

    def move(seed):
        numbers, moved = random.Random(seed), 0
        with Connection(server.protobuf) as connection:
            while not done.is_set():
                pair = numbers.sample(accounts, 2)
                before = connection.get(*pair, with_version=True)
                amount = numbers.randint(1, 50)
                after = [b"%d" % (int(result.value) + sign * amount) for result, sign in zip(before, (1, -1))]
                conditions = [is_version(result.version) for result in before]
                if seed % 2:
                    compare = [pb.Compare(key=key, condition=condition) for key, condition in zip(pair, conditions)]
                    succeeded, _ = connection.txn(compare, [pb.Operation(set=entry(*item)) for item in zip(pair, after)])
                else:
                    results = connection.set(*(entry(*item, condition=is_) for *item, is_ in zip(pair, after, conditions)))
                    succeeded = results == [OK, OK]
                    equal(succeeded or CONDITION_FAILED in results, True, str(results))
                moved += succeeded
        return moved

    def look(seed):
        numbers = random.Random(seed)
        with Connection(server.protobuf) as connection:
            for _ in range(250):
                keys = numbers.sample(accounts, len(accounts))
                results = connection.get(*keys) if seed % 2 else connection.txn(success=[pb.Operation(get=key) for key in keys])[1]
                equal(sum(int(result.value) for result in results), 1000 * len(accounts), "the sum of all accounts")

    with Server(cores) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        with Connection(server.protobuf) as connection:
            equal(connection.set(*(entry(key, b"1000") for key in accounts)), [OK] * 20)
        moves = [pool.submit(move, seed) for seed in range(4)]
        looks = [pool.submit(look, seed) for seed in range(2)]
        try:
            for a_look in looks:
                a_look.result()
        finally:
            done.set()
        equal(min(a_move.result() for a_move in moves) > 5, True, "every client has moved some")
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_ping_and_flush(cores):
    keys = [b"key-%d" % number for number in range(50)]
    with Server(cores) as server, Connection(server.protobuf) as connection:

        def fill():
            equal(connection.set(*map(entry, keys)), [OK] * 50)

        def are(there, when):
            equal(connection.get(*keys), [found(b"") if there else NOT_FOUND] * 50, when)

        equal(connection.ok(ping=pb.Ping()), pb.Response(id=connection.id))
        fill()
        connection.flush()
        are(False, "after a Flush")
        fill()
        connection.flush(delay_ms=0)
        are(False, "after a Flush with delay 0")
        fill()
        began = now_ms()
        connection.flush(delay_ms=500)
        are(True, "before a Flush's time")
        # what is written meanwhile goes too
        equal(connection.set(entry(b"later")), [OK])
        wait_until(began + 350)
        there = connection.get(b"later")
        if now_ms() < began + 450:
            equal(there, [found(b"")], "before a Flush's time")
        wait_until(began + 600)
        are(False, "after a Flush's time")
        equal(connection.get(b"later"), [NOT_FOUND])
        fill()
        are(True, "it comes once")
        # a later one replaces it, whether for a later moment or for now
        began = now_ms()
        connection.flush(delay_ms=300)
        connection.flush(delay_ms=10**8)
        wait_until(began + 450)
        are(True, "the first of two Flushes was replaced")
        began = now_ms()
        connection.flush(delay_ms=300)
        connection.flush()
        are(False, "after the second of two Flushes")
        fill()
        wait_until(began + 450)
        are(True, "the first of two Flushes was replaced by one at once")
        connection.flush(delay_ms=U64_MAX)
        are(True, "before the end of time")


@on_cores(1, 2, 8)
def test_protobuf_metrics(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        keys = [b"key-%d" % number for number in range(200)]
        for key in keys:
            connection.set(entry(key, key))
        versions = [result.version for result in connection.get(*keys, with_version=True)]
        for key in keys[:30]:
            connection.get(key)
        connection.get(*keys[:20], b"none")
        connection.delete(*keys[:10], b"none")
        connection.set(entry(keys[20], condition=is_version(versions[20])))
        connection.set(entry(keys[21], condition=is_version(versions[20])))
        connection.set(entry(b"gone", expires_at_ms=1))
        equal(connection.get(b"gone"), [NOT_FOUND])
        connection.ok(ping=pb.Ping())
        for _ in range(3):
            equal(connection.call(get=pb.Get()).code, pb.CODE_INVALID_ARGUMENT)
        requests = 200 + 1 + 30 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 3
        metrics = connection.metrics()
        counters = metrics.counters
        wanted = {
            "get_hits": 200 + 30 + 20, "get_misses": 1 + 1, "sets": 200 + 2 + 1, "items_written": 200 + 1 + 1,
            "delete_hits": 10, "delete_misses": 1, "version_hits": 1, "version_mismatches": 1, "version_misses": 0,
            "bad_requests": 3, "requests": requests, "connections": 1, "connections_opened": 1, "items": 190,
            "out_of_memory": 0, "too_large": 0, "flushes": 0, "txns": 3,
        }
        equal({name: counters[name] for name in wanted}, wanted)
        equal(metrics.cores, cores)
        if not re.fullmatch(r"\d+\.\d+\.\d+.*", metrics.server_version):
            raise AssertionError(f"the version is {metrics.server_version!r}")
        for name in ("bytes_received", "bytes_sent", "uptime_ns", "turns", "item_bytes", "index_bytes", "resident_bytes"):
            equal(counters[name] > 0, True, name)
        equal(counters["charged_bytes"] <= counters["memory_limit_bytes"], True, "memory")
        equal(counters["forwarded"] > 0, cores > 1, "some requests went to another core")

        latencies = {(latency.command, latency.forwarded): latency for latency in metrics.latencies}
        equal(len(latencies), len(metrics.latencies), "each class and place once")
        equal({place for _, place in latencies}, {False, True} if cores > 1 else {False})
        counts = collections.Counter()
        for (command, _), latency in latencies.items():
            counts[command] += latency.count
            check_histogram(latency)
        equal(dict(counts), {"get": 1 + 30 + 1 + 1, "set": 200 + 2 + 1, "delete": 1, "other": 1 + 3})

        # what was collected is there once more at the next time, and grows
        again = connection.metrics()
        equal(again.counters["requests"], requests + 1)


@on_cores(1, 2, 8)
def test_protobuf_flushes_are_counted(cores):
    for shards in (1, cores, 3 * cores + 1):
        with Server(cores, "--shards", str(shards)) as server, Connection(server.protobuf) as connection:
            connection.flush()
            connection.flush(delay_ms=10**6)
            equal(connection.metrics().counters["flushes"], 2, f"--shards {shards}")
            with contextlib.closing(client(server)) as mc:
                equal(mc.stats()[b"cmd_flush"], 2, f"--shards {shards}")


def check_histogram(latency):
    """The percentiles are those of the histogram, which another implementation of HdrHistogram reads."""
    data = latency.histogram
    equal(data[:4], b"\x1c\x84\x93\x13", "the cookie of the V2 encoding")
    equal(int.from_bytes(data[4:8], "big"), len(data) - 40, "the length of the counts")
    # that implementation knows the histogram only in the compressed form, which is this one deflated
    histogram = HdrHistogram.decode(zlib.compress(data), b64_wrap=False)
    equal(histogram.get_total_count(), latency.count)
    counted = [(index, n) for index in range(histogram.counts_len) if (n := histogram.get_count_at_index(index))]

    def at(quantile):
        rank, total = math.ceil(quantile * latency.count), 0
        for index, n in counted:
            total += n
            if total >= rank:
                return histogram.get_highest_equivalent_value(histogram.get_value_from_index(index))

    told = [latency.p50_ns, latency.p90_ns, latency.p99_ns, latency.p99_9_ns, latency.p99_99_ns, latency.max_ns]
    equal(told, [at(quantile) for quantile in (0.5, 0.9, 0.99, 0.999, 0.9999, 1)], latency.command)
    equal(latency.min_ns, histogram.get_value_from_index(counted[0][0]), latency.command)
    if not 100 <= latency.min_ns <= latency.p50_ns <= latency.max_ns < 10_000_000_000:
        raise AssertionError(f"latencies of {latency.command}: {latency.min_ns} to {latency.max_ns} ns")


@on_cores(1, 2, 8)
def test_protobuf_topology(cores):
    for shards, partitioner in ((cores, 0), (3 * cores + 1, 0), (5, 1)):
        options = ["--token-seed", str(U64_MAX - cores), "--shards", str(shards)]
        boundaries = [b"b", b"bcdefghi", b"mmmm", b"z"]
        if partitioner == pb.TopologyReport.FIRST_BYTES:
            options += ["--partitioner", "ordered", "--boundaries", b",".join(boundaries).decode()]
            starts = [0] + [int.from_bytes(key.ljust(8, b"\0"), "big") for key in boundaries]
        else:
            starts = [-(-(number << 64) // shards) for number in range(shards)]
        with Server(cores, *options) as server, Connection(server.protobuf) as connection:
            topology = connection.topology()
        equal((topology.cores, list(topology.core_ports)), (cores, []))
        equal(topology.token_function, partitioner)
        if partitioner == pb.TopologyReport.XXH3:
            equal(topology.seed, U64_MAX - cores)
        equal([a_range.start for a_range in topology.ranges], starts)
        owners = [a_range.core for a_range in topology.ranges]
        equal(owners, sorted(owners), "each core's ranges stand together")
        # as even as it goes
        shares = collections.Counter(owners)
        equal(max(shares.values()) - min(shares.get(core, 0) for core in range(cores)) <= 1, True, f"shares {shares}")


def test_protobuf_example_of_the_documentation():
    text = (ROOT / "docs" / "protocols.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    with Server(2) as server, Connection(server.protobuf) as connection:
        equal(connection.set(entry(b"greeting", b"hello")), [OK])
        equal(example.count("7001"), 1)
        out = io.StringIO()
        sys.modules["memkv_pb2"] = pb
        with contextlib.redirect_stdout(out):
            exec(example.replace("7001", str(server.protobuf[1])), {})
        equal(out.getvalue(), "b'hello'\n")


# --- streams --------------------------------------------------------------------------------------


class Model:
    """What a store holds of one client's keys, and what it therefore answers."""

    def __init__(self, seed):
        self.numbers = random.Random(seed)
        self.keys = [b"%d\0%s" % (seed, self.numbers.randbytes(self.numbers.randint(1, 30))) for _ in range(40)]
        self.items = {}
        self.versions = collections.defaultdict(set)

    def request(self):
        """A random message, and the function that checks its response once all before it are checked."""
        numbers = self.numbers
        id = numbers.choice([0, 1, numbers.getrandbits(7), numbers.getrandbits(32), numbers.getrandbits(64)])
        keys = [numbers.choice(self.keys) for _ in range(numbers.choice([1, 1, 1, 2, 5, 30]))]
        kind = numbers.randint(0, 23)
        if kind < 8:
            command = {"get": pb.Get(keys=keys, with_version=numbers.random() < 0.3)}
        elif kind < 15:
            command = {"set": pb.Set(entries=[self.entry(key) for key in keys])}
        elif kind < 17:
            conditions = [self.condition(key, deleting=True) for key in keys] if numbers.random() < 0.5 else []
            command = {"delete": pb.Delete(keys=keys, conditions=conditions)}
        elif kind < 21:
            compare = [pb.Compare(key=key, condition=self.condition(key)) for key in keys[:3]][numbers.randint(0, 1) :]
            branches = [[self.operation(key) for key in keys] for _ in range(2)]
            command = {"txn": pb.Txn(compare=compare, success=branches[0], failure=branches[1])}
        elif kind < 22:
            command = {"ping": pb.Ping()}
        elif kind < 23:
            command = {"topology": pb.Topology()}
        else:
            # refused, and nothing of it is done
            message = pb.Message(id=id, set=pb.Set(entries=[self.entry(key) for key in [*keys, b""]]))
            return message, lambda response: equal(response.code, pb.CODE_INVALID_ARGUMENT)
        message = pb.Message(id=id, **command)
        return message, lambda response: self.check(message, response)

    def entry(self, key, **options):
        numbers = self.numbers
        value = numbers.randbytes(numbers.choice([0, 1, 10, 100, 100, 1000, 3900, 4096, 5000, 20_000]))
        options.setdefault("flags", numbers.choice([0, 0, 5, U32_MAX]))
        if numbers.random() < 0.3:
            # never, at once, later
            options["expires_at_ms"] = numbers.choice([0, 1, now_ms() + 10**6, 1 << 42])
        if numbers.random() < 0.4:
            options.setdefault("condition", self.condition(key))
        return entry(key, value, with_version=numbers.random() < 0.3, **options)

    def operation(self, key):
        version = self.numbers.random() < 0.3
        kind = self.numbers.choice(["get", "set", "delete"])
        return pb.Operation(with_version=version, **{kind: self.entry(key, condition=None) if kind == "set" else key})

    def condition(self, key, deleting=False):
        known = self.items.get(key)
        version = known.version if known and known.version else self.numbers.getrandbits(50) | 1 << 62
        kinds = [PRESENT] * 3 + [is_version(version)] * 2 + [pb.Condition()] * 3 + [ABSENT] * (not deleting)
        return self.numbers.choice(kinds)

    def holds(self, condition, key):
        item, kind = self.items.get(key), condition.WhichOneof("is")
        if kind == "version":
            return item is not None and item.version == condition.version
        return kind is None or (item is None) == (kind == "absent")

    def check(self, message, response):
        equal(response.code, pb.CODE_OK, response.message)
        kind = message.WhichOneof("command")
        equal((response.HasField("topology"), response.HasField("txn")), (kind == "topology", kind == "txn"))
        results = list(response.results)
        if kind == "get":
            steps = [pb.Operation(get=key, with_version=message.get.with_version) for key in message.get.keys]
        elif kind == "set":
            steps = self.decided([(item.condition, pb.Operation(set=item)) for item in message.set.entries], results)
        elif kind == "delete":
            conditions = message.delete.conditions or [pb.Condition()] * len(message.delete.keys)
            steps = [pb.Operation(delete=key) for key in message.delete.keys]
            steps = self.decided(list(zip(conditions, steps)), results)
        elif kind == "txn":
            succeeded = all(self.holds(compare.condition, compare.key) for compare in message.txn.compare)
            equal(response.txn.succeeded, succeeded)
            steps = message.txn.success if succeeded else message.txn.failure
        else:
            steps = []
        equal(len(results), len(steps))
        for step, result in zip(steps, results):
            self.step(step, result)

    def decided(self, conditional, results):
        """The operations, if all their conditions hold; else the results tell why not."""
        held = [self.holds(condition, operation.set.key or operation.delete) for condition, operation in conditional]
        if all(held):
            return [operation for _, operation in conditional]
        want = [ABORTED if holds else CONDITION_FAILED for holds in held]
        equal(results, want)
        results.clear()
        return []

    def step(self, operation, result):
        kind = operation.WhichOneof("operation")
        key = operation.set.key or operation.get or operation.delete
        item = self.items.get(key)
        if kind == "set":
            wish = operation.set
            equal((result.code, result.version > 0), (pb.CODE_OK, wish.with_version))
            self.items[key] = found(
                wish.value, flags=wish.flags, expires_at_ms=wish.expires_at_ms,
                version=self.versioned(key, result.version) if wish.with_version else 0,
            )
            if wish.expires_at_ms == 1:
                del self.items[key]
        elif item is None:
            equal(result, NOT_FOUND)
        elif kind == "delete":
            equal(result, OK)
            del self.items[key]
        else:
            if operation.with_version and not item.version:
                item.version = self.versioned(key, result.version)
            version = item.version if operation.with_version else 0
            equal(result, found(item.value, flags=item.flags, expires_at_ms=item.expires_at_ms, version=version))

    def versioned(self, key, version):
        """A version that the key has not had before."""
        equal(version > 0 and version not in self.versions[key], True, f"version {version} is new")
        self.versions[key].add(version)
        return version


@on_cores(1, 2, 8)
def test_protobuf_pipelines(cores):
    with Server(cores) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(pipelines, server, seed) for seed in range(4)]:
            done.result()


def pipelines(server, seed):
    """Thousands of requests in pieces of any size, without waiting for the answers."""
    model = Model(seed)
    with Connection(server.protobuf) as connection:
        for length in (1, 10, 100, 1000):
            requests = [model.request() for _ in range(length)]
            data = b"".join(framed(message) for message, _ in requests)
            sender = threading.Thread(target=send_in_pieces, args=(connection, data, random.Random(seed)))
            sender.start()
            try:
                for number, (message, check) in enumerate(requests):
                    response = connection.receive()
                    equal(response.id, message.id, f"the id of response {number}")
                    check(response)
            finally:
                sender.join()


def send_in_pieces(connection, data, numbers):
    at = 0
    with contextlib.suppress(OSError):
        while at < len(data):
            size = numbers.choice([1, 3, 10, 100, 1000, 10_000, 100_000])
            connection.send(data[at : at + size])
            at += size


@on_cores(1, 2, 8)
def test_protobuf_5000_requests_at_once(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        requests = []
        for number in range(2500):
            key, value = b"key-%d" % (number % 600), b"%d" % number * (number % 40)
            requests.append(pb.Message(id=2 * number, set=pb.Set(entries=[entry(key, value)])))
            requests.append(pb.Message(id=2 * number + 1, get=pb.Get(keys=[key])))
        sender = threading.Thread(target=connection.send, args=(b"".join(map(framed, requests)),))
        sender.start()
        for number, request in enumerate(requests):
            stored = requests[number - 1].set.entries
            want = [found(stored[0].value)] if number % 2 else [OK]
            equal(connection.receive(), pb.Response(id=number, results=want))
        sender.join()


@on_cores(1, 2, 8)
def test_protobuf_requests_of_a_pipeline_do_not_overtake_each_other(cores):
    """A connection reads what it has just written, whoever looks at the same keys meanwhile."""
    keys = [b"key-%d" % number for number in range(20)]
    done = threading.Event()

    def look():
        with Connection(server.protobuf) as connection:
            while not done.is_set():
                connection.get(*keys)

    with Server(cores) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with Connection(server.protobuf) as connection:
            for number in range(200):
                key, value = keys[number % 20], b"%d" % number
                responses = connection.ask(
                    pb.Message(get=pb.Get(keys=keys)), pb.Message(set=pb.Set(entries=[entry(key, value)])),
                    pb.Message(get=pb.Get(keys=[key])), pb.Message(delete=pb.Delete(keys=[key])),
                    pb.Message(get=pb.Get(keys=[key])),
                )
                got = [list(response.results) for response in responses[1:]]
                equal(got, [[OK], [found(value)], [OK], [NOT_FOUND]], f"round {number}")
        looking = pool.submit(look)
        try:
            with Raw(server.memcached, timeout=2) as raw:
                for number in range(1000):
                    key, value = keys[number % 20], b"%04d" % number
                    raw.ask(b"set %s 0 0 4\r\n%s\r\nget %s\r\n" % (key, value, key),
                            b"STORED\r\nVALUE %s 0 4\r\n%s\r\nEND\r\n" % (key, value))
        finally:
            done.set()
        looking.result()


@on_cores(1, 2, 8)
def test_protobuf_cut_at_every_byte(cores):
    conversation = [
        pb.Message(id=1, set=pb.Set(entries=[entry(b"cut", ANY_BYTES[:150], flags=300, ttl_ms=10**6, condition=PRESENT)])),
        pb.Message(id=300, set=pb.Set(entries=[entry(b"cut-%d" % n, b"v", with_version=True) for n in range(4)])),
        pb.Message(id=U64_MAX, get=pb.Get(keys=[b"cut-%d" % n for n in range(6)])),
        pb.Message(delete=pb.Delete(keys=[b"cut", b"cut-0"], conditions=[pb.Condition(), PRESENT])),
        pb.Message(id=5),
        pb.Message(id=6, ping=pb.Ping()),
    ]
    large = b"".join(map(framed, [
        pb.Message(id=1 << 40, set=pb.Set(entries=[entry(b"large", ANY_BYTES * 20)])),
        pb.Message(id=2, get=pb.Get(keys=[b"large"])),
    ]))
    ping = framed(pb.Message(id=99, ping=pb.Ping()))

    def halves(connection, data, cut, count):
        # once the ping is answered, what came with it has been received
        connection.send(ping + data[:cut])
        first = connection.receive()
        equal(first.id, 99)
        connection.send(data[cut:])
        return [connection.receive() for _ in range(count)]

    with Server(cores) as server, Connection(server.protobuf) as connection:
        data = b"".join(map(framed, conversation))
        check = [pb.CODE_OK, pb.CODE_OK, pb.CODE_OK, pb.CODE_OK, pb.CODE_UNKNOWN_COMMAND, pb.CODE_OK]
        for cut in range(len(data) + 1):
            responses = halves(connection, data, cut, len(conversation))
            equal([response.id for response in responses], [message.id for message in conversation], f"cut at {cut}")
            equal([response.code for response in responses], check, f"cut at {cut}")
            equal(list(responses[0].results), [CONDITION_FAILED])
            equal(list(responses[2].results), [found(b"v")] * 4 + [NOT_FOUND] * 2)
            equal(list(responses[3].results), [NOT_FOUND, OK])
        for byte in data:
            connection.send(bytes([byte]))
        equal([connection.receive().code for _ in conversation], check, "byte by byte")
        # a message that is collected behind its head
        end = len(large)
        for cut in [*range(60), *range(60, end - 60, 501), *range(end - 60, end + 1)]:
            stored, got = halves(connection, large, cut, 2)
            equal((stored.id, list(stored.results)), (1 << 40, [OK]), f"cut at {cut}")
            equal((got.id, list(got.results)), (2, [found(ANY_BYTES * 20)]), f"cut at {cut}")


@on_cores(1, 2, 8)
def test_protobuf_1000_clients_at_once(cores):
    with Server(cores) as server:
        asyncio.run(asyncio.wait_for(thousand(server), 60))
        with Connection(server.protobuf) as connection:
            eventually(lambda: connection.metrics().counters["connections"] == 1, "all have left")
            equal(connection.metrics().counters["connections_opened"], 1001)


async def thousand(server):
    connected = asyncio.Semaphore(0)
    start = asyncio.Event()

    async def one(number):
        numbers = random.Random(number)
        keys = [b"%d-" % number + numbers.randbytes(numbers.randint(1, 200)) for _ in range(4)]
        reader, writer = await asyncio.open_connection(*server.protobuf)

        async def ask(*commands):
            ids = [numbers.getrandbits(64) for _ in commands]
            writer.write(b"".join(framed(pb.Message(id=id, **command)) for id, command in zip(ids, commands)))
            results = []
            for id in ids:
                prefix = b""
                while not prefix or prefix[-1] & 0x80:
                    prefix += await reader.readexactly(1)
                length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(prefix))
                response = pb.Response.FromString(await reader.readexactly(length))
                equal((response.id, response.code), (id, pb.CODE_OK), response.message)
                results.append(list(response.results))
            return results

        try:
            await ask({"ping": pb.Ping()})
            connected.release()
            await start.wait()
            for _ in range(2):
                values = [numbers.randbytes(numbers.choice([0, 10, 100, 1000, 5000])) for _ in keys]
                one_by_one = [{"set": pb.Set(entries=[entry(key, value)])} for key, value in zip(keys[:2], values)]
                together = {"set": pb.Set(entries=map(entry, keys[2:], values[2:]))}
                equal(await ask(*one_by_one, together), [[OK], [OK], [OK, OK]])
                want = [found(value) for value in values]
                equal(await ask({"get": pb.Get(keys=keys)}, {"get": pb.Get(keys=keys[:1])}), [want, want[:1]])
            equal(await ask({"delete": pb.Delete(keys=keys[1:])}), [[OK, OK, OK]])
            equal(await ask({"get": pb.Get(keys=keys)}), [want[:1] + [NOT_FOUND] * 3])
        finally:
            writer.close()

    tasks = [asyncio.create_task(one(number)) for number in range(1000)]
    all_connected = asyncio.gather(*(connected.acquire() for _ in tasks))
    await asyncio.wait([all_connected, *tasks], return_when=asyncio.FIRST_COMPLETED)
    start.set()
    await asyncio.gather(*tasks)


def test_protobuf_half_closed_clients_get_all_responses():
    with Server(2) as server:
        value = b"x" * 1_000_000
        with Connection(server.protobuf) as connection:
            equal(connection.set(entry(b"big", value), entry(b"k", b"v")), [OK, OK])
        for key, times, want in ((b"k", 1, b"v"), (b"k", 1000, b"v"), (b"big", 20, value)):
            for rest in (b"", b"\x80", framed(pb.Message(ping=pb.Ping()))[:-1], varint(100_000) + b"start"):
                with Connection(server.protobuf) as connection:
                    requests = [framed(pb.Message(id=number, get=pb.Get(keys=[key]))) for number in range(times)]
                    connection.send(b"".join(requests) + rest)
                    connection.socket.shutdown(socket.SHUT_WR)
                    for number in range(times):
                        response = connection.receive()
                        equal(response.id, number)
                        equal(list(response.results) == [found(want)], True, f"response {number} of {times}")
                    connection.ends()
        alive(server)


# --- bytes and sizes ------------------------------------------------------------------------------


@on_cores(1, 2, 8)
def test_protobuf_any_bytes(cores):
    numbers = random.Random(5)
    keys = [bytes([byte]) for byte in range(256)] + [bytes([byte, 0]) for byte in range(256)]
    keys += [numbers.randbytes(size) for size in (2, 16, 100, 249, 250, 250)] + [b"\0" * 250, b"\xff" * 250]
    with Server(cores) as server, Connection(server.protobuf) as connection:
        for key in keys:
            equal(connection.set(entry(key, key[::-1] + ANY_BYTES)), [OK])
        want = [found(key[::-1] + ANY_BYTES) for key in keys]
        equal(connection.get(*keys), want)
        for key, result in zip(keys, want):
            equal(connection.get(key), [result], repr(key))
        equal(connection.metrics().counters["items"], len(keys))
        equal(connection.delete(*keys), [OK] * len(keys))


@on_cores(1, 2, 8)
def test_protobuf_sizes(cores):
    """Around the size at which messages and values are kept by reference, and up to the limit."""
    numbers = random.Random(6)
    noise = numbers.randbytes(MEBIBYTE)
    # every size of a message between 4,096 bytes of message and 4,096 bytes of value, and varints' own steps
    sizes = [0, 1, 126, 127, 128, 129, *range(4060, 4110), 8191, 8192, 16_383, 16_384, 65_535, 65_536, 500_000, MEBIBYTE]
    with Server(cores) as server, Connection(server.protobuf) as connection:
        for number, size in enumerate(sizes):
            value, one, two = noise[:size], b"a%d" % number, b"b%d" % number
            responses = connection.ask(
                pb.Message(id=1, set=pb.Set(entries=[entry(one, value, flags=number)])),
                pb.Message(id=2, set=pb.Set(entries=[entry(two, value), entry(b"c", value[1:])])),
                pb.Message(id=3, get=pb.Get(keys=[one])),
                pb.Message(id=4, get=pb.Get(keys=[two, one, b"none", b"c"])),
            )
            want = [
                [OK], [OK, OK], [found(value, flags=number)],
                [found(value), found(value, flags=number), NOT_FOUND, found(value[1:])],
            ]
            equal([response.id for response in responses], [1, 2, 3, 4])
            equal([list(response.results) == results for response, results in zip(responses, want)], [True] * 4, f"{size} bytes")
        # what a value is replaced by, and deleted after, leaves the others alone
        for size in (MEBIBYTE, 10, 4096, 0, MEBIBYTE):
            equal(connection.set(entry(b"c", noise[:size])), [OK])
            equal(connection.get(b"c") == [found(noise[:size])], True, f"{size} bytes")
        for number, size in enumerate(sizes):
            equal(connection.get(b"b%d" % number) == [found(noise[:size])], True, f"{size} bytes, at the end")


@on_cores(1, 2, 8)
def test_protobuf_10_000_keys(cores):
    numbers = random.Random(8)
    items = {b"%d-" % number + numbers.randbytes(numbers.randint(0, 40)): numbers.randbytes(numbers.randint(0, 300)) for number in range(10_000)}
    keys = list(items)
    with Server(cores) as server, Connection(server.protobuf) as connection:
        equal(connection.set(*map(entry, items, items.values())) == [OK] * 10_000, True, "10,000 keys are set")
        numbers.shuffle(keys)
        equal(connection.get(*keys) == [found(items[key]) for key in keys], True, "10,000 keys are read")
        for part in (keys[:9999] + [b"none"], keys[:1] * 10_000):
            want = [found(items[key]) if key in items else NOT_FOUND for key in part]
            equal(connection.get(*part) == want, True, "10,000 keys are read")
        equal(connection.call(get=pb.Get(keys=keys + [b"one more"])).code, pb.CODE_INVALID_ARGUMENT)
        equal(connection.delete(*keys[1:], b"none") == [OK] * 9999 + [NOT_FOUND], True, "10,000 keys are deleted")
        equal(connection.metrics().counters["items"], 1)


# --- other protocols ------------------------------------------------------------------------------


@on_cores(1, 2, 8)
def test_protobuf_and_memcached_share_a_store(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection, contextlib.closing(client(server)) as mc:
        for number in range(100):
            key, value = b"key-%d" % number, ANY_BYTES * (number % 20)
            name = key.decode()
            equal(mc.set(name, value, flags=number), True)
            (got,) = connection.get(key, with_version=True)
            equal(got, found(value, flags=number, version=got.version))
            equal(mc.gets(name), (value, b"%d" % got.version), "the version of one is the cas of the other")
            # replaced at one door by what was read at the other
            (newer,) = connection.set(entry(key, b"new", condition=is_version(int(mc.gets(name)[1])), with_version=True))
            equal(newer.code, pb.CODE_OK)
            equal(mc.cas(name, b"x", b"%d" % got.version), False)
            equal(mc.cas(name, b"newest", b"%d" % newer.version), True)
            equal(connection.set(entry(key, condition=is_version(newer.version))), [CONDITION_FAILED])
            equal(connection.get(key), [found(b"newest")])
            equal(connection.set(entry(key, value, flags=U32_MAX - number)), [OK])
            equal(mc.raw_command(b"mg %s f s t" % key, end_tokens=b"\r\n"), b"HD f%d s%d t-1" % (U32_MAX - number, len(value)))
        keys = [b"key-%d" % number for number in range(100)]
        got = mc.get_many([key.decode() for key in keys])
        equal([result.value for result in connection.get(*keys)], [got[key.decode()] for key in keys])
        equal(mc.stats()[b"curr_items"], connection.metrics().counters["items"])

        # expiry: seconds there, milliseconds here
        equal(mc.set("e", b"v", expire=100), True)
        about(connection.get(b"e")[0].expires_at_ms, now_ms() + 100_000)
        equal(mc.touch("e", 500), True)
        about(connection.get(b"e")[0].expires_at_ms, now_ms() + 500_000)
        moment = now_ms() // 1000 + 10**8
        equal(mc.set("e", b"v", expire=moment), True)
        about(connection.get(b"e")[0].expires_at_ms, moment * 1000)
        equal(mc.touch("e", 0), True)
        equal(connection.get(b"e"), [found(b"v")])
        equal(mc.set("e", b"v", expire=-1), True)
        equal(connection.get(b"e"), [NOT_FOUND])
        for options in ({"ttl_ms": 200_400}, {"expires_at_ms": now_ms() + 200_400}):
            equal(connection.set(entry(b"e", b"v", **options)), [OK])
            equal(mc.raw_command(b"mg e t", end_tokens=b"\r\n"), b"HD t200")
        equal(connection.set(entry(b"e", ttl_ms=1)), [OK])
        time.sleep(0.05)
        equal(mc.get("e"), None)

        # what only the other one can do
        equal(connection.set(entry(b"n", b"9", flags=3)), [OK])
        (before,) = connection.get(b"n", with_version=True)
        equal(mc.incr("n", 2), 11)
        (after,) = connection.get(b"n", with_version=True)
        equal((after.value, after.flags, after.version != before.version), (b"11", 3, True))
        equal(mc.append("n", b"\0end"), True)
        equal(connection.get(b"n"), [found(b"11\0end", flags=3)])
        equal(connection.delete(b"n"), [OK])
        equal(mc.incr("n", 1), None)
        equal(mc.add("n", b"v"), True)
        equal(connection.set(entry(b"n", condition=ABSENT)), [CONDITION_FAILED])
        equal(mc.delete("n"), True)
        equal(connection.get(b"n"), [NOT_FOUND])

        # one empties what the other wrote
        connection.flush()
        equal(mc.get_many([key.decode() for key in keys]), {})
        equal(mc.set("n", b"v"), True)
        equal(mc.flush_all(), True)
        equal(connection.get(b"n", *keys), [NOT_FOUND] * 101)


def about(got, want):
    if abs(got - want) > 2000:
        raise AssertionError(f"expected about {want}, got {got}")


@on_cores(1, 2, 8)
def test_protobuf_and_the_simple_text_protocol_share_a_store(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection, Raw(server.text) as text:
        for number in range(50):
            key, value = b"key-%d" % number, b"%d\r\n" % number * 100
            text.ask(b"set %s %d\r\n%s\r\n" % (key, len(value), value), b"STORED\r\n")
            equal(connection.get(key), [found(value)])
            equal(connection.set(entry(key, b"new", flags=7, ttl_ms=10**6)), [OK])
            text.ask(b"get %s\r\n" % key, b"VALUE %s 3 \r\nnew\r\nEND\r\n" % key)
        text.ask(b"delete\r\n", b"DELETED\r\n")
        equal(connection.get(*(b"key-%d" % number for number in range(50))), [NOT_FOUND] * 50)


def binary_keys():
    numbers = random.Random(9)
    return [b"a b", b"line\r\nHD", b"\0", b"\xff\xfe", b" ", b"\n", b"a\r", *(numbers.randbytes(n) for n in range(3, 180, 9))]


@on_cores(1, 2, 8)
def test_protobuf_binary_keys_by_meta_commands(cores):
    keys = binary_keys()
    with Server(cores) as server, Connection(server.protobuf) as connection, Raw(server.memcached) as raw:
        for number, key in enumerate(keys):
            coded, value = base64.b64encode(key), key * 2
            raw.ask(b"mg %s v b\r\n" % coded, b"EN\r\n")
            (stored,) = connection.set(entry(key, value, flags=number, ttl_ms=300_400, with_version=True))
            head = b"VA %d f%d t300 c%d\r\n" % (len(value), number, stored.version)
            raw.ask(b"mg %s v f t c b\r\n" % coded, head + value + b"\r\n")
            raw.ask(b"ms %s 3 b T0 F9\r\nnew\r\n" % coded, b"HD\r\n")
            equal(connection.get(key), [found(b"new", flags=9)])
            raw.ask(b"md %s b\r\n" % coded, b"HD\r\n")
            equal(connection.get(key), [NOT_FOUND])
            raw.ask(b"ms %s %d b\r\n%s\r\n" % (coded, len(value), value), b"HD\r\n")
        equal(connection.get(*keys), [found(key * 2) for key in keys])


@on_cores(1, 2, 8)
def test_protobuf_binary_keys_are_shown_in_base64(cores):
    """A reply of memcached's protocol that repeats such a key is a line nevertheless."""
    with Server(cores) as server, Connection(server.protobuf) as connection, Raw(server.memcached, timeout=2) as raw:
        for key in binary_keys():
            coded = base64.b64encode(key)
            equal(connection.set(entry(key, b"1")), [OK])
            raw.ask(b"mg %s v k b\r\nmn\r\n" % coded, b"VA 1 k%s b\r\n1\r\nMN\r\n" % coded)
            raw.ask(b"ma %s v k b\r\nmn\r\n" % coded, b"VA 1 k%s b\r\n2\r\nMN\r\n" % coded)
            raw.send(b"me %s b\r\nmn\r\n" % coded)
            equal(raw.read(4 + len(coded)), b"ME %s " % coded)
            raw.socket.recv(1000)


# --- unusual messages -----------------------------------------------------------------------------


# Fields of no number that the definition uses, of every type.
UNKNOWN = field(15, U64_MAX) + field(99, b"of later") + fixed32(20) + fixed64((1 << 29) - 1) + group(77, field(1, 5) + group(2))


@on_cores(1, 2, 8)
def test_protobuf_unknown_fields_and_unusual_order(cores):
    rng = random.Random(12)

    def shuffled(*fields, unknown=True):
        fields = [*fields, *[UNKNOWN] * unknown]
        rng.shuffle(fields)
        return b"".join(fields)

    def ask(connection, *requests):
        connection.send(b"".join(map(framed, requests)))
        return [connection.receive() for _ in requests]

    with Server(cores) as server, Connection(server.protobuf) as connection:
        moment = now_ms() + 10**7
        for number, size in enumerate([0, 1, 10, 4000, 4096, 10_000] * 20):
            unknown = number % 3 > 0
            key, value, id = b"key-%d" % number, rng.randbytes(size), rng.getrandbits(64)
            condition = field(1, 1)
            item = shuffled(
                field(7, 1), field(6, condition), field(5, moment), field(3, number), field(2, value), field(1, key),
                unknown=unknown,
            )
            set_ = shuffled(field(3, shuffled(field(1, item), unknown=unknown)), field(1, id), unknown=unknown)
            get = shuffled(field(2, shuffled(field(1, key), field(2, 1), field(1, b"none"), unknown=unknown)), field(1, id))
            delete = shuffled(field(4, shuffled(field(1, key), field(2, field(2, 1)))), field(1, id))
            rest = [shuffled(field(kind, shuffled()), field(1, id)) for kind in (5, 6, 8)]
            pb.Message.FromString(set_ + get + delete)
            responses = ask(connection, set_, get, delete, *rest)
            equal([response.id for response in responses], [id] * 6)
            equal([response.code for response in responses], [pb.CODE_OK] * 6, str([response.message for response in responses]))
            (stored,) = responses[0].results
            hit = found(value, flags=number, expires_at_ms=moment, version=stored.version)
            got = list(responses[1].results)
            equal(sorted(map(str, got)) == sorted(map(str, [hit, NOT_FOUND])), True, f"{size} bytes")
            equal(list(responses[2].results), [OK])
            equal([response.HasField("metrics") for response in responses[3:]], [True, False, False])
            equal([response.HasField("topology") for response in responses[3:]], [False, False, True])

        # of a field that comes twice the later counts, as protobuf has it
        item = b"".join([
            field(1, b"old key"), field(2, b"old"), field(3, 1), field(4, 5), field(5, moment + 7), field(4, 10**9),
            field(5, moment), field(6, field(2, 1)), field(6, field(3, 7) + field(1, 1)), field(6, b""), field(1, b"k"), field(2, b"v"),
            field(3, 2), field(7, 1), field(7, 0),
        ])
        request = field(1, 5) + field(3, field(1, item)) + field(1, 6)
        equal(ask(connection, request)[0], pb.Response(id=6, results=[OK]))
        request = field(2, field(2, 1) + field(1, b"k") + field(2, 0)) + field(1, 5) + field(1, 7)
        equal(ask(connection, request)[0], pb.Response(id=7, results=[found(b"v", flags=2, expires_at_ms=moment)]))
        # of more bits than are kept
        request = field(3, field(1, field(1, b"k") + field(3, (7 << 32) + 5) + field(7, 1 << 40)))
        (response,) = ask(connection, request)
        equal(response.results[0].version > 0, True, "a true of many bits")
        equal(connection.get(b"k"), [found(b"", flags=5)])


@on_cores(1, 2, 8)
def test_protobuf_numbers_in_more_bytes_than_they_need(cores):
    with Server(cores) as server, Connection(server.protobuf) as connection:
        for padding in range(5):
            item = field(1, b"k") + field(2, b"w") + varint(3 << 3, padding) + varint(9, padding)
            entries = varint(1 << 3 | 2, padding) + varint(len(item), padding) + item
            request = field(1, 8) + varint(3 << 3 | 2, padding) + varint(len(entries), padding) + entries
            connection.send(varint(len(request), padding) + request)
            equal(connection.receive(), pb.Response(id=8, results=[OK]), f"{padding} bytes of padding")
            equal(connection.get(b"k"), [found(b"w", flags=9)])
            id = varint(1 << 3, padding) + varint(300, padding)
            for command in (b"", *(field(kind, b"") for kind in (2, 5, 6, 8)), field(2, field(1, b"k")), field(7, field(1, 10**9))):
                for request in (id + command, command + id):
                    pb.Message.FromString(request)
                    equal(connection.ask(request)[0].id, 300, f"the id in {request!r}")


# --- refusals -------------------------------------------------------------------------------------


LIMITS = ["--key-size-max", "20", "--item-size-max", "10k", "--request-bytes-max", "30k", "--request-keys-max", "3"]


def malformed():
    """(bytes that are no message as the definition has it, what they are)"""
    yield b"\xff\xff\xff", "a field without an end"
    yield b"\x08", "a number without an end"
    yield b"\x12\x05abc", "a field that is longer than the message"
    yield b"\x12" + varint(U64_MAX) + b"x", "a field of 2^64 - 1 bytes"
    yield b"\x00\x01", "field number 0"
    yield b"\x0e", "wire type 6"
    yield b"\x0f\x00", "wire type 7"
    yield varint(20 << 3 | 4), "the end of no group"
    yield varint(20 << 3 | 3) + field(1, 1), "a group without an end"
    yield varint(20 << 3 | 3) + varint(21 << 3 | 4), "a group with another's end"
    yield b"\x08" + b"\x80" * 10 + b"\x01", "a number of eleven bytes"
    yield fixed32(15, b"123"), "a short fixed32"
    yield fixed64(15, b"1234567"), "a short fixed64"
    yield field(2, field(1, b"k")) + field(2, field(1, b"l")), "a command twice"
    yield field(6, b"") + field(5, b""), "two commands"
    yield field(1, b"id"), "an id of bytes"
    yield fixed64(1) + field(6, b""), "a fixed id"
    for number in range(2, 10):
        yield field(number, 1), f"a command {number} that is a number"
        yield fixed32(number), f"a fixed command {number}"
        yield field(number, b"\xff"), f"noise in command {number}"
        yield field(number, b"\x0a\x05abc"), f"a cut field in command {number}"
    fine = field(1, field(1, b"fine"))
    for number, content in ((1, 5), (2, b"true")):
        yield field(2, field(1, b"fine") + field(number, content)), f"field {number} of Get"
    yield field(3, fine + field(1, 5)), "field 1 of Set"
    for number, content in ((1, 5), (2, 5), (3, b"x"), (4, b"x"), (5, b"x"), (6, 5), (7, b"x")):
        yield field(3, fine + field(1, field(1, b"k") + field(number, content))), f"field {number} of Entry"
        yield field(3, fine + field(1, field(1, b"k") + fixed32(number))), f"fixed field {number} of Entry"
    for number in (1, 2, 3):
        yield field(3, fine + field(1, field(1, b"k") + field(6, field(number, b"x")))), f"field {number} of Condition"
        yield field(4, field(1, b"fine") + field(2, field(number, b"x"))), f"field {number} of Condition"
    yield field(4, field(1, 5)), "field 1 of Delete"
    yield field(4, field(1, b"fine") + field(2, 5)), "field 2 of Delete"
    yield field(7, field(1, b"soon")), "field 1 of Flush"
    for number in (1, 2, 3):
        yield field(9, field(2, field(1, b"fine")) + field(number, 5)), f"field {number} of Txn"
    for number, content in ((1, 5), (2, 5)):
        yield field(9, field(1, field(1, b"fine") + field(number, content))), f"field {number} of Compare"
    for number, content in ((1, 5), (2, 5), (3, 5), (4, b"x")):
        yield field(9, field(2, field(1, b"fine") + field(number, content))), f"field {number} of Operation"


def refusals():
    """(request, code, what the message tells) under LIMITS"""
    invalid, too_large = pb.CODE_INVALID_ARGUMENT, pb.CODE_TOO_LARGE
    long = b"k" * 21
    for keys, why in (
        ([], "no key"), ([b""], "key 1 is empty"), ([b"fine", b""], "key 2 is empty"), ([long], "key 1 has 21 bytes"),
        ([b"fine", b"fine", long], "key 3 has 21 bytes"), ([b"1", b"2", b"3", b"4"], "more than 3 keys"),
    ):
        yield pb.Message(get=pb.Get(keys=keys)), invalid, why
        yield pb.Message(delete=pb.Delete(keys=keys)), invalid, why
        yield pb.Message(set=pb.Set(entries=[entry(key, b"v") for key in keys])), invalid, why
    yield pb.Message(set=pb.Set(entries=[entry(b"fine", b"v" * 5000), entry(b"", b"v" * 5000)])), invalid, "key 2 is empty"
    for conditions in (1, 3):
        delete = pb.Delete(keys=[b"fine", b"other"], conditions=[pb.Condition()] * conditions)
        yield pb.Message(delete=delete), invalid, f"{conditions} conditions for 2 keys"
    yield pb.Message(delete=pb.Delete(keys=[b"fine"], conditions=[ABSENT])), invalid, "absent"
    later = field(1, b"fine") + field(6, UNKNOWN)
    for request in (field(3, field(1, later)), field(4, field(1, b"fine") + field(2, UNKNOWN)), field(9, field(2, field(2, later)))):
        yield request, invalid, "condition"
    fine = pb.Operation(set=entry(b"fine"))
    for txn, why in (
        (pb.Txn(), "neither"), (pb.Txn(compare=[pb.Compare()]), "key 1 is empty"),
        (pb.Txn(compare=[pb.Compare(key=b"fine")], success=[pb.Operation(get=b"")]), "key 2 is empty"),
        (pb.Txn(success=[fine], failure=[pb.Operation(delete=long)]), "key 2 has 21 bytes"),
        (pb.Txn(success=[fine, fine], failure=[fine, fine]), "more than 3 keys"),
        (pb.Txn(success=[fine, pb.Operation(with_version=True)]), "operation 2"),
        (pb.Txn(success=[fine, pb.Operation(set=entry(b"k", condition=PRESENT))]), "operation 2 has a condition"),
    ):
        yield pb.Message(txn=txn), invalid, why
    large = entry(b"large", b"v" * 10_241)
    yield pb.Message(txn=pb.Txn(failure=[fine, pb.Operation(set=large)])), too_large, "entry 2"
    yield pb.Message(set=pb.Set(entries=[large])), too_large, "10241 bytes"
    yield pb.Message(set=pb.Set(entries=[entry(b"fine", b"v"), large])), too_large, "entry 2"
    for size in (40_000, 1 << 20):
        yield pb.Message(set=pb.Set(entries=[entry(b"fine", b"v" * size)])), too_large, "30720"
        yield pb.Message(get=pb.Get(keys=[b"fine" * (size // 4)])), too_large, "30720"
    yield pb.Message(), pb.CODE_UNKNOWN_COMMAND, "command"
    yield field(15, b"a command of later"), pb.CODE_UNKNOWN_COMMAND, "command"
    yield UNKNOWN, pb.CODE_UNKNOWN_COMMAND, "command"
    for data, _ in malformed():
        yield data, pb.CODE_MALFORMED, ""


@on_cores(1, 2, 8)
def test_protobuf_refusals(cores):
    """Each is told, counted, done nothing of, and the stream is in step behind it."""
    with Server(cores, *LIMITS) as server, Connection(server.protobuf) as connection:
        refused = 0
        for request, code, why in refusals():
            request = request if isinstance(request, bytes) else request.SerializeToString()
            for padding, cut in ((0, None), (0, 3), (5000, None), (5000, 3)):
                if padding and len(request) > 20_000:
                    continue
                # behind the padding the same message is collected first
                body = field(1, 77) + field(30, bytes(padding)) * (padding > 0) + request
                data = framed(pb.Message(id=1, ping=pb.Ping())) + framed(body)
                follow = framed(pb.Message(id=2, get=pb.Get(keys=[b"fine", b"k", b"large"])))
                if cut:
                    connection.send(data[:-cut])
                    equal(connection.receive().id, 1)
                    connection.send(data[-cut:] + follow)
                else:
                    connection.send(data + follow)
                    equal(connection.receive().id, 1)
                response = connection.receive()
                what = f"{why} {request[:60]} padding {padding}"
                equal(pb.Code.Name(response.code), pb.Code.Name(code), what)
                equal((why in response.message, response.message != ""), (True, True), f"{what}: {response.message!r}")
                equal(response, pb.Response(id=77, code=code, message=response.message), what)
                equal(connection.receive(), pb.Response(id=2, results=[NOT_FOUND] * 3), what)
                refused += 1
        equal(connection.metrics().counters["bad_requests"], refused)
        # at the limits all is well
        equal(connection.set(*(entry(b"%d" % n * 20, b"v" * 10_000) for n in range(3))), [OK] * 3)
        equal(connection.set(entry(b"1", b"v" * 10_240)), [OK])
        message = pb.Message(id=1, get=pb.Get(keys=[b"none"])).SerializeToString()
        exact = message + field(30, bytes(30_720 - len(message) - 5))
        equal(len(exact), 30_720)
        equal(connection.ask(exact), [pb.Response(id=1, results=[NOT_FOUND])])
        equal(connection.ask(exact + b"\x30\x00")[0].code, pb.CODE_TOO_LARGE)
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_responses_over_their_limit(cores):
    keys = [b"part-%d" % number for number in range(5)]
    reads = [pb.Operation(get=key) for key in keys]
    with Server(cores, "--response-bytes-max", "100k") as server, Connection(server.protobuf) as connection:
        equal(connection.set(*(entry(key, bytes(25_600)) for key in keys)), [OK] * 5)
        equal(connection.get(*keys[1:]), [found(bytes(25_600))] * 4)
        write = pb.Operation(set=entry(b"written"))
        for command in (
            {"get": pb.Get(keys=keys)}, {"get": pb.Get(keys=keys[:1] * 5)}, {"txn": pb.Txn(success=[*reads, write])},
        ):
            response = connection.call(**command)
            equal((response.code, response.message != ""), (pb.CODE_TOO_LARGE, True))
            equal(response, pb.Response(id=connection.id, code=response.code, message=response.message))
        equal(connection.get(b"written"), [NOT_FOUND], "of a refused Txn")
        equal(connection.txn(success=[*reads[:4], write]), (True, [found(bytes(25_600))] * 4 + [OK]))


@on_cores(1, 2, 8)
def test_protobuf_no_memory(cores):
    """A key's result without memory, or the whole message's; then reading and deleting go on, and there is memory again."""
    with Server(cores, "--max-memory", "96m", "--shards", str(cores)) as server, Connection(server.protobuf) as connection:
        keys, codes = [b"large-%d" % number for number in range(250)], collections.Counter()
        kept = []
        for key in keys:
            answer, pong, got = connection.ask(
                pb.Message(id=5, set=pb.Set(entries=[entry(key, key * 40_000)])),
                pb.Message(id=6, ping=pb.Ping()),
                pb.Message(id=7, get=pb.Get(keys=[key])),
            )
            equal([answer.id, pong.id, got.id], [5, 6, 7])
            code = answer.code or answer.results[0].code
            codes[pb.Code.Name(code), "message" if answer.code else "key"] += 1
            equal(answer.message != "", answer.code != pb.CODE_OK)
            equal(got.results[0].code, pb.CODE_NOT_FOUND if code else pb.CODE_OK)
            if not code:
                kept.append(key)
        equal({code for code, _ in codes}, {"CODE_OK", "CODE_OUT_OF_MEMORY"}, str(codes))
        # for so large a message there is none now
        message = pb.Set(entries=[entry(b"part-%d" % number, bytes(MEBIBYTE)) for number in range(12)])
        refused, pong = connection.ask(pb.Message(id=8, set=message), pb.Message(id=9, ping=pb.Ping()))
        equal((refused.id, refused.code, refused.message != "", pong.id), (8, pb.CODE_OUT_OF_MEMORY, True, 9))
        # small values up to the last byte, in groups: of each there is room for all or none
        small = collections.Counter()
        for number in range(2000):
            entries = [entry(b"small-%d-%d" % (number, n), bytes(1000)) for n in range(3)]
            response = connection.call(set=pb.Set(entries=entries))
            equal(response.code, pb.CODE_OK)
            results = [result.code for result in response.results]
            equal(len(set(results)), 1, "a part of a Set was done")
            equal(
                [result.code == pb.CODE_NOT_FOUND for result in connection.get(*(item.key for item in entries))],
                [code == pb.CODE_OUT_OF_MEMORY for code in results],
            )
            small.update(results)
            if small[pb.CODE_OUT_OF_MEMORY] >= 60:
                break
        equal(set(small), {pb.CODE_OK, pb.CODE_OUT_OF_MEMORY}, "small values")
        refused = sum(n for (code, _), n in codes.items() if code != "CODE_OK") + small[pb.CODE_OUT_OF_MEMORY] // 3
        counted = connection.metrics().counters["out_of_memory"]
        equal(counted >= refused, True, f"{refused} refused, {counted} counted")
        stored = [result for at in range(0, len(kept), 4) for result in connection.get(*kept[at : at + 4])]
        equal(stored == [found(key * 40_000) for key in kept], True, "what was stored is still there")
        equal(connection.delete(*kept), [OK] * len(kept))
        # what was freed can be used again as soon as it is known to be free
        again = pb.Set(entries=[entry(kept[0], bytes(300_000))])
        until(lambda: connection.call(set=again).code == pb.CODE_OK, "there is memory again")
        connection.flush()
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_streams_out_of_step_are_closed(cores):
    with Server(cores) as server:
        for bad in (b"\xff" * 20, b"\x80\x80\x80\x80\x80\x01", b"\xff\xff\xff\xff\x1f", b"\x80\x80\x80\x80\x10"):
            for together in (True, False):
                with Connection(server.protobuf) as connection:
                    ping = framed(pb.Message(id=4, ping=pb.Ping()))
                    connection.send(ping + bad if together else ping)
                    equal(connection.receive(), pb.Response(id=4))
                    for byte in b"" if together else bad:
                        with contextlib.suppress(ConnectionError):
                            connection.send(bytes([byte]))
                    response = connection.receive()
                    equal((response.id, response.code), (0, pb.CODE_MALFORMED), repr(bad))
                    equal(response.message != "", True, "a reason")
                    connection.ends()
        # the longest length there is, is one: told so, and read as far as it comes
        with Connection(server.protobuf) as connection:
            connection.send(varint(U32_MAX) + field(1, 3))
            response = connection.receive()
            equal((response.id, response.code), (3, pb.CODE_TOO_LARGE))
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_http_is_hung_up(cores):
    # some are shorter than their first letter says, read as a length
    hung_up(cores, itertools.product(VERBS, [b"/", b"/index.html"]), headers=b"")
    paths = b"/", b"/index.html", b"/" + b"x" * 5000, b"/cc" + b"Pa" * 500
    hung_up(cores, itertools.product(VERBS, paths))


@on_cores(1, 2, 8)
def test_protobuf_http_that_is_a_message_is_hung_up(cores):
    """A page chooses the path. Read as protobuf, these requests hold a Flush, a Metrics, a Topology, a Ping and a Txn."""
    for command in b":*B2J":
        hung_up(cores, [(b"OPTIONS", b"/abc" + bytes([command]) + b"B" + b"Pa" * 33)])


VERBS = b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE"


HEADERS = b"Host: localhost:7001\r\nUser-Agent: a browser of these days\r\nOrigin: http://example.com\r\nAccept: */*\r\n"


def hung_up(cores, requests, headers=HEADERS):
    """A browser's requests close their connections, unanswered and without effect."""
    with Server(cores) as server, Connection(server.protobuf) as other:
        equal(other.set(entry(b"kept", b"v")), [OK])
        flush = framed(pb.Message(flush=pb.Flush()))
        for (verb, path), step in itertools.product(requests, (0, 7)):
            data = verb + b" " + path + b" HTTP/1.1\r\n" + headers + b"\r\n" + flush * 25 * (headers != b"")
            what = f"{verb.decode()} {path[:20].decode()} in pieces of {step or 'any size'}"
            with Connection(server.protobuf, timeout=2) as connection, contextlib.suppress(ConnectionError):
                for at in range(0, min(len(data), 500), step or len(data)):
                    connection.send(data[at : at + (step or len(data))])
                try:
                    got = connection.incoming.read()
                except TimeoutError:
                    got = b"nothing, and no end"
            equal(other.get(b"kept"), [found(b"v")], f"the store behind {what}")
            equal(got, b"", f"the answer to {what}")
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_connections_over_the_limit_are_told(cores):
    with Server(cores, "--connections-max", "5", "--core-ports", "0") as server, contextlib.ExitStack() as stack:
        addresses = [server.protobuf, *server.core_ports]
        connections = [stack.enter_context(Connection(addresses[n % len(addresses)])) for n in range(4)]
        for connection in connections:
            connection.ok(ping=pb.Ping())
        memcached = stack.enter_context(Raw(server.memcached))
        memcached.ask(b"mn\r\n", b"MN\r\n")
        for number in range(20):
            with Connection(addresses[number % len(addresses)]) as refused:
                if number % 2:
                    # what it has sent by then changes nothing
                    with contextlib.suppress(ConnectionError):
                        refused.send(framed(pb.Message(id=1, ping=pb.Ping())))
                response = refused.receive()
                equal((response.id, response.code), (0, pb.CODE_UNAVAILABLE), f"connection {number}")
                equal(response.message != "", True, "a reason")
                refused.ends()
        counters = connections[0].metrics().counters
        equal((counters["connections_refused"], counters["connections"]), (20, 5))
        for connection in connections:
            connection.ok(ping=pb.Ping())
        memcached.socket.close()

        def admitted():
            with Connection(server.protobuf) as connection:
                return connection.ask(pb.Message(ping=pb.Ping()))[0].code == pb.CODE_OK

        eventually(admitted, "a place that became free is given away")


# --- bad clients ----------------------------------------------------------------------------------


def mutated(numbers, model):
    """The bytes of a request with some of them changed, taken away or added."""
    message, _ = model.request()
    body = bytearray(message.SerializeToString()[:6000])
    for _ in range(numbers.choice([1, 1, 2, 5, 20])):
        at = numbers.randint(0, min(len(body), numbers.choice([4, 30, len(body)])))
        kind = numbers.randint(0, 3)
        if kind == 0 and at < len(body):
            body[at] = numbers.randint(0, 255)
        elif kind == 1:
            body[at:at] = numbers.randbytes(numbers.randint(1, 4))
        elif kind == 2:
            del body[at : at + numbers.randint(1, 10)]
        elif at < len(body):
            body[at] ^= 1 << numbers.randint(0, 7)
    return bytes(body)


def noise(numbers, model):
    """Bytes that are a message, or nearly, or not at all; no Flush, which would be obeyed."""
    kind = numbers.randint(0, 9)
    if kind < 2:
        body = numbers.randbytes(numbers.choice([0, 1, 2, 5, 20, 100, 1000, 4096, 5000]))
    elif kind < 4:
        # random fields within random fields
        body = b""
        for _ in range(numbers.randint(1, 4)):
            inner = b"".join(field(numbers.randint(1, 9), numbers.choice([numbers.getrandbits(64), b"k", b"\x08\x01"])) for _ in range(3))
            body = field(numbers.choice([2, 3, 4, 5, 6, 8, 9]), body + field(1, inner) + inner * numbers.randint(0, 1))
        body += numbers.choice([b"", field(1, 5), UNKNOWN])
    else:
        body = mutated(numbers, model)
    with contextlib.suppress(DecodeError):
        if pb.Message.FromString(body).HasField("flush"):
            return b""
    return body


def agrees(body, response):
    """What the server accepts is a message to the library too, and has as many keys."""
    if response.code == pb.CODE_OK:
        try:
            message = pb.Message.FromString(body)
        except DecodeError:
            raise AssertionError(f"the server takes {body[:200]!r} for a message, and answers {response}") from None
        kind = message.WhichOneof("command")
        branch = message.txn.success if response.txn.succeeded else message.txn.failure
        asked = {"get": message.get.keys, "set": message.set.entries, "delete": message.delete.keys, "txn": branch}.get(kind, [])
        equal((len(response.results), response.id), (len(asked), message.id), repr(body[:200]))
        equal((response.HasField("metrics"), response.HasField("topology")), (kind == "metrics", kind == "topology"), repr(body[:200]))
    else:
        equal((len(response.results), response.message != ""), (0, True), repr(body[:200]))


@on_cores(1, 2, 8)
def test_protobuf_noise_in_frames(cores):
    """Every frame gets one response, whatever it holds, and no other client notices."""
    numbers, model, codes = random.Random(cores), Model(77), collections.Counter()
    with Server(cores) as server, Connection(server.protobuf) as other:
        other.set(entry(b"kept", ANY_BYTES))
        for _ in range(40):
            with Connection(server.protobuf) as connection:
                bodies = [noise(numbers, model) for _ in range(75)]
                sender = threading.Thread(target=send_in_pieces, args=(connection, b"".join(map(framed, bodies)), numbers))
                sender.start()
                for body in bodies:
                    response = connection.receive()
                    equal(response is None, False, f"the stream ends at {body[:200]!r}")
                    agrees(body, response)
                    codes[pb.Code.Name(response.code)] += 1
                sender.join()
                connection.ok(ping=pb.Ping())
            equal(other.get(b"kept"), [found(ANY_BYTES)])
        # the noise is of all kinds
        equal(min(codes[name] for name in ("CODE_OK", "CODE_INVALID_ARGUMENT", "CODE_UNKNOWN_COMMAND", "CODE_MALFORMED")) > 10, True, str(codes))
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_noise_without_frames(cores):
    numbers, model = random.Random(50 + cores), Model(78)
    with Server(cores) as server, Connection(server.protobuf) as other:
        for number in range(400):
            data = numbers.randbytes(numbers.choice([1, 5, 50, 500, 5000, 50_000]))
            if number % 2:
                data = b"".join(framed(mutated(numbers, model)) for _ in range(5)) + data
            with Connection(server.protobuf) as connection, contextlib.suppress(ConnectionError):
                send_in_pieces(connection, data, numbers)
                if number % 3:
                    with contextlib.suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_WR)
                    # responses perhaps, and the end in time
                    connection.incoming.read()
            equal(other.set(entry(b"kept", b"%d" % number)), [OK])
        alive(server)


@on_cores(1, 2, 8)
def test_protobuf_clients_that_never_finish(cores):
    """What they announce costs little memory while it does not come, and their leaving gives it to others."""
    with Server(cores) as server, Connection(server.protobuf) as other:
        alive(server)
        before, peaks = server.rss(), []
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for number in range(200):
                    connection = stack.enter_context(Connection(server.protobuf))
                    size = [10, 4000, 5000, 16 * MEBIBYTE, U32_MAX][number % 5]
                    connection.send(varint(size) + b"\x08\x01\x1a"[: number % 4] + bytes(number % 7 * 1000 % size))
                patience(other)
                peaks.append(server.rss())
            eventually(lambda: other.metrics().counters["connections"] == 1, "all have left")
        if max(peaks) > before + 256 * MEBIBYTE:
            raise AssertionError(f"{max(peaks) - before >> 20} MiB are held for bytes that never came")
        settled(server, peaks[0] + 64 * MEBIBYTE)


@on_cores(1, 2, 8)
def test_protobuf_clients_that_never_read(cores):
    with Server(cores) as server, Connection(server.protobuf) as other, contextlib.ExitStack() as stack:
        keys = [b"big-%d" % number for number in range(3)]
        equal(other.set(*(entry(key, b"x" * 1_000_000) for key in keys)), [OK] * 3)
        before = server.rss()
        # each asks for a gigabyte, as far as the server takes the requests
        request = b"".join(framed(pb.Message(get=pb.Get(keys=keys[: 1 + n % 3]))) for n in range(500))
        for _ in range(10):
            connection = stack.enter_context(Connection(server.protobuf))
            connection.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.socket.send(request)
        patience(other)
        time.sleep(0.3)
        patience(other)
        if server.rss() > before + 200 * MEBIBYTE:
            raise AssertionError(f"{server.rss() - before >> 20} MiB are held for clients that do not read")
        stack.close()
        eventually(lambda: other.metrics().counters["connections"] == 1, "all have left")


def patience(connection):
    """A client is served promptly beside bad ones."""
    for number in range(100):
        began = time.monotonic()
        connection.set(entry(b"p%d" % number), entry(b"q%d" % number))
        equal(connection.get(b"p%d" % number, b"q%d" % number), [found(b"")] * 2)
        if time.monotonic() - began > 1:
            raise AssertionError(f"two requests took {time.monotonic() - began:.1f} s beside bad clients")


# --- straight to the owner ------------------------------------------------------------------------


def token(topology, key):
    if topology.token_function == pb.TopologyReport.FIRST_BYTES:
        return int.from_bytes(key[:8].ljust(8, b"\0"), "big")
    # of the first "{" and the next "}", when there is something between them
    tag = re.match(rb"[^{]*\{([^}]+)\}", key, re.S)
    return xxhash.xxh3_64_intdigest(tag.group(1) if tag else key, topology.seed)


def owner(topology, key):
    starts = [a_range.start for a_range in topology.ranges]
    return topology.ranges[bisect.bisect_right(starts, token(topology, key)) - 1].core


class Routed:
    """A connection to each core, and how many requests went from one core to another."""

    def __init__(self, stack, server):
        self.cores = [stack.enter_context(Connection(address)) for address in server.core_ports]
        self.topology = self.cores[0].topology()
        # collecting metrics is itself a request to every other core
        self.own = -self.told() + self.told()
        self.before = self.told()

    def told(self):
        return self.cores[0].metrics().counters["forwarded"]

    def forwarded(self):
        """Since it was asked last."""
        now = self.told()
        since, self.before = now - self.before - self.own, now
        return since

    def to(self, key):
        return self.cores[owner(self.topology, key)]

    def past(self, key):
        """A core that does not own the key."""
        return self.cores[(owner(self.topology, key) + 1) % len(self.cores)]


TAGGED = [
    b"{tag}one", b"{tag}two", b"before{tag}after", b"tag", b"{}", b"{}empty", b"{}{second}", b"{", b"}", b"{open", b"close}",
    b"}{turned}", b"{{double}}", b"a{b}c{d}e", b"{b}", b"{\0\r\n}any", b"{\xff}x", b"{x}", b"x", b"{" * 30 + b"}", b"{a}" * 20,
]


def routes(server, cores, keys):
    """Requests to their keys' owners stay there, and others go on to them."""
    with contextlib.ExitStack() as stack:
        routed = Routed(stack, server)
        equal(routed.forwarded(), 0)
        by_core = collections.defaultdict(list)
        for key in keys:
            by_core[owner(routed.topology, key)].append(key)
        equal(len(by_core), cores, "every core owns some keys")
        for key in keys:
            equal(routed.to(key).set(entry(key, key[::-1], with_version=True))[0].code, pb.CODE_OK)
            equal(routed.to(key).get(key), [found(key[::-1])])
        for core, of_core in by_core.items():
            equal(routed.cores[core].get(*of_core), [found(key[::-1]) for key in of_core])
            equal(routed.cores[core].set(*map(entry, of_core)), [OK] * len(of_core))
            equal(routed.cores[core].delete(*of_core[::2]), [OK] * len(of_core[::2]))
        equal(routed.forwarded(), 0, "routed requests went to another core")
        for at in range(0, len(keys), 10):
            for key in keys[at : at + 10]:
                equal(routed.past(key).set(entry(key, key)), [OK])
            # a few at a time, so that a wrong owner has a name
            want = len(keys[at : at + 10]) * (cores > 1)
            equal(routed.forwarded(), want, f"requests for {keys[at : at + 10]} that went to another core")
        for key in keys:
            equal(routed.past(key).get(key), [found(key)])
        equal(routed.forwarded(), len(keys) * (cores > 1))
        equal(routed.cores[0].get(*keys), [found(key) for key in keys])
        equal(routed.forwarded() > 0, cores > 1, "a request for keys of all cores")


@on_cores(1, 2, 8)
def test_protobuf_core_ports(cores):
    numbers = random.Random(cores)
    keys = list(dict.fromkeys([numbers.randbytes(numbers.randint(1, 100)) for _ in range(250)] + TAGGED))
    for options in ([], ["--shards", str(5 * cores + 2)], ["--token-seed", "0"]):
        with Server(cores, "--core-ports", "0", *options) as server:
            equal(len(set(server.core_ports)), cores)
            for address in [server.protobuf, *server.core_ports]:
                with Connection(address) as connection:
                    topology = connection.topology()
                    equal([("127.0.0.1", port) for port in topology.core_ports], server.core_ports)
                    equal(connection.ok(ping=pb.Ping()), pb.Response(id=connection.id))
                    equal(connection.set(entry(b"k", b"%d" % address[1])), [OK])
                    equal(connection.get(b"k"), [found(b"%d" % address[1])])
            routes(server, cores, keys)
            alive(server)


@on_cores(1, 2, 8)
def test_protobuf_connections_to_a_core_stay_there(cores):
    """However many it has."""
    with Server(cores, "--core-ports", "0") as server, contextlib.ExitStack() as stack:
        routed = Routed(stack, server)
        core = owner(routed.topology, b"k")
        for _ in range(30):
            connection = stack.enter_context(Connection(server.core_ports[core]))
            equal(connection.set(entry(b"k")), [OK])
        equal(routed.forwarded(), 0)


@on_cores(1, 2, 8)
def test_protobuf_tags_keep_keys_together(cores):
    with Server(cores, "--core-ports", "0", "--shards", "64") as server, contextlib.ExitStack() as stack:
        routed = Routed(stack, server)
        for number in range(50):
            keys = [b"%s{user%d}%s" % (front, number, back) for front in (b"", b"cart:", b"}") for back in (b"", b":name", b"{x}")]
            equal(len({owner(routed.topology, key) for key in keys}), 1)
            equal(routed.to(keys[0]).set(*map(entry, keys)), [OK] * 9)
            equal(routed.to(b"user%d" % number).get(*keys), [found(b"")] * 9)
        equal(routed.forwarded(), 0)


@on_cores(1, 2, 8)
def test_protobuf_routes_of_ordered_keys(cores):
    numbers = random.Random(cores)
    boundaries = [b"b", b"customer", b"d", b"order:00", b"order:01", b"p", b"\xc3\xa9"][: max(cores, 3) - 1]
    keys = [numbers.randbytes(numbers.randint(1, 20)) for _ in range(150)]
    keys += [bytes([first]) + b"x" * numbers.randint(0, 9) for first in range(256)]
    for boundary in boundaries:
        at = int.from_bytes(boundary.ljust(8, b"\0"), "big")
        keys += [boundary, boundary + b"\0", boundary + b"zz", (at - 1).to_bytes(8, "big"), (at + 1).to_bytes(8, "big") + b"tail"]
    keys += [b"{order:00}" + b"a", b"order:00{b}"]
    options = ["--partitioner", "ordered", "--boundaries", ",".join(key.decode() for key in boundaries), "--core-ports", "0"]
    with Server(cores, *options) as server:
        routes(server, cores, list(dict.fromkeys(keys)))


def free_ports(count):
    """The first of so many ports in a row that nobody uses."""
    for base in range(21_000, 32_000, 50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return base
    raise AssertionError(f"there are no {count} free ports in a row")


@on_cores(1, 2, 8)
def test_protobuf_core_ports_from_a_base(cores):
    base = free_ports(cores)
    with Server(cores, "--core-ports", str(base)) as server:
        equal(server.core_ports, [("127.0.0.1", base + core) for core in range(cores)])
        for address in server.core_ports:
            with Connection(address) as connection:
                equal([*connection.topology().core_ports], [base + core for core in range(cores)])
    for core in range(cores):
        raises(ConnectionError, socket.create_connection, ("127.0.0.1", base + core), timeout=5)


# --- starting -------------------------------------------------------------------------------------


def refuses_to_start(*options, naming, protobuf="127.0.0.1:0"):
    """Exit code 1, and one message, that names the cause."""
    code, messages = start("--memcached", "127.0.0.1:0", "--text", "127.0.0.1:0", "--protobuf", protobuf, *options)
    what = f"--protobuf {protobuf} {' '.join(options)}"
    equal(code, 1, f"{what}: {messages}")
    said = [line for line in messages.splitlines() if line.startswith("memkv-tpc: ")]
    equal(len(said), 1, f"{what}: messages in {messages!r}")
    for word in naming:
        if word not in said[0]:
            raise AssertionError(f"{what}: no {word} in {said[0]!r}")


def test_protobuf_bad_options():
    for cores in ("1", "2", "8"):
        on = ["--cores", cores]
        refuses_to_start(*on, "--core-ports", "0", protobuf="off", naming=["--core-ports", "--protobuf"])
        refuses_to_start(*on, "--core-ports", "7200", protobuf="off", naming=["--core-ports", "--protobuf"])
        for size in ("0", "4095", "2g", "3g"):
            for limit in ("--request-bytes-max", "--response-bytes-max"):
                refuses_to_start(*on, limit, size, naming=[limit])
    for cores, base in (("2", "65535"), ("8", "65529")):
        last = str(int(base) + int(cores) - 1)
        refuses_to_start("--cores", cores, "--core-ports", base, naming=["--core-ports", base, last])
    for size in ("4096", str((2 << 30) - 1)):
        with Server(1, "--request-bytes-max", size, "--response-bytes-max", size) as server:
            alive(server)
    for options in (["--core-ports", "65536"], ["--core-ports", "x"], ["--request-bytes-max", "many"],
                    ["--request-keys-max", "0"], ["--request-keys-max", "65536"], ["--protobuf", "here"]):
        code, messages = start("--memcached", "127.0.0.1:0", "--text", "127.0.0.1:0", *options)
        equal(code, 2, f"{' '.join(options)}: {messages}")
        equal(options[0] in messages, True, messages)


def test_protobuf_core_port_in_use():
    base = free_ports(8)
    for cores in (1, 2, 8):
        for taken in {0, cores - 1}:
            with socket.create_server(("127.0.0.1", base + taken)):
                options = ["--cores", str(cores), "--core-ports", str(base)]
                refuses_to_start(*options, naming=["--core-ports", str(base + taken)])
    # by one of the server's own
    options = ["--cores", "2", "--core-ports", str(base)]
    refuses_to_start(*options, protobuf=f"127.0.0.1:{base + 1}", naming=["--core-ports", str(base + 1)])


def test_protobuf_port_of_another_protocol():
    port = str(free_ports(1))
    for protocols in itertools.permutations(("--memcached", "--text", "--protobuf"), 2):
        options = [word for protocol in protocols for word in (protocol, f"127.0.0.1:{port}")]
        (off,) = {"--memcached", "--text", "--protobuf"} - set(protocols)
        code, messages = start("--cores", "2", *options, off, "off", seconds=2)
        equal((code, port in messages), (1, True), f"{' '.join(options)}: {messages!r}")
