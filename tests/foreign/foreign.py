"""The foreign tests: real clients and bad clients against the server binary.

Started by `run`, which installs what is needed and sets MEMKV_TPC. A test is a
function whose name begins with test_; it fails by raising. The golden
transcripts come first, many at a time, so that their sleeps overlap; then the
tests here, of the text protocols, and those in protobuf.py, json_line.py, memory.py, metrics.py,
grpc_service.py, http_api.py and page.py.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import os
import pathlib
import random
import re
import resource
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

from pymemcache.exceptions import MemcacheClientError, MemcacheServerError

import grpc_service
import http_api
import json_line
import memory
import metrics
import page
import protobuf
import replay
from support import (
    BINARY, MEBIBYTE, ON_FREE_PORTS, START_SECONDS, Raw, Server, attempt, client, equal, on_cores, raises, settled, start, tests_of,
)

WORDS = pathlib.Path("/usr/share/dict/words")


def alive(server):
    """The server still answers on both ports."""
    with Raw(server.memcached) as raw:
        raw.ask(b"set alive 0 0 2\r\nhi\r\nget alive\r\n", b"STORED\r\nVALUE alive 0 2\r\nhi\r\nEND\r\n")
    with Raw(server.text) as raw:
        raw.ask(b"get alive\r\n", b"VALUE alive 2 \r\nhi\r\nEND\r\n")


# --- golden transcripts ---------------------------------------------------------------------------


def golden_jobs():
    """(name, function) for every transcript and number of cores, and for the real memcached."""
    for path in sorted((replay.GOLDEN / "memcached").glob("*.txt")):
        if not replay.Transcript(path).differs:
            yield f"golden memcached/{path.name} against the real memcached", lambda p=path: golden_real(p)
    for cores in (1, 2):
        for folder in ("memcached", "text", "json_line"):
            for path in sorted((replay.GOLDEN / folder).glob("*.txt")):
                yield f"golden {folder}/{path.name} --cores {cores}", lambda p=path, c=cores: golden(p, c)


def golden_real(path):
    for _, why in replay.validate([path], [0], 1):
        if why:
            raise AssertionError(why)


def golden(path, cores):
    transcript = replay.Transcript(path)
    folder = path.parent.name
    with Server(cores) as server:
        address = getattr(server, folder)
        for size in [0] if transcript.sleeps else [0, 10, 1]:
            replay.empty(server.memcached, False)
            if why := replay.replay(path, address, size):
                raise AssertionError(why)


# --- loading --------------------------------------------------------------------------------------


def word_rows():
    return [(word, str(n)) for n, word in enumerate(WORDS.read_text(encoding="utf-8").split("\n"), 1) if word]


@on_cores(1, 2, 8)
def test_word_list(cores):
    rows = word_rows()
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.writelines(f"{word} {number}\n" for word, number in rows)
        file.flush()
        with Server(cores, "--load", file.name) as server:
            with contextlib.closing(client(server, allow_unicode_keys=True)) as memcached:
                for at in range(0, len(rows), 500):
                    part = dict(rows[at : at + 500])
                    got = memcached.get_many(list(part))
                    equal({word: value.decode() for word, value in got.items()}, part, f"words from {at}")
            with Raw(server.text) as raw:
                for word, number in rows[:: len(rows) // 50]:
                    key, value = word.encode(), number.encode()
                    raw.ask(b"get %s\r\n" % key, b"VALUE %s %d \r\n%s\r\nEND\r\n" % (key, len(value), value))


# --- libmemcached ---------------------------------------------------------------------------------


def tool(*command, code=0):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != code:
        raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def memccapable(address):
    """The names of the ASCII tests that pass, and of those that do not."""
    command = ["memccapable", "-a", "-h", address[0], "-p", str(address[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = re.findall(r"^(ascii .*?)\s+\[(\w+)\]\s*$", done.stdout, re.M)
    if not results:
        raise AssertionError(f"memccapable says: {done.stdout}{done.stderr}")
    return {name for name, result in results if result == "pass"}, {name for name, result in results if result != "pass"}


def test_memccapable():
    with replay.Memcached() as real:
        real_passes, _ = memccapable(real.address)
    for cores in (1, 2):
        with Server(cores) as server:
            passes, others = memccapable(server.memcached)
        equal(sorted(others - (others - real_passes)), [], f"failed with --cores {cores}, passed with memcached")
        equal(sorted(real_passes - passes), [], f"not passed with --cores {cores}, passed with memcached")


def test_memcslap():
    with Server(2) as server:
        servers = f"--servers={server.memcached[0]}:{server.memcached[1]}"
        for test, verb in (("set", "set"), ("get", "get"), ("mget", "mget")):
            out = tool("memcslap", servers, "--concurrency=20", f"--test={test}", "--execute-number=1000")
            if not re.search(rf"Time to {verb}\s+20000 keys by\s+20 threads", out):
                raise AssertionError(f"memcslap --test={test} says: {out}")


def test_libmemcached_tools():
    with Server(2) as server, tempfile.TemporaryDirectory() as folder:
        servers = f"--servers={server.memcached[0]}:{server.memcached[1]}"
        contents = {f"file{n}": "".join(f"line {i} of file {n}\n" for i in range(n * 100 + 1)) for n in range(20)}
        for name, text in contents.items():
            pathlib.Path(folder, name).write_text(text)
        tool("memccp", servers, *(f"{folder}/{name}" for name in contents))
        for name, text in contents.items():
            equal(tool("memccat", servers, name), text + "\n", f"memccat {name}")
            tool("memcexist", servers, name)
            tool("memctouch", servers, "--expire=100", name)
        stats = tool("memcstat", servers)
        if not re.search(r"^\s*curr_items: 20$", stats, re.M):
            raise AssertionError(f"memcstat says: {stats}")
        for name in contents:
            tool("memcrm", servers, name)
        tool("memcrm", servers, "file0", code=1)
        tool("memccat", servers, "file0", code=1)
        tool("memcping", servers)
        tool("memcflush", servers)


# --- pymemcache -----------------------------------------------------------------------------------


@on_cores(1, 2)
def test_pymemcache(cores):
    with Server(cores) as server, contextlib.closing(client(server)) as mc:
        equal(mc.get("a"), None)
        equal(mc.get("a", b"default"), b"default")
        equal(mc.set("a", b"1"), True)
        equal(mc.get("a"), b"1")
        equal(mc.add("a", b"2"), False)
        equal(mc.add("b", b"2"), True)
        equal(mc.replace("c", b"2"), False)
        equal(mc.replace("b", b"22"), True)
        equal(mc.append("b", b"z"), True)
        equal(mc.prepend("b", b"a"), True)
        equal(mc.append("c", b"z"), False)
        equal(mc.prepend("c", b"z"), False)
        equal(mc.get("b"), b"a22z")

        value, unique = mc.gets("b")
        equal(value, b"a22z")
        equal(mc.cas("b", b"x", unique), True)
        equal(mc.cas("b", b"y", unique), False)
        equal(mc.cas("nope", b"y", unique), None)
        equal(mc.get("b"), b"x")
        equal(mc.gets("nope"), (None, None))
        both = mc.gets_many(["a", "b", "nope"])
        equal({key: value for key, (value, _) in both.items()}, {"a": b"1", "b": b"x"})
        if both["a"][1] == both["b"][1]:
            raise AssertionError("two items have the same unique number")

        equal(mc.incr("a", 9), 10)
        equal(mc.decr("a", 1), 9)
        equal(mc.get("a"), b"9 ")
        equal(mc.decr("a", 100), 0)
        equal(mc.incr("a", 2**64 - 1), 2**64 - 1)
        equal(mc.incr("a", 2), 1)
        equal(mc.incr("nope", 1), None)
        raises(MemcacheClientError, mc.incr, "b", 1)
        equal(mc.delete("b"), True)
        equal(mc.delete("b"), False)
        equal(mc.delete_many(["a", "nope"]), True)
        equal(mc.get("a"), None)

        equal(mc.set("t", b"x", expire=100), True)
        equal(mc.touch("t", 200), True)
        equal(mc.touch("nope", 200), False)
        equal(mc.raw_command(b"mg t t", end_tokens=b"\r\n"), b"HD t200")
        equal(mc.raw_command(b"gat 300 t", end_tokens=b"END\r\n"), b"VALUE t 0 1\r\nx\r\n")
        equal(mc.raw_command(b"mg t t", end_tokens=b"\r\n"), b"HD t300")
        equal(mc.set("t", b"x", expire=-1), True)
        equal(mc.get("t"), None)

        many = {f"key-{n}": b"value %d" % n * (n % 7) for n in range(2000)}
        equal(mc.set_many(many), [])
        equal(mc.get_many(list(many) + ["nope"]), many)
        raises(MemcacheServerError, mc.set_many, {"fine": b"x", "huge": b"x" * (MEBIBYTE + 1)})
        equal(mc.get("fine"), b"x")

        # values of any bytes and of many sizes
        numbers = random.Random(1)
        for size in (0, 1, 2, 100, 1023, 4096, 65535, 65536, 500_000, MEBIBYTE - 1000):
            value = numbers.randbytes(size)
            equal(mc.set("bytes", value), True, f"{size} bytes")
            equal(mc.get("bytes") == value, True, f"{size} bytes come back")
        value = bytes(range(256)) + b"\r\nEND\r\nVALUE x 0 1\r\n"
        equal(mc.set("bytes", value), True)
        equal(mc.get("bytes"), value)
        raises(MemcacheServerError, mc.set, "bytes", b"x" * (MEBIBYTE + 1))
        equal(mc.get("bytes"), None, "after a value that was too large")

        # without replies
        for n in range(300):
            mc.set("quiet", b"%d" % n, noreply=True)
        mc.append("quiet", b"0", noreply=True)
        mc.incr("quiet", 1, noreply=True)
        mc.touch("quiet", 100, noreply=True)
        mc.add("quiet", b"no", noreply=True)
        mc.delete("key-1", noreply=True)
        mc.set("huge", b"x" * (MEBIBYTE + 1), noreply=True)
        equal(mc.get("quiet"), b"2991")
        equal(mc.get("key-1"), None)

        if not re.fullmatch(rb"\d+\.\d+\.\d+.*", mc.version()):
            raise AssertionError(f"version is {mc.version()!r}")
        stats = mc.stats()
        for name in ("pid", "uptime", "time", "version", "curr_items", "total_items", "cmd_get", "cmd_set", "get_hits",
                     "get_misses", "curr_connections", "total_connections", "bytes_read", "bytes_written",
                     "limit_maxbytes", "threads"):
            if name.encode() not in stats:
                raise AssertionError(f"stats have no {name}: {sorted(stats)}")
        equal(int(stats[b"pid"]), server.process.pid)
        equal(int(stats[b"threads"]), cores)
        # of many all but key-1, and fine and quiet
        equal(int(stats[b"curr_items"]), len(many) - 1 + 2)
        equal(mc.flush_all(), True)
        equal(mc.get_many(list(many)), {})
        equal(mc.get("fine"), None)


def test_meta_commands():
    """A client such as today's libraries: keys in base64, quiet batches told apart by opaque."""
    with Server(2) as server, Raw(server.memcached) as raw:
        keys = {n: b"key %d\r\n" % n for n in range(500)}
        coded = {n: base64.b64encode(key) for n, key in keys.items()}
        batch = b"".join(b"ms %s %d b q T100\r\n%s\r\n" % (coded[n], len(keys[n]), keys[n]) for n in keys if n % 2)
        raw.ask(batch + b"mn\r\n", b"MN\r\n")
        raw.send(b"".join(b"mg %s b q v k O%d\r\n" % (coded[n], n) for n in keys) + b"mn\r\n")
        want = b"".join(
            b"VA %d k%s b O%d\r\n%s\r\n" % (len(keys[n]), coded[n], n, keys[n]) for n in keys if n % 2
        ) + b"MN\r\n"
        equal(raw.read(len(want)), want)
        raw.ask(b"".join(b"md %s b q\r\n" % coded[n] for n in keys if n % 2) + b"mn\r\n", b"MN\r\n")
        raw.ask(b"mg %s b k v\r\n" % coded[1], b"EN k%s b\r\n" % coded[1])
        # a counter that several connections count up loses nothing
        raw.ask(b"ma counter N0 J0 v\r\n", b"VA 1\r\n0\r\n")
        threads = [threading.Thread(target=count, args=(server, 500)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raw.ask(b"mg counter v\r\n", b"VA 4\r\n4000\r\n")


def count(server, times):
    with Raw(server.memcached) as raw:
        raw.ask(b"ma counter q\r\n" * times + b"mn\r\n", b"MN\r\n")


# --- the simple text protocol ---------------------------------------------------------------------


def test_text_and_memcached_share_a_store():
    with Server(2) as server, Raw(server.text) as text, Raw(server.memcached) as memcached:
        for n in range(200):
            key, value = b"shared-%d" % n, b"%d\r\n" % n * 10
            text.ask(b"set %s %d\r\n%s\r\n" % (key, len(value), value), b"STORED\r\n")
            memcached.ask(b"get %s\r\n" % key, b"VALUE %s 0 %d\r\n%s\r\nEND\r\n" % (key, len(value), value))
            memcached.ask(b"set %s 7 100 3\r\nnew\r\n" % key, b"STORED\r\n")
            text.ask(b"get %s\r\n" % key, b"VALUE %s 3 \r\nnew\r\nEND\r\n" % key)
            text.ask(b"set %s 1\r\nx\r\n" % key, b"STORED\r\n")
            memcached.ask(b"mg %s f t v\r\n" % key, b"VA 1 f0 t-1\r\nx\r\n")
        # every core is emptied, and what the other protocol stored goes too
        text.ask(b"delete\r\n", b"DELETED\r\n")
        keys = b" ".join(b"shared-%d" % n for n in range(200))
        memcached.ask(b"get %s\r\n" % keys, b"END\r\n")
        memcached.ask(b"set a 0 0 1\r\nx\r\n", b"STORED\r\n")
        memcached.ask(b"flush_all\r\n", b"OK\r\n")
        text.ask(b"get a\r\n", b"VALUE a 0 \r\n\r\nEND\r\n")


def test_text_pipeline_keeps_its_order():
    for cores in (1, 2, 8):
        with Server(cores) as server, Raw(server.text) as raw:
            requests, replies = [], []
            for n in range(3000):
                key, value = b"key-%d" % (n % 700), b"v" * (n % 50)
                requests.append(b"set %s %d\r\n%s\r\nget %s\r\n" % (key, len(value), value, key))
                replies.append(b"STORED\r\nVALUE %s %d \r\n%s\r\nEND\r\n" % (key, len(value), value))
            sender = threading.Thread(target=raw.send, args=(b"".join(requests),))
            sender.start()
            want = b"".join(replies)
            got = raw.read(len(want))
            sender.join()
            equal(got == want, True, f"the replies are in order with --cores {cores}")


# --- many clients ---------------------------------------------------------------------------------


def test_1000_clients_at_once():
    with Server(2) as server:
        asyncio.run(asyncio.wait_for(thousand(server), 120))


async def thousand(server):
    numbers = random.Random(7)
    letters = b"abcdefghijklmnopqrstuvwxyz0123456789-_:."

    async def one(number, text, start):
        key = b"%d-" % number + bytes(numbers.choice(letters) for _ in range(numbers.randint(1, 24)))
        values = [numbers.randbytes(numbers.randint(0, 1000)) for _ in range(3)]
        reader, writer = await asyncio.open_connection(*(server.text if text else server.memcached))
        try:
            await start.wait()
            for value in values:
                if text:
                    request = b"set %s %d\r\n%s\r\n" % (key, len(value), value)
                    reply = b"VALUE %s %d \r\n%s\r\nEND\r\n" % (key, len(value), value)
                else:
                    request = b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value)
                    reply = b"VALUE %s 0 %d\r\n%s\r\nEND\r\n" % (key, len(value), value)
                writer.write(request)
                equal(await reader.readexactly(8), b"STORED\r\n")
                writer.write(b"get %s\r\n" % key)
                equal(await reader.readexactly(len(reply)), reply)
        finally:
            writer.close()

    start = asyncio.Event()
    tasks = [asyncio.create_task(one(n, n % 2 == 0, start)) for n in range(1000)]
    await asyncio.sleep(1)  # most are connected by now
    start.set()
    await asyncio.gather(*tasks)


@on_cores(1, 2, 8)
def test_random_pipelines(cores):
    with Server(cores) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(random_pipeline, server, seed) for seed in range(6)]:
            done.result()


