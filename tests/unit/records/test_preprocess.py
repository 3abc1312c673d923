"""Preprocessing: every malformed kind has a name, plain images pass through, the same bytes always."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from dermfm.records.parts import Place, Task, read_rows, run_parts
from dermfm.records.preprocess import decode as kinds
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.crop import frame_box
from dermfm.records.preprocess.decode import ImageError, decode
from dermfm.records.preprocess.image import FRAMED, HAIRY, SAME, SMALL, prepare
from dermfm.records.preprocess.job import SCHEMA, preprocess_records, safe_name
from dermfm.records.source import Losses
from dermfm.records.table import Record

LIMIT = 10_000_000
PLAIN = PreprocessConfig(enabled=True, frame=False, size=0)
SKIN = (205, 160, 140)


def picture(size: tuple[int, int] = (96, 64), seed: int = 0) -> Image.Image:
    """Smooth colours over `size` = (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(90, 230, (4, 6, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_undone_as_pillow_does_it(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(), form, exif=exif)
    decoded = decode(data, LIMIT)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert decoded.pixels.shape == expected.shape
    assert decoded.full_size == expected.shape[1::-1]
    assert np.abs(decoded.pixels - expected).mean() < 1
    assert (kinds.ROTATED in decoded.kinds) == (orientation > 1)


def test_exif_is_found_behind_other_segments_and_not_in_their_text() -> None:
    comment = b"\xff\xff\xfe" + (2 + 12).to_bytes(2, "big") + b"Exif\x00\x00 no!! "  # after a fill byte
    plain = saved(picture(), "JPEG")
    assert decode(plain[:2] + comment + plain[2:], LIMIT).kinds == ()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(picture(), "JPEG", exif=exif)
    decoded = decode(turned[:2] + comment + turned[2:], LIMIT)
    assert decoded.kinds == (kinds.ROTATED,)
    assert np.array_equal(decoded.pixels, decode(turned, LIMIT).pixels)


def test_cmyk_jpegs_become_rgb_and_are_counted() -> None:
    image = picture()
    decoded = decode(saved(image.convert("CMYK"), "JPEG", quality=95), LIMIT)
    assert decoded.kinds == (kinds.CMYK,)
    assert np.abs(decoded.pixels - np.asarray(image).astype(int)).mean() < 3


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    _, grey = cv2.imencode(".png", ramp)
    decoded = decode(grey.tobytes(), LIMIT)
    assert decoded.kinds == (kinds.DEEP,)
    assert np.abs(decoded.pixels[..., 1] - ramp / 257.0).max() <= 1
    _, colour = cv2.imencode(".png", np.repeat(ramp[..., None], 3, axis=2))
    assert decode(colour.tobytes(), LIMIT).kinds == (kinds.DEEP,)
    _, tiff = cv2.imencode(".tiff", ramp)
    assert kinds.DEEP in decode(tiff.tobytes(), LIMIT).kinds


def test_palettes_transparency_and_animations_are_converted_and_counted() -> None:
    image = picture()
    palette = image.quantize(64)
    decoded = decode(saved(palette, "PNG"), LIMIT)
    assert decoded.kinds == (kinds.PALETTE,)
    assert np.array_equal(decoded.pixels, np.asarray(palette.convert("RGB")))
    clear = image.convert("RGBA")
    clear.putalpha(Image.new("L", image.size, 0))
    decoded = decode(saved(clear, "PNG"), LIMIT)
    assert decoded.kinds == (kinds.TRANSPARENT,)
    assert decoded.pixels.max() == 0
    frames = [picture(seed=i) for i in range(3)]
    for form in ("GIF", "WEBP"):
        moving = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=40)
        decoded = decode(moving, LIMIT)
        assert kinds.ANIMATED in decoded.kinds
        assert np.abs(decoded.pixels - np.asarray(frames[0]).astype(int)).mean() < 8


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(picture((400, 300)), "JPEG")[:-900], kinds.TRUNCATED),
        (saved(picture((400, 300)), "PNG")[:-900], kinds.TRUNCATED),
        (saved(picture(), "JPEG")[:40], kinds.UNREADABLE),
        (b"", kinds.UNREADABLE),
        (b"not an image at all", kinds.UNREADABLE),
        (saved(picture((4000, 3000)), "JPEG"), kinds.TOO_LARGE),
        (saved(picture((4000, 3000)), "PNG"), kinds.TOO_LARGE),
    ],
    ids=["short jpeg", "short png", "jpeg header only", "empty", "text", "large jpeg", "large png"],
)
def test_what_cannot_be_used_is_refused_under_its_name(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, LIMIT)
    assert caught.value.kind == kind
    assert str(caught.value)


