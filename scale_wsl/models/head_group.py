"""How many ranks share one copy of the head's rows: what the recipe says, or the fewest bytes a step.

Pure functions, but for `ranks_per_node`, which reads the launcher's environment; must never ask a process group.
"""

from __future__ import annotations

import os

from scale_wsl.errors import UserError

__all__ = ["best_group_size", "check_group_size", "choose_group_size", "ranks_per_node", "step_bytes"]


def step_bytes(group: int, *, ranks: int, images: int, classes: int, features: int) -> float:
    """Bytes that the head costs a rank in one step: sent and received, and held.

    With g ranks in a head group, W ranks, b images a rank, V classes, D features and embeddings of two bytes:

        embeddings gathered, their gradient scattered    4 g b D
        all-reduce of the rows' gradient over replicas   4 (V/g) D (1 - g/W)
        logits                                           4 b V        (whatever g is)
        rows, their gradient and momentum                10 (V/g) D

    The last is memory, not traffic; it counts because a step reads and writes it. Sharding more spares the second and
    fourth and costs the first, so the best g is near sqrt(V/b).

    What it leaves out: that links inside a node are faster than those between nodes (see `best_group_size`), latency,
    what overlaps with other work, targets and the `[n, 3]` exchanges (tens of bytes an image), that 4-byte features
    double the first line, padding of uneven shards, and sampling, which makes lines two and three smaller.
    """
    rows = classes / group
    return (
        4 * group * images * features
        + 4 * rows * features * (1 - group / ranks)
        + 4 * images * classes
        + 10 * rows * features
    )


def best_group_size(*, ranks: int, images: int, classes: int, features: int, ranks_per_node: int = 0) -> int:
    """The group size of the fewest `step_bytes` among the divisors of the world size; the smaller of two equals.

    Args:
        ranks: W, the world size.
        images: b, images of a micro-batch and rank.
        classes: V.
        features: D.
        ranks_per_node: if above 0, a group stays inside a node: only sizes that divide this number too. The formula
            knows one kind of byte, and those of a group that spans nodes go over the slowest link.
    """
    sizes = [
        size for size in range(1, ranks + 1) if ranks % size == 0 and (not ranks_per_node or ranks_per_node % size == 0)
    ]
    return min(sizes, key=lambda size: step_bytes(size, ranks=ranks, images=images, classes=classes, features=features))


def check_group_size(setting: int | str, ranks: int) -> None:
    """Make sure that a `head.group_size` suits the world size.

    Raises:
        UserError: it is a number that does not divide the world size.
    """
    if isinstance(setting, int) and setting and ranks % setting:
        raise UserError(f"head.group_size is {setting}, but must divide the {ranks} ranks of this run")


def choose_group_size(
    setting: int | str, *, ranks: int, images: int, classes: int, features: int, ranks_per_node: int = 0
) -> int:
    """The group size that a `head.group_size` means here: a number as it is, 0 for all ranks, the best for "auto"."""
    check_group_size(setting, ranks)
    if isinstance(setting, int):
        return setting or ranks
    return best_group_size(
        ranks=ranks, images=images, classes=classes, features=features, ranks_per_node=ranks_per_node
    )


def ranks_per_node() -> int:
    """Ranks on this host, as the launcher says (torchrun's variable, DeepSpeed's); 0 where it does not."""
    text = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ""))
    return int(text) if text.isdecimal() else 0