def random_pipeline(server, seed):
    """Requests in pieces of any size, and every byte of the replies foretold."""
    numbers = random.Random(seed)
    store, keys = {}, [b"%d-%d" % (seed, n) for n in range(40)]
    with Raw(server.memcached) as raw:
        for _ in range(60):
            requests, replies = [], []
            for _ in range(numbers.randint(1, 60)):
                key, kind = numbers.choice(keys), numbers.randint(0, 9)
                if kind < 4:
                    wanted = [numbers.choice(keys) for _ in range(numbers.randint(1, 12))]
                    requests.append(b"get %s\r\n" % b" ".join(wanted))
                    replies += [b"VALUE %s 0 %d\r\n%s\r\n" % (k, len(store[k]), store[k]) for k in wanted if k in store]
                    replies.append(b"END\r\n")
                elif kind < 6:
                    # some larger than what is copied, some empty
                    store[key] = numbers.randbytes(numbers.choice([0, 1, 10, 100, 1000, 5000, 20000]))
                    quiet = numbers.random() < 0.5
                    requests.append(
                        b"set %s 0 0 %d%s\r\n%s\r\n" % (key, len(store[key]), b" noreply" if quiet else b"", store[key])
                    )
                    replies.append(b"" if quiet else b"STORED\r\n")
                elif kind < 7:
                    requests.append(b"delete %s\r\n" % key)
                    replies.append(b"NOT_FOUND\r\n" if store.pop(key, None) is None else b"DELETED\r\n")
                elif kind < 9:
                    requests.append(b"mg %s v q k\r\n" % key)
                    if key in store:
                        replies.append(b"VA %d k%s\r\n%s\r\n" % (len(store[key]), key, store[key]))
                else:
                    requests.append(b"foo\r\n")
                    replies.append(b"ERROR\r\n")
            requests.append(b"mn\r\n")
            replies.append(b"MN\r\n")
            data, want, got, at = b"".join(requests), b"".join(replies), bytearray(), 0
            raw.socket.setblocking(False)
            while len(got) < len(want):
                readable, writable, _ = select.select([raw.socket], [raw.socket] if at < len(data) else [], [], 10)
                if readable:
                    piece = raw.socket.recv(1 << 18)
                    equal(bool(piece), True, "the connection stays open")
                    got += piece
                elif writable:
                    at += raw.socket.send(data[at : at + numbers.choice([1, 10, 100, 1000, 100_000])])
                elif not readable:
                    raise AssertionError(f"no more replies after {replay.show(bytes(got[-100:]))}")
            same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            equal(bytes(got[same : same + 200]), want[same : same + 200], f"replies from byte {same}")


