"""Means over the symmetric views of an image, against numpy's turns and flips and a plain mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dermfm.config import from_dict
from dermfm.evaluate.settings import EvaluateConfig
from dermfm.evaluate.views import VIEWS, over_views, symmetric


def turned(image):
    """All eight symmetries of [3, S, S] by numpy."""
    return [np.rot90(side, k, (1, 2)) for side in (image, image[:, :, ::-1]) for k in range(4)]


def test_eight_views_are_the_eight_symmetries_of_the_square_and_fewer_are_the_first_of_them():
    pixels = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4)
    views = [view[0].numpy() for view in symmetric(pixels, 8)]
    assert {v.tobytes() for v in views} == {np.ascontiguousarray(t).tobytes() for t in turned(pixels[0].numpy())}
    assert len({v.tobytes() for v in views}) == 8
    for number in VIEWS:
        assert [v[0].numpy().tobytes() for v in symmetric(pixels, number)] == [v.tobytes() for v in views[:number]]
    assert np.array_equal(views[0], pixels[0].numpy())


@pytest.mark.parametrize("number", VIEWS)
def test_outputs_are_means_of_unit_embeddings_probabilities_and_features(number):
    torch.manual_seed(0)
    weight = torch.randn(3 * 5 * 5, 6)

    def image(pixels):
        out = pixels.flatten(1).float() @ weight
        return {"embedding": out, "logits": out[:, :4], "malignancy_logits": out[:, 4:], "features": out}

    pixels = torch.rand(2, 3, 5, 5)
    found = over_views(image, number)(pixels)
    each = [{n: v.numpy() for n, v in image(view).items()} for view in symmetric(pixels, number)]
    unit = np.mean([e["embedding"] / np.linalg.norm(e["embedding"], axis=1, keepdims=True) for e in each], 0)
    own = found["embedding"].numpy()
    assert own / np.linalg.norm(own, axis=1, keepdims=True) == pytest.approx(
        unit / np.linalg.norm(unit, axis=1, keepdims=True), abs=1e-6
    )
    assert found["features"].numpy() == pytest.approx(np.mean([e["features"] for e in each], 0), abs=1e-5)
    for name in ("logits", "malignancy_logits"):
        powers = [np.exp(e[name].astype(float)) for e in each]
        expected = np.mean([p / p.sum(1, keepdims=True) for p in powers], 0)
        assert found[name].softmax(-1).numpy() == pytest.approx(expected, abs=1e-6)


def test_another_number_of_views_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"views: '3' is not valid.*1, 2, 4, 8"):
        from_dict(EvaluateConfig, {"run": "runs/x", "views": 3}, "evaluate")
