"""One picture, one vector: for a shell or a notebook."""

import json

import numpy as np
import pytest
from PIL import Image
from published_models import encode, make_picture, publish, read_dataset, write_backbone, write_packaged

from publish_model import embed_images, generate_embeddings_from_parquet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return publish(folder, write_backbone(folder / "backbone"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Thirty-five pictures: more than are decoded at a time; the last is a PNG."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(34):
        (folder / f"{number:02d}.jpg").write_bytes(encode(make_picture(number)))
    (folder / "34.png").write_bytes(encode(make_picture(34), "PNG"))
    return folder


@pytest.fixture(scope="module")
def expected(model, pictures, tmp_path_factory):
    """What stage 8 makes of the same pictures."""
    output = tmp_path_factory.mktemp("output") / "embeddings"
    packaged = write_packaged(
        output.parent / "packaged.parquet", [path.read_bytes() for path in sorted(pictures.iterdir())]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_ID", str(model))
        generate_embeddings_from_parquet.main(["--input", str(packaged), "--output", str(output)])
    return np.stack(read_dataset(output).column("embedding").to_numpy())


def test_the_vectors_are_those_of_stage_8_in_the_order_given(model, pictures, expected):
    paths = sorted(pictures.iterdir())
    found = embed_images.embed_images(paths, str(model))
    assert (found.dtype, found.shape) == (np.float32, (35, 256))
    assert (found * expected).sum(axis=1).min() > 0.9999
    back = embed_images.embed_images([str(path) for path in reversed(paths)], str(model))
    assert (back[::-1] * expected).sum(axis=1).min() > 0.9999


def test_a_shell_gets_a_line_of_json_for_each_picture(run_main, model, pictures, expected):
    paths = [pictures / "03.jpg", pictures / "34.png"]
    outcome = run_main(embed_images.main, *paths, "--model-id", model)
    assert outcome.code == 0, outcome.stderr
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert np.allclose([line["embedding"] for line in lines], expected[[3, 34]], atol=1e-4)


def test_an_npy_holds_the_vectors_and_its_path_is_printed(run_main, model, pictures, expected, tmp_path):
    outcome = run_main(
        embed_images.main, pictures / "01.jpg", "--model-id", model, "--npy", tmp_path / "deep" / "out.npy"
    )
    assert outcome.stdout.split() == [str(tmp_path / "deep" / "out.npy")]
    found = np.load(tmp_path / "deep" / "out.npy")
    assert (found.dtype, found.shape) == (np.float32, (1, 256))
    assert found[0] @ expected[1] > 0.9999


def test_pictures_that_cannot_be_read_are_named_and_nothing_is_written(run_main, model, pictures, tmp_path):
    (tmp_path / "half.jpg").write_bytes((pictures / "00.jpg").read_bytes()[:300])
    (tmp_path / "empty.jpg").write_bytes(b"")
    outcome = run_main(
        embed_images.main, pictures / "00.jpg", tmp_path / "half.jpg", tmp_path / "empty.jpg", "--model-id", model,
        "--npy", tmp_path / "out.npy",
    )  # fmt: skip
    assert outcome.code == 1
    assert "half.jpg: unreadable_image" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].endswith("give JPEG, PNG or WebP images")
    assert not (tmp_path / "out.npy").exists()
    gone = run_main(embed_images.main, pictures / "00.jpg", tmp_path / "gone.jpg", "--model-id", model)
    assert gone.stderr == f"error: {tmp_path / 'gone.jpg'}: not a file: give JPEG, PNG or WebP images\n"


def test_a_model_that_is_not_there_is_said_in_one_line(run_main, pictures, tmp_path):
    outcome = run_main(embed_images.main, pictures / "00.jpg", "--model-id", tmp_path / "nowhere")
    assert outcome.code == 1
    assert outcome.stderr.count("error: ") == 1
    assert "no such model folder" in outcome.stderr


def test_a_backbone_is_no_published_model(run_main, pictures, toy_backbone, tmp_path):
    outcome = run_main(
        embed_images.main, pictures / "01.jpg", "--model-id", toy_backbone, "--npy", tmp_path / "vectors.npy"
    )
    assert outcome.code == 1
    assert "its embeddings are not L2-normalised: give a model that stage 7 has published" in outcome.stderr
    assert not (tmp_path / "vectors.npy").exists()


def test_help_comes_without_torch(run_script):
    outcome = run_script("publish_model/embed_images.py", "--help")
    assert outcome.code == 0
    assert "one picture, one vector" in outcome.stdout


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_photograph_on_its_side_gets_its_upright_twins_vector(run_main, model, tmp_path, kind, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = make_picture(3, (300, 200))
    (tmp_path / "a").write_bytes(encode(upright, kind, **options))
    (tmp_path / "b").write_bytes(encode(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, **options))
    outcome = run_main(embed_images.main, tmp_path / "a", tmp_path / "b", "--model-id", model)
    first, second = (json.loads(line)["embedding"] for line in outcome.stdout.splitlines())
    assert np.dot(first, second) > 0.9999
    assert "1 pictures turned upright by their EXIF orientation" in outcome.stderr
