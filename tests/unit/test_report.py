"""The report page: whole without a network, escaped, with the numbers of metrics.json; bad input is one line."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dermfm.config import InputError
from dermfm.evaluate.job import EvaluateConfig, evaluate
from dermfm.model.dermfm import DermFM
from dermfm.notes.store import write_part
from dermfm.records.vocabulary import CLASSES
from dermfm.report import attention, breakdown, compare, figures, gallery, generated, page, tables
from dermfm.report.page import ReportConfig, write_report
from dermfm.report.run import load_run
from launch.cli import main


def fixtures() -> ModuleType:
    """The module with the small synthetic run of the evaluation's tests."""
    name = "evaluate_fixtures"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "evaluate" / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An evaluated run with a training log and notes."""
    import torch

    make = fixtures()
    folder = tmp_path_factory.mktemp("report")
    config = make.tiny_config(folder / "encoder")
    torch.manual_seed(0)
    model = DermFM(config).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "load_model", lambda path, device="cpu": model)
        made = make.build_run(folder, model, config, patch)
        evaluate(EvaluateConfig(run=str(made.run), resamples=40, device="cpu"))
        write_reports(made)
        rows = [
            {
                "step": s,
                "samples_seen": 8 * s,
                "loss": 1 / s,
                "loss/matching": 0.5 / s,
                "lr": 1e-4,
                "samples_per_s": 9.0,
            }
            for s in range(1, 20)
        ]
        (made.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_notes(made)
        yield made


def write_reports(run: SimpleNamespace) -> None:
    """Generated reports as an evaluation leaves them: one that contradicts its record, others that state its class."""
    rows = []
    for record in run.records:
        if record["split"] == "test" and record["label"] is not None:
            said = "seborrheic keratosis" if record["label"] == 6 else CLASSES[record["label"]]
            text = f"Dermoscopic image of a lesion. Diagnosis: {said}. <i>Fuzzy</i> edges."
            rows.append({"record_id": record["record_id"], "text": text, "reference": "a note <b>of its own</b>"})
    folder = next(run.run.glob("eval/*/metrics.json")).parent
    pq.write_table(pa.Table.from_pylist(rows), folder / generated.REPORTS)


def write_notes(run: SimpleNamespace) -> None:
    """The notes folder of the run: every third narrative note fell back to the template."""
    rows = []
    for i, record in enumerate(run.records):
        for note in record["notes"]:
            source = "template" if note["strategy"] == "template" or i % 3 == 0 else "generated"
            rows.append(
                {
                    "note_id": note["note_id"],
                    "record_id": record["record_id"],
                    "strategy": note["strategy"],
                    "engine": "template" if note["strategy"] == "template" else "transformers",
                    "model": "none",
                    "prompt_version": "1",
                    "seed": 0,
                    "attempt": 0,
                    "text": note["text"],
                    "label_access": "given",
                    "facts_source": "metadata",
                    "source": source,
                    "faults": ["dropped class"] if source == "template" and i % 3 == 0 else [],
                    "num_tokens": 5,
                    "error": None,
                }
            )
    (run.run / "notes").mkdir()
    write_part(run.run / "notes", 0, rows)


@pytest.fixture(scope="module")
def text(run: SimpleNamespace) -> str:
    """The page."""
    return write_report(ReportConfig(run=str(run.run), gallery=3, attention=2)).read_text()


class Links(html.parser.HTMLParser):
    """Everything that a browser would load, and the tags in use."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "poster", "data", "xlink:href")]
        self.loads += [v or "" for k, v in attrs if k == "href" and tag != "a"]


def test_the_page_loads_nothing_from_anywhere(text: str) -> None:
    links = Links()
    links.feed(text)
    assert "script" not in links.tags
    assert "link" not in links.tags
    assert links.loads
    assert all(load.startswith(("data:image/jpeg;base64,", "#")) for load in links.loads)
    assert not re.search(r"@import|url\((?!#)", text)


