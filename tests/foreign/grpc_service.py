"""The gRPC service, spoken by Google's library with stubs made of proto/kv.proto, and by the h2 package as no library would."""

import asyncio
import concurrent.futures
import contextlib
import gzip
import importlib.util
import itertools
import random
import struct
import sys
import tempfile
import threading
import time

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protobuf import ANY_BYTES, ROOT, U32_MAX, U64_MAX
from support import MEBIBYTE, Raw, Server, client, equal, on_cores, raises, settled, until

sys.path.append(str(ROOT / "proto"))
kv, services = grpc.protos_and_services("kv.proto")

ABSENT, PRESENT = kv.Condition(absent=True), kv.Condition(present=True)
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
SECONDS = 20


def is_version(version):
    return kv.Condition(version=version)


class Service:
    """A channel of its own, and its stubs, as a context manager. The methods are those of the service, with a time limit."""

    def __init__(self, server, *options, **channel):
        # channels with the same options would share a connection
        own = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1), *options]
        self.channel = grpc.insecure_channel("%s:%d" % server.grpc, options=own, **channel)
        self.stub = services.KVStub(self.channel)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def __getattr__(self, method):
        call = getattr(self.stub, method)
        return lambda request, **options: call(request, **{"timeout": SECONDS, **options})

    def get(self, key, **options):
        return self.Get(kv.GetRequest(key=key, **options))

    def put(self, key, value=b"", **options):
        return self.Put(kv.Entry(key=key, value=value, **options))

    def delete(self, key, **options):
        return self.Delete(kv.DeleteRequest(key=key, **options)).deleted

    def batch_get(self, *keys, **options):
        return list(self.BatchGet(kv.BatchGetRequest(keys=keys, **options)).results)

    def batch_put(self, *entries):
        return list(self.BatchPut(kv.BatchPutRequest(entries=entries)).results)

    def txn(self, compare=(), success=(), failure=()):
        answer = self.Txn(kv.Txn(compare=compare, success=success, failure=failure))
        return answer.succeeded, list(answer.results)


def found(value, **fields):
    return kv.GetResponse(found=True, value=value, **fields)


MISSING = kv.GetResponse()


def fails(code, call, *args, naming="", **kwargs):
    """A call ends with this status, and its message has these words."""
    try:
        answer = call(*args, **kwargs)
    except grpc.RpcError as error:
        equal(error.code(), code, error.details())
        equal(naming in error.details(), True, f"{naming!r} in {error.details()!r}")
        return error
    raise AssertionError(f"no {code} but {str(answer)[:200]!r}")


INVALID, EXHAUSTED, ABORTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED


def alive(server):
    """A new client is served on this port, and one of another protocol."""
    with Service(server) as service:
        service.put(b"alive", b"yes")
        equal(service.get(b"alive"), found(b"yes"))
    with contextlib.closing(client(server)) as memcached:
        equal(memcached.get("alive"), b"yes")


# --- what the service does ------------------------------------------------------------------------


DURABLE = (("memkv-durable", "true"),)


def durable_calls(service):
    """One of each method that concerns keys."""
    a, b, large = kv.Entry(key=b"a", value=b"1"), kv.Entry(key=b"b", value=b"2"), kv.Entry(key=b"large", value=bytes(50_000))
    return [
        (service.Put, a),
        (service.Put, large),
        (service.Get, kv.GetRequest(key=b"a")),
        (service.BatchPut, kv.BatchPutRequest(entries=[a, b])),
        (service.BatchGet, kv.BatchGetRequest(keys=[b"a", b"b"])),
        (service.Txn, kv.Txn(success=[kv.Operation(set=kv.Entry(key=b"t", value=b"3")), kv.Operation(delete=b"d")])),
        (service.Delete, kv.DeleteRequest(key=b"d")),
    ]


@on_cores(1, 2)
def test_grpc_durable_calls(cores):
    with Server(cores) as server, Service(server) as service:
        service.put(b"d", b"stays")
        for call, request in durable_calls(service):
            fails(grpc.StatusCode.FAILED_PRECONDITION, call, request, metadata=DURABLE, naming="--data-dir")
            fails(INVALID, call, request, metadata=(("memkv-durable", "yes"),), naming="memkv-durable")
        equal(service.batch_get(b"a", b"b", b"d", b"t"), [MISSING, MISSING, found(b"stays"), MISSING])
        for call, request in durable_calls(service):
            call(request, metadata=(("memkv-durable", "false"),))
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data-dir", folder, "--durability", "none"]
        with Server(cores, *options) as server, Service(server) as service:
            service.put(b"d", b"goes")
            for call, request in durable_calls(service):
                call(request, metadata=DURABLE)
            server.crash()
        with Server(cores, *options) as server, Service(server) as service:
            equal(service.batch_get(b"a", b"b", b"d", b"t"), [found(b"1"), found(b"2"), MISSING, found(b"3")])
            equal(service.get(b"large"), found(bytes(50_000)))


