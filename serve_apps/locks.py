"""Whether Ray is locked: it runs code for whoever reaches its ports and has its token, so both must be kept.

Ray listens at all addresses of a node, but for a node on loopback, so that its address must be one of an inner network,
whose firewall keeps others away. The dashboard, which a head has at loopback unless it is told otherwise, stays there.
"""

import ipaddress
from collections.abc import Mapping, Sequence

from stack.errors import Unauthorized
from stack.keys import is_loopback

_HOW = "see docs/clusters.md, `Ray is locked`"


def require_locked(environment: Mapping[str, str], addresses: Sequence[str], dashboard: Sequence[str]) -> None:
    """Raises Unauthorized unless Ray asks for its token, each of its nodes has an address of an inner network, and its
    dashboard listens at loopback alone: but for one on Kubernetes, which KubeRay's operator asks.

    The environment is that of a process of Ray's, which has it from where its node was started; `dashboard` are the
    addresses at which that listens.
    """
    if environment.get("RAY_AUTH_MODE") != "token":
        raise Unauthorized(
            "whoever reaches Ray's ports can run code on its nodes, as it asks nobody for a token (RAY_AUTH_MODE is "
            f"{environment.get('RAY_AUTH_MODE', 'not set')}): set it to token where each node is started; {_HOW}"
        )
    public = [address for address in addresses if not _is_inner(address)]
    if public:
        raise Unauthorized(
            f"Ray's ports are bound to addresses of the internet ({', '.join(public)}): start the nodes with "
            f"`ray start --node-ip-address` and an address of an inner network; {_HOW}"
        )
    outside = [address for address in dashboard if not is_loopback(address)]
    if outside and "KUBERNETES_SERVICE_HOST" not in environment:
        raise Unauthorized(
            f"Ray's dashboard, by which jobs are run, listens beyond loopback ({', '.join(outside)}): start the head "
            f"with `ray start --dashboard-host=127.0.0.1`; {_HOW}"
        )


def _is_inner(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_private  # loopback and link-local among them
    except ValueError:  # a name, which only the network's own resolver knows of
        return True
