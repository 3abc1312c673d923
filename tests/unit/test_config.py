"""Configuration: layers in their order, and for every kind of bad input one line that names it and what is valid."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dermfm.config import (
    REQUIRED,
    InputError,
    canonical_json,
    check_choice,
    check_range,
    explain,
    fingerprint,
    from_dict,
    key,
    load,
    nearest,
    read_file,
    read_yaml,
    short_hash,
    to_dict,
    to_yaml,
)


@dataclass(kw_only=True)
class Inner:
    size: int = key(224, "pixels")
    kernel: str = key("auto", "attention kernel")

    def __post_init__(self) -> None:
        check_range("inner.size", self.size, 32, 512)
        check_choice("inner.kernel", self.kernel, ("auto", "sdpa", "flash"))


@dataclass(kw_only=True)
class Source:
    name: str = key(REQUIRED, "data set")
    weight: float = key(1.0, "how often")


@dataclass(kw_only=True)
class Outer:
    run: str = key(REQUIRED, "run directory")
    epochs: float = key(10.0, "passes")
    seed: int | None = key(None, "seed; null: from the clock")
    shuffle: bool = key(True, "shuffle")
    names: list[str] = key(["a", "b"], "names")
    rates: dict[str, float] = key({"template": 1.0}, "weights by strategy")
    inner: Inner = key(Inner, "the inner part")
    sources: list[Source] = key([], "data sets")


@pytest.fixture
def write(tmp_path: Path):
    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return file


def refusal(*arguments, schema: type = Outer, call=load) -> str:
    """The message of the InputError; it is one line."""
    with pytest.raises(InputError) as error:
        call(schema, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- layers


def test_defaults_are_overlaid_by_the_file_and_then_by_the_command_line(write):
    path = write("c.yaml", "run: r\nepochs: 3\ninner: {size: 64}\nnames: [x]\n")
    config = load(Outer, path, ["epochs=4", "inner.kernel=sdpa", "names=[y, z]"])
    assert config == Outer(run="r", epochs=4.0, names=["y", "z"], inner=Inner(size=64, kernel="sdpa"))
    assert isinstance(config.inner, Inner)


def test_later_items_of_the_command_line_win():
    assert load(Outer, None, ["run=a", "run=b", "seed=3", "seed=null"]) == Outer(run="b")


def test_extends_lays_base_files_first_and_paths_are_relative_to_the_file(write):
    write("base/zero.yaml", "run: zero\nepochs: 1\ninner: {size: 33, kernel: sdpa}\n")
    write("base/one.yaml", "extends: zero.yaml\nepochs: 2\n")
    write("other.yaml", "inner: {size: 48}\n")
    path = write("top.yaml", "extends: [base/one.yaml, other.yaml]\nshuffle: false\n")
    expected = Outer(run="zero", epochs=2.0, shuffle=False, inner=Inner(size=48, kernel="sdpa"))
    assert load(Outer, path) == expected


def test_a_list_of_dataclasses_is_read_as_such(write):
    path = write("c.yaml", "run: r\nsources:\n- {name: HAM10000}\n- {name: MSK, weight: 2}\n")
    assert load(Outer, path).sources == [Source(name="HAM10000"), Source(name="MSK", weight=2.0)]


def test_a_free_dictionary_of_a_file_is_all_there_is(write):
    """Who lists the strategies to train on does not get the default one as well."""
    write("base.yaml", "rates: {label: 1, open: 2}\n")
    assert load(Outer, write("a.yaml", "run: r\nrates: {narrative: 1}\n")).rates == {"narrative": 1.0}
    assert load(Outer, write("b.yaml", "extends: base.yaml\nrun: r\n")).rates == {"label": 1.0, "open": 2.0}
    path = write("c.yaml", "extends: base.yaml\nrun: r\nrates: {narrative: 1}\n")
    assert load(Outer, path).rates == {"narrative": 1.0}
    assert from_dict(Outer, {"run": "r", "rates": {"x": 1}}, "here").rates == {"x": 1.0}


def test_the_command_line_changes_one_entry_of_a_free_dictionary_or_gives_all(write):
    path = write("c.yaml", "run: r\nrates: {narrative: 1}\n")
    assert load(Outer, path, ["rates.label=2"]).rates == {"narrative": 1.0, "label": 2.0}
    assert load(Outer, path, ["rates={label: 2}"]).rates == {"label": 2.0}
    assert load(Outer, path, ["rates={}"]).rates == {}


def test_a_part_can_extend_a_file_of_its_own(write):
    """Single parts of a job's file come from files that are shared with others."""
    write("parts/base.yaml", "kernel: sdpa\nsize: 33\n")
    write("parts/small.yaml", "extends: base.yaml\nsize: 48\n")
    path = write("c.yaml", "run: r\ninner: {extends: parts/small.yaml, kernel: flash}\n")
    assert load(Outer, path).inner == Inner(size=48, kernel="flash")
    assert f"inner.size = 48   [int] ({path.parent / 'parts' / 'small.yaml'})  pixels" in explain(Outer, path)
    write("parts/small.yaml", "sise: 48\n")
    assert refusal(path) == f"{path.parent / 'parts' / 'small.yaml'}: unknown key 'inner.sise'; did you mean 'size'?"