def test_notes_are_escaped(text: str) -> None:
    assert "red &lt;b&gt;border&lt;/b&gt;" in text
    assert "&lt;b&gt;of its own&lt;/b&gt;" in text
    assert not re.search(r"<[bi]>", text)


def test_the_main_table_holds_the_numbers_of_the_metrics(run: SimpleNamespace, text: str) -> None:
    content = json.loads(next(run.run.glob("eval/*/metrics.json")).read_text())
    for task, strategy in (("classify-image", None), ("probe", None), ("zero-shot", "ensemble")):
        wanted = {"task": task, "eval_strategy": strategy, "class_set": "classes", "metric": "f1_weighted"}
        for row in content["results"]:
            if row["scope_kind"] != "subgroup" and all(row[k] == v for k, v in wanted.items()):
                assert f"{row['value']:.3f}" in text
                assert f"{row['ci_low']:.3f}–{row['ci_high']:.3f}" in text


def test_it_says_what_the_data_were_and_what_the_notes_saw(run: SimpleNamespace, text: str) -> None:
    assert "Real images" in text
    assert "Embedded atlas" not in text
    assert "is label-given (80 notes)" in text
    assert "the reading of the class word" in text
    content = json.loads(next(run.run.glob("eval/*/metrics.json")).read_text())
    assert page.is_atlas({"datasets": {"Atlas_dermo": 3, "Atlas_clinic": 2}})
    assert not page.is_atlas(content["protocol"])


def test_curves_attention_gallery_and_notes_are_there(text: str) -> None:
    for title in (
        "Loss, all objectives",
        "Loss, matching",
        "Learning rate",
        "Cross-attention maps",
        "Retrieval gallery",
        "Calibration",
        "Recall of each class",
        "By data set",
        "Generated reports",
        "All tasks",
        "the primary endpoint",
    ):
        assert title in text
    assert "dropped class (" in text
    assert text.count('class="map"') == 2
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_every_id_and_reference_inside_the_drawings_is_resolved(text: str) -> None:
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= ids
    assert set(re.findall(r'xlink:href="#([^"]+)"', text)) <= ids
    assert not set(figures._CSS) & set(re.findall(r"#0[12]0\d0\d", text))


def test_every_drawing_has_words_for_those_who_do_not_see_it(text: str) -> None:
    drawings = re.findall(r"<svg [^>]*>", text)
    assert len(drawings) > 8
    assert all(re.search(r'role="img" aria-label="[^"]{8,}"', drawing) for drawing in drawings)
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", text))


def test_the_page_is_small_and_prints_what_is_folded(text: str) -> None:
    assert len(text) < 6e6
    assert "details::details-content" in text


def test_calibration_is_that_of_the_metrics(run: SimpleNamespace) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    shown = breakdown.reliabilities(evaluation)
    assert {(r.method, r.scope) for r in shown} == {
        (m, s) for m in ("model", "frozen probe") for s in ("internal", "external")
    }
    for one in shown:
        task = {"model": "classify-image", "frozen probe": "probe"}[one.method]
        wanted = {"task": task, "scope": one.scope, "metric": "ece", "class_set": "classes"}
        assert one.ece == pytest.approx(tables.find(evaluation.rows, **wanted)["value"], abs=1e-9)  # type: ignore[index]
        assert one.counts.sum() == one.n


def test_recall_of_the_classes_averages_to_balanced_accuracy(run: SimpleNamespace) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    for scope, bars in breakdown.class_recalls(evaluation).items():
        wanted = {"task": "classify-image", "scope": scope, "metric": "balanced_accuracy", "class_set": "classes"}
        row = tables.find(evaluation.rows, **wanted)
        assert np.mean([b.value for b in bars if b.value is not None]) == pytest.approx(row["value"], abs=1e-9)  # type: ignore[index]
        assert sum(b.n for b in bars) == row["n"]  # type: ignore[index]
        assert all((b.value is None) == (b.n == 0) for b in bars)


