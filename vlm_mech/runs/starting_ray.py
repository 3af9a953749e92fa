"""How Ray is started on this machine, or a cluster is joined, and how a process computes as workers do."""

import os
import socket
import sys
from typing import Any

from vlm_mech.errors import UsageError

STORE = 100 * 2**20
"""Bytes of Ray's object store, through which nothing but numbers of batches goes."""


def single_threaded() -> None:
    """Has this process compute as workers do, which have one thread each unless the environment says otherwise."""
    given = os.environ.get("OMP_NUM_THREADS", "").strip() or "1"
    n = given.partition(",")[0]
    if not n.isdigit() or int(n) < 1:
        raise UsageError(f"OMP_NUM_THREADS is {given!r}; it must be 1 or more")
    os.environ["OMP_NUM_THREADS"] = given
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(n))


def start(address: str | None) -> None:
    """Starts Ray on this machine, or joins the cluster at an address.

    Raises:
        UsageError: it cannot be reached.
    """
    import logging

    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **how)
        return
    check_address(address)
    try:
        ray.init(address=address, **how)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address!r} cannot be reached: {' '.join(str(error).split()):.200}") from error


def check_address(address: str) -> None:
    """Raises `UsageError` for an address that Ray would wait for, or that needs more than Ray itself."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray is {address!r}; run the command on a machine of the cluster, with --ray auto or HOST:PORT (6379)"
        )
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UsageError(f"--ray {address!r} cannot be reached: {error}") from error
