"""`peerlearn board`: all runs of a folder in a browser, as they train."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from socket import gethostname

from peerlearn.config import ArgumentParser
from peerlearn.errors import DONE, UsageError, UserError
from peerlearn.report.admission import TOKEN, Door
from peerlearn.report.board import Board
from peerlearn.report.server import LOOPBACK, USUAL_PORTS, BoardServer
from peerlearn.runs.terminal import say

_LAST_PORT = 2**16 - 1


def main(argv: Sequence[str]) -> int:
    """`peerlearn board [FOLDER] [--port N] [--no_token]`. Returns the exit code, once it is told to stop."""
    arguments = _parse(argv)
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name one that holds runs, or will")
    door = Door(takes_token=not arguments.no_token)
    server = _open(arguments.port, door, Board(folder))
    try:
        query = "" if door.token is None else f"?{TOKEN}={door.token}"
        say(
            f"http://{LOOPBACK}:{server.port}/{query}\n"
            f"From another machine, first: ssh -N -L {server.port}:{LOOPBACK}:{server.port} USER@{gethostname()}\n"
            "Ctrl-C ends it."
        )
        server.serve_forever()
    except KeyboardInterrupt:
        # It has nothing to save, and to be told to stop is its only end.
        return DONE
    finally:
        server.server_close()
    return DONE


def _open(port: int | None, door: Door, board: Board) -> BoardServer:
    """A server on the port or, without one, on the first of the usual ones that is free.

    Raises:
        UserError: none of them is free.
    """
    for each in USUAL_PORTS if port is None else (port,):
        try:
            return BoardServer(each, door, board.answer)
        except OSError as error:
            reason = error.strerror
    named = f"{LOOPBACK}:{each} cannot be had ({reason})"
    raise UserError(f"{named}: choose another --port, or 0 for any that is free")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="peerlearn board",
        description="Show all runs of a folder in a browser as they train: how each stands, what differs, scores, "
        "and a page for each run and study. It listens on this machine's loopback address alone and changes nothing. "
        "Example: peerlearn board runs",
        epilog="The address that it prints has a token, without which nobody is answered: every account of this "
        "machine can reach the port. docs/board.md tells more.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder that holds runs, however deep (default: runs)",
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=f"port of the loopback address; 0 = any that is free (default: {USUAL_PORTS[0]}, or the next free one)",
    )
    parser.add_argument(
        "--no_token",
        action="store_true",
        help="answer every account of this machine, and whoever a tunnel lets in",
    )
    arguments = parser.parse_args(argv)
    if arguments.port is not None and not 0 <= arguments.port <= _LAST_PORT:
        raise UsageError(f"--port: expected 0 to {_LAST_PORT}, got {arguments.port}")
    return arguments
