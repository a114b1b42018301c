"""How far a run scales: formulas for more cores and more hosts.

Runs in: the command line's own process, for `plan`; the distributed trainer's reports. Pure.

    cores   every process but the supervisor and the consumer is there as often as it is wanted, so
            c cores make  min(c / (read + encode + fetch + consume + supervise),
                              1 / consume, 1 / supervise)  megabytes of text a second
    hosts   ring all-reduce: each of R hosts sends 2 (R - 1) / R × the gradient's bytes, in
            2 (R - 1) rounds; an update takes  compute / R + apply + that
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

CORES = (8, 16, 32, 64, 128)
HOSTS = (1, 2, 4, 8, 16, 32, 64)
_ROUND_S = 50e-6  # of one message of the ring: latency of Ethernet and the sockets' work
_BITS = 8


class Reached(msgspec.Struct, frozen=True):
    """What so many cores or hosts bring."""

    count: int
    tokens_per_s: float
    efficiency: float  # of as many times one
    limit: str  # what it is limited by


def allreduce_bytes(hosts: int, gradient_bytes: int) -> float:
    """Bytes that each host sends (and receives) to average a gradient around a ring.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms (2009).
    """
    return 2 * (hosts - 1) / hosts * gradient_bytes


def allreduce_s(hosts: int, gradient_bytes: int, network_gbit: float) -> float:
    """Seconds of that over links of so many Gbit/s (10⁹ bits)."""
    sent_s = _BITS * allreduce_bytes(hosts, gradient_bytes) / (network_gbit * 1e9)
    return sent_s + 2 * (hosts - 1) * _ROUND_S


def update_s(
    hosts: int, compute_s: float, apply_s: float, gradient_bytes: int, network_gbit: float
) -> float:
    """Seconds of an update whose windows are divided among the hosts.

    Args:
        hosts: R; it divides the update's windows.
        compute_s: Of all the update's micro-steps on one host.
        apply_s: Of the optimizer, which every host does for itself.
        gradient_bytes: Float32, averaged once an update, after the last micro-step.
        network_gbit: Of every host's link.
    """
    return compute_s / hosts + apply_s + allreduce_s(hosts, gradient_bytes, network_gbit)


def hosts(
    windows: int,
    seq_len: int,
    compute_s: float,
    apply_s: float,
    gradient_bytes: int,
    network_gbit: float,
) -> list[Reached]:
    """The table over HOSTS that divide the update's windows; see update_s."""
    found: list[Reached] = []
    one = update_s(1, compute_s, apply_s, gradient_bytes, network_gbit)
    for count in HOSTS:
        if windows % count:
            continue
        seconds = update_s(count, compute_s, apply_s, gradient_bytes, network_gbit)
        parts = {
            "computing": compute_s / count,
            "the optimizer": apply_s,
            "the network": allreduce_s(count, gradient_bytes, network_gbit),
        }
        limit = max(parts, key=lambda name: parts[name])
        found.append(Reached(count, windows * seq_len / seconds, one / (count * seconds), limit))
    return found


def cores(
    parallel_s: Mapping[str, float], serial_s: Mapping[str, float], tokens_per_mb: float
) -> list[Reached]:
    """The pipeline without a trainer, over CORES.

    Args:
        parallel_s: CPU seconds a megabyte of text of stages with as many processes as wanted.
        serial_s: The same of those with one process.
        tokens_per_mb: Tokens of a megabyte of text.
    """
    return [pipeline(count, parallel_s, serial_s, tokens_per_mb) for count in CORES]


def pipeline(
    count: int, parallel_s: Mapping[str, float], serial_s: Mapping[str, float], tokens_per_mb: float
) -> Reached:
    """The pipeline on so many cores; see cores."""
    whole = sum(parallel_s.values()) + sum(serial_s.values())
    rates = {"the cores": count / whole}
    rates |= {f"the {name}": 1 / cost for name, cost in serial_s.items() if cost > 0}
    limit = min(rates, key=lambda name: rates[name])
    return Reached(count, rates[limit] * tokens_per_mb, rates[limit] * whole / count, limit)
