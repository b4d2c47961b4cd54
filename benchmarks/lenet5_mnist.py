"""LeNet-5 on MNIST: test accuracy of Tucker training at two budgets, dense beside it.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/lenet5_mnist.py --jobs 2

It trains every setting with three seeds by ``geotucker train``, writes the last epoch of each
run to ``benchmarks/results/lenet5_mnist.csv`` and prints mean and range. MNIST is downloaded, or
read from the folder that ``GEOTUCKER_DATA_DIR`` names. About an hour on two cores.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from tables import write

RECIPE = ["--data", "mnist", "--model", "lenet5", "--optimizer", "sgd", "--lr", "0.2",
          "--batch-size", "64", "--epochs", "12", "--basis-every", "1",
          "--threads", "1"]  # fmt: skip
SETTINGS = {
    "5%": ["--budget", "5%"],  # with the dense baseline
    "3%": ["--budget", "3%", "--no-baseline"],
}
RESULTS = Path(__file__).parent / "results" / "lenet5_mnist.csv"


def train(job: tuple[str, int, Path]) -> list[dict[str, object]]:
    """Train one setting with one seed, or go on with it, and return its last epochs."""
    setting, seed, out = job
    folder = out / f"{setting.strip('%')}-{seed}"
    command = [sys.executable, "-m", "geotucker", "train"]
    if (folder / "checkpoint.safetensors").exists():
        command += ["--resume", str(folder)]
    else:
        command += [*RECIPE, *SETTINGS[setting], "--seed", str(seed), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {line["network"]: line for line in lines}
    return [
        {
            "setting": setting if network == "tucker" else "dense",
            "network": network,
            "seed": seed,
            "epochs": line["epoch"],
            "parameters": line["parameters"],
            "compression": round(100 * line["compression"], 2),
            "test_accuracy": round(100 * line["test_accuracy"], 2),
        }
        for network, line in last.items()
    ]


def main(
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/lenet5_mnist"),
) -> None:
    """Train everything and write the table."""
    todo = [(setting, seed, out) for seed in range(seeds) for setting in SETTINGS]
    with ThreadPoolExecutor(jobs) as pool:
        rows = [row for rows in pool.map(train, todo) for row in rows]
    rows.sort(key=lambda row: (str(row["setting"]), str(row["seed"])))
    write(RESULTS, rows)
    for setting in ["dense", *SETTINGS]:
        chosen = [row for row in rows if row["setting"] == setting]
        accuracies = [float(str(row["test_accuracy"])) for row in chosen]
        typer.echo(
            f"{setting:>5}: {mean(accuracies):.2f} % ({min(accuracies):.2f} to "
            f"{max(accuracies):.2f}), {chosen[0]['parameters']:,} parameters, "
            f"{chosen[0]['compression']} % saved"
        )


if __name__ == "__main__":
    typer.run(main)
