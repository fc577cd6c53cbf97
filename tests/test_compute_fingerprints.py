import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from raw_tars import Entry, draw_view, encode, make_city, make_view, replace_tar, write_tar

from pipeline.files.archive import stream_members
from preprocess_raw_data import process_tar
from preprocess_raw_data.compute_fingerprints import (
    average_cells,
    average_intervals,
    choose_scale,
    compute_fingerprint,
    main,
)

TARS = {1: (3, 2, 1), 2: (4, 4)}


def average_by_strips(image: Image.Image, num_cells: int) -> np.ndarray:
    """The obvious oracle: cut every pixel into `num_cells` strips each way; a cell is then the mean of whole strips."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height, width, _ = pixels.shape
    strips = np.repeat(pixels, num_cells, axis=0)  # (num_cells * H, W, 3): a cell is H strips
    rows = strips.reshape(num_cells, height, width, 3).mean(axis=1, dtype=np.float64)
    strips = np.repeat(rows, num_cells, axis=1)
    return strips.reshape(num_cells, num_cells, width, 3).mean(axis=2)


def draw_scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges, a gradient and noise, the things that a photograph has."""
    generator = np.random.default_rng(seed)
    blocks = Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    sharp = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST), dtype=np.float64)
    smooth = np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    noise = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((0.5 * sharp + 0.5 * smooth + noise).clip(0, 255).astype(np.uint8))


def measure_error(data: bytes, image_size: int = 16) -> float:
    """Return the mean difference from the full decode's exact average, in grey levels."""
    exact = average_by_strips(Image.open(io.BytesIO(data)), image_size)
    return float(np.abs(compute_fingerprint(data, image_size).astype(np.float64) - exact.reshape(-1)).mean())


SIZES = [(640, 640), (448, 448), (449, 331), (137, 251), (143, 1000), (65, 65), (16, 16), (17, 15), (5, 3), (1, 1)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_fingerprint_is_the_exact_area_average_of_a_png(width: int, height: int) -> None:
    assert measure_error(encode(draw_scene(width, height), "PNG")) < 0.5


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("quality", [60, 95])
def test_a_reduced_decode_stays_within_two_grey_levels(width: int, height: int, quality: int) -> None:
    assert measure_error(encode(draw_scene(width, height), quality=quality)) < 1.0


@pytest.mark.parametrize("image_size", [1, 3, 8, 16, 32])
def test_fingerprints_of_other_sizes_are_area_averages_too(image_size: int) -> None:
    assert measure_error(encode(draw_scene(301, 203)), image_size) < 1.0


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("RGB", "WEBP")],
)
def test_every_colour_mode_and_format_is_averaged_as_rgb(mode: str, kind: str) -> None:
    assert measure_error(encode(draw_scene(300, 215).convert(mode), kind)) < 1.0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_progressive_jpeg_with_an_orientation_tag_is_averaged_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = encode(draw_scene(650, 459), progressive=True, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(tagged)))
    expected = compute_fingerprint(encode(upright, "PNG"), 16)
    assert np.abs(expected.astype(int) - compute_fingerprint(tagged, 16)).mean() < 0.4


def test_a_flat_image_has_flat_cells_whatever_its_size() -> None:
    for size in SIZES:
        flat = compute_fingerprint(encode(Image.new("RGB", size, (10, 130, 250)), "PNG"), 16)
        assert (flat.reshape(-1, 3) == np.array([10, 130, 250])).all()


def test_parts_of_an_interval_are_averaged_by_hand() -> None:
    values = np.array([10, 20, 60], dtype=np.uint8)
    assert average_intervals(values, 3.0, 2) == pytest.approx([(10 + 0.5 * 20) / 1.5, (0.5 * 20 + 60) / 1.5])
    assert average_intervals(values, 2.5, 1) == pytest.approx([(10 + 20 + 0.5 * 60) / 2.5])
    assert average_intervals(values, 3.0, 6) == pytest.approx([10, 10, 20, 20, 60, 60])
    assert average_intervals(values[:1], 0.25, 2) == pytest.approx([10, 10])


