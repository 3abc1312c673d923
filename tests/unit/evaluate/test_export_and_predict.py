"""An export stands alone and says what the model says; predictions are those of the model, whatever interrupts them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import log_loss

import dermfm
from dermfm.config import InputError
from dermfm.evaluate.embed import image_outputs
from dermfm.export import bundle
from dermfm.export import job as export_job
from dermfm.export.calibrate import expected_calibration_error, fit_temperature
from dermfm.export.card import results_section
from dermfm.export.job import ExportConfig, choose_notes, export
from dermfm.export.model import Exported
from dermfm.images import decode_image
from dermfm.model.decoder import DecoderConfig
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.predict import job as predict_job
from dermfm.predict.job import PredictConfig, predict
from dermfm.records.vocabulary import CLASS_CODES, CLASSES
from dermfm.samples import tokenize
from launch.cli import main
from shards.manifest import Manifest
from shards.reader import ShardReader


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    model: DermFM,
    model_config: ModelConfig,
    make_run: Callable[..., SimpleNamespace],
) -> SimpleNamespace:
    """The tiny run and its export; run and shards are moved away afterwards, as a user's would be."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        run = make_run(folder, model, model_config, patch)
        patch.setattr(export_job, "load_model", lambda path, device="cpu": model)
        out = export(ExportConfig(run=str(run.run), out=str(folder / "model"), max_notes=50))
    return SimpleNamespace(folder=out, run=run, model=model, records=run.records)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five images of several formats and sizes, one of them in a subfolder, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i, name in enumerate(("a.png", "b.jpg", "c.JPG", "d.bmp", "deep/e.png")):
        pixels = rng.integers(0, 256, (40 + 7 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "notes.txt").write_text("no image at all")
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_three_lines_load_the_model_and_give_its_own_vectors(exported, pictures):
    loaded = dermfm.load(exported.folder)
    images = [pictures / "a.png", Image.open(pictures / "a.png"), (pictures / "a.png").read_bytes()]
    vectors = loaded.encode_image(images)
    pixels = torch.from_numpy(np.ascontiguousarray(decode_image(images[2], exported.model.image_size)))[None]
    with torch.no_grad():
        expected = exported.model.encode_image(pixels)[0]
        tokens, lengths = tokenize(exported.model.tokenizer, ["a melanoma lesion"], 32)
        expected_text, states = exported.model.encode_text(tokens, lengths)
        logit = exported.model.match(exported.model.encode_image(pixels)[1], states, lengths)
    torch.testing.assert_close(vectors, expected.expand(3, -1))
    torch.testing.assert_close(loaded.encode_text(["a melanoma lesion"]), expected_text)
    torch.testing.assert_close(loaded.match([pixels[0]], ["a melanoma lesion"]), logit.sigmoid())


def test_probabilities_are_the_logits_over_the_temperature_that_is_optimal_on_the_valid_split(exported):
    """The grid search below knows nothing of ours but the definition."""
    loaded = dermfm.load(exported.folder)
    count = sum(r["split"] == "valid" for r in exported.records)
    reader = ShardReader(exported.run.shards, Manifest.load(exported.run.shards).split("valid"))
    samples = [s for s in (reader.read(0, row) for row in range(count)) if json.loads(s["json"])["label"] is not None]
    assert 0 < len(samples) < count
    pixels = torch.from_numpy(np.stack([decode_image(s["jpg"], loaded.model.image_size) for s in samples]))
    labels = np.array([json.loads(s["json"])["label"] for s in samples])
    logits = image_outputs(exported.model)(pixels)["logits"].detach().numpy().astype(float)
    grid = np.exp(np.linspace(-3, 3, 1201))
    losses = [log_loss(labels, softmax(logits / t, axis=1), labels=range(8)) for t in grid]
    assert loaded.temperature == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)
    torch.testing.assert_close(loaded.classify(pixels).numpy(), softmax(logits / loaded.temperature, axis=1))


def test_a_temperature_is_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits, axis=1)])
    found = fit_temperature(3.0 * logits, labels)
    assert found is not None
    assert found.temperature == pytest.approx(3.0, rel=0.05)
    assert found.log_loss[1] < found.log_loss[0]
    assert found.ece[1] < 0.02 < 0.1 < found.ece[0]
    assert fit_temperature(logits, np.full(len(logits), -1)) is None


def test_calibration_error_of_a_known_table():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    # bin of 0.9: half right, off by 0.4; bin of 0.6: all right, off by 0.4
    assert expected_calibration_error(probabilities, np.array([0, 1, 1, 1])) == pytest.approx(0.4)


def test_nearest_notes_are_training_notes_by_cosine(exported, pictures):
    loaded = dermfm.load(exported.folder)
    texts = [row["text"] for row in loaded.notes.rows]
    training = {n["text"] for r in exported.records if r["split"] == "train" for n in r["notes"]}
    assert len(set(texts)) == len(texts) == min(50, len(training))
    assert set(texts) <= training
    vector = loaded.encode_image([pictures / "a.png"])
    scores = (loaded.encode_text(texts) @ vector[0]).numpy()
    best = np.argsort(-scores)[:3]
    found = loaded.nearest_notes(vector, 3)[0]
    np.testing.assert_allclose([n["score"] for n in found], scores[best], atol=1e-5)
    for note in found:  # some texts have the same tokens, so only their scores are fixed
        assert note["score"] == pytest.approx(scores[texts.index(note["text"])], abs=1e-5)