def test_an_empty_file_changes_nothing(write):
    assert load(Outer, write("c.yaml", "# nothing\n"), ["run=r"]) == Outer(run="r")


def test_two_instances_do_not_share_their_lists():
    first, second = Outer(run="r"), Outer(run="r")
    first.names.append("c")
    first.inner.size = 1
    assert second.names == ["a", "b"]
    assert second.inner.size == 224


# ---- what bad input gets


def test_an_unknown_key_of_a_file_names_file_key_and_the_nearest(write):
    path = write("c.yaml", "run: r\nepoch: 3\n")
    assert refusal(path) == f"{path}: unknown key 'epoch'; did you mean 'epochs'?"


def test_an_unknown_key_deep_inside_is_named_in_full(write):
    path = write("c.yaml", "run: r\ninner: {sise: 3}\n")
    assert refusal(path) == f"{path}: unknown key 'inner.sise'; did you mean 'size'?"
    path = write("d.yaml", "run: r\nsources: [{name: a}, {nmae: b}]\n")
    assert refusal(path) == f"{path}: unknown key 'sources[1].nmae'; did you mean 'name'?"


def test_an_unknown_key_of_the_command_line_lists_the_valid_ones_where_none_is_near():
    message = refusal(None, ["run=r", "qqq=1"])
    assert message.startswith("command line: unknown key 'qqq'; valid: epochs, inner, names")


