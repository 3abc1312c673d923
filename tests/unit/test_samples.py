"""Decoding, augmentation, the choice of a note and collation depend on the given generator alone."""

from __future__ import annotations

import colorsys
import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

from dermfm.batch_memory import KEPT, _waiting, take
from dermfm.concepts import CONCEPTS
from dermfm.config import InputError
from dermfm.images import AugmentConfig, colour_map, decode_image, gaussian_blur, hue_rotation
from dermfm.samples import Collate, SampleFn, balanced_weights, check_strategies, choose_note

OFF = AugmentConfig(
    crop_area_min=1, crop_aspect=1, flip=False, rotate90=False, brightness=0, contrast=0, saturation=0, hue=0,
    white_balance=0, blur=0,
)  # fmt: skip


class ByteTokenizer:
    pad_token_id = 0

    def __call__(self, texts, truncation, max_length, padding):
        return {"input_ids": [[1, *text.encode()][:max_length] for text in texts]}


def smooth_image(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}), **options)
    return data.getvalue()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("width", "height"), [(600, 450), (450, 600), (224, 224), (100, 80), (1200, 300)])
def test_without_augmentation_the_centre_square_is_that_of_pil(width, height):
    image = smooth_image(width, height)
    found = decode_image(encode(image), 96).transpose(1, 2, 0)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    expected = image.crop((left, top, left + side, top + side)).resize((96, 96), Image.Resampling.BICUBIC)
    assert found.shape == (96, 96, 3)
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).mean() < 2


def test_png_and_grey_jpeg_are_decoded_to_three_channels():
    assert decode_image(encode(smooth_image(60, 40), "PNG"), 32).shape == (3, 32, 32)
    grey = decode_image(encode(smooth_image(60, 40).convert("L")), 32)
    assert (grey[0] == grey[1]).all()


def test_augmentation_that_is_switched_off_changes_nothing():
    data = encode(smooth_image(64, 64))
    assert (decode_image(data, 64, rng(), OFF) == decode_image(data, 64)).all()


def test_pixels_are_a_function_of_the_generator():
    data = encode(smooth_image(90, 70))
    one, same, other = (decode_image(data, 48, rng(seed), AugmentConfig()) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_the_number_of_draws_does_not_depend_on_what_is_switched_on():
    data, after = encode(smooth_image(64, 64)), []
    for config in (OFF, AugmentConfig(), AugmentConfig(blur=1.0)):
        generator = rng(3)
        decode_image(data, 32, generator, config)
        after.append(generator.random())
    assert len(set(after)) == 1


def test_flips_and_turns_give_all_eight_orientations_of_a_square():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).resize((32, 32), Image.Resampling.NEAREST)
    data = encode(image.convert("RGB"), "PNG")
    config = AugmentConfig(**{**vars(OFF), "flip": True, "rotate90": True})
    seen = {decode_image(data, 32, rng(seed), config).tobytes() for seed in range(200)}
    assert len(seen) == 8


