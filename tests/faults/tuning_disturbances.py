"""What the campaign does to the tuning of stage 6: its worker is killed, or asked to stop, at any file operation."""

import csv
import itertools
import shutil
from collections.abc import Iterator

from config_files import write_config
from faults.bench import Bench, Failure, expect
from faults.disturbances import RECOVERED, fault
from faults.harness import Run, count_operations, disturb, kill, terminate
from training_data import SETTINGS, fill_workspace

from train_specialized_embeddings import tune

TRIALS = 2


@fault("a tuning worker killed or asked to stop before a file operation")
def tuning_stopped(bench: Bench, tries: int) -> Iterator[str]:
    folder = bench.folder / "tuning"
    shutil.rmtree(folder, ignore_errors=True)
    fill_workspace(folder)
    training = SETTINGS["training"] | {"num_epochs": 1, "batch_size": 64}
    write_config(folder, training=training, training_model={"output_dim": 8, "hidden_dim": 128})
    study = folder / "checkpoint" / "_tune"
    line = ["--config", folder / "config.toml", "--trials", TRIALS]
    num_operations = count_operations(study, tune.main, line)
    chosen = bench.random.sample(range(1, num_operations + 1), min(num_operations, max(2, tries // 5)))
    for at, (act, code) in zip(chosen, itertools.cycle([(kill, -9), (terminate, 143)]), strict=False):
        shutil.rmtree(study.parent)
        expect(Run(tune.main, line, disturb(study, at, act)).wait(), code)
        expect(Run(tune.main, line).wait(), 0)
        with open(study / "trials.csv", encoding="utf-8") as file:
            states = [row["state"] for row in csv.DictReader(file)]
        if states != ["complete"] * TRIALS:
            raise Failure(f"operation {at}: the trials are {states}")
        if "the settings as configured" not in (study / "best.toml").read_text():
            raise Failure(f"operation {at}: no trial has the configured settings")
        yield RECOVERED
