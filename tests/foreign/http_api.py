"""HTTP: the OpenAPI document against the server (schemathesis), and clients good and bad, by plain sockets.

Not named http.py, which would hide Python's own module.
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

from support import MEBIBYTE, Raw, Server, equal, on_cores, settled, until

PROBLEM = "application/problem+json"


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def __repr__(self):
        return f"{self.status} {self.headers} {self.body[:200]!r}"

    @property
    def etag(self):
        return self.headers["etag"]

    @property
    def json(self):
        return json.loads(self.body)


class Connection(Raw):
    """One connection. It sends exactly what it is told to, and understands answers."""

    def __init__(self, address, timeout=15):
        super().__init__(address, timeout)
        self.host = "{}:{}".format(*address)
        self.file = self.socket.makefile("rb")

    def __exit__(self, *_):
        self.file.close()
        super().__exit__()

    def head(self, method, target, headers=(), version="HTTP/1.1"):
        lines = [f"{method} {target} {version}"]
        if not any(name.lower() == "host" for name, _ in headers):
            lines.append(f"Host: {self.host}")
        lines += [f"{name}: {value}" for name, value in headers if value is not None]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"

    def answer(self, method="GET"):
        """The next answer, or none if the server closes."""
        line = self.file.readline()
        if not line:
            return None
        status = int(re.fullmatch(rb"HTTP/1\.[01] (\d{3}) [^\r]*\r\n", line)[1])
        headers = {}
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, value = line.decode("latin-1").rstrip("\r\n").split(":", 1)
            headers[name.lower()] = value.strip()
        length = 0 if method == "HEAD" or status in (204, 304) or status < 200 else int(headers.get("content-length", 0))
        return Answer(status, headers, self.file.read(length))

    def ask(self, method, target, body=None, headers=(), version="HTTP/1.1"):
        headers = list(headers)
        if body is not None:
            headers.append(("Content-Length", len(body)))
        self.send(self.head(method, target, headers, version) + (body or b""))
        return self.answer(method)

    def chunked(self, method, target, pieces, headers=()):
        self.send(self.head(method, target, [*headers, ("Transfer-Encoding", "chunked")]))
        for piece in pieces:
            self.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.send(b"0\r\n\r\n")
        return self.answer(method)

    def batch(self, *operations, headers=()):
        body = json.dumps({"operations": operations}).encode()
        return self.ask("POST", "/keys:batch", body, [("Content-Type", "application/json"), *headers])

    def is_closed(self):
        """The server sends no more."""
        return self.answer() is None


def one(server, *args, **kwargs):
    """The answer on a connection of its own."""
    with Connection(server.http) as connection:
        return connection.ask(*args, **kwargs)


def refusal(answer, status, words="", has_body=True):
    """Every refusal is a problem document that says the status, too."""
    equal(answer.status, status, f"{answer}")
    equal(answer.headers.get("content-type"), PROBLEM, f"content type of {answer}")
    if has_body:
        problem = answer.json
        equal((problem["status"], problem["type"], bool(problem["title"])), (status, "about:blank", True), f"{answer}")
        equal(words in problem["detail"], True, f"'{words}' in {problem['detail']!r}")
    return answer


def path(key):
    return "/keys/" + "".join(f"%{byte:02X}" for byte in key)


def serves(server):
    """Others are served."""
    equal(one(server, "GET", "/healthz").status, 200, "health")


# --- the document ---------------------------------------------------------------------------------


def test_http_openapi_says_what_the_server_does():
    with Server(2) as server, tempfile.TemporaryDirectory() as folder:
        # Something to find, of each kind.
        with Connection(server.http) as connection:
            for key in ("0", "00", "key"):
                equal(connection.ask("PUT", f"/keys/{key}?flags=7", b"value").status, 201)
            equal(connection.ask("GET", "/openapi.json").headers["content-type"], "application/json")
        url = "http://{}:{}/openapi.json".format(*server.http)
        schemathesis = pathlib.Path(sys.executable).with_name("st")
        # 412 is no slip of who asked: a condition that a schema allows need not hold.
        pathlib.Path(folder, "schemathesis.toml").write_text('[checks]\npositive_data_acceptance.expected-statuses = ["2xx", 304, 404, 409, 412]\n')
        # Deterministic: the same examples each time. Events have no end, so they are left out.
        command = [schemathesis, "run", url, "--exclude-path", "/events", "--checks", "all", "--phases", "examples,coverage,fuzzing",
                   "--generation-deterministic", "--max-examples", "20", "--continue-on-failure", "--no-color"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=540)
        if run.returncode != 0:
            raise AssertionError(f"schemathesis ends with {run.returncode}:\n{run.stdout[-6000:]}{run.stderr[-500:]}")
        if not re.search(r"Operations: +\d\d selected", run.stdout):
            raise AssertionError(f"schemathesis did not test many operations:\n{run.stdout[-3000:]}")


# --- keys and values ------------------------------------------------------------------------------


@on_cores(1, 2)
def test_http_keys(cores):
    with Server(cores) as server, Connection(server.http) as connection:
        keys = [b"plain", b"a/b//c", b"\0", b"%41", b"with blank", "schlüssel-\u65e5".encode(), bytes(range(1, 200)), bytes(range(200, 256)), b"?", b"..", b"k" * 250]
        for number, key in enumerate(keys):
            equal(connection.ask("PUT", path(key), b"%d" % number).status, 201, f"{key!r}")
        for number, key in enumerate(keys):
            equal(connection.ask("GET", path(key)).body, b"%d" % number, f"{key!r}")
            shown = connection.ask("GET", path(key), headers=[("Accept", "application/json")]).json
            known = shown["key"].encode() if "key" in shown else base64.b64decode(shown["key_base64"])
            equal(known, key, "the key in JSON")
        # What needs no escape needs none, the other path leads to the same, and so do other protocols.
        equal(connection.ask("GET", "/keys/a/b//c").body, b"1")
        equal(connection.ask("GET", "/key/plain").body, b"0")
        with Raw(server.memcached) as raw:
            raw.ask(b"get plain\r\nset other 5 0 3\r\nabc\r\n", b"VALUE plain 0 1\r\n0\r\nEND\r\nSTORED\r\n")
        other = connection.ask("GET", "/keys/other")
        equal((other.body, other.headers["memkv-flags"]), (b"abc", "5"))
        for target, words in (("/keys/", "missing"), ("/keys/%", "%"), ("/keys/%4", "%"), ("/keys/a%zz", "%"), ("/keys/" + "k" * 251, "251"), (path(b"\xff" * 251), "251")):
            refusal(connection.ask("GET", target), 400, words)
        for target in ("/nothing", "/keys", "/key", "/keys:other", "/healthz/", "//"):
            refusal(connection.ask("GET", target), 404)


@on_cores(1, 2)
def test_http_values(cores):
    with Server(cores) as server, Connection(server.http) as connection:
        every = bytes(range(256))
        for number, value in enumerate((b"", b"\0", every, every * 16, every * 64, every * 4000, b"x" * MEBIBYTE)):
            for way in ("length", "chunked"):
                key = f"/keys/{way}{number}"
                if way == "length":
                    stored = connection.ask("PUT", key, value)
                else:
                    stored = connection.chunked("PUT", key, [value[at : at + 70_001] for at in range(0, len(value), 70_001)])
                equal(stored.status, 201, f"{way}, {len(value)} bytes")
                got = connection.ask("GET", key)
                equal((got.body, got.headers["content-type"]), (value, "application/octet-stream"), f"{way}, {len(value)} bytes")
                head = connection.ask("HEAD", key)
                equal((head.status, head.headers["content-length"], head.etag), (200, str(len(value)), got.etag), "HEAD")
        equal(connection.ask("PUT", "/keys/none").status, 201, "no body at all")
        equal(connection.ask("GET", "/keys/none").body, b"")
        # over the old one, and gone
        equal(connection.ask("PUT", "/keys/none", b"now").status, 204)
        equal(connection.ask("DELETE", "/keys/none").status, 204)
        refusal(connection.ask("DELETE", "/keys/none"), 404)
        refusal(connection.ask("GET", "/keys/none"), 404)
        refusal(connection.ask("HEAD", "/keys/none"), 404, has_body=False)


@on_cores(1, 2)
def test_http_flags_and_ttl(cores):
    with Server(cores) as server, Connection(server.http) as connection:
        equal(connection.ask("PUT", "/keys/f?flags=4294967295&ttl=1h", b"v").status, 201)
        got = connection.ask("GET", "/keys/f")
        equal(got.headers["memkv-flags"], "4294967295")
        left = int(got.headers["memkv-expires-at-ms"]) / 1000 - time.time()
        equal(3500 < left < 3610, True, f"{left} s are left")
        equal(connection.ask("PUT", "/keys/short?ttl=50ms", b"v").status, 201)
        until(lambda: connection.ask("GET", "/keys/short").status == 404, "the item ends")
        for query in ("ttl=0", "ttl=", "ttl", "ttl=-1", "ttl=soon", "ttl=inf", "ttl=NaN", "ttl=1e3", "ttl=1d", "ttl=0.5", "ttl=1.0s", "ttl=%2B1", "ttl=1%20s", "flags=4294967296", "flags=-1", "flags=x", "flags", "other=1"):
            refusal(connection.ask("PUT", f"/keys/bad?{query}", b"v"), 400)
        refusal(connection.ask("GET", "/keys/bad"), 404)


@on_cores(1, 2)
def test_http_json(cores):
    with Server(cores) as server, Connection(server.http) as connection:
        connection.ask("PUT", "/keys/text?flags=3", "väl".encode())
        connection.ask("PUT", "/keys/bytes", b"\xff\0")
        etag = connection.ask("GET", "/keys/text").etag
        as_json = "application/json"
        for accept, is_json in ((as_json, True), ("APPLICATION/JSON", True), ("text/html, application/json;q=0.9", False), ("application/json;q=0.9, */*;q=0.8", True),
                                ("application/json;q=0.1, application/octet-stream", False), ("application/json;q=0", False), ("*/*", False), ("application/json; q=1.0, text/plain", True)):
            got = connection.ask("GET", "/keys/text", headers=[("Accept", accept)])
            equal((got.headers["content-type"] == as_json, got.headers["vary"], got.etag), (is_json, "accept", etag), accept)
        headers = [("Accept", as_json)]
        equal(connection.ask("GET", "/keys/text", headers=headers).json, {"key": "text", "value": "väl", "flags": 3, "etag": etag.strip('"')})
        shown = connection.ask("GET", "/keys/bytes", headers=headers).json
        equal(base64.b64decode(shown["value_base64"]), b"\xff\0")


@on_cores(1, 2)
def test_http_conditions(cores):
    with Server(cores) as server, Connection(server.http) as connection:
        put = lambda *headers, key="k", value=b"v": connection.ask("PUT", f"/keys/{key}", value, headers)
        delete = lambda *headers, key="k": connection.ask("DELETE", f"/keys/{key}", headers=headers)
        get = lambda *headers, key="k": connection.ask("GET", f"/keys/{key}", headers=headers)
        yes, no = "If-Match", "If-None-Match"
        other = '"00000000000000ff"'
        # of no item
        for headers in ([(yes, "*")], [(yes, other)], [(yes, f"{other}, {other}")], [(yes, "*"), (no, other)]):
            refusal(put(*headers), 412)
            refusal(delete(*headers), 412)
            refusal(get(*headers), 412)
        for headers in ([(no, other)], [(no, "*")]):
            refusal(get(*headers), 404)
            refusal(delete(*headers), 404)
        # made once
        first = put((no, "*"))
        equal(first.status, 201)
        refusal(put((no, "*")), 412)
        equal(get().etag, first.etag, "the ETag of a write")
        tag, weak, several = first.etag, "W/" + first.etag, f'"x", {other} ,{first.etag}'
        # reads
        for headers, status in (([(yes, tag)], 200), ([(yes, "*")], 200), ([(yes, several)], 200), ([(yes, other)], 412), ([(yes, weak)], 412),
                                ([(no, tag)], 304), ([(no, weak)], 304), ([(no, several)], 304), ([(no, "*")], 304), ([(no, other)], 200),
                                ([(no, other), (no, tag)], 304), ([(yes, other), (yes, tag)], 200), ([(yes, other), (no, tag)], 412)):
            got = get(*headers)
            equal(got.status, status, f"{headers}")
            if status == 304:
                equal((got.body, got.etag), (b"", tag), "304")
            equal(connection.ask("HEAD", "/keys/k", headers=headers).status, status, f"HEAD {headers}")
        # writes
        for headers in ([(yes, other)], [(yes, weak)], [(no, tag)], [(no, weak)], [(no, several)], [(no, "*")], [(yes, tag), (no, tag)]):
            refusal(put(*headers, value=b"wrong"), 412)
            refusal(delete(*headers), 412)
        equal(get().etag, tag, "nothing was changed")
        for headers in ([(yes, "{}")], [(yes, f"{other}, {{}}")], [(yes, "*")], [(no, other)], [(yes, "{}"), (no, other)]):
            now = get().etag
            changed = put(*[(name, value.replace("{}", now)) for name, value in headers])
            equal((changed.status, changed.etag != now, get().etag), (204, True, changed.etag), f"{headers}")
        equal(delete((yes, get().etag)).status, 204)
        refusal(get(), 404)
        for value in ("", "x", '"x', 'x"', '"a" "b"', '*, "a"', "W/x", '"a b"', '"a", *', '"\xe4"'):
            for name in (yes, no):
                refusal(get((name, value)), 400, "entity tags")
                refusal(put((name, value)), 400, "entity tags")
        # a large value
        large = b"l" * 200_000
        now = put((no, "*"), key="large", value=large)
        equal(put((yes, now.etag), key="large", value=large).status, 204)
        refusal(one(server, "PUT", "/keys/large", b"m" * 200_000, [(yes, now.etag)]), 412)
        equal(one(server, "GET", "/keys/large").body, large)


def test_http_compare_and_swap_among_clients():
    """Counting with If-Match loses nothing, nor does any of the conditions that are checked before the write."""
    clients, rounds = 4, 25
    with Server(2) as server:
        for extra in ([], [("If-None-Match", '"00000000000000ff"')]):
            equal(one(server, "PUT", "/keys/count", b"0").status in (201, 204), True)
            failed = []

            def count():
                try:
                    with Connection(server.http) as connection:
                        done = 0
                        while done < rounds:
                            old = connection.ask("GET", "/keys/count")
                            answer = connection.ask("PUT", "/keys/count", b"%d" % (int(old.body) + 1), [("If-Match", old.etag), *extra])
                            equal(answer.status in (204, 412), True, f"{answer}")
                            done += answer.status == 204
                except Exception as error:
                    failed.append(error)

            run_all([count] * clients)
            equal(failed, [], "clients")
            equal(one(server, "GET", "/keys/count").body, b"%d" % (clients * rounds))


def run_all(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- batches --------------------------------------------------------------------------------------


@on_cores(1, 2)
def test_http_batch(cores):
    with Server(cores, "--request-keys-max", "100") as server, Connection(server.http) as connection:
        done = connection.batch({"op": "put", "key": "a", "value": "1", "flags": 9, "ttl_ms": 3_600_000}, {"op": "put", "key_base64": "/w==", "value_base64": "AP8="},
                                {"op": "get", "key": "a"}, {"op": "get", "key": "missing"}, {"op": "delete", "key": "missing"})
        equal(done.status, 200, f"{done}")
        results = done.json["results"]
        equal([result["status"] for result in results], [201, 201, 200, 404, 404])
        equal((results[2]["value"], results[2]["flags"]), ("1", 9), "it sees what stands before it")
        equal(connection.ask("GET", "/keys/%ff").body, b"\0\xff")
        etag = connection.ask("GET", "/keys/a").etag.strip('"')
        # conditions: all or nothing
        refusal(connection.batch({"op": "put", "key": "a", "value": "2", "if_match": "0000000000000001"}, {"op": "put", "key": "b", "value": "2"}), 412)
        refusal(connection.batch({"op": "put", "key": "b", "value": "2"}, {"op": "put", "key": "a", "value": "2", "if_none_match": "*"}), 412)
        refusal(connection.ask("GET", "/keys/b"), 404)
        equal(connection.ask("GET", "/keys/a").body, b"1")
        done = connection.batch({"op": "put", "key": "b", "value": "2", "if_none_match": "*"}, {"op": "delete", "key": "a", "if_match": etag}, {"op": "get", "key": "b", "if_match": "*"})
        refusal(done, 412)
        done = connection.batch({"op": "put", "key": "b", "value": "2", "if_none_match": "*"}, {"op": "delete", "key": "a", "if_match": etag})
        equal([result["status"] for result in done.json["results"]], [201, 204])
        # limits
        equal(connection.batch(*[{"op": "get", "key": "a"}] * 100).status, 200)
        refusal(connection.batch(*[{"op": "get", "key": "a"}] * 101), 413, "101")
        refusal(connection.batch({"op": "put", "key": "c", "value": "c" * (MEBIBYTE + 1)}), 413)
        # what is no batch
        for operations in ([], [{}], [{"op": "get"}], [{"op": "get", "key": ""}], [{"op": "get", "key": "k" * 251}], [{"op": "eat", "key": "k"}], [{"op": "put", "key": "k"}],
                           [{"op": "get", "key": "k", "value": "v"}], [{"op": "get", "key": "k", "key_base64": "aw=="}], [{"op": "get", "key_base64": "a"}], [{"op": "get", "key": "k", "more": 1}],
                           [{"op": "get", "key": "k", "ttl_ms": 1}], [{"op": "put", "key": "k", "value": "v", "ttl_ms": 0}], [{"op": "put", "key": "k", "value": "v", "flags": 1 << 32}],
                           [{"op": "get", "key": "k", "if_match": "*", "if_none_match": "*"}], [{"op": "get", "key": "k", "if_none_match": "x"}], [{"op": "get", "key": "k", "if_match": None}],
                           ["get"], [[]], [{"op": "get", "key": 1}]):
            refusal(connection.batch(*operations), 400)
        as_json = [("Content-Type", "application/json")]
        for body in (b"", b"{", b"[]", b"{}", b'{"operations": 1}', b'{"operations": [], "more": 1}', b'{"operations": [{"op": "get", "key": "k"}]} x', b"\xff", b"[" * 100_000):
            refusal(connection.ask("POST", "/keys:batch", body, as_json), 400)
        equal(connection.ask("POST", "/keys:batch", b'{"operations": [{"op": "get", "key": "b"}]}', [("Content-Type", "Application/JSON; charset=utf-8")]).status, 200)
    with Server(cores, "--request-bytes-max", "2m") as server:
        refusal(one(server, "POST", "/keys:batch", b" " * (2 * MEBIBYTE + 1), as_json), 413)
        for headers in ([], [("Content-Type", "text/plain")], [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]):
            refusal(one(server, "POST", "/keys:batch", b'{"operations": []}', headers), 415)


def test_http_batches_are_atomic():
    """Two clients write pairs, two swap them by reading and writing; nobody sees halves."""
    with Server(2) as server:
        keys = [f"pair:{number}" for number in range(6)]
        ending, failed, reads = threading.Event(), [], [0]

        def guarded(function):
            def run():
                try:
                    with Connection(server.http) as connection:
                        function(connection)
                except Exception as error:
                    failed.append(error)
                    ending.set()
            return run

        def write(name):
            def act(connection):
                for number in range(150):
                    done = connection.batch(*[{"op": "put", "key": key, "value": f"{name}{number}"} for key in keys])
                    equal(done.status, 200, f"{done}")
            return guarded(act)

        def read(connection):
            while not ending.is_set():
                done = connection.batch(*[{"op": "get", "key": key} for key in keys])
                values = {result.get("value") for result in done.json["results"]}
                equal(len(values), 1, f"one writer's values: {values}")
                reads[0] += 1

        readers = [threading.Thread(target=guarded(read)) for _ in range(2)]
        for reader in readers:
            reader.start()
        run_all([write("a"), write("b")])
        ending.set()
        for reader in readers:
            reader.join()
        equal(failed, [], "clients")
        equal(reads[0] > 0, True, "there were reads")


# --- who may write, and what there is -------------------------------------------------------------


def test_http_refuses_other_origins():
    with Server(1, "--http-hosts", "kv.example,other.example") as server, Connection(server.http) as connection:
        equal(connection.ask("PUT", "/keys/k", b"v").status, 201)
        here = connection.host
        good = ([("Host", "localhost")], [("Host", "LOCALHOST:80")], [("Host", "[::1]:8080")], [("Host", "10.1.2.3")], [("Host", "kv.example:1")], [("Host", "Other.Example.")],
                [("Origin", f"http://{here}")], [("Origin", "https://kv.example"), ("Host", "kv.example")], [("Sec-Fetch-Site", "same-origin")], [("Sec-Fetch-Site", "none")])
        for headers in good:
            equal(connection.ask("PUT", "/keys/k", b"v", headers).status, 204, f"{headers}")
        bad = ([("Host", "evil.example")], [("Host", "evil.example"), ("Origin", "http://evil.example")], [("Origin", "http://evil.example")], [("Origin", "null")],
               [("Origin", f"http://{here}0")], [("Sec-Fetch-Site", "cross-site")], [("Sec-Fetch-Site", "same-site")])
        for headers in bad:
            refusal(one(server, "PUT", "/keys/k", b"evil", headers), 403)
            refusal(one(server, "DELETE", "/keys/k", headers=headers), 403)
            refusal(one(server, "POST", "/keys:batch", b'{"operations": [{"op": "delete", "key": "k"}]}', [("Content-Type", "application/json"), *headers]), 403)
            got = one(server, "GET", "/keys/k", headers=headers)
            # reading is the browser's to allow, and nothing tells it to
            equal((got.body, [name for name in got.headers if name.startswith("access-control")]), (b"v", []))


def test_http_methods_and_versions():
    with Server(1) as server, Connection(server.http) as connection:
        for method in ("OPTIONS", "PATCH", "TRACE", "POST", "PROPFIND"):
            equal(refusal(connection.ask(method, "/keys/k"), 405).headers["allow"], "GET, HEAD, PUT, DELETE")
            equal(refusal(connection.ask(method, "/metrics"), 405).headers["allow"], "GET, HEAD")
        equal(refusal(connection.ask("GET", "/keys:batch"), 405).headers["allow"], "POST")
        connection.send(b"GET /healthz HTTP/1.1\r\n\r\n")
        refusal(connection.answer(), 400, "Host")
        equal(connection.ask("GET", "/healthz?why=not").status, 200)
        for target in ("/healthz", "/readyz", "/version", "/metrics", "/openapi.json", "/", "/page.css", "/page.js"):
            whole, head = connection.ask("GET", target), connection.ask("HEAD", target)
            equal((whole.status, head.status, head.headers["content-type"]), (200, 200, whole.headers["content-type"]), target)
        text = connection.ask("GET", "/metrics", headers=[("Accept", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")])
        equal(text.headers["content-type"].startswith("application/openmetrics-text"), True)
        # HTTP/1.0, without a Host
        connection.send(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        equal(connection.answer().body, b"ok\n")
        connection.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        equal(connection.answer().body, b"ok\n")
        equal(connection.is_closed(), True, "HTTP/1.0 ends the connection")
        with Connection(server.http) as closing:
            closing.ask("GET", "/healthz", headers=[("Connection", "close")])
            equal(closing.is_closed(), True, "Connection: close")


@on_cores(1, 2)
def test_http_pipelines(cores):
    count = 1000
    with Server(cores) as server, Connection(server.http) as connection:
        requests = b"".join(connection.head("PUT", f"/keys/p{n}", [("Content-Length", 4)]) + b"%04d" % n + connection.head("GET", f"/keys/p{n}") for n in range(count))
        sender = threading.Thread(target=connection.send, args=(requests,))
        sender.start()
        for number in range(count):
            equal(connection.answer().status, 201)
            equal(connection.answer().body, b"%04d" % number)
        sender.join()
        # the other half goes on when this one is closed
        connection.send(connection.head("GET", "/keys/p1") * 3)
        connection.socket.shutdown(socket.SHUT_WR)
        equal([connection.answer().body for _ in range(3)], [b"0001"] * 3)
        equal(connection.is_closed(), True, "all is said")


# --- limits ---------------------------------------------------------------------------------------


@on_cores(1, 2)
def test_http_too_large(cores):
    with Server(cores) as server:
        for method, target, headers, most in (("PUT", "/keys/k", [], MEBIBYTE), ("POST", "/keys:batch", [("Content-Type", "application/json")], 16 * MEBIBYTE)):
            # announced, and the client sends it all before it reads
            for bytes_ in (most + 1, 40 * MEBIBYTE):
                with Connection(server.http) as connection:
                    answer = refusal(connection.ask(method, target, b"x" * bytes_, headers), 413)
                    equal((answer.headers.get("connection"), connection.is_closed()), ("close", True))
            # chunked
            with Connection(server.http) as connection:
                refusal(connection.chunked(method, target, [b"x" * 65536] * (most // 65536 + 320), headers), 413)
            # announced, and nothing follows
            with Connection(server.http) as connection:
                connection.send(connection.head(method, target, [*headers, ("Content-Length", 1 << 50), ("Expect", "100-continue")]))
                refusal(connection.answer(), 413)
        refusal(one(server, "GET", "/keys/k"), 404)
    with Server(cores, "--item-size-max", "8m") as server, Connection(server.http) as connection:
        equal(connection.ask("PUT", "/keys/k", b"x" * (8 * MEBIBYTE)).status, 201)
        equal(len(connection.ask("GET", "/keys/k").body), 8 * MEBIBYTE)
        refusal(connection.ask("PUT", "/keys/k", b"x" * (8 * MEBIBYTE + 1)), 413)


def test_http_continue():
    with Server(1) as server, Connection(server.http) as connection:
        for size in (3, 300_000):
            connection.send(connection.head("PUT", f"/keys/{size}", [("Expect", "100-continue"), ("Content-Length", size)]))
            equal(connection.answer().status, 100)
            connection.send(b"x" * size)
            equal(connection.answer().status, 201)
        # not asked to go on with what is refused
        connection.send(connection.head("PUT", "/keys/3", [("Expect", "100-continue"), ("Content-Length", 3), ("If-None-Match", "x")]))
        refusal(connection.answer(), 400)


def test_http_memory_limit():
    with Server(2, "--max-memory", "64m") as server, Connection(server.http) as connection:
        value = b"x" * 500_000
        stored = 0
        while (answer := connection.ask("PUT", f"/keys/{stored}", value)).status == 201:
            stored += 1
            equal(stored < 200, True, "the memory limit is never reached")
        refusal(answer, 507)
        equal(stored > 10, True, f"{stored} values were stored")
        with Connection(server.http) as again:
            equal(again.ask("GET", "/keys/0").body, value)
            refusal(again.batch(*[{"op": "put", "key": f"b{n}", "value": "y" * 500_000} for n in range(20)]), 507)
        with Connection(server.http) as again:
            refusal(again.ask("PUT", "/keys/0", b"z" * 1_000_000), 507)
        with Connection(server.http) as again:
            equal(again.ask("GET", "/keys/0").body, value, "the old value")
            for number in range(stored):
                equal(again.ask("DELETE", f"/keys/{number}").status, 204)
            equal(again.ask("PUT", "/keys/0", b"z" * 1_000_000).status, 201)


def test_http_connection_limit():
    with Server(1, "--connections-max", "3") as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            equal(stack.enter_context(Connection(server.http)).ask("GET", "/healthz").status, 200)
        with Connection(server.http) as more:
            refusal(more.answer(), 503, "connections")
        stack.close()

        def admitted():
            with Connection(server.http) as connection:
                return connection.ask("GET", "/healthz").status == 200

        until(admitted, "there is room again")


def test_http_read_only_and_loaded_data():
    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder) / "rows"
        rows.write_bytes(b"first 1\nsecond two words\n")
        for options, popen in ((["--load", str(rows), "--read-only"], {}), (["--read-only"], {"env": {**os.environ, "KV_DATA_FILE_PATH": str(rows)}})):
            with Server(2, *options, **popen) as server, Connection(server.http) as connection:
                equal(connection.ask("GET", "/readyz").status, 200)
                for prefix in ("/keys", "/key"):
                    equal(connection.ask("GET", f"{prefix}/first").body, b"1")
                    equal(connection.ask("GET", f"{prefix}/second").body, b"two words")
                for value in (b"v", b"v" * 200_000):
                    refusal(one(server, "PUT", "/keys/first", value), 403, "read-only")
                refusal(connection.ask("DELETE", "/keys/first"), 403, "read-only")
                refusal(connection.batch({"op": "put", "key": "first", "value": "2"}), 403, "read-only")
                equal(connection.batch({"op": "get", "key": "first"}).json["results"][0]["value"], "1")
                equal(connection.ask("GET", "/keys/first").body, b"1")


@on_cores(1, 2)
def test_http_stops_in_time(cores):
    """With connections that are idle, in the middle of a request, or told events. Server.stop demands that it ends in time."""
    with Server(cores) as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            idle = stack.enter_context(Connection(server.http))
            equal(idle.ask("GET", "/healthz").status, 200)
        events = stack.enter_context(Connection(server.http))
        events.send(events.head("GET", "/events"))
        equal(events.answer().headers["content-type"], "text/event-stream")
        half = stack.enter_context(Connection(server.http))
        half.send(half.head("PUT", "/keys/half", [("Content-Length", 500_000)]) + b"x" * 1000)
        began = stack.enter_context(Connection(server.http))
        began.send(b"GET /heal")
        rude = stack.enter_context(Connection(server.http))
        rude.send(rude.head("PUT", "/keys/rude", [("Content-Length", 50 * MEBIBYTE)]))
        equal(rude.answer().status, 413)
        server.stop()
        equal(idle.is_closed(), True, "an idle connection is closed")


# --- bad clients ----------------------------------------------------------------------------------


def test_http_malformed_requests():
    with Server(1) as server:
        for request in (b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n", b"get keys value\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
                        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n continued\r\n\r\n", b"GET / HTTP/1.1\r\nA\0: x\r\n\r\n",
                        b"PUT /keys/k HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", b"PUT /keys/k HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\nxx",
                        b"PUT /keys/k HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\nxx"):
            with Connection(server.http) as connection:
                connection.send(request)
                refusal(connection.answer(), 400)
                equal(connection.is_closed(), True, f"{request[:40]!r}")
        # after good ones
        with Connection(server.http) as connection:
            connection.send(connection.head("GET", "/healthz") * 5 + b"nonsense\r\n\r\n")
            equal([connection.answer().status for _ in range(5)], [200] * 5)
            refusal(connection.answer(), 400)
            equal(connection.is_closed(), True)
        # A value that looks like a refusal is no refusal.
        with Connection(server.http) as connection:
            value = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            for _ in range(2):
                equal(connection.ask("PUT", "/keys/looks", value).status in (201, 204), True)
                equal(connection.ask("GET", "/keys/looks").body, value)
            connection.send(connection.head("GET", "/keys/looks") * 50)
            equal([connection.answer().body for _ in range(50)], [value] * 50)
            connection.send(connection.head("GET", "/keys/looks", [("Connection", "close")]))
            equal(connection.answer().body, value)
        # Both lengths: the request ends where the chunks do, or is refused; never is the rest taken for a request.
        with Connection(server.http) as connection:
            connection.send(b"PUT /keys/k HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nDELETE /keys/looks HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.socket.shutdown(socket.SHUT_WR)
            connection.read_all()
        serves(server)


def test_http_floods_of_headers():
    with Server(1) as server:
        many = lambda count, size=1: [(f"x-{n}", "v" * size) for n in range(count)]
        equal(one(server, "GET", "/healthz", headers=many(90)).status, 200)
        refusal(one(server, "GET", "/healthz", headers=many(150)), 431)
        refusal(one(server, "GET", "/healthz", headers=many(2, 10_000)), 431)
        refusal(one(server, "GET", "/healthz", headers=many(1, 100_000)), 431)
        refusal(one(server, "GET", "/healthz", headers=many(90, 10_000)), 431)
        equal(one(server, "GET", "/" + "x" * 100_000).status in (414, 431), True)
        # without an end
        with Connection(server.http) as connection, contextlib.suppress(ConnectionError):
            connection.send(connection.head("GET", "/healthz")[:-2])
            for _ in range(500):
                connection.send(b"x-y: " + b"z" * 995 + b"\r\n")
            refusal(connection.answer(), 431)
        serves(server)


def test_http_slow_clients():
    with Server(1, "--http-timeout", "1s") as server, contextlib.ExitStack() as stack:
        silent, slow, half, large, chunks = [stack.enter_context(Connection(server.http)) for _ in range(5)]
        slow.send(b"GET /healthz HTTP/1.1\r\n")
        half.send(half.head("PUT", "/keys/half", [("Content-Length", 10)]) + b"12345")
        large.send(large.head("PUT", "/keys/large", [("Content-Length", 500_000)]) + b"x" * 499_999)
        chunks.send(chunks.head("PUT", "/keys/chunks", [("Transfer-Encoding", "chunked")]) + b"3\r\nabc\r\n")
        # Headers that trickle are as slow as none.
        stop = time.monotonic() + 15
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < stop:
                slow.send(b"x: y\r\n")
                time.sleep(0.1)
        equal(time.monotonic() < stop, True, "slow headers end the connection")
        for connection in (half, large, chunks):
            refusal(connection.answer(), 408)
            equal(connection.is_closed(), True)
        equal(silent.is_closed(), True)
        for key in ("half", "large", "chunks"):
            refusal(one(server, "GET", f"/keys/{key}"), 404)


def test_http_bodies_that_break_off():
    with Server(2, "--max-memory", "128m") as server:
        before = server.rss()
        for number in range(200):
            with Connection(server.http) as connection:
                size = (10, 100_000, 1_000_000)[number % 3]
                if number % 2:
                    connection.send(connection.head("PUT", f"/keys/broken{number}", [("Content-Length", size)]) + b"x" * (size - 1))
                else:
                    connection.send(connection.head("PUT", f"/keys/broken{number}", [("Transfer-Encoding", "chunked")]) + b"%x\r\n" % size + b"x" * (size - 1))
                if number % 5 == 0:
                    connection.socket.shutdown(socket.SHUT_WR)
                    answer = connection.answer()
                    if answer is not None:
                        refusal(answer, 400, "broke off")
        with Connection(server.http) as connection:
            for number in range(200):
                refusal(connection.ask("GET", f"/keys/broken{number}"), 404)
            equal(connection.ask("PUT", "/keys/whole", b"x" * 1_000_000).status, 201)
        # All bodies together are 73 MiB. Each of the two cores may keep 256 buffers of 64 KiB to use them again.
        settled(server, before + 36 * MEBIBYTE)


def test_http_many_idle_connections():
    with Server(2) as server, contextlib.ExitStack() as stack:
        before = server.rss()
        connections = [stack.enter_context(Connection(server.http)) for _ in range(2000)]
        for connection in connections[::2]:
            equal(connection.ask("GET", "/healthz").status, 200)
        serves(server)
        equal(server.rss() - before < 64 * MEBIBYTE, True, f"{(server.rss() - before) / 2000 / 1024} KiB for each connection")
        for connection in connections[-5:]:
            equal(connection.ask("GET", "/healthz").status, 200)


def test_http_clients_that_do_not_read():
    """What one does not take is not made for it without end; the others go on."""
    with Server(1) as server, Connection(server.http) as deaf:
        equal(one(server, "PUT", "/keys/large", b"x" * 1_000_000).status, 201)
        before = server.rss()
        deaf.socket.settimeout(1)
        with contextlib.suppress(TimeoutError):
            deaf.send(deaf.head("GET", "/keys/large") * 20_000)
        serves(server)
        equal(server.rss() - before < 24 * MEBIBYTE, True, f"{(server.rss() - before) >> 20} MiB for who does not read")