@on_cores(1, 2)
def test_grpc_example(cores):
    """The wrapper that examples/python has."""
    spec = importlib.util.spec_from_file_location("client", ROOT / "examples" / "python" / "client.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with Server(cores) as server:
        wrapper = example.RequestWrapper("localhost:%d" % server.grpc[1])
        with contextlib.closing(wrapper.channel):
            wrapper.put("k1", "v1")
            equal(wrapper.get("k1"), "v1")
            equal(wrapper.put("k3", "v3"), None)
            equal(wrapper.get("k3"), "v3")
            equal(wrapper.delete("k3"), None)
            equal(wrapper.get("k3"), None)
            equal(wrapper.get("k1"), "v1")
            wrapper.put("ключ", "значение")
            equal(wrapper.get("ключ"), "значение")


@on_cores(1, 2)
def test_grpc_one_key(cores):
    with Server(cores) as server, Service(server) as service:
        for number, key in enumerate([b"k", b"\0", ANY_BYTES[:250], "ключ".encode(), b"a b\r\n", *(b"%d" % n for n in range(50))]):
            value = ANY_BYTES * number
            equal(service.get(key), MISSING)
            equal(service.delete(key), False)
            equal(service.put(key, value, flags=number), kv.PutResponse(created=True))
            equal(service.get(key), found(value, flags=number))
            equal(service.put(key, b"", flags=U32_MAX), kv.PutResponse())
            equal(service.get(key), found(b"", flags=U32_MAX))
            equal(service.delete(key), True)
            equal(service.get(key), MISSING)


@on_cores(1, 2)
def test_grpc_and_other_protocols(cores):
    with Server(cores) as server, Service(server) as service, contextlib.closing(client(server)) as memcached:
        for number in range(20):
            key = "k%d" % number
            memcached.set(key, b"1", flags=7)
            equal(service.get(key.encode()), found(b"1", flags=7))
            service.put(key.encode(), b"2", flags=9)
            equal(memcached.raw_command("mg %s v f" % key, b"\r\n").split()[:3], [b"VA", b"1", b"f9"])
            equal(memcached.get(key), b"2")
            memcached.delete(key)
            equal(service.get(key.encode()), MISSING)


@on_cores(1, 2)
def test_grpc_expiry(cores):
    with Server(cores) as server, Service(server) as service:
        now = int(time.time() * 1000)
        service.put(b"later", b"v", ttl_ms=3_600_000)
        ends = service.get(b"later").expires_at_ms
        equal(abs(ends - now - 3_600_000) < 60_000, True, f"{ends} is not an hour after {now}")
        service.put(b"at", b"v", expires_at_ms=now + 7_200_123)
        equal(service.get(b"at"), found(b"v", expires_at_ms=now + 7_200_123))
        service.put(b"at", b"w", ttl_ms=0)
        equal(service.get(b"at"), found(b"w"))
        service.put(b"at", b"w", expires_at_ms=0)
        equal(service.get(b"at"), found(b"w"))
        service.put(b"at", b"w", expires_at_ms=1)
        equal(service.get(b"at"), MISSING)
        service.put(b"soon", b"v", ttl_ms=50)
        until(lambda: service.get(b"soon") == MISSING, "it ends")
        service.put(b"never", b"v", ttl_ms=U64_MAX)
        equal(service.get(b"never").value, b"v")


@on_cores(1, 2)
def test_grpc_conditions(cores):
    with Server(cores) as server, Service(server) as service:
        for number in range(10):
            key = b"k%d" % number
            for condition in (PRESENT, is_version(5)):
                fails(ABORTED, service.put, key, b"x", condition=condition)
                fails(ABORTED, service.delete, key, condition=condition)
            equal(service.get(key), MISSING)
            first = service.put(key, b"1", condition=ABSENT, with_version=True)
            equal((first.created, first.version > 0), (True, True))
            fails(ABORTED, service.put, key, b"2", condition=ABSENT, naming="condition")
            equal(service.get(key, with_version=True), found(b"1", version=first.version))
            second = service.put(key, b"2", condition=is_version(first.version), with_version=True)
            equal((second.created, second.version in (0, first.version)), (False, False))
            fails(ABORTED, service.put, key, b"3", condition=is_version(first.version))
            fails(ABORTED, service.delete, key, condition=is_version(first.version))
            equal(service.get(key), found(b"2"))
            service.put(key, b"3", condition=PRESENT)
            # nothing has to hold
            for condition in (kv.Condition(absent=False), kv.Condition(present=False)):
                service.put(key, b"4", condition=condition)
            version = service.get(key, with_version=True).version
            equal(service.delete(key, condition=is_version(version)), True)
            service.put(key, b"5")
            equal(service.delete(key, condition=PRESENT), True)
            equal(service.get(key), MISSING)


@on_cores(1, 2)
def test_grpc_batches(cores):
    with Server(cores) as server, Service(server) as service:
        keys = [b"k%d" % number for number in range(100)]
        equal(service.batch_get(*keys), [MISSING] * 100)
        equal(service.batch_put(*(kv.Entry(key=key, value=key, flags=3) for key in keys)), [kv.PutResponse(created=True)] * 100)
        equal(service.batch_get(*keys, b"none", keys[0]), [*(found(key, flags=3) for key in keys), MISSING, found(b"k0", flags=3)])
        versions = [answer.version for answer in service.batch_get(*keys, with_version=True)]
        equal(all(versions), True, str(versions))
        # one condition that does not hold, and none is written
        entries = [kv.Entry(key=key, value=b"new", condition=is_version(version)) for key, version in zip(keys, versions)]
        entries[70].condition.CopyFrom(ABSENT)
        fails(ABORTED, service.batch_put, *entries, naming="entry 71")
        equal(service.batch_get(*keys), [found(key, flags=3) for key in keys])
        entries[70].ClearField("condition")
        equal(service.batch_put(*entries), [kv.PutResponse()] * 100)
        # the later one of one key is executed later
        twice = service.batch_put(kv.Entry(key=b"t", value=b"1"), kv.Entry(key=b"t", value=b"2", with_version=True))
        equal([answer.created for answer in twice], [True, False])
        equal(service.get(b"t", with_version=True), found(b"2", version=twice[1].version))
        for large in (4095, 4096, 100_000):
            values = [bytes([number]) * large for number in range(10)]
            service.batch_put(*(kv.Entry(key=key, value=value) for key, value in zip(keys, values)))
            equal(service.batch_get(*keys[:10]), [found(value) for value in values])


@on_cores(1, 2)
def test_grpc_batches_are_one_instant(cores):
    """Writers put one value to all keys; no reader ever sees two."""
    keys = [b"k%d" % number for number in range(20)]
    with Server(cores) as server, contextlib.ExitStack() as stack:
        writers, readers = ([stack.enter_context(Service(server)) for _ in range(3)] for _ in range(2))
        writers[0].batch_put(*(kv.Entry(key=key, value=b"0") for key in keys))

        def write(service, name):
            for number in range(150):
                value = b"%d-%d" % (name, number)
                service.batch_put(*(kv.Entry(key=key, value=value) for key in keys))

        def read(service):
            for _ in range(150):
                values = {answer.value for answer in service.batch_get(*keys)}
                equal(len(values), 1, f"values of one instant: {values}")

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(write, service, name) for name, service in enumerate(writers)]
            jobs += [pool.submit(read, service) for service in readers]
            for job in jobs:
                job.result()


