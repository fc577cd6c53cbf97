"""One command, several processes: the same outputs, the worst exit code, signals passed on."""

import os
import signal
import sys
import types

import pytest

from generate_embeddings import generate_embeddings
from pipeline.errors import ConfigError, Terminated
from pipeline.inference import launcher
from pipeline.inference.launcher import launch, list_gpus
from preprocess_raw_data import process_tar

STAGE_2 = "generate_embeddings/generate_embeddings.py"
# Says what it was given; then does what the shard's word says.
CHILD = """
import os, signal, sys, time
index = int(sys.argv[-1].partition("/")[0])
word = sys.argv[1].split(",")[index]
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
with open(f"{sys.argv[2]}/{index}.txt", "w") as file:
    print(*sys.argv[3:], os.environ.get("CUDA_VISIBLE_DEVICES", "none"), cores, file=file)
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    open(f"{sys.argv[2]}/{index}.ready", "w").close()
    signal.pause()
if word == "kill":
    os.kill(os.getpid(), 9)
sys.exit(int(word))
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Launch the child above for each of some words, without GPUs."""
    monkeypatch.setattr(launcher, "list_gpus", list)
    (tmp_path / "child.py").write_text(CHILD)

    def run(*words):
        arguments = [",".join(words), str(tmp_path), "--processes", str(len(words))]
        return launch(str(tmp_path / "child.py"), arguments, len(words), is_sharded=False)

    return run


def test_each_process_gets_its_shard_and_its_part_of_the_cores(child, tmp_path):
    before = os.sched_getaffinity(0)
    assert child("0", "0") is True
    told = [(tmp_path / f"{index}.txt").read_text().split() for index in range(2)]
    for index, words in enumerate(told):
        assert words[:6] == ["--processes", "2", "--processes", "1", "--shard", f"{index}/2"]
        assert words[6] == "none"
    if len(before) >= 2:
        assert sum(int(words[7]) for words in told) == len(before)
    assert os.sched_getaffinity(0) == before


def test_each_process_gets_one_gpu(child, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "list_gpus", lambda: ["4", "6"])
    child("0", "0", "0")
    assert [(tmp_path / f"{index}.txt").read_text().split()[6] for index in range(3)] == ["4", "6", "4"]


@pytest.mark.parametrize(
    ("words", "code"), [(("0", "1"), 1), (("2", "1"), 2), (("0", "kill"), 137), (("1", "0", "143"), 143)]
)
def test_the_exit_code_is_the_worst_and_all_are_waited_for(child, tmp_path, capfd, words, code):
    with pytest.raises(SystemExit) as caught:
        child(*words)
    assert caught.value.code == code
    assert len(list(tmp_path.glob("*.txt"))) == len(words)
    failed = sum(word != "0" for word in words)
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: {failed} of {len(words)} processes failed: see their own lines above"
    )


@pytest.mark.parametrize(("interruption", "number"), [(Terminated, signal.SIGTERM), (KeyboardInterrupt, signal.SIGINT)])
def test_a_signal_reaches_every_process_and_is_raised_when_all_have_ended(
    child, tmp_path, monkeypatch, interruption, number
):
    codes, plain = [], launcher.subprocess.Popen

    class Interrupted(plain):
        def wait(self):
            if not codes:
                codes.append("interrupted")
                while len(list(tmp_path.glob("*.ready"))) < 2:
                    pass
                raise interruption
            codes.append(super().wait())
            return codes[-1]

    monkeypatch.setattr(launcher.subprocess, "Popen", Interrupted)
    with pytest.raises(interruption):
        child("wait", "wait")
    assert codes == ["interrupted", 128 + number, 128 + number]


def test_one_process_is_this_one():
    assert launch("x.py", [], 1, is_sharded=True) is False


def test_auto_is_one_process_a_gpu(child, tmp_path, monkeypatch):
    assert launch(str(tmp_path / "child.py"), [], "auto", is_sharded=False) is False  # without any
    monkeypatch.setattr(launcher, "list_gpus", lambda: ["0", "1"])
    assert launch(str(tmp_path / "child.py"), ["0,0", str(tmp_path)], "auto", is_sharded=False) is True
    assert len(list(tmp_path.glob("*.txt"))) == 2


def test_a_shard_and_processes_exclude_each_other():
    with pytest.raises(ConfigError, match="--processes with --shard"):
        launch("x.py", [], 2, is_sharded=True)


def test_the_visible_gpus_go_by_the_names_that_the_machine_gave_them(monkeypatch):
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: 2))
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert list_gpus() == ["GPU-a", "GPU-b"]
    fake.cuda.device_count = lambda: 0
    assert list_gpus() == []


@pytest.mark.slow
def test_two_processes_of_stage_2_give_the_bytes_of_one(
    tmp_path, write_config, make_tar, toy_backbone, run_main, run_script
):
    config = write_config(tmp_path, embedding_model={"model_name": str(toy_backbone)})
    for number in (1, 2, 3):
        make_tar(tmp_path / "raw", number, (3, 2))
    assert run_main(process_tar.main, "--config", config).code == 0
    one_thread = {"OMP_NUM_THREADS": "1"}  # or sums are rounded by how many there are
    outcome = run_script(STAGE_2, "--config", config, "--processes", 2, **one_thread)
    assert outcome.code == 0, outcome.stderr
    paths = [tmp_path / "embeddings" / f"{number:04d}_embeddings.parquet" for number in (1, 2, 3)]
    assert sorted(outcome.stdout.split()) == [str(path) for path in paths]
    assert "2 in" not in outcome.stderr
    assert "10 in = 10 out" in outcome.stderr  # tars 1 and 3
    assert "5 in = 5 out" in outcome.stderr
    assert run_script(STAGE_2, "--config", config, "--set", "paths.embeddings_dir=alone", **one_thread).code == 0
    for path in paths:
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


@pytest.mark.parametrize("words", [("--processes", "0"), ("--processes", "two"), ("--processes=2", "--shard=0/2")])
def test_a_wrong_command_line_is_code_2(tmp_path, write_config, run_main, words):
    outcome = run_main(generate_embeddings.main, "--config", write_config(tmp_path), *words)
    assert outcome.code == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: ")
