# SPDX-License-Identifier: Apache-2.0
"""Which part of a long piece of work is this process's: jobs of an array, and processes that a launcher started in each.

The processes never talk to each other: each knows its part, and what is finished lies on the disk.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from steadyvq.training.processes import launched


@dataclass(frozen=True)
class Share:
    """A part of work that is cut into `count` parts.

    Attributes:
        index: Which one, from 0.
        count: How many there are.
        local: Which process of this machine, from 0.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    def of(self, total: int) -> range:
        """The pieces of this part, of `total` pieces in all."""
        return range(self.index, total, self.count)


def share_of(num_shards: int | None, shard_index: int | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The part of this process.

    Args:
        num_shards: Jobs of an array (None: one).
        shard_index: Which job this is, from 0.
        environment: Where a launcher (torchrun, srun) says which process of a job this is.

    Raises:
        ValueError: The numbers make no sense.
    """
    if (num_shards is None) != (shard_index is None):
        raise ValueError(
            "--num-shards and --shard-index belong together: give both, such as --num-shards 8 --shard-index 0"
        )
    jobs, job = num_shards or 1, shard_index or 0
    if num_shards is not None and not 0 <= job < num_shards:
        raise ValueError(f"--shard-index is {shard_index} and --num-shards {num_shards}, but jobs are numbered from 0")
    per_node, nodes = launched(environment)
    rank = int(environment.get("RANK", environment.get("SLURM_PROCID", "0"))) if per_node * nodes > 1 else 0
    return Share(job * per_node * nodes + rank, jobs * per_node * nodes, rank % per_node)
