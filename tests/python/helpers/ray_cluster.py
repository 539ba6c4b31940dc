"""``python ray_cluster.py FOLDER ARGS``: Ray with the server on this machine, until standard input
ends.

FOLDER keeps Ray's files; ARGS go to ``ktrt.serve.ray.build``, as JSON. Prints the server's URL when
the replicas answer.
"""

import json
import socket
import sys

import ray
from ray import serve

from ktrt.serve.ray import build


def main() -> None:
    folder, args = sys.argv[1], json.loads(sys.argv[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        # Enough for the controller, the proxy, the router and two replicas.
        ray.init(
            num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=folder,
            object_store_memory=100 << 20, log_to_driver=False,
        )  # fmt: skip
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), route_prefix="/")
        print(f"http://127.0.0.1:{port}", flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
