"""``transformers.Trainer`` over context-parallel ranks."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader
from transformers import Trainer

from magi_attention.config import DistAttnConfig
from magi_attention.integrations.transformers.batch import dispatch_batch
from magi_attention.runtime.groups import resolve_group

ONLY_TRAINS = (
    "ContextParallelTrainer trains only, without eval_strategy: evaluate with a transformers.Trainer and a model whose "
    'attn_implementation is "sdpa"'
)


class ContextParallelTrainer(Trainer):
    """A ``Trainer`` whose training batches are each shared by the ranks of a context-parallel group.

    The processes that were started are ``dp x cp``: the groups get different batches, the ranks of a group the same
    one, of which each computes its rows. ``per_device_train_batch_size`` is the batch of a group. Trainer counts the
    labels of all processes and averages gradients over all of them, so the loss is the mean over all labels of the
    step. Training only: ``evaluate`` and ``predict`` would put rows together as if each process had its own.

    Args:
        *args: As for ``Trainer``; the model has ``attn_implementation="magi_attention"``.
        cp_group: The context-parallel process group that this rank is in. Give either this or ``cp_mesh``.
        cp_mesh: The context-parallel device mesh.
        chunk_size: Rows in a chunk, the unit that is given to ranks.
        dist_attn_config: How to balance the ranks and to split communication into stages.
        **kwargs: As for ``Trainer``.

    Raises:
        ValueError: If the loss would not be averaged over the labels of all processes, because
            ``average_tokens_across_devices`` is off or the model takes no ``num_items_in_batch``.
    """

    def __init__(
        self,
        *args: Any,
        cp_group: dist.ProcessGroup | None = None,
        cp_mesh: DeviceMesh | None = None,
        chunk_size: int = 512,
        dist_attn_config: DistAttnConfig = DistAttnConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must be True: ranks have different numbers of labels")
        if not self.model_accepts_loss_kwargs:
            raise ValueError(f"{type(self.model).__name__} takes no num_items_in_batch, which its loss is divided by")
        self.cp_ranks = resolve_group(cp_group, cp_mesh).ranks
        self.cp_group, self.cp_mesh = cp_group, cp_mesh
        self.chunk_size = chunk_size
        self.dist_attn_config = dist_attn_config

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this rank's group.

        Raises:
            ValueError: If the data set is iterable only: nothing tells which of its batches are whose.
        """
        loader = super().get_train_dataloader()
        if self.args.world_size > 1:
            shard = loader.batch_sampler
            if not isinstance(shard, BatchSamplerShard):
                raise ValueError(f"train_dataset must have a length and an order, as {type(shard).__name__} has not")
            shard.num_processes, shard.process_index = self._data_parallel_place()
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The next batches, dispatched, and how many labels all processes have in them."""
        return super().get_batch_samples(map(self._dispatch, epoch_iterator), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(ONLY_TRAINS)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(ONLY_TRAINS)

    def _dispatch(self, batch: dict[str, Any]) -> dict[str, Any]:
        config = self.accelerator.unwrap_model(self.model).config
        return dispatch_batch(
            batch, config, self.chunk_size, self.cp_group, self.cp_mesh, dist_attn_config=self.dist_attn_config
        )

    def _data_parallel_place(self) -> tuple[int, int]:
        """How many context-parallel groups there are, and the number of this rank's."""
        first_ranks: list[int] = [0] * self.args.world_size
        dist.all_gather_object(first_ranks, min(self.cp_ranks))
        groups = sorted(set(first_ranks))
        return len(groups), groups.index(min(self.cp_ranks))