@on_cores(1, 2)
def test_grpc_counters_by_version(cores):
    """Increments by compare and set: none is lost."""
    with Server(cores) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Service(server)) for _ in range(4)]
        clients[0].put(b"n", b"0")

        def count(service):
            for _ in range(50):
                while True:
                    before = service.get(b"n", with_version=True)
                    try:
                        service.put(b"n", b"%d" % (int(before.value) + 1), condition=is_version(before.version))
                        break
                    except grpc.RpcError as error:
                        equal(error.code(), ABORTED)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(count, clients))
        equal(clients[0].get(b"n"), found(b"200"))


@on_cores(1, 2)
def test_grpc_txn(cores):
    get, put = lambda key: kv.Operation(get=key), lambda key, value: kv.Operation(set=kv.Entry(key=key, value=value))
    compare = lambda key, condition: kv.Compare(key=key, condition=condition)
    result = lambda **fields: kv.KeyResult(**fields)
    with Server(cores) as server, Service(server) as service:
        keys = [b"k%d" % number for number in range(20)]
        equal(service.txn(compare=[compare(key, ABSENT) for key in keys], success=[put(key, key) for key in keys]), (True, [result()] * 20))
        either = {"compare": [compare(b"k1", PRESENT), compare(b"k2", ABSENT)], "success": [put(b"k1", b"no")]}
        equal(service.txn(**either), (False, []))
        delete = kv.Operation(delete=b"k3")
        failure = [get(b"k1"), delete, delete, get(b"k3"), put(b"k4", b"new"), get(b"k4")]
        gone = result(code=kv.CODE_NOT_FOUND)
        want = [result(value=b"k1"), result(), gone, gone, result(), result(value=b"new")]
        equal(service.txn(**either, failure=failure), (False, want))
        equal(service.txn(success=[get(b"k5")]), (True, [result(value=b"k5")]))
        # only a comparison
        equal(service.txn(compare=[compare(b"k5", PRESENT)]), (True, []))
        (version,) = service.txn(success=[kv.Operation(get=b"k5", with_version=True)])[1]
        equal(service.get(b"k5", with_version=True).version, version.version)


@on_cores(1, 2)
def test_grpc_metrics(cores):
    with Server(cores) as server, Service(server) as service:
        for number in range(30):
            service.put(b"k%d" % number, b"v")
            service.get(b"k%d" % number)
        report = service.Metrics(kv.Metrics())
        equal((report.cores, report.counters["items"]), (cores, 30))
        equal(report.counters["connections"] >= 1, True)
        recorded = {}
        for latency in report.latencies:
            recorded[latency.command] = recorded.get(latency.command, 0) + latency.count
        equal((recorded["get"], recorded["set"]), (30, 30))


# --- bad input and limits -------------------------------------------------------------------------


@on_cores(1, 2)
def test_grpc_bad_input(cores):
    with Server(cores, "--request-keys-max", "50") as server, Service(server) as service:
        service.put(b"kept", b"v")
        fails(INVALID, service.get, b"", naming="empty")
        fails(INVALID, service.put, b"", naming="empty")
        fails(INVALID, service.delete, b"", naming="empty")
        service.put(b"x" * 250)
        for call in (service.get, service.put, service.delete):
            fails(INVALID, call, b"x" * 251, naming="251 bytes, and the most is 250")
        fails(INVALID, service.batch_get, naming="no key")
        fails(INVALID, service.batch_put, naming="no key")
        fails(INVALID, service.txn, naming="no key")
        fails(INVALID, service.batch_get, b"a", b"", b"b", naming="key 2 is empty")
        fails(INVALID, service.batch_put, kv.Entry(key=b"kept", value=b"x"), kv.Entry(), naming="key 2 is empty")
        fails(INVALID, service.put, b"kept", b"x", condition=kv.Condition(), naming="kind")
        fails(INVALID, service.delete, b"kept", condition=kv.Condition(), naming="kind")
        fails(INVALID, service.delete, b"kept", condition=ABSENT, naming="absent")
        # a kind of condition that is not known yet
        unknown = kv.Condition.FromString(b"\x48\x01")
        fails(INVALID, service.put, b"kept", b"x", condition=unknown, naming="kind")
        fails(INVALID, service.txn, success=[kv.Operation()], naming="operation 1")
        with_condition = kv.Operation(set=kv.Entry(key=b"kept", value=b"x", condition=PRESENT))
        fails(INVALID, service.txn, success=[kv.Operation(get=b"a"), with_condition], naming="operation 2")
        fails(INVALID, service.txn, compare=[kv.Compare(condition=PRESENT)], naming="key 1")
        # as many keys as there may be, and one more
        keys = [b"k%d" % number for number in range(51)]
        service.batch_put(*(kv.Entry(key=key) for key in keys[:50]))
        equal(len(service.batch_get(*keys[:50])), 50)
        fails(EXHAUSTED, service.batch_get, *keys, naming="50 keys")
        fails(EXHAUSTED, service.batch_put, *(kv.Entry(key=key) for key in keys), naming="50 keys")
        fails(EXHAUSTED, service.txn, success=[kv.Operation(get=key) for key in keys], naming="50 keys")
        equal(service.get(b"kept"), found(b"v"))


