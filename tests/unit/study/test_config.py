"""Cells of a study, and what its configuration refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from dermfm.config import InputError, load, to_dict
from dermfm.evaluate.records import record_set
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.study.config import CONTROLS, StudyConfig, TokensConfig, all_cells, differences
from dermfm.study.prepare import check_roles

ATLAS = "configs/study/atlas.yaml"


def atlas(root: Path, *items: str) -> StudyConfig:
    return load(StudyConfig, root / ATLAS, items)


def test_every_control_is_a_cell_of_every_seed(root):
    cells = all_cells(atlas(root))
    assert len(cells) == 2 * 6
    assert {c.strategy for c in cells if c.seed == 1} == {*CONTROLS, "narrative"}
    assert len({c.id for c in cells}) == len(cells)


def test_engines_multiply_prompted_strategies_and_their_shuffled_notes_only(root):
    config = atlas(root, "engines=[{name: one}, {name: two}]", "seeds=[0]")
    engines = {}
    for cell in all_cells(config):
        engines.setdefault(cell.strategy, set()).add(cell.engine)
    assert engines["narrative"] == engines["shuffled"] == engines["shuffled_within_class"] == {"one", "two"}
    assert engines["label"] == engines["template"] == {"template"}
    assert engines["image-only"] == {"none"}


def test_shares_of_cells_cover_all_of_them_once(root):
    cells = all_cells(atlas(root))
    shares = [[c.id for k, c in enumerate(cells) if k % 5 == share] for share in range(5)]
    assert sorted(name for share in shares for name in share) == sorted(c.id for c in cells)


def test_image_only_reads_no_note_and_keeps_the_rest(root):
    config = atlas(root)
    objective = config.objective("standard")
    assert objective.of("image-only").active == ["classify_image"]
    scaled = objective.of("narrative", 0.5)
    assert scaled.contrastive == objective.weights.contrastive * 0.5
    assert scaled.classify_image == objective.weights.classify_image


def test_every_cell_tries_as_many_settings(root):
    search = atlas(root, "tokens.search.lr=[0.1,0.2]", "tokens.search.image_only_lr=[1,2,3,4]").tokens.search
    assert len(search.settings("image-only")) == len(search.settings("narrative")) == 4


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("controls=[image-only,label,shuffled,template]", "controls: 'shuffled_within_class' is left out"),
        ("controls=[image-only,label,shuffled,shuffled_within_class,template,open]", "controls: 'open' is not valid"),
        ("strategies=[narrative,label]", "strategies: 'label' stands there twice"),
        ("strategies=[]", "strategies: at least one is needed"),
        ("seeds=[0,0]", "seeds: '0' stands there twice"),
        ("of=shuffled", "of: 'shuffled' is not valid"),
        ("mixes={all: [narrative]}", "mixes.all"),
        ("cells=[3,3]", "cells: .* is not valid"),
        ("only=[narativ]", "only: 'narativ' is not valid; did you mean 'narrative'"),
        ("tokens.search.image_only_lr=[0.1]", "the search must be the same size"),
        ("objectives=[{name: x, weights: {classify_image: 0}}]", "objectives.x.classify_image"),
        (
            "objectives=[{name: x, weights: {contrastive: 0, matching: 0, classify_text: 0, classify_fused: 0}}]",
            "objectives.x: no objective reads notes",
        ),
        ("objectives=[{name: a/b}]", "'a/b' is not a name"),
        ("tier=3", "tier: '3' is not valid"),
        ("objectives=[{name: none}]", "objectives: 'none' is the name of the frozen probe"),
        ("strategies=[frozen-probe]", "strategies: 'frozen-probe' is the name of the frozen probe"),
        ("protocol.endpoint=accuracy", "protocol.endpoint: 'accuracy', but the endpoint of a study, named before, is"),
        ("protocol.endpoint=f1_makro", "protocol.endpoint: 'f1_makro' is not valid; did you mean 'f1_macro'"),
        ("goals={external: 33}", "goals.external: 33 is not valid; it must be between 0 and 1"),
        ("other_looks={before: -1}", "other_looks.before: -1 is not valid"),
    ],
)
def test_contradictory_cells_are_one_line(root, item, message):
    with pytest.raises(InputError, match=message) as error:
        atlas(root, item)
    assert "\n" not in str(error.value)


def test_an_unknown_strategy_is_named(root):
    with pytest.raises(InputError, match="no strategy 'measurd'"):
        all_cells(atlas(root, "strategies=[narrative,measurd]"))


def test_a_new_key_at_its_default_does_not_make_a_cell_stale():
    now, default = to_dict(TokensConfig()), to_dict(TokensConfig())
    before = {name: value for name, value in now.items() if name != "clip"}
    assert differences(before, now, default) == []
    assert differences(before, now | {"clip": 2.0}, default) == ["clip"]
    assert differences(before | {"epochs": 1.0}, now, default) == ["epochs"]
    nested = before | {"optimizer": before["optimizer"] | {"weight_decay": 1.0}}
    assert differences(nested, now, default) == ["optimizer.weight_decay"]
    assert differences(before | {"gone": 1}, now, default) == ["gone"]


def test_a_side_without_data_sets_and_a_data_set_without_labels_are_refused():
    fields = [{"dataset": d, "label": label} for d, label in (("home", 1), ("away", 2), ("blank", None))]
    scored = record_set(fields, [[]] * 3, ["test"] * 3)
    check_roles(ProtocolConfig(internal=["home"], external=["away"]), scored)
    with pytest.raises(InputError, match=r"protocol.external: no data set with test records is external; .* away, b"):
        check_roles(ProtocolConfig(internal=["home", "away"]), scored)
    with pytest.raises(InputError, match="no test record of data set 'blank' has a label"):
        check_roles(ProtocolConfig(internal=["home"], external=["away", "blank"]), scored)