# --- bad clients ----------------------------------------------------------------------------------


def test_half_closed_clients_get_all_replies():
    with Server(2) as server:
        for address, one, reply in (
            (server.memcached, b"set k 0 0 3\r\nabc\r\nget k\r\n", b"STORED\r\nVALUE k 0 3\r\nabc\r\nEND\r\n"),
            (server.text, b"set k 3\r\nabc\r\nget k\r\n", b"STORED\r\nVALUE k 3 \r\nabc\r\nEND\r\n"),
        ):
            for times in (1, 1000):
                for rest in (b"", b"get", b"set k 0 0 100\r\nabc" if address == server.memcached else b"set k 100\r\nabc"):
                    with Raw(address) as raw:
                        raw.send(one * times + rest)
                        raw.socket.shutdown(socket.SHUT_WR)
                        got = raw.read_all()
                    equal(got == reply * times, True, f"{times} replies after a half close (and {len(got)} bytes came)")
        # with replies larger than any buffer
        with Raw(server.memcached) as raw:
            value = b"x" * 1_000_000
            raw.ask(b"set big 0 0 1000000\r\n%s\r\n" % value, b"STORED\r\n")
            raw.send(b"get big\r\n" * 20)
            raw.socket.shutdown(socket.SHUT_WR)
            equal(raw.read_all() == b"VALUE big 0 1000000\r\n%s\r\nEND\r\n" % value * 20, True, "20 MB after a half close")
        alive(server)


