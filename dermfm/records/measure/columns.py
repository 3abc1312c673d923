"""The columns `measured_*` of records.parquet: names and types, without the libraries that measure."""

from __future__ import annotations

import pyarrow as pa

# The reference study's six words, the order of the share columns.
COLOURS = ("white", "red", "light brown", "dark brown", "blue-gray", "black")
SHARE_COLUMNS = tuple(f"measured_share_{name.replace(' ', '_').replace('-', '_')}" for name in COLOURS)
SCHEMA = pa.schema(
    [
        ("measured_mask_confidence", pa.float64()),
        ("measured_size", pa.float64()),
        ("measured_asymmetry", pa.float64()),
        ("measured_asymmetry_word", pa.string()),
        ("measured_asymmetry_confidence", pa.float64()),
        ("measured_border_sharpness", pa.float64()),
        ("measured_border_irregularity", pa.float64()),
        ("measured_border_word", pa.string()),
        ("measured_border_confidence", pa.float64()),
        ("measured_colours", pa.list_(pa.string())),
        *((name, pa.float64()) for name in SHARE_COLUMNS),
        ("measured_colours_confidence", pa.float64()),
        ("measured_dots", pa.int64()),
        ("measured_globules", pa.int64()),
        ("measured_texture", pa.float64()),
        ("measured_structureless", pa.float64()),
        ("measured_structure_confidence", pa.float64()),
        ("measured_skin_ita", pa.float64()),
        ("measured_skin_tone", pa.string()),
        ("measured_fitzpatrick", pa.int64()),
        ("measured_skin_confidence", pa.float64()),
    ]
)