def test_the_reduced_size_leaves_eight_pixels_a_cell_or_cuts_between_pixels() -> None:
    assert choose_scale(640, 640, 16) == 8  # 5 pixels a cell, but its borders fall between them
    assert choose_scale(448, 448, 16) == 4
    assert choose_scale(1025, 1031, 16) == 8
    assert choose_scale(641, 640, 16) == 4
    assert choose_scale(255, 3000, 16) == 1


def test_an_image_of_extreme_proportions_is_averaged_in_little_memory() -> None:
    long = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8) * 4, 1_000)[None].repeat(2, axis=0)).convert("RGB")
    cells = average_cells(long, (64_000.0, 2.0), 16)
    assert cells[:, :, 0].tolist() == [[16 * cell + 6 for cell in range(16)]] * 16


# ------------------------------------------------------------------------------------------------ the stage


@pytest.fixture
def city(tmp_path: Path, write_config: Callable[..., Path], run_main: Callable[..., Any]) -> Path:
    """Two sound tars after stage 1; returns the configuration."""
    for dataset_id, images in TARS.items():
        write_tar(tmp_path / "raw" / f"{dataset_id:04d}.tar", make_city(dataset_id, images))
    config = write_config(tmp_path)
    assert run_main(process_tar.main, "--config", config).code == 0
    return config


def output_path(config: Path, dataset_id: int = 1) -> Path:
    return config.parent / "fingerprints" / f"{dataset_id:04d}_fingerprints.parquet"


def read_rejects(config: Path, dataset_id: int = 1) -> list[tuple[str, str]]:
    path = config.parent / "fingerprints" / "_rejects" / output_path(config, dataset_id).name
    return [(row["member"], row["reason"]) for row in pq.read_table(path).to_pylist()]


def test_each_image_has_its_fingerprint_in_the_order_of_the_intermediate(city: Path, run_main: Callable) -> None:
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert outcome.stdout.splitlines() == [str(output_path(city, dataset_id)) for dataset_id in TARS]
    assert "compute_fingerprints: 14 in = 14 out + 0 rejected + 0 dropped; 2 written, 0 kept" in outcome.stderr
    for dataset_id in TARS:
        views = pq.read_table(city.parent / "intermediates" / f"{dataset_id:04d}.parquet")
        found = pq.read_table(output_path(city, dataset_id))
        assert found.schema.remove_metadata() == pa.schema(
            [
                ("streetview_image_id", pa.string()),
                ("building_id", pa.string()),
                ("target_lat", pa.float64()),
                ("target_lon", pa.float64()),
                ("fingerprint", pa.list_(pa.uint8(), 768)),
            ]
        )
        for name in found.column_names[:4]:
            assert found[name].to_pylist() == views[name].to_pylist()
        images = {member.name: member.read() for member in stream_members(city.parent / "raw" / f"{dataset_id:04d}.tar")
                  if member.is_image_name}  # fmt: skip
        for path, fingerprint in zip(views["image_path"].to_pylist(), found["fingerprint"].to_pylist(), strict=True):
            assert fingerprint == compute_fingerprint(images[path], 16).tolist()
        assert read_rejects(city, dataset_id) == []


