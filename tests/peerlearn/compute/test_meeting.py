"""The ranks' meeting: at a socket that the launcher holds, and what is said if they do not meet."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from peerlearn.compute.dist import start_ranks
from peerlearn.errors import CrashError
from peerlearn.runs.launcher import MEETING_SOCKET

MEET = """
import sys, torch
from peerlearn.compute.dist import start_ranks
ranks = start_ranks("cpu", timeout_seconds=60)
print(ranks.gather(torch.tensor([ranks.rank + 1])).tolist())
ranks.close()
"""


def variables(rank: int, port: int, held: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        MEETING_SOCKET: str(held),
    }


@pytest.mark.ddp
def test_two_ranks_meet_at_a_socket_that_is_held_from_the_choice_of_its_port_on() -> None:
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("", port))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", MEET],
                env=variables(rank, port, held.fileno() if rank == 0 else -1),
                pass_fds=[held.fileno()] if rank == 0 else [],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    assert [rank.communicate(timeout=240)[0] for rank in ranks] == ["[1, 2]\n", "[1, 2]\n"]


@pytest.mark.parametrize("held", ["-1", None])
def test_a_rank_that_meets_nobody_names_host_address_and_cause(
    monkeypatch: pytest.MonkeyPatch, held: str | None
) -> None:
    """A failure of the machines, not of the user: another start may meet."""
    for name, value in variables(1, 9, -1).items():
        monkeypatch.setenv(name, value)
    if held is None:
        monkeypatch.delenv(MEETING_SOCKET)
    with pytest.raises(CrashError) as told:
        start_ranks("cpu", timeout_seconds=2)
    message = str(told.value)
    assert message.startswith(
        f"rank 1 of 2 on {socket.gethostname()} did not meet the others at 127.0.0.1:9 ("
    )
    assert "timed out" in message
    assert "\n" not in message
