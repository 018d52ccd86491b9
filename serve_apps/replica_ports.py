"""Where the replicas of deployments listen for each other: at their node's address alone.

Each replica of Ray Serve has a gRPC server, which runs what it is sent by whoever has Ray's token. Serve has it listen
at all addresses of the machine, also where all else of Ray's is at loopback, and knows no setting for it.
"""

import ray
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica


def listen_inside() -> None:
    """Has the replica that this process becomes listen at the address of its node. Every module with a deployment asks
    for it as it is imported, which is before a replica starts its server.
    """
    replica.add_port_to_grpc_server = _at_node  # type: ignore[attr-defined]


def _at_node(server: object, address: str) -> int:
    """As Ray's own of this place, with the node's address for that of all."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    host = f"[{host}]" if ":" in host else host
    bound: int = add_port_to_grpc_server(server, f"{host}:{address.rpartition(':')[2]}")  # type: ignore[no-untyped-call]
    return bound
