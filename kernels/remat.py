"""What rematerialisation keeps of attention kernels, whose results cost more to compute again than to store."""

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"  # the name by which a jax.checkpoint policy knows them


def kept(tree):
    """The same arrays, marked; None stays None."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)
