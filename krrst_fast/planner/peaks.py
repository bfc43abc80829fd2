"""The peak memory of a call of `krr_mse` with its gradients, from the arrays that live at a time.

Each function follows the code that it describes, array by array. Vectors are not counted, nor what
libraries keep for good: buffers of MKL, stacks of threads.
"""

from krrst_fast.planner.sizes import FLOAT64_UP_TO, Form, suits_thin

# csrc/cpu/gemm.inc: vectors of a panel's rows.
_PANEL_VECTORS = 3
# csrc/cpu/thin_matmul.cpp: panels that are packed at a time, and their depth.
_THIN_BY_COLUMNS, _THIN_BY_ROWS = (8, 128), (2, 512)
# csrc/cpu/gram.cpp: depth of a packed chunk, and the rows up to which there are no panels, for any
# depth and for a depth that is not smaller.
_CHUNK, _FEW_ROWS, _DOT_ROWS = 256, 64, 192
# csrc/cpu/batched_matmul.cpp: the largest block.
_BLOCK_ROWS, _BLOCK_COLUMNS = 60, 960
# A vector of AVX-512. Narrower ones make other choices of what to copy.
_VECTOR_BYTES = 64
# csrc/cpu/batched_cholesky.cpp: vectors of right-hand sides that are solved together.
_VECTORS = 4


def peak_bytes(form: Form, m: int, b: int, d: int, p: int, itemsize: int, whole: bool) -> int:
    """Return the peak of one problem beyond its inputs, in bytes.

    Args:
        form: The closed form.
        m, b, d, p: The sizes.
        itemsize: Bytes of a number of the computation.
        whole: One C++ operator computes each pass.
    """
    count = _whole if whole else _by_steps
    return round(itemsize * count(form, m, b, d, p, itemsize))


