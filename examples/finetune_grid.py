"""When does fine-tuning gain? Steps x rates x labels, for several ways to pre-train; one figure.

python examples/finetune_grid.py STORE OUT.svg RUN [RUN ...], where STORE is a labelled store of
`krrst prepare` and the RUNs are distillations of one size, which seeds take in turn. Every cell is
an evaluation of its own in the first RUN: a stopped call goes on where it was. It prints the figure
as a table, too.
"""

import argparse
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from krrst_fast.evaluate import (
    EvaluateConfig,
    Evaluation,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
)
from krrst_fast.models import ModelConfig

parser = argparse.ArgumentParser()
parser.add_argument("store", type=Path)
parser.add_argument("figure", type=Path)
parser.add_argument("runs", type=Path, nargs="+")
parser.add_argument("--labels", default="10,50,all", help="of each class")
parser.add_argument("--steps", default="100,1000")
parser.add_argument("--rates", default="0.01,0.03,0.1")
parser.add_argument("--methods", default="none,random_target,distilled,random_20x")
parser.add_argument("--widths", default="16,32,64")
parser.add_argument("--pretrain_steps", type=int, default=1000)
parser.add_argument("--seeds", type=int, default=3)
args = parser.parse_args()

LABELS, STEPS = args.labels.split(","), [int(steps) for steps in args.steps.split(",")]
RATES = [float(rate) for rate in args.rates.split(",")]
METHODS = tuple(args.methods.split(","))
NAMES = {
    "none": "no pre-training",
    "random_target": "real images",
    "distilled": "distilled images",
    "random_20x": "20 times as many real images",
}


def cell(labels: str, steps: int, rate: float) -> Evaluation:
    """Fine-tune every method with every seed at one rate."""
    return evaluate(
        EvaluateConfig(
            run=tuple(args.runs),
            store=args.store,
            name=f"grid-{labels}-{steps}-{rate:g}",
            methods=METHODS,
            seeds=args.seeds,
            model=ModelConfig(widths=tuple(map(int, args.widths.split(",")))),
            pretrain=PretrainConfig(steps=args.pretrain_steps),
            probe=ProbeConfig(solver="ridge", labels=(5,), measures=("probe",)),
            finetune=FinetuneConfig(
                steps=steps,
                batch_size=64,
                lr=rate,
                labels_per_class=None if labels == "all" else int(labels),
            ),
        )
    )


def accuracy(found: Evaluation, method: str) -> tuple[float, float]:
    """Return the mean over the seeds, and the standard error of the difference to real images."""
    summary = found.summary(method, "finetune")
    assert summary is not None
    return summary.mean, summary.difference.standard_error if summary.difference else 0.0


matplotlib.rcParams["svg.fonttype"] = "none"
figure = Figure(figsize=(3 * len(LABELS), 2.6 * len(STEPS)), layout="constrained")
panels = figure.subplots(len(STEPS), len(LABELS), sharex=True, squeeze=False)
print("| labels a class | steps | rate | " + " | ".join(METHODS) + " |")
print("|---" * (3 + len(METHODS)) + "|")
for (row, steps), (column, labels) in product(enumerate(STEPS), enumerate(LABELS)):
    cells = {rate: cell(labels, steps, rate) for rate in RATES}
    for rate, found in cells.items():
        values = [accuracy(found, method) for method in METHODS]
        shown = " | ".join(f"{mean:.1f}" + f" +- {e:.1f}" * (e > 0) for mean, e in values)
        print(f"| {labels} | {steps} | {rate:g} | {shown} |")
    panel = panels[row, column]
    for method in METHODS:
        points = sorted((rate, accuracy(found, method)) for rate, found in cells.items())
        panel.errorbar(
            [rate for rate, _ in points],
            [mean for _, (mean, _) in points],
            [error for _, (_, error) in points],
            marker="o",
            markersize=3,
            label=NAMES.get(method, method),
        )
    panel.set_xscale("log")
    panel.set_title(f"{labels} labels a class, {steps} steps", fontsize=9)
    panel.set_xlabel("rate" if row + 1 == len(STEPS) else "")
    panel.set_ylabel("" if column else "accuracy, %")
names = panels[0, 0].get_legend_handles_labels()
figure.legend(*names, loc="outside lower center", ncols=2, fontsize=8)
figure.savefig(args.figure, metadata={"Date": None} if args.figure.suffix == ".svg" else None)
