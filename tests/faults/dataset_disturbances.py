"""What the campaign does to an embeddings dataset that is there: overwriting, takedowns, repairs, few open files."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from faults.bench import Bench, Failure, Files, expect, expect_refusal
from faults.disturbances import RECOVERED, REFUSED, fault
from faults.harness import Hook, Run, count_operations, disturb, kill

from publish_model import (
    aggregate_embeddings,
    delete_ids,
    generate_embeddings_from_parquet,
    verify_embeddings,
)

TAKEN_DOWN = ("way/1", "way/2", "way/9")


def read_files(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, logs apart, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }


def take_down(bench: Bench, data: bytes = b"", name: str = "ids.txt", prepare: Hook | None = None) -> Run:
    """Start delete_ids with a list."""
    path = bench.folder / name
    path.write_bytes(data or "\n".join(TAKEN_DOWN).encode())
    return Run(delete_ids.main, [bench.output, "--delete-ids", path], prepare)


@fault("--overwrite over a dataset whose deletion was killed")
def overwritten_deletion(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    num_operations = count_operations(bench.output, lambda _: delete(bench), [])
    expected = bench.read()
    for at in bench.choose_moments(num_operations, tries // 10):
        bench.clear()
        bench.finish()
        expect(take_down(bench, prepare=disturb(bench.output, at, kill)).wait(), -9)
        expect(bench.embed("--overwrite"), 0)
        expect(take_down(bench).wait(), 0)  # it may have been killed before it had noted anything
        if bench.read() != expected:
            raise Failure(f"killed before operation {at}, then overwritten: ids came back, or others went")
        expect(bench.embed(), 0)
        yield RECOVERED


def delete(bench: Bench) -> None:
    """Take the ids down in this process."""
    (bench.folder / "ids.txt").write_text("\n".join(TAKEN_DOWN))
    delete_ids.main([str(bench.output), "--delete-ids", str(bench.folder / "ids.txt")])


def check_gone(bench: Bench, expected: Files, what: str) -> None:
    """Raise Failure unless a takedown has left what it leaves undisturbed, and nothing else."""
    left = bench.read()
    if left != expected or not json.loads((bench.output / "_deleted" / "id_hashes.json").read_text())["done"]:
        raise Failure(f"{what}: {sorted(name for name in left | expected if left.get(name) != expected.get(name))}")


@fault("a takedown killed before each file operation")
def takedown_killed(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    expect(Run(aggregate_embeddings.main, [bench.output]).wait(), 0)
    shutil.copytree(bench.output / "parts", bench.output / "_removed" / "1" / "parts")
    whole = bench.folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(bench.output, whole)
    num_operations = count_operations(bench.output, lambda _: delete(bench), [])
    expected = bench.read()
    for at in bench.choose_moments(num_operations, tries):
        bench.clear()
        shutil.copytree(whole, bench.output)
        expect(take_down(bench, prepare=disturb(bench.output, at, kill)).wait(), -9)
        expect(take_down(bench).wait(), 0)
        check_gone(bench, expected, f"killed before operation {at}")
        yield RECOVERED


@fault("two takedowns beside stage 8")
def takedowns_at_once(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    expect(take_down(bench).wait(), 0)
    expected = bench.read()
    for _ in range(max(1, tries // 10)):
        bench.clear()
        expect(bench.embed("--limit", 9), 0)
        runs = [
            bench.start(),
            *(take_down(bench, one.encode(), f"{number}.txt") for number, one in enumerate(TAKEN_DOWN)),
        ]
        for outcome in [run.wait() for run in runs]:  # done, or refused in one line
            expect(outcome, 0) if outcome.code == 0 else expect_refusal(outcome)
        expect(take_down(bench).wait(), 0, 1)  # 1: ids of parts that stage 8 has not made yet match nothing
        expect(bench.embed(), 0)
        check_gone(bench, expected, "at once")
        yield RECOVERED


@fault("--overwrite with a model that is none")
def overwritten_by_no_model(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    for model in (bench.folder / "backbone", bench.folder / "none", bench.folder):
        line = ["-i", bench.input, "-o", bench.output, "--model-id", model, "--read-batch-size", 4, "--overwrite"]
        expect_refusal(Run(generate_embeddings_from_parquet.main, line).wait())
        bench.check()
        bench.check_rerun()
        yield REFUSED


@fault("--overwrite killed before a file operation")
def overwriting_killed(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    num_operations = count_operations(
        bench.output, generate_embeddings_from_parquet.main, bench.arguments("--overwrite")
    )
    for at in bench.choose_moments(num_operations - 1, tries // 4):
        bench.clear()
        bench.finish()
        old = {name: data for name, data in read_files(bench.output).items() if name.endswith(".parquet")}
        expect(bench.embed("--overwrite", prepare=disturb(bench.output, at, kill)), -9)
        left = read_files(bench.output)
        kept = {name.split("/", 2)[2] if name.startswith("_removed/") else name: data for name, data in left.items()}
        if any(kept.get(name) != data for name, data in old.items()):
            raise Failure(f"killed before operation {at}: a part is neither in its place nor in _removed")
        bench.check_rerun()
        yield RECOVERED


LISTS = {
    "a byte-order mark": ("ids.txt", "\ufeff" + "\n".join(TAKEN_DOWN)),
    "Windows' line ends": ("ids.txt", "\r\n".join(TAKEN_DOWN)),
    "CSV": ("ids.csv", "\n".join(["\ufeffOSMID;reason", *(f"{one};asked" for one in TAKEN_DOWN)])),
}


@fault("a takedown list as other programs write it")
def written_otherwise(bench: Bench, tries: int) -> Iterator[str]:
    bench.finish()
    expect(take_down(bench).wait(), 0)
    expected = bench.read()
    for name, text in LISTS.values():
        bench.clear()
        bench.finish()
        expect(take_down(bench, text.encode(), name).wait(), 0)
        if bench.read() != expected:
            raise Failure(f"{text!r}: not all of its ids are gone")
        yield RECOVERED
    bench.clear()
    bench.finish()
    expect_refusal(take_down(bench, "\n".join([*TAKEN_DOWN, "weg/1"]).encode()).wait(), "match nothing", "weg/1")
    if bench.read() != expected:
        raise Failure("a typo in the list: the other ids are not gone")
    yield REFUSED


def write_foreign(folder: Path) -> None:
    """Write a dataset in this layout as another program does: without a word of whose it is."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    for number in range(3):
        table = pa.table({"OSMID": [f"way/{number}"], "embedding": pa.array([[1.0, 0.0]], pa.list_(pa.float32()))})
        pq.write_table(table, folder / "parts" / f"rg00000_rb{number:05d}.parquet")
    (folder / "state.json").write_text(json.dumps({"input_path": "in.parquet", "model_id": "m", "rows_embedded": 3}))


