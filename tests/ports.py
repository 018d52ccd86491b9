"""Which TCP ports of a host others reach: all at which something listens there are tried."""

import json
import re

from tests.hosts import Host

# Prints those of the ports that can be connected to.
TRY = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def answers(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=3).close()
    except OSError:
        return False
    return True

ports = json.loads(sys.argv[2])
with ThreadPoolExecutor(64) as pool:
    print(json.dumps([port for port, open in zip(ports, pool.map(answers, ports)) if open]))
"""


def listening(host: Host) -> dict[int, str]:
    """The TCP ports at which a host listens, beyond its loopback or not, and who does."""
    listed = host.run("ss", "--listening", "--tcp", "--numeric", "--no-header", "--processes")
    assert listed.returncode == 0, listed.stderr
    lines = [line.split(maxsplit=5) for line in listed.stdout.splitlines()]
    return {int(re.sub(r".*:", "", address)): who for _, _, _, address, _, who in lines}


def reached(seeker: Host, host: Host) -> dict[int, str]:
    """Those of a host's ports that another host reaches, and who listens there."""
    found = listening(host)
    tried = seeker.run("/usr/bin/python3", "-c", TRY, host.address, json.dumps(sorted(found)))
    assert tried.returncode == 0, tried.stderr
    return {port: found[port] for port in json.loads(tried.stdout)}
