import logging

import pytest

from peerlearn.runs.directory import RunDirectory
from pretrain.monitor import warn_of_collapse

FEATURES = "features (pooled backbone output)"
EMBEDDINGS = "embeddings (output of the head)"


@pytest.mark.parametrize(
    ("row", "collapsed"),
    [
        # A healthy start: close together, and two views still much closer than two images.
        ({"uniformity": -0.04, "alignment": 0.004, "feature_std": 1e-4, "rankme": 1.02}, []),
        ({"uniformity": -0.003, "alignment": 0.0009, "feature_std": 0.04, "rankme": 23.6}, []),
        # An untrained network's embeddings follow the view, but lie apart.
        ({"uniformity": -0.1, "alignment": 0.048, "feature_std": 0.02, "rankme": 15.7}, []),
        ({"uniformity": -2.0, "alignment": 1.9, "feature_std": 0.02, "rankme": 15.7}, []),
        (
            {"uniformity": -1e-3, "alignment": 6e-4, "feature_std": 0.02, "rankme": 9.0},
            [EMBEDDINGS],
        ),
        ({"uniformity": 0.0, "alignment": 0.0, "feature_std": 0.02, "rankme": 9.0}, [EMBEDDINGS]),
        (
            {"uniformity": 0.0, "alignment": 0.0, "feature_std": 0.0, "rankme": 1.0},
            [FEATURES, EMBEDDINGS],
        ),
        ({"feature_std": 1e-9, "rankme": 1.0}, [FEATURES]),
        ({"rankme": 1.2}, []),
    ],
)
def test_only_vectors_that_no_longer_tell_images_apart_are_warned_of(
    tmp_path, caplog, row, collapsed
):
    run = RunDirectory(tmp_path)
    healthy = {"net/0/uniformity": -1.5, "net/0/alignment": 0.2, "net/0/feature_std": 0.03}
    with caplog.at_level(logging.WARNING):
        warn_of_collapse(run, 12, healthy | {f"net/1/{name}": row[name] for name in row})
    assert [(e["event"], e["network"], e["vectors"]) for e in run.events()] == [
        ("collapse", "net/1", vectors) for vectors in collapsed
    ]
    assert [
        f"net/1: its {vectors} no longer tell images apart at step 12" for vectors in collapsed
    ] == [record.getMessage().rsplit(":", 1)[0] for record in caplog.records]