def test_an_image_that_needs_no_change_passes_through_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a.jpg"
    source.parent.mkdir()
    source.write_bytes(saved(picture((96, 64)), "JPEG", quality=81))
    record = Record(dataset="D", source_id="a", path=source, modality="clinical")
    losses = Losses()
    settings = PreprocessConfig(enabled=True, hair=True, size=64)
    (kept,) = preprocess_records([record], settings, tmp_path / "out", Place(1), losses)
    assert kept.path == tmp_path / "out/records/images/D/a.jpg"
    assert kept.path.read_bytes() == source.read_bytes()
    assert losses.count(SAME) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_black_border_and_a_round_view_are_cut_and_a_dark_lesion_is_not() -> None:
    canvas = np.full((120, 160, 3), SKIN, np.uint8)
    assert frame_box(canvas) is None
    framed = canvas.copy()
    framed[:12], framed[:, :20] = 4, 4
    left, top, right, bottom = frame_box(framed) or (0, 0, 0, 0)
    assert (right, bottom) == (160, 120)
    assert 20 <= left <= 23
    assert 12 <= top <= 15
    y, x = np.mgrid[:120, :160]
    view = canvas.copy()
    view[np.hypot(x - 80, y - 60) > 70] = 6
    left, top, right, bottom = frame_box(view) or (0, 0, 0, 0)
    kept = view[top:bottom, left:right].max(axis=2)
    assert (kept < 30).mean() < 0.02
    assert (right - left) * (bottom - top) > 0.45 * 120 * 160
    lesion = canvas.copy()
    lesion[np.hypot(x - 90, y - 70) < 45] = (20, 14, 14)
    assert frame_box(lesion) is None
    assert FRAMED in prepare(saved(Image.fromarray(framed), "PNG"), PreprocessConfig(enabled=True)).kinds


def test_squares_margins_and_sizes_are_as_asked_for() -> None:
    data = saved(picture((200, 120)), "JPEG")

    def size(**settings: object) -> tuple[int, int]:
        result = prepare(data, PreprocessConfig(enabled=True, frame=False, **settings))  # type: ignore[arg-type]
        if result.jpeg is not None:
            assert Image.open(io.BytesIO(result.jpeg)).size == (result.width, result.height)
        return result.width, result.height

    assert size(size=0, square="crop") == (120, 120)
    assert size(size=0, square="pad") == (200, 200)
    assert size(size=0, square="crop", margin=0.05) == (108, 108)
    assert size(size=60, square="crop", margin=0.05) == (60, 60)
    assert size(size=60, square="pad") == (60, 60)
    assert size(size=60) == (100, 60)
    assert size(size=500) == (200, 120)
    assert SMALL in prepare(data, PreprocessConfig(enabled=True, size=500)).kinds


