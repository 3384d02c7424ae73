#!/usr/bin/env python3
"""Replays the golden transcripts of tests/golden against a server.

A transcript is a text file of these lines:

    # text       a comment; the first one names what the file guards, and holds
                 `differs-from-memcached:` where our server means to differ
    > bytes      bytes to send; neighbouring lines are one group
    < bytes      bytes that must come back; neighbouring lines are one group
    ~ 2s         two seconds pass
    ! close      the server closes the connection here, having sent no more
    ! reconnect  go on with a fresh connection to the same store

Bytes are written with the escapes \\r \\n \\0 \\t \\\\ \\xNN, and \\{text*300}
for a text repeated; nothing is added at the end of a line. {{name}} stands for
a decimal number: an expected line captures it at first and must meet the same
number afterwards, a sent line inserts it. {{_}} is any number.

Every transcript starts on an empty store.

    replay.py HOST:PORT FILE...      against a running server, emptied first
    replay.py --validate [FILE...]   against the real memcached, which is
                                     started for every file
"""

import argparse
import concurrent.futures
import math
import pathlib
import re
import select
import socket
import subprocess
import sys
import time

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
SIZES = [1, 2, 5, 10, 100, 1000, 0]  # 0: the whole group at once
# Of a group longer than this only both ends are cut small: a value of a
# mebibyte in single bytes proves nothing more and takes minutes.
LONG_GROUP = 16384
REPLY_TIMEOUT = 10.0

_ESCAPE = re.compile(r"\\\{([^}]*)\*(\d+)\}|\\x([0-9a-fA-F]{2})|\\(.)|\{\{(\w+)\}\}", re.S)
_PLAIN = {"r": b"\r", "n": b"\n", "0": b"\0", "t": b"\t", "\\": b"\\"}
# Times that move on by themselves while a slow replay is under way.
_CLOCK = re.compile(rb"(?:(?<= t)|(?<= exp=-)|(?<= l)|(?<= la=))\d+(?=[ \r])")


class Mismatch(Exception):
    pass


def parse_bytes(text):
    """The pieces of a line: byte strings, and names of numbers as str."""
    out, last = [], 0
    for m in _ESCAPE.finditer(text):
        out.append(text[last : m.start()].encode("latin-1"))
        last = m.end()
        body, count, code, plain, name = m.groups()
        if name:
            out.append(name)
        elif count:
            inner = parse_bytes(body)
            out.append(b"".join(inner) * int(count))
        elif code:
            out.append(bytes([int(code, 16)]))
        elif plain in _PLAIN:
            out.append(_PLAIN[plain])
        else:
            raise ValueError(f"unknown escape \\{plain}")
    out.append(text[last:].encode("latin-1"))
    joined = []
    for piece in out:
        if isinstance(piece, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    return joined


def show(data, limit=400):
    """Bytes in the notation of the transcripts, with long runs folded."""
    names = {13: "\\r", 10: "\\n", 0: "\\0", 9: "\\t", 92: "\\\\"}
    text = "".join(names.get(b) or (chr(b) if 32 <= b < 127 else f"\\x{b:02x}") for b in data)
    text = re.sub(r"([^\\}])\1{30,}", lambda m: f"\\{{{m.group(1)}*{len(m.group(0))}}}", text)
    return text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :]


class Transcript:
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.name = f"{self.path.parent.name}/{self.path.name}"
        self.events = []  # (line number, kind, argument)
        self.differs = False
        lines = self.path.read_text(encoding="latin-1").split("\n")
        if not lines[0].startswith("# "):
            raise ValueError(f"{self.name}: the first line must say what the file guards")
        for number, line in enumerate(lines, 1):
            kind, rest = line[:1], line[2:]
            if kind in ("", "#"):
                self.differs |= "differs-from-memcached:" in line and number <= 5
                continue
            if line[1:2] != " ":
                raise ValueError(f"{self.name}:{number}: a blank is missing after {kind}")
            if kind in "<>":
                pieces = parse_bytes(rest)
                if self.events and self.events[-1][1] == kind:
                    self.events[-1][2].extend(pieces)
                else:
                    self.events.append((number, kind, pieces))
            elif kind == "~" and re.fullmatch(r"\d+s", rest):
                self.events.append((number, "~", int(rest[:-1])))
            elif kind == "!" and rest in ("close", "reconnect"):
                self.events.append((number, rest, None))
            else:
                raise ValueError(f"{self.name}:{number}: not a line of a transcript: {line[:60]}")
        for _, kind, pieces in self.events:
            if kind in "<>":
                for i in range(len(pieces) - 1, 0, -1):
                    if isinstance(pieces[i], bytes) and isinstance(pieces[i - 1], bytes):
                        pieces[i - 1] += pieces.pop(i)

    @property
    def sleeps(self):
        return sum(arg for _, kind, arg in self.events if kind == "~")