@on_cores(1, 2)
def test_grpc_bytes_that_are_no_message(cores):
    with Server(cores) as server, Service(server) as service:
        call = service.channel.unary_unary("/memkv.KV/Get")
        for data in (b"\xff", b"\x0a\x05k", b"\0", b"\x08\x01"):
            fails(grpc.StatusCode.INTERNAL, call, data, timeout=SECONDS, naming="malformed")
        # a field that is not known is ignored
        service.put(b"k", b"v")
        answer = call(kv.GetRequest(key=b"k").SerializeToString() + b"\xf8\x07\x01", timeout=SECONDS)
        equal(kv.GetResponse.FromString(answer), found(b"v"))
        numbers = random.Random(cores)
        for _ in range(200):
            with contextlib.suppress(grpc.RpcError):
                call(numbers.randbytes(numbers.randint(0, 30)), timeout=SECONDS)
        alive(server)


@on_cores(1, 2)
def test_grpc_many_empty_entries_cost_no_memory(cores):
    """Sixteen mebibytes of entries of two bytes each would be a gigabyte of decoded ones."""
    with Server(cores) as server, Service(server) as service:
        alive(server)
        before = server.rss()
        call = service.channel.unary_unary("/memkv.KV/BatchPut")
        for compression in (None, grpc.Compression.Gzip):
            for _ in range(3):
                fails(EXHAUSTED, call, b"\x0a\0" * (8 * MEBIBYTE - 100), timeout=SECONDS, compression=compression, naming="keys")
        settled(server, before + 128 * MEBIBYTE)


@on_cores(1, 2)
def test_grpc_large_values(cores):
    with Server(cores) as server, Service(server) as service:
        numbers = random.Random(cores)
        for size in (4095, 4096, 16_384, 100_000, MEBIBYTE - 1, MEBIBYTE):
            value = numbers.randbytes(size)
            for key in (b"a", b"b", b"c", b"d"):
                service.put(key, value)
                equal(service.get(key).value == value, True, f"{size} bytes")
        equal(service.get(b"a").value == value, True)
        fails(EXHAUSTED, service.put, b"a", bytes(MEBIBYTE + 1), naming=str(MEBIBYTE))
        fails(EXHAUSTED, service.put, b"a", bytes(15 * MEBIBYTE))
        # over what a message may have
        fails(EXHAUSTED, service.put, b"a", bytes(17 * MEBIBYTE))
        equal(service.get(b"a").value == value, True, "after refusals")
        # values that are too large together for one answer
        for number in range(17):
            service.put(b"large%d" % number, value)
        fails(EXHAUSTED, service.batch_get, *(b"large%d" % number for number in range(17)), naming="together")
        equal(len(service.batch_get(*(b"large%d" % number for number in range(15)))), 15)
    with Server(cores, "--item-size-max", "64m") as server, Service(server) as service:
        value = numbers.randbytes(64 * MEBIBYTE)
        service.put(b"k", value)
        equal(service.get(b"k").value == value, True, "64 MiB")
        fails(EXHAUSTED, service.put, b"k", value + b"x")


@on_cores(1, 2)
def test_grpc_memory_limit(cores):
    with Server(cores, "--max-memory", "128m") as server, Service(server) as service:
        refused = None
        for number in range(400):
            try:
                service.put(b"k%d" % number, bytes(MEBIBYTE))
            except grpc.RpcError as error:
                refused = error
                break
        equal(refused and refused.code(), EXHAUSTED)
        equal(service.get(b"k0").found, True)
        equal(service.delete(b"k0"), True)


@on_cores(1, 2)
def test_grpc_read_only(cores):
    refused = grpc.StatusCode.FAILED_PRECONDITION
    with Server(cores, "--read-only") as server, Service(server) as service:
        for value in (b"v", bytes(100_000)):
            fails(refused, service.put, b"k", value, naming="read-only")
            fails(refused, service.batch_put, kv.Entry(key=b"k", value=value), kv.Entry(key=b"l"), naming="read-only")
        fails(refused, service.delete, b"k", naming="read-only")
        fails(refused, service.txn, success=[kv.Operation(get=b"k"), kv.Operation(delete=b"k")], naming="read-only")
        equal(service.get(b"k"), MISSING)
        equal(service.batch_get(b"k", b"l"), [MISSING] * 2)
        equal(service.txn(success=[kv.Operation(get=b"k")]), (True, [kv.KeyResult(code=kv.CODE_NOT_FOUND)]))


# --- calls ----------------------------------------------------------------------------------------