def test_reducing_while_decoding_shows_the_same_picture() -> None:
    data = saved(picture((1600, 1200)), "JPEG", quality=95)
    result = prepare(data, PreprocessConfig(enabled=True, frame=False, square="crop", size=150, quality=95))
    middle = Image.open(io.BytesIO(data)).crop((200, 0, 1400, 1200))
    expected = np.asarray(middle.resize((150, 150), Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels_of(result.jpeg or b"") - expected).mean() < 2


def test_hairs_are_removed_and_dots_stay() -> None:
    canvas = np.full((224, 224, 3), SKIN, np.uint8)
    for x in (50, 130, 190):
        cv2.line(canvas, (x, 10), (x + 20, 215), (40, 30, 28), 2)
    cv2.circle(canvas, (90, 110), 4, (70, 40, 30), -1)
    settings = PreprocessConfig(enabled=True, hair=True, size=0, quality=95)
    result = prepare(saved(Image.fromarray(canvas), "PNG"), settings)
    after = pixels_of(result.jpeg or b"")
    assert HAIRY in result.kinds
    assert after[60, 30:220].min() > 110  # the row crosses all three hairs
    assert after[110, 90].max() < 110


def records_of(folder: Path, count: int) -> list[Record]:
    """Records of `count` images of three kinds of file below `folder`."""
    folder.mkdir(parents=True)
    records = []
    for i in range(count):
        path = folder / f"i{i}.{('jpg', 'png', 'bmp')[i % 3]}"
        picture((70 + i % 7, 64), seed=i).save(path)
        records.append(Record(dataset="D", source_id=f"i{i}", path=path, modality="clinical"))
    return records


def test_a_second_run_does_only_what_is_missing_or_changed(tmp_path: Path) -> None:
    records = records_of(tmp_path / "in", 9)
    sources = [record.path for record in records]
    settings = PreprocessConfig(enabled=True, size=32)

    def run() -> dict[str, int]:
        for record, source in zip(records, sources, strict=True):
            record.path = source
        kept = preprocess_records(records, settings, tmp_path / "out", Place(1), Losses())
        return {record.source_id: record.path.stat().st_mtime_ns for record in kept}

    first = run()
    assert run() == first
    (tmp_path / "out/records/images/D/i4.jpg").unlink()
    picture((80, 80), seed=99).save(sources[5])
    again = run()
    assert {name for name in first if again[name] != first[name]} == {"i4", "i5"}


def test_unusable_images_are_left_out_counted_and_named(tmp_path: Path) -> None:
    records = records_of(tmp_path / "in", 3)
    records[1].path.write_bytes(b"nothing")
    records[2].path.unlink()
    losses = Losses()
    kept = preprocess_records(records, PLAIN, tmp_path / "out", Place(1), losses)
    assert [record.source_id for record in kept] == ["i0"]
    assert losses.count(kinds.UNREADABLE) == 2
    assert any("D/i1: no image format that is known" in line for line in losses.lines())


def test_ids_with_odd_characters_keep_files_of_their_own() -> None:
    assert safe_name("ISIC_0024306") == "ISIC_0024306"
    names = {safe_name(name) for name in ("a/b", "a_b", "a b", "../b", ".hidden")}
    assert len(names) == 5
    assert not any("/" in name or name.startswith(".") for name in names)


def test_rows_of_parts_are_a_mapping_in_which_the_newest_of_a_key_counts(tmp_path: Path) -> None:
    rows = read_rows(tmp_path, SCHEMA.names)
    assert dict(rows) == {}
    for kind in ("old", "new"):
        part = [dict.fromkeys(SCHEMA.names) | {"key": key, "kinds": [kind]} for key in ("a", f"only {kind}")]
        rows.add(pa.Table.from_pylist(part, schema=SCHEMA))
    assert {key: row["kinds"] for key, row in rows.items()} == {"a": ["new"], "only old": ["old"], "only new": ["new"]}
    assert len(rows) == 3
    assert "b" not in rows


def test_a_part_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(tasks: object) -> list[dict[str, object]]:
        calls.append(len(list(tasks)))  # type: ignore[call-overload]
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [dict.fromkeys(SCHEMA.names) | {"key": task.key, "error": "none"} for task in tasks]  # type: ignore[attr-defined]

    tasks = [Task(f"{i}", f"{i}") for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        run_parts(tasks, work, tmp_path, SCHEMA, Place(1), "work")
    assert len(run_parts(tasks, work, tmp_path, SCHEMA, Place(1), "work")) == 100
    assert calls == [64, 36, 36]
