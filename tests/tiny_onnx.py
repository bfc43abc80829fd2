"""A small ONNX model as bytes, without the package that writes them: it is a protocol buffer."""

import numpy as np
import numpy.typing as npt

_FLOAT = 1


def linear_model(weight: npt.NDArray[np.float32]) -> bytes:
    """The model Relu(Flatten(x) @ weight), x [batch, ...] and weight [D, P]."""
    tensor = b"".join(_number(1, n) for n in weight.shape) + _number(2, _FLOAT)
    tensor += _bytes(8, b"weight") + _bytes(9, weight.astype("<f4").tobytes())
    nodes = (
        _node("Flatten", ["x"], "flat"),
        _node("MatMul", ["flat", "weight"], "product"),
        _node("Relu", ["product"], "features"),
    )
    # The graph: nodes 1, name 2, weights 5, inputs 11, outputs 12. The model: version 7, opset 8.
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"linear") + _bytes(5, tensor)
    graph += _bytes(11, _value("x", 4)) + _bytes(12, _value("features", 2))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13))


def _node(kind: str, inputs: list[str], output: str) -> bytes:
    named = b"".join(_bytes(1, name.encode()) for name in inputs)
    return named + _bytes(2, output.encode()) + _bytes(4, kind.encode())


def _value(name: str, dimensions: int) -> bytes:
    """An array of floats whose dimensions are free."""
    shape = b"".join(_bytes(1, _bytes(2, f"{name}{i}".encode())) for i in range(dimensions))
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])
