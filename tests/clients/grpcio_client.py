"""A gRPC client of carport's unix sockets on gRPC C-core, which is also below C++, Ruby, PHP and C#.

    grpcio_client.py REGISTRATION_SOCKET CSI_SOCKET CARPORT_SOCKET

Makes many calls on each connection, with metadata that fills HPACK's dynamic table and evicts from it.
"""

import random
import sys

import grpc

# More than fill the table of 4 KiB a hundred times.
CALLS_PER_CONNECTION = 500
TIMEOUT = 10

# What is asked of each socket, the request's bytes, and what the answer contains.
REGISTRATION = [
    ("/pluginregistration.Registration/GetInfo", b"", b"csi.carport.dev"),
    ("/pluginregistration.Registration/NotifyRegistrationStatus", b"\x08\x01", b""),
]
CSI = [
    ("/csi.v1.Identity/GetPluginInfo", b"", b"csi.carport.dev"),
    ("/csi.v1.Identity/Probe", b"", b""),
    ("/csi.v1.Node/NodeGetInfo", b"", b"node"),
]
CARPORT = [
    ("/carport.v1.LocalityService/GetNode", b"", b"node"),
    ("/carport.v1.GpuService/GetGpuInventory", b"", b""),
    ("/grpc.health.v1.Health/Check", b"", b""),
]

# `unix:` alone, and authorities that a program may set.
WAYS = [
    [],
    [("grpc.default_authority", "/var/lib/kubelet/x.sock")],
    [("grpc.default_authority", "%2Fvar%2Flib%2Fx.sock")],
]


def varied(rng):
    """Some names repeat and some do not, some values too, some are larger than the whole table."""
    pairs = []
    for _ in range(rng.randrange(8)):
        length = rng.randrange(900 if rng.randrange(4) == 0 else 20)
        value = chr(rng.randrange(0x21, 0x7F)) * length + str(rng.randrange(1000))
        pairs.append((f"x-{rng.randrange(40)}", value))
    if rng.randrange(50) == 0:
        pairs.append(("x-large", "~" * 5000))
    return pairs


def call_all(channel, calls, rng):
    for number in range(CALLS_PER_CONNECTION):
        method, request, expected = calls[number] if number < len(calls) else rng.choice(calls)
        answer = channel.unary_unary(method)(request, timeout=TIMEOUT, metadata=varied(rng))
        assert expected in answer, (method, answer)


def list_services(channel):
    for version in "v1", "v1alpha":
        method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        # list_services, field 7: an empty string.
        answers = channel.stream_stream(method)(iter([b"\x3a\x00"]), timeout=TIMEOUT)
        answer = next(answers)
        assert b"carport.v1.LocalityService" in answer, answer


def main(sockets):
    for name, socket, calls in zip(("registration", "csi", "carport"), sockets, (REGISTRATION, CSI, CARPORT)):
        for options in WAYS:
            with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
                call_all(channel, calls, random.Random(name))
                if calls is CARPORT:
                    list_services(channel)
            print(f"{name}, {options}: {CALLS_PER_CONNECTION} calls", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