def test_the_endpoint_is_the_mean_over_the_external_data_sets(run: SimpleNamespace) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    found = compare.endpoint(evaluation)
    wanted = {"task": "classify-image", "metric": "f1_macro", "class_set": "classes", "scope_kind": "dataset"}
    values = [tables.find(evaluation.rows, scope=d, **wanted)["value"] for d in evaluation.protocol["external"]]  # type: ignore[index]
    assert found is not None
    assert found.num_datasets == len(values) == 2
    assert found.model.value == pytest.approx(np.mean(values), abs=1e-9)
    assert found.model.low is not None
    assert found.model.low <= found.model.value <= found.model.high  # type: ignore[operator]


def test_confusion_matrices_cover_every_partition_once(run: SimpleNamespace) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    shown = compare.confusions(evaluation)
    names = [name for one in shown for name in one.title.split(" = ")]
    assert sorted(names) == ["all", "clinical", "dermoscopic", "external", "internal"]
    assert [one.n for one in shown] == [np.sum(one.counts) for one in shown]


def test_reports_are_marked_by_their_records(run: SimpleNamespace, text: str) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    shown = generated.marked_reports(evaluation, None, 12, 0)
    assert len(shown) == 12
    for one in shown:
        fact = next(f for f in one.facts if f.name == "image")
        wanted = generated.SUPPORTED if fact.value == "dermoscopic" else generated.CONTRADICTED
        assert fact.status == wanted
        assert any(p.mark == generated.UNSUPPORTED and p.text.lower() == "fuzzy" for p in one.pieces)
    assert '<mark class="unsupported">' in text
    counts = {c.name: c for c in generated.fact_counts(evaluation)}["image"]
    assert (counts.supported, counts.contradicted, counts.missing) == (59, 20, 0)  # 20 records are clinical images