def test_few_notes_are_of_every_class():
    rows = [{"label": i % 4, "strategy": "template", "text": str(i)} for i in range(40)]
    rows += [{"label": 7, "strategy": "template", "text": "rare"}]
    chosen = choose_notes(rows, 10, 0)
    assert len(chosen) == 10
    assert {row["label"] for row in chosen} == {0, 1, 2, 3, 7}
    assert choose_notes(rows, 10, 0) == chosen
    assert choose_notes(rows, 0, 0) == []


def test_the_card_names_use_data_licences_size_and_that_nothing_was_evaluated(exported):
    card = (exported.folder / "README.md").read_text()
    assert "Not a medical device" in card
    assert re.search(r"\| Ours \| train \| 40 \| dermoscopic \| not stated \|", card)
    assert "Temperature" in card
    total = sum(p.numel() for p in exported.model.parameters())
    assert f"| total | {total:,} |" in card
    assert "was not evaluated" in card
    assert "Intended use" in card


def test_the_card_has_the_results_with_their_intervals(exported):
    row = {"task": "classify-image", "class_set": "classes", "scope_kind": "partition", "scope": "external", "n": 40}
    row |= {"metric": "f1_macro", "value": 0.51, "ci_low": 0.4, "ci_high": 0.62, "eval_strategy": None}
    metrics = {"step": 11, "protocol": {"splits": ["test"]}, "results": [row]}
    text = results_section(metrics, 12)
    assert "| external | 40 | image head | – | – | 0.510 (0.400–0.620) |" in text
    assert "step 11, not of the exported one" in text