@on_cores(1, 2)
def test_grpc_unknown_methods(cores):
    with Server(cores) as server, Service(server) as service:
        for path in ("/memkv.KV/Nothing", "/memkv.KV/get", "/memkv.KV", "/", "/other.Service/Get", "//memkv.KV/Get", "/memkv.KV/Get/"):
            call = service.channel.unary_unary(path)
            fails(grpc.StatusCode.UNIMPLEMENTED, call, b"", timeout=SECONDS, naming=path)


@on_cores(1, 2)
def test_grpc_metadata(cores):
    with Server(cores) as server, Service(server) as service:
        metadata = [("x-own", "value"), ("x-own", "twice"), ("x-data-bin", ANY_BYTES), ("authorization", "Bearer x")]
        service.Put(kv.Entry(key=b"k", value=b"v"), metadata=metadata)
        answer, call = service.stub.Get.with_call(kv.GetRequest(key=b"k"), timeout=SECONDS, metadata=metadata)
        equal((answer, call.code()), (found(b"v"), grpc.StatusCode.OK))


@on_cores(1, 2)
def test_grpc_gzip(cores):
    with Server(cores) as server, Service(server) as service:
        for size in (0, 10, 5000, 500_000):
            service.Put(kv.Entry(key=b"k", value=bytes(size)), compression=grpc.Compression.Gzip)
            equal(service.get(b"k"), found(bytes(size)))
        deflated = {"compression": grpc.Compression.Deflate}
        fails(grpc.StatusCode.UNIMPLEMENTED, service.Put, kv.Entry(key=b"k", value=bytes(5000)), **deflated)
        # what becomes larger than a message may be
        bomb = kv.Entry(key=b"k", value=bytes(64 * MEBIBYTE))
        before = server.rss()
        for _ in range(3):
            fails(EXHAUSTED, service.Put, bomb, compression=grpc.Compression.Gzip)
        settled(server, before + 100 * MEBIBYTE)
        equal(service.get(b"k"), found(bytes(500_000)))


@on_cores(1, 2)
def test_grpc_deadlines(cores):
    with Server(cores) as server, Service(server) as service:
        service.put(b"k", b"v")
        for timeout in (3600, 10**7, 5):
            equal(service.Get(kv.GetRequest(key=b"k"), timeout=timeout), found(b"v"))
        with Http2(server.grpc) as http2:
            # over before it comes: nothing is done
            for text in ("0n", "0H", "00000000m"):
                stream = http2.ask("/memkv.KV/Put", kv.Entry(key=b"late", value=b"x"), ("grpc-timeout", text))
                equal(http2.answer(stream).status, "4")
            equal(service.get(b"late"), MISSING)
            # a request that does not come to its end
            stream = http2.ask("/memkv.KV/Put", None, ("grpc-timeout", "50m"))
            http2.connection.send_data(stream, b"\0\0\0")
            http2.flush()
            equal(http2.answer(stream).status, "4")
            for text in ("1", "S", "1s", "-1S", "123456789S", "1.5S", ""):
                stream = http2.ask("/memkv.KV/Get", kv.GetRequest(key=b"k"), ("grpc-timeout", text))
                equal(http2.answer(stream).status, "3", f"grpc-timeout {text!r}")
            stream = http2.ask("/memkv.KV/Get", kv.GetRequest(key=b"k"), ("grpc-timeout", "99999999H"))
            equal(http2.answer(stream).message(kv.GetResponse), found(b"v"))


@on_cores(1, 2)
def test_grpc_many_calls_at_once(cores):
    """On one connection, more than the server lets a connection have under way."""
    with Server(cores) as server, Service(server) as service:
        futures = [service.stub.Put.future(kv.Entry(key=b"k%d" % n, value=b"%d" % n), timeout=60) for n in range(1000)]
        equal([future.result() for future in futures], [kv.PutResponse(created=True)] * 1000)
        futures = [service.stub.Get.future(kv.GetRequest(key=b"k%d" % n), timeout=60) for n in range(1000)]
        equal([future.result() for future in futures], [found(b"%d" % n) for n in range(1000)])
        connections = service.Metrics(kv.Metrics()).counters["connections"]
        equal(connections, 1)


@on_cores(1, 2)
def test_grpc_asyncio(cores):
    async def go(address):
        async with grpc.aio.insecure_channel("%s:%d" % address) as channel:
            stub = services.KVStub(channel)
            await asyncio.gather(*(stub.Put(kv.Entry(key=b"k%d" % n, value=b"%d" % n)) for n in range(300)))
            answers = await asyncio.gather(*(stub.Get(kv.GetRequest(key=b"k%d" % n)) for n in range(300)))
            equal([answer.value for answer in answers], [b"%d" % n for n in range(300)])

    with Server(cores) as server:
        asyncio.run(go(server.grpc))


@on_cores(1, 2)
def test_grpc_cancelled_calls(cores):
    with Server(cores) as server, Service(server) as service:
        # not too many at once: more than a connection may have under way would look like a flood of resets
        for first in range(0, 300, 60):
            numbers = range(first, first + 60)
            futures = {}
            for number in numbers:
                futures[number] = service.stub.Put.future(kv.Entry(key=b"k%d" % number, value=bytes(number * 100)), timeout=SECONDS)
                if number % 3:
                    futures[number].cancel()
            equal([futures[number].result() for number in numbers if number % 3 == 0], [kv.PutResponse(created=True)] * 20)
        # done or not, but whole
        for number in range(300):
            answer = service.get(b"k%d" % number)
            equal(answer in (MISSING, found(bytes(number * 100))), True, f"key {number}")
        alive(server)


