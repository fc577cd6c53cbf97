"""The benchmark of image sizes and views: its features are stage 2's, and its table has a row for each setting."""

import json

import numpy as np
from plain_loop import smallest_cosine

from benchmarks import resolution
from pipeline.config import EmbeddingModelSection
from pipeline.inference.backbone import Embedder

SETTINGS = {
    "56": {"image_size": 56},
    "70, flip": {"image_size": 70, "flip": True},
    "56 + 84, flip": {"scales": [56, 84], "flip": True},
}


def test_a_tiny_run_puts_together_what_stage_2_gives_and_fills_the_table(
    tmp_path, make_tar, toy_backbone, monkeypatch, capsys
):
    monkeypatch.setattr(resolution, "SETTINGS", SETTINGS)
    for dataset in (1, 2):
        make_tar(tmp_path / "raw", dataset, [2, 3, 1, 2])
    arguments = ["--raw", tmp_path / "raw", "--backbone", toy_backbone, "--work-dir", tmp_path / "work"]
    resolution.main([*map(str, arguments), "--images", "4", "--rounds", "1", "--settings", *SETTINGS])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["settings"] for row in rows] == list(SETTINGS)
    assert all(0 <= row[kind]["map"] <= 1 for row in rows for kind in ("raw", "whitening"))
    assert rows[0]["cost"] == 1
    pictures, codes, tars = resolution.read_pictures(tmp_path / "raw", tmp_path / "work")
    assert len(pictures) == 14  # single images are left out
    assert np.bincount(codes).min() == 2
    assert np.bincount(tars).tolist() == [7, 7]
    views = resolution.Views(toy_backbone, tmp_path / "work", pictures)
    for name, settings in SETTINGS.items():
        section = EmbeddingModelSection(**settings)
        embedder = Embedder(
            toy_backbone, device="cpu", image_size=section.input_size, scales=section.scales, flip=section.flip
        )
        found = views.combine(section)
        assert smallest_cosine(found, embedder.embed([embedder.decode(data) for data in pictures])) > 0.9999, name
