"""The synthetic raw tars: their layout, their geometry, and that rendering them is repeatable and can be killed."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import cli, workspace
from pipeline.errors import ConfigError
from sample_data import render_streets
from sample_data.renderer.city import MAX_ANGLE_DEG, SINGLETONS, plan_city
from sample_data.renderer.street_geometry import DOWN, METRES_PER_DEGREE, Camera, StreetFrame, X

REPOSITORY = Path(__file__).resolve().parents[1]
BUILDINGS, SIZE = 4, 96
COMMON = ["--buildings", str(BUILDINGS), "--size", str(SIZE)]
TARS = ["0001.tar", "0002.tar", "0003.tar", "0004.tar"]


def render(output: Path, *extra: str) -> None:
    render_streets.main(["--output", str(output), *COMMON, "--workers", "1", *extra])


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("streets")
    render(output)
    return output


def read_tars(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return {tar name: {member name: bytes}}, in the tar's order."""
    contents: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            contents[path.name] = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    return contents


def read_d_lines(folder: Path) -> list[tuple[str, list[float]]]:
    """Return (stem, the 17 numbers) of every metadata file."""
    lines = []
    for members in read_tars(folder).values():
        for name, data in members.items():
            if name.endswith(".txt"):
                letter, *numbers = data.decode("ascii").split()
                assert letter == "d"
                lines.append((Path(name).stem, [float(n) for n in numbers]))
    return lines


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_every_member_is_named_by_dataset_patch_view_and_target_and_has_its_twin(tars: Path) -> None:
    contents = read_tars(tars)
    assert list(contents) == TARS
    for tar_name, members in contents.items():
        dataset = tar_name.removesuffix(".tar")
        for name in members:
            folder, repeated, file_name = name.split("/")
            stem, _, suffix = file_name.partition(".")
            parts = stem.split("_")
            assert folder == repeated == parts[0] == dataset
            assert suffix in {"jpg", "txt"}
            assert [len(p) for p in (parts[0], parts[1], parts[3])] == [4, 7, 7]
            assert name.replace(".jpg", ".txt") in members
            assert name.replace(".txt", ".jpg") in members


def test_members_are_shuffled_so_that_pairs_cannot_be_found_by_adjacency(tars: Path) -> None:
    names = [Path(name).stem for members in read_tars(tars).values() for name in members]
    neighbors = sum(a == b for a, b in zip(names, names[1:], strict=False))
    assert neighbors < len(names) / 4


def test_members_carry_no_time_and_no_owner(tars: Path) -> None:
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_d_lines_have_seventeen_numbers_that_agree_with_the_file_name(tars: Path) -> None:
    for stem, numbers in read_d_lines(tars):
        dataset, patch, _, target = (int(part) for part in stem.split("_"))
        assert len(numbers) == 17
        assert numbers[:3] == [dataset, target, patch]
        assert numbers[16] == 0.0


def test_distance_heading_and_pitch_agree_with_both_positions(tars: Path) -> None:
    for _, numbers in read_d_lines(tars):
        target_lat, target_lon, target_height = numbers[4:7]
        street_lat, street_lon, street_height, distance, heading, pitch = numbers[10:16]
        north = (target_lat - street_lat) * METRES_PER_DEGREE
        east = (target_lon - street_lon) * METRES_PER_DEGREE * math.cos(math.radians(street_lat))
        up = target_height - street_height
        assert math.hypot(north, east, up) == pytest.approx(distance, abs=0.02)
        assert abs((math.degrees(math.atan2(east, north)) - heading + 180) % 360 - 180) < 0.1
        assert math.degrees(math.atan2(up, math.hypot(north, east))) == pytest.approx(pitch, abs=0.1)
        assert 6 <= distance <= 30