@on_cores(1, 2)
def test_grpc_keepalive(cores):
    options = [("grpc.keepalive_time_ms", 100), ("grpc.keepalive_timeout_ms", 2000), ("grpc.http2.max_pings_without_data", 0),
               ("grpc.keepalive_permit_without_calls", 1)]
    with Server(cores) as server, Service(server, *options) as service:
        states = []
        service.put(b"k", b"v")
        service.channel.subscribe(states.append)
        time.sleep(1.5)
        equal(service.get(b"k"), found(b"v"))
        equal(grpc.ChannelConnectivity.TRANSIENT_FAILURE in states, False, str(states))


# --- health and reflection ------------------------------------------------------------------------


@on_cores(1, 2)
def test_grpc_health(cores):
    response = health_pb2.HealthCheckResponse
    with Server(cores) as server, Service(server) as service:
        health = health_pb2_grpc.HealthStub(service.channel)
        ask = lambda name: health_pb2.HealthCheckRequest(service=name)
        for name in ("", "memkv.KV"):
            equal(health.Check(ask(name), timeout=SECONDS).status, response.SERVING)
            watch = health.Watch(ask(name), timeout=SECONDS)
            equal(next(watch).status, response.SERVING)
            watch.cancel()
        fails(grpc.StatusCode.NOT_FOUND, health.Check, ask("other"), timeout=SECONDS, naming="other")
        watch = health.Watch(ask("other"), timeout=SECONDS)
        equal(next(watch).status, response.SERVICE_UNKNOWN)
        watch.cancel()
        # one that goes on when the server stops
        watch = health.Watch(ask(""))
        next(watch)
        server.stop()
        raises(grpc.RpcError, next, watch)


@on_cores(1, 2)
def test_grpc_reflection(cores):
    with Server(cores) as server, Service(server) as service:
        database = ProtoReflectionDescriptorDatabase(service.channel)
        names = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", "memkv.KV"]
        equal(sorted(database.get_services()), names)
        pool = DescriptorPool(database)
        described = pool.FindServiceByName("memkv.KV")
        equal([method.name for method in described.methods], [method.name for method in kv.DESCRIPTOR.services_by_name["KV"].methods])
        # a client that knows nothing but what the server says of itself
        for method, request in (("Put", {"key": b"k", "value": b"v"}), ("Get", {"key": b"k"})):
            method = described.FindMethodByName(method)
            answer = GetMessageClass(method.output_type)
            call = service.channel.unary_unary(f"/memkv.KV/{method.name}", lambda m: m.SerializeToString(), answer.FromString)
            got = call(GetMessageClass(method.input_type)(**request), timeout=SECONDS)
        equal((got.found, got.value), (True, b"v"))
        for name in names:
            pool.FindServiceByName(name)
        raises(KeyError, pool.FindServiceByName, "memkv.Other")


@on_cores(1, 2)
def test_grpc_reflection_streams(cores):
    """Version 1, whose messages are those of 1alpha: many questions on one stream, and their answers in order."""
    request = reflection_pb2.ServerReflectionRequest
    with Server(cores) as server, Service(server) as service:
        for version in ("v1", "v1alpha"):
            call = service.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request.SerializeToString, reflection_pb2.ServerReflectionResponse.FromString,
            )
            questions = [
                request(host="h", list_services=""), request(file_containing_symbol="memkv.KV.Get"), request(file_containing_symbol="memkv.X"),
                request(file_by_filename="memkv.proto"), request(file_by_filename="x.proto"), request(all_extension_numbers_of_type="memkv.Txn"),
                request(),
            ]
            many = questions * 50
            answers = list(call(iter(many), timeout=SECONDS))
            equal([answer.original_request for answer in answers], many)
            kinds = [answer.WhichOneof("message_response") for answer in answers[:7]]
            file, error = "file_descriptor_response", "error_response"
            equal(kinds, ["list_services_response", file, error, file, error, "all_extension_numbers_response", error])
            equal(answers[0].valid_host, "h")
            equal([answers[at].error_response.error_code for at in (2, 4, 6)], [5, 5, 3])
            equal(len(answers[1].file_descriptor_response.file_descriptor_proto), 2)


# --- HTTP/2 by hand -------------------------------------------------------------------------------


class Answer:
    """What has come on a stream."""

    def __init__(self):
        self.headers, self.data, self.ended, self.reset = {}, b"", False, None

    @property
    def status(self):
        return self.headers.get("grpc-status")

    def message(self, kind):
        equal(self.status, "0", self.headers.get("grpc-message", ""))
        equal(self.data[:1], b"\0", "not compressed")
        equal(len(self.data), 5 + struct.unpack(">I", self.data[1:5])[0])
        return kind.FromString(self.data[5:])


