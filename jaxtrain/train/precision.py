"""Which dtype the step computes in. It scales no losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtrain.errors import ConfigError, closest

Compute = Literal["float32", "bfloat16"]  # float16 would need its loss scaled


@dataclass(frozen=True, kw_only=True)
class Precision:
    """fp32 master parameters, with compute in `compute`. Softmax, norms' statistics, the loss and what the model marks as
    exact are fp32 in both."""

    compute: Compute = "float32"

    def __post_init__(self) -> None:
        if self.compute not in (known := get_args(Compute)):
            raise ConfigError(f"precision.compute = {self.compute!r} is not known.", fix=closest(str(self.compute), known))


FP32 = Precision()
BF16 = Precision(compute="bfloat16")
