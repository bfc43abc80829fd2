"""A closed-form layer: ridge regression in place of a trained linear head."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self  # torch brings it

from krrst_fast.ops.centring import check_intercept
from krrst_fast.ops.fit import krr_fit
from krrst_fast.ops.fitted import predict_linear
from krrst_fast.ops.krr import krr_predict
from krrst_fast.ops.problem import (
    check_kernel,
    check_matrices,
    check_solver,
    readable,
    result_dtype,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver

PROBE = ("weights", "intercept")


class RidgeHead(nn.Module):
    """Kernel ridge regression from a support set to queries, in a network or on frozen features.

    For each episode, `head(f_support, y_support, f_query)` fits the support set and predicts the
    queries, differentiably: the head of R2-D2 (arXiv 1805.08136). `fit(f, y)` keeps a closed-form
    probe in buffers, which `head(f)` applies as a linear layer.

    Args:
        ridge: Positive number.
        learn_ridge: Learn the ridge, from `ridge` on, as the parameter `log_ridge`: so it stays
            positive.
        ridge_of: What the ridge multiplies: the "trace" of K_ss, its "mean_diagonal", or 1
            ("absolute").
        detach_ridge: Treat the trace as a constant in the gradient.
        scale: Positive factor of every inner product.
        bias: Non-negative constant that is added to every kernel value.
        intercept: Fit a constant that the ridge does not penalise; bias must then be 0.
        calibrate: Multiply predictions by `output_scale` and add `output_shift`, which are learnt:
            they turn a regression to 0 and 1 into logits.
        num_classes: The number of classes of integer labels, which become rows of 0 and 1.
        solver: How the system is solved.

    Attributes:
        weights: Coefficients of the probe [..., D, P], or None before `fit`.
        intercept: Intercept of the probe [..., P], or None before `fit`.
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
        intercept: bool = False,
        calibrate: bool = False,
        num_classes: int | None = None,
        solver: Solver = DEFAULT,
    ) -> None:
        super().__init__()
        if isinstance(ridge, Tensor):
            raise TypeError("RidgeHead: ridge must be a number; learn_ridge=True makes it learn")
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError(
                f"RidgeHead: num_classes must be a whole number, one or more, got {num_classes!r}"
            )
        check_kernel("RidgeHead", ridge, ridge_of, detach_ridge, scale, bias)
        check_solver("RidgeHead", solver)
        check_intercept("RidgeHead", intercept, bias)
        self.intercept_is_free = intercept
        self.num_classes = num_classes
        self.detach_ridge = detach_ridge
        self.solver = solver
        self._kernel: dict[str, Any] = {"ridge_of": ridge_of, "scale": scale, "bias": bias}
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
        """Fit the support set and predict [..., B, P] at f_query; or apply the probe to f.

        Args:
            f_support: Features [..., M, D]; as the only argument, features [..., B, D] for the
                probe.
            y_support: Targets [..., M, P], or integer labels [..., M].
            f_query: Features [..., B, D].

        Raises:
            ValueError: Shapes or devices that do not fit, or a label that is no class.
            TypeError: An argument of another type or dtype.
            RuntimeError: Features alone, without a probe.
            NotPositiveDefiniteError: The ridge is too small, with check="raise".
        """
        if y_support is None and f_query is None:
            return self.predict(f_support)
        if y_support is None or f_query is None:
            raise ValueError("RidgeHead: y_support and f_query come together, or neither does")
        targets, constant = self._targets(y_support, f_support), None
        if self.intercept_is_free:
            wide = result_dtype(f_support)  # a mean in half precision would lose its digits
            f_support, f_query, targets = (x.to(wide) for x in (f_support, f_query, targets))
            mean, constant = (x.mean(-2, keepdim=True) for x in (f_support, targets))
            f_support, f_query, targets = f_support - mean, f_query - mean, targets - constant
        prediction = krr_predict(
            f_support,
            targets,
            f_query,
            ridge=self.ridge,
            detach_ridge=self.detach_ridge,
            solver=self.solver,
            **self._kernel,
        )
        return self._calibrated(prediction if constant is None else prediction + constant)

    def fit(self, f: Tensor, y: Tensor) -> Self:
        """Fit a probe of y [..., M, P], or integer labels [..., M], on f [..., M, D].

        No gradients are recorded. The probe is part of `state_dict`; a head without a probe, or
        with one of another shape, can load it.
        """
        how: dict[str, Any] = {**self._kernel, "intercept": self.intercept_is_free}
        fit = krr_fit(f, self._targets(y, f), ridge=self.ridge, solver=self.solver, **how)
        dtype = result_dtype(f, y)
        probe = fit.weights.to(dtype), fit.intercept.to(dtype)
        if probe[0].is_inference():  # could not be trained through, or loaded into
            with torch.inference_mode(False):
                probe = probe[0].clone(), probe[1].clone()
        self.weights, self.intercept = probe
        return self

    def predict(self, f: Tensor) -> Tensor:
        """Apply the probe to f [..., B, D]: predictions [..., B, P], differentiable in f.

        Computed in the dtype of the probe, float32 or more, also under autocast.
        """
        if self.weights is None or self.intercept is None:
            raise RuntimeError(
                "RidgeHead: there is no probe; call fit, or load a state_dict of one"
            )
        check_matrices("RidgeHead", ("f",), (f,))
        dtype = result_dtype(self.weights)
        if result_dtype(f) != dtype:
            raise TypeError(
                f"RidgeHead: f must be {self.weights.dtype} like the probe, got {f.dtype}"
            )
        prediction = predict_linear(
            "RidgeHead",
            f,
            self.weights.to(dtype),
            self.intercept.to(dtype),
            self.solver,
        )
        return self._calibrated(prediction)

    def _targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return y, or for integer labels [..., M] rows of 0 and 1 [..., M, P]."""
        for name, x in (("features", f), ("targets", y)):
            if not isinstance(x, Tensor):
                raise TypeError(f"RidgeHead: {name} must be a tensor, got {type(x).__name__}")
        if y.is_floating_point():
            return y
        if self.num_classes is None:
            raise ValueError(f"RidgeHead: labels ({y.dtype}) need num_classes")
        if y.dtype == torch.bool or y.ndim >= f.ndim:
            raise TypeError(
                f"RidgeHead: labels must be class indices [..., M] of an integer dtype, and rows "
                f"of 0 and 1 floating, got {y.dtype} {list(y.shape)}; pass y.to(features.dtype)"
            )
        if y.shape[-1:] != f.shape[-2:-1]:
            raise ValueError(
                f"RidgeHead: labels must be [..., M] for features [..., M, D], "
                f"got shapes {tuple(y.shape)} and {tuple(f.shape)}"
            )
        y = y.long()  # the unsigned types compare with nothing
        classes = torch.arange(self.num_classes, device=y.device)
        rows = (y.unsqueeze(-1) == classes).to(f.dtype)
        # Reading labels would stall a GPU: a label that is no class makes its episode NaN.
        known = (y >= 0) & (y < self.num_classes)
        if readable(y) and not known.all():
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
        # A fresh head has no probe, so that its shape is that of the saved one.
        for name in PROBE:
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (mine is None or mine.shape != saved.shape):
                device = (next(self.parameters(), saved) if mine is None else mine).device
                dtype = (saved if mine is None else mine).dtype
                setattr(self, name, torch.empty(saved.shape, dtype=dtype, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the settings and the shape of the probe, for `repr`."""
        parts = [f"ridge={self._ridge:g}", f"ridge_of={self._kernel['ridge_of']!r}"]
        parts += [f"{name}={self._kernel[name]}" for name in ("scale", "bias")]
        parts += ["intercept=True"] * self.intercept_is_free
        parts += ["learn_ridge=True"] * (self.log_ridge is not None)
        parts += ["calibrate=True"] * (self.output_scale is not None)
        parts += [f"num_classes={self.num_classes}"] * (self.num_classes is not None)
        if self.weights is not None:
            parts.append(f"probe={list(self.weights.shape)}")
        return ", ".join(parts)
