"""Classifier two-sample test: how well a network tells two sets of draws apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyroflows.diagnostics.checks import check_matrix, check_varying


def c2st(a: Tensor, b: Tensor, seed: int = 1, num_folds: int = 5) -> float:
    r"""Return the accuracy with which a classifier tells two sets of draws apart.

    A network with two hidden layers of :math:`10 D` rectified units is trained to tell rows of
    ``a`` from rows of ``b``, both z-scored by the means and standard deviations of ``a``; its
    accuracy on held-out rows is averaged over the folds of a cross-validation [1]. The result
    estimates

    .. math:: \tfrac12 + \tfrac12 \operatorname{TV}(p_a, p_b)

    from below, with the total variation distance :math:`\operatorname{TV}`: 1/2 if the
    distributions agree (within a standard error of about :math:`1 / \sqrt{8 N}`), 1 if they do not
    overlap. Networks, optimiser and folds are those of the sbibm benchmark [2], so that scores
    compare with published ones.

    Parameters
    ----------
    a : Tensor, shape (N, D)
        Draws from the reference distribution: the test is not symmetric, because they set the
        scale.
    b : Tensor, shape (N, D)
        Draws to compare with them, equally many: guessing the larger of two sets would beat 1/2.
    seed : int, default 1
        Seed of the networks and of the folds. The global random state is neither used nor changed.
    num_folds : int, default 5
        Number of folds, at least 2.

    Returns
    -------
    float
        Mean accuracy, 1/2 at best.

    Raises
    ------
    TypeError
        If ``a`` or ``b`` is not a tensor of floating-point numbers.
    ValueError
        If ``a`` or ``b`` is not a matrix of finite numbers, their shapes differ, there are fewer
        than ``2 * num_folds`` rows, ``num_folds`` is below 2, or a column of ``a`` is constant.

    Notes
    -----
    Trains ``num_folds`` networks with scikit-learn on one CPU thread, which takes about ten
    seconds for :math:`N = 10^4` draws of two parameters and some minutes for draws of ten. Folds
    run in parallel within ``joblib.parallel_config(n_jobs=num_folds)``, with the same result.

    References
    ----------
    [1] Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", ICLR 2017,
        `arXiv:1610.06545 <https://arxiv.org/abs/1610.06545>`_.
    [2] Lueckmann, Boelts, Greenberg, Gonçalves, Macke, "Benchmarking simulation-based
        inference", AISTATS 2021, `arXiv:2101.04653 <https://arxiv.org/abs/2101.04653>`_.

    Examples
    --------
    >>> import torch
    >>> reference = torch.linspace(-1, 1, 100).unsqueeze(-1)
    >>> c2st(reference, reference + 10)
    1.0
    """
    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2, got {num_folds}")
    check_matrix("a", a, "N", "D")
    check_matrix("b", b, *a.shape)
    if len(a) < 2 * num_folds:
        raise ValueError(
            f"a and b must hold at least 2 * num_folds = {2 * num_folds} rows, got {len(a)}"
        )
    check_varying("a", a)
    # NumPy lacks some of the shorter precisions.
    precision = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    reference, compared = (draws.detach().to("cpu", precision) for draws in (a, b))
    features = (torch.cat([reference, compared]) - reference.mean(0)) / reference.std(0)
    labels = np.repeat([0, 1], len(a))
    return _cross_validated_accuracy(features.numpy(), labels, seed, num_folds)


def _cross_validated_accuracy(
    features: np.ndarray, labels: np.ndarray, seed: int, num_folds: int
) -> float:
    # Imported late: importing scikit-learn takes half a second.
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    width = 10 * features.shape[1]
    classifier = MLPClassifier(
        hidden_layer_sizes=(width, width),
        activation="relu",
        solver="adam",
        max_iter=10_000,
        random_state=seed,
    )
    folds = KFold(num_folds, shuffle=True, random_state=seed)
    scores = cross_val_score(classifier, features, labels, cv=folds, scoring="accuracy")
    return float(scores.mean())
