"""How a training's failure is told to a supervisor."""

import pytest

from peerlearn.compute.dist import LostRankError
from peerlearn.compute.program import _failure_kind
from peerlearn.errors import CrashError, UserError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no space"), "user"),
        (CrashError("a process that reads images died"), "crash"),
        (LostRankError("rank 1 died"), "lost_rank"),
        (RuntimeError("CUDA error"), "crash"),
    ],
)
def test_only_what_the_user_must_mend_is_not_tried_again(error, kind):
    assert _failure_kind(error) == kind
