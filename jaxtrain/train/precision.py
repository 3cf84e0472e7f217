"""Which dtype the parameters are stored in and which the step computes in. It casts trees; it scales no losses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Precision:
    """fp32 master parameters, with compute in `compute`. Softmax, norms' statistics and the loss are fp32 in both.

    `keep` are regular expressions on parameter paths: a match stays fp32 in compute. Two near scores of experts must not
    become equal, nor a small change of a bias be lost (Fedus et al. 2021, arXiv 2101.03961, section 2.4).
    """

    compute: Literal["float32", "bfloat16"] = "float32"
    keep: tuple[str, ...] = ("router",)

    def cast(self, params: Any) -> Any:
        """The parameters in the compute dtype; gradients through it come back in fp32."""
        import jax

        def cast(path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x if any(re.search(pattern, name) for pattern in self.keep) else x.astype(self.compute)

        return jax.tree_util.tree_map_with_path(cast, params)


FP32 = Precision()
BF16 = Precision(compute="bfloat16")