def test_a_rerun_keeps_everything_and_tells_the_same_counts(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    before = output_path(city).read_bytes()
    outcome = run_main(main, "--config", city, "--set", "infrastructure.num_workers=1")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert "14 in = 14 out + 0 rejected + 0 dropped; 0 written, 2 kept" in outcome.stderr
    assert output_path(city).read_bytes() == before


def test_another_image_size_is_refused_by_name_and_made_with_overwrite(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    outcome = run_main(main, "--config", city, "--set", "fingerprints.image_size=8")
    assert outcome.code == 1
    assert "image_size was 16 and is now 8" in outcome.stderr
    assert run_main(main, "--config", city, "--set", "fingerprints.image_size=8", "--overwrite").code == 0
    assert pq.read_schema(output_path(city)).field("fingerprint").type == pa.list_(pa.uint8(), 192)


def test_two_runs_write_the_same_bytes(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    first = output_path(city).read_bytes()
    run_main(main, "--config", city, "--overwrite", "--set", "infrastructure.num_workers=5")
    assert output_path(city).read_bytes() == first


def test_shards_together_do_what_one_process_does(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    whole = {dataset_id: output_path(city, dataset_id).read_bytes() for dataset_id in TARS}
    shutil.rmtree(city.parent / "fingerprints")
    for index in (1, 0):
        assert run_main(main, "--config", city, "--shard", f"{index}/2").code == 0
    assert {dataset_id: output_path(city, dataset_id).read_bytes() for dataset_id in TARS} == whole


def test_named_tars_are_done_alone(city: Path, run_main: Callable) -> None:
    outcome = run_main(main, "--config", city, "--tar-file", city.parent / "raw" / "0002.tar")
    assert outcome.code == 0
    assert not output_path(city, 1).exists()
    assert output_path(city, 2).exists()


def test_a_tar_that_is_gone_leaves_its_fingerprints_valid(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    (city.parent / "raw" / "0001.tar").unlink()
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert "0 written, 2 kept" in outcome.stderr


def break_tar(config: Path, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Change the first tar's members after stage 1 has read them."""
    replace_tar(config.parent / "raw" / "0001.tar", change(make_city(1, TARS[1])))


def test_an_image_that_is_no_longer_in_the_tar_is_rejected(city: Path, run_main: Callable) -> None:
    gone = make_city(1, TARS[1])[2].name
    break_tar(city, lambda entries: [entry for entry in entries if entry.name != gone])
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert "14 in = 13 out + 1 rejected + 0 dropped (missing_image 1)" in outcome.stderr
    assert read_rejects(city) == [(gone, "missing_image")]
    views = pq.read_table(city.parent / "intermediates" / "0001.parquet")
    others = [view["streetview_image_id"] for view in views.to_pylist() if view["image_path"] != gone]
    assert pq.read_table(output_path(city))["streetview_image_id"].to_pylist() == others
    kept = run_main(main, "--config", city)
    assert "14 in = 13 out + 1 rejected + 0 dropped (missing_image 1); 0 written, 2 kept" in kept.stderr


def huge_png() -> bytes:
    """The header of a picture of 10^9 pixels."""
    small = encode(Image.new("RGB", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 40_000, 25_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_image"),
        (b"not an image", "unreadable_image"),
        (encode(draw_view(3, size=(400, 300)))[:-4_000], "unreadable_image"),
        (encode(draw_view(3, size=(400, 300)), "PNG")[:-4_000], "unreadable_image"),
        (huge_png(), "image_too_large"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_rejected(data: bytes, reason: str, city: Path, run_main: Callable) -> None:
    name = make_city(1, TARS[1])[4].name
    break_tar(city, lambda entries: [Entry(entry.name, data) if entry.name == name else entry for entry in entries])
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert read_rejects(city) == [(name, reason)]
    assert pq.read_table(output_path(city)).num_rows == 5


def test_of_two_members_of_one_name_the_first_regular_file_counts(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    before = pq.read_table(output_path(city))
    name = make_city(1, TARS[1])[0].name
    second = make_view(name.removesuffix(".jpg"), 1, 1, image=encode(draw_view(77)))[:1]
    folder = [Entry(name, kind=b"5")]
    break_tar(city, lambda entries: folder + entries + second)
    assert run_main(main, "--config", city, "--overwrite").code == 0
    assert pq.read_table(output_path(city)).equals(before)


def test_too_many_rejects_make_the_run_fail_with_everything_kept(city: Path, run_main: Callable) -> None:
    break_tar(city, lambda entries: entries[:2])
    outcome = run_main(main, "--config", city)
    assert outcome.code == 1
    assert "error: compute_fingerprints: 5 of 14 items were rejected" in outcome.stderr
    assert pq.read_table(output_path(city)).num_rows == 1
    assert pq.read_table(output_path(city, 2)).num_rows == 8
    assert run_main(main, "--config", city, "--set", "data.max_reject_fraction=0.9").code == 0


def test_a_damaged_tar_fails_alone(city: Path, run_main: Callable) -> None:
    tar = city.parent / "raw" / "0001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    outcome = run_main(main, "--config", city)
    assert outcome.code == 1
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "0001.tar" in errors[0]
    assert not output_path(city, 1).exists()
    assert output_path(city, 2).exists()


def test_a_missing_intermediate_fails_that_tar_alone(city: Path, run_main: Callable) -> None:
    (city.parent / "intermediates" / "0001.parquet").unlink()
    outcome = run_main(main, "--config", city)
    assert outcome.code == 1
    assert "0001.parquet: no such file: run the stage that writes it" in outcome.stderr
    assert output_path(city, 2).exists()


def change_intermediate(config: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = config.parent / "intermediates" / "0001.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def repeat_first_path(table: pa.Table) -> pa.Table:
    paths = table["image_path"].to_pylist()
    return table.set_column(table.schema.get_field_index("image_path"), "image_path", [[paths[1], *paths[1:]]])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.drop_columns(["image_path"]), "column image_path is missing"),
        (
            lambda table: table.set_column(4, "target_lat", table["target_lat"].cast(pa.string())),
            "column target_lat is string, expected double",
        ),
        (
            lambda table: table.set_column(6, "building_id", pa.nulls(len(table), pa.string())),
            "column building_id has empty values",
        ),
        (repeat_first_path, "is there twice"),
    ],
)
def test_a_bad_intermediate_is_named_with_its_column(
    change: Callable, problem: str, city: Path, run_main: Callable
) -> None:
    change_intermediate(city, change)
    outcome = run_main(main, "--config", city)
    assert outcome.code == 1
    assert "0001.parquet" in outcome.stderr
    assert problem in outcome.stderr
    assert not output_path(city, 1).exists()


def test_only_the_columns_that_it_needs_are_asked_for(city: Path, run_main: Callable) -> None:
    needed = ["streetview_image_id", "building_id", "target_lat", "target_lon", "image_path"]
    change_intermediate(city, lambda table: table.select(needed).replace_schema_metadata())
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert "carries no provenance" in outcome.stderr


def test_a_tar_without_usable_images_gives_an_empty_table(city: Path, run_main: Callable) -> None:
    change_intermediate(city, lambda table: table.slice(0, 0))
    assert run_main(main, "--config", city).code == 0
    assert pq.read_table(output_path(city)).num_rows == 0
    assert pq.read_schema(output_path(city)).field("fingerprint").type == pa.list_(pa.uint8(), 768)


def test_the_provenance_tells_inputs_settings_and_counts(city: Path, run_main: Callable) -> None:
    run_main(main, "--config", city)
    provenance = json.loads(pq.read_schema(output_path(city)).metadata[b"spatial_building_embeddings"])
    assert provenance["stage"] == "compute_fingerprints"
    assert [item["name"] for item in provenance["inputs"]] == ["0001.parquet", "0001.tar"]
    assert provenance["settings"] == {"descriptor": "area_mean_rgb", "image_size": 16}
    assert provenance["counts"] == {"in": 6, "out": 6, "rejected": 0}


def test_the_command_line_ends_with_its_codes_and_prints_what_was_written(
    city: Path, run_main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    outcome = run_main(main, "--config", city)
    assert outcome.code == 0
    assert outcome.stdout.splitlines() == [str(output_path(city, dataset_id)) for dataset_id in TARS]
    refused = run_main(main, "--config", city, "--set", "fingerprints.image_size=8")
    assert refused.code == 1
    assert "Traceback" not in refused.stderr
    assert run_main(main, "--config", city, "--set", "fingerprints.size=8").code == 2
    assert run_main(main, "--help").stdout.startswith("Stage 4: ")
    assert not list(elsewhere.iterdir())


def test_photographs_stay_within_two_grey_levels(shared_dir: Path) -> None:
    for tar in sorted((shared_dir / "data/raw").glob("*.tar")):
        images = [member.read() for member in stream_members(tar) if member.is_image_name]
        for data in images[:: len(images) // 5]:
            photograph = Image.open(io.BytesIO(data)).convert("RGB")
            assert measure_error(data) < 0.6
            assert measure_error(encode(photograph.resize((387, 291)), quality=90)) < 0.6
