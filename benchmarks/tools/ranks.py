"""Processes of one group without a launcher: what one would say in their environment."""

import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_variables(world: int, local_world: int) -> list[dict[str, str]]:
    """The variables of each of `world` processes, of which every node has `local_world`, by rank; they meet at a free port."""
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank % local_world)} for rank in range(world)]
