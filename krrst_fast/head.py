"""A closed-form layer: ridge regression in place of a linear head that is trained."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self  # torch brings it

from krrst_fast.backends import BackendName
from krrst_fast.krr import krr_fit, predict_linear
from krrst_fast.ops import checks, options
from krrst_fast.ops.krr import krr_predict
from krrst_fast.ops.options import Check, Precision, PredictOptions, RidgeOf
from krrst_fast.ops.prepare import result_dtype
from krrst_fast.planner import Form

PROBE = ("weights", "intercept")


class RidgeHead(nn.Module):
    """Kernel ridge regression from a support set to queries, within a network or on a frozen one.

    Per episode, `head(f_support, y_support, f_query)` fits the support set and predicts the
    queries, differentiably: the head of R2-D2 (arXiv 1805.08136). Once and for all, `fit(f, y)`
    keeps a closed-form probe in buffers, which `head(f)` applies as a linear layer.

    Args:
        ridge: positive; of what, says `ridge_of`.
        learn_ridge: it is where a parameter starts: `log_ridge`, so that it stays positive.
        calibrate: predictions are times `output_scale` and plus `output_shift`, which are learnt:
            of regression to 0 and 1 they make logits.
        num_classes: of integer labels, which become 0 and 1.

    The others are those of `krrst_fast.krr_predict`.

    Attributes:
        weights: of the probe [..., D, P], or None before `fit`.
        intercept: of the probe [..., P], or None before `fit`.
    """

    weights: Tensor | None
    intercept: Tensor | None

    def __init__(
        self,
        *,
        ridge: float = 1.0,
        learn_ridge: bool = False,
        ridge_of: RidgeOf = "absolute",
        detach_ridge: bool = True,
        scale: float = 1.0,
        bias: float = 0.0,
        calibrate: bool = False,
        num_classes: int | None = None,
        precision: Precision | None = None,
        refine: int = 0,
        form: Literal["auto"] | Form = "auto",
        backend: BackendName = "auto",
        max_retries: int | None = None,
        check: Check = "raise",
    ) -> None:
        super().__init__()
        if isinstance(ridge, Tensor):
            raise TypeError("RidgeHead: ridge must be a number; learn_ridge=True makes it learn")
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError(
                f"RidgeHead: num_classes must be a whole number, one or more, got {num_classes!r}"
            )
        self.num_classes = num_classes
        self.detach_ridge = detach_ridge
        self._settings: dict[str, Any] = {
            "ridge_of": ridge_of,
            "scale": scale,
            "bias": bias,
            "precision": precision,
            "refine": refine,
            "form": form,
            "backend": backend,
            "max_retries": max_retries,
            "check": check,
        }
        given = {"ridge": ridge, "detach_ridge": detach_ridge, **self._settings}
        options.read("RidgeHead", given, PredictOptions)
        self._ridge = float(ridge)
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge))) if learn_ridge else None
        self.output_scale = nn.Parameter(torch.tensor(1.0)) if calibrate else None
        self.output_shift = nn.Parameter(torch.tensor(0.0)) if calibrate else None
        for name in PROBE:
            self.register_buffer(name, None)

    @property
    def ridge(self) -> float | Tensor:
        """The ridge, a tensor [] if it is learnt."""
        return self._ridge if self.log_ridge is None else self.log_ridge.exp()

    def forward(
        self, f_support: Tensor, y_support: Tensor | None = None, f_query: Tensor | None = None
    ) -> Tensor:
        """Predictions [..., B, P] at f_query, fitted to the support set; or of the probe at f.

        Args:
            f_support: features [..., M, D]; alone, features [..., B, D] for the probe.
            y_support: targets [..., M, P], or integer labels [..., M].
            f_query: features [..., B, D].

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit, or a bad label.
            RuntimeError: features alone, and there is no probe.
            NotPositiveDefiniteError: the ridge is too small, with check="raise".
        """
        if y_support is None and f_query is None:
            return self.predict(f_support)
        if y_support is None or f_query is None:
            raise ValueError("RidgeHead: y_support and f_query come together, or neither does")
        prediction = krr_predict(
            f_support,
            self._targets(y_support, f_support),
            f_query,
            ridge=self.ridge,
            detach_ridge=self.detach_ridge,
            **self._settings,
        )
        return self._calibrated(prediction)

    def fit(self, f: Tensor, y: Tensor) -> Self:
        """Keep the regression of y [..., M, P], or integer labels [..., M], on f [..., M, D].

        No gradients are recorded. The probe is part of `state_dict`, and a head without one, or
        with one of another shape, loads it.
        """
        fit = krr_fit(f, self._targets(y, f), ridge=self.ridge, **self._settings)
        dtype = result_dtype(f, y)
        self.weights, self.intercept = fit.weights.to(dtype), fit.intercept.to(dtype)
        return self

    def predict(self, f: Tensor) -> Tensor:
        """Predictions [..., B, P] of the probe at f [..., B, D]; differentiable in f.

        Computed in the dtype of the probe, float32 or more, also under autocast.
        """
        if self.weights is None or self.intercept is None:
            raise RuntimeError(
                "RidgeHead: there is no probe; call fit, or load a state_dict of one"
            )
        checks.matrices("RidgeHead", f=f)
        dtype = result_dtype(self.weights)
        if result_dtype(f) != dtype:
            raise TypeError(f"RidgeHead: f is {f.dtype}, and the probe {self.weights.dtype}")
        prediction = predict_linear(
            "RidgeHead",
            f,
            self.weights.to(dtype),
            self.intercept.to(dtype),
            rounds=self._settings["precision"] == "fast",
            raises=self._settings["check"] == "raise",
        )
        return self._calibrated(prediction)

    def _targets(self, y: Tensor, f: Tensor) -> Tensor:
        """y, or for integer labels [..., M] their rows of 0 and 1 [..., M, P]."""
        for name, x in (("features", f), ("targets", y)):
            if not isinstance(x, Tensor):
                raise TypeError(f"RidgeHead: {name} must be a tensor, got {type(x).__name__}")
        if y.is_floating_point():
            return y
        if self.num_classes is None:
            raise ValueError(f"RidgeHead: labels ({y.dtype}) need num_classes")
        if y.shape[-1:] != f.shape[-2:-1]:
            raise ValueError(
                f"RidgeHead: labels must be [..., M] for features [..., M, D], "
                f"got shapes {tuple(y.shape)} and {tuple(f.shape)}"
            )
        classes = torch.arange(self.num_classes, device=y.device)
        rows = (y.unsqueeze(-1) == classes).to(f.dtype)
        # Asking a GPU would stall it: there a label that is no class makes its episode NaN.
        known = (y >= 0) & (y < self.num_classes)
        if checks.readable(y) and not known.all():
            raise ValueError(
                f"RidgeHead: labels must be 0 to {self.num_classes - 1}, "
                f"got {int(y.min())} to {int(y.max())}"
            )
        return rows.masked_fill(~known.unsqueeze(-1), math.nan)

    def _calibrated(self, prediction: Tensor) -> Tensor:
        if self.output_scale is None or self.output_shift is None:
            return prediction
        return self.output_scale * prediction + self.output_shift

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A probe has the shape of what it was fitted to, which a fresh head cannot know.
        for name in PROBE:
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (mine is None or mine.shape != saved.shape):
                device = (next(self.parameters(), saved) if mine is None else mine).device
                dtype = (saved if mine is None else mine).dtype
                setattr(self, name, torch.empty(saved.shape, dtype=dtype, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The ridge (where it started, if it learns), the classes, and the shape of the probe."""
        parts = [f"ridge={self._ridge:g}", f"ridge_of={self._settings['ridge_of']!r}"]
        parts += [f"{name}={self._settings[name]}" for name in ("scale", "bias")]
        parts += ["learn_ridge=True"] * (self.log_ridge is not None)
        parts += ["calibrate=True"] * (self.output_scale is not None)
        parts += [f"num_classes={self.num_classes}"] * (self.num_classes is not None)
        if self.weights is not None:
            parts.append(f"probe={list(self.weights.shape)}")
        return ", ".join(parts)
