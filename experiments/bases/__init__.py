"""Base models of the Llama architecture, small on purpose, each trained from nothing by one command.

    OMP_NUM_THREADS=1 python -m experiments.bases math-1m

`1m` is the demo's, of the standard library alone: 4,500 steps of 8 × 256 tokens in 18 minutes on one core of
an AMD EPYC (Zen 4). Training loss 2.40 nats per token; held out 2.79 (1.24 bits per byte), where token
frequencies alone give 6.37, a uniform guess 7.62. `gns/assets/base-1m` is that model; `--out
gns/assets/base-1m` replaces it.

`math-200k` … `math-100m` share one tokenizer and one text: the library's, and a primer of calculations and
one-step word problems, so that `wordmath` is neither trivial nor hopeless for them. The first three are under
`experiments/assets/`; the larger ones a GPU makes by the same command with `--device cuda`.

The text is the running interpreter's, so another Python gives another model. A run that was interrupted and
started again with the same command ends in the same weights. A new size is a new row of `BASES`.
"""

from experiments.bases.configs import BASES, BaseConfig
from experiments.bases.paths import base_path

__all__ = ["BASES", "BaseConfig", "base_path"]