def test_noise():
    numbers = random.Random(3)
    words = [b"get", b"set", b"mg", b"ms", b"cas", b"incr", b"delete", b"a", b"0", b"1", b"-1", b"noreply", b"v", b"q", b"\r\n",
             b" ", b"\n", b"\0", b"99999999999999999999", b"k" * 300, b"\xff", b"\r", b"T", b"C1", b"N10", b"HTTP/1.1"]
    with Server(2) as server:
        for n in range(1500):
            if n % 4 == 0:
                data = numbers.randbytes(numbers.randint(1, 5000))
            elif n % 4 == 1:
                # the binary protocol of memcached
                data = b"\x80" + bytes([numbers.randint(0, 40)]) + numbers.randbytes(22) + numbers.randbytes(100)
            else:
                data = b"".join(numbers.choice(words) + numbers.choice([b" ", b"", b"\r\n"]) for _ in range(300))
            # a request such as flush_all or delete would be fine; only a value that never comes may keep it waiting
            with Raw(server.memcached if numbers.random() < 0.6 else server.text) as raw, contextlib.suppress(OSError):
                at = 0
                while at < len(data):
                    step = numbers.choice([1, 7, 100, 5000])
                    raw.send(data[at : at + step])
                    at += step
                if n % 3:
                    raw.socket.shutdown(socket.SHUT_WR)
                    raw.read_all()
        alive(server)


