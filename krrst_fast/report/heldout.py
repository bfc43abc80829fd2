"""The held-out R2 of a run on its page: at the end, along the run, and in words."""

from krrst_fast.distill.heldout import ATTAINABLE, OURS, REAL, last_figures, nothing_to_distil
from krrst_fast.report import figures
from krrst_fast.report.figures import Curve, column
from krrst_fast.report.run_folder import Run
from krrst_fast.report.verdict import typographic


def at_the_end(run: Run) -> tuple[str, str] | None:
    """Return the last held-out R2 of the synthetic set, and that of real images in words."""
    found = last_figures(run.rows)
    if OURS not in found or REAL not in found:
        return None
    real = f"as many real images {found[REAL]:+.2f}"
    return typographic(f"{found[OURS]:+.2f}"), typographic(real)


def held_out_curve(run: Run) -> Curve | None:
    """Plot the held-out figures along the run; None where there are fewer than two."""
    step, ours, real, most = (column(run.rows, x) for x in ("step", OURS, REAL, ATTAINABLE))
    return figures.held_out(step, ours, real, most, _caption(run))


def _caption(run: Run) -> str:
    found = last_figures(run.rows)
    text = (
        "How much of the variance of the target\u2019s outputs kernel ridge regression explains, "
        "by the features of the pool\u2019s oldest network, on images that the run has not seen; "
        "below 0 their mean explains more."
    )
    if OURS in found and REAL in found:
        text += (
            f" At the end: distilled {found[OURS]:+.3f}, as many real images {found[REAL]:+.3f}."
        )
    if ATTAINABLE in found:
        text += (
            " Attainable through the same network, with up to 2,000 real images and the best "
            f"ridge: {found[ATTAINABLE]:+.3f}."
        )
    if nothing_to_distil(found):
        near = "The real images come near that as they are"
        reason = near if found[ATTAINABLE] > 0 else "No real images predict the target"
        text += (
            f" {reason}, so there was hardly anything to distil: a stronger target helps more "
            "than any setting."
        )
    return typographic(text)
