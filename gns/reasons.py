"""What is said when a step or a parameter cannot be used. One place, so that tests and docs can name them."""

TWICE = "the same forward pass was run backward twice: its examples' two gradients cannot be joined"
ABORTED = "a backward pass of this step raised an exception: its gradient is incomplete"
UNSEEN = (
    "the optimizer stepped, but no backward pass through the measured layers was noticed: the model was "
    "compiled and called before `attach()` (attach first, then compile), another adapter is active, or the "
    "gradients came from `torch.autograd.grad` or `backward(inputs=…)`"
)
NOT_OURS = (
    "optimizers step, but none owns a measured parameter (master copies, or an engine that hides them?): no "
    "step can be closed, so nothing is recorded"
)
LEFTOVER = "`.grad` held a gradient from before this step's first backward pass: zero the gradients each step"
REPEATED = "a layer is called more than once per example; its uses are joined from the next step on"
DISTRIBUTED = (
    "more than one data-parallel process, and this version measures one: measure on a single process first"
)
AMBIGUOUS = (
    "the model's own call was not seen, and its layers saw different numbers of rows, so that examples "
    "cannot be counted: pass the module that the loop calls to GNSMonitor, uncompiled or compiled by layers"
)
NO_CALL = (
    "the model's own call was not seen (it is compiled as a whole, or the loop calls a method or a part of "
    "it): rows of its layers are counted as examples, with equal weights and no tokens"
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
NO_GRADIENT = (
    "examples reached its layer, but no gradient reached it: frozen or cleared before the optimizer step"
)
UNREACHED = "no example has reached it in the steps so far"
LATE = "it became trainable after `attach()`: detach and attach again to measure it"
BATCH_NORM = (
    "{name} is a batch norm: examples in a batch change one another's gradient, so that per-example "
    "gradients are not defined; put it in eval mode, or do not rely on the numbers"
)