def test_normals_are_unit_vectors_that_face_the_camera_within_the_allowed_angle(tars: Path) -> None:
    for _, numbers in read_d_lines(tars):
        normal, heading = numbers[7:10], math.radians(numbers[14])
        assert math.hypot(*normal) == pytest.approx(1.0, abs=1e-5)
        facing = -(normal[0] * math.sin(heading) + normal[1] * math.cos(heading))
        assert facing >= math.cos(math.radians(MAX_ANGLE_DEG + 0.1))


def test_singletons_are_planted_and_every_other_target_has_two_to_seven_images(tars: Path) -> None:
    counts = Counter((numbers[0], numbers[1]) for _, numbers in read_d_lines(tars))
    assert len(counts) == BUILDINGS + SINGLETONS
    assert sum(count == 1 for count in counts.values()) == SINGLETONS
    assert all(1 <= count <= 7 for count in counts.values())


def test_a_full_city_has_the_asked_targets_and_shares_panoramas_between_them() -> None:
    numbers = [photo.d_line.split()[1:5] for street in plan_city(0, 150, 448) for photo in street.photos]
    counts = Counter((dataset, target) for dataset, target, _, _ in numbers)
    assert len(counts) == 150 + SINGLETONS
    assert sum(count == 1 for count in counts.values()) == SINGLETONS
    assert max(counts.values()) == 7
    targets_of_view: dict[tuple[str, str], set[str]] = {}
    for dataset, target, _, view in numbers:
        targets_of_view.setdefault((dataset, view), set()).add(target)
    assert sum(len(targets) > 1 for targets in targets_of_view.values()) > 20
    patches = [(dataset, patch) for dataset, _, patch, _ in numbers]
    assert len(patches) == len(set(patches))


def test_images_decode_and_have_the_asked_size(tars: Path) -> None:
    for members in read_tars(tars).values():
        for name, data in members.items():
            if name.endswith(".jpg"):
                image = Image.open(io.BytesIO(data))
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
                assert np.asarray(image).std() > 12


def test_the_target_lies_in_the_centre_of_its_image() -> None:
    for street in plan_city(3, 12, SIZE):
        for photo in street.photos:
            pixel, depth = photo.camera.project(np.array(photo.camera.target))
            assert pixel == pytest.approx([SIZE / 2, SIZE / 2])
            assert depth == pytest.approx(photo.camera.distance_m)


def test_what_lies_to_the_right_and_above_appears_to_the_right_and_above() -> None:
    camera = Camera((0.0, -10.0, 2.5), (4.0, 0.0, 5.0), 100)
    right, above = camera.project(np.array([(4.5, 0.0, 5.0), (4.0, 0.0, 5.5)]))[0]
    assert right[0] > 50
    assert above[1] < 50


def test_a_texture_is_sampled_where_its_plane_projects() -> None:
    camera = Camera((1.0, -9.0, 2.5), (4.0, 0.0, 5.0), 200)
    origin, texel_m, corner = np.array([-2.0, 0.0, 12.0]), 1 / 40, (30, 20)
    a, b, c, d, e, f, g, h = camera.texture_coefficients(origin, X * texel_m, DOWN * texel_m, corner)
    for u, v in ((100.0, 80.0), (300.0, 320.0)):
        (x, y), _ = camera.project(origin + u * texel_m * X + v * texel_m * DOWN)
        x, y = x - corner[0], y - corner[1]
        scale = g * x + h * y + 1
        assert ((a * x + b * y + c) / scale, (d * x + e * y + f) / scale) == pytest.approx((u, v))


def test_a_polygon_through_the_camera_is_cut_at_the_near_plane() -> None:
    camera = Camera((0.0, -10.0, 2.5), (0.0, 0.0, 2.5), 100)
    ground = np.array([(-5.0, -30.0, 0.0), (5.0, -30.0, 0.0), (5.0, 0.0, 0.0), (-5.0, 0.0, 0.0)])
    _, depth = camera.project(camera.clip_near(ground))
    assert depth.min() > 0
    assert len(camera.clip_near(ground - np.array([0.0, 100.0, 0.0]))) == 0