def test_an_export_replaces_an_export_but_nothing_else(exported, tmp_path, model):
    loaded = bundle.read(exported.folder)
    out = tmp_path / "out"
    bundle.write(loaded, out)
    loaded.card = "new"
    bundle.write(loaded, out)
    assert (out / "README.md").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # neither a half-written nor an old one is left
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and is no export"):
        bundle.write(loaded, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_an_interrupted_export_leaves_the_older_one(exported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    bundle.write(bundle.read(exported.folder), out)
    before = (out / "model.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="No space"):
        bundle.write(bundle.read(exported.folder), out)
    assert (out / "model.safetensors").read_bytes() == before
    assert bundle.is_export(out)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda f: (f / "config.json").unlink(), "is not an exported model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "the export is damaged"),
        (lambda f: shutil.rmtree(f / "text"), "text.name"),
        (lambda f: (f / "config.json").write_text('{"format": "dermfm-export-0"}'), "is not dermfm-export-1"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(exported, tmp_path, change, part):
    copy = tmp_path / "copy"
    shutil.copytree(exported.folder, copy)
    change(copy)
    with pytest.raises(InputError, match=part) as error:
        dermfm.load(copy)
    assert "\n" not in str(error.value)


def test_what_the_model_cannot_do_is_said(exported, pictures):
    loaded = dermfm.load(exported.folder)
    with pytest.raises(InputError, match="writes no reports; train with a decoder"):
        loaded.write_report([pictures / "a.png"])
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        loaded.match([pictures / "a.png"] * 2, ["one"])
    with pytest.raises(ValueError, match=r"are not uint8 \[B, 3, 32, 32\]"):
        loaded.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_a_model_with_decoder_writes_the_reports_of_its_decoder(model_config, tmp_path, pictures):
    torch.manual_seed(0)
    config = ModelConfig(
        image=model_config.image, text=model_config.text, fusion=FusionConfig(kind="none"), embed_dim=16,
        decoder=DecoderConfig(depth=1, width=16, heads=2),
    )  # fmt: skip
    model = DermFM(config).eval()
    about = {"classes": CLASSES, "name": "x", "step": 1, "manifest": "y", "temperature": None, "calibration": None}
    bundle.write(bundle.Bundle(model, about, bundle.Notes()), tmp_path / "model")
    loaded = dermfm.load(tmp_path / "model")
    images = [pictures / "a.png", pictures / "b.jpg"]
    reports = loaded.write_report(images, max_tokens=8)
    assert reports == model.write_report(loaded.pixels(images), max_tokens=8)
    assert loaded.nearest_notes(loaded.encode_image(images)) == [[], []]
    with pytest.raises(InputError, match="trained without fusion"):
        loaded.match(images, ["a", "b"])
    done = predict(PredictConfig(model=str(tmp_path / "model"), images=str(pictures), out=str(tmp_path / "out")))
    rows = {row["image"]: row for row in rows_of(done.folder)}
    assert [rows["a.png"]["report"]] == loaded.write_report(images[:1])
    assert "not calibrated" in (done.folder / "index.html").read_text()


def test_predictions_are_the_model_s_and_bad_files_are_named(exported, pictures, tmp_path):
    out = tmp_path / "out"
    done = predict(PredictConfig(model=str(exported.folder), images=str(pictures), out=str(out), num_notes=2))
    assert (done.num_images, [a.image for a in done.bad]) == (5, ["broken.jpg"])
    rows = {row["image"]: row for row in rows_of(out)}
    assert list(rows) == ["a.png", "b.jpg", "broken.jpg", "c.JPG", "d.bmp", "deep/e.png"]
    loaded = dermfm.load(exported.folder)
    good = [name for name in rows if name != "broken.jpg"]
    expected = loaded.classify([pictures / name for name in good]).numpy()
    found = np.array([[float(rows[name][f"p_{code}"]) for code in CLASS_CODES] for name in good])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [rows[n]["class"] for n in good] == [CLASS_CODES[i] for i in expected.argmax(1)]
    malignant = [float(rows[name]["p_malignant"]) for name in good]
    np.testing.assert_allclose(malignant, expected[:, 5:].sum(1), atol=1e-6)
    assert rows["broken.jpg"]["error"]
    assert rows["broken.jpg"]["class"] == ""
    near = loaded.nearest_notes(loaded.encode_image([pictures / "a.png"]), 2)[0]
    assert [rows["a.png"]["note_1"], rows["a.png"]["note_2"]] == [n["text"] for n in near]


def test_the_page_shows_every_image_with_its_map_and_that_it_is_no_medical_device(exported, pictures, tmp_path):
    out = tmp_path / "out"
    predict(PredictConfig(model=str(exported.folder), images=str(pictures), out=str(out)))
    page = (out / "index.html").read_text()
    assert "Not a medical device" in page
    assert "broken.jpg" in page
    shown = set(re.findall(r'src="(pictures/[^"]+)"', page))
    assert shown == {f"pictures/{p.name}" for p in (out / "pictures").iterdir()}
    assert len([s for s in shown if s.endswith("-image.jpg")]) == len([s for s in shown if s.endswith("-map.jpg")]) == 5
    assert "<b>" not in page  # notes are data, not markup
    assert not re.search(r'src="http|href="http', page)


def test_an_interrupted_prediction_goes_on_where_it_stopped(exported, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_job, "PART", 2)
    whole = tmp_path / "whole"
    config = PredictConfig(model=str(exported.folder), images=str(pictures), out=str(whole))
    predict(config)
    calls: list[list[str]] = []
    real = predict_job.answer_batch

    def stopping(model: Exported, names: list[str], *rest: object) -> list:
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, names, *rest)

    monkeypatch.setattr(predict_job, "answer_batch", stopping)
    config.out = str(tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        predict(config)
    assert not (tmp_path / "halves" / "predictions.csv").exists()
    predict(config)
    assert calls == [["a.png", "b.jpg"], ["c.JPG"], ["c.JPG"], ["d.bmp", "deep/e.png"]]
    for name in ("predictions.csv", "index.html"):
        assert (tmp_path / "halves" / name).read_text() == (whole / name).read_text()
    assert not list((tmp_path / "halves").glob("parts-*"))


def test_a_call_that_writes_among_its_images_does_not_read_its_own_pictures(exported, pictures):
    config = PredictConfig(model=str(exported.folder), images=str(pictures), out=str(pictures / "out"))
    assert predict(config).num_images == predict(config).num_images == 5


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["images=nowhere"], "images: no such file or folder: nowhere"),
        (["images={pictures}/deep", "model={pictures}"], "is neither an export nor a run directory"),
        (["model=nowhere"], "model: no such folder: nowhere"),
        (["out={pictures}"], "is not empty and holds no predictions"),
        (["images={model}"], "holds no image"),
        (["images={pictures}/broken.jpg"], "none of 1 can be read; first: broken.jpg"),
    ],
)
def test_bad_input_of_predict_is_one_line_and_exit_code_2(exported, pictures, tmp_path, capsys, arguments, part):
    given = {"model": str(exported.folder), "images": str(pictures), "out": str(tmp_path / "out")}
    given |= dict(a.format(model=exported.folder, pictures=pictures).split("=", 1) for a in arguments)
    assert main(["predict", *(f"{k}={v}" for k, v in given.items())]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dermfm")]
    assert len(error) == 1
    assert part in error[0]


def test_a_dry_run_writes_nothing(exported, pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["predict", f"model={exported.folder}", f"images={pictures}", f"out={out}", "--dry-run"]
    assert main(words) == 0
    assert main(["export", f"run={exported.run.run}", f"out={out}", "--dry-run"]) == 0
    assert "6 images" in capsys.readouterr().out
    assert not out.exists()


def test_predict_with_a_run_exports_it_once(tiny_run, pictures, tmp_path, monkeypatch):
    loads: list[str] = []
    monkeypatch.setattr(export_job, "load_model", lambda path, device="cpu": loads.append(path) or tiny_run.model)
    config = PredictConfig(model=str(tiny_run.run), images=str(pictures / "a.png"), out=str(tmp_path / "out"))
    assert predict(config).num_images == 1
    config.images = str(pictures / "b.jpg")
    assert predict(config).num_images == 1
    assert len(loads) == 1
    assert bundle.is_export(tiny_run.run / "export")
