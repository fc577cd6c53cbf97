"""Stage 1's judgement of a JPEG by its structure alone: the same verdicts as of a full decode, on every damage."""

import random
import time

import pytest
from PIL import Image, ImageFile
from raw_tars import draw_view, encode

from pipeline.errors import Rejection
from pipeline.inference.images import check_image, decode_rgb, decode_rgb_small, strip_scans
from pipeline.inference.pixels import decode_pixels

VIEW = draw_view(3, size=(120, 88))
EXIF = Image.Exif()
EXIF[0x0112] = 6
KINDS = {
    "baseline": encode(VIEW),
    "progressive": encode(VIEW, progressive=True),
    "grayscale": encode(VIEW.convert("L")),
    "cmyk": encode(VIEW.convert("CMYK")),
    "progressive cmyk": encode(VIEW.convert("CMYK"), progressive=True),
    "full chroma": encode(VIEW, subsampling=0),
    "restart markers": encode(VIEW, restart_marker_blocks=3),
    "progressive with restart markers": encode(VIEW, restart_marker_blocks=3, progressive=True),
    "rgb": encode(VIEW, keep_rgb=True),
    "tagged": encode(VIEW, exif=EXIF),
    "several pictures": encode(VIEW, "MPO", save_all=True, append_images=[draw_view(2)]),
    "one pixel": encode(VIEW.resize((1, 1))),
}


def judge(check, data):
    """Return why an image is refused, or None."""
    try:
        check(data)
    except Rejection as rejection:
        return rejection.reason, rejection.detail
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused_as_the_full_decode_refuses_it(kind):
    data = KINDS[kind]
    assert len(strip_scans(data)) < len(data)
    verdicts = [judge(check_image, data[:cut]) for cut in range(len(data) + 1)]
    assert verdicts == [judge(decode_rgb, data[:cut]) for cut in range(len(data) + 1)]
    assert verdicts[-1] is None
    assert verdicts.count(None) <= (1 if kind != "several pictures" else len(data))


def damage(generator, data):
    """Return a file with bytes changed, cut out or put in, more often than not such that mean something to a JPEG."""
    raw = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(min(len(raw), generator.choice([40, 200, 700, 10**6])))
        raw[place] = generator.choice([generator.randrange(256), 0xFF, 0xD9, 0x00, 0xD8, 0xDA, 0xC4, 0xD3])
    place = generator.randrange(len(raw))
    kind = generator.randrange(6)
    if kind < 2:
        raw[place : place + 2] = bytes([0xFF, generator.randrange(256)])
    elif kind == 2:
        del raw[place : place + generator.randrange(50)]
    elif kind == 3:
        raw[place:place] = generator.randbytes(generator.randrange(50))
    return bytes(raw)


def test_any_damage_is_judged_as_by_the_full_decode():
    generator = random.Random(1)
    accepted = stripped = 0
    for _ in range(4000):
        data = damage(generator, generator.choice(list(KINDS.values())))
        verdict = judge(check_image, data)
        assert verdict == judge(decode_rgb, data)
        accepted += verdict is None
        stripped += strip_scans(data) is not None
    assert 500 < accepted < 3500  # both verdicts were tried
    assert stripped > 500


def test_a_sound_jpeg_is_not_decoded(monkeypatch):
    fed = []
    load = ImageFile.ImageFile.load

    def note(self):
        fed.append((self.size, len(self.fp.getbuffer())))
        return load(self)

    data = encode(draw_view(1, size=(640, 640)), quality=95)
    monkeypatch.setattr(ImageFile.ImageFile, "load", note)
    check_image(data)
    assert fed[0][0] == (80, 80)
    assert fed[0][1] < 2000 < len(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_decoded_in_full(kind):
    data = encode(VIEW, kind)
    check_image(data)
    assert judge(check_image, data[:-40]) == judge(decode_rgb, data[:-40]) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", b"\xff\xd8\xff\xe0\x00", b"\xff\xd8\x00\x00",
        KINDS["baseline"].replace(b"\xff\xc0", b"\xff\xc9"),  # arithmetic coding
    ],
)  # fmt: skip
def test_what_is_no_plain_jpeg_is_left_to_the_full_decode(data):
    assert strip_scans(data) is None


@pytest.mark.parametrize("filling", [b"\xff" * 2**25, (b"\xff\xe1\xff\xfdExif\0\0" + bytes(65_525)) * 600])
def test_a_jpeg_of_filling_is_rejected_at_once(filling):
    data = KINDS["baseline"]
    with pytest.raises(Rejection, match="without end"):
        decode_rgb(data[:2] + filling + data[2:])


@pytest.mark.parametrize("kind", ["progressive", "scan by scan"])
def test_a_jpeg_of_very_many_scans_is_rejected_by_name_at_once(kind):
    whole = KINDS["progressive"]
    if kind == "scan by scan":  # a baseline JPEG whose only scan claims one of its three channels
        whole = KINDS["baseline"]
        start = whole.rindex(b"\xff\xda\0")
        one = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
        whole = whole[:start] + one + b"\xff\xd9"
    last = whole[whole.rindex(b"\xff\xda\0") : -2]
    data = whole[:-2] + last * 30_000 + whole[-2:]
    started = time.monotonic()
    for check in (check_image, decode_rgb, decode_pixels, lambda data: decode_rgb_small(data, lambda *_: 8)):
        reason, detail = judge(check, data)
        assert reason == "unreadable_image"
        assert detail.endswith("scans, at most 100 are decoded")
    assert time.monotonic() - started < 2
    few = whole[:-2] + last * 20 + whole[-2:]
    assert judge(check_image, few) == judge(decode_rgb, few) == judge(decode_pixels, few) is None
