"""A client of memkv-tpc's gRPC service, with strings for keys and values.

    pip install grpcio grpcio-tools

    >>> from client import *
    >>> t = RequestWrapper('localhost:7000')
    >>> t.put('k3', 'v3')
    >>> t.get('k3')
    'v3'
    >>> t.delete('k3')
    >>> t.get('k3')
"""

import pathlib
import sys

import grpc

# The stubs are made of the definitions as they are imported; protoc's --python_out and --grpc_python_out write them to files.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "proto"))
kv, services = grpc.protos_and_services("kv.proto")

__all__ = ["RequestWrapper"]


class RequestWrapper:
    """What the server at an address knows of keys."""

    def __init__(self, address, timeout=5):
        self.channel = grpc.insecure_channel(address)
        self.stub = services.KVStub(self.channel)
        self.timeout = timeout

    def get(self, key):
        """The value of a key; None when it has none."""
        response = self.stub.Get(kv.GetRequest(key=key.encode()), timeout=self.timeout)
        return response.value.decode() if response.found else None

    def put(self, key, value):
        self.stub.Put(kv.Entry(key=key.encode(), value=value.encode()), timeout=self.timeout)

    def delete(self, key):
        self.stub.Delete(kv.DeleteRequest(key=key.encode()), timeout=self.timeout)
