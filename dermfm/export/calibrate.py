"""Temperature scaling of class probabilities (Guo et al. 2017, arXiv 1706.04599), fitted on validation records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

LARGEST = 20.0  # temperatures are sought between 1/this and this
NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """The fitted temperature, the number of records, and log loss and calibration error before and after."""

    temperature: float
    num_records: int
    log_loss: tuple[float, float]
    ece: tuple[float, float]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Calibration | None:
    """The temperature that minimises the log loss of softmax(logits [N, C] / T) on labels [N]; −1 is left out.

    None where no record has a known label.
    """
    known = labels >= 0
    logits, labels = logits[known].astype(np.float64), labels[known]
    if not len(labels):
        return None

    def loss(log_t: float) -> float:
        return float(-log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    bound = float(np.log(LARGEST))
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    errors = [expected_calibration_error(softmax(logits / t, axis=1), labels) for t in (1.0, temperature)]
    return Calibration(temperature, len(labels), (loss(0.0), loss(float(found.x))), (errors[0], errors[1]))


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean over records of |accuracy − confidence| in bins of equal width of the top probability."""
    top, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((top * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(right[bins == b].mean() - top[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))
