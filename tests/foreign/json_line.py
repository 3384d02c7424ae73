"""The JSON-line protocol, spoken by telnet and by plain sockets; the answers are read by Python's json module.

Every answer must be, to the byte, what json.dumps makes of it.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import pty
import random
import re
import select
import socket
import struct
import subprocess
import threading
import time

from protobuf import Connection as Protobuf, entry
from support import MEBIBYTE, Raw, Server, client, equal, on_cores, raises, settled, until

OK = {"status": "Ok"}
# In the server's words, which the golden transcripts guard, too.
MISSING = "there is no such key"
CHANGED = "a key that was read has changed: nothing was applied"
NOT_OPEN = "no transaction is open"
OPEN = "a transaction is open already"
UNKNOWN = "unknown command: there are PUT, GET, DEL, START, COMMIT and ROLLBACK"
NO_KEY, NO_VALUE = "the key is missing", "the value is missing"
SURPLUS_KEY, SURPLUS = "there is something behind the key", "there is something behind the command"
START_TAKES = "START takes nothing, or CHECKED"
NOT_UTF8 = "the line is not UTF-8"
VALUE_NOT_UTF8 = "the value is not UTF-8: another protocol wrote it, and can read it"
LONG_LINE = "the line is too long"
TOO_MANY = "the transaction has too many commands: roll it back"
TOO_LARGE = "the transaction is too large: roll it back"
SILENT = "the transaction was silent for too long: roll it back"
KEY_MAX, VALUE_MAX, LINE_MAX = 250, MEBIBYTE, 250 + MEBIBYTE + 1024


def found(value):
    return {"status": "Ok", "result": value}


def no(mesg):
    return {"status": "Error", "mesg": mesg}


def encoded(answer):
    return json.dumps(answer).encode() + b"\n"


def understood(line):
    """An answer, which must be as json.dumps writes it."""
    if not line.endswith(b"\n"):
        raise AssertionError(f"the connection ends behind {line!r}")
    answer = json.loads(line)
    if line != (want := encoded(answer)):
        same = next((at for at, (a, b) in enumerate(zip(line, want)) if a != b), min(len(line), len(want)))
        equal(line[same : same + 20], want[same : same + 20], f"from byte {same} of an answer")
    return answer


class Connection(Raw):
    """A client of the JSON-line port."""

    def __init__(self, server, timeout=20):
        super().__init__(server.json_line, timeout)
        self.incoming = self.socket.makefile("rb", 1 << 18)

    def __exit__(self, *_):
        self.incoming.close()
        super().__exit__()

    def answer(self):
        return understood(self.incoming.readline())

    def say(self, line, end="\n"):
        """The answer to a line."""
        self.send(line + end.encode() if isinstance(line, bytes) else (line + end).encode())
        return self.answer()

    def tell(self, *lines):
        """Says lines that are answered with Ok, one after the other."""
        for line in lines:
            equal(self.say(line), OK, repr(line[:60]))

    def expect(self, line, want, end="\n"):
        equal(self.say(line, end), want, repr(line[:60]))

    def get(self, key):
        """A value; None for a missing key."""
        answer = self.say(f"GET {key}")
        return None if answer == no(MISSING) else self.value(answer)

    @staticmethod
    def value(answer):
        equal(answer.get("status"), "Ok", str(answer))
        return answer["result"]

    def closes(self):
        """The server closes, and has said nothing more."""
        with contextlib.suppress(ConnectionResetError):
            equal(self.incoming.read(), b"", "before the end of the stream")

    def reset(self):
        """Goes away without an orderly end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def sending(connection, data, size):
    """Sends in pieces beside what is done meanwhile. When that cannot go on, the answers are missed."""

    def send():
        with contextlib.suppress(OSError):
            for at in range(0, len(data), size):
                connection.send(data[at : at + size])

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


def converse(connection, conversation, end="\n"):
    for line, want in conversation:
        connection.expect(line, want, end)


def connections(server):
    with Raw(server.memcached) as raw:
        raw.send(b"stats\r\nmn\r\n")
        lines = b""
        while not lines.endswith(b"MN\r\n"):
            lines += raw.read(1)
    return int(re.search(rb"STAT curr_connections (\d+)", lines).group(1))


# A conversation of one client, with what is answered.
CONVERSATION = [
    ("PUT a    3 * 3 = 9  ", OK),
    ("get a", found("3 * 3 = 9")),
    ("GET b", no(MISSING)),
    ("put b \u00e9 \u8bf4 \U0001f418 \"quoted\" back\\slash", OK),
    ("Get b", found("\u00e9 \u8bf4 \U0001f418 \"quoted\" back\\slash")),
    ("DEL b", OK),
    ("DEL b", OK),
    ("commit", no(NOT_OPEN)),
    ("  START  ", OK),
    ("PUT b 2", OK),
    ("GET b", found("2")),
    ("start", no(OPEN)),
    ("DEL a", OK),
    ("GET a", no(MISSING)),
    ("fetch a", no(UNKNOWN)),
    ("PUT c", no(NO_VALUE)),
    ("rollback", OK),
    ("GET a", found("3 * 3 = 9")),
    ("start checked", OK),
    ("GET a", found("3 * 3 = 9")),
    ("PUT a 10", OK),
    ("GET a", found("10")),
    ("Commit", OK),
    ("GET a", found("10")),
    ("GET b", no(MISSING)),
    ("DEL a", OK),
]


# --- telnet ---------------------------------------------------------------------------------------