def test_ten_thousand_dropped_connections():
    with Server(2) as server:
        alive(server)
        for batch in range(20):
            sockets = []
            for n in range(500):
                s = socket.create_connection(server.memcached if n % 2 else server.text, timeout=20)
                if n % 5 == 1:
                    s.sendall(b"get a\r\n")
                elif n % 5 == 2:
                    s.sendall(b"set a 0 0 1000\r\nnever finished")
                elif n % 5 == 3:
                    # a reset instead of an orderly end
                    s.sendall(b"get a")
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sockets.append(s)
            for s in sockets:
                s.close()
            if batch == 1:
                before = server.rss()
        alive(server)
        settled(server, before + 64 * MEBIBYTE)


def test_clients_that_never_finish():
    with Server(2) as server:
        alive(server)
        peaks = []
        for _ in range(4):
            with contextlib.ExitStack() as stack:
                for n in range(200):
                    raw = stack.enter_context(Raw(server.memcached if n % 2 else server.text))
                    head = b"set half-%d %s1000000\r\n" % (n, b"0 0 " if n % 2 else b"")
                    raw.send(head + b"x" * 20_000 if n % 3 else head[: n % len(head)])
                patience(server)
                for n in range(200):
                    with Raw(server.text) as raw:
                        raw.ask(b"get half-%d\r\n" % n, b"VALUE half-%d 0 \r\n\r\nEND\r\n" % n)
                peaks.append(server.rss())
        alive(server)
        # what they announced need not go back to the kernel at once, but it must be used again
        settled(server, peaks[0] + 64 * MEBIBYTE)