class Http2(Raw):
    """A connection of the h2 package, which sends what it is told to and understands what comes."""

    def __init__(self, address, **settings):
        super().__init__(address, SECONDS)
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False, normalize_outbound_headers=False)
        self.connection = h2.connection.H2Connection(config)
        self.connection.local_settings.update({h2.settings.SettingCodes[name.upper()]: value for name, value in settings.items()})
        self.connection.initiate_connection()
        self.answers, self.gone = {}, False
        self.flush()

    def flush(self):
        self.send(self.connection.data_to_send())

    def open(self, path, *headers, method="POST", content_type="application/grpc", end=False):
        stream = self.connection.get_next_available_stream_id()
        kind = [("content-type", content_type)] if content_type else []
        all = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "memkv"), ("te", "trailers"), *kind, *headers]
        self.connection.send_headers(stream, all, end_stream=end)
        self.answers[stream] = Answer()
        return stream

    def ask(self, path, message, *headers):
        """A call; without a message it stays open."""
        stream = self.open(path, *headers)
        if message is not None:
            data = message.SerializeToString()
            self.connection.send_data(stream, b"\0" + struct.pack(">I", len(data)) + data, end_stream=True)
        self.flush()
        return stream

    def take(self):
        """Takes what comes next; false at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.gone = True
            return False
        for event in self.connection.receive_data(data):
            answer = self.answers.get(getattr(event, "stream_id", None))
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    answer.headers.update(event.headers)
                case h2.events.DataReceived():
                    answer.data += event.data
                    if event.flow_controlled_length:
                        self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.StreamEnded():
                    answer.ended = True
                case h2.events.StreamReset():
                    answer.ended, answer.reset = True, event.error_code
                case h2.events.ConnectionTerminated():
                    self.gone = True
        with contextlib.suppress(ConnectionError):
            self.flush()
        return True

    def answer(self, stream):
        answer = self.answers[stream]
        while not answer.ended and self.take():
            pass
        equal(answer.ended, True, f"stream {stream} is answered")
        return answer


@on_cores(1, 2)
def test_grpc_as_http(cores):
    with Server(cores) as server, Http2(server.grpc) as http2:
        for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS"):
            stream = http2.open("/memkv.KV/Get", method=method, end=True)
            http2.flush()
            answer = http2.answer(stream)
            equal((answer.headers[":status"], answer.headers["allow"]), ("405", "POST"), method)
        for kind in (None, "application/json", "text/plain", "application/grpc-web", "application/grpc-web+proto", "application/grpc+json"):
            stream = http2.open("/memkv.KV/Get", content_type=kind, end=True)
            http2.flush()
            equal(http2.answer(stream).headers[":status"], "415", str(kind))
        with Service(server) as service:
            service.put(b"k", b"v")
        for kind in ("application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"):
            stream = http2.open("/memkv.KV/Get", content_type=kind)
            http2.connection.send_data(stream, b"\0\0\0\0\3\x0a\1k", end_stream=True)
            http2.flush()
            answer = http2.answer(stream)
            equal(answer.headers["content-type"], "application/grpc")
            equal(answer.message(kv.GetResponse), found(b"v"))


@on_cores(1, 2)
def test_grpc_frames(cores):
    """What stands before a message, and around it."""
    with Server(cores) as server, Http2(server.grpc) as http2:
        with Service(server) as service:
            service.put(b"k", b"v")
        message = kv.GetRequest(key=b"k").SerializeToString()
        whole = b"\0" + struct.pack(">I", len(message)) + message

        def call(*pieces, headers=()):
            stream = http2.open("/memkv.KV/Get", *headers)
            for piece in pieces:
                http2.connection.send_data(stream, piece)
                http2.flush()
            http2.connection.end_stream(stream)
            http2.flush()
            return http2.answer(stream)

        for size in (1, 2, 3):
            pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
            equal(call(*pieces).message(kv.GetResponse), found(b"v"))
        equal(call(b"", whole, b"").message(kv.GetResponse), found(b"v"))
        # no message, half of one, a flag that means nothing, a compressed one of no announced kind
        for pieces in ([], [whole[:3]], [whole[:-1]], [b"\2" + whole[1:]], [b"\1" + whole[1:]]):
            equal(call(*pieces).status, "13", str(pieces))
        packed = gzip.compress(message)
        framed = b"\1" + struct.pack(">I", len(packed)) + packed
        equal(call(framed, headers=[("grpc-encoding", "gzip")]).message(kv.GetResponse), found(b"v"))
        equal(call(whole, headers=[("grpc-encoding", "gzip")]).message(kv.GetResponse), found(b"v"), "compressed only if the flag says so")
        equal(call(whole, headers=[("grpc-encoding", "identity")]).message(kv.GetResponse), found(b"v"))
        equal(call(b"\1" + struct.pack(">I", 5) + b"wrong", headers=[("grpc-encoding", "gzip")]).status, "13")
        for encoding in ("deflate", "zstd", "nothing"):
            answer = call(framed, headers=[("grpc-encoding", encoding)])
            equal((answer.status, answer.headers["grpc-accept-encoding"]), ("12", "gzip,identity"), encoding)
        # a length of four gigabytes, and one just over the limit
        for size in (U32_MAX, 17 * MEBIBYTE):
            equal(call(b"\0" + struct.pack(">I", size)).status, "8")


@on_cores(1, 2)
def test_grpc_bytes_that_are_no_http2(cores):
    with Server(cores) as server:
        numbers = random.Random(cores)
        noises = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"get k\r\n", b"\x16\x03\x01\x02\0\x01", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"\0" * 100]
        noises += [numbers.randbytes(numbers.randint(30, 3000)) for _ in range(50)]
        noises += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + numbers.randbytes(numbers.randint(9, 3000)) for _ in range(50)]
        for noise in noises:
            with Raw(server.grpc) as raw, contextlib.suppress(ConnectionError, TimeoutError):
                raw.send(noise)
                raw.socket.shutdown(1)
                raw.read_all()
        alive(server)


# --- bad clients ----------------------------------------------------------------------------------


def bears(server, abuse, mebibytes=128):
    """Bad clients do as they like for a while: others are served, and memory stays bounded."""
    alive(server)
    before, stop, failures = server.rss(), threading.Event(), []

    def go():
        while not stop.is_set():
            try:
                with contextlib.suppress(OSError, h2.exceptions.ProtocolError):
                    abuse(stop)
            except Exception as error:  # of the test itself
                failures.append(error)
                return

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    peak = 0
    try:
        with Service(server) as service:
            for number in range(25):
                service.put(b"k%d" % number, b"%d" % number)
                equal(service.get(b"k%d" % number), found(b"%d" % number))
                peak = max(peak, server.rss())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    equal(failures, [])
    equal(peak < before + mebibytes * MEBIBYTE, True, f"{peak - before >> 20} MiB are held for bad clients")
    alive(server)


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9


def head(path):
    """Headers of a call, each a literal that is not indexed."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), (b"te", b"trailers"),
              (b"content-type", b"application/grpc")]
    return b"".join(b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)


