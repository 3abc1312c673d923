"""The predictions as one HTML page beside its pictures, in the style of the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from dermfm.export.card import NO_DEVICE
from dermfm.export.model import Exported
from dermfm.predict.answer import Answer
from dermfm.records.vocabulary import CLASS_CODES, MALIGNANCIES
from dermfm.report.gallery import class_name, shorten
from dermfm.report.template import render_template

NUM_SHOWN = 3  # classes shown with their probability


def render(model: Exported, answers: list[Answer], title: str) -> str:
    """The page as text; pictures are read from pictures/ beside it."""
    shown = [_shown(answer, number) for number, answer in enumerate(answers) if not answer.error]
    values = {
        "title": title,
        "warning": NO_DEVICE,
        "name": model.about["name"],
        "step": model.about["step"],
        "manifest": model.about["manifest"],
        "calibration": model.about.get("calibration"),
        "num_notes": len(model.notes.rows),
        "writes_reports": model.writes_reports,
        "codes": CLASS_CODES,
        "answers": shown,
        "counts": [(code, sum(s["best"] == code for s in shown)) for code in CLASS_CODES],
        "bad": [answer for answer in answers if answer.error],
    }
    return render_template("page.html", values, package="dermfm.predict")


def _shown(answer: Answer, number: int) -> dict[str, Any]:
    order = np.argsort(-np.array(answer.probabilities), kind="stable")[:NUM_SHOWN]
    return {
        "image": answer.image,
        "number": f"{number:06d}",
        "best": CLASS_CODES[order[0]],
        "classes": [(class_name(int(c)), answer.probabilities[c]) for c in order],
        "malignancy": list(zip(MALIGNANCIES, answer.malignancy, strict=True)),
        "notes": [{**note, "text": shorten(note["text"]), "title": class_name(note["label"])} for note in answer.notes],
        "report": answer.report,
        "map_text": shorten(answer.map_text),
        "words": answer.words,
    }