def test_an_unknown_key_of_a_base_file_names_the_base_file(write):
    base = write("base.yaml", "sed: 1\n")
    path = write("c.yaml", "extends: base.yaml\nrun: r\n")
    assert refusal(path) == f"{base}: unknown key 'sed'; did you mean 'seed'?"


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("epochs=many", "epochs: Value 'many'"),
        ("inner.size=big", "inner.size: Value 'big'"),
        ("inner.size=1.5", "inner.size: Value '1.5'"),
        ("shuffle=perhaps", "shuffle: Value 'perhaps'"),
        ("names=3", "names: "),
        ("inner=3", "inner: '3' is not valid; it takes `key: value` lines of size, kernel"),
        ("sources=[3]", "sources[0]: '3' is not valid; it takes `key: value` lines of name, weight"),
        ("rates.template=often", "rates.template: Value 'often'"),
        ("sources=[{name: a, weight: heavy}]", "weight"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(item, part):
    message = refusal(None, ["run=r", item])
    assert message.startswith("command line: ")
    assert part in message


def test_a_missing_file_names_the_nearest_beside_it(write):
    path = write("train.yaml", "run: r\n")
    missing = path.with_name("trian.yaml")
    assert refusal(missing) == f"{missing}: no such file; did you mean 'train.yaml'?"
    assert "does not exist or is empty" in refusal(path.parent / "nowhere" / "c.yaml")
    assert refusal(path.parent) == f"{path.parent}: is a folder, a file is needed"


def test_a_missing_base_file_is_named(write):
    write("basis.yaml", "run: r\n")
    path = write("c.yaml", "extends: bases.yaml\n")
    assert refusal(path) == f"{path.with_name('bases.yaml')}: no such file; did you mean 'basis.yaml'?"


def test_files_that_extend_each_other_are_an_error(write):
    write("a.yaml", "extends: b.yaml\n")
    assert "'extends' leads back to the file itself" in refusal(write("b.yaml", "extends: a.yaml\n"))


def test_a_required_key_that_is_missing_is_named_with_its_meaning(write):
    message = refusal(write("c.yaml", "epochs: 1\n"))
    assert message.endswith("the key 'run' is required (run directory); give run=<value>")


def test_a_file_makes_a_key_required_by_question_marks_and_what_refers_to_it_follows(write):
    path = write("a.yaml", "run: ${inner.kernel}\nseed: ???\ninner:\n  kernel: ???\n")
    assert "the key 'inner.kernel' is required (attention kernel)" in refusal(path, ["seed=1"])
    assert "the key 'seed' is required" in refusal(path, ["inner.kernel=sdpa"])
    loaded = load(Outer, path, ["inner.kernel=sdpa", "seed=1"])
    assert (loaded.run, loaded.seed, loaded.inner.kernel) == ("sdpa", 1, "sdpa")


def test_a_required_key_inside_a_list_is_named(write):
    message = refusal(write("c.yaml", "run: r\nsources: [{weight: 1}]\n"))
    assert "'sources[0].name' is required" in message


@pytest.mark.parametrize("text", ["run: [r\n", "run: r\n\tepochs: 1\n", "run: 'r\n", "a: b: c\n"])
def test_broken_yaml_names_the_file_and_the_line(write, text):
    path = write("c.yaml", text)
    message = refusal(path)
    assert message.startswith(f"{path}: not valid YAML")
    assert "line " in message


def test_a_file_without_keys_is_an_error(write):
    path = write("c.yaml", "- run\n- r\n")
    assert refusal(path) == f"{path}: must hold `key: value` lines at the top level"


@pytest.mark.parametrize("item", ["run", "=r", "epochs", "--x"])
def test_an_item_that_is_no_setting_is_an_error(item):
    assert refusal(None, [item]) == f"command line: '{item}' is not of the form key=value"


def test_an_error_of_a_schema_s_own_check_names_origin_key_value_and_what_is_valid(write):
    path = write("c.yaml", "run: r\ninner: {size: 8}\n")
    assert refusal(path) == f"{path}: inner.size: 8 is not valid; it must be between 32 and 512"
    message = refusal(None, ["run=r", "inner.kernel=flsh"])
    assert message.endswith("inner.kernel: 'flsh' is not valid; did you mean 'flash'? (one of auto, sdpa, flash)")


def test_check_range_without_an_upper_bound_says_at_least():
    with pytest.raises(ValueError, match="ranks: -1 is not valid; it must be at least 0"):
        check_range("ranks", -1, 0)
    check_range("ranks", 0, 0)


def test_nearest_suggests_or_lists_and_never_lists_hundreds():
    assert nearest("trian", ["train", "notes"]) == "did you mean 'train'?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"
    assert nearest("zzz", [f"name{i}" for i in range(300)]).endswith("… (300 in all)")


# ---- explain


def test_explain_shows_value_type_doc_and_origin_of_every_key(write):
    write("base.yaml", "epochs: 3\nseed: 1\n")
    path = write("c.yaml", "extends: base.yaml\ninner: {size: 64}\nseed: 2\n")
    lines = explain(Outer, path, ["shuffle=false"]).splitlines()
    assert f"epochs = 3.0   [float] ({path.with_name('base.yaml')})  passes" in lines
    assert f"inner.size = 64   [int] ({path})  pixels" in lines
    assert any(line.startswith(f"seed = 2   [int | None] ({path})") for line in lines)
    assert "shuffle = false   [bool] (command line)  shuffle" in lines
    assert 'inner.kernel = "auto"   [str] (default)  attention kernel' in lines
    assert 'names = ["a", "b"]   [list[str]] (default)  names' in lines
    assert [line.split(" = ")[0] for line in lines] == [
        "run", "epochs", "seed", "shuffle", "names", "rates", "inner.size", "inner.kernel", "sources",
    ]  # fmt: skip


def test_explain_shows_a_required_key_as_such_and_the_origin_of_lists_and_dictionaries():
    lines = explain(Outer, None, ["rates.label=2", "names=[x]"]).splitlines()
    assert lines[0].startswith('run = "???"')
    assert any(
        line.startswith('rates = {"template": 1.0, "label": 2.0}') and "(command line)" in line for line in lines
    )
    assert any(line.startswith('names = ["x"]') and "(command line)" in line for line in lines)


def test_explain_shows_a_reference_to_a_required_key_as_it_is_written(write):
    path = write("c.yaml", "names: ['${run}/a']\n")
    assert any(line.startswith('names = ["${run}/a"]') for line in explain(Outer, path).splitlines())
    assert any(line.startswith('names = ["r/a"]') for line in explain(Outer, path, ["run=r"]).splitlines())


def test_explain_refuses_what_load_refuses(write):
    assert "unknown key 'epoch'" in refusal(write("c.yaml", "epoch: 1\n"), call=explain)


# ---- to and from plain values


def test_yaml_of_a_config_reads_back_as_the_same_config(write):
    config = Outer(run="r", seed=3, inner=Inner(size=64), sources=[Source(name="a")], rates={"x": 0.5})
    assert load(Outer, write("c.yaml", to_yaml(config))) == config
    assert from_dict(Outer, to_dict(config), "state") == config


def test_from_dict_checks_like_a_file_and_names_the_origin():
    def call(schema: type, values: dict) -> Outer:
        return from_dict(schema, values, "state.json")

    assert refusal({"run": "r", "epoch": 1}, call=call) == "state.json: unknown key 'epoch'; did you mean 'epochs'?"
    assert "inner.size: 8 is not valid" in refusal({"run": "r", "inner": {"size": 8}}, call=call)


def test_read_yaml_gives_plain_containers_and_names_what_is_broken(write):
    assert read_yaml(write("c.yaml", "a: {b: [1, 2]}\nc: ${a.b}\n")) == {"a": {"b": [1, 2]}, "c": [1, 2]}
    for text, part in (("a: [", "not valid YAML"), ("- 1\n", "`key: value` lines")):
        path = write("d.yaml", text)
        with pytest.raises(InputError, match=part) as error:
            read_yaml(path)
        assert str(error.value).startswith(str(path))
    with pytest.raises(InputError, match=r"did you mean 'c\.yaml'"):
        read_yaml(path.with_name("cc.yaml"))


def test_read_file_returns_the_path_of_a_file(write):
    path = write("x.csv", "")
    assert read_file(str(path)) == path


# ---- hashes


def test_the_fingerprint_depends_on_values_and_not_on_how_they_were_given(write):
    by_file = load(Outer, write("c.yaml", "inner: {size: 64}\nrun: r\n"))
    by_command_line = load(Outer, None, ["run=r", "inner.size=64"])
    assert fingerprint(by_file) == fingerprint(by_command_line)
    assert fingerprint(by_file) != fingerprint(load(Outer, None, ["run=r", "inner.size=65"]))


def test_the_fingerprint_is_the_same_in_another_process_with_another_hash_seed():
    program = (
        "from dermfm.config import short_hash; print(short_hash({'b': {'y', 'x'} == {'x', 'y'}, 'a': [1.5, None]}))"
    )
    environment = {"PYTHONHASHSEED": "77"}
    root = Path(__file__).parents[2]
    found = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment, cwd=root)
    assert found.strip() == short_hash({"a": [1.5, None], "b": True})


def test_short_hash_is_the_start_of_the_sha256_of_canonical_json():
    import hashlib

    assert canonical_json(["HAM10000", "ISIC_0024306"]) == '["HAM10000","ISIC_0024306"]'
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'
    expected = hashlib.sha256(b'["HAM10000","ISIC_0024306"]').hexdigest()[:16]
    assert short_hash(["HAM10000", "ISIC_0024306"]) == expected
