"""Which dtype the parameters are stored in and which the step computes in. It casts trees; it scales no losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Precision:
    """fp32 master parameters, with compute in `compute`. Softmax, norms' statistics and the loss are fp32 in both."""

    compute: Literal["float32", "bfloat16"] = "float32"

    def cast(self, params: Any) -> Any:
        """The parameters in the compute dtype; gradients through it come back in fp32."""
        import jax

        return jax.tree.map(lambda x: x.astype(self.compute), params)


FP32 = Precision()
BF16 = Precision(compute="bfloat16")
