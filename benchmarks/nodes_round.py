"""How long one look at the load of many nodes takes, over new and over kept connections.

    python benchmarks/nodes_round.py [--nodes 30] [--rounds 50] [--transport paramiko|openssh]

Each node is a real sshd on a loopback address of its own. The aim: at most 100 ms for a round over 30 kept connections.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from stagecal.adapters.nodes_ssh import Machine, SshNodes  # noqa: E402 - the checkout need not be installed
from tests.ssh_nodes import SshServer, make_shell  # noqa: E402


def main() -> None:
    """Start the nodes, look at them, and print milliseconds."""
    parser = argparse.ArgumentParser(description="How long a look at the load of many nodes takes.")
    parser.add_argument("--nodes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--transport", choices=("paramiko", "openssh"), default="paramiko")
    arguments = parser.parse_args()
    program = (CHECKOUT / "templates" / "job" / "node.sh").read_text()
    with tempfile.TemporaryDirectory() as temporary:
        servers = [
            SshServer(Path(temporary) / f"node{number:02}", f"node{number:02}", host=f"127.0.1.{number + 1}")
            for number in range(arguments.nodes)
        ]
        machines = {server.name: Machine(make_shell(arguments.transport, server.target())) for server in servers}
        nodes = SshNodes(Path(temporary), machines, b"", program, timeout_s=60)
        try:
            for server in servers:
                server.start()
            print(f"{arguments.nodes} nodes by {arguments.transport}, milliseconds per round")
            print(f"  new connections   {one_round(nodes):8.1f}")
            cpu = time.process_time()
            rounds = [one_round(nodes) for _ in range(arguments.rounds)]
            cpu = (time.process_time() - cpu) * 1000 / len(rounds)
            print(f"  kept connections  {statistics.median(rounds):8.1f} median of {len(rounds)}")
            print(f"                    {min(rounds):8.1f} best, {max(rounds):.1f} worst, {cpu:.1f} of our CPU")
        finally:
            nodes.close()
            for server in servers:
                server.stop()


def one_round(nodes: SshNodes) -> float:
    """Return the milliseconds of one look at all nodes, each of which has to answer."""
    begin = time.perf_counter()
    looks = nodes.loads()
    elapsed = (time.perf_counter() - begin) * 1000
    silent = [look for look in looks if look.load_per_core is None]
    if silent:
        sys.exit(f"{silent[0].name} is silent: {silent[0].trouble}")
    return elapsed


if __name__ == "__main__":
    main()
