"""The loss in Triton kernels: interpreted where there is no GPU, and compiled for one all the same."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from pretrain.losses import queue_terms
from pretrain.row_sums import Form
from pretrain.triton_choice import _warn, runs_in_triton
from tests.pretrain.embeddings import unit
from tests.pretrain.triton_cases import CASES


@pytest.fixture(scope="module")
def found() -> dict:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.triton_cases"],
        env=os.environ | interpreted,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(found, name):
    """Terms of each network and the gradient of a weighting of them, to five digits; the same bits a second time."""
    errors = found["cases"][name]
    assert errors["values"] < 1e-5
    assert errors["gradient"] < 1e-5
    assert errors["repeats"]


def test_embeddings_are_padded_to_what_blocks_can_hold(found):
    assert found["padded"] == [16, 16, 128, 128]


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["sum_kernel", "gradient_kernel"])
def test_compiles_for_a_gpu_within_the_shared_memory_that_is_asked_for(name, stored):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pretrain import triton_kernels, triton_passes

    columns = 128
    kernel = getattr(triton_kernels, name)
    constants = {
        "BASE": 3.0,
        "POWER": 1.0,
        "BLOCK_B": triton_passes._BLOCK_ANCHORS,
        "BLOCK_K": triton_passes._BLOCK_ROWS,
        "BLOCK_D": columns,
        "HAS_EXCESS": True,
    }
    kinds = {"query": "*fp32", "parts": "*fp32", "weights": "*fp32", "rows": f"*{stored}"}
    kinds |= {"pairs": "*i32", "scale": "fp32"}
    signature = {
        each: "constexpr" if each in constants else kinds.get(each, "i32")
        for each in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={each: constants[each] for each in signature if each in constants},
    )
    compiled = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 1})
    assert compiled.metadata.shared <= triton_passes.SHARED_BYTES_PER_COLUMN * columns
    # Products run on tensor cores.
    assert "mma" in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "form", "reason"),
    [
        (torch.float64, Form(0.1, 1.0), "it computes in float32, not float64"),
        (torch.float32, Form(0.01, 1.0), "a temperature of 0.01 with soft_temperature 1.0 needs"),
        (torch.float32, Form(0.1, 0.1), "a temperature of 0.1 with soft_temperature 0.1 needs"),
        (torch.float32, Form(0.1, 1.0), "it needs a CUDA device"),
    ],
)
def test_what_kernels_cannot_do_is_said_once(dtype, form, reason, caplog):
    _warn.cache_clear()
    query = unit(2, 3, 8, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        assert not runs_in_triton(query, form)
        assert not runs_in_triton(query, form)
    (line,) = caplog.messages
    assert line.startswith(f"the loss is computed without Triton kernels: {reason}")


def test_without_a_gpu_the_backend_is_flat():
    query, key, queue = (unit(2, n, 8, seed=n, dtype=torch.float32) for n in (3, 3, 40))
    terms = {
        backend: torch.stack(
            tuple(queue_terms(query, key[:, :3], queue, temperature=0.1, backend=backend))
        )
        for backend in ("triton", "flat")
    }
    assert torch.equal(terms["triton"], terms["flat"])
