"""What NetworkPolicies let through, as Kubernetes defines it: a connection needs both its ends."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "sepico"


@dataclass(frozen=True)
class Peer:
    """A pod by its labels and namespace, or an address outside."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = ""


def admits(
    objects: list[dict[str, Any]], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether a connection may be opened under the policies among `objects`."""
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    return _side(policies, "Egress", source, target, port, protocol) and _side(
        policies, "Ingress", target, source, port, protocol
    )


def _side(policies: list, kind: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    """Whether the policies of one end's pod admit the other end."""
    if pod.address or pod.namespace != NAMESPACE:
        return True  # not this namespace's to say
    mine = [p for p in policies if kind in p["policyTypes"] and selects(p["podSelector"], pod)]
    key = "to" if kind == "Egress" else "from"
    rules = [rule for policy in mine for rule in policy.get(kind.lower(), [])]
    return not mine or any(
        _port(rule, port, protocol) and any(is_peer(peer, other) for peer in rule.get(key, []))
        for rule in rules
    )


def _port(rule: dict, port: int, protocol: str) -> bool:
    named = rule.get("ports")
    return not named or any(p["port"] == port and p["protocol"] == protocol for p in named)


def is_peer(peer: dict, other: Peer) -> bool:
    if block := peer.get("ipBlock"):
        return bool(other.address) and _within(other.address, block)
    if other.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace}
        inside = selects(peer["namespaceSelector"], Peer(labels))
    else:
        inside = other.namespace == NAMESPACE
    return inside and selects(peer.get("podSelector", {}), other)


def _within(address: str, block: dict) -> bool:
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(
        ip in ipaddress.ip_network(cidr) for cidr in block.get("except", [])
    )


def selects(selector: dict, pod: Peer) -> bool:
    exact = all(pod.labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    return exact and all(
        pod.labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )
