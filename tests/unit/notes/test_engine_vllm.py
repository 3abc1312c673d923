"""The vllm engine against a stand-in with vLLM's interface, and its calls against the published source's signatures.

vLLM itself needs a GPU and an environment of its own; its source says what it takes.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from cluster.replicas import ReplicaLost
from dermfm.config import InputError
from dermfm.notes.engines import vllm as engine_module
from dermfm.notes.engines.protocol import EngineConfig, Request, prepare_engine
from dermfm.notes.engines.vllm import VllmEngine, llm_arguments
from dermfm.notes.plan import NotesConfig
from dermfm.notes.room import resources_of

FILES = {
    "vllm/entrypoints/llm.py", "vllm/engine/arg_utils.py", "vllm/sampling_params.py", "vllm/outputs.py",
    "vllm/v1/engine/exceptions.py", "vllm/v1/executor/ray_utils.py", "vllm/__init__.py",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"border": {"enum": ["sharp", "indistinct"]}}}


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.Module]:
    """The parsed files of vLLM's sdist that `make venv` fetches, or of a wheel or sdist in the folder $VLLM_SOURCE."""
    folder = Path(os.environ.get("VLLM_SOURCE") or Path(sys.prefix) / "sdist")
    found = sorted(path for path in folder.glob("vllm-*") if path.name.endswith((".tar.gz", ".whl")))
    if not found:
        pytest.skip(f"no vllm sdist under {sys.prefix}/sdist; `make venv` fetches it where an index is reached")
    return {name: ast.parse(text) for name, text in contents(found[-1])}


def contents(package: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of FILES in a wheel or an sdist."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            yield from ((name, wheel.read(name).decode()) for name in FILES & set(wheel.namelist()))
        return
    with tarfile.open(package) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if name in FILES and (content := tar.extractfile(member)) is not None:
                yield name, content.read().decode()


def find(tree: ast.AST, name: str) -> Any:
    """The class or function of that name."""
    kinds = ast.ClassDef | ast.FunctionDef
    return next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)


def fields(node: ast.ClassDef) -> set[str]:
    return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def parameters(function: ast.FunctionDef) -> set[str]:
    return {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}


@dataclasses.dataclass
class Params:
    """SamplingParams and StructuredOutputsParams of the stand-in: they keep what they were given."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        self.given = given


class Dead(Exception):  # noqa: N818  it stands for vLLM's EngineDeadError
    pass


class Llm:
    """Answers as vLLM's LLM.chat does: one RequestOutput a conversation, in order."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []

    def chat(self, messages, sampling_params=None, use_tqdm=True):
        self.calls.append((messages, sampling_params, use_tqdm))
        if isinstance(self.answers, Exception):
            raise self.answers
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[1, 2, 3], finish_reason=reason)])
            for text, reason in self.answers
        ]


@pytest.fixture
def model(tiny, tmp_path):
    return tiny.write_tiny_vlm(tmp_path / "vlm")


def build(model, answers, **keys):
    config = EngineConfig(kind="vllm", model=str(model), **keys)
    return VllmEngine(Llm(answers), Params, Params, Dead, config)


