"""The study's configuration, and the cells that follow from it: strategies × engines × objectives × seeds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermfm.config import REQUIRED, InputError, check_choice, check_range, check_share, key, nearest, to_dict
from dermfm.evaluate.job import EvaluateConfig
from dermfm.evaluate.shift import ProtocolConfig
from dermfm.model.dermfm import ModelConfig
from dermfm.notes import controls as control_notes
from dermfm.notes.engines.protocol import EngineConfig
from dermfm.notes.plan import NotesConfig
from dermfm.notes.strategies import Strategy, find_strategies
from dermfm.objectives import OBJECTIVES, ObjectiveConfig, check_objectives
from dermfm.optimizer import OptimizerConfig
from dermfm.pack_plan import ShardsConfig
from dermfm.plan import TrainConfig
from dermfm.records.build import RecordsConfig
from dermfm.samples import AugmentConfig

IMAGE_ONLY, LABEL, TEMPLATE = "image-only", "label", "template"
CONTROLS = (IMAGE_ONLY, LABEL, control_notes.SHUFFLED, control_notes.WITHIN_CLASS, TEMPLATE)
REFERENCES = (IMAGE_ONLY, LABEL, control_notes.WITHIN_CLASS)  # what every strategy is compared with
# Controls that no claim is made for; `template` is compared like any strategy.
UNTESTED = (IMAGE_ONLY, LABEL, *control_notes.CONTROLS)
BEST = "best"
NAME = re.compile(r"[\w.-]+")
NO_ENGINE, FIXED_ENGINE = "none", "template"
ENDPOINT = "f1_macro"  # of image classification, mean over the external data sets
PROBE, NO_OBJECTIVE = "frozen-probe", "none"  # the probe stands beside the cells, without an objective


@dataclass(kw_only=True)
class StudyEngine:
    """A language model that writes the prompted strategies, under a name of its own."""

    name: str = key(REQUIRED, "name in cells and tables")
    engine: EngineConfig = key(EngineConfig, "the model")


@dataclass(kw_only=True)
class StudyObjective:
    """A set of training objectives, under a name of its own."""

    name: str = key(REQUIRED, "name in cells and tables")
    weights: ObjectiveConfig = key(ObjectiveConfig, "weights of the objectives")

    def of(self, strategy: str, text_weight: float = 1.0) -> ObjectiveConfig:
        """The objectives of a cell: those that read notes times `text_weight`; without them for image-only."""
        factor = 0.0 if strategy == IMAGE_ONLY else text_weight
        reading = [name for name in self.weights.active if "notes" in OBJECTIVES[name].needs]
        return dataclasses.replace(self.weights, **{n: getattr(self.weights, n) * factor for n in reading})


@dataclass(kw_only=True)
class SearchConfig:
    """What is tried for every cell; the setting with the best macro F1 on the internal validation split counts."""

    lr: list[float] = key([1e-3, 3e-3], "learning rates")
    text_weight: list[float] = key([0.3, 1.0], "factors on all objectives that read notes")
    image_only_lr: list[float] = key(
        [5e-4, 1e-3, 2e-3, 4e-3], "learning rates of image-only, as many as the others have settings in all"
    )

    def __post_init__(self) -> None:
        if not self.lr or not self.text_weight:
            raise ValueError("search: lr and text_weight need at least one value each")
        for name in ("lr", "text_weight", "image_only_lr"):
            for value in getattr(self, name):
                check_range(f"search.{name}", value, 1e-8, 100)
        if len(self.image_only_lr) != len(self.lr) * len(self.text_weight):
            raise ValueError(
                f"search.image_only_lr: {len(self.image_only_lr)} values, but every other cell tries "
                f"{len(self.lr) * len(self.text_weight)} settings (lr × text_weight); the search must be the same size"
            )

    def settings(self, strategy: str) -> list[tuple[float, float]]:
        """(learning rate, factor on the objectives that read notes) of every try."""
        if strategy == IMAGE_ONLY:
            return [(lr, 0.0) for lr in self.image_only_lr]
        return [(lr, weight) for lr in self.lr for weight in self.text_weight]


@dataclass(kw_only=True)
class TokensConfig:
    """Tier 1: frozen towers, whose tokens are computed once; what lies behind them is trained for every cell."""

    model: ModelConfig = key(ModelConfig, "towers (frozen), fusion, heads, shared space")
    adapter: int = key(256, "channels of the trained layers between the frozen image tokens and all the rest")
    views: int = key(4, "views of a training image: the plain one and random ones, fixed once and for all cells")
    eval_views: int = key(1, "views of a scored image whose probabilities are averaged, the plain one first")
    augment: AugmentConfig = key(AugmentConfig, "random changes of the views")
    contrastive_batch: int = key(64, "pairs in one softmax and one optimizer step")
    epochs: float = key(12.0, "passes over the training records, the same for every cell")
    balance: float = key(0.5, "0: classes as often as they are; 1: all classes equally often; between: in between")
    optimizer: OptimizerConfig = key(OptimizerConfig, "AdamW and its schedule; lr and image_lr come from the search")
    clip: float = key(1.0, "largest norm of the gradient")
    search: SearchConfig = key(SearchConfig, "what is tried for every cell")
    batch_size: int = key(32, "images in one forward pass of the frozen tower")

    def __post_init__(self) -> None:
        check_range("tokens.adapter", self.adapter, 4)
        for name in ("views", "eval_views", "batch_size"):
            check_range(f"tokens.{name}", getattr(self, name), 1, 4096)
        check_range("tokens.contrastive_batch", self.contrastive_batch, 2)
        check_range("tokens.epochs", self.epochs, 1e-3)
        check_range("tokens.balance", self.balance, 0, 1)
        check_range("tokens.clip", self.clip, 1e-6)


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation."""

    tier: int
    strategy: str
    engine: str
    objective: str
    seed: int

    @property
    def id(self) -> str:
        """Name of its file."""
        return f"t{self.tier}-{self.strategy}-{self.engine}-{self.objective}-s{self.seed}"


