"""Our calls bind to flash-attn's real functions, read from its published source: the package itself needs CUDA."""

from __future__ import annotations

import ast
import inspect
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from dermfm.model import varlen

FILES = {"2": "flash_attn/flash_attn_interface.py", "3": "hopper/flash_attn_interface.py"}
# in the order of our calls; causal comes by name
POSITIONAL = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.FunctionDef]:
    """`flash_attn_varlen_func` of versions 2 and 3 from the sdist that `make venv` fetches."""
    found = sorted((Path(sys.prefix) / "sdist").glob("flash_attn-*.tar.gz"))
    if not found:
        pytest.skip(f"no flash-attn sdist under {sys.prefix}/sdist; `make venv` fetches it where an index is reached")
    functions = {}
    with tarfile.open(found[-1]) as tar:
        for member in tar.getmembers():
            for version, file in FILES.items():
                if member.name.split("/", 1)[-1] == file:
                    content = tar.extractfile(member)
                    assert content is not None
                    functions[version] = varlen_function(content.read().decode())
    return functions


def varlen_function(source: str) -> ast.FunctionDef:
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func":
            return node
    raise AssertionError("flash_attn_varlen_func is not defined")


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """The signature that Python would give the function, defaults as source."""
    names = [a.arg for a in function.args.args]
    empty: list[Any] = [inspect.Parameter.empty] * (len(names) - len(function.args.defaults))
    defaults = [*empty, *(ast.unparse(d) for d in function.args.defaults)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    pairs = zip(names, defaults, strict=True)
    return inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in pairs])


@pytest.mark.parametrize("version", FILES)
@pytest.mark.parametrize("causal", [False, True])
def test_our_call_binds_to_flash_attn_s_function(sources, version, causal):
    real = signature(sources[version])
    seen: dict[str, Any] = {}

    def function(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(real.bind(*args, **kwargs).arguments)
        return torch.zeros(1)

    inputs = [f"the {name}" for name in POSITIONAL]
    varlen.call_flash(function, *inputs, causal)
    assert seen == dict(zip(POSITIONAL, inputs, strict=True)) | {"causal": causal}
    # what we leave out must mean what our other kernels do: softmax scale 1/√D, no window, no dropout, no soft cap
    defaults = {n: p.default for n, p in real.parameters.items()}
    assert defaults["softmax_scale"] == "None"
    assert defaults["window_size"] == "(-1, -1)"
    assert defaults["softcap"] == "0.0"
    assert defaults.get("dropout_p", "0.0") == "0.0"


def test_flash_attn_2_says_that_causal_is_bottom_right(sources):
    text = ast.get_docstring(sources["2"])
    assert "bottom right corner" in text


def test_the_log_sum_exp_of_early_versions_of_3_is_dropped():
    assert varlen.call_flash(lambda *_, **__: ("out", "lse"), *range(7), True) == "out"


@pytest.mark.parametrize("causal", [False, True])
def test_our_call_binds_to_torch_s_varlen_function(causal):
    real = inspect.signature(varlen_attn)
    seen: dict[str, Any] = {}

    def function(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(real.bind(*args, **kwargs).arguments)
        return torch.zeros(1)

    function.__signature__ = real  # type: ignore[attr-defined]
    varlen.call_torch(function, *range(7), causal)
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    assert [seen[n] for n in names] == list(range(7))
    assert {n: v for n, v in seen.items() if n not in names} in (
        {"window_size": (-1, 0) if causal else (-1, -1)},
        {"is_causal": causal},
    )


def test_without_a_cuda_device_no_variable_length_kernel_is_found():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert varlen.find_varlen() is None
