"""Every variable-length kernel that is installed against the reference kernel; needs a CUDA device."""

from __future__ import annotations

import pytest
import torch

from dermfm.model import attention as ours
from dermfm.model import varlen
from dermfm.model.attention import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# (query rows, key rows, valid queries, valid keys) of a batch of three; None: no padding
SHAPES = [
    (64, 64, None, None),
    (17, 49, None, [49, 1, 30]),
    (96, 96, [96, 5, 40], [96, 5, 40]),
    (96, 49, [96, 5, 40], None),
    (32, 48, [32, 8, 0], [48, 10, 3]),
]


@pytest.fixture(params=["_flash3", "_flash2", "_torch"])
def kernel_source(request, monkeypatch) -> str:
    """Make one of the sources the one that `flash` stands for."""
    call = getattr(varlen, request.param)()
    if call is None:
        pytest.skip(f"{request.param}: not installed, or not for this device")
    monkeypatch.setattr(ours, "find_varlen", lambda: varlen.Found(request.param, call))
    return request.param


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_reference(kernel_source, shape, dtype, causal):
    rows, columns, lengths_q, lengths_k = shape
    if causal and rows > columns:
        pytest.skip("bottom-right causal masks leave the first queries without keys")
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 4, 64, device="cuda", dtype=dtype) for n in (rows, columns, columns))
    lengths = {
        "lengths_q": None if lengths_q is None else torch.tensor(lengths_q, device="cuda"),
        "lengths_k": None if lengths_k is None else torch.tensor(lengths_k, device="cuda"),
    }
    direction = torch.randn_like(q)
    results = []
    for kernel in ("flash", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attention(*leaves, **lengths, causal=causal, kernel=kernel)
        results.append([output, *torch.autograd.grad((output * direction).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