@dataclass(kw_only=True)
class StudyConfig:
    """`dermfm study`: the comparison of note strategies, with its controls."""

    out: str = key(REQUIRED, "folder of everything that the study makes")
    data: str | None = key(None, "folder of real images with metadata.csv, for the paths of `records`")
    records: RecordsConfig = key(RecordsConfig, "the job records")
    notes: NotesConfig = key(NotesConfig, "the job notes; its strategies and engine are the study's")
    shards: ShardsConfig = key(ShardsConfig, "the job shards; its notes are the study's")
    strategies: list[str] = key(REQUIRED, "note strategies that are compared, beside the controls")
    controls: list[str] = key(list(CONTROLS), "controls; none may be left out")
    of: str = key("narrative", "strategy whose notes the shuffled controls give to other records")
    mixes: dict[str, list[str]] = key({}, "name → strategies of which one note is drawn each time it is read")
    engines: list[StudyEngine] = key([], "models that write the prompted strategies; empty: that of `notes`")
    objectives: list[StudyObjective] = key([], "sets of objectives; empty: one, the default weights")
    seeds: list[int] = key([0, 1, 2, 3, 4], "seeds of initialisation, data order and note choice")
    tier: int = key(1, "1: on tokens of frozen towers; 2: fine-tuned towers, by the job train")
    tier2_strategies: list[str] = key(
        [IMAGE_ONLY, LABEL, control_notes.WITHIN_CLASS, BEST], "what tier 2 trains; best: tier 1's by validation"
    )
    tokens: TokensConfig = key(TokensConfig, "tier 1")
    train: TrainConfig = key(TrainConfig, "tier 2: the job train; run, shards, strategies and seed are the cell's")
    evaluate: EvaluateConfig = key(EvaluateConfig, "tier 2: the job evaluate")
    protocol: ProtocolConfig = key(ProtocolConfig, "roles of the data sets")
    results: str | None = key(
        None,
        "folder in version control that finished cells (without probabilities) and tables are taken from and put in",
    )
    goals: dict[str, float] = key(
        {}, "weighted F1 asked for beforehand of the model that validation chooses: internal, external or a data set"
    )
    other_looks: dict[str, int] = key(
        {}, "times that the external sets were scored beside the finished cells: what for → how often"
    )
    tables: bool = key(False, "only write tables and page anew, from the finished cells alone; needs no images")
    only: list[str] = key([], "do the cells, and write the notes, of these strategies only for now; empty: all")
    cells: list[int] = key([0, 1], "[k, n]: do the cells whose number mod n is k, as one of n jobs on the same folder")
    resamples: int = key(2000, "bootstrap resamples of groups for the effects")
    cell_resamples: int = key(200, "bootstrap resamples for the intervals of one cell")
    seed: int = key(0, "seed of the bootstrap and of the shuffled controls")
    device: str = key("auto", "where frozen towers run: auto, cpu or cuda")

    def __post_init__(self) -> None:
        self.engines = self.engines or [StudyEngine(name=Path(self.notes.engine.model).name, engine=self.notes.engine)]
        self.objectives = self.objectives or [StudyObjective(name="standard")]
        check_choice("tier", str(self.tier), ("1", "2"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_range("resamples", self.resamples, 200)
        check_range("cell_resamples", self.cell_resamples, 20)
        _check_cells(self.cells)
        for name, goal in self.goals.items():
            check_range(f"goals.{name}", goal, 0, 1)
        for name, count in self.other_looks.items():
            check_range(f"other_looks.{name}", count, 0)
        for name in CONTROLS:
            if name not in self.controls:
                raise ValueError(
                    f"controls: '{name}' is left out; without it nobody can tell what notes add: put it back"
                )
        for name in self.controls:
            check_choice("controls", name, CONTROLS)
        self._check_names()
        self._check_tiers()

    def _check_names(self) -> None:
        for what, names in (
            ("strategies", [*self.controls, *self.strategies]),
            ("engines", [engine.name for engine in self.engines]),
            ("objectives", [objective.name for objective in self.objectives]),
            ("seeds", list(map(str, self.seeds))),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"{what}: '{twice}' stands there twice, its cells would contradict each other; keep one"
                )
        for name in [*(e.name for e in self.engines), *(o.name for o in self.objectives), *self.mixes]:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"engines, objectives, mixes: '{name}' is not a name; letters, digits, '.', '_', '-' are"
                )
        for what, given in (
            ("strategies", self.strategies),
            ("seeds", self.seeds),
            ("tier2_strategies", self.tier2_strategies),
        ):
            if not given:
                raise ValueError(f"{what}: at least one is needed")
        for what, name, names in (
            ("objectives", NO_OBJECTIVE, [objective.name for objective in self.objectives]),
            ("strategies", PROBE, self.strategies),
        ):
            if name in names:
                raise ValueError(f"{what}: '{name}' is the name of the frozen probe, which stands beside the cells")
        for name, members in self.mixes.items():
            if len(set(members)) < 2 or set(members) & {IMAGE_ONLY, *control_notes.CONTROLS, *self.mixes}:
                raise ValueError(
                    f"mixes.{name}: {members} is not valid; give two or more strategies with notes of their own"
                )
        for seed in self.seeds:
            check_range("seeds", seed, 0)
        for name in self.only:
            check_choice("only", name, (*self.controls, *self.strategies))
        for name in self.tier2_strategies:
            check_choice("tier2_strategies", name, (*self.controls, *self.strategies, BEST))
        sources = [n for n in (LABEL, TEMPLATE, *self.strategies) if n not in self.mixes]
        if self.of not in sources:
            raise ValueError(
                f"of: '{self.of}' is not valid; the shuffled controls take the notes of one of {', '.join(sources)}"
            )

    def _check_tiers(self) -> None:
        if self.protocol.endpoint != ENDPOINT:
            raise ValueError(
                f"protocol.endpoint: '{self.protocol.endpoint}', but the endpoint of a study, named before, is "
                f"'{ENDPOINT}'; leave it out"
            )
        for objective in self.objectives:
            weights = objective.weights
            check_objectives(weights, self.tokens.model, self.tokens.contrastive_batch)
            if not weights.classify_image:
                raise ValueError(
                    f"objectives.{objective.name}.classify_image: 0, but the endpoint is image classification"
                )
            if not weights.uses_text:
                raise ValueError(
                    f"objectives.{objective.name}: no objective reads notes, so all its cells would be image-only; "
                    "give contrastive a weight"
                )

    def objective(self, name: str) -> StudyObjective:
        """The set of objectives of this name."""
        return next(objective for objective in self.objectives if objective.name == name)

    def members(self, strategy: str) -> list[str]:
        """The strategies whose notes a cell reads; none for image-only."""
        return [] if strategy == IMAGE_ONLY else self.mixes.get(strategy, [strategy])

    def written(self, only: Sequence[str] = ()) -> list[Strategy]:
        """The strategies whose notes must be written (for `only` these cells, if given), the sources of the shuffled
        ones included; InputError for an unknown one, with the nearest name."""
        asked = only or [*self.controls, *self.strategies]
        names = [n for s in asked for n in control_notes.written(self.members(s))]
        if set(asked) & set(control_notes.CONTROLS):
            names.append(self.of)
        return find_strategies(names, self.notes.prompts)


def all_cells(config: StudyConfig, best: Sequence[str] = ()) -> list[Cell]:
    """The cells of the tier, one seed after the other. `best`: [strategy, engine] of tier 1's best, for tier 2."""
    prompted = {s.name for s in config.written() if s.prompt is not None}
    pairs = list(_pairs(config, prompted, best))
    return [
        Cell(config.tier, strategy, engine, objective.name, seed)
        for seed in config.seeds
        for objective in config.objectives
        for strategy, engine in pairs
    ]


def _pairs(config: StudyConfig, prompted: set[str], best: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(strategy, engine): a strategy that no model writes stands there once."""
    every = [*config.controls, *config.strategies]
    for strategy in every if config.tier == 1 else [s for s in config.tier2_strategies if s != BEST]:
        yield from ((strategy, engine) for engine in engines_of(config, strategy, prompted))
    if config.tier == 2 and BEST in config.tier2_strategies and best and best[0] not in config.tier2_strategies:
        yield best[0], best[1]


def engines_of(config: StudyConfig, strategy: str, prompted: set[str]) -> list[str]:
    """Names of the engines that a strategy is tried with; the shuffled ones have those of their source."""
    if strategy == IMAGE_ONLY:
        return [NO_ENGINE]
    sources = [config.of] if strategy in control_notes.CONTROLS else config.members(strategy)
    return [engine.name for engine in config.engines] if set(sources) & prompted else [FIXED_ENGINE]


def check_engine(config: StudyConfig, name: str) -> StudyEngine:
    """The engine of this name, the first one for what no model writes."""
    found = [engine for engine in config.engines if engine.name == name]
    if not found and name not in (NO_ENGINE, FIXED_ENGINE):
        raise InputError(f"engines: no engine '{name}'; {nearest(name, [e.name for e in config.engines])}")
    return found[0] if found else config.engines[0]


def differences(stored: Any, current: Any, default: Any, prefix: str = "") -> list[str]:
    """Dotted names of what a stored configuration has otherwise. A key that it lacks counts where it is not at its
    default: a version of the program that knows more keys does not make finished cells stale."""
    if isinstance(current, dict) and isinstance(stored, dict):
        default = default if isinstance(default, dict) else {}
        found = [f"{prefix}{name}" for name in stored if name not in current]
        for name, value in current.items():
            if name in stored:
                found += differences(stored[name], value, default.get(name), f"{prefix}{name}.")
            elif value != default.get(name):
                found.append(f"{prefix}{name}")
        return found
    return [] if stored == current else [prefix.rstrip(".")]


def defaults() -> dict[str, Any]:
    """Default values of what a cell's configuration is made of."""
    return {
        "tokens": to_dict(TokensConfig()),
        "objectives": to_dict(ObjectiveConfig()),
        "train": to_dict(TrainConfig(run="", shards="")),
    }


def _check_cells(share: Sequence[int]) -> None:
    try:
        check_share(share)
    except ValueError as error:
        raise ValueError(str(error).replace("share:", "cells:", 1)) from None
