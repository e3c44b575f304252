"""Many runs in one program: engine "packed". See `experiments.packed.engine`."""

from experiments.packed.engine import best_width, packable, refusal, run_packed

__all__ = ["best_width", "packable", "refusal", "run_packed"]