def test_a_street_that_runs_north_has_facades_that_look_east_or_west() -> None:
    frame = StreetFrame(47.0, 8.0, 0.0, 400.0)
    assert frame.facade_normal == pytest.approx((1.0, 0.0, 0.0))
    assert frame.to_heading_deg(0.0, 1.0) == pytest.approx(270.0)


def test_the_same_seed_gives_the_same_bytes_by_path_and_by_module_with_any_number_of_workers(
    tars: Path, tmp_path: Path
) -> None:
    for i, command in enumerate((["sample_data/render_streets.py"], ["-m", "sample_data.render_streets"])):
        output = tmp_path / str(i)
        arguments = [*command, "--output", str(output), *COMMON, "--workers", "2"]
        done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(output / name) for name in TARS]
        assert bytes_of(output) == bytes_of(tars)


def test_another_seed_gives_other_bytes(tars: Path, tmp_path: Path) -> None:
    render(tmp_path, "--seed", "1")
    assert not set(bytes_of(tmp_path).values()) & set(bytes_of(tars).values())


def test_a_rerun_keeps_finished_tars_and_says_so(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (tars / name).stat().st_mtime_ns for name in TARS}
    render(tars)
    captured = capsys.readouterr()
    assert f"kept the tars of {tars}" in captured.err
    assert captured.out.split() == [str(tars / name) for name in TARS]
    assert before == {name: (tars / name).stat().st_mtime_ns for name in TARS}


def test_a_tar_of_another_size_is_rendered_again(tars: Path, tmp_path: Path) -> None:
    for path in [*tars.glob("*.tar"), tars / render_streets.MARKER_NAME]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0002.tar").write_bytes(b"truncated")
    render(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(tars)


def test_other_parameters_render_everything_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render(tmp_path, "--size", "48")
    render(tmp_path, "--size", "64")
    assert "kept " not in capsys.readouterr().err
    marker = json.loads((tmp_path / render_streets.MARKER_NAME).read_text())
    assert (marker["parameters"]["size"], sorted(marker["sizes"])) == (64, TARS)


def test_a_killed_run_leaves_no_unfinished_tar_under_its_final_name_and_the_next_one_completes_it(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_file = tarfile.TarFile.addfile
    added: list[str] = []

    def killed_in_the_second_tar(tar: tarfile.TarFile, member: tarfile.TarInfo, data: io.BytesIO) -> None:
        if member.name.startswith("0002/") and added:
            raise KeyboardInterrupt
        added.append(member.name)
        add_file(tar, member, data)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", killed_in_the_second_tar)
        with pytest.raises(KeyboardInterrupt):
            render(tmp_path)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["0001.tar"]
    leftover = workspace.temporary_path(tmp_path / "0002.tar")
    leftover.with_name(leftover.name.replace(f"-{os.getpid()}-", "-4999999-")).write_bytes(b"what a kill -9 leaves")
    workspace.clear_temporaries.cache_clear()  # as in a new process
    render(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(tars)
    assert sorted(path.name for path in tmp_path.iterdir()) == [render_streets.MARKER_NAME, *TARS]


def test_an_output_that_cannot_be_a_folder_is_one_line_and_exit_code_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        cli.run_guarded(render_streets.main, ["--output", str(occupied), *COMMON, "--workers", "1"])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (stopped.value.code, captured.out) == (1, "")
    assert errors == [
        f"error: cannot write {occupied}/.render.json (File exists): free space or allow writing there, then run this "
        "again"
    ]


@pytest.mark.parametrize("wrong", [["--buildings", "3"], ["--size", "0"], ["--seed", "-1"], ["--workers", "none"]])
def test_bad_arguments_exit_with_two(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(ConfigError) as stopped:
        render(tmp_path, *wrong)
    assert stopped.value.exit_code == 2
