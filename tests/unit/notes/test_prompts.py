"""Prompt files: what they may see, and what is refused."""

from __future__ import annotations

import pickle
import shutil

import pytest

from dermfm.config import InputError
from dermfm.notes.plan import NotesConfig, PlannedNote
from dermfm.notes.prompts import PROMPTS, load_prompt
from dermfm.notes.strategies import find_strategies
from dermfm.notes.synthesize import make_item

BLIND = """
version: "1"
label_access: blind
fields: [modality, age, sex, site]
requires: [image]
user: "{{ image }} {{ site or '' }} {{ age or '' }}"
"""


def edited(tmp_path, old, new):
    path = tmp_path / "narrative.yaml"
    path.write_text((PROMPTS / "narrative.yaml").read_text().replace(old, new))
    return str(path)


@pytest.mark.parametrize("path", sorted(PROMPTS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_packaged_prompt_loads(path):
    assert load_prompt(str(path)).version.startswith(path.stem)


HIDDEN = {
    "label": 6, "malignancy": "malignant", "class": "x", "subclass": "y", "findings": "z", "matched_class": "m",
    "matched_subclass": "n",
}  # fmt: skip
MEASURED = {
    "measured_asymmetry_word": "asymmetric", "measured_border_word": "sharp", "measured_colours": ["red", "black"],
    "measured_dots": 90, "measured_globules": 2, "measured_structureless": 0.5, "measured_size": 0.5,
}  # fmt: skip
BLINDS = ["blind", "measured", "open", "native_blind"]


@pytest.fixture
def blind_folder(tmp_path):
    for path in PROMPTS.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "blind.yaml").write_text(BLIND)
    return str(tmp_path)


def test_no_blind_strategy_is_left_out_of_the_next_test():
    found = find_strategies([p.stem for p in PROMPTS.glob("*.yaml")], takes_images=lambda: True)
    assert {s.name for s in found if s.label_access == "blind"} | {"blind"} == set(BLINDS)


@pytest.mark.parametrize("name", BLINDS)
def test_fields_that_a_blind_strategy_may_not_see_change_nothing_of_its_request(name, blind_folder, record):
    (strategy,) = find_strategies([name], blind_folder, takes_images=lambda: True)
    plain = {**record("a"), **MEASURED}
    changed = {**plain, **HIDDEN}
    settings = NotesConfig(records="r", out="o")
    items = [make_item(PlannedNote("id", 0, strategy, 7), one, settings) for one in (plain, changed)]
    assert items[0] == items[1]
    assert pickle.dumps(items[0]) == pickle.dumps(items[1])
    assert strategy.visible(plain) == strategy.visible(changed)
    assert "nevus" not in strategy.fallback(plain)


def test_examples_show_only_facts_that_the_record_has(record):
    (strategy,) = find_strategies(["narrative"])
    facts = strategy.facts(record("a", age=None, sex=None, site=None))
    for seed in range(2):
        said = " ".join(content for _, content in strategy.prompt.prefix(facts, seed))
        assert "year-old" not in said
        assert "site" not in said


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("fields: [modality", "fields: [modalities", "did you mean 'modality'"),
        ("label_access: given", "label_access: blind", "label-blind prompt may not see"),
        ("; {{ diagnosis }};", "; {{ diagnoses }};", r"\.yaml: .*'diagnoses' is undefined; .* the facts .*diagnosis"),
        ("; {{ diagnosis }};", "; {{ findings }};", r"\.yaml: .*'findings' is undefined; .* the facts .*image"),
        ("fields: [modality, age, sex,", "fields: [modality,", "see 'age'"),
        (
            "; {{ diagnosis }};",
            "; {{ diagnosis }};{{ label }}",
            r"\.yaml: .*'label' is undefined; .* the facts .*image",
        ),
        ("site: back, ", "", "see 'site'"),
        ("version:", "versoin:", "unknown key 'versoin'"),
    ],
)
def test_a_broken_prompt_is_refused_by_name(tmp_path, old, new, told):
    with pytest.raises(InputError, match=told):
        load_prompt(edited(tmp_path, old, new))


def test_a_prompt_cannot_reach_beyond_its_sandbox(tmp_path):
    with pytest.raises(InputError):
        load_prompt(edited(tmp_path, "{{ diagnosis }}", "{{ ''.__class__.__mro__ }}"))


def test_an_edit_without_a_new_version_still_changes_the_version_of_its_notes(tmp_path):
    before = load_prompt(str(PROMPTS / "narrative.yaml")).version
    assert load_prompt(edited(tmp_path, "Use every fact", "Use all facts")).version != before


def test_an_unknown_strategy_names_the_nearest_one(tmp_path):
    shutil.copy(PROMPTS / "narrative.yaml", tmp_path)
    with pytest.raises(InputError, match="did you mean 'narrative'"):
        find_strategies(["narative"], str(tmp_path))


def test_a_folder_of_prompts_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"prompts: no folder .*nowhere"):
        find_strategies(["narrative"], str(tmp_path / "nowhere"))
