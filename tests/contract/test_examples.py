"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

# The functions that users meet first.
EXAMPLES = (
    "detection.voc.evaluate",
    "fewshot.evaluate.evaluate_features",
    "peerlearn.backbones.create_backbone",
    "peerlearn.export.load_export",
    "peerlearn.knn.knn_scores",
    "pretrain.losses.queue_terms",
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    module, function = name.rsplit(".", 1)
    documented = getattr(importlib.import_module(module), function)
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, function, globs={})
    assert len(example.examples) >= 3
    report: list[str] = []
    runner = doctest.DocTestRunner()
    assert runner.run(example, out=report.append).failed == 0, "".join(report)