def test_a_lease_goes_in_at_once_with_images_options_and_planned_seeds(model, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    engine = build(model, [("a note", "stop"), ('{"border": "sharp"}', "stop"), ("cut", "length")])
    chat = (("system", "s"), ("user", "u"))
    requests = [
        Request(chat, 1, "", 1, image=str(tmp_path / "a.png")),
        Request(chat, 1, "", 2, schema=SCHEMA, attempt=1),
        Request(chat, 1, "", 3),
    ]
    found = engine.generate(requests)
    assert [(g.text, g.num_tokens, g.finished) for g in found] == [
        ("a note", 3, True),
        ('{"border": "sharp"}', 3, True),
        ("cut", 3, False),
    ]
    ((messages, how, bar),) = engine.llm.calls
    assert not bar
    assert messages[0][1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert messages[1][1] == {"role": "user", "content": "u"}
    assert [h.given["temperature"] for h in how] == [0.0, 0.6, 0.0]
    assert len({h.given["seed"] for h in how}) == 3
    assert how[0].given["structured_outputs"] is None
    assert how[1].given["structured_outputs"].given["json"]["required"] == ["border"]


def test_an_answer_against_the_options_is_an_error_and_a_dead_engine_costs_the_replica(model):
    request = Request((("user", "u"),), 0, "", 1, schema=SCHEMA)
    (found,) = build(model, [('{"border": "round"}', "stop")]).generate([request])
    assert "not among the options" in found.error
    with pytest.raises(ReplicaLost, match="engine died"):
        build(model, Dead("gone")).generate([request])


def test_each_shard_has_a_bundle_of_one_gpu_and_the_engine_fills_them_itself(model):
    engine = EngineConfig(kind="vllm", model=str(model), tensor_parallel=4, pipeline_parallel=2)
    config = NotesConfig(records="r", out="o", engine=engine, gpus_per_actor=1.0)
    need = resources_of(config, engine)
    assert (need.bundle, need.shards, need.num_actors) == ({"CPU": 1.0, "GPU": 1.0}, 8, 1)
    with pytest.raises(ValueError, match="gpus_per_actor: vllm needs 1 GPU"):
        NotesConfig(records="r", out="o", engine=engine)


def test_without_the_package_the_job_is_refused_at_the_start(model, monkeypatch):
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="vllm is not installed"):
        prepare_engine(EngineConfig(kind="vllm", model=str(model)))


def test_our_calls_fit_vllm_s_signatures(sources, model):
    config = EngineConfig(kind="vllm", model=str(model), tensor_parallel=2, pipeline_parallel=2, max_model_len=512)
    llm = find(sources["vllm/entrypoints/llm.py"], "LLM")
    known = parameters(find(llm, "__init__")) | fields(find(sources["vllm/engine/arg_utils.py"], "EngineArgs"))
    assert set(llm_arguments(config)) <= known
    assert "limit_mm_per_prompt" in llm_arguments(config)
    chat = find(llm, "chat")
    assert {"messages", "sampling_params", "use_tqdm"} <= parameters(chat)
    assert "list[RequestOutput]" in ast.unparse(chat.returns)
    assert "Sequence[SamplingParams]" in ast.unparse(chat.args.args[2].annotation)
    engine = build(model, [("x", "stop")])
    engine.generate([Request((("user", "u"),), 0, "", 1)])
    structured = build(model, [('{"border": "sharp"}', "stop")])
    structured.generate([Request((("user", "u"),), 0, "", 1, schema=SCHEMA)])
    sampling = sources["vllm/sampling_params.py"]
    assert set(engine.llm.calls[0][1][0].given) <= fields(find(sampling, "SamplingParams"))
    rule = structured.llm.calls[0][1][0].given["structured_outputs"]
    assert set(rule.given) <= fields(find(sampling, "StructuredOutputsParams"))


def test_what_we_read_of_vllm_s_answers_is_there(sources):
    outputs = sources["vllm/outputs.py"]
    assert {"text", "token_ids", "finish_reason"} <= fields(find(outputs, "CompletionOutput"))
    assert "outputs" in parameters(find(find(outputs, "RequestOutput"), "__init__"))
    assert find(sources["vllm/v1/engine/exceptions.py"], "EngineDeadError")
    exported = ast.unparse(sources["vllm/__init__.py"])
    assert "'LLM'" in exported
    assert "'SamplingParams'" in exported


def test_vllm_takes_the_placement_group_that_it_stands_in_with_one_gpu_a_bundle(sources):
    source = ast.unparse(sources["vllm/v1/executor/ray_utils.py"])
    assert "ray.util.get_current_placement_group()" in source
    assert "cannot have more than 1" in source
