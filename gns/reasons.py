"""What is said when a step or a parameter cannot be used. One place, so that tests and docs can name them."""

TWICE = "the same forward pass was run backward twice: its examples' two gradients cannot be joined"
ABORTED = "a backward pass of this step raised an exception: its gradient is incomplete"
UNSEEN = (
    "the optimizer stepped, but no backward pass through the measured layers was noticed: the model was "
    "compiled and called before `attach()`, or another of its class was compiled unwatched (attach first, "
    "then compile, after `torch._dynamo.reset()`), another adapter is active, or "
    "the gradients came from `torch.autograd.grad` or `backward(inputs=…)`"
)
NOT_OURS = (
    "optimizers step, but none owns a measured parameter (master copies, or an engine that hides them?): no "
    "step can be closed, so nothing is recorded"
)
HIDDEN = (
    "an optimizer steps that owns no measured parameter, and `.grad` is empty: the engine hides both; from "
    "the next step on each rank's own batch is measured as a step (local statistics)"
)
HIDDEN_LARGE = (
    "the engine hides `.grad`, and local statistics would keep {size:,} bytes of summed gradients: train "
    "fewer parameters (LoRA)"
)
EMPTIED = (
    "parameter {name} is empty: an engine (ZeRO-3) has taken it apart; use fully_shard, or ZeRO up to stage 2"
)
COMPILED_AUTOGRAD = (
    "compiled autograd is configured (torch._dynamo.config.compiled_autograd), and what is measured in "
    "backward cannot be compiled: nothing is measured as long as it is"
)
SECOND_ORDER = (
    "a backward pass of this step runs through the graph of a gradient (gradient penalty, second-order "
    "meta-learning): weights are used there in ways that no layer shows"
)
CROSSED = (
    "a graph made before the last optimizer step ran backward in this one, and it is not known what it adds: "
    "call the model after the step"
)
LEFTOVER = "`.grad` held a gradient from before this step's first backward pass: zero the gradients each step"
REPEATED = "a layer is called more than once per example; its uses are joined from the next step on"
NOT_ALL = (
    "only {here} of {size} data-parallel ranks came to a measured step within {seconds:.0f} s: attach a "
    "GNSMonitor on every rank (also where only one of them prints)"
)
OTHER_PARAMETERS = (
    "data-parallel ranks measure different parameters, or other steps: attach to the same model on every "
    "rank, with the same `every`, at the same step"
)
NO_GLOO = "this PyTorch was built without gloo, which ranks need to add up their sums"
LOST = "data-parallel ranks could not add up their sums ({why}): a rank left, or closed fewer steps"
APART = (
    "data-parallel ranks are not at the same optimizer step: each must step its optimizer equally often, "
    "also where it has no batch"
)
IDLE_RANK = "a data-parallel rank stepped without a backward pass through the measured layers"
DIFFERENT_GRADIENTS = (
    "data-parallel ranks hold different gradients when backward ends: they are not averaged, or only later "
    "by hand, or only in groups of ranks"
)
NO_FACTOR = (
    "the factor by which the engine joins the ranks' gradients is not known yet: the self-check has seen no "
    "gradient to find it from"
)
JOINED = (
    "the loop runs under DDP's `join()`, where ranks stop stepping one after another: they cannot be summed"
)
REASON_ELSEWHERE = "it is not usable on another data-parallel rank"
MISFIT_ELSEWHERE = "its rows on another data-parallel rank are not examples"
OLD_FSDP = (
    "the model is wrapped in FullyShardedDataParallel, which flattens its parameters: use "
    "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version 2)"
)
OTHER_MESH = (
    "parameter {name} is a DTensor on a mesh that is not all data-parallel (tensor or expert parallel, or a "
    "part of the ranks): only fully_shard over all ranks is measured"
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
    "one called, it is compiled as a whole, or checkpointing is reentrant (use_reentrant=False joins them)"
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
SHARED = (
    "its input has shape {shape}, so that all examples share one output; call it on ids of shape "
    "[{rows}, {positions}] to have it measured"
)
ATTENDS_ACROSS = (
    "rows are packed, but the attention does not keep their examples apart (with sdpa or eager attention: "
    "position_ids without an attention_mask, and use_cache=False): each example's share of the gradient is "
    "measured, which is not what it would add alone"
)
LOSS_OUTSIDE = (
    "the model's call has num_items_in_batch but no labels: the loss is made outside of it, and the "
    'examples\' weights in it are not seen and taken as equal (weights="equal" ends this message)'
)
NO_LABELS = (
    "the language model is called with padding and without labels: the loss is made outside of it, and every "
    "example is taken to weigh the same in it. Where it is a mean over tokens, pass labels to the model as "
    'well (its own loss may go unused); where it is not, weights="equal" ends this message'
)
NEVER_ATTACHED = "the monitor was never attached, so nothing was measured: call attach() before the loop"
PACKED = "its input has shape {shape}, in which the positions of packed rows cannot be told"
MIXED = (
    "checkpointing is reentrant, and it cannot be told whose rows a recomputation runs through: examples are "
    "not rows, or batches of other shapes have as many positions: use_reentrant=False"
)
PACKED_UNSEEN = (
    "examples are not rows, and layers that are compiled cannot tell which rows are whose: compile nothing, "
    "or give the model one example a row"
)
TOO_LARGE = (
    "it is used more than once, and the gradients of all examples at once would pass the bound of {limit:,} "
    "bytes: raise `max_bytes`, or use fewer examples a call"
)

OTHER_METRIC = (
    "{gone} of the {all} steps in the loaded state are not in metric {metric!r}, and sums in two metrics do "
    "not add: they are left out. Resume with the metric that was measured to go on with them"
)
NO_STATE = (
    'metric="adam": the optimizer has no second moments yet; there is no metric before its first step '
    "(collecting)"
)
NO_SECOND_MOMENT = (
    'metric="adam": {kind} keeps no second moment that is read here (`exp_avg_sq` and `step` of the '
    'parameter\'s shape, `betas` and `eps`): take Adam or AdamW, or metric="euclidean"'
)
SHARDED_STATE = (
    'metric="adam": the optimizer\'s second moments are sharded over ranks (FSDP2), and blocks are whole: '
    'take DDP, or metric="euclidean"'
)
COMPILED_METRIC = (
    'metric="adam": a compiled layer would keep the metric of the step it was compiled in: compile nothing, '
    'or take metric="euclidean"'
)

# those that ranks tell one another; any other is said in its own words on the rank that has it
POOLED = (TWICE, ABORTED, UNSEEN, LEFTOVER, REPEATED, AMBIGUOUS, IDLE_RANK)
OTHER_MODE = (
    "its layer was recognised in another mode (training or not) than it runs in, as batch norm in eval mode: "
    "attach in the mode that the training runs in"
)
IN_PLACE = (
    "the loop changes its layer's input in place after the call, which the layer allows and a tap does not"
)
WRONG_SHAPE = "its layer's rule gives a gradient of another shape than the parameter has"