def patience(server, rounds=200):
    """Another client is served promptly: none of its requests waits for a second."""
    with Raw(server.memcached) as memcached, Raw(server.text) as text:
        for n in range(rounds):
            began = time.monotonic()
            memcached.ask(b"set p%d 0 0 1\r\nx\r\nget p%d\r\n" % (n, n), b"STORED\r\nVALUE p%d 0 1\r\nx\r\nEND\r\n" % n)
            text.ask(b"get p%d\r\n" % n, b"VALUE p%d 1 \r\nx\r\nEND\r\n" % n)
            took = time.monotonic() - began
            if took > 1:
                raise AssertionError(f"a request took {took:.1f} s beside a bad client")


@on_cores(1, 2)
def test_a_client_that_never_reads(cores):
    with Server(cores) as server:
        alive(server)
        value = b"x" * 1_000_000
        with Raw(server.memcached) as raw:
            for key in (b"big", b"big2", b"big3"):
                raw.ask(b"set %s 0 0 1000000\r\n%s\r\n" % (key, value), b"STORED\r\n")
        before = server.rss()
        with contextlib.ExitStack() as stack:
            lazy = []
            for n in range(10):
                raw = stack.enter_context(Raw(server.memcached if n % 2 else server.text))
                raw.socket.setblocking(False)
                lazy.append(raw)
            # each asks for a gigabyte, as far as the server takes the requests
            requests = b"get big\r\nget big2\r\nget big3\r\n" * 333
            for raw in lazy:
                with contextlib.suppress(BlockingIOError):
                    raw.socket.send(requests)
            patience(server)
            time.sleep(1)
            patience(server, 50)
            held = server.rss() - before
            if held > 200 * MEBIBYTE:
                raise AssertionError(f"{held >> 20} MiB are held for clients that do not read")
        alive(server)
        settled(server, before + 64 * MEBIBYTE)