def _by_steps(form: Form, m: int, b: int, d: int, p: int, itemsize: int) -> float:
    """Count what `ops.closed_forms` allocates with `backends.cpp`, in numbers."""
    n = d if form == "primal" else m
    # Our Cholesky works in a copy, and solves without one; LAPACK factors in place, and solves in a
    # copy of the factor.
    own = n <= FLOAT64_UP_TO
    factor = n * n * (8 / itemsize if own else 1.0)
    factoring, solving = (factor, 0.0) if own else (0.0, factor)
    kept = _kept(form, m, b, d, p) + factor
    target = d * p if form == "primal" else 0  # F_s^T Y_s
    forward = max(
        n * n + target + factor + max(factoring, n * p + solving),
        kept + b * p,  # the squares of the error
    )

    def thin(rows: int, depth: int, columns: int, by_columns: bool = False) -> int:
        return _thin(rows, depth, columns, by_columns, _VECTOR_BYTES // itemsize)

    # [alpha, -beta] beside -beta, or [V, W]
    closing = max(3 * m * p, 2 * (m + d) * p + m * d + thin(m, 2 * p, d))
    if form == "k":
        forward = max(forward, kept + thin(b, m, p, True))
        # The sum of the outer product and its transpose; beside it alpha R^T, and that times F_r
        last = m * m + m * b + max(thin(m, p, b, True), m * d + thin(m, b, d))
        # R and K_sr R, then beta
        backward = b * p + m * p + max(thin(m, b, p), m * p + max(solving, 2 * m * m, last))
    elif form == "w":
        forward = max(forward, kept + max(thin(d, m, p, True) - b * p, thin(b, d, p)))
        # R, dW and its product with F_s, then beta, and its product with F_s
        after = max(thin(m, d, p), m * p + max(solving, d * p + thin(d, m, p, True), closing))
        backward = b * p + d * p + max(thin(d, b, p, True), m * p + after)
    else:
        forward = max(forward, n * n + d * p + thin(d, m, p, True), kept + thin(b, d, p))
        # R and F_r^T R; V in its place, and beside it dY and the residual, a prediction before
        after = max(d * p + solving, 3 * m * p, 2 * m * p + max(closing, thin(m, d, p)))
        backward = b * p + d * p + max(thin(d, b, p, True), after)
    return max(forward, kept + backward)


def _whole(form: Form, m: int, b: int, d: int, p: int, itemsize: int) -> float:
    """Count what csrc/cpu/krr_forward.cpp and krr_backward.cpp allocate on one thread, in numbers.

    Scratch memory that a class of theirs holds is there for the whole pass.
    """
    n, depth = (d, m) if form == "primal" else (m, d)
    double, lanes = 8 / itemsize, _VECTOR_BYTES // itemsize
    factor = n * n * double
    target = d * p + d * d if form == "primal" else 0  # F_s^T Y_s, and the Gram before its border
    if n < _FEW_ROWS or n <= min(_DOT_ROWS, depth):
        packed = d * m if form == "primal" else 0  # the columns of F_s, as rows
    else:
        panel = _PANEL_VECTORS * lanes
        packed = -(-n // panel) * panel * min(depth, _CHUNK)
    # Products [rows, depth, columns], and whether each factor lies by rows.
    before: list[tuple[int, int, int, bool, bool]]
    after: list[tuple[int, int, int, bool, bool]]
    if form == "k":
        before = [(m, d, b, True, False), (b, m, p, False, True)]
        after = [(b, p, m, True, False), (m, b, p, True, True), (m, p, m, True, False)]
        after += [(m, b, d, False, True), (m, m, d, True, True)]
        scratch = b * m + 2 * m * m + m * d
    elif form == "w":
        before = [(p, m, d, False, True), (b, d, p, True, False)]
        after = [(p, b, d, False, True), (m, d, p, True, False), (p, m, d, False, True)]
        after += [(m, 2 * p, d, True, True)]
        scratch = 2 * m * p + 3 * p * d
    else:
        before = [(d, m, p, False, True), (b, d, p, True, True)]
        after = [(d, b, p, False, True), (m, d, p, True, True), (m, 2 * p, d, True, True)]
        scratch = 4 * m * p + 2 * p * d
    solving = n * (_VECTORS * _VECTOR_BYTES // 8 + 1) * double
    forward = n * n + target + max(packed, factor, solving, *(_copied(*x, lanes) for x in before))
    scratch += b * p + 2 * n * p  # R, the right-hand side and the solution
    products = max(_copied(*x, lanes) for x in after)
    backward = m * d + m * p + scratch + max(products, solving)
    return _kept(form, m, b, d, p) + factor + max(forward, backward)


def _kept(form: Form, m: int, b: int, d: int, p: int) -> int:
    """Count what the forward pass saves beside the factor: error, coefficients, K_sr or W."""
    n = d if form == "primal" else m
    return b * p + n * p + {"k": m * b, "w": d * p, "primal": 0}[form]


def _thin(rows: int, depth: int, columns: int, by_columns: bool, lanes: int) -> int:
    """Count what csrc/cpu/thin_matmul.cpp copies where `backends.cpp.matmul` takes it."""
    if not suits_thin(rows, depth, columns, by_columns):
        return 0
    panels, chunk = _THIN_BY_COLUMNS if by_columns else _THIN_BY_ROWS
    return depth * columns + panels * _PANEL_VECTORS * lanes * (chunk + columns)


def _copied(rows: int, depth: int, columns: int, a: bool, b: bool, lanes: int) -> int:
    """Count what a product in csrc/cpu/batched_matmul.cpp copies: `choose` in it, and a block.

    a, b: Whether the factor lies by rows.
    """

    def vectors(count: int) -> int:
        return -(-count // lanes)

    down, across = -(-rows // _BLOCK_ROWS), -(-columns // _BLOCK_COLUMNS)
    tall, wide = -(-rows // max(down, 1)), -(-columns // max(across, 1))
    outputs, left, right = rows * columns, rows * depth, depth * columns
    padded = max(wide, lanes)
    ways = [  # vector operations, and copies of a block
        (
            outputs * (vectors(depth) + 6) + left * (not a) + right * b,
            tall * depth * (not a) + depth * padded * b,
        )
        if depth >= lanes
        else None,
        (rows * vectors(columns) * (depth + 2) + right * (not b), depth * padded * (not b))
        if columns >= lanes
        else None,
        (
            columns * vectors(rows) * (depth + 2) + left * a + outputs,
            max(tall, lanes) * (depth * a + wide),
        )
        if rows >= lanes
        else None,
        (left + right + outputs, (depth + tall) * padded) if columns < lanes else None,
    ]
    return min((way for way in ways if way is not None), key=lambda way: way[0])[1]