def fragments(data, size):
    if size == 0:
        return [data]
    cut = lambda part, n: [part[i : i + n] for i in range(0, len(part), n)]
    if len(data) <= LONG_GROUP:
        return cut(data, size)
    edge = LONG_GROUP // 8
    return (
        cut(data[:edge], size)
        + cut(data[edge:-edge], max(size, LONG_GROUP))
        + cut(data[-edge:], size)
    )


class Player:
    """One run of one transcript over one fragment size."""

    def __init__(self, transcript, address, size):
        self.t, self.address, self.size = transcript, address, size
        self.numbers, self.pending, self.ended = {}, b"", False
        self.virtual, self.began = 0, time.monotonic()
        self.sock = None

    def run(self):
        self.connect()
        try:
            for i, (line, kind, arg) in enumerate(self.t.events):
                try:
                    self.step(kind, arg, self.t.events[i + 1 :])
                except Mismatch as why:
                    raise Mismatch(f"{self.t.name}:{line} (fragments of {self.size or 'all'}): {why}") from None
                except OSError as why:
                    raise Mismatch(f"{self.t.name}:{line} (fragments of {self.size or 'all'}): {why}") from None
        finally:
            self.sock.close()

    def connect(self):
        self.sock = socket.create_connection(self.address, timeout=REPLY_TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.pending, self.ended = b"", False

    def step(self, kind, arg, following):
        if kind == ">":
            kinds = [k for _, k, _ in following[:2]]
            closing = kinds[:1] == ["close"] or kinds == ["<", "close"]
            self.send(b"".join(p if isinstance(p, bytes) else b"%d" % self.numbers[p] for p in arg), closing)
        elif kind == "<":
            self.expect(arg)
            # Nothing more may be there; a late surplus shows in the next group.
            self.receive(0 if following else 0.05)
            if self.pending:
                raise Mismatch(f"more than expected came: {show(self.pending)}")
        elif kind == "~":
            time.sleep(arg)
            self.virtual += arg
        elif kind == "close":
            self.expect_close()
        elif kind == "reconnect":
            self.sock.close()
            self.connect()

    def send(self, data, closing):
        for part in fragments(data, self.size):
            view = memoryview(part)
            while view and not self.ended:
                # Replies are read while sending, so that neither side blocks.
                readable, writable, _ = select.select([self.sock], [self.sock], [], REPLY_TIMEOUT)
                if not readable and not writable:
                    raise Mismatch("the server takes no more bytes")
                if readable:
                    self.take()
                try:
                    if writable:
                        view = view[self.sock.send(view) :]
                except BlockingIOError:
                    pass
                except OSError:
                    if not closing:
                        raise
                    self.ended = True
            if self.size:
                time.sleep(0)  # lets the server read what it got so far
        if self.ended and not closing:
            raise Mismatch("the connection was closed while the request was being sent")

    def take(self):
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self.pending += data
        self.ended |= not data

    def receive(self, timeout):
        """Waits for bytes; False when none came."""
        if self.ended or not select.select([self.sock], [], [], timeout)[0]:
            return False
        self.take()
        return True

    def slack(self):
        real = time.monotonic() - self.began
        return math.ceil(max(0.0, real - self.virtual)) + 1

    def expect(self, pieces):
        want = show(b"".join(p if isinstance(p, bytes) else b"{{%s}}" % p.encode() for p in pieces))
        for piece in pieces:
            if isinstance(piece, bytes):
                at = 0
                for m in _CLOCK.finditer(piece):
                    self.literal(piece[at : m.start()], want)
                    value, due = self.number(want), int(m.group())
                    before = piece[: m.start()]
                    slip = value - due if before.endswith((b" l", b" la=")) else due - value
                    if not 0 <= slip <= self.slack():
                        raise Mismatch(f"expected the time {due}, got {value}, in {want}")
                    at = m.end()
                self.literal(piece[at:], want)
            else:
                value = self.number(want)
                if piece != "_" and self.numbers.setdefault(piece, value) != value:
                    raise Mismatch(f"{{{{{piece}}}}} was {self.numbers[piece]} and is now {value}")

    def literal(self, piece, want):
        while len(self.pending) < len(piece):
            same = piece.startswith(self.pending)
            if not same or not self.receive(REPLY_TIMEOUT) or self.ended:
                if len(self.pending) >= len(piece):
                    break
                self.receive(0.05)  # the rest of the reply, for a clearer message
                self.differ(want, piece)
        if self.pending[: len(piece)] != piece:
            self.receive(0.05)
            self.differ(want, piece)
        self.pending = self.pending[len(piece) :]

    def number(self, want):
        while True:
            m = re.match(rb"(\d+)(?=\D)", self.pending)
            if m:
                self.pending = self.pending[m.end() :]
                return int(m.group(1))
            if re.search(rb"^\D", self.pending) or not self.receive(REPLY_TIMEOUT) or self.ended:
                self.differ(want, b"a number")

    def differ(self, want, piece):
        got = self.pending
        same = next((i for i, (a, b) in enumerate(zip(piece, got)) if a != b), min(len(piece), len(got)))
        end = " and the end of the connection" if self.ended else ""
        raise Mismatch(
            f"the reply differs\n    whole group: {want}\n    expected:    {show(piece[same:])}\n    got:         {show(got[same:])}{end}"
        )

    def expect_close(self):
        deadline = time.monotonic() + REPLY_TIMEOUT
        while not self.ended and not self.pending and time.monotonic() < deadline:
            self.receive(deadline - time.monotonic())
        if self.pending:
            raise Mismatch(f"expected the end of the connection, got {show(self.pending)}")
        if not self.ended:
            raise Mismatch("expected the end of the connection, which stays open")


def replay(path, address, size):
    """Plays one transcript; None, or a text that says what differs."""
    try:
        Player(Transcript(path), address, size).run()
    except (Mismatch, OSError) as why:
        return str(why)
    return None


def empty(address, text):
    """Empties the store of a running server."""
    with socket.create_connection(address, timeout=REPLY_TIMEOUT) as s:
        s.sendall(b"delete\r\n" if text else b"flush_all\r\n")
        reply = s.recv(100)
        if reply not in (b"DELETED\r\n", b"OK\r\n"):
            raise SystemExit(f"the store cannot be emptied: {show(reply)}")


class Memcached:
    """A real memcached on a free port of the loopback.

    Without its LRU thread: while that thread holds an item, incr makes a new
    one instead of changing it in place, which shows (no padding, no mark of
    being stale), so that the answers would depend on luck.
    """

    def __init__(self, *options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.address = s.getsockname()
        self.process = subprocess.Popen(
            ["memcached", "-t", "1", "-U", "0", "-l", "127.0.0.1", "-p", str(self.address[1])]
            + ["-u", "nobody", "-m", "64", "-I", "1m", "-o", "no_lru_maintainer", *options]
        )
        deadline = time.monotonic() + 5
        while True:
            try:
                socket.create_connection(self.address).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    self.stop()
                    raise
                time.sleep(0.01)

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def validate(paths, sizes, jobs=8):
    """Plays transcripts against the real memcached; yields name and result."""

    def one(path):
        transcript = Transcript(path)
        if transcript.differs:
            return transcript.name, "skipped"
        chosen = sizes if not transcript.sleeps else sizes[-1:]
        for size in chosen:
            with Memcached() as server:
                why = replay(path, server.address, size)
            if why:
                return transcript.name, why
        return transcript.name, None

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, paths)


def main():
    parser = argparse.ArgumentParser(description="Replays golden transcripts.")
    parser.add_argument("--validate", action="store_true", help="against the real memcached")
    parser.add_argument("--text", action="store_true", help="the server speaks the simple text protocol")
    parser.add_argument("--sizes", default="all", help="fragment sizes, such as 1,10,all; or `every`")
    parser.add_argument("what", nargs="*", help="HOST:PORT (unless --validate), then files; all by default")
    options = parser.parse_args()
    sizes = SIZES if options.sizes == "every" else [0 if s == "all" else int(s) for s in options.sizes.split(",")]
    address = None
    if not options.validate:
        if not options.what:
            parser.error("HOST:PORT is missing")
        host, port = options.what.pop(0).rsplit(":", 1)
        address = (host, int(port))
    folder = "text" if options.text else "memcached"
    paths = [pathlib.Path(p) for p in options.what] or sorted((GOLDEN / folder).glob("*.txt"))
    failed = 0
    if options.validate:
        for name, why in validate(paths, sizes):
            print(f"{name}: {why or 'as expected'}", flush=True)
            failed += why not in (None, "skipped")
    else:
        for path in paths:
            for size in sizes:
                empty(address, options.text)
                why = replay(path, address, size)
                print(f"{path.name} ({size or 'all'}): {why or 'as expected'}", flush=True)
                failed += why is not None
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
