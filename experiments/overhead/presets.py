"""What is compared in which setting, what was wanted there, and which arms come more than once in a round."""

from __future__ import annotations

from experiments.overhead.arms import OURS, PEERS, Arm, Backpack, Monitored, PerExample, Vmap
from experiments.overhead.settings import Setting

SHARED_NAME = "monitor, shared weight gradient"
SHARED = tuple(kind for kind in OURS if kind.name == SHARED_NAME)  # none where there is no such arm
NARROW, MIDDLE, WIDE = "width 512, r=16, 8×128", "width 768, r=16, 8×128", "width 1,024, r=16, 8×128"
FULL, LONG = "width 512, full, 8×128", "width 512, full, 4×512"
PRESETS = {
    "smoke": [Setting("width 512, 2 layers, r=8", "width-512", 8, 2, 64, layers=2)],
    "cpu": [
        Setting(NARROW, "width-512", 16, 8, 128, layers=2),
        Setting(MIDDLE, "width-768", 16, 8, 128, layers=2),
        Setting(WIDE, "width-1024", 16, 8, 128, layers=2),
        Setting(FULL, "width-512", None, 8, 128, layers=2),
        Setting(LONG, "width-512", None, 4, 512, layers=2),
    ],
    "gpu-7b": [
        Setting("Llama-2-7B, r=16, 8×1,024", "llama-2-7b", 16, 8, 1_024, "bfloat16"),
        Setting("Llama-2-7B, r=128, 8×1,024", "llama-2-7b", 128, 8, 1_024, "bfloat16"),
    ],
    "gpu-1b": [
        Setting("1B shape, r=16, 4×512", "llama-3.2-1b", 16, 4, 512, "bfloat16"),
        Setting("1B shape, r=16, 16×1,024", "llama-3.2-1b", 16, 16, 1_024, "bfloat16"),
    ],
}
WANTED = {  # setting → most time and most memory at every=1, × untouched
    NARROW: (1.05, 1.02),
    MIDDLE: (1.03, 1.02),
    WIDE: (1.03, 1.02),
    FULL: (1.25, 1.25),
    LONG: (1.4, 1.25),
}
STARTUP = Setting("Llama-2-7B shape, r=16", "llama-2-7b", 16, 1, 16)
STARTUP_SECONDS = 0.5  # wanted: less
KINDS = {"smoke": (*OURS, *PEERS), "gpu-7b": (Monitored, *SHARED), "gpu-1b": (*OURS, *PEERS)}
ALL = (NARROW,)  # settings in which every arm of ours is timed; elsewhere those that measure every step
# times in a round of what is judged: in five rounds, the fewest there are, 20 pairs; of the untouched step
# beside itself 10, of a peer 5
JUDGED: dict[type[Arm], int] = {Monitored: 4, **dict.fromkeys(SHARED, 4), Arm: 2}
SLOTS = {name: JUDGED for name in WANTED}
# peers of a setting, if not all: who is left out was slower, or level with one that stays
FEWER: dict[str, tuple[type[Arm], ...]] = {
    MIDDLE: (Vmap, Backpack),
    WIDE: (Vmap, Backpack),
    LONG: (Vmap, PerExample),
}


def kinds(preset: str, setting: Setting) -> tuple[type[Arm], ...]:
    """Name the arms of a setting, the untouched one not among them."""
    if preset in KINDS:
        return KINDS[preset]
    if setting.name in ALL:
        return (*OURS, *PEERS)
    return (Monitored, *SHARED, *FEWER.get(setting.name, PEERS))


def resident(setting: Setting) -> tuple[type[Arm], ...]:
    """Name the arms whose resident size is measured: ours of every step, and in two settings the peers."""
    return (Monitored, *SHARED, *(PEERS if setting.name in (NARROW, FULL) else ()))