@pytest.mark.parametrize("name", ["metrics.json", "embeddings.safetensors", "ids.parquet", "predictions.parquet"])
@pytest.mark.parametrize("damage", ["cut", "gone", "another table"])
def test_a_damaged_or_missing_file_is_one_line(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    folder = tmp_path / "eval"
    shutil.copytree(next(run.run.glob("eval/*/metrics.json")).parent, folder)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(whole[: len(whole) // 2])
    elif damage == "another table":
        pq.write_table(pa.table({"a": [1]}), folder / name)
    assert main(["report", f"run={folder}", f"shards={run.shards}", "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert name in error
    assert "run `dermfm evaluate" in error
    assert "\n" not in error


def test_damaged_reports_are_refused_and_none_are_none(tmp_path: Path) -> None:
    assert generated.read_reports(tmp_path) == []
    (tmp_path / generated.REPORTS).write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read"):
        generated.read_reports(tmp_path)
    pq.write_table(pa.table({"record_id": ["a"]}), tmp_path / generated.REPORTS)
    with pytest.raises(InputError, match="no column 'text'"):
        generated.read_reports(tmp_path)


def test_a_page_without_images_holds_none(run: SimpleNamespace, tmp_path: Path) -> None:
    path = write_report(ReportConfig(run=str(run.run), out=str(tmp_path / "plain.html"), images=False))
    assert "data:image" not in path.read_text()


def test_the_same_run_gives_the_same_page(run: SimpleNamespace, text: str) -> None:
    assert write_report(ReportConfig(run=str(run.run), gallery=3, attention=2)).read_text() == text


def test_the_paired_difference_is_that_of_the_two_values(run: SimpleNamespace) -> None:
    evaluation = load_run(str(run.run), None, None).evaluation
    for scope, difference in compare.differences(evaluation, ["f1_weighted"])["f1_weighted"].items():
        wanted = {"scope": scope, "metric": "f1_weighted", "class_set": "classes"}
        values = [tables.find(evaluation.rows, task=task, **wanted)["value"] for task in ("classify-image", "probe")]  # type: ignore[index]
        assert difference.value == pytest.approx(values[0] - values[1], abs=1e-9)


def test_gallery_leaves_out_the_query_lesion_and_marks_classes(run: SimpleNamespace) -> None:
    loaded = load_run(str(run.run), None, None)
    queries = gallery.image_queries(loaded.evaluation, 0, loaded.images, 6, 0)
    assert len(queries) == 6
    for query in queries:
        scores = [hit.score for hit in query.hits]
        assert scores == sorted(scores, reverse=True)
        for hit in query.hits:
            assert hit.right == (None if hit.label == "unknown class" else hit.label == query.label)


def test_shown_records_come_from_every_data_set_in_turn() -> None:
    datasets, labels = np.array(["A"] * 90 + ["B"] * 10), np.arange(100) % 4
    rows = gallery.choose_rows(datasets, labels, 6, 0)
    assert [str(d) for d in datasets[rows]] == ["A", "B"] * 3
    assert rows == gallery.choose_rows(datasets, labels, 6, 0)
    assert len(gallery.choose_rows(datasets, labels - 10, 6, 0)) == 0


def test_telling_words_are_whole_words() -> None:
    found = attention.telling_words("A scarred patient; Border irregular, melanoma.")
    assert [word for word, _ in found] == ["Border", "irregular", "melanoma"]
    found = attention.telling_words("Dark brown, black; pigment network.")
    assert [word for word, _ in found] == ["Dark brown", "black", "pigment network"]


def test_an_attention_map_is_brightest_where_the_weight_is() -> None:
    from PIL import Image

    grid = np.zeros((4, 4), np.float32)
    grid[0, 3] = 1.0
    picture = attention.blend(Image.new("RGB", (80, 80), (90, 90, 90)), grid)
    pixels = np.asarray(picture).sum(axis=2)
    assert pixels[:20, 60:].mean() > 2 * pixels[40:, :40].mean()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give run="),
        (["run=nowhere"], "not a folder"),
        (["run={run}", "step=7"], "evaluated steps: 12"),
        (["run={run}", "shards=nowhere"], "no such manifest"),
        (["run={empty}"], "run `dermfm evaluate"),
        (["run={run}", "notes=nowhere"], "notes: "),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], says: str
) -> None:
    assert main(["report", *(a.format(run=run.run, empty=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_dry_run_writes_nothing(run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", f"run={run.run}", f"out={tmp_path / 'page.html'}", "--dry-run"]) == 0
    assert "would be written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_shards_of_another_evaluation_are_refused(run: SimpleNamespace, tmp_path: Path) -> None:
    make = fixtures()
    rng = np.random.default_rng(9)
    other = make.build_shards(tmp_path / "other", make.make_records(rng), rng)
    with pytest.raises(InputError, match="fingerprint"):
        write_report(ReportConfig(run=str(run.run), shards=other))


def test_a_page_about_a_part_of_the_tasks_shows_that_part(run: SimpleNamespace, tmp_path: Path) -> None:
    """No probe, no notes in the shards, no log: the page has no such sections, and says nothing about them."""
    make = fixtures()
    (tmp_path / "bare").mkdir()
    rng = np.random.default_rng(4)
    records = [{**record, "notes": []} for record in make.make_records(rng) if record["dataset"] == "Ours"]
    shards = make.build_shards(tmp_path / "silent", records, rng)
    with pytest.MonkeyPatch.context() as patch:
        bare = make.build_run(tmp_path / "bare", run.model, run.model.config, patch).run
        tasks = ["classify-image", "retrieval-i2i"]
        evaluate(EvaluateConfig(run=str(bare), shards=shards, tasks=tasks, resamples=20, device="cpu"))
    text = write_report(ReportConfig(run=str(bare), shards=shards)).read_text()
    assert "Image → image" in text
    assert "both an internal and an external part" in text
    for missing in ("Retrieval gallery", "model − probe", "Cross-attention", "What the notes saw", 'id="training"'):
        assert missing not in text
