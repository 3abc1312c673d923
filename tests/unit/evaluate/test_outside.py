"""Models from outside: a tiny open_clip model and a tiny Hugging Face one, built, saved and scored from folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from dermfm.evaluate.job import EvaluateConfig, evaluate
from dermfm.evaluate.outside import load_outside
from dermfm.images import decode_image
from dermfm.model.dermfm import ModelConfig
from dermfm.samples import image_bytes, tokenize
from launch.cli import main
from shards.manifest import Manifest
from shards.reader import ShardReader

SIZE = 32
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ASKED = ["classify-image", "zero-shot", "retrieval-i2t", "probe", "few-shot"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real open_clip model of two small towers with random weights, in the layout of open_clip's own folders."""
    folder = tmp_path_factory.mktemp("open_clip-tiny")
    vision = {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg)
    content = {"model_cfg": cfg, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def hf_folder(model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with the tests' word tokenizer and an image processor."""
    folder = tmp_path_factory.mktemp("hf-tiny")
    tokenizer = AutoTokenizer.from_pretrained(model_config.text.name)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": SIZE, "patch_size": 16}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=crop, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(folder)
    return folder


def first_test_image(shards: str) -> np.ndarray:
    """uint8 [3, S, S]."""
    manifest = Manifest.load(shards)
    infos = manifest.split("test")
    return decode_image(image_bytes(ShardReader(manifest.folder, infos, manifest.remote).read(0, 0)), SIZE)


@torch.no_grad()
def test_an_open_clip_folder_goes_through_the_whole_protocol(
    clip_folder: Path, tiny_run: SimpleNamespace, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        model=f"open_clip:{clip_folder}", shards=tiny_run.shards, out=str(tmp_path / "out"), tasks=ASKED,
        resamples=20, shots=[2], few_shot_draws=1, device="cpu",
    )  # fmt: skip
    path = evaluate(config)
    content = json.loads(path.read_text())
    assert {r["task"] for r in content["results"]} == {*ASKED[1:], "classify-text"}  # the last: text information
    assert set(content["protocol"]["left_out"]) == {"classify-image"}
    assert "a photo of {}" in content["protocol"]["zero_shot_templates"]["classes"]
    vectors, ids = load_file(path.parent / "embeddings.safetensors"), pq.read_table(path.parent / "ids.parquet")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    model.eval()
    pixels = first_test_image(tiny_run.shards)
    shown = preprocess(Image.fromarray(pixels.transpose(1, 2, 0)))[None]
    expected = model.encode_image(shown, normalize=True)[0].numpy()
    np.testing.assert_allclose(vectors["image"][0], expected, atol=2e-5)
    note = next(n["text"] for n in tiny_run.records[55]["notes"] if n["strategy"] == "narrative")
    rows = [r for r in ids.to_pylist() if r["kind"] == "text" and r["strategy"] == "narrative"]
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")([note])
    expected = model.encode_text(tokens, normalize=True)[0].numpy()
    np.testing.assert_allclose(vectors["text"][rows[0]["row"]], expected, atol=2e-5)


@torch.no_grad()
def test_a_hugging_face_folder_embeds_as_its_own_model_does(hf_folder: Path, tiny_run: SimpleNamespace) -> None:
    encoders = load_outside(str(hf_folder), "cpu")
    model, tokenizer = CLIPModel.from_pretrained(hf_folder).eval(), AutoTokenizer.from_pretrained(hf_folder)
    texts = ["melanoma", "a photo of a benign skin lesion"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.ascontiguousarray(first_test_image(tiny_run.shards)))[None]
    processor = CLIPImageProcessor.from_pretrained(hf_folder)
    shown = processor(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    whole = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], pixel_values=shown)
    np.testing.assert_allclose(encoders.image(pixels)["embedding"], whole.image_embeds, atol=2e-5)
    ours = encoders.text(*tokenize(encoders.tokenizer, texts, encoders.max_tokens))["embedding"]
    np.testing.assert_allclose(ours, whole.text_embeds, atol=2e-5)


def test_templates_of_known_models_are_their_own_and_can_be_replaced(clip_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "dermlip-copy"
    own.symlink_to(clip_folder)
    assert load_outside(str(own), "cpu").templates["classes"] == ("This is a skin image of {}",)
    given = load_outside(str(clip_folder), "cpu", {"classes": ["skin, {}"]}).templates
    assert given["classes"] == ("skin, {}",)
    assert "a photo of a {} skin lesion" in given["malignancy"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=open_clip:ViT-B-33:openai"], "open_clip has no model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        (["model=open_clip:ViT-B-32"], "names no weights; open_clip:ViT-B-32:<"),
        (["model=open_clip:ViT-B-32:opanai"], "'opanai' is neither a file nor weights of open_clip's ViT-B-32"),
        (["model=nowhere"], "no such folder: nowhere; give open_clip:<name>, hf:<name> or a folder"),
        (["model=hf:./nowhere"], "no such folder: ./nowhere"),
        (["model={empty}"], "holds neither open_clip_config.json nor config.json"),
        (["model={run}"], "is a run directory; give run="),
        (["model={broken}"], "cannot be loaded"),
        (["model={clip}", "prompts={classes: [a lesion]}"], "'a lesion' has no {} where the class word stands"),
        (["model={clip}", "prompts={clases: [a lesion]}"], "there is no class set 'clases'; did you mean 'classes'"),
        (["run={run}", "prompts={classes: [a lesion]}"], "for a model from outside only"),
        (["model={clip}", "run={run}"], "give one of them"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_and_exit_2(
    arguments: list[str],
    says: str,
    clip_folder: Path,
    tiny_run: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = {"clip": clip_folder, "run": tiny_run.run}
    for name in ("empty", "broken"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
    (folders["broken"] / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    for name, folder in folders.items():
        arguments = [a.replace(f"{{{name}}}", str(folder)) for a in arguments]
    out = [] if arguments[0].startswith("run=") else [f"out={tmp_path / 'out'}"]
    assert main(["evaluate", f"shards={tiny_run.shards}", "device=cpu", *out, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1, error


def test_a_model_from_outside_needs_shards_and_out(clip_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", f"model={clip_folder}"]) == 2
    assert "give shards=<folder> and out=<folder> too" in capsys.readouterr().err