def test_stopping_with_clients_connected():
    with Server(2) as server, contextlib.ExitStack() as stack:
        for n in range(50):
            raw = stack.enter_context(Raw(server.memcached if n % 2 else server.text))
            raw.send(b"get a\r\n" if n % 3 else b"get a")
        server.stop()
        for address in (server.memcached, server.text):
            raises(ConnectionError, socket.create_connection, address, timeout=5)


# --- starting -------------------------------------------------------------------------------------


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for cores in ("1", "2"):
            for ours in ("--memcached", "--text", "--protobuf"):
                options = [f"127.0.0.1:{port}" if before == ours else word for before, word in zip([""] + ON_FREE_PORTS, ON_FREE_PORTS)]
                code, messages = start("--cores", cores, *options)
                equal(code, 1, f"{ours} on a taken port, --cores {cores}: {messages}")
                naming = [line for line in messages.splitlines() if str(port) in line]
                equal(len(naming), 1, f"lines that name the port in {messages!r}")


def test_bad_options():
    for options in (["--nope"], ["--cores", "0"], ["--cores", "x"], ["--cores"], ["--memcached", "nowhere"], ["--text", "1.2.3.4"],
                    ["--max-memory", "much"], ["--idle-timeout", "soon"], ["stray"]):
        code, messages = start(*options)
        equal(code, 2, f"{' '.join(options)}: {messages}")
        if not messages.strip():
            raise AssertionError(f"{' '.join(options)}: no message")


def test_a_file_to_load_that_is_missing():
    code, messages = start(*ON_FREE_PORTS, "--cores", "1", "--load", "/nonexistent/rows")
    equal(code, 1, messages)
    if "/nonexistent/rows" not in messages:
        raise AssertionError(f"the file is not named: {messages}")


def test_more_cores_than_cpus():
    with Server(8) as server:
        alive(server)
        messages = server.messages()
    cpus = len(os.sched_getaffinity(0))
    if cpus < 8 and "WARN" not in messages.upper():
        raise AssertionError(f"no warning about 8 cores on {cpus} CPUs: {messages!r}")


def test_too_little_locked_memory():
    limits = (64 << 10, 64 << 10)
    with tempfile.TemporaryDirectory() as folder:
        # somebody else must be able to read the binary
        os.chmod(folder, 0o755)
        copy = shutil.copy(BINARY, folder)
        os.chmod(copy, 0o755)
        # root is not held to the limit
        other = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
        process = subprocess.Popen(
            [copy, "--cores", "1", *ON_FREE_PORTS],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, limits), **other,
        )
        try:
            _, messages = process.communicate(timeout=START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError("the server starts with 64 KiB of locked memory") from None
    equal(process.returncode, 1, messages)
    if "panicked" in messages or not re.search("memlock|ulimit -l", messages, re.I):
        raise AssertionError(f"neither cause nor remedy is named: {messages!r}")


# --- running --------------------------------------------------------------------------------------


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16, hard))
    wanted = sys.argv[1:]
    chosen = lambda name: not wanted or any(word in name for word in wanted)
    modules = (sys.modules[__name__], protobuf, json_line, memory, metrics, grpc_service, http_api, page)
    tests = [test for module in modules for test in tests_of(module)]
    results = []
    # Those that sleep longest start first.
    jobs = sorted(
        ((name, job) for name, job in golden_jobs() if chosen(name)),
        key=lambda named: ("silence" not in named[0], "flush_all" not in named[0], "expiry" not in named[0] and "touch" not in named[0]),
    )
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results += pool.map(lambda named: attempt(*named), jobs)
    for name, function in tests:
        if chosen(name):
            results.append(attempt(name, function))
    if not results:
        print("no test has such a name")
        sys.exit(1)
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
