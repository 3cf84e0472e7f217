"""Which dtype the parameters are stored in and which the step computes in. It casts trees; it scales no losses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtrain import ranges
from jaxtrain.errors import ConfigError, closest

Compute = Literal["float32", "bfloat16"]  # float16 would need its loss scaled


@dataclass(frozen=True, kw_only=True)
class Precision:
    """fp32 master parameters, with compute in `compute`. Softmax, norms' statistics and the loss are fp32 in both.

    `keep` are regular expressions on parameter paths: a match stays fp32 in compute. Two near scores of experts must not
    become equal, nor a small change of a bias be lost (Fedus et al. 2021, arXiv 2101.03961, section 2.4).
    """

    compute: Compute = "float32"
    keep: tuple[str, ...] = ("router",)

    def __post_init__(self) -> None:
        if self.compute not in (known := get_args(Compute)):
            raise ConfigError(f"precision.compute = {self.compute!r} is not known.", fix=closest(str(self.compute), known))
        ranges.check_patterns("precision.keep", self.keep)

    def cast(self, params: Any) -> Any:
        """The parameters in the compute dtype; gradients through it come back in fp32."""
        import jax

        def cast(path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x if any(re.search(pattern, name) for pattern in self.keep) else x.astype(self.compute)

        return jax.tree_util.tree_map_with_path(cast, params)


FP32 = Precision()
BF16 = Precision(compute="bfloat16")