class Telnet:
    """The telnet program, at a terminal or between pipes, as a context manager."""

    def __init__(self, address, terminal):
        command = ["telnet", address[0], str(address[1])]
        if terminal:
            self.input, at = pty.openpty()
            self.process = subprocess.Popen(command, stdin=at, stdout=at, stderr=at, start_new_session=True)
            os.close(at)
            self.output = self.input
        else:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
            )
            self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.terminal, self.seen = terminal, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        if self.terminal:
            os.close(self.input)
        else:
            self.process.stdin.close()
            self.process.stdout.close()

    def until(self, what):
        """What is shown, up to and with a text."""
        deadline = time.monotonic() + 20
        while what not in self.seen:
            readable, _, _ = select.select([self.output], [], [], max(0, deadline - time.monotonic()))
            piece = b""
            with contextlib.suppress(OSError):  # the other end of a terminal is closed
                piece = os.read(self.output, 65536) if readable else b""
            if not piece:
                raise AssertionError(f"telnet does not show {what!r}, but {self.seen!r}")
            self.seen += piece
        before, self.seen = self.seen.split(what, 1)
        return before + what

    def type(self, line):
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(self.input, data) :]

    def say(self, line):
        self.type(line)
        if self.terminal:
            # it echoes what is typed
            self.until(b"\r\n")
        shown = self.until(b"}\r\n" if self.terminal else b"}\n")
        return understood(shown.replace(b"\r\n", b"\n"))


@on_cores(1, 2, 8)
def test_json_line_telnet(cores):
    with Server(cores) as server:
        for terminal in (True, False):
            with Telnet(server.json_line, terminal) as telnet, Connection(server) as other:
                telnet.until(b"Escape character is '^]'." + (b"\r\n" if terminal else b"\n"))
                for line, want in CONVERSATION:
                    equal(telnet.say(line), want, f"telnet: {line!r}")
                # several lines at once
                telnet.type("START\nPUT t 1\nPUT t 2\nCOMMIT")
                for _ in range(4):
                    shown = telnet.until(b"}\r\n" if terminal else b"}\n")
                    equal(shown.splitlines()[-1], encoded(OK).strip(), "one of four lines")
                equal(other.get("t"), "2", "what telnet committed")
                # an open transaction at the end
                equal([telnet.say(line) for line in ("START", "PUT t 3")], [OK, OK])
                before = connections(server)
                telnet.process.kill()
                telnet.process.wait()
                until(lambda: connections(server) < before, "telnet's connection is closed")
                equal(other.get("t"), "2", "after telnet has gone")
                other.tell("DEL t")
            # the server hangs up
            with Telnet(server.json_line, terminal) as telnet:
                telnet.type("GET / HTTP/1.1")
                shown = telnet.until(b"Connection closed by foreign host.")
                equal(b"status" in shown, False, f"an answer to a browser: {shown!r}")
                telnet.process.wait(20)


# --- lines and values -----------------------------------------------------------------------------


@on_cores(1, 2, 8)
def test_json_line_conversation(cores):
    with Server(cores) as server:
        for ends in (["\n"], ["\r\n"], ["\n", "\r\n"], [" \n", "  \r\n", "\n\n", "\n\r\n   \n"]):
            with Connection(server) as connection:
                for at, (line, want) in enumerate(CONVERSATION):
                    connection.expect(line, want, ends[at % len(ends)])
            # all at once, and in pieces; the half close behind it loses no answer
            lines = "".join(line + ends[at % len(ends)] for at, (line, _) in enumerate(CONVERSATION)).encode()
            want = b"".join(encoded(want) for _, want in CONVERSATION)
            for size in (len(lines), 1, 2, 3, 7, 50):
                with Connection(server) as connection:
                    for at in range(0, len(lines), size):
                        connection.send(lines[at : at + size])
                    connection.socket.shutdown(socket.SHUT_WR)
                    equal(connection.incoming.read(), want, f"pieces of {size} with {ends}")


