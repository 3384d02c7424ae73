"""The memory limit, attacked from all sides at once; a control group that shrinks; a process that gets no memory.

What is compared with the limit is the highest resident memory that the kernel has seen, so nothing depends on when
somebody looks.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import resource
import socket
import threading
import time

import protobuf
from protobuf import framed, pb
from support import MEBIBYTE, Raw, Server, equal, on_cores, settled

# for each number of cores and each --eviction
SOAK_SECONDS = float(os.environ.get("MEMKV_SOAK_SECONDS", "3"))
LIMIT = 256 * MEBIBYTE
BIG = bytes(random.Random(1).randbytes(MEBIBYTE))
WIDE = [b"wide-%d" % n for n in range(4000)]
GET_WIDE = framed(pb.Message(id=1, get=pb.Get(keys=WIDE)))
SET_WIDE = framed(pb.Message(id=1, set=pb.Set(entries=[pb.Entry(key=key, value=BIG[:3900]) for key in WIDE])))
STORED, NO_MEMORY = b"STORED\r\n", b"SERVER_ERROR out of memory"


def peak(server):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024


def stats(raw, what=b"stats\r\n"):
    raw.send(what)
    text = b""
    while not text.endswith(b"END\r\n"):
        piece = raw.socket.recv(65536)
        if not piece:
            raise AssertionError("no statistics")
        text += piece
    return dict(re.findall(r"STAT (\S+) (\S+)", text.decode()))


class Siege:
    """Attackers, each a thread, against one server, until it is over."""

    def __init__(self, server):
        self.server, self.over = server, threading.Event()
        self.counts, self.failures, self.threads = {}, [], []

    def count(self, what, number=1):
        self.counts[what] = self.counts.get(what, 0) + number

    def begin(self, attack, times=1):
        for number in range(times):
            thread = threading.Thread(target=self.run, args=(attack, number), name=attack.__name__)
            self.threads.append(thread)
            thread.start()

    def run(self, attack, number):
        while not self.over.is_set():
            try:
                attack(self, number)
            except (ConnectionError, TimeoutError, BlockingIOError):
                # refused, or closed by the server: the next one
                self.count(f"{attack.__name__} cut off")
                self.over.wait(0.01)
            except Exception as error:
                self.failures.append(f"{attack.__name__}: {error!r}")
                return

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                self.failures.append(f"{thread.name} does not end")
        if self.failures:
            raise AssertionError("; ".join(self.failures[:5]))


def line(raw, connected):
    """One line of an answer; an error when the server has closed."""
    text = connected.readline()
    if not text:
        raise ConnectionError("closed")
    return text


def push(raw, data):
    """Sends as much as the server takes."""
    raw.socket.setblocking(False)
    data = memoryview(data)
    with contextlib.suppress(BlockingIOError):
        while data:
            data = data[raw.socket.send(data) :]


def answered(connection):
    """The next response; an error when there is none any more, or the connection was refused."""
    response = connection.receive()
    if response is None or response.code == pb.CODE_UNAVAILABLE:
        raise ConnectionError("closed")
    return response


def prober(siege, _):
    """A client that has been there before: it is answered, however long the others have been at it."""
    with Raw(siege.server.memcached, timeout=20) as raw:
        while not siege.over.is_set():
            raw.send(b"version\r\n")
            answer = raw.read(9)
            if answer == b"ERROR Too":
                # it came too late for this time
                raise ConnectionError
            if not answer.startswith(b"VERSION "):
                raise AssertionError(f"version is answered with {answer!r}")
            while not answer.endswith(b"\n"):
                answer += raw.read(1)
            siege.count("version")
            siege.over.wait(0.01)


def big_values(siege, number):
    with Raw(siege.server.memcached) as raw, raw.socket.makefile("rb") as answers:
        for n in range(10_000):
            if siege.over.is_set():
                return
            raw.send(b"set big-%d-%d 0 0 %d\r\n%s\r\n" % (number, n % 400, MEBIBYTE, BIG))
            siege.count(line(raw, answers).split()[0].decode() + " big")


def small_values(siege, number):
    numbers = random.Random(number)
    with Raw(siege.server.memcached) as raw, raw.socket.makefile("rb") as answers:
        while not siege.over.is_set():
            requests = []
            for _ in range(100):
                key, size = numbers.randrange(200_000), numbers.choice((10, 100, 1000, 4000))
                requests.append(b"set small-%d 0 0 %d\r\n%s\r\n" % (key, size, BIG[:size]))
            raw.send(b"".join(requests))
            for _ in requests:
                siege.count(line(raw, answers).split()[0].decode() + " small")


def crowd(siege, _):
    """Many connections that have said a little, and stay."""
    with contextlib.ExitStack() as stack:
        for n in range(300):
            raw = stack.enter_context(Raw(siege.server.memcached if n % 2 else siege.server.text))
            raw.send(b"get missing\r\nget half" if n % 3 else b"set half 0 0 3000\r\n" + BIG[:2000])
            if siege.over.is_set():
                return
        siege.over.wait(0.5)


def slow_readers(siege, _):
    """They ask for more than the server may hold, and take nothing."""
    with contextlib.ExitStack() as stack:
        for n in range(60):
            address, requests = (
                (siege.server.memcached, b"get big-0-%d\r\n" % n * 200),
                (siege.server.memcached, b"get %s\r\n" % b" ".join(b"wide-%d" % m for m in range(180)) * 20),
                (siege.server.protobuf, GET_WIDE * 4),
                (siege.server.json_line, b"GET text\n" * 50),
                (siege.server.text, b"get wide-1\r\n" * 2000),
            )[n % 5]
            push(stack.enter_context(Raw(address)), requests)
            if siege.over.is_set():
                return
        siege.over.wait(1)


def hot_value(siege, number):
    """One overwrites a value all the time that the others have asked for and are slow to take."""
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Raw(siege.server.memcached))
        answers = stack.enter_context(writer.socket.makefile("rb"))
        for n in range(30):
            writer.send(b"set hot-%d 0 0 %d\r\n%s\r\n" % (number, MEBIBYTE, BIG))
            siege.count(line(writer, answers).split()[0].decode() + " hot")
            push(stack.enter_context(Raw(siege.server.memcached)), b"get hot-%d\r\n" % number * 20)
            if siege.over.is_set():
                return


def wide_reads(siege, _):
    """Requests for many values that are copied, and read as fast as can be."""
    with protobuf.Connection(siege.server.protobuf) as connection:
        for n in range(20):
            connection.send(GET_WIDE)
            response = answered(connection)
            siege.count(f"wide {pb.Code.Name(response.code or response.results[0].code)}")
            if siege.over.is_set():
                return


def wide_writes(siege, number):
    with protobuf.Connection(siege.server.protobuf) as connection:
        while not siege.over.is_set():
            connection.send(SET_WIDE)
            response = answered(connection)
            siege.count(f"wide set {pb.Code.Name(response.code or response.results[0].code)}")


def half_sent_lines(siege, _):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            push(stack.enter_context(Raw(siege.server.json_line)), b"PUT line " + b"x" * 900_000)
            if siege.over.is_set():
                return
        siege.over.wait(0.5)


def half_sent_values(siege, _):
    with contextlib.ExitStack() as stack:
        for n in range(60):
            push(stack.enter_context(Raw(siege.server.memcached)), b"set v%d 0 0 %d\r\n%s" % (n, MEBIBYTE, BIG[: n * 10_000]))
            if siege.over.is_set():
                return
        siege.over.wait(0.3)


def open_transactions(siege, number):
    with Raw(siege.server.json_line) as raw, raw.socket.makefile("rb") as answers:
        raw.send(b"START\n")
        for n in range(10):
            raw.send(b"PUT txn-%d-%d %s\n" % (number, n, b"t" * 500_000))
        for n in range(11):
            siege.count(f"transaction {json.loads(line(raw, answers))['status']}")


def comers_and_goers(siege, _):
    for n in range(100):
        with Raw(siege.server.memcached) as raw:
            raw.send(b"get big-0-%d\r\nset gone 0 0 100000\r\n" % n)
        if siege.over.is_set():
            return


def besiege(cores, eviction):
    with Server(cores, "--max-memory", "256m", "--eviction", eviction) as server:
        with Raw(server.json_line) as raw:
            # in JSON six times as long
            raw.ask(b"PUT text %s\n" % (b"\x01" * 100_000), b'{"status": "Ok"}\n')
        siege = Siege(server)
        siege.begin(prober)
        for attack, times in (
            (wide_writes, 1), (big_values, 2), (small_values, 2), (crowd, 3), (slow_readers, 2), (hot_value, 2),
            (wide_reads, 2), (half_sent_lines, 1), (half_sent_values, 1), (open_transactions, 2), (comers_and_goers, 1),
        ):
            siege.begin(attack, times)
        time.sleep(SOAK_SECONDS)
        siege.end()
        highest = peak(server)
        print(
            f"    --cores {cores} --eviction {eviction}: at most {highest / MEBIBYTE:.1f} of {LIMIT >> 20} MiB, "
            + ", ".join(f"{number} {what}" for what, number in sorted(siege.counts.items())),
            flush=True,
        )
        equal(highest <= LIMIT, True, f"{highest / MEBIBYTE:.1f} MiB were resident, and the limit is {LIMIT >> 20}")
        equal(siege.counts.get("version", 0) > 0, True, "somebody was answered meanwhile")
        if eviction == "none":
            equal(siege.counts.get("SERVER_ERROR big", 0) > 0, True, "writes were refused")
        usable(server)


def usable(server):
    """When all are gone everything can be used again, and memory goes back."""
    deadline = time.monotonic() + 20
    while True:
        # connections are told so until memory is back
        with contextlib.suppress(ConnectionError, AssertionError), Raw(server.memcached) as raw:
            raw.ask(b"flush_all\r\nset small 0 0 2\r\nhi\r\n", b"OK\r\nSTORED\r\n")
            raw.ask(b"get small\r\n", b"VALUE small 0 2\r\nhi\r\nEND\r\n")
            break
        if time.monotonic() > deadline:
            raise AssertionError("connections are refused for ever")
        time.sleep(0.05)
    settled(server, 96 * MEBIBYTE)
    with Raw(server.memcached) as raw:
        for n in range(100):
            raw.ask(b"set again-%d 0 0 %d\r\n%s\r\n" % (n, MEBIBYTE, BIG), STORED)
        raw.send(b"get again-7\r\n")
        want = b"VALUE again-7 0 %d\r\n%s\r\nEND\r\n" % (MEBIBYTE, BIG)
        equal(raw.read(len(want)) == want, True, "a value comes back")
        counted = stats(raw)
        equal(int(counted["bytes_items_resident"]) > 100 * MEBIBYTE, True, str(counted))
    with Raw(server.json_line) as raw:
        raw.ask(b"PUT key value\nGET key\n", b'{"status": "Ok"}\n{"status": "Ok", "result": "value"}\n')


@on_cores(1, 2)
def test_the_memory_limit_without_eviction(cores):
    besiege(cores, "none")


@on_cores(1, 2)
def test_the_memory_limit_with_eviction(cores):
    besiege(cores, "s3-fifo")


# --- a control group ------------------------------------------------------------------------------


@contextlib.contextmanager
def control_group(limit):
    """A control group for memory with this limit: (the folder, its file with the limit); None where none can be made."""
    for parent, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = pathlib.Path(parent, f"memkv-tpc-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit))
        except OSError:
            folder.rmdir()
            continue
        try:
            yield folder, folder / file
        finally:
            for _ in range(50):
                # processes that have ended leave it a little later
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    return
                time.sleep(0.1)
        return
    yield None


def until_limit(raw, megabytes):
    deadline = time.monotonic() + 10
    while (limit := int(stats(raw)["limit_maxbytes"])) != megabytes * MEBIBYTE:
        if time.monotonic() > deadline:
            raise AssertionError(f"the limit is {limit / MEBIBYTE}, not {megabytes}")
        time.sleep(0.1)


def fill(raw, prefix, count):
    """Sets values of a mebibyte; how many were stored."""
    stored = 0
    for n in range(count):
        raw.send(b"set %s-%d 0 0 %d\r\n%s\r\n" % (prefix, n, MEBIBYTE, BIG))
        answer = raw.read(8)
        if answer != STORED:
            equal((answer + raw.read(len(NO_MEMORY) + 16 - 8))[: len(NO_MEMORY)], NO_MEMORY)
        stored += answer == STORED
    return stored


def test_a_control_group_that_shrinks():
    with control_group(512 * MEBIBYTE) as group:
        if group is None:
            print("    skipped: no control group for memory can be made here")
            return
        folder, file = group
        enter = lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
        with Server(2, preexec_fn=enter) as server, Raw(server.memcached) as raw:
            until_limit(raw, 384)
            for megabytes in (600, 400):
                file.write_text(str(megabytes * MEBIBYTE))
                until_limit(raw, megabytes * 3 // 4)
            equal(fill(raw, b"big", 200), 200)
            # less than what is in use: nothing is lost, and nothing more is taken
            file.write_text(str(260 * MEBIBYTE))
            until_limit(raw, 195)
            equal(fill(raw, b"more", 5), 0)
            raw.send(b"get big-199\r\n")
            equal(len(raw.read(MEBIBYTE + 31 + 4)), MEBIBYTE + len(b"VALUE big-199 0 1048576\r\n\r\nEND\r\n"))
            with Raw(server.memcached) as other:
                other.ask(b"".join(b"delete big-%d\r\n" % n for n in range(150)), b"DELETED\r\n" * 150)
                # what was freed is given back within moments
                deadline = time.monotonic() + 10
                while not fill(other, b"more", 1):
                    equal(time.monotonic() < deadline, True, "there is memory again")
                    time.sleep(0.1)
            file.write_text(str(600 * MEBIBYTE))
            until_limit(raw, 450)
            equal(fill(raw, b"more", 100), 100)
            messages = server.messages()
            equal(messages.count("the memory limit is"), 5, messages)
        with Server(1, "--max-memory", "1g", preexec_fn=enter) as server:
            equal(str(file) in server.messages(), True, server.messages())


# --- a process that gets no memory ----------------------------------------------------------------


def test_no_memory_from_the_system():
    """The limit allows what the system does not: an error for the client, and not the end."""
    addresses = 1 << 30
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    with Server(1, "--max-memory", "4g", "--item-size-max", "64m", preexec_fn=limit) as server:
        value = bytes(60 * MEBIBYTE)
        with Raw(server.memcached, timeout=30) as raw:
            answers = []
            for n in range(30):
                raw.send(b"set big-%d 0 0 %d\r\n%s\r\n" % (n, len(value), value))
                answers.append(raw.socket.makefile("rb", 0).readline())
            equal({answer[:8] for answer in answers}, {STORED[:8], NO_MEMORY[:8]}, str(answers))
            raw.ask(b"delete big-0\r\n", b"DELETED\r\n")
            raw.ask(b"set small 0 0 2\r\nhi\r\nget small\r\n", b"STORED\r\nVALUE small 0 2\r\nhi\r\nEND\r\n")
        # a line that there is no room for costs the connection
        with contextlib.suppress(ConnectionError), Raw(server.json_line, timeout=30) as raw:
            raw.send(b"PUT big " + b"x" * 60 * MEBIBYTE + b"\n")
            equal(raw.read(20)[:20], b'{"status": "Error", ')
        with Raw(server.memcached) as raw:
            raw.ask(b"get small\r\n", b"VALUE small 0 2\r\nhi\r\nEND\r\n")
