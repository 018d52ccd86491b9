"""Whether Ray is locked: it runs code for whoever reaches its ports and has its token, so both must be kept.

Ray listens at all addresses of a node, whichever it is given, but for a node on loopback: so none of them may be one
of the internet, unless a firewall is said to close Ray's ports there. The dashboard, which a head has at loopback
unless it is told otherwise, stays there.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from stack.errors import Unauthorized
from stack.keys import is_loopback

_HOW = "see docs/clusters.md, `Ray is locked`"


def require_locked(
    environment: Mapping[str, str],
    addresses: Sequence[str],
    dashboard: Sequence[str],
    besides: Iterable[str] = (),
    *,
    firewalled: bool = False,
) -> None:
    """Raises Unauthorized unless Ray asks for its token, its nodes have addresses of inner networks alone, and its
    dashboard listens at loopback alone: but for one on Kubernetes, which KubeRay's operator asks.

    The environment is that of a process of Ray's, which has it from where its node was started; `addresses` are what
    the nodes were given, `besides` what else nodes that are not on loopback have, where `firewalled` ones are taken;
    `dashboard` are the addresses at which that listens.
    """
    if environment.get("RAY_AUTH_MODE") != "token":
        raise Unauthorized(
            "whoever reaches Ray's ports can run code on its nodes, as it asks nobody for a token (RAY_AUTH_MODE is "
            f"{environment.get('RAY_AUTH_MODE', 'not set')}): set it to token where each node is started; {_HOW}"
        )
    if public := _of_the_internet(addresses):
        raise Unauthorized(
            f"Ray's ports are bound to addresses of the internet ({', '.join(public)}): start the nodes with "
            f"`ray start --node-ip-address` and an address of an inner network; {_HOW}"
        )
    if (public := _of_the_internet(besides)) and not firewalled:
        raise Unauthorized(
            f"Ray listens at all addresses of its nodes, of which some are of the internet ({', '.join(public)}); "
            "allowed: addresses of inner networks. Take these from the nodes, or close Ray's ports there by a firewall "
            f"such as clusters/firewall.nft, and then say so in the config by `firewalled: true`; {_HOW}"
        )
    outside = [address for address in dashboard if not is_loopback(address)]
    if outside and "KUBERNETES_SERVICE_HOST" not in environment:
        raise Unauthorized(
            f"Ray's dashboard, by which jobs are run, listens beyond loopback ({', '.join(outside)}): start the head "
            f"with `ray start --dashboard-host=127.0.0.1`; {_HOW}"
        )


def _of_the_internet(addresses: Iterable[str]) -> list[str]:
    return sorted({address for address in addresses if _is_global(address)})


def _is_global(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a name, which only the network's own resolver knows of
        return False
