"""Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989) in a model: norms, rotary positions and gated layers, each
in one pass over memory. The package is imported only when it is asked for.
"""

from __future__ import annotations

from agentgym_ig.trainers.readout import Model

_NOT_ITS_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Ours are read from the output layer itself, by `readout`, which never holds all logits either."""


def with_liger(model: Model) -> Model:
    """The model, changed in place so that it computes by Liger's kernels; before an adapter is put on it.

    Raises ValueError for a model that is not on a GPU, or of a family for which there are no kernels, and ImportError
    without the package.
    """
    if model.device.type != "cuda":
        raise ValueError(f"Liger's kernels run on a GPU, and the model is on {model.device}; leave out --liger")
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ImportError("Liger's kernels need their package: pip install 'agentgym_ig[liger]'") from error
    family = model.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"Liger has no kernels for a {family}; leave out --liger, or take one of {known}")
    _apply_liger_kernel_to_instance(model=model, **_NOT_ITS_LOSSES)
    return model
