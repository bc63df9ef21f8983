"""The memory and traffic that the losses of a step need, by the number of GPUs.

What else a GPU holds (weights, gradients, the optimizer's state, activations of the towers) does not depend on how
many there are; `medmoe train --dry-run` measures it for one.
"""

from typing import Any, NamedTuple

import torch

from medmoe_hf.model.local_loss_kernel_medmoe import kernel_bytes, pack
from medmoe_hf.training.exchange import Block, ExchangePlan, plan_exchange

# Matrices (B, B) in float32 that the losses hold at a time: similarities, targets, their softmaxes and gradients.
_MATRICES = 14


class LossMemory(NamedTuple):
    """What the global and local loss of a step need on each GPU, in bytes.

    Attributes:
        words_travel: Whether words visit the other processes, or regions do: see `ExchangePlan`.
        kept: Number of processes whose part is kept for the backward pass; the others' are computed again.
        local: Memory of GLoRIA's local loss and its exchange at their peak, with gradients, beyond local maps and
            words of the own images.
        similarities: Memory of the matrices of all pairs.
        sent: What a process sends in a step, and receives, in the exchange.
    """

    words_travel: bool
    kept: int
    local: int
    similarities: int
    sent: int


def loss_memory(
    config: Any,
    batch_size: int,
    processes: int,
    words: int = 25,
    region_dtype: torch.dtype = torch.bfloat16,
    word_dtype: torch.dtype = torch.bfloat16,
) -> LossMemory:
    """Computes the memory of the losses on each GPU, from shapes alone.

    Args:
        config: A `MedMoEConfig` with `local_loss="gloria"`.
        batch_size: Pairs of each process.
        processes: Number of processes, all with as many pairs.
        words: Words of a caption.
        region_dtype: Dtype of the local maps; where they are pooled (`local_loss_regions`), float32 counts.
        word_dtype: Dtype of the words.

    Example:
        >>> from medmoe_hf.model import MedMoEConfig
        >>> from medmoe_hf.training.memory import loss_memory
        >>> one, many = (loss_memory(MedMoEConfig.from_preset("paper"), 32, number) for number in (1, 64))
        >>> many.words_travel, many.local < 4 * one.local
        (True, True)
    """
    vision = config.vision_config
    side = vision.map_size or vision.image_size // 4
    most = config.local_loss_regions
    if most is not None and side > most:
        side, region_dtype = most, torch.float32
    matmul_dtype = getattr(torch, config.local_loss_matmul_dtype)
    blocks = [Block(batch_size, side, side, batch_size, batch_size * words)] * processes
    depth = config.projection_dim or vision.local_size
    chosen = plan_exchange(blocks, depth, region_dtype, word_dtype, kernel=True)
    dtypes = matmul_dtype, region_dtype, word_dtype
    return LossMemory(
        *chosen,
        local=exchange_bytes(blocks[0], depth, processes, chosen, *dtypes),
        similarities=_MATRICES * 4 * (batch_size * processes) ** 2,
        sent=_sent_bytes(blocks[0], depth, processes, chosen, region_dtype, word_dtype),
    )


def exchange_bytes(
    block: Block,
    depth: int,
    processes: int,
    chosen: ExchangePlan,
    matmul_dtype: torch.dtype,
    region_dtype: torch.dtype,
    word_dtype: torch.dtype,
) -> int:
    """Computes the peak of memory of `exchanged_logits` with Triton kernels and of its gradients, beyond its inputs.

    Args:
        block: Of each process; captions have equally many words.
        depth: Width of the shared space.
        processes: Number of processes.
        chosen: The plan.
        matmul_dtype: Dtype of products.
        region_dtype: Dtype of the regions.
        word_dtype: Dtype of the words.
    """
    positions = block.height * block.width
    sizes = [block.words // block.captions] * block.captions
    one = kernel_bytes(block.images, positions, depth, sizes, matmul_dtype, region_dtype)
    packing = pack(sizes)
    slots = packing.width * packing.tiles
    packed = block.words * depth * word_dtype.itemsize
    padded = len(sizes) * packing.longest * depth * word_dtype.itemsize
    if processes == 1:
        return one
    # Of another block: contexts, words and contrasts in slots, cosines and lengths.
    saved = block.images * slots * (depth * matmul_dtype.itemsize + 8) + slots * depth * (4 + matmul_dtype.itemsize)
    elements, dtype = block.words * depth, word_dtype
    staying = block.regions * depth
    if not chosen.words_travel:
        elements, staying, dtype = staying, elements, region_dtype
    exact = torch.promote_types(dtype, torch.float32).itemsize
    # Blocks that were kept, and one that is computed while another arrives.
    travelling = (max(0, chosen.kept - 1) + 2) * elements * dtype.itemsize
    # The gradient that is sent, the one that arrives, and a share in float32.
    gradients = (2 + (dtype.itemsize < exact)) * elements * exact + staying * 4
    return one + max(0, chosen.kept - 1) * saved + packed + padded + travelling + gradients


def _sent_bytes(
    block: Block, depth: int, processes: int, chosen: ExchangePlan, region_dtype: torch.dtype, word_dtype: torch.dtype
) -> int:
    if processes == 1:
        return 0
    dtype = word_dtype if chosen.words_travel else region_dtype
    elements = (block.words if chosen.words_travel else block.regions) * depth
    values = processes - 1 + processes - chosen.kept
    gradients = processes * torch.promote_types(dtype, torch.float32).itemsize
    return int(elements * (values * dtype.itemsize + gradients))
