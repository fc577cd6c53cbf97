"""What the campaign does to the stages before: what hides rows, tars without embeddings, overwriting."""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator

import pyarrow.parquet as pq
from config_files import write_config
from faults.bench import Bench, Failure, expect, expect_refusal
from faults.disturbances import RECOVERED, REFUSED, fault
from faults.harness import Outcome, Run, count_operations, disturb, interrupt_twice, kill
from published_models import make_photographs
from raw_tars import make_city, write_tar

from generate_embeddings import generate_embeddings
from preprocess_raw_data import compute_fingerprints, merge_and_split, process_tar
from publish_model import package_images

SECTIONS = {"embedding_model": {"model_name": "../backbone"}, "infrastructure": {"device": "cpu", "num_workers": 1}}
STAGES: dict[int, tuple[Callable[..., None], str]] = {
    1: (process_tar.main, "intermediates"),
    2: (generate_embeddings.main, "embeddings"),
    3: (merge_and_split.main, "merged"),
    4: (compute_fingerprints.main, "fingerprints"),
}


class Workspace:
    """Two small tars and what stages 1 to 4 make of them."""

    def __init__(self, bench: Bench) -> None:
        self.folder = bench.folder / "workspace"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.tars = [self.folder / "raw" / f"000{number}.tar" for number in (1, 2)]
        for number, path in enumerate(self.tars, start=1):
            write_tar(path, make_city(number, [2, 3, 2, 4]))
        write_config(self.folder, **SECTIONS)
        for stage in STAGES:
            expect(self.run(stage), 0)
        self.undisturbed = self.read()

    def line(self, *more: object) -> list[object]:
        """Return the command line of a stage."""
        return ["--config", self.folder / "config.toml", *more]

    def run(self, stage: int, *more: object) -> Outcome:
        """Run a stage."""
        return Run(STAGES[stage][0], self.line(*more)).wait()

    def read(self) -> dict[str, object]:
        """Return every table."""
        return {str(path.relative_to(self.folder)): pq.read_table(path) for path in self.folder.rglob("*.parquet")}

    def check(self) -> None:
        """Compare every table with the undisturbed one."""
        found = self.read()
        if found.keys() != self.undisturbed.keys() or any(found[name] != self.undisturbed[name] for name in found):
            raise Failure("not as undisturbed")


@fault("tars put together, or with zeros in their midst")
def rows_behind_the_end(bench: Bench, tries: int) -> Iterator[str]:
    work = Workspace(bench)
    first, second = (path.read_bytes() for path in work.tars)
    with tarfile.open(work.tars[0]) as tar:
        middle = tar.getmembers()[7].offset
    for data in (first + second, first[:middle] + bytes(1024) + first[middle + 1024 :]):
        work.tars[0].write_bytes(data)
        for stage in (1, 4):
            shutil.rmtree(work.folder / STAGES[stage][1])
            expect_refusal(work.run(stage), "0001")
            if list((work.folder / STAGES[stage][1]).glob("0001*")):
                raise Failure(f"stage {stage}: a tar that was read in part has an output")
        work.tars[0].write_bytes(first)
        for stage in STAGES:
            expect(work.run(stage), 0)
        work.check()
        yield REFUSED


@fault("photographs behind linked folders and in folders that cannot be read")
def hidden_photographs(bench: Bench, tries: int) -> Iterator[str]:
    place, output = bench.folder / "photos", bench.folder / "photos_out"
    for path in (place, output, bench.folder / "elsewhere"):
        shutil.rmtree(path, ignore_errors=True)
    images = make_photographs(6)
    for number, image in enumerate(images):
        folder = (place, place / "below", bench.folder / "elsewhere")[number % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    (place / "linked").symlink_to(bench.folder / "elsewhere")
    (place / "loop").symlink_to(place)

    def forbid() -> None:
        raise PermissionError(13, "Permission denied", str(place / "below"))

    arguments = ["--input", place, "--output", output]
    expect_refusal(Run(package_images.main, arguments, disturb(place / "below", 1, forbid)).wait(), "below")
    expect(Run(package_images.main, arguments).wait(), 0)
    ids = pq.read_table(output)["OSMID"].to_pylist()
    if ids != ["0.jpg", "3.jpg", "below/1.jpg", "below/4.jpg", "linked/2.jpg", "linked/5.jpg"]:
        raise Failure(f"photographs are missing or twice there: {ids}")
    yield REFUSED


@fault("a tar without embeddings when the splits are made")
def missing_embeddings(bench: Bench, tries: int) -> Iterator[str]:
    work = Workspace(bench)
    lost = work.folder / "embeddings" / "0002_embeddings.parquet"
    for overwrite in ((), ("--overwrite",)):
        lost.unlink()
        expect_refusal(work.run(3, *overwrite), "0002", "run the stage that makes them")
        if {name for name in work.read() if name.startswith("merged")} != {
            name for name in work.undisturbed if name.startswith("merged")
        }:
            raise Failure("the splits that were there are gone")
        expect(work.run(2), 0)
        expect(work.run(3), 0)
        work.check()
        yield REFUSED


@fault("--overwrite of stages 1 to 4 killed before a file operation")
def overwriting_stages_killed(bench: Bench, tries: int) -> Iterator[str]:
    work = Workspace(bench)
    for stage, (main, folder) in STAGES.items():
        num_operations = count_operations(work.folder, main, work.line("--overwrite"))
        for at in bench.choose_moments(num_operations, tries // 10):
            expect(Run(main, work.line("--overwrite"), disturb(work.folder, at, kill)).wait(), -9)
            for path in (work.folder / folder).glob("*.parquet"):  # each is the old one or the new one, and whole
                pq.read_table(path)
            expect(work.run(stage), 0)
            work.check()
            yield RECOVERED


@fault("two SIGINTs at once before a file operation of stages 1 to 4")
def interrupted_twice(bench: Bench, tries: int) -> Iterator[str]:
    work = Workspace(bench)
    for stage, (main, folder) in STAGES.items():
        num_operations = count_operations(work.folder, main, work.line("--overwrite"))
        for at in bench.choose_moments(num_operations, tries // 10):
            shutil.rmtree(work.folder / folder)
            expect(Run(main, work.line(), disturb(work.folder, at, interrupt_twice)).wait(), 130, 0)
            expect(work.run(stage), 0)
            work.check()
            yield RECOVERED


@fault("tars copied, or changed without another size, between two runs of stages 1, 2 and 4")
def changed_tars(bench: Bench, tries: int) -> Iterator[str]:
    work = Workspace(bench)
    tar = work.tars[0]
    data = tar.read_bytes()
    for moment, name in enumerate(("copied", "changed"), start=1):
        tar.write_bytes(data if name == "copied" else data.replace(b" -90.5 ", b" -91.5 "))
        os.utime(tar, (moment, moment))
        for stage in (1, 2, 4):
            if name == "copied":
                expect(work.run(stage), 0)
            else:
                expect_refusal(work.run(stage), "input 0001.tar has changed")
        work.check()
        yield RECOVERED if name == "copied" else REFUSED
    tar.write_bytes(data)
    for stage in STAGES:
        expect(work.run(stage), 0)
    work.check()
