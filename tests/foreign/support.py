"""What the foreign tests share: the server as a context manager, plain sockets, and how tests are found and run."""

import contextlib
import functools
import inspect
import os
import pathlib
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback

from pymemcache.client.base import Client

import replay

BINARY = os.environ["MEMKV_TPC"]
START_SECONDS = 30
STOP_SECONDS = 5
MEBIBYTE = 1 << 20


# The default ports may be in use.
ON_FREE_PORTS = ["--memcached", "127.0.0.1:0", "--text", "127.0.0.1:0", "--protobuf", "127.0.0.1:0", "--json-line", "127.0.0.1:0",
                 "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]


class Server:
    """The server on ports of its own choice, as a context manager.

    Leaving it sends SIGTERM and demands that the server ends in time, with
    exit code 0 and without a panic.
    """

    def __init__(self, cores, *options, **popen):
        self.command = [BINARY, "--cores", str(cores), *ON_FREE_PORTS, *options]
        self.popen = popen
        self.addresses, self.stopped = {}, False

    def __enter__(self):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.log, **self.popen)
        try:
            self.wait_until_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.memcached, self.text, self.protobuf, self.json_line, self.http, self.grpc = map(
            self.addresses.get, ("memcached", "text", "protobuf", "json-line", "http", "grpc")
        )
        return self

    def wait_until_ready(self):
        deadline, seen = time.monotonic() + START_SECONDS, b""
        while b"\nready\n" not in b"\n" + seen:
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            if not data:
                raise AssertionError(f"the server does not get ready; it says {seen!r} and {self.messages()!r}")
            seen += data
        for name, host, port in re.findall(r"^listening ([\w-]+) (\S+):(\d+)$", seen.decode(), re.M):
            self.addresses[name] = (host, int(port))
        own = re.findall(r"^listening protobuf (\S+):(\d+) core \d+$", seen.decode(), re.M)
        self.core_ports = [(host, int(port)) for host, port in own]

    def messages(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def rss(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s*(\d+) kB", status).group(1)) * 1024

    def __exit__(self, *_):
        self.stop()

    def crash(self):
        """Ends it as no server would by itself."""
        self.stopped = True
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.process.stdout.close()

    def stop(self):
        if self.stopped:
            return
        self.stopped = True
        died = self.process.poll() is not None
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none {STOP_SECONDS} s after SIGTERM"
            self.process.kill()
            self.process.wait()
        messages = self.messages()
        self.log.close()
        self.process.stdout.close()
        if died or code != 0 or "panicked" in messages:
            when = "died during the test" if died else "was told to stop"
            # of a panic its head matters, of anything else the last lines
            panic = messages.find("panicked")
            excerpt = messages[-1500:] if panic < 0 else messages[max(0, panic - 200) : panic + 1500]
            raise AssertionError(f"the server {when}: exit code {code}, its messages: {excerpt}") from sys.exc_info()[1]


def equal(got, want, what=""):
    if got != want:
        show = lambda v: replay.show(v) if isinstance(v, bytes) else repr(v)[:400]
        raise AssertionError(f"{what + ': ' if what else ''}expected {show(want)}, got {show(got)}")


class Raw:
    """A plain socket."""

    def __init__(self, address, timeout=10):
        self.socket = socket.create_connection(address, timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def read(self, count):
        """So many bytes; fewer when no more come."""
        data = bytearray()
        with contextlib.suppress(TimeoutError):
            while len(data) < count and (piece := self.socket.recv(min(count - len(data), 1 << 18))):
                data += piece
        return bytes(data)

    def read_all(self):
        """Everything until the server closes."""
        data = bytearray()
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(1 << 18):
                data += piece
        return bytes(data)

    def ask(self, request, want):
        self.send(request)
        equal(self.read(len(want)), want, replay.show(request[:60]))


def client(server, **options):
    return Client(server.memcached, default_noreply=False, connect_timeout=10, timeout=10, **options)


def raises(kind, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} from {function.__name__}")


def until(condition, what):
    """Waits for what must come within seconds."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"it does not happen: {what}")
        time.sleep(0.01)


def settled(server, limit):
    """The server's memory falls below the limit within seconds."""
    deadline = time.monotonic() + 10
    while (rss := server.rss()) > limit:
        if time.monotonic() > deadline:
            raise AssertionError(f"the server holds {rss >> 20} MiB, more than {limit >> 20} MiB")
        time.sleep(0.2)


def start(*options, seconds=START_SECONDS, **popen):
    """Starts a server that is to fail: its exit code and its messages."""
    process = subprocess.Popen([BINARY, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
    try:
        _, messages = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"{' '.join(options)}: the server starts") from None
    if "panicked" in messages:
        raise AssertionError(f"{' '.join(options)}: {messages}")
    return process.returncode, messages


def on_cores(*numbers):
    """Has a test run once with each number of cores. The test takes the number."""

    def mark(test):
        test.cores = numbers
        return test

    return mark


def tests_of(module):
    """(name, function) for every test of a module."""
    for name, test in list(vars(module).items()):
        if not name.startswith("test_") or not inspect.isfunction(test):
            continue
        name = name[5:].replace("_", " ")
        if not hasattr(test, "cores"):
            yield name, test
        for cores in getattr(test, "cores", ()):
            yield f"{name} --cores {cores}", functools.partial(test, cores)


def attempt(name, function):
    began = time.monotonic()
    try:
        function()
        why = None
    except Exception as error:
        why = str(error) if isinstance(error, AssertionError) and str(error) else traceback.format_exc()
        if error.__cause__ is not None:
            why += f"\nafter: {error.__cause__}"
    line = f"{'ok' if why is None else 'FAILED'} {name} ({time.monotonic() - began:.1f} s)"
    if why is not None:
        line += "\n    " + why.strip().replace("\n", "\n    ")
    print(line, flush=True)
    return why is None
