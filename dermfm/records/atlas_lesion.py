"""The embedded atlas, part 1: what a lesion of each class is like, drawn at random from a seed.

The distributions are class-typical and overlap; a share of the lesions looks like a class that resembles their own.
Everything here is truth: the drawing (atlas_draw.py) shows it, findings and atlas_truth.parquet tell it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dermfm.records.vocabulary import CLASS_CODES

COLOURS = ["white", "red", "light brown", "dark brown", "blue-gray", "black"]
STRUCTURES = ["structureless areas", "pigment network", "branched streaks", "dots", "globules"]
SITES = ["face", "scalp", "neck", "chest", "back", "abdomen", "upper extremity", "lower extremity", "hand", "foot"]
DIAGNOSES = [  # (class text, subclass of the vocabulary) by label
    ("seborrheic keratosis", "seborrheic keratosis & pigmented keratoses"),
    ("dermatofibroma", "dermatofibroma / fibrous lesions"),
    ("nevus", "benign melanocytic nevus"),
    ("vascular lesion", "vascular lesions"),
    ("actinic keratosis", "actinic keratosis"),
    ("basal cell carcinoma", "basal cell carcinoma"),
    ("melanoma", "melanoma"),
    ("squamous cell carcinoma", "squamous cell carcinoma (invasive)"),
]


@dataclass(frozen=True)
class Profile:
    """Distributions of one class. Pairs are (mean, concentration) of a beta distribution on [0, 1] unless said."""

    asymmetry: tuple[float, float]
    sharpness: tuple[float, float]
    irregularity: tuple[float, float]
    colours: tuple[float, ...]  # probability of each of COLOURS
    structures: tuple[float, ...]  # probability of each of STRUCTURES
    radial: float  # 0: patches of colour, 1: rings from the centre outwards
    centre_first: tuple[int, ...]  # order of colours from the centre outwards
    accent: str  # colour of dots, globules and streaks
    diameter_mm: tuple[float, float]  # median and geometric spread
    age: tuple[float, float]  # mean and deviation in years
    sites: tuple[float, ...]  # weight of each of SITES
    resembles: tuple[str, ...]  # classes that it may look like


FACE = (8.0, 2.0, 2.0, 1.0, 2.0, 0.4, 1.0, 0.8, 1.0, 0.2)
TRUNK = (1.0, 0.4, 0.8, 2.0, 4.0, 2.0, 2.0, 2.0, 0.3, 0.4)
LIMBS = (0.3, 0.2, 0.2, 0.6, 1.0, 0.6, 2.5, 4.0, 0.6, 0.6)
EVEN = (1.0, 0.6, 0.8, 1.5, 1.5, 1.5, 1.5, 1.5, 0.8, 0.6)

# Typical appearance after the dermoscopy literature (for example Argenziano et al. 2003, J Am Acad Dermatol 48:679),
# simplified to the closed options of the notes.
PROFILES: dict[str, Profile] = {
    "SK": Profile((0.3, 9), (0.82, 12), (0.35, 8), (0.15, 0.03, 0.9, 0.7, 0.04, 0.08), (0.15, 0.06, 0.03, 0.88, 0.45),
                  0.2, (2, 3, 0, 5, 4, 1), "white", (9.5, 1.3), (64, 11), EVEN, ("MEL", "NEV", "BCC")),
    "DF": Profile((0.2, 9), (0.42, 9), (0.18, 9), (0.93, 0.15, 0.95, 0.12, 0.01, 0.01), (0.35, 0.75, 0.02, 0.08, 0.06),
                  0.92, (0, 1, 2, 3, 4, 5), "light brown", (6.5, 1.22), (45, 13), LIMBS, ("NEV", "SCC")),
    "NEV": Profile((0.18, 9), (0.68, 10), (0.18, 9), (0.01, 0.04, 0.85, 0.88, 0.03, 0.06), (0.2, 0.78, 0.03, 0.2, 0.4),
                   0.65, (5, 3, 4, 1, 2, 0), "dark brown", (5.8, 1.3), (38, 15), TRUNK, ("MEL", "DF", "SK")),
    "VASC": Profile((0.22, 9), (0.8, 12), (0.18, 9), (0.02, 0.99, 0.01, 0.02, 0.5, 0.1), (0.25, 0.01, 0.02, 0.06, 0.88),
                    0.3, (4, 5, 1, 3, 2, 0), "red", (5.5, 1.35), (48, 17), EVEN, ("BCC", "NEV")),
    "AK": Profile((0.45, 9), (0.2, 10), (0.4, 9), (0.25, 0.9, 0.75, 0.04, 0.01, 0.01), (0.75, 0.06, 0.05, 0.55, 0.03),
                  0.15, (1, 2, 0, 3, 4, 5), "white", (9.0, 1.3), (70, 9), FACE, ("SCC", "BCC", "SK")),
    "BCC": Profile((0.42, 9), (0.55, 9), (0.32, 9), (0.2, 0.95, 0.06, 0.06, 0.65, 0.06), (0.5, 0.01, 0.85, 0.12, 0.35),
                   0.2, (1, 4, 0, 2, 3, 5), "blue-gray", (8.5, 1.35), (68, 11), FACE, ("SCC", "VASC", "AK")),
    "MEL": Profile((0.66, 9), (0.38, 8), (0.62, 9), (0.12, 0.12, 0.5, 0.92, 0.6, 0.82), (0.4, 0.45, 0.5, 0.45, 0.35),
                   0.12, (5, 3, 4, 2, 1, 0), "black", (10.0, 1.3), (60, 14), TRUNK, ("NEV", "SK", "BCC")),
    "SCC": Profile((0.5, 9), (0.5, 9), (0.52, 9), (0.95, 0.92, 0.06, 0.12, 0.01, 0.03), (0.65, 0.01, 0.1, 0.5, 0.05),
                   0.75, (0, 1, 3, 2, 5, 4), "red", (11.0, 1.3), (72, 10), FACE, ("AK", "BCC", "DF")),
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """One half of the atlas: another clinic with another camera, distance and population."""

    dataset: str
    prefix: str
    modality: str
    number: int  # part of the seed
    prevalence: tuple[float, ...]  # by label
    field_mm: tuple[float, float]  # width of the frame, range
    ita: tuple[float, float]  # skin tone: mean and deviation of the individual typology angle in degrees
    hairs: float  # mean number of hairs
    licence: str = "Apache-2.0 (drawn)"


DERMO = Domain("Atlas_dermo", "AD", "dermoscopic", 0, (0.13, 0.08, 0.23, 0.07, 0.1, 0.14, 0.16, 0.09),
               (8.5, 12.0), (44, 11), 1.2)  # fmt: skip
CLINIC = Domain("Atlas_clinic", "AC", "clinical", 1, (0.16, 0.05, 0.19, 0.06, 0.16, 0.17, 0.11, 0.1),
                (13.0, 20.0), (22, 20), 3.5)  # fmt: skip
DOMAINS = {domain.dataset: domain for domain in (DERMO, CLINIC)}


@dataclass(frozen=True)
class Lesion:
    """Everything known about one lesion before it is drawn. Unit values lie in [0, 1]."""

    domain: str
    number: int
    label: int
    looks_like: int
    num_images: int
    asymmetry: float
    sharpness: float
    sharpness_varies: float
    irregularity: float
    elongation: float
    colours: tuple[str, ...]  # from the first region to the last
    shares: tuple[float, ...]
    radial: float
    structures: tuple[str, ...]
    accent: str
    diameter_mm: float
    ita: float
    age: int
    sex: str
    site: str
    seed: tuple[int, ...] = field(repr=False)

    @property
    def lesion_id(self) -> str:
        """Identity within the atlas."""
        return f"{DOMAINS[self.domain].prefix}_{self.number:05d}"


def draw_lesion(seed: int, domain: Domain, number: int, second_image: float, confusion: float) -> Lesion:
    """Lesion `number` of a domain: a pure function of its arguments."""
    entropy = (seed, domain.number, number)
    rng = np.random.default_rng(entropy)
    label = int(rng.choice(len(CLASS_CODES), p=np.array(domain.prevalence) / sum(domain.prevalence)))
    own = PROFILES[CLASS_CODES[label]]
    looks = CLASS_CODES[label] if rng.random() >= confusion else str(rng.choice(own.resembles))
    look = PROFILES[looks]
    colours, shares = _colours(rng, look)
    return Lesion(
        domain=domain.dataset,
        number=number,
        label=label,
        looks_like=CLASS_CODES.index(looks),
        num_images=2 if rng.random() < second_image else 1,
        asymmetry=_unit(rng, look.asymmetry),
        sharpness=_unit(rng, look.sharpness),
        sharpness_varies=float(rng.beta(1.2, 3.0)),
        irregularity=_unit(rng, look.irregularity),
        elongation=float(rng.uniform(0.0, 0.22)),
        colours=colours,
        shares=shares,
        radial=float(np.clip(look.radial + rng.normal(0, 0.15), 0, 1)),
        structures=_structures(rng, look),
        accent=look.accent,
        diameter_mm=float(np.clip(look.diameter_mm[0] * look.diameter_mm[1] ** rng.normal(), 2.5, 16.0)),
        ita=float(np.clip(rng.normal(*domain.ita), -35, 68)),
        age=int(np.clip(rng.normal(*own.age), 5, 95) / 5) * 5,
        sex=str(rng.choice(["female", "male"])),
        site=str(rng.choice(SITES, p=np.array(own.sites) / sum(own.sites))),
        seed=entropy,
    )


def _unit(rng: np.random.Generator, mean_concentration: tuple[float, float]) -> float:
    mean, concentration = mean_concentration
    return float(rng.beta(mean * concentration, (1 - mean) * concentration))


def _colours(rng: np.random.Generator, look: Profile) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """One to four colours in drawing order, with shares of at least 0.1."""
    probability = np.array(look.colours)
    present = np.flatnonzero(rng.random(len(COLOURS)) < probability)
    if len(present) == 0:
        present = np.array([int(probability.argmax())])
    if len(present) > 4:
        present = rng.choice(present, 4, replace=False, p=probability[present] / probability[present].sum())
    order = [i for i in look.centre_first if i in present]
    weights = rng.dirichlet(0.5 + 4.0 * probability[order])
    shares = 0.1 + (1 - 0.1 * len(order)) * weights
    return tuple(COLOURS[i] for i in order), tuple(float(s) for s in shares)


def _structures(rng: np.random.Generator, look: Profile) -> tuple[str, ...]:
    probability = np.array(look.structures)
    present = np.flatnonzero(rng.random(len(STRUCTURES)) < probability)
    if len(present) == 0:
        present = np.array([int(probability.argmax())])
    return tuple(STRUCTURES[i] for i in present)