def test_crops_keep_to_their_range_of_area():
    # horizontal and vertical position are the two channels, so the box can be read from the pixels
    ramp = np.zeros((200, 300, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 300)[None], np.linspace(0, 255, 200)[:, None]
    data = encode(Image.fromarray(ramp), "PNG")
    config = AugmentConfig(**{**vars(OFF), "crop_area_min": 0.3, "crop_area_max": 0.6, "crop_aspect": 1.5})
    areas = []
    for seed in range(60):
        pixels = decode_image(data, 64, rng(seed), config).astype(float)
        areas.append((np.ptp(pixels[0]) / 255) * (np.ptp(pixels[1]) / 255))
    assert min(areas) > 0.28
    assert max(areas) < 0.62
    assert max(areas) - min(areas) > 0.2


def test_gaussian_blur_is_that_of_torchvision():
    values = torch.rand(3, 40, 50) * 255
    ours = gaussian_blur(values, 1.3)[:, 6:-6, 6:-6]  # torchvision reflects at borders, we replicate
    theirs = tvf.gaussian_blur(values, kernel_size=[9, 9], sigma=[1.3, 1.3])[:, 6:-6, 6:-6]
    assert (ours - theirs).abs().max() < 0.01


@pytest.mark.parametrize(
    ("name", "place", "theirs"),
    [
        ("brightness", 3, tvf.adjust_brightness),
        ("contrast", 4, tvf.adjust_contrast),
        ("saturation", 5, tvf.adjust_saturation),
    ],
)
def test_colour_changes_are_those_of_torchvision(name, place, theirs):
    values = torch.rand(3, 20, 20) * 0.4 + 0.3
    draws = np.full(7, 0.5)
    draws[place] = 1.0
    config = AugmentConfig(**{**vars(OFF), name: 0.3})
    grey = float(tvf.rgb_to_grayscale(values).mean())
    matrix, offset = colour_map(config, draws, grey)
    ours = torch.einsum("ij,jhw->ihw", torch.from_numpy(matrix), values) + torch.from_numpy(offset)[:, None, None]
    assert (ours - theirs(values, 1.3)).abs().max() < 1e-3


def test_a_turn_of_the_hue_keeps_luma_and_grey_and_turns_red_towards_yellow_or_back():
    turn = hue_rotation(2 * np.pi * 0.05)
    assert turn @ np.ones(3) == pytest.approx(np.ones(3), abs=1e-3)
    luma = np.asarray([0.299, 0.587, 0.114])
    assert luma @ turn == pytest.approx(luma, abs=1e-3)
    hue = colorsys.rgb_to_hsv(*np.clip(turn @ [0.8, 0.4, 0.4], 0, 1))[0]
    assert min(hue, 1 - hue) == pytest.approx(0.05, abs=0.03)


def test_broken_images_raise_what_the_loader_counts():
    data = encode(smooth_image(200, 200))
    for broken in (b"", b"no image", data[:300], data[: len(data) // 2]):
        with pytest.raises((ValueError, OSError)):
            decode_image(broken, 32)


NOTES = [
    {"strategy": "open", "text": "o1"},
    {"strategy": "open", "text": "o2"},
    {"strategy": "template", "text": "t"},
    {"strategy": "abcd", "text": "a"},
]


def test_strategies_are_chosen_by_weight_and_their_notes_equally():
    generator = rng(1)
    counts = Counter(choose_note(NOTES, {"open": 3, "template": 1}, generator) for _ in range(8000))
    assert counts["t"] / 8000 == pytest.approx(0.25, abs=0.02)
    assert counts["o1"] / 8000 == pytest.approx(0.375, abs=0.02)
    assert set(counts) == {"t", "o1", "o2"}


def test_a_record_without_a_note_of_the_wanted_strategies_has_an_empty_text():
    assert choose_note(NOTES, {"narrative": 1, "open": 0}, rng()) == ""
    assert choose_note([], {"open": 1}, rng()) == ""
    assert choose_note(NOTES, {}, rng()) == ""


def test_weights_of_absent_strategies_go_to_the_present_ones():
    texts = {choose_note(NOTES, {"narrative": 5, "abcd": 1}, rng(seed)) for seed in range(50)}
    assert texts == {"a"}


def test_an_unknown_strategy_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'template'"):
        check_strategies({"tempalte": 1}, ["template", "open"])
    with pytest.raises(InputError, match="no notes at all"):
        check_strategies({"open": 1}, [])
    check_strategies({"other": 0}, ["open"])


def packed(number: int, **fields) -> dict[str, bytes]:
    values = {"record_id": f"r{number}", "group_id": "g", "label": 6, "notes": NOTES} | fields
    return {
        "__key__": f"r{number}".encode(),
        "jpg": encode(smooth_image(50, 40)),
        "json": json.dumps(values).encode(),
    }


def test_a_sample_becomes_an_item_with_its_fields():
    item = SampleFn(32, {"abcd": 1.0})(packed(1), rng())
    assert (item.text, item.label, item.record_id, item.pixels.shape) == ("a", 6, "r1", (3, 32, 32))
    assert 0 <= item.group < 2**63
    assert SampleFn(32, {})(packed(1, label=None), rng()).label == -1


def test_samples_of_one_group_share_the_group_hash_and_others_do_not():
    fn = SampleFn(16, {})
    groups = [fn(packed(i, group_id=g), rng()).group for i, g in enumerate(["a", "a", "b"])]
    assert groups[0] == groups[1] != groups[2]


def test_a_batch_is_padded_after_the_note_and_masks_what_is_bad():
    fn = pickle.loads(pickle.dumps(SampleFn(16, {"template": 1.0})))
    collate = pickle.loads(pickle.dumps(Collate(ByteTokenizer(), max_tokens=5, image_size=16)))
    items = [fn(packed(1), rng()), None, fn(packed(2, notes=[{"strategy": "template", "text": "long note"}]), rng())]
    batch = collate(items, np.asarray([40, 41, 42]))
    assert batch.tokens.tolist() == [
        [1, ord("t"), 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, *b"long", 0, 0, 0],
    ]
    assert batch.lengths.tolist() == [2, 1, 5]
    assert batch.weight.tolist() == [1, 0, 1]
    assert batch.labels.tolist() == [6, -1, 6]
    assert batch.indices.tolist() == [40, 41, 42]
    assert batch.record_ids == ["r1", "", "r2"]
    assert batch.pixels.shape == (3, 3, 16, 16)
    assert batch.pixels.dtype == torch.uint8
    assert batch.group[1] < 0
    assert batch.text[1] < 0
    assert len({int(t) for t in batch.text}) == 3


def test_a_batch_of_bad_samples_alone_still_has_its_shapes():
    batch = Collate(ByteTokenizer(), 5, 16)([None, None], np.asarray([0, 1])).to("cpu")
    assert batch.pixels.shape == (2, 3, 16, 16)
    assert batch.weight.sum() == 0
    assert len(batch) == 2


def test_an_empty_note_has_the_tokenizers_empty_encoding():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "nevus": 4}, "[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", padding_side="left")
    items = [
        SampleFn(16, {"open": 1.0})(packed(1, notes=n), rng()) for n in ([], [{"strategy": "open", "text": "nevus"}])
    ]
    batch = Collate(tokenizer, 4, 16)(items, np.asarray([0, 1]))
    assert batch.lengths.tolist() == [2, 3]
    assert not batch.concepts.any()
    named = Collate(tokenizer, 4, 16, concepts=True)(items, np.asarray([0, 1])).concepts
    assert [[CONCEPTS[i] for i in row.nonzero()[:, 0]] for row in named] == [[], ["nevus"]]
    assert batch.tokens[:, :3].tolist() == [[2, 3, 0], [2, 4, 3]]


def test_balanced_weights_make_all_classes_equally_frequent():
    labels = [0] * 90 + [1] * 9 + [None]
    weights = balanced_weights(labels)
    assert weights.sum() == pytest.approx(100)
    assert weights[:90].sum() == pytest.approx(weights[90:99].sum()) == pytest.approx(weights[99:].sum())
    assert balanced_weights(labels, power=0) == pytest.approx(np.ones(100))


@pytest.mark.parametrize(("name", "value"), [("crop_area_min", 0), ("hue", 0.7), ("crop_aspect", 0.5), ("blur", 2)])
def test_impossible_settings_name_key_and_range(name, value):
    with pytest.raises(ValueError, match=f"{name}: .* it must be between"):
        AugmentConfig(**{name: value})


def test_real_images_decode_to_what_pil_shows(shared_data):
    for path in sorted((shared_data / "images" / "PAD_UFES_20").glob("*.jpg"))[:10]:
        found = decode_image(path.read_bytes(), 112).transpose(1, 2, 0).astype(int)
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            expected = np.asarray(square.resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(found - expected).mean() < 3, path


def test_a_mix_draws_its_strategies_equally_however_many_notes_each_has():
    held = [{"strategy": "abcd", "text": f"a{k}"} for k in range(9)] + [{"strategy": "characteristics", "text": "c"}]
    held.append({"strategy": "template", "text": "t"})
    generator = np.random.default_rng(0)
    counts = Counter(choose_note(held, {"meta": 1}, generator)[0] for _ in range(4000))
    assert set(counts) == {"a", "c"}
    assert counts["a"] == pytest.approx(2000, abs=130)
    counts = Counter(choose_note(held, {"all": 2, "template": 1}, generator)[0] for _ in range(4500))
    assert counts["t"] == pytest.approx(2500, abs=150)  # 2/3 of its own from the mix, and 1 of 3 by itself
    assert counts["c"] == pytest.approx(1000, abs=130)


def test_whole_mixes_what_models_wrote_and_nothing_else():
    held = [{"strategy": s, "text": s} for s in ("label", "measured", "narrative", "open", "shuffled", "template")]
    generator = np.random.default_rng(1)
    assert {choose_note(held, {"whole": 1}, generator) for _ in range(60)} == {"narrative", "open"}
    assert {choose_note(held, {"whole_all": 1}, generator) for _ in range(90)} == {"narrative", "open", "template"}
    assert choose_note(held, {"meta": 1}, generator) == ""


def test_a_mix_without_one_of_its_strategies_is_refused_by_name():
    check_strategies({"meta": 1, "whole": 1}, ["abcd", "characteristics"])
    with pytest.raises(InputError, match="'all' mixes strategies, and the shards hold no note of template"):
        check_strategies({"all": 1}, ["abcd", "characteristics"])
    with pytest.raises(InputError, match="any strategy that a model writes"):
        check_strategies({"whole": 1}, ["template", "label"])


@pytest.mark.parametrize(("width", "height", "size"), [(600, 450, 224), (450, 600, 96), (301, 200, 64), (90, 70, 128)])
def test_pixels_are_bit_for_bit_those_of_torchs_antialiased_bicubic_resize(width, height, size):
    data = encode(smooth_image(width, height), "PNG")
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    with Image.open(io.BytesIO(data)) as image:
        square = np.array(image)[top : top + side, left : left + side]
    planes = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0]
    assert torch.equal(torch.from_numpy(decode_image(data, size)), expected)


@pytest.mark.parametrize("augment", [None, AugmentConfig(blur=0.5)])
def test_a_batch_decoded_in_place_holds_the_pixels_of_its_images_and_grey_for_bad_ones(augment):
    fn, collate = SampleFn(48, {}, augment), Collate(ByteTokenizer(), 5, 48)
    kinds = [("JPEG", 200, 150), ("PNG", 48, 48), ("JPEG", 30, 90), ("JPEG", 120, 120)]
    images = [encode(smooth_image(width, height), kind) for kind, width, height in kinds]
    images[3] = images[3][: len(images[3]) // 2]
    memory = fn.allocate(5)
    memory.fill_(7)
    items = []
    for place, data in enumerate(images):
        work = fn.prepare({**packed(place), "jpg": data}, rng(place))
        try:
            items.append(work(memory[place]))
        except (ValueError, OSError):
            items.append(None)
    batch = collate([*items, None], np.arange(5), memory)
    assert [item is None for item in items] == [False, False, False, True]
    assert batch.pixels.data_ptr() == memory.data_ptr()
    copied = collate([*items, None], np.arange(5))
    assert torch.equal(batch.pixels, copied.pixels)
    assert (batch.pixels[3:] == 128).all()
    for place in range(3):
        alone = fn(packed(place) | {"jpg": images[place]}, rng(place)).pixels
        assert (batch.pixels[place].numpy() == alone).all()
        if augment is None:
            assert (alone == decode_image(images[place], 48)).all()


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    first = take(3, 50, 7)
    first.fill_(1)
    row = first.view(-1)[5:9].numpy()
    address = first.data_ptr()
    del first
    second = take(3, 50, 7)
    second.fill_(2)
    assert row.tolist() == [1, 1, 1, 1]
    assert second.data_ptr() != address
    del row
    assert take(7, 150).data_ptr() == address  # any shape of as many bytes


def test_no_more_memory_is_kept_than_a_loader_has_in_hand():
    many = [take(11, 13) for _ in range(KEPT + 4)]
    many.clear()
    assert len(_waiting[11 * 13]) == KEPT