@fault("a dataset of another program, sound or damaged")
def not_ours(bench: Bench, tries: int) -> Iterator[str]:
    place = bench.folder / "foreign"
    for damaged in (False, True):
        write_foreign(place)
        if damaged:
            part = place / "parts" / "rg00000_rb00001.parquet"
            part.write_bytes(part.read_bytes()[:-30])
        before = read_files(place)
        for outcome in (
            bench.verify(output=place),
            bench.verify("--repair", output=place),
            bench.embed(output=place),
            bench.embed("--overwrite", output=place),
            Run(delete_ids.main, [place, "--delete-ids", bench.folder / "ids.txt"]).wait(),
        ):
            expect_refusal(outcome, "not written by this project")
            if read_files(place) != before:
                raise Failure("a file that is not ours was removed or changed")
            yield REFUSED


@fault("verify --repair killed before a file operation")
def repair_killed(bench: Bench, tries: int) -> Iterator[str]:
    for at in range(1, max(3, tries // 10)):
        bench.clear()
        bench.finish()
        for part in sorted((bench.output / "parts").iterdir())[:2]:
            part.write_bytes(part.read_bytes()[:-30])
        line = [bench.output, "--input", bench.input, "--repair"]
        outcome = Run(verify_embeddings.main, line, disturb(bench.output, at, kill)).wait()
        expect(outcome, -9, 0)
        expect(bench.verify("--repair"), 0)
        bench.check_rerun()
        yield RECOVERED


def allow_files(spare: int) -> Hook:
    """Return a preparation after which only so many more files can be open."""

    def prepare() -> None:
        used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
        free = [number for number in range(max(used) + spare + 2) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    return prepare


@fault("too many open files")
def few_files(bench: Bench, tries: int) -> Iterator[str]:
    for spare in (0, 1, 2, 3, 5, 8, 13):
        bench.clear()
        bench.finish()
        before = read_files(bench.output)
        line = [bench.output, "--input", bench.input, "--repair"]
        outcome = Run(verify_embeddings.main, line, allow_files(spare)).wait()
        if outcome.code:
            expect_refusal(outcome)
        if "damaged" in outcome.stderr or read_files(bench.output) != before:
            raise Failure(f"{spare} files more: sound files are called damaged: {outcome.stderr[-1000:]}")
        bench.check_rerun()
        yield REFUSED if outcome.code else RECOVERED


@fault("no right to read a part (simulated)")
def no_right(bench: Bench, tries: int) -> Iterator[str]:
    for _ in range(max(1, tries // 20)):
        bench.finish()
        part = bench.part()

        def prepare(part: Path = part) -> None:
            plain = pq.ParquetFile

            def open_file(path: object, *arguments: object, **options: object) -> pq.ParquetFile:
                if path == part:
                    raise PermissionError(13, os.strerror(13), str(path))
                return plain(path, *arguments, **options)

            pq.ParquetFile = open_file

        for outcome in (
            Run(verify_embeddings.main, [bench.output, "--repair"], prepare).wait(),
            bench.embed(prepare=prepare),
        ):
            expect_refusal(outcome, "Permission denied")
        bench.check_rerun()
        yield REFUSED
