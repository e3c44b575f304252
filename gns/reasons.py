"""What is said when a step or a parameter cannot be used. One place, so that tests and docs can name them."""

TWICE = "the same forward pass was run backward twice: its examples' two gradients cannot be joined"
ABORTED = "a backward pass of this step raised an exception: its gradient is incomplete"
UNSEEN = (
    "the optimizer stepped, but no backward pass reached the taps; if the model was compiled and called "
    "before `attach()`, attach first, then compile"
)
LEFTOVER = "`.grad` held a gradient from before this step's first backward pass: zero the gradients each step"
REPEATED = "a layer is called more than once per example; its uses are joined from the next step on"
DISTRIBUTED = (
    "more than one data-parallel process: this version reads one process; measure on a single process, "
    "or set `every` and read rank-local runs"
)
NO_TAP = (
    "its gradient arrived, but its layer's tap never fired: the weight is used without calling the module "
    "(functional use or a fused kernel)"
)
SILENT_TAP = (
    "its gradient arrived, but none through its layer's output: the weight is used outside its module"
)
SPLIT_USES = (
    "it is used more than once and the uses could not be joined: the model passed to GNSMonitor was not the "
    "one called, or checkpointing is reentrant (use_reentrant=False joins them)"
)
UNREACHED = "no example has reached it in the steps so far"