def characters(numbers):
    """Text that is awkward to JSON, to UTF-8, or to a protocol of lines and blanks."""
    awkward = [chr(code) for code in range(0x20) if code != 10] + [
        " ", " ", "  ", '"', "\\", "/", "\x7f", "\x80", "\x9f", "\xa0", "\xff", "\u2028", "\u2029", "\ud7ff", "\ue000", "\ufeff",
        "\ufffd", "\uffff", "\U00010000", "\U0001f418", "\U0001f468\u200d\U0001f469", "\U0010ffff", "e\u0301", "\u202e", "\\n", "\\u0041",
        "{}", "</script>", "\r", "'", "&",
    ]
    plain = "abc XYZ 019 ~!#$%^*()_+-=[]:;,.?"

    def one():
        kind = numbers.random()
        if kind < 0.5:
            return numbers.choice(awkward)
        if kind < 0.8:
            return numbers.choice(plain)
        code = numbers.choice([0x80, 0x800, 0x10000, 0x110000])
        code = numbers.randrange(code // 8, code)
        return "?" if code == 10 or 0xD800 <= code < 0xE000 else chr(code)

    return lambda count: "".join(one() for _ in range(count))


def kept(value, end):
    """What is kept of a value that stands in a line with this end: one CR belongs to the end, and blanks are trimmed."""
    return (value + end.removesuffix("\n")).removesuffix("\r").strip(" ")


@on_cores(1, 2, 8)
def test_json_line_values(cores):
    numbers = random.Random(cores)
    text = characters(numbers)
    with Server(cores) as server, Connection(server) as connection, Protobuf(server.protobuf) as protobuf:
        every = "".join(chr(code) for code in range(1, 0x300) if code != 10)
        values = [every, "\0" + every, *map(chr, [*range(10), *range(11, 0x800)]), "\U0010ffff" * 5000, "\x01" * VALUE_MAX]
        values += [text(numbers.choice([1, 2, 5, 20, 200, 3000])) for _ in range(600)]
        for at in range(0, len(values), 50):
            lines, want, stored = [], [], []
            for number, value in enumerate(values[at : at + 50]):
                end = numbers.choice(["\n", "\r\n"])
                key = f"{text(5)}{at + number}".replace(" ", "_")
                lines.append(f"PUT{' ' * numbers.randint(1, 3)}{key}{' ' * numbers.randint(1, 3)}{value}{end}GET {key}{end}")
                value = kept(value, end)
                want += [OK, found(value)] if value else [no(NO_VALUE), no(MISSING)]
                stored.append((key, value))
            lines = "".join(lines).encode()
            with sending(connection, lines, len(lines)):
                for each in want:
                    equal(connection.answer(), each, "a value")
            # other protocols have the bytes as they are
            for result, (key, value) in zip(protobuf.get(*(key.encode() for key, _ in stored)), stored):
                equal(result.value, value.encode(), f"the value of {key!r} to another protocol")
            protobuf.delete(*(key.encode() for key, _ in stored))


@on_cores(1, 2)
def test_json_line_long_lines(cores):
    with Server(cores) as server, Connection(server) as connection:
        key = "k" * KEY_MAX
        connection.tell(f"PUT {key} {'v' * VALUE_MAX}")
        connection.expect(f"GET {key}", found("v" * VALUE_MAX))
        connection.expect(f"PUT {key}k v", no(f"the key has {KEY_MAX + 1} bytes, and the most is {KEY_MAX}"))
        connection.expect(f"GET {key[1:]}\u00e9", no(f"the key has {KEY_MAX + 1} bytes, and the most is {KEY_MAX}"))
        too_large = no(f"the value has {VALUE_MAX + 1} bytes, and the most is {VALUE_MAX}")
        connection.expect(f"PUT a {'v' * (VALUE_MAX + 1)}", too_large)
        # up to the limit of a line blanks do no harm
        connection.expect(f"PUT a{' ' * (LINE_MAX - 6)}v", OK)
        connection.expect("GET a", found("v"))
        connection.expect(f"PUT a{' ' * (LINE_MAX - 5)}w", no(LONG_LINE))
        connection.tell("START", "PUT a 1")
        # one answer, however long the line is and wherever it goes on; the transaction stays
        for size in (LINE_MAX + 1, 3 * LINE_MAX, 20 * MEBIBYTE):
            for filler in (b"x", b" ", b"\xff", b"PUT a 2 \r"):
                line = (filler * (size // len(filler) + 1))[:size]
                connection.send(line[: size // 2])
                connection.send(line[size // 2 :] + b"\nGET a\r\n")
                equal([connection.answer(), connection.answer()], [no(LONG_LINE), found("1")], f"{size} of {filler!r}")
        connection.tell("COMMIT")
        connection.expect("GET a", found("1"))
        # lines that never end are not kept
        settled(server, server.rss() + 1)
        before = server.rss()
        with contextlib.ExitStack() as stack:
            for _ in range(10):
                endless = stack.enter_context(Connection(server))
                for _ in range(8):
                    endless.send(b"x" * (4 * MEBIBYTE))
                equal(endless.answer(), no(LONG_LINE), "a line without an end")
            connection.expect("GET a", found("1"))
            settled(server, before + 64 * MEBIBYTE)


@on_cores(1, 2)
def test_json_line_browsers(cores):
    with Server(cores) as server:
        for verb in ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"):
            for target in ("/", "/START", "*", "localhost:9888", "http://localhost/"):
                request = f"{verb} {target} HTTP/1.1\r\nHost: localhost\r\n\r\nPUT smuggled 1\r\nCOMMIT\r\n"
                with Connection(server) as connection:
                    connection.tell("START", "PUT open 1")
                    connection.send(request.encode())
                    connection.closes()
        with Connection(server) as connection:
            converse(connection, [("GET smuggled", no(MISSING)), ("GET open", no(MISSING))])
            # what no browser sends
            converse(connection, [
                ("PUT note I like HTTP/2", OK),
                ("GET note", found("I like HTTP/2")),
                ("get / HTTP/1.1", no(SURPLUS_KEY)),
                ("HEAD /", no(UNKNOWN)),
                ("GET /", no(MISSING)),
                ("GET HTTP/1.1", no(MISSING)),
            ])


@on_cores(1, 2, 8)
def test_json_line_values_of_other_protocols(cores):
    not_utf8 = [b"\xff\x00", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok until \xe8\xaf", bytes(range(256)) * 100]
    with (
        Server(cores) as server,
        contextlib.closing(client(server)) as memcached,
        Connection(server) as connection,
        Protobuf(server.protobuf) as protobuf,
        Raw(server.text) as text,
    ):
        for number, value in enumerate(not_utf8):
            key = f"k{number}"
            memcached.set(key, value, flags=77)
            before = memcached.gets(key)
            connection.expect(f"GET {key}", no(VALUE_NOT_UTF8))
            # a transaction goes on, and its check holds
            connection.tell("START CHECKED")
            connection.expect(f"GET {key}", no(VALUE_NOT_UTF8))
            connection.tell(f"PUT other {number}", "COMMIT")
            connection.expect("GET other", found(str(number)))
            equal(memcached.gets(key), before, "value and version afterwards")
            with Raw(server.memcached) as raw:
                raw.ask(b"mg %s f s\r\n" % key.encode(), b"HD f77 s%d\r\n" % len(value))
            # the check is of the item, whether its value can be shown or not
            connection.tell("START CHECKED")
            connection.expect(f"GET {key}", no(VALUE_NOT_UTF8))
            memcached.set(key, value, flags=77)
            connection.tell("PUT other changed")
            connection.expect("COMMIT", no(CHANGED))
            connection.expect("GET other", found(str(number)))
            equal(memcached.get(key), value, "the value afterwards")
        # values with line ends, flags, expiry; empty ones
        for value in (b"", b"\n", b" two \r\n lines \n", "\u8bf4".encode(), b"}\n{"):
            for write in (
                lambda: memcached.set("k", value),
                lambda: protobuf.set(entry(b"k", value, flags=5, ttl_ms=100_000)),
                lambda: text.ask(b"set k %d\r\n%s\r\n" % (len(value), value), b"STORED\r\n"),
            ):
                write()
                connection.expect("GET k", found(value.decode()))
                connection.tell("DEL k")
        connection.tell("PUT k \u00e9 1")
        equal(memcached.get("k"), "\u00e9 1".encode(), "what memcached reads")
        text.ask(b"get k\r\n", b"VALUE k 4 \r\n\xc3\xa9 1\r\nEND\r\n")
        equal(protobuf.get(b"k")[0], type(protobuf.get(b"k")[0])(value="\u00e9 1".encode()), "what protobuf reads")


# --- transactions ---------------------------------------------------------------------------------


KEYS = [f"key{number}" for number in range(20)]


@on_cores(1, 2, 8)
def test_json_line_isolation(cores):
    with Server(cores) as server, Connection(server) as one, Connection(server) as two, Protobuf(server.protobuf) as protobuf:
        for key in KEYS[:10]:
            two.tell(f"PUT {key} old")
        for start, end in (("START", "COMMIT"), ("sTaRt cHeCkEd", "cOmMiT"), ("start", "rollback"), ("START  checked", "ROLLBACK")):
            one.tell(start)
            for at, key in enumerate(KEYS):
                one.tell(f"del {key}" if at % 5 == 4 else f"pUt {key} new {end}")
                one.expect(f"gEt {key}", no(MISSING) if at % 5 == 4 else found(f"new {end}"))
                before = [two.get(key) for key in KEYS]
                equal(before, ["old"] * 10 + [None] * 10, f"before {end}, to another connection")
                results = protobuf.get(*(key.encode() for key in KEYS))
                equal([result.value for result in results], [b"old"] * 10 + [b""] * 10, f"before {end}, to another protocol")
            one.tell(end)
            after = [two.get(key) for key in KEYS]
            if end.upper() == "COMMIT":
                equal(after, [None if at % 5 == 4 else f"new {end}" for at in range(20)], f"after {end}")
            else:
                equal(after, before, f"after {end}")
            for at, key in enumerate(KEYS):
                two.tell(f"PUT {key} old" if at < 10 else f"DEL {key}")
        # reads are of what is committed at the moment, and do not disturb an unchecked commit
        one.tell("START")
        for value in ("1", "2"):
            two.tell(f"PUT moving {value}")
            one.expect("GET moving", found(value))
        one.tell("PUT fixed 1")
        two.tell("PUT moving 3", "DEL fixed")
        one.tell("COMMIT")
        equal((two.get("moving"), two.get("fixed")), ("3", "1"))


@on_cores(2, 8)
def test_json_line_commits_are_one_instant(cores):
    """Nobody sees a part of a transaction, nor anything of one that was rolled back."""
    rounds, writers = 150, 3
    with Server(cores) as server:
        names = [key.encode() for key in KEYS]

        def write(number):
            with Connection(server) as connection:
                for n in range(rounds):
                    kept = n % 3 > 0
                    lines = ["START"]
                    lines += [f"PUT {key} {number}-{n}{'' if kept else '-never'}" for key in random.Random(n).sample(KEYS, len(KEYS))]
                    lines.append("COMMIT" if kept else "ROLLBACK")
                    connection.send("".join(line + "\n" for line in lines).encode())
                    for line in lines:
                        equal(connection.answer(), OK, line)

        with concurrent.futures.ThreadPoolExecutor(writers) as pool, Protobuf(server.protobuf) as reader:
            jobs = [pool.submit(write, number) for number in range(writers)]
            seen = set()
            while not all(job.done() for job in jobs):
                values = {result.value for result in reader.get(*names)}
                equal(len(values), 1, f"values at one instant: {values}")
                seen |= values
            for job in jobs:
                job.result()
            equal([value for value in seen if b"never" in value], [], "values of transactions that were rolled back")
            values = {result.value for result in reader.get(*names)}
            equal(values <= {b"%d-%d" % (number, rounds - 1) for number in range(writers)}, True, f"in the end: {values}")


@on_cores(1, 2, 8)
def test_json_line_lost_connections(cores):
    with Server(cores) as server, Connection(server) as other:
        for key in KEYS:
            other.tell(f"PUT {key} old")
        base = connections(server)
        for start in ("START", "START CHECKED"):
            for way in ("close", "reset", "half close", "half a line", "unread"):
                with Connection(server) as connection:
                    connection.tell(start)
                    connection.expect(f"GET {KEYS[0]}", found("old"))
                    connection.tell(*(f"PUT {key} lost" for key in KEYS[1:]), f"DEL {KEYS[0]}")
                    if way == "reset":
                        connection.reset()
                    elif way == "half a line":
                        connection.send(b"COMMIT")
                        connection.socket.shutdown(socket.SHUT_WR)
                        connection.closes()
                    elif way == "half close":
                        connection.socket.shutdown(socket.SHUT_WR)
                        connection.closes()
                    elif way == "unread":
                        connection.send(f"GET {KEYS[0]}\nPUT {KEYS[1]} lost\n".encode() * 100)
                until(lambda: connections(server) <= base, "the connection is closed")
                equal([other.get(key) for key in KEYS], ["old"] * len(KEYS), f"{start}, {way}")
        # whose last line is whole commits, and is told so
        for line_end in (b"\n", b"\r\n"):
            with Connection(server) as connection:
                connection.send(b"START\nPUT a 1\nCOMMIT" + line_end)
                connection.socket.shutdown(socket.SHUT_WR)
                equal(connection.incoming.read(), encoded(OK) * 3, "after a half close")
            equal(other.get("a"), "1")
            other.tell("DEL a")
        # many at once, of which one leaves something
        with contextlib.ExitStack() as stack:
            for number in range(200):
                connection = stack.enter_context(Connection(server))
                connection.tell("START", f"PUT many{number} 1", f"PUT {KEYS[0]} {number}")
                if number == 77:
                    connection.tell("COMMIT")
                if number % 2:
                    connection.reset()
        until(lambda: connections(server) <= base, "the connections are closed")
        equal([number for number in range(200) if other.get(f"many{number}")], [77])
        equal(other.get(KEYS[0]), "77")


@on_cores(1, 2, 8)
def test_json_line_checked_commits(cores):
    with (
        Server(cores) as server,
        Connection(server) as one,
        Connection(server) as two,
        contextlib.closing(client(server)) as memcached,
        Protobuf(server.protobuf) as protobuf,
    ):
        def committed(*lines):
            two.tell("START", *lines, "COMMIT")

        changes = {
            "nothing": (lambda: None, True),
            "another key": (lambda: two.tell("PUT other 2"), True),
            "an unlucky rollback": (lambda: two.tell("START", "PUT read 2", "DEL read2", "PUT missing 1", "ROLLBACK"), True),
            "a delete of what is missing": (lambda: two.tell("DEL missing"), True),
            "a read by others": (lambda: equal([two.get("read"), memcached.get("read")], ["1", b"1"]), True),
            "a key that it writes only": (lambda: two.tell("PUT w0 7"), True),
            "a change": (lambda: two.tell("PUT read 2"), False),
            "a change of the second key": (lambda: two.tell("PUT read2 2"), False),
            "the same value": (lambda: two.tell("PUT read 1"), False),
            "there and back": (lambda: two.tell("PUT read 2", "PUT read 1"), False),
            "gone and back": (lambda: two.tell("DEL read", "PUT read 1"), False),
            "deleted": (lambda: two.tell("DEL read"), False),
            "created": (lambda: two.tell("PUT missing 1"), False),
            "a transaction": (lambda: committed("PUT read 1", "PUT other 3"), False),
            "a transaction that creates": (lambda: committed("PUT missing 1"), False),
            "memcached set": (lambda: memcached.set("read", "1"), False),
            "memcached append": (lambda: memcached.append("read", ""), False),
            "memcached incr": (lambda: memcached.incr("read", 1), False),
            "memcached delete": (lambda: memcached.delete("read"), False),
            "memcached add": (lambda: memcached.add("missing", "1"), False),
            "flush_all": (memcached.flush_all, False),
            "protobuf": (lambda: protobuf.set(entry(b"missing", b"1"), entry(b"w0", b"1")), False),
        }
        for what, (change, holds) in changes.items():
            for start in ("START CHECKED", "START"):
                protobuf.delete(*(f"w{number}".encode() for number in range(6)), b"missing", b"other")
                two.tell("PUT read 1", "PUT read2 1", "PUT gone 1")
                one.tell(start)
                converse(one, [("GET read", found("1")), ("GET read2", found("1")), ("GET missing", no(MISSING))])
                one.tell(*(f"PUT w{number} mine" for number in range(6)), "DEL gone")
                change()
                before = [two.get(key) for key in ("w0", "w1", "w2", "w3", "w4", "w5", "gone")]
                # what is read again is read as it is, and the first reading counts
                one.say("GET read")
                applies = holds or start == "START"
                one.expect("COMMIT", OK if applies else no(CHANGED))
                after = [two.get(key) for key in ("w0", "w1", "w2", "w3", "w4", "w5", "gone")]
                equal(after, ["mine"] * 6 + [None] if applies else before, f"{start}, {what}")
                # it is over in any case
                one.expect("COMMIT", no(NOT_OPEN))
                one.tell("PUT outside 1")
                equal(two.get("outside"), "1", f"{start}, {what}: outside")
        # what it wrote itself is no reading, and a reading before counts
        one.tell("START CHECKED", "PUT read mine")
        one.expect("GET read", found("mine"))
        two.tell("PUT read theirs")
        one.tell("COMMIT")
        equal(two.get("read"), "mine")
        one.tell("START CHECKED")
        one.expect("GET read", found("mine"))
        one.tell("DEL read")
        one.expect("GET read", no(MISSING))
        two.tell("PUT read theirs")
        one.expect("COMMIT", no(CHANGED))
        equal(two.get("read"), "theirs")
        # one that only reads
        for change, want in (("PUT other 4", OK), ("PUT read 5", no(CHANGED))):
            one.tell("START CHECKED")
            one.say("GET read")
            two.tell(change)
            one.expect("COMMIT", want)
        # an item that ends
        protobuf.set(entry(b"ends", b"1", ttl_ms=400))
        one.tell("START CHECKED")
        if one.get("ends") == "1":
            until(lambda: two.get("ends") is None, "the item ends")
            one.tell("PUT other 5")
            one.expect("COMMIT", no(CHANGED))
            equal(two.get("other"), "4")
        else:
            one.tell("ROLLBACK")


WRONG = [
    ("START", OPEN, None),
    ("START CHECKED", OPEN, None),
    ("START now", OPEN, START_TAKES),
    ("START CHECKED now", OPEN, START_TAKES),
    ("COMMIT now", SURPLUS, SURPLUS),
    ("ROLLBACK now", SURPLUS, SURPLUS),
    ("COMMIT", None, NOT_OPEN),
    ("ROLLBACK", None, NOT_OPEN),
    *((line, mesg, mesg) for line, mesg in [
        ("PUT", NO_KEY), ("GET", NO_KEY), ("DEL", NO_KEY), ("put   ", NO_KEY),
        ("PUT a", NO_VALUE), ("PUT a   ", NO_VALUE), ("PUT  a  \r", NO_VALUE),
        ("GET a b", SURPLUS_KEY), ("DEL a b", SURPLUS_KEY),
        ("FETCH a", UNKNOWN), ("GETS a", UNKNOWN), ("PU a 1", UNKNOWN), ("\tPUT a 1", UNKNOWN), ("PUT\ta 1", UNKNOWN),
        ("{\"get\": \"a\"}", UNKNOWN), ("\x1b[A", UNKNOWN), ("\u017fTART", UNKNOWN), ("\ufeffGET a", UNKNOWN), ("\0", UNKNOWN),
        (b"PUT a \xff", NOT_UTF8), (b"PUT \x80 1", NOT_UTF8), (b"\xff\xfb\x01", NOT_UTF8), (b"PUT a \xed\xa0\x80", NOT_UTF8),
        (b"PUT a \xc0\x80", NOT_UTF8), (b"GET \xe8\xaf", NOT_UTF8), (b"COMMIT \xff", NOT_UTF8),
        (f"PUT {'k' * 251} 1", "the key has 251 bytes, and the most is 250"),
        (f"GET {'k' * 251}", "the key has 251 bytes, and the most is 250"),
        (f"DEL {'k' * 251}", "the key has 251 bytes, and the most is 250"),
        (f"PUT a {'v' * 5000}", "the value has 5000 bytes, and the most is 4096"),
        (f"PUT a {'v' * 9000}", LONG_LINE),
    ]),
]


@on_cores(1, 2, 8)
def test_json_line_errors(cores):
    """After each of them the connection goes on, and a transaction is open or not, and holds what it held, as before."""
    with Server(cores, "--item-size-max", "4k") as server, Connection(server) as one, Connection(server) as two:
        for line, inside, outside in WRONG:
            if outside:
                two.tell("PUT a old")
                one.expect(line, no(outside))
                one.expect("GET a", found("old"))
                one.tell("PUT a 1")
                equal(two.get("a"), "1", f"outside, after {line!r}")
            for start in ("START", "START CHECKED"):
                for end in ("COMMIT", "ROLLBACK"):
                    for change in (None, "PUT read 2") if inside else ():
                        two.tell("PUT a old", "PUT b old", "PUT read 1")
                        one.tell(start)
                        one.expect("GET read", found("1"))
                        one.tell("PUT a new")
                        one.expect(line, no(inside))
                        one.expect("GET a", found("new"))
                        one.tell("PUT b new")
                        equal((two.get("a"), two.get("b")), ("old", "old"), f"inside, after {line!r}")
                        if change:
                            two.tell(change)
                        fails = bool(change) and start == "START CHECKED" and end == "COMMIT"
                        one.expect(end, no(CHANGED) if fails else OK)
                        want = "new" if end == "COMMIT" and not fails else "old"
                        equal((two.get("a"), two.get("b")), (want, want), f"{start}, {line!r}, {end}")
                        one.expect(end, no(NOT_OPEN))


def dooms(one, two, lines, line, mesg):
    """`line` behind `lines` is one too many: an Error until the transaction's end, whichever that is."""
    for start in ("START", "START CHECKED"):
        for end in ("COMMIT", "ROLLBACK"):
            two.tell("PUT read 1", "PUT first old")
            one.tell(start)
            one.tell("PUT first new", *lines)
            one.expect(line, no(mesg))
            for more in ("GET first", "GET read", "PUT first 2", "DEL first", line):
                one.expect(more, no(mesg))
            # what is wrong anyhow is answered as ever
            converse(one, [("START", no(OPEN)), ("nonsense", no(UNKNOWN)), ("COMMIT now", no(SURPLUS)), ("GET", no(NO_KEY))])
            equal(two.get("first"), "old", f"before {end}")
            one.expect(end, no(mesg) if end == "COMMIT" else OK)
            equal([two.get("first"), two.get("w0")], ["old", None], f"after {end}")
            one.expect(end, no(NOT_OPEN))
            # the next one begins afresh
            one.tell(start, "PUT first new", *lines, "COMMIT")
            equal(two.get("first"), "new")
            one.tell("DEL w0")


@on_cores(1, 2, 8)
def test_json_line_limits(cores):
    with Server(cores, "--txn-ops-max", "4", "--txn-bytes-max", "10000") as server:
        with Connection(server) as one, Connection(server) as two:
            dooms(one, two, ["PUT w0 1", "DEL w1", "DEL w1"], "DEL w2", TOO_MANY)
            dooms(one, two, ["PUT w0 1", "PUT w0 2", "PUT w0 3"], "PUT w0 4", TOO_MANY)
            # 64 bytes for each command, its key, and its value
            room = 10_000 - (64 + len("first") + len("new"))
            exactly = room - 2 * 64 - len("w0") - len("w1") - 1
            dooms(one, two, ["PUT w0 1", f"PUT w1 {'v' * exactly}"], "PUT w1 v", TOO_LARGE)
            dooms(one, two, ["PUT w0 1"], f"PUT w1 {'v' * (exactly + 1)}", TOO_LARGE)
            # reads are not counted as commands, and a checked one remembers them
            one.tell("START")
            for _ in range(1000):
                one.expect("GET w9", no(MISSING))
            one.tell("PUT w9 1", "ROLLBACK", "START CHECKED")
            answers = [one.say("GET w9") for _ in range(1000)]
            equal(answers[0], no(MISSING))
            equal(answers[-1] in (no(MISSING), no(TOO_LARGE)), True, str(answers[-1]))
            one.tell("ROLLBACK", "PUT w9 1")


def all_of_it(server, value):
    """True when a transaction of ten values could be done. While memory is very short, a half-sent line ends its connection."""
    with contextlib.suppress(ConnectionError, AssertionError), Connection(server) as connection:
        connection.tell("START", *(f"PUT large{number} {value}" for number in range(10)), "COMMIT")
        return True
    return False


def is_ended(connection, answer):
    """Asks something in a transaction that was refused. While memory is very short, the line that was refused may have ended its
    connection, half-sent: then nobody is there to be asked."""
    try:
        connection.expect("GET small", answer)
    except ConnectionError:
        return True
    return False


@on_cores(1, 2)
def test_json_line_no_memory(cores):
    """Transactions that stay open are charged, and given back."""
    with Server(cores, "--max-memory", "96m", "--txn-bytes-max", "1g") as server, Connection(server) as other:
        value = "v" * 1_000_000
        # A connection counts from when its core has accepted it, which may be later than another core answers.
        other.expect("GET small", no(MISSING))
        base = connections(server)
        for way in ("rollback", "commit", "lost"):
            with contextlib.ExitStack() as stack:
                full = []
                while len(full) < 20:
                    connection = stack.enter_context(Connection(server))
                    connection.tell("START")
                    for number in range(10):
                        answer = connection.say(f"PUT large{number} {value}")
                        if answer != OK:
                            break
                    full.append((connection, answer))
                refused = [answer for _, answer in full if answer != OK]
                equal(len(refused) >= 10, True, f"{len(refused)} of 20 transactions of 10 MB with 96 MiB were refused")
                for connection, answer in full:
                    if answer != OK and is_ended(connection, answer):
                        continue
                    if way == "commit":
                        done = connection.say("COMMIT")
                        equal(done == OK, done == OK and answer == OK, f"{answer} and {done}")
                        if done == OK:
                            equal(other.get("large9"), value)
                    elif way == "rollback":
                        connection.tell("ROLLBACK")
            until(lambda: connections(server) <= base, "the connections are closed")
            with Protobuf(server.protobuf) as protobuf:
                protobuf.delete(*(b"large%d" % number for number in range(10)))
            # all of it can be used again, as soon as it is known to be free
            until(lambda: all_of_it(server, value), "there is memory again")
            other.tell(*(f"DEL large{number}" for number in range(10)))


@on_cores(1, 2)
def test_json_line_silence(cores):
    """Only the lower end of the waiting time matters: the server notices within half a second."""
    with (
        Server(cores, "--txn-idle-timeout", "1s") as server,
        Server(cores, "--txn-idle-timeout", "0") as patient,
        Connection(patient) as forever,
    ):
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(Connection(server)) for _ in range(6)]
            for number, connection in enumerate([*silent, forever]):
                connection.tell("START" if number % 2 else "START CHECKED", f"PUT a{number} 1")
            outside = stack.enter_context(Connection(server))
            outside.tell("PUT b 1")
            time.sleep(2.5)
            for number, connection in enumerate(silent):
                for line in ("PUT b 2", "GET b", "DEL b", f"GET a{number}")[: number]:
                    connection.expect(line, no(SILENT))
                if number < 3:
                    connection.expect("COMMIT", no(SILENT))
                else:
                    connection.tell("ROLLBACK")
                connection.expect("COMMIT", no(NOT_OPEN))
                outside.expect(f"GET a{number}", no(MISSING))
                connection.tell("START", f"PUT a{number} 2", "COMMIT")
                outside.expect(f"GET a{number}", found("2"))
            outside.expect("GET b", found("1"))
            forever.tell("COMMIT")
            forever.expect("GET a6", found("1"))


# --- many clients ---------------------------------------------------------------------------------


class Model:
    """A store, and what its clients' transactions would do to it."""

    def __init__(self):
        self.items, self.clock = {}, 0  # key: (value, when it was written)

    def write(self, key, value):
        self.clock += 1
        if value is None:
            self.items.pop(key, None)
        else:
            self.items[key] = (value, self.clock)

    def value(self, key):
        return self.items[key][0] if key in self.items else None


class Client:
    """What a client has open, and what the answers to its lines must be."""

    def __init__(self, model):
        self.model, self.writes, self.reads = model, None, None

    def answer(self, line):
        verb, _, rest = line.partition(" ")
        key, _, value = rest.partition(" ")
        transacts = self.writes is not None
        if verb == "START":
            if not transacts:
                self.writes, self.reads = {}, {} if rest else None
            return no(OPEN) if transacts else OK
        if verb in ("COMMIT", "ROLLBACK"):
            if not transacts:
                return no(NOT_OPEN)
            writes, reads, self.writes = self.writes, self.reads or {}, None
            if verb == "ROLLBACK":
                return OK
            if any(self.model.items.get(key, (None, 0))[1] != when for key, when in reads.items()):
                return no(CHANGED)
            for key, value in writes.items():
                self.model.write(key, value)
            return OK
        if verb == "GET":
            if transacts and key in self.writes:
                value = self.writes[key]
            else:
                value = self.model.value(key)
                if transacts and self.reads is not None:
                    self.reads.setdefault(key, self.model.items.get(key, (None, 0))[1])
            return no(MISSING) if value is None else found(value)
        if transacts:
            self.writes[key] = value or None
        else:
            self.model.write(key, value or None)
        return OK


def lines_at_random(numbers, keys, texts):
    """Lines without end, which a client may say whatever it has open."""
    while True:
        key, kind = numbers.choice(keys), numbers.random()
        if kind < 0.35:
            yield f"GET {key}"
        elif kind < 0.6:
            yield f"PUT {key} {texts(numbers)}"
        elif kind < 0.7:
            yield f"DEL {key}"
        elif kind < 0.85:
            yield numbers.choice(["START", "START CHECKED", "START CHECKED"])
        else:
            yield numbers.choice(["COMMIT", "COMMIT", "COMMIT", "ROLLBACK"])


@on_cores(1, 2, 8)
def test_json_line_interleaved(cores):
    """Forty connections, one line at a time from any of them, and every answer foretold."""
    numbers, outcomes = random.Random(cores), collections.Counter()
    keys = [f"k{number}" for number in range(40)]
    # now and then the same value is written again
    lines = lines_at_random(numbers, keys, lambda numbers: numbers.choice(["same", f"{numbers.random()}"]))
    with Server(cores) as server, contextlib.ExitStack() as stack:
        model = Model()
        clients = [(stack.enter_context(Connection(server)), Client(model)) for _ in range(40)]
        for number in range(8000):
            at = numbers.randrange(len(clients))
            connection, told = clients[at]
            if numbers.random() < 0.005:
                # it goes away, and another one comes
                connection.__exit__()
                # the others, and the one that asks
                until(lambda: connections(server) <= len(clients), "the connection is closed")
                clients[at] = (stack.enter_context(Connection(server)), Client(model))
                outcomes["lost"] += told.writes is not None
                continue
            line = next(lines)
            want = told.answer(line)
            connection.expect(line, want)
            outcomes[line.split(" ")[0], want.get("mesg", "Ok")] += 1
        reader = stack.enter_context(Connection(server))
        equal({key: reader.get(key) for key in keys}, {key: model.value(key) for key in keys}, "in the end")
    for met in (("COMMIT", "Ok"), ("COMMIT", CHANGED), ("ROLLBACK", "Ok"), "lost"):
        equal(outcomes[met] > 0, True, f"it never came to {met}: {outcomes}")


@on_cores(1, 2, 8)
def test_json_line_pipelines(cores):
    with Server(cores) as server, concurrent.futures.ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(pipeline, server, seed) for seed in range(6)]:
            done.result()


def pipeline(server, seed):
    """Lines of one client in pieces of any size, and every byte of the answers foretold."""
    numbers = random.Random(seed)
    keys = [f"{seed}-{number}" for number in range(30)]
    text = characters(numbers)
    values = lambda numbers: "v" + text(numbers.choice([1, 10, 100, 5000])).replace("\r", "") + "v"
    lines, told = lines_at_random(numbers, keys, values), Client(Model())
    with Connection(server) as connection:
        for _ in range(30):
            asked = [next(lines) for _ in range(numbers.randint(1, 120))]
            want = [told.answer(line) for line in asked]
            data = "".join(line + numbers.choice(["\n", "\r\n"]) for line in asked).encode()
            size = numbers.choice([1, 10, 1000, 100_000])
            with sending(connection, data, max(size, len(data) // 5000)):
                for line, each in zip(asked, want):
                    equal(connection.answer(), each, repr(line[:60]))


@on_cores(1, 2, 8)
def test_json_line_bank(cores):
    """Transfers with START CHECKED, tried again when somebody was quicker: no money is made or lost."""
    accounts, each, tellers, transfers = [f"account{n}" for n in range(12)], 100, 16, 40
    with Server(cores) as server:
        with Connection(server) as connection:
            connection.tell("START", *(f"PUT {account} {each}" for account in accounts), "COMMIT")
        stop = threading.Event()

        def transfer(seed):
            numbers, done, lost = random.Random(seed), 0, 0
            with Connection(server) as connection:
                while done < transfers:
                    source, target = numbers.sample(accounts, 2)
                    connection.tell("START CHECKED")
                    had, has = (int(connection.value(connection.say(f"GET {account}"))) for account in (source, target))
                    amount = numbers.randint(0, had)
                    connection.tell(f"PUT {source} {had - amount}")
                    if numbers.random() < 0.05:
                        connection.tell("ROLLBACK")
                        continue
                    connection.tell(f"PUT {target} {has + amount}")
                    answer = connection.say("COMMIT")
                    if answer == OK:
                        done += 1
                    else:
                        equal(answer, no(CHANGED))
                        lost += 1
            return lost

        def audit(_):
            """All accounts at once by protobuf, and one by one in a transaction, which counts when it can be committed."""
            names, good = [account.encode() for account in accounts], 0
            with Connection(server) as connection, Protobuf(server.protobuf) as protobuf:
                while not stop.is_set():
                    at_once = [int(result.value) for result in protobuf.get(*names)]
                    equal((sum(at_once), min(at_once) >= 0), (each * len(accounts), True), f"at one instant: {at_once}")
                    connection.send(b"START CHECKED\n" + b"".join(b"GET %s\n" % name for name in names) + b"COMMIT\n")
                    equal(connection.answer(), OK)
                    read = [int(connection.value(connection.answer())) for _ in names]
                    if connection.answer() == OK:
                        equal(sum(read), each * len(accounts), f"in a transaction: {read}")
                        good += 1
            return good

        with concurrent.futures.ThreadPoolExecutor(tellers + 2) as pool:
            audits = [pool.submit(audit, number) for number in range(2)]
            jobs = [pool.submit(transfer, seed) for seed in range(tellers)]
            try:
                lost = sum(job.result() for job in jobs)
            finally:
                stop.set()
            for job in audits:
                job.result()
        equal(lost > 0, True, "somebody was quicker")
        with Connection(server) as connection:
            connection.tell("START CHECKED")
            equal(sum(int(connection.get(account)) for account in accounts), each * len(accounts), "in the end")
            connection.tell("COMMIT")
        with Connection(server) as connection, contextlib.closing(client(server)) as memcached:
            values = memcached.get_many(accounts)
            equal(sum(int(value) for value in values.values()), each * len(accounts), "to memcached")
