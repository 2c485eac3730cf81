"""How a module of a certain copy of the program is started.

PYTHONPATH cannot name a folder whose path has a colon, as that of a run with a time in its name.
"""

import sys
from pathlib import Path

# A launcher that listens already where the ranks are to meet names its socket in this variable for rank 0, and -1 for
# the others.
MEETING_SOCKET = "PEERLEARN_MEETING_SOCKET"
_LAUNCH = (
    "import runpy, sys; code = sys.argv.pop(1); sys.argv.pop(0); sys.path.insert(0, code); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module_words(home: Path, module: str) -> list[str]:
    """The words that run a module of the program in the folder ``home``; the module's own words follow them."""
    # -P: no module of the working directory takes the place of one of the program.
    return [sys.executable, "-u", "-P", "-c", _LAUNCH, str(home), module]
