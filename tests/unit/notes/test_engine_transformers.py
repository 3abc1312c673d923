"""The transformers engine on random weights: options hold whatever the model, images count, seeds decide."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from PIL import Image

from dermfm.config import InputError
from dermfm.notes.engines.pictures import picture_inputs
from dermfm.notes.engines.protocol import (
    EngineConfig,
    Request,
    build_engine,
    prepare_engine,
    takes_images,
    weight_bytes,
)
from dermfm.notes.engines.schema import decodable, longest, settle
from dermfm.notes.plan import NotesConfig, PlannedNote
from dermfm.notes.strategies import find_strategies
from dermfm.notes.synthesize import make_item
from dermfm.notes.write import NoteWriter

COLOURS = ["red", "light brown", "dark brown", "blue-grey", "weiß – white"]
SCHEMA = {
    "type": "object",
    "properties": {
        "asymmetry": {"type": "string", "enum": ["symmetric", "asymmetric in one axis", "asymmetric in two axes"]},
        "colours": {"type": "array", "items": {"enum": COLOURS}, "uniqueItems": True, "minItems": 1},
        "structures": {"type": "array", "items": {"enum": ["dots", "globules"]}, "maxItems": 2},
    },
    "required": ["asymmetry", "colours", "structures"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    folder = tiny.write_tiny_llm(tmp_path_factory.mktemp("models") / "llm")
    return build_engine(EngineConfig(model=str(folder), max_new_tokens=8, batch_size=16, retry_temperature=3.0))


@pytest.fixture(scope="module")
def seeing(tiny, tmp_path_factory):
    folder = tiny.write_tiny_vlm(tmp_path_factory.mktemp("models") / "vlm")
    return build_engine(EngineConfig(model=str(folder), max_new_tokens=8))


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(paths, ["red", "green"], strict=True):
        Image.new("RGB", (60, 40), colour).save(path)
    return [str(path) for path in paths]


def asked(text, seed=0, **more):
    return Request((("system", "Choose."), ("user", text)), 1, "", seed, **more)


def test_every_answer_under_a_schema_is_valid_whatever_the_weights_and_however_short_the_limit(engine):
    requests = [asked(f"lesion {k}", seed=k, attempt=k % 2, schema=SCHEMA) for k in range(48)]
    answers = engine.generate(requests)
    assert all(a.error is None and a.finished for a in answers)
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert len({a.text for a in answers}) > 24


def test_rows_with_and_without_options_share_a_call_and_change_nothing_for_each_other(engine):
    mixed = [asked(f"lesion {k}", seed=k, schema=SCHEMA if k % 2 else None) for k in range(6)]
    together = [a.text for a in engine.generate(mixed)]
    assert together == [engine.generate([r])[0].text for r in mixed]
    assert [t.startswith('{"asymmetry') for t in together] == [False, True] * 3


def test_an_image_changes_the_answer_and_its_neighbours_do_not(seeing, pictures):
    assert seeing.takes_images
    requests = [asked("what is it " * (1 + k % 3), image=pictures[k % 2], seed=k) for k in range(4)]
    together = [a.text for a in seeing.generate(requests)]
    assert together == [seeing.generate([r])[0].text for r in requests]
    swapped = [a.text for a in seeing.generate([replace(r, image=pictures[1 - k % 2]) for k, r in enumerate(requests)])]
    assert all(a != b for a, b in zip(together, swapped, strict=True))
    greedy = seeing.generate([replace(requests[0], seed=99)])[0].text
    assert greedy == together[0]


def test_requests_with_and_without_an_image_share_a_call(seeing, pictures):
    requests = [asked("what is it " * (1 + k % 3), image=pictures[0] if k % 2 else None) for k in range(6)]
    together = [a.text for a in seeing.generate(requests)]
    assert together == [seeing.generate([r])[0].text for r in requests]
    assert len(set(together)) > 3


def test_a_template_that_stands_with_the_tokenizer_only_serves_conversations_with_images(tiny, tmp_path, pictures):
    folder = tiny.write_tiny_vlm(tmp_path / "vlm")
    expected = build_engine(EngineConfig(model=str(folder), max_new_tokens=4))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    prepare_engine(EngineConfig(model=str(folder)))
    found = build_engine(EngineConfig(model=str(folder), max_new_tokens=4))
    requests = [asked("what is it", image=pictures[0])]
    assert found.generate(requests) == expected.generate(requests)


def test_a_large_photograph_reaches_the_model_at_a_bounded_size(seeing, tmp_path, monkeypatch):
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "phone.jpg")
    shown = []
    monkeypatch.setattr(seeing.processor, "apply_chat_template", lambda chats, **_: shown.append(chats) or {})
    picture_inputs(seeing.processor, [asked("?", image=str(tmp_path / "phone.jpg"))])
    assert shown[0][0][-1]["content"][0]["image"].size == (1536, 1152)


def test_a_model_that_knows_no_conversations_is_refused_before_it_is_loaded(tiny, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "llm")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template; use an instruction-tuned model"):
        prepare_engine(EngineConfig(model=str(folder)))


def test_a_model_that_transformers_does_not_know_is_refused_before_it_is_loaded(tiny, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "llm")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "lamma"}))
    with pytest.raises(InputError, match=r"engine\.model: .*llm cannot be loaded: .*lamma"):
        prepare_engine(EngineConfig(model=str(folder)))


def test_weights_that_end_too_early_are_told_in_one_line(tiny, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "llm")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"engine\.model: .*llm cannot be loaded: SafetensorError"):
        build_engine(EngineConfig(model=str(folder)))


def test_images_of_unequal_size_share_a_batch_and_their_pixels_reach_the_model(tiny, tmp_path):
    folder = tiny.write_tiny_tiling_vlm(tmp_path / "tiling")
    engine = build_engine(EngineConfig(model=str(folder), max_new_tokens=8, batch_size=4))
    sizes, names = [(40, 32), (96, 64), (64, 96), (96, 30)], "abcd"
    noise = np.random.default_rng(5)
    for name, (width, height) in zip(names, sizes, strict=True):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    requests = [asked("what " * (1 + k), image=str(tmp_path / f"{name}.png")) for k, name in enumerate(names)]
    counts = [picture_inputs(engine.processor, [r])["input_ids"].shape[1] for r in requests]
    assert len(set(counts)) == 4  # tiles, and words, differ
    together = [a.text for a in engine.generate(requests)]
    assert together == [engine.generate([r])[0].text for r in requests]
    for name, (width, height) in zip(names, sizes, strict=True):  # other pixels, all else the same
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{name}.png")
    assert all(a.text != before for a, before in zip(engine.generate(requests), together, strict=True))


def test_images_with_options_give_valid_answers(seeing, pictures):
    requests = [asked("?", image=pictures[k % 2], schema=SCHEMA, seed=k, attempt=1) for k in range(6)]
    answers = [json.loads(answer.text) for answer in seeing.generate(requests)]
    assert [list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(answer)) for answer in answers] == [[]] * 6


def test_strategies_that_see_make_notes_of_records_and_their_images(seeing, pictures, record):
    folder = pictures[0].rpartition("/")[0]
    config = NotesConfig(records=f"{folder}/records.parquet", out="o", engine=EngineConfig(attempts=1))
    strategies = find_strategies(["open", "native", "native_blind"], None, lambda: True)
    records = [record(f"i{k}", 5, image=path.rpartition("/")[2]) for k, path in enumerate(pictures)]
    items = [make_item(PlannedNote(f"{s.name}{r['image']}", 0, s, 3), r, config) for s in strategies for r in records]
    rows = NoteWriter(config.engine, engine=seeing).work(items)
    assert [item.request.image for item in items] == pictures * 3
    assert [row["label_access"] for row in rows] == ["blind", "blind", "given", "given", "blind", "blind"]
    assert not any("carcinoma" in text for k in (0, 1, 4, 5) for _, text in items[k].request.messages)
    assert not any(fault.startswith("option") for row in rows[:2] for fault in row["first_faults"])
    assert all(row["text"] and not row["error"] for row in rows)


def test_an_image_that_cannot_be_read_names_its_file(seeing, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be read as an image"):
        seeing.generate([asked("?", image=str(tmp_path / "broken.jpg"))])


def test_what_a_model_is_can_be_said_before_it_is_loaded(engine, seeing):
    assert not takes_images(engine.config)
    assert takes_images(seeing.config)
    unique = {id(p): p.numel() for p in engine.model.parameters()}
    assert weight_bytes(engine.config) == 4 * sum(unique.values())
    assert weight_bytes(replace(engine.config, dtype="bfloat16")) == 2 * sum(unique.values())
    assert prepare_engine(engine.config) != prepare_engine(seeing.config)


def test_a_damaged_model_file_is_named(tiny, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "llm")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model\.safetensors: is no safetensors file"):
        weight_bytes(EngineConfig(model=str(folder)))


def test_what_decoders_get_is_bounded_and_closed():
    plain = decodable(SCHEMA | {"required": []})
    assert plain["required"] == ["asymmetry", "colours", "structures"]
    assert plain["properties"]["colours"]["maxItems"] == 5
    assert "uniqueItems" not in plain["properties"]["colours"]
    answer = {"asymmetry": "asymmetric in one axis", "colours": [COLOURS[-1]] * 5, "structures": ["globules"] * 2}
    assert longest(plain) >= len(json.dumps(answer))
    assert longest({"type": "string"}) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"asymmetry": "symm', "no whole JSON"),
        ('{"asymmetry": "sharp", "colours": ["red"], "structures": []}', "asymmetry is not among the options"),
        ('{"asymmetry": "symmetric", "colours": [], "structures": []}', "colours"),
        ("I cannot help with that.", "no whole JSON"),
    ],
)
def test_an_answer_that_is_not_among_the_options_is_told(text, told):
    with pytest.raises(ValueError, match=told):
        settle(SCHEMA, text)


def test_an_option_named_twice_counts_once():
    text = '{"asymmetry": "symmetric", "colours": ["red", "light brown", "red"], "structures": []}'
    assert json.loads(settle(SCHEMA, text))["colours"] == ["red", "light brown"]
