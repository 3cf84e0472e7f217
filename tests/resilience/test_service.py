"""Where the coordination service of a generation listens."""

import ipaddress
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.resilience import service
from jaxtrain.resilience.host import SERVICE, Host
from jaxtrain.resilience.service import ALL, bound
from tests.resilience.supervisors import ROOT, free_ports


def resolving(monkeypatch, **addresses):
    """Names that resolve as they are told."""

    def found(host, port, **how):
        if host not in addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses[host]]

    monkeypatch.setattr(service.socket, "getaddrinfo", found)


def test_one_machine_is_served_on_localhost():
    assert bound(Host.address) == Host.address == "localhost"


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_of_this_machine_is_where_it_listens(host):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("IPv6 is off")
    assert bound(host) == host


def test_what_is_no_address_of_this_machine_or_is_one_to_itself_alone_means_all_interfaces(monkeypatch):
    assert bound("192.0.2.7") == ALL  # of no machine: RFC 5737
    resolving(monkeypatch, node=["127.0.1.1"], other=["192.0.2.7"])
    assert bound("node") == bound("other") == bound("unknown") == ALL


def test_a_name_that_means_an_address_of_this_machine_is_where_it_listens(monkeypatch):
    resolving(monkeypatch, node=["0.0.0.0"])  # stands for an interface's: which there are here nobody knows
    assert bound("node") == "node"


@pytest.mark.skipif(sys.platform != "linux", reason="by /proc/net/tcp")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_nobody_outside_this_machine_can_reach_a_service_on_loopback(host):
    (port,) = free_ports(1)
    command = [*SERVICE, host, str(port), "1"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"\0ready\n"
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        listening = [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
        assert listening and all(loopback(address) for address in listening)
        process.stdin.close()
        assert process.wait(60) == 0


def loopback(text):
    """Of an address as /proc/net/tcp writes it, word by word."""
    words = [bytes.fromhex(text[at : at + 8])[:: 1 if sys.byteorder == "big" else -1] for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
