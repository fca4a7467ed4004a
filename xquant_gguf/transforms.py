"""Coordinates for keys, in which errors of all channels weigh the same.

What codes do to a score q . k is the sum over channels j of var(k_j) E(q_j^2), times what a code of so many bits loses
of a channel's variance.  Keys times M and queries times M^-T give the same scores; with

    S_k = L L^T, covariance of keys within a page        S_q, second moment of queries
    L^T S_q L = U diag(l) U^T                            M = H diag(l)^(1/4) U^T L^-1,  H: Hadamard matrix

both moments become the same H diag(l)^(1/2) H^T, whose diagonal H makes even, and the sum is (sum_j sqrt(l_j))^2 / d,
the least that channels of equal bits can have.  Rotations by the queries' covariance (arXiv 2605.17757) are the case in
which M is orthogonal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xquant_gguf import codec
from xquant_gguf.plan import PAGE
from xquant_gguf.probe import Rows

Moment = NDArray[np.float64]  # [d][d]
Matrices = NDArray[np.float16]  # [KV head][d][d]

RIDGE = 0.1
"""Of every channel's own moment, added to it: correlations of a short text are taken for smaller than they look."""
LEAST = 1e-6
"""Moment that a channel has at least, of the mean of all."""


def page_covariance(rows: NDArray[np.float16]) -> Moment:
    """Covariance of keys [token][d] within their pages, the first left out: offsets of a page cost codes nothing."""
    x = rows[PAGE : len(rows) // PAGE * PAGE].astype(np.float64).reshape(-1, PAGE, rows.shape[1])
    x -= x.mean(1, keepdims=True)
    return np.einsum("ptd,pte->de", x, x) / (x.shape[0] * PAGE)


def balanced(keys: Moment, queries: Moment) -> NDArray[np.float16]:
    """M [d][d] of a KV head, in F16, from the moments of its keys and queries; a head without keys has its own."""
    d = len(keys)
    if not np.trace(keys) * np.trace(queries) > 0:
        return np.eye(d, dtype=np.float16)
    lower = np.linalg.cholesky(_ridged(keys))
    values, vectors = np.linalg.eigh(lower.T @ _ridged(queries) @ lower)
    # the Hadamard matrix mixes blocks of channels: each gets large ones and small ones
    dealt = np.arange(d).reshape(-1, d // (d & -d)).T.ravel()
    rows = (values[:, None] ** 0.25 * (vectors.T @ np.linalg.inv(lower)))[dealt]
    rows *= np.sqrt(d) / np.linalg.norm(rows)  # any factor will do: keys stay about as large as they were
    return codec.hadamard(np.ascontiguousarray(rows.T, np.float32)).T.astype(np.float16)


def coordinates(rows: Rows, queries: NDArray[np.float64]) -> Matrices:
    """M of each KV head of a layer, from its keys and the second moments [KV head][d][d] of its queries."""
    return np.stack([balanced(page_covariance(x), q) for x, q in zip(rows, queries, strict=True)])


def _ridged(moment: Moment) -> Moment:
    own = np.diag(moment)
    return moment + np.diag(RIDGE * own + LEAST * own.mean())


def times(matrices: NDArray[np.float32], rows: Rows) -> Rows:
    """Rows [KV head][token][d], each times the matrix of its head."""
    return (rows.astype(np.float32) @ matrices.transpose(0, 2, 1)).astype(np.float16)
