"""The faults of the campaign: each disturbs a run of stage 8 or of a script beside it, and checks what is left."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from faults.bench import Bench, Failure, count_rows, expect, expect_refusal, mount_tmpfs, remount, unmount
from faults.harness import Hook, Run, count_operations, disturb, fill_disk, kill, terminate
from published_models import make_photographs, write_packaged

from publish_model import aggregate_embeddings, cluster_embeddings, convert_to_hf

# What a try came to, beside failing: RECOVERED (after a rerun the undisturbed dataset) or REFUSED (in one clear line).
RECOVERED, REFUSED = "recovered", "refused"
Fault = Callable[[Bench, int], Iterator[str]]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    """Enter a fault into the table under a name. It is given the bench and the number of tries."""

    def enter(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return enter


def moments(bench: Bench, tries: int) -> list[int]:
    """Return numbers of file operations to disturb: all of them, or as many at random."""
    every = list(range(1, bench.num_operations + 1))
    return every if tries >= len(every) else sorted(bench.random.sample(every, tries))


@fault("SIGKILL before a file operation, then again in the rerun")
def killed(bench: Bench, tries: int) -> Iterator[str]:
    for at in [
        *moments(bench, tries),
        *bench.random.choices(range(1, bench.num_operations), k=max(0, tries - bench.num_operations)),
    ]:
        bench.clear()
        expect(bench.embed(prepare=disturb(bench.output, at, kill)), -9)
        expect(bench.embed(prepare=disturb(bench.output, bench.random.randint(1, at), kill)), -9, 0)
        bench.check_rerun()
        yield RECOVERED


@fault("SIGTERM before a file operation")
def terminated(bench: Bench, tries: int) -> Iterator[str]:
    for at in moments(bench, max(1, tries // 4)):
        bench.clear()
        outcome = bench.embed(prepare=disturb(bench.output, at, terminate))
        expect(outcome, 143)
        bench.check_rerun()
        yield RECOVERED


@fault("two writers on one shard")
def two_writers(bench: Bench, tries: int) -> Iterator[str]:
    for _ in range(max(1, tries // 20)):
        bench.clear()
        runs = [bench.start(), bench.start()]
        for run in runs:
            expect(run.wait(), 0)
        bench.check()
        yield RECOVERED


@fault("three shards at once, one killed and started again")
def killed_shard(bench: Bench, tries: int) -> Iterator[str]:
    for _ in range(max(1, tries // 20)):
        bench.clear()
        at = bench.random.randint(1, bench.num_operations // 3)
        runs = [bench.start("--shard", "0/3", prepare=disturb(bench.output, at, kill))]
        runs += [bench.start("--shard", f"{index}/3") for index in (1, 2)]
        for run, codes in zip(runs, ((-9, 0), (0,), (0,)), strict=True):
            expect(run.wait(), *codes)
        expect(bench.embed("--shard", "0/3"), 0)
        bench.check()
        yield RECOVERED


@fault("disk full at a file operation")
def disk_full(bench: Bench, tries: int) -> Iterator[str]:
    for at in moments(bench, max(1, tries // 2)):
        bench.clear()
        outcome = bench.embed(prepare=disturb(bench.output, at, fill_disk))
        if outcome.code:  # what is only tidied up may fail unsaid
            expect_refusal(outcome)
        bench.check_rerun()
        yield RECOVERED


@fault("disk full: a small file system")
def small_disk(bench: Bench, tries: int) -> Iterator[str]:
    place = bench.folder / "small"
    for pages in np.linspace(2, 40, max(1, min(tries, 20))).astype(int):
        if not mount_tmpfs(place, f"{4 * pages}k"):
            return
        try:
            outcome = bench.embed(output=place / "out")
            if outcome.code:
                expect_refusal(outcome)
            remount(place, "size=64m")
            bench.check_rerun(place / "out")
            yield RECOVERED
        finally:
            unmount(place)


@fault("output on a read-only file system, in the midst")
def read_only(bench: Bench, tries: int) -> Iterator[str]:
    place = bench.folder / "readonly"
    if not mount_tmpfs(place, "64m"):
        return
    try:
        expect(bench.embed("--limit", 9, output=place / "out"), 0)
        remount(place, "ro")
        expect_refusal(bench.embed(output=place / "out"), "ead-only")
        remount(place, "rw")
        bench.check_rerun(place / "out")
        yield REFUSED
    finally:
        unmount(place)


@fault("input that changes between runs")
def changed_input(bench: Bench, tries: int) -> Iterator[str]:
    for change in ("replaced", "truncated", "gone"):
        bench.clear()
        expect(bench.embed("--limit", 9), 0)
        other = bench.folder / "other.parquet" if change == "replaced" else bench.folder / "changed.parquet"
        if change == "truncated":
            other.write_bytes(bench.input.read_bytes()[:-20])
        expect_refusal(bench.embed(source=other))
        bench.check_rerun()
        yield REFUSED


def break_part(kind: str, path: Path, bench: Bench) -> None:
    """Damage a part's file."""
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: bench.random.randrange(1, len(data))])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "deleted":
        path.unlink()
    elif kind == "one byte changed":
        at = bench.random.randrange(4, len(data) - 8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
    else:
        other = next(one for one in sorted(path.parent.glob("*.parquet")) if one != path)
        other_data = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(other_data)


def damage(folder: str, kind: str) -> Fault:
    """Return the fault that a file of `folder` is damaged: verify sees it, and repairs."""

    def tried(bench: Bench, tries: int) -> Iterator[str]:
        for _ in range(max(1, tries // 20)):
            bench.finish()
            break_part(kind, bench.output / folder / bench.part().name, bench)
            outcome = bench.verify()
            if outcome.code == 0:
                # A byte that no reader looks at (padding, a statistic): what is read is as it was.
                if kind != "one byte changed":
                    raise Failure(f"{kind}: not seen by verify")
                check_values(bench)
                yield RECOVERED
                continue
            expect_refusal(outcome, "--repair")
            expect(bench.verify("--repair"), 0)
            bench.check_rerun()
            expect(bench.verify(), 0)
            yield RECOVERED

    return tried


for _kind in ("truncated", "emptied", "swapped", "deleted", "one byte changed"):
    FAULTS[f"a part {_kind}"] = damage("parts", _kind)
    FAULTS[f"a part's rejects {_kind}"] = damage("_rejects", _kind)


def check_values(bench: Bench) -> None:
    """Raise Failure unless the rows of the dataset are those of the undisturbed one."""
    for name, data in bench.undisturbed.items():
        if name.endswith(".parquet"):
            expected = pq.read_table(io.BytesIO(data))
            if not pq.read_table(bench.output / name).equals(expected):
                raise Failure(f"{name}: other values, and verify does not see it")


@fault("state.json missing or empty")
def lost_state(bench: Bench, tries: int) -> Iterator[str]:
    for text in (None, "", "{", "[]", "{}"):
        bench.finish()
        state_path = bench.output / "state.json"
        state_path.unlink()
        if text is not None:
            state_path.write_text(text)
        expect_refusal(bench.verify(), "--repair")
        bench.check_rerun()
        yield RECOVERED


@fault("state.json of another run")
def foreign_state(bench: Bench, tries: int) -> Iterator[str]:
    for key, value in (("embedding_version", "0" * 16), ("row_group_fingerprint", "0" * 32), ("read_batch_size", 5)):
        bench.finish()
        state_path = bench.output / "state.json"
        state = json.loads(state_path.read_text())
        state_path.write_text(json.dumps(state | {key: value}))
        expect_refusal(bench.embed(), key)
        state_path.write_text(json.dumps(state))
        bench.check_rerun()
        yield REFUSED


def bad_images(share: float) -> Fault:
    """Return the fault that a share of the images is damaged: each costs one row, and the others come out as ever."""

    def tried(bench: Bench, tries: int) -> Iterator[str]:
        count = 100
        good = make_photographs(count)
        bad = set(bench.random.sample(range(count), round(count * share)))
        images: list[bytes | None] = [good[row][:100] if row in bad else good[row] for row in range(count)]
        source = write_packaged(bench.folder / "bad.parquet", images, row_group_size=50)
        bench.clear()
        expect(bench.embed(source=source), 0)
        if count_rows(bench.output) != (count - len(bad), len(bad)):
            raise Failure(f"{len(bad)} bad of {count}, but rows are {count_rows(bench.output)}")
        if share > 0.5:
            expect_refusal(bench.embed("--max-reject-fraction", "0.5", source=source), "rejected")
        yield RECOVERED

    return tried


for _share in (0.01, 0.1, 1.0):
    FAULTS[f"{_share:.0%} bad images"] = bad_images(_share)


@fault("model folder that lacks a weight file")
def missing_shard(bench: Bench, tries: int) -> Iterator[str]:
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        bench.clear()
        path = bench.model_dir / name
        aside = bench.folder / name
        shutil.move(path, aside)
        try:
            expect_refusal(bench.embed())
        finally:
            shutil.move(aside, path)
        bench.check_rerun()
        yield REFUSED


def run_out_of_memory(largest: int) -> Hook:
    """Return a preparation after which no module takes more than `largest` images at a time."""

    def prepare() -> None:
        import torch

        def check(_module: object, inputs: tuple[object, ...]) -> None:
            if any(isinstance(one, torch.Tensor) and one.ndim == 4 and len(one) > largest for one in inputs):
                raise torch.cuda.OutOfMemoryError("simulated")

        torch.nn.modules.module.register_module_forward_pre_hook(check)

    return prepare


@fault("out of memory on the device (simulated)")
def out_of_memory(bench: Bench, tries: int) -> Iterator[str]:
    for largest in (3, 1, 0):
        bench.clear()
        outcome = bench.embed(prepare=run_out_of_memory(largest))
        if largest == 0:  # not one image fits: the dataset cannot be made here
            expect_refusal(outcome)
            bench.check_rerun()
            yield REFUSED
            continue
        expect(outcome, 0)
        expect(bench.verify(), 0)
        for name in bench.undisturbed:  # smaller passes round otherwise in the last bit
            if name.startswith("parts"):
                check_near(bench, name)
        yield RECOVERED


def check_near(bench: Bench, name: str) -> None:
    """Raise Failure unless a part holds the ids of the undisturbed one, and its embeddings but for rounding."""
    expected = pq.read_table(io.BytesIO(bench.undisturbed[name]))
    found = pq.read_table(bench.output / name)
    near = np.allclose(
        np.array(found["embedding"].to_pylist()), np.array(expected["embedding"].to_pylist()), rtol=0, atol=1e-5
    )
    if found["OSMID"].to_pylist() != expected["OSMID"].to_pylist() or not near:
        raise Failure(f"{name}: other embeddings")


@fault("clock set back ten years, files of the future")
def clock(bench: Bench, tries: int) -> Iterator[str]:
    bench.clear()
    expect(bench.embed("--limit", 9), 0)
    for path in bench.output.rglob("*"):
        os.utime(path, (time.time() + 1e8, time.time() + 1e8))
    plain = time.time

    def set_back() -> None:
        time.time = lambda: plain() - 10 * 365 * 86400

    expect(bench.embed(prepare=set_back), 0)
    bench.check()
    yield RECOVERED


def kill_beside(main: Callable[..., None], *arguments: object, result: str) -> Fault:
    """Return the fault that a script beside stage 8 is killed: after a rerun its files are as undisturbed."""

    def read(bench: Bench) -> dict[str, bytes]:
        files = {}
        for path in sorted(bench.output.rglob("*")):
            if path.is_file() and path.suffix != ".log" and str(path.relative_to(bench.output)).startswith(result):
                files[str(path.relative_to(bench.output))] = path.read_bytes()
        return files

    def tried(bench: Bench, tries: int) -> Iterator[str]:
        line = [bench.output, *arguments]
        bench.finish()
        num_operations = count_operations(bench.output, main, line)
        expected = read(bench)
        for at in bench.choose_moments(num_operations, tries // 4):
            bench.finish()
            shutil.rmtree(bench.output / result, ignore_errors=True)
            expect(Run(main, line, disturb(bench.output, at, kill)).wait(), -9)
            expect(Run(main, line).wait(), 0)
            if read(bench) != expected:
                raise Failure(f"{main.__module__}: killed before operation {at}: not as undisturbed")
            yield RECOVERED

    return tried


FAULTS["aggregate_embeddings killed"] = kill_beside(aggregate_embeddings.main, result="_aggregated/OSMID")
FAULTS["cluster_embeddings killed"] = kill_beside(
    cluster_embeddings.main, "--threshold", "0.9", "--html", result="_clusters"
)


@fault("stage 7 killed while it publishes")
def publishing_killed(bench: Bench, tries: int) -> Iterator[str]:
    config = bench.folder / "config.toml"
    config.write_text(
        '[paths]\ncheckpoint_dir = "checkpoint"\npublished_model_dir = "again/model"\n'
        '[global]\nlog_dir = "logs"\n[embedding_model]\nmodel_name = "backbone"\n'
    )
    place = bench.folder / "again"
    line = ["--config", config]

    def read() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((place / "model").iterdir())}

    num_operations = count_operations(place, convert_to_hf.main, line)
    expected = read()
    for at in bench.choose_moments(num_operations, tries // 10):
        shutil.rmtree(place)
        expect(Run(convert_to_hf.main, line, disturb(place, at, kill)).wait(), -9)
        expect(Run(convert_to_hf.main, line).wait(), 0)
        if read() != expected:
            raise Failure(f"killed before operation {at}: not as undisturbed")
        yield RECOVERED