def flood(server, first, again, reads=False):
    """Sends something over and over until the server closes, reading nothing or everything."""

    def abuse(stop):
        with Raw(server.grpc, timeout=1) as raw:
            raw.send(PREFACE + first)
            for number in itertools.count():
                if stop.is_set():
                    break
                raw.send(again(number))
                if reads:
                    raw.socket.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        if raw.socket.recv(1 << 16) == b"":
                            break
                    raw.socket.settimeout(1)

    return abuse


@on_cores(1, 2)
def test_grpc_rapid_reset(cores):
    def resets(number):
        streams = range(number * 200 + 1, number * 200 + 200, 2)
        one = head(b"/memkv.KV/Get")
        return b"".join(frame(HEADERS, 4, stream, one) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08") for stream in streams)

    with Server(cores) as server:
        for reads in (False, True):
            bears(server, flood(server, b"", resets, reads))


@on_cores(1, 2)
def test_grpc_floods_that_want_answers(cores):
    """PINGs and SETTINGS whose acknowledgements are not read."""
    with Server(cores) as server:
        for again in (frame(PING, 0, 0, b"12345678") * 1000, frame(SETTINGS, 0, 0) * 1000, frame(SETTINGS, 0, 0, b"\0\4\0\0\xff\xff") * 1000):
            for reads in (False, True):
                bears(server, flood(server, b"", lambda _: again, reads))


@on_cores(1, 2)
def test_grpc_floods_of_frames(cores):
    """Frames that cost their sender nothing: empty data, window updates, and those of kinds that nobody knows."""
    call = frame(HEADERS, 4, 1, head(b"/memkv.KV/Put"))
    with Server(cores) as server:
        for again in (frame(DATA, 0, 1) * 1000, frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1") * 100, frame(77, 0, 0, bytes(1000)) * 10):
            bears(server, flood(server, call, lambda _: again, True))


@on_cores(1, 2)
def test_grpc_floods_of_headers(cores):
    with Server(cores) as server:
        # headers that never end
        begun = frame(HEADERS, 0, 1, head(b"/memkv.KV/Get"))
        field = b"\0\5x-own\x64" + b"v" * 100
        bears(server, flood(server, begun, lambda _: frame(CONTINUATION, 0, 1, field * 100)))
        bears(server, flood(server, begun, lambda _: frame(CONTINUATION, 0, 1) * 1000))

        # new streams with as many headers as fit, which stay open
        def streams(number):
            size = head(b"/memkv.KV/Get") + field * 120
            return frame(HEADERS, 4, 2 * number + 1, size)

        bears(server, flood(server, b"", streams, True))


@on_cores(1, 2)
def test_grpc_slow_large_requests(cores):
    """Many streams that send large messages, and never end them."""
    size = 15 * MEBIBYTE

    def abuse(stop):
        with Http2(server.grpc) as http2:
            http2.socket.settimeout(1)
            streams = [http2.open("/memkv.KV/BatchPut") for _ in range(50)]
            for stream in streams:
                http2.connection.send_data(stream, b"\0" + struct.pack(">I", size))
            http2.flush()
            sent = 0
            while not stop.is_set() and sent < 50 * size and not http2.gone:
                for stream in streams:
                    with contextlib.suppress(h2.exceptions.ProtocolError):
                        room = min(16_384, http2.connection.local_flow_control_window(stream))
                        if room > 0:
                            http2.connection.send_data(stream, bytes(room))
                            sent += room
                http2.flush()
                with contextlib.suppress(TimeoutError):
                    http2.socket.settimeout(0.01)
                    http2.take()
                http2.socket.settimeout(1)

    with Server(cores) as server:
        # each core holds as much as four of the longest messages, and a little
        bears(server, abuse, 64 * cores + 128)


@on_cores(1, 2)
def test_grpc_clients_that_never_read(cores):
    """Windows of nothing, or answers that stay in the socket: what waits for them is bounded."""
    with Server(cores) as server:
        with Service(server) as service:
            for number in range(10):
                service.put(b"large%d" % number, bytes(MEBIBYTE))

        def ask(number):
            data = kv.GetRequest(key=b"large%d" % (number % 10)).SerializeToString()
            message = b"\0" + struct.pack(">I", len(data)) + data
            stream = 2 * number + 1
            return frame(HEADERS, 4, stream, head(b"/memkv.KV/Get")) + frame(DATA, 1, stream, message)

        window = lambda size: frame(SETTINGS, 0, 0, b"\0\4" + struct.pack(">I", size))
        for first in (window(0), window(1), window(0x7FFFFFFF) + frame(WINDOW_UPDATE, 0, 0, b"\x7f\0\0\0")):
            bears(server, flood(server, first, ask), 400)


@on_cores(1, 2)
def test_grpc_many_connections(cores):
    with Server(cores) as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Http2(server.grpc)) for _ in range(300)]
        for number, http2 in enumerate(connections):
            stream = http2.ask("/memkv.KV/Put", kv.Entry(key=b"k%d" % number, value=b"v"))
            equal(http2.answer(stream).message(kv.PutResponse), kv.PutResponse(created=True))
        alive(server)
