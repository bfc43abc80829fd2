"""The README.md of a data set on Hugging Face: a YAML header and a page."""

import json
import re
from collections.abc import Mapping
from typing import Any

from krrst_fast.distill.distilled_set import DistilledSet

_LICENCE = (
    " Before you publish them, put the licence of that set into the first lines of this file."
)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


def card(distilled: DistilledSet, about: Mapping[str, Any]) -> str:
    """Return the card of an exported set; `about` is what its krrst.json holds.

    Where the set does not say its licence it is `unknown`: it is that of the images that were
    distilled, their owner's to say.
    """
    count, licence = len(distilled), about["meta"].get("license", "")
    # It becomes a value in YAML, and a set may come from anywhere.
    known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) is not None
    size = next((name for most, name in _SIZES if count < most), "100K<n<1M")
    header = [
        "---",
        "pretty_name: Distilled images",
        f"license: {licence if known else 'unknown'}",
        "library_name: krrst_fast",
        "task_categories:",
        "- image-feature-extraction",
        "size_categories:",
        f"- {size}",
        "tags:",
        "- dataset-distillation",
        "- krrst",
    ]
    if about["format"] == "imagefolder":
        header += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
        header += ["    path: train/**"]
    shape = " x ".join(map(str, about["shape"][1:]))
    rows = {
        "Layout": about["format"],
        "Images": f"{count} of {shape} (channels x height x width)",
        "Numbers in the image files": about["image_range"],
        "Mean, a channel": json.dumps(about["mean"]),
        "Standard deviation, a channel": json.dumps(about["std"]),
        "Labels": _label_words(about),
        "Order of the classes": ", ".join(about["classes"]) or "not known",
        "Target network": about["encoder"] or "not known",
        "Method": about["meta"].get("method", "not known"),
    }
    if "source" in about["meta"]:
        rows["Made from"] = about["meta"]["source"]
    table = [
        f"| {key} | {str(value).replace('|', chr(92) + '|').replace(chr(10), ' ')} |"
        for key, value in rows.items()
    ]
    body = [
        "# Distilled images",
        "",
        "A few synthetic images that stand for a larger set, made by krrst_fast."
        + ("" if known else _LICENCE),
        "",
        "| | |",
        "|---|---|",
        *table,
        "",
        "`krrst.json` holds all of this for programs; `targets.npy` holds the targets, "
        "one row an image, in the order of the images.",
    ]
    return "\n".join([*header, "---", "", *body, ""])


def _label_words(about: Mapping[str, Any]) -> str:
    if about["label_kind"] == "representation":
        return "none; the targets are outputs of the target network"
    words = {"class": "one class an image, counted from 0", "soft": "one score a class"}
    origin = f"; those of {about['labels_from']}" if about.get("labels_from") else ""
    return words[about["label_kind"]] + origin
